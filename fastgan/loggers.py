"""What `--logger` adds to a run's own files: the same scalars and grids for a viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import UsageError, first_line

FOLDER = "tensorboard"  # in the run's
SCALARS = ("d_loss", "g_loss", "d_real", "d_fake", "img_per_s", "gpu_memory_bytes", "diversity")


def check_logger(name: str) -> None:
    """Before a run is made or opened: whether `--logger` can do its work.

    Raises:
        UsageError: the package tensorboard is not installed.
    """
    if name != "tensorboard":
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--logger tensorboard needs the package tensorboard ({first_line(error)}): pip "
            "install 'fastgan[tensorboard]'"
        ) from None


class TensorBoard:
    """Event files in RUN/tensorboard, over images seen; what a run that goes on writes again
    replaces what was there beyond its checkpoint.
    """

    def __init__(self, run: Path, images: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / FOLDER), purge_step=images + 1)

    def tick(self, row: dict[str, Any]) -> None:
        """A line of statistics."""
        for name in SCALARS:
            if row.get(name) is not None:
                self._writer.add_scalar(name, row[name], round(1000 * row["kimg"]))

    def picture(self, name: str, picture: Image.Image, images: int) -> None:
        """A grid after so many images."""
        pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(name, pixels, images, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
