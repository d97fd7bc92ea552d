"""What the user sees, on a terminal and off it."""

import io
import sys

from fastgan import console


def test_lines_go_to_the_screen_and_to_the_log(capsys, tmp_path):
    log = tmp_path / "log.txt"
    with console.log_to(log):
        console.say("a [bold]line[/bold] of " + "x" * 200)
        console.warn("careful")
    console.say("after")
    said = capsys.readouterr()
    assert said.out == "a [bold]line[/bold] of " + "x" * 200 + "\nafter\n"  # no markup, no wrapping
    assert said.err == "warning: careful\n"
    assert log.read_text() == said.out.replace("after\n", "") + said.err


def test_off_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.bar("decoding", 100) as bar:
        for now in range(4, 44, 4):  # noqa: B007 - the clock reads it
            bar.update(2 * now)
    assert capsys.readouterr().out.splitlines() == [
        "decoding: 24%  2 img/s  38s left",  # at 12 s
        "decoding: 48%  2 img/s  26s left",
        "decoding: 72%  2 img/s  14s left",
    ]


def test_on_a_terminal_the_bar_is_drawn_and_gone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(
        console, "_out", console.Console(file=screen, force_terminal=True, width=100)
    )
    with console.bar("training", 10) as bar:
        bar.update(5, "412 img/s")
        assert bar._rich is not None
        bar._rich.refresh()
    assert "training" in screen.getvalue() and "412 img/s" in screen.getvalue()


def test_clock():
    assert [console.clock(s) for s in (0.4, 59, 125, 11520)] == ["0s", "59s", "2m 05s", "3h 12m"]
