"""One pairwise term of a PAC-CRF: which neighbours speak to a pixel, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import GuidanceError, ShapeError, nearest_hint
from pacswap.nn.kernel import AdaptingKernel, KernelOptions
from pacswap.ops.window import make_window

if TYPE_CHECKING:
    from typing_extensions import Unpack

COMPATIBILITIES = ("4d", "2d", "potts")


@dataclass(frozen=True)
class PairwiseKernel:
    """What a pairwise term is; the defaults are the paper's.

    Attributes:
        kernel_size: side of the window, odd, at least 3.
        dilation: pixels (of the blurred image) between taps.
        blur: the message is computed on an image so many times smaller, by average pooling, and
            interpolated back.
        compatibility: what a label says to another: `"4d"`, a C×C matrix at every tap; `"2d"`, one
            spatial filter, then one C×C matrix; `"potts"`, one spatial filter, and equal labels
            attract.
        spatial_filter: whether the spatial filter is learned; it starts as a gaussian. Without it
            every tap but the centre counts 1. With `"4d"` the filter is in the matrices.
        weight: how strong the message starts, in units of the unary.
        color: where the scale σ starts by which features are divided, in their units; None: the
            term does not look at the guidance (smoothness).
        position: where the scale σ of the distance starts, in pixels of the unary: every tap counts
            exp(−½·distance²/σ²). None: the distance does not count.

    Raises:
        ShapeError: a value is out of range.

    Example:
        >>> PairwiseKernel(kernel_size=11, dilation=4, color=13.0, position=20.0).compatibility
        'potts'
    """

    kernel_size: int = 5
    dilation: int = 1
    blur: int = 1
    compatibility: Literal["4d", "2d", "potts"] = "potts"
    spatial_filter: bool = True
    weight: float = 1.0
    color: float | None = 1.0
    position: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("kernel_size", 3), ("dilation", 1), ("blur", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ShapeError(f"{name} must be an int of at least {least}, got {value!r}.")
        if self.kernel_size % 2 == 0:
            raise ShapeError(
                f"kernel_size must be odd, got {self.kernel_size}: no tap is the centre."
            )
        if self.compatibility not in COMPATIBILITIES:
            hint = nearest_hint(str(self.compatibility), COMPATIBILITIES)
            raise ShapeError(f"compatibility={self.compatibility!r} is unknown. {hint}")
        if self.compatibility == "4d" and not self.spatial_filter:
            raise ShapeError(
                "compatibility='4d' has a matrix at every tap, which is its spatial filter: leave "
                "spatial_filter at True, or use '2d'."
            )
        if not math.isfinite(self.weight):
            raise ShapeError(f"weight must be finite, got {self.weight!r}.")
        for name in ("color", "position"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ShapeError(f"{name} must be positive and finite, or None, got {value!r}.")


class Factors(NamedTuple):
    """What is the same in every step: N(K · position factor), taken apart.

    Attributes:
        kernel: K, [B, 1 or C, taps, h, w], h×w being the blurred image; None where K ≡ 1.
        along: the position factor of the taps along one side, [k]; a tap's is the product of two.
        scale: the normalisation, [1 or B, 1 or C, h, w]; None for none.
    """

    kernel: Tensor | None
    along: Tensor
    scale: Tensor | None

    @property
    def taps(self) -> Tensor:
        """The position factor of each tap, [k, k]."""
        return self.along[:, None] * self.along


class PairwiseTerm(nn.Module):
    """A pairwise term of `PacCRF`, for one or for all of its steps.

    What it learns, S being 1 or the number of steps that have weights of their own: `weight`, the
    spatial filter [S, 1, k, k] or the matrices [S·C, C, k, k]; `compatibility` [S·C, C, 1, 1];
    `strength` [S]; those among them that its kind has. And, the same for all steps,
    `adapting_kernel.log_bandwidth` (the logarithm of `color`) and `log_position`.

    Args:
        channels: C, the number of labels.
        kernel: what it is.
        steps: S.
        device: of the parameters.
        dtype: of the parameters.
        **kernel_options: how K is made, as for `AdaptingKernel`. `normalize` is of K times the
            position factor, over the window; the centre is counted, though it sends no message: a
            pixel that is unlike its neighbours hears little of them.
    """

    weight: Tensor | None
    compatibility: Tensor | None
    strength: Tensor | None
    log_position: Tensor | None
    adapting_kernel: AdaptingKernel | None

    def __init__(
        self,
        channels: int,
        kernel: PairwiseKernel,
        *,
        steps: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel_options: Unpack[KernelOptions],
    ) -> None:
        super().__init__()
        self.channels, self.options, self.repeats = channels, kernel, steps
        self.normalize = kernel_options.pop("normalize", "none")
        self.window = make_window(
            kernel.kernel_size,
            padding=kernel.kernel_size // 2 * kernel.dilation,
            dilation=kernel.dilation,
        )
        self.adapting_kernel = None
        if kernel.color is not None:
            # Not normalised here: that comes after the product with the position factor.
            given: dict[str, Any] = {**kernel_options, "bandwidth": kernel.color}
            self.adapting_kernel = AdaptingKernel(
                self.window, channels=channels, device=device, dtype=dtype, **given
            )
        for name, value in _starts(channels, kernel).items():
            self._start(name, value, steps, device, dtype)
        position = None
        if kernel.position is not None:
            position = torch.full((), math.log(kernel.position), device=device, dtype=dtype)
        if position is not None and kernel_options.get("learnable", True):
            self.log_position = nn.Parameter(position)
        else:
            self.register_buffer("log_position", position)

    def _start(
        self,
        name: str,
        value: Tensor | None,
        steps: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if value is None:
            self.register_parameter(name, None)
            return
        value = value.to(device=device, dtype=dtype or torch.get_default_dtype())
        # The steps side by side in the first dimension: five dimensions have no channels_last.
        value = value.repeat(steps, 1, 1, 1) if value.dim() == 4 else value.repeat(steps)
        self.register_parameter(name, nn.Parameter(value))

    @property
    def is_guided(self) -> bool:
        """Whether it looks at the guidance."""
        return self.adapting_kernel is not None

    def factors(self, guidance: Tensor | None, like: Tensor) -> Factors:
        """What is the same in every step.

        Args:
            guidance: f, [B, D, h, w], blurred already; not looked at by a term that has no colour.
            like: a tensor [B, C, h, w], blurred already.

        Raises:
            GuidanceError: the adapting kernel is disabled.
        """
        kernel = None
        if self.adapting_kernel is not None:
            kernel = self.adapting_kernel(guidance)
            if kernel is None:
                raise GuidanceError(
                    "the adapting kernel of this PacCRF is disabled and the layer is not. Disable "
                    "both: `with pacswap.disabled(model):`."
                )
            kernel = kernel.to(like.dtype)
        along = self._along(ops.compute_dtype(like.dtype), like.device)
        factors = Factors(kernel, along, None)
        return factors._replace(scale=self._scale(factors, like))

    def _along(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """exp(−½·distance²/σ²) of the taps along one side, [k]; 1 without a scale."""
        k = self.options.kernel_size
        if self.log_position is None:
            return torch.ones(k, dtype=dtype, device=device)
        along = torch.arange(k, dtype=dtype, device=device) - k // 2
        along = along * (self.options.dilation * self.options.blur)
        return torch.exp(-0.5 * (along / self.log_position.to(dtype).exp()).square())

    def _scale(self, factors: Factors, like: Tensor) -> Tensor | None:
        """By what a message is multiplied so that the factors add up as `normalize` says."""
        if self.normalize == "none":
            return None
        B, _, H, W = like.shape
        # Outside the image there are no ones, so their sum is that of the factors inside.
        ones = like.new_ones(1, 1, H, W)
        if factors.kernel is None:
            total = self._summed(ones, factors.along)
        else:
            channels = factors.kernel.shape[1]
            filters = factors.taps.to(like.dtype).expand(channels, 1, -1, -1)
            many = ones.expand(B, channels, -1, -1)
            total = ops.convolve(many, factors.kernel, filters, None, self.window, channels, "auto")
        total = total.to(ops.compute_dtype(like.dtype))
        if self.normalize == "sum":
            return 1 / total
        inside = self._summed(ones, torch.ones_like(factors.along)).to(total.dtype)
        return self.window.taps / (total + (self.window.taps - inside))

    def _summed(self, image: Tensor, along: Tensor) -> Tensor:
        """Σ over the window of the image, centre included, each tap times its position factor."""
        channels, (pad, _), (dilation, _) = (
            image.shape[1],
            self.window.pad[:2],
            self.window.dilation,
        )
        row = along.to(image.dtype).expand(channels, 1, 1, -1)
        image = F.conv2d(image, row, padding=(0, pad), dilation=dilation, groups=channels)
        column = row.transpose(-1, -2)
        return F.conv2d(image, column, padding=(pad, 0), dilation=dilation, groups=channels)

    def message(self, beliefs: Tensor, factors: Factors, step: int) -> Tensor:
        """What is subtracted from log Q: the neighbours' energies for each label.

        Args:
            beliefs: Q, [B, C, h, w], blurred already.
            factors: what `factors` gave.
            step: which step it is, from 0.

        Returns:
            [B, C, h, w], in float32 or better.
        """
        wide = ops.compute_dtype(beliefs.dtype)
        message = self._gathered(beliefs, factors, step).to(wide)
        if factors.scale is not None:
            message = message * factors.scale
        if self.compatibility is not None:
            matrix = self.of_step(self.compatibility, step)
            return F.conv2d(message, matrix.to(wide)).to(wide)
        if self.strength is not None:
            message = message * self.of_step(self.strength, step).to(wide)
        return -message if self.options.compatibility == "potts" else message

    def _gathered(self, beliefs: Tensor, factors: Factors, step: int) -> Tensor:
        """What the neighbours believe, filtered and weighted, [B, C, h, w]."""
        if factors.kernel is None and self.weight is None:
            # Twice k taps instead of k².
            return self._summed(beliefs, factors.along) - beliefs
        filters = self._filters(factors.taps, step).to(beliefs.dtype)
        groups = self.channels // filters.shape[1]
        if factors.kernel is not None:
            kernel = factors.kernel
            return ops.convolve(beliefs, kernel, filters, None, self.window, groups, "auto")
        pad, dilation = self.window.pad[0], self.window.dilation
        return F.conv2d(beliefs, filters, padding=pad, dilation=dilation, groups=groups)

    def _filters(self, taps: Tensor, step: int) -> Tensor:
        """The weights of the step times the factor of each tap, as `F.conv2d` takes them."""
        if self.weight is None:
            numbers = torch.arange(self.window.taps, device=taps.device).view_as(taps)
            weight = (numbers != self.window.centre).to(taps.dtype)[None, None]
        else:
            weight = self.of_step(self.weight, step).to(taps.dtype)
        filters = weight * taps
        return filters if filters.shape[0] > 1 else filters.expand(self.channels, -1, -1, -1)

    def of_step(self, numbers: Tensor, step: int) -> Tensor:
        """The part of a parameter that a step has: [1 or C, 1 or C, k, k], [C, C, 1, 1] or [].

        Args:
            numbers: `weight`, `compatibility` or `strength`.
            step: from 0.
        """
        index = step if self.repeats > 1 else 0
        part = numbers.unflatten(0, (self.repeats, -1))[index]
        return part[0] if numbers.dim() == 1 else part

    def macs(self, pixels: int) -> int:
        """Multiply-accumulates of one step on so many pixels of the unary."""
        at_tap = self.channels * (1 if self.options.compatibility != "4d" else self.channels)
        at_tap += self.channels if self.is_guided else 0
        at_pixel = self.window.taps * at_tap
        if not self.is_guided and self.weight is None:
            at_pixel = 2 * self.options.kernel_size * self.channels
        if self.options.compatibility == "2d":
            at_pixel += self.channels**2
        return at_pixel * -(-pixels // self.options.blur**2)

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        names = ("kernel_size", "dilation", "blur", "compatibility", "spatial_filter")
        words = [f"{name}={getattr(self.options, name)!r}" for name in names]
        return ", ".join([*words, f"normalize={self.normalize!r}"])


def _starts(channels: int, kernel: PairwiseKernel) -> dict[str, Tensor | None]:
    """Where the parameters start: the message strength is in one of them."""
    starts: dict[str, Tensor | None] = {"weight": None, "compatibility": None, "strength": None}
    unlike = 1 - torch.eye(channels, dtype=torch.float64)[:, :, None, None]
    if kernel.spatial_filter:
        starts["weight"] = _gaussian(kernel.kernel_size)[None, None]
    if kernel.compatibility == "4d":
        starts["weight"] = kernel.weight * unlike * _gaussian(kernel.kernel_size)
    elif kernel.compatibility == "2d":
        starts["compatibility"] = kernel.weight * unlike
    elif kernel.spatial_filter:
        starts["weight"] = kernel.weight * _gaussian(kernel.kernel_size)[None, None]
    else:
        starts["strength"] = torch.tensor(kernel.weight, dtype=torch.float64)
    return starts


def _gaussian(size: int) -> Tensor:
    """The paper's spatial filter: σ = size/4, sum size² before its centre is set to 0.

    In float32, as the reference implementation makes it.
    """
    along = torch.arange(size, dtype=torch.float32) - size // 2
    distance = (along[:, None].square() + along.square()).sqrt()
    sigma = size / 4
    gauss = torch.exp(-distance.square() / (2 * sigma**2))
    gauss = gauss / gauss.sum() * size * size
    gauss[size // 2, size // 2] = 0
    return gauss.double()
