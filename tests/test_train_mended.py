"""Trained networks found again from anywhere, and what is said of data that cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_equal
from PIL import Image
from torch import Tensor
from train_data import opened, write_folder

from pacswap.errors import DataError
from pacswap.recipes import load_recipe
from pacswap.scenes import CLASSES
from pacswap.surgery import rewrite
from pacswap.train.data.labels import distinct_colours
from pacswap.train.data.scan import scan
from pacswap.train.data.split import Split, open_data, shared_pictures
from pacswap.train.measure.compare import Comparison, Difference, compare
from pacswap.train.measure.metrics import MEASURES, Scores, count
from pacswap.train.measure.statistics import Interval
from pacswap.train.setting import section_of
from pacswap.train.trained import Trained, evaluate, keep_model, open_trained, predict
from pacswap.upgrade import built, folder_of, planned

RECIPE = """
version: 1
model:
  library: pacswap
  name: scene_net
  weights: null
  args: {width: 6, num_classes: 6}
  input_size: [3, 48, 64]
upsample:
  - layers: interpolate
    guidance: {from: [stem, input], channels: 4}
    filter: {kernel_size: 3, weights: full, blur: 2}
finetune:
  batch_size: 2
  workers: 0
  data: {format: folder, root: ../data, classes: classes.txt}
  stages:
    - {name: all, train: [all], steps: 1, lr: 1.0e-3}
"""
COLOURS = [list(colour) for colour in distinct_colours(9)[3:]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data", train=4, val=2)


def kept(tmp_path: Path, *overrides: str) -> tuple[Trained, tuple[Split, Split]]:
    """A network as a run keeps it, opened again, and the data as the run read it."""
    recipe = tmp_path / "recipe/r.yaml"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(RECIPE, encoding="utf-8")
    loaded = load_recipe(recipe, [f"finetune.data.{text}" for text in overrides])
    model = built(loaded)
    plan = planned(loaded, model)
    splits = open_data(section_of(loaded).data, folder_of(loaded, ("finetune", "data", "root")))
    folder = keep_model(rewrite(model, plan), loaded, plan, splits[1], tmp_path / "run/model")
    return open_trained(folder, device="cpu"), splits


def said(trained: Trained, key: str) -> object:
    return getattr(section_of(trained.loaded).data, key)


def assert_same_data(trained: Trained, splits: tuple[Split, Split]) -> None:
    found = open_data(section_of(trained.loaded).data, trained.folder)
    for one, other in zip(found, splits, strict=True):
        assert one.classes == other.classes
        assert [s.name for s in one.samples] == [s.name for s in other.samples]
        for index in range(len(one)):
            assert_equal(one.read(index)[1], other.read(index)[1])


# --- where a trained network finds its data -----------------------------------------------------


def test_lists_beside_the_recipe_are_found_from_the_run(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "some.txt").write_text("t003\nt001\n")
    (recipe / "few.txt").write_text("v001\n")
    trained, splits = kept(tmp_path, "train=some", "val=few.txt")
    monkeypatch.chdir(data)
    assert (said(trained, "train"), said(trained, "val")) == (
        str(recipe.resolve() / "some.txt"),
        str(recipe.resolve() / "few.txt"),
    )
    assert_same_data(trained, splits)
    assert evaluate(trained).pictures == ("v001",)


def test_lists_in_the_datas_folder_and_subfolders_keep_their_names(
    tmp_path: Path, data: Path
) -> None:
    for folder in ("images", "masks"):
        (data / folder / "held").mkdir()
        for path in (data / folder).glob("v*"):
            path.rename(data / folder / "held" / path.name)
    trained, splits = kept(tmp_path, "train=train.txt", "val=held")
    assert (said(trained, "train"), said(trained, "val")) == ("train.txt", "held")
    assert said(trained, "classes") == CLASSES
    assert_same_data(trained, splits)


def test_a_formats_own_split_is_not_a_file_beside_the_recipe(tmp_path: Path) -> None:
    from pacswap.train.data.formats import _LIBRARY
    from pacswap.train.trained import _OWN_SPLITS, _lasting

    assert set().union(*(library.splits for library in _LIBRARY.values())) == _OWN_SPLITS
    for name in ("val", "mine"):
        (tmp_path / name).write_text("2007_a\n")
    root = tmp_path / "data"
    assert _lasting("val", "voc", root, tmp_path) == "val"
    assert _lasting("mine", "voc", root, tmp_path) == str(tmp_path.resolve() / "mine")
    assert _lasting(None, "voc", root, tmp_path) is None


def coloured(path: Path) -> None:
    """Make a mask of numbers one of colours."""
    labels = np.array(Image.open(path))
    Image.fromarray(np.array(COLOURS, np.uint8)[labels]).save(path)


@pytest.mark.parametrize("beside", [False, True], ids=["in the data", "beside the recipe"])
@pytest.mark.parametrize("which", ["all", "some"])
def test_masks_stay_readable_by_the_colours_of_a_classes_file(
    tmp_path: Path, data: Path, beside: bool, which: str
) -> None:
    for path in (data / "masks").glob("*.png" if which == "all" else "*1.png"):
        coloured(path)
    place = tmp_path / "recipe" if beside else data
    place.mkdir(exist_ok=True)
    legend = {"classes": list(CLASSES), "palette": COLOURS}
    (place / "legend.json").write_text(json.dumps(legend))
    trained, splits = kept(tmp_path, "classes=legend.json")
    assert said(trained, "classes") == str(place.resolve() / "legend.json")
    assert trained.classes == CLASSES
    assert_same_data(trained, splits)


def test_colours_that_no_mask_is_read_by_bind_to_no_file(tmp_path: Path, data: Path) -> None:
    legend = {"classes": list(CLASSES), "palette": COLOURS}
    (data / "legend.json").write_text(json.dumps(legend))
    trained, splits = kept(tmp_path, "classes=legend.json")
    assert (said(trained, "classes"), said(trained, "palette")) == (CLASSES, None)
    assert_same_data(trained, splits)


def test_the_recipes_own_palette_is_kept(tmp_path: Path, data: Path) -> None:
    for path in (data / "masks").glob("*.png"):
        coloured(path)
    trained, splits = kept(tmp_path, f"palette={COLOURS}")
    assert said(trained, "classes") == CLASSES
    assert_same_data(trained, splits)


# --- predict ------------------------------------------------------------------------------------


def test_an_overlay_that_meets_another_mask_is_refused(tmp_path: Path, data: Path) -> None:
    trained, _ = kept(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "a_overlay.png"):
        Image.new("RGB", (64, 48)).save(pictures / name)
    out = tmp_path / "out"
    with pytest.raises(DataError) as raised:
        predict(trained, [pictures], out, overlays=True)
    assert str(raised.value) == f"several pictures would be written to '{out / 'a_overlay.png'}'."
    assert not out.exists()
    assert len(predict(trained, [pictures], out)) == 2


# --- pictures of different sizes ----------------------------------------------------------------


def test_pictures_of_different_sizes_are_found_before_training(data: Path) -> None:
    for folder in ("images", "masks"):
        Image.open(data / folder / "t002.png").resize((32, 40), 0).save(data / folder / "t002.png")
    train, val = opened(data)
    with pytest.raises(DataError) as raised:
        scan(train, one_size=True)
    assert str(raised.value) == (
        f"'{data}', train (4 pictures): pictures differ in size, 2 sizes: 'images/t000.png' "
        "(48×64), 'images/t002.png' (40×32). A batch takes one size: give "
        "finetune.data.transforms.crop or finetune.data.resize, or set finetune.batch_size: 1."
    )
    scan(train)
    scan(val, one_size=True)
    scan(opened(data, resize=(48, 64))[0], one_size=True)


# --- pictures that are learnt from and measured on ----------------------------------------------


def test_a_link_is_the_picture_that_it_leads_to(data: Path) -> None:
    (data / "images/v000.png").unlink()
    (data / "images/v000.png").symlink_to("t002.png")
    loop = data / "images/v001.jpg"
    loop.unlink()
    loop.symlink_to(loop)
    assert shared_pictures(*opened(data)) == (
        "1 picture is both learnt from and measured on: 'v000'. The measure then says little "
        "about new pictures."
    )


# --- one picture to measure on ------------------------------------------------------------------


def of_pixels(wrong: int, pictures: int) -> Scores:
    """Scores of pictures in which so many pixels are mistaken."""
    truth = torch.arange(16).view(4, 4) % 2
    seen: Tensor = truth.clone()
    seen.view(-1)[:wrong] = 1 - seen.view(-1)[:wrong]
    tally = count(seen, truth, classes=2)
    return Scores.of([tally] * pictures, ["sky", "road"], [f"{i}" for i in range(pictures)])


def test_one_picture_shows_no_gain() -> None:
    found = compare({0: of_pixels(4, 1)}, {0: of_pixels(2, 1)}, resamples=50)
    assert found.measures["miou"].mean > 0
    for one in (*found.measures.values(), *found.classes, *found.outlines):
        assert (one.over_pictures, one.verdict) == (None, "no gain is shown")
        assert one.as_dict()["over_pictures"] is None
    assert "| over 1 picture |" in found.as_markdown()
    assert found.as_dict()["verdict"] == "no gain is shown"
    two = compare({0: of_pixels(4, 2)}, {0: of_pixels(2, 2)}, resamples=50)
    assert two.measures["miou"].over_pictures is not None
    assert two.verdict == "gain"


def of_one_picture(seeds: tuple[int, ...], over_seeds: Interval | None) -> Comparison:
    found = Difference("mIoU", 0.4, 0.41, (0.01,) * len(seeds), over_seeds, None)
    measures = dict.fromkeys(MEASURES, found)
    return Comparison("control", "upgraded", seeds, 1, 2000, 0.95, measures, (), ())


def test_one_picture_in_words() -> None:
    assert of_one_picture((0,), None).sentence == (
        "No gain is shown: mIoU of upgraded is +1.00 points against control (one seed cannot say "
        "how another would end; one picture cannot say how another would score)."
    )
    assert of_one_picture((0, 1), Interval(0.005, 0.015)).sentence == (
        "A gain on this picture: mIoU of upgraded is +1.00 points against control (95 % interval "
        "+0.50 … +1.50 over 2 seeds; one picture cannot say how another would score)."
    )
    assert of_one_picture((0, 1), Interval(-0.005, 0.015)).sentence == (
        "No gain is shown: mIoU of upgraded is +1.00 points against control (95 % interval "
        "−0.50 … +1.50 over 2 seeds; one picture cannot say how another would score)."
    )
