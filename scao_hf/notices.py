"""Warnings for what is legal, as in torch, but hardly ever meant: an optimizer without matrices, or without gradients."""

from __future__ import annotations

from warnings import warn

from scao_hf.finite import PATIENCE
from scao_hf.names import name_of
from scao_hf.rules import is_entrywise
from scao_hf.state import Groups, members


def without_matrices(groups: Groups) -> None:
    """Warn where every 2-D parameter has a side of length 1: all steps are AdamW's, and the log would show no phase."""
    narrow = []
    for group in (group for group in groups if not is_entrywise(group)):
        for param in group["params"]:
            if any(member.block for _, member in members(param, group)):
                return
            if param.ndim == 2 and param.numel() and not param.is_complex():
                narrow.append(f"the parameter{name_of(param, group)} of shape {tuple(param.shape)}")
    if narrow:
        warn(
            f"no parameter is a matrix with two sides of at least 2, so every step will be AdamW's: {narrow[0]} is one of "
            f"{len(narrow)} with a side of length 1. A LoRA needs a rank of at least 2",
            RuntimeWarning,
            stacklevel=2,
        )


class Idleness:
    """Notices that there is never a gradient."""

    def __init__(self) -> None:
        self._steps = 0

    def count(self, groups: Groups, idle: bool) -> None:
        """Count a step, which was ``idle`` where no parameter had a gradient; warn where that cannot be meant."""
        self._steps = self._steps + 1 if idle else 0
        if self._steps not in (1, PATIENCE):
            return
        params = [param for group in groups for param in group["params"]]
        if self._steps == PATIENCE:
            warn(
                f"none of the {len(params)} parameters of this optimizer has had a gradient in {PATIENCE} steps, so these "
                "changed nothing: if other parameters are trained now (PEFT's set_adapter, another model), build the "
                "optimizer from those",
                RuntimeWarning,
                stacklevel=2,
            )
        elif not any(param.requires_grad for param in params):
            warn(
                f"none of the {len(params)} parameters of this optimizer requires a gradient, so its steps change nothing: "
                "unfreeze them (requires_grad_()), or build the optimizer from the parameters that are to be trained",
                RuntimeWarning,
                stacklevel=2,
            )
