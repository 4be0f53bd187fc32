"""Every recipe that ships: what it says of itself, that it holds for its network, that it works."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import pacswap
from pacswap import upgrade
from pacswap.cli import main
from pacswap.errors import VerificationError
from pacswap.recipes import dump_recipe, load_recipe, shipped_recipes, summary

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = {
    path.relative_to(FOLDER).with_suffix("").as_posix(): path
    for path in sorted(FOLDER.rglob("*.yaml"))
}
# name: (layers, adapting kernels, tensors added)
SWAPPED = {
    "camvid_deeplabv3": (1, 1, 4),
    "convnext_tiny": (3, 3, 7),
    "deeplabv3_resnet50": (3, 3, 7),
    "deeplabv3_resnet50_guided": (1, 1, 4),
    "efficientnet_b0": (4, 4, 9),
    "fcn_resnet50": (3, 3, 7),
    "fcn_resnet50_crf": (1, 2, 7),
    "fcn_resnet50_guided": (1, 1, 4),
    "fcn_resnet50_pool": (1, 1, 3),
    "lraspp_mobilenet_v3_large": (2, 1, 4),
    "mobilenetv2_100": (4, 2, 7),
    "quickstart": (4, 3, 8),
    "resnet50": (3, 3, 7),
    "resnet50d_pool": (3, 3, 13),
    "scenes_guided": (1, 1, 4),
    "squeezenet1_1_pool": (3, 3, 7),
    "vgg16_hotswap": (3, 3, 6),
}
# A dilation of 36 has to find a neighbour inside the features, at an eighth of the image's size.
SIZES = {"deeplabv3_resnet50": (3, 16, 304)}

every_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The fewest passes that measure a latency; what it is does not matter here."""
    shortened = functools.partial(upgrade.measure_latency, seconds=0)
    monkeypatch.setattr(upgrade, "measure_latency", shortened)


def header(name: str) -> list[str]:
    """The comment at the top, without its marks."""
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    comments = lines[: lines.index("version: 1")]
    assert all(line.startswith("#") for line in comments)
    return [line.removeprefix("#").strip() for line in comments]


def test_the_recipes_are_these():
    assert set(RECIPES) == set(SWAPPED)
    assert shipped_recipes() == RECIPES


@every_recipe
def test_its_first_line_says_what(name):
    first = header(name)[0]
    assert first.endswith(".")
    assert 40 <= len(first) <= 110
    assert summary(RECIPES[name]) == first


@every_recipe
def test_its_header_names_the_command(name):
    commands = [line for line in header(name) if line.startswith(f"pacswap apply {name} ")]
    assert len(commands) >= 1


@every_recipe
def test_its_header_says_what_to_expect(name):
    expected = [line for line in header(name) if line.startswith("Expect: ")]
    assert len(expected) == 1
    assert expected == header(name)[-1:], "it is the last line, and the only one"


@every_recipe
def test_it_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(RECIPES[name]).recipe
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy).recipe == recipe


plan_recipe = functools.cache(upgrade.plan_recipe)


@every_recipe
def test_it_is_valid(name, capsys, monkeypatch):
    monkeypatch.setattr(upgrade, "plan_recipe", lambda name, _, trust_python: plan_recipe(name))
    main(["validate", name])
    printed = capsys.readouterr()
    assert f"{name}.yaml is valid: {SWAPPED[name][0]} layers of " in printed.out
    assert printed.err == ""


@every_recipe
def test_its_plan(name):
    loaded, plan = plan_recipe(name)
    assert loaded.path == RECIPES[name]
    found = (len(plan.layers), len(plan.kernels), len(plan.added_parameters()))
    assert found == SWAPPED[name]
    share = plan.cost.added_parameters / plan.cost.parameters
    assert 0 < share < 0.01, "the README says: well under 1 %"


@every_recipe
def test_it_keeps_its_promises(name):
    size = list(SIZES.get(name, (3, 64, 64)))
    applied = pacswap.apply(name, ["model.weights=null", f"model.input_size={size}"])
    checks = applied.report.verification.checks
    assert [check for check in checks if not check.passed] == []
    assert {check.promise for check in checks} == {1, 2, 3, 4, 5}
    # Every header promises the output of before, bit for bit.
    image = torch.rand(1, *size)
    with torch.inference_mode():
        before, after = applied.original(image), applied.model(image)
    tensors = (before, after) if isinstance(before, torch.Tensor) else (before["out"], after["out"])
    assert torch.equal(*tensors)
    assert set(applied.report.bandwidths) == {kernel.owner for kernel in applied.plan.kernels}


def test_a_broken_promise_is_seen(monkeypatch):
    def careless(model: nn.Module, plan: pacswap.Plan) -> nn.Module:
        upgraded = pacswap.rewrite(model, plan)
        with torch.no_grad():
            upgraded.head.classifier.bias += 0.01
        return upgraded

    monkeypatch.setattr(upgrade, "rewrite", careless)
    with pytest.raises(VerificationError) as raised:
        pacswap.apply("quickstart", ["model.input_size=[3,64,64]"])
    failed = str(raised.value).splitlines()[1:-1]
    assert [line.split(":")[0].strip(" -") for line in failed] == [
        "promise 1, same output in eval mode",
        "promise 1, same output in train mode",
        "promise 3, state_dict keys and values kept",
        "promise 4, revert gives the original back",
    ]
