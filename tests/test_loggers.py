"""The same scalars and grids for TensorBoard."""

import json
import sys

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastgan.cli import main

FLAGS = ["--data=faces:64", "--size=32", "--width=4", "--batch=8", "--latent=8", "--grid=4"]
FLAGS += ["--device=cpu", "--logger=tensorboard"]


def events(run):
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_a_run_writes_scalars_and_grids_and_goes_on_with_them(tmp_path):
    assert main(["train", *FLAGS, f"--out={tmp_path}", "--kimg=0.064", "--tick-kimg=0.016"]) == 0
    (run,) = tmp_path.glob("0*")
    assert main(["train", f"--resume={run}", "--kimg=0.096"]) == 0
    rows = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    found = events(run)
    losses = found.Scalars("d_loss")
    assert [e.step for e in losses] == [round(1000 * row["kimg"]) for row in rows]
    np.testing.assert_allclose([e.value for e in losses], [row["d_loss"] for row in rows], 1e-6)
    grids = sorted((run / "samples").glob("fake-*.png"))
    assert len(found.Images("samples")) >= len(grids) > 1
    last = found.Images("samples")[-1]
    assert (last.width, last.height) == Image.open(grids[-1]).size


def test_without_the_package_it_says_what_to_install_before_a_run_is_made(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", *FLAGS, f"--out={tmp_path / 'runs'}", "--kimg=0.016"]) == 2
    said = capsys.readouterr().err
    assert "--logger tensorboard needs the package tensorboard (" in said
    assert "pip install 'fastgan[tensorboard]'" in said and not (tmp_path / "runs").exists()
