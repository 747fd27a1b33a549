"""Work spread over other processes, its results in the order of the tasks."""

import collections
import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Not multiprocessing, which would run the user's main module again in every process.
_START = "import sys; sys.path[:] = {path!r}; from cla_jax.data import workers; workers.serve()"


class Workers:
    """Processes that are started when there is enough to do, and end with this one, however it ends.

    Args:
      count: how many; with 1 the work is done in this process.
    """

    def __init__(self, count: int):
        self._count = count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count)  # one waits for each process

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # a task that it did not read any more
                    pipe.close()

    def map(self, function: Callable[[T], R], tasks: Iterable[T], *, alone: int = 0) -> Iterator[R]:
        """`function` of each task. Only a few tasks and results are held at once.

        To start processes takes a second: the first tasks, `alone` of them, are done by this process,
        unless others run already. A process gets the function once, so it may hold much. What it raises
        is raised here.
        """
        tasks = iter(tasks)
        own = None if self._count == 1 else 0 if self._processes else alone
        for task in itertools.islice(tasks, own):
            yield function(task)
        waiting: collections.deque[Future[R]] = collections.deque()
        for task in tasks:
            self._start()
            waiting.append(self._threads.submit(self._ask, function, task))
            if len(waiting) > 2 * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _start(self) -> None:
        if self._processes:
            return
        for _ in range(self._count):
            process = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._processes.append(process)
            self._idle.put(_Worker(process))

    def _ask(self, function: Callable, task: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.ask(function, task)
        finally:
            self._idle.put(worker)


class _Worker:
    """The parent's side of one process."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process
        self._function: Callable | None = None

    def ask(self, function: Callable, task: Any) -> Any:
        known = function is self._function
        self._function = function
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, (None if known else function, task))
            result, error = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            raise ChildProcessError(
                f"a data preparation process ended with code {code}; this may mean too little memory"
            ) from None
        if error is not None:
            raise error
        return result


def serve() -> None:
    """The life of a worker: answers tasks until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent ends its workers
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    function = None
    while True:
        try:
            new, task = pickle.load(tasks)
        except EOFError:
            return
        function = new or function
        assert function is not None
        try:
            answer = function(task), None
        except (ValueError, OSError, MemoryError) as error:  # anything else is shown, and ends this
            answer = None, error
        try:
            _send(answers, answer)
        except BrokenPipeError:
            return


def _send(pipe: IO[bytes], message: Any) -> None:
    pickle.dump(message, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()
