"""The networks of two-rate64 against `nn.Sequential` in the words of the text, their counts, and
what else a network must bear.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastgan.models.two_rate import (
    AutoencoderGenerator,
    TwoRateDiscriminator,
    TwoRateGenerator,
    default_init,
)
from fastgan.precision import low_copy
from fastgan_kernels import BatchNormAct2d

NETWORKS = [TwoRateDiscriminator, TwoRateGenerator, AutoencoderGenerator]


def written(kind):
    """The same network of PyTorch's modules in the order that the text lists them in."""
    if kind is TwoRateDiscriminator:
        return nn.Sequential(
            nn.Conv2d(3, 32, 7, padding="same"),
            nn.AvgPool2d(2),
            nn.LeakyReLU(0.01),
            nn.Conv2d(32, 64, 5, padding="same"),
            nn.AvgPool2d(2),
            nn.LeakyReLU(0.01),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(128, 256, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4096, 1),
            nn.Flatten(0),
        )
    if kind is TwoRateGenerator:
        return nn.Sequential(
            nn.Unflatten(1, (5, 5, 5)),
            nn.ConvTranspose2d(5, 128, 4, stride=1, padding=2),
            nn.ReLU(),
            nn.BatchNorm2d(128),
            nn.ConvTranspose2d(128, 64, 3, stride=3, padding=2),
            nn.ReLU(),
            nn.BatchNorm2d(64),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(32),
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 2, stride=2),
            nn.ReLU(),
        )
    return nn.Sequential(
        nn.Unflatten(1, (3, 64, 64)),
        nn.Conv2d(3, 64, 3, padding="same"),
        nn.LeakyReLU(0.01),
        nn.Conv2d(64, 128, 5, padding="same"),
        nn.LeakyReLU(0.01),
        nn.Conv2d(128, 256, 7, padding="same"),
        nn.LeakyReLU(0.01),
        nn.Conv2d(256, 64, 3, padding="same"),
        nn.ReLU(),
        nn.Conv2d(64, 3, 3, padding="same"),
        nn.ReLU(),
    )


def made(kind):
    """A network with its own first weights, and what it takes."""
    network = kind()
    default_init(network, torch.Generator().manual_seed(1))
    if kind is TwoRateDiscriminator:
        return network, torch.rand(2, 3, 64, 64)
    return network, torch.randn(2, network.latent)


def copied(network, other):
    """`other` with the network's parameters, in their order."""
    with torch.no_grad():
        for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
            theirs.copy_(mine)
    return other.to(next(network.parameters()).dtype)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [(kind, torch.channels_last) for kind in NETWORKS]
    + [(kind, torch.contiguous_format) for kind in NETWORKS[:2]],  # 3 s for the autoencoder
)
def test_values_statistics_and_gradients_are_those_of_the_text(kind, layout):
    network, given = made(kind)
    if kind is AutoencoderGenerator:
        given = given[:1]  # 8 billion multiply-adds
    network, given = network.double().to(memory_format=layout), given.double().requires_grad_()
    other = copied(network, written(kind))
    ours, theirs = network(given), other(given)
    # sums of up to 12,544 terms of float64
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    up = torch.randn_like(theirs)
    grads = torch.autograd.grad(ours, [given, *network.parameters()], up)
    others = torch.autograd.grad(theirs, [given, *other.parameters()], up)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * float(b.abs().max()))
    for a, b in zip(network.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "parameters", "of_images"),
    [
        (TwoRateDiscriminator, 429_121, False),
        (TwoRateGenerator, 125_811, True),
        (AutoencoderGenerator, 1_961_859, True),
    ],
)
def test_counts_shapes_and_what_a_network_says_of_itself(kind, parameters, of_images):
    network, given = made(kind)
    assert sum(p.numel() for p in network.parameters()) == parameters
    maps = []
    for module in network.modules():
        if isinstance(module, nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, i, out: maps.append(out.shape[-1]))
    out = network(given)
    assert out.shape == ((2, 3, 64, 64) if of_images else (2,))
    if kind is TwoRateGenerator:
        assert maps == [4, 8, 16, 32, 64]
    assert (network.size, network.width) == (64, 64)
    if of_images:
        assert network.pixel_range == (0.0, 1.0)
        assert network.latent == {"two-rate": 125, "two-rate-autoencoder": 12288}[kind.arch]
        assert (network.latent_dist, kind(latent_dist="uniform").latent_dist) == (
            "normal",
            "uniform",
        )


def test_the_autoencoder_takes_8_billion_multiply_adds_an_image():
    network, _ = made(AutoencoderGenerator)
    with torch.device("meta"):
        network, given = AutoencoderGenerator(), torch.empty(1, network.latent)
    with FlopCounterMode(display=False) as counted:
        network(given)
    weights = 3 * 64 * 9 + 64 * 128 * 25 + 128 * 256 * 49 + 256 * 64 * 9 + 64 * 3 * 9
    assert counted.get_total_flops() == 2 * weights * 64 * 64
    assert round(weights * 64 * 64 / 1e9, 2) == 8.03


@pytest.mark.parametrize("kind", NETWORKS)
def test_16_bit_copies_have_all_but_batch_norms(kind):
    network, given = made(kind)
    network = network.to(memory_format=torch.channels_last)
    low = low_copy(network, torch.bfloat16)
    norms = {id(p) for m in low.modules() if isinstance(m, BatchNormAct2d) for p in m.parameters()}
    for p in low.parameters():
        assert p.dtype == (torch.float32 if id(p) in norms else torch.bfloat16)
    with torch.no_grad():
        ours, wide = low(given.bfloat16()), network(given)
    assert ours.dtype == torch.bfloat16
    # a dozen roundings of 2^-9 and sums of them: far from another function, whose error is 1
    error = (ours.float() - wide).norm() / wide.norm()
    assert error < 0.05


@pytest.mark.parametrize("kind", NETWORKS)
def test_they_compile_as_a_whole(kind):
    network, given = made(kind)
    run = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(given), network(given), rtol=1e-5, atol=1e-6)


def test_latents_in_longer_rows_and_maps_in_channels_last():
    """A row of the step's 16-bit latents begins on 16 bytes."""
    network, given = made(TwoRateGenerator)
    rows = torch.zeros(2, 128)
    rows[:, :125] = given
    assert torch.equal(network(rows[:, :125]), network(given))
    network = network.to(memory_format=torch.channels_last)
    assert network(given).is_contiguous(memory_format=torch.channels_last)


def test_images_of_both_halves_are_judged_one_by_one():
    network, images = made(TwoRateDiscriminator)
    apart = torch.cat([network(images[:1]), network(images[1:])])
    torch.testing.assert_close(network(images, 2), apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NETWORKS)
def test_first_weights_are_those_that_pytorch_draws(kind):
    """From the same numbers: ours come from a generator, PyTorch's from the global one."""
    network = kind()
    for module in network.modules():
        if isinstance(module, BatchNormAct2d):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)
    default_init(network, torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    for ours, theirs in zip(network.parameters(), written(kind).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # bounds by other roundings
    bound = 1 / math.sqrt(network.layers[0].weight[0].numel())
    assert 0.9 * bound < network.layers[0].weight.abs().max() <= bound
