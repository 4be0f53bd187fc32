"""What went wrong inside the pixel-adaptive layers of a trained network, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pacswap.surgery import pac_layers
from pacswap.surgery.watch import Seen, watch

LEAST_BLEND = 1e-4
LEAST_KERNEL, MOST_KERNEL = 0.02, 0.98
LEAST_CHANGE = 1e-4
# Forms whose K has bounds that it can be stuck at.
_BOUNDED = ("gaussian", "laplacian")
_BINS = 2000


@dataclass(frozen=True)
class Finding:
    """Something in a layer that keeps it from adapting.

    Attributes:
        layer: dotted name; of a term of a CRF, with the term's (`crf_out.kernels.0`).
        kind: `blend` (it stayed at 0), `kernel` (K is stuck at 0 or at 1) or `guidance` (its
            features are the same everywhere).
        value: the figure: the blend, the median K of the neighbours, or by how much of its largest
            magnitude the liveliest channel of the guidance varies over the positions of an image.
        text: what it is, why it matters and what to do, in words that name the layer.
    """

    layer: str
    kind: Literal["blend", "kernel", "guidance"]
    value: float
    text: str

    def __str__(self) -> str:
        """The words."""
        return self.text


def diagnose(
    model: nn.Module, images: Tensor | Iterable[Tensor], guidance: Tensor | None = None
) -> list[Finding]:
    """Look for layers of a trained network that do not adapt.

    The model runs in eval mode and is left as it was. Just after a swap every blend is 0 by
    design, so ask after training. K is looked at before its normalisation, and in the gaussian and
    the laplacian form only: the others have no bounds to be stuck at.

    Args:
        model: a trained network with pixel-adaptive layers.
        images: normalised, as the model takes them, [B, C, H, W], or several such batches.
        guidance: the external guidance of one batch, if the model was upgraded with one.

    Returns:
        One finding for each fault, in the order of the layers; none if all is well.

    Raises:
        PlanError: the model has no pixel-adaptive layers.
    """
    looks: dict[str, _Look] = {}

    def see(seen: Seen) -> None:
        looks.setdefault(seen.name, _Look(seen)).add(seen)

    for batch in [images] if isinstance(images, Tensor) else images:
        watch(model, batch, see, guidance=guidance)
    findings = []
    for name, layer in pac_layers(model).items():
        blend = layer.blend.detach().float().item()
        if abs(blend) < LEAST_BLEND:
            findings.append(Finding(name, "blend", blend, _of_blend(name, blend)))
        own = [look for look in looks.values() if look.layer == name]
        findings += [finding for look in own for finding in look.findings()]
    return findings


class _Look:
    """What was seen of one adapting kernel, over all images."""

    def __init__(self, first: Seen) -> None:
        self.name, self.layer, self.form = first.name, first.layer, first.kernel.form
        self.change = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, seen: Seen) -> None:
        flat = seen.features.float().flatten(2)
        span = flat.amax(2) - flat.amin(2)
        largest = flat.abs().amax(2)
        # A channel that is 0 everywhere is as constant as any other.
        share = torch.where(largest > 0, span / largest, torch.zeros_like(span))
        self.change = max(self.change, share.max().item())
        if self.form in _BOUNDED:
            factors = seen.factors()
            values = factors.masked_select(seen.neighbours()[:, None]).float().cpu()
            self.counts += torch.histc(values, _BINS, 0, 1).double()

    def median(self) -> float | None:
        """The median K of neighbours to half a thousandth; None if none was seen."""
        total = self.counts.sum().item()
        if total == 0:
            return None
        index = int((self.counts.cumsum(0) < total / 2).sum().item())
        return (index + 0.5) / _BINS

    def findings(self) -> list[Finding]:
        if self.form == "constant":
            return []  # a control, which adapts to nothing by design
        if self.change < LEAST_CHANGE:
            # The kernel is then stuck too, and for this reason.
            text = _of_guidance(self.name, self.change)
            return [Finding(self.name, "guidance", self.change, text)]
        median = self.median()
        if median is None or LEAST_KERNEL <= median <= MOST_KERNEL:
            return []
        return [Finding(self.name, "kernel", median, _of_kernel(self.name, median))]


def _of_blend(name: str, blend: float) -> str:
    return (
        f"'{name}': blend is {blend:.1e} after training (below {LEAST_BLEND:.0e}), so the layer is "
        "still what it was before the swap and its adapting kernel changes nothing. See that a "
        "stage trains 'added', raise its learning rate (lr: {default: …, added: 1e-2}) or train "
        "longer; if it stays there, leave the layer out: `pacswap probe` shows which layers answer."
    )


def _of_kernel(name: str, median: float) -> str:
    if median < LEAST_KERNEL:
        return (
            f"'{name}': the adapting kernel is stuck at 0 (median K of the neighbours {median:.4f},"
            f" below {LEAST_KERNEL}), so the layer hardly sees beyond its centre tap and its "
            "bandwidth gets no gradient. Calibrate on images like these (kernel: {bandwidth: auto} "
            "and calibration: {images: …}), or lower the learning rate of 'added'."
        )
    return (
        f"'{name}': the adapting kernel is stuck at 1 (median K of the neighbours {median:.4f}, "
        f"above {MOST_KERNEL}), so all pixels look alike to it and the layer is a plain one. "
        "Calibrate on images like these (kernel: {bandwidth: auto} and calibration: {images: …}), "
        "set standardize: true, or choose another guidance: `pacswap probe` ranks them."
    )


def _of_guidance(name: str, change: float) -> str:
    return (
        f"'{name}': the guidance is constant: no channel varies over an image by more than "
        f"{change:.1e} of its size (below {LEAST_CHANGE:.0e}), so K is 1 everywhere and the layer "
        "is a plain one. Choose another guidance, such as an earlier layer or 'input': "
        "`pacswap probe` ranks them."
    )
