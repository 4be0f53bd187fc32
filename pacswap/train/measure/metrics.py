"""How well masks are predicted: IoU, pixel accuracy, and the same near edges.

All pictures are counted together, class by class, and classes are then averaged: a mean over the
classes that occur in the truth or in the prediction of any picture. A class that occurs in neither
has no score (NaN); one that is predicted and never true scores 0. Pixels labelled `ignore_index`
count nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pacswap.errors import DataError, TrainingError
from pacswap.train.writing import write_file

# What is kept of each picture, per class; everything else follows from sums of these.
TALLIES = (
    "hits",
    "truth",
    "predicted",
    "band_hits",
    "band_truth",
    "band_predicted",
    "boundary_hits",
    "boundary_union",
)
# The measures, with the words that people read.
MEASURES = {
    "miou": "mIoU",
    "boundary_iou": "boundary IoU",
    "band_miou": "mIoU near edges",
    "pixel_accuracy": "pixel accuracy",
}

_IGNORED, _OUTSIDE = -1, -2  # labels of no class


@dataclass(frozen=True)
class Counts:
    """One picture's pixels, counted.

    Attributes:
        confusion: [C, C], int64; row: true class, column: predicted class.
        band: [C, C], the same among the pixels near a change of label in the truth.
        boundary_intersection: [C], pixels of both contour regions.
        boundary_union: [C], pixels of either.
    """

    confusion: Tensor
    band: Tensor
    boundary_intersection: Tensor
    boundary_union: Tensor

    @property
    def tally(self) -> Tensor:
        """What sums over pictures need, one row per name of `TALLIES`. [8, C], int64."""
        rows = [
            row
            for matrix in (self.confusion, self.band)
            for row in (matrix.diagonal(), matrix.sum(1), matrix.sum(0))
        ]
        return torch.stack([*rows, self.boundary_intersection, self.boundary_union])


def count(
    prediction: Tensor,
    truth: Tensor,
    *,
    classes: int,
    ignore_index: int = 255,
    band: int = 2,
    boundary: float = 0.02,
) -> Counts:
    """Count one picture's pixels.

    The band is all pixels within `band` pixels (Chebyshev: rows and columns alike) of one with
    another label in the truth. A change to `ignore_index` is such a change, since masks like PASCAL
    VOC's draw a line of ignored pixels along every outline; the picture's border is none.

    Boundary IoU is that of Cheng, Girshick, Dollár, Berg and Kirillov (CVPR 2021, arXiv
    2103.16562): of each class's mask only the pixels within d of its contour count, d being
    `boundary` times the picture's diagonal, rounded, at least 1. As in the paper's code, where the
    picture cuts a mask is a contour; so is where ignored pixels do.

    Args:
        prediction: [H, W], int64, classes.
        truth: [H, W], int64, classes or `ignore_index`.
        classes: how many there are, C.
        ignore_index: the label of pixels that do not count, whatever is predicted there.
        band: in pixels, at least 1.
        boundary: a share of the picture's diagonal.

    Returns:
        Tensors on the CPU.

    Raises:
        DataError: a label is no class, or the sizes differ.
        TrainingError: torchmetrics is missing.

    Example:
        >>> truth = torch.tensor([[0, 0, 1, 1]])
        >>> count(torch.tensor([[0, 1, 1, 1]]), truth, classes=2, band=1).confusion
        tensor([[1, 1],
                [0, 2]])
    """
    if prediction.shape != truth.shape or truth.dim() != 2:
        raise DataError(
            f"a prediction of shape {list(prediction.shape)} and a mask of shape "
            f"{list(truth.shape)}: expected two of one shape [H, W]."
        )
    if prediction.device.type not in ("cpu", "cuda"):  # others lack some of the operations
        prediction, truth = prediction.cpu(), truth.cpu()
    valid = truth != ignore_index
    labels, seen = truth.where(valid, _IGNORED), prediction.where(valid, _IGNORED)
    _check_labels(labels, classes, "mask")
    _check_labels(seen, classes, "prediction")

    near = ~_is_uniform(labels, band, at_border=False)
    reach = max(1, round(boundary * (truth.shape[0] ** 2 + truth.shape[1] ** 2) ** 0.5))
    outlines = [
        mask.where(~_is_uniform(mask, reach, at_border=True), _IGNORED) for mask in (labels, seen)
    ]
    common = _occurring(outlines[0].where(outlines[0] == outlines[1], _IGNORED), classes)
    either = sum(_occurring(outline, classes) for outline in outlines) - common
    found = (
        _confusion(seen, labels, classes),
        _confusion(seen, labels.where(near, _IGNORED), classes),
        common,
        either,
    )
    return Counts(*(tensor.cpu() for tensor in found))


def scores_of(tallies: Tensor, ignore_index: int = 255) -> dict[str, Tensor]:
    """The measures of pictures whose tallies were added up.

    Args:
        tallies: [..., 8, C], rows as in `TALLIES`.
        ignore_index: has no score where it is one of the classes.

    Returns:
        Float64: the names of `MEASURES` with [...], and `class_iou`, `class_band_iou` and
        `class_boundary_iou` with [..., C]; NaN where nothing was counted.

    Example:
        >>> scores_of(torch.tensor([[8], [10], [10], [0], [0], [0], [1], [2]]))["boundary_iou"]
        tensor(0.5000, dtype=torch.float64)
    """
    hits, truth, predicted, band_hits, band_truth, band_predicted, common, either = (
        tallies.double().unbind(-2)
    )
    found = {
        "class_iou": hits / (truth + predicted - hits),
        "class_band_iou": band_hits / (band_truth + band_predicted - band_hits),
        "class_boundary_iou": common / either,
    }
    if 0 <= ignore_index < tallies.shape[-1]:
        for ratios in found.values():
            ratios[..., ignore_index] = torch.nan
    means = {name.removeprefix("class_"): ratios.nanmean(-1) for name, ratios in found.items()}
    return {
        "miou": means["iou"],
        "boundary_iou": means["boundary_iou"],
        "band_miou": means["band_iou"],
        "pixel_accuracy": hits.sum(-1) / truth.sum(-1),
        **found,
    }


@dataclass(frozen=True, eq=False)
class Scores:
    """A network's scores on the pictures of a split; fractions, 0 to 1.

    Attributes:
        classes: their names.
        pictures: their names, in the split's order.
        tallies: [N, 8, C], int64: each picture's sums, rows as in `TALLIES`.
        confusion: [C, C], int64, of all pictures; row: true class, column: predicted class.
        ignore_index: the label of pixels that did not count.
    """

    classes: tuple[str, ...]
    pictures: tuple[str, ...]
    tallies: Tensor
    confusion: Tensor
    ignore_index: int = 255

    @classmethod
    def of(
        cls,
        counts: Iterable[Counts],
        classes: Sequence[str],
        pictures: Sequence[str],
        ignore_index: int = 255,
    ) -> Scores:
        """The scores of pictures that were counted one by one.

        Raises:
            DataError: there are none, or not as many as names.
        """
        found = list(counts)
        if not found or len(found) != len(pictures):
            raise DataError(
                f"{len(found)} pictures were counted and {len(pictures)} have names. Expected as "
                "many, and at least one."
            )
        return cls(
            tuple(classes),
            tuple(pictures),
            torch.stack([one.tally for one in found]),
            torch.stack([one.confusion for one in found]).sum(0),
            ignore_index,
        )

    @cached_property
    def _found(self) -> dict[str, Tensor]:
        return scores_of(self.tallies.sum(0), self.ignore_index)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur."""
        return self._found["miou"].item()

    @property
    def boundary_iou(self) -> float:
        """Mean boundary IoU over the classes that occur."""
        return self._found["boundary_iou"].item()

    @property
    def band_miou(self) -> float:
        """Mean IoU of the pixels near an edge, over the classes that occur there."""
        return self._found["band_miou"].item()

    @property
    def pixel_accuracy(self) -> float:
        """The share of pixels that are right."""
        return self._found["pixel_accuracy"].item()

    @property
    def class_iou(self) -> tuple[float, ...]:
        """IoU of each class; NaN where it never occurs."""
        return tuple(self._found["class_iou"].tolist())

    @property
    def class_boundary_iou(self) -> tuple[float, ...]:
        """Boundary IoU of each class; NaN where it never occurs."""
        return tuple(self._found["class_boundary_iou"].tolist())

    @property
    def class_band_iou(self) -> tuple[float, ...]:
        """IoU of each class near edges; NaN where it never occurs there."""
        return tuple(self._found["class_band_iou"].tolist())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; None where there is no score."""
        per_class = zip(
            self.classes,
            self.class_iou,
            self.class_boundary_iou,
            self.class_band_iou,
            strict=True,
        )
        names = ("iou", "boundary_iou", "band_iou")
        return {
            **{name: or_none(getattr(self, name)) for name in MEASURES},
            "classes": [
                {"name": name, **dict(zip(names, map(or_none, values), strict=True))}
                for name, *values in per_class
            ],
            "pictures": len(self.pictures),
        }

    def __str__(self) -> str:
        """One line in points, hundredths."""
        return ", ".join(f"{word} {100 * getattr(self, m):.2f}" for m, word in MEASURES.items())

    def write(self, path: Path) -> Path:
        """Keep the scores in a safetensors file, picture by picture.

        Raises:
            TrainingError: it cannot be written.
        """
        from safetensors.torch import save

        words = {
            "classes": self.classes,
            "pictures": self.pictures,
            "ignore_index": self.ignore_index,
        }
        tensors = {"tallies": self.tallies.contiguous(), "confusion": self.confusion.contiguous()}
        return write_file(path, save(tensors, {"scores": json.dumps(words)}))

    @classmethod
    def read(cls, path: Path) -> Scores:
        """The scores that `write` kept.

        Raises:
            TrainingError: the file is missing, truncated or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                words = json.loads((file.metadata() or {})["scores"])
                tensors = file.get_tensor("tallies"), file.get_tensor("confusion")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise TrainingError(
                f"'{path}' does not hold scores: {error}. Measure again, or remove the file."
            ) from error
        names = tuple(words["classes"]), tuple(words["pictures"])
        return cls(*names, *tensors, words["ignore_index"])


def or_none(value: float) -> float | None:
    """The number, or None for NaN, which JSON lacks."""
    return None if value != value else value


def _check_labels(labels: Tensor, classes: int, what: str) -> None:
    lowest, highest = (int(edge) for edge in labels.aminmax())
    if lowest < _IGNORED or highest >= classes:
        wrong = lowest if lowest < _IGNORED else highest
        raise DataError(
            f"label {wrong} in a {what}: expected classes 0 to {classes - 1}. Check the data's "
            "classes and ignore_index."
        )


def _confusion(prediction: Tensor, truth: Tensor, classes: int) -> Tensor:
    """[C, C]: pixels by true and predicted class, those left out whose truth is `_IGNORED`."""
    try:
        from torchmetrics.functional.classification import multiclass_confusion_matrix
    except ImportError as error:
        raise TrainingError(
            "torchmetrics is missing, by which predictions are measured. Install it: "
            'pip install "pacswap[train]"'
        ) from error
    # It leaves out pixels by their truth; their prediction only has to be some class.
    return multiclass_confusion_matrix(
        prediction.clamp(min=0), truth, classes, ignore_index=_IGNORED, validate_args=False
    )


def _occurring(labels: Tensor, classes: int) -> Tensor:
    """[C]: how many pixels each class has."""
    return torch.bincount(labels[labels >= 0], minlength=classes)


def _is_uniform(labels: Tensor, reach: int, *, at_border: bool) -> Tensor:
    """Whether all labels within `reach` pixels, rows and columns alike, are one. [H, W], bool.

    One pass over the labels serves all classes: a pixel lies in its mask's erosion exactly where
    the lowest and the highest label around it are equal.

    Args:
        labels: [H, W].
        reach: in pixels.
        at_border: whether what is beyond the picture counts as a label of its own.
    """
    small = labels.to(torch.int16 if labels.max() < 2**15 else torch.int64)
    if at_border:
        small = F.pad(small, (reach,) * 4, value=_OUTSIDE)
    else:  # a border of copies holds nothing that the window does not hold anyway
        for dim in (0, 1):
            size = small.shape[dim]
            places = torch.arange(-reach, size + reach, device=small.device).clamp(0, size - 1)
            small = small.index_select(dim, places)
    lowest, highest = small, small
    for dim in (0, 1):
        lowest = -_highest(-lowest, 2 * reach + 1, dim)
        highest = _highest(highest, 2 * reach + 1, dim)
    return lowest == highest


def _highest(values: Tensor, length: int, dim: int) -> Tensor:
    """The greatest of every `length` neighbours along `dim`, by doubling the stretch it covers."""
    covered = 1
    while covered < length:
        step = min(covered, length - covered)
        size = values.shape[dim] - step
        values = torch.maximum(values.narrow(dim, 0, size), values.narrow(dim, step, size))
        covered += step
    return values
