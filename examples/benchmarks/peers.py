"""The optimizers that are compared, each by the name and the options that a command line gives: ``scao:k_max=8``.

Every builder gets the model and makes a ``torch.optim.Optimizer`` over its trainable parameters without weight decay.
A peer whose package is absent, or that does not run here, is ``Unavailable`` with the reason.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any
from unittest import mock

import torch
from polora import PoLoRA, lora_pairs
from shampoo import Shampoo
from torch import Tensor, nn
from torch.optim import Optimizer

from scao_hf import SCAO, ops
from scao_hf.blocks import blocks_of
from scao_hf.experts import find_vocabulary
from scao_hf.initial import is_untrained
from scao_hf.options import LARGEST_RANK, OPTIONS, RULE_DEFAULTS, RULES, default_rank
from scao_hf.rules import eigenbasis, published, rule_of

Builder = Callable[..., Optimizer]


class Unavailable(Exception):
    """The optimizer cannot run here; the message says why."""


class UnknownOption(ValueError):
    """An option that the optimizer does not have; the message names it."""


class Several(Optimizer):
    """Optimizers that step together, for rules that are meant for some of the parameters only."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([param for part in parts for group in part.param_groups for param in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters to optimize, with their names."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters to optimize."""
    return [param for _, param in trainable(model)]


def imported(module: str, distribution: str) -> Any:
    """The module of an optional package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{distribution} is not installed ({error}): see examples/benchmarks/README.md") from error


def adamw(model: nn.Module, lr: float, beta1: float = 0.9, beta2: float = 0.999) -> Optimizer:
    """torch's own, in its fused form."""
    return torch.optim.AdamW(parameters(model), lr=lr, betas=(beta1, beta2), weight_decay=0.0, fused=True)


def scao(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """SCAO with its default rule."""
    return SCAO(trainable(model), lr=lr, weight_decay=0.0, vocabulary=find_vocabulary(model), **options)


def scao_published(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """SCAO with the published rule."""
    return SCAO(trainable(model), lr=lr, weight_decay=0.0, rule="published", **options)


class Undebiased(SCAO):
    """The published rule whose curvature averages are used as they are, without (E2), which nobody should do."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of SCAO with (E2) left out."""
        with mock.patch.object(published, "debias", lambda factor, rho, count: factor):
            return super().step(closure)


def scao_published_undebiased(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """SCAO with the published rule and no bias correction, for an ablation."""
    return Undebiased(trainable(model), lr=lr, weight_decay=0.0, rule="published", **options)


class Ungrafted(SCAO):
    """SCAO's own rule with steps of the size that they have in their bases, without (U13), in PyTorch code."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of SCAO with (U13) left out."""
        with mock.patch.object(eigenbasis, "MOST_GAIN", 1.0), mock.patch.object(ops, "NATIVE", frozenset()):
            return super().step(closure)


def scao_ungrafted(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """SCAO whose steps do not get AdamW's size, for an ablation."""
    return Ungrafted(trainable(model), lr=lr, weight_decay=0.0, **{"rule": "eigenbasis", **options})


def matrices_and_others(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What Muon and its relatives are meant for, and embeddings, heads and vectors, which they leave to AdamW."""
    lookups = ("embed", "lm_head")
    matrix = {name: param.ndim == 2 and not any(word in name for word in lookups) for name, param in trainable(model)}
    matrices = [param for name, param in trainable(model) if matrix[name]]
    return matrices, [param for name, param in trainable(model) if not matrix[name]]


def muon(model: nn.Module, lr: float, adjust_lr_fn: str = "match_rms_adamw") -> Optimizer:
    """torch.optim.Muon on the matrices, AdamW on embeddings and everything else."""
    matrices, others = matrices_and_others(model)
    parts: list[Optimizer] = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn=adjust_lr_fn)]
    if others:
        parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True))
    return Several(*parts)


def normuon(model: nn.Module, lr: float, update_scale: str = "match_rms", **options: Any) -> Optimizer:
    """NorMuon as pytorch-optimizer has it, on the matrices; AdamW on embeddings and everything else."""
    build = imported("pytorch_optimizer", "pytorch-optimizer").NorMuon
    matrices, others = matrices_and_others(model)
    groups = [{"params": matrices, "lr": lr, "use_muon": True, "update_scale": update_scale, **options}]
    parts: list[Optimizer] = [build(groups)]
    if others:
        parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True))
    return Several(*parts)


def soap(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """SOAP as pytorch-optimizer has it."""
    return imported("pytorch_optimizer", "pytorch-optimizer").SOAP(
        parameters(model), lr=lr, weight_decay=0.0, **options
    )


def shampoo(
    model: nn.Module,
    lr: float,
    graft_type: int = 3,
    start_preconditioning_step: int = 10,
    preconditioning_compute_steps: int = 10,
    **options: Any,
) -> Optimizer:
    """Scalable Shampoo as pytorch-optimizer has it: with RMSProp's step size, refreshed early and often."""
    return imported("pytorch_optimizer", "pytorch-optimizer").ScalableShampoo(
        parameters(model),
        lr=lr,
        weight_decay=0.0,
        graft_type=graft_type,
        start_preconditioning_step=start_preconditioning_step,
        preconditioning_compute_steps=preconditioning_compute_steps,
        **options,
    )


def plain_shampoo(model: nn.Module, lr: float, epsilon: float = 1e-4, decomposition: str = "svd") -> Optimizer:
    """Shampoo from its definition (shampoo.py)."""
    return Shampoo(parameters(model), lr=lr, epsilon=epsilon, decomposition=decomposition)


def scao_pypi(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """The public ``scao`` package from PyPI, which is another project's."""
    return imported("scao", "scao").SCAO(parameters(model), lr=lr, weight_decay=0.0, **options)


def adamw8bit(model: nn.Module, lr: float) -> Optimizer:
    """bitsandbytes' 8-bit AdamW."""
    bitsandbytes = imported("bitsandbytes", "bitsandbytes")
    device = parameters(model)[0].device
    probe = nn.Parameter(torch.ones(64, 128, device=device))
    probe.grad = torch.ones_like(probe)
    try:
        bitsandbytes.optim.AdamW8bit([probe], lr=1e-3).step()
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        raise Unavailable(f"bitsandbytes' AdamW8bit does not run on {device.type}: {error}") from error
    return bitsandbytes.optim.AdamW8bit(parameters(model), lr=lr, weight_decay=0.0)


#: How many times A's learning rate B's is in LoRA+, if nothing else is said.
LORAPLUS_RATIO = 16


def with_loraplus(base: type[Optimizer], model: nn.Module, lr: float, ratio: float, **options: Any) -> Optimizer:
    """An optimizer with LoRA+ as peft has it: ``lr`` is A's learning rate, and B's is ``ratio`` times as large."""
    factory = imported("peft.optimizers", "peft").create_loraplus_optimizer
    if not any("lora_B" in name for name, _ in trainable(model)):
        raise Unavailable("LoRA+ is defined for LoRA factors only")
    return factory(model, base, lr=lr, loraplus_lr_ratio=ratio, weight_decay=0.0, **options)


def loraplus(model: nn.Module, lr: float, ratio: float = LORAPLUS_RATIO) -> Optimizer:
    """AdamW with LoRA+."""
    return with_loraplus(torch.optim.AdamW, model, lr, ratio)


def scao_loraplus(model: nn.Module, lr: float, ratio: float = LORAPLUS_RATIO, **options: Any) -> Optimizer:
    """SCAO with LoRA+."""
    return with_loraplus(SCAO, model, lr, ratio, **options)


def riemannian(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """peft's Riemannian-preconditioned AdamW."""
    factory = getattr(imported("peft.optimizers", "peft"), "create_riemannian_optimizer", None)
    if factory is None:
        installed = importlib.metadata.version("peft")
        raise Unavailable(f"peft {installed} has no create_riemannian_optimizer: it came with a later release")
    if not any("lora_B" in name for name, _ in trainable(model)):
        raise Unavailable("Riemannian preconditioning is defined for LoRA factors only")
    return factory(model, torch.optim.AdamW, lr=lr, weight_decay=0.0, **options)


def polora(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """PoLoRA, from its definition (polora.py)."""
    pairs = lora_pairs(model)
    if not pairs:
        raise Unavailable("PoLoRA is defined for LoRA factors only")
    return PoLoRA(pairs, lr=lr, **options)


#: name -> (builder, the distributions whose versions say what ran)
PEERS: dict[str, tuple[Builder, tuple[str, ...]]] = {
    "adamw": (adamw, ("torch",)),
    "scao": (scao, ("scao-hf",)),
    "scao-published": (scao_published, ("scao-hf",)),
    "scao-published-undebiased": (scao_published_undebiased, ("scao-hf",)),
    "scao-ungrafted": (scao_ungrafted, ("scao-hf",)),
    "scao-loraplus": (scao_loraplus, ("scao-hf", "peft")),
    "scao-pypi": (scao_pypi, ("scao",)),
    "muon": (muon, ("torch",)),
    "normuon": (normuon, ("pytorch_optimizer",)),
    "soap": (soap, ("pytorch_optimizer",)),
    "shampoo": (shampoo, ("pytorch_optimizer",)),
    "plain-shampoo": (plain_shampoo, ()),
    "adamw8bit": (adamw8bit, ("bitsandbytes",)),
    "loraplus": (loraplus, ("peft",)),
    "riemannian": (riemannian, ("peft",)),
    "polora": (polora, ()),
}
#: Rules with a part left out: no optimizers that anyone could take instead.
ABLATIONS = frozenset({"scao-published-undebiased", "scao-ungrafted"})


def parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Split ``name:option=value:option=value`` into the name and its options.

    Raises:
        ValueError: an unknown optimizer, or an option without a value.
    """
    name, *parts = spec.split(":")
    if name not in PEERS:
        raise ValueError(f"optimizer {name!r} is not one of {', '.join(PEERS)}")
    options: dict[str, Any] = {}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals or not option or not value:
            raise ValueError(f"{part!r} in {spec!r} is not option=value")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[option] = value
    return name, options


#: The parameters of the problem behind a fingerprint: matrices with a small side and a vector; matrices with two large sides.
SMALL: tuple[tuple[int, ...], ...] = ((8, 40), (40, 8), (6, 24), (6, 24), (6, 24), (12,))
LARGE = ((72, 80), (80, 72))


@functools.cache
def behaviour(rule: str, options: tuple[tuple[str, Any], ...], shapes: tuple[tuple[int, ...], ...] = SMALL) -> str:
    """A fingerprint of what SCAO does with some options, to see which rule a result belongs to.

    It is the trajectory of a small problem in float64 PyTorch code, through both phases, rounded far above rounding
    errors: code that computes the same thing in another way keeps it, a changed equation or default does not.

    The curvature is held in float64 even with ``use_int8_ema``, which rounds in float32 and so differs between
    processors: a single code that is rounded the other way moves the trajectory by a thousandth.

    Args:
        rule: SCAO's rule.
        options: other keyword arguments of ``SCAO``, as pairs.
        shapes: of the problem's parameters.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = [nn.Parameter(draw(*shape)) for shape in shapes]
    targets, scales = [draw(*param.shape) for param in params], [draw(*param.shape).exp() for param in params]
    optimizer = SCAO(params, lr=1e-2, weight_decay=0.01, rule=rule, **dict(options))
    optimizer.param_groups[0]["use_int8_ema"] = False
    digest = hashlib.sha256()
    for _ in range(45):
        for param, target, scale in zip(params, targets, scales, strict=True):
            param.grad = (param.detach() - target + 0.3 * draw(*param.shape)) * scale
        optimizer.step()
        digest.update(" ".join(f"{float(param.detach().norm()):.6e}" for param in params).encode())
    return digest.hexdigest()[:12]


def _fingerprint(rule: str, options: dict[str, Any], largest: bool) -> str:
    """``behaviour``, where ``largest`` says that the default rank is the largest for all matrices that are trained."""
    shapes = LARGE if rule == "orthogonal" else SMALL + LARGE if rule == "auto" else SMALL
    if largest and RULE_DEFAULTS[rule]["k_max"] is None:
        options = {"k_max": LARGEST_RANK, **options}  # the problem's own matrices are too small for it
    return behaviour(rule, tuple(sorted(options.items())), shapes)


def is_current(cell: dict[str, Any]) -> bool:
    """Whether a recorded run's optimizer is still what its options stood for; of others than SCAO, always.

    Args:
        cell: of the record, with ``resolved`` options.
    """
    options = dict(cell["options"])
    recorded = options.pop("behaviour", None)
    if recorded is None:
        return True
    rule = options.pop("rule")
    options = {  # JSON has made a list of a pair
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if name not in ("ratio", "blocks")
    }
    largest = "rank" not in cell or default_rank(cell["rank"]) == LARGEST_RANK
    try:
        return _fingerprint(rule, options, largest) == recorded
    except (TypeError, ValueError):  # an option or a value of then
        return False


def resolved(spec: str, model: nn.Module | None = None) -> dict[str, Any]:
    """The options that a spec stands for. SCAO's name what it does with them: a changed rule makes another run.

    Args:
        spec: an optimizer and its options, as on a command line.
        model: what is trained, with the weights that it is trained from. SCAO's rule is the one that steps its matrices,
            ``auto`` where there are some of either kind. Where SCAO cuts one of them, which those of its fingerprint are
            too small for, ``blocks`` is the largest dense factor.

    Raises:
        ValueError: an unknown optimizer, or an option or value that SCAO does not have.
    """
    name, options = parse(spec)
    if name.startswith("scao") and name != "scao-pypi":
        own = {"scao-ungrafted": "eigenbasis"}.get(name, RULES[0])
        rule = "published" if name.startswith("scao-published") else options.pop("rule", own)
        most = options.get("max_precond_dim", RULE_DEFAULTS[rule]["max_precond_dim"])
        matrices = [param for param in parameters(model) if param.ndim == 2] if model else []
        if rule == "auto":
            words = find_vocabulary(model) if model else set()
            sides = {param: min(param.shape) > most for param in matrices if param not in words}
            scratch = options.pop("from_scratch", None)
            if scratch is None:
                scratch = is_untrained([param for param, large in sides.items() if large])
            kinds = {large and scratch for large in sides.values()}
            rule = "auto" if len(kinds) > 1 else "orthogonal" if True in kinds else "eigenbasis"
        shared = {"ratio": options.pop("ratio", LORAPLUS_RATIO)} if name == "scao-loraplus" else {}
        ranks = {default_rank(min(param.shape)) for param in matrices}
        try:
            mark = _fingerprint(rule, options, ranks == {LARGEST_RANK})
            found = {"rule": rule, **shared, **options, "behaviour": mark}
        except TypeError as error:
            near = [match for option in options for match in difflib.get_close_matches(option, OPTIONS, n=1)]
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UnknownOption(f"{spec!r}: {error}{hint}") from error
        cut_sides = rule_of({"rule": rule}, matrix=True).cut_sides
        cut = rule != "auto" and any(len(blocks_of(param.shape, most, cut_sides)) > 1 for param in matrices)
        return found | ({"blocks": most} if cut else {})
    try:
        inspect.signature(PEERS[name][0]).bind(None, 0.0, **options)
    except TypeError as error:
        raise UnknownOption(f"{spec!r}: {error}") from error
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(PEERS[name][0]).parameters.items()
        if parameter.default is not parameter.empty
    }
    return {**defaults, **options}


def create(spec: str, model: nn.Module, lr: float) -> Optimizer:
    """Build the optimizer of a spec.

    Raises:
        Unavailable: its package is absent or it cannot run here.
        UnknownOption: an option that it does not have.
        ValueError: an unknown optimizer.
    """
    name, options = parse(spec)
    try:
        return PEERS[name][0](model, lr, **options)
    except TypeError as error:
        raise UnknownOption(f"{spec!r}: {error}") from error


def versions(spec: str) -> dict[str, str]:
    """The versions of the distributions that an optimizer comes from."""
    found = {}
    for distribution in PEERS[parse(spec)[0]][1]:
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    return found


NOT_STATE = (str, bytes, int, float, type, nn.Module, FunctionType, MethodType, ModuleType)


def state_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """The bytes of every tensor that the optimizer holds, wherever it keeps it, besides parameters and gradients."""
    foreign = {param.untyped_storage().data_ptr() for param in model.parameters()}
    foreign |= {param.grad.untyped_storage().data_ptr() for param in model.parameters() if param.grad is not None}
    storages: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [vars(optimizer)]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, NOT_STATE):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor) and not item.is_meta:
            storage = item.untyped_storage()
            if storage.data_ptr() not in foreign:
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, (list, tuple, set)):
            stack += item
        elif hasattr(item, "__dict__"):
            stack.append(vars(item))
    return sum(storages.values())
