"""`adam_ema` as an optimizer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._launch import IMPLS
from .adam_ema import Average, adam_ema, check_options

MOMENTS = ("exp_avg", "exp_avg_sq")
# What torch.optim.Adam has beyond this one; and what it looks for in a state_dict to be itself.
ABSENT: dict[str, Any] = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
THEIRS = {**ABSENT, "fused": True}


class Adam(torch.optim.Optimizer):
    """`torch.optim.Adam` (weight decay 0, no amsgrad) as one launch a step.

    Its state is made at once, on the device and in each parameter's layout, under
    `torch.optim.Adam`'s names, and its state_dict goes into `torch.optim.Adam` and back; all
    parameters of a group share one step count. Learning rate, counts and moments are tensors on the
    device that stay where they are, also when a state is loaded: a captured graph takes them up.
    `torch.amp.GradScaler` hands it scale and found_inf, and no gradient is unscaled in memory; with
    found_inf not zero nothing happens.

    Args:
        params: parameters, or groups of them (`torch.optim.Optimizer`); float32 for "triton".
        lr, betas, eps: Adam's.
        low: for each parameter, in order, a bfloat16 or float16 copy that is written in the same
            launch, or None. A copy that requires a gradient is what the network computes with: its
            gradient is taken in the place of the parameter's.
        average: what is averaged in the same launch.
        impl: `adam_ema`'s.

    Raises:
        ValueError: an option out of range or not there; `low` or `average` with several groups; at
            a step, a parameter without a gradient.
    """

    _step_supports_amp_scaling = True  # GradScaler sets these for each step, and deletes them
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        low: Sequence[Tensor | None] = (),
        average: Average | None = None,
        impl: str = "auto",
    ) -> None:
        if impl not in IMPLS:
            raise ValueError(f"Adam: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
        self.low, self.average, self.impl = low, average, impl
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, **THEIRS})

    def __getstate__(self) -> dict[str, Any]:
        mine = {"low": self.low, "average": self.average, "impl": self.impl}
        return {**super().__getstate__(), **mine}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take further parameters, with options of their own; their state is made at once."""
        if (self.low or self.average is not None) and self.param_groups:
            raise ValueError("Adam: low and average go with one group of parameters")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        params = group["params"]
        if not params:
            raise ValueError("Adam: a group must hold at least one parameter, got none")
        _check_group(group)
        device, dtype = params[0].device, torch.float32  # which CUDA's fused Adam reads it as
        if device.type != "cuda":
            dtype = torch.promote_types(params[0].dtype, dtype)
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float64).to(device, dtype)
        group["capturable"] = params[0].is_cuda  # torch.optim.Adam's: only there
        step = torch.zeros((), dtype=torch.float32, device=device)
        for p in params:
            self.state[p] = {"step": step, **{name: torch.zeros_like(p) for name in MOMENTS}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the parameters' `grad`; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = group["params"]
            grads = self._gradients(params)
            if not isinstance(group["lr"], Tensor):
                raise ValueError(
                    f"Adam: lr must stay the tensor that it is, got {group['lr']}; write into it: "
                    'param_groups[0]["lr"].fill_(...)'
                )
            _check_absent(group)
            adam_ema(
                params,
                grads,
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                self.state[params[0]]["step"],
                group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                low=self.low,
                average=self.average,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                impl=self.impl,
            )
        return loss

    def gradients(self) -> list[Tensor]:
        """What the next step will take, of every parameter in order: to reduce, check or clip.

        Raises:
            ValueError: one has none.
        """
        return [g for group in self.param_groups for g in self._gradients(group["params"])]

    def _gradients(self, params: list[Tensor]) -> list[Tensor]:
        grads = []
        for i, leaf in enumerate(self._reached(params)):
            if leaf.grad is None:
                raise ValueError(
                    f"Adam: parameter {i} of shape {tuple(leaf.shape)} has no gradient; leave out "
                    "of the optimizer what is not trained"
                )
            grads.append(leaf.grad)
        return grads

    def leaves(self) -> list[Tensor]:
        """What has the gradients, of every parameter in order: it, or its copy."""
        return [t for group in self.param_groups for t in self._reached(group["params"])]

    def _reached(self, params: list[Tensor]) -> list[Tensor]:
        copies = self.low or [None] * len(params)
        return [
            p if copy is None or not copy.requires_grad else copy
            for p, copy in zip(params, copies, strict=True)
        ]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the parameters and of the copies that have their gradients."""
        super().zero_grad(set_to_none)
        for copy in self.low:
            if copy is not None and copy.grad is not None:
                if set_to_none:
                    copy.grad = None
                else:
                    copy.grad.zero_()

    @torch.no_grad()
    def write_low(self) -> None:
        """Write the copies, as a step does: after the parameters were set by something else."""
        for copy, p in zip(self.low, self.param_groups[0]["params"], strict=False):
            if copy is not None:
                copy.copy_(p)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam`'s, where each parameter has a step count of its own."""
        saved = super().state_dict()
        state = {i: {**s, "step": s["step"].clone()} for i, s in saved["state"].items()}
        groups = [{**group, "lr": group["lr"].clone()} for group in saved["param_groups"]]
        return {**saved, "state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of this optimizer or of a `torch.optim.Adam`, into the tensors in use.

        Raises:
            ValueError: it is another optimizer's, has a weight decay, amsgrad or maximize, or its
                parameters have been stepped a different number of times.
        """
        for group in state_dict["param_groups"]:
            _check_group(group)
            states = [state_dict["state"].get(i) for i in group["params"]]
            if any(s is not None and not s.keys() >= {"step", *MOMENTS} for s in states):
                raise ValueError("Adam: the state must hold step, exp_avg and exp_avg_sq")
            steps = {float(s["step"]) if s is not None else 0.0 for s in states}
            if len(steps) > 1:
                raise ValueError(f"Adam: all parameters must have one step count, got {steps}")
        mine = {p: dict(state) for p, state in self.state.items()}
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            rate.copy_(torch.as_tensor(group["lr"]))
            group["lr"], group["capturable"] = rate, rate.is_cuda
            for p in group["params"]:
                for name, t in mine[p].items():
                    taken = self.state[p].get(name)  # none before the other's first step
                    t.zero_() if taken is None else t.copy_(taken)
                self.state[p] = mine[p]


def _check_group(group: dict[str, Any]) -> None:
    if not group.keys() >= {"lr", "betas", "eps"}:
        raise ValueError(f"Adam: a group must hold lr, betas and eps, got {', '.join(group)}")
    check_options("Adam", group["betas"], group["eps"])
    if not 0 <= float(group["lr"]) < float("inf"):
        raise ValueError(f"Adam: lr must be 0 or more, got {float(group['lr'])}")
    _check_absent(group)


def _check_absent(group: dict[str, Any]) -> None:
    for name in ABSENT:
        if group.get(name):
            raise ValueError(f"Adam: there is no {name} here, got {group[name]}")
