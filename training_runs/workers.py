"""Where a grid's runs run: local processes, one torch thread each, or Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Literal, get_args

import torch

Backend = Literal["local", "ray"]


def check_backend(name: str) -> Backend:
    """The name as a `Backend`.

    Raises:
        ValueError: it is none.
    """
    known: tuple[Backend, ...] = get_args(Backend)
    for backend in known:
        if backend == name:
            return backend
    raise ValueError(f"backend: {name!r} is unknown; accepted: {', '.join(known)}")


@contextlib.contextmanager
def executor(backend: Backend, workers: int) -> Iterator[Callable[..., Future[Any]]]:
    """`submit(function, *args)` of a pool that lasts as long as the block.

    Left by an exception, the block cancels what has not begun. Local workers end with their parent, even with one
    that is killed: a worker that went on would write into the folders of the grid that resumes.

    Args:
        backend: "local", or "ray" for a cluster that shares the file system.
        workers: local processes.

    Raises:
        ValueError: Ray is asked for and not installed.
    """
    if backend == "ray":
        with _ray_submit() as submit:
            yield submit
        return
    # spawn: a forked torch may hang on the thread pools of its parent
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with ours, theirs, ProcessPoolExecutor(workers, context, _start_worker, (theirs,)) as pool:
        try:
            yield pool.submit
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            ours.close()
            raise


def result_of(future: Future[Any]) -> Any:
    """What a finished run returned, or the exception that it raised, unwrapped from Ray's own."""
    try:
        return future.result()
    except Exception as e:
        cause = getattr(e, "cause", None)  # Ray wraps what a task raised, and its text is the whole traceback
        if isinstance(cause, Exception):
            raise cause from e
        raise


def _start_worker(parent: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Ends this worker once its parent has closed the pipe, or was killed."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    os._exit(1)


@contextlib.contextmanager
def ray_cluster() -> Iterator[Any]:
    """The module `ray`, connected to the cluster at hand or to a local one that ends with the block.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as e:
        raise ValueError(
            "backend: 'ray' needs the package ray; accepted: pip install 'lbw-rl[ray]', or --backend local"
        ) from e
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


@contextlib.contextmanager
def _ray_submit() -> Iterator[Callable[..., Future[Any]]]:
    with ray_cluster() as ray:
        remote = ray.remote(num_cpus=1)(lambda f, *args: f(*args))
        yield lambda f, *args: remote.remote(f, *args).future()
