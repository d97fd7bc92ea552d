"""`--init-g` and `--init-d`: what a run begins with, and weights that do not fit it."""

import pytest
import torch

from fastgan.cli import main
from fastgan.config import NetworkOptions, TrainConfig
from fastgan.data.prepare import prepare
from fastgan.errors import UsageError
from fastgan.models import make_generator as make_g
from fastgan.modes import pick_modes
from fastgan.reference import make_discriminator, make_generator
from fastgan.state import State
from fastgan.tensor_file import write_tensors
from fastgan.warm_start import first_weights, warm_start
from ranks import in_ranks
from test_trainer import FLAGS, only_run, tensors

SMALL = {"data": "faces:20", "size": 32, "width": 4, "latent": 8, "batch": 8, "device": "cpu"}


@pytest.fixture
def theirs(tmp_path):
    """netG.pth and netD.pth, of pytorch/examples' layout, and the networks."""
    torch.manual_seed(11)
    networks = {"netG": make_generator(32, 8, 4), "netD": make_discriminator(32, 4)}
    paths = {}
    for name, network in networks.items():
        for t in network.buffers():  # as after some training
            t.copy_(torch.rand(t.shape) + 0.5 if t.is_floating_point() else torch.tensor(7))
        paths[name] = tmp_path / f"{name}.pth"
        torch.save({f"main.{k}": t for k, t in network.state_dict().items()}, paths[name])
    return paths, networks


def begun(tmp_path, ranks=None, **options):
    config = TrainConfig(**SMALL, **options)
    data = prepare(config.data, config, root=tmp_path)
    state = State(config, data, pick_modes(config), ranks)
    warm_start(state, first_weights(config) if state.ranks.first else {})
    return state


def test_a_run_begins_with_the_weights_and_statistics_of_the_files(tmp_path, theirs):
    paths, networks = theirs
    state = begun(tmp_path, init_g=paths["netG"], init_d=paths["netD"], amp=True, amp_dtype="fp16")
    for ours, name in ((state.g, "netG"), (state.ema, "netG"), (state.d, "netD")):
        pairs = zip(
            ours.network.state_dict().values(), networks[name].state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = state.g.network.eval()(z)
        expected = networks["netG"].eval()(z[:, :, None, None])
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    for side in (state.g, state.d):  # what computes has them, too
        for low, kept in zip(side.working.parameters(), side.network.parameters(), strict=True):
            assert torch.equal(low, kept.to(low.dtype))
    state.close()


def test_one_network_alone_leaves_the_other_as_it_was_drawn(tmp_path, theirs):
    paths, _ = theirs
    drawn, begun_with = begun(tmp_path), begun(tmp_path, init_d=paths["netD"])
    for a, b in zip(drawn.g.network.parameters(), begun_with.g.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(drawn.d.network.first.weight, begun_with.d.network.first.weight)


def on_rank(ranks, tmp_path, path):
    # the file is where rank 0 is, and nowhere else
    here = path if ranks.first else tmp_path / "not-there.pth"
    state = begun(tmp_path / str(ranks.rank), ranks, init_g=here)
    return [p.detach().numpy() for p in state.g.working.parameters()]


def test_all_ranks_begin_with_what_rank_0_reads(tmp_path, theirs):
    paths, networks = theirs
    for mine in in_ranks(2, on_rank, tmp_path, paths["netG"]):
        for ours, expected in zip(mine, networks["netG"].parameters(), strict=True):
            assert (ours == expected.detach().numpy()).all()


def test_a_run_that_goes_on_needs_the_files_no_more(tmp_path, theirs):
    paths, _ = theirs
    out = tmp_path / "runs"
    given = ["train", *FLAGS, f"--init-g={paths['netG']}", f"--out={out}"]
    assert main([*given, "--kimg=0.016"]) == 0
    paths["netG"].unlink()
    assert main([*given, "--kimg=0.032", "--resume=auto"]) == 0
    assert int(tensors(only_run(out))["state.ema.steps"]) == 4


WRONG = {
    "another width": ("netG", {"width": 8}, "is a generator of width 4, and the run's has width 8"),
    "another latent": ("netG", {"latent": 9}, "generator of latent 8, and the run's has latent 9"),
    "another range": ("netG", {"pixel_range": (0.0, 1.0)}, r"of pixel_range \(-1.0, 1.0\), and"),
    "another D": ("netD", {"spectral_norm": True}, "of spectral_norm False, and the run's has"),
    "another arch": (
        "netG",
        {"arch": "two-rate", "size": 64, "latent": 125, "width": 64, "pixel_range": (0.0, 1.0)},
        "of arch dcgan, size 32, .* and the run's has arch two-rate, size 64",
    ),
}


@pytest.mark.parametrize(("name", "options", "said"), WRONG.values(), ids=WRONG.keys())
def test_weights_of_another_network_are_refused_and_both_are_named(
    tmp_path, theirs, name, options, said
):
    paths, _ = theirs
    key = {"netG": "init_g", "netD": "init_d"}[name]
    config = TrainConfig(**SMALL | options | {key: paths[name]})
    with pytest.raises(UsageError, match=said):
        first_weights(config)


def test_on_the_command_line(tmp_path, theirs, capsys):
    paths, _ = theirs
    flags = [*FLAGS, "--kimg=0.016", f"--out={tmp_path / 'runs'}"]
    assert main(["train", *flags, f"--init-g={paths['netD']}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastgan: --init-g: weights") and "discriminator" in said
    assert main(["train", *flags, f"--init-d={tmp_path / 'none.pth'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastgan: --init-d: weights") and "none.pth cannot be read" in said
    assert main(["train", *flags, f"--init-g={paths['netG']}", "--width=8"]) == 2
    assert "is a generator of width 4, and the run's has width 8" in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*"))  # nothing was begun


def test_uniform_latents_that_are_recorded_are_compared(tmp_path):
    options = NetworkOptions(size=32, width=4, latent=8, latent_dist="uniform")
    path = tmp_path / "g.safetensors"
    network = make_g(options, "torch")
    write_tensors(path, network.state_dict(), {"options": options.model_dump_json()})
    with pytest.raises(UsageError, match="latent_dist uniform, and the run's has latent_dist norm"):
        first_weights(TrainConfig(**SMALL, init_g=path))
    assert first_weights(TrainConfig(**SMALL, init_g=path, latent_dist="uniform"))
