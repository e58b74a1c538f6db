"""Reading ``scao_*`` keys and ``optim_args``: spelling, types and ranges, before any rule looks at them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from scao_hf.options import OPTIONS, SWITCHES, TORCH_OPTIONS, about_unknown, did_you_mean, read_value

PREFIX = "scao_"
#: Keys that optim_args may hold besides SCAO's options, and the config key that says the same.
MOMENT_KEYS = {"betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon"}
#: Keys of other optimizers that Axolotl accepts and SCAO does not read; ``optim`` is the Trainer's name for ``optimizer``.
WITHOUT_EFFECT = ("adam_beta3", "adam_epsilon2", "optim", "optim_target_modules", "torchdistx_path")
FOREIGN_PREFIXES = ("dion_", "qgalore_")


@dataclass
class Findings:
    """What is wrong with a config, gathered so that the user hears of all of it at once."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def report(self, log: Any) -> None:
        """Log every warning, then raise ``ValueError`` with every error, if there is one."""
        for warning in self.warnings:
            log.warning("SCAO: %s", warning)
        if self.errors:
            raise ValueError("\n".join(["this config does not work with SCAO:", *(f"  - {e}" for e in self.errors)]))


def read_optim_args(optim_args: str | dict[str, Any] | None, errors: list[str]) -> dict[str, Any]:
    """The options in ``optim_args``, a dict or ``"k=v,k=v"``, in their types; problems go to ``errors``."""
    if not optim_args:
        return {}
    if isinstance(optim_args, str):
        pairs = [part.partition("=") for part in optim_args.split(",")]
        broken = [key + sep + value for key, sep, value in pairs if not (key.strip() and sep and value.strip())]
        if broken or any("=" in value for _, _, value in pairs):
            errors.append(f"optim_args: {optim_args!r} is malformed: write key=value,key=value, or a YAML mapping")
            return {}
        optim_args = {key.strip(): value.strip() for key, _, value in pairs}
        if len(optim_args) < len(pairs):
            errors.append("optim_args: a key is given twice")
    options = {}
    for key, value in optim_args.items():
        if key in ("lr", "weight_decay"):
            errors.append(f"optim_args: {key}: set {'learning_rate' if key == 'lr' else key} in the config instead")
            continue
        if key not in OPTIONS and key not in MOMENT_KEYS:
            near = about_unknown(key.removeprefix(PREFIX), (*OPTIONS, *MOMENT_KEYS))
            errors.append(f"optim_args: {key} is not an option of SCAO{near}")
            continue
        try:
            if key == "betas":
                if not isinstance(value, (list, tuple)) or len(value) != 2:
                    raise ValueError(f"betas={value!r} is not valid: write [0.9, 0.99] or set {MOMENT_KEYS['betas']}")
                options[key] = tuple(read_value("betas", beta, TORCH_OPTIONS["beta"]) for beta in value)
            else:
                options[key] = read_value(key, value, OPTIONS.get(key) or TORCH_OPTIONS[key])
        except ValueError as error:
            errors.append(f"optim_args: {error}")
    return options


def read_raw(data: dict[str, Any], findings: Findings) -> dict[str, Any]:
    """Normalise the optimizer's name and the ``scao_*`` values of a raw config, and find what Axolotl would ignore.

    Returns:
        A copy of ``data`` whose ``scao_*`` values are legal; the others are dropped and reported.
    """
    data = dict(data)
    if isinstance(data.get("optimizer"), str):
        data["optimizer"] = _optimizer_name(data["optimizer"], findings)
    chosen = data.get("optimizer") == "scao" or bool(findings.errors)
    problems: list[str] = []
    named = sorted(key for key, value in data.items() if str(key).startswith(PREFIX) and value is not None)
    for key in named:
        option = {**OPTIONS, **SWITCHES}.get(key.removeprefix(PREFIX))
        try:
            if option is None:
                near = about_unknown(key.removeprefix(PREFIX), (*OPTIONS, *SWITCHES), PREFIX)
                raise ValueError(f"{key} is not an option of SCAO{near}")
            data[key] = read_value(key, data[key], option)
        except ValueError as error:
            problems.append(str(error))
            del data[key]
    named = [key for key in named if key != "scao_fuse_moe"]  # which acts with any optimizer
    if data.get("scao") is not None:
        block = data["scao"]
        flat = ", ".join(f"{PREFIX}{key}: {value}" for key, value in block.items()) if isinstance(block, dict) else ""
        problems.append(f"scao: {block!r} has no effect: options are flat keys, {flat or 'for example scao_k_max: 16'}")
        named.append("scao")
    if chosen:
        findings.errors += problems
        if ignored := sorted(key for key in of_others(data) if data[key] is not None):
            findings.warnings.append(f"{', '.join(ignored)} belong to other optimizers and have no effect")
    elif named:
        findings.warnings.append(
            f"optimizer: {data.get('optimizer')} does not read {', '.join(named)}; set optimizer: scao or remove them"
        )
    return data


def of_others(data: dict[str, Any]) -> list[str]:
    """The keys of a config that belong to other optimizers."""
    return [key for key in data if key in WITHOUT_EFFECT or str(key).startswith(FOREIGN_PREFIXES)]


def misspelt(name: str) -> str | None:
    """What is said of an optimizer that is nearly called scao, which none that Axolotl knows is; None for all others."""
    word = name.strip().lower()
    near = did_you_mean(word, ["scao"]) if word != "scao" else ""
    return f"optimizer: {name!r} is unknown{near}" if near else None


def _optimizer_name(name: str, findings: Findings) -> str:
    if name.strip().lower() == "scao":
        return "scao"
    if said := misspelt(name):
        findings.errors.append(said)
    return name
