"""Options that are edited in ``optimizer.param_groups`` in a run: held to what the constructor accepts, then followed."""

from __future__ import annotations

from itertools import chain
from numbers import Real
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from scao_hf import options

Groups = list[dict[str, Any]]

_NAMES = tuple(name for name in options.GROUP_KEYS if name != "lr")  # which schedules edit in every step
_values = itemgetter(*_NAMES)
_shaping = itemgetter(*map(_NAMES.index, options.SHAPING))


class Edits:
    """The options under which the state of each parameter group was laid out.

    Args:
        groups: the parameter groups.
    """

    def __init__(self, groups: Groups) -> None:
        self._known = [tuple(map(group.get, _NAMES)) for group in groups]

    def add(self, group: dict[str, Any]) -> None:
        """Add a group whose options have been checked."""
        self._known.append(_values(group))

    def known(self) -> Groups:
        """These options, by name."""
        return [dict(zip(_NAMES, values, strict=True)) for values in self._known]

    def shaping(self, groups: Groups) -> bool:
        """Whether options have been edited on which existing state depends; ``accept`` ends that.

        Raises:
            ValueError: an option is illegal or missing.
        """
        for group in groups:
            options.check_foreign(group)
            if "lr" in group:
                check_lr(group["lr"])
        try:
            values = [*map(_values, groups)]
        except KeyError:
            values = []
        if len(values) == len(self._known) and all(map(is_, chain(*values), chain(*self._known))):
            return False
        for group in groups:
            options.check_group(group)
        if [*map(_shaping, values)] != [*map(_shaping, self._known)]:
            return True
        self._known = values
        return False

    def own(self, groups: Groups, name: str) -> None:
        """The optimizer itself has set the option ``name``."""
        place = _NAMES.index(name)
        self._known = [
            (*values[:place], group[name], *values[place + 1 :])
            for values, group in zip(self._known, groups, strict=False)
        ]

    def accept(self, groups: Groups) -> None:
        """Their state has been laid out under the options that ``groups`` have now."""
        self._known = [*map(_values, groups)]


def check_lr(lr: Any) -> None:
    """Raise ``ValueError`` for an illegal learning rate; the value of a tensor is not read, as a device would be waited for."""
    if not isinstance(lr, Tensor):
        options.check("lr", float(lr) if isinstance(lr, Real) else lr, options.TORCH_OPTIONS["lr"])
    elif lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements: it must have one element")
