"""The import ladder: a module imports only modules on rungs below its own."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNGS = [
    ["fastgan_kernels._launch", "fastgan_kernels._once", "fastgan_kernels.bn_act_plain"],
    ["fastgan_kernels.adam_ema", "fastgan_kernels.bn_act_kernels", "fastgan_kernels.gather_u8"],
    ["fastgan_kernels.conv4x4_kernels", "fastgan_kernels.guard", "fastgan_kernels.tally"],
    ["fastgan_kernels.adam", "fastgan_kernels.bn_act", "fastgan_kernels.conv4x4"],
    ["fastgan_kernels.batch_norm_act"],
    ["fastgan_kernels"],
    ["fastgan"],
    ["fastgan.errors", "fastgan.framing", "fastgan.lock"],
    ["fastgan.console", "fastgan.durable", "fastgan.paths", "fastgan.signals", "fastgan.config"],
    ["fastgan.commands"],
    ["fastgan.compiling", "fastgan.env", "fastgan.formats"],
    ["fastgan.films", "fastgan.latents", "fastgan.modes", "fastgan.png_files"],
    ["fastgan.data", "fastgan.data.face_factors", "fastgan.data.face_paint"],
    ["fastgan.data.image_file", "fastgan.data.faces"],
    ["fastgan.data.png_decoder", "fastgan.data.routes", "fastgan.data.subset"],
    ["fastgan.data.archive", "fastgan.data.pillow_decoder", "fastgan.data.face_files"],
    ["fastgan.data.images", "fastgan.data.dali_decoder"],
    ["fastgan.data.decode"],
    ["fastgan.data.worker"],
    ["fastgan.data.process"],
    ["fastgan.data.cache", "fastgan.data.pool", "fastgan.data.wanted"],
    ["fastgan.data.place"],
    ["fastgan.data.build"],
    ["fastgan.data.prepare", "fastgan.data.on_the_fly", "fastgan.data.feed"],
    ["fastgan.data.stream"],
    ["fastgan.data.loader"],
    ["fastgan.models.dcgan", "fastgan.models.spectral", "fastgan.models.two_rate"],
    ["fastgan.models.sn_dcgan"],
    ["fastgan.models.choice"],
    ["fastgan.models"],
    ["fastgan.distributed", "fastgan.graph", "fastgan.losses"],
    ["fastgan.augment", "fastgan.penalty"],
    ["fastgan.sight"],
    ["fastgan.packing", "fastgan.precision", "fastgan.reference"],
    ["fastgan.optim"],
    ["fastgan.health"],
    ["fastgan.step"],
    ["fastgan.loggers", "fastgan.tensor_file", "fastgan.weights", "fastgan.watch"],
    ["fastgan.stats", "fastgan.checkpoint", "fastgan.layouts"],
    ["fastgan.runlog", "fastgan.saving", "fastgan.state"],
    ["fastgan.resume", "fastgan.warm_start"],
    ["fastgan.generators"],
    ["fastgan.samples"],
    ["fastgan.charts", "fastgan.interpolate", "fastgan.run_files", "fastgan.thumbnails"],
    ["fastgan.animate", "fastgan.report_metrics"],
    ["fastgan.report"],
    ["fastgan.recorder"],
    ["fastgan.metrics", "fastgan.metrics.images"],
    ["fastgan.metrics.c2st", "fastgan.metrics.ms_ssim", "fastgan.metrics.swd"],
    ["fastgan.metrics.inception"],
    ["fastgan.metrics.baselines", "fastgan.metrics.nearest", "fastgan.metrics.records"],
    ["fastgan.metrics.sources", "fastgan.metrics.table"],
    ["fastgan.metrics.plan", "fastgan.metrics.rows"],
    ["fastgan.metrics.evaluate"],
    ["fastgan.card", "fastgan.onnx_file"],
    ["fastgan.export"],
    ["fastgan.evaluations"],
    ["fastgan.trainer"],
    ["fastgan.api"],
    ["fastgan.cli"],
    ["fastgan.__main__"],
]
RUNG = {name: height for height, names in enumerate(RUNGS) for name in names}
OWN = {"fastgan", "fastgan_kernels", "benchmarks", "tools", "tests"}


def modules():
    for base in (ROOT / "fastgan", ROOT / "kernels" / "fastgan_kernels"):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported(path, name):
    """Every module of ours that a file imports, at its top or inside a function; not what it names
    for a type checker alone.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = ".".join(filter(None, [above, base]))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in RUNG else base  # a module, or a name inside one


def test_every_module_is_on_the_ladder():
    assert sorted(RUNG) == sorted(name for name, _ in modules())


def test_imports_only_go_down_the_ladder():
    wrong = [
        f"{name} imports {target}"
        for name, path in modules()
        for target in imported(path, name)
        if target.split(".")[0] in OWN and RUNG.get(target, len(RUNGS)) >= RUNG[name]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_watch_sees_a_wrong_import(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "def f():\n    from ..trainer import train\n    from . import cache\n"
        "if TYPE_CHECKING:\n    from .. import step\nelse:\n    from ..state import State\n"
    )
    seen = set(imported(path, "fastgan.data.wrong"))
    assert seen == {"fastgan.trainer", "fastgan.data.cache", "fastgan.state"}


def test_kernels_never_import_fastgan():
    for name, path in modules():
        if name.startswith("fastgan_kernels"):
            tops = {target.split(".")[0] for target in imported(path, name)}
            ours = {"torch", "triton", "fastgan_kernels"}
            assert not (tops - ours - sys.stdlib_module_names), name


def test_the_reference_shares_no_code_with_the_fast_path():
    path = ROOT / "fastgan" / "reference.py"
    tops = {target.split(".")[0] for target in imported(path, "fastgan.reference")}
    assert tops == {"__future__", "typing", "torch"}


def test_kernels_folder_is_not_a_package():
    """PyPI's `kernels` owns that import name: ours would overwrite it on install."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
