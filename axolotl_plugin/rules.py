"""What a config with ``optimizer: scao`` may say, each rule in one place, with the remedy in every message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from axolotl_plugin.values import MOMENT_KEYS, PREFIX, Findings, read_optim_args
from scao_hf import SCAO
from scao_hf.options import OPTIONS, TORCH_OPTIONS, resolve_arguments
from scao_hf.rules import rule_of
from scao_hf.trainer import choose_betas
from scao_hf.zero import refused

if TYPE_CHECKING:
    from transformers import TrainingArguments

GROUP_RATES = ("embedding_lr", "embedding_lr_scale", "lr_groups")
ON_POLICY = ("grpo", "gdpo", "ebft")

ONE_GPU = "train in one process on one GPU (QLoRA makes the model fit), or use optimizer: adamw_torch"

WHOLE_MATRICES = "remove it and train with DDP, or with FSDP2 (fsdp_version: 2), which keeps the shapes of the matrices"

Get = Callable[[str], Any]


def check_sizes(get: Get, findings: Findings) -> None:
    """Refuse kinds of parallelism on the raw config: Axolotl's own rules for these keys would be heard first."""
    for key in ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "expert_parallel_size"):
        size = get(key)
        if isinstance(size, int) and size > 1:
            findings.errors.append(f"{key}: {size} splits matrices or sequences over GPUs; set it to 1, {ONE_GPU}")


def check_config(get: Get, findings: Findings) -> None:
    """Apply every rule to a config that Axolotl has validated; nothing for another optimizer.

    Args:
        get: the config's value by key, None where it has none.
        findings: where errors and warnings go.
    """
    _check_experts(get, findings)
    if get("optimizer") != "scao":
        return
    options = merged_options(get, findings.errors)
    _check_torch_options(get, findings)
    _check_parallelism(get, findings)
    _check_training_kind(get, options, findings)
    bf16 = get("bf16") in (True, "full") or bool(get("bfloat16"))
    _check_precision(get, options, get("fp16") is True, bf16, findings)
    _check_learning_rates(get, findings)
    if get("save_only_model") and (get("resume_from_checkpoint") or get("auto_resume_from_checkpoints")):
        findings.warnings.append(
            "save_only_model saves no optimizer state, so a resumed run starts with no moments and no curvature; set "
            "save_only_model: false"
        )
    if get("max_steps"):
        _check_length(options, get("max_steps"), f"max_steps: {get('max_steps')}", findings)
        if isinstance(get("warmup_steps"), (int, float)) and get("warmup_steps") >= get("max_steps"):
            findings.warnings.append(
                f"warmup_steps: {get('warmup_steps')} is not below max_steps: {get('max_steps')}, so the learning rate "
                "never reaches its full value"
            )


def check_run(get: Get, args: TrainingArguments, options: dict[str, Any], findings: Findings) -> None:
    """Apply the rules that need what Axolotl knows only once the trainer is built: length and precision of the run."""
    _check_precision(get, options, args.fp16, args.bf16, findings)
    if args.max_steps > 0 and args.max_steps != get("max_steps"):
        _check_length(options, args.max_steps, f"the run's {args.max_steps} steps", findings)


def optimizer_kwargs(cfg: Any, args: TrainingArguments) -> dict[str, Any]:
    """The arguments of ``SCAO`` for a validated config: the Trainer's, ``optim_args`` and the ``scao_*`` options."""
    errors: list[str] = []
    options = merged_options(cfg.get, errors)
    Findings(errors).report(None)
    kwargs = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "eps": args.adam_epsilon}
    if (betas := choose_betas(options.get("rule"), cfg.adam_beta1, cfg.adam_beta2)) is not None:
        kwargs["betas"] = betas
    if cfg.loraplus_lr_ratio is not None:
        # peft's LoRA+ groups take their decay from this key alone and pop it before SCAO sees it.
        kwargs["loraplus_weight_decay"] = args.weight_decay
    return {**kwargs, **options}


def merged_options(get: Get, errors: list[str]) -> dict[str, Any]:
    """The options of optim_args and of the fields, or none of them where they contradict each other."""
    options = read_optim_args(get("optim_args"), errors)
    for name in OPTIONS:
        value = get(PREFIX + name)
        if value is None:
            continue
        if name in options:
            errors.append(f"{PREFIX}{name}: {value} and optim_args: {name}={options[name]}: keep one of the two")
        options[name] = value
    for name, keys in (("betas", ("adam_beta1", "adam_beta2")), ("eps", ("adam_epsilon",))):
        if name in options and any(get(key) is not None for key in keys):
            errors.append(f"optim_args: {name} is also set as {MOMENT_KEYS[name]}: keep one of the two")
    try:
        resolve_arguments(options)
    except ValueError as error:
        errors.append(str(error))
        return {}
    return options


def _check_torch_options(get: Get, findings: Findings) -> None:
    rate = get("learning_rate")
    if rate is not None and not (TORCH_OPTIONS["lr"].accepts(rate) and rate > 0):
        findings.errors.append(f"learning_rate: {rate} must be a finite number above 0")
    keys = {"weight_decay": "weight_decay", "adam_epsilon": "eps", "adam_beta1": "beta", "adam_beta2": "beta"}
    for key, name in keys.items():
        if get(key) is not None and not TORCH_OPTIONS[name].accepts(get(key)):
            findings.errors.append(f"{key}: {get(key)} must be {TORCH_OPTIONS[name].valid}")


def _check_parallelism(get: Get, findings: Findings) -> None:
    """DDP, FSDP2 and DeepSpeed's ZeRO give the result of one process; what leaves no matrix whole is refused."""
    if get("deepspeed"):
        _check_deepspeed(get, findings)
    if not (get("fsdp") or get("fsdp_config")):
        return
    config = get("fsdp_config")
    version = get("fsdp_version") or getattr(config, "fsdp_version", None) or 1
    if str(version) != "2":
        findings.errors.append(f"fsdp_config: FSDP1 flattens the matrices that SCAO needs whole; {WHOLE_MATRICES}")
    elif getattr(config, "offload_params", None):
        findings.errors.append(
            "fsdp_config.offload_params: true keeps the shards in the memory of the host, where the step of SCAO has not "
            "been proved; set it to false"
        )
    # None is SHARDED_STATE_DICT under FSDP2, by Accelerate's own default.
    kind = getattr(config, "state_dict_type", None)
    if str(version) == "2" and kind not in (None, "SHARDED_STATE_DICT"):
        findings.errors.append(
            f"fsdp_config.state_dict_type: {kind}: a run that is resumed from such a checkpoint starts from other weights, "
            "with any optimizer; set SHARDED_STATE_DICT (final_state_dict_type: FULL_STATE_DICT is for the model at the end)"
        )


def _check_deepspeed(get: Get, findings: Findings) -> None:
    """The configuration behind the key ``deepspeed``, a file or its content."""
    given, config = get("deepspeed"), {}
    try:
        config = dict(json.loads(Path(given).read_text(encoding="utf-8")) if isinstance(given, str) else given)
        reason = refused(config)
    except FileNotFoundError:
        reason = "there is no such file here; `axolotl fetch deepspeed_configs` brings Axolotl's own"
    except (OSError, ValueError) as error:
        reason = f"it cannot be read ({error})"
    if reason is not None:
        findings.errors.append(f"deepspeed: {given}: SCAO does not run under this configuration: {reason}")
    elif config["zero_optimization"]["stage"] == 3 and (get("load_in_4bit") or get("load_in_8bit")):
        findings.warnings.append(
            "ZeRO-3 with a quantized base model has not been run with SCAO; ZeRO-2 does not cut it"
        )


def _check_experts(get: Get, findings: Findings) -> None:
    """``scao_fuse_moe``, which holds with any optimizer."""
    if not get("scao_fuse_moe"):
        return
    kernels = [key for key in ("use_scattermoe", "use_sonicmoe") if get(key)]
    if kernels:
        findings.errors.append(
            f"scao_fuse_moe: true and {kernels[0]}: true both replace the forward of the experts: keep one of the two"
        )
    if not get("adapter"):
        findings.errors.append("scao_fuse_moe: true without adapter: lora or qlora has nothing to fuse")


def half_precision(get: Get) -> bool:
    """Whether the weights are loaded in 16 bit, as Axolotl decides it."""
    return any(get(key) for key in ("bf16", "bfloat16", "fp16", "float16", "load_in_8bit"))


def _state_of(rows: int, cols: int, get: Get, options: dict[str, Any]) -> str:
    """How much state a matrix needs under valid options, in words."""
    own = {name: value for name, value in options.items() if name in OPTIONS}
    dtype = torch.bfloat16 if half_precision(get) else torch.float32
    size = SCAO([torch.empty(rows, cols, device="meta", dtype=dtype, requires_grad=True)], **own).memory_report()[
        "peak"
    ]
    adamw = 2 * dtype.itemsize * rows * cols
    return f"{rows} x {cols} weights take {size / 2**20:.0f} MiB of state (AdamW: {adamw / 2**20:.0f} MiB)"


def _check_training_kind(get: Get, options: dict[str, Any], findings: Findings) -> None:
    warn, adapter = findings.warnings.append, get("adapter")
    for key in ("relora", "jagged_restart_steps", "lisa_step_interval"):
        if get(key):
            findings.errors.append(
                f"{key}: {get(key)}: restarts and layer switching invalidate SCAO's curvature, an average over past "
                "steps; remove it or use optimizer: adamw_torch"
            )
    if not adapter and not get("unfrozen_parameters"):
        warn(
            f"no adapter, so every weight is trained: {_state_of(2048, 2048, get, options)}; the exact figure for the "
            "model is logged before training"
        )
    elif adapter and (get("load_in_8bit") or not get("load_in_4bit")):
        base = "an 8-bit" if get("load_in_8bit") else "a 16-bit"
        warn(f"adapter: {adapter} on {base} base model works, but SCAO's defaults were chosen on 4-bit models")
    if get("load_in_4bit") and getattr(get("peft"), "loftq_config", None):
        findings.errors.append(
            "peft.loftq_config with load_in_4bit: LoftQ has to see the unquantized weights; set load_in_4bit: false "
            "with adapter: lora, or remove loftq_config"
        )
    if get("peft_use_dora"):
        warn("peft_use_dora: the magnitude vectors have one side, so they take plain AdamW steps (8 bytes each)")
    for key in ("lora_modules_to_save", "unfrozen_parameters"):
        if get(key):
            besides = " besides the adapter" if adapter else ""
            warn(
                f"{key}: {get(key)}: whole weights are trained{besides}, in blocks of at most max_precond_dim: "
                f"{_state_of(151936, 2048, get, options)}, as in the embedding of a 3B model"
            )
    rl = getattr(get("rl"), "value", get("rl"))
    if rl in ON_POLICY:
        warn(f"rl: {rl}: SCAO has not been measured with on-policy rewards, whose gradients are far noisier")
    if any("grokfast" in str(plugin).lower() for plugin in get("plugins") or []):
        warn("GrokfastPlugin changes the gradients before SCAO sees them; the two have not been measured together")


def _check_precision(get: Get, options: dict[str, Any], fp16: bool, bf16: bool, findings: Findings) -> None:
    if get("peft_autocast_adapter_dtype") is not False:
        return
    if fp16:
        findings.errors.append(
            "fp16 with peft_autocast_adapter_dtype: false leaves the adapter in float16, which the gradient scaler "
            "cannot train; remove peft_autocast_adapter_dtype or use bf16"
        )
    elif bf16 and not options.get("stochastic_rounding"):
        findings.warnings.append(
            "peft_autocast_adapter_dtype: false leaves the adapter in bfloat16, whose 8 bits round small updates away; "
            "remove it, or set scao_stochastic_rounding: true"
        )


def _check_learning_rates(get: Get, findings: Findings) -> None:
    per_group = [key for key in GROUP_RATES if get(key)]
    if get("loraplus_lr_ratio"):
        if get("weight_decay"):
            findings.warnings.append(
                f"loraplus_lr_ratio: weight_decay: {get('weight_decay')} is passed on to LoRA+, where it acts on B "
                f"times {get('loraplus_lr_ratio'):g} because decay is scaled by the learning rate"
            )
        if per_group:
            findings.warnings.append(f"loraplus_lr_ratio makes its own groups: no effect of {', '.join(per_group)}")
        per_group.append("loraplus_lr_ratio")
    if get("lr_scheduler") == "one_cycle" and per_group:
        findings.warnings.append(
            f"lr_scheduler: one_cycle gives every group the same learning rate: no effect of {', '.join(per_group)}"
        )


def _check_length(options: dict[str, Any], steps: int, what: str, findings: Findings) -> None:
    full = resolve_arguments(options)
    start = rule_of(full, matrix=True).phase1_steps(full)
    phase1 = (
        f"phase 1 (plain AdamW) lasts {start} steps: scao_warmup_steps is {full['warmup_steps']}, and "
        f"scao_min_precond_updates x scao_precond_freq is {full['min_precond_updates']} x {full['precond_freq']}"
    )
    if start >= steps:
        findings.errors.append(f"{phase1}; {what} would end before phase 2. Lower these options or train for longer")
    elif 2 * start > steps:
        findings.warnings.append(f"{phase1}, more than half of {what}")
