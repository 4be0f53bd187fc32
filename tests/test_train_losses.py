"""Losses: equal to torch's and to naive ones, whole or in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import DIFFERS, assert_close64
from torch import Tensor

from pacswap.errors import TrainingError
from pacswap.recipes import LossSection
from pacswap.train.engine.losses import Loss, balanced_weights

C = 4
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)


def pictures(ignore: int = 255, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits [3, 4, 5, 7] and masks, of which every picture ignores another share."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(3, C, 5, 7, generator=generator, dtype=torch.float64)
    masks = torch.randint(C, (3, 5, 7), generator=generator)
    chance = torch.rand(3, 5, 7, generator=generator)
    masks[chance < torch.tensor([0.1, 0.5, 0.8])[:, None, None]] = ignore
    return logits.to(dtype), masks


def make(ignore: int = 255, weights: Tensor | None = None, **keys: Any) -> Loss:
    return Loss(LossSection.model_validate(keys), C, ignore, weights)


def value(loss: Loss, output: Any, masks: Tensor) -> Tensor:
    return loss.mean(loss.sums(output, masks), loss.counts(masks))


def naive_dice(logits: Tensor, masks: Tensor, weights: Tensor | None, ignore: int) -> Tensor:
    lost = []
    for picture, mask in zip(logits.softmax(1), masks, strict=True):
        overlap, weight = [], []
        inside = mask != ignore
        for c in range(C):
            truth = (mask == c) & inside
            if truth.any():
                both = picture[c][truth].sum()
                overlap.append(2 * both / (picture[c][inside].sum() + truth.sum()))
                weight.append(torch.tensor(1.0).double() if weights is None else weights[c])
        if weight and sum(weight) > 0:
            mean = sum(o * w for o, w in zip(overlap, weight, strict=True)) / sum(weight)
            lost.append(1 - mean)
    return torch.stack(lost).mean()


def naive_ohem(logits: Tensor, masks: Tensor, share: float) -> Tensor:
    hardest = []
    for picture, mask in zip(logits, masks, strict=True):
        losses = [
            -picture[:, y, x].log_softmax(0)[mask[y, x]]
            for y in range(mask.shape[0])
            for x in range(mask.shape[1])
            if mask[y, x] != 255
        ]
        hardest += sorted(losses, reverse=True)[: max(1, round(share * len(losses)))]
    return torch.stack(hardest).mean()


@pytest.mark.parametrize("ignore", [255, -1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_cross_entropy_is_torchs(weights, smoothing, ignore):
    logits, masks = pictures(ignore)
    found = value(make(ignore, weights, label_smoothing=smoothing), logits, masks)
    truth = F.cross_entropy(
        logits, masks, weight=weights, ignore_index=ignore, label_smoothing=smoothing
    )
    assert_close64(found, truth)


def test_the_comparison_sees_a_forgotten_weight():
    logits, masks = pictures()
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(value(make(), logits, masks), value(make(255, WEIGHTS), logits, masks))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_dice_is_the_naive_one(weights):
    logits, masks = pictures()
    truth = naive_dice(logits, masks, weights, 255)
    assert_close64(value(make(255, weights, name="dice"), logits, masks), truth)


def test_dice_ignores_pixels():
    logits, masks = pictures()
    other = logits.clone()
    other.movedim(1, -1)[masks == 255] = 50.0
    other[:, 1].masked_fill_(masks == 255, -50.0)
    loss = make(name="dice")
    assert_close64(value(loss, other, masks), value(loss, logits, masks))
    other.movedim(1, -1)[masks == 0] = torch.tensor([-9.0, 0, 0, 0]).double()
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(value(loss, other, masks), value(loss, logits, masks))


def test_a_sum_is_the_sum():
    logits, masks = pictures()
    both = value(make(name="cross_entropy+dice"), logits, masks)
    parts = [value(make(name=name), logits, masks) for name in ("cross_entropy", "dice")]
    assert_close64(both, parts[0] + parts[1])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.999])
def test_ohem_is_the_naive_one(share):
    logits, masks = pictures()
    assert_close64(value(make(ohem=share), logits, masks), naive_ohem(logits, masks, share))


def test_ohem_of_weighted_classes_lies_above_the_mean():
    logits, masks = pictures()
    plain = value(make(255, WEIGHTS), logits, masks)
    assert value(make(255, WEIGHTS, ohem=0.3), logits, masks) > plain


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "weighted": {"weights": WEIGHTS},
    "ohem": {"ohem": 0.3},
    "ohem_weighted": {"ohem": 0.3, "weights": WEIGHTS},
    "dice": {"name": "dice", "weights": WEIGHTS},
    "both": {"name": "cross_entropy+dice", "ohem": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parts_add_up_to_the_whole(options):
    logits, masks = pictures()
    loss = make(**options)
    counts = loss.counts(masks[:2]) + loss.counts(masks[2:])
    parts = [loss.mean(loss.sums(logits[s], masks[s]), counts) for s in (slice(2), slice(2, 3))]
    assert_close64(parts[0] + parts[1], value(loss, logits, masks))
    alone = [value(loss, logits[s], masks[s]) for s in (slice(2), slice(2, 3))]
    with pytest.raises(AssertionError, match=DIFFERS):  # what averaging the parts' means would give
        assert_close64((alone[0] + alone[1]) / 2, value(loss, logits, masks))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_valid_is_a_loss_of_0(options):
    logits, masks = pictures()
    logits.requires_grad_()
    found = value(make(**options), logits, torch.full_like(masks, 255))
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.item() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_picture_without_valid_pixels_changes_nothing(options):
    logits, masks = pictures()
    masks[1] = 255
    rest = [0, 2]
    loss = make(**options)
    assert_close64(value(loss, logits, masks), value(loss, logits[rest], masks[rest]))


def test_an_auxiliary_head_counts_by_its_weight():
    logits, masks = pictures()
    output = {"out": logits, "aux": logits.flip(0)}
    alone = [value(make(), one, masks) for one in output.values()]
    assert_close64(value(make(), output, masks), alone[0] + 0.4 * alone[1])
    assert_close64(value(make(auxiliary=0.0), output, masks), alone[0])


def test_smaller_logits_are_resized():
    logits, masks = pictures()
    small = logits[:, :, ::2, ::2]
    large = F.interpolate(small, size=(5, 7), mode="bilinear", align_corners=False)
    assert_close64(value(make(), small, masks), value(make(), large, masks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_single(dtype):
    logits, masks = pictures(dtype=dtype)
    assert make().sums(logits, masks).dtype == torch.float32


def refused(**keys: Any) -> str:
    with pytest.raises(TrainingError) as raised:
        make(**keys)
    return str(raised.value)


def test_other_classes_than_the_data_has():
    logits, masks = pictures()
    with pytest.raises(TrainingError) as raised:
        make().sums(logits[:, :3], masks)
    assert str(raised.value) == (
        "the network gives 3 classes and the data has 4. Set model.num_classes: 4 in the recipe, "
        "or correct the data's classes."
    )


def test_weights_that_do_not_fit():
    assert refused(weights=WEIGHTS[:3]) == (
        "finetune.loss.class_weights: expected one weight for each of the 4 classes, got 3."
    )
    assert refused(weights=torch.zeros(4)) == (
        "finetune.loss.class_weights: every weight is 0, so there is nothing to learn. Give one "
        "class at least a weight above 0."
    )


def test_balanced_weights_are_median_frequency():
    masks = [torch.tensor([[0, 0, 0, 1]]), torch.tensor([[0, 255, 2, 2]])]
    # class 0: 4 of 7 pixels; class 1: 1 of 4; class 2: 2 of 3; the median is 4/7
    truth = torch.tensor([1, 4 / 7 * 4, 4 / 7 * 1.5, 0], dtype=torch.float64)
    assert_close64(balanced_weights(masks, C, 255), truth)
