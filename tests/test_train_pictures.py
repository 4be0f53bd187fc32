"""What is drawn is what was predicted, pixel by pixel; curves are what was logged."""

from __future__ import annotations

import sys
from itertools import product

import pytest
import torch
from PIL import Image
from torch import Tensor

from pacswap.errors import DataError, TrainingError
from pacswap.train.measure.curves import draw_curves, mean_curve, read_log
from pacswap.train.measure.pictures import (
    BETTER,
    IGNORED,
    WORSE,
    WRONG,
    difference,
    overlay,
    palette_image,
    side_by_side,
    write_picture,
)

PALETTE = ((10, 20, 30), (200, 0, 0), (0, 0, 200), (90, 180, 0))
CLASSES = ("sky", "road", "car", "pole")
PALE = (236, 236, 236)

TRUTH = torch.tensor([[0, 0, 1], [1, 2, 255]])
BEFORE = torch.tensor([[0, 1, 1], [2, 2, 0]])
AFTER = torch.tensor([[0, 0, 2], [2, 2, 1]])


def image(height: int = 2, width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def pixels(picture: Image.Image) -> list[tuple[int, ...]]:
    size = picture.size
    return [picture.getpixel((x, y)) for y, x in product(range(size[1]), range(size[0]))]


def test_palette_pictures_hold_the_classes(tmp_path):
    path = tmp_path / "mask.png"
    palette_image(TRUTH, PALETTE, 255).save(path)
    with Image.open(path) as found:
        found.load()
    assert (found.mode, found.size) == ("P", (3, 2))
    assert pixels(found) == TRUTH.flatten().tolist()
    colours = [PALETTE[0], PALETTE[0], PALETTE[1], PALETTE[1], PALETTE[2], PALE]
    assert pixels(found.convert("RGB")) == colours


def test_a_palette_with_a_colour_for_ignored_pixels_is_kept():
    whole = [(i, 255 - i, 7) for i in range(256)]
    assert pixels(palette_image(TRUTH, whole, 255).convert("RGB"))[-1] == (255, 0, 7)


@pytest.mark.parametrize("label", [-1, 256])
def test_a_label_too_large_for_a_palette_is_refused(label):
    with pytest.raises(DataError) as raised:
        palette_image(torch.tensor([[0, label]]), PALETTE)
    assert str(raised.value) == (
        f"label {label} in a mask: expected 0 to 255, all that a palette picture holds."
    )


def test_overlays_mix_colour_and_brightness():
    given = image()
    found = pixels(overlay(given, TRUTH, PALETTE, ignore_index=255, opacity=0.6))
    for (y, x), pixel in zip(product(range(2), range(3)), found, strict=True):
        red, green, blue = given[:, y, x].tolist()
        if TRUTH[y, x] == 255:
            assert pixel == (red, green, blue)
            continue
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        mixed = [0.6 * part + 0.4 * grey for part in PALETTE[TRUTH[y, x]]]
        assert pixel == pytest.approx(mixed, abs=0.51)
    assert pixels(overlay(given, TRUTH, PALETTE, opacity=1.0))[:3] == [
        PALETTE[0],
        PALETTE[0],
        PALETTE[1],
    ]


def test_differences_by_hand():
    found = pixels(difference(image(), TRUTH, BEFORE, AFTER))
    assert found[1:] == [BETTER, WORSE, WRONG, found[4], IGNORED]
    for shown in (found[0], found[4]):  # both right: the picture in pale grey
        assert len(set(shown)) == 1
        assert shown[0] >= 150
    swapped = pixels(difference(image(), TRUTH, AFTER, BEFORE))
    assert swapped[1:3] == [WORSE, BETTER]


def sheet(**changes) -> Image.Image:
    given = {
        "image": image().repeat_interleave(10, 1).repeat_interleave(10, 2),
        "truth": TRUTH.repeat_interleave(10, 0).repeat_interleave(10, 1),
        "before": BEFORE.repeat_interleave(10, 0).repeat_interleave(10, 1),
        "after": AFTER.repeat_interleave(10, 0).repeat_interleave(10, 1),
        "classes": CLASSES,
        "palette": PALETTE,
        **changes,
    }
    first = [given.pop(name) for name in ("image", "truth", "before", "after")]
    return side_by_side(*first, **given)


# The middle of each panel's first cell; a panel is 520×347, its cells 173×173.
PANELS = {
    "image": (16, 38),
    "truth": (552, 38),
    "difference": (1088, 38),
    "before": (16, 431),
    "after": (552, 431),
}


def cells(found: Image.Image, panel: str) -> list[tuple[int, ...]]:
    left, top = PANELS[panel]
    middles = product((top + 87, top + 260), (left + 87, left + 260, left + 433))
    return [found.getpixel((x, y)) for y, x in middles]


def test_panels_hold_what_they_are_called():
    found = sheet()
    assert (found.mode, found.size) == ("RGB", (1624, 794))
    drawn = {"truth": TRUTH, "before": BEFORE, "after": AFTER}
    for name, mask in drawn.items():
        colours = [PALE if c == 255 else PALETTE[c] for c in mask.flatten().tolist()]
        assert cells(found, name) == colours
    places = product((0, 1), range(3))
    places = product((0, 1), range(3))
    assert cells(found, "image") == [tuple(image()[:, y, x].tolist()) for y, x in places]
    shown = cells(found, "difference")
    assert shown[1:] == [BETTER, WORSE, WRONG, shown[4], IGNORED]


def test_the_legend_names_what_occurs():
    plain = sheet().tobytes()
    assert sheet(classes=("sky", "road", "car", "pylon")).tobytes() == plain
    assert sheet(classes=("sky", "road", "cat", "pole")).tobytes() != plain
    assert sheet(names=("control", "upgraded")).tobytes() != plain
    assert sheet(title="0016E5").tobytes() != plain


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (300, 40), (500, 1000)])
def test_any_size_is_drawn(size):
    mask = torch.zeros(size, dtype=torch.int64)
    given = {"image": torch.zeros(3, *size, dtype=torch.uint8), "truth": mask}
    found = sheet(**given, before=mask, after=mask)
    assert found.width >= 2 * 16 + 330
    assert found.height >= 12 * 23


def test_many_classes_with_long_names_are_drawn():
    mask = torch.arange(64).reshape(8, 8).repeat_interleave(6, 1)
    found = sheet(
        image=image(8, 48),
        truth=mask,
        before=mask.flip(0),
        after=mask,
        classes=[f"a class with a rather long name, number {i}" for i in range(64)],
    )
    assert found.width == 1624


def test_nothing_counts():
    mask = torch.full((20, 30), 255)
    assert sheet(truth=mask).size == (1624, 794)


def test_sizes_that_differ_are_refused():
    with pytest.raises(DataError) as raised:
        sheet(truth=TRUTH)
    assert str(raised.value) == (
        "image, truth and predictions have sizes [(2, 3), (20, 30)]: expected one."
    )


def test_pictures_are_written(tmp_path):
    path = write_picture(tmp_path / "pictures" / "a.png", sheet())
    with Image.open(path) as found:
        assert found.tobytes() == sheet().tobytes()
    assert [found.name for found in path.parent.iterdir()] == ["a.png"]


LOG = (
    "step,stage,epoch,loss,lr/default,lr/added\n1,warm,1,2.5,1e-4,0.001\n2,warm,1,1.5,5e-5,0.0005\n"
)
VAL = "step,stage,epoch,miou,iou/sky\n2,warm,1,0.25,\n"


def runs(folder, log: str = LOG, val: str = VAL, *, seeds: int = 2):
    for seed in range(seeds):
        (folder / f"{seed}").mkdir()
        (folder / f"{seed}" / "log.csv").write_text(log)
        (folder / f"{seed}" / "val.csv").write_text(val)
    return [folder / f"{seed}" for seed in range(seeds)]


def test_logs_are_read(tmp_path):
    (run,) = runs(tmp_path, LOG + "3,warm,2,nan,1e-5,\n4,wa", seeds=1)
    assert read_log(run / "log.csv") == {
        "epoch": [(1, 1.0), (2, 1.0), (3, 2.0)],
        "loss": [(1, 2.5), (2, 1.5)],
        "lr/default": [(1, 1e-4), (2, 5e-5), (3, 1e-5)],
        "lr/added": [(1, 1e-3), (2, 5e-4)],
    }
    assert read_log(run / "val.csv") == {"epoch": [(2, 1.0)], "miou": [(2, 0.25)]}


@pytest.mark.parametrize(("text", "columns"), [("a,b\n1,2\n", "a, b"), ("", "none")])
def test_what_is_no_log_is_refused(tmp_path, text, columns):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(TrainingError) as raised:
        read_log(path)
    assert str(raised.value) == f"'{path}' is not a log: expected a column 'step', got {columns}."


def test_a_missing_log_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    with pytest.raises(TrainingError) as raised:
        read_log(path)
    assert str(raised.value) == (
        f"cannot read the log '{path}': [Errno 2] No such file or directory: '{path}'."
    )


def test_mean_curves():
    assert mean_curve([]) == []
    assert mean_curve([[(1, 1.0)], [(2, 1.0)]]) == []


@pytest.mark.parametrize(
    ("log", "val"),
    [(LOG, VAL), ("step,loss\n", "step,miou\n"), (LOG.replace("0.001", "0.0001"), VAL)],
    ids=["full", "empty", "rates alike"],
)
def test_curves_are_drawn(tmp_path, log, val):
    folders = runs(tmp_path, log, val)
    path = draw_curves({"control": folders, "upgraded": folders[:1]}, tmp_path / "curves.png")
    with Image.open(path) as found:
        assert found.size == (1485, 429)


def test_curves_show_what_was_logged(tmp_path):
    folders = runs(tmp_path)
    first = draw_curves({"control": folders}, tmp_path / "a.png").read_bytes()
    again = draw_curves({"control": folders}, tmp_path / "b.png").read_bytes()
    assert again == first
    (folders[1] / "val.csv").write_text(VAL.replace("0.25", "0.31"))
    assert draw_curves({"control": folders}, tmp_path / "c.png").read_bytes() != first


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TrainingError) as raised:
        draw_curves({"control": runs(tmp_path)}, tmp_path / "a.png")
    assert str(raised.value) == (
        'matplotlib is missing, by which curves are drawn. Install it: pip install "pacswap[viz]"'
    )
