"""Options, recipes and their round trip through TOML."""

import datetime
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastgan.config import (
    BASES,
    SIZES,
    TrainConfig,
    config_from,
    differences,
    load_recipe,
    recipe_names,
    split_size,
    to_plain,
    to_toml,
)
from fastgan.errors import UsageError

positive = st.floats(1e-6, 1e6)
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
paths = text.filter(lambda t: not t.startswith("~")).map(Path)  # not somebody's home
configs = st.builds(
    TrainConfig,
    data=text,
    size=st.sampled_from(SIZES),
    batch=st.integers(2, 65536),
    epochs=st.none() | positive,
    amp=st.booleans(),
    kernels=st.sampled_from(["auto", "triton", "torch"]),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    seed=st.integers(0, 2**63 - 1),
    pixel_range=st.sampled_from([(-1.0, 1.0), (0.0, 1.0)]),
    lr_g=st.floats(1e-9, 10),
    beta1=st.floats(0, 1, exclude_max=True),
    out=paths,
    cache=st.none() | paths,
    tick_kimg=st.none() | positive,
)


@given(configs)
def test_toml_reads_back_to_the_same(config):
    assert config_from(tomllib.loads(to_toml(config)), "") == config


@pytest.mark.parametrize("size", SIZES)
def test_sizes_split_into_a_base_and_doublings(size):
    base, doublings = split_size(size)
    assert base in BASES and base << doublings == size


@pytest.mark.parametrize(
    ("size", "near"),
    [(100, "96, 112"), (31, "32, 40"), (500, "224, 256"), (65, "56, 64"), (-4, "32, 40")],
)
def test_another_size_names_the_nearest_two(size, near):
    with pytest.raises(ValidationError, match=rf"nearest: {near}\), got {size}"):
        TrainConfig(size=size)


def test_the_length_is_kimg_or_epochs():
    assert TrainConfig().kimg == 1000 and TrainConfig().epochs is None
    assert TrainConfig(epochs=3).kimg is None
    with pytest.raises(ValidationError, match="only one may be given: got kimg 2 and epochs 3"):
        TrainConfig(kimg=2, epochs=3)


TOGETHER = [
    (
        {"arch": "two-rate"},
        "arch two-rate has latent 125 and no other, got 100; the recipe two-rate64",
    ),
    ({"arch": "two-rate-autoencoder", "latent": 12288}, "pixel_range 0 1 and no other, got -1 1"),
    ({"loss": "hinge", "label_smoothing": 0.1}, "does not go with loss hinge"),
    ({"noise_kimg": 10}, "noise_kimg needs instance_noise"),
    ({"r1": 1, "sync_bn": True}, "r1 does not go with sync_bn"),
    ({"tick_kimg": 1, "tick_epochs": 1}, "give one of them"),
]


@pytest.mark.parametrize(("values", "said"), TOGETHER, ids=[said for _, said in TOGETHER])
def test_options_that_do_not_go_together(values, said):
    with pytest.raises(ValidationError, match=said):
        TrainConfig(**values)


def test_r1_goes_with_sync_bn_where_d_has_no_batch_norm():
    assert TrainConfig(r1=1, sync_bn=True, spectral_norm=True).r1 == 1


WRONG = [
    ({"batch": "many"}, "batch must be a valid integer, got 'many'"),
    ({"batch": "128"}, "batch must be a valid integer"),  # text that looks like a number is text
    ({"batch": 0}, "batch must be greater than or equal to 2, got 0"),
    ({"amp": 1}, "amp must be a valid boolean, got 1"),
    ({"szie": 64}, "unknown key 'szie'; did you mean size?"),
    ({"kimg": 1, "epochs": 1}, "kimg and epochs are two ways.*only one may be given"),
    ({"size": 100}, r"size must be 4, 5, 6 or 7 times a power of two.*got 100"),
    ({"pixel_range": [0, 2]}, "pixel_range must be -1 1 or 0 1, got 0 2"),
    ({"pixel_range": [0]}, "pixel_range"),
    ({"device": "gpu"}, "device must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
    ({"data": ""}, "data must not be empty"),
    ({"out": "a\0b"}, "out must not hold a NUL"),
    ({"lr_g": float("nan")}, "lr_g must be"),
    ({"data": datetime.date(2020, 1, 1)}, r"data must be a valid string, got \{'date'"),
    ({"pixel_range": [0, 1, 2]}, "pixel_range must have at most 2 items"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_recipe_values_name_key_rule_and_value(values, message):
    with pytest.raises(UsageError, match=f"^my.toml: {message}"):
        config_from(values, "my.toml: ")


def test_every_wrong_key_is_told_at_once():
    with pytest.raises(UsageError) as caught:
        config_from({"batch": 1, "width": 0, "foo": 1}, "")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name):
    assert isinstance(load_recipe(name), TrainConfig)


def test_a_missing_recipe_names_the_closest():
    with pytest.raises(
        UsageError, match="one of celeba112.*quickstart.*got 'quikstart'; did you mean quickst"
    ):
        load_recipe("quikstart")


def test_a_recipe_file_that_is_not_toml(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("batch = = 3")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_recipe(str(path))
    for endless in ("batch = " + "9" * 5000, "batch = " + "[" * 20_000):
        path.write_text(endless)
        with pytest.raises(UsageError, match="not valid TOML"):
            load_recipe(str(path))
    path.write_bytes(b"\xef\xbb\xbfbatch = 8")  # as some editors save
    assert load_recipe(str(path)).batch == 8
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        load_recipe(str(path))


def test_differences_and_plain_values():
    a, b = TrainConfig(batch=64), TrainConfig(epochs=2)
    assert differences(a, b) == {
        "batch": (64, 128),
        "kimg": (1000.0, None),
        "epochs": (None, 2.0),
    }
    assert config_from(to_plain(b), "") == b


def test_the_home_directory_is_meant_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = TrainConfig(out="~/runs", cache="~/sets")
    assert (config.out, config.cache) == (Path("/home/somebody/runs"), Path("/home/somebody/sets"))
    with pytest.raises(ValidationError, match="home directory that is not known: ~nobody-here"):
        TrainConfig(out="~nobody-here/runs")
