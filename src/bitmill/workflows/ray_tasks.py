"""Independent calls as tasks of a Ray cluster, which distributes them, and retries those whose worker is lost.

Every task computes with as many threads as this process, so that its results are equal to the byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Protocol

import torch

from bitmill.errors import BitmillError, UsageError, one_line, quoted
from bitmill.native import threads
from bitmill.progress import Progress

LOCAL, AUTO = "local", "auto"
_ADDRESS = re.compile(r"[A-Za-z0-9._-]{1,253}:[0-9]{1,5}", re.ASCII)
RETRIES = 3  # of a task whose worker is lost
_STORE_BYTES = 128 << 20  # of a local cluster: arguments are token ids


class Tasks(Protocol):
    """Makes independent calls of a function."""

    @property
    def workers(self) -> int:
        """Return the number of calls that run at a time."""

    def __call__(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of each call and its result, as calls finish.

        Args:
            function: the function.
            calls: arguments of each call.
        """


class OneByOne:
    """Makes calls in this process, in order."""

    workers = 1

    def __call__(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of each call and its result."""
        for number, arguments in enumerate(calls):
            yield number, function(*arguments)


def check_address(address: str | None) -> None:
    """Raise UsageError unless this is None, "local", "auto" or HOST:PORT."""
    if address not in (None, LOCAL, AUTO) and not _ADDRESS.fullmatch(address):
        raise UsageError(
            f"--ray (ray) is {quoted(address)}; use local, for a cluster of this machine, auto for the one that "
            "runs on it, or HOST:PORT, as ray start --head prints."
        )


def import_ray() -> Any:
    """Return the module ray.

    Raises:
        UsageError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing to anyone
    try:
        return import_module("ray")
    except ImportError as error:
        raise UsageError(
            f'Ray cannot be imported ({one_line(error)}); install it with pip install "bitmill[ray]".'
        ) from None


@contextmanager
def tasks_on(address: str | None, progress: Progress) -> Iterator[Tasks]:
    """Connect to a Ray cluster inside a with-block; a connection that this process has already is used.

    Args:
        address: "local" for a cluster of this machine, which ends with the block, or the address of another one;
            None makes calls one by one in this process.
        progress: advanced by one for each task of the cluster.

    Raises:
        UsageError: Ray is not installed, there is no cluster at the address, or none of its nodes has as many
            processors as this process has threads.
    """
    check_address(address)
    if address is None:
        yield OneByOne()
        return
    ray = import_ray()
    connected = ray.is_initialized()
    if not connected:
        _connect(ray, address)
    try:
        processors = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if max(processors, default=0) < threads():
            raise UsageError(
                f"No node of the Ray cluster has {threads()} processors, the number of threads of this process; "
                "set OMP_NUM_THREADS to a smaller number."
            )
        yield RayTasks(ray, sum(count // threads() for count in processors), progress)
    finally:
        if not connected:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Start a local cluster, or connect to another one."""
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == LOCAL:
            processors = max(os.cpu_count() or 1, threads())
            ray.init(address=LOCAL, num_cpus=processors, object_store_memory=_STORE_BYTES, **quiet)
        else:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises the base class where a node does not start in time
        raise UsageError(
            f"The Ray cluster {quoted(address)} cannot be reached or started ({one_line(error)}); use --ray "
            "local, or the address that ray start --head prints."
        ) from None


class RayTasks:
    """Makes calls as tasks of the cluster.

    Attributes:
        workers: tasks that run at a time.
    """

    def __init__(self, ray: Any, workers: int, progress: Progress) -> None:
        self._ray, self.workers, self._progress = ray, workers, progress

    def __call__(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of each call and its result, as calls finish; Ray retries those of a lost worker.

        Args:
            function: of the module of bitmill, with a result that can be pickled.
            calls: arguments of each call, which can be pickled.

        Raises:
            BitmillError: that of a call, or the workers of one call were lost too often.
        """
        ray = self._ray
        task = ray.remote(num_cpus=threads(), max_retries=RETRIES)(_call)
        numbers = {
            task.remote(function, threads(), os.getcwd(), arguments): n for n, arguments in enumerate(calls)
        }
        waiting = list(numbers)
        self._progress.start("tasks on Ray", len(calls))
        try:
            while waiting:
                [done], waiting = ray.wait(waiting, num_returns=1)
                result = self._result(done)
                self._progress.advance()
                yield numbers[done], result
        finally:
            self._progress.finish()
            for reference in waiting:
                ray.cancel(reference, force=True)

    def _result(self, reference: Any) -> Any:
        ray = self._ray
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise BitmillError(
                f"A task of the Ray cluster was lost {RETRIES + 1} times ({one_line(error)}); run the command "
                "again, which continues, with more memory or fewer tasks at a time."
            ) from None


def _call(function: Callable[..., Any], count: int, folder: str, arguments: tuple[Any, ...]) -> Any:
    """Call a function with so many threads, in a folder that relative paths start from, where it exists."""
    torch.set_num_threads(count)
    if os.path.isdir(folder):
        os.chdir(folder)
    return function(*arguments)
