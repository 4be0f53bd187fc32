"""What a review of the layers and operations of the family found, so that it stays mended."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pacswap
from pacswap.errors import GuidanceError, PlanError
from pacswap.nn import PacConv2d, PacConvTranspose2d, PacCRF, PacFilter2d, PacPool2d

STEPS = (1.0, 14.0, 20.0, 54.0, 1000.0)


def step(height: float) -> Tensor:
    """A guidance that is 0 but for one pixel."""
    guidance = torch.zeros(1, 1, 16, 16)
    guidance[..., 8, 8] = height
    return guidance.requires_grad_()


@pytest.mark.parametrize("height", STEPS)
@pytest.mark.parametrize("form", ["gaussian", "laplacian"])
@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["transposed", "smoothed", "masked"])
def test_a_window_far_from_all_it_sees_is_still_divided(kind, normalize, form, height):
    guidance, options = step(height), {"normalize": normalize, "form": form}
    ones = torch.ones(1, 1, 16, 16)
    if kind == "transposed":
        layer = PacConvTranspose2d(1, 1, 4, 2, 1, bias=False, **options)
        nn.init.ones_(layer.weight)
        output = layer(ones[..., ::2, ::2], guidance)
    elif kind == "smoothed":
        layer = PacPool2d(3, 1, 1, smoothing="gaussian", **options)
        output = layer(ones, guidance)
    else:
        layer = PacConv2d(1, 1, 3, padding=1, bias=False, **options)
        nn.init.ones_(layer.weight)
        mask = ones.clone()
        mask[..., 8, 8] = 0
        output, _ = layer(ones, guidance, mask=mask)
    # A sum of ones by factors that add up to 1, or to the number of taps that count.
    counted = {"sum": 1.0, "mean": 4.0 if kind == "transposed" else 9.0}[normalize]
    inner = output[..., 2:-2, 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, counted), rtol=1e-5, atol=0)
    output.square().sum().backward()
    gradients = [guidance.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
    assert len(gradients) >= 3
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_division_by_the_bare_sum_would_be_seen():
    distances = torch.tensor([0.0, 400.0, 400.0])
    bare = torch.exp(-0.5 * distances[1:])
    assert (bare / bare.sum()).isnan().all()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    "layer",
    [
        PacFilter2d(2, 3, blend=0.0),
        PacFilter2d(2, 3, blend=0.0, weights="full", steps=2),
        PacCRF(2, blend=0.0),
        PacPool2d.from_pool(nn.MaxPool2d(2)),
        PacPool2d.from_pool(nn.AvgPool2d(2)),
    ],
    ids=["filter", "full", "crf", "max", "average"],
)
def test_infinities_pass_a_layer_at_blend_0(layer, grad):
    input, guidance = torch.zeros(1, 2, 8, 8), torch.rand(1, 3, 8, 8)
    input[:, 1] = -math.inf
    plain = layer.plain(input) if isinstance(layer, PacPool2d) else input
    with torch.set_grad_enabled(grad):
        output = layer(input, guidance)
    assert torch.equal(output, plain)
    with torch.no_grad():
        layer.blend.fill_(0.5)
        moved = layer(input, guidance)
        layer.blend.zero_()
    assert not torch.equal(moved, plain)


def test_the_gradient_of_a_blend_at_0_is_that_next_to_it():
    input, guidance = torch.rand(1, 2, 8, 8).double(), torch.rand(1, 3, 8, 8).double()
    gradients = []
    for blend in (0.0, 1e-9):
        layer = PacFilter2d(2, 3, blend=blend, dtype=torch.float64)
        layer(input, guidance).square().sum().backward()
        gradients.append(layer.blend.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)
    assert gradients[0].abs() > 1e-3


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.stem(x))


class Inside(nn.Module):
    """Everything that changes lies in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=2, mode="bilinear")
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.features(x))


IMAGES = torch.rand(2, 3, 16, 20)


def test_a_constant_average_is_refused():
    with pytest.raises(PlanError) as raised:
        pacswap.plan(
            Pooled(),
            "pool",
            "stem",
            operation="pool",
            kernel={"form": "constant"},
            example_input=IMAGES,
        )
    assert str(raised.value) == (
        "cannot upgrade Pooled: layers: cannot swap 'pool': a constant kernel leaves it the plain "
        "average, in which nothing can learn."
    )


def test_what_is_put_behind_an_average_may_be_constant():
    """The reasons why a pooling cannot have such a kernel are not the CRF's behind it."""
    options = {"kernel": {"form": "constant"}, "crf": {"kernels": [{"compatibility": "2d"}]}}
    net = Pooled()
    upgraded = pacswap.swap(
        net, "pool", "stem", operation="append", example_input=IMAGES, **options
    )
    assert pacswap.verify(net, upgraded, IMAGES).passed


def test_nothing_is_put_into_a_sequential():
    upgraded = pacswap.swap(
        Inside(), "features.1", "features.0", operation="upsample", example_input=IMAGES
    )
    assert len(upgraded.features) == 2
    assert isinstance(upgraded.guided_features_1, PacFilter2d)
    assert pacswap.verify(pacswap.revert(upgraded), upgraded, IMAGES).passed


@pytest.mark.parametrize("enabled", [True, False])
def test_a_transposed_layer_takes_its_output_size_where_torch_does(enabled):
    conv = nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1)
    layer = PacConvTranspose2d.from_conv(conv)
    layer.enabled = enabled
    input, kernel = torch.rand(1, 2, 5, 6), torch.ones(1, 1, 9, 10, 12)
    output = layer(input, [10, 12], kernel=kernel if enabled else None)
    assert torch.equal(output, conv(input, [10, 12]))
    assert conv(input).shape != output.shape


@pytest.mark.parametrize(
    "layer",
    [
        PacConv2d(2, 2, 3, padding=1, form="external"),
        PacConvTranspose2d(2, 2, 3, padding=1, form="external"),
        PacPool2d(3, 1, 1, form="external"),
        PacFilter2d(2, 3, form="external"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_an_external_kernel_leaves_no_parameter_unused(layer):
    input, kernel = torch.rand(1, 2, 6, 6), torch.rand(1, 1, 9, 6, 6)
    layer(input, kernel=kernel).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    name = type(layer).__name__
    with pytest.raises(GuidanceError) as raised:
        layer(input)
    assert str(raised.value) == f"{name} was called without a kernel. Call it with kernel=…"
    with pytest.raises(GuidanceError) as raised:
        layer(input, torch.rand(1, 3, 6, 6))
    assert str(raised.value) == (
        f"this {name} has no adapting kernel of its own: it shares another layer's, or its form "
        "is external. Call it with kernel=…"
    )


def test_a_misspelt_option_names_the_layer():
    with pytest.raises(TypeError) as raised:
        PacPool2d(2, bandwith=1.0)
    assert str(raised.value) == (
        "PacPool2d got an unexpected option 'bandwith'. Nearest: 'bandwidth'."
    )


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ({"alpha": 0.5}, "kernel.alpha: belongs to form 'inverse', got 'gaussian'."),
        (
            {"lambd": 3.0, "form": "laplacian"},
            "kernel.lambd: belongs to form 'inverse', got 'laplacian'.",
        ),
        (
            {"smoothing_size": 7},
            "kernel.smoothing_size: there is no smoothing. Set smoothing, or leave it out.",
        ),
    ],
)
def test_options_without_effect_are_refused(kernel, message):
    with pytest.raises(PlanError) as raised:
        pacswap.plan(Pooled(), "stem", "input", kernel=kernel, example_input=IMAGES)
    assert str(raised.value) == message


def test_a_crf_that_sees_only_padding_is_refused():
    crf = {"kernels": [{"dilation": 64}]}
    with pytest.raises(PlanError) as raised:
        pacswap.plan(Pooled(), "pool", "stem", operation="append", crf=crf, example_input=IMAGES)
    assert str(raised.value) == (
        "cannot upgrade Pooled: crf: a dilation of 64 pixels is more than 'pool' has at the "
        "example input, 8×10: every neighbour is padding. Use a smaller one, or a larger example "
        "input."
    )


def masked_layers() -> dict[str, tuple[nn.Module, tuple[int, int]]]:
    """Layers whose plain twin a mask of ones leaves as it is, with the size of their guidance."""
    torch.manual_seed(0)
    made = {
        "conv": (PacConv2d(2, 3, 3, padding=1, blend=0.0), (8, 8)),
        "transposed": (PacConvTranspose2d(2, 3, 4, 2, 1, blend=0.0), (16, 16)),
        "average": (PacPool2d(3, 2, 1, blend=0.0, normalize="sum"), (8, 8)),
        "max": (PacPool2d(3, 2, 1, blend=0.0, normalize="sum", plain="max"), (8, 8)),
    }
    return {name: (layer.double(), size) for name, (layer, size) in made.items()}


# Not "mean": taps outside the image count as 1 there, and with a mask they count as invalid.
@pytest.mark.parametrize("normalize", ["none", "sum"])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", masked_layers())
def test_a_mask_of_ones_changes_nothing(name, blend, normalize):
    layer, size = masked_layers()[name]
    layer.adapting_kernel.normalize = normalize
    nn.init.constant_(layer.blend, blend)
    input, guidance = torch.rand(2, 2, 8, 8).double(), torch.rand(2, 3, *size).double()
    output, seen = layer(input, guidance, mask=torch.ones(2, 1, 8, 8).double())
    assert seen.all()
    torch.testing.assert_close(output, layer(input, guidance), rtol=1e-12, atol=1e-12)
    some = torch.ones(2, 1, 8, 8).double()
    some[..., 3:5, 3:5] = 0
    holed, _ = layer(input, guidance, mask=some)
    assert (holed - output).abs().max() > 1e-3


@pytest.mark.parametrize("blend", [0.0, 1.0])
@pytest.mark.parametrize("name", masked_layers())
def test_what_is_masked_does_not_matter(name, blend):
    layer, size = masked_layers()[name]
    nn.init.constant_(layer.blend, blend)
    input, guidance = torch.rand(1, 2, 8, 8).double(), torch.rand(1, 3, *size).double()
    mask = torch.ones(1, 1, 8, 8).double()
    mask[..., :4] = 0
    output, seen = layer(input, guidance, mask=mask)
    broken = input.clone()
    broken[..., :4] = math.nan
    again, _ = layer(broken, guidance, mask=mask)
    assert torch.equal(output, again)
    assert output[..., 0].abs().max() == 0
    assert seen[..., 0].max() == 0
    assert seen[..., -1].min() == 1
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", masked_layers())
def test_a_mask_needs_the_guidance(name):
    layer, size = masked_layers()[name]
    input, kernel = torch.rand(1, 2, 8, 8).double(), torch.rand(1, 1, 9, *size).double()
    with pytest.raises(GuidanceError) as raised:
        layer(input, kernel=kernel, mask=torch.ones(1, 1, 8, 8).double())
    assert str(raised.value) == (
        "a mask enters where K is made. Call the layer as layer(input, guidance, mask=…)."
    )


def test_a_masked_average_is_that_of_the_valid_pixels():
    layer = PacPool2d(2, normalize="sum", blend=0.0)
    input = torch.arange(16.0).view(1, 1, 4, 4)
    mask = torch.ones(1, 1, 4, 4)
    mask[0, 0, 0, :2] = 0
    output, _ = layer(input, torch.zeros(1, 1, 4, 4), mask=mask)
    assert output.flatten().tolist() == [4.5, 4.5, 10.5, 12.5]
