"""The machine's ceiling once, every row into one record, and a table at the end."""

from __future__ import annotations

import re
import time
from pathlib import Path

import harness
import pytest
import torch

from fastgan.env import environment

RESULTS = Path(__file__).parent / "results"
ROWS = pytest.StashKey[list[harness.Row]]()
COPY = pytest.StashKey[float | None]()
SKIPPED = (
    "not measured, for lack of an NVIDIA GPU: the Triton kernels, batches 128 and 1024, bfloat16 "
    "and float16, torch.compile, CUDA graphs, share of the copy bandwidth; nothing is recorded"
)


def pytest_addoption(parser):
    parser.addoption(
        "--records", default=str(RESULTS), help="folder of the records that a GPU's figures go to"
    )


def pytest_configure(config):
    config.stash[ROWS] = []
    config.stash[COPY] = None


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_gbps(device, pytestconfig):
    """GB/s of a copy on the GPU; None on a CPU."""
    if device.type == "cuda":
        pytestconfig.stash[COPY] = harness.copy_gbps(device)
    return pytestconfig.stash[COPY]


@pytest.fixture(scope="session")
def machine(device):
    """What the record says of where it was made."""
    return environment(device)


@pytest.fixture
def record(pytestconfig, device, machine, copy_gbps):
    """A function that takes the rows of a test into the record; a GPU's are written at once, so
    that a run which is cut short keeps what it has.
    """
    rows = pytestconfig.stash[ROWS]

    def take(more):
        rows.extend(more)
        if device.type != "cuda":
            return
        name = re.sub(r"\W+", "-", machine["gpu"]).lower()
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "environment": machine,
            "copy_gbps": copy_gbps,
            "rows": [row.__dict__ for row in rows],
        }
        path = Path(pytestconfig.getoption("records")) / name / "kernels.json"
        harness.write_record(path, content)

    return take


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    write = terminalreporter.write_line
    copy = config.stash[COPY]
    terminalreporter.section("ms a call: median (10% .. 90%), GB/s, share of a copy, error")
    for r in rows:
        share = f"{r.share_of_copy:6.1%}" if r.share_of_copy is not None else "      "
        write(
            f"{r.op:<10} {r.case:<20} {r.dtype:<5} {r.variant:<26} {r.ms:9.4f} "
            f"({r.low_ms:.4f} .. {r.high_ms:.4f}) {r.gbps:8.1f} {share} {r.error:.1e}"
        )
    write(f"a copy: {copy:,.0f} GB/s" if copy else SKIPPED)
