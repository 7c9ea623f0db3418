"""The command line `lbw-rl`."""

from __future__ import annotations

import errno
import sys
from concurrent.futures.process import BrokenProcessPool

import typer

from lbw_rl import launch
from lbw_rl.cli.app import app
from lbw_rl.cli.console import fail
from lbw_rl.extras import extra_of

# typer ships click under a private name, so its family of usage errors is reached through its public member.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_INTERRUPTED = 130

# What would be done as often as there are processes, all in one folder.
_OF_ONE_PROCESS = ("compare", "demo", "report", "stress", "train-policy")


def main() -> None:
    """Entry point: exit 0 on success, 2 with one line on bad input, 1 on what the machine lacks, 130 when interrupted."""
    try:
        arguments = sys.argv[1:] or ["--help"]
        if launch.world_size() > 1 and arguments[0] in _OF_ONE_PROCESS:
            raise ValueError(f"{arguments[0]}: is of one process; accepted from {launch.world_size()}: run")
        code = app(arguments, standalone_mode=False)
        if code == _INTERRUPTED:  # typer turns a KeyboardInterrupt into its exit code, without a word
            raise KeyboardInterrupt
    except (typer.Abort, KeyboardInterrupt):
        code = fail("interrupted; the same command with --resume goes on where it stopped", code=_INTERRUPTED)
    except _UsageError as e:
        message = e.format_message()  # type: ignore[attr-defined]
        code = fail(f"{message} See `lbw-rl --help`.") if message else 2  # empty: the help itself was shown
    except BrokenProcessPool:
        code = fail("a worker process died (killed, or out of memory); --resume keeps what is finished", code=1)
    except ModuleNotFoundError as e:
        extra = extra_of(e.name)
        if extra is None:
            raise
        advice = f"{str(e.name).partition('.')[0]} is not installed; accepted: pip install 'lbw-rl[{extra}]'"
        code = fail(str(e) if "pip install" in str(e) else advice)  # some say what it is needed for
    except ValueError as e:
        if not _ours(e):
            raise
        code = fail(str(e))
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" at {e.filename}" if e.filename else ""
        code = fail(
            f"{e.strerror}{where}; with more room, the same command with --resume goes on where it stopped", code=1
        )
    except RuntimeError as e:
        if type(e).__name__ != "PeerLostError":  # its module would import torch
            raise
        code = fail(f"{e}; the same command with --resume goes on from the last checkpoint", code=1, alike=False)
    sys.exit(code if isinstance(code, int) else 0)


def _ours(error: BaseException) -> bool:
    """Whether this package raised the error on purpose: bad input, not a bug in a library underneath."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return module.startswith(("lbw_rl", "concurrent.futures"))
