"""DiffAugment against loops written from the paper and its authors' code, image by image."""

import itertools

import numpy as np
import pytest
import torch

from fastgan.augment import NUMBERS, diff_augment, numbers

ALL = ("color", "translation", "cutout")


def slow_color(x, u):
    """x [3, H, W] from -1 to 1, float64."""
    x = x + (u[0] - 0.5)
    for i, j in itertools.product(range(x.shape[1]), range(x.shape[2])):
        mean = sum(x[c, i, j] for c in range(3)) / 3
        for c in range(3):
            x[c, i, j] = (x[c, i, j] - mean) * u[1] * 2 + mean
    mean = x.sum() / x.size
    return (x - mean) * (u[2] + 0.5) + mean


def slow_translation(x, u):
    y = np.zeros_like(x)
    _, height, width = x.shape
    most_i, most_j = int(height / 8 + 0.5), int(width / 8 + 0.5)
    down, right = (int(u[k] * (2 * m + 1)) - m for k, m in enumerate((most_i, most_j)))
    for i, j in itertools.product(range(height), range(width)):
        if 0 <= i + down < height and 0 <= j + right < width:
            y[:, i, j] = x[:, i + down, j + right]
    return y


def slow_cutout(x, u):
    """As theirs: offsets of a square about its centre, clamped to the image."""
    y, sides = x.copy(), x.shape[1:]
    cut = [int(side * 0.5 + 0.5) for side in sides]
    offset = [int(u[k] * (sides[k] + (1 - cut[k] % 2))) for k in range(2)]
    for a, b in itertools.product(range(cut[0]), range(cut[1])):
        i = min(max(a + offset[0] - cut[0] // 2, 0), sides[0] - 1)
        j = min(max(b + offset[1] - cut[1] // 2, 0), sides[1] - 1)
        y[:, i, j] = 0
    return y


SLOW = {"color": slow_color, "translation": slow_translation, "cutout": slow_cutout}


def slow(images, policies, uniform, low=-1.0, high=1.0):
    done = []
    for x, u in zip(images.double().numpy(), uniform.double().numpy(), strict=True):
        x, at = (x - low) * (2 / (high - low)) - 1, 0
        for name in ALL:
            if name in policies:
                x, at = SLOW[name](x, u[at:]), at + NUMBERS[name]
        done.append((x + 1) * ((high - low) / 2) + low)
    return torch.from_numpy(np.stack(done))


def drawn(policies, height=16, width=16, count=6, dtype=torch.float64):
    x = torch.rand(count, 3, height, width, dtype=dtype) * 2 - 1
    return x, torch.rand(count, numbers(policies))


CASES = [("color",), ("translation",), ("cutout",), ("color", "cutout"), ALL, ()]


@pytest.mark.parametrize("policies", CASES, ids="+".join)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (14, 9)])
def test_it_is_what_the_loops_do(policies, height, width):
    x, u = drawn(policies, height, width)
    y = diff_augment(x, policies, u)
    # the color is a dozen roundings of float64; what moves or is cut out is exact
    rtol, atol = (1e-13, 1e-14) if "color" in policies else (0, 0)
    torch.testing.assert_close(y, slow(x, policies, u), rtol=rtol, atol=atol)
    assert torch.equal(diff_augment(x, policies[::-1], u), y)  # in one order, whichever is given
    if policies:
        assert not torch.equal(y, x)


@pytest.mark.parametrize("policies", CASES, ids="+".join)
def test_pixels_from_0_to_1_are_the_same_images(policies):
    x, u = drawn(policies)
    y = diff_augment((x + 1) / 2, policies, u, (0.0, 1.0))
    torch.testing.assert_close(y, (diff_augment(x, policies, u) + 1) / 2, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(y, slow((x + 1) / 2, policies, u, 0.0, 1.0), rtol=1e-13, atol=1e-14)


def test_each_image_has_numbers_of_its_own():
    x, u = drawn(ALL)
    together = diff_augment(x, ALL, u)
    for i in range(len(x)):
        assert torch.equal(diff_augment(x[i : i + 1], ALL, u[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("side", [16, 9])
def test_every_shift_and_centre_is_as_likely(side):
    """At equal steps of u through [0, 1) each whole number comes as often, to one; the last float32
    before 1 is inside, where the product with a count may round up to it.
    """
    x = torch.arange(1.0, side + 1)[:, None].expand(side, side)[None, None]
    most = int(side / 8 + 0.5)
    u = torch.linspace(0, 1, 2 * most + 2)[:-1] + 1e-4  # past a step that is no float32
    u = torch.cat([u, u.new_tensor([1 - 2**-24])])
    images = x.expand(len(u), 3, side, side)
    y = diff_augment(images, ("translation",), torch.stack([u, torch.full_like(u, 0.5)], 1))
    first = y[:, 0, side // 2, side // 2] - (side // 2 + 1)
    assert first.tolist() == [*range(-most, most + 1), most]
    cut = int(side / 2 + 0.5)
    centres = side + 1 - cut % 2
    u = torch.linspace(0, 1, centres + 1)[:-1] + 1e-4
    ones = torch.ones(centres + 1, 3, side, side)
    u = torch.cat([u, u.new_tensor([1 - 2**-24])])
    y = diff_augment(ones, ("cutout",), torch.stack([u, u], 1))
    gone = (y[:, 0] == 0).any(2).sum(1)  # rows that a square in this place takes
    expected = [
        min(o - cut // 2 + cut, side) - max(o - cut // 2, 0) for o in [*range(centres), centres - 1]
    ]
    assert gone.tolist() == expected


@pytest.mark.parametrize("policies", CASES[:-1], ids="+".join)
def test_gradients_and_their_gradients(policies):
    x, u = drawn(policies, 4, 5, count=2)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: diff_augment(t, policies, u), x)
    # all are linear in x: without the square no second derivative would be there to be wrong
    assert torch.autograd.gradgradcheck(lambda t: diff_augment(t, policies, u).square(), x)


def test_what_comes_from_outside_gets_no_gradient_and_spreads_no_nan():
    x, u = drawn(("translation",), 16, 16, 2, torch.float32)
    u[:] = torch.tensor([0.99, 0.01])  # two down, two to the left
    x[:, :, :2], x[:, :, :, -2:] = torch.nan, torch.nan  # what leaves the image
    x.requires_grad_()
    y = diff_augment(x, ("translation",), u)
    assert y.isfinite().all() and not y[:, :, -2:].any() and not y[:, :, :, :2].any()
    up = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, up)
    assert torch.equal(grad[:, :, 2:, :-2], up[:, :, :-2, 2:])
    assert not grad[:, :, :2].any() and not grad[:, :, :, -2:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype):
    x, u = drawn(ALL, dtype=torch.float32)
    x = x.to(dtype)
    y, wide = diff_augment(x, ALL, u), diff_augment(x.float(), ALL, u)
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("policies", CASES, ids="+".join)
def test_the_memory_format_is_kept_both_ways(policies, layout):
    x, u = drawn(policies, dtype=torch.float32)
    images = x.contiguous(memory_format=layout).requires_grad_()
    y = diff_augment(images, policies, u)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(y, diff_augment(x, policies, u), rtol=1e-6, atol=1e-6)
    up = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, images, up, materialize_grads=True)
    assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_compiles_as_a_whole_with_its_gradient(layout):
    """In D's layout, too: there torch 2.11 lost it where what came last changed nothing."""
    torch._dynamo.reset()
    x, u = drawn(ALL, dtype=torch.float32)
    x = x.contiguous(memory_format=layout).requires_grad_()
    run = torch.compile(diff_augment, fullgraph=True, dynamic=False)
    ours, plain = run(x, ALL, u), diff_augment(x, ALL, u)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert ours.is_contiguous(memory_format=layout)
    up = torch.randn_like(plain)
    grads = [torch.autograd.grad(y, x, up)[0] for y in (ours, plain)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_numbers_of_another_shape_are_refused():
    x, u = drawn(ALL)
    with pytest.raises(ValueError, match=r"uniform must have shape \(6, 5\), got \(6, 7\)"):
        diff_augment(x, ("color", "cutout"), u)
    assert [numbers(case) for case in CASES] == [3, 2, 2, 5, 7, 0]
