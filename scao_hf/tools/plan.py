"""``scao-hf plan``: what fills the card. Exact for weights, LoRA, gradients and optimizer state, else an estimate."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scao_hf.optimizer import SCAO
from scao_hf.tools import ToolError
from scao_hf.tools.settings import Settings, load_config
from scao_hf.tools.simulate import STATED_ERROR, AutocastLinear, Peaks, fused_attention, step_peaks

GIB = 2**30
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


@dataclass(frozen=True)
class Plan:
    """A finished plan; sizes are bytes."""

    settings: Settings
    source: str
    rows: list[Row]
    parameters: int
    trainable: int
    lora_pairs: int
    scao: dict[str, int]
    adamw: int
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
    model = build_model(config)
    parameters = sum(param.numel() for param in model.parameters())
    frozen, pairs = prepare(model, settings)
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    try:
        optimizer = SCAO(trainable, **settings.scao)
    except (ValueError, TypeError) as error:
        raise ToolError(str(error)) from error
    scao, adamw = optimizer.memory_report(), sum(2 * size_of(param) for _, param in trainable)
    notes = [*settings.notes, *_moments_note(trainable, settings, scao["peak"], adamw)]
    try:
        flags = {"off": False, "on": True}
        peaks = {name: step_peaks(model, settings.batch, settings.sequence, flag) for name, flag in flags.items()}
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        # A model may read values in its forward pass, which a tensor without data cannot answer.
        peaks = {"off": Peaks(0, 0, 0), "on": Peaks(0, 0, 0)}
        reason = str(error).split("\n")[0]
        notes.append(f"NOT counted: activations and logits, for this model's step cannot be followed ({reason})")
    rows = [*frozen, *_training_rows(settings, model, trainable, scao)]
    rows += _step_rows(settings, peaks["on" if settings.checkpointing else "off"])
    rows.append(Row("CUDA context, workspaces, allocator", OVERHEAD, False, "assumed"))
    count = sum(param.numel() for _, param in trainable)
    return Plan(settings, source, rows, parameters, count, pairs, scao, adamw, peaks, notes)


def _moments_note(trainable: list[tuple[str, nn.Parameter]], settings: Settings, peak: int, adamw: int) -> list[str]:
    """Which option holds SCAO's moments in the 16 bits of the parameters, as AdamW does; nothing where they are."""
    if "moment_dtype" in settings.scao or all(param.element_size() > 2 for _, param in trainable):
        return []
    smaller = SCAO(trainable, **settings.scao, moment_dtype="bfloat16").memory_report()["peak"]
    sizes = " to ".join(f"{size / 2**20:,.0f}" for size in (peak, smaller))
    return [
        "AdamW holds the moments of 16-bit weights in 16 bit and SCAO in 32: scao_moment_dtype: bfloat16 takes SCAO's state "
        f"from {sizes} MiB at its peak (AdamW: {adamw / 2**20:,.0f} MiB)"
    ]


def build_model(config: Any) -> nn.Module:
    """The causal language model of a config on the meta device, with 16-bit weights and nothing trainable."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(_ATTENTION, fused_attention)
    config._attn_implementation = _ATTENTION
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
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
        ToolError: no linear layer matches the targets.
    """
    anything: Any = model
    head = anything.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if settings.upcast:  # biases stay: bitsandbytes brings them back to 16 bit in the first step
        layers = {module for module in linear.values() if module is not head}
        for other in model.modules():
            if other not in layers:
                for param in other.parameters(recurse=False):
                    param.data = param.data.float()
    packed = constants = pairs = 0
    taken: set[Tensor] = set()
    for name, module in linear.items():
        four_bit = settings.four_bit and module is not head
        lora = None
        if settings.adapter and module is not head and settings.targeted(name):
            sides = ((settings.rank, module.in_features), (module.out_features, settings.rank))
            down, up = (nn.Parameter(torch.empty(side, device=module.weight.device)) for side in sides)
            lora, pairs = (down, up), pairs + 1
        if four_bit:
            packed_here, constants_here = nf4_bytes(module.weight.numel(), settings.double_quant)
            packed, constants = packed + packed_here, constants + constants_here
            taken.add(module.weight)
        dtype = torch.bfloat16 if settings.upcast else module.weight.dtype
        model.set_submodule(name, AutocastLinear(module, four_bit, lora, settings.dropout, dtype))
    if settings.adapter and not pairs:
        known = sorted({name.rpartition(".")[2] for name, module in linear.items() if module is not head})
        asked = settings.targets if isinstance(settings.targets, str) else ", ".join(settings.targets)
        raise ToolError(f"no layer matches the LoRA targets {asked}: this model has {', '.join(known)}")
    taken_or_lora = {*taken, *lora_factors(model)}
    rest = [param for param in model.parameters() if param not in taken_or_lora]
    plain = sum(map(size_of, rest)) + sum(map(size_of, model.buffers()))
    rows = []
    if settings.four_bit:
        double = "double quantisation" if settings.double_quant else "no double quantisation"
        rows.append(Row("4-bit NF4 weights", packed, True, f"{len(taken)} linear layers"))
        rows.append(Row("their quantisation constants", constants, True, double))
    remark = "embeddings, norms, biases, output layer" if settings.four_bit else "all weights of the model"
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
    for factor in lora_factors(model):
        factor.requires_grad_(True)
    found: set[str] = set()
    for name, module in model.named_modules():
        saved = name.rpartition(".")[2]
        if saved in settings.modules_to_save:
            found.add(saved)
            for param in module.parameters():
                param.requires_grad_(True)
    if missing := set(settings.modules_to_save) - found:
        raise ToolError(f"lora_modules_to_save names {', '.join(sorted(missing))}, which this model does not have")


def _training_rows(
    settings: Settings, model: nn.Module, trainable: list[tuple[str, nn.Parameter]], scao: dict[str, int]
) -> list[Row]:
    size = sum(size_of(param) for _, param in trainable)
    lora = sum(map(size_of, lora_factors(model)))
    rows = []
    if settings.adapter:
        rows.append(Row("LoRA weights", lora, True, "32 bit"))
        if size > lora:
            rows.append(Row("trainable copies", size - lora, True, "modules_to_save"))
    rows.append(Row("gradients", size, True))
    kinds = ("moments", "curvature", "bases", "counters")
    rows += [Row(f"SCAO: {kind}", scao[kind], True) for kind in kinds if scao.get(kind)]
    if scao["peak"] > scao["total"]:
        rows.append(Row("SCAO: what phase 1 needs beyond that", scao["peak"] - scao["total"], True))
    return rows


def _step_rows(settings: Settings, peaks: Peaks) -> list[Row]:
    kept = "one input a layer" if settings.checkpointing else "no gradient checkpointing"
    head = Row("logits and loss", peaks.head, False, "batch x sequence x vocabulary, 16 and 32 bit")
    layer = Row("backward pass of a layer", peaks.layer - peaks.head, False, "beyond logits and loss, gone by then")
    rows = [Row("activations", peaks.kept, False, kept), head]
    return [*rows, layer] if peaks.layer > peaks.head else rows


def advice(plan: Plan, card: float) -> list[tuple[str, int]]:
    """Changes that together make a plan fit, easiest first, each with the bytes that it saves; all where none do."""
    settings = plan.settings
    peaks, batch, sequence = plan.peaks["on" if settings.checkpointing else "off"], settings.batch, settings.sequence
    changes: list[tuple[str, int]] = []
    missing = plan.margin - plan.free(card)

    def change(text: str, saved: int) -> bool:
        if saved > 0:
            changes.append((text, saved))
        return sum(size for _, size in changes) >= missing

    if not settings.checkpointing:
        if change("gradient_checkpointing: true", peaks.peak - plan.peaks["on"].peak):
            return changes
        peaks = plan.peaks["on"]
    if not settings.four_bit and settings.adapter:
        linear = sum(row.size for row in plan.rows if row.name == "unquantised weights")
        if change("load_in_4bit: true with adapter: qlora (about)", int(0.7 * linear)):
            return changes
    if batch > 1:
        text = f"micro_batch_size: 1, accumulation steps x {batch}"
        if change(text, peaks.peak - peaks.peak // batch):
            return changes
        peaks = Peaks(*(size // batch for size in peaks))
    text = "the cut_cross_entropy plugin, which never holds the logits"
    if change(text, max(0, peaks.head - max(peaks.layer, 0))):
        return changes
    peaks = Peaks(peaks.kept, 0, peaks.layer)
    while sequence >= 512:
        sequence //= 2
        if change(f"sequence_len: {sequence}", peaks.peak // 2):
            return changes
        peaks = Peaks(*(size // 2 for size in peaks))
    return changes
