"""Images as planes: each one long row with its border, so that a tap is an offset."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pacswap.ops.window import Window


@dataclass(frozen=True)
class Layout:
    """How a padded image [.., H', W'] lies in a plane for a window.

    Of an image that is looked at in steps, the pixels of each phase are together: what one tap sees
    for the whole output is then a stretch.

    Attributes:
        window: the geometry; its border is in the image already.
        padded: (H', W').
        size: (H_out, W_out).
    """

    window: Window
    padded: tuple[int, int]
    size: tuple[int, int]

    @property
    def phase(self) -> tuple[int, int]:
        """(rows, columns) of one phase."""
        down, across = self.window.stride
        return -(-self.padded[0] // down), -(-self.padded[1] // across)

    @property
    def row(self) -> int:
        """Numbers from an output to the one below."""
        return self.phase[1]

    @property
    def offsets(self) -> list[int]:
        """Of each tap, where what the first output sees lies in the plane."""
        rows, columns = self.phase
        down, across = self.window.stride
        found = []
        for tap_rows, tap_columns in self.window.slices(self.size):
            y, x = tap_rows.start, tap_columns.start
            phase = (y % down) * across + x % across
            found.append(phase * rows * columns + y // down * columns + x // across)
        return found

    def planes(self, image: Tensor) -> Tensor:
        """[B, C, H', W'] to contiguous [B, C, plane]."""
        if self.window.stride == (1, 1):
            return image.contiguous().flatten(2)
        rows, columns = self.phase
        down, across = self.window.stride
        right, below = columns * across - self.padded[1], rows * down - self.padded[0]
        whole = F.pad(image, (0, right, 0, below))
        phases = whole.unflatten(3, (columns, across)).unflatten(2, (rows, down))
        return phases.permute(0, 1, 3, 5, 2, 4).contiguous().flatten(2)

    def image(self, planes: Tensor) -> Tensor:
        """The inverse of `planes`."""
        if self.window.stride == (1, 1):
            return planes.unflatten(2, self.padded)
        (rows, columns), (down, across) = self.phase, self.window.stride
        phases = planes.unflatten(2, (down, across, rows, columns)).permute(0, 1, 4, 2, 5, 3)
        whole = phases.reshape(*planes.shape[:2], rows * down, columns * across)
        return whole[:, :, : self.padded[0], : self.padded[1]]

    def outputs(self, x: Tensor) -> Tensor:
        """[.., H_out, W_out] to contiguous [.., H_out·row], zeros between the rows."""
        return F.pad(x, (0, self.row - self.size[1])).flatten(-2)

    def sized(self, flat: Tensor) -> Tensor:
        """The inverse of `outputs`, a view."""
        return flat.unflatten(-1, (self.size[0], self.row))[..., : self.size[1]]
