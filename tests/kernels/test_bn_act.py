"""bn_act: the definition against nn.BatchNorm2d in float64, every implementation against the
definition.
"""

import pytest
import torch
from torch import nn

from fastgan_kernels import BatchNormAct2d, bn_act

ACTS = {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "none": nn.Identity()}
SHAPES = [(8, 16, 4, 4), (4, 3, 7, 9), (4, 1, 1, 1), (6, 100, 1, 1), (12, 5, 3, 2)]

# float32: sums of n terms by blocks lose about 2^-24 * log2(n) relative to the largest term, three
# times (mean, variance, backward sums); outputs and gradients of N(0, 1) data reach about 5.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5 * 3 * 10 * 2**-24,
    torch.float16: 5 * 3 * 2**-12,
    torch.bfloat16: 5 * 3 * 2**-9,
}


def inputs(shape, dtype, channels_last=True):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (torch.randn(shape) * 2 + 0.5).to(dtype).contiguous(memory_format=layout)
    wide = torch.promote_types(dtype, torch.float32)
    c = shape[1]
    parameters = [torch.rand(c) + 0.5, torch.randn(c), torch.randn(c), torch.rand(c) + 0.5]
    grad = torch.randn(shape).to(dtype)
    return x, [p.to(wide) for p in parameters], grad


def run(x, parameters, grad, *, impl, training=True, **options):
    """y, gradients of x, weight and bias, running statistics; everything on fresh copies."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weight, bias, mean, var = (p.clone() for p in parameters)
    weight.requires_grad_(), bias.requires_grad_()
    y = bn_act(x, weight, bias, mean, var, training=training, impl=impl, **options)
    y.backward(grad.to(y.dtype))
    return {"y": y, "dx": x.grad, "dw": weight.grad, "db": bias.grad, "mean": mean, "var": var}


def torch_modules(x, parameters, grad, act, groups, training=True):
    """The same by nn.BatchNorm2d and nn activations in float64, one call a group."""
    norm = nn.BatchNorm2d(x.shape[1]).double().train(training)
    with torch.no_grad():
        for target, value in zip(
            (norm.weight, norm.bias, norm.running_mean, norm.running_var), parameters, strict=True
        ):
            target.copy_(value)
    wide = x.detach().double().requires_grad_()
    y = torch.cat([ACTS[act](norm(part)) for part in wide.chunk(groups)])
    y.backward(grad.double())
    return {
        "y": y,
        "dx": wide.grad,
        "dw": norm.weight.grad,
        "db": norm.bias.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }


def assert_close(ours, theirs, tolerance):
    for name, expected in theirs.items():
        expected = expected.detach().double()
        error = (ours[name].detach().double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative L2 error {error:.2e}, limit {tolerance:.2e}"


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


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("channels_last", [True, False])
def test_storage_types_stay_within_their_rounding(impl, dtype, groups, channels_last):
    # no activation: a mask that flips at a rounding would be another error than a rounding
    x, parameters, grad = inputs((16, 24, 8, 8), dtype, channels_last)
    ours = run(x, parameters, grad, impl=impl, act="none", groups=groups)
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    assert ours["mean"].dtype == ours["dw"].dtype == torch.float32
    assert_close(ours, torch_modules(x, parameters, grad, "none", groups), TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["ref", "torch"])
@pytest.mark.parametrize("act", ACTS)
def test_evaluation_uses_and_keeps_the_running_statistics(impl, act):
    x, parameters, grad = inputs((6, 10, 5, 5), torch.float64)
    ours = run(x, parameters, grad, impl=impl, act=act, training=False, groups=2)
    assert_close(ours, torch_modules(x, parameters, grad, act, 2, training=False), 1e-12)
    assert torch.equal(ours["mean"], parameters[2]) and torch.equal(ours["var"], parameters[3])


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
    assert_close(
        ours, theirs, 30 * TOLERANCE[torch.float32]
    )  # the mean's own rounding, 30 sigma large


@pytest.mark.parametrize("impl", ["ref", "torch"])
def test_the_module_is_batchnorm2d_and_its_activation(impl):
    ours = BatchNormAct2d(12, act="leaky_relu", impl=impl).double()
    theirs = nn.BatchNorm2d(12).double()
    nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 12, 3, 3, dtype=torch.float64)
    expected = torch.cat([nn.functional.leaky_relu(theirs(p), 0.2) for p in x.chunk(2)])
    torch.testing.assert_close(ours(x, 2), expected, rtol=1e-10, atol=1e-12)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=0)
    assert int(ours.num_batches_tracked) == 2


BAD = [
    ({"groups": 3}, "groups must divide the batch of 8 evenly, got 3"),
    ({"groups": 0}, "groups must divide"),
    ({"act": "gelu"}, "act must be one of relu, leaky_relu, none, got 'gelu'"),
    ({"impl": "cuda"}, "impl must be one of"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_wrong_options_are_named(change, message):
    x, parameters, _ = inputs((8, 4, 2, 2), torch.float32)
    with pytest.raises(ValueError, match=message):
        bn_act(x, *parameters, training=True, **change)


def test_wrong_shapes_are_named():
    x, (weight, bias, mean, var), _ = inputs((8, 4, 2, 2), torch.float32)
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\), got \(3,\)"):
        bn_act(x, weight[:3], bias, mean, var, training=True)
    with pytest.raises(ValueError, match="4 dimensions"):
        bn_act(x[0], weight, bias, mean, var, training=True)
    with pytest.raises(ValueError, match="at least 2 values a channel in each group"):
        bn_act(x[:2, :, :1, :1], weight, bias, mean, var, training=True, groups=2)
    with pytest.raises(ValueError, match="momentum must be a number"):
        BatchNormAct2d(4, momentum=None)
