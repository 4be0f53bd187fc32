"""Writes what this version of pacswap leaves behind for all later ones: see README.md beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pacswap
from pacswap.zoo import Source, build

FOLDER = Path(__file__).parent


def image() -> Tensor:
    """[1, 3, 48, 64] of numbers that every machine computes alike."""
    return ((torch.arange(3 * 48 * 64) * 7919 % 33 - 16) / 8).reshape(1, 3, 48, 64)


def numbers(model: nn.Module) -> Tensor:
    """Some of a model's logits."""
    with torch.inference_mode():
        return model(image())[0, :, ::8, ::8].contiguous()


def train_(model: nn.Module, names: tuple[str, ...]) -> None:
    """Some steps for the parameters whose names hold one of these words."""
    chosen = [p for name, p in model.named_parameters() if any(word in name for word in names)]
    optimizer = torch.optim.SGD(chosen, lr=0.3)
    target = torch.arange(48 * 64).reshape(1, 48, 64) // 16 % 6
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image()), target).backward()
        optimizer.step()


def added() -> nn.Module:
    """The quickstart's weights; trained: what was added, the classifier, the head's statistics."""
    net = build(Source("pacswap", "scene_net", "DEFAULT"))
    layers = ["layer2.1.conv2", "layer3.*.conv2", "head.conv"]
    model = pacswap.swap(net, layers, {"from": "layer1", "channels": 8}).eval()
    model.head.bn.train()
    train_(model, ("blend", "adapting_kernel", "guidance.", "classifier"))
    return model.eval()


def full() -> nn.Module:
    """A narrow network with a group of every operation that its structure has room for."""
    net = build(Source("pacswap", "scene_net", None, {"width": 8}))
    groups = [
        {"layers": "layer3.*.conv2", "guidance": ["layer1", "layer2"]},
        {"layers": "interpolate", "guidance": "input", "operation": "upsample"},
        {"layers": "head.classifier", "guidance": "input", "operation": "append"},
    ]
    model = pacswap.swap(net, groups=groups, example_input=image())
    train_(model, ("",))
    return model.eval()


def main() -> None:
    """Write all of it.

    Raises:
        FileExistsError: this version has written its files already, and they stay as they are.
    """
    torch.manual_seed(0)
    folder = FOLDER / pacswap.__version__
    folder.mkdir()
    models = {"added": added(), "full": full()}
    for name, model in models.items():
        pacswap.save(model, folder / name, added_only=name == "added")
    save_file({n: numbers(m) for n, m in models.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
