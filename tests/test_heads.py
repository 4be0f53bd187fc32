"""Convolutions inside attention: a kernel for each image serves all its heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pacswap
from pacswap.errors import PlanError


class Attention(nn.Module):
    """Pools its queries with one convolution for all heads, as MViT does."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Conv2d(channels, channels, 1)
        self.pool = nn.Conv2d(channels // num_heads, channels // num_heads, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        heads = self.query(x).reshape(B * self.num_heads, C // self.num_heads, H, W)
        return self.pool(heads).reshape(B, C, H, W)


class HeadsFirst(Attention):
    """As many maps, but the first heads of all images come before the second ones."""

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        heads = self.query(x).reshape(B, self.num_heads, C // self.num_heads, H, W)
        made = self.pool(heads.transpose(0, 1).flatten(0, 1))
        return made.reshape(self.num_heads, B, -1, H, W).transpose(0, 1).reshape(B, C, H, W)


class Windows(nn.Module):
    """Cuts four windows out of each image: as many maps, but parts of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = 4
        self.attention = self.inner(channels)

    def inner(self, channels: int) -> nn.Module:
        return Attention(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        cut = x.reshape(B, C, 2, H // 2, 2, W // 2).permute(0, 2, 4, 1, 3, 5)
        made = self.attention(cut.reshape(B * 4, C, H // 2, W // 2))
        whole = made.reshape(B, 2, 2, C, H // 2, W // 2).permute(0, 3, 1, 4, 2, 5)
        return whole.reshape(B, C, H, W)


class OwnWindows(Windows):
    """Cuts them itself, as torchvision's Swin does, and has as many heads as windows."""

    def inner(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))


class Network(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 8, 3, padding=1), part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.stem(x).relu())


def upgraded(part: nn.Module, layer: str) -> tuple[nn.Module, nn.Module]:
    network = Network(part)
    example = torch.rand(2, 3, 16, 16)
    return network, pacswap.swap(network, layer, "stem", example_input=example)


def test_each_head_of_an_image_has_the_images_kernel():
    network, model = upgraded(Attention(8, 4), "part.pool")
    images = torch.rand(3, 3, 18, 16)
    assert torch.equal(model(images), network(images))
    assert model.part.pool.heads == 4
    with torch.no_grad():
        model.part.pool.blend.fill_(1.0)
        both = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        model.part.pool._of_heads = lambda kernel: kernel.repeat(4, 1, 1, 1, 1)
        mixed = model(images)  # the twin: each head with the kernel of another image
    torch.testing.assert_close(both, alone)
    assert not torch.allclose(both, network(images), atol=1e-3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mixed, alone)


def test_it_learns_is_saved_and_undone(tmp_path):
    network, model = upgraded(Attention(8, 4), "part.pool")
    model(torch.rand(2, 3, 16, 16)).square().mean().backward()
    assert model.part.pool.blend.grad.abs() > 0
    report = pacswap.verify(network, model, torch.rand(2, 3, 16, 16))
    assert report.passed, str(report)
    back = pacswap.revert(model)
    assert type(back.part.pool) is nn.Conv2d and not hasattr(back.part.pool, "heads")


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        (Windows(8), "part.attention.pool"),  # a module further out has as many heads as windows
        (OwnWindows(8), "part.attention.0"),
        (HeadsFirst(8, 4), "part.pool"),
    ],
    ids=["windows", "own-windows", "heads-first"],
)
def test_other_maps_are_no_heads(part: nn.Module, layer: str):
    with pytest.raises(PlanError) as raised:
        upgraded(part, layer)
    assert str(raised.value) == (
        f"cannot upgrade Network: guidance: cannot feed '{layer}' from 'stem': it "
        "filters 8 maps where the guidance has 2. It runs on regions or windows of the image, or "
        "on several images at once; name a guidance that runs on the same ones."
    )


class Videos(nn.Module):
    """One clip as the example: only the mark's own two tell what belongs to which."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part = nn.Conv3d(3, 8, 3, padding=1), part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.stem(x).relu().mean(2))


def test_one_clip_tells_heads_from_their_order():
    clip = torch.rand(1, 3, 4, 16, 16)
    model = pacswap.swap(Videos(Attention(8, 4)), "part.pool", "part.query", example_input=clip)
    assert model.part.pool.heads == 4
    with pytest.raises(PlanError, match="it filters 4 maps where the guidance has 1"):
        pacswap.plan(Videos(HeadsFirst(8, 4)), "part.pool", "part.query", example_input=clip)


def test_a_network_without_values_has_heads_too():
    with torch.device("meta"):
        network = Network(Attention(8, 4))
    plan = pacswap.plan(network, "part.pool", "stem", example_input=torch.rand(1, 3, 16, 16))
    assert plan.layers[0].heads == 4
