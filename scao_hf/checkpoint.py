"""What a checkpoint holds and what a resume does: everything that is checked, converted, refused and restored.

``saved`` makes a state dict. ``restored`` reads one in this order and changes nothing: structure, options and order of the
groups (``_completed``); version, rule, packing, sizes and names (``_check_groups``); each entry's fields by name, from bytes
where they were saved so (``_named``); shapes and kinds (``_check_entry``); checksums (``_check_sums``); values (``_exact``).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Mapping
from copy import deepcopy
from numbers import Integral, Real
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from scao_hf import options
from scao_hf.distributed.exchange import agreed, is_sharded
from scao_hf.distributed.shards import BYTES, EARLIER, Shards, from_bytes, size_of, to_bytes
from scao_hf.experts import packing_of
from scao_hf.integrity import CHECKSUM, checksum
from scao_hf.names import difference, few, in_order, labels, named_by_keys, names_of, pairs
from scao_hf.rules import Groups, State, expected, only_foreign, rule_for
from scao_hf.rules.base import COUNTERS

#: Version of the state's layout, kept in every parameter group. Version 2 has no ``activity``, and is continued without.
VERSION, READABLE = 3, (2, 3)
#: Options that 0.1.0 did not have. torch.distributed.checkpoint wants every key of the live groups in a file, so it finds these
#: with the version.
LATER = ("from_scratch", "stochastic_rounding")
#: The key of the step in a flattened state dict, where the bytes are below the step.
COUNT = "count"

AS_SAVED = (
    "build the optimizer from the same model with the same trainable parameters and groups (adapter, decay) as in the run "
    "that was saved, or start from the weights alone. SCAO(..., partial_resume=True) loads the rest (scao_partial_resume: true "
    "in a YAML)"
)


# Saving


def saved(state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """Torch's state dict as SCAO saves it: each entry with its checksum, sharded state as bytes. Then collective.

    Args:
        state_dict: of ``torch.optim.Optimizer``.
        groups: the live parameter groups.
    """
    entries = {
        key: entry if isinstance(entry.get(BYTES), dict) else {**entry, CHECKSUM: checksum(entry)}
        for key, entry in apart(state_dict["state"]).items()
    }
    # A schedule in NumPy leaves a learning rate that torch.load(weights_only=True) refuses.
    numbers = [
        {
            name: float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value
            for name, value in group.items()
        }
        for group in state_dict["param_groups"]
    ]
    state_dict = {**state_dict, "state": entries, "param_groups": numbers}
    shards = Shards.of(groups, {param: entries[key] for key, param, _ in pairs(state_dict, groups) if key in entries})
    return _for_checkpoint(state_dict if shards is None else shards.to_bytes(state_dict, groups), groups)


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


def _for_checkpoint(state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """``state_dict`` as torch.distributed.checkpoint needs it, where its ``get_optimizer_state_dict`` is the caller.

    It reads a checkpoint into the state dict of an optimizer that was just built, so keys and shapes must be those of both
    phases: every parameter's fields become bytes. Nothing but the call stack tells it from other callers. In a flattened
    state dict it knows no keys but those of the live state, of which the step alone is always there: the bytes go below it.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.distributed.checkpoint.state_dict":
        frame = frame.f_back
    if frame is None:
        return state_dict
    flat = getattr(frame.f_locals.get("info"), "flatten_optimizer_state_dict", False)
    entries = dict(state_dict["state"])
    for key, param, group in pairs(state_dict, groups):
        entry = entries.get(key, {})
        if "step" not in entry or BYTES in entry:
            continue
        fields = {name: entry[name] for name in expected(param, group, entry["step"])}
        if fields:
            vector = to_bytes(fields, entry["step"], size_of(param, group))
            others = {name: value for name, value in entry.items() if name not in fields and name != CHECKSUM}
            below = {"step": {COUNT: entry["step"], BYTES: vector}}
            entries[key] = {**others, **(below if flat else {BYTES: vector})}
    if flat:  # it then wants every key of the optimizer's own groups
        return {**state_dict, "state": entries}
    marked = []
    for group in state_dict["param_groups"]:
        version = group["scao_version"], {name: group[name] for name in LATER}
        old = {name: value for name, value in group.items() if name not in LATER}
        marked.append({**old, "scao_version": version})
    return {**state_dict, "state": entries, "param_groups": marked}


# Loading


def restored(state_dict: dict[str, Any], groups: Groups) -> tuple[dict[str, Any], State]:
    """A state dict, checked and with every option, and its state by parameter as the optimizer keeps it.

    Nothing is changed. With sharded parameters collective.

    Raises:
        ValueError: it does not fit; in all processes where it does not in one.
    """
    fresh: State = {}
    foreign: State = {}
    shards: Shards | None = None
    with agreed(groups):
        shards = Shards.of(groups, {})
        state_dict = _completed(state_dict, groups)
        _check_groups(state_dict, groups)
        if shards is not None:
            _check_sharded(state_dict, groups, shards)
    with agreed(groups):
        if shards is not None:
            shards.check_alike(state_dict, groups)
    whole = state_dict if shards is None else shards.collected(state_dict, groups)
    with agreed(groups):
        fresh, foreign = _restored(whole, groups, () if shards is None else shards.elsewhere)
    if shards is not None:
        fresh = shards.adopt(fresh)
    return state_dict, {param: fresh.get(param, {}) | foreign.get(param, {}) for param in fresh | foreign}


def in_common(state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """The part of a state dict that belongs to parameters of the same name and shape here, as one of the live groups.

    A group has the saved options of the group that most of its parameters were in; a state that was laid out under others
    is left out. A warning names what is left out and which parameters have no state.

    Raises:
        ValueError: names are missing, or no parameter is in both.
    """
    _check_structure(state_dict)
    if not all("scao_version" in saved for saved in state_dict["param_groups"]):
        return state_dict  # refused as a whole
    saved_groups = _completed(state_dict, groups)["param_groups"]
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for saved in saved_groups:
        found |= {name: (key, saved) for name, key in zip(_known_names(saved), saved["params"], strict=True)}
    common: dict[str, Any] = {**state_dict, "state": {}, "param_groups": []}
    new, other, count = [], [], 0
    for group in groups:
        names = _known_names(group)
        origins = [found[name][1] for name in names if name in found]
        counts = Counter(map(id, origins))
        origin = max(origins, key=lambda each: counts[id(each)], default=group)
        numbers = range(count, count + len(names))
        common["param_groups"].append({**origin, "params": [*numbers], "param_names": group.get("param_names", [])})
        count += len(names)
        for number, name, param in zip(numbers, names, group["params"], strict=True):
            key, saved = found.pop(name, (None, None))
            entry = state_dict["state"].get(key)
            if saved is None or entry is None:
                new.append(name)
            elif _laid_out_alike(saved, origin) and _fits(entry, param, origin):
                common["state"][number] = entry
            else:
                other.append(name)
    if not common["state"] and state_dict["state"]:
        raise ValueError(
            f"partial_resume: no parameter of the saved state has the name and shape of one here: it has {few([*found])}, the "
            f"optimizer {few(new)}: take the checkpoint of this model, or start from the weights alone"
        )
    told = [
        f"{what} {few(names)}"
        for what, names in (
            ("new or never stepped, and without state:", new),
            ("of another shape or other options, and without state:", other),
            ("only in the saved state, frozen or removed since:", [*found]),
        )
        if names
    ]
    if told:
        warn(
            f"partial_resume: the state of {len(common['state'])} parameters is loaded; {'; '.join(told)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return common


def _known_names(group: dict[str, Any]) -> list[str]:
    names = names_of(group) if group["params"] else []
    if names is None:
        raise ValueError(
            "partial_resume goes by the names of the parameters, which the saved state or the optimizer does not have: build "
            "both from model.named_parameters(), create_scao_optimizer or a Trainer"
        )
    return names


def _laid_out_alike(saved: dict[str, Any], other: dict[str, Any]) -> bool:
    return saved is other or (
        packing_of(saved) == packing_of(other)
        and all(saved.get(name) == other.get(name) for name in ("scao_version", *options.SHAPING))
    )


def _fits(entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> bool:
    """Whether a saved entry has the shapes of the state of ``param``. What is damaged in another way is refused later."""
    entry = _unflattened(entry)
    if isinstance(vector := entry.get(BYTES), Tensor):
        return tuple(vector.shape) == (size_of(param, group),)
    step = entry.get("step")
    if not isinstance(step, int) or only_foreign(entry, param, group):
        return True
    fields = expected(param, group, max(step, 0))
    return all(
        isinstance(entry.get(name), Tensor) and entry[name].shape == field.shape for name, field in fields.items()
    )


def _restored(state_dict: dict[str, Any], groups: Groups, elsewhere: Collection[Tensor]) -> tuple[State, State]:
    """What SCAO keeps for each parameter, and what a wrapper of the optimizer does."""
    saved, names = state_dict["state"], labels(state_dict, groups)
    entries = {
        key: _named(names[key], saved[key], param, group)
        for key, param, group in pairs(state_dict, groups)
        if key in saved
    }
    state_dict = {**state_dict, "state": entries}
    for key, param, group in pairs(state_dict, groups):
        entry = entries.get(key)
        if entry is not None and param not in elsewhere and not only_foreign(entry, param, group):
            _check_entry(names[key], entry, param, group)
    # Afterwards, as those checks say better what is wrong, and before single numbers are judged.
    _check_sums(saved, names)
    return _exact(state_dict, groups, elsewhere), _foreign(state_dict, groups)


def _completed(state_dict: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A state dict whose groups have every option and, by their names, the order of the live ones.

    Options that are newer than the file have their rule's defaults.
    """
    _check_structure(state_dict)
    complete = []
    for saved in state_dict["param_groups"]:
        match saved.get("scao_version"):
            case (int() as version, dict() as later):
                saved = {**saved, **later, "scao_version": version}
        defaults = options.RULE_DEFAULTS.get(str(saved.get("rule")), {})
        given = {name: value for name, value in saved.items() if value is not None or name not in defaults}
        complete.append({**defaults, **given})
    return {**state_dict, "param_groups": in_order(named_by_keys(complete, groups), groups)}


def _check_structure(state_dict: dict[str, Any]) -> None:
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


def _check_groups(state_dict: dict[str, Any], groups: Groups) -> None:
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
        if not isinstance(saved["scao_version"], int) or saved["scao_version"] not in READABLE:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)


def _packed(group: dict[str, Any]) -> str:
    packing = packing_of(group)
    return "ordinary matrices" if packing is None else f"{packing.side} factors of {packing.experts} stacked experts"


def _check_sharded(state_dict: dict[str, Any], groups: Groups, shards: Shards) -> None:
    """Raise ``ValueError`` for the entry of a sharded parameter that is neither SCAO's bytes nor a whole one."""
    names = labels(state_dict, groups)
    for key, param, group in shards.saved(state_dict, groups):
        entry = state_dict["state"][key]
        _check_step(names[key], entry)
        if BYTES in entry:
            _check_bytes(names[key], entry, param, group)
            vector = entry[BYTES]
            if is_sharded(vector) and (vector.device_mesh, vector.placements) != (param.device_mesh, param.placements):
                raise ValueError(
                    f"{names[key]}: the saved state is cut differently from the parameter: load it through "
                    "torch.distributed.checkpoint, which cuts it again"
                )


def _named(where: str, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """A parameter's saved state with its fields by name, whether they were saved by name or as bytes.

    Raises:
        ValueError: bytes of another number, besides fields by name, or that do not fit their checksum.
    """
    entry = _unflattened({name: value for name, value in entry.items() if name != CHECKSUM})
    if BYTES not in entry:
        return entry
    _check_bytes(where, entry, param, group)
    vector = entry[BYTES]
    if hasattr(vector, "full_tensor"):
        vector = vector.full_tensor()
    others = {name: value for name, value in entry.items() if name != BYTES}
    return {**others, **from_bytes(where, vector, param, group, entry["step"])}


def _unflattened(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with its bytes by name where torch.distributed.checkpoint has had them below the step."""
    below = entry.get("step")
    if not isinstance(below, dict) or below.keys() != {COUNT, BYTES}:
        return entry
    # Live keys without anything below them in the file have become empty dicts.
    others = {name: value for name, value in entry.items() if not (isinstance(value, dict) and not value)}
    return {**others, "step": below[COUNT], BYTES: below[BYTES]}


def _check_bytes(where: str, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    """Raise ``ValueError`` where a saved entry mixes forms, or has another number of bytes than the state of ``param``."""
    vector, step, size = entry[BYTES], entry.get("step"), size_of(param, group)
    if not isinstance(step, int) or step < 0 or entry.keys() & expected(param, group, step).keys():
        raise ValueError(
            f"{where}: the saved state has {sorted(map(str, entry))} with step={step!r}: besides its bytes there must be a "
            "step, an integer of at least 0, and no field by name. A state dict of one process goes to "
            "optimizer.load_state_dict in every process, not through set_optimizer_state_dict"
        )
    if not isinstance(vector, Tensor) or vector.dtype != torch.uint8 or tuple(vector.shape) != (size,):
        found = f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(
            f"{where}: the saved state is {found}, expected {size} bytes: the run that was saved had another shape here (LoRA "
            "rank, vocabulary) or other options (k_max, use_int8_ema, moment_dtype, max_precond_dim, from_scratch). Build "
            "model and optimizer as they were, or start from the weights alone"
        )


def _check_step(where: str, entry: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless a saved entry has counted its steps."""
    step = entry.get("step")
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{where}: the saved step is {step!r}: it must be an integer of at least 0; {EARLIER}")


def _check_entry(where: str, entry: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
    _check_step(where, entry)
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


def _check_sums(state: dict[Any, dict[str, Any]], labels: Mapping[Any, str]) -> None:
    """Raise ``ValueError`` unless every entry that has a checksum fits it; ``labels`` are what messages call the entries."""
    for key, entry in state.items():
        saved = entry.get(CHECKSUM)
        if CHECKSUM in entry and (not isinstance(saved, int) or saved != checksum(entry)):
            raise ValueError(
                f"{labels[key]}: the saved state does not fit its checksum: it has changed since state_dict() was called. If "
                "it was kept in memory, its tensors are the live ones: keep copy.deepcopy(optimizer.state_dict()) instead. If "
                "it comes from a file, the file is damaged: take an earlier checkpoint. After an edit of your own, delete "
                f"{CHECKSUM!r} from the entry"
            )


def _exact(state_dict: dict[str, Any], groups: Groups, elsewhere: Collection[Tensor] = ()) -> State:
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
            legal = COUNTERS[field] if field in COUNTERS else rule.field(field).legal
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


def _foreign(state_dict: dict[str, Any], groups: Groups) -> State:
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
