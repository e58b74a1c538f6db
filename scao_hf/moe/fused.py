"""A fused forward for PEFT's LoRA on stacked experts: opt-in, on the outermost wrapper of each expert module."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from scao_hf.blocks import Packing, unpack
from scao_hf.experts import wrappers
from scao_hf.moe.grouped import GroupedLoRA, Routing, Stacked, Weights, has_grouped_product, route
from scao_hf.moe.nf4 import quantized

#: What transformers' decorator for expert modules leaves on them, and the fused forward reads.
EXPERT_FIELDS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")


def fuse_moe_lora(model: nn.Module) -> list[str]:
    """Compute LoRA on stacked experts next to the experts' products, not by adding ``B A`` to every weight first.

    The parameters, what PEFT saves, merging and disabling adapters stay PEFT's own; the results are those of
    transformers' eager experts to rounding. The setting of ``experts_implementation`` has no part in them any more.

    Args:
        model: a PEFT model whose ``target_parameters`` (or ``target_modules``, which PEFT translates) are the stacked
            weights of transformers' expert modules, in full precision or in 4 bit (``quantize_experts``).

    Returns:
        The names of the fused modules, all of them.

    Raises:
        ValueError: there is no LoRA on stacked experts, or an expert module that the fused forward does not know; no
            module is changed then.
    """
    found = _outermost(model)
    if not found:
        raise ValueError(
            "the model has no LoRA on stacked experts: name their parameters in the LoraConfig, for example "
            "target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'], before the call"
        )
    problems = [f"{name}: {why}" for name, wrapper in found if (why := _unsupported(wrapper))]
    if problems:
        raise ValueError("\n".join(["these expert modules cannot be fused:", *(f"  - {p}" for p in problems)]))
    for _, outermost in found:
        outermost.forward = types.MethodType(_fused_forward, outermost)
        for wrapper in _chain(outermost)[0].values():
            wrapper.merge = types.MethodType(_guarded_merge, wrapper)
    return [name for name, _ in found]


def unfuse_moe_lora(model: nn.Module) -> list[str]:
    """Undo ``fuse_moe_lora``; the names of the modules that have PEFT's forward again."""
    names = []
    for name, wrapper in wrappers(model):
        if "forward" in vars(wrapper):
            names.append(name)
        for method in ("forward", "merge"):
            vars(wrapper).pop(method, None)
    return names


def _chain(wrapper: Any) -> tuple[dict[str, Any], Any]:
    """The wrappers of one expert module by the parameter that each adapts, and the module itself."""
    chain = {}
    while hasattr(wrapper, "parameter_name"):
        chain[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    return chain, wrapper


def _outermost(model: nn.Module) -> list[tuple[str, Any]]:
    inside = {id(wrapper.base_layer) for _, wrapper in wrappers(model)}
    return [(name, wrapper) for name, wrapper in wrappers(model) if id(wrapper) not in inside]


def _projections(experts: Any) -> tuple[str, str]:
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def _unsupported(wrapper: Any) -> str | None:
    """Why the experts behind a wrapper cannot be fused, None if they can."""
    chain, experts = _chain(wrapper)
    kind = type(experts).__name__
    missing = [field for field in EXPERT_FIELDS if not hasattr(experts, field)]
    if missing:
        return f"{kind} has no {', '.join(missing)}, so it is none of transformers' exchangeable expert modules"
    strangers = set(chain) - set(_projections(experts))
    if strangers:
        return f"LoRA on {', '.join(sorted(strangers))} of {kind} is neither of {', '.join(_projections(experts))}"
    for name in _projections(experts):
        if quantized(experts, name):
            continue
        weight = getattr(experts, name, None)
        if not isinstance(weight, Tensor) or weight.ndim != 3 or not weight.is_floating_point() or weight.itemsize < 2:
            return f"{kind}.{name} is not a stack of floating-point matrices of 16 bits or more, or of 4-bit ones"
        if weight.requires_grad:
            return f"{kind}.{name} is trained itself, and the fused forward holds it frozen: freeze it"
    for inner in chain.values():
        if any(inner.lora_bias.values()):
            return "LoRA with a bias"
    return None


def _guarded_merge(self: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of ``ParamWrapper.merge``, which would add ``B A`` to a decoded copy of 4-bit weights and drop it."""
    if quantized(self.get_base_layer(), self.parameter_name):
        raise RuntimeError(
            f"{self.parameter_name} is in 4 bit, where an adapter cannot be merged: call "
            "scao_hf.moe.dequantize_experts(model) first, or merge into the model as it was before it was quantised"
        )
    type(self).merge(self, *args, **kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _fused_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of ``ParamWrapper.forward``; arguments and result as the expert module's own forward has them."""
    chain, experts = _chain(self)
    if any(wrapper.disable_adapters or wrapper.merged for wrapper in chain.values()):
        # There is nothing to fuse: the experts run as they are.
        result: Tensor = type(self).forward(self, x, *args, **kwargs)
        return result
    self._check_forward_args(x, *args, **kwargs)
    bound = inspect.signature(type(experts).forward).bind(experts, x, *args, **kwargs)
    _, hidden, choices, shares = bound.arguments.values()
    device, k = hidden.device, choices.shape[-1]
    first, second = _projections(experts)
    with torch.no_grad():
        routing = route(choices, experts.num_experts)
    rows = hidden.index_select(0, routing.order // k)
    rows = _linear(chain, experts, first, rows, routing)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _linear(chain, experts, second, rows, routing)
    rows = rows * shares.reshape(-1, 1).index_select(0, routing.order)
    # Each token's k results side by side, so that they are summed in a fixed order.
    flat = torch.zeros(choices.numel(), rows.shape[-1], dtype=rows.dtype, device=device)
    return flat.index_copy(0, routing.order, rows).view(*choices.shape, rows.shape[-1]).sum(1).to(hidden.dtype)


def _linear(chain: dict[str, Any], experts: Any, name: str, rows: Tensor, routing: Routing) -> Tensor:
    """One projection of the experts, with its adapters and bias."""
    four_bit = quantized(experts, name)
    weights: Weights = four_bit or Stacked(getattr(experts, name), experts.is_transposed)
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        rows = rows.to(torch.get_autocast_dtype(kind))
    factors: list[Tensor] = []
    scalings: list[float] = []
    for wrapper in [chain[name]] if name in chain else []:
        for adapter in (adapter for adapter in wrapper.active_adapters if adapter in wrapper.lora_A):
            factors.append(unpack(wrapper.lora_A[adapter].weight, Packing("A", experts.num_experts)).to(rows.dtype))
            # Transposed as one matrix, here and in the backward pass: a permutation of three sides takes five times as long.
            whole = wrapper.lora_B[adapter].weight.to(rows.dtype).t().contiguous()
            factors.append(unpack(whole.t(), Packing("B", experts.num_experts)).mT)
            scalings.append(wrapper.scaling[adapter])
    grouped = has_grouped_product(rows, weights, factors)
    with torch.autocast(kind, enabled=False):
        out: Tensor = GroupedLoRA.apply(  # type: ignore[no-untyped-call]
            rows, weights, routing, scalings, grouped, *factors
        )
    if experts.has_bias:
        numbers = torch.bucketize(torch.arange(len(rows), device=rows.device), routing.ends, right=True)
        out = out + getattr(experts, f"{name}_bias").index_select(0, numbers).to(out.dtype)
    return out
