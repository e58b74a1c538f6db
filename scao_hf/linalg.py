"""Eigendecompositions of stacks of curvature factors, which may fail, and how many directions of one to keep."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from scao_hf import ops


def eigh(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues of ``L + damping I`` in falling order, at least ``damping``, and eigenvectors; None if it fails.

    It is done on the CPU whatever the device: the solvers of other devices differ in speed and in how they fail. Each
    matrix is scaled to a trace of d first, so that float32 neither over- nor underflows. A stack on which the
    decomposition fails, or for which memory does not suffice, is tried once more in float64 with a thousandth of the
    mean eigenvalue on the diagonal. A factor that int8 rounding has made slightly indefinite comes out
    with the damping in place of its negative eigenvalues.

    Args:
        factor: L, symmetric, ``[N, d, d]``.
        damping: ``[N]``, not negative.
    """
    side, device = factor.shape[-1], factor.device
    factor, damping = factor.cpu(), damping.cpu()
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(factor.dtype).tiny)[:, None, None]
    scaled = factor / mean
    for last in (False, True):
        try:
            if last:
                identity = torch.eye(side, dtype=torch.float64, device="cpu")
                found = torch.linalg.eigh(scaled.double() + 1e-3 * identity)
            else:
                found = ops.eigh(scaled)
            values, vectors = (part.flip(-1).to(factor) for part in found)
        except (torch.linalg.LinAlgError, torch.OutOfMemoryError) as error:  # type: ignore[attr-defined]
            # Python shows a warning once for each place and text: not at every refresh.
            warnings.warn(
                f"a decomposition of curvature factors of side {side} failed ({type(error).__name__}): "
                + ("the matrices keep their last basis" if last else "tried again in float64"),
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        return (values.clamp_min(0) * mean[:, 0] + damping[:, None]).to(device), vectors.to(device)
    return None


def adaptive_rank(values: Tensor, total: Tensor, epsilon_sparse: float, k_min: int, k_max: int) -> Tensor:
    """(E4) The smallest k in ``[k_min, k_max]`` whose eigenvalues hold at least ``1 - epsilon_sparse`` of the mass.

    Args:
        values: ``[N, d]``, falling.
        total: ``[N]``, the trace (larger than the sum of ``values`` where these are truncated already).

    Returns:
        ``[N]``, int64, at most d.
    """
    # The tolerance keeps a rounding error in the running sum from costing one more direction.
    threshold = (1 - epsilon_sparse) * total * (1 - 1e-6)
    side = values.shape[-1]
    # A product, because torch.use_deterministic_algorithms refuses cumsum on CUDA.
    running = values @ torch.ones(side, side, dtype=values.dtype, device=values.device).triu_()
    rank = (running < threshold[:, None]).sum(-1) + 1
    return rank.clamp(min(k_min, side), min(k_max, side))
