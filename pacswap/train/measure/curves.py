"""Loss, learning rates and validation mIoU of all arms, drawn from their logs."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from pacswap.errors import TrainingError
from pacswap.train.engine.log import LOG, VAL
from pacswap.train.writing import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[int, float]]

# Okabe and Ito's colours, which colour-blind readers tell apart; dashes tell them apart in grey.
_STYLES = (
    ("#0072b2", "solid"),
    ("#d55e00", (0, (6, 1.5))),
    ("#009e73", (0, (1.5, 1.2))),
    ("#cc79a7", (0, (6, 1.5, 1.5, 1.5))),
    ("#56b4e9", (0, (3, 3))),
)
_GREYS = ("#202226", "#5c6068", "#8e929a", "#b6bac2")
_RATE = "lr/"  # begins the columns of learning rates


def read_log(path: Path) -> dict[str, Points]:
    """A log's numbers, column by column.

    Args:
        path: a CSV file with a column `step`. Empty cells and anything but finite numbers are left
            out, so is a last line that was cut off.

    Returns:
        Of every other column with a number: (step, value), by step.

    Raises:
        TrainingError: the file cannot be read or has no column `step`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainingError(f"cannot read the log '{path}': {error}.") from error
    if "step" not in names:
        raise TrainingError(
            f"'{path}' is not a log: expected a column 'step', got {', '.join(names) or 'none'}."
        )
    found: dict[str, Points] = {name: [] for name in names if name != "step"}
    for row in rows:
        step = _number(row["step"])
        for name, points in found.items():
            value = _number(row[name])
            if step is not None and value is not None:
                points.append((int(step), value))
    return {name: sorted(points) for name, points in found.items() if points}


def draw_curves(folders: Mapping[str, Sequence[Path]], path: Path) -> Path:
    """Draw the arms' loss, learning rates and mIoU over steps into a PNG.

    Each seed is a thin line; the mean over the seeds, where there are several, is a bold one. The
    loss is averaged over a fiftieth of the training, else its noise would hide it. The learning
    rates are those of the schedule, which is the same for all arms: a line for each name in the
    recipe.

    Args:
        folders: each arm's trainings, one per seed: where their logs lie.
        path: the picture.

    Returns:
        `path`.

    Raises:
        TrainingError: matplotlib is missing, a log cannot be read or the picture not be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TrainingError(
            "matplotlib is missing, by which curves are drawn. Install it: "
            'pip install "pacswap[viz]"'
        ) from error

    learning = {arm: [read_log(one / LOG) for one in runs] for arm, runs in folders.items()}
    measured = {arm: [read_log(one / VAL) for one in runs] for arm, runs in folders.items()}
    figure = Figure(figsize=(13.5, 3.9), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, rates, miou = figure.subplots(1, 3)
    for number, arm in enumerate(folders):
        losses = [log["loss"] for log in learning[arm] if "loss" in log]
        _draw_arm(loss, arm, [smoothed(c, max(1, len(c) // 50)) for c in losses], number)
        scores = [log["miou"] for log in measured[arm] if "miou" in log]
        scaled = [[(step, 100 * value) for step, value in curve] for curve in scores]
        _draw_arm(miou, arm, scaled, number, marker="o")
    _draw_rates(rates, [log for logs in learning.values() for log in logs])
    _dress(loss, "loss")
    _dress(rates, "learning rate")
    _dress(miou, "mIoU on the validation pictures, in points")
    handles, labels = loss.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    data = BytesIO()
    canvas.print_png(data)
    return write_file(path, data.getvalue())


def smoothed(points: Points, window: int) -> Points:
    """The mean of each value and those before it, `window` at most.

    >>> smoothed([(1, 4.0), (2, 2.0), (3, 0.0)], 2)
    [(1, 4.0), (2, 3.0), (3, 1.0)]
    """
    sums = list(accumulate((value for _, value in points), initial=0.0))
    return [
        (step, (sums[end] - sums[max(0, end - window)]) / min(end, window))
        for end, (step, _) in enumerate(points, start=1)
    ]


def mean_curve(curves: Sequence[Points]) -> Points:
    """The mean over the curves at the steps that all of them have.

    >>> mean_curve([[(1, 4.0), (2, 2.0)], [(2, 4.0), (3, 1.0)]])
    [(2, 3.0)]
    """
    found = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*map(set, found))) if found else []
    return [(step, math.fsum(curve[step] for curve in found) / len(found)) for step in common]


def _number(cell: str | None) -> float | None:
    """A cell's number; None for an empty, missing or unreadable one."""
    try:
        value = float(cell or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _draw_arm(
    axes: Axes, arm: str, curves: list[Points], number: int, *, marker: str | None = None
) -> None:
    colour, dashes = _STYLES[number % len(_STYLES)]
    several = len(curves) > 1
    bold = mean_curve(curves) if several else [point for curve in curves for point in curve]
    for curve in curves if several else []:
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.8, alpha=0.4)
    if bold:
        axes.plot(
            *zip(*bold, strict=True),
            color=colour,
            linestyle=dashes,
            linewidth=2,
            marker=marker,
            markersize=4,
            label=f"{arm} ({len(curves)} seeds and their mean)" if several else arm,
        )


def _draw_rates(axes: Axes, logs: Sequence[Mapping[str, Points]]) -> None:
    """Each name's learning rate once, as the first training has it."""
    found: dict[str, Points] = {}
    for log in logs:
        for column, points in log.items():
            if column.startswith(_RATE):
                found.setdefault(column.removeprefix(_RATE), points)
    for number, (name, points) in enumerate(found.items()):
        colour, (_, dashes) = _GREYS[number % len(_GREYS)], _STYLES[number % len(_STYLES)]
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, label=name)
    peaks = [max(value for _, value in points) for points in found.values()]
    if peaks and min(peaks) > 0 and max(peaks) > 5 * min(peaks):
        # far apart, as those of new and of old layers are; what falls to 0 leaves the picture
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(peaks) / 30, top=2 * max(peaks))
    else:
        axes.yaxis.set_major_formatter("{x:g}")
    if len(found) > 1:
        axes.legend(frameon=False, fontsize=9)


def _dress(axes: Axes, words: str) -> None:
    axes.set_title(words, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes)
