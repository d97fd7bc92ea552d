"""The DCGAN for every size: the tutorial's at 64 px, the same rule elsewhere."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastgan.config import SIZES
from fastgan.models import Discriminator, Generator, convolutions, dcgan, init_weights
from fastgan.reference import make_discriminator, make_generator


@pytest.mark.parametrize(
    ("size", "width", "words"),
    [
        (64, 64, "fastgan's convolutions"),
        (128, 32, "fastgan's convolutions"),
        (64, 48, "fastgan's convolutions in 2 of 4 layers, cuDNN's elsewhere: channels must be a"),
        (80, 64, "fastgan's convolutions in 1 of 4 layers, cuDNN's elsewhere: 64 and 128 pixels"),
    ],
)
def test_it_is_said_whose_convolutions_run(size, width, words, monkeypatch):
    weight = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert convolutions(size, width, weight, "torch") == "cuDNN's convolutions"
    monkeypatch.setattr(dcgan, "conv4x4_runs", lambda dtype, device: False)
    assert "fastgan's are for 16 bits on sm_90" in convolutions(size, width, weight, "auto")
    monkeypatch.setattr(dcgan, "conv4x4_runs", lambda dtype, device: True)
    assert convolutions(size, width, weight, "auto").startswith(words)
    assert convolutions(size, width, Generator(32, 8, 4).last.weight, "auto").startswith("PyTorch")


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_the_supported_sizes():
    assert SIZES == (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def test_parameter_counts_of_the_tutorial():
    assert parameters(Generator(64, 100, 64)) == 3_576_704
    assert parameters(Discriminator(64, 64)) == 2_765_568


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_reference_architecture_and_values(size):
    ours, theirs = Generator(size, 10, 2).double(), make_generator(size, 10, 2).double()
    critic, critic_ref = Discriminator(size, 2).double(), make_discriminator(size, 2).double()
    for mine, yours in ((ours, theirs), (critic, critic_ref)):
        state = dict(zip(mine.state_dict(), yours.state_dict().values(), strict=True))
        mine.load_state_dict(state)
    z = torch.randn(3, 10, dtype=torch.float64)
    images = ours(z)
    assert images.shape == (3, 3, size, size)
    torch.testing.assert_close(images, theirs(z[:, :, None, None]), rtol=1e-9, atol=1e-12)
    logits = critic(images.detach())
    torch.testing.assert_close(
        logits.sigmoid(), critic_ref(images.detach()).flatten(), rtol=1e-9, atol=1e-12
    )


def test_the_width_is_capped_at_sixteen_times():
    shapes = [tuple(b.conv.weight.shape[:2]) for b in Generator(256, 100, 64).blocks]
    assert shapes == [(100, 1024), (1024, 1024), (1024, 512), (512, 256), (256, 128), (128, 64)]


def test_groups_are_separate_passes():
    d = Discriminator(32, 8).double()
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    together = d(images, 2)
    apart = torch.cat([d(images[:3]), d(images[3:])])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)
    assert (together - d(images)).abs().max() > 1e-3  # and not one pass of shared statistics


@pytest.mark.parametrize("pixel_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_images_fill_the_pixel_range(pixel_range):
    g = Generator(32, 10, 4, pixel_range)
    with torch.no_grad():
        g.last.weight.mul_(50)  # drives the output into both ends
        images = g(torch.randn(16, 10))
    low, high = pixel_range
    assert images.min() >= low and images.max() <= high
    assert images.min() < low + 0.05 and images.max() > high - 0.05


def test_initial_weights_follow_the_paper_and_the_seed():
    g = Generator(64, 100, 32)
    init_weights(g, torch.Generator().manual_seed(1))
    for module in g.modules():
        if isinstance(module, nn.ConvTranspose2d):
            n = module.weight.numel()
            # the mean of n draws of N(0, 0.02) is within 5 standard errors, and so is their
            # deviation
            assert abs(module.weight.mean()) < 5 * 0.02 / n**0.5
            assert abs(module.weight.std() - 0.02) < 5 * 0.02 / (2 * n) ** 0.5
        elif isinstance(module, nn.BatchNorm2d):
            assert abs(module.weight.mean() - 1) < 5 * 0.02 / module.weight.numel() ** 0.5
            assert not module.bias.any()
    again, other = Generator(64, 100, 32), Generator(64, 100, 32)
    init_weights(again, torch.Generator().manual_seed(1))
    init_weights(other, torch.Generator().manual_seed(2))
    assert torch.equal(again.last.weight, g.last.weight)
    assert not torch.equal(other.last.weight, g.last.weight)
