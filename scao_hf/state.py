"""The state of an optimizer: building stacked buckets from it, publishing it per parameter, saving and loading it exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scao_hf import ops, options
from scao_hf.buckets import Bucket, Member, arithmetic_dtype, members_of, turns_of
from scao_hf.rules import rule_of

#: Version of the state's layout, kept in every parameter group.
VERSION = 1

State = dict[Tensor, dict[str, Any]]
Groups = list[dict[str, Any]]


def refuse_sharded(param: Tensor) -> None:
    """Raise ``ValueError`` for a parameter that is a shard of a larger one: its curvature would be a shard's too."""
    if type(param).__name__ == "DTensor" or hasattr(param, "ds_id"):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is sharded ({type(param).__name__}): SCAO steps whole matrices. "
            "Train on one device or with DDP instead of FSDP or ZeRO"
        )


def build_buckets(groups: Groups, state: State, include: Callable[[Tensor], bool]) -> list[Bucket]:
    """Group the blocks of the included parameters by shape, dtype, device, age and parameter group.

    Existing state is stacked (without a copy where it already is), missing state is created and entered in ``state``.

    Raises:
        RuntimeError: a sparse gradient.
    """
    buckets: dict[tuple[Any, ...], Bucket] = {}
    for index, group in enumerate(groups):
        turns, cycle = turns_of(entry for param in group["params"] for entry in _members(param, group))
        for param in group["params"]:
            if not include(param):
                continue
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"SCAO does not support sparse gradients (parameter of shape {tuple(param.shape)}): use "
                    "torch.optim.SparseAdam for it, or an embedding with sparse=False"
                )
            refuse_sharded(param)
            step = state[param]["step"] if param in state else 0
            dtype = arithmetic_dtype(param)
            for shape, member in _members(param, group):
                key = (index, shape, dtype, param.dtype, param.device, step, member.block is None)
                bucket = buckets.setdefault(key, Bucket(group, shape, step, dtype, cycle=cycle))
                bucket.members.append(member)
                bucket.turns.append(turns.get((id(param), member.suffix), 0))
    for bucket in buckets.values():
        bucket.native = ops.supports([member.param for member in bucket.members], bucket.shape, bucket.matrix)
        bucket.state = _stacked(bucket, state) if bucket.step else create(bucket, bucket.members[0].param.device)
    # The old entries go only when every block has been read: the blocks of one parameter may lie in several buckets.
    for bucket in buckets.values():
        for member in bucket.members:
            state[member.param] = {}
    for bucket in buckets.values():
        publish(bucket, state)
    return list(buckets.values())


def _members(param: Tensor, group: dict[str, Any]) -> list[tuple[tuple[int, int], Member]]:
    return members_of(param, group["max_precond_dim"], rule_of(group, matrix=True).split_long_side)


def create(bucket: Bucket, device: torch.device) -> dict[str, Tensor]:
    """Zeroed stacked state of a bucket of its age on ``device``; ``taken`` counts the finite gradients of each member."""
    rule = rule_of(bucket.group, bucket.matrix)
    size = len(bucket.members)
    taken = torch.zeros(size, dtype=bucket.dtype, device=device)
    return {"taken": taken, **rule.create(size, bucket.shape, bucket.dtype, device, bucket.group, bucket.step)}


def _stacked(bucket: Bucket, state: State) -> dict[str, Tensor]:
    first, suffix, _ = bucket.members[0]
    names = [key.removesuffix(suffix) for key in state[first] if key != "step" and key.endswith(suffix)]
    stacks = {}
    for name in names:
        pieces = [state[param][name + suffix] for param, suffix, _ in bucket.members]
        base = pieces[0]._base
        in_place = (
            base is not None
            and base.shape == (len(pieces), *pieces[0].shape)
            and all(piece.data_ptr() == base[index].data_ptr() for index, piece in enumerate(pieces))
        )
        stacks[name] = base if in_place and base is not None else torch.stack(pieces)
    return stacks


def publish(bucket: Bucket, state: State) -> None:
    """Enter the step and, where the fields are others than before, views of the stacked tensors for each parameter."""
    first, suffix, _ = bucket.members[0]
    known = {key.removesuffix(suffix) for key in state[first] if key != "step" and key.endswith(suffix)}
    for index, (param, suffix, _) in enumerate(bucket.members):
        entry = state[param]
        entry["step"] = bucket.step
        if known != bucket.state.keys():
            for name in known - bucket.state.keys():
                del entry[name + suffix]
            for name, stack in bucket.state.items():
                entry[name + suffix] = stack[index]


def expected(param: Tensor, group: dict[str, Any], step: int) -> dict[str, Tensor]:
    """The fields of a parameter's state after ``step`` steps as meta tensors, for checks and for counting bytes."""
    fields: dict[str, Tensor] = {}
    for shape, member in _members(param, group):
        bucket = Bucket(group, shape, step, arithmetic_dtype(param), [member])
        for name, stack in create(bucket, torch.device("meta")).items():
            fields[name + member.suffix] = stack[0]
    return fields


def _pairs(state_dict: dict[str, Any], groups: Groups) -> list[tuple[Any, Tensor, dict[str, Any]]]:
    """(saved id, live parameter, saved group) of every parameter."""
    return [
        (key, param, saved)
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
        for key, param in zip(saved["params"], group["params"], strict=True)
    ]


def check_state_dict(state_dict: dict[str, Any], groups: Groups) -> None:
    """Raise ``ValueError`` unless ``state_dict`` fits: SCAO's, this rule's, these shapes, all its fields, all finite."""
    saved_groups = state_dict.get("param_groups")
    if saved_groups is None or "state" not in state_dict:
        raise ValueError(
            f"not an optimizer state: its keys are {sorted(map(str, state_dict))}, not state and param_groups"
        )
    if not all("scao_version" in saved for saved in saved_groups):
        raise ValueError(
            "the saved state was written by another optimizer (its groups have no 'scao_version'): resume with the "
            "optimizer that wrote it, or start SCAO from the weights alone, without the optimizer state"
        )
    saved_sizes = [len(saved["params"]) for saved in saved_groups]
    live_sizes = [len(group["params"]) for group in groups]
    if saved_sizes != live_sizes:
        raise ValueError(f"the saved state has parameter groups of sizes {saved_sizes}, the optimizer has {live_sizes}")
    for saved, group in zip(saved_groups, groups, strict=True):
        if saved["scao_version"] != VERSION:
            raise ValueError(
                f"the saved state has layout version {saved['scao_version']}, this scao_hf reads {VERSION}"
            )
        if saved.get("rule") != group["rule"]:
            raise ValueError(
                f"the saved state belongs to rule={saved.get('rule')!r}, the optimizer has rule={group['rule']!r}"
            )
        options.check_torch_options(float(saved["lr"]), saved["betas"], saved["eps"], saved["weight_decay"])
        options.resolve(
            saved["rule"], {name: saved[name] for name in options.RULE_DEFAULTS[saved["rule"]] if name in saved}
        )
    pairs = _pairs(state_dict, groups)
    strangers = set(state_dict["state"]) - {key for key, _, _ in pairs}
    if strangers:
        raise ValueError(f"the saved state has entries for unknown parameters: {sorted(map(str, strangers))[:5]}")
    for key, param, saved in pairs:
        if key in state_dict["state"]:
            _check_entry(f"parameter {key} of shape {tuple(param.shape)}", state_dict["state"][key], param, saved)


def _check_entry(where: str, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    step = entry.get("step")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{where}: the saved step is {step!r}: it must be an integer of at least 0")
    fields = expected(param, group, step)
    missing, extra = fields.keys() - entry.keys(), entry.keys() - fields.keys() - {"step"}
    if missing or extra:
        raise ValueError(f"{where}: the saved state lacks {sorted(missing)} and has {sorted(extra)} that do not belong")
    for name, field in fields.items():
        value = entry[name]
        if not isinstance(value, Tensor) or value.shape != field.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where}: saved {name} is {found}, expected a tensor of shape {tuple(field.shape)}")
        if value.is_floating_point() != field.is_floating_point():
            raise ValueError(f"{where}: saved {name} is {value.dtype}, expected {field.dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{where}: saved {name} holds NaN or Inf")


def exact_state(state_dict: dict[str, Any], groups: Groups) -> State:
    """Copies of a checked state dict's entries, by live parameter: on its device, in the dtypes that the rule uses."""
    fresh: State = {}
    for key, param, saved in _pairs(state_dict, groups):
        entry = state_dict["state"].get(key)
        if entry is None:
            continue
        fields = expected(param, saved, entry["step"])
        fresh[param] = {
            name: value.detach().to(device=param.device, dtype=fields[name].dtype, copy=True)
            if isinstance(value, Tensor)
            else value
            for name, value in entry.items()
        }
    return fresh
