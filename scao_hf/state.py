"""The state of an optimizer: what it consists of, and saving and loading it exactly."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from scao_hf import options
from scao_hf import storage as encoding
from scao_hf.buckets import Bucket, Member, arithmetic_dtype, as_real, members_of
from scao_hf.experts import packing_of
from scao_hf.names import difference, in_order, labels
from scao_hf.rules import COUNTERS, Rule, rule_of

#: Version of the state's layout, kept in every parameter group. Version 2 has no ``activity``: it goes on without.
VERSION, READABLE = 3, (2, 3)

AS_SAVED = (
    "build the optimizer from the same model with the same trainable parameters and groups (adapter, decay) as in the run "
    "that was saved, or start from the weights alone"
)
EARLIER = "take an earlier checkpoint, or start from the weights alone"

State = dict[Tensor, dict[str, Any]]
Groups = list[dict[str, Any]]
Wholes = dict[Tensor, Tensor | None]


def members(param: Tensor, group: dict[str, Any]) -> list[tuple[tuple[int, int], Member]]:
    """The blocks of a parameter under the options of its group, with their shapes."""
    if group["rule"] == "adamw":
        return [((1, as_real(param).numel()), Member(param, "", None))] if param.numel() else []

    def cut_sides(shape: torch.Size) -> int:
        return rule_of(group, True, shape).cut_sides

    return members_of(param, group["max_precond_dim"], cut_sides, packing_of(group))


def rule_for(param: Tensor, group: dict[str, Any]) -> Rule:
    """The rule that steps a parameter of a group."""
    shape, member = next(iter(members(param, group)), ((), None))
    return rule_of(group, member is not None and member.block is not None, shape)


def create(bucket: Bucket, device: torch.device) -> dict[str, Tensor]:
    """Zeroed stacked state of a bucket of its age on ``device``; ``taken`` counts the finite gradients of each member,
    ``level`` is how large they were (U3), ``activity`` which of those of an expert were not zero (X3)."""
    rule = rule_of(bucket.group, bucket.matrix, bucket.shape)
    size = bucket.size
    taken = torch.zeros(size, dtype=bucket.dtype, device=device)
    fields = rule.create(size, bucket.shape, bucket.dtype, device, bucket.group, bucket.step)
    counters = {"taken": taken, "level": torch.zeros_like(taken)}
    if bucket.packed and bucket.group["scao_version"] >= 3 and any(rule.kind(name) == "curvature" for name in fields):
        counters["activity"] = torch.zeros(size, 2, dtype=bucket.dtype, device=device)
    return counters | encoding.zeros(fields, bucket.group)


def expected(param: Tensor, group: dict[str, Any], step: int) -> dict[str, Tensor]:
    """The fields of a parameter's state after ``step`` steps as meta tensors, for checks and for counting bytes."""
    fields: dict[str, Tensor] = {}
    for shape, member in members(param, group):
        bucket = Bucket(group, shape, step, arithmetic_dtype(param), [member])
        for name, stack in create(bucket, torch.device("meta")).items():
            fields[name + member.suffix] = bucket.split(stack)[0]
    return fields


def pairs(state_dict: dict[str, Any], groups: Groups) -> list[tuple[Any, Tensor, dict[str, Any]]]:
    """(saved id, live parameter, saved group) of every parameter."""
    return [
        (key, param, saved)
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
        for key, param in zip(saved["params"], group["params"], strict=True)
    ]


def check_state(state_dict: dict[str, Any], groups: Groups, elsewhere: Collection[Tensor] = ()) -> None:
    """Raise ``ValueError`` unless the entries of ``state_dict`` fit: all their fields, these shapes and kinds of numbers.

    Entries of the parameters ``elsewhere``, whose state another process holds, are not looked at.
    """
    names = labels(state_dict, groups)
    for key, param, saved in pairs(state_dict, groups):
        entry = state_dict["state"].get(key)
        if entry is not None and param not in elsewhere and not only_foreign(entry, param, saved):
            _check_entry(names[key], entry, param, saved)


def only_foreign(entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> bool:
    """Whether an entry holds only what a wrapper of the optimizer has put there, before the parameter's first step."""
    return not entry.keys() & {"step", "bytes", *expected(param, group, 0)}


def completed(state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A state dict whose groups have every option and, by their names, the order of the live ones.

    Options that are newer than the file have their rule's defaults.
    """
    check_structure(state_dict)
    complete = []
    for saved in state_dict["param_groups"]:
        defaults = options.RULE_DEFAULTS.get(str(saved.get("rule")), {})
        given = {name: value for name, value in saved.items() if value is not None or name not in defaults}
        complete.append({**defaults, **given})
    return {**state_dict, "param_groups": in_order(complete, groups)}


def check_structure(state_dict: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless ``state_dict`` is built as torch builds state dicts, whatever the values in it are."""
    saved_groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if saved_groups is None or state is None:
        raise ValueError(
            f"not an optimizer state: its keys are {sorted(map(str, state_dict))[:5]}, not state and param_groups. Pass what "
            "optimizer.state_dict() returned; a Trainer's checkpoint has it in optimizer.pt"
        )
    sound = isinstance(saved_groups, list) and isinstance(state, dict)
    sound = sound and all(isinstance(saved, dict) for saved in saved_groups)
    sound = sound and all(isinstance(saved.get("params"), list) for saved in saved_groups)
    sound = sound and all(isinstance(key, (int, str)) for saved in saved_groups for key in saved["params"])
    if not sound or not all(isinstance(entry, dict) for entry in state.values()):
        raise ValueError(
            "not an optimizer state: state must map to dicts, and param_groups list dicts with params. Pass what "
            "optimizer.state_dict() returned"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def check_groups(state_dict: dict[str, Any], groups: Groups) -> None:
    """Raise ``ValueError`` unless the groups of ``state_dict`` fit: SCAO's, this rule's, legal, of these parameters."""
    saved_groups = state_dict["param_groups"]
    if not all("scao_version" in saved for saved in saved_groups):
        raise ValueError(
            "the saved state was written by another optimizer (its groups have no 'scao_version'): resume with the "
            "optimizer that wrote it, or start SCAO from the weights alone, without the optimizer state"
        )
    saved_sizes = [len(saved["params"]) for saved in saved_groups]
    live_sizes = [len(group["params"]) for group in groups]
    unlike = difference(saved_groups, groups)
    if saved_sizes != live_sizes:
        raise ValueError(
            f"the saved state has parameter groups of sizes {saved_sizes}, the optimizer has {live_sizes}{unlike}: {AS_SAVED}"
        )
    if unlike:
        raise ValueError(
            f"the saved state names other parameters than the optimizer{unlike}: {AS_SAVED}. To load it by position, "
            "delete 'param_names' from its groups"
        )
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if saved["scao_version"] not in READABLE:
            raise ValueError(
                f"the saved state has layout version {saved['scao_version']}, this scao_hf reads "
                f"{' and '.join(map(str, READABLE))}: resume with the release that wrote it, or start from the weights alone"
            )
        # A run by the eigenbasis alone continues by it.
        known = (group["rule"], "eigenbasis") if group["rule"] == "auto" else (group["rule"],)
        if saved.get("rule") not in known:
            raise ValueError(
                f"the saved state belongs to rule={saved.get('rule')!r}, the optimizer has rule={group['rule']!r}: pass the "
                "rule of the run that was saved, or start from the weights alone"
            )
        if packing_of(saved) != packing_of(group):
            raise ValueError(
                f"the saved state is of {_packed(saved)}, the optimizer's group of {_packed(group)}: build the optimizer as "
                "the saved one was, from the same model (experts=find_experts(model), as create_scao_optimizer does)"
            )
        missing = [name for name in ("lr", "eps", "weight_decay") if not _is_number(saved.get(name))]
        if missing:
            raise ValueError(
                f"parameter group {index} of the saved state has no number for {', '.join(missing)}: it was edited; {EARLIER}"
            )
        given = {name: saved[name] for name in options.RULE_DEFAULTS[saved["rule"]] if name in saved}
        try:
            options.check_torch_options(float(saved["lr"]), saved["betas"], saved["eps"], saved["weight_decay"])
            options.resolve(saved["rule"], given)
        except ValueError as error:
            raise ValueError(f"parameter group {index} of the saved state: {error}; {EARLIER}") from error
    strangers = set(state_dict["state"]) - {key for key, _, _ in pairs(state_dict, groups)}
    if strangers:
        raise ValueError(
            f"the saved state has entries for unknown parameters, {sorted(map(str, strangers))[:5]}, which its groups do not "
            "list: it was edited or put together by hand; delete them from its state"
        )


def _packed(group: dict[str, Any]) -> str:
    packing = packing_of(group)
    return "ordinary matrices" if packing is None else f"{packing.side} factors of {packing.experts} stacked experts"


def check_step(where: str, entry: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless a saved entry has counted its steps."""
    step = entry.get("step")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{where}: the saved step is {step!r}: it must be an integer of at least 0; {EARLIER}")


def _check_entry(where: str, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    check_step(where, entry)
    fields = expected(param, group, entry["step"])
    missing = fields.keys() - entry.keys()
    if missing:
        raise ValueError(
            f"{where}: the saved state lacks {sorted(missing)}, it has {sorted(map(str, entry))}: the parameter had another "
            "shape in the run that was saved, or the file was edited. Build the model as it was, or start from the weights "
            "alone"
        )
    for name, field in fields.items():
        value = entry[name]
        if not isinstance(value, Tensor) or value.shape != field.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{where}: saved {name} is {found}, expected a tensor of shape {tuple(field.shape)}: the parameter had another "
                "shape in the run that was saved (LoRA rank, vocabulary). Build the model as it was, or start from the "
                "weights alone"
            )
        if value.dtype != field.dtype and not (value.is_floating_point() and field.is_floating_point()):
            raise ValueError(f"{where}: saved {name} is {value.dtype}, expected {field.dtype}: it was cast; {EARLIER}")


def exact_state(state_dict: dict[str, Any], groups: Groups, elsewhere: Collection[Tensor] = ()) -> State:
    """Copies of a checked state dict's entries, by live parameter: on its device, in the dtypes that the rule uses.

    Of the parameters ``elsewhere``, whose state another process holds, only the step.

    Raises:
        ValueError: a field holds what it cannot.
    """
    fresh: State = {}
    names = labels(state_dict, groups)
    for key, param, saved in pairs(state_dict, groups):
        entry = state_dict["state"].get(key)
        if entry is None or only_foreign(entry, param, saved):
            continue
        step = entry["step"]
        fresh[param] = {"step": step}
        if param in elsewhere:
            continue
        rule = rule_for(param, saved)
        for name, like in expected(param, saved, step).items():
            value = entry[name].detach().to(device=param.device, dtype=like.dtype, copy=True)
            field = name.partition(".")[0]
            legal = COUNTERS.get(field) or encoding.legal(field, rule)
            if field == "taken":
                legal = legal._replace(high=step)
            offence = legal.offence(value)
            if offence is not None:
                raise ValueError(
                    f"{names[key]}: saved {name} holds {offence:g}; its entries must be {legal}: the file is damaged or was "
                    f"edited, or the run had diverged; {EARLIER}"
                )
            fresh[param][name] = value
    return fresh


def foreign_state(state_dict: dict[str, Any], groups: Groups) -> State:
    """Copies of what wrappers of the optimizer keep in its state (Lookahead its slow weights), by live parameter."""
    fresh: State = {}
    for key, param, saved in pairs(state_dict, groups):
        entry = state_dict["state"].get(key, {})
        foreign = entry.keys() - {"step", "bytes", *expected(param, saved, entry.get("step", 0))}
        if foreign:
            fresh[param] = {name: _copy(entry[name], param.device) for name in entry if name in foreign}
    return fresh


def _copy(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, copy=True) if isinstance(value, Tensor) else deepcopy(value)


def apart(value: Any) -> Any:
    """Nested dicts of state whose tensors have storages of their own, over the same memory.

    A view of a stack is saved with all of that, and pickled with all of it once for each view.
    """
    if isinstance(value, dict):
        return {name: apart(each) for name, each in value.items()}
    if type(value) is not Tensor or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    whole = value.contiguous()
    first = whole.storage_offset() * whole.element_size()
    part = whole.untyped_storage()[first : first + whole.nbytes]
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(part, 0, value.shape)  # type: ignore[call-overload]
