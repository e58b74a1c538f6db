"""``python -m scao_hf``: the command line ``scao-hf``."""

from scao_hf.tools import main

if __name__ == "__main__":
    main()
