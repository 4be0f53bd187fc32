"""Predictions are counted as torchmetrics, OpenCV and loops over pixels count them."""

from __future__ import annotations

import math
import sys
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from numerics import DIFFERS, assert_close64, assert_equal
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from pacswap.errors import DataError, TrainingError
from pacswap.train.measure.metrics import TALLIES, Counts, Scores, count, scores_of

CLASSES = 5


def pictures(ignore: int | None = 255, count: int = 3, size: tuple[int, int] = (37, 50)):
    """Masks of large and small regions, and predictions that are off at edges and at random."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        blocks = torch.randint(0, CLASSES, (8, 10), generator=generator)
        truth = blocks.repeat_interleave(5, 0).repeat_interleave(5, 1)[: size[0], : size[1]]
        prediction = truth.roll((1, 2), (0, 1))
        noise = torch.rand(truth.shape, generator=generator)
        prediction = prediction.where(noise > 0.03, (prediction + 1) % CLASSES)
        if ignore is not None:
            truth = truth.where((noise < 0.8) | (noise > 0.83), ignore)
            truth[10:14, 20:33] = ignore
        yield prediction, truth.contiguous()


def tensors(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def looped_confusion(prediction, truth, keep):
    found = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for y, x in product(*map(range, truth.shape)):
        if keep(y, x):
            found[truth[y, x], prediction[y, x]] += 1
    return torch.from_numpy(found)


def looped_band(truth, ignore: int, reach: int):
    """Which pixels see another label within `reach`, from the definition."""

    def near(y, x):
        rows = slice(max(0, y - reach), y + reach + 1)
        return bool((truth[rows, max(0, x - reach) : x + reach + 1] != truth[y, x]).any())

    return lambda y, x: truth[y, x] != ignore and near(y, x)


def eroded_outline(mask: np.ndarray, reach: int, *, border: bool = True) -> np.ndarray:
    """A mask less its erosion, which starts at the picture's border too."""
    edge = {"borderType": cv2.BORDER_CONSTANT, "value": 0}
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, **edge) if border else mask
    small = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=reach)
    return mask - (small[1:-1, 1:-1] if border else small)


def eroded_boundary(prediction, truth, ignore: int, reach: int, **options):
    """Intersection and union of each class's outlines, mask by mask. [C] each."""
    common, either = [], []
    for label in range(CLASSES):
        seen = ((prediction == label) & (truth != ignore)).numpy().astype(np.uint8)
        real = (truth == label).numpy().astype(np.uint8)
        outlines = [eroded_outline(mask, reach, **options) > 0 for mask in (seen, real)]
        common.append(int((outlines[0] & outlines[1]).sum()))
        either.append(int((outlines[0] | outlines[1]).sum()))
    return torch.tensor(common), torch.tensor(either)


def all_counts(ignore: int = 255, **options) -> list[Counts]:
    return [
        count(*pair, classes=CLASSES, ignore_index=ignore, **options) for pair in pictures(ignore)
    ]


def scores(ignore: int = 255, **options) -> Scores:
    counts = all_counts(ignore, **options)
    return Scores.of(counts, list("abcde"), [f"{i}" for i in range(len(counts))], ignore)


@pytest.mark.parametrize("ignore", [255, -1, 11, 2])
def test_confusion_is_the_loops(ignore):
    for counts, (prediction, truth) in zip(all_counts(ignore), pictures(ignore), strict=True):
        looped = looped_confusion(prediction, truth, lambda y, x, t=truth: t[y, x] != ignore)
        assert_equal(counts.confusion, looped)


def test_ignored_pixels_would_be_seen():
    prediction, truth = next(iter(pictures()))
    everything = looped_confusion(prediction, truth.where(truth < CLASSES, 0), lambda y, x: True)
    with pytest.raises(AssertionError, match="differ by"):
        assert_equal(count(prediction, truth, classes=CLASSES).confusion, everything)


@pytest.mark.parametrize("ignore", [255, -1, 2])
def test_scores_are_those_of_torchmetrics(ignore):
    jaccard = MulticlassJaccardIndex(CLASSES, ignore_index=ignore)
    accuracy = MulticlassAccuracy(CLASSES, average="micro", ignore_index=ignore)
    for pair in pictures(ignore):
        jaccard.update(*pair)
        accuracy.update(*pair)
    found = scores(ignore)
    # torchmetrics divides in float32
    values = tensors([found.miou, found.pixel_accuracy])
    truths = torch.stack([jaccard.compute(), accuracy.compute()]).double()
    assert_close64(values, truths, relative=3e-7)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(tensors([found.band_miou, found.boundary_iou]), truths, relative=3e-2)


def test_pictures_are_counted_together():
    """Not averaged picture by picture, which is another number."""
    together = scores().miou
    apart = [Scores.of([counts], list("abcde"), ["a"]).miou for counts in all_counts()]
    assert abs(together - sum(apart) / len(apart)) > 1e-4
    confusion = sum(counts.confusion for counts in all_counts()).double()
    hits = confusion.diagonal()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    assert_close64(tensors(together), iou.mean())
    assert_equal(scores().confusion, sum(counts.confusion for counts in all_counts()))


@pytest.mark.parametrize("band", [1, 2, 3, 60])
@pytest.mark.parametrize("ignore", [255, -1])
def test_the_band_is_the_loops(ignore, band):
    prediction, truth = next(iter(pictures(ignore)))
    found = count(prediction, truth, classes=CLASSES, ignore_index=ignore, band=band).band
    assert_equal(found, looped_confusion(prediction, truth, looped_band(truth, ignore, band)))
    with pytest.raises(AssertionError, match="differ by"):
        wider = looped_band(truth, ignore, band + 1 if band < 60 else 1)
        assert_equal(found, looped_confusion(prediction, truth, wider))


def test_the_band_lies_at_changes_and_not_at_the_border():
    truth = torch.zeros(9, 20, dtype=torch.int64)
    assert count(truth, truth, classes=2).band.sum() == 0
    truth[:, 10:] = 1
    assert count(truth, truth, classes=2, band=2).band.tolist() == [[18, 0], [0, 18]]


def test_the_band_lies_beside_ignored_pixels_and_holds_none():
    truth = torch.zeros(9, 20, dtype=torch.int64)
    truth[:, 10:12] = 255
    assert count(truth.clamp(max=1), truth, classes=2, band=3).band.tolist() == [[54, 0], [0, 0]]


@pytest.mark.parametrize("ignore", [255, -1, 2])
@pytest.mark.parametrize("boundary", [0.001, 0.02, 0.05, 0.2])
def test_boundary_is_that_of_erosion(boundary, ignore):
    for prediction, truth in pictures(ignore):
        found = count(prediction, truth, classes=CLASSES, ignore_index=ignore, boundary=boundary)
        reach = max(1, round(boundary * math.hypot(*truth.shape)))
        common, either = eroded_boundary(prediction, truth, ignore, reach)
        if ignore < CLASSES and ignore >= 0:  # has no score, whatever is predicted
            common, either = (t * (torch.arange(CLASSES) != ignore) for t in (common, either))
            kept = torch.arange(CLASSES) != ignore
            assert_equal(found.boundary_intersection * kept, common)
            assert_equal(found.boundary_union * kept, either)
        else:
            assert_equal(found.boundary_intersection, common)
            assert_equal(found.boundary_union, either)


@pytest.mark.parametrize("wrong", [{"reach": 2}, {"reach": 1, "border": False}])
def test_another_erosion_is_seen(wrong):
    prediction, truth = next(iter(pictures()))
    found = count(prediction, truth, classes=CLASSES, boundary=0.02)
    assert_equal(found.boundary_union, eroded_boundary(prediction, truth, 255, 1)[1])
    with pytest.raises(AssertionError, match="differ by"):
        assert_equal(found.boundary_union, eroded_boundary(prediction, truth, 255, **wrong)[1])


def test_boundary_iou_of_a_shifted_square_by_hand():
    """10×10 pixels one to the right, d = 1: outlines of 36, 18 of them in common."""
    truth = torch.zeros(40, 40, dtype=torch.int64)
    truth[10:20, 10:20] = 1
    found = count(truth.roll(1, 1), truth, classes=2, boundary=0.02)
    assert (found.boundary_intersection[1].item(), found.boundary_union[1].item()) == (18, 54)


def test_a_class_that_never_occurs_has_no_score():
    truth = torch.tensor([[0, 0, 1, 1, 255]])
    prediction = torch.tensor([[0, 0, 1, 0, 3]])  # 3 only where nothing counts
    found = Scores.of([count(prediction, truth, classes=4, band=9)], list("abcd"), ["x"])
    for values in (found.class_iou, found.class_band_iou, found.class_boundary_iou):
        assert [math.isnan(value) for value in values] == [False, False, True, True]
    assert found.miou == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_class_that_is_only_predicted_scores_0():
    truth, prediction = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 2]])
    found = Scores.of([count(prediction, truth, classes=4, band=9)], list("abcd"), ["x"])
    assert found.class_iou[:3] == (1.0, 0.5, 0.0)
    assert found.class_boundary_iou[2] == found.class_band_iou[2] == 0
    assert found.miou == 0.5


def test_nothing_but_ignored_pixels_has_no_score():
    truth = torch.full((4, 4), 255)
    found = Scores.of([count(torch.zeros_like(truth), truth, classes=2)], ["a", "b"], ["x"])
    assert math.isnan(found.miou)
    assert math.isnan(found.pixel_accuracy)
    assert found.as_dict()["miou"] is None


def test_tallies_add_up():
    """Sums of tallies give what one large picture's tally gives."""
    counts = all_counts()
    whole = torch.stack([one.tally for one in counts]).sum(0)
    assert whole.shape == (len(TALLIES), CLASSES)
    assert_equal(whole[1], sum(one.confusion for one in counts).sum(1))
    assert_equal(whole[2], sum(one.confusion for one in counts).sum(0))
    assert_equal(whole[6], sum(one.boundary_intersection for one in counts))
    stacked = torch.stack([whole, 2 * whole])
    assert_close64(scores_of(stacked)["miou"], tensors([scores().miou] * 2))


def test_scores_in_words_and_data():
    truth, prediction = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 0, 1, 2]])
    found = Scores.of([count(prediction, truth, classes=4, band=1)], list("abcd"), ["x"])
    assert (
        str(found) == "mIoU 50.00, boundary IoU 50.00, mIoU near edges 100.00, pixel accuracy 75.00"
    )
    assert found.as_dict() == {
        "miou": 0.5,
        "boundary_iou": 0.5,
        "band_miou": 1.0,
        "pixel_accuracy": 0.75,
        "classes": [
            {"name": "a", "iou": 1.0, "boundary_iou": 1.0, "band_iou": 1.0},
            {"name": "b", "iou": 0.5, "boundary_iou": 0.5, "band_iou": 1.0},
            {"name": "c", "iou": 0.0, "boundary_iou": 0.0, "band_iou": None},
            {"name": "d", "iou": None, "boundary_iou": None, "band_iou": None},
        ],
        "pictures": 1,
    }


def test_scores_are_kept(tmp_path):
    kept, found = scores(2), Scores.read(scores(2).write(tmp_path / "run" / "scores.safetensors"))
    assert_equal(found.tallies, kept.tallies)
    assert_equal(found.confusion, kept.confusion)
    names = (kept.classes, kept.pictures, kept.ignore_index)
    assert (found.classes, found.pictures, found.ignore_index) == names
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["scores.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "foreign", "missing"])
def test_damaged_scores_are_refused(tmp_path, damage):
    path = scores().write(tmp_path / "scores")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    if damage == "foreign":
        path.write_text("hello")
    if damage == "missing":
        path.unlink()
    with pytest.raises(TrainingError) as raised:
        Scores.read(path)
    assert str(raised.value).startswith(f"'{path}' does not hold scores: ")
    assert str(raised.value).endswith(". Measure again, or remove the file.")


REFUSED = {
    "shapes": (
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        "a prediction of shape [2, 3] and a mask of shape [2, 4]: expected two of one shape "
        "[H, W].",
    ),
    "mask": (
        (torch.zeros(1, 2), torch.tensor([[0, 7]])),
        "label 7 in a mask: expected classes 0 to 4. Check the data's classes and ignore_index.",
    ),
    "negative": (
        (torch.zeros(1, 2), torch.tensor([[0, -3]])),
        "label -3 in a mask: expected classes 0 to 4. Check the data's classes and ignore_index.",
    ),
    "prediction": (
        (torch.tensor([[0, 5]]), torch.zeros(1, 2)),
        "label 5 in a prediction: expected classes 0 to 4. Check the data's classes and "
        "ignore_index.",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_counted_is_refused(given, message):
    with pytest.raises(DataError) as raised:
        count(*(tensor.long() for tensor in given), classes=CLASSES)
    assert str(raised.value) == message


def test_scores_need_pictures():
    with pytest.raises(DataError) as raised:
        Scores.of([], ["a"], [])
    assert str(raised.value) == (
        "0 pictures were counted and 0 have names. Expected as many, and at least one."
    )


def test_without_torchmetrics_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(TrainingError) as raised:
        scores()
    assert str(raised.value) == (
        "torchmetrics is missing, by which predictions are measured. Install it: "
        'pip install "pacswap[train]"'
    )
