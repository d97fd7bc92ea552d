"""From the resident image set to a batch of the networks' numbers.

    y[b, c, h, w] = low + (high - low) / 255 * images[index[b], h, w', c]
    w' = W - 1 - w where flip[b], else w

    images    [N, H, W, 3] uint8, contiguous; on the device for the whole run
    index     [B] int64 or int32
    flip      [B] bool
    y         [B, 3, H, W] in `dtype`, channels-last: an image's values lie as its bytes did

Bytes: 3 H W read and 3 H W sizeof(dtype) written an image. The arithmetic is float32 (float64 for
a float64 result), rounded once to `dtype`.
"""

import torch
from torch import Tensor

from ._launch import DTYPES, choose, empty, jit, launch, tl

BLOCK = 2048  # bytes a program: one 16-byte load by each of 128 threads
WARPS = 4


def gather_u8_ref(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> Tensor:
    """The definition in plain PyTorch."""
    low, high = value_range
    wide = torch.promote_types(dtype, torch.float32)
    batch = images.index_select(0, index)
    if flip is not None:
        batch = torch.where(flip.view(-1, 1, 1, 1), batch.flip(2), batch)
    return batch.to(wide).mul_((high - low) / 255).add_(low).to(dtype).permute(0, 3, 1, 2)


@jit
def _gather_u8_kernel(
    images_ptr,  # [N, SIZE] uint8, SIZE = H * W * 3
    index_ptr,  # [B] int64 or int32
    flip_ptr,  # [B] bool, or None
    y_ptr,  # [B, SIZE]
    N, low, scale,
    SIZE: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr,  # ROW = W * 3
):  # fmt: skip
    b = tl.program_id(0)  # the axis that takes more than 65,535 programs
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    index = tl.load(index_ptr + b).to(tl.int64)
    image_ptr = images_ptr + index * SIZE
    real = (index >= 0) & (index < N)
    mirrored = False
    if flip_ptr is not None:
        mirrored = tl.load(flip_ptr + b) != 0
    if mirrored:
        in_row = place % ROW
        source = place - in_row + (ROW - 3 - in_row // 3 * 3) + in_row % 3
        level = tl.load(image_ptr + source, mask=inside & real, other=0)
    else:
        level = tl.load(image_ptr + place, mask=inside & real, other=0)
    value = level.to(tl.float32) * scale + low
    # an index outside of the set must not pass for an image: the device cannot raise
    value = tl.where(real, value, float("nan"))
    y_ptr += b.to(tl.int64) * SIZE
    tl.store(y_ptr + place, value.to(y_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("fastgan_kernels::gather_u8", mutates_args=())
def _gather_u8_fused(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None,
    dtype: torch.dtype,
    low: float,
    high: float,
) -> Tensor:
    count, height, width, _ = images.shape
    y = empty(len(index), height, width, 3, dtype=dtype, device=images.device)
    size = height * width * 3
    launch(
        _gather_u8_kernel,
        (len(index), -(-size // BLOCK)),
        images, index, flip, y, count, low, (high - low) / 255,
        device=images.device, num_warps=WARPS,
        enable_fp_fusion=False,  # the roundings of the definition: both ends of the range exact
        SIZE=size, ROW=width * 3, BLOCK=BLOCK,
    )  # fmt: skip
    return y.permute(0, 3, 1, 2)


@_gather_u8_fused.register_fake
def _(images, index, flip, dtype, low, high):
    shape = (index.shape[0], *images.shape[1:])
    return images.new_empty(shape, dtype=dtype).permute(0, 3, 1, 2)


def gather_u8(
    images: Tensor,
    index: Tensor,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    value_range: tuple[float, float] = (-1.0, 1.0),
    impl: str = "auto",
) -> Tensor:
    """Images `index` of the set as a [B, 3, H, W] channels-last batch in `value_range`; see the
    top of this file.

    An index outside of the set raises where it is looked up on the host ("torch" on a CPU); the
    kernel, which cannot, gives an image of NaN.

    Args:
        flip: bool [B], which images to mirror left to right; None mirrors none.
        impl: "triton", "torch" and "ref" (both the definition); "auto" is "triton" on an NVIDIA GPU
            for float32, bfloat16 and float16, "torch" elsewhere.

    Raises:
        ValueError: an argument of another shape or type.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(
            "gather_u8: images must be uint8 [N, H, W, 3], "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    if index.dtype not in (torch.int64, torch.int32) or index.dim() != 1:
        raise ValueError(
            f"gather_u8: index must be int64 or int32 [B], got {index.dtype} {tuple(index.shape)}"
        )
    if flip is not None and (flip.dtype != torch.bool or flip.shape != index.shape):
        raise ValueError(
            f"gather_u8: flip must be bool [{index.shape[0]}], got {flip.dtype} {tuple(flip.shape)}"
        )
    if len(value_range) != 2:
        raise ValueError(f"gather_u8: value_range must be two numbers, got {value_range}")
    kind = choose("gather_u8", impl, images, _fault(images, index, flip, dtype))
    if kind != "triton" or index.numel() == 0:
        return gather_u8_ref(images, index, flip, dtype=dtype, value_range=value_range)
    return _gather_u8_fused(images, index, flip, dtype, *value_range)


def _fault(images: Tensor, index: Tensor, flip: Tensor | None, dtype: torch.dtype) -> str:
    """What the kernel cannot take, or ""."""
    if dtype not in DTYPES:
        return f"dtype must be float32, bfloat16 or float16, got {dtype}"
    for name, t in {"images": images, "index": index, "flip": flip}.items():
        if t is not None and not t.is_contiguous():
            return f"{name} must be contiguous, got strides {t.stride()}"
        if t is not None and t.device != images.device:
            return f"{name} must be on {images.device}, got {t.device}"
    return ""
