"""The recipes: what each is made of, counted by hand, and that each trains.

Figures of a trained generator are not here: each recipe's comment has the commands for them.
"""

import json
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources

import pytest
import torch

from fastgan import checkpoint
from fastgan.config import TrainConfig, config_from, load_recipe, recipe_names, to_plain, to_toml
from fastgan.models import init_weights, make_discriminator, make_generator
from fastgan.trainer import train

NAMES = [
    "celeba112",
    "celeba64-subset",
    "ffhq64",
    "quickstart",
    "speed",
    "stable64",
    "tutorial64",
    "two-rate64",
    "two-rate64-autoencoder",
]
# Layer by layer: weights, then biases, then weights and biases of batch norms.
TUTORIAL = (
    100 * 512 * 16 + 512 * 256 * 16 + 256 * 128 * 16 + 128 * 64 * 16 + 64 * 3 * 16
    + 2 * (512 + 256 + 128 + 64),
    3 * 64 * 16 + 64 * 128 * 16 + 128 * 256 * 16 + 256 * 512 * 16 + 512 * 16
    + 2 * (128 + 256 + 512),
)  # fmt: skip
HALF = (
    100 * 256 * 16 + 256 * 128 * 16 + 128 * 64 * 16 + 64 * 32 * 16 + 32 * 3 * 16
    + 2 * (256 + 128 + 64 + 32),
    3 * 32 * 16 + 32 * 64 * 16 + 64 * 128 * 16 + 128 * 256 * 16 + 256 * 16
    + 2 * (64 + 128 + 256),
)  # fmt: skip
SEVEN = (  # from maps of 7x7
    100 * 512 * 49 + 512 * 256 * 16 + 256 * 128 * 16 + 128 * 64 * 16 + 64 * 3 * 16
    + 2 * (512 + 256 + 128 + 64),
    3 * 64 * 16 + 64 * 128 * 16 + 128 * 256 * 16 + 256 * 512 * 16 + 512 * 49
    + 2 * (128 + 256 + 512),
)  # fmt: skip
SMALL_D = (
    3 * 32 * 49 + 32 * 64 * 25 + 64 * 128 * 9 + 128 * 256 * 9 + 256 * 4 * 4
    + 32 + 64 + 128 + 256 + 1
)  # fmt: skip
TWO_RATE = (
    5 * 128 * 16 + 128 * 64 * 9 + 64 * 32 * 16 + 32 * 16 * 16 + 16 * 3 * 4
    + 128 + 64 + 32 + 16 + 3
    + 2 * (128 + 64 + 32),
    SMALL_D,
)  # fmt: skip
AUTOENCODER = (
    3 * 64 * 9 + 64 * 128 * 25 + 128 * 256 * 49 + 256 * 64 * 9 + 64 * 3 * 9
    + 64 + 128 + 256 + 64 + 3,
    SMALL_D,
)  # fmt: skip
COUNTS = dict.fromkeys(NAMES, TUTORIAL) | {
    "quickstart": HALF,
    "celeba112": SEVEN,
    "two-rate64": TWO_RATE,
    "two-rate64-autoencoder": AUTOENCODER,
}


def text_of(name):
    return (resources.files("fastgan") / "recipes" / f"{name}.toml").read_text("utf-8")


def test_these_are_all():
    assert recipe_names() == NAMES
    assert [TUTORIAL, TWO_RATE] == [(3_576_704, 2_765_568), (125_811, 429_121)]
    assert AUTOENCODER[0] == 1_961_859


@pytest.mark.parametrize("name", NAMES)
def test_each_reads_back_and_says_where_it_is_from_and_how_it_is_measured(name):
    config, text = load_recipe(name), text_of(name)
    assert config_from(tomllib.loads(to_toml(config)), "") == config
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 100
    if name != "quickstart":  # which is what `fastgan train` does
        assert f"fastgan train --recipe {name} --data" in text
    for verb in re.findall(r"^#   fastgan (\w+)", text, re.MULTILINE):
        assert verb in ("train", "evaluate", "animate")


@pytest.mark.parametrize("name", NAMES)
def test_networks_have_as_many_parameters_as_counted_by_hand(name):
    config = load_recipe(name)
    with torch.device("meta"):
        networks = make_generator(config), make_discriminator(config)
    counts = tuple(sum(p.numel() for p in network.parameters()) for network in networks)
    assert counts == COUNTS[name]


OF_TUTORIAL = {"arch": "dcgan", "size": 64, "latent": 100, "width": 64, "batch": 128, "seed": 999}
OF_TUTORIAL |= {"loss": "non-saturating", "latent_dist": "normal", "pixel_range": (-1, 1)}
OF_TUTORIAL |= {"lr_g": 2e-4, "lr_d": 2e-4, "beta1": 0.5, "beta2": 0.999, "ema_kimg": 0, "keep": 1}
OF_TUTORIAL |= {"crop": "center", "r1": 0, "diffaug": (), "spectral_norm": False, "flip": False}
OF_TWO_RATE = {
    "size": 64,
    "pixel_range": (0, 1),
    "crop": "140x140",
    "loss": "minimax",
    "ema_kimg": 0,
}
OF_TWO_RATE |= {"lr_g": 1e-3, "lr_d": 1e-5, "beta1": 0.9, "beta2": 0.999, "keep": 0.25}
SUBSET = {"limit": 50000, "holdout": 0.1, "tick_epochs": 1}
UNIFORM = {"size": 112, "latent_dist": "uniform", "lr_d": 4e-5, "batch": 64, "epochs": 20}
PUBLISHED = {  # what each text says, and what is settled of the rest
    "tutorial64": OF_TUTORIAL | {"epochs": 5},
    "ffhq64": OF_TUTORIAL | {"ema_kimg": 10, "kimg": 3000},
    "celeba64-subset": OF_TUTORIAL | SUBSET,
    "two-rate64": OF_TWO_RATE | {"arch": "two-rate", "latent": 125},
    "two-rate64-autoencoder": OF_TWO_RATE | {"arch": "two-rate-autoencoder", "latent": 12288},
    "celeba112": OF_TUTORIAL | UNIFORM,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_of_the_published_systems(name):
    config, expected = load_recipe(name), PUBLISHED[name]
    assert {key: getattr(config, key) for key in expected} == expected


@dataclass
class Made:
    """A run of a recipe on drawn faces, in two steps."""

    config: TrainConfig
    model: dict
    rows: list = field(default_factory=list)


def run(name, tmp_path, steps=2, **changes):
    """A recipe trained for so many steps on a CPU, as it is but for what would take long."""
    recipe = to_plain(load_recipe(name))
    for length in ("kimg", "epochs", "save_kimg"):
        recipe.pop(length, None)
    batch = 4 if name == "two-rate64-autoencoder" else 8
    recipe |= {"data": "faces:64", "crop": "center", "batch": batch, "grid": 4, "device": "cpu"}
    recipe |= {
        "amp": False,
        "compile": False,
        "kernels": "torch",
        "out": str(tmp_path),
        "sample_kimg": 1,
    }
    if recipe["arch"] == "dcgan":
        recipe["width"] = 8
    if not changes.get("epochs"):
        recipe["kimg"] = steps * batch / 1000
    config = config_from(recipe | changes, "")
    folders = []
    assert train(config, began=folders.append) == 0
    assert json.loads((folders[0] / "run.json").read_text())["status"] == "done"
    rows = (folders[0] / "stats.jsonl").read_text().splitlines()
    model = checkpoint.newest(folders[0]).tensors("model")
    return Made(config, model, [json.loads(row) for row in rows])


def first_weights(config):
    random = torch.Generator().manual_seed(config.seed)
    networks = {"g": make_generator(config), "d": make_discriminator(config)}
    for network in networks.values():
        init_weights(network, random)
    return {
        f"{side}.{name}": p.detach()
        for side, network in networks.items()
        for name, p in network.named_parameters()
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_moves_both_networks_at_its_rates(name, tmp_path):
    """Adam's first step is the rate itself for every weight, and a second one is no longer."""
    steps = 1 if name == "two-rate64-autoencoder" else 2
    made = run(name, tmp_path, steps)
    moved = {"g": 0.0, "d": 0.0}
    for key, first in first_weights(made.config).items():
        assert made.model[key].isfinite().all(), key
        moved[key[0]] = max(moved[key[0]], float((made.model[key] - first).abs().max()))
    for side, rate in (("g", made.config.lr_g), ("d", made.config.lr_d)):
        # of weights about 1, whose last bit is 1.2e-7: 2% of the lowest rate
        assert 0.5 * rate < moved[side] < steps * rate * 1.05
    for row in made.rows:
        assert 0 < row["d_real"] < 1 and 0 < row["d_fake"] < 1
        assert torch.tensor([row["d_loss"], row["g_loss"]]).isfinite().all()


def test_without_an_average_the_generator_is_what_it_is(tmp_path):
    """But for a last bit: the average moves by the whole difference, a + (p - a)."""

    def apart(name):
        model = run(name, tmp_path, 3).model
        own = [key for key in model if key.startswith("g.")]
        return max(float((model[k] - model[f"ema.{k[2:]}"]).abs().max()) for k in own)

    assert apart("tutorial64") < 1e-9  # of differences below 0.01
    assert apart("speed") > 1e-6


def test_the_subset_has_a_line_of_losses_after_every_epoch_and_a_test_set(tmp_path):
    made = run("celeba64-subset", tmp_path, epochs=3, width=4)
    epochs = [row["epoch"] for row in made.rows]
    images = made.rows[-1]["kimg"] * 1000 / epochs[-1]
    assert 45 < images < 64  # of 64, with a tenth held out
    # a line comes with the first step in which an epoch has ended
    assert len(epochs) == 3
    assert all(n <= epoch < n + 8 / images for n, epoch in enumerate(epochs, 1))
