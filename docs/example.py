# %% [markdown]
# fastgan from Python: train, look, load, walk through the latents, measure, export. Each `# %%` is
# a cell in VS Code, PyCharm and, by jupytext, in Jupyter; `python docs/example.py` runs all of it,
# in a minute or two on two cores, and writes into the current folder.

# %%
from pathlib import Path

import torch

import fastgan
from fastgan.commands import ExportCommand
from fastgan.export import export
from fastgan.samples import grid, to_uint8

FACES = 2048  # drawn faces to learn from; a folder of photographs is data="FOLDER"
KIMG = 6  # thousands of images to show; 300 and more for faces worth looking at
WIDTH = 16
COUNT = 256  # images of each set to measure by; 10,000 for numbers to be compared

# %% [markdown]
# A run has the options of `fastgan train`. It is a folder, and its samples and curves are there.

# %%
run = fastgan.train(
    recipe="quickstart",  # small batches, and a D that learns more slowly than G
    data=f"faces:{FACES}",
    width=WIDTH,
    kimg=KIMG,
    grid=16,
    device="cpu",
    out="runs",
)
print(run, sorted(path.name for path in run.iterdir()))

# %% [markdown]
# Its averaged generator: latents [B, 100] to images [B, 3, 64, 64] in its pixel range.

# %%
generator = fastgan.load_generator(run)
random = torch.Generator().manual_seed(0)
images = generator(torch.randn(16, generator.latent, generator=random))
picture = grid(to_uint8(images, generator.pixel_range))
picture.save("faces.png")
picture  # noqa: B018 - a notebook shows it

# %% [markdown]
# From one face to another on the great circle between their latents, so that each on the way is as
# far from 0 as latents are.

# %%
start, end = torch.randn(2, generator.latent, generator=random)
angle = torch.arccos(torch.dot(start, end) / (start.norm() * end.norm()))
t = torch.linspace(0, 1, 8)[:, None]
walk = (torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end) / torch.sin(angle)
strip = grid(to_uint8(generator(walk), generator.pixel_range), columns=8)
strip.save("walk.png")
strip  # noqa: B018

# %% [markdown]
# How good they are, beside real images (the floor), an untrained generator and noise.

# %%
record = fastgan.evaluate(run, count=COUNT, metrics=("swd", "ms_ssim"), device="cpu")
for row in record["rows"]:
    print(f"{row['set']:40} SWD {row['swd']['mean']:7.2f}  MS-SSIM {row['ms_ssim']:.3f}")

# %% [markdown]
# A folder to take away: weights, a model card, samples. It loads as a run does.

# %%
folder = export(ExportCommand(what=str(run), out=Path("exported")))
again = fastgan.load_generator(folder)
assert torch.equal(again(walk), generator(walk))
print(sorted(path.name for path in folder.iterdir()))
