"""`adam_ema` as an optimizer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adam_ema import Average, adam_ema

MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam(torch.optim.Optimizer):
    """`torch.optim.Adam` (weight decay 0, no amsgrad) as one launch a step.

    Its state is made at once, on the device and in each parameter's layout, under
    `torch.optim.Adam`'s names, and its state_dict goes into `torch.optim.Adam` and back; all
    parameters of a group share one step count. The learning rate is a tensor on the device: write
    into `param_groups[0]["lr"]` and a captured graph takes it up. `torch.amp.GradScaler` hands it
    scale and found_inf, and no gradient is unscaled in memory.

    Args:
        params: parameters, or groups of them (`torch.optim.Optimizer`); float32 for "triton".
        lr, betas, eps: Adam's.
        low: a bfloat16 or float16 copy of each parameter, in order, written in the same launch.
        average: what is averaged in the same launch.
        impl: `adam_ema`'s.

    Raises:
        ValueError: an option out of range; `low` or `average` with several groups; at a step, a
            parameter without a gradient.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf for each step

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        low: Sequence[Tensor] = (),
        average: Average | None = None,
        impl: str = "auto",
    ) -> None:
        if lr < 0:
            raise ValueError(f"Adam: lr must be 0 or more, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Adam: betas must be from 0 to below 1, got {betas}")
        if eps < 0:
            raise ValueError(f"Adam: eps must be 0 or more, got {eps}")
        # the names that torch.optim.Adam looks for when it takes this state_dict
        rest = {"weight_decay": 0.0, "amsgrad": False, "maximize": False}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, **rest})
        if (low or average is not None) and len(self.param_groups) > 1:
            raise ValueError("Adam: low and average go with one group of parameters")
        self.low, self.average, self.impl = low, average, impl
        for group in self.param_groups:
            self._on_device(group)
            first = group["params"][0]
            step = torch.zeros((), dtype=torch.float32, device=first.device)
            for p in group["params"]:
                moments = {name: torch.zeros_like(p) for name in MOMENTS}  # in p's own layout
                self.state[p] = {"step": step, **moments}

    @staticmethod
    def _on_device(group: dict[str, Any]) -> None:
        """A learning rate of the group's own, where its parameters are."""
        first = group["params"][0]
        wide = torch.promote_types(first.dtype, torch.float32)
        group["lr"] = torch.as_tensor(group["lr"]).to(first.device, wide).clone()
        group["capturable"] = first.is_cuda  # torch.optim.Adam: on other devices it must not be

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the parameters' `grad`; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = group["params"]
            missing = [i for i, p in enumerate(params) if p.grad is None]
            if missing:
                raise ValueError(
                    f"Adam: parameter {missing[0]} of shape {tuple(params[missing[0]].shape)} has "
                    "no gradient; leave out of the optimizer what is not trained"
                )
            adam_ema(
                params,
                [p.grad for p in params],
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

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam`'s: each parameter has a step count of its own there."""
        saved = super().state_dict()
        apart = {i: {**s, "step": s["step"].clone()} for i, s in saved["state"].items()}
        return {**saved, "state": apart}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of this optimizer or of a `torch.optim.Adam`.

        Raises:
            ValueError: it has a weight decay, amsgrad or maximize; or its parameters have been
                stepped a different number of times.
        """
        for group in state_dict["param_groups"]:
            for name in ("weight_decay", "amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(f"Adam: cannot take a state with {name}, got {group[name]}")
            steps = {float(state_dict["state"][i]["step"]) for i in group["params"]}
            if len(steps) > 1:
                raise ValueError(f"Adam: all parameters must have one step count, got {steps}")
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            self._on_device(group)
            first = group["params"][0]
            step = self.state[first]["step"].to(first.device, torch.float32)
            for p in group["params"]:
                self.state[p]["step"] = step
                for name in MOMENTS:  # in p's own layout, whatever it was saved in
                    self.state[p][name] = torch.empty_like(p).copy_(self.state[p][name])
