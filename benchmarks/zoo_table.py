"""The published table of the zoo, in Markdown, from the lines that `zoo.py --run` wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo_checks import CHECKS, PROMISES, SWAP
from zoo_models import models

Row = dict[str, Any]

HEAD = (
    "family", "models", "convolutions", "reachable", "models swapped", "layers", "promise 1",
    "promise 2", "other checks", "refused",
)  # fmt: skip


@dataclass
class Tally:
    """The figures of several models.

    Attributes:
        models: how many.
        convolutions: all that look at more than a pixel.
        reachable: those that can be planned.
        swapped: models of which layers were swapped.
        asked: models of which layers were to be swapped.
        layers: that were swapped.
        kept: models that keep promise 1, and 2.
        others: models that pass all other checks.
        refused: how many convolutions, by reason.
        failures: models that could not be examined to the end.
    """

    models: int = 0
    convolutions: int = 0
    reachable: int = 0
    swapped: int = 0
    asked: int = 0
    layers: int = 0
    kept: Counter[int] = field(default_factory=Counter)
    others: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: int = 0

    def add(self, row: Row) -> None:
        """Count a model's row."""
        self.models += 1
        self.convolutions += row.get("convolutions", 0)
        self.reachable += row.get("reachable", 0)
        self.failures += "failure" in row
        for refused in row.get("refused", []):
            self.refused[refused["reason"]] += refused["count"]
        verdicts = {name: passed for name, passed, _ in row.get("swap", {}).get("checks", [])}
        self.asked += SWAP in verdicts
        if verdicts.get(SWAP):
            self.swapped += 1
            self.layers += len(row["swap"]["layers"])
            promised = [name for names in PROMISES.values() for name in names]
            for promise, names in PROMISES.items():
                self.kept[promise] += all(verdicts.get(name) for name in names)
            rest = [name for name in CHECKS if name not in promised]
            self.others += all(verdicts.get(name) is not False for name in rest)

    def cells(self, number: Callable[[str], int]) -> list[str]:
        """As the table shows it, but for the name."""
        refused = ", ".join(
            f"{count}: [{number(why)}]" for why, count in self.refused.most_common()
        )
        of = f"/{self.swapped}"
        swapped = str(self.swapped) + (f" of {self.asked}" if self.asked > self.swapped else "")
        results = [f"{self.kept[1]}{of}", f"{self.kept[2]}{of}", f"{self.others}{of}"]
        return [
            str(self.models) + (f" ({self.failures} failed)" if self.failures else ""),
            str(self.convolutions),
            str(self.reachable),
            *([swapped, str(self.layers), *results] if self.asked else ["–"] * 5),
            refused or "–",
        ]


def table(rows: Sequence[Row], file: str) -> str:
    """The page.

    Args:
        rows: one of each model.
        file: the name of the file that they come from.
    """
    seen = [row for row in rows if row.get("convolutions") != 0]
    total = Tally()
    families: dict[str, Tally] = {}
    for row in sorted(seen, key=lambda row: (row["family"], row["name"])):
        total.add(row)
        families.setdefault(row["family"], Tally()).add(row)
    numbers = {why: place for place, (why, _) in enumerate(total.refused.most_common(), 1)}
    lines = ["# The zoo", "", *_introduction(rows, seen, total, file), ""]
    lines += ["## Families", "", _row(HEAD), _row(["---", *["---:"] * 8, "---"])]
    lines += [
        _row([family, *tally.cells(numbers.__getitem__)]) for family, tally in families.items()
    ]
    lines += [_row(["**all**", *total.cells(numbers.__getitem__)]), ""]
    lines += ["## Refusals", "", *_reasons(total, numbers, seen), ""]
    lines += ["## Failures", "", *_failures(seen), ""]
    lines += ["## Not swapped", "", *_skipped(seen), ""]
    return "\n".join([*lines, *_method(seen)]) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _introduction(
    rows: Sequence[Row], seen: Sequence[Row], total: Tally, file: str
) -> Iterator[str]:
    options = _different(row["options"] for row in rows)
    words = "; ".join(
        f"--limit {o['limit']:g} --most-parameters {o['most_parameters']:g}"
        + (" --reach-only" if o["reach_only"] else "")
        for o in options
    )
    none = len(rows) - len(seen)
    yield _INTRODUCTION.format(
        file=file,
        words=words,
        versions="; ".join(
            ", ".join(f"{name} {number}" for name, number in versions.items())
            for versions in _different(row["versions"] for row in rows if "versions" in row)
        ),
        none=none,
        rows=len(rows),
        known=len(models()),
        families=len({row["family"] for row in seen}),
        share=100 * total.reachable / max(total.convolutions, 1),
        total=total,
        refused=sum(total.refused.values()),
        reasons=len(total.refused),
    )


_INTRODUCTION = """\
Which convolutions of timm's and torchvision's models pacswap can make pixel-adaptive, and whether
they keep their promises right after it. Generated: `benchmarks/zoo_table.py` has the words.

    python benchmarks/zoo.py --run {file}  # {words}
    python benchmarks/zoo.py --table {file} > docs/zoo.md

Made with {versions}.
Examined so far: {rows} of the {known} models of both libraries, in no particular order. {none} of
them have no convolution to swap and are left out.

- **{total.models}** models of {families} families have {total.convolutions} convolutions;
  **{total.reachable}** of them ({share:.2f} %) are reachable.
- **{total.swapped}** of {total.asked} models were swapped, {total.layers} layers in all. Of these
  models, **{total.kept[1]}** keep promise 1 (nothing changes), **{total.kept[2]}** promise 2
  (everything learns), and {total.others} pass all other checks.
- {refused} convolutions are refused, for {reasons} reasons. {total.failures} models could not be
  examined to the end."""


def _reasons(total: Tally, numbers: dict[str, int], rows: Sequence[Row]) -> Iterator[str]:
    if not numbers:
        yield "None."
    for why, place in numbers.items():
        model, layer = next(
            (f"{row['library']} {row['name']}", refused["example"])
            for row in rows
            for refused in row.get("refused", [])
            if refused["reason"] == why
        )
        models = sum(any(r["reason"] == why for r in row.get("refused", [])) for row in rows)
        yield (
            f"{place}. {total.refused[why]} in {models} models, such as `{layer}` of {model}: {why}"
        )


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    found = [
        f"- {row['library']} {row['name']}: {row['failure']}" for row in rows if "failure" in row
    ]
    found += [
        f"- {row['library']} {row['name']}, {name}: {figure}"
        for row in rows
        for name, passed, figure in row.get("swap", {}).get("checks", [])
        if passed is False
    ]
    yield from sorted(found) or ["None."]


def _skipped(rows: Sequence[Row]) -> Iterator[str]:
    reasons = Counter(row["swap"]["skipped"] for row in rows if "skipped" in row.get("swap", {}))
    yield from [f"- {count} models: {why}" for why, count in reasons.most_common()] or ["None."]


def _method(rows: Sequence[Row]) -> Iterator[str]:
    plans = sorted(row["plan_seconds"]["three"] for row in rows
                   if "three" in row.get("plan_seconds", {}))  # fmt: skip
    speed = "not timed"
    if plans:
        speed = f"{plans[len(plans) // 2]:.1f} s (median), at most {plans[-1]:.1f} s of one core"
    rest = [name for name in CHECKS if not any(name in names for names in PROMISES.values())]
    yield _METHOD.format(speed=speed, rest="; ".join(rest))


_METHOD = """\
## How it was measured

- *convolutions*: modules of torch's convolution classes and their subclasses with a kernel side
  above 1; those that cut the picture into patches (stride = kernel, no padding) are left out.
  *family*: the module that the model is written in.
- *reachable*: `pacswap.plan` accepts it, together with all others, guided by the convolution of as
  many dimensions that runs first, or, where that is refused, by the image. Weights and images are
  on the meta device (on the CPU where values decide what a network does), of the model's own size.
  A plan of three layers: {speed}.
- *models swapped*: built with random weights (seed 0) on the CPU, scales that start near zero
  opened and batch norms settled; the first, middle and last reachable convolution swapped
  (*layers*; of those that see more than one pixel), on two images of the smallest of 96, 128 and
  the model's own size that it runs on; detectors, optical flow and video have inputs of their own
  (`benchmarks/zoo_models.py`).
- *promise 1*: equal outputs in eval and in train mode, to 1e-5 of each tensor's largest value,
  running statistics too.
- *promise 2*: a random projection of the outputs gives every swapped layer's `blend` a finite
  gradient that is not zero.
- *other checks*: {rest}. Copies and files are compared with `blend` at ½.
- *refused*: how many convolutions, and the number of the reason."""


def _different(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({str(sorted(value.items())): value for value in values}.values())
