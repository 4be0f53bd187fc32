"""`PacCRF`: mean-field inference in a dense CRF whose pairwise terms adapt to the image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pacswap import ops
from pacswap.errors import GuidanceError, ShapeError, nearest_hint, quoted
from pacswap.nn.adaptive import Adaptive
from pacswap.nn.blur import reduced, restored
from pacswap.nn.kernel import KernelOptions
from pacswap.nn.pairwise import Factors, PairwiseKernel, PairwiseTerm
from pacswap.ops.kernel import check_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PAPERS = PairwiseKernel()
OUTPUTS = ("log_q", "softmax", "log_softmax")

# Taps along a side of a smoothness term made by `from_densecrf`: it is a plain convolution, cheap.
_SMOOTHNESS_TAPS = 33


class PacCRF(Adaptive, nn.Module):
    """Mean field over a CRF with pixel-adaptive messages (Su et al., CVPR 2019, section 4.2).

    log Q starts as the unary; each step makes Q = softmax(log Q) and then
    log Q = w_u·unary − Σ_k message_k(Q). With the defaults it is the paper's; the adapting kernels
    are computed once for all steps. At `blend` = 0, where surgery starts, log Q is the unary,
    exactly; in between, unary + blend·(log Q − unary).

    Args:
        channels: C, the number of labels.
        kernels: the pairwise terms, one or several.
        steps: of the iteration.
        shared_steps: False gives each step weights of its own (σ of colour and position stay
            shared).
        unary_weight: where w_u starts.
        output: `"log_q"` (logits), `"softmax"` or `"log_softmax"` of them.
        blend: where the learnable blend starts.
        device: of the parameters.
        dtype: of the parameters.
        **kernel_options: how K is made, as for `AdaptingKernel`, the same for all terms; the
            bandwidth is each term's `color`. `normalize` is of K times the position factor.
            `learnable=False` keeps the scales σ as buffers.

    Attributes:
        kernels: the terms, `PairwiseTerm`s; `kernels.<i>.adapting_kernel` is None in one that has
            no colour.
        unary_weight: w_u, [1] or [steps].

    Raises:
        ShapeError: an option is out of range.

    Example:
        >>> crf = PacCRF(21, [PairwiseKernel(dilation=4, color=0.1), PairwiseKernel(color=None)])
        >>> crf(torch.rand(1, 21, 64, 64), torch.rand(1, 3, 64, 64)).shape
        torch.Size([1, 21, 64, 64])
    """

    takes_kernel = False

    def __init__(
        self,
        channels: int,
        kernels: PairwiseKernel | Sequence[PairwiseKernel] = _PAPERS,
        *,
        steps: int = 5,
        shared_steps: bool = True,
        unary_weight: float = 1.0,
        output: Literal["log_q", "softmax", "log_softmax"] = "log_q",
        blend: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kernel_options: Unpack[KernelOptions],
    ) -> None:
        super().__init__()
        terms = [kernels] if isinstance(kernels, PairwiseKernel) else list(kernels)
        _check(channels, terms, steps, unary_weight, output, kernel_options)
        self.channels, self.steps, self.output = channels, steps, output
        own = 1 if shared_steps else steps
        self.unary_weight = nn.Parameter(
            torch.full((own,), float(unary_weight), device=device, dtype=dtype)
        )
        self.kernels = nn.ModuleList(
            PairwiseTerm(channels, kernel, steps=own, device=device, dtype=dtype, **kernel_options)
            for kernel in terms
        )
        self._adapt(blend, None, self.unary_weight, kernel_options)

    @property
    def terms(self) -> list[PairwiseTerm]:
        """The pairwise terms, by their type."""
        return [term for term in self.kernels if isinstance(term, PairwiseTerm)]

    def forward(
        self, unary: Tensor, guidance: Tensor | Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """Infer labels from what each pixel says alone and from its neighbours.

        Args:
            unary: logits, [B, C, H, W].
            guidance: f, [B, D, H, W], for all terms, or a sequence with one for each; a term
                without colour takes None.

        Returns:
            [B, C, H, W], the dtype of `unary`; logits, probabilities or their logarithms, as
            `output` says.

        Raises:
            GuidanceError: a term looks at the guidance and there is none.
            ShapeError: the tensors disagree.
        """
        if self.is_resting:
            return self._finished(unary)
        guidances = self._guidances(unary, guidance)
        if self._rests():
            return self._finished(unary)
        return self._again(self._blended_labels, unary, *guidances)

    def _blended_labels(self, unary: Tensor, *guidances: Tensor | None) -> Tensor:
        logits = unary.to(ops.compute_dtype(unary.dtype))
        log_q = self._inferred(logits, unary.dtype, guidances)
        return self._finished(self._toward(logits, log_q)).to(unary.dtype)

    def _inferred(
        self, logits: Tensor, dtype: torch.dtype, guidances: Sequence[Tensor | None]
    ) -> Tensor:
        """Log Q after all steps; beliefs and messages have the dtype that the caller's have."""
        # Only their shape counts before the first step.
        beliefs = self._blurred(logits.to(dtype))
        factors = self._factors(guidances, beliefs)
        size = (logits.shape[-2], logits.shape[-1])
        log_q = logits
        for step in range(self.steps):
            beliefs = self._blurred(F.softmax(log_q, dim=1).to(dtype))
            weight = self.unary_weight[step if self.unary_weight.shape[0] > 1 else 0]
            log_q = logits * weight.to(logits.dtype)
            for term, factor in zip(self.terms, factors, strict=True):
                blur = term.options.blur
                log_q = log_q - restored(term.message(beliefs[blur], factor, step), blur, size)
        return log_q

    def _blurred(self, image: Tensor) -> dict[int, Tensor]:
        """The image at each term's resolution, by the blur."""
        return {blur: reduced(image, blur) for blur in {term.options.blur for term in self.terms}}

    def _factors(
        self, guidances: Sequence[Tensor | None], like: Mapping[int, Tensor]
    ) -> list[Factors]:
        """What is the same in every step; each guidance is blurred once."""
        blurred: dict[tuple[int, int], Tensor] = {}
        made = []
        for term, guidance in zip(self.terms, guidances, strict=True):
            blur = term.options.blur
            if guidance is not None:
                key = (id(guidance), blur)
                if key not in blurred:
                    blurred[key] = reduced(guidance, blur)
                guidance = blurred[key]
            made.append(term.factors(guidance, like[blur]))
        return made

    def _guidances(
        self, unary: Tensor, guidance: Tensor | Sequence[Tensor | None] | None
    ) -> list[Tensor | None]:
        """One for each term, None for one that does not look at it; checked."""
        if unary.dim() != 4 or unary.shape[1] != self.channels:
            raise ShapeError(
                f"unary must be [B, C, H, W] with C = {self.channels}, got {list(unary.shape)}."
            )
        terms = self.terms
        if guidance is None or isinstance(guidance, Tensor):
            given: list[Tensor | None] = [guidance] * len(terms)
        else:
            given = list(guidance)
        if len(given) != len(terms):
            raise ShapeError(
                f"this PacCRF has {len(terms)} kernels, got {len(given)} guidances. Give one for "
                "each, or one tensor for all."
            )
        given = [g if term.is_guided else None for term, g in zip(terms, given, strict=True)]
        B, _, H, W = unary.shape
        for term, g in zip(terms, given, strict=True):
            if g is None and term.is_guided:
                raise GuidanceError(self._missing_guidance())
            if g is not None and (g.dim() != 4 or (g.shape[0], *g.shape[2:]) != (B, H, W)):
                raise ShapeError(
                    f"guidance must be [B, D, H, W] = [{B}, D, {H}, {W}], as large as the unary, "
                    f"got {list(g.shape)}."
                )
        return given

    def _finished(self, log_q: Tensor) -> Tensor:
        if self.output == "softmax":
            return F.softmax(log_q, dim=1)
        return F.log_softmax(log_q, dim=1) if self.output == "log_softmax" else log_q

    def macs(self, pixels: int) -> int:
        """Multiply-accumulates of all steps on so many pixels of the unary, without making K."""
        return self.steps * sum(term.macs(pixels) for term in self.terms)

    def extra_repr(self) -> str:
        """The options, as `print(model)` shows them."""
        shared = self.unary_weight.shape[0] == 1 or self.steps == 1
        words = f"{self.channels}, steps={self.steps}, output={self.output!r}"
        return words if shared else f"{words}, shared_steps=False"

    @classmethod
    def from_densecrf(
        cls,
        channels: int,
        *,
        gaussian: Iterable[Mapping[str, Any]] = ({"sxy": 3, "compat": 3},),
        bilateral: Iterable[Mapping[str, Any]] = ({"sxy": 80, "srgb": 13, "compat": 10},),
        steps: int = 5,
        reach: float = 2.0,
        taps: int = 11,
        blur: int = 1,
        output: Literal["log_q", "softmax", "log_softmax"] = "log_q",
        blend: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PacCRF:
        """The PAC-CRF nearest to a fully connected one, in the words of pydensecrf.

        `gaussian` holds what `addPairwiseGaussian(sxy, compat)` takes, `bilateral` what
        `addPairwiseBilateral(sxy, srgb, rgbim, compat)` does; the defaults are those of DeepLab's
        examples. Every number is where a parameter starts; all of them can be learned.

        Units. `sxy`: pixels of the unary. `srgb`: units of the guidance, so feed the image in
        0..255 for the usual values (divide `srgb` by 255 for an image in 0..1). The unary is a
        logit, pydensecrf's unary an energy: unary = −U = log p + any constant. `compat` is in units
        of the logit: a number w is Potts and adds w·Σ K̃·Q to a label's log Q; a vector v subtracts
        v[l]·Σ K̃·Q_l; a C×C matrix M, made symmetric as pydensecrf does, subtracts M·Σ K̃·Q.

        What differs. All pairs become a window of `taps`×`taps` pixels that reaches `reach`·sxy
        from its centre: the farther, the more apart the taps (`dilation`), so that a large sxy is
        sampled, not summed. A smoothness term is a plain convolution and takes up to 33 taps along
        a side. K̃ is K over the sum of the window at the pixel, where pydensecrf's default divides
        by the square root at both ends; a pixel is counted in that sum but does not speak to
        itself.

        Args:
            channels: C, the number of labels.
            gaussian: smoothness terms: `sxy`, `compat`.
            bilateral: terms that look at colours: `sxy`, `srgb`, `compat`.
            steps: of the iteration.
            reach: of the window, in units of sxy.
            taps: along a side of the window of a bilateral term, odd: finer and slower, as its
                square.
            blur: of the bilateral terms, as for `PairwiseKernel`: denser and faster, but borders
                get as coarse.
            output: as for the class, like the rest.
            blend: where the learnable blend starts.
            device: of the parameters.
            dtype: of the parameters.

        Raises:
            ShapeError: a term or an option is out of range.

        Example:
            >>> crf = PacCRF.from_densecrf(21, bilateral=[{"sxy": 50, "srgb": 5, "compat": 4}])
            >>> [term.window.dilation for term in crf.terms]
            [(1, 1), (20, 20)]
        """
        if type(taps) is not int or taps < 3 or taps % 2 == 0:
            raise ShapeError(f"taps must be an odd int of at least 3, got {taps!r}.")
        if not (reach > 0 and math.isfinite(reach)):
            raise ShapeError(f"reach must be positive and finite, got {reach!r}.")
        kernels, matrices = [], []
        for words, asked, most in (
            (("sxy", "compat"), gaussian, _SMOOTHNESS_TAPS),
            (("sxy", "srgb", "compat"), bilateral, taps),
        ):
            for term in asked:
                _check_words(term, words)
                factor = blur if "srgb" in words else 1
                matrices.append(_matrix(term["compat"], channels))
                kernels.append(_pairwise(term, reach, most, factor, matrices[-1]))
        crf = cls(
            channels,
            kernels,
            steps=steps,
            output=output,
            blend=blend,
            device=device,
            dtype=dtype,
            normalize="sum",
        )
        with torch.no_grad():
            for made, matrix in zip(crf.terms, matrices, strict=True):
                if made.compatibility is not None and matrix is not None:
                    made.compatibility.copy_(matrix[:, :, None, None])
        return crf


def _check(
    channels: int,
    kernels: Sequence[PairwiseKernel],
    steps: int,
    unary_weight: float,
    output: str,
    options: KernelOptions,
) -> None:
    """Raise unless a PacCRF knows these options."""
    for name, number in (("channels", channels), ("steps", steps)):
        if type(number) is not int or number < 1:
            raise ShapeError(f"{name} must be an int of at least 1, got {number!r}.")
    if not kernels or not all(isinstance(kernel, PairwiseKernel) for kernel in kernels):
        raise ShapeError(f"kernels must be one or more PairwiseKernel, got {kernels!r}.")
    if not math.isfinite(unary_weight):
        raise ShapeError(f"unary_weight must be finite, got {unary_weight!r}.")
    if output not in OUTPUTS:
        raise ShapeError(f"output={output!r} is unknown. {nearest_hint(str(output), OUTPUTS)}")
    if "bandwidth" in options:
        raise ShapeError(
            f"the bandwidth of a pairwise kernel is its color, got bandwidth={options['bandwidth']}"
            ". Give PairwiseKernel(color=…)."
        )
    check_options(
        form=options.get("form", "gaussian"),
        distance=options.get("distance", "sum"),
        normalize=options.get("normalize", "none"),
        bandwidth=1.0,
        asymmetric=options.get("asymmetric", False),
    )


def _check_words(term: Mapping[str, Any], words: tuple[str, ...]) -> None:
    """Raise unless a term in pydensecrf's words has them all, and numbers where they belong."""
    if sorted(term) != sorted(words):
        raise ShapeError(f"a term needs {quoted(words)}, got {quoted(sorted(map(str, term)))}.")
    for name in words[:-1]:
        value = term[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ShapeError(f"{name} must be a positive number, got {value!r}.")


def _matrix(compat: Any, channels: int) -> Tensor | None:
    """The energies between labels, [C, C]; None for a number (Potts)."""
    matrix = torch.as_tensor(compat, dtype=torch.float64)
    if matrix.dim() == 0:
        return None
    if tuple(matrix.shape) not in ((channels,), (channels, channels)):
        raise ShapeError(
            f"compat must be a number, [C] = [{channels}] or [C, C], got {list(matrix.shape)}."
        )
    return torch.diag(matrix) if matrix.dim() == 1 else (matrix + matrix.T) / 2


def _pairwise(
    term: Mapping[str, Any], reach: float, most: int, blur: int, matrix: Tensor | None
) -> PairwiseKernel:
    """The window of at most `most` taps along a side that reaches far enough."""
    radius = max(1, math.ceil(reach * term["sxy"] / blur))
    dilation = math.ceil(radius / (most // 2))
    return PairwiseKernel(
        kernel_size=2 * math.ceil(radius / dilation) + 1,
        dilation=dilation,
        blur=blur,
        compatibility="potts" if matrix is None else "2d",
        spatial_filter=False,
        weight=float(term["compat"]) if matrix is None else 1.0,
        color=term.get("srgb"),
        position=term["sxy"],
    )
