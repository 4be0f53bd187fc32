"""What the paper says pixel-adaptive convolution generalises, each from its own formula."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import BACKENDS, CASES, DIFFERS, all_cases, assert_close64, fresh_memory_is_nan
from torch import Tensor

from pacswap import ops
from pacswap.scenes import draw_scene

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
PHOTOS = Path(__file__).parents[2] / "shared" / "assets" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}")

REACH = 2
SIGMA_SPACE, SIGMA_COLOUR = 1.5, 0.12


def scene(seed: int = 0, size: tuple[int, int] = (18, 22)) -> Tensor:
    """A street, [1, 3, H, W], float64 RGB in 0..1."""
    return draw_scene(seed, size)[0][None].double()


def gaussian_window(reach: int, sigma: float) -> Tensor:
    side = torch.arange(-reach, reach + 1, dtype=torch.float64)
    gaussian = torch.exp(-0.5 * (side / sigma) ** 2)
    return gaussian[:, None] * gaussian


def convolved(case: Any, given: dict[str, Tensor], guidance: Tensor, backend: str) -> Tensor:
    kernel = ops.adapting_kernel(guidance, case.window, backend=backend)
    return ops.pac_conv2d(given["input"], kernel, given["weight"], **case.options, backend=backend)


# With padding a constant guidance meets zeros, and K is not 1 there; the constant form is always 1.
@every_backend
def test_a_constant_guidance_makes_a_convolution(backend):
    case = CASES["3x3_valid"]
    given = case.tensors()
    constant = torch.full_like(given["guidance"], 3.7)
    expected = F.conv2d(given["input"], given["weight"])
    assert_close64(convolved(case, given, constant, backend), expected)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(convolved(case, given, given["guidance"], backend), expected)


@all_cases
def test_the_constant_form_makes_a_convolution(case):
    given = case.tensors()
    kernel = ops.adapting_kernel(given["guidance"], case.window, form="constant")
    output = ops.pac_conv2d(given["input"], kernel, given["weight"], **case.options)
    padded = case.window.padded(given["input"])
    options = {n: case.options[n] for n in ("stride", "dilation", "groups")}
    assert_close64(output, F.conv2d(padded, given["weight"], **options))


@every_backend
def test_a_constant_kernel_normalised_by_its_window_is_average_pooling(backend):
    image, window = scene(), ops.make_window(3, stride=2)
    expected = F.avg_pool2d(image, 3, 2)

    def pooled(form: str) -> Tensor:
        kernel = ops.adapting_kernel(image, window, form=form, normalize="sum", backend=backend)
        return ops.pac_pool2d(image, kernel, window, backend=backend)

    assert_close64(pooled("constant"), expected)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(pooled("gaussian"), expected)


def bilateral(
    image: Tensor,
    guidance: Tensor,
    weight: Tensor,
    *,
    sigma: float = SIGMA_COLOUR,
    padding_mode: str = "zeros",
    backend: str = "auto",
) -> Tensor:
    """Z = ΣK·W: the filtered image by the filtered ones."""
    reach = weight.shape[-1] // 2
    kernel = ops.adapting_kernel(
        guidance / sigma, 2 * reach + 1, padding=reach, padding_mode=padding_mode, backend=backend
    )
    channels = image.shape[1]
    filters = weight.expand(channels, 1, -1, -1)

    def filtered(x: Tensor) -> Tensor:
        return ops.pac_conv2d(
            x,
            kernel,
            filters,
            padding=reach,
            padding_mode=padding_mode,
            groups=channels,
            backend=backend,
        )

    return filtered(image) / filtered(torch.ones_like(image))


def looped_bilateral(image: Any, guidance: Any) -> Any:
    """Tomasi and Manduchi, ICCV 1998, over the pixels that there are; [C, H, W]."""
    _, H, W = image.shape
    result = np.zeros_like(image)
    for y, x in product(range(H), range(W)):
        total = 0.0
        for v, u in product(range(-REACH, REACH + 1), range(-REACH, REACH + 1)):
            if 0 <= y + v < H and 0 <= x + u < W:
                near = np.exp(-(v**2 + u**2) / (2 * SIGMA_SPACE**2))
                colour = ((guidance[:, y, x] - guidance[:, y + v, x + u]) ** 2).sum()
                w = near * np.exp(-colour / (2 * SIGMA_COLOUR**2))
                result[:, y, x] += w * image[:, y + v, x + u]
                total += w
        result[:, y, x] /= total
    return result


@every_backend
@pytest.mark.parametrize("joint", [False, True], ids=["bilateral", "joint_bilateral"])
def test_bilateral_filter(joint, backend):
    image = scene()
    guidance = scene(1) if joint else image
    expected = torch.from_numpy(looped_bilateral(image[0].numpy(), guidance[0].numpy()))[None]
    weight = gaussian_window(REACH, SIGMA_SPACE)
    assert_close64(bilateral(image, guidance, weight, backend=backend), expected)
    other = scene(0 if joint else 1)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(bilateral(image, other, weight, backend=backend), expected)


@needs_photos
@pytest.mark.parametrize(
    "name", ["0340_n02391049_zebra.jpg", "0940_n07716906_spaghetti_squash.jpg"]
)
def test_bilateral_filter_of_a_photograph_is_opencvs(name):
    """In grey: OpenCV sums the absolute differences of colours before it squares them."""
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    photo = cv2.imread(str(PHOTOS / name), cv2.IMREAD_GRAYSCALE)
    reach, space, colour = 4, 3.0, 25.0
    filtered = cv2.bilateralFilter(photo, 2 * reach + 1, colour, space)
    grey = torch.from_numpy(photo)[None, None].double()
    round_window = gaussian_window(reach, space)
    side = torch.arange(-reach, reach + 1)
    round_window[side[:, None] ** 2 + side**2 > reach**2] = 0  # OpenCV's window is a disc

    def differences(sigma: float) -> tuple[float, float]:
        ours = bilateral(grey, grey, round_window, sigma=sigma, padding_mode="reflect")
        off = (ours[0, 0] - torch.from_numpy(filtered)).abs()
        return off.max().item(), off.mean().item()

    worst, mean = differences(colour)
    # OpenCV rounds to whole grey levels: half a level at most, a quarter on average.
    assert worst < 0.5 + 1e-3
    assert mean < 0.26
    assert differences(1.2 * colour)[0] > 0.6


def upsampled(low: Tensor, guidance: Tensor, factor: int, backend: str) -> Tensor:
    reach = factor * REACH
    size = 2 * reach + 1
    kernel = ops.adapting_kernel(
        guidance / SIGMA_COLOUR, ops.guidance_window(size), backend=backend
    )
    weight = gaussian_window(reach, factor * SIGMA_SPACE).expand(low.shape[1], 1, -1, -1)

    def spread(x: Tensor) -> Tensor:
        return ops.pac_conv_transpose2d(
            x,
            kernel,
            weight,
            stride=factor,
            padding=reach,
            output_padding=factor - 1,
            groups=x.shape[1],
            backend=backend,
        )

    return spread(low) / spread(torch.ones_like(low))


def looped_upsampled(low: Any, guidance: Any, factor: int) -> Any:
    """Kopf et al., SIGGRAPH 2007: spatial distances in low-resolution pixels."""
    C, h, w = low.shape
    _, H, W = guidance.shape
    result = np.zeros((C, H, W))
    for y, x in product(range(H), range(W)):
        total = 0.0
        for v, u in product(range(h), range(w)):
            down, across = y / factor - v, x / factor - u
            if max(abs(down), abs(across)) <= REACH:
                near = np.exp(-(down**2 + across**2) / (2 * SIGMA_SPACE**2))
                colour = ((guidance[:, y, x] - guidance[:, v * factor, u * factor]) ** 2).sum()
                weight = near * np.exp(-colour / (2 * SIGMA_COLOUR**2))
                result[:, y, x] += weight * low[:, v, u]
                total += weight
        result[:, y, x] /= total
    return result


@every_backend
@pytest.mark.parametrize("factor", [2, 3])
def test_joint_bilateral_upsampling(factor, backend):
    guidance = scene(0, (18, 24))
    low = F.avg_pool2d(guidance.flip(1), factor)[:, :2]
    expected = looped_upsampled(low[0].numpy(), guidance[0].numpy(), factor)
    expected = torch.from_numpy(expected)[None]
    assert_close64(upsampled(low, guidance, factor, backend), expected)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(upsampled(low, scene(1, (18, 24)), factor, backend), expected)


def detail_pooled(
    image: Tensor, alpha: Any, lambd: Any, *, asymmetric: bool, backend: str, padding: int = 1
) -> Tensor:
    window = ops.make_window(3, stride=2 if padding else 3, padding=padding)
    kernel = ops.adapting_kernel(
        image,
        window,
        form="inverse",
        alpha=alpha,
        lambd=lambd,
        asymmetric=asymmetric,
        smoothing=ops.smoothing_filter("gaussian" if padding else "box"),
        channel_wise=True,
        normalize="sum",
        backend=backend,
    )
    return ops.pac_pool2d(image, kernel, window, backend=backend)


def looped_detail(image: Any, alpha: Any, lambd: Any, *, asymmetric: bool) -> Any:
    """Saeedan et al., CVPR 2018: weights α + ρ_λ(I_q − Ĩ_p), ρ_λ(x) = (x² + ε²)^(λ/2), ε = 0.01.

    The asymmetric ρ_λ takes max(0, x) for x; [C, H, W], windows of 3×3 at every second pixel.
    """
    C, H, W = image.shape
    blur = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
    result = np.zeros((C, (H + 1) // 2, (W + 1) // 2))
    for c, y, x in product(range(C), range(0, H, 2), range(0, W, 2)):
        near = [
            (v, u, y + v - 1, x + u - 1)
            for v, u in product(range(3), range(3))
            if 0 <= y + v - 1 < H and 0 <= x + u - 1 < W
        ]
        smooth = sum(blur[v, u] * image[c, row, column] for v, u, row, column in near)
        total = 0.0
        for _, _, row, column in near:
            difference = image[c, row, column] - smooth
            if asymmetric:
                difference = max(0.0, difference)
            weight = alpha[c] + (difference**2 + 0.01**2) ** (lambd[c] / 2)
            result[c, y // 2, x // 2] += weight * image[c, row, column]
            total += weight
        result[c, y // 2, x // 2] /= total
    return result


@every_backend
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_detail_preserving_pooling(asymmetric, backend):
    image = scene()
    alpha, lambd = torch.tensor([0.0, 0.02, 0.5]), torch.tensor([1.5, 0.4, 2.0])
    alpha, lambd = alpha.double(), lambd.double()
    looped = looped_detail(image[0].numpy(), alpha.numpy(), lambd.numpy(), asymmetric=asymmetric)
    expected = torch.from_numpy(looped)[None]
    options = {"asymmetric": asymmetric, "backend": backend}
    assert_close64(detail_pooled(image, alpha, lambd, **options), expected)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(detail_pooled(image, alpha, lambd.flip(0), **options), expected)


@every_backend
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_detail_preserving_pooling_becomes_average_pooling_at_lambda_0(asymmetric, backend):
    image = scene()
    expected = F.avg_pool2d(image, 3, 2, 1, count_include_pad=False)
    options = {"asymmetric": asymmetric, "backend": backend}
    assert_close64(detail_pooled(image, 0.3, 0.0, **options), expected)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(detail_pooled(image, 0.3, 0.01, **options), expected)


@every_backend
def test_detail_preserving_pooling_becomes_max_pooling_at_a_large_lambda(backend):
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0)).double()
    # Each value 2^¼ times the next: from λ = 100 on the largest of a window outweighs the others.
    image = (2 ** (order / 4)).reshape(1, 1, 6, 6)
    expected = F.max_pool2d(image, 3)
    options = {"asymmetric": True, "backend": backend, "padding": 0}
    assert_close64(detail_pooled(image, 0.0, 100.0, **options), expected, relative=1e-6)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(detail_pooled(image, 0.0, 10.0, **options), expected, relative=1e-6)
