"""fastgan: DCGAN-family face generators, trained at the speed of the card."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate"]


def __getattr__(name: str) -> Any:
    """`fastgan.evaluate`, with which torch is imported."""
    if name == "evaluate":
        return importlib.import_module("fastgan.metrics.evaluate").evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
