"""The geometry of a 2-D window: where its taps lie, what is padded, which tap is the centre."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.errors import ShapeError, quoted

Size2: TypeAlias = "int | tuple[int, ...] | list[int]"
Padding: TypeAlias = "Size2 | str"

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Window:
    """A window as `torch.nn.Conv2d` moves it over an image.

    Attributes:
        kernel_size: (KH, KW).
        stride: (vertical, horizontal), in pixels.
        dilation: (vertical, horizontal), in pixels.
        pad: (left, right, top, bottom), in pixels, as `torch.nn.functional.pad` takes it.
        padding_mode: one of `PADDING_MODES`.
        ceil: let a last window hang over the right and the bottom, as pooling's `ceil_mode` does.
        same: pad with zeros, as much as ⌈H/stride⌉ × ⌈W/stride⌉ outputs need, the odd pixel at the
            right and the bottom (TensorFlow's SAME); `pad` is 0 then.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pad: tuple[int, int, int, int]
    padding_mode: str
    ceil: bool = False
    same: bool = False

    @property
    def taps(self) -> int:
        """KH·KW."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def centre(self) -> int:
        """The tap on the output pixel: the middle one, the earlier of two in an even side.

        (k−1)//2 is where `padding="same"` puts the output pixel, for even sides too (dilation 1).
        """
        KH, KW = self.kernel_size
        return (KH - 1) // 2 * KW + (KW - 1) // 2

    @property
    def unpadded(self) -> Window:
        """The same window over an image that has its border already, or needs none."""
        return replace(self, pad=(0, 0, 0, 0), padding_mode="zeros", ceil=False, same=False)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(H_out, W_out) for an image of that size.

        Raises:
            ShapeError: the padded image is smaller than the window.
        """
        if self.same:
            # Not −(−n // s), here and below: ONNX divides toward zero.
            return tuple(
                (n + s - 1) // s for n, s in zip((height, width), self.stride, strict=True)
            )  # type: ignore[return-value]
        left, right, top, bottom = self.pad
        room_y = height + top + bottom - self.dilation[0] * (self.kernel_size[0] - 1) - 1
        room_x = width + left + right - self.dilation[1] * (self.kernel_size[1] - 1) - 1
        # A window that may hang over need not fit: one that begins in the image is enough.
        hang_y, hang_x = (s - 1 if self.ceil else 0 for s in self.stride)
        if room_y + hang_y < 0 or room_x + hang_x < 0:
            raise ShapeError(
                f"the window is larger than the padded image: kernel_size={self.kernel_size}, "
                f"dilation={self.dilation}, padding={self.pad} (left, right, top, bottom), "
                f"image {height}×{width}. Use a larger image or more padding."
            )
        if not self.ceil:
            return room_y // self.stride[0] + 1, room_x // self.stride[1] + 1
        return (
            _ceil_size(room_y, self.stride[0], height + top),
            _ceil_size(room_x, self.stride[1], width + left),
        )

    def border(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(left, right, top, bottom) of an image of that size: `pad`, and what hangs over."""
        if self.same:
            top, bottom = self._same_border(0, height)
            left, right = self._same_border(1, width)
            return left, right, top, bottom
        left, right, top, bottom = self.pad
        if not self.ceil:
            return self.pad
        rows, columns = self.output_size(height, width)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        below = (rows - 1) * self.stride[0] + reach[0] - (height + top + bottom)
        beside = (columns - 1) * self.stride[1] + reach[1] - (width + left + right)
        return left, right + max(beside, 0), top, bottom + max(below, 0)

    def _same_border(self, axis: int, side: int) -> tuple[int, int]:
        """(before, after) of one axis under `same`."""
        step, reach = self.stride[axis], self.dilation[axis] * (self.kernel_size[axis] - 1)
        total: Any
        if step == 1:
            total = reach  # whatever the side: nothing for a compiler to guard
        else:
            total = torch.sym_max((side + step - 1) // step * step - step + reach + 1 - side, 0)
        return total // 2, total - total // 2

    def padded(self, x: Tensor) -> Tensor:
        """`x` [B, C, H, W] with its border."""
        border = self.border(x.shape[-2], x.shape[-1])
        if not self._has_border(border):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, border, mode=mode)

    def _has_border(self, border: tuple[int, int, int, int]) -> bool:
        # What hangs over differs between sizes: a compiler that looked would allow only one.
        sized = self.ceil or (self.same and max(self.stride) > 1)
        return any(self.pad) or (sized and torch.compiler.is_compiling()) or any(border)

    def slices(self, size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
        """For each tap, the (rows, columns) of a padded image that the whole output sees."""
        KH, KW = self.kernel_size
        for i in range(KH):
            for j in range(KW):
                yield self._slice(0, i, size), self._slice(1, j, size)

    def seen(self, padded: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """For each tap, what the whole output sees of an image with its border, [..., *size].

        Args:
            padded: [..., H', W'].
            size: (H_out, W_out).
        """
        for rows, columns in self.slices(size):
            tap = padded[..., rows, columns]
            if torch.compiler.is_compiling():
                # A compiler cannot derive it where sizes are divided and rounded: the ONNX
                # exporter would take each slice for one of unknown size.
                torch._check(tap.shape[-2] == size[0])
                torch._check(tap.shape[-1] == size[1])
            yield tap

    def _slice(self, axis: int, index: int, size: tuple[int, int]) -> slice:
        start, step = index * self.dilation[axis], self.stride[axis]
        return slice(start, start + (size[axis] - 1) * step + 1, step)

    def inside(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """Which taps see the image, not its zero padding: bool [1, KH·KW, H_out, W_out] or None.

        None means that every tap does, because nothing is padded or the border has values of its
        own.
        """
        if self.padding_mode != "zeros" or not self._has_border(self.border(height, width)):
            return None
        size = self.output_size(height, width)
        image = self.padded(torch.ones(1, 1, height, width, device=device))[0, 0]
        return torch.stack([tap > 0 for tap in self.seen(image, size)])[None]


def make_window(
    kernel_size: Size2,
    *,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    padding_mode: str = "zeros",
    ceil: bool = False,
) -> Window:
    """Check and normalise the options of a convolution or a pooling.

    Args:
        kernel_size: KH·KW taps; an int for a square window.
        stride: step between output pixels.
        padding: pixels added on both sides, `"valid"` (none) or `"same"` (the output is as large as
            the input; stride 1 only; the odd pixel goes to the right and to the bottom).
        dilation: step between taps.
        padding_mode: `"zeros"`, `"reflect"`, `"replicate"` or `"circular"`.
        ceil: let a last window hang over the right and the bottom; zero padding only.

    Raises:
        ShapeError: an option is out of range.
    """
    size = _pair("kernel_size", kernel_size, least=1)
    strides = _pair("stride", stride, least=1)
    dilations = _pair("dilation", dilation, least=1)
    if padding_mode not in PADDING_MODES:
        raise ShapeError(
            f"padding_mode={padding_mode!r} is unknown. Known: {quoted(PADDING_MODES)}."
        )
    if ceil and padding_mode != "zeros":
        raise ShapeError(f"ceil needs padding_mode='zeros', got {padding_mode!r}.")
    pad = _resolve_padding(padding, size, strides, dilations)
    return Window(size, strides, dilations, pad, padding_mode, ceil)


def as_window(
    given: Size2 | Window,
    *,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    padding_mode: str = "zeros",
) -> Window:
    """A `Window` as it is, or one of that `kernel_size` and the options of `make_window`.

    Raises:
        ShapeError: an option is out of range, or given beside a `Window`.
    """
    if not isinstance(given, Window):
        return make_window(
            given, stride=stride, padding=padding, dilation=dilation, padding_mode=padding_mode
        )
    if (stride, padding, dilation, padding_mode) != (1, 0, 1, "zeros"):
        raise ShapeError("a Window has stride, padding and dilation itself. Leave them out.")
    return given


def _ceil_size(room: int, stride: int, start: int) -> int:
    """How many windows there are if one may hang over; none may begin beyond the image."""
    count = (room + stride - 1) // stride + 1
    return count - 1 if (count - 1) * stride >= start else count


def _resolve_padding(
    padding: Padding, size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ShapeError(
                f"padding={padding!r} is unknown. Use an int, a pair of ints, 'same' or 'valid'."
            )
        if stride != (1, 1):
            raise ShapeError(
                f"padding='same' needs stride 1, got stride={stride}. Give the padding as numbers."
            )
        total_y, total_x = (d * (k - 1) for d, k in zip(dilation, size, strict=True))
        return total_x // 2, total_x - total_x // 2, total_y // 2, total_y - total_y // 2
    vertical, horizontal = _pair("padding", padding, least=0)
    return horizontal, horizontal, vertical, vertical


def _pair(name: str, value: Size2, *, least: int) -> tuple[int, int]:
    if type(value) is int and value >= least:
        return value, value
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in pair):
        raise ShapeError(f"{name} must be an int or a pair of ints, got {value!r}.")
    if min(pair) < least:
        raise ShapeError(f"{name} must be at least {least}, got {value!r}.")
    return pair[0], pair[1]
