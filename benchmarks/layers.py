"""One layer: pixel-adaptive convolutions against the plain one, in turns, in one process.

    python benchmarks/layers.py [--seconds 3] [--layers GLOB …] [--csv FILE] [--plot FILE]
    python benchmarks/layers.py --peer PATH  # also NVlabs/pacnet, a checkout of its branch th14
    python benchmarks/layers.py --device cuda --dtype bfloat16 --batch 16 [--channels-last]

Prints, for each layer, ratios to `F.conv2d`: the median over rounds, with the quarters around it.
`ours` is `pacswap.ops.pac_conv2d`, `im2col` the textbook's way (unfold, times K, a matrix product),
`peer` the authors' code. The adapting kernel is computed beforehand; `kernel` is
`pacswap.ops.adapting_kernel` of a guidance with 128 channels. `memory` is the peak of a step
(forward and backward) beside what was there before. Takes about five minutes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from in_turns import Run, in_turns, peak_bytes, table
from torch import Tensor

from pacswap import ops

GUIDANCE_CHANNELS = 128
Pac = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """A convolution of a well-known network, padded to keep its size at stride 1."""

    name: str
    C_in: int
    C_out: int
    kernel_size: int
    size: int
    groups: int = 1
    stride: int = 1
    dilation: int = 1

    @property
    def geometry(self) -> dict[str, int]:
        """Options of a window."""
        padding = self.dilation * (self.kernel_size // 2)
        return {"stride": self.stride, "padding": padding, "dilation": self.dilation}


LAYERS = (
    Layer("smallest", 16, 16, 3, 32),
    Layer("VGG-16 conv1_2 at half size", 64, 64, 3, 112),
    Layer("C=64 at 128×128", 64, 64, 3, 128),
    Layer("VGG-16 conv3_3", 256, 256, 3, 56),
    Layer("VGG-16 conv5_3", 512, 512, 3, 14),
    Layer("ResNet-50 layer2 conv2", 128, 128, 3, 28),
    Layer("ResNet-50 layer2.0 conv2 stride 2", 128, 128, 3, 56, stride=2),
    Layer("ResNet-50 layer4 conv2", 512, 512, 3, 7),
    Layer("FCN layer3 conv2 at 64×64", 256, 256, 3, 64, dilation=2),
    Layer("DeepLab atrous 2048, rate 12", 2048, 256, 3, 28, dilation=12),
    Layer("ResNeXt-50 32 groups", 256, 256, 3, 28, groups=32),
    Layer("ConvNeXt-T stage 1 depthwise 7×7", 96, 96, 7, 56, groups=96),
    Layer("ConvNeXt-T stage 3 depthwise 7×7", 384, 384, 7, 14, groups=384),
    Layer("MobileNetV2 depthwise 3×3 at 56", 144, 144, 3, 56, groups=144),
    Layer("MobileNetV2 depthwise 3×3 at 14", 576, 576, 3, 14, groups=576),
)


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    options = parsed(words)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, on "
          f"{torch.cuda.get_device_name() if options.device == 'cuda' else 'the CPU'}")  # fmt: skip
    columns = ("layer", "contender", "what", "median", "low", "high")
    rows: list[dict[str, Any]] = []
    with table(options.csv, columns) as write:
        for layer in LAYERS:
            if options.layers and not any(fnmatch(layer.name, glob) for glob in options.layers):
                continue
            print(f"{layer.name}: {layer.C_in}→{layer.C_out}, {layer.kernel_size}×"
                  f"{layer.kernel_size} on {layer.size}×{layer.size}")  # fmt: skip
            for row in measured(layer, ways_of(layer, options), options):
                print(f"    {row['what']:<10}{row['contender']:<8}{row['median']:6.2f} "
                      f"({row['low']:.2f}…{row['high']:.2f})", flush=True)  # fmt: skip
                write({"layer": layer.name, **row})
                rows.append({"layer": layer.name, **row})
    if options.plot:
        plot(rows, options.plot)
    slow = [row for row in rows if row["contender"] == "ours" and row["median"] > options.guard]
    if slow:
        sys.exit(f"more than {options.guard} times the convolution: {slow}")


def parsed(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per figure")
    parser.add_argument("--layers", nargs="+", metavar="GLOB", help="only those so named")
    parser.add_argument("--backend", default="auto", help="of pacswap")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="of torch; as many as it likes if left out")
    parser.add_argument("--peer", type=Path, help="a checkout of NVlabs/pacnet, branch th14")
    parser.add_argument("--guard", type=float, metavar="RATIO", default=float("inf"),
                        help="exit 1 if ours takes more")  # fmt: skip
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels-last", action="store_true", help="of images and weights")
    parser.add_argument("--csv", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw them there")
    options = parser.parse_args(words)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peer and not (options.peer / "pac.py").is_file():
        parser.error(f"--peer: no pac.py in {options.peer}. Give the folder of a checkout.")
    return options


def ways_of(layer: Layer, options: argparse.Namespace) -> dict[str, Pac]:
    """The contenders that can do this layer."""
    geometry: dict[str, Any] = {**layer.geometry, "groups": layer.groups}

    def ours(x: Tensor, K: Tensor, w: Tensor) -> Tensor:
        return ops.pac_conv2d(x, K, w, backend=options.backend, **geometry)

    ways: dict[str, Pac] = {"ours": ours}
    if layer.groups == 1:
        ways["im2col"] = lambda x, K, w: im2col(x, K, w, layer)
    if options.peer and layer.groups == 1:
        sys.path.insert(0, str(options.peer))
        pac = importlib.import_module("pac")

        def peer(x: Tensor, K: Tensor, w: Tensor) -> Tensor:
            window = (layer.kernel_size, layer.kernel_size)
            return pac.pacconv2d(x, K.unflatten(2, window), w, **layer.geometry)

        ways["peer"] = peer
    return ways


def im2col(x: Tensor, K: Tensor, w: Tensor, layer: Layer) -> Tensor:
    """The textbook's way: all taps of all pixels in one matrix, times K, times W."""
    columns = F.unfold(x, layer.kernel_size, **layer.geometry)  # [B, C·taps, pixels]
    adapted = columns.unflatten(1, (x.shape[1], -1)) * K.flatten(3)
    made = w.flatten(1) @ adapted.flatten(1, 2)
    return made.unflatten(2, tuple(K.shape[3:]))


def measured(layer: Layer, ways: Mapping[str, Pac], options: argparse.Namespace) -> Any:
    """Rows of figures of one layer."""
    tensors, guidance = drawn(layer, options)
    forward, step = {}, {}
    for name, way in {"conv": None, **ways}.items():
        forward[name], step[name] = runs(layer, way, tensors)
    same(forward)
    device, seconds = options.device, options.seconds
    for what, contenders in (("forward", forward), ("step", step)):
        for name, ratio in in_turns(contenders, seconds=seconds, device=device).items():
            if name != "conv":
                yield {"what": what, "contender": name, **ratio._asdict()}
    beside = {"conv": forward["conv"], "kernel": kernel_of(layer, guidance)}
    ratio = in_turns(beside, seconds=seconds, device=device)["kernel"]
    yield {"what": "kernel", "contender": "ours", **ratio._asdict()}
    base = peak_bytes(step["conv"], device)
    for name in ways:
        part = peak_bytes(step[name], device) / max(base, 1)
        yield {"what": "memory", "contender": name, "median": part, "low": part, "high": part}


def drawn(layer: Layer, options: argparse.Namespace) -> tuple[list[Tensor], Tensor]:
    """([input, kernel, weight], guidance)."""
    made: dict[str, Any] = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    torch.manual_seed(0)
    B, H, k = options.batch, layer.size, layer.kernel_size
    x = torch.randn(B, layer.C_in, H, H, **made)
    w = torch.randn(layer.C_out, layer.C_in // layer.groups, k, k, **made) / (k * layer.C_in**0.5)
    f = torch.randn(B, GUIDANCE_CHANNELS, H, H, **made)
    K = ops.adapting_kernel(f, k, **layer.geometry, distance="mean")
    if options.channels_last:
        x, w, f = (t.contiguous(memory_format=torch.channels_last) for t in (x, w, f))
    return [x, K.detach(), w], f


def runs(layer: Layer, way: Pac | None, tensors: list[Tensor]) -> tuple[Run, Run]:
    """(forward, forward with backward) of a contender; None is the plain convolution."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    learned = [leaves[0], leaves[2]] if way is None else leaves

    def made() -> Tensor:
        if way is not None:
            return way(*leaves)
        return F.conv2d(leaves[0], leaves[2], groups=layer.groups, **layer.geometry)

    def forward() -> Tensor:
        with torch.no_grad():
            return made()

    def step() -> object:
        output = made()
        return torch.autograd.grad(output, learned, torch.ones_like(output))

    return forward, step


def same(forward: Mapping[str, Run]) -> None:
    """Raise unless all contenders but the plain convolution compute the same."""
    truth: Any = forward["ours"]()
    for name, run in forward.items():
        worst = (run() - truth).float().abs().max() / truth.float().abs().max()  # type: ignore
        if name != "conv" and not worst < 0.05:
            raise AssertionError(f"{name} differs from ours by {worst:.2g} of the largest output")


def kernel_of(layer: Layer, guidance: Tensor) -> Run:
    """The adapting kernel of a layer."""

    def kernel() -> object:
        with torch.no_grad():
            options: Any = {**layer.geometry, "distance": "mean"}
            return ops.adapting_kernel(guidance, layer.kernel_size, **options)

    return kernel


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratios, with the goal of 1 as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    options: Any = {"sharey": True, "layout": "constrained"}
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 0.45 * len(layers) + 1.5), **options)
    for axis, what in zip(axes, ("forward", "step", "memory"), strict=True):
        for i, contender in enumerate(contenders):
            found = {
                r["layer"]: r for r in rows if (r["what"], r["contender"]) == (what, contender)
            }
            places = [layers.index(name) + 0.25 * (i - 1) for name in found]
            values = [row["median"] for row in found.values()]
            axis.barh(places, values, height=0.25, label=contender)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title({"step": "forward and backward", "memory": "peak memory"}.get(what, what))
        axis.set_xlabel("times the plain convolution's")
    axes[0].set_yticks(range(len(layers)), layers)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
