"""The report says first what came of it, leaves nothing out, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pacswap.errors import TrainingError
from pacswap.recipes import EvaluateSection
from pacswap.report import Latency
from pacswap.train.measure.metrics import MEASURES, Scores, count
from pacswap.train.measure.summary import (
    CAPACITY,
    CONTROL,
    UPGRADED,
    ArmResult,
    RunSummary,
    duration,
    write_report,
)
from pacswap.train.writing import write_file

CLASSES = ("sky", "road", "pole", "unicorn")


def scores(wrong: float, seed: int = 0) -> Scores:
    """Ten pictures in which that share of the pixels is wrong; nobody sees a unicorn."""
    counts = []
    for i in range(10):
        truth = torch.randint(0, 3, (4, 6), generator=torch.Generator().manual_seed(i))
        truth = truth.repeat_interleave(5, 0).repeat_interleave(5, 1)
        dice = torch.rand(truth.shape, generator=torch.Generator().manual_seed(100 * seed + i))
        counts.append(count(truth.where(dice >= wrong, (truth + 1) % 3), truth, classes=4))
    return Scores.of(counts, CLASSES, [f"picture {i}" for i in range(10)])


def result(name: str, seed: int, wrong: float, **changes) -> ArmResult:
    given = {"steps": 460, "seconds": 125.0, "best_step": 440, **changes}
    return ArmResult(name, seed, scores(wrong, seed), **given)


ARMS = (
    *(result(UPGRADED, seed, 0.1) for seed in (1, 2)),
    *(result(CONTROL, seed, 0.2) for seed in (1, 2)),
    *(result(CAPACITY, seed, 0.1) for seed in (1, 2)),
)


def summary(**changes) -> RunSummary:
    given = {
        "recipe": "recipes/camvid.yaml",
        "model": "fcn_resnet50",
        "change": "3 convolutions swapped",
        "plan": "layer4.2.conv2  3×3 | guided by layer1",
        "data": "Folder data/camvid: 367 pictures to learn from, 101 to measure on.",
        "training": ("adapt: added, 2 epochs", "joint: all, 20 epochs"),
        "evaluate": EvaluateSection(),
        "command": "pacswap finetune recipes/camvid.yaml --control",
        "arms": ARMS,
        "seconds": 7380.0,
        "device": "cpu, fp32",
        "versions": {"Python": "3.11", "torch": "2.8"},
        **changes,
    }
    return RunSummary(**given)


FULL = summary(
    parameters=(32_000_000, 32_004_100),
    before=scores(0.5),
    latency=Latency(0.1, 0.104, 1.04, 1.01, 1.09, 9, (1, 3, 360, 480), "cpu"),
    warnings=("layer4.2.conv2: its blend stayed at 0.",),
    pictures=(Path("run/pictures/a picture.png"), Path("run/pictures/b.png")),
    curves=(Path("run/curves.png"),),
)


def section(page: str, head: str) -> str:
    return page.split(f"## {head}\n\n")[1].split("\n\n## ")[0]


def test_the_verdict_comes_first():
    page = FULL.as_markdown(Path("run")).splitlines()
    assert page[0] == "# fcn_resnet50, 3 convolutions swapped"
    assert page[2] == f"**{FULL.comparisons[0].sentence}**"
    assert page[2].startswith("**A gain: mIoU of upgraded is +")
    assert page[4].startswith("**No gain is shown: mIoU of upgraded is +0.00 points against cap")


def test_no_gain_is_said_as_such():
    same = summary(arms=tuple(result(name, s, 0.2) for name in (UPGRADED, CONTROL) for s in (1, 2)))
    assert same.verdict == (
        "No gain is shown: mIoU of upgraded is +0.00 points against control (95 % interval "
        "+0.00 … +0.00 over 2 seeds, +0.00 … +0.00 over 10 pictures)."
    )
    assert same.as_markdown(Path()).splitlines()[2] == f"**{same.verdict}**"


@pytest.mark.parametrize("kept", [(UPGRADED,), (UPGRADED, CAPACITY)])
def test_without_a_control_nothing_is_claimed(kept):
    found = summary(arms=tuple(arm for arm in ARMS if arm.name in kept))
    assert found.verdict == (
        "Not compared: no control was trained alike, so nobody knows what the swap brought and "
        "what the fine-tuning. Train one: --control."
    )
    page = found.as_markdown(Path())
    assert page.splitlines()[2] == f"**{found.verdict}**"
    assert "What the swap brought" not in page
    assert ("Adapting, or only more parameters?" in page) == (CAPACITY in kept)


def test_each_control_is_paired_by_seed():
    first, second = FULL.comparisons
    assert [(c.control, c.upgraded, c.seeds) for c in FULL.comparisons] == [
        ("control", "upgraded", (1, 2)),
        ("capacity control", "upgraded", (1, 2)),
    ]
    assert first.measures["miou"].per_seed == pytest.approx(
        [scores(0.1, s).miou - scores(0.2, s).miou for s in (1, 2)]
    )
    assert second.measures["miou"].per_seed == (0, 0)


def test_seeds_without_a_partner_are_named():
    found = summary(arms=(*ARMS[:4], result(UPGRADED, 3, 0.1), result(CONTROL, 4, 0.1)))
    assert found.comparisons[0].seeds == (1, 2)
    assert found.all_warnings == (
        "Seeds 3, 4 were not trained in both control and upgraded; the comparison leaves them out.",
    )
    assert "- Seeds 3, 4 were" in section(found.as_markdown(Path()), "Warnings")
    assert FULL.all_warnings == ("layer4.2.conv2: its blend stayed at 0.",)


def test_scores_are_means_over_seeds_then_every_training():
    text = section(FULL.as_markdown(Path("run")), "Scores")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    firsts = [row[0] for row in rows if len(row) > 1]
    assert firsts == [
        *("in points", ":---", "before fine-tuning", CONTROL, CAPACITY, UPGRADED),
        *("training", ":---", "control, seed 1", "control, seed 2"),
        *("capacity control, seed 1", "capacity control, seed 2"),
        *("upgraded, seed 1", "upgraded, seed 2"),
    ]
    by_name = {row[0]: row[1:] for row in rows if len(row) > 1}
    both = [scores(0.2, seed) for seed in (1, 2)]
    for column, measure in enumerate(MEASURES, start=1):
        mean = sum(getattr(one, measure) for one in both) / 2
        assert float(by_name[CONTROL][column]) == pytest.approx(100 * mean, abs=0.0051)
        alone = 100 * getattr(both[0], measure)
        found = float(by_name["control, seed 1"][column - 1])
        assert found == pytest.approx(alone, abs=0.0051)
    assert by_name["control, seed 1"][-3:] == ["460", "440", "2 min 5 s"]
    assert by_name["before fine-tuning"][0] == "–"


def test_differences_are_told_overall_per_class_and_near_edges():
    text = section(FULL.as_markdown(Path("run")), "What the swap brought")
    for first in (*MEASURES.values(), *CLASSES):
        lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
        assert len(lines) == (2 if first in CLASSES else 1)
    assert "| unicorn | – | – | – | – | – | no gain is shown |" in text
    assert "Over seeds: Student's t of the differences of seeds 1, 2, trained alike" in text


def test_one_seed_is_said_to_be_one():
    text = summary(arms=(ARMS[0], ARMS[2])).as_markdown(Path())
    assert "Over seeds: none, since only seed 1 was trained" in text
    assert "| over 1 seed |" in text


def test_everything_else_is_there():
    page = FULL.as_markdown(Path("run"))
    assert section(page, "Before and after") == (
        "![a picture](pictures/a%20picture.png)\n\n![b](pictures/b.png)"
    )
    assert section(page, "Curves") == "![curves](curves.png)"
    assert section(page, "Warnings") == "- layer4.2.conv2: its blend stayed at 0."
    trained = section(page, "What was trained")
    assert trained == (
        "Recipe `recipes/camvid.yaml`: fcn_resnet50, 3 convolutions swapped.\n\n"
        "Folder data/camvid: 367 pictures to learn from, 101 to measure on.\n\n"
        "1. adapt: added, 2 epochs\n2. joint: all, 20 epochs\n\n"
        "32,000,000 parameters before the swap, 32,004,100 after it.\n\n"
        "Forward pass of 1×3×360×480 on cpu: 100.0 ms before the swap, 104.0 ms after it, 1.04 "
        "times (1.01 … 1.09 over 9 pairs in turns).\n\n"
        "```text\nlayer4.2.conv2  3×3 | guided by layer1\n```"
    )
    assert page.endswith(
        "## Do it again\n\n```bash\npacswap finetune recipes/camvid.yaml --control\n```\n\n"
        "2 h 3 min on cpu, fp32, with Python 3.11, torch 2.8.\n"
    )


def test_what_there_is_not_has_no_heading():
    page = summary().as_markdown(Path("run"))
    heads = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
    assert heads == [
        "Scores",
        "What the swap brought",
        "Adapting, or only more parameters?",
        "What was trained",
        "Do it again",
    ]


WAYS = {
    "whole": ({}, "Measured each picture at once; all"),
    "all": (
        {"window": (512, 640), "overlap": 0.25, "scales": (0.75, 1.0), "flip": True},
        "Measured by windows of 512×640 that overlap by 25 %, at sizes 0.75, 1, mirrored too; all",
    ),
    "edges": (
        {"band": 5, "boundary": 0.05},
        "Near edges: within 5 px of a change of label. Boundary IoU looks as far from a contour as "
        "5 % of the picture's diagonal",
    ),
}


@pytest.mark.parametrize(("given", "words"), WAYS.values(), ids=WAYS)
def test_how_it_was_measured_is_said(given, words):
    found = summary(evaluate=EvaluateSection(**given))
    assert words in section(found.as_markdown(Path()), "Scores")


def test_the_data_is_plain_and_complete(tmp_path):
    page, data = write_report(FULL, tmp_path / "run")
    assert page.read_text(encoding="utf-8") == FULL.as_markdown(tmp_path / "run")
    found = json.loads(data.read_text(encoding="utf-8"))
    assert found["verdict"] == FULL.verdict
    assert [(arm["arm"], arm["seed"]) for arm in found["arms"]] == [(a.name, a.seed) for a in ARMS]
    assert found["arms"][0]["scores"]["miou"] == ARMS[0].scores.miou
    assert found["arms"][0]["scores"]["classes"][3]["iou"] is None
    assert found["comparisons"][0]["measures"]["boundary_iou"]["verdict"] == "gain"
    assert found["latency"]["ratio"] == 1.04
    assert found["evaluate"]["band"] == 2
    assert set(found) >= {f for f in vars(FULL) if f != "comparisons"}


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_report(FULL, tmp_path)
    old = (tmp_path / "report.md").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError) as raised:
        write_report(replace(FULL, model="other"), tmp_path)
    assert str(raised.value) == (
        f"cannot write '{tmp_path / 'report.md'}': No space left on device. Free some space or "
        "name another folder; what was there before is untouched."
    )
    assert (tmp_path / "report.md").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
    monkeypatch.undo()
    write_report(replace(FULL, model="other"), tmp_path)
    assert (tmp_path / "report.md").read_bytes() != old


def test_a_file_in_the_place_of_a_folder_is_said(tmp_path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot write"):
        write_file(tmp_path / "run" / "a.txt", "words")
    assert (tmp_path / "run").read_text() == "in the way"


def test_durations():
    assert [duration(s) for s in (0.04, 59.94, 59.96, 60, 3599.4, 3599.6, 90_000)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "25 h 0 min",
    ]
