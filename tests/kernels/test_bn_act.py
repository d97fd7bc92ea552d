"""bn_act: the definition against nn.BatchNorm2d in float64, every implementation against that."""

import pytest
import torch
from float64_bn_act import (
    ACTS,
    FLOAT32,
    LAYERS,
    ROUNDING,
    STORED,
    assert_close,
    away_from_the_kink,
    inputs,
    run,
    torch_modules,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan_kernels import _launch, bn_act, bn_act_kernels

SHAPES = [(8, 16, 4, 4), (4, 3, 7, 9), (4, 1, 1, 1), (6, 100, 1, 1), (12, 5, 3, 2)]


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_float64_equals_one_batchnorm_call_a_group(impl, act, shape, groups):
    x, parameters, grad = inputs(shape, torch.float64)
    ours = run(x, parameters, grad, impl=impl, act=act, groups=groups)
    # of two values a channel the gradient of x is what is left after everything cancels: up to
    # 1e-16 times the inverse of eps = 1e-5, squared
    assert_close(ours, torch_modules(x, parameters, grad, act, groups), 1e-7)


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [True, False])
def test_storage_types_stay_within_their_rounding(impl, dtype, groups, channels_last, device):
    x, parameters, grad = inputs((16, 24, 8, 8), dtype, device, channels_last=channels_last)
    grad = away_from_the_kink(x, parameters, grad, groups)
    ours = run(x, parameters, grad, impl=impl, act="leaky_relu", groups=groups)
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    assert ours["mean"].dtype == ours["dw"].dtype == torch.float32
    theirs = torch_modules(x, parameters, grad, "leaky_relu", groups)
    # PyTorch's own rounds between batch norm and activation, too, forwards and backwards
    between = ROUNDING[dtype] if impl == "torch" else 0.0
    assert_close(ours, theirs, FLOAT32 + between, ROUNDING[dtype])


def held_to_float64(shape, dtype, device, act, groups=1, training=True, **of):
    x, parameters, grad = inputs(shape, dtype, device, **of)
    grad = away_from_the_kink(x, parameters, grad, groups, training)
    ours = run(x, parameters, grad, impl="triton", act=act, groups=groups, training=training)
    theirs = torch_modules(x, parameters, grad, act, groups, training)
    # a mean many deviations away takes its own rounding into x - mean
    sigmas = max(1.0, abs(of.get("offset", 0.5)) / of.get("spread", 2.0))
    assert_close(ours, theirs, FLOAT32 * sigmas, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_kernels_on_the_layers_of_a_dcgan(layer, dtype, device):
    channels, size, act = LAYERS[layer]
    held_to_float64((2, channels, size, size), dtype, device, act, groups=2 if layer > "E" else 1)


# rows of 1 and 3 values, of less than a tile, of no multiple of one; 2, 63 and 1025 rows
AWKWARD = [(2, 1, 1, 1), (2, 3, 1, 1), (7, 48, 3, 3), (7, 100, 3, 3), (1, 64, 63, 1)]
AWKWARD += [(1, 3, 41, 25), (25, 48, 41, 1), (1, 100, 25, 41), (1, 192, 2, 1)]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_the_kernels_on_awkward_shapes(shape, dtype, device):
    x, parameters, grad = inputs(shape, dtype, device)
    grad = away_from_the_kink(x, parameters, grad, 1)
    ours = run(x, parameters, grad, impl="triton", act="leaky_relu")
    theirs = torch_modules(x, parameters, grad, "leaky_relu", 1)
    if shape[0] * shape[2] * shape[3] == 2:
        # of two values the gradient of x is what is left where everything cancels: eps / var of
        # it; only its size says something
        assert (ours.pop("dx") - theirs.pop("dx")).abs().max() <= FLOAT32 * 5 + ROUNDING[dtype] * 5
    assert_close(ours, theirs, FLOAT32, ROUNDING[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(
    "shape", [(c, s) for c, s, _ in LAYERS.values()][:4] + [(1, 5), (3, 7), (48, 3), (100, 9)]
)
def test_the_kernels_on_everything(shape, dtype, act, groups, training, device):
    channels, size = shape
    held_to_float64((12, channels, size, size), dtype, device, act, groups, training)


@pytest.mark.parametrize("dtype", STORED)
def test_the_kernels_keep_the_variance_of_a_mean_30_sigma_away(dtype, device):
    held_to_float64((4, 70, 9, 9), dtype, device, "leaky_relu", 2, offset=60.0)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_outlier_at_the_corner_does_not_cost_the_variance(groups, device):
    """The first value of an image is not its others' kind: padding makes it so."""
    x, parameters, grad = inputs((16, 24, 16, 16), torch.float32, device, offset=60.0)
    x[:, :, 0, 0] *= 4 / 9
    grad = away_from_the_kink(x, parameters, grad, groups)
    ours = run(x, parameters, grad, impl="triton", act="relu", groups=groups)
    theirs = torch_modules(x, parameters, grad, "relu", groups)
    assert_close({"var": ours["var"]}, {"var": theirs["var"]}, FLOAT32)
    assert_close(ours, theirs, 30 * FLOAT32)


@pytest.mark.parametrize("dtype", STORED)
def test_the_kernels_on_a_constant_channel(dtype, device):
    x, parameters, grad = inputs((4, 5, 6, 6), dtype, device)
    x[:, 2] = 3.0
    grad = away_from_the_kink(x, parameters, grad, 1)
    ours = run(x, parameters, grad, impl="triton", act="relu")
    theirs = torch_modules(x, parameters, grad, "relu", 1)
    assert torch.equal(ours["y"][:, 2], theirs["y"][:, 2].to(dtype))
    assert_close(ours, theirs, FLOAT32, ROUNDING[dtype])


@settings(deadline=None, max_examples=15)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 6), st.integers(1, 6)),
    st.integers(1, 4),
    st.sampled_from(STORED),
    st.sampled_from(sorted(ACTS)),
)
def test_the_kernels_on_drawn_shapes(part, groups, dtype, act):
    n, channels, height, width = part
    if n * height * width < 2:
        height = 3
    torch.manual_seed(n * 7 + channels)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    shape = (n * groups, channels, height, width)
    x, parameters, grad = inputs(shape, dtype, device)
    ours = run(x, parameters, grad, impl="triton", act=act, groups=groups)
    parts = [
        run(x_part, parameters, grad_part, impl="triton", act=act)
        for x_part, grad_part in zip(x.chunk(groups), grad.chunk(groups), strict=True)
    ]
    for name in ("y", "dx"):  # the same function as one call a group, split in the same way or not
        apart = torch.cat([p[name] for p in parts]).double()
        limit = 1e-4 * apart.abs().max() + 2 * ROUNDING[dtype] * apart.abs()
        different = (ours[name].double() - apart).abs() > limit
        # where z is within a rounding of 0 the activation may be on either side
        assert different.double().mean() <= (0 if act == "none" or name == "y" else 1e-2)
    assert int(ours["count"]) == groups


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
def test_groups_move_the_running_statistics_in_order(impl, device):
    x, parameters, grad = inputs((8, 6, 3, 3), torch.float32, device)
    weight, bias, mean, var = (p.clone() for p in parameters)
    for part in x.chunk(4):
        bn_act(part, weight, bias, mean, var, training=True, impl="ref")
    ours = run(x, parameters, grad, impl=impl, groups=4)
    assert_close(ours, {"mean": mean, "var": var}, FLOAT32)
    backwards = run(x.flip(0), parameters, grad, impl=impl, groups=4)
    assert (backwards["mean"] - mean).norm() > 100 * FLOAT32 * mean.norm()


@pytest.mark.parametrize("dtype", STORED)
def test_the_kernels_give_the_same_bits_twice(dtype, device):
    x, parameters, grad = inputs((6, 72, 9, 9), dtype, device)
    first, second = (run(x, parameters, grad, impl="triton", groups=2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_whichever_program_ends_last_gives_the_same_bits(device, backwards):
    """A GPU runs programs in any order: here from the first to the last, and the other way."""
    x, parameters, grad = inputs((16, 150, 9, 9), torch.float32, device)
    first = run(x, parameters, grad, impl="triton", groups=2)
    with backwards() as ran:
        second = run(x, parameters, grad, impl="triton", groups=2)
    assert len(ran) > 30 and all(torch.equal(first[name], second[name]) for name in first)


def test_the_kernels_take_any_memory_layout(device):
    x, parameters, grad = inputs((6, 20, 10, 8), torch.float32, device)
    expected = run(x, parameters, grad, impl="triton")
    padded = torch.randn(6, 20, 12, 8, device=device)
    padded[:, :, 1:11] = x
    for other in (
        x.contiguous(),
        padded[:, :, 1:11],
        x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    ):
        got = run(
            other,
            parameters,
            grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
            impl="triton",
        )
        assert got["y"].is_contiguous(memory_format=torch.channels_last)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_kernels_pass_nan_on(device):
    x, parameters, grad = inputs((4, 5, 3, 3), torch.float32, device)
    x[1, 2, 0, 0] = float("nan")
    got = run(x, parameters, grad, impl="triton", act="relu")
    bad = torch.tensor([False, False, True, False, False], device=device)
    for name in ("y", "dx"):
        assert torch.equal(got[name].isnan().all((2, 3)).all(0), bad), name
        assert torch.equal(got[name].isnan().any((2, 3)).any(0), bad), name
    for name in ("dw", "db", "mean", "var"):
        # the mask of a NaN is closed, so dbias is the one that stays a number
        assert name == "db" or torch.equal(got[name].isnan(), bad), name


def test_the_counters_are_zero_again(device):
    x, parameters, grad = inputs((4, 130, 3, 3), torch.float32, device)
    run(x, parameters, grad, impl="triton", groups=2)
    assert not _launch._COUNTERS[device]._all.any()


@pytest.mark.parametrize("impl", ["ref", "torch", "triton"])
@pytest.mark.parametrize("act", ACTS)
def test_evaluation_uses_and_keeps_the_running_statistics(impl, act, device):
    dtype, tolerance = (torch.float32, FLOAT32) if impl == "triton" else (torch.float64, 1e-12)
    x, parameters, grad = inputs((6, 10, 5, 5), dtype, device)
    grad = away_from_the_kink(x, parameters, grad, 2, training=False)
    ours = run(x, parameters, grad, impl=impl, act=act, training=False, groups=2)
    assert_close(ours, torch_modules(x, parameters, grad, act, 2, training=False), tolerance)
    assert torch.equal(ours["mean"], parameters[2]) and torch.equal(ours["var"], parameters[3])


def test_evaluation_is_one_launch(device, monkeypatch):
    launched = []
    real = bn_act_kernels.launch
    monkeypatch.setattr(
        bn_act_kernels, "launch", lambda *a, **k: (launched.append(a[0]), real(*a, **k))
    )
    x, (weight, bias, mean, var), grad = inputs((4, 6, 3, 3), torch.float32, device)
    with torch.no_grad():
        bn_act(x, weight, bias, mean, var, training=False, impl="triton")
    assert len(launched) == 1
    run(x, (weight, bias, mean, var), grad, impl="triton")
    assert len(launched) == 1 + 4  # training: two forward, two backward


def test_the_definition_has_right_gradients():
    x, (weight, bias, mean, var), _ = inputs((4, 3, 2, 2), torch.float64)

    def f(x, weight, bias):
        return bn_act(
            x,
            weight,
            bias,
            mean.clone(),
            var.clone(),
            training=True,
            act="leaky_relu",
            groups=2,
            impl="ref",
        )

    arguments = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(f, arguments)


def test_a_large_mean_does_not_cancel_the_variance():
    x, parameters, grad = inputs((32, 8, 8, 8), torch.float32)
    ours = run(x + 60, parameters, grad, impl="torch", act="none")  # 30 sigma
    theirs = torch_modules(x + 60, parameters, grad, "none", 1)
    assert_close(ours, theirs, 30 * FLOAT32)  # the mean's own rounding, 30 sigma large
