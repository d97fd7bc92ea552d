"""The candidates for the DCGAN's convolutions against PyTorch's in float64."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgan_kernels import _launch

if _launch.triton is None:
    pytest.skip("needs Triton", allow_module_level=True)

PATH = Path(__file__).resolve().parents[1] / "benchmarks/conv4x4.py"
SPEC = importlib.util.spec_from_file_location("conv4x4", PATH)
conv4x4 = sys.modules["conv4x4"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(conv4x4)
Block = conv4x4.Block

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The rounding of a result to its type; the interpreter cuts bfloat16 off, by up to a whole unit.
ROUNDING = {
    torch.float32: 0.0,
    torch.float16: 2**-11,
    torch.bfloat16: 2**-7 if _launch.INTERPRETED else 2**-8,
}
# float32 sums of a few thousand products, relative to the largest result; tensor cores add in
# hundreds of steps and cut off instead of rounding.
FLOAT32 = 2**-20 if _launch.INTERPRETED else 2**-16
# An activated input is rounded, too, and where float32 and float64 differ to another value.
ACTED = {dtype: FLOAT32 + 2 * rounding for dtype, rounding in ROUNDING.items()}
# Batch, height and width of L, CL, CS: blocks of rows that end within images and beyond the last;
# blocks of columns of one tap and of several.
SHAPES = [(5, 8, 4, 32, 32), (3, 10, 6, 16, 64)]
# Tiles of 32 pixels, two images, and of 16, half an image.
OF_TMA = {32: (9, 8, 8, 16, 32), 16: (3, 16, 8, 16, 32)}
BLOCK = Block(32, 32, 32, 4, 2)
NARROW = [(3, 8, 4, 3, 32), (3, 4, 8, 4, 32), (1, 10, 6, 3, 32)]
needs_tma = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs an NVIDIA GPU of capability 9.0",
)


@pytest.fixture
def device():
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel leaves unwritten is NaN."""
    empty = _launch.empty
    monkeypatch.setattr(conv4x4, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.fixture(autouse=True)
def pinned_algorithms(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def maps(shape, dtype, device):
    """L, S and W."""
    batch, height, width, cl, cs = shape
    large = torch.randn(batch, height, width, cl)
    small = torch.randn(batch, height // 2, width // 2, cs)
    weight = torch.randn(4, 4, cl, cs) * 0.05
    return [t.to(device, dtype) for t in (large, small, weight)]


def act_of(channels, device, slope=0.2):
    """With a shift that shows where padding was activated."""
    scale, shift = torch.rand(channels) + 0.5, torch.randn(channels) + 0.5
    return conv4x4.Act(scale.to(device), shift.to(device), slope)


def wide(*tensors):
    return [t.double() for t in tensors]


def assert_close(got, expected, allowed=FLOAT32):
    """Within the rounding of each value and `allowed` of the largest."""
    assert got.shape == expected.shape
    bound = ROUNDING[got.dtype] * expected.abs() + allowed * expected.abs().max()
    assert ((got.double() - expected).abs() <= bound).all()


def assert_sums(partial, expected, allowed=FLOAT32):
    """Those of the rows of blocks are those of all pixels."""
    one, two = partial.double().sum(0)
    pixels = expected.flatten(0, 2)
    # each value is off by up to `allowed` of the largest, its square by twice that
    bound = allowed * pixels.abs().max() * len(pixels)
    assert ((one - pixels.sum(0)).abs() <= bound).all()
    assert ((two - pixels.square().sum(0)).abs() <= 2 * bound * pixels.abs().max()).all()


def test_the_definitions_are_those_of_the_modules():
    conv = nn.Conv2d(3, 5, 4, 2, 1, bias=False, dtype=torch.float64)
    transposed = nn.ConvTranspose2d(5, 3, 4, 2, 1, bias=False, dtype=torch.float64)
    images = torch.randn(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    latents = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    large, small = images.permute(0, 2, 3, 1), latents.permute(0, 2, 3, 1)
    for module, x, dy in ((conv, images, latents), (transposed, latents, images)):
        y = module(x)
        dx, dweight = torch.autograd.grad(y, [x, module.weight], dy)
        weight = module.weight.permute(2, 3, 1, 0)
        to_small, to_large = (y, dx) if module is conv else (dx, y)
        for got, expected in (
            (conv4x4.fwd_ref(large, weight), to_small.permute(0, 2, 3, 1)),
            (conv4x4.dgrad_ref(small, weight), to_large.permute(0, 2, 3, 1)),
            (conv4x4.wgrad_ref(large, small), dweight.permute(2, 3, 1, 0)),
        ):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fwd(shape, dtype, device):
    large, _, weight = maps(shape, dtype, device)
    y, partial = conv4x4.conv_fwd(large, weight, BLOCK, sums=True)
    expected = conv4x4.fwd_ref(*wide(large, weight))
    assert y.dtype == dtype
    assert_close(y, expected)
    assert_sums(partial, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dgrad(shape, dtype, device):
    _, small, weight = maps(shape, dtype, device)
    block = Block(32, 16, 32, 4, 2)
    y, partial = conv4x4.conv_dgrad(small, weight, block, sums=True)
    expected = conv4x4.dgrad_ref(*wide(small, weight))
    assert y.dtype == dtype
    assert_close(y, expected)
    assert_sums(partial, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_wgrad(shape, dtype, device):
    large, small, _ = maps((9, *shape[1:]), dtype, device)
    # two splits, the second one shorter
    got = conv4x4.conv_wgrad(large, small, Block(64, 32, 16, 4, 2, programs=8))
    assert got.dtype == torch.float32
    assert_close(got, conv4x4.wgrad_ref(*wide(large, small)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "slope"), [((3, 8, 4, 32, 32), 0.2), ((2, 4, 8, 16, 32), 0.0)])
def test_an_activated_input(shape, slope, dtype, device):
    large, small, weight = maps(shape, dtype, device)
    act, small_act = (act_of(c, device, slope) for c in shape[3:])
    acted, small_acted = conv4x4.act_ref(large, act), conv4x4.act_ref(small, small_act)
    allowed = ACTED[dtype]
    for (y, partial), expected in (
        (
            conv4x4.conv_fwd(large, weight, BLOCK, act=act, sums=True),
            conv4x4.fwd_ref(*wide(acted, weight)),
        ),
        (
            conv4x4.conv_dgrad(small, weight, Block(32, 16, 32, 4, 2), act=small_act, sums=True),
            conv4x4.dgrad_ref(*wide(small_acted, weight)),
        ),
    ):
        assert_close(y, expected, allowed)
        assert_sums(partial, expected, allowed)
    got = conv4x4.conv_wgrad(large, small, Block(64, 32, 16, 4, 2), act=act)
    assert_close(got, conv4x4.wgrad_ref(*wide(acted, small)), allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_at_an_image(shape, dtype, device):
    large, small, weight = maps(shape, dtype, device)
    k = 16 if shape[3] == 3 else 64
    y, _ = conv4x4.conv_fwd(large, weight, Block(32, 32, k, 4, 2))
    assert_close(y, conv4x4.fwd_ref(*wide(large, weight)))
    for act in (conv4x4.NO_ACT, act_of(shape[4], device)):
        x, _ = conv4x4.conv_dgrad(small, weight, BLOCK, act=act)
        acted = small if act is conv4x4.NO_ACT else conv4x4.act_ref(small, act)
        allowed = FLOAT32 if act is conv4x4.NO_ACT else ACTED[dtype]
        assert_close(x, conv4x4.dgrad_ref(*wide(acted, weight)), allowed)
    got = conv4x4.conv_wgrad(large, small, Block(64, 32, 16, 4, 2))  # 48 or 64 rows
    assert_close(got, conv4x4.wgrad_ref(*wide(large, small)))


@needs_tma
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", OF_TMA)
def test_tma(pixels, dtype, device):
    large, small, weight = maps(OF_TMA[pixels], dtype, device)
    y, partial = conv4x4.conv_fwd_tma(large, weight, Block(pixels, 32, 16, 4, 2), sums=True)
    expected = conv4x4.fwd_ref(*wide(large, weight))
    assert_close(y, expected)
    assert_sums(partial, expected)
    y, partial = conv4x4.conv_dgrad_tma(small, weight, Block(pixels, 16, 32, 4, 2), sums=True)
    expected = conv4x4.dgrad_ref(*wide(small, weight))
    assert_close(y, expected)
    assert_sums(partial, expected)
    got = conv4x4.conv_wgrad_tma(large, small, Block(16, 32, 16, 4, 2, programs=16))
    assert_close(got, conv4x4.wgrad_ref(*wide(large, small)))


@pytest.mark.gpu  # the interpreter runs one program after the other
@pytest.mark.parametrize("tma", [False, pytest.param(True, marks=needs_tma)], ids=["", "tma"])
def test_the_same_bits_on_two_runs(tma, device):
    large, small, weight = maps((63, 16, 16, 128, 256), torch.bfloat16, device)
    form, block = "_tma" if tma else "", Block(128, 128, 64, 8, 3)
    for kind, operands, options in (
        ("fwd", (large, weight), {"sums": True}),
        ("dgrad", (small, weight), {"sums": True}),
        ("wgrad", (large, small), {}),
    ):
        function = getattr(conv4x4, f"conv_{kind}{form}")
        first, second = (function(*operands, block, **options) for _ in range(2))
        pairs = zip(first, second, strict=True) if options else [(first, second)]
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tma", [False, pytest.param(True, marks=needs_tma)], ids=["", "tma"])
@pytest.mark.parametrize("layer", [(32, 64, 128), (16, 128, 256), (8, 256, 512)], ids=str)
def test_the_layers_of_a_dcgan(layer, tma, dtype, device):
    edge, cl, cs = layer
    large, small, weight = maps((9, edge, edge, cl, cs), dtype, device)
    form = "_tma" if tma else ""
    fwd, dgrad, wgrad = (
        getattr(conv4x4, f"conv_{kind}{form}") for kind in ("fwd", "dgrad", "wgrad")
    )
    block = Block(128, min(128, cl), 64, 8, 3)
    y, partial = fwd(large, weight, block, sums=True)
    expected = conv4x4.fwd_ref(*wide(large, weight))
    assert_close(y, expected)
    assert_sums(partial, expected)
    y, partial = dgrad(small, weight, block, sums=True)
    expected = conv4x4.dgrad_ref(*wide(small, weight))
    assert_close(y, expected)
    assert_sums(partial, expected)
    got = wgrad(large, small, Block(min(128, cl), 128, 64, 8, 3, programs=8))
    assert_close(got, conv4x4.wgrad_ref(*wide(large, small)))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("fwd", "conv_fwd: CS must be a multiple of the block's 128, got 32"),
        ("dgrad", "conv_dgrad: CL must be a multiple of the block's 128, got 32"),
        ("wgrad", "conv_wgrad: CS must be a multiple of the block's 128, got 32"),
        ("fwd_tma", "conv_fwd_tma: CS must be a multiple of the block's 128, got 32"),
        ("dgrad_tma", "conv_dgrad_tma: CL must be a multiple of the block's 128, got 32"),
        ("wgrad_tma", "conv_wgrad_tma: CL must be a multiple of the block's 64, got 32"),
    ],
)
def test_a_block_that_does_not_fit_is_named(op, message, device):
    large, small, weight = maps(SHAPES[0], torch.float16, device)
    operands = {"f": (large, weight), "d": (small, weight), "w": (large, small)}[op[0]]
    with pytest.raises(ValueError, match=message):
        getattr(conv4x4, f"conv_{op}")(*operands, Block(64, 128, 32, 4, 2))


def test_what_has_no_form_is_named(device):
    _, small, weight = maps(NARROW[0], torch.float16, device)
    with pytest.raises(ValueError, match="sums must be False where CL <= 4, got CL = 3"):
        conv4x4.conv_dgrad(small, weight, BLOCK, sums=True)
    large, _, weight = maps(SHAPES[1], torch.float16, device)
    with pytest.raises(ValueError, match="16 pixels are no box of maps of 5x3"):
        conv4x4.conv_fwd_tma(large, weight, Block(16, 32, 16, 4, 2))
