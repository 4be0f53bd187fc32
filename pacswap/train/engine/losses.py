"""Losses of segmentation, as sums and counts.

A step's loss is Σ sums ÷ Σ counts over all its pictures. Counts follow from the masks alone, so
they are known before any network runs; each process, and each part of an accumulated step, then
contributes its own sums divided by the counts of all. The parts add up to the loss of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.errors import TrainingError
from pacswap.recipes import LossSection
from pacswap.train.outputs import auxiliary_of, logits_of


class Loss:
    """What training makes small.

    Cross-entropy is the mean over the valid pixels of all pictures, each pixel weighted by its true
    class, as in `torch.nn.functional.cross_entropy`. With `ohem` it is the mean over that share of
    each picture's valid pixels whose loss is greatest; with class weights the sum over those is
    divided by that share of the picture's weight.

    Dice is 1 − Σ_c w_c · 2 Σ p_c t_c / (Σ p_c + Σ t_c) / Σ_c w_c over the valid pixels and the
    classes of each picture, w being the class weights, averaged over the pictures.

    Args:
        section: of the recipe.
        classes: C, channels of the logits.
        ignore_index: the label of pixels that do not count.
        weights: one per class, [C]; None weighs all alike.

    Raises:
        TrainingError: a weight is missing, or an option is not of this loss.

    Example:
        >>> loss = Loss(LossSection(), classes=2, ignore_index=255)
        >>> logits, masks = torch.zeros(1, 2, 1, 3), torch.tensor([[[0, 1, 255]]])
        >>> loss.mean(loss.sums(logits, masks), loss.counts(masks))
        tensor(0.6931)
    """

    def __init__(
        self,
        section: LossSection,
        classes: int,
        ignore_index: int,
        weights: Tensor | None = None,
    ) -> None:
        self.section, self.classes, self.ignore_index = section, classes, ignore_index
        self.weights = weights
        names = section.name.split("+")
        self.has_cross_entropy, self.has_dice = "cross_entropy" in names, "dice" in names
        if weights is not None and list(weights.shape) != [classes]:
            raise TrainingError(
                f"finetune.loss.class_weights: expected one weight for each of the {classes} "
                f"classes, got {weights.numel()}."
            )
        if weights is not None and not weights.sum() > 0:
            raise TrainingError(
                "finetune.loss.class_weights: every weight is 0, so there is nothing to learn. "
                "Give one class at least a weight above 0."
            )

    def counts(self, masks: Tensor) -> Tensor:
        """What the sums of these pictures are divided by.

        Args:
            masks: [B, H, W], int64.

        Returns:
            [2]: the weight of the pixels that cross-entropy averages over, and the number of the
            pictures that Dice does; float64, float32 on devices that lack it.
        """
        dtype = torch.float32 if masks.device.type == "mps" else torch.float64
        valid = masks != self.ignore_index
        weight = self._pixel_weights(masks, valid, dtype)
        pixels = weight.sum()
        if self.section.ohem is not None:
            kept = weight.new_tensor(self._kept(valid))
            sizes = valid.flatten(1).sum(1).clamp(min=1)
            pixels = (weight.flatten(1).sum(1) * kept / sizes).sum()
        pictures = (weight.flatten(1) > 0).any(1).sum()
        return torch.stack([pixels, pictures.to(dtype)])

    def sums(self, output: Any, masks: Tensor) -> Tensor:
        """What is to be divided by the counts, with gradient.

        Args:
            output: what the network returned; logits smaller than the masks are resized.
            masks: [B, H, W], int64.

        Returns:
            [2], float32 or the dtype of the logits where that is wider.

        Raises:
            TrainingError: there are no logits, or not one channel per class.
        """
        total = self._sums(logits_of(output), masks)
        auxiliary = auxiliary_of(output)
        if auxiliary is not None and self.section.auxiliary > 0:
            total = total + self.section.auxiliary * self._sums(auxiliary, masks)
        return total

    def mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The loss, or a part's contribution to it where `counts` are those of all parts; [].

        Pictures without a valid pixel contribute 0, and so does a step of such pictures only.
        """
        divisors = counts.where(counts > 0, 1.0).to(sums.dtype)
        return (sums / divisors).sum()

    def _sums(self, logits: Tensor, masks: Tensor) -> Tensor:
        if logits.shape[1] != self.classes:
            raise TrainingError(
                f"the network gives {logits.shape[1]} classes and the data has {self.classes}. "
                f"Set model.num_classes: {self.classes} in the recipe, or correct the data's "
                "classes."
            )
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if logits.shape[-2:] != masks.shape[-2:]:
            logits = F.interpolate(
                logits, size=masks.shape[-2:], mode="bilinear", align_corners=False
            )
        none = logits.new_zeros(())
        return torch.stack(
            [
                self._cross_entropy(logits, masks) if self.has_cross_entropy else none,
                self._dice(logits, masks) if self.has_dice else none,
            ]
        )

    def _cross_entropy(self, logits: Tensor, masks: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits)
        losses = F.cross_entropy(
            logits,
            masks,
            weight=weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.section.label_smoothing,
            reduction="none" if self.section.ohem is not None else "sum",
        )
        if self.section.ohem is None:
            return losses
        valid = masks != self.ignore_index
        hardest = [
            picture[inside].topk(count).values.sum()
            for picture, inside, count in zip(losses, valid, self._kept(valid), strict=True)
        ]
        return torch.stack(hardest).sum()

    def _kept(self, valid: Tensor) -> list[int]:
        """How many pixels of each picture OHEM learns from: at least one, if any is valid."""
        share = self.section.ohem
        assert share is not None
        return [max(1, round(n * share)) if n else 0 for n in valid.flatten(1).sum(1).tolist()]

    def _dice(self, logits: Tensor, masks: Tensor) -> Tensor:
        valid = (masks != self.ignore_index)[:, None]
        labels = torch.arange(self.classes, device=masks.device)[:, None, None]
        truth = (masks[:, None] == labels) & valid  # [B, C, H, W]
        shares = logits.softmax(1) * valid
        sizes = truth.sum((2, 3))
        both = (shares * truth).sum((2, 3))
        overlap = 2 * both / (shares.sum((2, 3)) + sizes).where(sizes > 0, 1.0)  # [B, C]
        weights = overlap.new_ones(self.classes) if self.weights is None else self.weights
        present = (sizes > 0) * weights.to(overlap)
        total = present.sum(1)
        lost = 1 - (overlap * present).sum(1) / total.where(total > 0, 1.0)
        return lost.where(total > 0, 0.0).sum()

    def _pixel_weights(self, masks: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, H, W]."""
        if self.weights is None:
            return valid.to(dtype)
        weights = self.weights.to(masks.device, dtype)
        return weights[masks.where(valid, 0)] * valid


def balanced_weights(masks: Iterable[Tensor], classes: int, ignore_index: int) -> Tensor:
    """A weight per class that is higher for rare ones, by median frequency balancing.

    A class's frequency is its share of the valid pixels of those pictures in which it occurs
    (Eigen and Fergus, ICCV 2015); its weight is the median frequency divided by its own. A class
    that never occurs weighs 0.

    Args:
        masks: [H, W] each, int64.
        classes: C.
        ignore_index: the label of pixels that do not count.

    Returns:
        [C], float64.

    Example:
        >>> balanced_weights([torch.tensor([[0, 0, 0, 1]])], 3, 255)
        tensor([0.6667, 2.0000, 0.0000], dtype=torch.float64)
    """
    own = torch.zeros(classes, dtype=torch.float64)
    around = torch.zeros(classes, dtype=torch.float64)
    for mask in masks:
        found = torch.bincount(mask[mask != ignore_index].flatten(), minlength=classes).double()
        own += found
        around += (found > 0) * found.sum()
    seen = own > 0
    frequency = own[seen] / around[seen]
    weights = torch.zeros(classes, dtype=torch.float64)
    if seen.any():
        weights[seen] = frequency.quantile(0.5) / frequency
    return weights
