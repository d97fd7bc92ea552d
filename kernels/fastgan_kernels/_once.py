"""Backward passes of kernels, which cannot be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A backward that raises where its gradients are to be differentiated (`create_graph=True`).

    PyTorch's `once_differentiable` alone raises when it is reached: a gradient penalty by
    `torch.autograd.grad` need not reach it, and its term would be missing in silence. A compiled
    backward is refused by torch.compile itself.

    Raises:
        RuntimeError: in that backward.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        plain = torch.autograd.function.once_differentiable(backward)

        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f'{op}: impl="triton" cannot be differentiated twice (create_graph=True); '
                    'impl="torch" can'
                )
            return plain(ctx, *grads)

        return checked

    return decorate
