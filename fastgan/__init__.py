"""fastgan: DCGAN-family face generators, trained at the speed of the card.

run = fastgan.train(data="photos", kimg=1000)       as `fastgan train`
record = fastgan.evaluate(run)                      as `fastgan evaluate`
generator = fastgan.load_generator(run)             latents [B, latent] to images
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for a type checker and an editor: `import fastgan` imports no torch
    from .api import train as train
    from .config import TrainConfig as TrainConfig
    from .generators import load_generator as load_generator
    from .metrics.evaluate import evaluate as evaluate
    from .models import Discriminator as Discriminator
    from .models import Generator as Generator

__version__ = "0.1.0"
HOMES: dict[str, Callable[[], ModuleType]] = {
    "Discriminator": lambda: import_module("fastgan.models"),
    "Generator": lambda: import_module("fastgan.models"),
    "TrainConfig": lambda: import_module("fastgan.config"),
    "evaluate": lambda: import_module("fastgan.metrics.evaluate"),
    "load_generator": lambda: import_module("fastgan.generators"),
    "train": lambda: import_module("fastgan.api"),
}
__all__ = [
    "Discriminator",
    "Generator",
    "TrainConfig",
    "__version__",
    "evaluate",
    "load_generator",
    "train",
]


def __getattr__(name: str) -> Any:
    """What is in `HOMES`, with which torch is imported."""
    if name in HOMES:
        return getattr(HOMES[name](), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
