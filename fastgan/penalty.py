"""R1, the penalty on D's gradient at real images (Mescheder et al. 2018, arXiv:1801.04406, eq. 9).

It is differentiated twice, which fused kernels cannot be: `plain` has a network compute by
PyTorch's own operators meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastgan_kernels import BatchNormAct2d


def r1(discriminate: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The mean over images x [B, 3, H, W] of |d sum(D(x)) / dx|^2, 0-d, in float32 at least.

    Eq. 9 is gamma / 2 times that. It can be differentiated by D's parameters (inside `plain`, if D
    has kernels of its own), which gives nothing to the images. Where D normalises by the batch, an
    image's gradient has its part in the others' logits, too.
    """
    x = images.detach().to(torch.promote_types(images.dtype, torch.float32)).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminate(x).sum(), x, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


@contextmanager
def plain(network: nn.Module) -> Iterator[None]:
    """Inside, all of a network's operators can be differentiated twice, and its state stays as it
    is: in training, too, batch norms leave running statistics and counts alone.

    They get copies of these to move, so that neither a value that is not finite nor a count is
    left behind; the buffers themselves come back.
    """
    with ExitStack() as back:
        for module in network.modules():
            if isinstance(module, BatchNormAct2d):
                _lend(back, vars(module), "impl", "torch")
                for name, buffer in list(module._buffers.items()):
                    if buffer is not None:
                        _lend(back, module._buffers, name, buffer.clone())
            elif hasattr(module, "conv_impl"):
                _lend(back, vars(module), "conv_impl", "torch")
        yield


def _lend(back: ExitStack, owner: dict[str, Any], name: str, value: Any) -> None:
    """Set owner[name] to a value until `back` closes."""
    back.callback(owner.__setitem__, name, owner[name])
    owner[name] = value
