"""Every kind of convolution and of network: sequences, clips, detectors, optical flow."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from same import assert_differ, assert_same
from torch import Tensor, nn

import pacswap
from pacswap.errors import PlanError
from pacswap.nn import PacConv1d, PacConv3d
from pacswap.surgery import calibrate, default_input
from pacswap.surgery.example import calibration_batch, of_size

IMAGES = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
CLIPS = torch.rand(2, 3, 6, 20, 24, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """ECA: a convolution over the channels of the pooled map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weights = self.conv(x.mean((2, 3))[:, None])
        return x * weights.sigmoid().view(len(x), -1, 1, 1)


class Clip(nn.Module):
    """A video network with a convolution in space, one in time and one in both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1))
        self.space = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))
        self.both = nn.Conv3d(4, 4, 3, padding=1, stride=2)
        self.frame = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        middle = self.frame(x[:, :, 1])
        return self.both(self.time(self.space(x).relu())) + middle.mean()


class Mine(nn.Conv3d):
    """A subclass that leaves `forward` alone, as torchvision's Conv3DSimple does."""

    def __init__(self) -> None:
        super().__init__(4, 4, (3, 3, 3), padding=1, bias=False)


def swapped(model: nn.Module, layers: Any, images: Tensor, guidance: Any = "stem") -> nn.Module:
    upgraded = pacswap.swap(model, layers, guidance, example_input=images)
    report = pacswap.verify(model, upgraded, images)
    assert report.passed, str(report)
    return upgraded


@pytest.mark.parametrize("guidance", ["stem", "input", {"from": ["input", "stem"], "channels": 8}])
def test_a_convolution_over_channels_is_swapped(guidance: Any) -> None:
    torch.manual_seed(0)
    upgraded = swapped(Attention(), "conv", IMAGES, guidance)
    assert isinstance(upgraded.conv, PacConv1d)
    assert isinstance(pacswap.revert(upgraded).conv, nn.Conv1d)


@pytest.mark.parametrize("layer", ["space", "time", "both"])
def test_a_convolution_of_clips_is_swapped(layer: str) -> None:
    torch.manual_seed(0)
    model = Clip()
    upgraded = swapped(model, layer, CLIPS)
    assert isinstance(upgraded.get_submodule(layer), PacConv3d)
    nn.init.constant_(upgraded.get_submodule(layer).blend, 0.7)
    assert_differ(model(CLIPS), upgraded(CLIPS))
    with pacswap.disabled(upgraded):
        assert_same(model(CLIPS), upgraded(CLIPS), tolerance=0)


def test_a_subclass_of_it_stays_one() -> None:
    model = Clip()
    model.both = Mine()
    upgraded = swapped(model, "both", CLIPS)
    assert isinstance(upgraded.both, Mine)
    assert type(pacswap.revert(upgraded).both) is Mine


@pytest.mark.parametrize(
    ("layer", "guidance", "message"),
    [
        (
            "frame",
            "stem",
            "cannot feed 'frame' from 'stem', which returns [2, 4, 6, 20, 24]: the layer filters "
            "maps [B, C, H, W]. Name a guidance that returns what the layer filters.",
        ),
        (
            "time",
            "frame",
            "cannot feed 'time' from 'frame', which returns [2, 4, 20, 24]: a map is the same "
            "along the first axis, and the layer's window has a single tap along the last. Name a "
            "guidance that returns what the layer filters.",
        ),
        (
            "both",
            ["stem", "frame"],
            "'frame' returns [2, 4, 20, 24] and 'stem' [2, 4, 6, 20, 24], which cannot be "
            "concatenated. Name sources of as many axes.",
        ),
    ],
    ids=["clip guides map", "map guides time", "clip and map"],
)
def test_axes_that_do_not_fit_are_refused(layer: str, guidance: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        pacswap.plan(Clip(), layer, guidance, example_input=CLIPS)
    assert str(caught.value) == f"cannot upgrade Clip: guidance: {message}"


class Line(nn.Module):
    """A convolution over the rows of a map, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x).flatten(2))


def test_a_map_guides_no_line_but_that_of_its_channels() -> None:
    with pytest.raises(PlanError) as caught:
        pacswap.plan(Line(), "conv", "stem", example_input=IMAGES)
    assert str(caught.value) == (
        "cannot upgrade Line: guidance: cannot feed 'conv' from 'stem', which returns "
        "[2, 4, 20, 24]: the layer filters sequences [B, C, L]. Name a guidance that returns what "
        "the layer filters."
    )
    torch.manual_seed(0)
    swapped(Line(), "conv", IMAGES, "flatten")


def test_a_map_guides_a_clip() -> None:
    torch.manual_seed(0)
    swapped(Clip(), "both", CLIPS, "frame")


def test_what_enlarges_is_named_elsewhere() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 4, stride=2))
    with pytest.raises(PlanError) as caught:
        pacswap.plan(model, "1", "0", example_input=IMAGES)
    assert str(caught.value) == (
        "cannot upgrade Sequential: layers: cannot swap '1': it is a ConvTranspose2d, which "
        "enlarges. Name it in an upsampling: operation='upsample', or upsample: in a recipe."
    )


# ---- what a model takes


class Config(nn.Sequential):
    def __init__(self, channels: int, size: tuple[int, int, int]) -> None:
        super().__init__(nn.Conv2d(channels, 4, 3))
        self.default_cfg = {"input_size": size}


class Folded(nn.Module):
    """A stem that folds space into channels, as timm's TResNet has."""

    default_cfg: ClassVar = {"input_size": (3, 32, 32)}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pixel_unshuffle(x, 2))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Config(3, (3, 48, 64)), (1, 3, 48, 64)),
        (Config(1, (3, 48, 64)), (1, 1, 48, 64)),
        (Config(5, (3, 48, 64)), (1, 5, 48, 64)),
        (Folded(), (1, 3, 32, 32)),
        (nn.Conv2d(4, 4, 3), (1, 4, 224, 224)),
        (nn.Conv3d(3, 4, 3), (1, 3, 16, 112, 112)),
        (nn.Conv1d(2, 4, 3), (1, 2, 1024)),
    ],
    ids=["named", "grey", "wide", "folded", "image", "clip", "sequence"],
)
def test_a_default_input_has_the_shape_that_runs(model: nn.Module, shape: Any) -> None:
    example = default_input(model)
    assert isinstance(example, Tensor)
    assert tuple(example.shape) == shape
    assert example.is_meta


def test_images_of_an_example_get_another_size() -> None:
    example = ([torch.empty(3, 9, 9)], torch.empty(1, 3, 9, 9), torch.tensor([1]))
    ([inner], outer, index) = of_size(example, (3, 40, 30))
    assert (inner.shape, outer.shape) == ((3, 40, 30), (1, 3, 40, 30))
    assert torch.equal(index, torch.tensor([1]))
    clip = of_size(torch.empty(1, 3, 8, 9, 9), (3, 40, 30))
    assert clip.shape == (1, 3, 8, 40, 30)


def test_scenes_stand_in_for_every_image_of_an_example() -> None:
    example = ([torch.empty(3, 32, 32, device="meta")], torch.empty(2, 3, 4, 32, 32), 7)
    ([image], clip, number) = calibration_batch(example)
    assert (image.shape, clip.shape, number) == ((3, 32, 32), (2, 3, 4, 32, 32), 7)
    assert image.std() > 0.1
    assert not torch.equal(clip[:, :, 0], clip[:, :, 1])


def test_a_network_without_images_needs_its_own_calibration() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3, padding=1))
    words = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(PlanError, match="this model's input has none"):
        pacswap.swap(model, "2", "1", example_input=words)
    upgraded = pacswap.swap(model, "2", "1", kernel={"bandwidth": 1.0}, example_input=words)
    assert calibrate(upgraded, pacswap.surgery.plan_of(upgraded), words) == {}
