"""From latents to pixels and files, and which weights a sample is drawn from."""

import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from fastgan import png_files
from fastgan.checkpoint import find, under
from fastgan.cli import main
from fastgan.config import NetworkOptions
from fastgan.errors import RunError, UsageError
from fastgan.generators import open_generator
from fastgan.latents import CHUNK, latents
from fastgan.models import Generator, init_weights, make_generator
from fastgan.png_files import png_name, write_pngs
from fastgan.samples import generate, grid, to_uint8

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


@pytest.mark.parametrize(
    ("dist", "truncation"),
    [("normal", None), ("uniform", None), ("normal", 0.7), ("normal", 1e-6), ("uniform", 0.7)],
)
def test_latent_i_depends_on_the_seed_and_i_alone(dist, truncation):
    few, many = (torch.cat(list(latents(3, n, 7, dist, truncation))) for n in (5, CHUNK + 9))
    assert many.shape == (CHUNK + 9, 7) and many.dtype == torch.float32
    assert torch.equal(few, many[:5]) and len(many.unique(dim=0)) == CHUNK + 9
    assert not torch.equal(few, torch.cat(list(latents(4, 5, 7, dist, truncation))))


def test_plain_latents_are_what_they_always_were():
    random = np.random.default_rng(3)
    wanted = random.standard_normal((CHUNK + 9, 7), np.float32)
    assert np.array_equal(torch.cat(list(latents(3, CHUNK + 9, 7))), wanted)


def shares(t):
    """Of N(0, 1): what is below `t`; and the density there."""
    return (1 + math.erf(t / 2**0.5)) / 2, math.exp(-(t**2) / 2) / (2 * math.pi) ** 0.5


@pytest.mark.parametrize("truncation", [None, 0.3, 1.0, 2.5, 40.0])
def test_normal_latents_have_the_truncated_distribution(truncation):
    t = truncation or 40.0
    z = torch.cat(list(latents(1, 2000, 50, truncation=truncation))).double().flatten().sort()[0]
    assert z.abs().max() <= t * (1 + 1e-7)  # rounded to float32
    below, density = shares(t)
    inside, tail = 2 * below - 1, 2 * t * density
    second = 1 - tail / inside  # moments of the truncated normal, by parts
    fourth = 3 * second - t**2 * tail / inside
    assert abs(z.mean()) < 4 * (second / len(z)) ** 0.5
    assert abs((z**2).mean() - second) < 4 * ((fourth - second**2) / len(z)) ** 0.5
    # Kolmogorov and Smirnov: further than 1.95 / sqrt(n) by chance once in a thousand
    wanted = ((1 + torch.erf(z / 2**0.5)) / 2 - (1 - below)) / inside
    assert (wanted - torch.linspace(0, 1, len(z))).abs().max() < 1.95 / len(z) ** 0.5
    # clamped instead of drawn anew, a share of 1 - inside would be at the two ends
    assert (z.abs() >= t * (1 - 1e-6)).sum() < 10


@pytest.mark.parametrize(("truncation", "span"), [(None, 1.0), (0.4, 0.4), (3.0, 1.0)])
def test_uniform_latents_fill_their_cube(truncation, span):
    z = torch.cat(list(latents(1, 2000, 50, "uniform", truncation))).double().flatten().sort()[0]
    assert -span <= z[0] < -0.999 * span and 0.999 * span < z[-1] <= span
    wanted = (z / span + 1) / 2
    assert (wanted - torch.linspace(0, 1, len(z))).abs().max() < 1.95 / len(z) ** 0.5


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
        network = open_generator(str(run), "RUN", ema, torch.device("cpu")).generator
        assert not network.training
        state = network.state_dict()
        expected = under(saved.tensors("model"), prefix)
        assert all(torch.equal(state[k], v) for k, v in expected.items())
    g, average = (under(saved.tensors("model"), prefix) for prefix in ("g.", "ema."))
    for name in ("last.weight", "blocks.0.norm.weight", "blocks.0.norm.running_var"):
        assert not torch.equal(g[name], average[name]), name


def test_a_sample_of_a_run_of_its_checkpoint_and_of_its_weights_is_the_same(tmp_path, capsys):
    flags = [*FLAGS, "--latent-dist=uniform"]
    assert main(["train", *flags, "--kimg=0.016", f"--out={tmp_path / 'runs'}"]) == 0
    (run,) = (tmp_path / "runs").glob("0*")
    saved = find(run).path
    capsys.readouterr()
    for ema in ("--ema", "--no-ema"):
        pictures = {}
        for number, given in enumerate((run, saved, saved / "model.safetensors")):
            out = tmp_path / f"{number}{ema}.png"
            args = ["--device=cpu", "--count=5", "--seed=2", f"--out={out}", ema]
            assert main(["sample", str(given), *args]) == 0
            pictures[given.name] = out.read_bytes()
            which = "averaged" if ema == "--ema" else "trained"
            weights = given if given.is_file() else f"the {which} weights of {saved}"
            assert f"5 images from {weights}: {out}" in capsys.readouterr().out
        assert len(set(pictures.values())) == 1, ema
    generator = open_generator(str(run), "RUN", True, torch.device("cpu")).generator
    for truncation in (None, 0.3):
        args = [f"--truncation={truncation}"] if truncation else []
        assert main(["sample", str(run), "--device=cpu", "--count=9", *args]) == 0
        name = "sample-seed0-truncation0.3.png" if truncation else "sample-seed0.png"
        drawn = torch.cat(list(generate(generator, latents(0, 9, 8, "uniform", truncation))))
        with Image.open(run / "samples" / name) as file:
            assert np.array_equal(np.asarray(file), np.asarray(grid(drawn)))


def test_the_columns_of_a_grid_can_be_given():
    images = torch.randint(256, (6, 4, 5, 3), dtype=torch.uint8)
    picture = np.asarray(grid(images, columns=2))
    assert picture.shape == (3 * 6 + 2, 2 * 7 + 2, 3)
    assert np.array_equal(picture[14:18, 9:14], images[5])


def test_single_files_are_their_images_whole_and_in_order(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 9, 3), np.uint8)
    images[::2] = images[::2, :1, :1]  # of one colour, which is packed in another way
    made = 0

    def drawn():
        nonlocal made
        for made, image in enumerate(images, 1):  # noqa: B007 - what was made when it fails
            yield image

    write_pngs(drawn(), tmp_path, 600)
    assert sorted(os.listdir(tmp_path)) == [png_name(i, 600) for i in range(600)]
    for i, image in enumerate(images):
        with Image.open(tmp_path / png_name(i, 600)) as file:
            assert np.array_equal(np.asarray(file), image)
    assert made == 600


def test_two_at_once_do_not_write_into_one_folder(tmp_path):
    """Each has found it empty: the second one to begin is refused, and so is one after the end."""
    images = np.zeros((3, 8, 8, 3), np.uint8)

    def meanwhile():
        with pytest.raises(UsageError, match="another process is writing into it"):
            write_pngs(images + 9, tmp_path, 3)
        yield from images

    write_pngs(meanwhile(), tmp_path, 3)
    with pytest.raises(UsageError, match="holds images already"):
        write_pngs(images + 9, tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [png_name(i, 3) for i in range(3)]
    assert np.asarray(Image.open(tmp_path / png_name(2, 3))).max() == 0


def test_what_is_interrupted_says_how_many_are_whole(tmp_path, capsys):
    def interrupted():
        yield np.zeros((8, 8, 3), np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pngs(interrupted(), tmp_path, 2)
    assert " of 2 images are whole" in capsys.readouterr().err


def test_a_link_is_followed_and_a_pipe_refused(tmp_path, capsys):
    network = make_generator(NetworkOptions(size=32, latent=4, width=2), "torch")
    torch.save(network.state_dict(), tmp_path / "g.pth")
    link, target = tmp_path / "link.png", tmp_path / "target.png"
    link.symlink_to(target)
    command = ["sample", str(tmp_path / "g.pth"), "--count=4", "--device=cpu", "--out"]
    assert main([*command, str(link)]) == 0
    assert link.is_symlink() and Image.open(target).size == (70, 70)
    os.mkfifo(tmp_path / "pipe.png")
    capsys.readouterr()
    assert main([*command, str(tmp_path / "pipe.png")]) == 2
    assert "--out must be a file, got the device or pipe" in capsys.readouterr().err
    assert main([*command, str(tmp_path / f"{'a' * 300}.png")]) == 2
    assert "--out: the name is too long" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_ends_it_with_whole_ones(tmp_path, monkeypatch):
    """The disk is full after 40: what is there is whole, and no more than is ahead was drawn."""
    written, made = [], []
    save = Image.Image.save

    def full(self, path, **how):
        if len(written) >= 40:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        save(self, path, **how)

    def drawn():
        for image in np.random.default_rng(0).integers(0, 256, (5000, 8, 8, 3), np.uint8):
            made.append(image)
            yield image

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(RunError, match="No space left on device; [0-9]+ of 5,000 images are w"):
        write_pngs(drawn(), tmp_path, 5000)
    names = os.listdir(tmp_path)
    assert 40 <= len(names) <= 40 + 64 and not [name for name in names if not name[0].isdigit()]
    for name in names:
        with Image.open(tmp_path / name) as file:
            file.load()
    assert len(made) <= 40 + png_files.AHEAD + 64


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path, monkeypatch):
    assert main(["train", *FLAGS, "--kimg=0.016", f"--out={tmp_path}"]) == 0
    (run,) = tmp_path.glob("0*")
    saved = find(run)
    saved.meta["config"]["width"] = 8
    monkeypatch.setattr("fastgan.generators.find", lambda path: saved)
    with pytest.raises(RunError, match="do not fit the configuration.*blocks.0.conv.weight"):
        open_generator(str(run), "RUN", True, torch.device("cpu"))
