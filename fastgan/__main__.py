"""`python -m fastgan`, the console script, and what torchrun starts."""

import os
import signal
import sys
import threading


def main() -> int:
    """`fastgan.cli.main`; and the answer to a Ctrl-C while that is imported, which takes 0.3 s."""
    try:
        # By no exception: in the midst of an import it may be wrapped or swallowed. Where Ctrl-C is
        # ignored (a shell's background jobs), that stays so.
        ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if ours:
            signal.signal(signal.SIGINT, _interrupted)
        from .cli import main as cli

        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = cli()
        if any(thread.name.startswith("fastgan") for thread in threading.enumerate()):
            # Who was told twice to end leaves a thread that writes. The interpreter's end would
            # stop that in the midst of C++, which ends the process by SIGABRT.
            sys.stdout.flush()
            os._exit(code)
        return code
    except KeyboardInterrupt:  # just before cli has an answer of its own
        return _interrupted()


def _interrupted(*_: object) -> int:
    """End at once: nothing has begun that would have to be put right."""
    try:
        os.write(2, b"fastgan: interrupted\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
