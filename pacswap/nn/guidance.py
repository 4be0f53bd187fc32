"""From a layer's output to adapting features: concatenate, add positions, project, resize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap.errors import GuidanceError, ShapeError

Resize: TypeAlias = Literal["bilinear", "nearest", "area"]

# By the number of axes: what a map is called, its projection and its interpolation.
NAMES = {1: "a sequence [B, D, L]", 2: "a map [B, D, H, W]", 3: "a video [B, D, T, H, W]"}
_LAYERS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_POINTWISE: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    1: F.conv1d,
    2: F.conv2d,
    3: F.conv3d,
}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


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
        position: prepend two channels, the column and the row of each pixel (of a sequence one,
            its place; of a video three, the frame last).
        detach: stop the gradient into the layers that compute the maps.
        axes: 2 for maps, 1 for sequences, 3 for videos: the shape of the projection's weight,
            [channels, in_channels, 1, 1] for maps.
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
        axes: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refusal = why_not_project(in_channels, channels)
        if refusal is not None:
            raise ShapeError(refusal)
        if axes not in _LAYERS:
            raise ShapeError(f"axes must be 1, 2 or 3, got {axes!r}.")
        self.in_channels, self.channels = in_channels, channels
        self.position, self.detach = position, detach
        # False inside `pacswap.disabled`: nothing is computed.
        self.enabled = True
        self.project: nn.Conv1d | nn.Conv2d | nn.Conv3d | None = None
        if channels is not None and in_channels is not None:
            # Built on meta: no random number of the user's is consumed, surgery is reproducible.
            self.project = _LAYERS[axes](in_channels, channels, 1, bias=False, device="meta")
            weight = _orthogonal(channels, in_channels).to(device=device, dtype=dtype)
            self.project.weight = nn.Parameter(weight.view(self.project.weight.shape))

    def forward(self, *features: Tensor | None) -> Tensor | None:
        """Adapting features of maps, as large as the first one.

        Args:
            *features: [B, D_i, H_i, W_i]; or sequences [B, D_i, L_i], or videos
                [B, D_i, T_i, H_i, W_i]; None where all layers rest that it is for.

        Returns:
            [B, D, H, W], [B, D, L] or [B, D, T, H, W]; None inside `pacswap.disabled`, and of None.
        """
        given = tuple(f for f in features if f is not None)
        if not self.enabled or len(given) < len(features):
            return None
        first = given[0]
        if self.project is not None and len(given) > 1 and not self.position:
            return self._projected(given)
        maps = [resize_guidance(f, first, "bilinear") for f in given]
        if self.position:
            maps = [_positions(first), *maps]
        joined = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        if self.detach:
            joined = joined.detach()
        if self.project is None:
            return joined
        if joined.dim() == self.project.weight.dim():
            return self.project(joined)
        return _pointwise(joined, self.project.weight)

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
            part = _pointwise(part, weight)
            part = resize_guidance(part, features[0], "bilinear")
            total = part if total is None else total + part
        assert total is not None
        return total

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        return (
            f"{self.in_channels}, {self.channels}, position={self.position}, detach={self.detach}"
        )


Like: TypeAlias = "Tensor | tuple[int, ...]"


@overload
def resize_guidance(guidance: Tensor, like: Like, mode: Resize) -> Tensor: ...


@overload
def resize_guidance(guidance: None, like: Like, mode: Resize) -> None: ...


def resize_guidance(guidance: Tensor | None, like: Like, mode: Resize) -> Tensor | None:
    """Bring adapting features to a layer's resolution.

    A map guides a layer over videos as the same map at every frame. A layer over sequences is
    guided by a map or a video as `to_sequence` reads it.

    Args:
        guidance: [B, D, H, W], [B, D, L] or [B, D, T, H, W], or None where guidance is disabled.
        like: what has the resolution: a tensor [B, C, H', W'] or (H', W'), or with the axes of a
            sequence or a video.
        mode: `"bilinear"` (the paper's; linear along sequences, trilinear in videos), `"nearest"`
            or `"area"` (average pooling, for much smaller targets).

    Returns:
        [B, D, H', W'], or with the axes of `like`.

    Raises:
        GuidanceError: a sequence for a map or a video, or a video for a map.

    Example:
        >>> resize_guidance(torch.rand(1, 3, 8, 8), (4, 16, 16), "bilinear").shape
        torch.Size([1, 3, 4, 16, 16])
    """
    if guidance is None:
        return None
    size = size_of(like)
    if same_size(size_of(guidance), size):
        return guidance
    axes = guidance.dim() - 2
    if len(size) == 1 and axes > 1:
        guidance, axes = to_sequence(guidance), 1
    if axes == 2 and len(size) == 3:
        flat = resize_guidance(guidance, size[1:], mode)
        return flat.unsqueeze(2).expand(-1, -1, size[0], -1, -1)
    if axes != len(size):
        has, wants = (NAMES.get(n, f"a tensor of {2 + n} axes") for n in (axes, len(size)))
        raise GuidanceError(
            f"{has} cannot guide a layer over {wants}, got {list(guidance.shape)} for {size}. "
            "Choose a guidance with the layer's axes, or reduce it to them in the model."
        )
    if same_size(size_of(guidance), size):
        return guidance
    if mode == "bilinear":
        return F.interpolate(guidance, size=size, mode=_LINEAR[axes], align_corners=False)
    return F.interpolate(guidance, size=size, mode=mode)


def to_sequence(guidance: Tensor) -> Tensor:
    """A map's channels as a sequence: its channel descriptor, read along the channels.

    The mean over all places of each channel. That is what ECA's convolution, the one `Conv1d` of
    common image networks, reads of its own input; a guidance that it can be compared with is then
    another map's descriptor, resized to the number of the layer's channels.

    Args:
        guidance: [B, D, H, W] or [B, D, T, H, W].

    Returns:
        [B, 1, D].

    Example:
        >>> to_sequence(torch.rand(2, 64, 8, 8)).shape
        torch.Size([2, 1, 64])
    """
    return guidance.flatten(2).mean(2).unsqueeze(1)


def size_of(like: Like) -> tuple[int, ...]:
    """(H, W) of a tensor [B, C, H, W], (L,) of [B, C, L], (T, H, W) of [B, C, T, H, W]; or itself.

    >>> size_of(torch.rand(1, 3, 8, 9)), size_of((5,))
    ((8, 9), (5,))
    """
    return tuple(like) if isinstance(like, tuple) else tuple(like.shape[2:])


def same_size(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two resolutions are one; under a compiler, whether they are for every image.

    A compiler that compared the sizes of its example would refuse all images that round otherwise.

    Args:
        one: (H, W), or of a sequence or a video.
        other: likewise.

    Example:
        >>> same_size((8, 9), (8, 9)), same_size((8, 9), (8,))
        (True, False)
    """
    if not torch.compiler.is_compiling() or len(one) != len(other):
        return one == other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


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
    # On the CPU whatever torch's default device is: the same numbers everywhere.
    shape = (max(rows, columns), min(rows, columns))
    generator = torch.Generator("cpu").manual_seed(0)
    gaussian = torch.randn(shape, generator=generator, device="cpu")
    basis = torch.linalg.qr(gaussian)[0]
    return basis if rows >= columns else basis.T.contiguous()


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1×1 convolution over as many axes as `x` has; weight [channels, in_channels, 1, …]."""
    axes = x.dim() - 2
    return _POINTWISE[axes](x, weight.reshape(*weight.shape[:2], *[1] * axes))


def _positions(like: Tensor) -> Tensor:
    """Column, row and frame of each pixel, [B, axes, *size].

    Column and row are in −1 … 1 along the longer side of the image, the frame is by itself.
    """
    size = like.shape[2:]
    longest = max(size[-2:])
    places = []
    for axis in reversed(range(len(size))):
        side = size[axis]
        scale = 2.0 / (longest if axis >= len(size) - 2 else side)
        place = (torch.arange(side, device=like.device, dtype=like.dtype) - (side - 1) / 2) * scale
        # Along its own axis, the same along those behind it.
        places.append(place.view(-1, *[1] * (len(size) - 1 - axis)).expand(size))
    return torch.stack(places).expand(like.shape[0], -1, *size)
