"""The DCGAN's convolutions against PyTorch's in float64."""

import itertools
import sys

import pytest
import torch
from torch import nn

from fastgan.config import split_size
from fastgan_kernels import _launch, conv4x4, conv_transpose4x4
from fastgan_kernels import conv4x4_kernels as kernels
from fastgan_kernels.conv4x4_kernels import Block

op = sys.modules["fastgan_kernels.conv4x4"]
needs_triton = pytest.mark.skipif(_launch.triton is None, reason="needs Triton")
needs_tma = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs an NVIDIA GPU of capability 9.0",
)
DTYPES = [torch.float16, torch.bfloat16]
if not torch.cuda.is_available():
    DTYPES.append(torch.float32)
# The rounding of a result to its type; the interpreter cuts bfloat16 off, by up to a whole unit.
ROUNDING = {
    torch.float32: 0.0,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-7 if _launch.INTERPRETED else 2**-8,
}
# float32 sums of a few thousand products, relative to the largest result; tensor cores add in
# hundreds of steps and cut off instead of rounding.
FLOAT32 = 2**-20 if _launch.INTERPRETED else 2**-16
# Batch, height and width of L, CL, CS. Of inner maps: tiles of 32 pixels, two images, and of 16,
# half an image, and a last tile that is cut. At an image: three channels and four.
INNER = {32: (9, 8, 8, 16, 32), 16: (3, 16, 8, 16, 32)}
IMAGES = [(3, 8, 4, 3, 32), (3, 4, 8, 4, 32), (1, 10, 6, 3, 32)]
WHOLE = [(3, 16, 16, 32, 64), (5, 16, 16, 3, 32)]  # what the operators take
MULTIPROCESSORS = 132  # of an H200


def maps(shape, dtype, device):
    """L [B, CL, H, W], S [B, CS, H/2, W/2] and W [CS, CL, 4, 4], channels-last."""
    batch, height, width, cl, cs = shape
    tensors = (
        torch.randn(batch, cl, height, width),
        torch.randn(batch, cs, height // 2, width // 2),
        torch.randn(cs, cl, 4, 4) * 0.05,
    )
    return [t.to(device, dtype).to(memory_format=torch.channels_last) for t in tensors]


def nhwc(*tensors):
    return [t.permute(0, 2, 3, 1) for t in tensors]


def exact(kind, large, small, weight):
    """The product in float64, by PyTorch."""
    large, small, weight = (t.double().contiguous() for t in (large, small, weight))
    if kind == "fwd":
        return nn.functional.conv2d(large, weight, stride=2, padding=1)
    if kind == "dgrad":
        return nn.functional.conv_transpose2d(small, weight, stride=2, padding=1)
    return torch.nn.grad.conv2d_weight(large, weight.shape, small, stride=2, padding=1)


def product(kind, form, block, large, small, weight):
    """By a kernel with a block of its own, into memory that is NaN."""
    given = {"large": large, "small": small, "weight": weight}
    order = {"fwd": "large weight small", "dgrad": "small weight large"}
    order = order.get(kind, "large small weight").split()
    out = torch.full_like(given[order[-1]], float("nan"))
    operands = nhwc(*(given[name] for name in order[:-1]), out)
    getattr(kernels, kind + form)(*operands, block)
    return out


def assert_close(got, expected, allowed=FLOAT32):
    """Within the rounding of each value and `allowed` of the largest."""
    assert got.shape == expected.shape
    bound = ROUNDING[got.dtype] * expected.abs() + allowed * expected.abs().max()
    assert ((got.double() - expected).abs() <= bound).all()


@needs_triton
@needs_tma
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", INNER)
def test_between_inner_maps(pixels, dtype, device):
    large, small, weight = tensors = maps(INNER[pixels], dtype, device)
    for kind, block in (
        ("fwd", Block(pixels, 32, 16, 4, 2)),
        ("dgrad", Block(pixels, 16, 32, 4, 2)),
        ("wgrad", Block(16, 32, 16, 4, 2, programs=16)),  # several splits
        ("wgrad", Block(16, 32, 16, 4, 2)),
    ):
        assert_close(product(kind, "", block, *tensors), exact(kind, *tensors))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_at_an_image(shape, dtype, device):
    tensors = maps(shape, dtype, device)
    for kind, block in (
        ("fwd", Block(32, 32, 16, 4, 2)),
        ("dgrad", Block(32, 16, 32, 4, 2)),
        ("wgrad", Block(64, 32, 16, 4, 2)),  # 48 or 64 rows
        ("wgrad", Block(64, 32, 16, 4, 2, programs=8)),
    ):
        assert_close(product(kind, "_image", block, *tensors), exact(kind, *tensors))


@needs_triton
@needs_tma
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", WHOLE, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_values_and_gradients(transposed, shape, dtype, device):
    large, small, weight = maps(shape, dtype, device)
    x, dy = (small, large) if transposed else (large, small)
    function = conv_transpose4x4 if transposed else conv4x4
    x.requires_grad_()
    weight.requires_grad_()
    y = function(x, weight, impl="triton")
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    for got in (y, dx, dweight):
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    x, dy, weight = (t.detach().double().contiguous() for t in (x, dy, weight))
    x.requires_grad_()
    weight.requires_grad_()
    expected = function(x, weight, impl="ref")
    assert_close(y, expected.detach())
    gradients = torch.autograd.grad(expected, [x, weight], dy)
    for got, right in zip((dx, dweight), gradients, strict=True):
        assert_close(got, right)


@needs_triton
@needs_tma
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to_images", [False, True])
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_a_leaky_relu(shape, to_images, dtype, device):
    """In the kernels at an image, and after the others; in backward, too, where the images need no
    gradient.
    """
    large, small, weight = maps(shape, dtype, device)
    given = (large.requires_grad_(to_images), weight.requires_grad_())
    wanted = [t for t in given if t.requires_grad]
    y = conv4x4(*given, negative_slope=0.2, impl="triton")
    gradients = torch.autograd.grad(y, wanted, small)
    wide = [t.detach().double().contiguous().requires_grad_(t.requires_grad) for t in given]
    expected = nn.functional.leaky_relu(nn.functional.conv2d(*wide, stride=2, padding=1), 0.2)
    assert_close(y, expected.detach(), FLOAT32 + ROUNDING[dtype])  # rounded twice, between others
    # of a y next to 0 the rounding decides the slope: the exact gradient of the signs that it has
    dz = torch.where(y > 0, 1.0, 0.2) * small.double()
    z = nn.functional.conv2d(*wide, stride=2, padding=1)
    right = torch.autograd.grad(z, [t for t in wide if t.requires_grad], dz)
    for got, value in zip(gradients, right, strict=True):
        # each term of the sum is rounded, too
        assert_close(got, value, FLOAT32 + ROUNDING[dtype])


@needs_triton
@needs_tma
def test_only_what_is_asked_for_is_computed(device, monkeypatch):
    large, _, weight = maps(WHOLE[0], torch.float16, device)
    monkeypatch.setattr(op, "_dgrad", None)  # D's first layer gives no gradient to the images
    y = conv4x4(large, weight.requires_grad_(), impl="triton")
    y.sum().backward()
    assert weight.grad.isfinite().all()


@needs_triton
@needs_tma
def test_the_gradient_of_the_input_alone(device):
    large, small, weight = maps(WHOLE[0], torch.float16, device)
    (dx,) = torch.autograd.grad(
        conv4x4(large.requires_grad_(), weight, impl="triton"), large, small
    )
    assert_close(dx, exact("dgrad", large.detach(), small, weight))


@needs_triton
@needs_tma
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, device):
    large, _, weight = maps(WHOLE[1], torch.float16, device)
    large[1, 0, 5, 5] = value
    y = conv4x4(large, weight, negative_slope=0.2, impl="triton")
    expected = conv4x4(large.float(), weight.float(), negative_slope=0.2, impl="ref")
    assert torch.equal(y.isfinite(), expected.isfinite()) and not y.isfinite().all()


@needs_triton
@needs_tma
def test_a_second_derivative_is_refused_where_it_would_be_lost(device):
    large, _, weight = maps(WHOLE[0], torch.float16, device)
    y = conv4x4(large.requires_grad_(), weight.requires_grad_(), impl="triton")
    with pytest.raises(RuntimeError, match="conv4x4: .* cannot be differentiated twice"):
        torch.autograd.grad(y.float().square().sum(), large, create_graph=True)


@needs_triton
@needs_tma
def test_memory_that_begins_anywhere(device):
    large, small, weight = tensors = maps(WHOLE[0], torch.float16, device)
    odd = []
    for t in tensors:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)[1:]
        batch, channels, height, width = t.shape
        odd.append(memory.view(batch, height, width, channels).permute(0, 3, 1, 2).copy_(t))
    ops = torch.ops.fastgan_kernels
    assert torch.equal(ops.conv4x4_fwd(odd[0], odd[2], 1.0), ops.conv4x4_fwd(large, weight, 1.0))
    assert torch.equal(ops.conv4x4_dgrad(odd[1], odd[2]), ops.conv4x4_dgrad(small, weight))


def test_nothing_of_nothing():
    weight = torch.zeros(32, 32, 4, 4)
    assert conv4x4(torch.zeros(0, 32, 8, 8), weight).shape == (0, 32, 4, 4)
    for function in (conv4x4, conv_transpose4x4):
        with pytest.raises(RuntimeError):  # PyTorch's own word, on a map without pixels
            function(torch.zeros(2, 32, 0, 8), weight, impl="torch")


@pytest.mark.parametrize("width", [32, 48, 64, 96, 128])
@pytest.mark.parametrize("size", [32, 40, 48, 64, 96, 128, 224, 256])
def test_every_tile_that_is_chosen_fits(size, width, monkeypatch):
    """For whatever network can be built and batches of any size, on a card of 132 processors:
    tiles divide the channels, boxes hold what TMA takes, and a multiprocessor has the memory.
    """
    monkeypatch.setattr(op, "processors", lambda device: MULTIPROCESSORS)
    base, doublings = split_size(size)
    inner = [min(width << i, 16 * width) for i in range(doublings)]
    edges = [base << i for i in reversed(range(doublings))]  # of the small maps
    layers = list(zip(edges, [3, *inner], inner, strict=False))
    assert len(layers) == doublings
    device = torch.device("cpu")
    for (edge, cl, cs), batch in itertools.product(layers, (1, 3, 37, 128, 256, 4096)):
        if kernels.unfit(cl, cs, edge, edge):
            assert cl % 32 and cl > 3 or cs % 32 or 64 % edge
            continue
        pixels = batch * edge * edge
        if cl <= kernels.IMAGE:
            n = op.FWD_IMAGE.fitted(0, cs, 16 * cl)
            assert cs % n.n == 0 and 16 * cl % n.k == 0 and min(n.n, n.k) >= 16
            assert cs % op.DGRAD_IMAGE.fitted(0, 0, cs).k == 0
            assert cs % op.WGRAD_IMAGE.fitted(0, cs, 0).n == 0 and op.WGRAD_IMAGE.m >= 16 * cl
            continue
        wgrad = (op.WGRAD if cl % op.WGRAD.m == 0 else op.WGRAD_NARROW).fitted(cl, cs, 0)
        fwd, dgrad = op._tile(pixels, cs, cl, device), op._tile(4 * pixels, cl, cs, device)
        for block, columns, depth in ((fwd, cs, cl), (dgrad, cl, cs)):
            assert columns % block.n == 0 and depth % block.k == 0
        assert cl % wgrad.m == 0 and cs % wgrad.n == 0
        for block, along in ((fwd, fwd.m), (dgrad, dgrad.m), (wgrad, wgrad.k)):
            images, rows = kernels.box(along, edge, edge)
            assert images * rows * edge == along and max(images, rows, edge, block.n) <= 256
            bytes_of_tiles = 2 * (block.m * block.k + block.n * block.k) * block.stages
            assert bytes_of_tiles <= 227 << 10


@pytest.mark.parametrize("function", [conv4x4, conv_transpose4x4])
def test_torch_and_ref_are_pytorchs(function):
    conv = nn.Conv2d(3, 5, 4, 2, 1, bias=False)
    transposed = nn.ConvTranspose2d(5, 3, 4, 2, 1, bias=False)
    module, x = (conv, torch.randn(2, 3, 8, 6)) if function is conv4x4 else (transposed, None)
    x = torch.randn(2, 5, 4, 3) if x is None else x
    for impl in ("auto", "torch", "ref"):  # on a CPU auto is PyTorch's
        assert torch.equal(function(x, module.weight, impl=impl), module(x))


@needs_triton
@needs_tma
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_the_operators_are_registered_rightly(shape, device):
    large, small, weight = maps(shape, torch.float16, device)
    ops = torch.ops.fastgan_kernels
    torch.library.opcheck(ops.conv4x4_fwd, (large, weight, 0.2))
    torch.library.opcheck(ops.conv4x4_dgrad, (small, weight))
    for y in (None, small):
        torch.library.opcheck(ops.conv4x4_wgrad, (large, small, y, 0.2))


@needs_triton
@needs_tma
def test_it_is_compiled_whole(device):
    large, _, weight = maps(WHOLE[0], torch.float16, device)
    weight.requires_grad_()

    def loss(x, weight):
        y = torch.tanh(conv4x4(x, weight, impl="triton"))
        return conv_transpose4x4(y, weight, impl="triton").square().mean()

    plain = torch.autograd.grad(loss(large, weight), weight)[0]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(large, weight), weight)[0], plain)


@pytest.mark.gpu  # the interpreter runs one program after the other
@needs_tma
@pytest.mark.parametrize("shape", [(63, 16, 16, 128, 256), (64, 64, 64, 3, 64)], ids=str)
def test_the_same_bits_on_two_runs(shape, device):
    large, small, weight = maps(shape, torch.bfloat16, device)
    weight.requires_grad_()
    for function, x, dy in ((conv4x4, large, small), (conv_transpose4x4, small, large)):
        x.requires_grad_()
        runs = []
        for _ in range(2):
            y = function(x, weight)
            runs.append((y, *torch.autograd.grad(y, [x, weight], dy)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@needs_tma
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [128, 256, 37, 1])
@pytest.mark.parametrize(
    "layer",
    [(64, 3, 64), (32, 64, 128), (16, 128, 256), (8, 256, 512), (32, 32, 96), (16, 96, 160)],
    ids=str,
)
def test_the_layers_of_a_dcgan(layer, batch, dtype, device):
    """In the tiles that the operators choose."""
    edge, cl, cs = layer
    large, small, weight = tensors = maps((batch, edge, edge, cl, cs), dtype, device)
    ops = torch.ops.fastgan_kernels
    chosen = op._chosen("conv4x4", "auto", large, weight, edge // 2, edge // 2)
    assert chosen == ("triton" if torch.cuda.get_device_capability() == (9, 0) else "torch")
    assert_close(ops.conv4x4_fwd(large, weight, 1.0), exact("fwd", *tensors))
    assert_close(ops.conv4x4_dgrad(small, weight), exact("dgrad", *tensors))
    assert_close(ops.conv4x4_wgrad(large, small, None, 1.0), exact("wgrad", *tensors))


@pytest.mark.parametrize(
    ("function", "x", "weight", "message"),
    [
        (conv4x4, (2, 3, 8, 8), (5, 3, 3, 3), r"weight \[CS, CL, 4, 4\], got \(2, 3, 8, 8\) and"),
        (conv4x4, (3, 8, 8), (5, 3, 4, 4), r"x must be \[B, C, H, W\]"),
        (conv4x4, (2, 5, 8, 8), (5, 3, 4, 4), "x has 5 channels, and the weight.*takes 3"),
        (conv4x4, (2, 3, 7, 8), (5, 3, 4, 4), "height and width must be even"),
        (conv_transpose4x4, (2, 3, 8, 8), (5, 3, 4, 4), "x has 3 channels.*takes 5"),
    ],
)
def test_shapes_that_do_not_fit_are_named(function, x, weight, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(x), torch.zeros(weight))


@needs_triton
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 16, 16, 32, 48), torch.float16, "channels must be a multiple of 32, or an image's"),
        ((2, 20, 16, 32, 32), torch.float16, "whole rows of small maps, which are 10x8"),
        ((2, 16, 16, 32, 32), torch.float64, "must be both of one of"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(shape, dtype, message, device):
    large, small, weight = maps(shape, dtype, device)
    with pytest.raises(ValueError, match=message):
        conv4x4(large, weight, impl="triton")
    with pytest.raises(ValueError, match=message):
        conv_transpose4x4(small, weight, impl="triton")
    assert conv4x4(large, weight).shape == small.shape  # auto takes PyTorch's
    assert op._chosen("conv4x4", "auto", large, weight, *small.shape[2:]) == "torch"
