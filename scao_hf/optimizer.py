"""``SCAO``: a drop-in for ``torch.optim.AdamW`` with Kronecker curvature. Lifecycle only; the equations live elsewhere."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scao_hf import checkpoint, notices, report
from scao_hf import options as opt
from scao_hf.blocks import Packing, is_matrix
from scao_hf.distributed.exchange import agreed, check_flattened, check_placement
from scao_hf.distributed.shards import Shards
from scao_hf.distributed.sharing import Sharing
from scao_hf.experts import find_experts, find_vocabulary, split_group
from scao_hf.initial import is_untrained
from scao_hf.names import name_of, with_names
from scao_hf.ops import full_precision
from scao_hf.rules import State, is_large
from scao_hf.rules.base import Bucket, Step, idle_experts_kept
from scao_hf.rules.low_bit import decoded
from scao_hf.stacks import Stacks, publish

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class SCAO(Optimizer):
    """Sparse Curvature-Aware Adaptive Optimizer.

    Matrices take AdamW steps while their curvature is gathered (phase 1), then steps in the eigenbasis of that
    curvature (phase 2), with a linear ramp between the two. Random matrices with two large sides, as in training from
    scratch, take orthogonalised steps from the first one on. Everything else takes AdamW steps.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts; a group may override every option below.
        lr: learning rate, a number or a one-element tensor. An AdamW learning rate carries over.
        betas: decays of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        rule: how matrices are stepped, one of ``scao_hf.options.RULES``.
        warmup_steps, blend_steps, min_precond_updates, precond_freq, rho, epsilon_sparse, k_min, k_max, tau,
            max_precond_dim, use_int8_ema, cautious, moment_dtype, stochastic_rounding, on_nonfinite: see
            ``scao_hf.options.OPTIONS``. None takes the rule's default (``scao_hf.options.RULE_DEFAULTS``).
        from_scratch: whether the weights are random; None looks at them in the first step (``scao_hf.initial``).
        experts: the packed LoRA factors of stacked experts, from ``scao_hf.experts.find_experts(model)``: each expert
            then is a matrix of its own. They become parameter groups of their own.
        vocabulary: embeddings and heads, from ``scao_hf.experts.find_vocabulary(model)``. They become parameter groups of
            their own, and take AdamW steps where other large matrices take those of the orthogonal rule.
        names: of parameters that are passed without theirs; used if it has all of them.
        partial_resume: whether ``load_state_dict`` takes a state of other parameters: it restores those that have the same
            name and shape here, warns of the others, and leaves the new ones without state, as at the start of a run.

    Raises:
        ValueError: an option outside its legal range, named with the value and the range.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rule: str = opt.RULES[0],
        from_scratch: bool | None = None,
        warmup_steps: int | None = None,
        blend_steps: int | None = None,
        min_precond_updates: int | None = None,
        precond_freq: int | None = None,
        rho: float | None = None,
        epsilon_sparse: float | None = None,
        k_min: int | None = None,
        k_max: int | None = None,
        tau: float | None = None,
        max_precond_dim: int | None = None,
        use_int8_ema: bool | None = None,
        cautious: bool | None = None,
        moment_dtype: str | None = None,
        stochastic_rounding: bool | None = None,
        on_nonfinite: str | None = None,
        experts: Mapping[Tensor, Packing] | None = None,
        vocabulary: Collection[Tensor] | None = None,
        names: Mapping[Tensor, str] | None = None,
        partial_resume: bool = False,
    ) -> None:
        passed = {name: value for name, value in locals().items() if name in opt.OPTIONS or name == "betas"}
        passed.pop("rule")
        _check_params(params)
        opt.check("partial_resume", partial_resume, opt.SWITCHES["partial_resume"])
        self._partial_resume = partial_resume
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, **opt.resolve(rule, passed)}
        defaults["scao_version"] = checkpoint.VERSION
        self._passed = {name: value for name, value in passed.items() if value is not None}
        self._sharing: Sharing | None = None
        self._experts, self._vocabulary = experts or {}, set(vocabulary or ())
        #: For each group that was added, whether it had a matrix; the ids of all parameters that were none. A weak reference
        #: would forbid torch.utils.swap_tensors, with which modules are moved and cast.
        self._had_matrices: list[bool] = []
        self._vectors: set[int] = set()
        self._edits = opt.Edits([])
        super().__init__(params if names is None else with_names(params, names), defaults)
        self._experts, self._vocabulary = {}, set()
        self._begin()
        notices.without_matrices(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        state = defaultdict(dict, checkpoint.apart(self.state))
        own = {"_passed": self._passed, "_partial_resume": self._partial_resume}
        return {**super().__getstate__(), "state": state, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "defaults" in state:  # a copy or an unpickled one; torch's load_state_dict calls this too, with less
            self._passed = dict(state.get("_passed", {}))
            self._partial_resume = state.get("_partial_resume", False)
            self._sharing = None
            self._experts, self._vocabulary = {}, set()
            self._had_matrices, self._vectors = [], set()
            for group in self.param_groups:
                self._remember(group["params"])
        self._begin()

    def _begin(self) -> None:
        """Forget what belonged to other parameter groups or another state."""
        self._stacks: Stacks | None = None
        self._watch = notices.Watch()
        self._idleness = notices.Idleness()
        self._edits = opt.Edits(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not name are those that the optimizer was given, or its rule's defaults.

        A group with ``experts`` (as in the constructor) becomes one group for each kind of packing in it.

        Raises:
            ValueError: an illegal option, or a parameter that is given twice, or sharded in a way SCAO cannot step.
        """
        _check_params(param_group["params"])
        group, before = dict(param_group), len(self.param_groups)
        experts = group.pop("experts", None) or self._experts
        try:
            for part in split_group(group, experts, self._vocabulary):
                super().add_param_group(self._completed(part))
                _check_once(self.param_groups[-1])
                for param in self.param_groups[-1]["params"]:
                    check_placement(param)
        except BaseException:
            del self.param_groups[before:]
            raise
        for added in self.param_groups[before:]:
            self._remember(added["params"])
            self._edits.add(added)

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """A new group with its rule's options, all of them checked."""
        opt.check_foreign(group)
        rule = group.get("rule", self.defaults["rule"])
        named = {name: group[name] for name in (*opt.OPTIONS, "betas") if name in group and name != "rule"}
        group = {**group, **opt.resolve(rule, {**self._passed, **named})}
        settings = {**self.defaults, **group}
        lr = settings["lr"]
        if isinstance(lr, Tensor):
            opt.check_lr(lr)
        opt.check_torch_options(
            float(lr) if isinstance(lr, Tensor) else lr, settings["betas"], settings["eps"], settings["weight_decay"]
        )
        return group

    def _remember(self, params: list[Tensor]) -> None:
        """What a group was given, to know flattened matrices by."""
        self._had_matrices.append(any(map(is_matrix, params)))
        self._vectors.update(id(param) for param in params if not is_matrix(param))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: re-evaluates the model and returns the loss, as in ``torch.optim``.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, a non-finite one under ``on_nonfinite="raise"``, or a parameter that has had no
                finite gradient in ten steps or more. Before anything is changed, and with sharded parameters in all
                processes where it is one's.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Compiled, every step would be a graph of its own. Marked here, as the mark itself loads the compiler.
        torch.compiler.disable(self._step)()
        return loss

    def _step(self) -> None:
        try:
            with agreed(self.param_groups):
                self._follow_edits()
                self.look_at_weights()
                notices.check_finite(self.param_groups)
                stacks = self._current()
                self._watch.check(stacks.buckets)
            self._step_stacks(stacks)
            self._idleness.count(self.param_groups, stacks.idle)
        finally:
            if self._stacks is not None:
                self._stacks.close()

    def _current(self) -> Stacks:
        """The stacks of the parameters that have a gradient now; built again only where something in them has changed."""
        stacks = self._stacks
        if stacks is None or not stacks.fits(self.param_groups) or not stacks.open(self.state):
            self._stacks = stacks = self._stack(lambda param: param.grad is not None)
        return stacks

    def _step_stacks(self, stacks: Stacks) -> None:
        buckets, shards, sharing = stacks.buckets, stacks.shards, self._sharing
        if shards is not None:
            shards.gather()
        parts = [] if sharing is None else sharing.split(buckets)
        for index, bucket in enumerate(buckets):
            # The step may be taken inside the training loop's autocast block: its own arithmetic must not be lowered.
            device = bucket.members[0].param.device.type
            with full_precision(), torch.autocast(device, enabled=False):
                due = parts[index].get(sharing.rank, slice(0, 0)) if sharing else bucket.due(bucket.step + 1)
                self._step_bucket(bucket, due)
        if sharing is not None:
            sharing.exchange(buckets, parts)
        if shards is not None:
            shards.scatter(self.state)

    @torch.no_grad()
    def look_at_weights(self) -> None:
        """Set ``from_scratch`` in the groups of ``rule="auto"`` that leave it open. Collective with sharded parameters.

        ``step`` does so; before it, the weights must be those that training starts from.
        """
        undecided = [group for group in self.param_groups if group["rule"] == "auto" and group["from_scratch"] is None]
        if undecided:
            large = [
                param
                for group in undecided
                for param in group["params"]
                if is_matrix(param) and is_large(param.shape, group) and not group.get("vocabulary")
            ]
            found = is_untrained(large)
            for group in undecided:
                group["from_scratch"] = found
            self._edits.own(self.param_groups, "from_scratch")

    def _follow_edits(self) -> None:
        """Check options that were edited in the groups, and lay the state out as they say.

        Raises:
            ValueError: an illegal option, or one that existing state cannot follow. Nothing is changed then.
        """
        if self._edits.shaping(self.param_groups):
            self._stacks = None  # built for the options that were
            self._stack_all().close()
            self._edits.accept(self.param_groups)

    def _stack(self, include: Callable[[Tensor], bool]) -> Stacks:
        for group in self.param_groups:
            for param in group["params"]:
                check_placement(param)
        for group, had in zip(self.param_groups, self._had_matrices, strict=False):
            # Users may take matrices out of a group: 1-D parameters that it was given are not flattened matrices.
            check_flattened(group["params"], had and any(id(param) not in self._vectors for param in group["params"]))
        return Stacks(self.param_groups, self.state, include, self._edits.known())

    def _stack_all(self) -> Stacks:
        """Of every parameter with state, whether or not it has a gradient now."""
        return self._stack(lambda param: "step" in self.state.get(param, ()))

    def _step_bucket(self, bucket: Bucket, due: slice) -> None:
        """One step of one bucket, whose moments are decoded for it where they are kept encoded; ``due`` are refreshed."""
        try:
            with idle_experts_kept(bucket), decoded(bucket) as state:
                bucket.rule.step(Step(bucket, state, bucket.step + 1, due))
        finally:
            publish(bucket)

    def share_refresh(self, group: Any = None) -> None:
        """Share the refreshes out between the processes of a data-parallel run (DDP). Call it in all of them.

        Every process must give the optimizer the same parameters and gradients, as DDP does, and take every step: the others
        would wait for one that does not (DDP's ``join``). Each matrix is then
        refreshed by one process, which sends its state to the others; weights and states stay equal to the bit.

        Args:
            group: a ``torch.distributed.ProcessGroup``; None for all processes.

        Raises:
            ValueError: the processes hold parameters of different shapes, or sharded ones.
        """
        self._sharing = Sharing(self.param_groups, group)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dict: tensors and numbers only, loadable with ``torch.load(weights_only=True)``.

        As with AdamW the tensors are the live ones, which the next steps change: to keep a state in memory, copy it with
        ``copy.deepcopy``. Each parameter's entry has a checksum (``scao_hf.integrity``), which ``load_state_dict`` checks.

        With sharded parameters (FSDP2) all processes have to call it together: each parameter's state is then its step
        and one DTensor of bytes (``scao_hf.distributed.shards``), which torch.distributed.checkpoint saves and reshards.
        Through ``get_optimizer_state_dict`` so is every other parameter's, in an ordinary tensor.
        """
        with agreed(self.param_groups):
            self._follow_edits()
        return checkpoint.saved(super().state_dict(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state exactly: dtypes are kept, tensors are copied. Under ``partial_resume``, what there is of it.

        Raises:
            ValueError: another optimizer's or rule's state, a shape or key that does not fit, a non-finite value. The
                optimizer is unchanged then.
        """
        fresh: State = {}

        def inspect(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            if self._partial_resume:
                with agreed(self.param_groups):
                    incoming = checkpoint.in_common(incoming, self.param_groups)
            incoming, state = checkpoint.restored(incoming, self.param_groups)
            fresh.update(state)
            return {**incoming, "state": {}}

        # The first hook runs after those of the user, which may replace the dict, and before torch changes anything.
        # Torch sees no state: it would cast every tensor to its parameter's dtype. The second one enters the state before
        # the user's hooks look at it.
        handles = (
            self.register_load_state_dict_pre_hook(inspect),
            self.register_load_state_dict_post_hook(lambda _: self.state.update(fresh), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def metrics(self) -> dict[str, float]:
        """The figures for a training log: scao/phase, blend, rank, captured_mass, curvature_norm, damped, skipped.

        Averages over the matrices of the latest step; one device synchronisation. With sharded parameters, over those
        that this process owns.
        """
        stacks = self._stacks
        if stacks is None or not stacks.buckets or not stacks.open(self.state):
            stacks = self._stack_all()
        try:
            return report.metrics(stacks.buckets)
        finally:
            stacks.close()

    def statistics(self, names: Mapping[Tensor, str] | None = None) -> list[dict[str, Any]]:
        """One plain row per matrix: name, shape, phase, rank, captured mass, curvature norm, damped, skipped steps.

        With sharded parameters, the matrices that this process owns.

        Args:
            names: of parameters that were passed without one.
        """
        names = dict(names or {}) | {
            param: name
            for group in self.param_groups
            for param, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        stacks = self._stack_all()
        try:
            return report.statistics(stacks.buckets, names)
        finally:
            stacks.close()

    def describe(self) -> str:
        """The parameter groups in words, a line for each rule in them: parameters, learning rate, weight decay."""
        return report.describe(self.param_groups)

    def memory_report(self) -> dict[str, int]:
        """Bytes of optimizer state by kind, for real and for meta parameters, whether or not a step was taken.

        Of the parameters that require a gradient or have state; with sharded ones, of those that this process owns.
        """
        shards = Shards.of(self.param_groups, self.state)
        params = [param for group in self.param_groups for param in group["params"]]
        held = {param for param in params if param.requires_grad or param in self.state}
        return report.memory_report(self.param_groups, held if shards is None else held - shards.elsewhere)


def _check_params(params: Any) -> None:
    """Raise ``TypeError`` for a module, whose error in torch says nothing of parameters."""
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        raise TypeError(
            f"SCAO was given a {type(params).__name__}: pass model.parameters() or model.named_parameters(), or use "
            "create_scao_optimizer(model)"
        )


def _check_once(group: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a parameter that would be stepped twice, of which torch only warns."""
    counts = Counter(group["params"])
    for param in counts if len(counts) < len(group["params"]) else ():
        if counts[param] > 1:
            raise ValueError(
                f"the parameter{name_of(param, group)} of shape {tuple(param.shape)} is twice in a parameter group: "
                "pass it once"
            )


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model that are to be trained, with their names.

    Raises:
        ValueError: there are none.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError(
            "the model has no trainable parameter: add an adapter (peft.get_peft_model) or unfreeze some weights first"
        )
    return trainable


def create_scao_optimizer(
    model: nn.Module, lr: float | Tensor = 1e-3, weight_decay: float = 0.01, **scao_kwargs: Any
) -> SCAO:
    """Build SCAO for a model's trainable parameters, with their names and without decay on biases and norms.

    LoRA on stacked experts is found and stepped expert by expert.

    Args:
        model: any module; PEFT models bring their LoRA factors as the trainable parameters.
        lr: learning rate.
        weight_decay: decoupled decay of parameters with at least two sides; the others are not decayed.
        **scao_kwargs: every other option of ``SCAO``.

    Raises:
        ValueError: nothing in the model is trainable.
    """
    trainable = trainable_parameters(model)
    groups = [
        {"params": [pair for pair in trainable if pair[1].ndim >= 2], "weight_decay": weight_decay},
        {"params": [pair for pair in trainable if pair[1].ndim < 2], "weight_decay": 0.0},
    ]
    return SCAO(
        [group for group in groups if group["params"]],
        lr=lr,
        weight_decay=weight_decay,
        experts=find_experts(model),
        vocabulary=find_vocabulary(model),
        **scao_kwargs,
    )
