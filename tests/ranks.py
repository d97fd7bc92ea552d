"""Several processes of one run, inside a test: forked from a server that has torch imported, so
that they start in a moment.
"""

import multiprocessing
import os
import resource
import signal
import socket
import time
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastgan.trainer", "equality"])
TIMEOUT_S = 120


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def variables(rank, world, port):
    """What a launcher sets for one of the processes of a machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _one(rank, world, port, joined, function, args, answers):
    os.environ |= variables(rank, world, port)
    from fastgan.distributed import Ranks

    ranks = Ranks.from_environment()
    try:
        if joined:
            ranks.join(on_gpu=False)
        answers.put((rank, True, function(ranks, *args)))
        ranks.leave(failed=False)
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
        ranks.leave(failed=True)


def in_ranks(world, function, *args, joined=True, within_s=TIMEOUT_S):
    """What `function(ranks, *args)` returns on each of `world` ranks; it is one of a module's own,
    and returns what can be sent (no tensors: arrays).

    Args:
        joined: the ranks have met; False where the function is to see to that.
    """
    answers, port = CONTEXT.Queue(), free_port()
    children = [
        CONTEXT.Process(target=_one, args=(rank, world, port, joined, function, args, answers))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    try:
        got = dict()
        for _ in children:
            rank, well, value = answers.get(timeout=within_s)
            got[rank] = value
            assert well, f"rank {rank}: {value}"
        return [got[rank] for rank in range(world)]
    finally:
        for child in children:
            child.join(10)
            child.kill()


def _speaking(rank, world, port, function, args, said, settings, linger_s):
    """Ends as the command line does: with 0, or with 1 and a line."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= variables(rank, world, port)
    from fastgan import distributed
    from fastgan.errors import RunError

    for name, value in settings.items():
        assert hasattr(distributed, name)
        setattr(distributed, name, value)
    ranks = distributed.Ranks.from_environment()
    failed = True
    try:
        ranks.join(on_gpu=False)
        function(ranks, *args)
        failed = False
    except RunError as error:
        os.write(2, f"fastgan: rank {rank}: {error}\n".encode())
        raise SystemExit(1) from None
    finally:
        ranks.leave(failed)
        time.sleep(linger_s)


class Started:
    """`function(ranks, *args)` in `world` processes that may not all live to its end.

    Args:
        settings: what fastgan.distributed's constants are there.
        missing: ranks that are never started.
        linger_s: how long their ends are held up.
    """

    def __init__(self, folder: Path, world, function, *args, settings=None, missing=(), linger_s=0):
        port = free_port()
        self.said = {r: folder / f"said.{r}" for r in range(world) if r not in missing}
        self.children = {
            rank: CONTEXT.Process(
                target=_speaking,
                args=(rank, world, port, function, args, said, settings or {}, linger_s),
            )
            for rank, said in self.said.items()
        }
        for child in self.children.values():
            child.start()

    def ends(self, *ranks, within_s):
        """The exit code of each of these, and fastgan's own last line there."""
        deadline, found = time.monotonic() + within_s, []
        for rank in ranks:
            self.children[rank].join(max(0, deadline - time.monotonic()))
            lines = [line for line in self.lines(rank) if line.startswith("fastgan: ")]
            found.append((self.children[rank].exitcode, lines[-1] if lines else ""))
        return found

    def lines(self, rank):
        return self.said[rank].read_text().splitlines() if self.said[rank].exists() else []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for child in self.children.values():
            child.kill()
            child.join(10)


def _commanded(rank, world, port, argv, said, environment, file_limit):
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    os.environ |= variables(rank, world, port)
    for name, value in environment.items():
        os.environ[name] = value or ""
        if value is None:
            del os.environ[name]
    from fastgan.cli import main

    raise SystemExit(main(argv))


class Command:
    """`fastgan ARGV` in `world` processes, as a launcher would start it that then looks away.

    Args:
        folder: where what they say is kept.
        environment: further variables, of each rank that has some; None takes one away.
        file_limit: bytes that no file of rank 0 may grow beyond.
    """

    def __init__(self, folder: Path, world, *argv, environment=None, file_limit=None):
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.said = [folder / f"said.{port}.{rank}" for rank in range(world)]
        self.children = [
            CONTEXT.Process(
                target=_commanded,
                args=(rank, world, port, [*map(str, argv)], said, (environment or {}).get(rank, {}))
                + (file_limit if rank == 0 else None,),
            )
            for rank, said in enumerate(self.said)
        ]
        for child in self.children:
            child.start()

    def all_alive(self):
        return all(child.is_alive() for child in self.children)

    def codes(self, within_s=TIMEOUT_S):
        """The exit codes; None of one that has not ended by then."""
        deadline = time.monotonic() + within_s
        for child in self.children:
            child.join(max(0, deadline - time.monotonic()))
        return [child.exitcode for child in self.children]

    def lines(self, rank=None):
        """What one rank has said so far, or all of them."""
        files = self.said if rank is None else [self.said[rank]]
        return [line for file in files if file.exists() for line in file.read_text().splitlines()]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for child in self.children:
            child.kill()
            child.join(10)


def command(folder, world, *argv, **options):
    """The exit codes of `fastgan ARGV` in `world` processes, and all that they said, in lines."""
    with Command(folder, world, *argv, **options) as started:
        return started.codes(), started.lines()
