"""Many jobs in other processes, on this machine or on a Dask cluster: one that dies or hangs costs itself alone.

Both ways are an Executor whose threads hand each job to a child process of their own, which has a time limit and a memory bound, and
is renewed now and then. ProcessPoolExecutor has no time limit, and one killed worker breaks all of it; pebble's pool, which has both,
cannot start its processes inside a Dask worker, since that is a daemon. So one child per thread serves both.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from volssl import __version__
from volssl.files import BadInput

ATTEMPTS = 2  # a job whose process is killed is tried once more
CONNECT_S = 20.0
GIB = 2**30
LEAST_GIB = 0.5  # the libraries alone take a good part of this
# As many processes as cores are meant to run: each computes with one thread, unless the user says otherwise.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLOSC_NTHREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")
CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Means:
    """What a run may use: `workers` processes of this machine (0: only this one), or the Dask cluster at `scheduler`.

    A job beside this process gets `minutes`, and its process `memory_gib`: 0 is an equal share of this machine's memory, or no bound on
    a cluster. A process is renewed after `renew` jobs. `ignore_space` goes on where the disk seems too small.
    """

    workers: int = 0
    scheduler: str | None = None
    minutes: float = 30.0
    memory_gib: float = 0.0
    renew: int = 100
    ignore_space: bool = False

    def __post_init__(self) -> None:
        if self.workers < 0 or self.renew < 1 or not self.minutes > 0:
            raise BadInput(f"workers must be >= 0, renew >= 1 and minutes > 0; found {self.workers}, {self.renew} and {self.minutes}")
        if self.memory_gib and not self.memory_gib >= LEAST_GIB:
            raise BadInput(f"memory-gib: must be 0 or at least {LEAST_GIB}; found {self.memory_gib}")
        if self.workers and self.scheduler:
            raise BadInput("--workers and --scheduler exclude each other: a cluster has its own workers; give one of them")


@dataclass(frozen=True)
class Bounds:
    """Of one child process. `memory_bytes` counts what it writes to (heap, stacks), not mapped files; None is no bound."""

    seconds: float
    memory_bytes: int | None
    renew: int


class Lost(Exception):
    """A job that gave no answer. `code` is `timeout`, or `worker_killed` if its process died twice."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class _Child:
    # A fresh interpreter, not multiprocessing's: that one would import the caller's script again, and is forbidden to daemons.
    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.done = bounds, 0
        self.line, theirs = multiprocessing.Pipe()
        code = f"import sys; sys.path[:] = {sys.path!r}; from volssl.pools import serve; serve({theirs.fileno()}, {bounds.memory_bytes})"
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=ONE_THREAD | os.environ)

    def ask(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
        # Whether it answered, and the answer or the exception. Raises: TimeoutError, or EOFError, OSError: it is dead.
        self.line.send((function, args))
        if not self.line.poll(self.bounds.seconds):
            raise TimeoutError
        self.done += 1
        return self.line.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.line.close()


@dataclass
class _Crew:
    # The children of one run in this process.
    children: set[_Child] = field(default_factory=set)
    idle: list[_Child] = field(default_factory=list)
    closed: bool = False
    lock: Any = field(default_factory=threading.Lock)

    def take(self, bounds: Bounds) -> _Child:
        with self.lock:
            if self.closed:
                raise Lost("worker_killed")
            child = self.idle.pop() if self.idle else _Child(bounds)
            self.children.add(child)
            return child

    def give_back(self, child: _Child, *, fit: bool) -> None:
        with self.lock:
            if fit and not self.closed and child.done < child.bounds.renew:
                self.idle.append(child)
                return
            self.children.discard(child)
        child.end()


_crews: dict[str, _Crew] = {}


def apart(crew: str, bounds: Bounds, function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` in a child process of this one and answer what it answers, or raise what it raises.

    Args: crew: name of the run whose idle children may be used; `dismiss` ends them.
    Raises: Lost: it took too long, or its process died, also at the second attempt.
    """
    own = _crews.setdefault(crew, _Crew())
    for _ in range(ATTEMPTS):
        child = own.take(bounds)
        fit = False
        try:
            answered, answer = child.ask(function, args)
            fit = answered
        except TimeoutError:
            raise Lost("timeout") from None
        except (EOFError, OSError):
            continue
        finally:
            own.give_back(child, fit=fit)
        if answered:
            return answer
        raise answer
    raise Lost("worker_killed")


def _told(crew: str, bounds: Bounds, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[bool, Any]:
    # Whether it answered, and the answer or the exception. A Dask worker would log an exception that is raised, with the arguments: paths.
    try:
        return True, apart(crew, bounds, function, *args)
    except Exception as error:
        return False, error


def dismiss(crew: str) -> None:
    """End all children of a run in this process; it gets no new ones."""
    own = _crews.setdefault(crew, _Crew())
    with own.lock:
        own.closed = True
        for child in own.children:
            child.process.kill()  # whoever waits for it finds the line closed, and cleans up
    for child in own.idle:
        child.end()


def serve(handle: int, memory_bytes: int | None) -> None:
    """What a child does: answer jobs from the pipe `handle` until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its children
    if memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    threading.Thread(target=_end_with_parent, args=(handle,), daemon=True).start()
    line = Connection(handle)
    while True:
        try:
            job = line.recv_bytes()
        except EOFError:
            return
        try:
            function, args = pickle.loads(job)
            reply = pickle.dumps((True, function(*args)))
        except Exception as error:
            reply = _packed(error)
        line.send_bytes(reply)


def _packed(error: Exception) -> bytes:
    try:
        reply = pickle.dumps((False, error))
        pickle.loads(reply)
    except Exception:  # some exceptions do not survive the journey
        reply = pickle.dumps((False, RuntimeError(type(error).__name__)))
    return reply


def _end_with_parent(handle: int) -> None:
    # A parent that is killed must not leave a child that goes on writing beside a resumed run.
    poll = select.poll()
    poll.register(handle, 0)
    poll.poll()
    os._exit(1)


@dataclass(frozen=True)
class _Hands:
    # `lost` are the exceptions by which the executor says that a job's worker died.
    executor: Executor
    crew: str
    bounds: Bounds
    slots: Callable[[], int]
    lost: tuple[type[BaseException], ...] = ()

    def submit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Future[Any]:
        return self.executor.submit(_told, self.crew, self.bounds, function, args)

    def answer(self, future: Future[Any]) -> Any:
        try:
            answered, answer = future.result()
            if answered or isinstance(answer, Lost):
                return answer
            raise answer
        except self.lost:
            return Lost("worker_killed")
        except CancelledError:
            raise BadInput("--scheduler: must be there to the end; the connection was lost; start it and run again with --resume") from None


def spread(
    function: Callable[..., Any], jobs: Iterable[tuple[str, tuple[Any, ...]] | None], means: Means, *, ahead: int = 1
) -> Iterator[tuple[str, Any]]:
    """Do all `jobs`, (name, arguments of `function`), and yield (name, answer) as they end; the answer of a lost job is a `Lost`.

    Jobs are taken a few at a time, so that memory does not grow with their number: `ahead` for each worker besides the one it does, 0
    where which job comes next depends on how others end; None among them stands for no job before another one has ended. `function` must
    be importable by its name.
    Raises: what a job raises, which ends all; BadInput: no such cluster.
    """
    if not means.workers and not means.scheduler:
        yield from ((name, function(*args)) for name, args in filter(None, jobs))
        return
    with _cluster(means) if means.scheduler else _local(means) as hands:
        waiting: dict[Future[Any], str] = {}
        for job in jobs:
            if job is None:
                yield from _ended(hands, waiting)
                continue
            waiting[hands.submit(function, job[1])] = job[0]
            while len(waiting) >= (1 + ahead) * hands.slots():
                yield from _ended(hands, waiting)
        while waiting:
            yield from _ended(hands, waiting)


def _ended(hands: _Hands, waiting: dict[Future[Any], str]) -> Iterator[tuple[str, Any]]:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(future), hands.answer(future)


@contextmanager
def _local(means: Means) -> Iterator[_Hands]:
    share = int(means.memory_gib * GIB) or _machine_bytes() // means.workers
    crew = uuid.uuid4().hex
    with ThreadPoolExecutor(means.workers) as pool:
        try:
            yield _Hands(pool, crew, Bounds(60 * means.minutes, share, means.renew), lambda: means.workers)
        finally:
            dismiss(crew)
            pool.shutdown(wait=True, cancel_futures=True)


def _machine_bytes() -> int:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # in a container, its own bound; "max" if it has none
        total = min(total, int(CGROUP.read_text()))
    return total


@contextmanager
def _cluster(means: Means) -> Iterator[_Hands]:
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError:
        raise BadInput('--scheduler: needs Dask; found no package distributed; pip install "volssl[dask]"') from None
    if not re.fullmatch(r"(tcp|tls)://.+:\d+", str(means.scheduler)):
        raise BadInput(f"--scheduler: must be tcp://HOST:PORT or tls://HOST:PORT; found {means.scheduler}")
    try:
        client: Any = Client(means.scheduler, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"--scheduler {means.scheduler}: must be a Dask scheduler that answers; {type(error).__name__}") from None
    crew = uuid.uuid4().hex
    memory = int(means.memory_gib * GIB) or None
    with client:
        executor = client.get_executor(pure=False, retries=0)
        try:
            found = sorted(set(client.run(_version).values()))
            if found and found != [__version__]:
                raise BadInput(f"--scheduler {means.scheduler}: its workers must run volssl {__version__}; found {', '.join(found)}")
            slots = lambda: max(4, sum(client.nthreads().values()))  # noqa: E731  # workers may come and go
            yield _Hands(executor, crew, Bounds(60 * means.minutes, memory, means.renew), slots, (KilledWorker,))
        finally:
            executor.shutdown(wait=False)
            client.run(dismiss, crew, on_error="ignore")


def _version() -> str:
    return __version__
