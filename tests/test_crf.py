"""PacCRF: against mean field written as loops over pixels, and what a layer of it promises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from numerics import (
    DIFFERS,
    ONE_DIRECTION,
    assert_close64,
    assert_equal,
    fresh_memory_is_nan,
)
from torch import Tensor

from pacswap.nn import PacCRF, PairwiseKernel
from pacswap.nn.blur import reduced, restored
from pacswap.nn.pairwise import PairwiseTerm

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

C, D, H, W = 3, 2, 3, 4
KINDS = {
    "4d": {"compatibility": "4d"},
    "2d": {"compatibility": "2d"},
    "2d_unfiltered": {"compatibility": "2d", "spatial_filter": False},
    "potts": {"compatibility": "potts"},
    "potts_unfiltered": {"compatibility": "potts", "spatial_filter": False},
}
SCALES = {
    "color": {"color": 1.3},
    "color_position": {"color": 1.3, "position": 2.1},
    "position": {"color": None, "position": 2.1},
    "nothing": {"color": None},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_scale = pytest.mark.parametrize("scales", SCALES)
normalizations = pytest.mark.parametrize("normalize", ["none", "sum", "mean"])


def kernel_of(kind: str = "potts", scales: str = "color", **options) -> PairwiseKernel:
    return PairwiseKernel(**{"kernel_size": 7, **KINDS[kind], **SCALES[scales], **options})


def tensors(dtype: torch.dtype = torch.float64, size=(H, W)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    unary = 2 * torch.randn(2, C, *size, generator=generator, dtype=torch.float64)
    guidance = torch.randn(2, D, *size, generator=generator, dtype=torch.float64)
    return unary.to(dtype), guidance.to(dtype)


def shaken(crf: PacCRF) -> PacCRF:
    """The same CRF with every parameter moved away from where it starts."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in crf.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.2 * noise.to(parameter.dtype)
    return crf


def factor(term: PairwiseTerm, f: Tensor, p: tuple[int, int], q: tuple[int, int]) -> float:
    """K times the position factor, for two pixels of one image."""
    d = 0.0
    if term.adapting_kernel is not None:
        difference = f[:, p[0], p[1]] - f[:, q[0], q[1]]
        d += (difference**2).sum().item() / term.adapting_kernel.bandwidth.item() ** 2
    if term.log_position is not None:
        apart = (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2
        d += apart / math.exp(term.log_position.item()) ** 2
    return math.exp(-0.5 * d)


def energies(term: PairwiseTerm, step: int, offset: tuple[int, int]) -> Tensor:
    """What is subtracted from log Q of each label for a neighbour's label, [C, C], before K."""
    k = term.options.kernel_size
    y, x = offset[0] + k // 2, offset[1] + k // 2
    if term.options.compatibility == "4d":
        return term.of_step(term.weight, step)[:, :, y, x]
    spatial = 1.0 if term.weight is None else term.of_step(term.weight, step)[0, 0, y, x].item()
    if term.weight is None and offset == (0, 0):
        spatial = 0.0
    if term.options.compatibility == "2d":
        return spatial * term.of_step(term.compatibility, step)[:, :, 0, 0]
    strength = 1.0 if term.strength is None else term.of_step(term.strength, step).item()
    return -spatial * strength * torch.eye(C, dtype=torch.float64)


def divisor(term: PairwiseTerm, f: Tensor, p: tuple[int, int], pixels: list) -> float:
    if term.normalize == "none":
        return 1.0
    total = sum(factor(term, f, p, q) for q in pixels)
    if term.normalize == "sum":
        return total
    taps = term.options.kernel_size**2
    return (total + taps - len(pixels)) / taps


def mean_field(crf: PacCRF, unary: Tensor, guidance: Tensor) -> Tensor:
    """All pixels speak to all: what a window as large as the image comes to, without one."""
    pixels = list(itertools.product(range(unary.shape[2]), range(unary.shape[3])))
    images = []
    for u, f in zip(unary, guidance, strict=True):
        log_q = u
        for step in range(crf.steps):
            q = torch.softmax(log_q, 0)
            log_q = u * crf.unary_weight[step if len(crf.unary_weight) > 1 else 0]
            for term, here in itertools.product(crf.kernels, pixels):
                share = divisor(term, f, here, pixels)
                for there in pixels:
                    offset = there[0] - here[0], there[1] - here[1]
                    told = energies(term, step, offset) @ q[:, there[0], there[1]]
                    log_q[:, here[0], here[1]] -= factor(term, f, here, there) * told / share
        images.append(u + crf.blend * (log_q - u))
    return torch.stack(images)


@normalizations
@every_scale
@every_kind
@torch.no_grad()
def test_mean_field(kind, scales, normalize):
    crf = shaken(
        PacCRF(C, kernel_of(kind, scales), steps=2, normalize=normalize, dtype=torch.float64)
    )
    unary, guidance = tensors()
    assert_close64(crf(unary, guidance), mean_field(crf, unary, guidance))


@torch.no_grad()
def test_mean_field_of_two_kernels_and_loose_steps():
    kernels = [kernel_of("4d"), kernel_of("potts_unfiltered", "color_position")]
    crf = shaken(PacCRF(C, kernels, steps=3, shared_steps=False, dtype=torch.float64))
    unary, guidance = tensors()
    truth = mean_field(crf, unary, guidance)
    assert_close64(crf(unary, guidance), truth)
    first = crf.kernels[0]
    first.of_step(first.weight, 2).copy_(first.of_step(first.weight, 1))
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(crf(unary, guidance), truth)


@pytest.mark.parametrize("broken", ["centre", "sign", "color", "position", "normalize"])
@torch.no_grad()
def test_mean_field_sees(broken):
    crf = PacCRF(C, kernel_of("potts", "color_position"), normalize="sum", dtype=torch.float64)
    crf = shaken(crf)
    unary, guidance = tensors()
    truth = mean_field(crf, unary, guidance)
    term = crf.kernels[0]
    if broken == "centre":
        term.weight[..., 3, 3] += 0.01
    elif broken == "sign":
        term.weight.neg_()
    elif broken == "color":
        term.adapting_kernel.log_bandwidth += 0.001
    elif broken == "position":
        term.log_position += 0.001
    else:
        term.normalize = "mean"
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(crf(unary, guidance), truth)


def lively(crf: PacCRF) -> dict[str, bool]:
    """Which parameters get a gradient that is not zero."""
    unary, guidance = tensors(size=(5, 6))
    crf.zero_grad()
    crf(unary, guidance).square().sum().backward()
    return {name: bool(p.grad is not None and p.grad.any()) for name, p in crf.named_parameters()}


@pytest.mark.parametrize("blur", [1, 2])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "loose"])
@every_scale
@every_kind
def test_every_parameter_learns(kind, scales, shared, blur):
    kernel = kernel_of(kind, scales, kernel_size=3, blur=blur)
    crf = PacCRF(C, kernel, steps=2, shared_steps=shared, blend=0.0, dtype=torch.float64)
    assert [name for name, alive in lively(crf).items() if alive] == ["blend"]
    with torch.no_grad():
        crf.blend -= 0.1 * crf.blend.grad
    assert all(lively(crf).values())


def test_dead_parameters_are_seen():
    crf = PacCRF(C, kernel_of("2d"), steps=2, unary_weight=0.7, dtype=torch.float64)
    with torch.no_grad():
        crf.kernels[0].compatibility.zero_()
    alive = lively(crf)
    assert [name for name in alive if not alive[name]] == [
        "kernels.0.weight",
        "kernels.0.adapting_kernel.log_bandwidth",
    ]


@pytest.mark.parametrize("blur", [1, 2])
@every_scale
@every_kind
def test_gradients(kind, scales, blur):
    kernel = kernel_of(kind, scales, kernel_size=3, blur=blur)
    crf = shaken(PacCRF(C, kernel, steps=2, normalize="sum", dtype=torch.float64))
    names = [name for name, _ in crf.named_parameters()]
    unary, guidance = (t[:1].requires_grad_() for t in tensors())

    def run(unary: Tensor, guidance: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(crf, named, (unary, guidance))

    assert torch.autograd.gradcheck(run, (unary, guidance, *crf.parameters()), **ONE_DIRECTION)


@pytest.mark.parametrize("learns", [True, False])
def test_blend_0_is_the_unary(learns):
    crf = PacCRF(C, [kernel_of("4d"), kernel_of("2d", blur=2)], blend=0.0)
    unary, guidance = tensors(torch.float32)
    with torch.set_grad_enabled(learns):
        assert_equal(crf(unary, guidance).detach(), unary)
        crf.blend.data.fill_(1e-3)
        with pytest.raises(AssertionError, match="expected the same bits"):
            assert_equal(crf(unary, guidance).detach(), unary)


@torch.no_grad()
def test_blend_comes_before_the_output():
    unary, guidance = tensors()
    crf = PacCRF(C, kernel_of(), blend=0.3, dtype=torch.float64)
    log_q = crf(unary, guidance)
    crf.output = "softmax"
    assert_close64(crf(unary, guidance), log_q.softmax(1))
    crf.output = "log_softmax"
    assert_close64(crf(unary, guidance), log_q.log_softmax(1))
    crf.blend.zero_()
    assert_equal(crf(unary, guidance), unary.log_softmax(1))


@pytest.mark.parametrize("size", [(7, 9), (8, 6), (1, 5)], ids=str)
@pytest.mark.parametrize("blur", [2, 3, 4])
def test_blur_of_a_constant_is_that_constant(blur, size):
    image = torch.full((1, 2, *size), 0.7, dtype=torch.float64)
    small = reduced(image, blur)
    assert small.shape[2:] == tuple(-(-n // blur) for n in size)
    assert_close64(restored(small, blur, size), image)


def test_blur_keeps_places():
    """A ramp stays one in the middle; the twin, shifted by a pixel, does not."""
    ramp = torch.arange(24.0, dtype=torch.float64).expand(1, 1, 5, 24)
    for blur in (2, 3, 4):
        middle = restored(reduced(ramp, blur), blur, (5, 24))[..., 4:-4]
        assert_close64(middle, ramp[..., 4:-4])
        with pytest.raises(AssertionError, match=DIFFERS):
            assert_close64(middle, ramp[..., 3:-5])


GAUSSIAN, BILATERAL = {"sxy": 2.0, "compat": 1.5}, {"sxy": 2.5, "srgb": 0.8, "compat": 2.0}


def densecrf(**options) -> PacCRF:
    """Terms that reach over the whole of a small image, so that nothing is left out."""
    given = {"gaussian": [GAUSSIAN], "bilateral": [BILATERAL], "taps": 21, **options}
    return PacCRF.from_densecrf(C, dtype=torch.float64, **given)


@torch.no_grad()
def test_from_densecrf_is_dense_on_a_small_image():
    crf = densecrf()
    unary, guidance = tensors()
    assert_close64(crf(unary, guidance), mean_field(crf, unary, guidance))
    assert [term.options.position for term in crf.terms] == [2.0, 2.5]
    assert [term.options.color for term in crf.terms] == [None, 0.8]


@pytest.mark.parametrize(
    "compat",
    [[-2.0] * C, torch.diag(torch.full((C,), -2.0)).tolist()],
    ids=["vector", "matrix"],
)
@torch.no_grad()
def test_from_densecrf_compat(compat):
    """A number w attracts; a vector and a matrix are energies, so −w says the same."""
    given = tensors()
    truth = densecrf()(*given)
    same = densecrf(bilateral=[{**BILATERAL, "compat": compat}])
    assert_close64(same(*given), truth)
    opposite = densecrf(bilateral=[{**BILATERAL, "compat": [2.0] * C}])
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(opposite(*given), truth)


def test_from_densecrf_makes_a_matrix_symmetric():
    matrix = [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]]
    crf = densecrf(gaussian=[], bilateral=[{**BILATERAL, "compat": matrix}])
    made = crf.terms[0].compatibility[:, :, 0, 0].tolist()
    assert made == [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.5, 0.0, 3.0]]


@pytest.mark.parametrize(
    ("sxy", "taps", "blur", "geometry"),
    [
        (80, 11, 1, (11, 32, 1)),
        (80, 5, 1, (5, 80, 1)),
        (80, 11, 4, (11, 8, 4)),
        (1, 11, 1, (5, 1, 1)),
    ],
    ids=str,
)
def test_from_densecrf_windows_reach_two_sigma(sxy, taps, blur, geometry):
    crf = densecrf(gaussian=[], bilateral=[{**BILATERAL, "sxy": sxy}], taps=taps, blur=blur)
    made = crf.terms[0].options
    assert (made.kernel_size, made.dilation, made.blur) == geometry
    assert made.kernel_size // 2 * made.dilation * made.blur >= 2 * sxy
