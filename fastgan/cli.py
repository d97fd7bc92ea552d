"""The command line: `fastgan VERB`. Only config is imported until a verb runs, so help and
mistakes answer at once.

Of several processes that torchrun starts, all have the same arguments: rank 0 alone says what is
wrong with these. What goes wrong later may have gone wrong on one of them, which then says so.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import __version__
from .commands import (
    AnimateCommand,
    EvaluateCommand,
    ExportCommand,
    FacesCommand,
    InfoCommand,
    InterpolateCommand,
    PrepareCommand,
    ReportCommand,
    SampleCommand,
    TrainCommand,
    plain_config,
)
from .config import (
    DEFAULT_RECIPE,
    TrainConfig,
    flag_of,
    lengths_replaced,
    load_recipe,
    to_toml,
)
from .console import say, warn
from .errors import RunError, UsageError, first_line, is_out_of_memory
from .signals import Terminated, at_once, raised, said, terminable

VERBS: dict[str, type] = {
    "train": TrainCommand,
    "prepare": PrepareCommand,
    "sample": SampleCommand,
    "interpolate": InterpolateCommand,
    "animate": AnimateCommand,
    "evaluate": EvaluateCommand,
    "export": ExportCommand,
    "report": ReportCommand,
    "faces": FacesCommand,
    "info": InfoCommand,
}
ABOUT = "Train DCGAN-family face generators at the speed of the card."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0; 1 for a failure, 2 for wrong usage; 130, 143, 138, 129 for Ctrl-C, SIGTERM, SIGUSR1, SIGHUP.
    """
    _ready_streams()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            code = _run(args)
        except SystemExit as done:  # tyro: help, or a flag that it refused
            code = int(done.code or 0)
        sys.stdout.flush()
        return code
    except OSError as error:  # stdout is full, or its reader has gone (`fastgan info | head -1`)
        if not isinstance(error, BrokenPipeError):
            _complain(str(error), everywhere=False)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nothing more to say at exit
        return 1


def _run(args: list[str]) -> int:
    try:
        if args in (["--version"], ["-V"]):
            _print_once(f"fastgan {__version__}\n")
            return 0
        with at_once(speaks=_rank() == 0):
            with _told_by_first("LOCAL_RANK"):
                _check_folder()
            work = made(parse(args))
        with terminable():
            return _ended(work)
    except (UsageError, RunError) as error:
        _complain(str(error), error.everywhere)
        return 2 if isinstance(error, UsageError) else 1


def _ended(work: Callable[[], int]) -> int:
    """What the work returns, or 128 + the signal that it was ended by."""
    try:
        return work()
    except (UsageError, RunError):
        raise
    except BaseException as error:
        number = raised()
        if isinstance(error, KeyboardInterrupt):
            number = signal.SIGINT
        elif isinstance(error, Terminated):
            number = error.number
        if number is None:  # else it came of the signal, in the midst of what knows none
            if is_out_of_memory(error):
                said_so = f"out of memory ({first_line(error)}): ask for less at once"
                raise RunError(said_so) from None
            raise
        # torchrun ends all of them once one has failed, whose words would be lost among theirs
        _complain(said(number), everywhere=True)
        return 128 + number


def _complain(text: str, everywhere: bool) -> None:
    """Say what went wrong; where it did on every rank, rank 0 says it."""
    rank = _rank()
    with suppress(OSError):  # stderr is full: the exit code still says it
        if rank == 0:
            print(f"fastgan: {text}", file=sys.stderr)
        elif not everywhere:
            print(f"fastgan: rank {rank}: {text}", file=sys.stderr)


def _print_once(text: str) -> int:
    if _rank() == 0:
        print(text, end="")
    return 0


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _rank() -> int:
    """Which of torchrun's processes this is; 0 for one that is alone, or not rightly started: that
    one speaks.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, world, _ = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError):
        return 0
    return rank if 0 < rank < world else 0


@contextmanager
def _told_by_first(of: Literal["RANK", "LOCAL_RANK"]) -> Iterator[None]:
    """An error in the block is met by all processes of the run, or by all of this node (files may
    not be there on another); the first of them tells it.
    """
    try:
        yield
    except (UsageError, RunError) as error:
        error.everywhere = os.environ.get(of, "0") != "0"
        raise


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise UsageError("the current folder is gone: cd to one that is there") from None


def _ready_streams() -> None:
    """Streams that may be closed or know only ASCII: nothing that is said may fail for that."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the whole process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def parse(args: Sequence[str]) -> Any:
    """The command that `args` spell. Exits 2 on a wrong flag (tyro), raises `UsageError` on a
    wrong value.
    """
    args = _joined(args, "--allow-change")
    base = TrainConfig()
    if args and args[0] == "train" and not {"-h", "--help"} & set(args):
        base = _train_base(args[1:])
    union: Any = None
    for name, verb in VERBS.items():
        # model_construct: the base may lack a length, which a flag is about to give
        default = (
            TrainCommand.model_construct(**base.model_dump())
            if verb is TrainCommand
            else tyro.MISSING
        )
        settings = tyro.conf.subcommand(name, default=default, prefix_name=False)
        made: Any = Annotated[(verb, settings)]
        union = made if union is None else union | made
    with _told_by_first("RANK"):
        with _spoken_once():
            command = tyro.cli(
                union,
                prog="fastgan",
                description=ABOUT,
                args=args,
                config=(tyro.conf.OmitArgPrefixes,),
            )
        if isinstance(command, TrainCommand) and command.allow_change:
            from .resume import allowed_changes

            allowed_changes(command.allow_change)
    return command


@contextmanager
def _spoken_once() -> Iterator[None]:
    """What is printed in the block, help and tyro's errors, rank 0 alone prints."""
    if _rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _joined(args: Sequence[str], flag: str) -> list[str]:
    """The arguments with `flag --lr-g` as `flag=--lr-g`: a value may look like a flag."""
    joined: list[str] = []
    for arg in args:
        if joined and joined[-1].replace("_", "-") == flag and arg.startswith("--"):
            joined[-1] += f"={arg}"
        else:
            joined.append(arg)
    return joined


def _train_base(args: Sequence[str]) -> TrainConfig:
    """What the flags are laid over: the run to be resumed, the recipe, or the defaults."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--recipe", "--resume", "--data", "--out"):
        scan.add_argument(flag)
    for flag in ("--kimg", "--epochs", "--tick-kimg", "--tick-epochs"):
        scan.add_argument(flag, f"--{flag[2:].replace('-', '_')}", dest=flag[2:].replace("-", "_"))
    try:
        given, _ = scan.parse_known_args(args)
    except argparse.ArgumentError:  # a flag without its value: tyro says it better
        return TrainConfig()
    if given.resume and given.resume != "auto":
        if given.recipe:
            raise UsageError(
                "--recipe does not go with --resume RUN: the run has a configuration", True
            )
        if given.out:
            raise UsageError("--out does not go with --resume RUN: the run stays where it is", True)
        from .resume import load_config

        with _told_by_first("LOCAL_RANK"):
            base = load_config(Path(given.resume))
    elif given.recipe:
        with _told_by_first("LOCAL_RANK"):
            base = load_recipe(given.recipe)
        if "data" not in base.model_fields_set and given.data is None and _rank() == 0:
            warn(f"{given.recipe} names no images: without --data it has drawn faces ({base.data})")
    elif given.data is None:
        base = load_recipe(DEFAULT_RECIPE)
    else:
        base = TrainConfig()
    return lengths_replaced(base, vars(given))


def made(command: Any) -> Callable[[], int]:
    """What a parsed command asks, to be called; the heavy imports happen here."""
    if isinstance(command, TrainCommand):
        config = plain_config(command)
        if command.dry_run:
            return lambda: _print_once(to_toml(config))
        if _several():  # a rank that is gone is told in a line, without C++'s own twenty
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from .trainer import train

        return lambda: train(
            config,
            resume=command.resume,
            allow_change=command.allow_change,
            elastic=command.elastic,
            exit_zero=command.exit_zero,
        )
    if isinstance(command, PrepareCommand):
        from .data import cache, prepare  # noqa: F401

        return lambda: _prepare(command)
    if isinstance(command, SampleCommand):
        from .samples import sample

        return lambda: _done(sample, command)
    if isinstance(command, InterpolateCommand):
        from .interpolate import interpolate

        return lambda: _done(interpolate, command)
    if isinstance(command, AnimateCommand):
        from .animate import animate

        return lambda: _done(animate, command)
    if isinstance(command, EvaluateCommand):
        from .metrics.evaluate import run

        return lambda: _done(run, command)
    if isinstance(command, ExportCommand):
        from .export import export

        return lambda: _done(export, command)
    if isinstance(command, ReportCommand):
        from . import report  # noqa: F401

        return lambda: _report(command)
    if isinstance(command, FacesCommand):
        from .data import face_files  # noqa: F401

        return lambda: _faces(command)
    from . import modes  # noqa: F401
    from .data import pool  # noqa: F401

    return _info


def _done(work: Callable[[Any], object], command: Any) -> int:
    """Do it; what goes wrong is raised."""
    work(command)
    return 0


def _prepare(command: PrepareCommand) -> int:
    from .data.cache import check_cache, summary
    from .data.prepare import prepare
    from .paths import absolute

    if command.check:
        plain = PrepareCommand(source=command.source, check=True)
        if others := [key for key, value in plain if value != getattr(command, key)]:
            flags = ", ".join(map(flag_of, others))
            raise UsageError(f"--check takes a cache alone, without {flags}")
        cache = check_cache(Path(absolute(command.source, "SOURCE")), "SOURCE")
        say(f"{summary(cache)}: whole, by its checksums")
        return 0
    if command.out is not None and command.cache is not None:
        raise UsageError("--out names the cache, --cache a folder of caches: give one of them")
    prepare(
        command.source,
        command,
        out=command.out,
        root=command.cache,
        verify=command.verify,
        flag="SOURCE",
    )
    return 0


def _report(command: ReportCommand) -> int:
    from .report import report

    page = report(command.run, command.out)
    say(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
    return 0


def _faces(command: FacesCommand) -> int:
    from .data.face_files import write_faces
    from .paths import empty_folder

    folder = empty_folder(command.out, "--out")
    write_faces(folder, command.count, command.size, command.seed)
    say(f"{command.count:,} faces of {command.size} px and factors.csv in {folder}")
    return 0


def _info() -> int:
    from .data.pool import DecodePool
    from .env import version_of
    from .framing import Framing
    from .modes import info

    with DecodePool(Framing(), processes=1) as pool:
        found = {name: version_of(name) for name in ("nvidia-dali-cuda120", "kornia-rs", "pillow")}
        versions = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        print(info(f"{pool.name} ({versions}{f'; {pool.why}' if pool.why else ''})"))
    return 0
