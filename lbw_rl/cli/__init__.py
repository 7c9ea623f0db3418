"""The command line `lbw-rl`."""

from __future__ import annotations

import sys

import typer

from lbw_rl.cli.app import app
from lbw_rl.cli.console import fail

# typer ships click under a private name, so its family of usage errors is reached through its public member.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Entry point: exit 0 on success, 2 with one line on bad input, 130 when interrupted."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Exit as e:
        code = e.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = fail("interrupted; the same command with --resume goes on where it stopped", code=130)
    except _UsageError as e:
        code = fail(f"{e.format_message()} See `lbw-rl --help`.")  # type: ignore[attr-defined]
    except (ValueError, ModuleNotFoundError) as e:
        if not _ours(e):
            raise
        code = fail(str(e))
    sys.exit(code if isinstance(code, int) else 0)


def _ours(error: BaseException) -> bool:
    """Whether this package raised the error on purpose: bad input, not a bug in a library underneath."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return module.startswith(("lbw_rl", "concurrent.futures"))
