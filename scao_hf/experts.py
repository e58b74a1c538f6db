"""LoRA on stacked experts: where a model keeps it, and how parameter groups carry that.

PEFT adapts a 3-D expert weight with two factors that look like ordinary 2-D LoRA: A, ``[E r, in]``, expert by expert,
and B, ``[out, E r]``, rank by rank. Each expert's own factor is a matrix of its own, with a curvature of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from scao_hf.blocks import Packing, Side, check_packing
from scao_hf.names import listed


def wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module that adapts an expert stack as PEFT's ``ParamWrapper`` does, with its name.

    Known by what it has (``parameter_name``, ``num_experts``, ``lora_A``, ``lora_B``), not by its class or its place:
    the wrappers of one module nest in any order.
    """
    for name, module in model.named_modules():
        if not all(hasattr(module, field) for field in ("parameter_name", "num_experts", "lora_A", "lora_B")):
            continue
        if int(module.num_experts) > 1:
            yield name, module


def find_experts(model: nn.Module) -> dict[Tensor, Packing]:
    """The trainable packed LoRA factors of a model, all adapters included; empty for a model without them."""
    found: dict[Tensor, Packing] = {}
    for _, wrapper in wrappers(model):
        sides: tuple[tuple[Side, Any], ...] = (("A", wrapper.lora_A), ("B", wrapper.lora_B))
        for side, factors in sides:
            for factor in factors.values():
                if factor.weight.requires_grad:
                    found[factor.weight] = Packing(side, int(wrapper.num_experts))
    return found


def find_vocabulary(model: nn.Module) -> set[Tensor]:
    """The weights of a model's embeddings and of its heads, whose rows belong to the words of a vocabulary.

    A row has a gradient where its word occurs, so that directions of the whole matrix mean little: AdamW is the better
    rule. Heads are what ``get_output_embeddings`` returns, and linear layers whose name ends in ``head``.
    """
    found = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        or (isinstance(module, nn.Linear) and name.rpartition(".")[2].endswith("head"))
    }
    head = getattr(getattr(model, "get_output_embeddings", lambda: None)(), "weight", None)
    return found | ({head} if isinstance(head, Tensor) else set())


def packing_of(group: Mapping[str, Any]) -> Packing | None:
    """How the parameters of a group are packed; None for ordinary ones."""
    count = group.get("expert_count")
    return None if count is None else Packing(group["expert_side"], count)


def split_group(
    group: dict[str, Any], experts: Mapping[Tensor, Packing], vocabulary: Collection[Tensor] = ()
) -> list[dict[str, Any]]:
    """A parameter group as groups of one kind each: ordinary parameters, embeddings and heads, every kind of packing.

    The kind is kept in the group, as numbers and strings: attributes of tensors are lost when these are sharded or
    copied, and groups are what a checkpoint keeps.

    Args:
        group: as for ``torch.optim.Optimizer.add_param_group``, with parameters or ``(name, parameter)`` pairs.
        experts: what ``find_experts`` returns.
        vocabulary: what ``find_vocabulary`` returns.

    Raises:
        ValueError: a parameter cannot hold so many experts.
    """
    params = group["params"]
    if isinstance(params, set) or not (experts or vocabulary):
        return [group]  # torch has its own words for a set
    params = listed(params)
    words = set(vocabulary)
    kinds: dict[tuple[tuple[str, Any], ...], list[Any]] = {(): []}
    for entry in params:
        param = entry[1] if isinstance(entry, tuple) else entry
        packing = experts.get(param)
        if packing:
            check_packing(param, packing)
            kind: dict[str, Any] = {"expert_side": packing.side, "expert_count": packing.experts}
        else:
            kind = {"vocabulary": True} if param in words else {}
        kinds.setdefault(tuple(kind.items()), []).append(entry)
    split = [{**group, "params": members, **dict(kind)} for kind, members in kinds.items() if members]
    return split or [{**group, "params": params}]
