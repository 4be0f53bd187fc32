"""The drawn scenes, and the small network that ships trained on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pacswap.errors import ShapeError
from pacswap.scenes import CLASSES, MEAN, STD, draw_batch, draw_scene, normalize
from pacswap.zoo.scene_net import SceneNet

WEIGHTS = Path(__file__).parents[1] / "recipes" / "quickstart.safetensors"
HELD_OUT = range(1_000_000, 1_000_012)  # the first of those that the training script holds out


@pytest.fixture(scope="module")
def held_out() -> tuple[Tensor, Tensor]:
    return draw_batch(HELD_OUT)


@pytest.fixture(scope="module")
def trained() -> SceneNet:
    model = SceneNet()
    model.load_state_dict(load_file(WEIGHTS), strict=True)
    return model.eval()


@torch.no_grad()
def mean_iou(model: SceneNet, images: Tensor, masks: Tensor) -> float:
    predicted = model(normalize(images)).argmax(1)
    ious = []
    for index in range(len(CLASSES)):
        found, true = predicted == index, masks == index
        ious.append((found & true).sum() / (found | true).sum().clamp(min=1))
    return torch.stack(ious).mean().item()


def test_a_seed_draws_the_same_scene_again() -> None:
    (image, mask), (again, mask_again) = draw_scene(3, (32, 40)), draw_scene(3, (32, 40))
    assert torch.equal(image, again)
    assert torch.equal(mask, mask_again)


def test_another_seed_draws_another_scene() -> None:
    (image, mask), (other, other_mask) = draw_scene(3, (32, 40)), draw_scene(4, (32, 40))
    assert not torch.allclose(image, other, atol=0.1)
    assert not torch.equal(mask, other_mask)


def test_another_size_shows_the_same_scene() -> None:
    (_, coarse), (_, fine), (_, other) = (
        draw_scene(5, (48, 64)),
        draw_scene(5, (96, 128)),
        draw_scene(6, (48, 64)),
    )
    assert (fine[::2, ::2] == coarse).float().mean() > 0.95
    assert (other == coarse).float().mean() < 0.9


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    image, _ = draw_scene(7, (32, 40))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw_scene(7, (32, 40))[0], image)


def test_default_dtype_and_device_do_not_matter() -> None:
    expected, _ = draw_scene(7, (32, 40))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            image, _ = draw_scene(7, (32, 40))
    finally:
        torch.set_default_dtype(torch.float32)
    assert image.dtype == torch.float32
    assert torch.equal(image, expected)


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (16, 96), (80, 16)])
def test_shapes_dtypes_and_ranges(size: tuple[int, int]) -> None:
    image, mask = draw_scene(11, size)
    assert (image.shape, image.dtype) == ((3, *size), torch.float32)
    assert (mask.shape, mask.dtype) == (size, torch.int64)
    assert bool(torch.isfinite(image).all())
    assert 0 <= image.min() < image.max() <= 1
    assert 0 <= mask.min() < mask.max() < len(CLASSES)


def test_every_class_occurs(held_out: tuple[Tensor, Tensor]) -> None:
    share = held_out[1].flatten().bincount(minlength=len(CLASSES)) / held_out[1].numel()
    assert share.shape == (len(CLASSES),)
    assert share.min() > 0.005
    assert share.max() < 0.6


def test_colour_alone_does_not_give_the_class(held_out: tuple[Tensor, Tensor]) -> None:
    """Even the best guess from a pixel's colour, fitted to these very scenes, is often wrong."""
    images, masks = held_out
    levels = (images * 7.99).long()
    bins = (levels[:, 0] * 64 + levels[:, 1] * 8 + levels[:, 2]) * len(CLASSES) + masks
    counts = torch.bincount(bins.flatten(), minlength=512 * len(CLASSES)).view(512, len(CLASSES))
    assert counts.max(1).values.sum() / counts.sum() < 0.8


def test_a_batch_is_its_scenes_stacked() -> None:
    images, masks = draw_batch([5, 2], (24, 32))
    assert images.shape == (2, 3, 24, 32)
    assert masks.shape == (2, 24, 32)
    image, mask = draw_scene(2, (24, 32))
    assert torch.equal(images[1], image)
    assert torch.equal(masks[1], mask)


@pytest.mark.parametrize("size", [(15, 128), (96, 8), (96.0, 128), (96,), (3, 96, 128)])
def test_a_wrong_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError) as caught:
        draw_scene(0, size)
    assert str(caught.value) == (
        f"size={size!r}: a scene needs (height, width), two whole numbers of pixels, each at "
        "least 16. Try size=(96, 128)."
    )


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ShapeError) as caught:
        draw_batch([])
    assert str(caught.value) == (
        "seeds is empty: a batch needs at least one scene. Try seeds=range(4)."
    )


def test_normalize_takes_out_mean_and_deviation() -> None:
    mean, std = (torch.tensor(rgb, dtype=torch.float64)[:, None, None] for rgb in (MEAN, STD))
    expected = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)[:, None, None].expand(3, 2, 2)
    torch.testing.assert_close(normalize(mean + std * expected), expected)


@pytest.mark.parametrize("size", [(16, 16), (17, 31), (33, 47), (96, 128)])
def test_the_network_takes_any_size(size: tuple[int, int]) -> None:
    traced = torch.fx.symbolic_trace(SceneNet(width=8).eval())
    images = torch.zeros(2, 3, *size)
    assert traced(images).shape == (2, len(CLASSES), *size)


def test_the_weights_are_small_and_say_where_they_come_from() -> None:
    assert WEIGHTS.stat().st_size < 1.4e6
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["command"].startswith("python benchmarks/train_quickstart.py")
    assert float(metadata["miou"]) > 0.75


def test_the_weights_segment_held_out_scenes(
    trained: SceneNet, held_out: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    assert mean_iou(trained, *held_out) > 0.7
    assert mean_iou(SceneNet().eval(), *held_out) < 0.2
