"""What a picture of a layer is made of: its features and its K, seen in one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import ShapeError
from pacswap.surgery import pac_layers
from pacswap.surgery.watch import Seen, watch
from pacswap.zoo import normalization


@dataclass(frozen=True)
class Looked:
    """A pixel-adaptive layer on one image.

    Attributes:
        name: the layer, or the term of a CRF.
        features: [D, Hf, Wf] as the distances see them: standardised if the kernel does that.
        factors: K, [KH*KW, H, W], in 0 … 1, before its normalisation; the mean over channels where
            each has its own.
        neighbours: which taps are neighbours inside the image, bool [KH*KW, H, W].
        window: its geometry.
        blend: how far the layer follows K.
        form: of the kernel.
        bandwidth: of the kernel; None where it has none.
    """

    name: str
    features: Tensor
    factors: Tensor
    neighbours: Tensor
    window: ops.Window
    blend: float
    form: str
    bandwidth: float | None

    def centre_of(self, row: int, column: int) -> tuple[int, int]:
        """Where in the features the window of an output pixel has its centre."""
        window, index = self.window, (row, column)
        KH, KW = window.kernel_size
        taps = ((KH - 1) // 2, (KW - 1) // 2)
        left, _, top, _ = window.border(*self.features.shape[-2:])
        before = (top, left)
        y, x = (
            index[axis] * window.stride[axis] - before[axis] + taps[axis] * window.dilation[axis]
            for axis in (0, 1)
        )
        return y, x

    def pixel_at(self, y: float, x: float) -> tuple[int, int]:
        """The output pixel whose window is centred nearest to a place.

        Args:
            y: in 0 … 1 from the top of the image.
            x: in 0 … 1 from its left.
        """
        sizes, places = self.factors.shape[-2:], (y, x)
        first, step = self.centre_of(0, 0), self.window.stride
        found = []
        for axis in (0, 1):
            at = places[axis] * self.features.shape[1 + axis] - 0.5
            index = round((at - first[axis]) / step[axis])
            found.append(min(max(index, 0), sizes[axis] - 1))
        return found[0], found[1]


def look_into(
    model: nn.Module,
    image: Tensor,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    guidance: Tensor | None = None,
) -> dict[str, Looked]:
    """Run a model on an image and keep what its pixel-adaptive layers see; the model stays as is.

    Args:
        model: an upgraded model.
        image: [3, H, W], RGB, uint8 or float in 0 … 1.
        mean: subtracted from each channel in 0 … 1; None is the model's own.
        std: by which each is divided then; None is the model's own.
        guidance: the external guidance, [1, D, H, W], if the model was upgraded with one.

    Returns:
        By the layer's name (with the term's for a CRF); of a layer that runs twice, its first call.

    Raises:
        ShapeError: it is no image.
        PlanError: the model has no pixel-adaptive layers.
    """
    pixels = as_unit(image)
    own_mean, own_std = normalization(model)
    columns = (3, 1, 1)
    shift = torch.tensor(own_mean if mean is None else mean).view(columns)
    scale = torch.tensor(own_std if std is None else std).view(columns)
    found: dict[str, Looked] = {}
    blends = {name: float(layer.blend.detach()) for name, layer in pac_layers(model).items()}

    def see(seen: Seen) -> None:
        if seen.name not in found:
            found[seen.name] = _looked(seen, blends[seen.layer])

    watch(model, ((pixels - shift) / scale)[None], see, guidance=guidance)
    return found


def adaptation_map(looked: Looked) -> Tensor:
    """How much a layer adapts at each pixel: 1 − mean K of its neighbours inside the image.

    Args:
        looked: what `look_into` gave for the layer.

    Returns:
        [H, W], 0 (all neighbours count, the layer is a plain one) … 1 (none does).
    """
    counts = looked.neighbours.sum(0)
    total = torch.where(looked.neighbours, looked.factors, 0.0).sum(0)
    return torch.where(counts > 0, 1 - total / counts.clamp(min=1), 0.0)


def as_unit(image: Tensor) -> Tensor:
    """An RGB image as float32 [3, H, W] in 0 … 1.

    Raises:
        ShapeError: it is something else.
    """
    shape = list(image.shape)
    if image.dim() != 3 or image.shape[0] != 3:
        raise ShapeError(f"image must be [3, H, W], RGB, got {shape}.")
    pixels = image.detach().float().cpu()
    pixels = pixels / 255 if image.dtype == torch.uint8 else pixels
    if not (pixels.isfinite().all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ShapeError(
            f"image must be uint8 or in 0 … 1, got {pixels.min().item():.3g} … "
            f"{pixels.max().item():.3g}. Pass it before it is normalised."
        )
    return pixels


def _looked(seen: Seen, blend: float) -> Looked:
    features = seen.features[:1].to(ops.compute_dtype(seen.features.dtype))
    if seen.kernel.standardize:
        features = ops.standardized(features)
    width = None if seen.kernel.form == "constant" else float(seen.kernel.bandwidth.detach())
    factors = seen.factors()[0].mean(0)
    return Looked(
        seen.name,
        features[0].cpu(),
        factors.cpu(),
        seen.neighbours()[0].cpu(),
        seen.kernel.window,
        blend,
        seen.kernel.form,
        width,
    )
