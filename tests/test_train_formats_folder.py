"""A folder of pictures and masks in every layout, and what is said of one that is wrong."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_data import opened, refused, write_folder

from pacswap.recipes import DataSection
from pacswap.scenes import CLASSES, draw_scene
from pacswap.train.data.scan import scan
from pacswap.train.data.split import Split, open_data, shared_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path, train=4, val=2, size=(16, 20))


def names(split: Split) -> list[str]:
    return [sample.name for sample in split.samples]


TRAIN = [f"t{index:03}" for index in range(4)]

# --- the folder's layouts -----------------------------------------------------------------------


def as_camvid(root: Path) -> dict[str, str]:
    for split in ("train", "val"):
        for kind, ending in (("images", ""), ("masks", "annot")):
            (root / f"{split}{ending}").mkdir()
            for path in (root / kind).glob(f"{split[0]}*"):
                shutil.move(path, root / f"{split}{ending}" / path.name)
    return {"images": "{split}", "masks": "{split}annot"}


def as_camvid_half(root: Path) -> dict[str, str]:
    keys = as_camvid(root)
    (root / "train.txt").rename(root / "train_half_2.txt")
    return {**keys, "train": "train_half_2.txt"}


def as_camvid_without_lists(root: Path) -> dict[str, str]:
    keys = as_camvid(root)
    (root / "train.txt").unlink()
    (root / "val.txt").unlink()
    return keys


def as_subfolders(root: Path) -> dict[str, str]:
    for split in ("train", "val"):
        (root / f"{split}.txt").unlink()
        for kind in ("images", "masks"):
            (root / kind / split).mkdir()
            for path in list((root / kind).glob(f"{split[0]}0*")):
                path.rename(root / kind / split / path.name)
    return {}


def as_named_subfolders(root: Path) -> dict[str, str]:
    as_subfolders(root)
    (root / "images/train").rename(root / "images/learn")
    (root / "masks/train").rename(root / "masks/learn")
    return {"train": "learn", "val": "val"}


def as_flat_masks(root: Path) -> dict[str, str]:
    as_subfolders(root)
    for path in list(root.glob("masks/*/*")):
        path.rename(root / "masks" / path.name)
    shutil.rmtree(root / "masks/train")
    shutil.rmtree(root / "masks/val")
    return {}


def as_deep_folders(root: Path) -> dict[str, str]:
    as_subfolders(root)
    for kind in ("images", "masks"):
        (root / kind / "train/day").mkdir()
        for path in list((root / kind / "train").glob("t*")):
            path.rename(root / kind / "train/day" / path.name)
    return {}


def as_lists_of_windows(root: Path) -> dict[str, str]:
    for split in ("train", "val"):
        path = root / f"{split}.txt"
        lines = path.read_text().split()
        text = "\r\n".join(["\ufeff# a comment", "", *(f"  {line}.png " for line in lines)])
        path.write_bytes(text.encode())
    return {}


def as_segnet_lines(root: Path) -> dict[str, str]:
    for path in root.glob("masks/*"):
        path.rename(path.with_stem("label of " + path.stem.replace("0", "o")).with_suffix(".png"))
    for path in root.glob("masks/*"):
        path.rename(path.with_name(path.name.replace(" ", "")))
    for split in ("train", "val"):
        path = root / f"{split}.txt"
        lines = [
            f"/SegNet/images/{line}.png /SegNet/masks/labelof{line.replace('0', 'o')}.png\n"
            for line in path.read_text().split()
        ]
        path.write_text("".join(lines))
    return {}


def as_suffixed_masks(root: Path) -> dict[str, str]:
    for path in root.glob("masks/*"):
        path.rename(path.with_stem(path.stem + "_L"))
    return {}


def as_suffixed_pairs(root: Path) -> dict[str, str]:
    for path in root.glob("images/*"):
        path.rename(path.with_stem(path.stem + "_leftImg8bit"))
    for path in root.glob("masks/*"):
        path.rename(path.with_stem(path.stem + "_gtFine_labelIds"))
    for split in ("train", "val"):
        path = root / f"{split}.txt"
        path.write_text("".join(f"{line}_leftImg8bit\n" for line in path.read_text().split()))
    return {}


def as_one_folder(root: Path) -> dict[str, str]:
    (root / "all").mkdir()
    for path in root.glob("images/*"):
        path.rename(root / "all" / path.name)
    for path in root.glob("masks/*"):
        path.rename(root / "all" / f"{path.stem}_mask.png")
    return {"images": "all", "masks": "all"}


def as_other_kinds(root: Path) -> dict[str, str]:
    for path, suffix in zip(root.glob("images/t*"), (".webp", ".bmp", ".TIF", ".gif"), strict=True):
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    for path in root.glob("masks/v*"):
        Image.open(path).save(path.with_suffix(".tiff"))
        path.unlink()
    return {}


def as_names_of_the_world(root: Path) -> dict[str, str]:
    for kind in ("images", "masks"):
        for path in (root / kind).glob("t000.*"):
            path.rename(path.with_stem("Straße 東京 v1.2"))
    path = root / "train.txt"
    path.write_text(path.read_text().replace("t000", "Straße 東京 v1.2"), encoding="utf-8")
    return {}


def as_linked_in_a_circle(root: Path) -> dict[str, str]:
    as_subfolders(root)
    (root / "images/train/again").symlink_to(root / "images/train")
    (root / "images/train/up").symlink_to(root / "images")
    (root / "masks/train/up").symlink_to(root)
    (root / "images/val").rename(root / "elsewhere")
    (root / "images/val").symlink_to(root / "elsewhere")
    return {}


LAYOUTS = [value for name, value in list(globals().items()) if name.startswith("as_")]


@pytest.mark.parametrize("arrange", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_of_a_folder(folder: Path, arrange: Callable[[Path], dict[str, str]]) -> None:
    train, val = opened(folder, **arrange(folder))
    scan(train)
    scan(val)
    assert (len(train), len(val)) == (4, 2)
    seen = []
    for split, seed in ((train, 0), (val, 1_000_000)):
        for index in range(len(split)):
            picture, mask = split.read(index)
            # Pairs stay pairs, in the list's order, which here is that of the names.
            seen.append(torch.equal(mask, draw_scene(seed + index, (16, 20))[1]))
            assert (picture / 255 - draw_scene(seed + index, (16, 20))[0]).abs().mean() < 0.1
    assert seen == [True] * 6


def test_a_list_may_lie_beside_the_recipe(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "few.txt").write_text("t003\nt001\n")
    section = DataSection(format="folder", root="..", classes="classes.txt", train="few.txt")
    train, val = open_data(section, recipe)
    assert (names(train), len(val)) == (["t003", "t001"], 2)


def test_a_leak_is_warned_of(folder: Path) -> None:
    assert shared_pictures(*opened(folder)) is None
    assert shared_pictures(*opened(folder, val="train.txt")) == (
        "4 pictures are both learnt from and measured on: 't000', 't001', 't002' and 1 more. The "
        "measure then says little about new pictures."
    )


# --- classes ------------------------------------------------------------------------------------


def test_forms_of_classes(folder: Path) -> None:
    assert opened(folder, classes=6)[0].classes == tuple(f"class {i}" for i in range(6))
    assert opened(folder, classes=list("abcdef"))[0].classes == tuple("abcdef")
    assert opened(folder)[0].classes == CLASSES
    palette = [[1, i, 3] for i in range(7)]
    text = json.dumps({"classes": list("abcdef"), "palette": palette, "ignore_index": 255})
    (folder / "c.json").write_text(text)
    train, _ = opened(folder, classes="c.json")
    assert train.classes == tuple("abcdef")
    assert train.palette[:7] == tuple(map(tuple, palette))


# id: (what the file holds, or None; the keys; what is said)
CLASS_FAULTS = {
    "none": (None, {"classes": None}, "classes: missing key. Expected: the names of the classes in the order of the masks' numbers, a file with one per line, or how many."),
    "no file": (None, {"classes": "c.txt"}, "classes: no file 'c.txt' in '{root}' or beside the recipe."),
    "empty file": ("\n# c\n", {"classes": "c.txt"}, "classes: 'c.txt' lists no class. Write one name per line."),
    "twice": ("a\nb\na\n", {"classes": "c.txt"}, "classes: named twice: 'a'. Give each class its own name."),
    "no JSON": ("{", {"classes": "c.json"}, "classes: 'c.json' is not JSON."),
    "no names": ('{"classes": [1]}', {"classes": "c.json"}, "classes: 'c.json' has no list of names. Expected: {{\"classes\": [\"sky\", \"road\"]}}, perhaps with \"palette\": [[r, g, b], ...]."),
    "bad palette": ('{"classes": ["a"], "palette": [[1, 2]]}', {"classes": "c.json"}, "classes: the palette of 'c.json' is not a list of [red, green, blue], 0 to 255, one for each class."),
    "other ignored": ('{"classes": ["a"], "ignore_index": 11}', {"classes": "c.json"}, "ignore_index: 'c.json' says 11, the recipe 255. Write ignore_index: 11."),
    "few colours": (None, {"classes": ["a", "b"], "palette": [[0, 0, 0]]}, "palette: expected a colour for each of the 2 classes, got 1."),
    "a colour twice": (None, {"classes": ["a", "b"], "palette": [[7, 8, 9], [7, 8, 9]]}, "palette: [7, 8, 9] is the colour of the classes 0 and 1. Give each class its own."),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASS_FAULTS)
def test_faults_of_classes(folder: Path, case: str) -> None:
    text, keys, expected = CLASS_FAULTS[case]
    if text is not None:
        (folder / str(keys["classes"])).write_text(text)
    assert refused(folder, **keys) == ": " + expected.format(root=folder)


# --- what is wrong with a folder ----------------------------------------------------------------


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    data = text.encode() if isinstance(text, str) else text
    return lambda root: (root / name).write_bytes(data)


def remove(*found: str) -> Callable[[Path], object]:
    def act(root: Path) -> None:
        for path in [path for name in found for path in root.glob(name)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    return act


def copy(old: str, new: str) -> Callable[[Path], object]:
    return lambda root: shutil.copy(root / old, root / new)


PAIR = "Expected the picture's name, alone or with _mask, _label, _labels ... after it."
# id: (what is done, the keys, what is said)
FOLDER_FAULTS = {
    "no lists": (remove("*.txt"), {"classes": 6}, "train: missing key, and neither a list 'train.txt' nor a folder 'images/train' in '{root}'. Name a list of the pictures, or a subfolder.\nval: missing key, and neither a list 'val.txt' nor a folder 'images/val' in '{root}'. Name a list of the pictures, or a subfolder."),
    "other lists": (remove("train.txt"), {}, "train: missing key, and neither a list 'train.txt' nor a folder 'images/train' in '{root}'. Name one of 'classes.txt', 'val.txt', or a subfolder."),
    "unknown list": (None, {"train": "trian.txt"}, "train: 'trian.txt' is neither a list in '{root}' or beside the recipe nor the folder 'images/trian.txt'. Nearest: 'train.txt'."),
    "no folders": (remove("images", "masks"), {}, "images: no folder 'images' in '{root}'. There is no folder in it.\nmasks: no folder 'masks' in '{root}'. There is no folder in it."),
    "misspelt folder": (None, {"images": "image"}, "images: no folder 'image' in '{root}'. Nearest: 'images'."),
    "no folder of the split": (None, {"images": "{split}", "masks": "{split}annot"}, "images: no folder 'train' in '{root}'. Known: 'images', 'masks'.\nmasks: no folder 'trainannot' in '{root}'. Known: 'images', 'masks'.\nimages: no folder 'val' in '{root}'. Known: 'images', 'masks'.\nmasks: no folder 'valannot' in '{root}'. Known: 'images', 'masks'."),
    "no partner": (remove("masks/t002.png"), {}, "train: 1 picture has no mask in '{root}/masks': 't002.jpg'. " + PAIR),
    "no partners": (remove("masks/t*"), {}, "train: 4 pictures have no mask in '{root}/masks': 't000.png', 't001.jpg', 't002.png' and 1 more. " + PAIR),
    "two partners": (copy("masks/t002.png", "masks/t002.tif"), {}, "train: 1 picture has more than one mask: 't002.png' ('t002.png' and 't002.tif'). Keep one of each."),
    "two of a name": (copy("images/t002.png", "images/t002.jpg"), {}, "train: more than one file in '{root}/images' can be meant by 't002'. Keep one, or write its ending too."),
    "not there": (write("train.txt", "t000\nt00\n"), {}, "train: 'train.txt' lists 1 picture that '{root}/images' lacks: 't00'. Nearest: 't003'."),
    "several not there": (write("train.txt", "a\nb\nc\nd\nt000\ne f\n"), {}, "train: 'train.txt' lists 5 pictures that '{root}/images' lacks: 'a', 'b', 'c' and 2 more."),
    "mask not there": (write("train.txt", "t000.png masks/z.png\n"), {}, "train: 'train.txt' lists 1 mask that '{root}/masks' lacks: 'masks/z.png'."),
    "listed twice": (write("train.txt", "t000\nt001\nt000.png\n"), {}, "train: 'train.txt' lists 1 picture more than once: 't000.png'. Keep one line of each."),
    "empty list": (write("train.txt", "\r\n# nothing\r\n"), {}, "train: 'train.txt' lists no picture. Write one name per line."),
    "list not text": (write("train.txt", b"t000\n\xff\xfe"), {}, "train: 'train.txt' is not UTF-8 text (byte 5). Save it as UTF-8."),
    "faults of both": (remove("masks/[tv]001.png"), {}, "train: 1 picture has no mask in '{root}/masks': 't001.jpg'. " + PAIR + "\nval: 1 picture has no mask in '{root}/masks': 'v001.jpg'. " + PAIR),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDER_FAULTS)
def test_faults_of_a_folder(folder: Path, case: str) -> None:
    act, keys, expected = FOLDER_FAULTS[case]
    if act is not None:
        act(folder)
    expected = expected.replace("{root}", str(folder))
    if case == "no partner":
        expected = expected.replace(".jpg", ".png")
    count = expected.count("\n")
    start = f" has {count + 1} faults:\n" if count else ": "
    assert refused(folder, **keys) == start + expected


def test_a_mask_alone_in_its_split(folder: Path) -> None:
    as_subfolders(folder)
    (folder / "images/train/t001.jpg").unlink()
    assert refused(folder) == (
        f": train: 1 mask has no picture in '{folder}/images/train': 't001.png'."
    )
    shutil.copy(folder / "masks/train/t000.png", folder / "masks/train/t000_color.png")
    (folder / "masks/train/t001.png").unlink()
    assert names(opened(folder)[0]) == ["t000", "t002", "t003"]


def test_an_empty_folder_of_a_split(folder: Path) -> None:
    as_subfolders(folder)
    remove("images/val/*", "masks/val/*")(folder)
    assert refused(folder) == f": val: no picture in '{folder}/images/val'."


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    root = tmp_path / "nowhere"
    assert refused(root) == (
        f": root: '{root}' is not there. A relative root starts at the recipe's folder. To get the "
        f"data: put the pictures into '{root}/images' and the masks into '{root}/masks'."
    )
    root.write_text("")
    assert refused(root, format="voc") == (
        f": root: '{root}' is not a folder. A relative root starts at the recipe's folder. To get "
        'the data: python -c "from torchvision.datasets import VOCSegmentation as D; '
        f"D(r'{root}', download=True)\"."
    )
