"""The command line. Thin: every command calls one verb and prints what it returns."""

from __future__ import annotations

import os
import sys

from moviola.types import MoviolaError, printable


def main() -> None:
    """Entry point of the `moviola` command.

    Exit status: 0 done, 1 done with failures or nothing found, 2 an error that the message explains.
    """
    from moviola.cli.commands import app

    try:
        app()
    except MoviolaError as error:
        _complain(error.problem, error.hint)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _complain(f"{error.strerror or error}: {printable(error.filename or '')}".rstrip(": "), None)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code != 130:  # what Typer makes of Ctrl-C
            raise
        _complain("Stopped. What was finished is kept; run the same command again to go on.", None)
        sys.exit(130)


def _complain(problem: str, hint: str | None) -> None:
    print(f"moviola: {problem}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)
