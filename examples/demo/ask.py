"""Ask the demo's model a question, with the trained adapter and without it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adapter import load


def main() -> int:
    """Load base model and adapter, generate greedily, print both answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="What does `shutil.copytree` do in Python?")
    parser.add_argument("--adapter", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=96, help="longest answer (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        model, tokenizer = load(arguments.adapter)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model.eval()
    chat = [{"role": "user", "content": arguments.question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer() -> str:
        tokens = model.generate(
            **inputs.to(model.device),
            max_new_tokens=arguments.tokens,
            do_sample=False,
            repetition_penalty=1.2,  # so small a model repeats itself without it
            pad_token_id=tokenizer.pad_token_id,
        )
        return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    print(f"# {arguments.question}\n\n## with the adapter\n{answer()}")
    with model.disable_adapter():
        print(f"\n## without it\n{answer()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
