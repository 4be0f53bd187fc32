"""What the convolutions of images, of sequences and of volumes have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from pacswap import ops
from pacswap.errors import ShapeError
from pacswap.nn.adaptive import ADDED, Adaptive
from pacswap.nn.kernel import KernelOptions, kernel_for
from pacswap.nn.made import alike, made_class
from pacswap.nn.variants import Variant, plain_class, variant_of
from pacswap.ops.dimensions import AnyWindow, any_window

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AdaptiveConv(Adaptive):
    """Mixin of a subclass of `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.

    Attributes:
        heads: maps of each image that it filters, one after another, as inside attention: the
            kernel of an image serves all of them.
    """

    heads = 1
    _variant = Variant()  # another one in the classes that `adaptive_class` makes
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    weight: Tensor
    bias: Tensor | None
    training: bool

    @property
    def window(self) -> AnyWindow:
        """The geometry of this layer."""
        return any_window(
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )

    @property
    def filters(self) -> Tensor:
        """The weight that it convolves with, [C_out, C_in/groups, *kernel size].

        The stored one, but for shared filters and for the twins of layers that standardise theirs.
        """
        return self._filters()

    def _filters(self) -> Tensor:
        made = self._variant.weight
        return self.weight if made is None else made(self)

    def _start(self, blend: float, options: KernelOptions, *, own_kernel: bool = True) -> None:
        """Add what is adaptive, on the device and in the dtype of the weight."""
        kernel = None
        if own_kernel:
            made = {"device": self.weight.device, "dtype": self.weight.dtype}
            name, channels = type(self).__name__, self.in_channels
            kernel = kernel_for(name, self.window, options, channels=channels, **made)
        self._adapt(blend, kernel, self.weight, options)

    def forward(
        self, input: Tensor, guidance: Tensor | None = None, *, kernel: Tensor | None = None
    ) -> Tensor:
        """Convolve `input`, adapted to a guidance or by a kernel that was computed from one.

        Args:
            input: v, [B, C_in, *size] (or unbatched, like its companions), with the size (L,) or
                (T, H, W).
            guidance: f, [B, D, *size].
            kernel: K, [B, 1 or C_in, taps, *output size], instead of `guidance`.

        Returns:
            [B, C_out, *output size].

        Raises:
            GuidanceError: neither `guidance` nor `kernel` was given, or both.
            ShapeError: the tensors disagree.
        """
        if input.dim() == 1 + len(self.kernel_size):
            guidance, kernel = (None if t is None else t.unsqueeze(0) for t in (guidance, kernel))
            return self.forward(input.unsqueeze(0), guidance, kernel=kernel).squeeze(0)
        if self.is_resting:
            return self._convolved(input)
        return self._again(
            self._adapted, input, self._of_heads(self._kernel(guidance, kernel, like=input))
        )

    def _of_heads(self, kernel: Tensor) -> Tensor:
        return kernel if self.heads == 1 else kernel.repeat_interleave(self.heads, 0)

    def _adapted(self, input: Tensor, kernel: Tensor) -> Tensor:
        """PAC; at blend 0 the plain convolution to the last bit, with the kernel's gradient."""
        window, groups = self.window, self.groups
        if not self._is_plain():
            blended = self._blended(kernel, input.dtype)
            return ops.convolve(input, blended, self.filters, self.bias, window, groups, "auto")
        output = self._convolved(input)
        if not self._learns(kernel):
            return output
        blended = self._blended(kernel, input.dtype)
        return ops.attach_kernel_gradient(
            output, input, blended, self.filters, window=window, groups=groups
        )

    def _convolved(self, input: Tensor) -> Tensor:
        """What the layer was before, to the last bit: the forward of the class it was made from."""
        return super().forward(input)  # type: ignore[misc]

    @classmethod
    def from_conv(
        cls,
        conv: _ConvNd,
        *,
        blend: float = 0.0,
        own_kernel: bool = True,
        **kernel_options: Unpack[KernelOptions],
    ) -> Self:
        """The pixel-adaptive layer with a convolution's weights; `blend` starts at 0.

        The parameters are the convolution's own objects, not copies; mode, device, dtype and
        attributes are kept. The layer is of the convolution's class too (`StdConv2d`, say).

        Args:
            conv: a convolution of as many axes, or a subclass that `why_not_adapt` knows.
            blend: where the learnable blend starts.
            own_kernel: False for a layer that is always called with `kernel=`.
            **kernel_options: as for the class.

        Raises:
            ShapeError: the convolution's class computes something else than a convolution.
        """
        refusal = why_not_adapt(type(conv))
        if refusal is not None:
            raise ShapeError(f"{refusal}.")
        layer = alike(conv, adaptive_class(cls, type(conv)))
        layer._start(blend, kernel_options, own_kernel=own_kernel)
        return layer

    def to_conv(self) -> Any:
        """The plain convolution with this layer's weights as they are now, the same objects."""
        assert isinstance(self, nn.Module)
        return alike(self, plain_class(type(self)), without=ADDED)


def adaptive_class(layer: type[Any], plain: type[nn.Module]) -> type[Any]:
    """`layer` for convolutions of class `plain`: a subclass of both; the same one each time.

    >>> class Mine(nn.Conv2d):
    ...     pass
    >>> from pacswap.nn import PacConv2d
    >>> issubclass(adaptive_class(PacConv2d, Mine), Mine)
    True
    """
    if plain is plain_class(layer):
        return layer
    if (layer, plain) not in _classes:
        namespace: dict[str, Any] = {"__module__": __name__, "__doc__": layer.__doc__}
        namespace["_variant"] = variant_of(plain)
        bases = (layer, plain)
        name = f"Pac{plain.__name__}"
        _classes[layer, plain] = made_class(name, bases, namespace, adaptive_class, *bases)
    return _classes[layer, plain]


_classes: dict[tuple[type, type], type[Any]] = {}


def why_not_adapt(plain: type[nn.Module]) -> str | None:
    """Why convolutions of this class have no pixel-adaptive twin, or None."""
    if variant_of(plain) is not None:
        return None
    return (
        f"{plain.__name__} has a forward of its own, and what it computes would be lost. Known are "
        "torch.nn.Conv1d, Conv2d and Conv3d, their subclasses that leave forward alone, and timm's "
        "Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d and ScaledStdConv2dSame"
    )
