"""`ept`: the command line. Heavy libraries are imported inside the commands, so that `ept --help` answers at once."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import typer
from typer import Option
from typer.core import TyperGroup

from ept.runs.processes import rank
from ept.version import __version__

from . import compare, env, evaluate, export, predict, profile, tasks, train

USER_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, PermissionError, ConnectionError)
# Not caused by wrong input: a full disk, no memory left, a training run that diverges.
FAILURES = (OSError, MemoryError, FloatingPointError)


class OneLineErrors(TyperGroup):
    """Command group that shows an error as one line on standard error, or as a traceback with EPT_DEBUG=1.

    The exit code is 2 for wrong input, 1 if the machine or the training failed, and 128 plus the signal's number if a
    signal ended the command.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            if rank() == 0:  # all ranks have agreed on it, or the launcher signals them all
                typer.echo(str(stop) or "stopped", err=True)
            raise typer.Exit(getattr(stop, "exit_code", 130)) from stop
        except BrokenPipeError:
            raise  # the reader has closed the pipe: the command line ends silently
        except (*USER_ERRORS, *FAILURES) as error:
            if os.environ.get("EPT_DEBUG") == "1":
                raise
            text = str(error) or type(error).__name__
            where = f" on rank {rank()}" if rank() else ""
            typer.echo(f"error{where}: {text}  (EPT_DEBUG=1 shows where)", err=True)
            raise typer.Exit(2 if isinstance(error, USER_ERRORS) else 1) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Efficient Prompt Tuning: train, evaluate and use small adapters of frozen language models.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ept {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: bool = Option(False, "--version", callback=_version, is_eager=True, help="Print the version and exit."),
) -> None:
    for stream in (sys.stdout, sys.stderr):  # a character that the console cannot write is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


for command in (train.train, evaluate.evaluate, predict.predict, compare.compare, export.export, profile.profile):
    app.command()(command)
app.add_typer(tasks.app, name="tasks")
app.command()(env.env)


if __name__ == "__main__":
    app()
