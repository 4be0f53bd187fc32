"""From a layer's output to adapting features: concatenate, add positions, project, resize."""

from __future__ import annotations

from typing import Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap.errors import ShapeError

Resize: TypeAlias = Literal["bilinear", "nearest", "area"]


class Guidance(nn.Module):
    """Adapting features from one or several feature maps.

    The order is: resize to the first map and concatenate, prepend positions, stop the gradient,
    project. The resolution of a layer is reached afterwards, by `resize_guidance`, so that one
    projection serves layers at several resolutions.

    Args:
        in_channels: D of the concatenated maps, positions included; None if it is not known and
            nothing is projected.
        channels: project to so many channels by a 1×1 convolution; None leaves them as they are.
            The projection has no bias: a constant cancels in f_p − f_q and could not learn.
        position: prepend two channels, the column and the row of each pixel.
        detach: stop the gradient into the layers that compute the maps.
        device: of the projection.
        dtype: of the projection.

    Raises:
        ShapeError: a projection of a single channel, which would be a mere scale.

    Example:
        >>> Guidance(64, 16)(torch.rand(1, 64, 8, 8)).shape
        torch.Size([1, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int | None,
        channels: int | None = None,
        *,
        position: bool = False,
        detach: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refusal = why_not_project(in_channels, channels)
        if refusal is not None:
            raise ShapeError(refusal)
        self.in_channels, self.channels = in_channels, channels
        self.position, self.detach = position, detach
        # False inside `pacswap.disabled`: nothing is computed.
        self.enabled = True
        self.project: nn.Conv2d | None = None
        if channels is not None and in_channels is not None:
            # Built on meta: no random number of the user's is consumed, surgery is reproducible.
            self.project = nn.Conv2d(in_channels, channels, 1, bias=False, device="meta")
            weight = _orthogonal(channels, in_channels).to(device=device, dtype=dtype)
            self.project.weight = nn.Parameter(weight[:, :, None, None])

    def forward(self, *features: Tensor) -> Tensor | None:
        """Adapting features [B, D, H, W] of maps [B, D_i, H_i, W_i], as large as the first one."""
        if not self.enabled:
            return None
        first = features[0]
        if self.project is not None and len(features) > 1 and not self.position:
            return self._projected(features)
        maps = [resize_guidance(f, first, "bilinear") for f in features]
        if self.position:
            maps = [_positions(first), *maps]
        joined = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        if self.detach:
            joined = joined.detach()
        return joined if self.project is None else self.project(joined)

    def _projected(self, features: tuple[Tensor, ...]) -> Tensor:
        """Project each map at its own resolution, then resize and add.

        That is the projection of the concatenation, because both are linear, without 64 channels of
        an early layer at the resolution of the image. A map of few channels (the image) is resized
        before it is projected, which is less work.
        """
        assert self.project is not None
        total: Tensor | None = None
        start = 0
        for f in features:
            few = f.shape[1] < self.project.out_channels
            weight = self.project.weight[:, start : start + f.shape[1]]
            start += f.shape[1]
            part = f.detach() if self.detach else f
            part = resize_guidance(part, features[0], "bilinear") if few else part
            part = F.conv2d(part, weight)
            part = resize_guidance(part, features[0], "bilinear")
            total = part if total is None else total + part
        assert total is not None
        return total

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return (
            f"{self.in_channels}, {self.channels}, position={self.position}, detach={self.detach}"
        )


Like: TypeAlias = "Tensor | tuple[int, int]"


@overload
def resize_guidance(guidance: Tensor, like: Like, mode: Resize) -> Tensor: ...


@overload
def resize_guidance(guidance: None, like: Like, mode: Resize) -> None: ...


def resize_guidance(guidance: Tensor | None, like: Like, mode: Resize) -> Tensor | None:
    """Bring adapting features to a layer's resolution.

    Args:
        guidance: [B, D, H, W], or None where guidance is disabled.
        like: what has the resolution: a tensor [B, C, H', W'] or (H', W').
        mode: `"bilinear"` (the paper's), `"nearest"` or `"area"` (average pooling, for much smaller
            targets).

    Returns:
        [B, D, H', W'].
    """
    if guidance is None:
        return None
    size = size_of(like)
    if same_size(size_of(guidance), size):
        return guidance
    if mode == "bilinear":
        return F.interpolate(guidance, size=size, mode=mode, align_corners=False)
    return F.interpolate(guidance, size=size, mode=mode)


def size_of(like: Like) -> tuple[int, int]:
    """(H, W) of a tensor [B, C, H, W], or of itself."""
    return like if isinstance(like, tuple) else (like.shape[-2], like.shape[-1])


def same_size(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two resolutions are one; under a compiler, whether they are for every image.

    A compiler that compared the sizes of its example would refuse all images that round otherwise.

    Args:
        one: (H, W).
        other: (H, W).
    """
    if not torch.compiler.is_compiling():
        return one == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(one[0] == other[0]) and statically_known_true(one[1] == other[1])


def why_not_project(in_channels: int | None, channels: int | None) -> str | None:
    """Why a guidance of so many channels cannot be projected to `channels`, or None if it can."""
    if channels is not None and channels < 1:
        return f"channels must be at least 1, got {channels}"
    if channels is not None and in_channels is None:
        return "the number of channels to project from is not known"
    if channels is not None and in_channels == 1:
        return (
            "a guidance of 1 channel cannot be projected: the 1×1 convolution would be a mere "
            "scale, which the standardisation undoes. Leave channels out"
        )
    return None


def _orthogonal(rows: int, columns: int) -> Tensor:
    """A fixed random matrix with orthonormal rows or columns."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    basis = torch.linalg.qr(gaussian)[0]
    return basis if rows >= columns else basis.T.contiguous()


def _positions(like: Tensor) -> Tensor:
    """Column and row of each pixel, [B, 2, H, W], in −1 … 1 along the longer side."""
    H, W = like.shape[-2:]
    scale = 2.0 / max(H, W)
    x = (torch.arange(W, device=like.device, dtype=like.dtype) - (W - 1) / 2) * scale
    y = (torch.arange(H, device=like.device, dtype=like.dtype) - (H - 1) / 2) * scale
    grid = torch.stack([x.expand(H, W), y[:, None].expand(H, W)])
    return grid.expand(like.shape[0], 2, H, W)
