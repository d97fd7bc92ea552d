"""R1 against its definition image by image and its gradient against finite differences; what
`plain` changes meanwhile, and what it leaves alone.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastgan.models.dcgan import Discriminator, Generator
from fastgan.models.spectral import SpectralNorm
from fastgan.models.two_rate import TwoRateDiscriminator, default_init
from fastgan.penalty import plain, r1
from fastgan_kernels import BatchNormAct2d


class Spectral(nn.Module):
    """A single layer of a spectral norm, and what it is used by."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 2, 1)
        self.norm = SpectralNorm(self.conv.weight.shape)
        self.norm.reset(self.conv.weight, torch.Generator().manual_seed(1))

    def forward(self, x):
        x = nn.functional.conv2d(x, self.norm(self.conv.weight), self.conv.bias, 2, 1)
        return nn.functional.leaky_relu(x, 0.2).square().mean((1, 2, 3))


def two_rate():
    network = TwoRateDiscriminator()
    default_init(network, torch.Generator().manual_seed(1))
    return network


MADE: dict[str, tuple[Callable, int]] = {
    "dcgan": (lambda: Discriminator(32, 2), 32),
    "two-rate": (two_rate, 64),
    "spectral": (Spectral, 16),
}


@pytest.fixture(params=MADE)
def network_and_images(request):
    make, size = MADE[request.param]
    torch.manual_seed(3)
    return make().double(), torch.randn(3, 3, size, size, dtype=torch.float64)


def test_it_is_the_mean_square_of_each_images_gradient(network_and_images):
    network, images = network_and_images
    network.eval()  # each image for itself
    with plain(network):
        value = r1(network, images)
    squares = []
    for image in images:
        x = image[None].requires_grad_()
        (gradient,) = torch.autograd.grad(network(x), x)
        squares.append(gradient.square().sum())
    torch.testing.assert_close(value, sum(squares) / 3, rtol=1e-10, atol=0)
    assert value > 0


def test_it_is_a_paraboloids_by_hand():
    """D(x) = a |x|^2 has the gradient 2 a x."""
    images = torch.randn(5, 3, 4, 4)
    a = torch.tensor(0.7, requires_grad=True)
    value = r1(lambda x: a * x.square().sum((1, 2, 3)), images.bfloat16())
    assert value.dtype == torch.float32
    mean = images.bfloat16().float().square().sum() / 5
    torch.testing.assert_close(value, 4 * 0.49 * mean)
    (grad,) = torch.autograd.grad(value, a)
    torch.testing.assert_close(grad, 8 * 0.7 * mean)


def test_its_gradient_is_that_of_finite_differences(network_and_images):
    """In training, so batch norm's statistics are differentiated through; five directions."""
    network, images = network_and_images
    parameters, step = list(network.parameters()), 1e-9
    at = [p.detach().clone() for p in parameters]
    with plain(network):
        grads = torch.autograd.grad(r1(network, images), parameters, materialize_grads=True)
        size = sum(g.square().sum() for g in grads).sqrt()
        assert size > 0
        for _ in range(5):
            along = [torch.randn_like(p) for p in parameters]
            ends = []
            for sign in (1, -1):
                for p, start, d in zip(parameters, at, along, strict=True):
                    p.data = start + sign * step * d
                ends.append(r1(network, images))
            slope = (ends[0] - ends[1]) / (2 * step)
            ours = sum((g * d).sum() for g, d in zip(grads, along, strict=True))
            # rounding: 1e-16 / 1e-9 of the value, which is within 4 of `size`; on so short a way
            # there is no corner of a LeakyReLU, where the penalty jumps (at 1e-7 there are some)
            assert abs(slope - ours) < 1e-6 * size


def everything(network):
    return {name: t.clone() for name, t in network.state_dict().items()}


@pytest.mark.parametrize("impl", ["auto", "ref"])
def test_nothing_of_the_network_has_changed(impl):
    network = Discriminator(32, 2, impl)
    images = torch.randn(4, 3, 32, 32)
    network(images)
    before, tensors = everything(network), network.state_dict(keep_vars=True)
    images[0, 0, 0, 0] = torch.inf
    with plain(network):
        for module in network.modules():
            if isinstance(module, BatchNormAct2d):
                assert module.impl == "torch"
            assert getattr(module, "conv_impl", "torch") == "torch"
        value = r1(network, images)
        torch.autograd.grad(value, list(network.parameters()))
        inside = everything(network)
    assert not value.isfinite()  # and not even this is left behind
    assert not torch.equal(
        inside["blocks.0.norm.running_mean"], before["blocks.0.norm.running_mean"]
    )
    after = network.state_dict(keep_vars=True)
    for name, tensor in after.items():
        assert tensor is tensors[name] and torch.equal(tensor, before[name]), name
    norms = [m for m in network.modules() if isinstance(m, BatchNormAct2d)]
    assert {m.impl for m in norms} == {impl}
    assert {m.conv_impl for m in network.modules() if hasattr(m, "conv_impl")} == {"auto"}
    network(images[1:])  # and its statistics move again
    assert not torch.equal(
        network.blocks[0].norm.running_mean, before["blocks.0.norm.running_mean"]
    )


def test_it_ends_where_an_error_does():
    network = Generator(32, 4, 2)
    buffer = network.blocks[0].norm.running_mean
    with pytest.raises(RuntimeError, match="planted"), plain(network):
        raise RuntimeError("planted")
    assert network.blocks[0].norm.running_mean is buffer
    assert network.blocks[0].norm.impl == "auto" and network.conv_impl == "auto"


def test_statistics_of_the_batch_are_what_it_normalises_by():
    """As D's own passes do: the other images of the batch are part of an image's gradient."""
    network, images = Discriminator(32, 2).double(), torch.randn(4, 3, 32, 32).double()
    with plain(network):
        training = r1(network, images)
        evaluating = r1(network.eval(), images)
    assert abs(training - evaluating) > 0.1 * evaluating


def test_both_parts_of_the_penalty_as_a_step_takes_them():
    """gamma / 2 of it beside a loss: its gradient is the sum of theirs, and images get none."""
    network, images = Discriminator(32, 2).double(), torch.randn(4, 3, 32, 32).double()
    images.requires_grad_()
    parameters = list(network.parameters())
    with plain(network):
        both = torch.autograd.grad(network(images).mean() + 5 * r1(network, images), parameters)
        one = torch.autograd.grad(network(images).mean(), parameters)
        other = torch.autograd.grad(r1(network, images), parameters)
        (of_images,) = torch.autograd.grad(
            r1(network, images), images, allow_unused=True, materialize_grads=True
        )
    for a, b, c in zip(both, one, other, strict=True):
        torch.testing.assert_close(a, b + 5 * c, rtol=1e-9, atol=1e-12)
    assert not of_images.any()
