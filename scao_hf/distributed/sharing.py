"""Refreshes shared out between the processes of a data-parallel run (DDP), whose gradients and states are the same.

Every matrix that is due is refreshed by one process, which then sends its state to the others.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from scao_hf.distributed.exchange import as_bytes, from_all, is_sharded
from scao_hf.rules import Groups
from scao_hf.rules.base import Bucket


class Sharing:
    """Which process refreshes what in a step, and the exchange afterwards.

    Args:
        groups: the parameter groups, alike in all processes.
        group: the processes, None for all.

    Raises:
        ValueError: the processes hold other parameters, or parts of parameters.
    """

    def __init__(self, groups: Groups, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        params = [param for settings in groups for param in settings["params"]]
        if any(is_sharded(param) for param in params):
            raise ValueError(
                "with sharded parameters every matrix is refreshed by its owner already: leave share_refresh out"
            )
        shapes = [tuple(param.shape) for param in params]
        if any(other != shapes for other in from_all(shapes, group)):
            raise ValueError(
                "the processes hold parameters of different shapes: share_refresh is for data parallelism, where all are alike"
            )

    def split(self, buckets: list[Bucket]) -> list[dict[int, slice]]:
        """For each bucket, the members that each process refreshes in its next step: about as many entries each.

        The processes take turns in who comes first, so that a step with few matrices is not always the same one's.
        """
        dues, total = [], 0
        for bucket in buckets:
            due = bucket.due(bucket.step + 1)
            dues.append((due, bucket.shape[0] * bucket.shape[1]))
            total += (due.stop - due.start) * dues[-1][1]
        shift = buckets[0].step if buckets else 0
        parts: list[dict[int, slice]] = []
        before = 0
        for due, entries in dues:
            parts.append({})
            for member in range(due.start, due.stop):
                # A member belongs to the part in which its middle lies.
                rank = (self.world * (2 * before + entries) // (2 * total) + shift) % self.world
                first = parts[-1][rank].start if rank in parts[-1] else member
                parts[-1][rank] = slice(first, member + 1)
                before += entries
        return parts

    def exchange(self, buckets: list[Bucket], parts: list[dict[int, slice]]) -> None:
        """Send the state of the members that this process has refreshed, and take that of the others."""
        pending: list[tuple[dist.Work, Tensor, list[Tensor]]] = []
        for rank in sorted({rank for part in parts for rank in part}):
            rows = [
                as_bytes(field[part[rank]])
                for bucket, part in zip(buckets, parts, strict=True)
                if rank in part
                for field in bucket.state.values()
            ]
            packed = torch.cat(rows) if rank == self.rank else rows[0].new_empty(sum(row.numel() for row in rows))
            pending.append((self._broadcast(packed, rank), packed, [] if rank == self.rank else rows))
        for work, packed, rows in pending:
            work.wait()
            if rows:
                torch._foreach_copy_(rows, list(packed.split([row.numel() for row in rows])))

    def _broadcast(self, tensor: Tensor, rank: int) -> dist.Work:
        source = rank if self.group is None else dist.get_global_rank(self.group, rank)
        return cast(dist.Work, dist.broadcast(tensor, source, group=self.group, async_op=True))
