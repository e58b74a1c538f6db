"""Any shape, dtype, scale and legal option: finite, bounded, deterministic; scale-equivariant where it has to be."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from scao_hf import SCAO, options

STEPS = 9
QUIET = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
SIDES = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple)
LONG = st.tuples(st.integers(2, 12), st.integers(40, 90)).flatmap(lambda sides: st.sampled_from([sides, sides[::-1]]))
SHAPES = st.lists(SIDES | LONG, min_size=1, max_size=3)


def of_option(name: str, option: options.Option) -> st.SearchStrategy[Any]:
    """Legal values of an option, small enough for a run of some steps."""
    if option.choices:
        values: st.SearchStrategy[Any] = st.sampled_from(option.choices)
    elif option.kind is bool:
        values = st.booleans()
    elif option.kind is int:
        values = st.integers(int(option.low or 0), 6 if name != "max_precond_dim" else 20)
    else:
        values = st.floats(
            option.low or 0, option.high if option.high is not None else 1e3,
            exclude_min=option.open_low, exclude_max=option.open_high, allow_subnormal=False,
        )  # fmt: skip
    return values | st.none() if option.optional else values


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    """Any legal combination of options."""
    chosen = {name: draw(of_option(name, option)) for name, option in options.OPTIONS.items()}
    chosen["rule"] = draw(
        st.sampled_from(("eigenbasis", "published", "adamw"))
    )  # the bounds of the orthogonal rule are others
    chosen["on_nonfinite"] = "skip"
    if chosen["k_max"]:
        chosen["k_min"] = min(chosen["k_min"], chosen["k_max"])
    chosen["betas"] = draw(st.tuples(*[st.floats(0, 0.999)] * 2))
    try:
        options.resolve(chosen["rule"], {name: value for name, value in chosen.items() if name != "rule"})
    except ValueError:
        reject()  # two options that contradict each other
    return chosen


def gradient(shape: tuple[int, ...], dtype: torch.dtype, scale: float, step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    value = torch.randn(shape, generator=draw, dtype=wide) * scale
    if dtype == torch.float16:
        value = value.clamp(-6e4, 6e4)
    return value.to(dtype)


def train(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, scale: float, lr: float = 0.01, **chosen: Any
) -> tuple[list[torch.nn.Parameter], list[float], SCAO]:
    """Parameters, the largest entry of each step in learning rates, and the optimizer."""
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = SCAO(params, lr=lr, weight_decay=0.0, **chosen)
    sizes = []
    for step in range(STEPS):
        before = [param.detach().clone() for param in params]
        for index, param in enumerate(params):
            param.grad = gradient(tuple(param.shape), dtype, scale, 10 * step + index)
        optimizer.step()
        moves = [((p.detach() - b).abs().double() / lr) for p, b in zip(params, before, strict=True) if p.numel()]
        sizes.append(max((float(move.square().mean().sqrt()) for move in moves), default=0.0))
    return params, sizes, optimizer


def is_finite(value: torch.Tensor) -> bool:
    return bool(torch.isfinite(torch.view_as_real(value) if value.is_complex() else value).all())


@QUIET
@given(SHAPES, DTYPES, st.integers(-30, 30), choices())
def test_every_step_is_finite_and_bounded(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, magnitude: int, chosen: dict[str, Any]
) -> None:
    params, sizes, optimizer = train(shapes, dtype, 10.0**magnitude, **chosen)
    assert all(is_finite(param) for param in params)
    for entry in optimizer.state.values():
        assert all(is_finite(value) for value in entry.values() if isinstance(value, torch.Tensor))
    first, second = chosen["betas"]
    if first**2 < second:  # otherwise Adam itself has no bound: a momentum can outlive the squares that it came with
        bound = (1 - first) / ((1 - second) * (1 - first**2 / second)) ** 0.5  # (U14)
        assert max(sizes) <= 4 * max(1.0, bound), f"a step of {max(sizes):.2g} learning rates"
    assert all(isinstance(value, float) for value in optimizer.metrics().values())


@QUIET
@given(SHAPES, DTYPES, st.integers(-3, 3), choices())
def test_the_same_run_twice_is_the_same_to_the_bit(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, magnitude: int, chosen: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, _, _ = train(shapes, dtype, 10.0**magnitude, **chosen)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second, _, _ = train(shapes, dtype, 10.0**magnitude, **chosen)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@QUIET
@given(
    st.sampled_from([(4, 30), (30, 4), (6, 6), (3, 7), (11,)]),
    st.integers(-30, 30),
    st.booleans(),
)
def test_the_scale_of_the_loss_makes_no_difference(shape: tuple[int, ...], power: int, int8: bool) -> None:
    # With eps far below every gradient. The published rule is no case of this: on the ramp it mixes the gradient with a
    # natural gradient of another scale.
    chosen: dict[str, Any] = {"use_int8_ema": int8, "eps": 1e-30, "warmup_steps": 3, "blend_steps": 2}
    chosen |= {"precond_freq": 2, "min_precond_updates": 1}
    plain, _, _ = train([shape], torch.float32, 1.0, **chosen)
    scaled, _, _ = train([shape], torch.float32, 2.0**power, **chosen)
    torch.testing.assert_close(plain[0], scaled[0], rtol=2e-3, atol=2e-4)


@QUIET
@given(st.sampled_from(options.MATRIX_RULES), st.integers(2, 9), st.integers(2, 30), st.integers(0, 3))
def test_transposing_the_problem_transposes_the_step(rule: str, rows: int, cols: int, seed: int) -> None:
    params = []
    for flip in (False, True):
        shape = (cols, rows) if flip else (rows, cols)
        param = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = SCAO(
            [param], lr=0.01, rule=rule, warmup_steps=3, blend_steps=2, precond_freq=2, min_precond_updates=1
        )
        for step in range(STEPS):
            grad = torch.randn(
                rows, cols, generator=torch.Generator().manual_seed(100 * seed + step), dtype=torch.float64
            )
            param.grad = grad.T.clone() if flip else grad
            optimizer.step()
        params.append(param.detach().T if flip else param.detach())
    if rows != cols:  # a square matrix has no smaller side that would be the same one both ways
        torch.testing.assert_close(*params, rtol=1e-6, atol=1e-8)


def test_a_second_moment_without_memory_is_the_last_square() -> None:
    # Found by the search above: as v + (g^2 - v), a small g^2 after a large one came out as zero.
    chosen: dict[str, Any] = {"betas": (0.0, 0.0), "warmup_steps": 0, "blend_steps": 0, "precond_freq": 4}
    _, sizes, _ = train([(2, 40)], torch.float32, 1.0, min_precond_updates=1, **chosen)
    assert max(sizes) < 4
