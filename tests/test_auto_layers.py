"""`layers: {auto: …}` in a recipe: a probe chooses, the choice can be pinned, faults are placed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap import scenes
from pacswap.errors import RecipeError
from pacswap.recipes import LoadedRecipe, dump_recipe, load_recipe, refuse_auto
from pacswap.train.auto import resolve_auto
from pacswap.upgrade import plan_recipe, planned
from pacswap.zoo import Source, build

SIZE = (48, 64)
RECIPE = """\
version: 1
model: {library: pacswap, name: scene_net, weights: null, input_size: [3, 48, 64]}
swap:
  - layers: {auto: {top: 2, max_cost: 5%}}
    guidance: {from: layer1, channels: 8}
"""
PIN = (
    "which layers is decided on data, and none is looked at here. `pacswap finetune` decides it on "
    "the recipe's data, and `pacswap probe` shows its ranking. To pin the choice, write the names "
    "in its place: layers: [layer3.1.conv2, …]."
)


def batch(number: int) -> tuple[Tensor, Tensor]:
    images, masks = scenes.draw_batch([2 * number, 2 * number + 1], SIZE)
    return scenes.normalize(images), masks


BATCHES = [batch(0), batch(1)]


def loss(output: Tensor, masks: Tensor) -> Tensor:
    return F.cross_entropy(output, masks)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return build(Source("pacswap", "scene_net"))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(old: str = "", new: str = "") -> LoadedRecipe:
        assert old in RECIPE
        (tmp_path / "r.yaml").write_text(RECIPE.replace(old, new) if old else RECIPE)
        return load_recipe("r.yaml")

    return load


def test_auto_is_replaced_by_what_the_probe_ranks_first(net, recipe):
    loaded = recipe()
    reports = []
    found = resolve_auto(
        loaded, net, iter(BATCHES), loss, report=lambda *given: reports.append(given)
    )
    ((group, probed),) = reports
    assert group == "swap[0]"
    assert found.recipe.swap[0].layers == probed.best(2, 0.05)
    assert found.recipe.swap[0].guidance == loaded.recipe.swap[0].guidance
    assert found.where(("swap", 0, "layers", 1)) == "r.yaml:4:13"
    refuse_auto(found)
    names = [layer.name for layer in planned(found, net).layers]
    assert names == list(probed.best(2, 0.05))
    # As it is written into a run's folder, it is pinned.
    again = load_recipe(_written(dump_recipe(found.recipe)))
    assert again.recipe == found.recipe


def _written(text: str) -> str:
    Path("again.yaml").write_text(text)
    return "again.yaml"


def test_auto_survives_a_dump(recipe):
    loaded = recipe()
    assert load_recipe(_written(dump_recipe(loaded.recipe))).recipe == loaded.recipe


def test_auto_leaves_alone_what_others_claim(net, recipe):
    others = (
        "  - {layers: head.conv, guidance: input}\n"
        "  - {layers: {auto: {top: 9}}, guidance: input}\n"
    )
    loaded = recipe("8}\n", "8}\n" + others)
    found = resolve_auto(loaded, net, BATCHES[:1], loss)
    first, head, third = (section.layers for section in found.recipe.swap)
    assert head == "head.conv"
    assert "head.conv" not in (*first, *third)
    assert set(first).isdisjoint(third)
    assert len(planned(found, net).layers) == len(first) + len(third) + 1


def test_auto_chooses_among_what_the_query_leaves(net, recipe):
    loaded = recipe("5%}", "5%}, name: 'layer3.*', exclude: '*.conv1'")
    assert resolve_auto(loaded, net, BATCHES[:1], loss).recipe.swap[0].layers == (
        "layer3.0.conv2",
        "layer3.1.conv2",
    )


def test_a_recipe_without_auto_needs_no_data(net, recipe):
    loaded = recipe("{auto: {top: 2, max_cost: 5%}}", "head.conv")
    assert resolve_auto(loaded, net, [], loss) is loaded
    refuse_auto(loaded)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "5%",
            "0.0001%",
            "no layer fits into max_cost 0.0001%: the cheapest of 9 adds",
        ),
        (
            "5%}",
            "5%}, kernel_size: 7",
            "none of the 14 spatial convolutions has kernel_size=7.",
        ),
        ("from: layer1", "from: layer9", "cannot upgrade SceneNet"),
    ],
)
def test_auto_that_cannot_be_met_points_at_its_line(net, recipe, old, new, message):
    with pytest.raises(RecipeError) as raised:
        resolve_auto(recipe(old, new), net, BATCHES[:1], loss)
    assert str(raised.value).startswith(f"r.yaml:4:20: swap[0].layers.auto: {message}")


def test_auto_when_all_is_claimed(net, recipe):
    loaded = recipe(
        "    guidance", "    guidance: input\n  - layers: {kernel_size: 3}\n    guidance"
    )
    with pytest.raises(RecipeError) as raised:
        resolve_auto(loaded, net, BATCHES[:1], loss)
    assert str(raised.value) == (
        "r.yaml:4:20: swap[0].layers.auto: other groups claim every layer that matches."
    )


def test_auto_without_data_is_told_how_to_be_pinned(recipe):
    loaded = recipe()
    with pytest.raises(RecipeError) as raised:
        refuse_auto(loaded)
    assert str(raised.value) == f"r.yaml:4:20: swap[0].layers.auto: {PIN}"
    with pytest.raises(RecipeError) as raised:
        plan_recipe("r.yaml")
    assert str(raised.value).endswith(f"layers.auto: {PIN}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("5%", "5", "r.yaml:4:39: swap[0].layers.auto.max_cost: expected at most 1, got 5."),
        (
            "5%",
            "0%",
            "r.yaml:4:39: swap[0].layers.auto.max_cost: expected more than 0% and at most 100%, "
            "such as '5%', got '0%'.",
        ),
        (
            "5%",
            "5 percent",
            "r.yaml:4:39: swap[0].layers.auto.max_cost: expected more than 0% and at most 100%, "
            "such as '5%', got '5 percent'.",
        ),
        (
            "5%",
            "[5]",
            "r.yaml:4:39: swap[0].layers.auto.max_cost: expected a percentage such as '5%' or a "
            "number above 0, got a list.",
        ),
        ("top: 2", "top: 0", "r.yaml:4:26: swap[0].layers.auto.top: expected at least 1, got 0."),
        (
            "top: 2",
            "tpo: 2",
            "r.yaml:4:21: swap[0].layers.auto.tpo: unknown key. Nearest: 'top'.",
        ),
    ],
)
def test_faults_of_auto(recipe, old, new, message):
    with pytest.raises(RecipeError) as raised:
        recipe(old, new)
    assert str(raised.value) == message


@pytest.mark.parametrize(("written", "share"), [("5%", 0.05), ("0.5 %", 0.005), ("0.02", 0.02)])
def test_shares(recipe, written, share):
    assert recipe("5%", written).recipe.swap[0].layers.auto.max_cost == share
