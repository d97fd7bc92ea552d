"""The two errors a user meets. The command line turns them into one line and an exit code."""


class FastganError(Exception):
    """A message for the user. `everywhere`: all processes of a run raise it, and rank 0 alone tells
    it.
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class UsageError(FastganError):
    """A flag, recipe or path that the user can mend. The message names it, its rule and its value
    (exit 2).
    """


class RunError(FastganError):
    """Work that started rightly and could not be finished: a damaged file, a full disk (exit 1)."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or NumPy is a lack of memory: a CPU's allocator and the libraries
    on a GPU have no error of their own for it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    signs = ("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
