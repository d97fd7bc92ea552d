"""A generator as an ONNX file, made of plain operators, and compared with PyTorch.

    latents  float32 [batch, latent]            any batch
    images   float32 [batch, 3, size, size]     in the generator's pixel range

By torch.onnx's exporter over torch.export: the one over TorchScript, which does without onnxscript,
is deprecated since torch 2.9, traces Python's checks into warnings, and leaves the sizes of the
images unknown.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import NetworkOptions
from .durable import write_flushed
from .env import version_of
from .errors import RunError, UsageError, first_line
from .models import AnyGenerator, make_generator
from .optim import copy_into

OPSET = 18  # the oldest that the exporter writes without converting: onnxruntime 1.14 reads it
MAX_BYTES = 2**31 - 1  # of a protobuf message
BATCHES = (1, 5)  # that are compared
TOLERANCE = 1e-5  # of a pixel, whose range is 1 or 2; about 100 roundings of float32
# The exporter is told that the batch is at most this: with that, torch.export sees at once that the
# operators' checks of an index's size hold. The file is of any batch.
TRACED_BATCHES = 64


def require_onnx() -> None:
    """`UsageError` unless the packages that write the file are there."""
    lack = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if lack:
        raise UsageError(f"--format onnx needs {' and '.join(lack)}: pip install 'fastgan[export]'")


def write_onnx(
    path: Path, options: NetworkOptions, state: Mapping[str, Tensor], about: Mapping[str, str]
) -> str:
    """Write the generator of these weights, and return how it was compared, in words.

    Args:
        about: what the file says of itself.

    Raises:
        UsageError: it is too large for one.
        RunError: it does not compute what PyTorch does.
        OSError: it cannot be written.
    """
    size = sum(t.nbytes for t in state.values())
    if size >= MAX_BYTES:
        raise UsageError(
            f"--format onnx: {size:,} bytes of weights are more than one file holds (2 GiB)"
        )
    generator = make_generator(options, "torch")
    copy_into(generator.state_dict(), state, "the generator")
    model = _model(generator.eval().requires_grad_(False), about)
    content = model.SerializeToString(deterministic=True)
    compared = _compared(content, generator)
    write_flushed(path, content)
    return compared


def _model(generator: AnyGenerator, about: Mapping[str, str]) -> Any:
    """The checked ModelProto, without the exporter's notes, which hold paths of this machine."""
    onnx = importlib.import_module("onnx")
    batch = torch.export.Dim("batch", min=1, max=TRACED_BATCHES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.onnx.export(
                generator,
                (torch.zeros(2, generator.latent),),
                input_names=["latents"],
                output_names=["images"],
                dynamic_shapes=({0: batch},),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise RunError(
            f"--format onnx: torch {torch.__version__} with onnxscript {version_of('onnxscript')} "
            f"cannot export the generator: {first_line(error)}"
        ) from None
    assert program is not None
    model = program.model_proto
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
    for value in (*graph.value_info, *graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    for key, text in about.items():
        model.metadata_props.add(key=key, value=text)
    onnx.checker.check_model(model, full_check=True)
    return model


@torch.no_grad()
def _compared(content: bytes, generator: AnyGenerator) -> str:
    """How far the file's images are from PyTorch's in float64, as onnxruntime computes them;
    `RunError` where that is too far: over `TOLERANCE` and over four times what PyTorch itself is
    off in float32.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "not compared with PyTorch: pip install onnxruntime"
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    worst = 0.0
    for batch in BATCHES:
        latents = random.standard_normal((batch, generator.latent), dtype=np.float32)
        (images,) = session.run(["images"], {"latents": latents})
        narrow = generator.float()(torch.from_numpy(latents)).double()
        exact = generator.double()(torch.from_numpy(latents).double())
        apart = float((torch.from_numpy(images).double() - exact).abs().max())
        if not apart <= max(TOLERANCE, 4 * float((narrow - exact).abs().max())):
            raise RunError(
                f"--format onnx: at batch {batch} its images are {apart:.1e} from PyTorch's, more "
                f"than {TOLERANCE:.0e}: this pair of torch {torch.__version__} and onnxruntime "
                f"{version_of('onnxruntime')} cannot export it"
            )
        worst = max(worst, apart)
    generator.float()
    batches = " and ".join(map(str, BATCHES))
    return (
        f"within {worst:.1e} of PyTorch on random latents at batch {batches} (onnxruntime "
        f"{version_of('onnxruntime')})"
    )
