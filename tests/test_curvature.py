"""Curvature equations: golden values, the rank rule's property, truncation that keeps the trace, failing decompositions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scao_hf import ops
from scao_hf.rules import base, eigenbasis, published


def test_accumulate_and_debias_recover_a_constant() -> None:
    outer = torch.tensor([[[4.0, 2.0], [2.0, 9.0]]])
    factor = torch.zeros_like(outer)
    for _ in range(3):
        base.accumulate(factor, outer, torch.full((1, 1, 1), 0.25))
    torch.testing.assert_close(base.debias(factor, 0.75, torch.full((1, 1, 1), 3.0)), outer)


@pytest.mark.parametrize("rank", [2, 6])
def test_a_basis_tells_whether_its_damping_was_above_the_floor(rank: int) -> None:
    """Worked out from what a truncated basis keeps, against the damping itself."""
    root = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = root @ root.mT * torch.tensor([1e-8, 1e-6, 1e-5, 1e-3, 1.0])[:, None, None]
    for eps in (1e-8, 1e-6):
        damping = published.damping(factor, eps)
        values, vectors = ops.eigh(factor, damping) or pytest.fail("no decomposition")
        basis = published.truncate(values, vectors, torch.full((5,), rank), width=6)
        found = published.damped_above(basis.values, basis.tail, 6, eps)
        assert found.tolist() == (damping > eps).double().tolist() and 0 < found.sum() < 5
    assert published.damped_above(torch.zeros(1, 6), torch.ones(1), 6, 1e-8) == 0  # no basis yet


def test_damping_is_the_larger_of_eps_and_a_share_of_the_mean_eigenvalue() -> None:
    factors = torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2, 2)])
    torch.testing.assert_close(published.damping(factors, 1e-8), torch.tensor([2e-4, 1e-8]))


def test_eigh_golden() -> None:
    values, vectors = ops.eigh(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), torch.tensor([0.5]))  # type: ignore[misc]
    torch.testing.assert_close(values, torch.tensor([[3.5, 1.5]]))
    torch.testing.assert_close(vectors.abs(), torch.full((1, 2, 2), 0.5**0.5))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_eigh_is_scale_free(scale: float) -> None:
    base = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    values, _ = ops.eigh(base * scale, torch.zeros(1))  # type: ignore[misc]
    torch.testing.assert_close(values / scale, torch.tensor([[3.0, 1.0]]))


def test_a_failing_eigh_is_tried_in_float64_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.linalg.eigh, []

    def failing(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32 or always:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(ops, "NATIVE", frozenset())
    always = False
    factor, damping = torch.eye(3)[None], torch.zeros(1)
    with torch.device("meta"):  # whatever the default device is
        assert ops.eigh(factor, damping) is not None
    always = True
    assert ops.eigh(torch.eye(3)[None], torch.zeros(1)) is None
    assert calls == [torch.float32, torch.float64] * 2


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=12),
    st.floats(0, 0.9),
    st.integers(1, 8),
    st.integers(0, 8),
)
def test_adaptive_rank_is_the_smallest_that_holds_the_mass(
    spectrum: list[float], epsilon: float, k_min: int, more: int
) -> None:
    values = torch.tensor([sorted(spectrum, reverse=True)], dtype=torch.float64)
    total, k_max = values.sum(-1), k_min + more
    rank = int(base.adaptive_rank(values, total, epsilon, k_min, k_max))
    side = values.shape[-1]
    assert min(k_min, side) <= rank <= min(k_max, side)
    if rank < min(k_max, side):
        assert values[0, :rank].sum() >= (1 - epsilon) * total * (1 - 1e-5)
    if rank > min(k_min, side):
        assert values[0, : rank - 1].sum() < (1 - epsilon) * total


def test_truncation_keeps_the_trace() -> None:
    values = torch.tensor([[8.0, 4.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    vectors = torch.eye(4).expand(2, 4, 4)
    basis = published.truncate(values, vectors, torch.tensor([2, 4]), width=4)
    torch.testing.assert_close(basis.tail, torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(basis.mass, torch.tensor([12 / 15, 1.0]))
    assert basis.vectors[0, :, 2:].abs().max() == 0
    torch.testing.assert_close(basis.values.sum(-1) + basis.tail * torch.tensor([2.0, 0.0]), values.sum(-1))


def test_preconditioner_with_truncated_factors_is_the_dense_one() -> None:
    torch.manual_seed(0)
    grads = torch.randn(1, 3, 5, dtype=torch.float64)
    dense, bases = [], []
    for side in (3, 5):
        root = torch.randn(side, side, dtype=torch.float64)
        values, vectors = ops.eigh((root @ root.T)[None], torch.tensor([0.1], dtype=torch.float64))  # type: ignore[misc]
        basis = published.truncate(values, vectors, torch.tensor([2]), width=2)
        bases.append((basis.vectors, basis.values, basis.tail))
        spectrum = torch.cat([values[0, :2], values[0, 2:].mean().expand(side - 2)])
        dense.append(vectors[0] @ torch.diag(spectrum**-0.25) @ vectors[0].T)
    expected = dense[0] @ grads[0] @ dense[1]
    torch.testing.assert_close(published.kronecker_precondition(grads, bases[0], bases[1])[0], expected)


def sketch(vectors: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, decay: float) -> tuple[torch.Tensor, ...]:
    lift = torch.nn.functional.pad(torch.eye(rows.shape[1], dtype=rows.dtype), (vectors.shape[1], 0))
    found = eigenbasis.sketch(eigenbasis.gram(rows, vectors), values, lift.expand(len(rows), -1, -1), decay)
    assert found is not None
    return found[0] @ torch.cat([vectors, rows], 1), *found[1:]


def test_sketch_is_the_top_of_the_dense_matrix_and_accounts_for_the_rest() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 3, 9, dtype=torch.float64)
    vectors, values = torch.zeros(2, 4, 9, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    vectors, values, lost = sketch(vectors, values, rows, 0.5)
    assert (values[:, 3] == 0).all() and (vectors[:, 3] == 0).all()
    torch.testing.assert_close((vectors.mT * values[:, None]) @ vectors, rows.mT @ rows)
    more = torch.randn(2, 3, 9, dtype=torch.float64)
    dense = 0.5 * rows.mT @ rows + more.mT @ more
    vectors, values, lost = sketch(vectors, values, more, 0.5)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense).flip(-1)[:, :4])
    torch.testing.assert_close(vectors @ dense @ vectors.mT, values.diag_embed())
    torch.testing.assert_close(values.sum(-1) + lost, dense.diagonal(dim1=1, dim2=2).sum(-1))


def test_schedule() -> None:
    for warmup, updates, freq, start in ((100, 10, 20, 200), (10, 1, 10, 10)):
        group = {"warmup_steps": warmup, "min_precond_updates": updates, "precond_freq": freq}
        assert published.Published().phase1_steps(group) == start
    assert [base.blend_weight(step, 10, 3) for step in (10, 11, 12, 13, 14, 99)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert base.blend_weight(11, 10, 0) == 1
