"""Peak memory of a training step and of the optimizer's: they run on the meta device, and every storage is counted."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scao_hf.optimizer import SCAO
from scao_hf.rules import create
from scao_hf.rules.base import Step
from scao_hf.rules.low_bit import decoded
from scao_hf.stacks import build_buckets

#: Relative error to plan with. tests/test_tools.py holds the estimate to half of it against the CPU allocator's peak;
#: the rest is for what a GPU's kernels and its allocator do otherwise.
STATED_ERROR = 0.10


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak.

    Args:
        known: tensors that are there already and are not to be counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._leave, key, storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def restart(self) -> int:
        """The peak since the last call; the next one counts from here."""
        peak, self.peak = self.peak, self.live
        return peak


class _Everywhere(Meter):
    """Copies to the host are made on the device instead, and count there: the meta device has no numbers to copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and "device" in kwargs and args and isinstance(args[0], Tensor):
            kwargs = {**kwargs, "device": args[0].device}
        return super().__torch_dispatch__(func, types, args, kwargs)


@torch.no_grad()
def optimizer_peak(optimizer: SCAO) -> int:
    """Bytes that a step of SCAO takes at most besides the state that it finds: temporary tensors, and new state.

    The first step, the one that enters phase 2, the next one, and the one with most refreshes are taken without numbers.

    Args:
        optimizer: of parameters with gradients, on the meta device; its state is neither read nor changed.
    """
    peaks = [0]
    for bucket in build_buckets(optimizer.param_groups, {}, lambda param: param.grad is not None):
        start, steps = bucket.phase1_steps, {1}
        if bucket.matrix:
            cycle = range(start + 1, start + 1 + bucket.group["precond_freq"])
            due = {number: bucket.due(number) for number in cycle}
            most = max(cycle, key=lambda number: due[number].stop - due[number].start)
            steps |= {max(1, start), start + 1, most, bucket.group["precond_freq"]}
        for number in steps:
            bucket.step = number - 1
            bucket.state = create(bucket, torch.device("meta"))
            members = [member.param for member in bucket.members]
            grads = [param.grad for param in members if param.grad is not None]
            kept = nullcontext(bucket.state) if bucket.group["moment_dtype"] == "float32" else decoded(bucket)
            with _Everywhere([*members, *grads, *bucket.state.values()]) as meter, kept as state:
                bucket.rule.step(Step(bucket, state, number, bucket.due(number)))
            peaks.append(meter.peak)
    return max(peaks)


class _Frozen4bit(torch.autograd.Function):
    """bitsandbytes' 4-bit product: the weight is decoded for the product and again for the gradient, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int) -> Tensor:
        ctx.sides = (out_features, x.shape[-1])
        return x @ x.new_empty(ctx.sides).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ grads[0].new_empty(ctx.sides), None


class _Frozen8bit(_Frozen4bit):
    """bitsandbytes' int8 product: the input is quantised for it and kept, the weight is decoded for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int) -> Tensor:
        ctx.sides = (out_features, x.shape[-1])
        ctx.kept = x  # as bitsandbytes has it, out of sight of checkpointing, which does not let go of it
        codes = x.to(torch.float16).to(torch.int8)
        products = codes.new_empty((*x.shape[:-1], out_features), dtype=torch.int32)
        return products.to(torch.float16).to(x.dtype)


#: How a frozen weight of so many bits is multiplied.
_FROZEN = {4: _Frozen4bit, 8: _Frozen8bit}


class AutocastLinear(nn.Module):
    """A linear layer as it acts under autocast: quantised or plain, with or without LoRA.

    Args:
        base: the layer; only its shapes, bias and weight are used.
        bits: in which the weight is held: 4, 8 or 16.
        lora: the factors A ``[r, in]`` and B ``[out, r]`` in float32, or None.
        dropout: LoRA dropout.
        dtype: of the products.
    """

    def __init__(
        self, base: nn.Linear, bits: int, lora: tuple[Tensor, Tensor] | None, dropout: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.bits, self.dropout = base.out_features, bits, dropout
        self.weight, self.bias = base.weight, base.bias
        self.lora = None if lora is None else nn.ParameterList(lora)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        given, asked, x = x, x.dtype, x.to(self.dtype)
        if frozen := _FROZEN.get(self.bits):
            # Autocast leaves the input of int8 products as it is.
            out = frozen.apply(given if self.bits == 8 else x, self.out_features)  # type: ignore[no-untyped-call]
            out = (out if self.bias is None else out + self.bias.to(self.dtype)).to(asked)
        else:
            bias = None if self.bias is None else self.bias.to(self.dtype)
            out = nn.functional.linear(x, self.weight.to(self.dtype), bias)
        if self.lora is not None:
            down, up = (factor.to(self.dtype) for factor in self.lora)
            inner = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
            out = out.clone() if frozen else out
            out = out + nn.functional.linear(nn.functional.linear(inner, down), up) * 2.0
        return out  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    """Fused attention: keeps its inputs, its output and one float32 number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query[..., : value.shape[-1]])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dtype: torch.dtype = torch.bfloat16,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; keys and values are repeated for their groups, as sdpa does on old cards."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
    inputs = (tensor.to(dtype) for tensor in (query, key, value))  # as autocast has it
    out = _Attention.apply(*inputs)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


class Peaks(NamedTuple):
    """Bytes of a step besides weights, gradients and optimizer state.

    Attributes:
        kept: what the forward pass keeps for the backward pass, up to the output layer.
        head: what logits and loss add to that at their peak.
        layer: what the backward pass through the layers adds to it at its peak; ``head`` is gone by then.
    """

    kept: int
    head: int
    layer: int

    @property
    def peak(self) -> int:
        return self.kept + max(self.head, self.layer)


def set_checkpointing(model: Any, enabled: bool, reentrant: bool = False) -> None:
    """Turn gradient checkpointing of a transformers model on or off, under the name that its release has for it."""
    names = ("activation_checkpointing", "gradient_checkpointing")  # the latter is deprecated since transformers 5.2x
    name = next(name for name in names if hasattr(model, f"{name}_enable"))
    if enabled:
        # The state of a random generator is not counted, and the meta device has none.
        getattr(model, f"{name}_enable")({"use_reentrant": reentrant, "preserve_rng_state": False})
    else:
        getattr(model, f"{name}_disable")()


class _Gather(torch.autograd.Function):
    """``gather`` along the last dimension; in a dispatch mode torch's own gradient takes twice the memory that it has else."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.shape = values.shape
        ctx.save_for_backward(index)
        return values.gather(-1, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.shape).scatter_add_(-1, index, grads[0]), None


def _preference_loss(model: Any, tokens: Tensor, reference: bool) -> Tensor:
    """DPO as TRL has it; the reference, the same model without LoRA or a copy of it, takes as much for its pass."""

    def log_probabilities() -> tuple[Tensor, Tensor]:
        logits = model(input_ids=tokens, use_cache=False).logits.float()[:, :-1]  # Accelerate returns 32 bits
        chosen = _Gather.apply(logits, tokens[:, 1:, None])  # type: ignore[no-untyped-call]
        whole = torch.stack([torch.logsumexp(row, -1) for row in logits])
        return logits, (chosen - whole[..., None]).sum((1, 2))

    logits, policy = log_probabilities()
    with torch.no_grad():
        # Both pairs of logits are there until the loss is.
        held = log_probabilities() if reference else (logits, policy)
        rows = logits.reshape(-1, logits.shape[-1])  # the entropy for the log: a copy, and some rows at a time
        shares = rows[:128].log_softmax(-1)
        (shares.exp() * shares).sum(-1)
    return -nn.functional.logsigmoid(policy - held[1]).mean()


def step_peaks(
    model: Any,
    sequences: int,
    sequence: int,
    checkpointing: bool,
    *,
    objective: str = "sft",
    reference: bool = False,
    reentrant: bool = False,
) -> Peaks:
    """Run one forward and backward pass of a language model and follow its memory.

    Args:
        model: on the meta device (or a real one, for tests), in training mode, its linear layers as in training.
        sequences: how many go through the model at once.
        sequence: tokens in a sequence.
        checkpointing: recompute each layer in the backward pass.
        objective: "sft", or a preference.
        reference: a preference with a pass through the reference model.
        reentrant: the older kind of checkpointing.

    Returns:
        Peaks; gradients of parameters are not in them.
    """
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.zeros_like(param)  # between micro-batches they are there throughout
    device = next(model.parameters()).device
    tokens = torch.zeros(sequences, sequence, dtype=torch.long, device=device)
    set_checkpointing(model, checkpointing, reentrant)
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None), tokens]
    meter = Meter(known)
    marks: dict[str, int] = {}

    def before_head(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if "kept" in marks:
            return  # the reference's pass
        marks["kept"], marks["forward"] = meter.live, meter.restart()

        def after_head(grad: Tensor) -> Tensor:
            marks["head"] = meter.restart()
            return grad

        inputs[0].register_hook(after_head)

    handle = model.get_output_embeddings().register_forward_pre_hook(before_head)
    inputs = model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    try:
        with meter:
            if objective == "sft":
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                loss = _preference_loss(model, tokens, reference)
            loss.backward()
    finally:
        handle.remove()
        inputs.remove()
    kept = marks["kept"]
    return Peaks(kept, marks["head"] - kept, max(meter.peak, marks["forward"]) - kept)
