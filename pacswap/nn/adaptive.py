"""What all pixel-adaptive layers have in common: a blend, a kernel, a switch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import GuidanceError
from pacswap.nn.guidance import Like
from pacswap.nn.kernel import AdaptingKernel, KernelOptions
from pacswap.nn.recompute import recomputed
from pacswap.ops.transforms import is_transformed

MASKED = "a mask enters where K is made. Call the layer as layer(input, guidance, mask=…)."


# What a layer gains when it becomes adaptive; what surgery adds under it too.
ADDED = (
    "blend",
    "adapting_kernel",
    "enabled",
    "held",
    "recompute",
    "guided_by",
    "supply",
    "shared_filters",
    "guidance",
    "heads",
)


class Adaptive:
    """Mixin of a layer that adapts to a guidance.

    At `blend` = 0 the layer is what it was before (a convolution, a pooling, nothing at all), and
    `blend` has a gradient there; at 1 it is the paper's. It owns an `adapting_kernel`, or is given
    the kernel that another layer's made.

    Attributes:
        blend: learnable scalar, dimensionless.
        adapting_kernel: from a guidance to K; None for a layer that is always called with
            `kernel=` (it shares another's, or its form is `external`).
        takes_kernel: whether it can be called with `kernel=`; a CRF makes its kernels itself.
        enabled: False inside `pacswap.disabled`: the layer is then what it was before.
        held: whether `rest` was called; `is_resting` says whether that still holds.
        recompute: whether the backward pass computes again what the layer adapts, instead of
            keeping it.
        guided_by: set by surgery, for the message of a call that forgets the guidance.
        supply: set by surgery: from what has the layer's resolution to the kernel of the call that
            runs now, or to None.
    """

    takes_kernel = True
    # On the class too: layers that an earlier version pickled have them not.
    held: bool = False
    recompute: bool = False
    blend: nn.Parameter
    adapting_kernel: AdaptingKernel | None
    enabled: bool
    guided_by: str | None
    supply: Callable[[Like], Tensor | None] | None

    def _adapt(
        self,
        blend: float,
        kernel: AdaptingKernel | None,
        like: Tensor | None,
        options: KernelOptions,
    ) -> None:
        """Add what is adaptive; device and dtype are those of `like`."""
        zero = torch.zeros(()) if like is None else like.new_zeros((), requires_grad=False)
        self.blend = nn.Parameter(torch.full_like(zero, blend))
        self.adapting_kernel = kernel
        self.enabled = True
        self.held = False
        self.recompute = options.get("recompute", False)
        self.guided_by = None
        self.supply = None

    def _kernel(
        self,
        guidance: Tensor | None,
        kernel: Tensor | None,
        mask: Tensor | None = None,
        like: Like | None = None,
    ) -> Tensor:
        """K, as it was given, from the guidance (and the mask of the input), or as supplied.

        Args:
            guidance: f.
            kernel: K.
            mask: of the input.
            like: what has the guidance's resolution, for a kernel that surgery supplies.

        Raises:
            GuidanceError: neither or both are given, or there is nothing to make K.
        """
        name = type(self).__name__
        if guidance is not None and kernel is not None:
            raise GuidanceError(f"{name} takes a guidance or a kernel, got both. Leave one out.")
        if kernel is not None:
            return kernel
        if guidance is None:
            supplied = None if self.supply is None or like is None else self.supply(like)
            if supplied is None:
                raise GuidanceError(self._missing_guidance())
            return supplied
        if self.adapting_kernel is None:
            raise GuidanceError(
                f"this {name} has no adapting kernel of its own: it shares another layer's, or its "
                "form is external. Call it with kernel=…"
            )
        masked = {} if mask is None else {"mask": mask}
        made = self.adapting_kernel(guidance, **masked)
        if made is None:
            raise GuidanceError(
                f"the adapting kernel of this {name} is disabled and the layer is not. Disable "
                "both: `with pacswap.disabled(model):`."
            )
        return made

    def received(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The kernel that a call with these arguments works with, if it is not given features.

        Args:
            args: of `forward`.
            kwargs: of `forward`.

        Returns:
            K as it was given, or as surgery supplies it; None if the layer makes it itself.
        """
        if kwargs.get("kernel") is not None or self.supply is None or not args:
            return kwargs.get("kernel")
        return self.supply(self._guided_like(args[0], kwargs))

    def _guided_like(self, input: Tensor, kwargs: Mapping[str, Any]) -> Like:
        """What has the resolution of the guidance of a call."""
        return input

    def _missing_guidance(self) -> str:
        if self.guided_by is None:
            name = type(self).__name__
            if self.takes_kernel and self.adapting_kernel is None:
                return f"{name} was called without a kernel. Call it with kernel=…"
            return f"{name} was called without a guidance. Call it as layer(input, guidance)."
        return (
            f"{self.guided_by} was called on a path through the model that does not compute its "
            "guidance. Call the model itself, or use `with pacswap.disabled(model):` to run that "
            "path as it was before the swap."
        )

    @property
    def is_resting(self) -> bool:
        """Whether nothing has to be computed for it: it is disabled, or its blend is fixed at 0.

        Fixed is a blend that does not learn (`blend.requires_grad_(False)`). On the CPU its value
        is looked at each time; elsewhere that would stall the device, and under a compiler there
        is no value, so there the layer rests if it was told to (`rest`). A layer that rests passes
        no gradient to its kernel and its guidance, and needs neither; if all that share a kernel
        or a guidance rest, it is not computed.
        """
        if not self.enabled:
            return True
        if self.blend.requires_grad:
            return False
        if self._is_readable():
            return self.blend.detach().item() == 0
        return self.held

    def rest(self) -> None:
        """Fix the blend at 0: the layer is what it was before, and nothing is computed for it.

        On any device and under a compiler. It ends when `blend` learns again
        (`blend.requires_grad_()`), or when a state_dict is loaded whose blend is not 0.
        """
        with torch.no_grad():
            self.blend.zero_()
        self.blend.requires_grad_(False)
        self.held = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        if self.held:
            self.held = not self.blend.is_meta and self.blend.detach().item() == 0

    def _again(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; with `recompute` the backward pass keeps the arguments alone."""
        return recomputed(function, *args) if self.recompute else function(*args)

    def _is_readable(self) -> bool:
        """Whether looking at the blend's value costs nothing, and says all that there is."""
        if self.blend.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed():
            return False
        return type(self.blend) in (nn.Parameter, Tensor)

    def _is_plain(self) -> bool:
        """Whether `blend` is exactly 0: what was there before is the answer to the last bit.

        Asked on the CPU only: elsewhere looking at a value would stall the device, and under a
        compiler there is no value to look at.
        """
        return self._is_readable() and self.blend.detach().item() == 0

    def _blended(self, kernel: Tensor, dtype: torch.dtype) -> Tensor:
        """K_a = 1 + blend·(K − 1) in the dtype of what it weighs.

        Of `lerp` the backward pass keeps K, which is there anyway, and not K − 1.
        """
        # In a half precision K − 1 would round away what a small K is.
        wide = ops.compute_dtype(kernel.dtype)
        one = torch.ones((), dtype=wide, device=kernel.device)
        return torch.lerp(one, kernel.to(wide), self.blend.to(wide)).to(dtype)

    def _rests(self, *learning: Tensor) -> bool:
        """Whether what was there before is all that is asked for: neither value nor gradient more.

        Args:
            *learning: what may learn through the adapted part, beside the blend.
        """
        return self._is_plain() and not self._learns(*learning)

    def _learns(self, *learning: Tensor) -> bool:
        """Whether the blend, or what is named beside it, asks for a gradient."""
        learns = any(tensor.requires_grad for tensor in (self.blend, *learning))
        return torch.is_grad_enabled() and learns

    def _toward(self, plain: Tensor, adapted: Tensor) -> Tensor:
        """Plain + blend · (adapted − plain): exactly `plain` at 0 and `adapted` at 1.

        Args:
            plain: what was there before, any shape.
            adapted: the same shape.

        Returns:
            The shape and dtype of `plain`.
        """
        adapted = adapted.to(plain.dtype)
        if self._is_plain():
            return _AtZero.apply(plain, adapted, self.blend)
        return torch.lerp(plain, adapted, self.blend.to(plain.dtype))


class _AtZero(torch.autograd.Function):
    """`plain` to the last bit, infinities too, where 0 · (∞ − x) would be NaN."""

    @staticmethod
    def forward(plain: Tensor, adapted: Tensor, blend: Tensor) -> Tensor:
        return plain.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain, adapted, blend = ctx.saved_tensors
        difference = adapted - plain
        difference = torch.where(difference.isfinite(), difference, 0.0)
        factor = blend.to(grad.dtype)
        return grad * (1 - factor), grad * factor, (grad * difference).sum().to(blend.dtype)
