"""Train the eager reference as long as a run of fastgan, on the same images: what its pictures and
its wall time are compared with.

    python benchmarks/train_reference.py DATA OUT [--kimg 500] [--size 64] [--batch 128]
                                         [--width 64] [--seed 999]

The tutorial's loop as it is (`fastgan/reference.py`: float32, convolutions in TF32 on a GPU, five
numbers read back a step), fed from images on the device in fastgan's order, so that nothing waits
for a decoder. OUT gets, every 100 kimg, G's weights (g-000100.safetensors, convolutions in float16)
and run.json: images, seconds of the loop, GPU memory, losses of each mark.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from fastgan.config import TrainConfig, config_from  # noqa: E402
from fastgan.data.loader import open_data, open_feed  # noqa: E402
from fastgan.env import environment  # noqa: E402
from fastgan.reference import Reference  # noqa: E402
from fastgan_kernels import gather_u8  # noqa: E402

MARK_KIMG = 100


def train(config: TrainConfig, out: Path) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    feed, _ = open_feed(open_data(config), config, device)
    reference = Reference(
        config.size, config.latent, config.width, lr=config.lr_g, seed=config.seed, device=device
    )
    marks: list[dict[str, Any]] = []
    images, seconds = 0, 0.0
    steps = int((config.kimg or 0) * 1000 / config.batch)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        batch = feed.next()
        real = gather_u8(*batch, dtype=torch.float32, impl="torch")
        stats = reference.step(real.contiguous())
        images += config.batch
        if images % (MARK_KIMG * 1000) < config.batch or step == steps:
            seconds += time.perf_counter() - began
            memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
            mark = {"kimg": images / 1000, "seconds": seconds, "peak_bytes": memory}
            marks.append(mark | stats._asdict())
            save_file(
                {k: halved(v) for k, v in reference.netG.state_dict().items()},
                out / f"g-{round(images / 1000):06d}.safetensors",
            )
            content = {"environment": environment(device), "batch": config.batch, "marks": marks}
            (out / "run.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
            print(
                f"{images / 1000:8.1f} kimg  {images / seconds:10,.0f} img/s  {stats}", flush=True
            )
            began = time.perf_counter()
    feed.close()


def halved(t: torch.Tensor) -> torch.Tensor:
    """A convolution's weight in float16, all else as it is."""
    return (t.half() if t.dim() == 4 else t).cpu().contiguous()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--kimg", type=float, default=500)
    for name, default in (("size", 64), ("batch", 128), ("width", 64), ("seed", 999)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = vars(parser.parse_args())
    out: Path = args.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    train(config_from(args, "--"), out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
