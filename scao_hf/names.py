"""Which saved parameter is which live one: by name where both sides have names, by position otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

#: What wrappers put into the names of a module's parameters.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def name_of(param: Tensor, group: dict[str, Any]) -> str:
    """A parameter's name as a message has it, nothing where it has none."""
    names = zip(group["params"], group.get("param_names", ()), strict=False)
    return next((f" {name!r}" for each, name in names if each is param), "")


def pairs(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> list[tuple[Any, Tensor, dict[str, Any]]]:
    """(saved id, live parameter, saved group) of every parameter."""
    return [
        (key, param, saved)
        for saved, group in zip(state_dict["param_groups"], groups, strict=True)
        for key, param in zip(saved["params"], group["params"], strict=True)
    ]


def labels(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[Any, str]:
    """What messages call each saved parameter: its name, or its number where it has none, and the live one's shape."""
    found: dict[Any, str] = {}
    for saved, group in zip(state_dict["param_groups"], groups, strict=True):
        names = saved.get("param_names")
        known = isinstance(names, list) and len(names) == len(saved["params"])
        shown = zip(saved["params"], names if known else saved["params"], group["params"], strict=True)
        found |= {key: f"parameter {name!r} of shape {tuple(param.shape)}" for key, name, param in shown}
    return found


def with_names(params: Any, names: Mapping[Tensor, str]) -> Any:
    """Parameters or groups of them as (name, parameter) pairs, where ``names`` has all of them; otherwise as they are."""
    if isinstance(params, Tensor):
        return params
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    groups = [{**group, "params": listed(group["params"])} for group in groups]
    if not all(isinstance(param, Tensor) and param in names for group in groups for param in group["params"]):
        return given
    named = [{**group, "params": [(names[param], param) for param in group["params"]]} for group in groups]
    # torch finds no names in an empty group, and wants names in all groups or in none.
    return [group if group["params"] else {**group, "param_names": []} for group in named]


def listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def names_of(group: dict[str, Any]) -> list[str] | None:
    """The names of a group's parameters without those of wrappers; None where they are not known, or not one each."""
    names = group.get("param_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    for wrapper in WRAPPERS:
        names = [name.replace(wrapper, "") for name in names]
    if all(name.startswith("module.") for name in names):  # of DDP, not a submodule that is called so
        names = [name.removeprefix("module.") for name in names]
    return names if len(set(names)) == len(names) == len(group["params"]) else None


def named_by_keys(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups; those whose keys are names of live parameters have the keys for names.

    So torch.distributed.checkpoint makes them. It leaves the list of names as the saved run had it: of other parameters
    where some have been frozen or added since, or in another order.
    """
    live = {name for group in groups for name in names_of(group) or ()}
    named = [{**saved, "param_names": list(saved["params"])} for saved in saved_groups]
    return [
        by_keys if live.intersection(names_of(by_keys) or ()) else saved
        for by_keys, saved in zip(named, saved_groups, strict=True)
    ]


def in_order(saved_groups: list[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups and their parameters in the live ones' order, where both have names and these are the same."""
    sets = {frozenset(names): saved for saved in saved_groups if (names := names_of(saved)) is not None}
    wanted = [names for group in groups if (names := names_of(group)) is not None]
    if not len(sets) == len(saved_groups) == len(groups) == len(wanted) or any(
        frozenset(w) not in sets for w in wanted
    ):
        return saved_groups
    ordered = []
    for group, names in zip(groups, wanted, strict=True):
        saved = sets[frozenset(names)]
        places = dict(zip(names_of(saved) or (), saved["params"], strict=True))
        # torch.distributed.checkpoint, whose keys then are other names, has put them into this order, and left the list.
        arranged = all(isinstance(key, str) and key not in places for key in saved["params"])
        keys = saved["params"] if arranged else [places[name] for name in names]
        ordered.append({**saved, "params": keys, "param_names": group["param_names"]})
    return ordered


def difference(saved_groups: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> str:
    """What the names tell about parameters that do not fit; nothing where they are not known."""
    sides = []
    for side in (saved_groups, groups):
        named = [names_of(group) for group in side]
        sides.append({name: index for index, names in enumerate(named) for name in names or ()})
        if None in named:
            return ""
    saved, live = sides
    parts = [
        f"; only {who} has {few([name for name in ours if name not in others])} ({why})"
        for who, why, ours, others in (
            ("the saved state", "frozen or removed since", saved, live),
            ("the optimizer", "new", live, saved),
        )
        if ours.keys() - others.keys()
    ]
    moved = [name for name in saved if name in live and saved[name] != live[name]]
    if moved and not parts:
        parts = [f"; {moved[0]!r} is in group {saved[moved[0]]} there and in group {live[moved[0]]} here"]
    return "".join(parts)


def few(names: list[str], most: int = 5) -> str:
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")
