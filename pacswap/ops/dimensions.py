"""Windows over sequences and over volumes, made of windows over images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pacswap.errors import ShapeError
from pacswap.ops.window import Padding, Size2, Window, as_window, make_window


@dataclass(frozen=True)
class SequenceWindow:
    """A window as `torch.nn.Conv1d` moves it along a sequence.

    Attributes:
        row: the same window over an image of height 1.
    """

    row: Window

    @property
    def kernel_size(self) -> tuple[int]:
        """(K,)."""
        return (self.row.kernel_size[1],)

    @property
    def stride(self) -> tuple[int]:
        """In places of the sequence, like `dilation`."""
        return (self.row.stride[1],)

    @property
    def dilation(self) -> tuple[int]:
        """Places between taps."""
        return (self.row.dilation[1],)

    @property
    def pad(self) -> tuple[int, int]:
        """(left, right)."""
        return self.row.pad[:2]

    @property
    def padding_mode(self) -> str:
        """As in `Window`."""
        return self.row.padding_mode

    @property
    def taps(self) -> int:
        """K."""
        return self.row.taps

    @property
    def centre(self) -> int:
        """The middle tap, the earlier of two."""
        return self.row.centre

    @property
    def unpadded(self) -> SequenceWindow:
        """The same window over a sequence that has its border already, or needs none."""
        return SequenceWindow(self.row.unpadded)

    def output_size(self, length: int) -> tuple[int]:
        """(L_out,) for a sequence of that length.

        Raises:
            ShapeError: the padded sequence is shorter than the window.
        """
        _check_fits(self, "sequence", length)
        return (self.row.output_size(1, length)[1],)

    def inside(self, length: int, device: torch.device) -> Tensor | None:
        """Which taps see the sequence, not its zero padding: bool [1, K, L_out].

        None means that every tap does.
        """
        inside = self.row.inside(1, length, device)
        return None if inside is None else inside.squeeze(-2)


@dataclass(frozen=True)
class VolumeWindow:
    """A window as `torch.nn.Conv3d` moves it through a volume, such as a video.

    Its taps are ordered by time, then by row, then by column.

    Attributes:
        time: (KT, 1), along an image whose rows are the frames.
        plane: (KH, KW), over each frame.
    """

    time: Window
    plane: Window

    @property
    def kernel_size(self) -> tuple[int, int, int]:
        """(KT, KH, KW)."""
        return (self.time.kernel_size[0], *self.plane.kernel_size)

    @property
    def stride(self) -> tuple[int, int, int]:
        """(temporal, vertical, horizontal), in frames and pixels."""
        return (self.time.stride[0], *self.plane.stride)

    @property
    def dilation(self) -> tuple[int, int, int]:
        """(temporal, vertical, horizontal), in frames and pixels."""
        return (self.time.dilation[0], *self.plane.dilation)

    @property
    def pad(self) -> tuple[int, int, int, int, int, int]:
        """(left, right, top, bottom, front, back), as `torch.nn.functional.pad` takes it."""
        return (*self.plane.pad, *self.time.pad[2:])

    @property
    def padding_mode(self) -> str:
        """As in `Window`."""
        return self.plane.padding_mode

    @property
    def taps(self) -> int:
        """KT·KH·KW."""
        return self.time.taps * self.plane.taps

    @property
    def centre(self) -> int:
        """The middle tap, in each direction the earlier of two."""
        return self.time.centre * self.plane.taps + self.plane.centre

    @property
    def unpadded(self) -> VolumeWindow:
        """The same window through a volume that has its border already, or needs none."""
        return VolumeWindow(self.time.unpadded, self.plane.unpadded)

    def output_size(self, time: int, height: int, width: int) -> tuple[int, int, int]:
        """(T_out, H_out, W_out) for a volume of that size.

        Raises:
            ShapeError: the padded volume is smaller than the window.
        """
        _check_fits(self, "volume", time, height, width)
        return (self.time.output_size(time, 1)[0], *self.plane.output_size(height, width))

    def padded(self, x: Tensor) -> Tensor:
        """`x` [B, C, T, H, W] with its border."""
        if not any(self.pad):
            return x
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self.pad, mode=mode)

    def times(self, outputs: int) -> Iterator[slice]:
        """For each temporal tap, which frames of a padded volume so many outputs see."""
        return (rows for rows, _ in self.time.slices((outputs, 1)))

    def inside(self, time: int, height: int, width: int, device: torch.device) -> Tensor | None:
        """Which taps see the volume, not its zero padding: bool [1, taps, T_out, H_out, W_out].

        None means that every tap does.
        """
        when = self.time.inside(time, 1, device)
        where = self.plane.inside(height, width, device)
        if when is None and where is None:
            return None
        T, H, W = self.output_size(time, height, width)
        if when is None:
            when = torch.ones(1, self.time.taps, T, 1, dtype=torch.bool, device=device)
        if where is None:
            where = torch.ones(1, self.plane.taps, H, W, dtype=torch.bool, device=device)
        return (when[:, :, None, :, :, None] & where[:, None, :, None]).flatten(1, 2)


AnyWindow: TypeAlias = Window | SequenceWindow | VolumeWindow
AXES = {1: ("L",), 2: ("H", "W"), 3: ("T", "H", "W")}


def make_sequence_window(
    kernel_size: Size2,
    *,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    padding_mode: str = "zeros",
) -> SequenceWindow:
    """Check and normalise the options of `torch.nn.Conv1d`, as `make_window` does for images.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> make_sequence_window(5, padding="same").output_size(8)
        (8,)
    """
    named = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    (size,), (step,), (reach,) = (_sides(name, value, 1) for name, value in named.items())
    pad = padding if isinstance(padding, str) else (0, *_sides("padding", padding, 1))
    return SequenceWindow(
        make_window(
            (1, size),
            stride=(1, step),
            padding=pad,
            dilation=(1, reach),
            padding_mode=padding_mode,
        )
    )


def make_volume_window(
    kernel_size: Size2,
    *,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    padding_mode: str = "zeros",
) -> VolumeWindow:
    """Check and normalise the options of `torch.nn.Conv3d`, as `make_window` does for images.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> make_volume_window((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)).output_size(4, 8, 8)
        (4, 4, 4)
    """
    named = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    size, step, reach = (_sides(name, value, 3) for name, value in named.items())
    pad = padding if isinstance(padding, str) else _sides("padding", padding, 3)
    time = make_window(
        (size[0], 1),
        stride=(step[0], 1),
        padding=pad if isinstance(pad, str) else (pad[0], 0),
        dilation=(reach[0], 1),
        padding_mode=padding_mode,
    )
    plane = make_window(
        size[1:],
        stride=step[1:],
        padding=pad if isinstance(pad, str) else pad[1:],
        dilation=reach[1:],
        padding_mode=padding_mode,
    )
    return VolumeWindow(time, plane)


def any_window(
    given: Size2 | AnyWindow,
    *,
    stride: Size2 = 1,
    padding: Padding = 0,
    dilation: Size2 = 1,
    padding_mode: str = "zeros",
    axes: int | None = None,
) -> AnyWindow:
    """A window as it is, or one of that `kernel_size` over a sequence, an image or a volume.

    Args:
        given: a window; or (K,), (KH, KW), (KT, KH, KW), or an int.
        stride: as in `make_window`, like the next three.
        padding: as in `make_window`.
        dilation: as in `make_window`.
        padding_mode: as in `make_window`.
        axes: 1, 2 or 3; as many as `given` has sides if left out, and 2 for an int.

    Raises:
        ShapeError: an option is out of range, or given beside a window.
    """
    options = (stride, padding, dilation, padding_mode)
    if isinstance(given, SequenceWindow | VolumeWindow):
        if options != (1, 0, 1, "zeros"):
            raise ShapeError(
                f"a {type(given).__name__} has stride, padding and dilation itself. Leave them out."
            )
        return given
    if axes is None:
        axes = len(given) if isinstance(given, tuple | list) else 2
    if isinstance(given, Window) or axes not in (1, 3):
        return as_window(
            given, stride=stride, padding=padding, dilation=dilation, padding_mode=padding_mode
        )
    make = make_sequence_window if axes == 1 else make_volume_window
    return make(given, stride=stride, padding=padding, dilation=dilation, padding_mode=padding_mode)


def axes_of(window: AnyWindow) -> tuple[str, ...]:
    """The names of what a window moves along: L, or H and W, or T, H and W."""
    return AXES[len(window.kernel_size)]


def _check_fits(window: SequenceWindow | VolumeWindow, what: str, *size: int) -> None:
    pad = window.pad
    for axis, side in enumerate(size):
        # The last axis comes first in `pad`.
        around = pad[2 * (len(size) - 1 - axis)] + pad[2 * (len(size) - 1 - axis) + 1]
        if side + around <= window.dilation[axis] * (window.kernel_size[axis] - 1):
            raise ShapeError(
                f"the window is larger than the padded {what}: kernel_size={window.kernel_size}, "
                f"dilation={window.dilation}, padding={pad}, {what} {'×'.join(map(str, size))}. "
                f"Use a larger {what} or more padding."
            )


def _sides(name: str, value: Size2, count: int) -> tuple[int, ...]:
    """An option of each axis, from one for all or one for each."""
    sides = tuple(value) if isinstance(value, tuple | list) else (value,) * count
    if len(sides) != count or any(isinstance(v, bool) or not isinstance(v, int) for v in sides):
        each = "a tuple of one" if count == 1 else f"a tuple of {count} ints"
        raise ShapeError(f"{name} must be an int or {each}, got {value!r}.")
    return sides
