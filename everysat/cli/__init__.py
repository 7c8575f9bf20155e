"""The command line: a few verbs, each thin over the Python function of the same name."""

from __future__ import annotations

import sys

import typer

from everysat.cli import adapt, ask, collect, data, distill, learn, locate, maps, stores, words

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Earth observation for any sensor: pre-train, fine-tune, embed, map. Start with: everysat demo",
)
for commands in (data, collect, learn, distill, adapt, maps, ask, locate, stores, words):
    app.add_typer(commands.app)


def main() -> None:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    try:
        app()
    except (ValueError, LookupError, OSError, ImportError, MemoryError) as error:
        message = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
        print(f"everysat: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("everysat: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
