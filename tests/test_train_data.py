"""Reading pictures and masks, and the scan that finds what is wrong with them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_equal
from PIL import Image
from train_data import opened, write_folder

from pacswap.errors import DataError
from pacswap.recipes import DataSection
from pacswap.scenes import CLASSES, draw_scene
from pacswap.train.data.labels import distinct_colours
from pacswap.train.data.scan import scan
from pacswap.train.data.split import open_data, picture_and_mask_at

ASSETS = Path(__file__).parents[2] / "shared" / "assets"
MEANT = (
    "Correct the masks, finetune.data.classes or ignore_index; of masks that hold colours or "
    "greys, say in palette which is which class."
)
REPLACE = "Replace what is damaged, or leave it out of the split."


def found_wrong(root: Path, split: int = 0, **keys: object) -> str:
    with pytest.raises(DataError) as raised:
        scan(opened(root, **keys)[split])
    return str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path, train=4, val=2)


def test_a_folder_is_read_as_it_was_drawn(folder: Path) -> None:
    train, val = opened(folder)
    assert (len(train), len(val), train.name, val.name) == (4, 2, "train", "val")
    assert (train.classes, train.ignore_index) == (CLASSES, 255)
    assert [sample.name for sample in train.samples] == ["t000", "t001", "t002", "t003"]
    image, mask = draw_scene(2, (48, 64))
    picture, labels = train.read(2)  # a PNG, which loses nothing
    assert_equal(picture, (image * 255).round().byte())
    assert_equal(labels, mask)
    with pytest.raises(AssertionError):
        assert_equal(train.read(0)[1], mask)


def test_a_jpeg_is_nearly_as_it_was_drawn(folder: Path) -> None:
    image, _ = draw_scene(1, (48, 64))
    picture, _ = opened(folder)[0].read(1)
    assert (picture.shape, picture.dtype) == ((3, 48, 64), torch.uint8)
    assert (picture / 255 - image).abs().mean() < 0.03
    assert (picture / 255 - draw_scene(2, (48, 64))[0]).abs().mean() > 0.05


def test_a_sound_folder_passes_the_scan(folder: Path) -> None:
    done: list[tuple[int, int]] = []
    scan(opened(folder)[0], progress=lambda *counts: done.append(counts))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_is_drawn_is_not_scanned() -> None:
    train, _ = open_data(DataSection(format="scenes", count=(50000, 1)), Path())
    done: list[tuple[int, int]] = []
    scan(train, progress=lambda *counts: done.append(counts))
    assert done == [(50000, 50000)]


def save(path: Path, pixels: object, **options: object) -> None:
    Image.fromarray(np.asarray(pixels)).save(path, **options)


def grey16(root: Path) -> None:
    save(root / "images/t000.png", np.full((48, 64), 257 * 77, np.uint16))


def palette_with_transparency(root: Path) -> None:
    picture = Image.new("P", (64, 48), 1)
    picture.putpalette([0, 0, 0, 77, 77, 77])
    picture.save(root / "images/t000.png", transparency=b"\x00\xff")


def four_channels(root: Path) -> None:
    Image.new("RGBA", (64, 48), (77, 77, 77, 3)).save(root / "images/t000.png")


def black_and_white(root: Path) -> None:
    Image.new("L", (64, 48), 77).save(root / "images/t000.png")


@pytest.mark.parametrize(
    "write", [grey16, palette_with_transparency, four_channels, black_and_white]
)
def test_pictures_of_every_mode_are_rgb(folder: Path, write: Callable[[Path], None]) -> None:
    write(folder)
    picture, _ = opened(folder)[0].read(0)
    assert_equal(picture, torch.full((3, 48, 64), 77, dtype=torch.uint8))


@pytest.mark.parametrize("turned", [False, True], ids=["mask as stored", "mask as shown"])
def test_a_picture_is_turned_as_its_mask_is(folder: Path, turned: bool) -> None:
    image, mask = draw_scene(1, (48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    pixels = (image * 255).byte().permute(1, 2, 0).numpy()
    save(folder / "images/t000.png", pixels, exif=exif)
    shown = torch.rot90(mask, -1, (0, 1)) if turned else mask
    save(folder / "masks/t000.png", shown.byte().numpy())
    picture, labels = opened(folder)[0].read(0)
    expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    assert_equal(picture, torch.rot90(expected, -1, (1, 2)) if turned else expected)
    assert_equal(labels, shown)


def palette_index(labels: np.ndarray, path: Path) -> None:
    picture = Image.fromarray(labels)
    picture.putpalette([level for colour in COLOURS for level in colour])
    picture.save(path)


def index16(labels: np.ndarray, path: Path) -> None:
    save(path, labels.astype(np.uint16))


def index_with_alpha(labels: np.ndarray, path: Path) -> None:
    grey = Image.fromarray(labels)
    Image.merge("LA", (grey, Image.new("L", grey.size, 9))).save(path)


COLOURS = [(9 * i, 200 - i, 7) for i in range(6)]


@pytest.mark.parametrize("write", [palette_index, index16, index_with_alpha])
def test_index_masks_of_every_mode(folder: Path, write: Callable[[np.ndarray, Path], None]) -> None:
    labels = draw_scene(0, (48, 64))[1]
    write(labels.byte().numpy(), folder / "masks/t000.png")
    train, _ = opened(folder)
    scan(train)
    assert_equal(train.read(0)[1], labels)


def test_colour_masks_by_the_palette(folder: Path) -> None:
    labels = draw_scene(0, (48, 64))[1]
    for path in (folder / "masks").iterdir():
        rgb = np.array(COLOURS, np.uint8)[np.array(Image.open(path))]
        rgb[:2] = 1  # no colour of the palette
        save(path, rgb)
    train, _ = opened(folder, palette=COLOURS)
    scan(train)
    expected = labels.clone()
    expected[:2] = 255
    assert_equal(train.read(0)[1], expected)
    assert train.palette[:6] == tuple(COLOURS)
    other, _ = opened(folder, palette=COLOURS[::-1])
    with pytest.raises(AssertionError):
        assert_equal(other.read(0)[1], expected)


def test_black_and_white_masks_by_the_palette(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        save(path, (np.array(Image.open(path)) == 2).astype(np.uint8) * 255)
    train, _ = opened(folder, classes=["rest", "house"], palette=[[0, 0, 0], [255, 255, 255]])
    scan(train)
    assert_equal(train.read(0)[1], (draw_scene(0, (48, 64))[1] == 2).long())
    assert found_wrong(folder, classes=["rest", "house"]) == (
        f"'{folder}', train (4 pictures): every pixel of its masks is 'rest' or ignored (255): "
        "there is nothing to tell apart. Where masks are black and white, say palette: [[0, 0, 0], "
        "[255, 255, 255]]."
    )


def test_masks_without_any_class(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        save(path, np.full((48, 64), 255, np.uint8))
    assert found_wrong(folder) == (
        f"'{folder}', train (4 pictures): no pixel of its masks has a class, all are ignored "
        "(255). Check finetune.data.classes, palette and ignore_index."
    )


@pytest.mark.parametrize("ignore", [-100, 7, 300], ids=str)
def test_any_ignore_index(folder: Path, ignore: int) -> None:
    labels = np.array(Image.open(folder / "masks/t000.png")).astype(np.int32)
    labels[:3] = ignore if ignore > 0 else 0
    save(folder / "masks/t000.png", labels.astype(np.uint16))
    train, _ = opened(folder, ignore_index=ignore)
    scan(train)
    assert_equal(train.read(0)[1], torch.from_numpy(labels).long())


def test_both_are_resized_and_stay_aligned() -> None:
    mask = torch.zeros(30, 40, dtype=torch.uint8)
    mask[8:20, 12:28] = 1
    picture = (mask * 255).expand(3, 30, 40)
    for size in ((15, 20), (45, 60), (30, 40), (60, 120)):
        image, labels = picture_and_mask_at(picture, mask, size)
        assert (image.shape, labels.shape) == ((3, *size), size)
        assert_equal((image[0] > 127).byte(), labels)
        with pytest.raises(AssertionError):
            assert_equal((image[0] > 127).byte(), labels.roll(1, 0))


def test_the_recipe_resizes(folder: Path) -> None:
    train, val = opened(folder, resize=(24, 30))
    assert train.read(0)[0].shape == val.read(1)[0].shape == (3, 24, 30)
    assert train.read(0)[1].shape == (24, 30)


def test_a_palette_has_256_colours_that_differ(folder: Path) -> None:
    palette_index(np.array(Image.open(folder / "masks/t000.png")), folder / "masks/t000.png")
    for split in (*opened(folder), *open_data(DataSection(format="scenes"), folder)):
        assert len(set(split.palette)) == len(split.palette) == 256
    assert opened(folder)[0].palette[:6] == tuple(COLOURS)


def test_the_fixed_colours_are_those_of_pascal_voc() -> None:
    found = distinct_colours()
    assert found[15] == (192, 128, 128)
    assert found[255] == (224, 224, 192)
    assert len(set(found)) == 256


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def bomb() -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 99))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def flipped(data: bytes) -> bytes:
    """A bit of the pixels has changed."""
    return data[:200] + bytes([data[200] ^ 16]) + data[201:]


# id: (what becomes of a good PNG, what is said)
DAMAGE = {
    "cut off": (lambda data: data[: len(data) // 2], "damaged or cut off"),
    "a wrong bit": (flipped, "damaged or cut off"),
    "text": (lambda data: b"this is text", "not a picture that Pillow reads"),
    "empty": (lambda data: b"", "an empty file"),
    "bomb": (lambda data: bomb(), "more pixels than Pillow's limit of 178,956,970"),
}


@pytest.mark.parametrize("where", ["images", "masks"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named(folder: Path, case: str, where: str) -> None:
    spoil, why = DAMAGE[case]
    path = folder / where / "t002.png"
    path.write_bytes(spoil(path.read_bytes()))
    assert found_wrong(folder) == (
        f"'{folder}', train (4 pictures): '{where}/t002.png' cannot be read: {why}. {REPLACE}"
    )
    with pytest.raises(DataError) as raised:
        opened(folder)[0].read(2)
    assert str(raised.value) == f"'{path}' cannot be read: {why}. {REPLACE}"
    scan(opened(folder)[1])


def test_a_link_to_itself_is_named(folder: Path) -> None:
    path = folder / "images/t002.png"
    path.unlink()
    path.symlink_to(path)
    message = found_wrong(folder)
    assert message == (
        f"'{folder}', train (4 pictures): 'images/t002.png' cannot be read: "
        f"{os.strerror(40).lower()}. {REPLACE}"
    )


def test_a_wrong_number_is_named(folder: Path) -> None:
    path = folder / "masks/t001.png"
    labels = np.array(Image.open(path))
    labels[0, 0], labels[5, 5] = 200, 6
    save(path, labels)
    assert found_wrong(folder) == (
        f"'{folder}', train (4 pictures): 'masks/t001.png' holds numbers that are no class: "
        f"6, 200. Classes are 0 to 5, ignored is 255. {MEANT}"
    )
    scan(opened(folder, classes=201)[0])


def test_a_colour_mask_without_palette_is_named(folder: Path) -> None:
    Image.new("RGB", (64, 48)).save(folder / "masks/t003.png")
    assert found_wrong(folder) == (
        f"'{folder}', train (4 pictures): 'masks/t003.png' is a colour picture, not a mask of "
        "class numbers: its mode is RGB. Say in finetune.data.palette which colour is which class."
    )


def test_a_mask_of_fractions_is_named(folder: Path) -> None:
    (folder / "masks/t003.png").unlink()
    save(folder / "masks/t003.tif", np.zeros((48, 64), np.float32))
    assert found_wrong(folder) == (
        f"'{folder}', train (4 pictures): 'masks/t003.tif' does not hold whole numbers: its "
        "pixels are fractions. Save masks as 8-bit or 16-bit PNG."
    )


def test_a_mask_of_another_size_is_named(folder: Path) -> None:
    save(folder / "masks/t003.png", np.zeros((24, 32), np.uint8))
    assert found_wrong(folder) == (
        f"'{folder}', train (4 pictures): 'images/t003.jpg' is not as large as its mask: picture "
        "48×64, mask 24×32. Pair each picture with its own mask."
    )


def test_all_flaws_come_at_once_counted(tmp_path: Path) -> None:
    root = write_folder(tmp_path, train=9, val=1)
    for index in range(0, 9, 2):
        save(root / f"masks/t00{index}.png", np.full((48, 64), 99, np.uint8))
    (root / "images/t001.jpg").write_bytes(b"")
    assert found_wrong(root) == (
        f"'{root}', train (9 pictures) has 2 faults:\n"
        f"'images/t001.jpg' cannot be read: an empty file. {REPLACE}\n"
        "5 masks hold numbers that are no class: 'masks/t000.png' (99), 'masks/t002.png' (99), "
        f"'masks/t004.png' (99) and 2 more. Classes are 0 to 5, ignored is 255. {MEANT}"
    )


@pytest.mark.skipif(not (ASSETS / "camvid").is_dir(), reason=f"no CamVid in {ASSETS}")
def test_camvid_is_read() -> None:
    keys = {"images": "{split}", "masks": "{split}annot", "ignore_index": 11}
    names = {"train": "train_subset120.txt", "val": "val_subset40.txt", "classes": "classes.json"}
    root = ASSETS / "camvid"
    train, val = open_data(
        DataSection(format="folder", root=str(root), **names, **keys),  # type: ignore[arg-type]
        root,
    )
    assert (len(train), len(val), len(train.classes), train.classes[0]) == (120, 40, 11, "sky")
    assert train.palette[11] == (0, 0, 0)
    image, mask = train.read(119)
    assert (image.shape, mask.shape) == ((3, 360, 480), (360, 480))
    scan(val)
    whole, _ = opened(root, train="train.txt", val="val.txt", **(keys | {"classes": 11}))
    assert len(whole) == 367
