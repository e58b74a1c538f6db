"""The options of SCAO: names, legal values and each rule's defaults, in one table; edits of them in a run.

The optimizer validates against this table, the Axolotl plugin builds its ``scao_*`` fields from it and the
README's option table is checked against it, so a name, a range or a default is written down once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from numbers import Real
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from scao_hf.namesake import foreign_option

#: What an edit of an option in ``optimizer.param_groups`` does, from the next step on.
AT_ONCE = "acts at once"
CONVERTS = "converts the state"
LAYOUT = "an error where it changes the layout of existing state"
PHASE = "acts at once; an error where it puts existing state into the other phase"


@dataclass(frozen=True)
class Option:
    """One option: its type, its legal range (bounds included unless ``open_*``), what it does, what an edit of it does."""

    kind: type
    doc: str
    _: KW_ONLY
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    optional: bool = False
    choices: tuple[str, ...] = ()
    edited: str = AT_ONCE

    @property
    def valid(self) -> str:
        """The legal values in words, as error messages and documentation show them."""
        if self.choices:
            words = "one of " + ", ".join(repr(choice) for choice in self.choices)
        elif self.kind is bool:
            words = "True or False"
        else:
            left = "(-inf" if self.low is None else f"{'(' if self.open_low else '['}{self.low:g}"
            right = "inf)" if self.high is None else f"{self.high:g}{')' if self.open_high else ']'}"
            words = f"{'an integer' if self.kind is int else 'a number'} in {left}, {right}"
        return words + (" or None" if self.optional else "")

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` has the right type and lies in the range."""
        if value is None:
            return self.optional
        if self.choices:
            return value in self.choices
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if not isinstance(value, int if self.kind is int else (int, float)):
            return False
        # An integer that no 64 bits hold cannot come back out of a tensor operation.
        if not math.isfinite(value) or (isinstance(value, int) and abs(value) >= 2**63):
            return False
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or (value < self.high if self.open_high else value <= self.high)
        return above and below


#: The rules that step matrices by more than their single entries.
MATRIX_RULES = ("eigenbasis", "orthogonal", "published")
RULES = ("auto", *MATRIX_RULES, "adamw")

#: Options that every rule has, besides torch's own lr, betas, eps and weight_decay.
OPTIONS: dict[str, Option] = {
    "rule": Option(
        str,
        "the update rule of matrices: 'eigenbasis' is SCAO's own, 'orthogonal' one for matrices with two large sides, 'auto' "
        "chooses between them by shape and from_scratch, 'published' is a reference, 'adamw' is for embeddings and heads",
        choices=RULES,
        edited=LAYOUT,
    ),
    "from_scratch": Option(
        bool,
        "with 'auto': True takes 'orthogonal' for matrices with two large sides, False takes 'eigenbasis'; None looks in the "
        "first step whether the weights are still random",
        optional=True,
        edited=LAYOUT,
    ),
    "warmup_steps": Option(int, "AdamW steps, with these betas, before phase 2", low=0, edited=PHASE),
    "blend_steps": Option(int, "length of the ramp from the AdamW step to the curvature step", low=0),
    "min_precond_updates": Option(int, "refreshes of the curvature basis required before phase 2", low=1, edited=PHASE),
    "precond_freq": Option(int, "steps between two refreshes of a matrix's curvature basis", low=1, edited=PHASE),
    "rho": Option(float, "EMA decay of the curvature per step", low=0, high=1, open_high=True),
    "epsilon_sparse": Option(
        float, "spectral mass that the truncated basis may leave out", low=0, high=1, open_high=True
    ),
    "k_min": Option(int, "smallest rank of the truncated basis", low=1),
    "k_max": Option(
        int,
        "largest rank of the truncated basis; None: 16, or one and a half times the matrix's small side where that is less",
        low=1,
        optional=True,
        edited=LAYOUT,
    ),
    "tau": Option(float, "bound on the natural-gradient norm, None for no bound", low=0, open_low=True, optional=True),
    "max_precond_dim": Option(
        int,
        "largest dense curvature factor; a larger side that has a dense factor is cut into blocks",
        low=2,
        edited=LAYOUT,
    ),
    "use_int8_ema": Option(bool, "hold the curvature as blockwise int8 with stochastic rounding", edited=LAYOUT),
    "cautious": Option(
        bool, "zero the entries of a curvature step that oppose the current gradient; False with 'published'"
    ),
    "moment_dtype": Option(
        str,
        "how the moments are kept between steps; below float32 with stochastic rounding, int8 in blocks of 128",
        choices=("float32", "bfloat16", "int8"),
        edited=CONVERTS,
    ),
    "stochastic_rounding": Option(
        bool,
        "round bfloat16 weights to one of the two nearest numbers, right on average: small steps and decay are not lost",
    ),
    "on_nonfinite": Option(
        str,
        "a NaN or Inf gradient leaves its matrix as it is ('skip'; ten in a row are an error) or is an error ('raise')",
        choices=("skip", "raise"),
    ),
}

#: The largest rank of a truncated basis unless ``k_max`` says otherwise.
LARGEST_RANK = 16


def default_rank(small_side: int) -> int:
    """What ``k_max`` stands for when it is None: so many that the state of a LoRA stays about as large as AdamW's."""
    return min(LARGEST_RANK, small_side + small_side // 2)


#: What an option is when it is not passed: what the benchmarks support for SCAO's own rule, and the published table.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "betas": ((0.9, 0.99), (0.9, 0.999)),
    "from_scratch": (None, None),
    "warmup_steps": (3, 100),
    "blend_steps": (2, 50),
    "min_precond_updates": (1, 10),
    "precond_freq": (2, 20),
    "rho": (0.95, 0.999),
    "epsilon_sparse": (0.05, 0.05),
    "k_min": (4, 8),
    "k_max": (None, 128),
    "tau": (None, None),
    "max_precond_dim": (64, 4096),
    "use_int8_ema": (False, False),
    "cautious": (True, False),
    "moment_dtype": ("float32", "float32"),
    "stochastic_rounding": (False, False),
    "on_nonfinite": ("skip", "skip"),
}
RULE_DEFAULTS: dict[str, dict[str, Any]] = {
    rule: {name: published if rule == "published" else own for name, (own, published) in _DEFAULTS.items()}
    for rule in RULES
}

#: Keys of a YAML besides the options of a parameter group.
SWITCHES = {
    "fuse_moe": Option(
        bool, "compute LoRA on stacked experts next to their products (scao_hf.moe), with any optimizer"
    ),
    "partial_resume": Option(bool, "resume though other parameters are trained: the new ones start without state"),
}

TORCH_OPTIONS: dict[str, Option] = {
    "lr": Option(float, "learning rate", low=0),
    "beta": Option(float, "decay of an Adam moment", low=0, high=1, open_high=True),
    # A smaller one, times a bias correction, is zero in float32, and a step 0 / 0.
    "eps": Option(float, "Adam's epsilon", low=1e-30),
    "weight_decay": Option(float, "decoupled weight decay", low=0),
}


def check(name: str, value: Any, option: Option) -> None:
    """Raise ``ValueError`` naming the option, the value and the legal range unless ``value`` is legal."""
    if option.accepts(value):
        return
    kind, hint = option.kind, ""
    # A NumPy scalar would be in every checkpoint, which torch.load then refuses to read.
    if isinstance(value, Real) and not isinstance(value, (int, float)) and kind in (int, float):
        hint = f", of Python's own type: pass {kind.__name__}(...) of it"
    raise ValueError(f"{name}={value!r} is not valid: it must be {option.valid}{hint}")


def read_value(name: str, value: Any, option: Option) -> Any:
    """``value`` in the option's type. Text is converted, because YAML reads ``1e-3`` as text and ``optim_args`` all.

    Raises:
        ValueError: the value has the wrong type or lies outside the option's range.
    """
    if isinstance(value, str) and not option.choices:
        text = value.strip()
        words = {"true": True, "false": False} if option.kind is bool else {}
        if option.optional and text.lower() in ("none", "null"):
            return None
        try:
            value = words[text.lower()] if option.kind is bool else option.kind(text)
        except (KeyError, ValueError):
            value = text
    if isinstance(value, str) and option.choices:
        value = value.strip().lower()
    check(name, value, option)
    return value


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``" (did you mean 'k_max'?)"`` for the nearest known word, or an empty string where none is near.

    Args:
        word: what was written.
        known: what may be meant.
        cutoff: how near it must be, 1 for the same word.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


#: What users of other low-rank methods look for, and SCAO's name for it.
SYNONYMS = {"rank": "k_max"}


def about_unknown(word: str, known: Iterable[str], prefix: str = "") -> str:
    """What a message adds about a word that is not among the known options: whose it is, the nearest one, or all of them.

    Args:
        word: without the prefix.
        known: the options that are read in this place.
        prefix: what they are written with there.
    """
    if told := foreign_option(word, prefix):
        return told
    known = list(known)
    near = did_you_mean(word, (*known, *SYNONYMS))
    for synonym, name in SYNONYMS.items():
        near = near.replace(repr(synonym), repr(name))
    return near.replace("'", "'" + prefix, 1) or f"; its options are: {', '.join(prefix + name for name in known)}"


def resolve_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``resolve`` of the options among arguments of ``SCAO`` (``scao_kwargs``, ``optim_args``), ``rule`` in them or not."""
    passed = {
        name: value for name, value in arguments.items() if name != "rule" and (name in OPTIONS or name == "betas")
    }
    return resolve(arguments.get("rule") or RULES[0], passed)


def resolve(rule: str, passed: dict[str, Any]) -> dict[str, Any]:
    """Fill the options that were not passed with the rule's defaults, and validate every one.

    Args:
        rule: one of ``RULES``.
        passed: options by name; ``None`` means "not passed" (where it is legal, it is SCAO's default as well).

    Returns:
        Every option of the rule, ``betas`` included, ``rule`` first.

    Raises:
        ValueError: an unknown rule, a value outside its range, or two options that contradict each other.
    """
    check("rule", rule, OPTIONS["rule"])
    options = {**RULE_DEFAULTS[rule], **{name: value for name, value in passed.items() if value is not None}}
    for name, value in options.items():
        if name != "betas":
            check(name, value, OPTIONS[name])
    if rule == "published" and options["cautious"]:
        raise ValueError(
            "cautious=True is not valid with rule='published': it must be False, or take rule='eigenbasis'"
        )
    if rule in MATRIX_RULES and options["from_scratch"] is not None:
        raise ValueError(
            f"from_scratch={options['from_scratch']} is not valid with rule={rule!r}: it is for rule='auto'"
        )
    if options["k_min"] > (options["k_max"] or LARGEST_RANK):
        if passed.get("k_min") is not None and passed.get("k_max") is not None:
            raise ValueError(f"k_min={options['k_min']} must not exceed k_max={options['k_max']}")
        # Only one of the two was passed: the other one's default gives way.
        options["k_min"] = options["k_max"] = passed.get("k_max") or options["k_min"]
    return {"rule": rule, **options}


#: A schedule that ends at zero may end so far below: torch's LinearLR is off by a few last places of the first rate.
ROUNDING = 1e-12


def _check_rate(lr: Any) -> None:
    check("lr", 0.0 if isinstance(lr, float) and -ROUNDING < lr < 0 else lr, TORCH_OPTIONS["lr"])


def check_torch_options(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Validate the options that torch's own AdamW has; a tensor ``lr`` is checked by its caller."""
    _check_rate(lr)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} is not valid: it must be two numbers, for example (0.9, 0.99)")
    for index, beta in enumerate(betas):
        check(f"betas[{index}]", beta, TORCH_OPTIONS["beta"])
    check("eps", eps, TORCH_OPTIONS["eps"])
    check("weight_decay", weight_decay, TORCH_OPTIONS["weight_decay"])


#: What a parameter group must have, apart from its parameters.
GROUP_KEYS = ("lr", "betas", "eps", "weight_decay", *OPTIONS, "scao_version")
#: The options that existing state depends on.
SHAPING = tuple(name for name, option in OPTIONS.items() if option.edited != AT_ONCE)


def check_group(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless a parameter group, which may have been edited, has every option, all legal but its lr."""
    missing = [name for name in GROUP_KEYS if name not in group]
    if missing:
        raise ValueError(
            f"a parameter group lacks {', '.join(missing)}: add it with optimizer.add_param_group, or copy one of "
            "optimizer.param_groups"
        )
    check_foreign(group)
    check_torch_options(0, group["betas"], group["eps"], group["weight_decay"])
    for name, option in OPTIONS.items():
        check(name, group[name], option)  # None is a default in a constructor alone
    # What was found under "auto" remains when that is edited.
    own = RULE_DEFAULTS[group["rule"]].keys() - {"from_scratch"}
    resolve(group["rule"], {name: group[name] for name in own})


def check_foreign(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for what other optimizers read in a parameter group and SCAO would do otherwise."""
    for name, instead in {"maximize": "negate the loss", "amsgrad": "leave it out"}.items():
        if group.get(name):
            raise ValueError(f"{name}={group[name]!r} in a parameter group is not an option of SCAO: {instead}")


_NAMES = tuple(name for name in GROUP_KEYS if name != "lr")  # which schedules edit in every step
_values = itemgetter(*_NAMES)
_shaping = itemgetter(*map(_NAMES.index, SHAPING))


class Edits:
    """The options under which the state of each parameter group was laid out.

    Args:
        groups: the parameter groups.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self._known = [tuple(map(group.get, _NAMES)) for group in groups]

    def add(self, group: dict[str, Any]) -> None:
        """Add a group whose options have been checked."""
        self._known.append(_values(group))

    def known(self) -> list[dict[str, Any]]:
        """These options, by name."""
        return [dict(zip(_NAMES, values, strict=True)) for values in self._known]

    def shaping(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether options have been edited on which existing state depends; ``accept`` ends that.

        Raises:
            ValueError: an option is illegal or missing.
        """
        for group in groups:
            check_foreign(group)
            if "lr" in group:
                check_lr(group["lr"])
        try:
            values = [*map(_values, groups)]
        except KeyError:
            values = []
        if len(values) == len(self._known) and all(map(is_, chain(*values), chain(*self._known))):
            return False
        for group in groups:
            check_group(group)
        if [*map(_shaping, values)] != [*map(_shaping, self._known)]:
            return True
        self._known = values
        return False

    def own(self, groups: Sequence[dict[str, Any]], name: str) -> None:
        """The optimizer itself has set the option ``name``."""
        place = _NAMES.index(name)
        self._known = [
            (*values[:place], group[name], *values[place + 1 :])
            for values, group in zip(self._known, groups, strict=False)
        ]

    def accept(self, groups: Sequence[dict[str, Any]]) -> None:
        """Their state has been laid out under the options that ``groups`` have now."""
        self._known = [*map(_values, groups)]


def check_lr(lr: Any) -> None:
    """Raise ``ValueError`` for an illegal learning rate; the value of a tensor is not read, as a device would be waited for."""
    if not isinstance(lr, Tensor):
        _check_rate(float(lr) if isinstance(lr, Real) else lr)
    elif lr.numel() != 1:
        raise ValueError(f"lr is a tensor of {lr.numel()} elements: it must have one element")


def eight_bit_hint(optim: str, options: str = "moment_dtype='int8' and use_int8_ema=True") -> str | None:
    """What becomes of the memory when SCAO replaces an optimizer with an 8-bit, 4-bit or paged state, or None for others.

    Args:
        optim: the optimizer's name in TrainingArguments or in an Axolotl YAML.
        options: the options that make SCAO's state small, as they are written where the hint is read.
    """
    name = str(getattr(optim, "value", optim)).lower()
    remedy = f"{options} bring it down to 8 bits"
    if bits := re.search(r"[48](?=bit)|(?<=fp)8", name):
        return f"SCAO's float32 state is about {32 // int(bits[0])} times as large as one in {bits[0]} bits: {remedy}"
    if "paged" in name:
        return f"SCAO's float32 state stays in GPU memory, where a paged one can leave it: {remedy}"
    return None
