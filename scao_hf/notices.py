"""What the optimizer refuses or warns of in what it is given: NaN and Inf, no gradients at all, no matrix."""

from __future__ import annotations

from warnings import warn

import torch
from torch import Tensor

from scao_hf.distributed.exchange import is_sharded, local_gradient
from scao_hf.names import name_of
from scao_hf.rules import Groups, is_entrywise, members
from scao_hf.rules.base import Bucket

#: Steps in a row without a finite gradient that end a run.
PATIENCE = 10
#: For so many looks a bucket is remembered that has no gradient in the steps in which they fall.
MEMORY = 10


def check_finite(groups: Groups) -> None:
    """Raise ``RuntimeError`` where ``on_nonfinite="raise"`` refuses what this process has of the gradients."""
    held = [
        (group, param, local_gradient(param) if is_sharded(param) else param.grad)
        for group in groups
        if group["on_nonfinite"] == "raise"
        for param in group["params"]
        if param.grad is not None
    ]
    for group, param, grad in held:
        if not bool(torch.isfinite(grad).all()):
            raise RuntimeError(
                f"the gradient of the parameter{name_of(param, group)} of shape {tuple(param.shape)} holds NaN or Inf and "
                "on_nonfinite='raise'; nothing was changed. Pass on_nonfinite='skip' to leave such a matrix as it is for "
                "the step"
            )


class Watch:
    """Notices matrices that were skipped ``PATIENCE`` times in a row.

    It looks in every ``PATIENCE``-th step alone, as the answer of a GPU has to be waited for: a run ends after 10 to 21
    such steps. Every third time it looks a step later, as parameters may have gradients in every other step, or every fifth.
    """

    def __init__(self) -> None:
        self._steps = self._looks = 0
        self._next = PATIENCE
        #: Of each bucket, by the places of its members: the last look at it, its step and its counters then.
        self._seen: dict[tuple[tuple[int, str], ...], tuple[int, int, Tensor]] = {}

    def check(self, buckets: list[Bucket]) -> None:
        """Count a step that is about to be taken; one synchronisation where it is one to look in.

        Raises:
            RuntimeError: names the first such parameter.
        """
        self._steps += 1
        if self._steps < self._next:
            return
        self._looks += 1
        self._next += PATIENCE + (self._looks % 3 == 2)
        late: list[tuple[Bucket, Tensor]] = []
        look = self._looks
        seen = {key: last for key, last in self._seen.items() if last[0] > look - MEMORY}
        for bucket in buckets:
            places = zip(bucket.entries, bucket.members, strict=True)
            key, taken = tuple((id(entry), member.suffix) for entry, member in places), bucket.state["taken"]
            if key in seen and bucket.step >= seen[key][1]:  # lower where its state was taken away
                _, step, before = seen[key]
                if bucket.step - step < PATIENCE:
                    seen[key] = look, step, before  # it has not had a gradient in every step
                    continue
                late.append((bucket, before == taken))
            seen[key] = look, bucket.step, taken.clone()
        self._seen = seen
        if not late:
            return
        first = late[0][1].device
        stuck = torch.cat([skipped.to(first) for _, skipped in late])
        if not bool(stuck.any()):
            return
        owners = [
            (bucket.group, owner)
            for bucket, _ in late
            for member, owner in zip(bucket.members, bucket.owners, strict=True)
            for _ in range(member.size)
        ]
        group, param = owners[int(stuck.int().argmax())]
        self._seen.clear()
        raise RuntimeError(
            f"the parameter{name_of(param, group)} of shape {tuple(param.shape)} has had a gradient with NaN or Inf in at "
            f"least {PATIENCE} steps in a row and does not train; nothing was changed in this one. Go back to a checkpoint "
            "from before that and lower the learning rate, or look for the cause in the data or in the loss"
        )


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
