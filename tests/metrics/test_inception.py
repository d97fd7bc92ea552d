"""Inception's metrics: the features are torch-fidelity's own, the numbers are their definitions
written out, and a file of weights is not looked into before its digest is known to be right.

No weights are at hand here: those of the tests are drawn.
"""

import hashlib
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import nn
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from fastgan.errors import RunError, UsageError
from fastgan.metrics import inception as module
from fastgan.metrics.inception import (
    MISSING,
    NAMES,
    SHA256,
    URL,
    Features,
    Inception,
    density_coverage,
    find,
    hub_folder,
    scores,
)


def draw(network):
    """Weights that keep signals as large as they are, and batch norms that do something."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()
            for tensor, low, high in (
                (layer.running_mean, -0.3, 0.3),
                (layer.running_var, 0.5, 2),
                (layer.weight.data, 0.8, 1.2),
                (layer.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high)
    network.fc.bias.data.normal_()
    return network.state_dict()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A file as the true one is: of torch before 1.6, and without counts of batches."""
    torch.manual_seed(0)
    tensors = draw(module._network().to_empty(device="cpu"))
    kept = OrderedDict((k, v) for k, v in tensors.items() if "num_batches" not in k)
    path = tmp_path_factory.mktemp("hub") / NAMES[0]
    torch.save(kept, path, _use_new_zipfile_serialization=False)
    yield path
    path.unlink()  # 96 MB


@pytest.fixture(scope="module")
def digest(drawn):
    return hashlib.sha256(drawn.read_bytes()).hexdigest()


@pytest.fixture
def weights(drawn, digest, monkeypatch):
    """The file, taken to be the true one."""
    monkeypatch.setattr(module, "SHA256", digest)
    return drawn


def pictures(count, height, width):
    """uint8 [count, height, width, 3], of different colours and contrast."""
    random = np.random.default_rng(1)
    middle, contrast = random.uniform(40, 216, (count, 1, 1, 3)), random.uniform(0, 40, (count,))
    noise = random.standard_normal((count, height, width, 3))
    return (middle + contrast[:, None, None, None] * noise).clip(0, 255).astype(np.uint8)


# The network.


def test_features_are_torch_fidelitys(weights, monkeypatch):
    images = pictures(10, 37, 53)  # no side is even
    monkeypatch.setattr(module, "BATCH_CPU", 4)
    before, done = torch.get_rng_state(), []
    found = Inception(weights).features(images, done.append)
    assert torch.equal(torch.get_rng_state(), before) and done == [4, 8, 10]
    theirs = create_feature_extractor(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        cuda=False,
        feature_extractor_weights_path=weights,
        verbose=False,
    )

    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, i):
            return torch.from_numpy(images[i]).permute(2, 0, 1)

    wanted = get_featuresdict_from_dataset(Images(), theirs, 10, False, True, False)
    for ours, name in ((found.pool, "2048"), (found.logits, "logits_unbiased")):
        other = wanted[name].numpy()
        assert ours.dtype == np.float32 and ours.shape == other.shape
        assert other.std(0).mean() > 0.01  # images differ by far more than what is allowed
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def seen(network, images):
    """float32 [N, 3, 299, 299] that reaches the first convolution; the rest is not run."""

    class Stop(Exception):
        pass

    def stop(layer, inputs):
        kept.append(inputs[0])
        raise Stop

    kept = []
    hook = network._network.Conv2d_1a_3x3.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        network.features(images)
    hook.remove()
    return kept[0].numpy()


def test_images_are_resized_as_tensorflow_1_did_and_in_any_memory_layout(weights, tmp_path):
    network = Inception(weights)
    for height, width in ((5, 7), (64, 64), (299, 299), (400, 311)):
        images = pictures(2, height, width)
        y, x = np.arange(299) * height / 299, np.arange(299) * width / 299
        top, left = y.astype(int), x.astype(int)
        below, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
        down, across = (y - top)[:, None, None], (x - left)[:, None]
        wanted = (
            (1 - down) * (1 - across) * images[:, top][:, :, left]
            + (1 - down) * across * images[:, top][:, :, right]
            + down * (1 - across) * images[:, below][:, :, left]
            + down * across * images[:, below][:, :, right]
        )
        found = seen(network, images)
        np.testing.assert_allclose(found.transpose(0, 2, 3, 1), (wanted - 128) / 128, atol=1e-4)
        np.save(tmp_path / "images.npy", images)
        planes = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
        backward = np.ascontiguousarray(images[:, :, ::-1])[:, :, ::-1]
        for same in (planes, np.asfortranarray(images), mapped, backward):
            assert np.array_equal(seen(network, same), found)


def test_bytes_alone_are_taken(weights):
    """What is not rounded yet is refused, of real as of generated images."""
    network = Inception(weights)
    for wrong in (pictures(2, 8, 8) / 255, pictures(2, 8, 8)[..., :1], pictures(0, 8, 8)):
        with pytest.raises(ValueError, match=r"Inception.features: images must be"):
            network.features(wrong)


@pytest.mark.gpu
def test_a_gpu_computes_in_float32(weights):
    images = pictures(4, 64, 64)
    here, there = (Inception(weights, device).features(images) for device in ("cpu", "cuda"))
    # TF32 would be off by 1e-3
    np.testing.assert_allclose(there.pool, here.pool, atol=1e-4 * here.pool.max())


# The file.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder of torch hub's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    hub_folder().mkdir(parents=True)
    return hub_folder()


@pytest.fixture
def right(monkeypatch):
    """What the file's bytes are taken to be."""
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"right").hexdigest())
    return b"right"


@pytest.mark.parametrize(
    "given",
    [
        {"HOME": "/a"},
        {"HOME": "/a", "XDG_CACHE_HOME": "/b"},
        {"HOME": "/a", "XDG_CACHE_HOME": "/b", "TORCH_HOME": "/c"},
        {"HOME": "/a", "TORCH_HOME": "~/d"},
    ],
)
def test_the_folder_is_torch_hubs(given, monkeypatch):
    for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert hub_folder() == Path(torch.hub.get_dir()) / "checkpoints"


def test_without_a_file_there_is_a_line_on_how_to_get_it(hub):
    assert find(None) is None
    assert "\n" not in MISSING
    for part in (URL, SHA256, "--inception FILE", "hub/checkpoints", "fid", "coverage"):
        assert part in MISSING
    assert NAMES[0] in URL and SHA256[:8] in NAMES[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_found_under_both_names(name, hub, right):
    (hub / name).write_bytes(right)
    assert find(None) == hub / name


def test_the_named_file_goes_first(hub, right, tmp_path):
    (hub / NAMES[0]).write_bytes(right)
    (tmp_path / "mine.pth").write_bytes(right)
    assert find(tmp_path / "mine.pth") == tmp_path / "mine.pth"
    (tmp_path / "mine.pth").write_bytes(b"wrong")
    with pytest.raises(UsageError) as error:  # and not the hub's instead
        find(tmp_path / "mine.pth")
    said = str(error.value)
    for part in ("--inception: ", "mine.pth", URL, module.SHA256, hashlib.sha256(b"wrong")):
        assert (part if isinstance(part, str) else part.hexdigest()) in said
    assert "\n" not in said


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("none.pth", "No such file"), ("", "not a regular"), ("pipe", "not a reg")):
        with pytest.raises(UsageError, match=f"--inception: .*{name} cannot be read: {why}"):
            find(tmp_path / name)
    with pytest.raises(UsageError, match="cannot be read: .*null"):
        find(Path("a\0b"))


def test_a_wrong_file_in_the_hubs_folder_is_passed_over(hub, right, capsys):
    (hub / NAMES[0]).write_bytes(right[:-1])  # a download that was cut short
    assert find(None) is None
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {hub / NAMES[0]} is not ") and said.endswith("passed over")
    (hub / NAMES[1]).write_bytes(right)
    assert find(None) == hub / NAMES[1]


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.makedirs, (self.marker,)


@pytest.mark.parametrize("digest_is_right", [False, True])
@pytest.mark.parametrize("by", ["torch", "zip", "pickle"])
def test_a_crafted_file_runs_nothing(by, digest_is_right, hub, tmp_path, monkeypatch, capsys):
    marker, path = tmp_path / "marker", hub / NAMES[0]
    if by == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save({"a": Bomb(marker)}, path, _use_new_zipfile_serialization=by == "zip")
    if digest_is_right:  # if SHA-256 were broken
        monkeypatch.setattr(module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        assert find(None) == path
        with pytest.raises(RunError, match=NAMES[0]):
            Inception(path)
    else:
        monkeypatch.setattr(module, "read_weights", lambda path: pytest.fail("it is read"))
        assert find(None) is None and "passed over" in capsys.readouterr().err
        for careful in (find, Inception):
            with pytest.raises(UsageError, match=SHA256):
                careful(path)
    assert not marker.exists()


def test_without_torch_fidelity_an_error_says_what_to_install(hub, right, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "torch_fidelity":
            monkeypatch.setitem(sys.modules, name, None)
    (hub / NAMES[0]).write_bytes(right)
    path, some = find(None), normal(10)
    for needs in (lambda: Inception(path), lambda: scores(some, some)):
        with pytest.raises(RunError, match=r"pip install 'fastgan\[metrics\]'"):
            needs()


# The numbers.


def normal(count, wide=16, seed=0, shift=0.0):
    """Features of images that are not there."""
    random = np.random.default_rng(seed)
    pool = random.standard_normal((count, wide), np.float32) + np.float32(shift)
    return Features(pool, random.standard_normal((count, 20), np.float32))


REAL, FAKE = normal(60, seed=1), normal(50, seed=2, shift=0.5)


class Pixels(FeatureExtractorBase):
    """Takes small images for their own features."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return "2048", "logits_unbiased"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits_unbiased" if metric == "isc" else "2048"

    def forward(self, images):
        flat = images.flatten(1).float() / 64
        parts = {"2048": flat, "logits_unbiased": flat[:, :20].square()}
        return tuple(parts[name] for name in self.features_list)


def test_all_numbers_are_what_torch_fidelity_says_of_the_same_features(monkeypatch):
    """Its own entry, with its defaults but for the number of KID's subsets: 100 take seconds."""
    assert DEFAULTS["kid_subsets"] == module.SUBSETS
    monkeypatch.setattr(module, "SUBSETS", 3)
    register_feature_extractor("pixels", Pixels)
    random = np.random.default_rng(3)
    sets = [random.integers(0, high, (1010, 3, 4, 4), np.uint8) for high in (256, 240)]
    real, fake = (torch.from_numpy(images) for images in sets)

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, i):
            return self.images[i]

    wanted = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        feature_extractor="pixels",
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subsets=3,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    extractor = Pixels("pixels", ["2048", "logits_unbiased"])
    ours, theirs = (Features(*(f.numpy() for f in extractor(images))) for images in (real, fake))
    found = scores(ours, theirs)
    names = {
        "fid": torch_fidelity.KEY_METRIC_FID,
        "kid": torch_fidelity.KEY_METRIC_KID_MEAN,
        "kid_std": torch_fidelity.KEY_METRIC_KID_STD,
        "is": torch_fidelity.KEY_METRIC_ISC_MEAN,
        "is_std": torch_fidelity.KEY_METRIC_ISC_STD,
    }
    assert {name: found[name] for name in names} == {n: wanted[key] for n, key in names.items()}
    # its distances are computed in other pieces: one image may be on the other side of a ball
    for name in ("precision", "recall"):
        assert 0.2 < found[name] < 0.98
        assert found[name] == pytest.approx(wanted[name], abs=1.5 / 1010)
    assert list(found) == [*names, "precision", "recall", "density", "coverage"]


def test_fid_of_the_same_set_is_0():
    assert scores(REAL, REAL)["fid"] == pytest.approx(0, abs=1e-6)


def test_fid_of_gaussians():
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), of sets that have these m and S exactly."""
    random = np.random.default_rng(5)
    means, roots, sets = [], [], []
    for count in (300, 400):
        mean = random.standard_normal(8)
        root = random.standard_normal((8, 8))
        root = root @ root.T  # symmetric, and positive
        plain = random.standard_normal((count, 8))
        plain -= plain.mean(0)
        plain = plain @ np.linalg.inv(np.linalg.cholesky(np.cov(plain, rowvar=False))).T
        pool = (plain @ root + mean).astype(np.float32)
        means.append(mean)
        roots.append(root)
        sets.append(Features(pool, np.zeros((count, 20), np.float32)))
    values, vectors = np.linalg.eigh(roots[0] @ roots[1] @ roots[1] @ roots[0])
    cross = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    wanted = np.square(means[0] - means[1]).sum()
    wanted += np.trace(roots[0] @ roots[0] + roots[1] @ roots[1] - 2 * cross)
    assert scores(*sets)["fid"] == pytest.approx(wanted, rel=1e-5)


def test_kid_is_the_unbiased_estimate_of_subsets_by_the_seed(monkeypatch):
    monkeypatch.setattr(module, "SUBSETS", 4)
    monkeypatch.setattr(module, "SUBSET", 30)

    def kernel(a, b):
        return (a.astype(float) @ b.T.astype(float) / a.shape[1] + 1) ** 3

    def others(k):
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    random, each = np.random.RandomState(7), []
    for _ in range(4):
        x = FAKE.pool[random.choice(50, 30, replace=False)]
        y = REAL.pool[random.choice(60, 30, replace=False)]
        each.append(others(kernel(x, x)) + others(kernel(y, y)) - 2 * kernel(x, y).mean())
    found = scores(REAL, FAKE, seed=7)
    assert found["kid"] == pytest.approx(np.mean(each), rel=1e-3)
    assert found["kid_std"] == pytest.approx(np.std(each), rel=1e-3)
    assert scores(REAL, FAKE, seed=7) == found != scores(REAL, FAKE, seed=8)


def test_kid_is_left_out_of_small_sets(monkeypatch):
    monkeypatch.setattr(module, "SUBSET", 50)
    assert "kid" in scores(REAL, FAKE)
    monkeypatch.setattr(module, "SUBSET", 51)
    assert not {"kid", "kid_std"} & scores(REAL, FAKE).keys()


def test_the_inception_score_is_of_ten_parts_of_the_generated_set():
    """As many as there are classes where each image is surely of one and all are as frequent; 1
    where all images are the same.
    """
    sure = Features(REAL.pool[:40], np.tile(50 * np.eye(4, dtype=np.float32), (10, 1)))
    order = np.random.RandomState(2020).permutation(40)
    wanted = []
    for part in order.reshape(10, 4) % 4:  # the classes of each part
        shares = np.bincount(part, minlength=4) / 4
        wanted.append(np.exp(-sum(p * np.log(p) for p in shares if p)))
    found = scores(FAKE, sure)
    assert found["is"] == pytest.approx(np.mean(wanted), rel=1e-6)
    assert found["is_std"] == pytest.approx(np.std(wanted), rel=1e-6)
    same = Features(sure.pool, np.ones_like(sure.logits))
    assert scores(FAKE, same)["is"] == pytest.approx(1, abs=1e-9)


def radius(points, i, k):
    """The distance to the kth neighbour among the others."""
    return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]


def test_precision_and_recall_written_out():
    real, fake = REAL.pool.astype(float), FAKE.pool.astype(float)

    def share(points, centres):
        radii = [radius(centres, i, 3) for i in range(len(centres))]
        balls = list(zip(centres, radii, strict=True))
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in balls) for p in points])

    found = scores(REAL, FAKE)
    assert found["precision"] == pytest.approx(share(fake, real), abs=1e-6)
    assert found["recall"] == pytest.approx(share(real, fake), abs=1e-6)
    assert 0.1 < found["precision"] < 0.9 and found["precision"] != found["recall"]


@pytest.mark.parametrize("rows", [1000, 7])
@pytest.mark.parametrize("far", [0, 1000])  # and the same wherever the origin is
def test_density_and_coverage_written_out(rows, far, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    real, fake = REAL.pool.astype(float), FAKE.pool.astype(float)
    inside = [
        [np.linalg.norm(x - y) < radius(real, i, 5) for y in fake] for i, x in enumerate(real)
    ]
    wanted = np.sum(inside) / (5 * len(fake)), np.mean(np.any(inside, axis=1))
    found = density_coverage(REAL.pool + np.float32(far), FAKE.pool + np.float32(far))
    assert found == pytest.approx(wanted, abs=1e-9)
    assert 0.05 < wanted[0] < 0.95 and 0.05 < wanted[1] < 0.95


def test_an_image_on_the_edge_of_a_ball_is_not_in_it():
    """Of density and coverage, as of their authors' code; it is of precision and recall, as of
    torch-fidelity's.
    """
    real = np.arange(0, 60, 10, dtype=np.float32)[:, None]  # the fifth neighbour of 0 is 50 away
    edge, inner = np.full((10, 1), -50, np.float32), np.full((10, 1), -49, np.float32)
    assert density_coverage(real, edge) == (0, 0)
    assert density_coverage(real, inner) == pytest.approx((1 / 5, 1 / 6))
    logits = np.zeros((10, 20), np.float32)
    line = np.arange(0, 100, 10)[:, None] * np.float32([1, 0])  # the third neighbour is 30 away
    for place, share in ((-30, 1), (-31, 0)):
        there = Features(np.tile(np.float32([place, 0]), (10, 1)), logits)
        assert scores(Features(line, logits), there)["precision"] == share


def test_two_sets_of_the_same_kind_and_one_that_is_not():
    """Density and coverage of as many images of the same kind: 1, and 1 - 1/2^5."""
    density, coverage = density_coverage(normal(1500, 8, 1).pool, normal(1500, 8, 2).pool)
    assert density == pytest.approx(1, abs=0.05) and coverage == pytest.approx(0.97, abs=0.02)
    other = scores(REAL, normal(50, shift=9))
    for name in ("precision", "recall", "density", "coverage"):
        assert other[name] == 0
    assert other["fid"] > 16 * 81 * 0.9


@pytest.mark.parametrize(
    ("real", "fake", "says"),
    [
        (normal(9), FAKE, "scores: real must be 10 images or more, got 9"),
        (REAL, normal(20, 15), "scores: fake must have 16 features an image .* got 15"),
        (
            Features(REAL.pool, FAKE.logits),
            FAKE,
            r"scores: real must be \[N, 2048\] and \[N, 1008\], got \[\[60, 16\], \[50, 20\]\]",
        ),
    ],
)
def test_other_features_are_refused(real, fake, says):
    with pytest.raises(ValueError, match=says):
        scores(real, fake)
