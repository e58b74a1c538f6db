"""``SCAO``: a drop-in for ``torch.optim.AdamW`` with Kronecker curvature. Lifecycle only; the equations live elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scao_hf import options as opt
from scao_hf import report
from scao_hf import state as storage
from scao_hf.buckets import Bucket
from scao_hf.rules import Tick, rule_of
from scao_hf.update import full_precision, sanitize

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class SCAO(Optimizer):
    """Sparse Curvature-Aware Adaptive Optimizer.

    Matrices take AdamW steps while their curvature is gathered (phase 1), then steps in the eigenbasis of that
    curvature (phase 2), with a linear ramp between the two. Everything else takes AdamW steps.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or group dicts; a group may override every option below.
        lr: learning rate, a number or a one-element tensor. An AdamW learning rate carries over.
        betas: decays of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        rule: ``"eigenbasis"`` (SCAO's own) or ``"published"`` (the published algorithm, as a reference).
        warmup_steps, blend_steps, min_precond_updates, precond_freq, rho, epsilon_sparse, k_min, k_max, tau,
            max_precond_dim, use_int8_ema, on_nonfinite: see ``scao_hf.options.OPTIONS``. None takes the rule's default
            (``scao_hf.options.RULE_DEFAULTS``).

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
        rule: str = "eigenbasis",
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
        on_nonfinite: str | None = None,
    ) -> None:
        passed = {
            "betas": betas,
            "warmup_steps": warmup_steps,
            "blend_steps": blend_steps,
            "min_precond_updates": min_precond_updates,
            "precond_freq": precond_freq,
            "rho": rho,
            "epsilon_sparse": epsilon_sparse,
            "k_min": k_min,
            "k_max": k_max,
            "tau": tau,
            "max_precond_dim": max_precond_dim,
            "use_int8_ema": use_int8_ema,
            "on_nonfinite": on_nonfinite,
        }
        self._reset_plan()
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, **opt.resolve(rule, passed)}
        defaults["scao_version"] = storage.VERSION
        self._passed = {name: value for name, value in passed.items() if value is not None}
        super().__init__(params, defaults)

    def _reset_plan(self) -> None:
        self._signature: tuple[Any, ...] = ()
        self._buckets: list[Bucket] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._passed = {}
        self._reset_plan()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not name take the optimizer's, or its own rule's defaults.

        Raises:
            ValueError: an illegal option, or a parameter that is sharded in a way SCAO cannot step.
        """
        group = dict(param_group)
        rule = group.get("rule", self.defaults["rule"])
        named = {name: group[name] for name in (*opt.OPTIONS, "betas") if name in group and name != "rule"}
        if rule != self.defaults["rule"]:
            group.update(opt.resolve(rule, {**self._passed, **named}))
        settings = {**self.defaults, **group}
        lr = settings["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr is a tensor of {lr.numel()} elements: it must have one element")
        opt.check_torch_options(
            float(lr) if isinstance(lr, Tensor) else lr, settings["betas"], settings["eps"], settings["weight_decay"]
        )
        opt.resolve(rule, {name: settings[name] for name in opt.RULE_DEFAULTS[rule]})
        super().add_param_group(group)
        for param in self.param_groups[-1]["params"]:
            storage.refuse_sharded(param)
        self._reset_plan()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: re-evaluates the model and returns the loss, as in ``torch.optim``.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, or a non-finite one under ``on_nonfinite="raise"`` (before anything changed).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_nonfinite()
        for bucket in self._plan():
            # The step may be taken inside the training loop's autocast block: its own arithmetic must not be lowered.
            with full_precision(), torch.autocast(bucket.members[0].param.device.type, enabled=False):
                self._step_bucket(bucket)
        return loss

    def _plan(self) -> list[Bucket]:
        """The buckets of the parameters that have a gradient now; built anew only when these have changed."""
        signature = tuple(
            (id(param), param.dtype, param.device)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        )
        if signature != self._signature:
            self._buckets = storage.build_buckets(self.param_groups, self.state, lambda param: param.grad is not None)
            self._signature = signature
        return self._buckets

    def _refuse_nonfinite(self) -> None:
        for group in self.param_groups:
            if group["on_nonfinite"] != "raise":
                continue
            for param in group["params"]:
                if param.grad is not None and not bool(torch.isfinite(param.grad).all()):
                    raise RuntimeError(
                        f"the gradient of a parameter of shape {tuple(param.shape)} holds NaN or Inf and on_nonfinite="
                        "'raise'; nothing was changed. Pass on_nonfinite='skip' to leave such a matrix as it is for the step"
                    )

    def _step_bucket(self, bucket: Bucket) -> None:
        """One step of one bucket: moments and curvature, direction, decay, write-back."""
        group, rule = bucket.group, rule_of(bucket.group, bucket.matrix)
        due = bucket.due(bucket.step + 1, rule.start(group))
        # A learning rate on a device would have to be waited for.
        if bucket.native and not (isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu"):
            params, parts = bucket.parts()
            if rule.fused(bucket.state, params, parts, bucket.step + 1, group, due):
                bucket.step += 1
                torch.autograd.graph.increment_version(params)
                storage.publish(bucket, self.state)
                return
        grads, finite = sanitize(bucket.gradients())
        bucket.step += 1
        bucket.state["taken"] += finite[:, 0, 0]
        tick = Tick.of(bucket.step, bucket.state["taken"][:, None, None], finite, group, due)
        direction = rule.step(bucket.state, grads, tick)
        lr, decay = group["lr"], group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = lr.detach().to(direction)
        if decay:
            bucket.decay(1 - finite * (lr * decay))
        bucket.subtract(direction.mul_(finite * lr))
        storage.publish(bucket, self.state)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dict: tensors and numbers only, loadable with ``torch.load(weights_only=True)``."""
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state exactly: dtypes are kept, tensors are copied.

        Raises:
            ValueError: another optimizer's or rule's state, a shape or key that does not fit, a non-finite value. The
                optimizer is unchanged then.
        """
        taken: dict[str, Any] = {}

        def inspect(_: Optimizer, incoming: dict[str, Any]) -> None:
            storage.check_state_dict(incoming, self.param_groups)
            taken.update(incoming)

        # The hook runs after those of the user, which may replace the dict, and before torch changes anything.
        handle = self.register_load_state_dict_pre_hook(inspect)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch has cast every tensor to its parameter's dtype: put the exact values in place of those.
        self.state.update(storage.exact_state(taken, self.param_groups))
        self._reset_plan()

    def _all_buckets(self) -> list[Bucket]:
        """Buckets of every parameter with state, whether or not it has a gradient now."""
        return storage.build_buckets(self.param_groups, self.state, lambda param: param in self.state)

    def metrics(self) -> dict[str, float]:
        """The figures for a training log: scao/phase, blend, rank, captured_mass, curvature_norm, skipped.

        Averages over the matrices of the latest step; one device synchronisation.
        """
        return report.metrics(self._buckets or self._all_buckets())

    def statistics(self) -> list[dict[str, Any]]:
        """One plain row per matrix: name, shape, phase, rank, captured mass, curvature norm, skipped steps."""
        names = {
            param: name
            for group in self.param_groups
            for param, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        buckets = self._all_buckets()
        self._reset_plan()
        return report.statistics(buckets, names)

    def memory_report(self) -> dict[str, int]:
        """Bytes of optimizer state by kind, for real and for meta parameters, whether or not a step was taken."""
        return report.memory_report(self.param_groups)


def create_scao_optimizer(
    model: nn.Module, lr: float | Tensor = 1e-3, weight_decay: float = 0.01, **scao_kwargs: Any
) -> SCAO:
    """Build SCAO for a model's trainable parameters, with their names and without decay on biases and norms.

    Args:
        model: any module; PEFT models bring their LoRA factors as the trainable parameters.
        lr: learning rate.
        weight_decay: decoupled decay of parameters with at least two sides; the others are not decayed.
        **scao_kwargs: every other option of ``SCAO``.

    Raises:
        ValueError: nothing in the model is trainable.
    """
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise ValueError(
            "the model has no trainable parameter: add an adapter (peft.get_peft_model) or unfreeze some weights first"
        )
    groups = [
        {"params": [pair for pair in trainable if pair[1].ndim >= 2], "weight_decay": weight_decay},
        {"params": [pair for pair in trainable if pair[1].ndim < 2], "weight_decay": 0.0},
    ]
    return SCAO([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay, **scao_kwargs)
