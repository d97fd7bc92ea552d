"""The two errors a user meets. The command line turns them into one line and an exit code."""


class UsageError(Exception):
    """A flag, recipe or path that the user can mend. The message names it, its rule and its value
    (exit 2).
    """


class RunError(Exception):
    """Work that started rightly and could not be finished: a damaged file, a full disk (exit 1)."""
