"""Shapes of common model families, for planning without a network. Data: a row is what ``config.json`` says."""

from __future__ import annotations

import re
from typing import Any

_COLUMNS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "tie_word_embeddings"),
)

#: name -> (model_type, parameters, the columns above). ``parameters`` is the published count; tests hold the row to it.
SHAPES: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "Qwen2.5-0.5B": ("qwen2", 494_032_768, (896, 4864, 24, 14, 2, 64, 151936, True)),
    "Qwen2.5-1.5B": ("qwen2", 1_543_714_304, (1536, 8960, 28, 12, 2, 128, 151936, True)),
    "Qwen2.5-3B": ("qwen2", 3_085_938_688, (2048, 11008, 36, 16, 2, 128, 151936, True)),
    "Qwen2.5-7B": ("qwen2", 7_615_616_512, (3584, 18944, 28, 28, 4, 128, 152064, False)),
    "Qwen3-0.6B": ("qwen3", 596_049_920, (1024, 3072, 28, 16, 8, 128, 151936, True)),
    "Qwen3-1.7B": ("qwen3", 1_720_574_976, (2048, 6144, 28, 16, 8, 128, 151936, True)),
    "Qwen3-4B": ("qwen3", 4_022_468_096, (2560, 9728, 36, 32, 8, 128, 151936, True)),
    "Qwen3-8B": ("qwen3", 8_190_735_360, (4096, 12288, 36, 32, 8, 128, 151936, False)),
    "Llama-3.2-1B": ("llama", 1_235_814_400, (2048, 8192, 16, 32, 8, 64, 128256, True)),
    "Llama-3.2-3B": ("llama", 3_212_749_824, (3072, 8192, 28, 24, 8, 128, 128256, True)),
    "Llama-3.1-8B": ("llama", 8_030_261_248, (4096, 14336, 32, 32, 8, 128, 128256, False)),
    "Llama-3-8B": ("llama", 8_030_261_248, (4096, 14336, 32, 32, 8, 128, 128256, False)),
    "TinyLlama-1.1B": ("llama", 1_100_048_384, (2048, 5632, 22, 32, 4, 64, 32000, False)),
    "Mistral-7B-v0.1": ("mistral", 7_241_732_096, (4096, 14336, 32, 32, 8, 128, 32000, False)),
    "Mistral-7B-v0.3": ("mistral", 7_248_023_552, (4096, 14336, 32, 32, 8, 128, 32768, False)),
    "SmolLM2-135M": ("llama", 134_515_008, (576, 1536, 30, 9, 3, 64, 49152, True)),
    "SmolLM2-360M": ("llama", 361_821_120, (960, 2560, 32, 15, 5, 64, 49152, True)),
    "SmolLM2-1.7B": ("llama", 1_711_376_384, (2048, 8192, 24, 32, 32, 64, 49152, True)),
    "Gemma-2-2B": ("gemma2", 2_614_341_888, (2304, 9216, 26, 8, 4, 256, 256000, True)),
    "Phi-3-mini": ("phi3", 3_821_079_552, (3072, 8192, 32, 32, 32, 96, 32064, False)),
}

#: What publishers append to a name without changing a shape, and other spellings of the same model.
_SUFFIX = re.compile(r"(-(instruct|it|base|chat|hf|unsloth|bnb|4bit|4k|128k|intermediate-step-.*|chat-v[\d.]+))+$")
_SPELLINGS = (("meta-llama-", "llama-"), ("mistral-7b-instruct-", "mistral-7b-"))


def builtin(model: str) -> tuple[str, dict[str, Any]] | None:
    """The (model_type, config fields) of a model that is listed here, or None.

    Args:
        model: a hub name; publisher, letter case and endings such as ``-Instruct`` do not matter.
    """
    name = model.rstrip("/").rpartition("/")[2].lower()
    for spelling, usual in _SPELLINGS:
        name = name.replace(spelling, usual, 1) if name.startswith(spelling) else name
    candidates = (name, _SUFFIX.sub("", name))
    for known, (model_type, _, row) in SHAPES.items():
        if known.lower() in candidates:
            return model_type, dict(zip(_COLUMNS, row, strict=True))
    return None
