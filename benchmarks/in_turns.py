"""What the benchmarks of speed share: contenders in turns, in one process; memory; CSV and plots.

Absolute times of shared machines do not compare. Ratios of calls that follow one another do: each
round runs every contender once, and a ratio is taken within its round.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

Run = Callable[[], object]


class Spread(NamedTuple):
    """Median, and the quarter and three quarters around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}…{self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least two values."""
    low, median, high = statistics.quantiles(values, n=4)
    return Spread(median, low, high)


def in_turns(
    contenders: Mapping[str, Run], *, seconds: float, device: str = "cpu", least: int = 7
) -> dict[str, Spread]:
    """Each contender's time as a ratio to the first's of the same round.

    A GPU gets as many calls in a row as fill ten milliseconds, as a network gives it: launches are
    then hidden where a kernel takes longer.

    Args:
        contenders: what to run, by name; the first is the yardstick.
        seconds: for all together, unless `least` rounds take longer.
        device: `"cuda"` is waited for.
        least: rounds.
    """
    for run in contenders.values():  # compilers, caches and allocators
        run()
        run()
    times = {name: calls(run, device) for name, run in contenders.items()}
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    while len(next(iter(ratios.values()))) < least or time.perf_counter() - began < seconds:
        took = {name: seconds_of(run, device, times[name]) for name, run in contenders.items()}
        yardstick = next(iter(took.values()))
        for name, value in took.items():
            ratios[name].append(value / yardstick)
    return {name: spread(values) for name, values in ratios.items()}


def calls(run: Run, device: str) -> int:
    """How many to make in a row."""
    return 1 if device == "cpu" else max(1, int(0.01 / seconds_of(run, device)))


def seconds_of(run: Run, device: str = "cpu", times: int = 1) -> float:
    """Wall-clock time of one call, of so many in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def peak_bytes(run: Run, device: str = "cpu") -> int:
    """What a call takes at its peak beside what was there before; the least of three.

    On a CPU the process's resident memory (Linux), which sees what oneDNN and BLAS take too.

    Raises:
        OSError: the system does not tell.
    """
    run()
    return min(_peak_of_cuda(run) if device == "cuda" else _peak_of_process(run) for _ in range(3))


def _peak_of_cuda(run: Run) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_process(run: Run) -> int:
    gc.collect()
    # Freed memory goes back to the system, or its reuse would not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not say {name}")


@contextmanager
def table(
    path: Path | None, columns: Sequence[str]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Rows go to a CSV file as they come, if there is a path, with what computed them."""
    if path is None:
        yield lambda row: None
        return
    made_by = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *made_by])
        writer.writeheader()

        def write(row: Mapping[str, Any]) -> None:
            writer.writerow({**row, **made_by})
            file.flush()

        yield write
