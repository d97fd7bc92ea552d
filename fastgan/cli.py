"""The command line: `fastgan VERB`. Only config is imported until a verb runs, so help and
mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from . import __version__
from .config import (
    DEFAULT_RECIPE,
    FacesCommand,
    InfoCommand,
    PrepareCommand,
    SampleCommand,
    TrainCommand,
    TrainConfig,
    flag_of,
    load_recipe,
    plain_config,
    to_toml,
)
from .console import say
from .errors import RunError, UsageError
from .signals import Terminated, terminable

VERBS: dict[str, type] = {
    "train": TrainCommand,
    "prepare": PrepareCommand,
    "sample": SampleCommand,
    "faces": FacesCommand,
    "info": InfoCommand,
}
ABOUT = "Train DCGAN-family face generators at the speed of the card."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0; 1 for a failure, 2 for wrong usage; 130, 143, 129 for Ctrl-C, SIGTERM, SIGHUP.
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
            print(f"fastgan: {error}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nothing more to say at exit
        return 1


def _run(args: list[str]) -> int:
    try:
        if args in (["--version"], ["-V"]):
            print(f"fastgan {__version__}")
            return 0
        with terminable():
            _check_folder()
            return run(parse(args))
    except UsageError as error:
        print(f"fastgan: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"fastgan: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastgan: interrupted", file=sys.stderr)
        return 130
    except Terminated as signal:
        print(f"fastgan: terminated by {signal.name}", file=sys.stderr)
        return 128 + signal.number


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
    return tyro.cli(
        union,
        prog="fastgan",
        description=ABOUT,
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _train_base(args: Sequence[str]) -> TrainConfig:
    """What the flags are laid over: the run to be resumed, the recipe, or the defaults."""
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--recipe", "--resume", "--data", "--out", "--kimg", "--epochs"):
        scan.add_argument(flag)
    try:
        given, _ = scan.parse_known_args(args)
    except argparse.ArgumentError:  # a flag without its value: tyro says it better
        return TrainConfig()
    if given.resume and given.resume != "auto":
        if given.recipe:
            raise UsageError("--recipe does not go with --resume RUN: the run has a configuration")
        if given.out:
            raise UsageError("--out does not go with --resume RUN: the run stays where it is")
        from .resume import load_config

        base = load_config(Path(given.resume))
    elif given.recipe:
        base = load_recipe(given.recipe)
    elif given.data is None:
        base = load_recipe(DEFAULT_RECIPE)
    else:
        base = TrainConfig()
    # A length on the command line replaces the recipe's, of whichever kind that was.
    if given.epochs is not None and given.kimg is None:
        base = base.model_copy(update={"kimg": None})
    if given.kimg is not None and given.epochs is None:
        base = base.model_copy(update={"epochs": None})
    return base


def run(command: Any) -> int:
    """Do what a parsed command asks; the heavy imports happen here."""
    if isinstance(command, TrainCommand):
        config = plain_config(command)
        if command.dry_run:
            print(to_toml(config), end="")
            return 0
        from .trainer import train

        return train(config, resume=command.resume)
    if isinstance(command, PrepareCommand):
        if command.check:
            from .data.cache import check_cache, summary
            from .paths import absolute

            plain = PrepareCommand(source=command.source, check=True)
            if others := [key for key, value in plain if value != getattr(command, key)]:
                flags = ", ".join(map(flag_of, others))
                raise UsageError(f"--check takes a cache alone, without {flags}")
            cache = check_cache(Path(absolute(command.source, "SOURCE")), "SOURCE")
            say(f"{summary(cache)}: whole, by its checksums")
            return 0
        if command.out is not None and command.cache is not None:
            raise UsageError("--out names the cache, --cache a folder of caches: give one of them")
        from .data.prepare import prepare

        prepare(
            command.source,
            command,
            out=command.out,
            root=command.cache,
            verify=command.verify,
            flag="SOURCE",
        )
        return 0
    if isinstance(command, SampleCommand):
        from .samples import sample

        sample(command)
        return 0
    if isinstance(command, FacesCommand):
        from .data.face_files import write_faces
        from .paths import empty_folder

        folder = empty_folder(command.out, "--out")
        write_faces(folder, command.count, command.size, command.seed)
        say(f"{command.count:,} faces of {command.size} px and factors.csv in {folder}")
        return 0
    from .data.pool import DecodePool
    from .env import version_of
    from .framing import Framing
    from .modes import info

    with DecodePool(Framing(), processes=1) as pool:
        found = {name: version_of(name) for name in ("nvidia-dali-cuda120", "kornia-rs", "pillow")}
        versions = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        print(info(f"{pool.name} ({versions}{f'; {pool.why}' if pool.why else ''})"))
    return 0
