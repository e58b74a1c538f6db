"""DeepSpeed's ZeRO-1, 2 and 3, which cut parameters into parts of flat vectors: every matrix is stepped whole by one process.

DeepSpeed keeps the float32 weights and the averaged, clipped gradients as one flat vector per parameter group (ZeRO-3: per
sub-group), of which each process has a part, and has them stepped one after the other. Each step of a vector sends the
parts of its parameters and gradients to the owners of these and the new parts back, as under FSDP2. The state of a
parameter lives with its owner alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from scao_hf import report
from scao_hf.blocks import Packing
from scao_hf.distributed.exchange import Exchange, agreed_among, as_bytes, from_all
from scao_hf.distributed.shards import balance, size_of
from scao_hf.names import few, listed
from scao_hf.optimizer import SCAO, Params

#: Keys of a state dict: for each vector, the state dict of the SCAO that steps this process's matrices, and the number of its
#: steps; how many processes there were.
VECTORS, STEPS, WORLD = "scao_vectors", "scao_steps", "scao_world"


def refused(config: Mapping[str, Any]) -> str | None:
    """Why SCAO does not run under a DeepSpeed configuration, with what to do about it; None where it does."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    offload = zero.get("offload_optimizer") or {}
    if stage not in (1, 2, 3):
        return f"zero_optimization.stage is {stage}: set 1, 2 or 3, or train without DeepSpeed (DDP does the same)"
    if "optimizer" in config:
        return "it has an optimizer of its own, with which DeepSpeed would train: remove the section optimizer"
    if offload.get("device", "none") not in ("none", None) and config.get("zero_force_ds_cpu_optimizer", True):
        return (
            "offload_optimizer replaces SCAO with DeepSpeed's Adam: remove it (the state of LoRA is small), or set "
            '"zero_force_ds_cpu_optimizer": false'
        )
    sections = {**config, **zero, "zero_optimization": zero}
    for section, key, legal in LIMITS:
        value = (sections.get(section) or {}).get(key, legal[0])
        if value not in legal:
            return f"{section}.{key} is {value!r}, with which SCAO has not been proved: leave it out"
    return None


#: Section, key and values of a DeepSpeed configuration with which SCAO runs; the first one is DeepSpeed's default.
LIMITS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("offload_optimizer", "device", ("none", None, "cpu")),
    ("offload_optimizer", "ratio", (1, 1.0)),
    ("offload_param", "device", ("none", None, "cpu")),
    ("zero_optimization", "elastic_checkpoint", (False,)),
    ("zero_optimization", "round_robin_gradients", (False,)),
    ("zero_optimization", "zenflow", (None,)),
    ("zero_optimization", "mics_shard_size", (-1,)),
    ("zero_optimization", "zero_hpz_partition_size", (1,)),
    ("checkpoint", "load_universal", (False,)),
    ("tensor_parallel", "autotp_size", (0, 1)),
)


class ZeroSCAO(Optimizer):
    """SCAO for ``deepspeed.initialize`` with ZeRO stage 1, 2 or 3.

    DeepSpeed replaces the parameters with flat vectors; this optimizer knows which part of which matrix is where.
    Clipping, loss scales and gradient accumulation are DeepSpeed's.

    Args:
        params: as for ``SCAO``.
        experts, vocabulary, names, **options: as for ``SCAO``.

    Raises:
        ValueError: an option outside its legal range; ``partial_resume``, as the parts of the vectors would be others.
    """

    def __init__(
        self,
        params: Params,
        *,
        experts: Mapping[Tensor, Packing] | None = None,
        vocabulary: Collection[Tensor] | None = None,
        names: Mapping[Tensor, str] | None = None,
        **options: Any,
    ) -> None:
        if options.get("partial_resume"):
            raise ValueError(
                "partial_resume=True under ZeRO: DeepSpeed's checkpoint has the state by place in flat vectors, not by "
                "parameter: train with DDP or FSDP2, or start from the weights alone (load_optimizer_states=False)"
            )
        origins: dict[Tensor, Tensor] = {}
        like: dict[Tensor, Tensor] = {}

        def replaced(param: Any) -> Any:
            if isinstance(param, tuple):
                return (param[0], replaced(param[1]))
            if param not in like:
                like[param] = _shape_of(param)
                origins[like[param]] = param
            return like[param]

        groups: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        if groups and isinstance(groups[0], dict):
            groups = [{**group, "params": [replaced(param) for param in listed(group["params"])]} for group in groups]
        else:
            groups = [replaced(param) for param in groups]
        # It checks the options and splits the groups; the shapes are enough for that.
        built = SCAO(
            groups,
            experts={replaced(param): packing for param, packing in (experts or {}).items()},
            vocabulary={replaced(param) for param in vocabulary or ()},
            names=None if names is None else {replaced(param): name for param, name in names.items()},
            **options,
        )
        for group in built.param_groups:
            if group["rule"] == "auto" and group["from_scratch"] is None:
                group["from_scratch"] = False  # no process has the weights of a whole group to look at
        #: The groups as they were given, each parameter as a tensor of its whole shape without memory.
        self.shapes = [dict(group) for group in built.param_groups]
        self.origins = origins
        self._vectors: dict[Tensor, _Vector] = {}
        self._loads: list[int] = []
        own = [{**group, "params": [origins[shape] for shape in group["params"]]} for group in built.param_groups]
        for group in own:
            names = group.pop("param_names", None)
            if names is not None:
                group["params"] = list(zip(names, group["params"], strict=True))
        super().__init__(own, built.defaults)
        #: Of each group its place in ``shapes``; DeepSpeed takes groups out of the list, but keeps the dicts.
        self._places = {id(group): place for place, group in enumerate(self.param_groups)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Part of the constructor.

        Raises:
            ValueError: afterwards, as DeepSpeed lays out its vectors once.
        """
        if hasattr(self, "_places"):
            raise ValueError("ZeroSCAO takes no groups after it was built: pass all of them to its constructor")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the vectors that DeepSpeed has put into the groups. Collective.

        Raises:
            RuntimeError: as from ``SCAO.step``, in all processes where it is one's.
            ValueError: there are no such vectors.
        """
        if closure is not None:
            raise ValueError("ZeroSCAO.step takes no closure: DeepSpeed has computed the gradients")
        for group, flat in self._flats():
            if flat.grad is not None:
                self._vector(group, flat).step(flat, group)
                self.state[flat]["step"] = self.state[flat].get("step", 0) + 1

    def _flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for flat in group["params"]:
                yield group, flat

    def _vector(self, group: dict[str, Any], flat: Tensor) -> _Vector:
        """What is in a flat vector. Collective where it is new."""
        vector = self._vectors.get(flat)
        if vector is None:
            shapes = self.shapes[self._places[id(group)]]
            vector = self._vectors[flat] = _Vector(
                flat, {**shapes, **group, "params": shapes["params"]}, self.origins, self._loads
            )
        return vector

    def state_dict(self) -> dict[str, Any]:
        """This process's part, as DeepSpeed's checkpoints keep it: the state of the matrices that it owns."""
        flats = [flat for _, flat in self._flats()]
        vectors = [self._vectors.get(flat) for flat in flats]
        return {
            "state": {},
            "param_groups": [_settings(group) for group in self.param_groups],
            WORLD: len(self._loads),
            STEPS: [self.state.get(flat, {}).get("step", 0) for flat in flats],
            VECTORS: [None if vector is None else vector.optimizer.state_dict() for vector in vectors],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore this process's part. Collective.

        Raises:
            ValueError: another optimizer's state, or one of another number of processes, vectors, or of other parameters.
        """
        vectors = [(self._vector(group, flat), flat) for group, flat in self._flats()]
        with agreed_among([vector.group for vector, _ in vectors[:1]], _device()):
            saved = state_dict.get(VECTORS)
            if saved is None:
                raise ValueError(
                    "the saved state is not one of ZeroSCAO: it was written by another optimizer, or without ZeRO. Start from "
                    "the weights alone (load_optimizer_states=False)"
                )
            if len(saved) != len(vectors) or state_dict[WORLD] not in (0, len(self._loads)):
                raise ValueError(
                    f"the saved state is of {state_dict[WORLD]} processes with {len(saved)} flat vectors each, this run has "
                    f"{len(self._loads)} with {len(vectors)}: resume with as many processes, groups and the same sub_group_size"
                )
            for (vector, flat), entry, steps in zip(vectors, saved, state_dict[STEPS], strict=True):
                if entry is not None:
                    _check_owned(vector.optimizer, entry)
                    vector.optimizer.load_state_dict(entry)
                    self.state[flat] = {"step": steps}
        for group, entry in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(entry)

    def metrics(self) -> dict[str, float]:
        """As ``SCAO.metrics``, over the matrices that this process owns."""
        stacks = [vector.optimizer._stack_all() for vector in self._vectors.values()]
        try:
            return report.metrics([bucket for each in stacks for bucket in each.buckets])
        finally:
            for each in stacks:
                each.close()

    def describe(self) -> str:
        """As ``SCAO.describe``, of the groups as they were given."""
        return report.describe(self.shapes)

    def statistics(self, names: Mapping[Tensor, str] | None = None) -> list[dict[str, Any]]:
        """As ``SCAO.statistics``, of the matrices that this process owns."""
        known = names or {}
        rows = []
        for vector in self._vectors.values():
            own = {
                whole: known[param]
                for param, whole in zip(vector.params, vector.wholes, strict=True)
                if param in known and whole is not None
            }
            rows += vector.optimizer.statistics(own)
        return rows


class _Vector:
    """The parameters in one of DeepSpeed's flat vectors: cut in the vector, whole with their owners.

    Args:
        flat: this process's part of the vector.
        group: the parameter group, its parameters as tensors of their shapes without memory.
        origins: for each of these the parameter.
        loads: bytes of state that each process has already; added to in place.

    Raises:
        ValueError: what is in the vector is not known.
    """

    def __init__(self, flat: Tensor, group: dict[str, Any], origins: Mapping[Tensor, Tensor], loads: list[int]) -> None:
        found = [
            (shape, piece)
            for shape in group["params"]
            if (piece := _piece(origins[shape], shape.numel(), flat)) is not None
        ]
        if not found:
            raise ValueError(
                "the groups hold no flat vector of ZeRO stage 1, 2 or 3: pass ZeroSCAO to deepspeed.initialize with such a "
                "stage, or use SCAO (stage 0, DDP, FSDP2)"
            )
        shapes, pieces = [shape for shape, _ in found], [piece for _, piece in found]
        self.params = [origins[shape] for shape in shapes]
        first: Any = self.params[0]
        self.group = first.ds_process_group if hasattr(first, "ds_process_group") else first._dp_group
        self.device = _device()
        self.rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        #: Of each parameter the place of its piece in this process's part of the vector.
        self.slices = [slice(offset, offset + length) for _, length, offset in pieces]
        #: By process, of each parameter: where its piece begins in it, and how many entries it has.
        self.pieces = from_all([piece[:2] for piece in pieces], self.group)
        by_param = [list(each) for each in zip(*self.pieces, strict=True)]
        for shape, each in zip(shapes, by_param, strict=True):
            _check_pieces(shape, each)
        loads.extend([0] * (world - len(loads)))
        owners = balance([size_of(shape, group) for shape in shapes], loads, [_candidates(each) for each in by_param])
        self.wholes = [
            torch.empty(shape.shape, dtype=flat.dtype, device=flat.device) if owner == self.rank else None
            for owner, shape in zip(owners, shapes, strict=True)
        ]
        self.release()
        # All parameters of the group, whose order decides when a matrix is refreshed: those of others remain without memory.
        mine = dict(zip(shapes, self.wholes, strict=True))
        params = [shape if (whole := mine.get(shape)) is None else whole for shape in group["params"]]
        if "param_names" in group:
            params = list(zip(group["param_names"], params, strict=True))
        self.optimizer = SCAO([{**_settings(group), "params": params}])
        sizes = [[length * flat.element_size() for _, length in each] for each in by_param]
        self._both = Exchange(owners * 2, sizes * 2, self.group)
        self._back = Exchange(owners, sizes, self.group)
        self._known = False

    def owned(self) -> list[tuple[int, Tensor]]:
        """The whole parameters that this process owns, with their places among those of the vector."""
        return [(index, whole) for index, whole in enumerate(self.wholes) if whole is not None]

    def step(self, flat: Tensor, group: Mapping[str, Any]) -> None:
        """One step of every parameter in the vector. Collective."""
        if not self._known:
            with agreed_among([self.group], self.device):
                for param in self.params:
                    _check_masters(param)
            self._known = True
        grad, owned = cast(Tensor, flat.grad), self.owned()
        received = self._both.to_owners([self._sent(vector[part]) for vector in (flat, grad) for part in self.slices])
        try:
            for _, whole in owned:
                whole.untyped_storage().resize_(whole.nbytes)
                whole.grad = torch.empty_like(whole)
            gradients = [(index, cast(Tensor, whole.grad)) for index, whole in owned]
            targets = [
                part for rank in range(len(self.pieces)) for part in self._cut(owned, rank) + self._cut(gradients, rank)
            ]
            for target, source in zip(targets, received, strict=True):
                as_bytes(target).copy_(source)
            with agreed_among([self.group], self.device):
                if owned:
                    self.optimizer.param_groups[0].update(_settings(group))
                    self.optimizer.step()
            stepped = [self._sent(part) for rank in range(len(self.pieces)) for part in self._cut(owned, rank)]
            for part, source in zip(self.slices, self._back.to_parts(stepped, self.device), strict=True):
                as_bytes(flat[part]).copy_(source)
        finally:
            self.release()

    def _cut(self, tensors: Sequence[tuple[int, Tensor]], rank: int) -> list[Tensor]:
        """The pieces of whole tensors, given with the places of their parameters, that belong to a process."""
        return [
            tensor.view(-1)[start : start + length]
            for index, tensor in tensors
            for start, length in [self.pieces[rank][index]]
        ]

    def _sent(self, piece: Tensor) -> Tensor:
        return as_bytes(piece.to(self.device))

    def release(self) -> None:
        """Free the memory of the whole parameters, which keep their shapes."""
        for _, whole in self.owned():
            whole.grad = None
            whole.untyped_storage().resize_(0)


def _check_owned(optimizer: SCAO, state_dict: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where a saved state is not that of the parameters that this process owns.

    Args:
        optimizer: of a vector; what others own is without memory.
        state_dict: with one group, after no step or after some. Other parameters are refused by the optimizer itself.
    """
    (group,), (saved,) = optimizer.param_groups, state_dict["param_groups"]
    names, saved_names = (each.get("param_names", [*range(len(each["params"]))]) for each in (group, saved))
    owned = {name for name, param in zip(names, group["params"], strict=True) if not param.is_meta and param.numel()}
    held = {name for name, key in zip(saved_names, saved["params"], strict=True) if key in state_dict["state"]}
    if held and held != owned and {*names} == {*saved_names}:
        theirs, ours = (few([*map(str, sorted(each))]) for each in (held, owned))
        raise ValueError(
            f"the saved state of this process is of the parameters {theirs}, but it owns {ours}: resume with the parameters "
            "in the order of the run that was saved and with its options (k_max, use_int8_ema, moment_dtype, "
            "max_precond_dim), or start from the weights alone (load_optimizer_states=False)"
        )


def _device() -> torch.device:
    """Where processes exchange tensors; the flat vectors may be in the memory of the host."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _shape_of(param: Tensor) -> Tensor:
    """A tensor of a parameter's shape without memory. Of one that ZeRO-3 has cut already, DeepSpeed keeps the shape."""
    shape = getattr(param, "ds_shape", param.shape)
    return torch.empty(tuple(shape), device="meta", requires_grad=param.requires_grad)


def _piece(param: Any, numel: int, flat: Tensor) -> tuple[int, int, int] | None:
    """The piece of a parameter in this process's part of a vector: its begin in the parameter, its length, its begin there.

    None for a parameter of another vector.
    """
    if hasattr(param, "_z3_optimizer"):
        zero = param._z3_optimizer
        place = zero.grad_position.get(zero.get_param_id(param))
        if place is None or zero.fp32_partitioned_groups_flat[place[0]] is not flat:
            return None
        if zero.swap_optimizer or (zero.offload_optimizer and zero.partial_offload != 1):
            raise ValueError(
                "offload_optimizer to nvme, or of a part (ratio), is not supported: set its device to cpu or none, and leave "
                "ratio out"
            )
        # Parts are of one length; what the last ones have beyond the end is padding.
        start = min(dist.get_rank(param.ds_process_group) * place[2], numel)
        return start, min(place[2], numel - start), place[1]
    if hasattr(param, "_hp_mapping"):
        mapping = param._hp_mapping
        if mapping is None:
            return 0, 0, 0
        own, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return own.start, own.numel, there.start
    return None


def _check_masters(param: Any) -> None:
    """Raise ``ValueError`` where the float32 weights that ZeRO-1 or 2 says are a parameter's are those of others."""
    mapping = getattr(param, "_hp_mapping", None)
    if mapping is not None:
        own = mapping.lp_fragment
        if not torch.equal(mapping.hp_fragment.to(own.device, own.dtype), own):
            raise ValueError(
                f"DeepSpeed names other float32 weights than those of a parameter of shape {tuple(param.shape)}, as it does "
                "with round_robin_gradients: leave that out of its config"
            )


def _candidates(pieces: Sequence[tuple[int, int]]) -> list[int]:
    """The processes that may own a parameter: those that have most of it already, which ZeRO-3 has cut into equal pieces."""
    most = max(length for _, length in pieces)
    return [rank for rank, (_, length) in enumerate(pieces) if 2 * length >= most]


def _check_pieces(shape: Tensor, pieces: Sequence[tuple[int, int]]) -> None:
    """Raise ``ValueError`` where the pieces of the processes do not make up the whole parameter."""
    end = 0
    for start, length in sorted(piece for piece in pieces if piece[1]):
        if start != end:
            break
        end = start + length
    if end != shape.numel():
        raise ValueError(
            f"the processes of a data-parallel group hold the pieces {list(pieces)} (begin, length) of a parameter of shape "
            f"{tuple(shape.shape)}, which are not the whole of it: leave MiCS, hpZ and other splits out of the DeepSpeed config"
        )
