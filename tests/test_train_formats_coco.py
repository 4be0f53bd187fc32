"""COCO's outlines become masks."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import assert_equal
from PIL import Image

from pacswap.errors import DataError
from pacswap.recipes import DataSection
from pacswap.train.data.scan import scan
from pacswap.train.data.split import Split, open_data

H, W = 12, 20

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed"
    ),
    # pycocotools 2.0.11 was written for numpy 1.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),
]


def rectangle(top: int, left: int, bottom: int, right: int) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


def counts(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: down the columns, background first."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": [H, W], "counts": [0, *runs] if flat[0] else runs}


def annotation(picture: int, category: int, outline: Any, **more: Any) -> dict[str, Any]:
    return {"image_id": picture, "category_id": category, "segmentation": outline, **more}


CATEGORIES = [{"id": 90, "name": "cup"}, {"id": 3, "name": "dog"}, {"id": 18, "name": "cat"}]
CROWD = np.zeros((H, W), np.uint8)
CROWD[:, 16:] = 1


def content(key: str) -> dict[str, Any]:
    """One picture, its things and a crowd."""
    return {
        "images": [{"id": 7, "file_name": f"{key}.jpg", "height": H, "width": W}],
        "categories": CATEGORIES,
        "annotations": [
            annotation(7, 90, rectangle(3, 3, 6, 6), area=9),
            annotation(7, 3, rectangle(2, 2, 9, 12), area=70),
            annotation(7, 18, rectangle(0, 14, 4, 18), area=16),
            annotation(7, 3, counts(CROWD), area=999, iscrowd=1),
        ],
    }


def expected(dog: int, cat: int, cup: int, ignore: int = 255) -> torch.Tensor:
    mask = torch.zeros(H, W, dtype=torch.int64)
    mask[:, 16:] = ignore
    mask[2:9, 2:12] = dog
    mask[0:4, 14:18] = cat
    mask[3:6, 3:6] = cup
    return mask


def write(root: Path, *, layout: str = "images", **changed: dict[str, Any]) -> Path:
    (root / "annotations").mkdir()
    for key in ("train", "val"):
        place = root / layout.replace("{split}", f"{key}2017")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (W, H), (9, 9, 9)).save(place / f"{key}.jpg")
        text = json.dumps(content(key) | changed.get(key, {}))
        (root / f"annotations/instances_{key}2017.json").write_text(text)
    return root


def opened(root: Path, **keys: Any) -> tuple[Split, Split]:
    return open_data(DataSection(format="coco", root=str(root), **keys), root)


def refused(root: Path, **keys: Any) -> str:
    with pytest.raises(DataError) as raised:
        opened(root, **keys)
    return str(raised.value).removeprefix(f"finetune.data of {root}")


@pytest.mark.parametrize("layout", ["images", "{split}", "images/{split}", "annotations", "else"])
def test_outlines_become_a_mask(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout=layout)
    train, val = opened(tmp_path, images="else" if layout == "else" else None)
    assert train.classes == ("background", "dog", "cat", "cup")
    scan(train)
    assert_equal(train.read(0)[1], expected(1, 2, 3))
    with pytest.raises(AssertionError):
        assert_equal(train.read(0)[1], expected(1, 2, 1))
    assert (train.samples[0].name, val.samples[0].name) == ("train", "val")


def test_the_recipe_chooses_categories(tmp_path: Path) -> None:
    train, _ = opened(write(tmp_path), classes=["cup", "dog"], ignore_index=9)
    assert train.classes == ("background", "cup", "dog")
    # The crowd is one of dogs.
    truth = expected(2, 0, 1, 9)
    truth[:4, 16:18] = 9
    assert_equal(train.read(0)[1], truth)
    assert opened(tmp_path, classes=4)[0].classes == ("background", "dog", "cat", "cup")
    assert refused(tmp_path, classes=3) == (
        ": classes: the data has 3 categories, 4 classes with the background, got 3."
    )
    assert refused(tmp_path, classes=["background", "dgo"]) == (
        ": classes: 1 is no category of the data: 'dgo'. Nearest: 'dog'."
    )


def test_run_lengths_as_text(tmp_path: Path) -> None:
    from pycocotools import mask as coco_mask

    coded = coco_mask.encode(np.asfortranarray(CROWD))
    outline = {"size": coded["size"], "counts": coded["counts"].decode()}
    train, _ = opened(write(tmp_path, train={"annotations": [annotation(7, 90, outline)]}))
    assert_equal(train.read(0)[1], torch.from_numpy(CROWD).long() * 3)


DAMAGED = {
    "a point": [[1.0, 2.0]],
    "half a point": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]],
    "words": [["a"] * 6],
    "nothing": [],
    "too few pixels": {"size": [H, W], "counts": [3, 4]},
    "too many pixels": {"size": [H, W], "counts": [0, 10**6]},
    "another size": {"size": [W, H], "counts": [H * W]},
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_outlines_are_named(tmp_path: Path, case: str) -> None:
    wrong = {"annotations": [annotation(7, 3, DAMAGED[case])]}
    train, val = opened(write(tmp_path, train=wrong))
    scan(val)
    with pytest.raises(DataError) as raised:
        scan(train)
    assert str(raised.value) == (
        f"'{tmp_path}', train (1 picture): 'images/train.jpg' cannot be read: its outlines are "
        "damaged. Replace what is damaged, or leave it out of the split."
    )


def test_a_picture_of_another_size_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    Image.new("RGB", (W + 1, H)).save(tmp_path / "images/train.jpg")
    with pytest.raises(DataError) as raised:
        scan(opened(tmp_path)[0])
    assert str(raised.value) == (
        f"'{tmp_path}', train (1 picture): 'images/train.jpg' is not as large as its mask: picture "
        "12×21, mask 12×20. Pair each picture with its own mask."
    )


def test_a_missing_picture_is_named(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in range(6)]
    images[0]["file_name"] = "train.jpg"
    write(tmp_path, train={"images": images})
    assert refused(tmp_path) == (
        ": train: 5 files are missing: 'images/1.jpg', 'images/2.jpg', 'images/3.jpg' and 2 more. "
        "Unpack the data once more."
    )


# id: (what the training file holds instead, the keys, what is said)
FAULTS: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "other categories": ({"categories": [{"id": 3, "name": "wolf"}]}, {}, "val: its categories are not those of train. Give both the same."),
    "no pictures": ({"images": []}, {}, "train: 'instances_train2017.json' lists no picture."),
    "no list": ({"annotations": None}, {}, "train: 'instances_train2017.json' has no list 'annotations', as COCO's files have."),
    "no field": ({"annotations": [{"image_id": 7, "category_id": 3}]}, {}, "train: 'instances_train2017.json' has no 'segmentation' in annotations[0]."),
    "not there": ({}, {"train": "instances_train2017.jsn"}, "train: no file 'instances_train2017.jsn' in '{root}' or beside the recipe. Nearest: 'annotations/instances_train2017.json', 'annotations/instances_val2017.json'."),
    "no JSON": ({}, {"train": "images/train.jpg"}, "train: 'train.jpg' is not JSON."),
    "no folder": ({"images": [{"id": 7, "file_name": "q.jpg", "height": H, "width": W}]}, {}, "train: its first picture 'q.jpg' is not in 'images', 'train2017', 'images/train2017', 'annotations'. Name images."),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_a_file(tmp_path: Path, case: str) -> None:
    changed, keys, said = FAULTS[case]
    write(tmp_path, train=changed)
    assert refused(tmp_path, **keys) == ": " + said.replace("{root}", str(tmp_path))


def test_no_file_at_all(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "annotations/instances_val2017.json").unlink()
    assert refused(tmp_path) == (
        ": val: missing key, and no 'val.json' or 'annotations/val.json' or "
        f"'annotations/instances_val*.json' or 'val/_annotations.coco.json' in '{tmp_path}'. Name "
        "the JSON file."
    )


def test_without_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert refused(tmp_path) == (
        ': format coco needs pycocotools. Install it: pip install "pacswap[coco]"'
    )
