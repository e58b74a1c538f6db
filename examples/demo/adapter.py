"""Load a trained adapter on its 4-bit base model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from quiet import quiet

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the demo's base model and adapter are local folders


def load(adapter: Path) -> tuple[Any, Any]:
    """Model and tokenizer of an adapter.

    Args:
        adapter: the folder that the training wrote.

    Raises:
        FileNotFoundError: the adapter or its base model is missing; the message says what makes it.
    """
    config = adapter / "adapter_config.json"
    if not (config.is_file() and (adapter / "adapter_model.safetensors").is_file()):
        raise FileNotFoundError(f"{adapter} holds no adapter; `make demo` trains one into runs/demo")
    base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if base.startswith((".", "/")) and not Path(base).is_dir():
        raise FileNotFoundError(f"the adapter's base model {base} is missing here; run this in the repository's root")
    quiet()
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32, quantization_config=quantization)
    return model, AutoTokenizer.from_pretrained(adapter)
