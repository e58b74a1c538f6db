"""Silence what the libraries say about accelerators and networks that a CPU demo does without."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Call before torch, transformers or bitsandbytes is imported. Errors are still shown."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module="bitsandbytes")
    # CUDA extensions that do not load, enums that torch.compile has learned to read, a fused kernel on the hub.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
