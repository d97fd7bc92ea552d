"""A trained generator from a run, a checkpoint, an exported folder and weights is one and the same,
and what is none says what it is.
"""

import shutil

import pytest
import torch

import fastgan
from fastgan.checkpoint import checkpoints, find, under
from fastgan.cli import main
from fastgan.config import NetworkOptions
from fastgan.errors import RunError, UsageError
from fastgan.generators import is_generator, load_generator, open_generator, options_of
from fastgan.models import init_weights, make_discriminator, make_generator
from fastgan.tensor_file import write_tensors

CPU = torch.device("cpu")
FLAGS = ["--size=32", "--width=4", "--latent=8", "--batch=8", "--grid=4", "--sample-kimg=9"]
FLAGS += ["--data=faces:16", "--device=cpu", "--pixel-range", "0", "1", "--latent-dist=uniform"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert main(["train", *FLAGS, "--kimg=0.08", "--save-kimg=0.04", f"--out={out}"]) == 0
    return next(out.glob("0*"))


def test_one_generator_from_everywhere(run, tmp_path):
    """And it draws the same images."""
    newest = checkpoints(run)[-1]
    folder = tmp_path / "exported"
    assert main(["export", str(run), "--out", str(folder)]) == 0
    saved = under(find(newest).tensors("model"), "ema.")
    torch.save(saved, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    given = [run, newest, newest / "model.safetensors", folder, folder / "generator.safetensors"]
    given.append(tmp_path / "weights.pt")
    found = [open_generator(str(path), "RUN", True, CPU) for path in given]
    assert len({one.digest for one in found}) == 1
    z = torch.rand(3, 8) * 2 - 1
    images = found[0].generator(z)
    assert images.shape == (3, 3, 32, 32) and images.min() >= 0
    for one in found:
        assert one.options == NetworkOptions(
            size=32, width=4, latent=8, pixel_range=(0.0, 1.0), latent_dist="uniform"
        )
        assert all(torch.equal(one.generator.state_dict()[k], t) for k, t in saved.items())
        assert torch.equal(one.generator(z), images)
    assert [one.run for one in found] == [run, run, None, None, None, None]
    assert [one.checkpoint is not None for one in found] == [True, True] + 4 * [False]
    names = [f"{run.name} {newest.name}"] * 2 + ["model", "exported", "generator", "weights"]
    assert [one.name for one in found] == names
    trained = open_generator(str(run), "RUN", False, CPU)
    assert trained.digest != found[0].digest and trained.name.endswith("(as trained)")
    assert trained.digest == open_generator(str(given[2]), "RUN", False, CPU).digest


def test_it_is_ready(run):
    generator = fastgan.load_generator(run)
    assert not generator.training and not any(p.requires_grad for p in generator.parameters())
    weight = generator.blocks[1].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    z = torch.rand(4, generator.latent) * 2 - 1
    before = {k: t.clone() for k, t in generator.state_dict().items()}
    assert torch.equal(generator(z)[:1], generator(z[:1]))  # no statistics of the batch
    assert all(torch.equal(before[k], t) for k, t in generator.state_dict().items())
    z.requires_grad_()
    generator(z).sum().backward()  # latents can be searched
    assert z.grad.abs().sum() > 0
    trained = load_generator(str(run), ema=False, device=torch.device("cpu"))
    assert not torch.equal(trained.last.weight, generator.last.weight)
    assert options_of(trained) == options_of(generator)


@pytest.mark.parametrize("arch", ["two-rate", "two-rate-autoencoder"])
def test_the_other_architectures(arch, tmp_path):
    latent = 125 if arch == "two-rate" else 12288
    options = NetworkOptions(arch=arch, size=64, latent=latent, pixel_range=(0.0, 1.0))
    network = make_generator(options, "torch")
    init_weights(network, torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "g.safetensors", network.state_dict())
    found = open_generator(str(tmp_path / "g.safetensors"), "RUN", True, CPU)
    assert found.options == options == options_of(found.generator)
    z = torch.randn(1, latent)
    with torch.no_grad():
        assert torch.allclose(found.generator(z), network.eval()(z), atol=1e-5)


def test_what_is_none(run, tmp_path):
    def refused(path, error=UsageError, **options):
        with pytest.raises(error) as raised:
            load_generator(path, **options)
        return str(raised.value)

    kinds = "path must be a run, a checkpoint, an exported folder or weights (.safetensors, .pth)"
    assert f"{kinds}; no such path: {tmp_path / 'x'}" in refused(tmp_path / "x")
    assert "load_generator: device cud: " in refused(run, device="cud")
    said = refused(run / "checkpoints" / "000007.000kimg")
    assert "no such run or checkpoint folder (there are 000000.040kimg, 000000.080kimg)" in said
    assert f"{kinds}; it is another folder" in refused(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    assert f"{kinds}; it is another file" in refused(tmp_path / "a.txt")
    assert not is_generator(tmp_path) and not is_generator(tmp_path / "a.txt")
    d = make_discriminator(NetworkOptions(size=48, width=2), "torch")
    torch.save(d.state_dict(), tmp_path / "netD.pth")
    said = refused(tmp_path / "netD.pth", RunError)
    assert "are of no generator: they are a dcgan discriminator (48 px, width 2)" in said
    own = shutil.copytree(run, tmp_path / run.name)
    shutil.rmtree(own / "checkpoints")
    assert is_generator(own) and "no checkpoint" in refused(own)
    (own / "checkpoints").mkdir()
    assert "this run has no checkpoint yet" in refused(own)


def test_a_checkpoint_of_another_shape_than_its_configuration(run, monkeypatch):
    saved = find(run)
    saved.meta["config"]["width"] = 8
    monkeypatch.setattr("fastgan.generators.find", lambda path: saved)
    with pytest.raises(RunError, match="do not fit the configuration.*blocks.0.conv.weight"):
        load_generator(run)
