"""One small model of each family of timm and torchvision: what is refused, and the promises."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from zoo_models import Model, models
from zoo_sample import LEFT_OUT, SAMPLE, VERSIONS, WITHOUT
from zoo_swap import Options, examine

# By model, how often each reason is given: `python benchmarks/zoo.py --refusals OUT` writes it.
REFUSED = json.loads((Path(__file__).parent / "zoo_refusals.json").read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore")  # the libraries warn of their own code
@pytest.mark.parametrize("model", SAMPLE, ids=lambda model: str(model).replace(" ", "-"))
def test_family(model):
    row = {}
    for part in examine(model, Options(timed=False)):
        row |= part
    assert row.get("failure") is None
    assert {r["reason"]: r["count"] for r in row["refused"]} == REFUSED.get(str(model), {})
    assert row["reachable"] == row["convolutions"] - sum(r["count"] for r in row["refused"])
    if row["reachable"]:
        checks = row["swap"]["checks"]
        assert [f"{name}: {figure}" for name, passed, figure in checks if passed is False] == []


def test_no_refusal_is_expected_of_what_is_not_tried():
    """The whole run may be the source of the file, of which only the sample is looked at."""
    known = {str(model) for model in models()}
    assert set(REFUSED) <= known


@pytest.mark.skipif(
    any(not version(name).startswith(number) for name, number in VERSIONS.items()),
    reason=f"the sample was chosen for {VERSIONS}",
)
def test_every_family_is_in_the_sample_or_left_out_with_a_reason():
    tried = [model.family for model in SAMPLE]
    left = [model.family for model in LEFT_OUT]
    assert len({*tried, *left, *WITHOUT}) == len(tried) + len(left) + len(WITHOUT)
    assert {*tried, *left, *WITHOUT} == {model.family for model in models()}


def test_the_sample_names_models_that_exist():
    assert {*SAMPLE, *LEFT_OUT} <= set(models())
    assert all(reason for reason in LEFT_OUT.values())
    assert Model("timm", "resnet18") in models("timm")
