"""Every model of timm and torchvision: which convolutions can be swapped, and are promises kept.

    python benchmarks/zoo.py --run zoo.jsonl [--sample] [--library timm] [--models GLOB …]
    python benchmarks/zoo.py --table zoo.jsonl > docs/zoo.md
    python benchmarks/zoo.py --refusals zoo.jsonl > tests/zoo_refusals.json

The first examines models, with random weights and without network, each in a process with a time
limit, and appends a line of JSON for each; started again, it goes on where it was. A model that
crashes or takes too long has a line that says so. The second makes the published table of the last
line of each model, the third what tests/test_zoo_families.py expects to be refused.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import zlib
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from zoo_models import Model, models
from zoo_sample import SAMPLE
from zoo_swap import Options, examine
from zoo_table import table
from zoo_workers import worked

Row = dict[str, Any]


def main(words: list[str] | None = None) -> None:
    """Examine models, or print what was found."""
    options = parsed(words)
    if options.table:
        print(table(list(rows(options.table).values()), options.table.name), end="")
    elif options.refusals:
        print(json.dumps(refusals(options.refusals), indent=1, sort_keys=True))
    else:
        run(options)


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="OUT", help="examine models, append to OUT")
    what.add_argument("--table", type=Path, metavar="OUT", help="print the table of what OUT says")
    what.add_argument("--refusals", type=Path, metavar="OUT", help="print what was refused")
    parser.add_argument("--library", choices=("timm", "torchvision"), help="only this one")
    parser.add_argument("--models", nargs="+", metavar="GLOB", help="only models so named")
    parser.add_argument("--sample", action="store_true", help="one small model of each family")
    parser.add_argument("--reach-only", action="store_true", help="swap nothing")
    parser.add_argument("--again", action="store_true", help="also those that OUT has already")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--limit", type=float, default=Options.limit, help="seconds for a model")
    parser.add_argument(
        "--most-parameters", type=float, default=Options.most_parameters, metavar="MILLIONS",
        help="of models whose layers are really swapped",
    )  # fmt: skip
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> None:
    """Examine what is not examined yet; a line for each on standard error."""
    how = Options(
        options.most_parameters, options.limit, options.reach_only, timed=not options.sample
    )
    known = rows(options.run) if options.run.exists() and not options.again else {}
    tasks = [model for model in chosen(options) if not is_done(known.get(model), how)]
    if not tasks:
        sys.exit("nothing to do: no model is so named, or OUT has all of them (see --again).")
    work = functools.partial(examine, options=how)
    began = time.monotonic()
    with options.run.open("a", encoding="utf-8") as file:
        if options.run.stat().st_size and not options.run.read_bytes().endswith(b"\n"):
            file.write("\n")  # the last line was cut short
        ended = worked(work, tasks, jobs=options.jobs, limit=options.limit)
        for count, (model, found) in enumerate(ended, 1):
            # What a worker could not tell before it died.
            row = {**asdict(model), "family": model.family, "options": asdict(how), **found}
            file.write(json.dumps(row) + "\n")
            file.flush()
            left = (time.monotonic() - began) / count * (len(tasks) - count)
            print(f"{count}/{len(tasks)} {model}: {in_short(row)}; {clock(left)} left",
                  file=sys.stderr)  # fmt: skip


def chosen(options: argparse.Namespace) -> list[Model]:
    """The models asked for, in an order in which the time left can be guessed."""
    found = [
        model
        for model in (SAMPLE if options.sample else models())
        if options.library in (None, model.library)
        and (not options.models or any(fnmatch(model.name, glob) for glob in options.models))
    ]
    return sorted(found, key=lambda model: zlib.crc32(str(model).encode()))


def rows(path: Path) -> dict[Model, Row]:
    """The last line of each model; one that was cut short does not count."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[Model(row["library"], row["name"])] = row
    return found


def is_done(row: Row | None, options: Options) -> bool:
    """Whether a model need not be examined: its line tells all that is asked for."""
    return row is not None and (options.reach_only or not row["options"]["reach_only"])


def refusals(path: Path) -> dict[str, dict[str, int]]:
    """By model, how often each reason was given; models of which nothing is refused left out."""
    return {
        str(model): {refused["reason"]: refused["count"] for refused in row["refused"]}
        for model, row in rows(path).items()
        if row.get("refused")
    }


def in_short(row: Row) -> str:
    """A model's row in a few words."""
    words = []
    if "convolutions" in row:
        words.append(f"{row['reachable']} of {row['convolutions']} reachable")
    found = row.get("swap", {}).get("checks", [])
    failed = [name for name, passed, _ in found if passed is False]
    if found:
        words.append(f"{len(found) - len(failed)} of {len(found)} checks passed")
    words += [f"FAILED: {name}" for name in failed]
    if "failure" in row:
        words.append(f"FAILED: {row['failure']}")
    return ", ".join([*words, f"{row['seconds']:.0f} s of CPU"] if "seconds" in row else words)


def clock(seconds: float) -> str:
    """A duration in words."""
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min"


if __name__ == "__main__":
    main()
