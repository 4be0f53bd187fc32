"""The models of timm and torchvision: their families, their convolutions, what they take."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pacswap.zoo import Source, build

BATCH = 2
SMALL_SIDES = (96, 128)  # of images, in pixels; tried before a model's own
OWN_SIDE = 224  # where a library does not say
OWN_SIDES = {"torchvision inception": 299, "torchvision quantization.inception": 299}
OPENED = 0.5  # what scales that start at nothing are set to
NOTHING = 0.1  # a constant vector below this is opened


@dataclass(frozen=True, order=True)
class Model:
    """A name in a library.

    Attributes:
        library: `timm` or `torchvision`.
        name: as the library lists it.
    """

    library: str
    name: str

    @property
    def family(self) -> str:
        """The library and the module that the model is written in, such as `timm resnet`."""
        if self.library == "timm":
            home = timm.model_entrypoint(self.name).__module__
        else:
            home = torchvision.models.get_model_builder(self.name).__module__
        return f"{self.library} {home.removeprefix(f'{self.library}.models.')}"

    @property
    def source(self) -> Source:
        """What builds it with random weights."""
        return Source(self.library, self.name, None, ARGUMENTS.get(self.family, {}))

    def __str__(self) -> str:
        """The library and the name."""
        return f"{self.library} {self.name}"


# Detectors enlarge their images, to 800 pixels as a rule, which says no more about a swap.
_SMALLER = {"min_size": 160, "max_size": 256}
ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "torchvision detection.faster_rcnn": _SMALLER,
    "torchvision detection.mask_rcnn": _SMALLER,
    "torchvision detection.keypoint_rcnn": _SMALLER,
    "torchvision detection.fcos": _SMALLER,
    "torchvision detection.retinanet": _SMALLER,
}


def models(library: str | None = None) -> list[Model]:
    """All of a library, or of both."""
    listed = {"timm": timm.list_models, "torchvision": torchvision.models.list_models}
    return [Model(lib, name) for lib, names in listed.items() for name in names()
            if library in (None, lib)]  # fmt: skip


def convolutions(network: nn.Module) -> dict[str, _ConvNd]:
    """The convolutions that look at more than a pixel, those that cut patches left out."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _ConvNd) and max(module.kernel_size) > 1 and not cuts_patches(module)
    }


def cuts_patches(conv: _ConvNd) -> bool:
    """Whether windows neither overlap nor leave the picture: a linear layer on each patch."""
    if type(conv).__name__.endswith("Same"):  # timm's: padded when they run, whatever they say
        return False
    unpadded = conv.padding in ("valid", (0,) * len(conv.kernel_size))
    return unpadded and tuple(conv.stride) == tuple(conv.kernel_size)


class Example(NamedTuple):
    """What a model is called with.

    Attributes:
        evaluate: the arguments in eval mode.
        train: the arguments in train mode.
        words: what it is.
    """

    evaluate: tuple[Any, ...]
    train: tuple[Any, ...]
    words: str

    @property
    def shown(self) -> tuple[Any, ...]:
        """What pacswap is told of it: what its user would predict with."""
        return self.evaluate

    def of(self, training: bool) -> tuple[Any, ...]:
        """A copy of the arguments of a mode; a model may overwrite them."""
        return copy.deepcopy(self.train if training else self.evaluate)


Size = tuple[int, ...]


def _images(size: Size, device: str) -> Example:
    args = (_drawn((BATCH, *size), device),)
    return Example(args, args, "×".join(map(str, (BATCH, *size))))


def _pictures_with_boxes(size: Size, device: str) -> Example:
    """Detectors: a list of pictures; in train mode what is on them too."""
    pictures = [_drawn(size, device, seed) for seed in range(BATCH)]
    H, W = size[-2:]
    boxes = torch.tensor([[0.1 * W, 0.1 * H, 0.6 * W, 0.7 * H], [0.4 * W, 0.3 * H, W, H]])
    masks = torch.zeros(2, H, W, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    points = torch.cat([middle, torch.ones(2, 1)], 1)[:, None].repeat(1, 17, 1)
    target = {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": points}
    words = f"a list of {BATCH} of " + "×".join(map(str, size))
    return Example((pictures,), (pictures, [target] * BATCH), words)


def _two_frames(size: Size, device: str) -> Example:
    """Optical flow: a frame and the next."""
    args = tuple(_drawn((BATCH, *size), device, seed) for seed in range(2))
    return Example(args, args, "two of " + "×".join(map(str, (BATCH, *size))))


def _drawn(size: Size, device: str, seed: int = 0) -> torch.Tensor:
    if device == "meta":
        return torch.empty(size, device="meta")
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Input:
    """What a family takes.

    Attributes:
        make: an example of a size, on a device.
        sizes: of one image, frame or clip; the first with which a model runs is taken. None:
            small images, then those of the model's own size.
        placed: the device of the example, if values decide what the model does.
    """

    make: Callable[[Size, str], Example]
    sizes: tuple[Size, ...] | None = None
    placed: str | None = field(default=None)


# The first pattern that a family matches counts.
INPUTS: Mapping[str, Input] = {
    "torchvision detection.*": Input(_pictures_with_boxes, ((3, 160, 192),), "cpu"),
    "torchvision optical_flow.*": Input(_two_frames, ((3, 128, 128),)),
    "torchvision video.resnet": Input(_images, ((3, 8, 64, 64),)),
    "torchvision video.*": Input(_images, ((3, 16, 224, 224),)),
    "*": Input(_images),
}


def input_of(model: Model) -> Input:
    """What a model takes."""
    return next(made for pattern, made in INPUTS.items() if fnmatch(model.family, pattern))


def own_example(model: Model, network: nn.Module) -> Example:
    """What a model was made for, on the network's device; it need not be run."""
    device = "meta" if all(p.is_meta for p in network.parameters()) else "cpu"
    taken = input_of(model)
    return taken.make(_sizes(model, network)[-1], taken.placed or device)


def fitting_example(model: Model, network: nn.Module) -> Example:
    """The smallest input with which a network runs in both modes and stays finite.

    Raises:
        RuntimeError: there is none; the message has the model's last words.
    """
    words = ""
    for size in _sizes(model, network):
        example = input_of(model).make(size, "cpu")
        try:
            for training in (True, False):
                twin = copy.deepcopy(network).train(training)
                with torch.no_grad():
                    output = twin(*example.of(training))
                if not all(leaf.isfinite().all() for leaf in tensors(output)):
                    raise RuntimeError("its output is not finite")
        except Exception as error:  # the model's own code: anything can come of it
            words = f"{type(error).__name__}: {error}"
            continue
        return example
    raise RuntimeError(f"the original runs on no input that was tried: {words}")


def _sizes(model: Model, network: nn.Module) -> list[Size]:
    special = input_of(model).sizes
    if special is not None:
        return list(special)
    config = getattr(network, "pretrained_cfg", None) or {}
    side = OWN_SIDES.get(model.family, OWN_SIDE)
    own = tuple(config.get("input_size") or (3, side, side))
    if config.get("fixed_input_size"):
        return [own]
    return [*((own[0], s, s) for s in SMALL_SIDES if s < own[-1]), own]


def tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def built(model: Model) -> nn.Module:
    """A network with random weights, always the same, through which every layer can be heard.

    Scales that start at zero or almost, which end residual blocks in untrained networks, are
    opened: whatever happens inside such a block would not show. Biases of zero are drawn: behind a
    norm of a single channel there is nothing else.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(model.source)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if not _is_closed(parameter):
                    continue
                if "bias" in name.rpartition(".")[2]:
                    parameter.normal_(std=NOTHING)
                else:
                    parameter.fill_(OPENED)
    return network


def _is_closed(parameter: nn.Parameter) -> bool:
    is_vector = 0 < parameter.numel() == max(parameter.shape, default=1)
    if not is_vector or not parameter.is_floating_point():
        return False
    low, high = parameter.min().item(), parameter.max().item()
    return low == high and abs(low) < NOTHING


def settle(network: nn.Module, example: Example) -> None:
    """Statistics of batch norms as training leaves them: the initial ones let signals fade."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.9
    was = network.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network.train()(*example.of(True))
    network.train(was)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def seeing(network: nn.Module, example: Example) -> set[str]:
    """The convolutions with windows that hold more than one pixel of what they are given.

    Those of a map of one pixel, or with a dilation beyond it, see padding: nothing can adapt there.
    """
    seen: set[str] = set()
    twin = copy.deepcopy(network).train()
    for name, conv in convolutions(twin).items():

        def note(conv: _ConvNd, args: tuple[Any, ...], name: str = name) -> None:
            sides = args[0].shape[-len(conv.kernel_size) :]
            geometry = zip(sides, conv.kernel_size, conv.dilation, strict=True)
            if conv.transposed or any(k > 1 and side > d for side, k, d in geometry):
                seen.add(name)

        conv.register_forward_pre_hook(note)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        twin(*example.of(True))
    return seen
