"""The fast path against the float64 reference, and the limits in which SCAO is AdamW."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scao_hf import SCAO, options, reference

REFERENCES = {"published": reference.published, "eigenbasis": reference.eigenbasis, "orthogonal": reference.orthogonal}


def gradients(shape: tuple[int, int], steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Gradients with a decaying spectrum on both sides and a slowly turning mean, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sides: int) -> torch.Tensor:
        return torch.randn(*sides, generator=generator, dtype=torch.float64)

    left = normal(shape[0], shape[0]) * torch.logspace(0, -1, shape[0], dtype=torch.float64)
    right = torch.logspace(0, -1.5, shape[1], dtype=torch.float64)[:, None] * normal(shape[1], shape[1])
    drift = normal(*shape)
    return [0.1 * left @ (normal(*shape) + drift) @ right for _ in range(steps)]


def trajectory(weight: torch.Tensor, grads: list[torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
    param = torch.nn.Parameter(weight.clone())
    optimizer = SCAO([param], **kwargs)
    steps = []
    for grad in grads:
        param.grad = grad.to(param.dtype).clone()
        optimizer.step()
        steps.append(param.detach().double().clone())
    return steps


OPTIONS = {"warmup_steps": 4, "blend_steps": 5, "precond_freq": 3, "min_precond_updates": 1, "k_min": 2, "k_max": 4}


@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize(
    ("shape", "extra"),
    [
        ((5, 12), {}),
        ((5, 12), {"cautious": False}),
        ((12, 5), {}),
        ((6, 6), {"tau": 0.3}),
        ((3, 40), {"epsilon_sparse": 0.4, "rho": 0.8}),
        ((4, 9), {"blend_steps": 0, "warmup_steps": 0}),
        ((8, 30), {"k_max": 30, "k_min": 1, "epsilon_sparse": 0.0}),
        ((4, 20), {"k_max": None, "epsilon_sparse": 0.0}),
    ],
)
def test_fast_path_follows_the_reference(rule: str, shape: tuple[int, int], extra: dict[str, Any]) -> None:
    weight, grads = gradients(shape, 1, seed=7)[0], gradients(shape, 30)
    chosen = {**OPTIONS, **extra}
    fast = trajectory(weight, grads, lr=0.01, rule=rule, **chosen)
    full = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.01, **options.resolve(rule, chosen)}
    tall = shape[0] > shape[1] and rule != "published"
    oriented = [g.T for g in grads] if tall else grads
    slow = REFERENCES[rule](weight.T if tall else weight, oriented, full)
    for step, (a, b) in enumerate(zip(fast, slow, strict=True), start=1):
        torch.testing.assert_close(a, b.T if tall else b, rtol=1e-6, atol=1e-8, msg=lambda m, s=step: f"step {s}: {m}")


def test_matrices_that_take_turns_follow_the_reference() -> None:
    """(S1) Seven matrices in three slots: each refreshed in its own step, the first time after fewer of them."""
    shapes = [(5, 12), (12, 5), (4, 9), (5, 12), (5, 12), (4, 9), (5, 12)]
    slots = [0, 0, 2, 0, 1, 2, 1]  # 3 * before // 372: 5 x 12 first (0, 60, 120, 180, 240), then 4 x 9 (300, 336)
    weights = [gradients(shape, 1, seed=7 + index)[0] for index, shape in enumerate(shapes)]
    grads = [gradients(shape, 30, seed=index) for index, shape in enumerate(shapes)]
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = SCAO(params, lr=0.01, **OPTIONS)
    full = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.01, **options.resolve("eigenbasis", OPTIONS)}
    for step in range(30):
        for param, mine in zip(params, grads, strict=True):
            param.grad = mine[step].clone()
        optimizer.step()
    for param, weight, mine, slot in zip(params, weights, grads, slots, strict=True):
        tall = weight.shape[0] > weight.shape[1]
        slow = reference.eigenbasis(weight.T if tall else weight, [g.T for g in mine] if tall else mine, full, slot)[-1]
        torch.testing.assert_close(param.detach(), slow.T if tall else slow, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", REFERENCES)
def test_float32_stays_near_the_reference(rule: str) -> None:
    weight, grads = gradients((6, 48), 1, seed=7)[0], gradients((6, 48), 30)
    fast = trajectory(weight.float(), grads, lr=0.01, rule=rule, **OPTIONS)
    full = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.01, **options.resolve(rule, OPTIONS)}
    slow = REFERENCES[rule](weight, grads, full)
    moved = (slow[-1] - weight).norm()
    # The long basis is kept in bfloat16: a relative error of 2^-9 a direction, against the distance covered.
    assert (fast[-1] - slow[-1]).norm() < 0.02 * moved


@pytest.mark.parametrize("rule", ["eigenbasis", "published", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_curvature_it_is_adamw(rule: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(4, 10), (10, 4), (7,), (), (3, 2, 5), (6, 3, 2, 2), (1, 9)]
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    scao = SCAO(ours, rule=rule, warmup_steps=100, **settings)
    adamw = torch.optim.AdamW(theirs, **settings)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        scao.step()
        adamw.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13 if dtype == torch.float64 else 2e-6, atol=1e-7)


def test_published_rule_cuts_large_matrices_into_independent_blocks() -> None:
    weight, grads = gradients((10, 16), 1, seed=3)[0], gradients((10, 16), 12)
    whole = trajectory(weight, grads, rule="published", max_precond_dim=8, **OPTIONS)[-1]
    for rows in ((0, 5), (5, 10)):
        for cols in ((0, 8), (8, 16)):
            part = (slice(*rows), slice(*cols))
            alone = trajectory(weight[part], [g[part] for g in grads], rule="published", **OPTIONS)[-1]
            torch.testing.assert_close(whole[part], alone, rtol=1e-9, atol=1e-12)
