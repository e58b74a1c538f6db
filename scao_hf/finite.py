"""Gradients that hold NaN or Inf: refused where that is asked for, and noticed where a matrix has nothing else any more."""

from __future__ import annotations

import torch
from torch import Tensor

from scao_hf.buckets import Bucket
from scao_hf.distributed.exchange import is_sharded, local_gradient
from scao_hf.names import name_of
from scao_hf.state import Groups

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
