"""From numbers to pixels, and which weights a sample is drawn from."""

import numpy as np
import pytest
import torch

from fastgan.checkpoint import find, under
from fastgan.cli import main
from fastgan.errors import RunError
from fastgan.models import Generator, init_weights
from fastgan.samples import CHUNK, generate, grid, latents, load_generator, to_uint8

FLAGS = ["--size=32", "--width=4", "--latent=8", "--batch=8", "--grid=4", "--sample-kimg=9"]
FLAGS += ["--data=faces:16", "--device=cpu"]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0)])
def test_pixels_are_the_inverse_of_the_gather(low, high):
    levels = torch.arange(256, dtype=torch.float64)
    images = (low + (high - low) * levels / 255).float().view(1, 1, 16, 16).expand(1, 3, 16, 16)
    back = to_uint8(images, (low, high))
    assert back.shape == (1, 16, 16, 3)
    assert torch.equal(back[0, :, :, 0].flatten().double(), levels)
    ends = torch.tensor([low - 5, high + 5]).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    assert to_uint8(ends, (low, high))[0, 0, :, 0].tolist() == [0, 255]


def test_latent_i_depends_on_the_seed_and_i_alone():
    few, many = (torch.cat(list(latents(3, n, 7))) for n in (5, CHUNK + 9))
    assert many.shape == (CHUNK + 9, 7) and torch.equal(few, many[:5])
    assert not torch.equal(few, torch.cat(list(latents(4, 5, 7))))
    everything = torch.cat(list(latents(0, 5000, 20)))
    assert abs(everything.mean()) < 5 / 100_000**0.5 and abs(everything.std() - 1) < 0.02


def test_generate_uses_running_statistics_and_restores_the_mode():
    g = Generator(32, 8, 4)
    init_weights(g, torch.Generator().manual_seed(0))
    for _ in range(20):
        g(torch.randn(16, 8))
    before = {k: v.clone() for k, v in g.state_dict().items()}
    piece = torch.randn(4, 8)
    (together,) = generate(g, iter([piece]))
    (alone,) = generate(g, iter([piece[:1]]))
    assert torch.equal(together[:1], alone)  # batch statistics would tie an image to its neighbours
    assert g.training and all(torch.equal(v, before[k]) for k, v in g.state_dict().items())


def test_a_grid_shows_its_images_in_order():
    images = torch.zeros(5, 4, 4, 3, dtype=torch.uint8)
    for i in range(5):
        images[i] = 40 * i
    picture = np.asarray(grid(images))
    assert picture.shape == (2 * 6 + 2, 3 * 6 + 2, 3)  # two rows of three, two pixels between
    for i in range(5):
        row, column = divmod(i, 3)
        assert (picture[2 + 6 * row : 6 + 6 * row, 2 + 6 * column : 6 + 6 * column] == 40 * i).all()
    assert (picture[:2] == 255).all()


def test_the_averaged_weights_and_statistics_are_what_is_sampled(tmp_path):
    assert main(["train", *FLAGS, "--kimg=0.4", f"--out={tmp_path}"]) == 0
    (run,) = tmp_path.glob("0*")
    saved = find(run)
    for ema, prefix in ((True, "ema."), (False, "g.")):
        network = load_generator(saved, ema, torch.device("cpu"))
        assert not network.training
        state = network.state_dict()
        expected = under(saved.tensors("model"), prefix)
        assert all(torch.equal(state[k], v) for k, v in expected.items())
    g, average = (under(saved.tensors("model"), prefix) for prefix in ("g.", "ema."))
    for name in ("last.weight", "blocks.0.norm.weight", "blocks.0.norm.running_var"):
        assert not torch.equal(g[name], average[name]), name


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path, monkeypatch):
    assert main(["train", *FLAGS, "--kimg=0.016", f"--out={tmp_path}"]) == 0
    (run,) = tmp_path.glob("0*")
    saved = find(run)
    saved.meta["config"]["width"] = 8
    with pytest.raises(RunError, match="do not fit the configuration.*blocks.0.conv.weight"):
        load_generator(saved, True, torch.device("cpu"))
