"""Gradients that hold NaN or Inf: refused where that is asked for, and noticed where a matrix has nothing else any more."""

from __future__ import annotations

import torch
from torch import Tensor

from scao_hf.buckets import Bucket
from scao_hf.distributed.exchange import is_sharded
from scao_hf.state import Groups, Wholes

#: Steps in a row without a finite gradient that end a run.
PATIENCE = 10
#: For so many looks a bucket is remembered that has no gradient in the steps in which they fall.
MEMORY = 10


def nonfinite(groups: Groups, wholes: Wholes) -> RuntimeError | None:
    """What ``on_nonfinite="raise"`` has to say about the gradients that are held whole here.

    Args:
        groups: the parameter groups.
        wholes: for each sharded parameter the whole one, where this process has it.
    """
    for group in groups:
        if group["on_nonfinite"] != "raise":
            continue
        for param in group["params"]:
            held = wholes.get(param) if is_sharded(param) else param
            if held is not None and held.grad is not None and not bool(torch.isfinite(held.grad).all()):
                return RuntimeError(
                    f"the gradient of a parameter of shape {tuple(param.shape)} holds NaN or Inf and on_nonfinite="
                    "'raise'; nothing was changed. Pass on_nonfinite='skip' to leave such a matrix as it is for the step"
                )
    return None


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

    def due(self) -> bool:
        """Count a step; whether this is one to look in."""
        self._steps += 1
        if self._steps < self._next:
            return False
        self._looks += 1
        self._next += PATIENCE + (self._looks % 3 == 2)
        return True

    def problem(self, buckets: list[Bucket]) -> RuntimeError | None:
        """The error for the first such parameter, before a step; one synchronisation where there has been a look before."""
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
            return None
        first = late[0][1].device
        stuck = torch.cat([skipped.to(first) for _, skipped in late])
        if not bool(stuck.any()):
            return None
        owners = [(bucket, member) for bucket, _ in late for member in bucket.members for _ in range(member.size)]
        bucket, member = owners[int(stuck.int().argmax())]
        self._seen.clear()
        names = zip(bucket.group["params"], bucket.group.get("param_names", ()), strict=False)
        name = next((f" {name!r}" for param, name in names if param is member.param), "")
        return RuntimeError(
            f"the parameter{name} of shape {tuple(member.param.shape)} has had a gradient with NaN or Inf in at least "
            f"{PATIENCE} steps in a row and does not train; nothing was changed in this one. Go back to a checkpoint from "
            "before that and lower the learning rate, or look for the cause in the data or in the loss"
        )
