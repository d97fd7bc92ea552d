"""FID, KID, Inception score, precision, recall, density and coverage: what the Inception network of
2015 makes of two sets of images, as torch-fidelity computes it.

Those numbers are defined by one file of weights, which the user brings: nothing is downloaded. Its
SHA-256 is checked before anything looks into it, and it is then read as any stranger's weights are
(`read_weights`). torch-fidelity's own loader does neither: it unpickles whatever it is given, and
downloads where it is given nothing; so its network is put together here, and filled here.

All is float32, and TF32 is off: that bf16 leaves the third digit alone is not shown yet.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ..console import warn
from ..data.image_file import open_regular
from ..errors import RunError, UsageError, first_line
from ..weights import read_weights
from .images import checked

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# torch-fidelity's name of the file, and pytorch-fid's
NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{NAMES[0]}"

READ_BYTES = 1 << 20
BATCH_CPU, BATCH_GPU = 16, 64  # images a pass: on a CPU 64 are no faster and take 700 MB more
FEWEST = 10  # images of each set: the Inception score is the mean of ten parts
SUBSETS, SUBSET = 100, 1000  # of KID, and images in each
NEAREST_PR = 3  # neighbours that make a ball: precision and recall (Kynkaanniemi et al. 2019)
NEAREST_DC = 5  # and density and coverage (Naeem et al. 2020)
ROWS = 1000  # whose distances to all others are held at a time


def hub_folder() -> Path:
    """Where torch.hub, and so torch-fidelity and pytorch-fid, keep weights that they downloaded."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(os.path.expanduser(home), "hub", "checkpoints")


DOWNLOAD = (
    "fid, kid, is, precision, recall, density and coverage need Inception's weights: download "
    f"{URL} (96 MB, SHA-256 {SHA256}) into {hub_folder()}"
)
MISSING = f"{DOWNLOAD}, or name the file by --inception FILE"
NO_KID = f"kid is left out: it is of subsets of {SUBSET:,} images, and the sets are smaller"


def find(named: Path | None) -> Path | None:
    """The file of weights, its digest checked: the one that is named, else torch hub's; None where
    there is none, and `MISSING` says what to do.

    A wrong file in the hub's folder is warned of and passed over. It may be another program's
    download that was cut short, and nobody asked for it here: all other metrics do without.

    Raises:
        UsageError: the named file is missing or another one.
    """
    if named is not None:
        if fault := _fault(named):
            raise UsageError(f"--inception: {fault}")
        return named
    for path in (hub_folder() / name for name in NAMES):
        if os.path.lexists(path):
            if not (fault := _fault(path)):
                return path
            warn(f"{fault}; passed over")
    return None


def _fault(path: Path) -> str | None:
    """What is wrong with a file of weights, of which nothing but the digest is looked at."""
    try:
        digest = hashlib.sha256()
        with open_regular(path) as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
    if digest.hexdigest() == SHA256:
        return None
    return (
        f"{path} is not the Inception network that FID is defined by: its SHA-256 is "
        f"{digest.hexdigest()}, not {SHA256}; that is the file of {URL}"
    )


@contextmanager
def _extra() -> Iterator[None]:
    """Around the imports of torch-fidelity: it takes seconds, and not everybody has it."""
    try:
        yield
    except ImportError as error:
        raise RunError(
            "Inception's metrics need torch-fidelity 0.4: pip install 'fastgan[metrics]' "
            f"({first_line(error)})"
        ) from error


def require_library(flag: str) -> None:
    """`UsageError` unless torch-fidelity is there; `flag` asks for it."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UsageError(f"{flag} inception needs torch-fidelity: pip install 'fastgan[metrics]'")


@dataclass(frozen=True)
class Features:
    """What the network makes of N images.

    Attributes:
        pool: float32 [N, 2048], its last layer but one, averaged over the image.
        logits: float32 [N, 1008], of the classes, without the bias, as the Inception score has it.
    """

    pool: np.ndarray
    logits: np.ndarray


class Inception:
    """The network with its weights, in evaluation mode."""

    def __init__(self, path: Path, device: str | torch.device = "cpu") -> None:
        """Check the digest of a file, and read it.

        Raises:
            UsageError: there is no such file, or it is another one.
            RunError: torch-fidelity is missing.
        """
        network = _network()
        if fault := _fault(path):
            raise UsageError(f"Inception's weights: {fault}")
        network.load_state_dict(read_weights(path), assign=True)
        self._device = torch.device(device)
        if self._device.type == "cpu":
            network.to(memory_format=torch.channels_last)  # two thirds of the time
        self._network = network.to(self._device).requires_grad_(False).eval()

    def features(
        self, images: ArrayLike, progress: Callable[[int], object] | None = None
    ) -> Features:
        """The features of images, resized to 299 px as TensorFlow 1 did: bilinear, not antialiased,
        corner on corner.

        Args:
            images: uint8 [N, H, W, 3], real or generated, of any size. A memory map is read a batch
                at a time. 0.07 s an image on two CPU cores.
            progress: called with the count of images done, after each batch.

        Raises:
            ValueError: of another type or shape.
        """
        array = checked(images, "Inception.features: images", 1, 1)
        batch = BATCH_CPU if self._device.type == "cpu" else BATCH_GPU
        pool = np.empty((len(array), 2048), np.float32)
        logits = np.empty((len(array), 1008), np.float32)
        for start in range(0, len(array), batch):
            part = slice(start, start + batch)
            pixels = torch.from_numpy(np.array(array[part], order="C")).to(self._device)
            for out, found in zip((pool, logits), self._pass(pixels), strict=True):
                out[part] = found.cpu().numpy()
            if progress is not None:
                progress(min(start + batch, len(array)))
        return Features(pool, logits)

    @torch.no_grad()
    def _pass(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self._network(pixels.permute(0, 3, 1, 2))


def _network() -> nn.Module:
    """torch-fidelity's network, whose `forward` is used, without weights and without its own
    constructor, which reads or downloads them.
    """
    with _extra():
        from torch_fidelity.feature_extractor_base import FeatureExtractorBase
        from torch_fidelity.feature_extractor_inceptionv3 import (
            BasicConv2d,
            FeatureExtractorInceptionV3,
            InceptionA,
            InceptionB,
            InceptionC,
            InceptionD,
            InceptionE_1,
            InceptionE_2,
        )
    network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    FeatureExtractorBase.__init__(network, "inception-v3-compat", ["2048", "logits_unbiased"])
    network.feature_extractor_internal_dtype = torch.float32
    with torch.device("meta"):  # nothing is drawn for weights that are replaced
        layers = {
            "Conv2d_1a_3x3": BasicConv2d(3, 32, kernel_size=3, stride=2),
            "Conv2d_2a_3x3": BasicConv2d(32, 32, kernel_size=3),
            "Conv2d_2b_3x3": BasicConv2d(32, 64, kernel_size=3, padding=1),
            "MaxPool_1": nn.MaxPool2d(kernel_size=3, stride=2),
            "Conv2d_3b_1x1": BasicConv2d(64, 80, kernel_size=1),
            "Conv2d_4a_3x3": BasicConv2d(80, 192, kernel_size=3),
            "MaxPool_2": nn.MaxPool2d(kernel_size=3, stride=2),
            "Mixed_5b": InceptionA(192, pool_features=32),
            "Mixed_5c": InceptionA(256, pool_features=64),
            "Mixed_5d": InceptionA(288, pool_features=64),
            "Mixed_6a": InceptionB(288),
            "Mixed_6b": InceptionC(768, channels_7x7=128),
            "Mixed_6c": InceptionC(768, channels_7x7=160),
            "Mixed_6d": InceptionC(768, channels_7x7=160),
            "Mixed_6e": InceptionC(768, channels_7x7=192),
            "Mixed_7a": InceptionD(768),
            "Mixed_7b": InceptionE_1(1280),
            "Mixed_7c": InceptionE_2(2048),
            "AvgPool": nn.AdaptiveAvgPool2d(1),
            "fc": nn.Linear(2048, 1008),
        }
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network


def scores(real: Features, fake: Features, *, seed: int = 2020) -> dict[str, float]:
    """How generated images compare with real ones, by name:

    - `fid` (Heusel et al. 2017, arXiv:1706.08500): 0 is alike. It is larger of fewer images;
      published numbers are of 50,000 or 10,000. Of any count it takes 5 to 25 s on two cores.
    - `kid` and `kid_std` (Binkowski et al. 2018, arXiv:1801.01401): mean and deviation over 100
      subsets of 1,000 images; 0 is alike, of any count, and a little below it is no mistake.
      Left out where a set has fewer (`NO_KID`).
    - `is` and `is_std` (Salimans et al. 2016, arXiv:1606.03498): of the generated images alone, in
      ten parts; more is better, for ImageNet's classes, of which faces are none.
    - `precision` and `recall` (Kynkaanniemi et al. 2019, arXiv:1904.06991): the share of each set
      that is no farther from an image of the other than that one's third neighbour in its own set.
    - `density` and `coverage`: see `density_coverage`.

    All but the last are torch-fidelity's, to the bit, the generated set as its first input.

    Args:
        real, fake: of 10 images or more each; as many of both, or recall and coverage mean little.
        seed: of KID's subsets and the parts of the Inception score; torch-fidelity's is 2020.

    Raises:
        ValueError: of another shape.
        RunError: torch-fidelity is missing.
    """
    with _extra():
        from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc
    _check(real, "real")
    _check(fake, "fake")
    if fake.pool.shape[1] != real.pool.shape[1]:
        raise ValueError(
            f"scores: fake must have {real.pool.shape[1]:,} features an image as real has, got "
            f"{fake.pool.shape[1]:,}"
        )
    both = [torch.tensor(features.pool, dtype=torch.float32) for features in (fake, real)]
    given = {
        "verbose": False,
        "rng_seed": seed,
        "kid_subsets": SUBSETS,
        "kid_subset_size": SUBSET,
        "prc_neighborhood": NEAREST_PR,
        # a piece of the matrix of distances at a time: whole, it takes 10 GB for 50,000 images
        "save_cpu_ram": True,
        "prc_batch_size": ROWS,
    }
    statistics = map(metric_fid.fid_features_to_statistics, both)
    found = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
    if min(map(len, both)) >= SUBSET:
        found |= metric_kid.kid_features_to_metric(*both, **given)
    found |= metric_isc.isc_features_to_metric(torch.tensor(fake.logits), rng_seed=seed)
    found |= metric_prc.prc_features_to_metric(*both, **given)
    names = {
        "fid": metric_fid.KEY_METRIC_FID,
        "kid": metric_kid.KEY_METRIC_KID_MEAN,
        "kid_std": metric_kid.KEY_METRIC_KID_STD,
        "is": metric_isc.KEY_METRIC_ISC_MEAN,
        "is_std": metric_isc.KEY_METRIC_ISC_STD,
        "precision": metric_prc.KEY_METRIC_PRECISION,
        "recall": metric_prc.KEY_METRIC_RECALL,
    }
    result = {name: float(found[theirs]) for name, theirs in names.items() if theirs in found}
    result["density"], result["coverage"] = density_coverage(real.pool, fake.pool)
    return result


def _check(features: Features, name: str) -> None:
    shapes = [list(part.shape) for part in (features.pool, features.logits)]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0]:
        raise ValueError(f"scores: {name} must be [N, 2048] and [N, 1008], got {shapes}")
    if shapes[0][0] < FEWEST:
        raise ValueError(f"scores: {name} must be {FEWEST} images or more, got {shapes[0][0]}")


def density_coverage(real: np.ndarray, fake: np.ndarray) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797), of balls around each real image
    that end before its fifth neighbour among the real ones.

    Density is how many balls hold a generated image, in the mean, over five: 1 of real images, and
    more where the generated ones crowd. Coverage is the share of balls that hold one or more: 0.97
    of as many real images.

    Args:
        real, fake: float32 [N, D] and [M, D], N more than 5.
    """
    # distances of small differences of large numbers would be less precise
    middle = real.mean(0)
    ours, theirs = torch.tensor(real - middle), torch.tensor(fake - middle)
    inside, held = 0, 0
    for some in ours.split(ROWS):
        # the first neighbour is the image itself
        radius = torch.cdist(some, ours).kthvalue(NEAREST_DC + 1, dim=1, keepdim=True).values
        within = torch.cdist(some, theirs) < radius
        inside += int(within.sum())
        held += int(within.any(dim=1).sum())
    return inside / (NEAREST_DC * len(theirs)), held / len(ours)
