"""PacConv1d and PacConv3d: what they promise of the convolutions they replace; their guidance."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import DIFFERS, assert_close64, assert_equal, fresh_memory_is_nan
from torch import Tensor, nn
from volumes import CASES, Line, all_cases, few_cases, oracle

from pacswap import ops
from pacswap.errors import GuidanceError, ShapeError
from pacswap.nn import (
    AdaptingKernel,
    Guidance,
    PacConv1d,
    PacConv2d,
    PacConv3d,
    resize_guidance,
    size_of,
    to_sequence,
)

# torch says so of its own layer too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
LAYERS: dict[int, Any] = {1: PacConv1d, 3: PacConv3d}
LIVE = {name: case for name, case in CASES.items() if case.window.taps > 1}
live_cases = pytest.mark.parametrize("case", LIVE.values(), ids=LIVE)
base_cases = pytest.mark.parametrize("name", ["line_p1", "3x3x3_p1"])


def pair(case: Line, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """A convolution and the layer made of a twin of it."""
    conv = case.conv(dtype)
    return conv, LAYERS[case.axes].from_conv(copy.deepcopy(conv), **options)


def tensors(case: Line, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    given = case.tensors(dtype)
    return given["input"], given["guidance"]


NAMES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


@all_cases
def test_to_conv_undoes_from_conv(case):
    conv = case.conv().eval()
    layer = LAYERS[case.axes].from_conv(conv)
    back = layer.to_conv()
    assert type(back) is type(conv)
    for other in (layer, back):
        assert other.weight is conv.weight
        assert other.bias is conv.bias
        for name in (*NAMES, "padding_mode", "training"):
            assert getattr(other, name) == getattr(conv, name)


@all_cases
def test_the_output_at_blend_0_is_the_convolutions_to_the_bit(case):
    conv, layer = pair(case)
    image, guidance = tensors(case)
    assert_equal(layer(image, guidance), conv(image))
    with torch.no_grad():
        assert_equal(layer(image, guidance), conv(image))


@live_cases
def test_the_blend_has_a_gradient_at_0_and_the_others_are_the_convolutions(case):
    conv, layer = pair(case, torch.float64)
    image, guidance = tensors(case, torch.float64)
    conv(image).square().sum().backward()
    layer(image, guidance).square().sum().backward()
    assert layer.blend.grad.abs() > 1e-3
    assert_equal(layer.weight.grad, conv.weight.grad)
    assert_equal(layer.bias.grad, conv.bias.grad)
    # dL/d(blend) as the layer has it next to 0, where it takes another way
    _, near = pair(case, torch.float64, blend=1e-9)
    near(image, guidance).square().sum().backward()
    assert_close64(layer.blend.grad, near.blend.grad, relative=1e-6)


@live_cases
def test_the_output_at_another_blend_is_not_the_convolutions(case):
    conv, layer = pair(case, blend=0.1)
    image, guidance = tensors(case)
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(layer(image, guidance), conv(image))


@few_cases
def test_the_layer_is_the_papers_equation(case):
    given = case.tensors()
    _, layer = pair(case, torch.float64, blend=given["blend"], bandwidth=given["bandwidth"].item())
    assert_close64(layer(given["input"], given["guidance"]), oracle(case)[0])
    kernel = layer.adapting_kernel(given["guidance"])
    assert_equal(layer(given["input"], kernel=kernel), layer(given["input"], given["guidance"]))
    shuffled = given["guidance"].flip(-1)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(layer(given["input"], shuffled), oracle(case)[0])


@base_cases
def test_a_kernel_that_is_given_has_a_gradient_at_0(name):
    case = CASES[name]
    _, layer = pair(case, torch.float64, own_kernel=False)
    assert layer.adapting_kernel is None
    kernel = ops.adapting_kernel(tensors(case, torch.float64)[1], case.kernel_size, padding=1)
    layer(case.tensors()["input"], kernel=kernel.requires_grad_()).square().sum().backward()
    assert layer.blend.grad != 0
    assert kernel.grad is not None


@base_cases
@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_without_a_batch(name, blend):
    _, layer = pair(CASES[name], torch.float64, blend=blend)
    image, guidance = tensors(CASES[name], torch.float64)
    assert_close64(layer(image[0], guidance[0]), layer(image[:1], guidance[:1])[0])


@base_cases
@pytest.mark.parametrize("blend", [0.0, 0.4])
def test_copies_compilers_and_in_place_activations(name, blend):
    _, layer = pair(CASES[name], blend=blend, form="inverse", normalize="mean")
    image, guidance = tensors(CASES[name])
    expected = layer(image, guidance)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal(twin(image, guidance), expected)
    _, other = pair(CASES[name], form="inverse", normalize="mean", lambd=-0.3)
    other.load_state_dict(layer.state_dict())
    assert_equal(other(image, guidance), expected)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image, guidance), expected, rtol=1e-5, atol=1e-5)
    F.relu_(layer(image, guidance)).sum().backward()
    assert layer.blend.grad != 0
    layer.enabled = False
    assert_equal(layer(image), layer._conv_forward(image, layer.weight, layer.bias))


@base_cases
def test_state_dict_keys(name):
    _, layer = pair(CASES[name], form="inverse")
    added = ["blend", *(f"adapting_kernel.{n}" for n in ("log_bandwidth", "alpha", "lambd"))]
    assert list(layer.state_dict()) == ["weight", "bias", *added]


@base_cases
def test_no_random_number_is_consumed(name):
    conv, before = CASES[name].conv(), torch.get_rng_state()
    LAYERS[CASES[name].axes].from_conv(conv).to_conv()
    assert torch.equal(torch.get_rng_state(), before)


@base_cases
def test_a_call_without_guidance_says_so(name):
    case = CASES[name]
    kind = LAYERS[case.axes].__name__
    with pytest.raises(GuidanceError, match=f"{kind} was called without a guidance"):
        LAYERS[case.axes](*case.channels, 3)(tensors(case)[0])


def test_autocast_decides_the_dtype_as_for_conv3d():
    conv, layer = pair(CASES["3x3x3_p1"], blend=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(*tensors(CASES["3x3x3_p1"]))
        plain = conv(tensors(CASES["3x3x3_p1"])[0])
    assert output.dtype == plain.dtype == torch.bfloat16
    assert output.is_contiguous() == plain.is_contiguous()


def test_a_sequence_may_be_smoothed_and_a_volume_not():
    kernel = AdaptingKernel((3,), padding=1, smoothing="gaussian")
    assert kernel.smoothing_filter.tolist() == [0.25, 0.5, 0.25]
    assert kernel(torch.rand(1, 2, 6)).shape == (1, 1, 3, 6)
    with pytest.raises(ShapeError) as raised:
        AdaptingKernel((3, 3, 3), smoothing="box")
    assert str(raised.value) == "smoothing of a volume's centre is not known, got 'box'."


@pytest.mark.parametrize("size", [(3,), (3, 3), (3, 3, 3)], ids=["sequence", "map", "volume"])
@pytest.mark.parametrize("form", ["gaussian", "laplacian"])
def test_distances_are_what_the_bandwidth_divides(size, form):
    guidance = torch.randn(2, 4, *range(4, 4 + len(size)), dtype=torch.float64)
    options: dict[str, Any] = {"form": form, "distance": "mean", "standardize": True}
    kernel = AdaptingKernel(size, dtype=torch.float64, bandwidth=1.5, padding=1, **options)
    d = kernel.distances(guidance)
    inner = ops.adapting_kernel(guidance, size, bandwidth=1.5, **options)
    assert_close64(torch.exp(-d / 1.5 if form == "laplacian" else -d / 4.5), inner)
    small = guidance[(..., *[slice(2)] * len(size))]
    assert kernel.distances(small).shape == kernel(small).shape


RESIZED = {
    "sequence": ((7,), (12,), "linear"),
    "map": ((4, 5), (8, 3), "bilinear"),
    "volume": ((2, 4, 5), (3, 8, 3), "trilinear"),
}


@pytest.mark.parametrize(("size", "target", "mode"), RESIZED.values(), ids=RESIZED)
def test_resizing_keeps_the_axes(size, target, mode):
    features = torch.rand(2, 3, *size)
    expected = F.interpolate(features, size=target, mode=mode, align_corners=False)
    assert_equal(resize_guidance(features, target, "bilinear"), expected)
    assert_equal(resize_guidance(features, torch.rand(2, 1, *target), "bilinear"), expected)
    assert size_of(expected) == size_of(target) == target
    assert resize_guidance(features, size, "nearest") is features
    area = F.interpolate(features, size=target, mode="area")
    assert_equal(resize_guidance(features, target, "area"), area)


def test_a_map_guides_every_frame_alike():
    features = torch.rand(2, 3, 4, 5)
    made = resize_guidance(features, torch.rand(2, 8, 3, 8, 10), "bilinear")
    flat = resize_guidance(features, (8, 10), "bilinear")
    assert_equal(made, torch.stack([flat] * 3, dim=2))
    layer = PacConv3d(8, 2, 3, padding=1)
    assert layer(torch.rand(2, 8, 3, 8, 10), made).shape == (2, 2, 3, 8, 10)


@pytest.mark.parametrize("size", [(4, 5), (2, 4, 5)], ids=["map", "video"])
def test_a_sequence_is_guided_by_a_channel_descriptor(size):
    features = torch.rand(2, 6, *size)
    descriptor = features.flatten(2).mean(2)[:, None]
    assert_equal(to_sequence(features), descriptor)
    assert_equal(resize_guidance(features, (6,), "bilinear"), descriptor)
    longer = F.interpolate(descriptor, size=9, mode="linear", align_corners=False)
    assert_equal(resize_guidance(features, torch.rand(2, 1, 9), "bilinear"), longer)


WRONG = {
    "video_for_map": ((2, 4, 5), (4, 5), "a video [B, D, T, H, W]", "a map [B, D, H, W]"),
    "sequence_for_map": ((4,), (4, 5), "a sequence [B, D, L]", "a map [B, D, H, W]"),
    "sequence_for_video": ((4,), (2, 4, 5), "a sequence [B, D, L]", "a video [B, D, T, H, W]"),
}


@pytest.mark.parametrize(("size", "like", "has", "wants"), WRONG.values(), ids=WRONG)
def test_other_axes_are_refused(size, like, has, wants):
    with pytest.raises(GuidanceError) as raised:
        resize_guidance(torch.rand(1, 3, *size), like, "bilinear")
    assert str(raised.value) == (
        f"{has} cannot guide a layer over {wants}, got {[1, 3, *size]} for {like}. "
        "Choose a guidance with the layer's axes, or reduce it to them in the model."
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_guidance_projects_and_prepends_positions(axes):
    size, small = tuple(range(4, 4 + axes)), tuple(range(2, 2 + axes))
    maps = [torch.rand(2, 3, *size), torch.rand(2, 6, *small)]
    guidance = Guidance(9, 5, axes=axes)
    assert {n: tuple(p.shape) for n, p in guidance.named_parameters()} == {
        "project.weight": (5, 9, *[1] * axes)
    }
    assert torch.equal(guidance.project.weight.flatten(1), Guidance(9, 5).project.weight.flatten(1))
    joined = torch.cat([maps[0], resize_guidance(maps[1], size, "bilinear")], 1)
    torch.testing.assert_close(guidance(*maps), guidance(joined), rtol=1e-5, atol=1e-6)
    assert guidance(joined).shape == (2, 5, *size)
    made = Guidance(None, position=True)(*maps)
    assert made.shape == (2, axes + 9, *size)
    for channel in range(axes):  # the column first, and the frame last
        place = made[0, channel]
        steps = place.diff(dim=axes - 1 - channel)
        assert (steps > 0).all()
        assert place.abs().max() < 1
        torch.testing.assert_close(place.mean(), torch.zeros(()), rtol=0, atol=1e-6)


def test_a_projection_of_maps_takes_videos_too():
    video = torch.rand(1, 3, 2, 4, 4)
    made = Guidance(3, 2)(video)
    assert_equal(made[:, :, 0], Guidance(3, 2)(video[:, :, 0]))


def test_the_layers_agree_across_axes():
    """One frame, one row: three layers, one result."""
    x, f = torch.randn(2, 4, 9).double(), torch.randn(2, 3, 9).double()
    layers: dict[int, Any] = {}
    for axes, kind in ((1, PacConv1d), (2, PacConv2d), (3, PacConv3d)):
        ones = [1] * (axes - 1)
        padding = tuple([0] * (axes - 1) + [2])
        layers[axes] = kind(4, 6, (*ones, 5), padding=padding, dtype=torch.float64)
        with torch.no_grad():
            layers[axes].weight.copy_(layers[1].weight.view(6, 4, *ones, 5))
            layers[axes].bias.copy_(layers[1].bias)
    expected = layers[1](x, f)
    for axes in (2, 3):
        inputs = (t.view(2, -1, *[1] * (axes - 1), 9) for t in (x, f))
        assert_close64(layers[axes](*inputs).reshape(2, 6, 9), expected)
    assert isinstance(layers[3], nn.Conv3d)
