"""One seed for every test, and caches in a folder of their own."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Decoded sets of a test session never meet the user's."""
    monkeypatch.setenv("FASTGAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
