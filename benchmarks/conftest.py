"""The machine's ceilings once, every row into the record of its file, and the tables at the end."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from fastgan.env import environment, machine_line

RESULTS = Path(__file__).parent / "results"
RECORDS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
CEILINGS = pytest.StashKey[dict[str, float]]()
MACHINE = pytest.StashKey[str]()
SKIPPED = (
    "not measured, for lack of an NVIDIA GPU: the Triton kernels, bfloat16 and float16, large "
    "batches, CUDA graphs, shares of the ceilings; nothing is recorded"
)


def pytest_addoption(parser):
    parser.addoption(
        "--records", default=str(RESULTS), help="folder of the records that a GPU's figures go to"
    )
    parser.addoption(
        "--scale",
        type=float,
        default=1.0,
        help="how many times as many files the data path is measured on; below 1 only to try it: "
        "nothing is recorded",
    )


def pytest_configure(config):
    # who is cut off by a time limit still shows the tables so far
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # profiles of CUDA graphs, several in one process
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    config.stash[RECORDS] = {}
    config.stash[CEILINGS] = {}
    folder = Path(config.getoption("records"))
    try:  # before anything is measured
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise pytest.UsageError(f"--records {folder} cannot be written: {error.strerror}") from None


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.timeout(0))  # the tests' limit is not for measuring


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def copy_gbps(device, pytestconfig):
    """GB/s of a copy on the GPU, read and written; None on a CPU."""
    if device.type == "cuda":
        pytestconfig.stash[CEILINGS]["copy_gbps"] = harness.copy_gbps(device)
    return pytestconfig.stash[CEILINGS].get("copy_gbps")


@pytest.fixture(scope="session")
def matmul_tflops(device, pytestconfig):
    """TFLOP/s of a large bfloat16 matrix product on the GPU; None on a CPU."""
    if device.type == "cuda":
        pytestconfig.stash[CEILINGS]["matmul_tflops"] = harness.matmul_tflops(device)
    return pytestconfig.stash[CEILINGS].get("matmul_tflops")


@pytest.fixture(scope="session")
def machine(device, pytestconfig):
    """What the record says of where it was made."""
    found = environment(device)
    tree = f"{found['commit']}{'' if found['clean'] else ', changed'}"
    pytestconfig.stash[MACHINE] = f"{machine_line(device)}, torch {found['torch']}, commit {tree}"
    return found


@pytest.fixture(scope="session")
def scale(pytestconfig):
    return pytestconfig.getoption("scale")


@pytest.fixture
def compile_anew(monkeypatch):
    """torch.compile without what earlier tests compiled, and room for networks of many kinds in the
    same functions.

    Nor with AOTAutograd's cache, here and in processes that are started: torch 2.11 finds the code
    of bfloat16 in it for autocast to float16 (pytorch #181564).
    """
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
    with (
        torch._dynamo.config.patch(recompile_limit=100),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture
def record_rows(request, pytestconfig, device, machine, copy_gbps, matmul_tflops):
    """A function that takes a test's rows into the record NAME.json, instead of those that it gave
    before; a GPU's are written at once, so that a run which is cut short keeps what it has.
    """

    def take(name: str, rows: list[dict[str, Any]]) -> None:
        test, records = request.node.name, pytestconfig.stash[RECORDS]
        taken = [row for row in records.get(name, []) if row["test"] != test]
        taken += [{"test": test, **row} for row in rows]
        records[name] = taken
        if device.type != "cuda" or pytestconfig.getoption("scale") < 1:
            return
        content = {
            "date": time.strftime("%Y-%m-%d"),
            "environment": machine,
            **pytestconfig.stash[CEILINGS],
            "rows": taken,
        }
        folder = re.sub(r"\W+", "-", machine["gpu"]).lower()
        harness.write_record(
            Path(pytestconfig.getoption("records")) / folder / f"{name}.json", content
        )

    return take


def pytest_terminal_summary(terminalreporter, config):
    for name, rows in config.stash[RECORDS].items():
        terminalreporter.section(name)
        for line in table(rows):
            terminalreporter.write_line(line)
    if MACHINE in config.stash:
        terminalreporter.write_line(config.stash[MACHINE])
    if ceilings := config.stash[CEILINGS]:
        terminalreporter.write_line(", ".join(f"{k} {v:,.0f}" for k, v in ceilings.items()))
    elif config.stash[RECORDS]:
        terminalreporter.write_line(SKIPPED)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows in aligned columns; numbers with four digits, nothing for None."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "test"))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    texts = {c for c in columns if any(isinstance(row.get(c), str) for row in rows)}
    return [
        "  ".join(
            cell.ljust(width) if column in texts else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in cells
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
