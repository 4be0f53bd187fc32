"""The pictures: right numbers in right places, the same each time, nothing changed by looking."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from same import Untouched
from torch import Tensor, nn

import pacswap
from pacswap import ops, scenes
from pacswap.errors import PlanError, ShapeError
from pacswap.nn import PacConv2d
from pacswap.surgery import pac_layers
from pacswap.viz import (
    adaptation_map,
    canvas,
    guidance_image,
    heat_image,
    kernel_images,
    look_into,
    show,
)
from pacswap.zoo import Source, build

SIZE = (48, 64)
IMAGE, _ = scenes.draw_scene(3, SIZE)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A swap with stride, one with dilation, a guided upsampling, and a CRF of two terms."""
    torch.manual_seed(0)
    net = build(Source("pacswap", "scene_net"))
    groups = [
        {"layers": "stem.conv", "guidance": "input"},
        {"layers": "layer3.1.conv2", "guidance": {"from": "layer1", "channels": 8}},
        {"operation": "upsample", "layers": "interpolate", "guidance": "input"},
        {
            "operation": "append",
            "layers": "interpolate",
            "guidance": "input",
            "crf": {"kernels": [{"guided": False}, {"kernel_size": 7, "blur": 2}]},
        },
    ]
    example = scenes.normalize(scenes.draw_batch([0, 1], SIZE)[0])
    upgraded = pacswap.swap(net, groups=groups, example_input=example, calibration=example)
    for layer in pac_layers(upgraded).values():
        layer.blend.data.fill_(0.25)
    return upgraded.train()


NAMES = ["stem.conv", "layer3.1.conv2", "guided_interpolate", "crf_interpolate.kernels.1"]


class Own(nn.Module):
    """A layer of the user's own on the image itself."""

    def __init__(self, **options) -> None:
        super().__init__()
        options = {"padding": 1, "distance": "mean", "bandwidth": 0.3} | options
        self.layer = PacConv2d(3, 3, options.pop("kernel_size", 3), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def halves() -> Tensor:
    """Dark left, light right."""
    image = torch.zeros(3, 12, 16)
    image[:, :, 8:] = 1
    return image


def test_one_sheet_for_each_layer_and_the_model_as_it_was(model, tmp_path):
    untouched = Untouched(model)
    paths = show(model, IMAGE, tmp_path / "new" / "folder")
    untouched.check()
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for path in paths:
        with Image.open(path) as sheet:
            assert sheet.format == "PNG"
            assert sheet.width > 1000
            assert len(sheet.convert("L").getcolors()) > 50


def test_a_sheet_is_the_same_each_time(model, tmp_path):
    first, second = show(model, IMAGE, tmp_path / "a"), show(model, IMAGE, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    as_bytes = (255 * IMAGE).round().to(torch.uint8)
    other = show(model, as_bytes, tmp_path / "c", pixels=[(10, 10)])
    assert other[0].read_bytes() != first[0].read_bytes()


def test_what_is_looked_at_is_the_normalised_image(model):
    seen = look_into(model, IMAGE)["stem.conv"]
    features = ops.standardized(scenes.normalize(IMAGE)[None])[0]
    torch.testing.assert_close(seen.features, features)
    assert (seen.blend, seen.form) == (0.25, "gaussian")
    kernel = pac_layers(model)["stem.conv"].adapting_kernel
    assert seen.bandwidth == pytest.approx(kernel.bandwidth.item())
    with torch.no_grad():
        K = kernel(scenes.normalize(IMAGE)[None])[0, 0]
    torch.testing.assert_close(seen.factors, K)
    other = look_into(model, IMAGE, mean=(0.1, 0.5, 0.9), std=(0.5, 0.5, 0.5))["stem.conv"]
    torch.testing.assert_close(other.features, features, atol=1e-4, rtol=1e-4)  # standardised
    own = look_into(Own(), IMAGE, **PLAIN)["layer"]
    assert torch.equal(own.features, IMAGE)


def looped_map(image: Tensor, width: float, dilation: int = 1) -> Tensor:
    """1 − mean K of the eight neighbours inside the image, by loops."""
    _, H, W = image.shape
    made = torch.zeros(H, W)
    for y in range(H):
        for x in range(W):
            factors = []
            for dy in (-dilation, 0, dilation):
                for dx in (-dilation, 0, dilation):
                    v, u = y + dy, x + dx
                    if (dy, dx) != (0, 0) and 0 <= v < H and 0 <= u < W:
                        d2 = (image[:, y, x] - image[:, v, u]).square().mean()
                        factors.append(torch.exp(-0.5 * d2 / width**2))
            made[y, x] = 1 - torch.stack(factors).mean()
    return made


@pytest.mark.parametrize("normalize", ["none", "sum", "mean"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_map_is_one_minus_the_mean_of_k(normalize, dilation):
    image, _ = scenes.draw_scene(0, (16, 20))
    options = {"normalize": normalize, "dilation": dilation, "padding": dilation}
    seen = look_into(Own(**options), image, **PLAIN)["layer"]
    torch.testing.assert_close(adaptation_map(seen), looped_map(image, 0.3, dilation))
    assert (adaptation_map(seen) - looped_map(image.flip(2), 0.3, dilation)).abs().max() > 0.05


def test_a_layer_adapts_at_edges_only():
    found = adaptation_map(look_into(Own(), halves(), **PLAIN)["layer"])
    assert found[:, 7:9].min() > 0.3
    assert found[:, :7].max() == found[:, 9:].max() == 0


@pytest.mark.parametrize("form", ["laplacian", "inverse", "constant"])
def test_other_forms_stay_between_0_and_1(form):
    seen = look_into(Own(form=form), halves(), **PLAIN)["layer"]
    assert 0 <= seen.factors.min() <= seen.factors.max() == 1
    flat = adaptation_map(seen)[:, :6]
    assert flat.max() < 1e-6
    assert (adaptation_map(seen)[:, 7].min() > 0.1) == (form != "constant")


def test_k_is_drawn_where_it_belongs():
    """A window of nine taps a side, whose cells are too small for numbers."""
    model = Own(kernel_size=9, padding=4)
    (drawn,) = kernel_images(model, halves(), [(6, 8)], **PLAIN)["layer"]
    seen = look_into(model, halves(), **PLAIN)["layer"]
    colours = heat_image(seen.factors[:, 6, 8].view(9, 9))
    cell = 137 // 9
    left = drawn.width - (9 * cell + 2)  # the grid is at the right, under a title
    top = drawn.height - (9 * cell + 2)
    for i in range(9):
        for j in range(9):
            at = (left + j * cell + cell // 2 + 1, top + i * cell + cell // 2 + 1)
            inside = 0 <= 6 + i - 4 < 12 and 0 <= 8 + j - 4 < 16
            if inside:
                assert drawn.getpixel(at) == tuple(colours[i, j].tolist())
    assert colours[4, 4].tolist() != colours[4, 0].tolist()


def test_taps_outside_the_image_are_empty():
    factors = torch.ones(3, 3)
    inside = torch.ones(3, 3, dtype=torch.bool)
    inside[0, 0] = False
    drawn = canvas.grid(factors, inside, 60)
    assert drawn.getpixel((4, 6)) == canvas.OUTSIDE
    assert drawn.getpixel((30, 30)) == tuple(heat_image(torch.ones(1, 1))[0, 0].tolist())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": 2, "padding": 0},
        {"dilation": 3, "padding": 3},
        {"kernel_size": 4, "stride": 3, "padding": 1},
        {"kernel_size": (1, 5), "padding": (0, 2)},
    ],
    ids=str,
)
def test_a_window_is_found_where_it_looks(options):
    """A single bright pixel is seen by the window centred nearest to it."""
    image = torch.zeros(3, 14, 18)
    seen = look_into(Own(**options), image, **PLAIN)["layer"]
    for row, column in ((0, 0), (1, 5), (7, 3), (13, 17)):
        at = seen.pixel_at((row + 0.5) / 14, (column + 0.5) / 18)
        distance = [abs(a - b) for a, b in zip(seen.centre_of(*at), (row, column), strict=True)]
        every = [
            [abs(a - b) for a, b in zip(seen.centre_of(y, x), (row, column), strict=True)]
            for y in range(seen.factors.shape[1])
            for x in range(seen.factors.shape[2])
        ]
        assert distance == [min(d[0] for d in every), min(d[1] for d in every)]


def test_the_centre_of_a_window_is_its_centre_tap():
    """K of the centre tap is 1 whatever the features are; that of every other tap is not."""
    torch.manual_seed(0)
    image = torch.rand(3, 14, 18)
    seen = look_into(Own(stride=2), image, **PLAIN)["layer"]
    y, x = seen.centre_of(3, 4)
    left = (seen.features[:, y, x] - seen.features[:, y, x - 1]).square().mean()
    expected = torch.exp(-0.5 * left / 0.3**2)
    torch.testing.assert_close(seen.factors[3, 3, 4], expected)
    assert seen.factors[4, 3, 4] == 1
    assert seen.factors[3, 3, 4] < 1


def test_guidance_in_colours():
    torch.manual_seed(0)
    features = torch.randn(6, 1, 1) * torch.linspace(-1, 1, 40).expand(6, 30, 40)
    features[:, 5:15, 5:15] += torch.randn(6, 1, 1)
    image = guidance_image(features)
    assert (image.shape, image.dtype) == ((30, 40, 3), torch.uint8)
    assert torch.equal(image, guidance_image(features))
    assert torch.equal(image, guidance_image(features[[3, 0, 5, 2, 1, 4]]))
    assert torch.equal(image, guidance_image(3 * features + 2))
    assert not torch.equal(image, guidance_image(features.flip(2)))
    assert image.float().mean(2).std() > 20  # the first component is how light a pixel is


def test_one_channel_is_grey_and_two_are_not():
    one = guidance_image(torch.linspace(0, 1, 60).view(1, 6, 10))
    assert (one.amax(2).int() - one.amin(2).int()).max() <= 1
    assert one[0, 0, 0] < 60
    assert one[-1, -1, 0] > 220
    two = guidance_image(torch.rand(2, 6, 10, generator=torch.Generator().manual_seed(0)))
    assert (two.amax(2).int() - two.amin(2).int()).max() > 20


@pytest.mark.parametrize("level", [0.0, 5.0, 1e8])
def test_constant_features_are_one_grey(level):
    image = guidance_image(torch.full((5, 7, 9), level) * torch.rand(5, 1, 1))
    assert len({tuple(pixel) for pixel in image.flatten(0, 1).tolist()}) == 1


def test_an_outlier_does_not_hide_the_rest():
    features = torch.linspace(0, 1, 400).view(1, 20, 20).clone()
    features[0, 3, 3] = 1e4
    image = guidance_image(features).float()
    assert image.std() > 40


def test_few_pixels_on_an_even_ground_are_seen():
    features = torch.zeros(2, 40, 40)
    features[:, 3, 3] = 1
    image = guidance_image(features)
    assert not torch.equal(image[3, 3], image[0, 0])


def test_the_ramp_gets_ever_lighter():
    colours = heat_image(torch.linspace(0, 1, 200)[None])[0].double()
    light = colours @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64)
    assert (light.diff() >= -0.5).all()
    assert light[-1] - light[0] > 200
    assert torch.equal(
        heat_image(torch.tensor([[-1.0, 2.0]])), heat_image(torch.tensor([[0.0, 1]]))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model, folder: show(model, IMAGE[None], folder),
            "image must be [3, H, W], RGB, got [1, 3, 48, 64].",
        ),
        (
            lambda model, folder: show(model, 4 * IMAGE - 2, folder),
            f"image must be uint8 or in 0 … 1, got {(4 * IMAGE - 2).min().item():.3g} … "
            f"{(4 * IMAGE - 2).max().item():.3g}. Pass it before it is normalised.",
        ),
        (
            lambda model, folder: show(model, IMAGE, folder, pixels=[(1, 2), (48, 0)]),
            "pixel (48, 0) lies outside the image, 48×64.",
        ),
        (
            lambda model, folder: show(model, IMAGE, folder, pixels=[]),
            "pixels is empty. Name at least one (row, column), or leave it out.",
        ),
        (
            lambda model, folder: guidance_image(torch.zeros(1, 2, 3, 4)),
            "features must be [D, H, W], got [1, 2, 3, 4].",
        ),
    ],
    ids=["batch", "normalised", "outside", "no pixels", "no features"],
)
def test_what_cannot_be_drawn(model, tmp_path, call, message):
    with pytest.raises(ShapeError) as raised:
        call(model, tmp_path / "none")
    assert str(raised.value) == message
    assert not (tmp_path / "none").exists()


def test_nothing_to_show_while_disabled(model, tmp_path):
    with pacswap.disabled(model), pytest.raises(PlanError) as raised:
        show(model, IMAGE, tmp_path)
    assert str(raised.value) == (
        "no adapting kernel of this SceneNet was made: its layers rest in eval mode, or are "
        "disabled. There is nothing to show."
    )


def test_external_guidance_is_shown(tmp_path):
    torch.manual_seed(0)
    net = build(Source("pacswap", "scene_net", None))
    model = pacswap.swap(net, "head.conv", "external", example_input=IMAGE[None])
    features = torch.randn(1, 5, 12, 16)
    (path,) = show(model, IMAGE, tmp_path, guidance=features)
    assert path.name == "head.conv.png"
