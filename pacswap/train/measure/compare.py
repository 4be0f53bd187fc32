"""What an upgrade brought: two networks that were trained alike, measured on the same pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pacswap.errors import DataError
from pacswap.surgery.table import columns
from pacswap.train.measure.metrics import MEASURES, Scores, or_none, scores_of
from pacswap.train.measure.statistics import Interval, percentile_interval, resampled, t_interval

Verdict = Literal["gain", "loss", "no gain is shown"]

_PER_CLASS = ("class_iou", "class_boundary_iou")


@dataclass(frozen=True)
class Difference:
    """One measure of two arms; fractions, 0 to 1.

    Attributes:
        name: the measure in words, or the class.
        control: mean over the seeds of the arm that is compared with.
        upgraded: mean over the seeds of the arm that is judged.
        per_seed: upgraded − control, one per seed; NaN where one of them has no score.
        over_seeds: Student's interval, as wide as other seeds may differ; None for one seed.
        over_pictures: the bootstrap's, as wide as other pictures may differ; None for one picture.
    """

    name: str
    control: float
    upgraded: float
    per_seed: tuple[float, ...]
    over_seeds: Interval | None
    over_pictures: Interval | None

    @property
    def mean(self) -> float:
        """Mean over the seeds; NaN where no seed has one."""
        return _mean(self.per_seed)

    @property
    def verdict(self) -> Verdict:
        """A gain or a loss only where every interval there is lies on one side of 0."""
        intervals = [i for i in (self.over_seeds, self.over_pictures) if i is not None]
        if intervals and all(interval.low > 0 for interval in intervals):
            return "gain"
        if intervals and all(interval.high < 0 for interval in intervals):
            return "loss"
        return "no gain is shown"

    def cells(self) -> list[str]:
        """A row of a table, in points."""
        return [
            self.name,
            points(self.control),
            points(self.upgraded),
            points(self.mean, signed=True),
            span(self.over_seeds),
            span(self.over_pictures),
            self.verdict,
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; None for what there is not."""
        return {
            "name": self.name,
            "control": or_none(self.control),
            "upgraded": or_none(self.upgraded),
            "difference": or_none(self.mean),
            "per_seed": [or_none(value) for value in self.per_seed],
            "over_seeds": None if self.over_seeds is None else list(self.over_seeds),
            "over_pictures": None if self.over_pictures is None else list(self.over_pictures),
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """Two arms compared, seed by seed and picture by picture.

    Attributes:
        control: the name of the arm that is compared with.
        upgraded: the name of the arm that is judged.
        seeds: of the trainings.
        pictures: how many were measured.
        resamples: how often the bootstrap drew them anew.
        confidence: of the intervals.
        measures: by the names of `MEASURES`.
        classes: IoU, class by class.
        outlines: boundary IoU, class by class.
    """

    control: str
    upgraded: str
    seeds: tuple[int, ...]
    pictures: int
    resamples: int
    confidence: float
    measures: dict[str, Difference]
    classes: tuple[Difference, ...]
    outlines: tuple[Difference, ...]

    @property
    def verdict(self) -> Verdict:
        """Of mIoU."""
        return self.measures["miou"].verdict

    @property
    def sentence(self) -> str:
        """The verdict in one plain sentence."""
        found = self.measures["miou"]
        opening = {"gain": "A gain", "loss": "A loss"}.get(self.verdict, "No gain is shown")
        spans, limits = [], []
        if len(self.seeds) == 1:
            opening += " with this seed" if self.verdict in ("gain", "loss") else ""
            limits.append("one seed cannot say how another would end")
        else:
            spans.append(f"{span(found.over_seeds)} over {len(self.seeds)} seeds")
        if self.pictures == 1:
            opening += " on this picture" if self.verdict in ("gain", "loss") else ""
            limits.append("one picture cannot say how another would score")
        else:
            spans.append(f"{span(found.over_pictures)} over {self.pictures} pictures")
        known = [f"{100 * self.confidence:g} % interval {', '.join(spans)}"] if spans else []
        return (
            f"{opening}: {found.name} of {self.upgraded} is {points(found.mean, signed=True)} "
            f"points against {self.control} ({'; '.join([*known, *limits])})."
        )

    def __str__(self) -> str:
        rows = [d.cells() for d in (*self.measures.values(), *self.classes)]
        return "\n".join([self.sentence, "", *columns(self._head("measure"), rows)])

    def as_markdown(self) -> str:
        """A table of the measures, then one of the classes' IoU, then one of their boundary IoU."""
        tables = {
            "measure": self.measures.values(),
            "IoU of": self.classes,
            "boundary IoU of": self.outlines,
        }
        return "\n\n".join(
            markdown_table(self._head(first), [d.cells() for d in differences])
            for first, differences in tables.items()
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "control": self.control,
            "upgraded": self.upgraded,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "seeds": list(self.seeds),
            "pictures": self.pictures,
            "resamples": self.resamples,
            "confidence": self.confidence,
            "measures": {name: d.as_dict() for name, d in self.measures.items()},
            "classes": [d.as_dict() for d in self.classes],
            "outlines": [d.as_dict() for d in self.outlines],
        }

    def _head(self, first: str) -> list[str]:
        seeds, pictures = _number(len(self.seeds), "seed"), _number(self.pictures, "picture")
        return [
            first,
            self.control,
            self.upgraded,
            "difference",
            f"over {seeds}",
            f"over {pictures}",
            "verdict",
        ]


def compare(
    control: Mapping[int, Scores],
    upgraded: Mapping[int, Scores],
    *,
    names: tuple[str, str] = ("control", "upgraded"),
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two arms whose trainings share seeds and were measured on the same pictures.

    Over seeds: Student's t of the paired differences, from two seeds on. Over pictures: the
    percentile bootstrap; each time as many pictures are drawn with replacement, their counts are
    added up for either arm and every seed, and the seeds' differences are averaged. One picture
    has no such interval. It takes pictures for independent: where they are frames of one video its
    interval is too narrow.

    Args:
        control: the scores of the arm that is compared with, by seed.
        upgraded: those of the arm that is judged.
        names: what the arms are called.
        resamples: how often pictures are drawn.
        confidence: of both intervals, between 0 and 1.
        seed: of the bootstrap.

    Raises:
        DataError: the arms differ in seeds, pictures, classes or labels.

    Example:
        >>> from pacswap.train.measure.metrics import count
        >>> truth, wrong = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])
        >>> names, classes = ["a", "b"], ["sky", "road"]
        >>> before = Scores.of([count(wrong, truth, classes=2)] * 2, classes, names)
        >>> after = Scores.of([count(truth, truth, classes=2)] * 2, classes, names)
        >>> compare({0: before}, {0: after}, resamples=100).verdict
        'gain'
    """
    _refuse_unlike(control, upgraded, names)
    seeds = tuple(sorted(control))
    first = control[seeds[0]]
    arms = [torch.stack([arm[s].tallies for s in seeds], 1) for arm in (control, upgraded)]
    tallies = torch.stack(arms, 1)  # [N, 2, seeds, 8, C]

    def measured(sums: Tensor) -> Tensor:
        """[R, 2, seeds, 8, C] → [R, 2, seeds, M]: the measures, then those of each class."""
        found = scores_of(sums, first.ignore_index)
        overall = torch.stack([found[name] for name in MEASURES], -1)
        return torch.cat([overall, *(found[name] for name in _PER_CLASS)], -1)

    def difference(sums: Tensor) -> Tensor:
        values = measured(sums)
        return (values[:, 1] - values[:, 0]).nanmean(1)

    values = measured(tallies.sum(0)[None])[0]  # [2, seeds, M]
    intervals: list[Interval | None] = [None] * values.shape[-1]
    if len(tallies) > 1:  # one picture drawn again and again would have no spread at all
        drawn = resampled(tallies, difference, resamples=resamples, seed=seed)
        intervals = percentile_interval(drawn, confidence)
    rows = zip(
        (*MEASURES.values(), *first.classes, *first.classes),
        values.unbind(-1),
        intervals,
        strict=True,
    )
    found = [_difference(name, value, pictures, confidence) for name, value, pictures in rows]
    overall, classes = len(MEASURES), len(first.classes)
    return Comparison(
        *names,
        seeds,
        len(first.pictures),
        resamples,
        confidence,
        dict(zip(MEASURES, found[:overall], strict=True)),
        tuple(found[overall : overall + classes]),
        tuple(found[overall + classes :]),
    )


def points(value: float, *, signed: bool = False) -> str:
    """A fraction in points, hundredths; a dash for NaN.

    >>> points(0.4234), points(-0.0012, signed=True), points(float("nan"))
    ('42.34', '−0.12', '–')
    """
    if math.isnan(value):
        return "–"
    text = f"{100 * value:{'+' if signed else ''}.2f}"
    return text.replace("-", "−")


def span(interval: Interval | None) -> str:
    """An interval in points; a dash where there is none.

    >>> span(Interval(-0.004, 0.0064))
    '−0.40 … +0.64'
    """
    if interval is None:
        return "–"
    return " … ".join(points(edge, signed=True) for edge in interval)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, its first column left-aligned and the others right.

    >>> print(markdown_table(["class", "IoU"], [["sky", "41.64"]]))
    | class | IoU |
    |:---|---:|
    | sky | 41.64 |
    """
    lines = [head, [":---", *["---:"] * (len(head) - 1)], *rows]
    texts = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    texts[1] = texts[1].replace(" ", "")
    return "\n".join(f"|{text}|" if i == 1 else f"| {text} |" for i, text in enumerate(texts))


def _difference(
    name: str, values: Tensor, pictures: Interval | None, confidence: float
) -> Difference:
    """Of a measure's values [2, seeds]: control, upgraded."""
    control, upgraded = values
    per_seed = (upgraded - control).tolist()
    counted = [value for value in per_seed if not math.isnan(value)]
    return Difference(
        name,
        _mean(control.tolist()),
        _mean(upgraded.tolist()),
        tuple(per_seed),
        t_interval(counted, confidence),
        pictures,
    )


def _mean(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN of none."""
    counted = [value for value in values if not math.isnan(value)]
    return statistics.fmean(counted) if counted else math.nan


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _refuse_unlike(
    control: Mapping[int, Scores], upgraded: Mapping[int, Scores], names: tuple[str, str]
) -> None:
    if not control or set(control) != set(upgraded):
        had = [", ".join(map(str, sorted(arm))) or "none" for arm in (control, upgraded)]
        raise DataError(
            f"{names[0]} has seeds {had[0]}, {names[1]} has {had[1]}: expected the same seeds, at "
            "least one. Train both arms with each."
        )
    first = next(iter(control.values()))
    for name, arm in zip(names, (control, upgraded), strict=True):
        for seed, scores in arm.items():
            what = _unlikeness(first, scores)
            if what is not None:
                raise DataError(
                    f"{name}, seed {seed}: measured with {what} than {names[0]}, seed "
                    f"{next(iter(control))}. Measure all on the same data."
                )


def _unlikeness(first: Scores, other: Scores) -> str | None:
    """In what two measurements differ that must not."""
    if other.classes != first.classes or other.ignore_index != first.ignore_index:
        return "other classes"
    if other.pictures != first.pictures:
        return "other pictures"
    truths = [scores.tallies[:, 1] for scores in (first, other)]
    bands = [scores.tallies[:, 4] for scores in (first, other)]
    if not torch.equal(*truths) or not torch.equal(*bands):
        return "other labels or another band"
    return None
