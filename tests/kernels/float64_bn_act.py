"""How bn_act is held to float64: inputs, nn.BatchNorm2d and its activation, derived limits."""

import torch
from torch import nn

from fastgan_kernels import _launch, bn_act

ACTS = {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.2), "none": nn.Identity()}
STORED = [torch.float32, torch.bfloat16, torch.float16]
# Sums in float32 of n terms by lanes and then by halves lose about 2^-24 * log2(n) relative to the
# largest term, three times (mean, variance, backward sums); outputs and gradients of N(0, 1) data
# reach about 5.
FLOAT32 = 5 * 3 * 10 * 2**-24
# What is stored in 16 bits is rounded once, by half a unit in the last place at most; Triton's
# interpreter cuts bfloat16 off instead, by a whole one.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.float16: 2**-11}
ROUNDING[torch.bfloat16] = 2**-7 if _launch.INTERPRETED else 2**-8


def inputs(shape, dtype, device="cpu", *, channels_last=True, offset=0.5, spread=2.0):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = (torch.randn(shape) * spread + offset).to(device, dtype).contiguous(memory_format=layout)
    wide = torch.promote_types(dtype, torch.float32)
    c = shape[1]
    parameters = [torch.rand(c) + 0.5, torch.randn(c), torch.randn(c), torch.rand(c) + 0.5]
    grad = torch.randn(shape).to(device, dtype)
    return x, [p.to(device, wide) for p in parameters], grad


def run(x, parameters, grad, *, impl, training=True, **options):
    """y, gradients of x, weight and bias, running statistics; everything on fresh copies."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    weight, bias, mean, var = (p.clone() for p in parameters)
    weight.requires_grad_(), bias.requires_grad_()
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    y = bn_act(
        x, weight, bias, mean, var,
        training=training, num_batches_tracked=count, impl=impl, **options,
    )  # fmt: skip
    y.backward(grad.to(y.dtype))
    result = {"y": y.detach(), "dx": x.grad, "dw": weight.grad, "db": bias.grad}
    return result | {"mean": mean, "var": var, "count": count}


def torch_modules(x, parameters, grad, act, groups, training=True):
    """The same by nn.BatchNorm2d and nn activations in float64, one call a group."""
    norm = nn.BatchNorm2d(x.shape[1]).double().train(training).to(x.device)
    with torch.no_grad():
        for target, value in zip(
            (norm.weight, norm.bias, norm.running_mean, norm.running_var), parameters, strict=True
        ):
            target.copy_(value)
    wide = x.detach().double().requires_grad_()
    y = torch.cat([ACTS[act](norm(part)) for part in wide.chunk(groups)])
    y.backward(grad.double())
    result = {"y": y.detach(), "dx": wide.grad, "dw": norm.weight.grad, "db": norm.bias.grad}
    statistics = {"mean": norm.running_mean, "var": norm.running_var}
    return result | statistics | {"count": norm.num_batches_tracked}


def away_from_the_kink(x, parameters, grad, groups, training=True):
    """`grad` without the places where a rounding of z decides the activation's side."""
    z = torch_modules(x, parameters, grad, "none", groups, training)["y"]
    return grad.masked_fill(z.abs() < 1e-4, 0)


def assert_close(ours, theirs, tolerance, rounding=0.0):
    """Relative L2 errors within `tolerance`; of what is stored as x is, with its `rounding`."""
    for name, expected in theirs.items():
        limit = tolerance + (rounding if name in ("y", "dx") else 0.0)
        expected = expected.detach().double()
        error = (ours[name].detach().double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= limit, f"{name}: relative L2 error {error:.2e}, limit {limit:.2e}"


# Channels and edge of the DCGAN's batch norms at 64 px, in the order of its layers.
LAYERS = {
    "G1": (512, 4, "relu"),
    "G2": (256, 8, "relu"),
    "G3": (128, 16, "relu"),
    "G4": (64, 32, "relu"),
    "D2": (128, 16, "leaky_relu"),
    "D3": (256, 8, "leaky_relu"),
    "D4": (512, 4, "leaky_relu"),
}
