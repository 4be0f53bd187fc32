"""torchvision's formats and drawn scenes, on trees as small as they come."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_equal
from PIL import Image
from torchvision.datasets import Cityscapes, OxfordIIITPet, VOCSegmentation
from train_data import opened, refused

from pacswap.errors import DataError
from pacswap.scenes import CLASSES
from pacswap.train.data.scan import scan
from pacswap.train.data.split import Split, shared_pictures


def names(split: Split) -> list[str]:
    return [sample.name for sample in split.samples]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def ramp(*numbers: int) -> np.ndarray:
    """A mask of these numbers, one per column."""
    return np.tile(np.array(numbers, np.uint8), (16, 1))


GREY = np.full((16, 4, 3), 90)


def write_voc(root: Path, year: str = "2012") -> Path:
    base = root / "VOCdevkit" / f"VOC{year}"
    lists = base / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for split, ids in {"train": "ab", "val": "c", "trainval": "abc"}.items():
        (lists / f"{split}.txt").write_text("".join(f"2007_{id}\n" for id in ids))
    for number, id in enumerate("abc"):
        save(base / f"JPEGImages/2007_{id}.jpg", GREY)
        save(base / f"SegmentationClass/2007_{id}.png", ramp(0, 20, 255, number))
    return root


def test_voc_is_torchvisions(tmp_path: Path) -> None:
    train, val = opened(write_voc(tmp_path), format="voc")
    data = VOCSegmentation(tmp_path, image_set="train")
    assert [(str(s.image), str(s.mask)) for s in train.samples] == list(
        zip(data.images, data.masks, strict=True)
    )
    assert (names(train), names(val)) == (["2007_a", "2007_b"], ["2007_c"])
    assert (len(train.classes), train.classes[15], train.ignore_index) == (21, "person", 255)
    scan(train)
    assert_equal(train.read(1)[1][0], torch.tensor([0, 20, 255, 1]))
    other, _ = opened(tmp_path, format="voc", ignore_index=-1)
    assert_equal(other.read(1)[1][0], torch.tensor([0, 20, -1, 1]))


@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC2009"])
def test_voc_of_any_year_from_any_folder(tmp_path: Path, inner: str) -> None:
    train, _ = opened(
        write_voc(tmp_path, "2009") / inner, format="voc", train="trainval", val="val"
    )
    assert len(train) == 3


def test_a_list_chooses_among_the_formats_pictures(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "mine.txt").write_text("2007_c\n2007_a.jpg\n")
    train, val = opened(tmp_path, format="voc", train="mine.txt")
    assert shared_pictures(train, val) == (
        "1 picture is both learnt from and measured on: '2007_c'. The measure then says little "
        "about new pictures."
    )
    assert names(train) == ["2007_c", "2007_a"]
    (tmp_path / "mine.txt").write_text("2007_c\n2007_d\n2007_c\n")
    assert refused(tmp_path, format="voc", train="mine.txt", classes=["a"]) == (
        " has 3 faults:\n"
        "classes: format voc has 21 ('background', 'aeroplane', 'bicycle' and 18 more), got 1. "
        "Give as many names, or leave the key out.\n"
        "train: 'mine.txt' lists 1 picture that no split of the format has: '2007_d'.\n"
        "train: 'mine.txt' lists 1 picture more than once: '2007_c'. Keep one line of each."
    )


def test_a_split_that_the_format_does_not_know(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass/2007_c.png").unlink()
    assert refused(tmp_path, format="voc", train="trian") == (
        " has 2 faults:\n"
        f"train: 'trian' is neither a split of the format nor a file in '{tmp_path}' or beside the "
        "recipe. Nearest: 'train', 'trainval'.\n"
        "val: 1 file is missing: 'VOCdevkit/VOC2012/SegmentationClass/2007_c.png'. Unpack the data "
        "once more."
    )
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    assert refused(tmp_path, format="voc", val="trainval").startswith(
        f" has 2 faults:\ntrain: the split 'train' cannot be read from '{tmp_path}': there is no "
        "'VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt'. To get the data: python -c "
    )


def test_cityscapes_is_torchvisions(tmp_path: Path) -> None:
    for split, cities in {"train": ("ulm", "aachen"), "val": ("bonn",), "test": ()}.items():
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / split).mkdir(parents=True)
        for city in cities:
            name = f"{city}_000000_000019"
            save(tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png", GREY)
            mask = tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png"
            save(mask, ramp(0, 7, 33, 255))
    train, val = opened(tmp_path, format="cityscapes")
    data = Cityscapes(tmp_path, split="train", target_type="semantic")
    assert sorted(str(s.image) for s in train.samples) == sorted(map(str, data.images))
    assert names(train) == [f"{c}/{c}_000000_000019_leftImg8bit" for c in ("aachen", "ulm")]
    assert (len(train.classes), train.classes[0], train.classes[18]) == (19, "road", "bicycle")
    assert train.palette[0] == (128, 64, 128)
    scan(train)
    assert_equal(train.read(0)[1][0], torch.tensor([255, 0, 18, 255]))
    save(tmp_path / "gtFine/val/bonn/bonn_000000_000019_gtFine_labelIds.png", ramp(1, 2, 34, 3))
    with pytest.raises(DataError, match=r"numbers that are no class: 34\."):
        scan(val)


@pytest.mark.parametrize("inner", ["", "oxford-iiit-pet"])
def test_pets_are_torchvisions(tmp_path: Path, inner: str) -> None:
    base = tmp_path / "oxford-iiit-pet"
    for split, name in {"trainval": "Abyssinian_1", "test": "pug_2"}.items():
        save(base / f"images/{name}.jpg", GREY)
        save(base / f"annotations/trimaps/{name}.png", ramp(1, 2, 3, 2))
        (base / f"annotations/{split}.txt").write_text(f"{name} 1 1 1\n")
    train, val = opened(tmp_path / inner, format="oxford_pet", classes=["Tier", "Grund", "Rand"])
    data = OxfordIIITPet(tmp_path, split="test", target_types="segmentation")
    assert (names(train), names(val)) == (["Abyssinian_1"], ["pug_2"])
    assert train.classes == ("Tier", "Grund", "Rand")
    scan(train)
    expected = torch.from_numpy(np.array(data[0][1])).long() - 1
    assert_equal(val.read(0)[1], expected)
    assert refused(tmp_path / "oxford-iiit-pet/images", format="oxford_pet").count("To get") == 2


def test_sbd_is_read(tmp_path: Path) -> None:
    io = pytest.importorskip("scipy.io", reason="SciPy reads the masks of SBD")
    for folder in ("img", "cls"):
        (tmp_path / folder).mkdir()
    kind = [("Segmentation", object), ("Boundaries", object)]
    for split in ("train", "val"):
        save(tmp_path / f"img/{split}1.jpg", GREY)
        struct = np.zeros((1, 1), dtype=kind)
        struct[0, 0] = (ramp(0, 20, 3, 5), ramp(0, 0, 0, 0))
        io.savemat(tmp_path / f"cls/{split}1.mat", {"GTcls": struct})
        (tmp_path / f"{split}.txt").write_text(f"{split}1\n")
    train, _ = opened(tmp_path, format="sbd")
    scan(train)
    assert_equal(train.read(0)[1][0], torch.tensor([0, 20, 3, 5]))
    (tmp_path / "cls/train1.mat").write_bytes(b"no")
    with pytest.raises(DataError, match=r"'cls/train1.mat' cannot be read: damaged, or not of the"):
        scan(train)


def test_sbd_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert refused(tmp_path, format="sbd") == (
        ": format sbd needs SciPy to read its masks. Install it: pip install scipy"
    )


def test_scenes_do_not_overlap() -> None:
    train, val = opened(None, format="scenes")
    assert (len(train), len(val), train.classes) == (320, 60, CLASSES)
    assert not {s.number for s in train.samples} & {s.number for s in val.samples}
    with pytest.raises(DataError) as raised:
        opened(None, format="scenes", resize=(8, 64), classes=["a"])
    assert str(raised.value) == (
        "finetune.data of scenes has 2 faults:\n"
        "resize: scenes are drawn at 16×16 at least, got 8×64.\n"
        "classes: format scenes has 6 ('sky', 'ground', 'building' and 3 more), got 1. Give as "
        "many names, or leave the key out."
    )
