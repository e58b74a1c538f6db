"""``scao-hf plan``: what fills the card. Exact for weights, LoRA, gradients and optimizer state, else an estimate."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scao_hf.experts import find_vocabulary
from scao_hf.optimizer import SCAO
from scao_hf.tools import ToolError
from scao_hf.tools.rivals import STATES, state_bytes
from scao_hf.tools.settings import Settings, load_config
from scao_hf.tools.simulate import STATED_ERROR, AutocastLinear, Peaks, fused_attention, optimizer_peak, step_peaks

MIB, GIB = 2**20, 2**30
#: Nominal sizes that every plan answers for.
CARDS = (8, 12, 16, 24)
#: Share of a card's nominal gigabytes that PyTorch can use, in GiB: a T4's 16 GB are 14.56 GiB.
USABLE = 0.91
#: CUDA context, cuBLAS workspaces and the allocator's rounding; an assumption, not a measurement.
OVERHEAD = int(0.75 * GIB)

_ATTENTION = "scao_plan"


class Row(NamedTuple):
    """One line of the plan: what, bytes, whether it is exact, and a remark."""

    name: str
    size: int
    exact: bool
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A finished plan; sizes are bytes.

    Attributes:
        scao: SCAO's state as ``memory_report`` has it.
        adamw: AdamW's, in the precision of the parameters.
        rival: the optimizer that SCAO takes the place of, and its state.
        small: the peak of SCAO's state with its int8 options.
        temporary: what SCAO's step takes at its peak besides the state, when activations, logits and loss are gone.
    """

    settings: Settings
    source: str
    rows: list[Row]
    parameters: int
    trainable: int
    lora_pairs: int
    scao: dict[str, int]
    adamw: int
    rival: tuple[str, int]
    small: int
    temporary: int
    peaks: dict[str, Peaks]
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(row.size for row in self.rows)

    @property
    def margin(self) -> int:
        """The stated error of what is estimated from the step's simulation."""
        return int(STATED_ERROR * self.peaks["on" if self.settings.checkpointing else "off"].peak)

    def free(self, card: float) -> int:
        """Bytes left on a card of that many nominal gigabytes; negative where it is too small."""
        return int(card * USABLE * GIB) - self.total

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and names, for ``--json``."""
        return {
            "settings": asdict(self.settings),
            "config_from": self.source,
            "rows": [row._asdict() for row in self.rows],
            "total": self.total,
            "estimate_error": self.margin,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "lora_pairs": self.lora_pairs,
            "scao_state": self.scao,
            "adamw_state": self.adamw,
            "rival_state": {self.rival[0]: self.rival[1]},
            "scao_int8_state": self.small,
            "scao_temporary": self.temporary,
            "activations": {
                f"checkpointing_{name}": {**peaks._asdict(), "peak": peaks.peak} for name, peaks in self.peaks.items()
            },
            "cards": {str(card): {"fits": self.free(card) >= 0, "free": self.free(card)} for card in CARDS},
            "notes": self.notes,
        }


def nf4_bytes(numel: int, double_quant: bool) -> tuple[int, int]:
    """Bytes of a weight in NF4 and of its quantisation constants, as bitsandbytes holds them in blocks of 64.

    Args:
        numel: number of weights.
        double_quant: the constants are int8 themselves, in blocks of 256 with one float32 each.
    """
    blocks, code = -(-numel // 64), 16 * 4
    constants = blocks + 4 * -(-blocks // 256) + 256 * 4 + 4 if double_quant else 4 * blocks
    return (numel + 1) // 2, constants + code


def make_plan(settings: Settings) -> Plan:
    """Build the model on the meta device, count what it holds, and run a training step there.

    Raises:
        ToolError: the model cannot be found or built, no layer matches the LoRA targets, or an option is illegal.
    """
    config, source = load_config(settings.model)
    _check_checkpoint(config, settings)
    for name, value in settings.shape.items():
        setattr(config, name, value)
    model = build_model(config, torch.float32 if settings.float32 else torch.bfloat16)
    parameters, notes = sum(param.numel() for param in model.parameters()), list(settings.notes)
    rows, pairs = prepare(model, settings)
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    trainable, words = [param for _, param in named], find_vocabulary(model)

    def optimizer(**options: Any) -> SCAO:
        return SCAO(named, vocabulary=words, **{**settings.scao, **options})

    try:
        scao = optimizer().memory_report()
    except (ValueError, TypeError) as error:
        raise ToolError(str(error)) from error
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    adamw = state_bytes("adamw_torch", trainable, embeddings)
    if settings.rival in STATES:
        rival = (settings.rival, state_bytes(settings.rival, trainable, embeddings))
    else:
        rival = ("adamw_torch", adamw)
        notes.append(f"the state of {settings.rival} is not known: SCAO is compared with AdamW")
    if "moment_dtype" not in settings.scao and any(param.element_size() <= 2 for param in trainable):
        smaller = optimizer(moment_dtype="bfloat16").memory_report()["peak"]
        notes.append(
            "AdamW holds the moments of 16-bit weights in 16 bit and SCAO in 32: scao_moment_dtype: bfloat16 takes SCAO's "
            f"state from {scao['peak'] / MIB:,.0f} to {smaller / MIB:,.0f} MiB at its peak (AdamW: {adamw / MIB:,.0f} MiB)"
        )
    peaks = {"off": Peaks(0, 0, 0), "on": Peaks(0, 0, 0)}
    try:
        kind = {name: getattr(settings, name) for name in ("objective", "reference", "reentrant")}
        peaks = {name: step_peaks(model, settings.sequences, settings.sequence, name == "on", **kind) for name in peaks}
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        # A model may read values in its forward pass, which a tensor without data cannot answer.
        reason = str(error).split("\n")[0]
        notes.append(f"NOT counted: activations and logits, for this model's step cannot be followed ({reason})")
    if settings.reference and not settings.adapter:
        remark = "the weights as they were; with an adapter it would need none"
        rows.append(Row("reference model", sum(row.size for row in rows), True, remark))
    temporary = optimizer_peak(optimizer())
    return Plan(
        settings=settings,
        source=source,
        rows=[
            *rows,
            *_training_rows(settings, sum(map(size_of, trainable)), sum(map(size_of, lora_factors(model))), scao),
            *_step_rows(settings, peaks["on" if settings.checkpointing else "off"], temporary),
            Row("CUDA context, workspaces, allocator", OVERHEAD, False, "assumed"),
        ],
        parameters=parameters,
        trainable=sum(param.numel() for param in trainable),
        lora_pairs=pairs,
        scao=scao,
        adamw=adamw,
        rival=rival,
        small=optimizer(moment_dtype="int8", use_int8_ema=True).memory_report()["peak"],
        temporary=temporary,
        peaks=peaks,
        notes=notes,
    )


def _check_checkpoint(config: Any, settings: Settings) -> None:
    """Refuse weights that are quantised already in a way other than the one that is planned."""
    found = getattr(config, "quantization_config", None)
    if found is None and not re.search(r"bnb-4bit$", settings.model):
        return
    method = found.get("quant_method", "another way") if isinstance(found, dict) else "bitsandbytes"
    if method != "bitsandbytes" or not settings.four_bit:
        raise ToolError(
            f"the weights of {settings.model} are quantised already ({method}): only bitsandbytes in 4 bit can be planned, "
            "with adapter: qlora and load_in_4bit: true"
        )


def build_model(config: Any, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The causal language model of a config on the meta device, with nothing trainable; float32 is without autocast."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    config._attn_implementation = f"{_ATTENTION}_{dtype}"
    AttentionInterface.register(config._attn_implementation, functools.partial(fused_attention, dtype=dtype))
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ToolError(f"no causal language model can be built from this config: {reason}") from error
    return model.train().requires_grad_(False)


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def prepare(model: nn.Module, settings: Settings) -> tuple[list[Row], int]:
    """Put LoRA, 4-bit layers and trainable copies in place, as training has them.

    Returns:
        The rows of the frozen (or, without an adapter, of all) weights, and the number of LoRA pairs.

    Raises:
        ToolError: no linear layer matches one of the targets.
    """
    anything: Any = model
    head = anything.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: module for name, module in linear.items() if module is not head}
    if settings.upcast:  # biases stay: bitsandbytes brings them back to 16 bit in the first step
        for other in set(model.modules()) - set(layers.values()):
            for param in other.parameters(recurse=False):
                param.data = param.data.float()
    if settings.adapter and (missing := settings.unmatched(layers)):
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise ToolError(f"no layer matches the LoRA targets {', '.join(missing)}: this model has {', '.join(known)}")
    packed = constants = pairs = 0
    taken: set[Tensor] = set()
    for name, module in linear.items():
        bits, lora, weight = 16, None, module.weight
        if settings.adapter and name in layers and settings.targeted(name):
            sides = ((settings.rank, module.in_features), (module.out_features, settings.rank))
            kind = torch.bfloat16 if settings.half_adapter else torch.float32
            down, up = (nn.Parameter(torch.empty(side, dtype=kind, device=weight.device)) for side in sides)
            lora, pairs = (down, up), pairs + 1
        if settings.quantised and name in layers:
            bits = 4 if settings.four_bit else 8
            # In int8 a scale for each row.
            sizes = nf4_bytes(weight.numel(), settings.double_quant) if bits == 4 else (weight.numel(), 4 * len(weight))
            packed, constants = packed + sizes[0], constants + sizes[1]
            taken.add(weight)
        dtype = torch.bfloat16 if settings.upcast else weight.dtype
        model.set_submodule(name, AutocastLinear(module, bits, lora, settings.dropout, dtype))
    counted_else = {*taken, *lora_factors(model)}
    rest = [param for param in model.parameters() if param not in counted_else]
    plain = sum(map(size_of, rest)) + sum(map(size_of, model.buffers()))
    rows, remark = [], "all weights of the model"
    if settings.quantised:
        double = f"{'' if settings.double_quant else 'no '}double quantisation"
        form, constant = ("4-bit NF4", double) if settings.four_bit else ("int8", "one for each row")
        rows.append(Row(f"{form} weights", packed, True, f"{len(taken)} linear layers"))
        rows.append(Row("their quantisation constants", constants, True, constant))
        remark = "embeddings, norms, biases, output layer"
    rows.append(Row("unquantised weights", plain, True, remark + (", in 32 bit" if settings.upcast else "")))
    for weight in taken:
        weight.data = weight.data.new_empty(0)  # decoded in the step, never there as a whole
    _unfreeze(model, settings)
    return rows, pairs


def lora_factors(model: nn.Module) -> list[nn.Parameter]:
    """The LoRA factors that ``prepare`` put in."""
    layers = (layer.lora for layer in model.modules() if isinstance(layer, AutocastLinear) and layer.lora is not None)
    return [factor for factors in layers for factor in factors]


def _unfreeze(model: nn.Module, settings: Settings) -> None:
    if not settings.adapter:
        model.requires_grad_(True)
        return
    found: set[str] = set()
    for name, module in model.named_modules():
        saved = name.rpartition(".")[2]
        if saved in settings.modules_to_save:
            found.add(saved)
            _copy(module, settings.tied_copies)
    for factor in lora_factors(model):
        factor.requires_grad_(True)
    if missing := set(settings.modules_to_save) - found:
        raise ToolError(f"lora_modules_to_save names {', '.join(sorted(missing))}, which this model does not have")


def _copy(module: nn.Module, tied: bool) -> None:
    """Make the parameters of a layer trainable; those that another such layer has already are copied once more."""
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            if param.requires_grad and not tied:
                setattr(part, name, nn.Parameter(torch.empty_like(param)))
            else:
                param.requires_grad_(True)


def _training_rows(settings: Settings, size: int, lora: int, scao: dict[str, int]) -> list[Row]:
    """What is trained, of ``size`` bytes in all and ``lora`` in LoRA's factors, its gradients and SCAO's state."""
    rows = []
    if settings.adapter:
        rows.append(Row("LoRA weights", lora, True, "16 bit" if settings.half_adapter else "32 bit"))
        if size > lora:
            rows.append(Row("trainable copies", size - lora, True, "modules_to_save"))
    rows.append(Row("gradients", size, True))
    kinds = ("moments", "curvature", "bases", "counters")
    rows += [Row(f"SCAO: {kind}", scao[kind], True) for kind in kinds if scao.get(kind)]
    if scao["peak"] > scao["total"]:
        rows.append(Row("SCAO: what phase 1 needs beyond that", scao["peak"] - scao["total"], True))
    return rows


def _step_rows(settings: Settings, peaks: Peaks, temporary: int) -> list[Row]:
    kept = "one input a layer" if settings.checkpointing else "no gradient checkpointing"
    head = Row("logits and loss", peaks.head, False, "batch x sequence x vocabulary, 16 and 32 bit")
    layer = Row("backward pass of a layer", peaks.layer - peaks.head, False, "beyond logits and loss, gone by then")
    step = Row("a step of SCAO", temporary - peaks.peak, False, "beyond all of these, gone by then")
    return [Row("activations", peaks.kept, False, kept), head, *(row for row in (layer, step) if row.size > 0)]


def advice(plan: Plan, card: float) -> list[tuple[str, int]]:
    """Changes that together make a plan fit, each with the bytes that it saves; all of them where even these do not.

    First what leaves the result as it is (a smaller micro-batch, no logits), then what costs time, then what trains otherwise.
    """
    settings, missing = plan.settings, plan.margin - plan.free(card)
    changes: list[tuple[str, int]] = []
    run = {"batch": settings.batch, "head": 1, "checkpointing": settings.checkpointing, "sequence": settings.sequence}

    def peak(batch: int, head: int, checkpointing: int, sequence: int) -> int:
        peaks = plan.peaks["on" if checkpointing else "off"]
        share = batch * sequence / (settings.batch * settings.sequence)
        return int(share * (peaks.kept + max(head * peaks.head, peaks.layer)))

    def change(text: str, saved: int = 0, **to: int) -> bool:
        """Add a change where it saves anything; whether the changes are enough."""
        saved = saved or peak(**run) - peak(**{**run, **to})
        if saved > 0:
            changes.append((text, saved))
            run.update(to)
        return sum(size for _, size in changes) >= missing

    fused = "the cut_cross_entropy plugin" if settings.objective == "sft" else "dpo_use_liger_kernel: true"
    loose = sum(row.size for row in plan.rows if row.name == "unquantised weights")
    plain = loose if settings.adapter and not settings.quantised else 0
    if (
        change(f"micro_batch_size: 1, accumulation steps x {settings.batch}", batch=1)
        or change(f"{fused}, which never holds the logits", head=0)
        or change("gradient_checkpointing: true", checkpointing=True)
        or (plain and change("load_in_4bit: true with adapter: qlora (about)", int(0.7 * plain)))
    ):
        return changes
    left, sequence = missing - sum(size for _, size in changes), settings.sequence
    while sequence >= 512 and peak(**run) - peak(**{**run, "sequence": sequence}) < left:
        sequence //= 2
    change(f"sequence_len: {sequence}", sequence=sequence)
    return changes
