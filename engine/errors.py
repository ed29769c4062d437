"""Errors that end a run with a sentence instead of a traceback."""

from __future__ import annotations

EXIT_DONE, EXIT_ERROR, EXIT_USER_ERROR, EXIT_STOPPED = 0, 1, 2, 75


class RunError(Exception):
    """Something outside the user's recipe went wrong; the message says what, where and the remedy (exit code 1)."""

    exit_code = EXIT_ERROR


class UserError(RunError):
    """The user's mistake: one or more sentences, each naming what, where and the remedy (exit code 2)."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
