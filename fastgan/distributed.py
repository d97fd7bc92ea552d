"""Several processes that train one run: who they are, what they add up, what they agree on, and
what becomes of the others when one is gone. Nothing else knows torch.distributed.

torchrun (or whatever sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT) starts one process a GPU. Tensors on GPUs go by NCCL, those on CPUs by gloo. A process
alone has a world of 1, in which all of this does nothing, and torch.distributed is not imported.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .errors import RunError, UsageError, first_line
from .signals import deadly

MEET_S = 600.0  # for all ranks to come
BEAT_S = 1.0  # between two signs of life
# Without one for so long, and a rank is taken for dead: longer than a file server that is away may
# hold up a process as a whole.
SILENT_S = 35.0
GRACE_S = 15.0  # for a rank to end by itself once another is gone; both within a minute
ASK_S = 0.5  # between two times that the ranks ask each other whether to stop
PATIENCE = timedelta(days=7)  # of a collective: ranks that live may take their time, see Watcher
MESSAGE_BYTES = 4096  # of an error that all ranks are told


class Ranks:
    """This process among those of the run.

    Attributes:
        rank, world: its number, and how many there are.
        local, local_world: the same on this machine: which GPU is its own.
        first: whether it is rank 0, which writes and speaks.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, local_world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.local, self.local_world = local, local_world
        self.first = rank == 0
        self._watcher: Watcher | None = None

    @classmethod
    def from_environment(cls) -> Ranks:
        """What the launcher's variables say; alone without them.

        Raises:
            UsageError: some are missing or are no numbers.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = [os.environ.get(name) for name in names]
        if given[0] is None and given[1] in (None, "1"):
            return cls()
        try:
            rank, world, local, local_world = (int(value or "") for value in given)
            if not (0 <= rank < world and 0 <= local < local_world <= world):
                raise ValueError
        except ValueError:
            said = ", ".join(f"{n}={v}" for n, v in zip(names, given, strict=True))
            raise UsageError(
                f"several processes need {', '.join(names)} as torchrun sets them, got {said}: "
                "start them by torchrun, or unset these variables"
            ) from None
        return cls(rank, world, local, local_world)

    def take_device(self, wanted: str) -> None:
        """Make this process's GPU torch's, if `--device` is to be a GPU.

        Raises:
            UsageError: there are fewer GPUs here than processes.
        """
        if self.world == 1 or wanted == "cpu" or not torch.cuda.is_available():
            return
        count = torch.cuda.device_count()
        if count == 1 and self.local_world > 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
            return  # a launcher's, which shows each process its own: see `card`
        if self.local_world > count:
            raise UsageError(
                f"{self.local_world} processes share this machine's {count} GPUs: start one "
                "process a GPU (torchrun --nproc-per-node), or add --device cpu",
                everywhere=True,
            )
        torch.cuda.set_device(self.local)

    def card(self) -> str:
        """This process's GPU by machine and number, as no other process may have it."""
        if not torch.cuda.is_available():
            return ""
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{socket.gethostname()} {getattr(found, 'uuid', self.local)}"

    def gather(self, text: str) -> list[str]:
        """Every rank's text, in their order."""
        if self.world == 1:
            return [text]
        content = text.encode()[:MESSAGE_BYTES]
        rows = torch.zeros(self.world, MESSAGE_BYTES, dtype=torch.uint8)
        if content:
            rows[self.rank, : len(content)] = torch.frombuffer(
                bytearray(content), dtype=torch.uint8
            )
        self.sum_(rows)
        return [r.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for r in rows]

    def join(self, on_gpu: bool) -> None:
        """Meet the others: from here on they notice each other's end.

        Raises:
            RunError: they could not be reached.
        """
        if self.world == 1:
            return
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        global _joined
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        try:
            with deadly():  # this waits in C++, and there is nothing to save yet
                store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=MEET_S))))
                # before the rest of it, in which the others may be gone already
                self._watcher = Watcher(store.clone(), self.rank, self.world)
                dist.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.world, timeout=PATIENCE
                )
                self.barrier()
        except BaseException as error:
            self.leave(failed=True)
            if not isinstance(error, RuntimeError | ValueError | OSError):
                raise
            raise RunError(
                f"the {self.world} processes of the run could not meet: {first_line(error)}"
            ) from None
        _joined = self

    def fail(self) -> None:
        """Let the others know at once that this process has failed, which then has some time for
        what it has to close.
        """
        if self._watcher is not None:
            self._watcher.fail()

    def leave(self, failed: bool) -> None:
        """Say so to the others; after a failure they end, too, and so does this process."""
        global _joined
        if self._watcher is None:
            return
        if not failed:
            try:
                self.barrier()  # nobody leaves, and takes the store along, before all are done
                whole = True
            except RunError:  # another one is gone; this one's work is done
                whole = False
        watcher, self._watcher, _joined = self._watcher, None, Ranks()
        watcher.stop(failed)
        if failed:
            # What waits on a GPU for a rank that is gone may hold up the interpreter's own end,
            # when no thread of Python runs any more.
            nowhere = open(os.devnull, "w")  # noqa: SIM115 - faulthandler's from here on
            faulthandler.dump_traceback_later(GRACE_S, exit=True, file=nowhere)
        elif whole:
            torch.distributed.destroy_process_group()

    @property
    def orphaned(self) -> int:
        """SIGTERM once the place that the ranks met at is gone, as after `kill -9` of torchrun: as
        long as they reach each other they can still save; else 0.
        """
        gone = self._watcher is not None and self._watcher.gone
        return signal.SIGTERM if gone else 0

    def share_of(self, batch: int) -> slice:
        """This rank's rows of a batch of all ranks, which they divide evenly."""
        share = batch // self.world
        return slice(self.rank * share, (self.rank + 1) * share)

    # What is added up.

    def sum_(self, t: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place; the same bits on every one."""
        if self.world > 1:
            with self._meeting():
                torch.distributed.all_reduce(t)
        return t

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank rank 0's tensors, in place."""
        if self.world > 1:
            with self._meeting(), torch.no_grad():
                for t in tensors:
                    whole = t.contiguous()
                    torch.distributed.broadcast(whole, 0)
                    t.copy_(whole)

    def same(self, value: float) -> bool:
        """Whether all ranks have the same number."""
        highest = torch.tensor([value, -value], dtype=torch.float64)
        self._max_(highest)
        return bool(highest[0] == -highest[1])

    # What is agreed on.

    def barrier(self) -> None:
        """Wait for all ranks."""
        self._max_(torch.zeros(1))

    def share(self, value: Any) -> Any:
        """Rank 0's value (JSON) on every rank."""
        if self.world == 1:
            return value
        content = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(content)])
        self._max_(size)
        held = torch.zeros(int(size), dtype=torch.uint8)
        if self.first:
            held.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.broadcast_([held])
        return json.loads(held.numpy().tobytes())

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in the block on one rank fails on all: with the same error, which rank 0
        tells. An OSError becomes a RunError; all other kinds are this rank's own, and end the
        others by its end.
        """
        if self.world == 1:
            yield
            return
        failed: UsageError | RunError | None = None
        try:
            yield
        except (UsageError, RunError) as error:
            failed = error
        except OSError as error:
            failed = RunError(str(error))
        kind = "" if failed is None else "U" if isinstance(failed, UsageError) else "R"
        for rank, said in enumerate(self.gather(kind + str(failed or ""))):
            if said:
                what = UsageError if said[0] == "U" else RunError
                raise what(said[1:] if rank == 0 else f"rank {rank}: {said[1:]}", everywhere=True)

    def _max_(self, t: Tensor) -> None:
        if self.world > 1:
            with self._meeting():
                torch.distributed.all_reduce(t, op=torch.distributed.ReduceOp.MAX)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """A collective that fails because another rank has gone says so."""
        try:
            yield
        except RuntimeError as error:
            reason = self._watcher.reason(5 * BEAT_S) if self._watcher else ""
            raise RunError(
                f"another process of the run has ended ({reason or first_line(error)}); its "
                "own last lines say why"
            ) from None


class Stop:
    """Which signal any rank has caught, known to all of them at the same step.

    They ask each other every ASK_S or so, at steps that rank 0 sets; a rank alone looks every time.
    """

    def __init__(self, ranks: Ranks, caught: Sequence[int], step: int) -> None:
        self._ranks, self._caught = ranks, caught
        self._next, self._last = step, step
        self._asked = time.monotonic()

    def by(self, step: int) -> int:
        """The signal to stop by after `step` steps; 0 to go on."""
        mine = self._caught[0] if self._caught else self._ranks.orphaned
        if self._ranks.world == 1:
            return mine
        if step < self._next:
            return 0
        now = time.monotonic()
        each = (now - self._asked) / max(step - self._last, 1)
        ahead = max(1, min(int(ASK_S / max(each, 1e-6)), 2 * (step - self._last) + 1))
        self._asked, self._last = now, step
        said = torch.tensor([mine, step + ahead if self._ranks.first else 0])
        self._ranks._max_(said)
        signal_, self._next = said.tolist()
        return int(signal_)


class Watcher:
    """Signs of life between the ranks, by the store that they met at, in threads of its own.

    A rank that waits for one that is gone may wait in a library that never returns (NCCL): when
    another ends or falls silent, a rank has GRACE_S to end by itself, and is ended then.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank = store, rank
        self._others = [other for other in range(world) if other != rank]
        self._left, self._stir = threading.Event(), threading.Event()
        self._failed = False
        self._answers = 0  # of the store
        self._signs: dict[int, str] = {}  # the last of each other rank that has come
        self._silent = dict.fromkeys(self._others, 0)  # beats since then
        self.gone = ""  # what the store failed with
        self._lost = ""
        # two: a store whose machine has vanished never answers, whatever its timeout is
        self._asking = threading.Thread(target=self._ask, daemon=True)
        self._asking.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def fail(self) -> None:
        """Give the sign that this rank has failed. It is ended itself should it not end."""
        self._failed = True
        self._stir.set()

    def stop(self, failed: bool) -> None:
        """Give no more signs, but that it has failed, and look for none."""
        self._failed = failed
        self._left.set()
        self._stir.set()
        self._asking.join(BEAT_S)

    def reason(self, wait_s: float) -> str:
        """Why the others are taken for gone, once that is known; "" if it is not by then."""
        until = time.monotonic() + wait_s
        while not self._lost and time.monotonic() < until:
            time.sleep(0.1)
        return self._lost or self._quiet()

    def _ask(self) -> None:
        """Give this rank's signs, and take the others'."""
        beats, mine = 0, _key(self._rank)
        try:
            while True:
                self._store.set(mine, "failed" if self._failed else str(beats))
                come = [o for o in self._others if o in self._signs or self._store.check([_key(o)])]
                signs = self._store.multi_get([_key(other) for other in come]) if come else []
                self._signs = {o: sign.decode() for o, sign in zip(come, signs, strict=True)}
                self._answers += 1
                self._stir.wait(BEAT_S)
                self._stir.clear()
                if self._left.is_set():
                    break
                beats += 1
            if self._failed:
                self._store.set(mine, "failed")
        except RuntimeError as error:
            self.gone = first_line(error)

    def _watch(self) -> None:
        """Look for the others' signs, and end this process some time after they have ended.

        Time is counted in beats of its own: a process that was suspended, and the others with it,
        has not waited for them.
        """
        before: dict[int, str] = {}
        answers = unanswered = 0
        while not self._lost and not self._left.wait(BEAT_S):
            signs, unanswered = self._signs, unanswered + 1
            if self._answers != answers:
                answers, unanswered = self._answers, 0
            for other in self._others:
                changed = signs.get(other) != before.get(other)
                self._silent[other] = 0 if changed else self._silent[other] + 1
            before = signs
            self._lost = self._verdict(signs, unanswered)
        if self._lost and not self._left.wait(GRACE_S):
            line = f"fastgan: rank {self._rank}: ended, since {self._lost}"
            print(line, file=sys.stderr, flush=True)
            os._exit(1)

    def _verdict(self, signs: dict[int, str], unanswered: int) -> str:
        """Who is gone, in words; "" for nobody."""
        for other, sign in signs.items():
            if sign == "failed":
                quiet = self._quiet()  # it may have failed for that
                return f"rank {other} failed" + (f", {quiet}" if quiet else "")
        where = "the place that they met at (rank 0, or its torchrun)"
        if self.gone:
            return f"{where} is gone: {self.gone}"
        if unanswered * BEAT_S > SILENT_S:
            return f"{where} has been silent for {SILENT_S:g} s"
        for other, beats in self._silent.items():
            if other not in signs and beats * BEAT_S > MEET_S:
                return f"rank {other} has not come within {MEET_S:g} s"
            if other in signs and beats * BEAT_S > SILENT_S:
                return f"rank {other} has been silent for {SILENT_S:g} s"
        return ""

    def _quiet(self) -> str:
        silent = [
            str(other)
            for other, beats in self._silent.items()
            if beats >= 2 and self._signs.get(other) != "failed"
        ]
        return f"rank {' and '.join(silent)} gives no sign of life" if silent else ""


def _key(rank: int) -> str:
    return f"alive/{rank}"


_joined = Ranks()  # this process, while it is one of several: what operators add up over


@torch.library.custom_op("fastgan::sum_over_ranks", mutates_args=())
def sum_over_ranks(t: Tensor) -> Tensor:
    """A tensor added up over all ranks: what `BatchNormAct2d.reduce` takes, also when compiled."""
    return _joined.sum_(t.clone())


@sum_over_ranks.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t)


class Mean:
    """Gradients and a few numbers averaged over all ranks, in one flat all-reduce.

    Args:
        leaves: what the gradients are of.
        numbers: how many 0-d tensors come along.
    """

    def __init__(self, ranks: Ranks, leaves: Sequence[Tensor], numbers: int) -> None:
        self._ranks = ranks
        wide = torch.promote_types(leaves[0].dtype, torch.float32)
        sizes = [leaf.numel() for leaf in leaves]
        self._flat = torch.zeros(sum(sizes) + numbers, dtype=wide, device=leaves[0].device)
        *parts, self._numbers = self._flat.split([*sizes, numbers])
        # in the gradients' own order: channels-last leaves are dense
        self._parts = [
            part.as_strided(leaf.shape, leaf.stride())
            for part, leaf in zip(parts, leaves, strict=True)
        ]

    @torch.no_grad()
    def __call__(self, grads: Sequence[Tensor], numbers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Replace gradients by their mean over the ranks; returns the numbers' means."""
        torch._foreach_copy_(self._parts, list(grads))
        self._numbers.copy_(torch.stack(list(numbers)))
        self._ranks.sum_(self._flat)
        self._flat.div_(self._ranks.world)
        torch._foreach_copy_(list(grads), self._parts)
        return self._numbers.clone().unbind()
