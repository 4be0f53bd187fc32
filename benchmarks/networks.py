"""Whole networks: upgraded against original, in turns, in one process.

    python benchmarks/networks.py [--seconds 10] [--networks GLOB …] [--csv FILE] [--plot FILE]
    python benchmarks/networks.py --growth [--csv FILE] [--plot FILE]  # by size, by swapped layers

Prints ratios of the upgraded network to the original: forward, a training step (forward, loss,
backward, SGD), and the peak memory of a step. Random weights: they cost what trained ones cost.
The blend is 0.5, so that every layer adapts; `at the swap` is 0. The first form takes about ten
minutes on two cores, the second as long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from in_turns import Run, in_turns, peak_bytes, table
from torch import Tensor, nn

import pacswap

COLUMNS = ("network", "what", "median", "low", "high")


@dataclass(frozen=True)
class Network:
    """A network, and how it is upgraded."""

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    guidance: dict[str, Any]
    input: tuple[int, int, int, int]


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="per figure")
    parser.add_argument("--networks", nargs="+", metavar="GLOB", help="only those so named")
    parser.add_argument("--growth", action="store_true", help="one network, larger and larger")
    parser.add_argument("--largest", type=int, default=2048, help="image side of --growth")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--csv", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw them there")
    options = parser.parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    chosen = growth(options.largest) if options.growth else networks()
    rows = []
    with table(options.csv, COLUMNS) as write:
        for network in chosen:
            if options.networks and not any(fnmatch(network.name, g) for g in options.networks):
                continue
            for row in measured(network, options.seconds):
                print(f"{row['network']:<44}{row['what']:<22}{row['median']:6.2f} "
                      f"({row['low']:.2f}…{row['high']:.2f})", flush=True)  # fmt: skip
                write(row)
                rows.append(row)
    if options.plot:
        plot(rows, options.plot)


def networks() -> Iterator[Network]:
    """What the shipped recipes upgrade, and the network of the project's goal."""
    import timm
    from torchvision.models import segmentation as heads

    bare: Any = {"weights": None, "weights_backbone": None, "num_classes": 21}
    fcn = ("backbone.layer2.3.conv2", "backbone.layer3.5.conv2", "backbone.layer4.2.conv2")
    first = {"from": "backbone.layer1", "channels": 16}
    yield Network("fcn_resnet50, three layers, 512×512", lambda: heads.fcn_resnet50(**bare), fcn,
                  first, (1, 3, 512, 512))  # fmt: skip
    yield Network("deeplabv3_resnet50, atrous head, 256×256",
                  lambda: heads.deeplabv3_resnet50(**bare), ("classifier.0.convs.[123].0",),
                  first, (2, 3, 256, 256))  # fmt: skip
    yield Network("resnet50, last 3×3 of each stage, 224×224",
                  lambda: timm.create_model("resnet50"),
                  ("layer2.3.conv2", "layer3.5.conv2", "layer4.2.conv2"),
                  {"from": "layer1", "channels": 16}, (4, 3, 224, 224))  # fmt: skip
    yield Network("mobilenetv2_100, four depthwise, 224×224",
                  lambda: timm.create_model("mobilenetv2_100"),
                  ("blocks.[3456].0.conv_dw",),
                  {"from": "blocks.1", "channels": 16}, (4, 3, 224, 224))  # fmt: skip
    yield Network("convnext_atto, three depthwise 7×7, 224×224",
                  lambda: timm.create_model("convnext_atto"),
                  ("stages.[123].blocks.0.conv_dw",),
                  {"from": "stages.0", "channels": 16}, (4, 3, 224, 224))  # fmt: skip


def growth(largest: int) -> Iterator[Network]:
    """resnet18 by the size of its image, and by how many of its layers are swapped."""
    import timm

    def build() -> nn.Module:
        return timm.create_model("resnet18")

    every = tuple(f"layer{i}.{j}.conv{k}" for i in (2, 3, 4) for j in (0, 1) for k in (1, 2))
    every = tuple(name for name in every if name not in ("layer2.0.conv1",))
    first, side = {"from": "layer1", "channels": 16}, 256
    while side <= largest:
        yield Network(f"{side}×{side}, 4 layers", build, every[-4:], first, (1, 3, side, side))
        side *= 2
    for count in (1, 2, 4, 8, len(every)):
        yield Network(f"512×512, {count} layers", build, every[-count:], first, (1, 3, 512, 512))


def measured(network: Network, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of ratios."""
    torch.manual_seed(0)
    original = network.build()
    options: Any = {"example_input": torch.randn(network.input)}
    upgraded = pacswap.swap(original, list(network.layers), network.guidance, **options)
    images = torch.randn(network.input)
    adapting = deepcopy(upgraded)
    with torch.no_grad():
        for name, parameter in adapting.named_parameters():
            if name.endswith("blend"):
                parameter.fill_(0.5)
    models = {"original": original, "adapting": adapting, "at the swap": upgraded}
    kinds: dict[str, Callable[[nn.Module, Tensor], Run]] = {"forward": forward, "step": step}
    for kind, make in kinds.items():
        runs = {name: make(model, images) for name, model in models.items()}
        for name, ratio in in_turns(runs, seconds=seconds, least=5).items():
            if name != "original":
                what = f"{kind}, {name}" if name != "adapting" else kind
                yield {"network": network.name, "what": what, **ratio._asdict()}
    runs = {name: step(model, images) for name, model in models.items()}
    part = peak_bytes(runs["adapting"]) / max(1, peak_bytes(runs["original"]))
    row: dict[str, Any] = {"network": network.name, "what": "memory of a step"}
    yield {**row, "median": part, "low": part, "high": part}


def forward(model: nn.Module, images: Tensor) -> Run:
    """In eval mode, without gradients."""

    def run() -> object:
        model.eval()
        with torch.no_grad():
            return model(images)

    return run


def step(model: nn.Module, images: Tensor) -> Run:
    """In train mode: forward, loss, backward and an update too small to matter."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        output = model(images)
        output = output["out"] if isinstance(output, dict) else output
        output.square().mean().backward()
        optimizer.step()

    return run


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios by network, forward, step and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["network"] for row in rows))
    size = (9, 0.4 * len(names) + 1.5)
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    for i, what in enumerate(("forward", "step", "memory of a step")):
        found = {row["network"]: row["median"] for row in rows if row["what"] == what}
        places = [names.index(name) + 0.25 * (i - 1) for name in found]
        axis.barh(places, list(found.values()), height=0.25, label=what)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("times the original's")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
