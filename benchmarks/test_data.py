"""From files to a resident set: `fastgan prepare` beside an epoch of torchvision's ImageFolder with
DataLoader on all cores, which decodes anew in every epoch.

    pytest benchmarks --benchmark-only -k data
"""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
import torch
from harness import summary
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastgan.data.decode import open_decoder
from fastgan.data.faces import draw_faces
from fastgan.data.prepare import prepare
from fastgan.env import cores

GPU = torch.cuda.is_available()
EDGE, COUNT, SIZE = (1024, 512, 64) if GPU else (256, 24, 64)
FORMATS = {"PNG": (".png", {}), "JPEG": (".jpg", {"quality": 95})}
ROUNDS = 3
LIMIT = 1.0  # levels, on average, between the two ways to the same pixels


@pytest.fixture(scope="module")
def pictures():
    """A few faces, written again and again under other names: decoders keep nothing of them."""
    return [Image.fromarray(face) for face in draw_faces(8, EDGE)]


@pytest.mark.parametrize("form", FORMATS)
def test_data(form, pictures, record_rows, benchmark, tmp_path):
    """Images a second, from files in the page cache to uint8 [N, 64, 64, 3]."""
    suffix, options = FORMATS[form]
    folder = tmp_path / "images"
    (folder / "faces").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / "faces" / f"{i:06d}{suffix}", **options)
    for i in range(len(pictures), COUNT):
        name = f"{i % len(pictures):06d}{suffix}"
        shutil.copy(folder / "faces" / name, folder / "faces" / f"{i:06d}{suffix}")
    crop = v2.Compose([v2.PILToTensor(), v2.Resize(SIZE, antialias=True), v2.CenterCrop(SIZE)])

    def ours() -> np.ndarray:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return prepare(str(folder), SIZE, out=tmp_path / "cache").images

    def theirs() -> np.ndarray:
        loader = DataLoader(ImageFolder(folder, crop), 64, num_workers=cores())
        batches = [images for images, _ in loader]
        return torch.cat(batches).permute(0, 2, 3, 1).numpy()

    ways = {"fastgan prepare": ours, "ImageFolder, DataLoader": theirs}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, np.ndarray] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begin = time.perf_counter()
            found[name] = way()
            times[name].append(1000 * (time.perf_counter() - begin) / COUNT)
    got, expected = (np.asarray(images, np.float64) for images in found.values())
    error = float(np.abs(got - expected).mean())
    assert got.shape == (COUNT, SIZE, SIZE, 3) and error <= LIMIT, f"{error:.2f} levels apart"
    decoders = {"fastgan prepare": open_decoder(SIZE).name, "ImageFolder, DataLoader": "pillow"}
    rows = []
    for name, measured in times.items():
        t = summary(measured)
        of = {"case": f"{form} {EDGE} px", "variant": name, "decoder": decoders[name]}
        rows.append({**of, "ms": t.ms, "img_per_s": 1000 / t.ms, "cores": cores(), "error": error})
    record_rows("data", rows)
    benchmark.extra_info |= {row["variant"]: row["img_per_s"] for row in rows}
    benchmark.pedantic(ours, rounds=1)
