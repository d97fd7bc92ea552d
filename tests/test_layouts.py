"""Weights by anybody's names: what they compute stays, and what they are is found."""

import json

import pytest
import torch
from safetensors.torch import save_file

from examples_dcgan import NetD, NetG
from fastgan.config import NetworkOptions
from fastgan.errors import RunError
from fastgan.layouts import digest_of, read_discriminator, read_generator, to_examples
from fastgan.models import make_discriminator, make_generator
from fastgan.tensor_file import write_tensors

NZ, WIDTH = 7, 3
FIXED = {"size": 64, "pixel_range": (0.0, 1.0)}
OPTIONS = [
    {"size": 32, "width": 5, "latent": 9},
    {"size": 80, "width": 2, "latent": 1, "latent_dist": "uniform"},
    {"size": 112, "width": 3, "latent": 6, "pixel_range": (0.0, 1.0)},
    {"size": 256, "width": 1, "latent": 4, "spectral_norm": True},
    {"arch": "two-rate", "latent": 125, **FIXED},
    {"arch": "two-rate-autoencoder", "latent": 12288, **FIXED},
]


@torch.no_grad()
def drawn(network, seed=0):
    """The network with every tensor drawn, statistics too, and counts that differ."""
    random = torch.Generator().manual_seed(seed)
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        if tensor.is_floating_point():
            tensor.normal_(0, 0.3, generator=random)
            if "running_var" in name:
                tensor.abs_().add_(0.5)
        else:
            tensor.fill_(number)
    return network.eval()


def same(a, b, ordered=False):
    right = list(a) == list(b) if ordered else set(a) == set(b)
    return right and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def theirs(tmp_path):
    """pytorch/examples' networks and their files."""
    pair = drawn(NetG(NZ, WIDTH), 1), drawn(NetD(WIDTH), 2)
    for name, network in zip(("netG", "netD"), pair, strict=True):
        torch.save(network.state_dict(), tmp_path / f"{name}.pth")
    return pair


def test_the_networks_of_pytorch_examples(theirs, tmp_path):
    """The same function in float64, but for the order of sums; and back, bit for bit."""
    g, d = theirs
    state, options = read_generator(tmp_path / "netG.pth")
    assert options == NetworkOptions(size=64, latent=NZ, width=WIDTH)
    ours = make_generator(options, "torch")
    ours.load_state_dict(state)
    z = torch.randn(5, NZ, dtype=torch.float64)
    images = g.double()(z[:, :, None, None])
    assert images.std() > 0.1
    # tanh's range is 1, sums have up to 16 * 24 terms, and a rounding is 1.1e-16
    assert torch.allclose(ours.double().eval()(z), images, rtol=0, atol=1e-12)
    assert same(to_examples(state, "generator"), g.float().state_dict(), ordered=True)

    state, options = read_discriminator(tmp_path / "netD.pth")
    assert options == NetworkOptions(size=64, width=WIDTH)
    ours = make_discriminator(options, "torch")
    ours.load_state_dict(state)
    told = d.double()(images.detach().clone())
    assert told.std() > 1e-3
    assert torch.allclose(torch.sigmoid(ours.double().eval()(images)), told, rtol=0, atol=1e-12)
    back = to_examples(dict(reversed(state.items())), "discriminator")
    assert same(back, d.float().state_dict(), ordered=True)
    drawn(NetD(WIDTH), 9).load_state_dict(back, strict=True)


@pytest.mark.parametrize("spelled", ["{}", "module.main.{}", "_orig_mod.main.{}"])
def test_other_spellings(theirs, tmp_path, spelled):
    for network, read in zip(theirs, (read_generator, read_discriminator), strict=True):
        saved = {k.removeprefix("main."): t for k, t in network.state_dict().items()}
        save_file({spelled.format(k): t for k, t in saved.items()}, tmp_path / "a.safetensors")
        assert same(read(tmp_path / "a.safetensors")[0], read_of(network, tmp_path)[0])
        old = {k: t.half() if t.dim() == 4 else t for k, t in saved.items() if "num_" not in k}
        save_file({spelled.format(k): t for k, t in old.items()}, tmp_path / "a.safetensors")
        state, _ = read(tmp_path / "a.safetensors")
        for name, tensor in read_of(network, tmp_path)[0].items():
            halved = tensor.half().float() if tensor.dim() == 4 else tensor
            assert torch.equal(state[name], torch.zeros_like(tensor) if "num_" in name else halved)


def read_of(network, folder):
    torch.save(network.state_dict(), folder / "b.pth")
    return (read_generator if isinstance(network, NetG) else read_discriminator)(folder / "b.pth")


@pytest.mark.parametrize("values", OPTIONS, ids=lambda v: v.get("arch", f"dcgan-{v['size']}"))
def test_what_the_shapes_tell(values, tmp_path):
    options = NetworkOptions(**values)
    g, d = make_generator(options, "torch"), make_discriminator(options, "torch")
    parts = {"g.": g.state_dict(), "ema.": drawn(make_generator(options, "torch")).state_dict()}
    parts["d."] = d.state_dict()
    path = tmp_path / "model.safetensors"
    write_tensors(path, {a + k: t for a, part in parts.items() for k, t in part.items()})
    untold = {"pixel_range": (-1.0, 1.0)} if options.arch == "dcgan" else {}
    untold |= {"latent_dist": "normal", "spectral_norm": False}
    for ema, prefix in ((True, "ema."), (False, "g.")):
        state, found = read_generator(path, ema)
        assert found == options.model_copy(update=untold)
        assert same(state, parts[prefix])
    state, found = read_discriminator(path)
    assert same(state, parts["d."])
    assert (found.size, found.width, found.spectral_norm) == (
        options.size,
        options.width,
        options.spectral_norm,
    )
    # beside a checkpoint's record all of it is known
    record = {"fastgan": "0.1.0", "config": {**options.model_dump(mode="json"), "batch": 8}}
    (tmp_path / "meta.json").write_text(json.dumps(record))
    assert read_generator(path)[1] == options == read_discriminator(path)[1]
    path.rename(tmp_path / "other.safetensors")  # it is of model.safetensors
    assert read_generator(tmp_path / "other.safetensors")[1] == options.model_copy(update=untold)


def test_records(tmp_path, capsys):
    options = NetworkOptions(size=32, latent=3, width=2, pixel_range=(0, 1), latent_dist="uniform")
    state = drawn(make_generator(options, "torch")).state_dict()
    path = tmp_path / "a.safetensors"
    about = {"options": options.model_dump_json(), "sha256": digest_of(state)}
    write_tensors(path, state, about)
    assert read_generator(path)[1] == options
    write_tensors(
        path,
        state,
        about | {"sha256": digest_of(state | {"last.weight": state["last.weight"] + 1})},
    )
    with pytest.raises(RunError, match="do not have their recorded SHA-256"):
        read_generator(path)
    wrong = options.model_dump(mode="json") | {"pixel_range": [0, 2]}
    write_tensors(path, state, {"options": json.dumps(wrong)})
    with pytest.raises(RunError, match=r"a.safetensors: pixel_range must be -1 1 or 0 1"):
        read_generator(path)
    write_tensors(path, state)
    config = tmp_path / "config.json"
    values = {"fastgan": "9.9", "new": 1, **options.model_dump(mode="json")}
    config.write_text(json.dumps(values))
    assert read_generator(path)[1] == options
    plain = options.model_copy(update={"pixel_range": (-1.0, 1.0), "latent_dist": "normal"})
    for text in ("{", "[1]", json.dumps({**values, "fastgan": 1} | {"fastgan": 2})[:-9], "null"):
        config.write_text(text)
        assert read_generator(path)[1] == plain
    config.write_text(json.dumps({k: v for k, v in values.items() if k != "fastgan"}))
    assert read_generator(path)[1] == plain  # somebody else's
    capsys.readouterr()
    config.write_text(json.dumps(values | {"latent": 4}))
    assert read_generator(path)[1] == plain
    said = capsys.readouterr().err
    assert f"{config} is of a dcgan generator (32 px, width 2, latent 4), and not of a" in said


def test_a_record_of_another_kind_of_network_does_not_count(tmp_path, capsys):
    options = NetworkOptions(arch="two-rate", latent=125, pixel_range=(0, 1))
    state = drawn(make_discriminator(options, "torch")).state_dict()
    write_tensors(tmp_path / "d.safetensors", state)
    (tmp_path / "config.json").write_text(
        json.dumps({"fastgan": "0.1.0", **NetworkOptions().model_dump(mode="json")})
    )
    assert read_discriminator(tmp_path / "d.safetensors")[1].arch == "two-rate"
    assert "it does not count" in capsys.readouterr().err


def test_a_variance_below_0_is_damage(tmp_path):
    state = drawn(make_generator(NetworkOptions(size=32, latent=3, width=2), "torch")).state_dict()
    state["blocks.0.norm.running_var"][1] = -1e-3
    write_tensors(tmp_path / "a.safetensors", state)
    with pytest.raises(RunError, match="a variance in them is below 0"):
        read_generator(tmp_path / "a.safetensors")


def refused(read, path, tensors):
    write_tensors(path, tensors)
    with pytest.raises(RunError) as error:
        read(path)
    return str(error.value)


def test_weights_of_something_else(tmp_path):
    path = tmp_path / "a.safetensors"
    options = NetworkOptions(size=32, latent=3, width=2)
    g = make_generator(options, "torch").state_dict()
    d = make_discriminator(options, "torch").state_dict()
    said = refused(read_generator, path, d)
    assert (
        said
        == f"weights {path} are of no generator: they are a dcgan discriminator (32 px, width 2)"
    )
    assert "of no discriminator: they are a dcgan generator (32 px, width 2, latent 3)" in refused(
        read_discriminator, path, g
    )
    fixed = NetworkOptions(arch="two-rate", latent=125, **FIXED)
    assert "they are a two-rate discriminator (64 px" in refused(
        read_generator, path, make_discriminator(fixed).state_dict()
    )
    other = make_generator(fixed, "torch").state_dict()
    assert "they are a two-rate generator (64 px" in refused(read_discriminator, path, other)
    first = next(iter(other))
    assert "of no generator that fastgan knows: for a two-rate generator" in refused(
        read_generator, path, other | {first: torch.zeros(5, 127, 4, 4)}
    )
    assert "no blocks.0.conv.weight and" in refused(read_generator, path, {"a": torch.zeros(1)})
    for name in g:
        left = {k: t for k, t in g.items() if k != name}
        if "num_batches" in name:
            write_tensors(path, left)
            assert read_generator(path)[0].keys() == g.keys()
            continue
        assert "of no generator that fastgan knows" in refused(read_generator, path, left)
        tensor = torch.zeros((*g[name].shape[:-1], g[name].shape[-1] + 1))
        assert "that fastgan knows" in refused(read_generator, path, g | {name: tensor})
    said = refused(read_generator, path, g | {"blocks.1.conv.weight": torch.zeros(8, 4, 4, 5)})
    assert "blocks.1.conv.weight is [8, 4, 4, 5] and not [8, 4, 4, 4]" in said
    assert "tensors that do not fit: more" in refused(
        read_generator, path, g | {"more": g["last.weight"][0, 0, 0]}
    )
    nan = g | {"last.weight": g["last.weight"] * torch.nan}
    assert "not all of them are finite" in refused(read_generator, path, nan)
    whole = {k: t.to(torch.int64) for k, t in g.items()}
    assert "weights are not floating-point" in refused(read_generator, path, whole)
    assert "those of d, without ema" in refused(
        read_generator, path, {f"d.{k}": t for k, t in d.items()}
    )


def test_shapes_that_lie_take_no_memory(tmp_path):
    """The second convolution would have 137 GB."""
    sides = {"blocks.0.conv": (1, 65536), "blocks.1.conv": (1, 1), "blocks.2.conv": (1, 1)}
    tensors = {f"{k}.weight": torch.zeros(*v, 4, 4) for k, v in sides.items()}
    tensors |= {
        "blocks.3.conv.weight": torch.zeros(1, 1, 4, 4),
        "blocks.4.conv.weight": torch.zeros(1, 1, 4, 4),
    }
    tensors["last.weight"] = torch.zeros(4096, 3, 4, 4)
    said = refused(read_generator, tmp_path / "a.safetensors", tensors)
    assert "tensors that do not fit: blocks.0.norm.bias" in said
    for number, count in enumerate((65536, 1, 1, 1, 1)):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"blocks.{number}.norm.{leaf}"] = torch.zeros(count)
    said = refused(read_generator, tmp_path / "a.safetensors", tensors)
    assert "blocks.1.conv.weight is [1, 1, 4, 4] and not [65536, 32768, 4, 4]" in said
