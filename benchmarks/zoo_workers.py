"""Work in processes of its own, each piece with a time limit; what dies is told, not lost."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

Task = Any
Parts = Iterable[dict[str, Any]]
MOST_TASKS = 30  # of a process: libraries keep what they once made
PATIENCE = 5.0  # seconds that an idle process has to end
_CONTEXT = multiprocessing.get_context("spawn")


class Worker:
    """A process that does one task after another.

    Attributes:
        task: what it is at, or None.
        row: the parts of it that are known.
        began: when the task was given.
        done: how many tasks are finished.
        is_busy: whether one is not.
    """

    def __init__(self, work: Callable[[Task], Parts]) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task = None
        self.row: dict[str, Any] = {}
        self.began = 0.0
        self.done = 0
        self.is_busy = False

    def give(self, task: Task) -> None:
        """Begin with a task."""
        self.task, self.row, self.began, self.is_busy = task, {}, time.monotonic(), True
        self.connection.send(task)

    def receive(self) -> bool:
        """Take what is there; whether the task has ended, well or badly."""
        try:
            part = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            self.row["failure"] = f"its process died with exit code {self.process.exitcode}"
            return True
        if part is None:
            self.done += 1
            self.is_busy = False
            return True
        self.row.update(part)
        return False

    def stop(self) -> None:
        """End the process, whatever it is at; an idle one goes by itself."""
        self.connection.close()
        if not self.is_busy:
            self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()

    @property
    def is_worn(self) -> bool:
        """Whether the next task needs a new process."""
        return self.done >= MOST_TASKS or "failure" in self.row


def _serve(connection: Connection, work: Callable[[Task], Parts]) -> None:
    warnings.filterwarnings("ignore")
    while True:
        try:
            task = connection.recv()
        except EOFError:  # nobody wants anything any more
            return
        for part in work(task):
            connection.send(part)
        connection.send(None)


def worked(
    work: Callable[[Task], Parts], tasks: Sequence[Task], *, jobs: int, limit: float
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Do tasks side by side.

    Args:
        work: makes the parts of a task's row, in a process of its own; importable by name.
        tasks: what to do.
        jobs: how many processes.
        limit: seconds for one task; its parts so far are kept.

    Yields:
        A task and its row, as they end. `failure` in a row says why there is not more.
    """
    left = list(reversed(tasks))
    workers: list[Worker] = []
    idle: list[Worker] = []
    try:
        while left or workers:
            while left and len(workers) < jobs:
                worker = idle.pop() if idle else Worker(work)
                workers.append(worker)
                worker.give(left.pop())
            soonest = min(worker.began for worker in workers) + limit - time.monotonic()
            ready = wait([worker.connection for worker in workers], max(soonest, 0.0))
            for worker in list(workers):
                late = time.monotonic() - worker.began > limit
                ended = worker.connection in ready and worker.receive()
                if late and not ended:
                    worker.row["failure"] = f"it took more than {limit:g} s"
                if late or ended:
                    workers.remove(worker)
                    if worker.is_worn:
                        worker.stop()
                    else:
                        idle.append(worker)
                    yield worker.task, worker.row
    finally:
        for worker in [*workers, *idle]:
            worker.stop()
