"""The convolutions of a DCGAN: kernel 4, stride 2, padding 1, no bias.

    conv4x4             Conv2d:          x [B, CL, 2h, 2w] to [B, CS, h, w], and a LeakyReLU
    conv_transpose4x4   ConvTranspose2d: x [B, CS, h, w] to [B, CL, 2h, 2w]

with a weight [CS, CL, 4, 4] in both, PyTorch's layout. All in float32, bfloat16 or float16 (float64
by PyTorch's own operators), channels-last. The three products that both and their gradients are
made of, with what they cost and how they round, are those of `conv4x4_kernels`; a weight's gradient
comes in the weight's type. Saved for backward: x, the weight and, with a LeakyReLU, y.

cuDNN runs the layer at an image, of three channels, at a fraction of the memory's speed, and the
others at half to nine tenths of the matrix units'; the kernels are written for those few shapes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import conv4x4_kernels as kernels
from ._launch import DTYPES, choose, empty, processors
from ._once import once
from .conv4x4_kernels import IMAGE, Block

HALVES = (torch.bfloat16, torch.float16)
LARGEST = 1 << 31  # elements of a tensor: offsets are 32 bits
# Between inner maps: the tile where there is more than one for each multiprocessor, where there is
# about one, and where that leaves half of them idle. Of five tiles the first two were the fastest
# for each layer of a 64 px DCGAN at a batch of 256 on an H200
# (benchmarks/results/nvidia-h200/early/convs-256.json); the third was compared with cuDNN alone.
MANY, FEW, FEWER = (
    Block(128, 128, 64, 4, 3),
    Block(128, 128, 64, 8, 4),
    Block(64, 128, 64, 4, 4),
)
WGRAD, WGRAD_NARROW = Block(128, 128, 64, 8, 4), Block(64, 128, 64, 4, 4, programs=2)
FWD_IMAGE, DGRAD_IMAGE = Block(64, 64, 16, 4, 3), Block(64, 16, 64, 4, 3)
WGRAD_IMAGE = Block(64, 64, 64, 4, 3, programs=2)


def conv4x4_ref(x: Tensor, weight: Tensor, negative_slope: float = 1.0) -> Tensor:
    """The definition of `conv4x4`, by PyTorch's own operators; `conv_transpose4x4_ref`'s likewise.
    Every other implementation is held to them in float64.
    """
    y = F.conv2d(x, weight, stride=2, padding=1)
    return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)


def conv_transpose4x4_ref(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv_transpose2d(x, weight, stride=2, padding=1)


def conv4x4(
    x: Tensor, weight: Tensor, *, negative_slope: float = 1.0, impl: str = "auto"
) -> Tensor:
    """x [B, CL, 2h, 2w] to [B, CS, h, w] by a weight [CS, CL, 4, 4], as `F.conv2d(x, weight,
    stride=2, padding=1)`, and `F.leaky_relu` with `negative_slope` (above 0; 1: none).

    Args:
        impl: "triton", "torch" (`F.conv2d`, cuDNN on a GPU), "ref"; "auto" is "triton" where the
            kernels can run and are for: bfloat16 and float16 on a GPU of sm_90 in the shapes that
            they take (measured on an H200, the layers of a 64 px DCGAN of width 64); "torch"
            elsewhere. "triton" cannot be differentiated twice.

    Raises:
        ValueError: shapes that do not fit each other; a slope that is not above 0; "triton" for
            what the kernels cannot take.
    """
    _check("conv4x4", x, weight, 1)
    if not negative_slope > 0:  # y's sign is that of the product
        raise ValueError(f"conv4x4: negative_slope must be above 0, got {negative_slope}")
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"conv4x4: height and width must be even, got {tuple(x.shape)}")
    height, width = x.shape[2] // 2, x.shape[3] // 2
    if _chosen("conv4x4", impl, x, weight, height, width) == "triton":
        if _image(weight.shape[1]):
            return _Conv4x4.apply(x, weight, False, negative_slope)
        y = _Conv4x4.apply(x, weight, False, 1.0)
        return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)
    return conv4x4_ref(x, weight, negative_slope)


def conv_transpose4x4(x: Tensor, weight: Tensor, *, impl: str = "auto") -> Tensor:
    """x [B, CS, h, w] to [B, CL, 2h, 2w] by a weight [CS, CL, 4, 4], as `F.conv_transpose2d(x,
    weight, stride=2, padding=1)`; `impl` and errors as of `conv4x4`.
    """
    _check("conv_transpose4x4", x, weight, 0)
    if _chosen("conv_transpose4x4", impl, x, weight, *x.shape[2:]) == "triton":
        return _Conv4x4.apply(x, weight, True, 1.0)
    return conv_transpose4x4_ref(x, weight)


def _check(op: str, x: Tensor, weight: Tensor, side: int) -> None:
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[2:] != (4, 4):
        raise ValueError(
            f"{op}: x must be [B, C, H, W] and weight [CS, CL, 4, 4], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.shape[1] != weight.shape[side]:
        raise ValueError(
            f"{op}: x has {x.shape[1]} channels, and the weight, {tuple(weight.shape)}, takes "
            f"{weight.shape[side]}"
        )


def conv4x4_runs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether "auto" takes the kernels there, for layers that fit (`conv4x4_kernels.unfit`)."""
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return capable and dtype in HALVES


def _chosen(op: str, impl: str, x: Tensor, weight: Tensor, height: int, width: int) -> str:
    """`choose`, with "auto" for what was measured alone."""
    fault = _fault(x, weight, height, width)
    if impl == "auto":
        fast = not fault and conv4x4_runs(x.dtype, x.device)
        return choose(op, "auto" if fast else "torch", x, fault)
    return choose(op, impl, x, fault)


def _fault(x: Tensor, weight: Tensor, height: int, width: int) -> str:
    """What the kernels cannot take, or ""; height and width of the small map."""
    cs, cl = weight.shape[:2]
    if not x.numel():
        return ""
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"x and weight must be both of one of {DTYPES}, got {x.dtype} and {weight.dtype}"
    if x.is_cuda and x.dtype not in HALVES:
        return f"x must be bfloat16 or float16 on a GPU, got {x.dtype}"
    if x.device != weight.device:
        return f"x and weight must be on one device, got {x.device} and {weight.device}"
    if x.shape[0] * height * width * max(4 * cl, cs) >= LARGEST:
        return f"maps must be of fewer than 2^31 elements, got {tuple(x.shape)}"
    if fault := kernels.unfit(cl, cs, height, width):
        return fault
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0):
        return "the card must be of sm_90 or newer (they use its tensor memory accelerator)"
    return ""


def _tile(pixels: int, channels: int, k: int, device: torch.device) -> Block:
    """The tile of a product with so many pixels and channels."""
    columns = channels // MANY.fitted(0, channels, k).n
    tiles, most = -(-pixels // MANY.m) * columns, processors(device)
    block = MANY if tiles > most else FEWER if 2 * tiles <= most else FEW
    return block.fitted(0, channels, k)


def _nhwc(x: Tensor) -> Tensor:
    """Its memory, which is channels-last, as it lies."""
    return x.permute(0, 2, 3, 1)


def _image(channels: int) -> bool:
    return channels <= IMAGE


@torch.library.custom_op("fastgan_kernels::conv4x4_fwd", mutates_args=())
def _fwd(large: Tensor, weight: Tensor, slope: float) -> Tensor:
    batch, cl, height, width = large.shape
    cs = weight.shape[0]
    small = empty(batch, height // 2, width // 2, cs, dtype=large.dtype, device=large.device)
    given = (_nhwc(large), _nhwc(weight), small)
    if _image(cl):
        kernels.fwd_image(*given, FWD_IMAGE.fitted(0, cs, 16 * cl), slope)
    else:
        kernels.fwd(*given, _tile(small.numel() // cs, cs, cl, large.device))
    return small.permute(0, 3, 1, 2)


@torch.library.custom_op("fastgan_kernels::conv4x4_dgrad", mutates_args=())
def _dgrad(small: Tensor, weight: Tensor) -> Tensor:
    batch, cs, height, width = small.shape
    cl = weight.shape[1]
    large = empty(batch, 2 * height, 2 * width, cl, dtype=small.dtype, device=small.device)
    given = (_nhwc(small), _nhwc(weight), large)
    if _image(cl):
        kernels.dgrad_image(*given, DGRAD_IMAGE.fitted(0, 0, cs))
    else:
        kernels.dgrad(*given, _tile(4 * batch * height * width, cl, cs, small.device))
    return large.permute(0, 3, 1, 2)


@torch.library.custom_op("fastgan_kernels::conv4x4_wgrad", mutates_args=())
def _wgrad(large: Tensor, small: Tensor, y: Tensor | None, slope: float) -> Tensor:
    cl, cs = large.shape[1], small.shape[1]
    weight = empty(cs, 4, 4, cl, dtype=large.dtype, device=large.device)
    given = (_nhwc(large), _nhwc(small), weight)
    if _image(cl):
        of_y = None if y is None else _nhwc(y)
        kernels.wgrad_image(*given, WGRAD_IMAGE.fitted(0, cs, 0), of_y, slope)
    else:
        block = WGRAD if cl % WGRAD.m == 0 else WGRAD_NARROW
        kernels.wgrad(*given, block.fitted(cl, cs, 0))
    return weight.permute(0, 3, 1, 2)


@_fwd.register_fake
def _(large, weight, slope):
    batch, _, height, width = large.shape
    small = large.new_empty(batch, height // 2, width // 2, weight.shape[0])
    return small.permute(0, 3, 1, 2)


@_dgrad.register_fake
def _(small, weight):
    batch, _, height, width = small.shape
    large = small.new_empty(batch, 2 * height, 2 * width, weight.shape[1])
    return large.permute(0, 3, 1, 2)


@_wgrad.register_fake
def _(large, small, y, slope):
    return large.new_empty(small.shape[1], 4, 4, large.shape[1]).permute(0, 3, 1, 2)


class _Conv4x4(torch.autograd.Function):
    """One of the two convolutions, from the three products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: bool, slope: float) -> Tensor:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        y = _dgrad(x, weight) if transposed else _fwd(x, weight, slope)
        ctx.save_for_backward(x, weight, None if slope == 1 else y)
        ctx.transposed, ctx.slope = transposed, slope
        return y

    @staticmethod
    @once("conv4x4")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = dweight = None
        if y is not None and ctx.needs_input_grad[0]:  # dgrad takes each pixel nine times
            dy, y = torch.where(y > 0, dy, dy * ctx.slope), None
        if ctx.needs_input_grad[0]:
            dx = _fwd(dy, weight, 1.0) if ctx.transposed else _dgrad(dy, weight)
        if ctx.needs_input_grad[1]:
            large, small = (dy, x) if ctx.transposed else (x, dy)
            dweight = _wgrad(large, small, y, ctx.slope)
        return dx, dweight, None, None
