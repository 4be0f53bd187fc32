"""`PacPool2d`: pooling in which the image decides how much each pixel of the window counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import GuidanceError, ShapeError, nearest_hint
from pacswap.nn.adaptive import MASKED, Adaptive
from pacswap.nn.kernel import KernelOptions, kernel_for
from pacswap.ops.window import Size2, make_window

if TYPE_CHECKING:
    from typing_extensions import Unpack

POOLS = ("average", "max")


class PacPool2d(Adaptive, nn.Module):
    """Pixel-adaptive pooling: y_p = Σ_q K(f_p, f_q)·v_q (Su et al., CVPR 2019, section 3.3).

    At `blend` = 1 it is the paper's; at 0, where surgery starts, the plain pooling, exactly; in
    between, plain + blend·(adapted − plain). With the inverse form, a smoothed centre and
    `normalize="sum"` it is detail-preserving pooling (Saeedan et al., CVPR 2018).

    Args:
        kernel_size: KH, KW.
        stride: pixels between outputs; the window's size by default.
        padding: pixels.
        dilation: pixels between taps.
        ceil_mode: let a last window hang over the right and the bottom.
        plain: what it is at blend 0, `"average"` (of the pixels inside the image) or `"max"`.
        blend: where the learnable blend starts.
        channels: C; needed by the inverse form with `channel_wise` for an α and λ of each channel.
        device: of the parameters.
        dtype: of the parameters.
        **kernel_options: how K is made, as for `AdaptingKernel`; the paper's default does not
            normalise, `normalize="sum"` makes it an average.

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> layer = PacPool2d(2, normalize="sum")
        >>> layer(torch.rand(1, 8, 32, 32), torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 8, 16, 16])
    """

    def __init__(
        self,
        kernel_size: Size2,
        stride: Size2 | None = None,
        padding: Size2 = 0,
        dilation: Size2 = 1,
        ceil_mode: bool = False,
        *,
        plain: Literal["average", "max"] = "average",
        blend: float = 1.0,
        channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel_options: Unpack[KernelOptions],
    ) -> None:
        super().__init__()
        if plain not in POOLS:
            raise ShapeError(f"plain={plain!r} is unknown. {nearest_hint(str(plain), POOLS)}")
        self.window = make_window(
            kernel_size,
            stride=kernel_size if stride is None else stride,
            padding=padding,
            dilation=dilation,
            ceil=ceil_mode,
        )
        size, step, pad = self.window.kernel_size, self.window.stride, self.window.pad[2::-2]
        if plain == "max":
            self.plain: nn.Module = nn.MaxPool2d(
                size, step, pad, self.window.dilation, ceil_mode=ceil_mode
            )
        elif self.window.dilation != (1, 1):
            raise ShapeError(f"average pooling has no dilation, got dilation={dilation}.")
        else:
            self.plain = nn.AvgPool2d(size, step, pad, ceil_mode, count_include_pad=False)
        name, made = type(self).__name__, {"device": device, "dtype": dtype}
        kernel = kernel_for(name, self.window, kernel_options, channels=channels, **made)
        zero = torch.zeros((), device=device, dtype=dtype)
        self._adapt(blend, kernel, zero, kernel_options)

    def forward(
        self,
        input: Tensor,
        guidance: Tensor | None = None,
        *,
        kernel: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Any:
        """Pool `input`, adapted to a guidance or by a kernel that was computed from one.

        Args:
            input: v, [B, C, H, W] (or unbatched, like its companions).
            guidance: f, [B, D, H, W], at the resolution of `input`.
            kernel: K, [B, 1 or C, KH*KW, H_out, W_out], instead of `guidance`.
            mask: [B, 1, H, W], above 0 where the input is valid; with `guidance` only. An output
                that sees nothing valid is 0.

        Returns:
            [B, C, H_out, W_out]; with a mask, that and the output's mask [B, 1, H_out, W_out].

        Raises:
            GuidanceError: neither `guidance` nor `kernel` was given, or both.
            ShapeError: the tensors disagree.
        """
        if input.dim() == 3:
            given = (None if t is None else t.unsqueeze(0) for t in (guidance, kernel, mask))
            guidance, kernel, mask = given
            made = self.forward(input.unsqueeze(0), guidance, kernel=kernel, mask=mask)
            return made.squeeze(0) if mask is None else tuple(t.squeeze(0) for t in made)
        if mask is not None:
            return self._masked(input, guidance, kernel, mask)
        plain = self.plain(input)
        if self.is_resting:
            return plain
        kernel = self._kernel(guidance, kernel, like=input)
        return plain if self._rests(kernel) else self._again(self._pooled, plain, input, kernel)

    def _pooled(self, plain: Tensor, input: Tensor, kernel: Tensor) -> Tensor:
        return self._toward(plain, ops.pac_pool2d(input, kernel.to(input.dtype), self.window))

    def _masked(
        self, input: Tensor, guidance: Tensor | None, kernel: Tensor | None, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        valid = ops.valid_taps(mask, self.window)
        seen = valid.any(2)
        # What is not valid may be anything, NaN too.
        filled = input.masked_fill(mask <= 0, 0)
        output = torch.where(seen, self._masked_plain(filled, mask, valid), 0.0)
        if self.enabled:
            if kernel is not None or guidance is None:
                raise GuidanceError(MASKED)
            made = self._kernel(guidance, None, mask).to(input.dtype)
            output = self._toward(output, ops.pac_pool2d(filled, made, self.window))
        return output * seen, seen.to(input.dtype)

    def _masked_plain(self, filled: Tensor, mask: Tensor, valid: Tensor) -> Tensor:
        """The plain pooling of what is valid."""
        if isinstance(self.plain, nn.MaxPool2d):
            return self.plain(filled.masked_fill(mask <= 0, -math.inf))
        counted = valid.to(filled.dtype)
        counted = counted / counted.sum(2, keepdim=True).clamp(min=1)
        return ops.pac_pool2d(filled, counted.expand(filled.shape[0], -1, -1, -1, -1), self.window)

    @classmethod
    def from_pool(
        cls,
        pool: nn.AvgPool2d | nn.MaxPool2d,
        *,
        blend: float = 0.0,
        own_kernel: bool = True,
        channels: int | None = None,
        like: Tensor | None = None,
        **kernel_options: Unpack[KernelOptions],
    ) -> PacPool2d:
        """The pixel-adaptive twin of a pooling layer, which it keeps as `plain`.

        Args:
            pool: a `torch.nn.AvgPool2d` or a `torch.nn.MaxPool2d`.
            blend: where the learnable blend starts.
            own_kernel: False for a layer that is always called with `kernel=`.
            channels: as for the class.
            like: a tensor whose device and dtype the parameters get.
            **kernel_options: as for the class.

        Raises:
            ShapeError: the layer returns indices, or an option is out of range.
        """
        if getattr(pool, "return_indices", False):
            raise ShapeError("a pooling with return_indices=True has no pixel-adaptive twin.")
        # Divided, as what averages has to be: an un-normalised sum leaves the range of float16.
        kernel_options.setdefault("normalize", "sum")
        layer = cls(
            pool.kernel_size,
            pool.stride,
            pool.padding,
            getattr(pool, "dilation", 1),
            pool.ceil_mode,
            plain="max" if isinstance(pool, nn.MaxPool2d) else "average",
            channels=channels,
            device=None if like is None else like.device,
            dtype=None if like is None else like.dtype,
            **kernel_options,
        )
        layer.plain = pool
        kernel = layer.adapting_kernel if own_kernel else None
        layer._adapt(blend, kernel, like, kernel_options)
        return layer.train(pool.training)

    def to_pool(self) -> nn.Module:
        """The plain pooling layer."""
        return self.plain

    def extra_repr(self) -> str:
        """The geometry, as `print(model)` shows it."""
        w = self.window
        return f"kernel_size={w.kernel_size}, stride={w.stride}, pad={w.pad}, ceil_mode={w.ceil}"
