"""`fastgan report`: a run as one page of HTML that needs nothing beside it, neither files nor a
network.

It is made of what is in the run folder alone; a piece that is missing or damaged is a line in it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from . import __version__
from .charts import CHARTS, DISTANCES, svg
from .config import TrainConfig, flag_of, recorded_config, to_plain
from .durable import replace_file
from .errors import RunError, UsageError
from .paths import picture_file
from .report_metrics import evaluation, in_table
from .run_files import RunFiles, one_line, read_run
from .thumbnails import Thumbnail, spread, thumbnails

NAME = "report.html"
SUFFIXES = (".html", ".htm")
MAX_BYTES = 5_000_000  # of a page, which then can be sent by mail
NEIGHBOURS_BYTES = 500_000  # of them for the picture of the nearest neighbours
EMBEDDED_ROWS = 2000  # ticks in the page's JSON at most
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # what HTML has no place for


def report(path: Path, out: Path | None = None) -> Path:
    """Write the page of a run, by default as report.html in it, and return where it is.

    Raises:
        UsageError: RUN is no run folder, or --out no place for a page.
        RunError: it cannot be written.
    """
    run = read_run(path)
    target = run.path / NAME if out is None else picture_file(out, SUFFIXES, "--out")
    content = page(run)
    try:
        replace_file(target, content)
    except OSError as error:
        raise RunError(
            f"{target} cannot be written ({error.strerror or error}); --out names another place"
        ) from None
    return target


def page(run: RunFiles) -> bytes:
    """The page of a run, at most `MAX_BYTES`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastgan", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    script = environment.get_template("report.js").render()
    values = {
        "run": run,
        "title": run.path.name,
        "line": one_line(run),
        "style": Markup(environment.get_template("report.css").render()),
        "script": Markup(script),
        # the one script that may run, whatever a run's files hold
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "charts": _charts(run),
        "evaluations": [evaluation(record, run.path.name) for record in reversed(run.records)],
        "evaluate": f"fastgan evaluate {shlex.quote(str(run.path))}",
        "command": _command(run),
        "config": _config(run),
        "environment": {key: in_table(value, key) for key, value in run.environment.items()},
        "numbers": _numbers(run),
        "version": __version__,
        "frames": [],
        "real": None,
        "neighbours": None,
    }
    spare = MAX_BYTES - len(_encoded(template.render(values))) - (1 << 16)  # the pictures' tags
    values |= _pictures(run, max(spare, 0))
    content = _encoded(template.render(values))
    if len(content) > MAX_BYTES:
        raise RunError(
            f"the report of {run.path} would be {len(content):,} bytes: its files are too large"
        )
    return content


def _charts(run: RunFiles) -> list[tuple[str, Markup]]:
    """Titles and drawings."""
    curves = [(chart, run.rows) for chart in CHARTS]
    if len(run.distances) > 1:  # of one the table says it all
        curves.append((DISTANCES, run.distances))
    return [(c.title, Markup(drawn)) for c, rows in curves if (drawn := svg(c, rows))]


def _encoded(text: str) -> bytes:
    return CONTROL.sub("\ufffd", text).encode(errors="backslashreplace")


def _pictures(run: RunFiles, spare_bytes: int) -> dict[str, Any]:
    """The grids over time, the real images and the nearest neighbours, within so many bytes."""
    neighbours: Thumbnail | None = None
    if path := run.picture("nearest.png"):
        (neighbours,), faults = thumbnails([path], min(NEIGHBOURS_BYTES, spare_bytes))
        for fault in faults:
            run.note("nearest", f"{fault}.")
        spare_bytes -= len(neighbours.uri) if neighbours else 0
    chosen = [run.grids[i] for i in spread(len(run.grids))]
    if len(chosen) < len(run.grids):
        run.note("samples", f"{len(chosen)} of the {len(run.grids)} grids in samples/ are shown.")
    real = run.picture("samples/real.png")
    if real is None:
        run.note("samples", "samples/real.png, the real images to compare with, is not there.")
    made, faults = thumbnails(
        [*([real] if real else []), *(path for _, path in reversed(chosen))], spare_bytes
    )
    for fault in faults:
        run.note("samples", f"{fault}.")
    of_real = made.pop(0) if real else None
    shown = zip(chosen, reversed(made), strict=True)
    frames = [(f"{_short(kimg)} kimg", one) for (kimg, _), one in shown if one is not None]
    return {"frames": frames, "real": of_real, "neighbours": neighbours}


def _short(kimg: float) -> str:
    return f"{kimg:,.3f}".rstrip("0").rstrip(".")


def _config(run: RunFiles) -> list[tuple[str, str, bool]]:
    """Each option, its value, and whether that is another than the default."""
    usual = to_plain(TrainConfig())
    return [(key, in_table(v), usual.get(key) != v) for key, v in run.config.items()]


def _command(run: RunFiles) -> str:
    """The command line that trains the same; "" where the configuration is none."""
    if not run.config:
        return ""
    values = run.config
    if "crop" not in values:
        from .formats import upgraded_config  # torch, which only an old run needs

        values = upgraded_config(values)
    try:
        config = recorded_config(values, "config.json: ", run.environment.get("fastgan"))
    except (UsageError, RunError) as error:
        run.note("config", f"No command can be given: {error}.")
        return ""
    words = ["fastgan"]
    processes = re.match(r"\d{1,5} ", run.modes.get("processes", ""))
    if processes:
        words = ["torchrun", "--nproc-per-node", processes[0].strip(), "-m", "fastgan"]
    return shlex.join([*words, "train", *flags(config)])


def flags(config: TrainConfig) -> list[str]:
    """The flags of `fastgan train` that come to a configuration, without those that do nothing."""
    usual, words = to_plain(TrainConfig()), ["--data", config.data]
    for key, value in to_plain(config).items():
        if key == "data" or value == usual.get(key):
            continue
        if isinstance(value, bool):
            words.append(flag_of(key if value else f"no_{key}"))
        elif isinstance(value, list):
            words += [flag_of(key), *map(str, value)]
        else:
            words.append(f"{flag_of(key)}={str(value).removesuffix('.0')}")
    return words


def _numbers(run: RunFiles) -> dict[str, Any]:
    """All numbers of the page, for its JSON."""
    rows = [run.rows[i] for i in spread(len(run.rows), EMBEDDED_ROWS)]
    if len(rows) < len(run.rows):
        run.note("curves", f"The page's JSON has {len(rows):,} of the {len(run.rows):,} ticks.")
    return {
        "run": {"name": run.path.name, **run.status},
        "config": run.config,
        "environment": run.environment,
        "stats": rows,
        "metrics": run.records,
        "warnings": [{"text": w, "when": when, "count": count} for w, when, count in run.warnings],
    }
