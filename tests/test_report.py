"""The page of a run: what it shows, what it does without, and that a browser shows it."""

import json
import os
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgan import report as report_module
from fastgan.charts import CHARTS, POINTS, svg
from fastgan.cli import main, parse
from fastgan.commands import plain_config
from fastgan.config import TrainConfig
from fastgan.report import flags, report
from fastgan.thumbnails import spread, thumbnails

TINY = ["--size", "32", "--width", "4", "--latent", "8", "--batch", "8", "--grid", "4"]
TINY += ["--device", "cpu", "--kimg", "0.08", "--tick-kimg", "0.008", "--sample-kimg", "0.02"]
EVIL = "<script>alert(1)</script>\"'&amp;<img src=x onerror=alert(2)>"
VOID = {"meta", "link", "img", "input", "br", "path", "use"}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser, google-chrome"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of ten ticks and five grids, with the page that it ended with."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGAN_CACHE", str(out / "cache"))
        assert main(["train", "--data", "faces:32", *TINY, "--out", str(out)]) == 0
    (folder,) = out.glob("0*")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, without the page."""
    copy = Path(shutil.copytree(trained, tmp_path / trained.name))
    (copy / "report.html").unlink()
    return copy


class Page(HTMLParser):
    """Its elements as (tag, attributes), and the text within each id."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.path, self.elements, self._open = path, [], []
        self.text = {"": ""}
        self.feed(path.read_text("utf-8"))
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("id", "")))
            self.text.setdefault(self._open[-1][1], "")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for key in {"", *(key for _, key in self._open)}:
            self.text[key] += data

    def all(self, tag, **wanted):
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]

    @property
    def numbers(self):
        return json.loads(self.text["numbers"])

    @property
    def grids(self):
        return [a for a in self.all("img") if a.get("alt", "").startswith("Samples at")]


def made(run, *args):
    return Page(report(run, *args))


def evaluation(**changes):
    """A line of metrics.jsonl as `fastgan evaluate` writes it."""

    def row(name, role, swd, ms_ssim, accuracy):
        told = {"accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy, "count": 64}
        levels = {"mean": swd, "32": swd + 1, "16": swd - 1}
        return {"set": name, "role": role, "swd": levels, "ms_ssim": ms_ssim, "c2st": told}

    model = row("R 000000.080kimg", "model", 40.0, 0.25, 0.98)
    model |= {"d_accuracy": {"real": 0.75, "held_out": None, "fake": 0.5, "count": 16}}
    model |= {"nearest": {"ratio": 0.9}, "inception": {"fid": 123.456, "kid": -0.001}}
    rows = [row("real, the other half", "real", 2.5, 0.2, 0.5), model]
    rows += [row("noise", "noise", 160.0, 0.01, 1.0)]
    record = {"date": "2026-01-02", "checkpoint": "000000.080kimg", "ema": True, "count": 16}
    return {**record, "seed": 7, "data": {"source": "faces:32"}, "rows": rows, **changes}


def test_training_ends_with_a_page_that_needs_nothing_else(trained):
    page = Page(trained / "report.html")
    assert trained.name in page.text["line"] or page.text[""].count(trained.name)
    assert "Done at 0.08 kimg" in page.text["line"] and "faces:32" in page.text["line"]
    assert 10_000 < (trained / "report.html").stat().st_size < 1_000_000
    assert not list(trained.glob(".tmp.*"))
    rows = [json.loads(line) for line in (trained / "stats.jsonl").open()]
    assert len(rows) == 10
    for mine, theirs in zip(page.numbers["stats"], rows, strict=True):
        assert all(mine[key] == theirs[key] for key in ("step", "kimg", "d_loss", "img_per_s"))
        assert mine["seconds"] == theirs["seconds"]
    assert page.numbers["config"] == json.loads((trained / "config.json").read_text())
    assert [grid["data-label"] for grid in page.grids] == [
        "0 kimg", "0.024 kimg", "0.04 kimg", "0.064 kimg", "0.08 kimg"
    ]  # fmt: skip
    assert len(page.all("img", id="real")) == 1
    links = [
        a.get(key) for _, a in page.elements for key in ("src", "href", "xlink:href", "action")
    ]
    assert {link.split(":")[0].split("-")[0][:5] for link in links if link} <= {
        "data", *(f"#{chart.name}"[:5] for chart in CHARTS)
    }  # fmt: skip
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_without_javascript_the_last_grid_is_there(trained):
    page = Page(trained / "report.html")
    assert [("hidden" in grid) for grid in page.grids] == [True] * 4 + [False]
    assert "hidden" in page.all("div", id="controls")[0]
    shown = page.grids[-1]["src"].removeprefix("data:image/webp;base64,")
    assert shown != page.grids[0]["src"] and page.text["label"] == "0.08 kimg"


def test_curves(trained):
    page = Page(trained / "report.html")
    titles = [a["aria-label"] for a in page.all("svg")]
    assert len(titles) == 4 and not any("memory" in title for title in titles)  # on a CPU
    assert "counted on a GPU alone" in page.text["curves"]
    for words in ("D(x), real", "D(G(z)), generated", "thousands of images"):
        assert words in page.text["curves"]
    assert all("#0a0b0" not in str(attrs) for _, attrs in page.elements)


def test_a_curve_is_where_its_numbers_are():
    rows = [{"kimg": float(i), "d_fake": y, "d_real": None} for i, y in enumerate((0.5, 0.0, 1.0))]
    drawn = svg(CHARTS[1], rows)
    paths = re.findall(r'<path d="([^"]*)" clip-path[^>]*style="([^"]*)"', drawn)
    heights = {
        "dasharray" in style: [float(y) for y in re.findall(r" ([\d.]+) *\n", f"{d}\n")]
        for d, style in paths
        if "dasharray" in style or "var(--first)" in style
    }
    level, curve = heights[True], heights[False]
    assert len(level) == 2 and len(curve) == 3
    assert curve[0] == pytest.approx(level[0], abs=0.01)
    assert curve[2] < level[0] < curve[1]  # down is up
    assert level[0] - curve[2] == pytest.approx(curve[1] - level[0], abs=0.01)
    assert "var(--second)" in svg(CHARTS[1], [{"kimg": 1.0, "d_real": 0.5}])  # the colour stays its
    many = [{"kimg": i, "img_per_s": 1.0 + i % 2} for i in range(50 * POINTS)]
    assert len(svg(CHARTS[2], many)) < 30_000 and svg(CHARTS[2], rows) == ""
    memory = [{"kimg": 1.0, "gpu_memory_bytes": 3 * 2**30}]  # a tick alone has a mark
    assert "<use" in svg(CHARTS[3], memory) and svg(CHARTS[3], memory) == svg(CHARTS[3], memory)


def test_metrics_stand_beside_their_baselines(run):
    older = evaluation(checkpoint="000000.040kimg")
    lines = [json.dumps(older), "{", json.dumps(evaluation())]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    Image.new("RGB", (40, 20), "teal").save(run / "nearest.png")
    page = made(run)
    text = " ".join(page.text["metrics"].split())
    assert text.index("000000.080kimg") < text.index("000000.040kimg")  # the newest first
    for words in ("averaged weights", "16 images of each set", "seed 7", "2.50", "40.00", "160.00"):
        assert words in text
    for words in ("98.0% (96.0% to 98.0%)", "123.46", "-0.0010", "75% of real, 50% of generated"):
        assert words in text
    assert "1 damaged lines are left out" in text and "fastgan evaluate" not in text
    bars = [a["style"] for a in page.all("i")]
    # of SWD, MS-SSIM, C2ST, the distance to neighbours, FID, and KID, which is below 0
    widths = [1.6, 25, 100, 20, 25, 1, 50, 98, 100, 90, 100, 0]
    assert bars[: len(widths)] == [f"width:{width:.1f}%" for width in widths]
    assert len(page.all("img", alt="Samples and their nearest training images")) == 1
    assert page.numbers["metrics"][1]["rows"][1]["swd"]["mean"] == 40.0


def test_a_run_that_was_not_evaluated_says_how(run):
    page = made(run)
    assert f"fastgan evaluate {run}" in page.text["metrics"]
    assert "There is no nearest.png" in page.text["nearest"]


def test_whatever_a_run_holds_is_text(run, tmp_path):
    odd = run.rename(tmp_path / f"0<b>{EVIL.replace('/', '_')}")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "data": EVIL, EVIL: "\ud800"}))
    (odd / "env.json").write_text(json.dumps({"gpu": EVIL, EVIL: [EVIL]}))
    with open(odd / "log.txt", "a") as log:
        log.write(f"warning: {EVIL}\n\x1b[31m\0red\n")
    record = evaluation(checkpoint=EVIL, data={"source": EVIL}, seed=EVIL)
    record["rows"][1] |= {"set": EVIL, "role": f'"{EVIL}'}
    (odd / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    page = made(odd)
    assert len(page.all("script")) == 2 and not page.all("b", src="x")
    assert not [a for _, a in page.elements if "onerror" in a or "alert" in a.get("src", "")]
    assert {len(page.all("img", src="x")), len(page.all("body"))} == {0, 1}
    for place in ("line", "warnings", "metrics", "config"):
        assert EVIL in page.text[place], place
    assert "alert(1)" not in page.path.read_text().split("<script>")[-1]
    assert page.numbers["config"]["data"] == EVIL  # no end of a script in it
    assert "\0" not in page.text[""] and "\x1b" not in page.text[""]
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


@pytest.mark.parametrize(
    ("name", "place", "line"),
    [
        ("config.json", "config", "config.json is"),
        ("env.json", "config", "env.json is"),
        ("run.json", "", "run.json is"),
        ("stats.jsonl", "curves", "The curves are from losses.npy"),
        ("log.txt", "log", None),
        ("samples/real.png", "samples", "real.png"),
        ("samples/fake-000000.080kimg.png", "samples", None),
        ("metrics.jsonl", "metrics", None),
        ("nearest.png", "nearest", None),
        ("losses.npy", "curves", None),
    ],
)
@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_a_piece_that_misses_is_a_line(damage, name, place, line, run, monkeypatch):
    (run / name).unlink(missing_ok=True)
    if damage == "damaged":
        (run / name).write_bytes(b"\x80\x04\x95 no such thing {\xff\n")
    if place != "curves":  # to save time
        monkeypatch.setattr(report_module, "svg", lambda chart, rows: "")
    page = made(run)
    if line is not None:
        assert line in page.text[place]
    if damage == "damaged" and name.endswith(".png"):
        assert f"{Path(name).name} cannot be read" in page.text[place]
    if name == "stats.jsonl":
        assert len(page.all("svg")) == 2 and len(page.numbers["stats"]) == 10
    assert len(page.grids) == (4 if "fake" in name else 5)


def test_folders_and_pipes_in_the_place_of_files(run):
    """Neither is read: from a pipe nothing would ever come."""
    for number, name in enumerate(("env.json", "stats.jsonl", "log.txt", "metrics.jsonl")):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name) if number % 2 else (run / name).mkdir()
    (run / "samples/real.png").unlink()
    os.mkfifo(run / "samples/real.png")
    page = made(run)
    for name in ("env.json", "log.txt", "metrics.jsonl", "samples/real.png"):
        assert name in page.text[""]
    assert len(page.grids) == 5 and len(page.all("svg")) == 2


def test_a_run_of_nothing_but_its_configuration(run):
    for path in run.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = made(run)
    assert not page.all("svg") and not page.all("img")
    for words in (
        "stats.jsonl is not there",
        "No tick of the run",
        "no sample grids",
        "log.txt is",
    ):
        assert words in page.text[""]
    assert page.text["command"].startswith("fastgan train --data faces:32")


def test_a_run_that_goes_on(run):
    """One tick, the second in the midst of being written, a grid that is not whole yet."""
    whole, cut = (run / "stats.jsonl").read_bytes().splitlines(keepends=True)[:2]
    (run / "stats.jsonl").write_bytes(whole + cut[:40])
    (run / "run.json").write_text('{"status": "running", "step": 1, "kimg": 0.008}')
    grids = sorted((run / "samples").glob("fake-*"))
    for grid in grids[1:]:
        grid.unlink()
    page = made(run)
    assert "its last line is cut short" in page.text["curves"]
    assert "damaged" not in page.text["curves"]
    assert len(page.numbers["stats"]) == 1 and len(page.all("svg")) == 4
    assert "Ended without a word" in page.text["line"]  # nobody has its lock
    assert len(page.grids) == 1 and page.text["label"] == "0 kimg"


def test_numbers_that_are_none(run):
    row = json.loads((run / "stats.jsonl").read_text().splitlines()[0])
    rows = [
        {**row, "step": 1, "d_loss": float("nan"), "img_per_s": "many", "seconds": 3},
        {
            **row,
            "step": 2,
            "g_loss": float("inf"),
            "d_real": True,
            "diversity": 10**400,
            "img_per_s": 1e308,
        },
        {**row, "step": 2},
        [1],
        {"step": 3},
    ]
    (run / "stats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = made(run)
    assert "3 damaged lines are left out" in page.text["curves"]
    first, second = page.numbers["stats"]
    assert first["d_loss"] is first["img_per_s"] is first["seconds"]["train"] is None
    assert (
        second["g_loss"] is second["d_real"] is second["diversity"] is second["img_per_s"] is None
    )
    record = evaluation(count=10**400)
    record["rows"] += [{"swd": 3, "set": 5, "c2st": {"accuracy": float("nan")}}, 7]
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert "40.00" in made(run).text["metrics"]


def test_warnings_say_when_and_how_often(run):
    said = "diversity is 0.01 (<0.2)"
    with open(run / "log.txt", "a") as log:
        log.write(f"   999.9 kimg  D 0.1  fake-000999.900kimg.png\nwarning: {said}\n" * 3)
    page = made(run)
    assert f"{said} (after 999.9 kimg, 3 times)" in " ".join(page.text["warnings"].split())
    assert page.numbers["warnings"][-1] == {"text": said, "when": "after 999.9 kimg", "count": 3}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"data": "/a b/it's", "size": 96, "kimg": 0.5, "lr_g": 1e-6, "flip": True, "graph": False},
        {"kimg": None, "epochs": 3, "pixel_range": (0, 1), "crop": "178x178+0+20", "limit": 7},
        {"out": "-x", "amp": True, "beta1": 0, "seed": 0, "min_size": 50, "on_bad": "stop"},
    ],
)
def test_the_command_trains_the_same(changed):
    config = TrainConfig(**changed)
    words = shlex.split(shlex.join(["train", *flags(config)]))
    assert plain_config(parse(words)) == config
    assert len(words) < 20


def test_the_command_of_several_processes_and_of_a_strange_run(run):
    log = (run / "log.txt").read_text()
    several = "processes  2 by gloo, 4 images each; batch norm by each its own\nnetworks   "
    (run / "log.txt").write_text(log.replace("networks   ", several))
    assert made(run).text["command"].startswith("torchrun --nproc-per-node 2 -m fastgan train --da")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "size": 33}))
    page = made(run)
    assert "command" not in page.text
    assert "No command can be given: config.json: size must be" in page.text["config"]


def test_refusals(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    checkpoint = next((run / "checkpoints").glob("*kimg"))
    for args, words in [
        ([tmp_path / "none"], "RUN must be a run folder: ", ),
        ([run / "log.txt"], "log.txt is a file"),
        ([tmp_path / "empty"], "has no config.json and no stats.jsonl"),
        ([checkpoint], f"is a checkpoint of {run}"),
        ([run, "--out", tmp_path / "a.pdf"], "--out must end in .html, .htm"),
        ([run, "--out", run / "log.txt" / "a.html"], "--out must be a folder"),
    ]:  # fmt: skip
        assert main(["report", *map(str, args)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
    assert not (run / "report.html").exists()
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "a.html")]) == 0
    assert f"{tmp_path / 'new' / 'a.html'}: 0." in capsys.readouterr().out
    (run / "report.html").mkdir()
    assert main(["report", str(run)]) == 1
    assert "report.html cannot be written" in capsys.readouterr().err


def test_a_report_that_fails_fails_no_run(tmp_path, monkeypatch, capsys):
    def fails(path):
        raise ZeroDivisionError("of a test")

    monkeypatch.setattr(report_module, "report", fails)
    short = ["--data", "faces:16", *TINY, "--kimg", "0.016", "--out", str(tmp_path)]
    assert main(["train", *short]) == 0
    (run,) = tmp_path.glob("0*")
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    said = capsys.readouterr()
    assert f"report.html was not written (of a test); fastgan report {run} tries again" in said.err
    assert "done: 0.016 kimg" in said.out


def noise(path, edge, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (edge, edge, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_pictures_fit_their_budget(tmp_path):
    paths = [noise(tmp_path / f"{i}.png", 300, i) for i in range(3)]
    best, faults = thumbnails(paths, 10**9)
    assert not faults and [one.width for one in best] == [300] * 3
    whole = sum(len(one.uri) for one in best)
    fewer, faults = thumbnails(paths, whole // 2)
    assert not faults and sum(len(one.uri) for one in fewer) <= whole // 2
    assert len({(one.width, one.height) for one in fewer}) == 1
    some, faults = thumbnails(paths, 45_000)
    assert some[0] is not None and some[2] is None
    assert "2.png is left out: the page would be too large" in faults
    assert thumbnails(paths, 0)[0] == [None] * 3


def test_a_page_stays_within_its_size(run, monkeypatch):
    for number in range(1, 41):
        shutil.copy(run / "samples/real.png", run / f"samples/fake-00{number:04d}.000kimg.png")
    page = made(run)
    assert len(page.grids) == 30 and page.grids[0]["data-label"] == "0 kimg"
    assert page.grids[-1]["data-label"] == "40 kimg"
    assert "30 of the 45 grids" in page.text["samples"]
    limit = page.path.stat().st_size - 20_000
    monkeypatch.setattr(report_module, "MAX_BYTES", limit + (1 << 16))
    smaller = made(run)
    assert smaller.path.stat().st_size <= limit + (1 << 16)
    assert len(smaller.grids) == 30 and smaller.grids[0]["src"] != page.grids[0]["src"]


def test_spread():
    assert spread(3) == [0, 1, 2] and spread(0) == []
    places = spread(1000, 30)
    assert places[0] == 0 and places[-1] == 999 and len(set(places)) == 30
    assert max(np.diff(places)) - min(np.diff(places)) <= 1


# What ends beyond the page; tables of metrics are in boxes that scroll. Without a picture Chromium
# has a window of 500 pixels at the least, so the page is made as narrow as is wanted.
WIDER = """
const width = Number(location.hash.slice(1));
document.documentElement.style.width = `${width}px`;
const seen = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide table"));
const wide = seen.filter(e => e.getBoundingClientRect().right > width + 0.5);
document.title = `looked at ${seen.length < 100 ? "few" : "100 or more"}, wider: `
    + wide.map(e => `${e.tagName} ${e.className} ${e.id}`).join();
"""


def browse(tmp_path, address, *options):
    """What Chromium gives out of a page: stdout, and the lines of its console."""
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
            *(*options, address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_browser
@pytest.mark.parametrize("at", ["", "#1", "#0", "#99", "#x"])
def test_the_slider_moves_the_picture(at, trained, tmp_path):
    dump, said = browse(tmp_path, f"file://{trained / 'report.html'}{at}", "--dump-dom")
    assert not said
    (tmp_path / "dump.html").write_text(dump)
    page = Page(tmp_path / "dump.html")
    wanted = {"#1": 1, "#0": 0}.get(at, 4)
    assert [i for i, grid in enumerate(page.grids) if "hidden" not in grid] == [wanted]
    assert page.text["label"] == page.grids[wanted]["data-label"]
    assert "hidden" not in page.all("div", id="controls")[0]


@in_browser
def test_a_fault_would_be_seen(trained, tmp_path):
    """The console is watched, and a script that a run smuggled in would not be run."""
    page = (trained / "report.html").read_text()
    (tmp_path / "a.html").write_text(page.replace("<footer>", "<footer><script>x</script>"))
    _, said = browse(tmp_path, f"file://{tmp_path / 'a.html'}", "--dump-dom")
    assert len(said) == 1 and "Content Security Policy" in said[0]


@in_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_how_it_looks(width, run, tmp_path):
    """Not blank, nothing wider than the screen, and dark where that is preferred."""
    (run / "metrics.jsonl").write_text(json.dumps(evaluation()) + "\n")
    path = report(run)
    shots = []
    for scheme in (0, 1):
        shot = tmp_path / f"{scheme}.png"
        options = [f"--window-size={width},3000", f"--screenshot={shot}"]
        options += [f"--blink-settings=preferredColorScheme={scheme}"]
        _, said = browse(tmp_path, f"file://{path}", *options)
        assert not said
        shots.append(np.asarray(Image.open(shot).convert("L"), float))
    dark, light = shots
    for shot in shots:
        assert shot.shape == (3000, width) and shot.std() > 10
        assert all(part.std() > 1 for part in np.array_split(shot, 6))
    assert dark[:8, :8].max() < 60 and light[:8, :8].min() > 240
    text = path.read_text().replace("Content-Security-Policy", "none")
    (tmp_path / "wide.html").write_text(text.replace("</body>", f"<script>{WIDER}</script></body>"))
    dump, _ = browse(tmp_path, f"file://{tmp_path / 'wide.html'}#{width}", "--dump-dom")
    assert "<title>looked at 100 or more, wider: </title>" in dump
