"""The benchmark tasks. A task owns a model, resets it from a seed, and gives training and held-out losses.

- ``qlora``: a pretrained model of ``QLORA`` in NF4, LoRA on all seven linear targets, instruction rows.
- ``full``: SmolLM2-135M-Instruct without rounding to NF4, every weight of it.
- ``tiny``: the first on a one-million-parameter Qwen2-style model that is pretrained here, once.
- ``gpt``: a GPT of 837,888 parameters, or of another size of ``models.GPT_SIZES``, from scratch on the bytes of a text.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from typing import Any

import data
import packed
import torch
import torch.nn.functional as F
from models import GPT, GPT_SIZES, TARGETS, cached, device, prepare_gemma3, prepare_smollm2, prepare_tiny
from torch import Tensor, nn

#: The model of ``qlora`` unless another is named. Its runs were recorded before there were others, and do not name it.
USUAL_MODEL = "smollm2-135m"
#: The models of ``qlora``: what each is called in a table, and what prepares it.
QLORA = {
    USUAL_MODEL: ("SmolLM2-135M-Instruct", prepare_smollm2),
    "gemma3-270m": ("Gemma 3 270M (Q4_K_M)", prepare_gemma3),
}
EVAL_ROWS = 64
EVAL_WINDOWS = 64


class Task:
    """A model and its data. Subclasses define ``reset``, ``loss`` and ``evaluate``."""

    model: nn.Module
    definition: dict[str, Any]  # all that identifies the task in a result file
    steps_available: int

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that an optimizer gets, with their names."""
        return [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]

    def reset(self, seed: int) -> None:
        """Give the trainable parameters their initial values and the data their order, both from the seed."""
        raise NotImplementedError

    def loss(self, step: int) -> Tensor:
        """The training loss of a step's batch."""
        raise NotImplementedError

    def evaluate(self) -> float:
        """The mean loss per token on the held-out data."""
        raise NotImplementedError

    def exact_match(self) -> float | None:
        """The share of held-out answers that are right in full; None where there are no answers."""
        return None

    def untrained(self) -> float:
        """The held-out loss before the first step, of seed 0; a run that ends above it has diverged."""
        if self._untrained is None:
            self.reset(0)
            self._untrained = self.evaluate()
        return self._untrained

    _untrained: float | None = None


class RowsTask(Task):
    """A causal model on instruction rows; the loss covers the answers only. Subclasses say what is trained."""

    body: Any
    head: Any
    bf16: bool
    packed: bool

    def __init__(
        self, rows: list[data.Tokens], batch: int, length: int, definition: dict[str, Any], eval_rows: int = EVAL_ROWS
    ) -> None:
        train, held_out = data.split_rows(rows)
        self.train = [row for row in train if sum(map(len, row)) <= length]
        held_out = [row for row in held_out if sum(map(len, row)) <= length][:eval_rows]
        self.held_out = sorted(held_out, key=lambda row: sum(map(len, row)))
        self.batch = batch
        self.steps_available = len(data.batch_order(self.train, batch, seed=0))
        if not self.held_out:
            raise ValueError(f"no held-out row has at most {length} tokens: raise --max-tokens")
        self.definition = {
            **definition,
            "batch": batch,
            "max_tokens": length,
            "held_out": f"{data.HELD_OUT_ROWS}; of these the first {len(self.held_out)} of at most {length} tokens",
        }

    def reset(self, seed: int) -> None:
        self.order = data.batch_order(self.train, self.batch, seed)

    def loss(self, step: int) -> Tensor:
        total, count = self._summed([self.train[row] for row in self.order[step]])
        return total / count

    @torch.no_grad()
    def evaluate(self) -> float:
        parts = [self._summed(self.held_out[at : at + 4]) for at in range(0, len(self.held_out), 4)]
        return float(sum(total for total, _ in parts)) / sum(count for _, count in parts)

    @torch.no_grad()
    def exact_match(self) -> float:
        """The share of held-out answers that greedy decoding gives in full, end token included."""
        right = 0
        for at in range(0, len(self.held_out), 4):
            rows = self.held_out[at : at + 4]
            hidden, labels = self._learned(rows)
            with torch.autocast(device().type, torch.bfloat16, enabled=self.bf16):
                found = self.head(hidden).argmax(-1) == labels
            right += sum(bool(part.all()) for part in found.split([len(answer) for _, answer in rows]))
        return right / len(self.held_out)

    def _summed(self, rows: list[data.Tokens]) -> tuple[Tensor, int]:
        hidden, labels = self._learned(rows)
        if self.packed:
            return packed.summed_loss(hidden, self.head.weight, labels), len(labels)
        with torch.autocast(device().type, torch.bfloat16, enabled=self.bf16):
            logits = self.head(hidden)
        return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)

    def _learned(self, rows: list[data.Tokens]) -> tuple[Tensor, Tensor]:
        """The last hidden states where a token of an answer is predicted, and these tokens, row after row."""
        if self.packed:
            dtype = torch.bfloat16 if self.bf16 else None
            hidden = packed.hidden(self.body, [torch.tensor(prompt + answer) for prompt, answer in rows], dtype)
            labels = torch.tensor(
                [label for prompt, answer in rows for label in [-100] * (len(prompt) - 1) + answer + [-100]]
            )
        else:
            width = max(sum(map(len, row)) for row in rows)
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            labels = torch.full((len(rows), width), -100)
            for at, (prompt, answer) in enumerate(rows):
                whole = torch.tensor(prompt + answer)
                tokens[at, : len(whole)] = whole
                labels[at, len(prompt) - 1 : len(whole) - 1] = whole[len(prompt) :]
            tokens, labels = tokens.to(device()), labels.to(device())
            with torch.autocast(device().type, torch.bfloat16, enabled=self.bf16):
                # Padding is on the right, so that the causal mask alone keeps it out.
                hidden = self.body(input_ids=tokens, use_cache=False).last_hidden_state
        learned = labels != -100
        return hidden[learned], labels[learned]


class LoraTask(RowsTask):
    """LoRA on a frozen causal model."""

    def __init__(
        self,
        base: nn.Module,
        rows: list[data.Tokens],
        rank: int,
        batch: int,
        length: int,
        definition: dict[str, Any],
        targets: Sequence[str] = TARGETS,
        eval_rows: int = EVAL_ROWS,
    ) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__(rows, batch, length, {**definition, "rank": rank, "alpha": 2 * rank}, eval_rows)
        self.bf16 = next(base.parameters()).dtype == torch.bfloat16
        self.packed = device().type == "cpu" and packed.supports(base, targets)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config).to(device())
        self.body, self.head = base.model, base.lm_head
        names = {name.split(".")[-1] for name, _ in base.named_modules()}
        if not names.issuperset(targets):
            raise ValueError(f"the model lacks {sorted(set(targets) - names)}")

    def reset(self, seed: int) -> None:
        super().reset(seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        for name, param in self.trainable():
            if "lora_B" in name:
                nn.init.zeros_(param.data)
            else:
                bound = 1 / math.sqrt(param.shape[1])  # PEFT's own initialisation, from the seed
                param.data.copy_(torch.empty(param.shape).uniform_(-bound, bound, generator=generator))


class FullTask(RowsTask):
    """Every weight of a causal model, in float32; products in bfloat16."""

    def __init__(
        self,
        base: nn.Module,
        rows: list[data.Tokens],
        batch: int,
        length: int,
        definition: dict[str, Any],
        eval_rows: int = EVAL_ROWS,
    ) -> None:
        super().__init__(rows, batch, length, definition, eval_rows)
        self.model = base.float().to(device())
        self.body, self.head = base.model, base.lm_head
        self.bf16, self.packed = True, device().type == "cpu" and packed.supports(base, TARGETS)
        self.initial = [param.detach().clone() for _, param in self.trainable()]

    def reset(self, seed: int) -> None:
        super().reset(seed)
        for (_, param), initial in zip(self.trainable(), self.initial, strict=True):
            param.data.copy_(initial)


class GptTask(Task):
    """A GPT from scratch on the bytes of a text; exp of its loss is the perplexity per byte."""

    def __init__(self, source: data.Source, batch: int = 16, context: int | None = None, size: str = "838k") -> None:
        layers, width, heads, usual_context = GPT_SIZES[size]
        context = context or usual_context
        text = torch.tensor(list(source.text.encode()), dtype=torch.long)
        held_out = len(text) // 10
        self.text, tail = text[:-held_out], text[-held_out:]
        windows = min(EVAL_WINDOWS, (len(tail) - 1) // context)
        if windows < 1:
            raise ValueError(f"{source.name} has {len(text)} bytes: at least {10 * (context + 1)} are needed")
        self.tail = torch.stack([tail[at * context : at * context + context + 1] for at in range(windows)])
        self.model = GPT(layers, width, heads, context).to(device())
        self.batch, self.context, self.steps_available = batch, context, sys.maxsize
        self.definition = {
            "model": f"GPT, {layers} layers, width {width}, {heads} heads, bytes",
            # Runs of the first size were recorded before there were others.
            **({} if size == "838k" else {"size": size}),
            "batch": batch,
            "max_tokens": context,
            "held_out": f"{data.HELD_OUT_TEXT}; of it the first {windows} windows",
        }

    def reset(self, seed: int) -> None:
        self.model.initialise(torch.Generator().manual_seed(1000 + seed))
        self.seed = seed

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.text) - self.context, (self.batch,), generator=generator)
        return self._mean(torch.stack([self.text[at : at + self.context + 1] for at in starts.tolist()]))

    @torch.no_grad()
    def evaluate(self) -> float:
        return sum(float(self._mean(part)) * len(part) for part in self.tail.split(16)) / len(self.tail)

    def _mean(self, windows: Tensor) -> Tensor:
        windows = windows.to(device())
        return F.cross_entropy(self.model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def build(
    name: str,
    source: data.Source,
    rank: int,
    batch: int,
    length: int | None = None,
    size: str = "838k",
    eval_rows: int = EVAL_ROWS,
    model_name: str = USUAL_MODEL,
) -> Task:
    """Make a task.

    Args:
        name: ``qlora``, ``full``, ``tiny`` or ``gpt``.
        source: its data; all but ``gpt`` need rows.
        rank: of the LoRA factors (``qlora`` and ``tiny``).
        batch: rows or windows per step.
        length: tokens of the longest row that is used (None: 128), or of a window (None: what the size has).
        size: of the GPT, one of ``models.GPT_SIZES``.
        eval_rows: held-out rows that the loss is taken on (not used by ``gpt``).
        model_name: of ``qlora``, one of ``QLORA``.

    Raises:
        ValueError: an unknown name, or data that does not fit.
    """
    if model_name != USUAL_MODEL and name != "qlora":
        raise ValueError(f"--model {model_name} is for --task qlora; {name} has a model of its own")
    identity = {"task": name, "data": source.name, "data_sha256": source.fingerprint}
    if name == "gpt":
        task: Task = GptTask(source, batch, length, size)
        task.definition = {**identity, **task.definition}
        return task
    if name not in ("qlora", "full", "tiny"):
        raise ValueError(f"--task {name!r} must be qlora, full, tiny or gpt")
    if not source.rows:
        raise ValueError(f"--task {name} needs question/answer rows (.jsonl or a hub name), not plain text")
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    if name == "qlora":
        called, prepare = QLORA[model_name]
        folder = cached(f"{model_name}-nf4", prepare)
        identity["model"] = f"{called}, NF4 dequantised once to bfloat16"
        identity |= {} if model_name == USUAL_MODEL else {"base": model_name}
    elif name == "full":
        folder = cached("smollm2-135m", lambda path: prepare_smollm2(path, four_bit=False))
        identity["model"] = "SmolLM2-135M-Instruct, every weight, float32"
    else:
        folder = cached(f"tiny-qwen2-{source.fingerprint}", lambda path: prepare_tiny(path, source))
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
        identity["model"] = f"Qwen2-style, 5 layers, width 128, pretrained here ({weights})"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    model.config.use_cache = False
    end = model.config.eos_token_id
    start = tokenizer.encode("").ids  # a begin-of-text token where the model was trained with one
    rows = data.encode(source.rows, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, end, start)
    if name == "full":
        return FullTask(model, rows, batch, length or 128, identity, eval_rows)
    return LoraTask(model, rows, rank, batch, length or 128, identity, eval_rows=eval_rows)
