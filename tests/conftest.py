"""One seed for every test, caches in a folder of their own, `gpu` tests skipped where there is
none.
"""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Decoded sets of a test session never meet the user's."""
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
