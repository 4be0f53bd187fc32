"""The page on a run: what was trained, what came of it, and whether the swap brought anything."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pacswap.recipes import EvaluateSection
from pacswap.report import Latency
from pacswap.train.measure.compare import Comparison, compare, markdown_table, points
from pacswap.train.measure.metrics import MEASURES, Scores
from pacswap.train.writing import write_file

# What the arms are called, in folders, tables and words.
UPGRADED, CONTROL, CAPACITY = "upgraded", "control", "capacity control"

# What each comparison asks, in the order in which they are told.
_QUESTIONS = {
    CONTROL: "What the swap brought",
    CAPACITY: "Adapting, or only more parameters?",
}


@dataclass(frozen=True)
class ArmResult:
    """One training that ended.

    Attributes:
        name: of the arm: `UPGRADED`, `CONTROL` or `CAPACITY`.
        seed: what its randomness started from.
        scores: of the network as it was kept.
        steps: how many it took.
        seconds: how long it took.
        best_step: after which its mIoU was highest; None where it was measured once.
        log: its CSV log.
    """

    name: str
    seed: int
    scores: Scores
    steps: int
    seconds: float
    best_step: int | None = None
    log: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "arm": self.name,
            "seed": self.seed,
            "steps": self.steps,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "log": None if self.log is None else str(self.log),
            "scores": self.scores.as_dict(),
        }


@dataclass(frozen=True)
class RunSummary:
    """All that a run's report is made of.

    Attributes:
        recipe: the recipe's file.
        model: the network's name in its library.
        change: what was done to it, in a few words ("3 convolutions swapped").
        plan: the plan as a printed table.
        data: where the pictures are from and how many, in a sentence.
        training: the stages in words, one each.
        evaluate: how the networks were measured.
        command: what starts the same run again.
        arms: the trainings, in any order.
        seconds: of the whole run.
        device: where, with the number format.
        versions: of Python and the libraries.
        parameters: before and after the swap.
        before: the network before fine-tuning; None where its classes are others.
        latency: before and after the swap; None where it was not measured.
        warnings: what the user should know.
        pictures: side-by-side pictures.
        curves: pictures of the curves.
    """

    recipe: str
    model: str
    change: str
    plan: str
    data: str
    training: tuple[str, ...]
    evaluate: EvaluateSection
    command: str
    arms: tuple[ArmResult, ...]
    seconds: float
    device: str
    versions: dict[str, str]
    parameters: tuple[int, int] | None = None
    before: Scores | None = None
    latency: Latency | None = None
    warnings: tuple[str, ...] = ()
    pictures: tuple[Path, ...] = ()
    curves: tuple[Path, ...] = ()

    def by_seed(self, name: str) -> dict[int, Scores]:
        """An arm's scores."""
        return {arm.seed: arm.scores for arm in self.arms if arm.name == name}

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """The upgraded arm against each control, over the seeds that both have."""
        upgraded, found = self.by_seed(UPGRADED), []
        for name in _QUESTIONS:
            control = self.by_seed(name)
            seeds = sorted(set(control) & set(upgraded))
            if seeds:
                pair = [{seed: arm[seed] for seed in seeds} for arm in (control, upgraded)]
                found.append(compare(pair[0], pair[1], names=(name, UPGRADED)))
        return tuple(found)

    @property
    def verdict(self) -> str:
        """What the run says of the swap, in a sentence."""
        if not self.comparisons or self.comparisons[0].control != CONTROL:
            return (
                "Not compared: no control was trained alike, so nobody knows what the swap brought "
                "and what the fine-tuning. Train one: --control."
            )
        return self.comparisons[0].sentence

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The run's, and of trainings that have no partner to be compared with."""
        upgraded = set(self.by_seed(UPGRADED))
        names = [name for name in _QUESTIONS if self.by_seed(name)]
        lonely = [
            f"Seeds {', '.join(map(str, sorted(odd)))} were not trained in both {name} and "
            f"{UPGRADED}; the comparison leaves them out."
            for name in names
            if (odd := set(self.by_seed(name)) ^ upgraded)
        ]
        return (*self.warnings, *lonely)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "verdict": self.verdict,
            "recipe": self.recipe,
            "model": self.model,
            "change": self.change,
            "plan": self.plan,
            "data": self.data,
            "training": list(self.training),
            "evaluate": self.evaluate.model_dump(mode="json"),
            "command": self.command,
            "before": None if self.before is None else self.before.as_dict(),
            "arms": [arm.as_dict() for arm in self.arms],
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
            "parameters": None if self.parameters is None else list(self.parameters),
            "latency": None if self.latency is None else asdict(self.latency),
            "warnings": list(self.all_warnings),
            "pictures": [str(path) for path in self.pictures],
            "curves": [str(path) for path in self.curves],
            "seconds": self.seconds,
            "device": self.device,
            "versions": self.versions,
        }

    def as_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def as_markdown(self, folder: Path) -> str:
        """The report as a page that lies in `folder`."""
        sections = {
            "Scores": self._scores(),
            **{_QUESTIONS[c.control]: _compared(c) for c in self.comparisons},
            "Before and after": _embedded(self.pictures, folder),
            "Curves": _embedded(self.curves, folder),
            "Warnings": "\n".join(f"- {warning}" for warning in self.all_warnings),
            "What was trained": self._trained(),
            "Do it again": f"```bash\n{self.command}\n```",
        }
        body = "".join(f"## {head}\n\n{text}\n\n" for head, text in sections.items() if text)
        sentences = [self.verdict, *(c.sentence for c in self.comparisons)]
        opening = "\n\n".join(f"**{one}**" for one in dict.fromkeys(sentences))
        numbers = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"# {self.model}, {self.change}\n\n{opening}\n\n{body}"
            f"{duration(self.seconds)} on {self.device}, with {numbers}.\n"
        )

    def _scores(self) -> str:
        """Every arm's mean over its seeds, then every training."""
        names = dict.fromkeys([CONTROL, CAPACITY, UPGRADED, *(arm.name for arm in self.arms)])
        means = [_row(name, self.by_seed(name).values()) for name in names if self.by_seed(name)]
        if self.before is not None:
            means.insert(0, _row("before fine-tuning", [self.before]))
        means_table = markdown_table(["in points", "seeds", *MEASURES.values()], means)
        each = [
            [
                f"{arm.name}, seed {arm.seed}",
                *_measures([arm.scores]),
                str(arm.steps),
                "–" if arm.best_step is None else str(arm.best_step),
                duration(arm.seconds),
            ]
            for arm in sorted(self.arms, key=lambda arm: (list(names).index(arm.name), arm.seed))
        ]
        head = ["training", *MEASURES.values(), "steps", "best after", "time"]
        return f"{means_table}\n\n{_how(self.evaluate)}\n\n{markdown_table(head, each)}"

    def _trained(self) -> str:
        parts = [
            f"Recipe `{self.recipe}`: {self.model}, {self.change}.",
            self.data,
            "\n".join(f"{i}. {stage}" for i, stage in enumerate(self.training, start=1)),
        ]
        if self.parameters is not None:
            before, after = self.parameters
            parts.append(f"{before:,} parameters before the swap, {after:,} after it.")
        if self.latency is not None:
            found = self.latency
            parts.append(
                f"Forward pass of {'×'.join(map(str, found.shape))} on {found.device}: "
                f"{1e3 * found.before:.1f} ms before the swap, {1e3 * found.after:.1f} ms after "
                f"it, {found.ratio:.2f} times ({found.lowest:.2f} … {found.highest:.2f} over "
                f"{found.pairs} pairs in turns)."
            )
        return "\n\n".join([*parts, f"```text\n{self.plan}\n```"])


def write_report(summary: RunSummary, folder: Path) -> tuple[Path, Path]:
    """Write `report.md` and `report.json`, each whole or not at all.

    Returns:
        Where they are.

    Raises:
        TrainingError: they cannot be written.
    """
    page = write_file(folder / "report.md", summary.as_markdown(folder))
    return page, write_file(folder / "report.json", summary.as_json())


def duration(seconds: float) -> str:
    """A time that people can read.

    >>> duration(7.24), duration(125), duration(7380)
    ('7.2 s', '2 min 5 s', '2 h 3 min')
    """
    if seconds < 59.95:  # what is shown as less than a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _measures(scores: Iterable[Scores]) -> list[str]:
    """The mean over some scores of each measure, in points."""
    found = list(scores)
    return [points(statistics.fmean(getattr(one, name) for one in found)) for name in MEASURES]


def _row(name: str, scores: Iterable[Scores]) -> list[str]:
    found = list(scores)
    return [name, "–" if name == "before fine-tuning" else str(len(found)), *_measures(found)]


def _how(section: EvaluateSection) -> str:
    """How the networks were measured, in a sentence or two."""
    ways = ["each picture at once"]
    if section.window is not None:
        ways = [
            f"by windows of {section.window[0]}×{section.window[1]} that overlap by "
            f"{100 * section.overlap:g} %"
        ]
    if section.scales != (1.0,):
        ways.append("at sizes " + ", ".join(f"{scale:g}" for scale in section.scales))
    if section.flip:
        ways.append("mirrored too")
    return (
        f"Measured {', '.join(ways)}; all pictures are counted together, a mean is over the "
        f"classes that occur. Near edges: within {section.band} px of a change of label. Boundary "
        f"IoU looks as far from a contour as {100 * section.boundary:g} % of the picture's "
        "diagonal (Cheng et al., CVPR 2021)."
    )


def _compared(found: Comparison) -> str:
    share = f"{100 * found.confidence:g} %"
    seeds = (
        f"Student's t of the differences of seeds {', '.join(map(str, found.seeds))}, trained "
        "alike in pairs"
        if len(found.seeds) > 1
        else f"none, since only seed {found.seeds[0]} was trained: train more to know how far "
        "seeds differ"
    )
    return (
        f"{found.sentence}\n\n{found.as_markdown()}\n\n"
        f"Differences are {found.upgraded} − {found.control}, in points, with {share} intervals. "
        f"Over seeds: {seeds}. Over pictures: the paired bootstrap, {found.resamples} draws; it "
        "takes pictures for independent, which frames of one video are not. A gain or a loss is "
        "said only where all intervals lie on one side of 0; of many classes, some do by chance."
    )


def _embedded(paths: Sequence[Path], folder: Path) -> str:
    """Pictures by their relative paths."""
    places = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    return "\n\n".join(
        f"![{path.stem}]({quote(place)})" for path, place in zip(paths, places, strict=True)
    )
