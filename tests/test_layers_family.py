"""The layers of the whole family: what they promise of the plain layer, and as torch modules."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    DIFFERS,
    HALVES,
    ONE_DIRECTION,
    assert_as_good_as,
    assert_close64,
    assert_equal,
    fresh_memory_is_nan,
)
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from pacswap import ops
from pacswap.errors import GuidanceError, ShapeError
from pacswap.nn import (
    AdaptingKernel,
    PacConv2d,
    PacConvTranspose2d,
    PacFilter2d,
    PacPool2d,
    TransposedKernel,
)
from pacswap.nn.blur import reduced

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

DETAIL: dict[str, Any] = {
    "form": "inverse",
    "alpha": 0.2,
    "lambd": 0.7,
    "asymmetric": True,
    "smoothing": "learned",
    "normalize": "sum",
}
# A layer, and how many times larger its guidance is than its input.
LAYERS: dict[str, tuple[Callable[..., Any], int]] = {
    "conv": (lambda **o: PacConv2d(4, 6, 3, padding=1, form="laplacian", **o), 1),
    "conv_shared": (
        lambda **o: PacConv2d(4, 4, 3, padding=1, bias=False, shared_filters=True, **DETAIL, **o),
        1,
    ),
    "conv_channels": (lambda **o: PacConv2d(4, 2, 3, channel_wise=True, **DETAIL, **o), 1),
    "transposed": (lambda **o: PacConvTranspose2d(4, 3, 4, 2, 1, normalize="mean", **o), 2),
    "transposed_inverse": (
        lambda **o: PacConvTranspose2d(4, 4, 4, 2, 1, groups=2, **DETAIL, **o),
        2,
    ),
    "pool": (lambda **o: PacPool2d(3, 2, 1, ceil_mode=True, smoothing="box", **o), 1),
    "pool_detail": (lambda **o: PacPool2d(2, channel_wise=True, channels=4, **DETAIL, **o), 1),
    "pool_max": (lambda **o: PacPool2d(3, 2, 1, plain="max", normalize="sum", **o), 1),
    "filter": (lambda **o: PacFilter2d(4, 3, steps=2, **o), 1),
    "filter_blur": (lambda **o: PacFilter2d(4, 3, weights="full", blur=2, **o), 1),
    "filter_full": (lambda **o: PacFilter2d(4, 3, dilation=2, weights="full", **o), 1),
}
all_layers = pytest.mark.parametrize("name", LAYERS)


def made(name: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(1)
    return LAYERS[name][0](dtype=dtype, **options)


def given(name: str, dtype: torch.dtype = torch.float32, B: int = 2) -> tuple[Tensor, Tensor]:
    times = LAYERS[name][1]
    generator = torch.Generator().manual_seed(2)
    shapes = ((B, 4, 6, 7), (B, 4, 6 * times, 7 * times))
    input, guidance = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return input.to(dtype), guidance.to(dtype)


def seen(layer: nn.Module, guidance: Tensor) -> Tensor:
    """What a layer's adapting kernel is made of: a blurred filter works on a smaller image."""
    return reduced(guidance, layer.blur) if isinstance(layer, PacFilter2d) else guidance


def plain_of(layer: nn.Module, input: Tensor) -> Tensor:
    """What the layer is at blend 0, by torch's own layers."""
    if isinstance(layer, PacConv2d | PacConvTranspose2d):
        return layer.to_conv()(input)
    return layer.plain(input) if isinstance(layer, PacPool2d) else input


@trainings
@all_layers
def test_at_blend_0_every_layer_is_the_plain_one_to_the_bit(name, training):
    layer = made(name, blend=0.0).train(training)
    input, guidance = given(name)
    assert_equal(layer(input, guidance), plain_of(layer, input))
    with torch.no_grad():
        assert_equal(layer(input, guidance), plain_of(layer, input))
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(made(name, blend=0.1)(input, guidance), plain_of(layer, input))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@all_layers
def test_at_blend_0_the_blend_learns_in(name, dtype):
    layer = made(name, dtype=dtype, blend=0.0)
    layer(*given(name, dtype)).float().square().sum().backward()
    assert layer.blend.grad.abs().item() > 1e-3


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "filter"])  # two steps, not linear
def test_at_blend_0_the_gradient_of_the_blend_is_what_adapting_changes(name):
    layer, adapted = (made(name, dtype=torch.float64, blend=blend) for blend in (0.0, 1.0))
    input, guidance = given(name, torch.float64)
    output = layer(input, guidance)
    change = adapted(input, guidance) - output
    output.square().sum().backward()
    assert_close64(layer.blend.grad, (2 * output * change).sum().detach(), relative=1e-11)
    turned = adapted(input, guidance.flip(-1)) - output
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(layer.blend.grad, (2 * output * turned).sum().detach(), relative=1e-11)


@all_layers
def test_after_one_step_every_parameter_learns(name):
    layer = made(name, dtype=torch.float64, blend=0.2)
    input, guidance = given(name, torch.float64)
    layer(input, guidance.requires_grad_()).square().sum().backward()
    dead = [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead
    assert guidance.grad.abs().max() > 0


@all_layers
def test_gradcheck_of_every_parameter(name):
    layer = made(name, dtype=torch.float64, blend=0.3)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    inputs = [t[:1].requires_grad_() for t in given(name, torch.float64)]

    def function(input: Tensor, guidance: Tensor, *values: Tensor) -> Tensor:
        replaced = dict(zip(names, values, strict=True))
        return functional_call(layer, replaced, (input, guidance))

    gradcheck(
        function, [*inputs, *(p.detach().requires_grad_() for p in parameters)], **ONE_DIRECTION
    )


@all_layers
def test_deepcopy_pickle_and_state_dict(name):
    layer = made(name, blend=0.7)
    expected = layer(*given(name))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    fresh = made(name)
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, 0.25)
    assert not torch.equal(fresh(*given(name)), expected)
    fresh.load_state_dict(layer.state_dict())
    for other in [*copies, fresh]:
        assert_equal(other(*given(name)), expected)
        assert list(other.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@all_layers
def test_half_precision_is_as_good_as_rounding_every_step(name, dtype):
    layer = made(name, blend=1.0)
    half = copy.deepcopy(layer).to(dtype)
    exact = copy.deepcopy(half).double()
    inputs = given(name, dtype)
    truth = exact(*(t.double() for t in inputs))
    output = half(*inputs)
    assert output.dtype == dtype
    # The kernel is rounded to the dtype, the products are summed in float32, the result is rounded.
    kernel = half.adapting_kernel(seen(half, inputs[1]))
    rounded = exact(inputs[0].double(), kernel=kernel.double())
    baseline = rounded.to(dtype)
    assert_as_good_as(output.detach(), truth.detach(), baseline.detach(), 2.0)


@all_layers
def test_autocast_runs_and_blend_0_stays_the_plain_layer(name):
    layer, input_and_guidance = made(name, blend=0.0), given(name)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(*input_and_guidance)
        assert_equal(output, plain_of(layer, input_and_guidance[0]))
        adapted = made(name, blend=1.0)(*input_and_guidance)
    assert adapted.dtype == output.dtype
    exact = made(name, blend=1.0)(*input_and_guidance)
    assert (adapted - exact).abs().max() < 0.05 * exact.abs().max()


@all_layers
def test_channels_last_gives_the_same(name):
    layer = made(name, dtype=torch.float64)
    inputs = given(name, torch.float64)
    last = [t.contiguous(memory_format=torch.channels_last) for t in inputs]
    assert_close64(layer(*last).detach(), layer(*inputs).detach())


@pytest.mark.parametrize("name", [n for n in LAYERS if not n.startswith("filter")])
@pytest.mark.parametrize("blend", [0.0, 0.6])
def test_unbatched(name, blend):
    layer = made(name, dtype=torch.float64, blend=blend)
    input, guidance = given(name, torch.float64, B=1)
    expected = layer(input, guidance)[0].detach()
    assert_close64(layer(input[0], guidance[0]).detach(), expected)
    kernel = layer.adapting_kernel(guidance)[0]
    assert_close64(layer(input[0], kernel=kernel).detach(), expected)


@all_layers
def test_a_kernel_stands_for_its_guidance(name):
    layer = made(name, dtype=torch.float64, blend=0.6)
    input, guidance = given(name, torch.float64)
    expected = layer(input, guidance).detach()
    kernel = layer.adapting_kernel(seen(layer, guidance))
    assert_close64(layer(input, kernel=kernel).detach(), expected)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(layer(input, kernel=kernel.flip(-1)).detach(), expected)


@all_layers
def test_disabled_it_is_the_plain_layer_and_needs_no_guidance(name):
    layer = made(name, blend=1.0)
    layer.enabled = False
    input, _ = given(name)
    assert_equal(layer(input), plain_of(layer, input))


@all_layers
def test_adaptive_messages(name):
    layer, (input, guidance) = made(name), given(name)
    kind = type(layer).__name__
    kernel = layer.adapting_kernel(guidance)
    silent = copy.deepcopy(layer)
    silent.adapting_kernel.enabled = False
    shared = copy.deepcopy(layer)
    shared.adapting_kernel = None
    guided = copy.deepcopy(layer)
    guided.guided_by = "'layer4.0.conv2'"
    calls = [
        (lambda: layer(input), f"{kind} was called without a guidance. Call it as layer(input, guidance)."),
        (lambda: layer(input, guidance, kernel=kernel), f"{kind} takes a guidance or a kernel, got both. Leave one out."),
        (lambda: silent(input, guidance), f"the adapting kernel of this {kind} is disabled and the layer is not. Disable both: `with pacswap.disabled(model):`."),
        (lambda: shared(input, guidance), f"this {kind} has no adapting kernel of its own: it shares another layer's, or its form is external. Call it with kernel=…"),
        (lambda: guided(input), "'layer4.0.conv2' was called on a path through the model that does not compute its guidance. Call the model itself, or use `with pacswap.disabled(model):` to run that path as it was before the swap."),
    ]  # fmt: skip
    for call, message in calls:
        with pytest.raises(GuidanceError) as raised:
            call()
        assert str(raised.value) == message


# Masks.


def masked_conv(layer: PacConv2d, input: Tensor, mask: Tensor) -> Tensor:
    """A convolution of what is valid, made up for what is not, by torch alone."""
    ones = torch.ones(1, 1, *layer.kernel_size, dtype=input.dtype)
    inside = F.conv2d(torch.ones_like(mask), ones, stride=layer.stride, padding=layer.padding)
    valid = F.conv2d(mask, ones, stride=layer.stride, padding=layer.padding)
    output = F.conv2d(input * mask, layer.filters, None, layer.stride, layer.padding)
    bias = 0 if layer.bias is None else layer.bias[:, None, None]
    return torch.where(valid > 0, output * inside / valid.clamp(min=1) + bias, 0)


def masked_inputs() -> tuple[Tensor, Tensor, Tensor]:
    input, guidance = given("conv", torch.float64)
    mask = (torch.rand(2, 1, 6, 7, dtype=torch.float64) < 0.3).double()
    mask[:, :, :3, :3] = 0
    return input, guidance, mask


@pytest.mark.parametrize("disabled", [False, True], ids=["blend_0", "disabled"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_mask_at_blend_0_is_the_masked_convolution(stride, disabled):
    layer = PacConv2d(4, 6, 3, stride, 1, dtype=torch.float64, blend=float(disabled))
    layer.enabled = layer.adapting_kernel.enabled = not disabled
    input, guidance, mask = masked_inputs()
    output, seen = layer(input, guidance, mask=mask)
    assert_close64(output.detach(), masked_conv(layer, input, mask).detach())
    assert_equal(seen, ops.output_mask(mask, layer.window))
    assert 0 < seen.mean() < 1
    assert_equal(
        output[~seen.bool().expand_as(output)], torch.zeros(int((seen == 0).sum()) * 6).double()
    )


@pytest.mark.parametrize("normalize", ["none", "sum", "mean"])
def test_a_masked_layer_at_blend_1_is_the_papers(normalize):
    layer = PacConv2d(4, 6, 3, padding=1, dtype=torch.float64, normalize=normalize)
    input, guidance, mask = masked_inputs()
    kernel = ops.adapting_kernel(guidance, layer.window, mask=mask, normalize=normalize)
    paper = ops.pac_conv2d(input, kernel, layer.weight, layer.bias, padding=1)
    output, seen = layer(input, guidance, mask=mask)
    assert_close64(output.detach(), (paper * seen).detach())


def test_a_mask_of_ones_changes_nothing_and_hides_nan():
    layer = PacConv2d(4, 6, 3, padding=1, dtype=torch.float64, blend=0.5)
    input, guidance, mask = masked_inputs()
    full, seen = layer(input, guidance, mask=torch.ones_like(mask))
    assert seen.all()
    assert_close64(full.detach(), layer(input, guidance).detach())
    holes = torch.where(mask > 0, input, torch.nan)
    assert_equal(layer(holes, guidance, mask=mask)[0], layer(input, guidance, mask=mask)[0])
    alone = layer(input[0], guidance[0], mask=mask[0])
    both = layer(input, guidance, mask=mask)
    for one, two in zip(alone, both, strict=True):
        assert_close64(one.detach(), two[0].detach())


@pytest.mark.parametrize("extra", [{}, {"kernel": torch.ones(2, 1, 9, 6, 7)}], ids=str)
def test_a_mask_needs_a_guidance(extra):
    layer, mask = PacConv2d(4, 6, 3, padding=1), torch.ones(2, 1, 6, 7)
    with pytest.raises(GuidanceError) as raised:
        layer(given("conv")[0], mask=mask, **extra)
    assert str(raised.value) == (
        "a mask enters where K is made. Call the layer as layer(input, guidance, mask=…)."
    )


@pytest.mark.parametrize(
    ("call", "got"),
    [((4, 6, 3, 1, 0, 1, 1, False), "4 → 6, groups=1, bias=False"),
     ((4, 4, 3, 1, 0, 1, 2, False), "4 → 4, groups=2, bias=False"),
     ((4, 4, 3), "4 → 4, groups=1, bias=True")],
)  # fmt: skip
def test_shared_filters_refuse_to_mix_channels(call, got):
    with pytest.raises(ShapeError) as raised:
        PacConv2d(*call, shared_filters=True)
    assert str(raised.value) == (
        "shared_filters mixes no channels: it needs out_channels = in_channels, groups=1 and "
        f"bias=False, got {got}."
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
def test_shared_filters_become_a_depthwise_convolution(frozen):
    layer = made("conv_shared", blend=0.0)
    layer.weight.requires_grad_(not frozen)
    conv = layer.to_conv()
    assert (conv.groups, conv.weight.shape) == (4, (4, 1, 3, 3))
    assert conv.weight.requires_grad is not frozen
    assert_equal(conv.weight[3], layer.weight[0])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("smoothing", ["gaussian", "box"])
@pytest.mark.parametrize("transposed", [False, True], ids=["kernel", "transposed"])
def test_smoothing_leaves_a_constant_guidance_at_1(transposed, smoothing, dtype):
    # Not normalised: that would make 1 of a kernel that is too small everywhere.
    options: dict[str, Any] = {"smoothing": smoothing, "dtype": dtype}
    kernel = (
        TransposedKernel(3, stride=2, **options) if transposed else AdaptingKernel(3, **options)
    )
    inner = kernel(torch.full((1, 2, 9, 9), 30.0, dtype=dtype))[..., 2:-2, 2:-2]
    assert_equal(inner[inner != 0], torch.ones_like(inner[inner != 0]))
