"""The README does what it says: its commands are those of CI, and its Python runs."""

import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

import pacswap
from pacswap.cli import app
from pacswap.recipes import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_ci_calls_exactly_the_readmes_test_command():
    commands = [block.strip() for block in blocks("bash")]
    assert commands == [
        "pip install . && pacswap apply quickstart -o upgraded",
        'pip install -e ".[test]" && python -m pytest',
    ]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[1] in ci
    assert commands[0].removeprefix("pip install . && ") in ci


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.randn(2, 3, 64, 64), "features": torch.randn(1, 64, 8, 8)}
    names["guidance"] = torch.randn(1, 5, 8, 8)
    for block in blocks("python"):
        block = block.replace('weights="DEFAULT"', "weights=None, weights_backbone=None")
        exec(block.replace("pretrained=True", "pretrained=False"), names)
    assert type(names["plain"]).__name__ == "EfficientNet"
    assert names["y"].shape == (1, 64, 8, 8)


def test_the_readmes_recipes_are_valid():
    swapped, trained = (Recipe.model_validate(yaml.safe_load(text)) for text in blocks("yaml"))
    assert swapped.swap[0].guidance.channels == 16
    assert trained.finetune.data.classes == ("road", "car", "other")


def test_the_recipes_of_the_manual_are_valid():
    manual = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", manual, flags=re.DOTALL)
    assert Recipe.model_validate(yaml.safe_load(text)).model.num_classes == 3


def test_every_command_named_in_the_readme_exists():
    commands = set(re.findall(r"(?:`|^)pacswap ([a-z]+) ", README, flags=re.MULTILINE))
    assert {"finetune", "apply", "cp"} <= commands
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert commands - known - {"ls"} == set()


@pytest.mark.parametrize("name", re.findall(r"`pacswap\.(\w+)\(", README))
def test_every_function_named_in_the_readme_exists(name):
    assert callable(getattr(pacswap, name))


def test_every_file_named_in_the_readme_exists():
    linked = re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(
        r"python (benchmarks/\S+\.py)", README
    )
    assert linked
    assert [name for name in linked if not (ROOT / name).is_file()] == []


def test_the_refusal_shown_in_the_readme_is_the_one_given():
    with pytest.raises(pacswap.errors.PlanError) as caught:
        pacswap.plan(timm.create_model("resnet50"), "layer9.*", "layer?")
    assert str(caught.value) == blocks("text")[0].strip()
