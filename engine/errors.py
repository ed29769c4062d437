"""Errors that end a run with a sentence instead of a traceback."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

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


class Parser(argparse.ArgumentParser):
    """A parser of a command's own flags, whose errors are sentences; its prog begins with ``python -m engine.NAME``."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{self.prog}: {message}; see {' '.join(self.prog.split()[:3])} --help.")


def command(main: Callable[[list[str]], int]) -> Callable[..., int]:
    """Make a command's entry point of a function from its words to its exit code: errors become sentences on standard error."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except RunError as error:
            for line in str(error).splitlines():
                print(f"error: {line}" if not line.startswith("  ") else line, file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("error: interrupted; the same command starts again, or goes on from a checkpoint.", file=sys.stderr)
            return EXIT_ERROR

    return run


def run_command(
    words: list[str],
    help_text: str,
    commands: Mapping[str, Callable[[argparse.Namespace], int]],
    parser: Callable[[str], Parser],
) -> int:
    """Run one of several commands, ``python -m engine.NAME COMMAND …``, and return its exit code.

    Args:
        words: The command, and what is for it.
        help_text: What is shown without a command.
        commands: By name.
        parser: Returns the parser of a command's words.

    Raises:
        UserError: For a command that is not there.
    """
    if not words or words[0] in ("-h", "--help"):
        print(help_text, end="")
        return EXIT_DONE if words else EXIT_USER_ERROR
    chosen = words[0]
    if chosen not in commands:
        raise UserError(f"{chosen}: no such command; there are {', '.join(commands)}.")
    return commands[chosen](parser(chosen).parse_intermixed_args(words[1:]))
