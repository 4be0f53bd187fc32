"""`PacFilter2d`: sharpens a feature map along a guidance; the last step of guided upsampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import ShapeError, nearest_hint
from pacswap.nn.adaptive import Adaptive
from pacswap.nn.blur import reduced, restored
from pacswap.nn.kernel import KernelOptions, kernel_for
from pacswap.ops.window import Size2

if TYPE_CHECKING:
    from typing_extensions import Unpack

WEIGHTS = ("filter", "full")


class PacFilter2d(Adaptive, nn.Module):
    """A pixel-adaptive filter that keeps size and channels, and starts as nothing at all.

    Each step is x + blend·(Σ_q N(K)·W[p−q]·x_q − x). The weights start at 1 (for each channel with
    itself), so that with `normalize="sum"`, the default, the adapted part is a joint bilateral
    filter: an average over the neighbours that look alike (Su et al., CVPR 2019, section 3.1).
    Put behind an interpolation it makes a guided upsampling.

    Args:
        channels: C.
        kernel_size: KH, KW, odd.
        dilation: pixels between taps.
        weights: `"filter"`, one spatial filter for all channels (`weight` is [steps, 1, KH, KW]),
            or `"full"`, a C×C matrix at every tap ([steps·C, C, KH, KW]), which can move mass
            between classes.
        steps: how often the filter is applied, each time with weights of its own and the same K.
        blur: compute the change at a resolution so many times lower and bring it back bilinearly;
            what is not changed keeps its full resolution. Taps are then `dilation·blur` pixels
            apart, and the cost falls by blur².
        blend: where the learnable blend starts.
        device: of the parameters.
        dtype: of the parameters.
        **kernel_options: how K is made, as for `AdaptingKernel`; `normalize` is `"sum"` unless
            said otherwise.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> layer = PacFilter2d(21)
        >>> layer(torch.rand(1, 21, 64, 64), torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 21, 64, 64])
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Size2 = 5,
        *,
        dilation: Size2 = 1,
        weights: Literal["filter", "full"] = "filter",
        steps: int = 1,
        blur: int = 1,
        blend: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel_options: Unpack[KernelOptions],
    ) -> None:
        super().__init__()
        if weights not in WEIGHTS:
            raise ShapeError(
                f"weights={weights!r} is unknown. {nearest_hint(str(weights), WEIGHTS)}"
            )
        if type(steps) is not int or steps < 1:
            raise ShapeError(f"steps must be an int of at least 1, got {steps!r}.")
        if type(blur) is not int or blur < 1:
            raise ShapeError(f"blur must be an int of at least 1, got {blur!r}.")
        window = ops.guidance_window(kernel_size, dilation)
        if any(k % 2 == 0 for k in window.kernel_size):
            raise ShapeError(f"kernel_size must be odd, got {kernel_size!r}: no tap is the centre.")
        self.channels, self.weights, self.steps, self.window = channels, weights, steps, window
        self.blur = blur
        self.weight = nn.Parameter(_ones(channels, window, weights, steps, device, dtype))
        kernel_options.setdefault("normalize", "sum")
        name, made = type(self).__name__, {"device": device, "dtype": dtype}
        kernel = kernel_for(name, window, kernel_options, channels=channels, **made)
        self._adapt(blend, kernel, self.weight, kernel_options)

    def forward(
        self, input: Tensor, guidance: Tensor | None = None, *, kernel: Tensor | None = None
    ) -> Tensor:
        """Filter `input`, adapted to a guidance or by a kernel that was computed from one.

        Args:
            input: [B, C, H, W].
            guidance: f, [B, D, H, W].
            kernel: K, [B, 1 or C, KH*KW, ⌈H/blur⌉, ⌈W/blur⌉], instead of `guidance`.

        Returns:
            [B, C, H, W].

        Raises:
            GuidanceError: neither `guidance` nor `kernel` was given, or both.
            ShapeError: the tensors disagree.
        """
        if self.is_resting:
            return input
        kernel = self._kernel(None if guidance is None else reduced(guidance, self.blur), kernel)
        return input if self._rests(kernel) else self._again(self._filtered, input, kernel)

    def _filtered(self, input: Tensor, kernel: Tensor) -> Tensor:
        kernel = kernel.to(input.dtype)
        if self.blur == 1:
            for weight in self.weight.chunk(self.steps):
                input = self._toward(input, self._adapted(input, kernel, weight))
            return input
        small = reduced(input, self.blur)
        size = (input.shape[-2], input.shape[-1])
        change = restored(self._change(small, kernel), self.blur, size)
        return self._toward(input, input + change) if self._is_plain() else input + change

    def _change(self, small: Tensor, kernel: Tensor) -> Tensor:
        """What all steps change; at blend 0, where they change nothing, what they would begin."""
        weights = self.weight.chunk(self.steps)
        if self._is_plain():
            return sum(
                (self._adapted(small, kernel, w) - small for w in weights), small.new_zeros(())
            )
        filtered = small
        for weight in weights:
            filtered = self._toward(filtered, self._adapted(filtered, kernel, weight))
        return filtered - small

    def _adapted(self, input: Tensor, kernel: Tensor, weight: Tensor) -> Tensor:
        """One step of the joint bilateral filter, at blend 1."""
        groups = self.channels if self.weights == "filter" else 1
        filters = weight.to(input.dtype)
        if self.weights == "filter":
            filters = filters.expand(groups, -1, -1, -1)
        return ops.convolve(input, kernel, filters, None, self.window, groups, "auto")

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        w = self.window
        return (
            f"{self.channels}, kernel_size={w.kernel_size}, dilation={w.dilation}, "
            f"weights={self.weights!r}, steps={self.steps}, blur={self.blur}"
        )


def _ones(
    channels: int,
    window: ops.Window,
    weights: str,
    steps: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Weights that leave the average to the kernel: 1, or the identity at every tap.

    The steps lie side by side in the first dimension: five dimensions have no channels_last.
    """
    if weights == "filter":
        return torch.ones(steps, 1, *window.kernel_size, device=device, dtype=dtype)
    matrix = torch.eye(channels, device=device, dtype=dtype)[:, :, None, None]
    return matrix.repeat(steps, 1, *window.kernel_size)
