"""Training batches: the same whatever reads them, and masks that stay on their pictures."""

from __future__ import annotations

import os
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_equal
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data
from train_data import write_folder

from pacswap.errors import DataError, TrainingError
from pacswap.recipes import DataSection, TransformSection
from pacswap.scenes import MEAN, STD, draw_scene
from pacswap.scenes import normalize as normalize_scene
from pacswap.train.data.batches import Batch, Batches, normalized
from pacswap.train.data.split import Split, open_data
from pacswap.train.data.vary import Vary

ALL = TransformSection(scale=(0.5, 1.5), crop=(32, 40), flip=0.5, color=0.4)
PLAIN = TransformSection()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    root = write_folder(tmp_path_factory.mktemp("data"), train=11, val=1)
    section = DataSection(format="folder", root=str(root), classes="classes.txt")
    return open_data(section, root)[0]


def batches(split: Split, transforms: TransformSection = ALL, **changes: object) -> Batches:
    given: dict[str, object] = {"batch_size": 4, "seed": 3, "mean": MEAN, "std": STD}
    return Batches(split, transforms, **(given | changes))  # type: ignore[arg-type]


def first(row: Batches, count: int, step: int = 0) -> list[Batch]:
    return list(islice(row.from_step(step), count))


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    """Raise unless every bit agrees."""
    if len(found) != len(expected) or not found:
        raise AssertionError(f"{len(found)} and {len(expected)} batches")
    for one, other in zip(found, expected, strict=True):
        if (one.names, one.step) != (other.names, other.step):
            raise AssertionError(f"step {one.step} {one.names}, step {other.step} {other.names}")
        assert_equal(one.images, other.images, name="images")
        assert_equal(one.masks, other.masks, name="masks")


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """The batches of several processes put together, rank after rank."""
    return [
        Batch(
            torch.cat([part.images for part in step]),
            torch.cat([part.masks for part in step]),
            tuple(name for part in step for name in part.names),
            step[0].step,
        )
        for step in zip(*parts, strict=True)
    ]


def test_a_batch_is_what_was_drawn(split: Split) -> None:
    (batch,) = first(batches(split, PLAIN), 1)
    assert batch.images.shape == (4, 3, 48, 64)
    assert (batch.images.dtype, batch.masks.dtype, batch.step) == (torch.float32, torch.int64, 0)
    for image, mask, name in zip(batch.images, batch.masks, batch.names, strict=True):
        drawn, labels = draw_scene(int(name[1:]), (48, 64))
        assert_equal(mask, labels)
        assert (image - normalize_scene(drawn)).abs().mean() < 0.15


def test_normalisation_is_that_of_the_networks() -> None:
    bytes_ = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    assert torch.allclose(normalized(bytes_, MEAN, STD), normalize_scene(bytes_ / 255), atol=1e-6)


def test_a_pass_takes_no_picture_twice(split: Split) -> None:
    row = batches(split)
    assert row.steps_per_epoch == 2
    passes = [[*row.indices(2 * i), *row.indices(2 * i + 1)] for i in range(8)]
    assert all(len(set(one)) == 8 for one in passes)
    assert len({tuple(one) for one in passes}) == 8
    assert set().union(*passes) == set(range(11))


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_share_the_same_batch(split: Split, world: int) -> None:
    whole = first(batches(split), 5)
    parts = [first(batches(split, world=world, rank=rank), 5) for rank in range(world)]
    assert_same(joined(parts), whole)
    with pytest.raises(AssertionError):
        assert_same(joined(parts[::-1]), whole)


def test_workers_change_nothing(split: Split) -> None:
    assert_same(first(batches(split, workers=2), 5), first(batches(split), 5))


def test_threads_change_nothing(tmp_path: Path) -> None:
    big = TransformSection(color=0.9)
    section = DataSection(format="scenes", count=(2, 1), resize=(400, 600))
    split = open_data(section, tmp_path)[0]
    alone = first(batches(split, big, batch_size=2), 2)
    torch.set_num_threads(2)
    try:
        several = first(batches(split, big, batch_size=2, workers=0), 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert_same(several, alone)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_it_goes_on_from_any_step(split: Split, step: int, workers: int) -> None:
    whole = first(batches(split), 10)
    found = first(batches(split, workers=workers), 3, step)
    assert_same(found, whole[step : step + 3])
    with pytest.raises(AssertionError):
        assert_same(found, whole[step - 1 : step + 2])


def test_another_seed_gives_other_batches(split: Split) -> None:
    with pytest.raises(AssertionError):
        assert_same(first(batches(split, seed=4), 1), first(batches(split), 1))


def test_a_picture_varies_from_pass_to_pass(split: Split) -> None:
    vary = TransformSection(color=0.4)
    seen: dict[str, list[Tensor]] = {}
    for batch in first(batches(split, vary), 8):
        for name, image in zip(batch.names, batch.images, strict=True):
            seen.setdefault(name, []).append(image)
    one, other, *_ = next(images for images in seen.values() if len(images) > 1)
    with pytest.raises(AssertionError):
        assert_equal(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_neither_read_nor_moved(split: Split, workers: int) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = first(batches(split, workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_same(first(batches(split, workers=workers), 2), found)


def coded(height: int, width: int) -> tuple[Tensor, Tensor]:
    """A picture whose red says what the mask says, in blocks."""
    mask = torch.randint(0, 8, (height // 16, width // 16)).repeat_interleave(16, 0)
    mask = mask.repeat_interleave(16, 1).byte()
    picture = torch.stack([mask * 30 + 20] * 3)
    picture[1:] = 128
    return picture, mask


def share_aligned(image: Tensor, mask: Tensor) -> float:
    """The share of the counted pixels whose label is what the picture's red says."""
    counted = mask != 255
    says = ((image[0].float() - 20) / 30).round()
    return (says == mask)[counted].float().mean().item()


VARIATIONS = {
    "nothing": TransformSection(),
    "scale": TransformSection(scale=(0.4, 2.2), crop=(200, 200)),
    "crop": TransformSection(crop=(40, 56)),
    "crop beyond": TransformSection(crop=(100, 40)),
    "flip": TransformSection(flip=1.0),
    "all": TransformSection(scale=(0.5, 2), crop=(72, 72), flip=0.5),
}


@pytest.mark.parametrize("case", VARIATIONS)
def test_picture_and_mask_stay_aligned(case: str) -> None:
    picture, mask = coded(80, 96)
    vary = Vary(VARIATIONS[case], (0.5, 0.5, 0.5), 255)
    for seed in range(12):
        image, labels = vary(picture, mask, seed)
        assert image.shape[-2:] == labels.shape
        assert labels.dtype == torch.uint8
        # Between two blocks a resized picture has colours of neither.
        assert share_aligned(image, labels) > (0.75 if "scale" in case or case == "all" else 0.999)
        assert share_aligned(image, labels.flip(1)) < 0.6
        assert share_aligned(image, labels.roll((16, 16), (0, 1))) < 0.6


def test_a_flip_is_a_mirror_image() -> None:
    picture, mask = coded(80, 96)
    image, labels = Vary(TransformSection(flip=1.0), MEAN, 255)(picture, mask, 0)
    assert_equal(image, picture.flip(2))
    assert_equal(labels, mask.flip(1))
    sides = [
        torch.equal(Vary(TransformSection(flip=0.5), MEAN, 255)(picture, mask, s)[1], mask)
        for s in range(200)
    ]
    assert 70 < sum(sides) < 130


def test_a_large_crop_is_filled_with_what_does_not_count() -> None:
    picture, mask = coded(80, 96)
    vary = Vary(TransformSection(crop=(128, 160), color=1.0), MEAN, 255)
    corners = set()
    for seed in range(20):
        image, labels = vary(picture, mask, seed)
        assert (image.shape, labels.shape) == ((3, 128, 160), (128, 160))
        outside = labels == 255
        assert outside.sum() == 128 * 160 - 80 * 96
        colour = torch.tensor([round(255 * level) for level in MEAN], dtype=torch.uint8)
        assert_equal(image[:, outside], colour[:, None].expand(3, int(outside.sum())))
        assert normalized(image, MEAN, STD)[:, outside].abs().max() < 0.02
        corners.add(tuple((~outside).nonzero()[0].tolist()))
    assert len(corners) > 10


def test_scales_and_crops_reach_everywhere() -> None:
    picture = torch.zeros(3, 60, 60, dtype=torch.uint8)
    mask = torch.arange(3600).view(60, 60).int()
    vary = Vary(TransformSection(crop=(20, 20)), MEAN, -1)
    tops = {int(vary(picture, mask, seed)[1][0, 0]) // 60 for seed in range(300)}
    assert min(tops) <= 1
    assert max(tops) >= 39
    sizes = {
        vary_size(TransformSection(scale=(0.5, 2.0)), picture, mask, seed) for seed in range(100)
    }
    assert min(sizes) < 35
    assert max(sizes) > 110
    assert vary_size(TransformSection(scale=(2.0, 2.0)), picture, mask, 0) == 120


def vary_size(section: TransformSection, picture: Tensor, mask: Tensor, seed: int) -> int:
    return Vary(section, MEAN, -1)(picture, mask, seed)[0].shape[1]


def test_color_leaves_the_mask_alone() -> None:
    picture, mask = coded(80, 96)
    image, labels = Vary(TransformSection(color=0.5), MEAN, 255)(picture, mask, 1)
    assert_equal(labels, mask)
    with pytest.raises(AssertionError):
        assert_equal(image, picture)


def test_scenes_are_drawn_once(tmp_path: Path) -> None:
    section = DataSection(format="scenes", count=(4, 2), resize=(32, 40))
    train, val = open_data(section, tmp_path)
    found = first(batches(train, PLAIN, workers=2), 3)
    drawn = train.reader._memory  # type: ignore[attr-defined]
    assert drawn[:4, -1].tolist() == [1, 1, 1, 1]  # what the workers drew is seen here
    assert_same(found, first(batches(train, PLAIN), 3))
    image, mask = draw_scene(1_000_001, (32, 40))
    assert_equal(val.read(1)[0], (image * 255).round().byte())
    assert_equal(val.read(1)[1], mask)


def test_a_batch_needs_a_share_for_each(split: Split) -> None:
    with pytest.raises(TrainingError) as raised:
        batches(split, world=3)
    assert str(raised.value) == (
        "finetune.batch_size: 4 pictures per step cannot be shared evenly by 3 processes. Give a "
        "multiple of 3."
    )


def test_a_batch_needs_enough_pictures(split: Split) -> None:
    assert batches(split, batch_size=11).steps_per_epoch == 1
    with pytest.raises(DataError) as raised:
        batches(split, batch_size=12)
    assert str(raised.value) == (
        "finetune.batch_size: a step takes 12 pictures, and train has 11. Give 11 at most."
    )


def test_scales_need_a_crop(split: Split) -> None:
    varying = TransformSection(scale=(0.5, 2))
    assert first(batches(split, varying, batch_size=1), 1)[0].images.shape[0] == 1
    with pytest.raises(DataError) as raised:
        batches(split, varying)
    assert str(raised.value) == (
        "finetune.data.transforms: scale 0.5 to 2 makes the pictures of a step differ in size. "
        "Give crop, the height and width that is cut out of each."
    )


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Split]:
    """Four pictures that a test may spoil."""
    root = write_folder(tmp_path, train=4, val=1)
    section = DataSection(format="folder", root=str(root), classes="classes.txt")
    return root, open_data(section, root)[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_sizes_that_differ(own: tuple[Path, Split], workers: int) -> None:
    root, split = own
    for path in (root / "images/t002.png", root / "masks/t002.png"):
        Image.fromarray(np.array(Image.open(path))[:40]).save(path)
    row = batches(split, PLAIN, workers=workers)
    names = [split.samples[index].name for index in row.indices(0)]
    other = names[1] if names[0] == "t002" else "t002"
    sizes = ["40×64", "48×64"] if names[0] == "t002" else ["48×64", "40×64"]
    with pytest.raises(DataError) as raised:
        first(row, 1)
    assert str(raised.value) == (
        f"finetune.data: the pictures of step 0 differ in size: '{names[0]}' is {sizes[0]}, "
        f"'{other}' {sizes[1]}. Give resize, or transforms.crop."
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_keeps_its_words(own: tuple[Path, Split], workers: int) -> None:
    root, split = own
    (root / "images/t002.png").write_bytes(b"")
    with pytest.raises(DataError) as raised:
        first(batches(split, workers=workers), 1)
    assert str(raised.value) == (
        f"'{root}/images/t002.png' cannot be read: an empty file. Replace what is damaged, or "
        "leave it out of the split."
    )


def test_a_killed_worker_is_said_in_words(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: object, key: object) -> None:
        if torch_data.get_worker_info() is None:
            raise AssertionError("not in a worker")
        os.kill(os.getpid(), signal.SIGKILL)

    row = batches(split, workers=1)
    monkeypatch.setattr(type(row._pictures), "__getitem__", killed)
    with pytest.raises(TrainingError) as raised:
        first(row, 1, 5)
    assert str(raised.value) == (
        "a process that reads pictures ended at step 5. Mostly memory ran out: give fewer "
        "finetune.workers, 0 reads without them; in a container, more shared memory (--shm-size)."
    )
