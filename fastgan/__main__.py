"""`python -m fastgan`, the console script, and what torchrun starts."""

import os
import sys
import threading

from .signals import at_once


def main() -> int:
    """`fastgan.cli.main`; a signal while that is imported, for 0.3 s, has its answer, too."""
    try:
        with at_once():
            from .cli import main as cli
        code = cli()
    except KeyboardInterrupt:  # between two that answer it
        print("fastgan: interrupted", file=sys.stderr)
        return 130
    if any(thread.name.startswith("fastgan") for thread in threading.enumerate()):
        # Who was told twice to end leaves a thread that writes. The interpreter's end would stop
        # that in the midst of C++, which ends the process by SIGABRT.
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
