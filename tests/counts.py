"""What a forward pass of an upgraded network computes, counted, and what it leaves in memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refusals import untraceable
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import pacswap

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STEM = {"from": "stem", "channels": 2}


class Four(nn.Module):
    """A stem, and two convolutions at each of two lower resolutions; the second of each is 5×5."""

    def __init__(self, second: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        for name in ("a", "b", "c", "d"):
            side = second if name in "bd" else 3
            setattr(self, name, nn.Conv2d(4, 4, side, padding=side // 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(F.max_pool2d(F.relu(self.stem(x)), 2))))
        return self.d(F.relu(self.c(F.max_pool2d(F.relu(x), 2))))


WAYS: dict[str, Callable[[type[nn.Module]], type[nn.Module]]] = {
    "graph": lambda cls: cls,
    "relay": untraceable,
}
WAY = pytest.mark.parametrize("way", list(WAYS))


def four(way: str = "graph", *groups: dict[str, Any], second: int = 3, **kernel: Any) -> nn.Module:
    """`Four`, upgraded; its blends are at 0.7 unless the kernel says otherwise."""
    torch.manual_seed(0)
    kernel = {"blend": 0.7, "bandwidth": 1.0} | kernel
    asked = groups or ({"layers": ["a", "b", "c", "d"], "guidance": STEM},)
    return pacswap.swap(
        WAYS[way](Four)(second),
        groups=[{"kernel": kernel, **group} for group in asked],
        example_input=IMAGES,
    )


class Operations(TorchDispatchMode):
    """Counts what runs.

    Attributes:
        names: the operations, each with how often it ran.
        weights: the storages of the weights of its convolutions, likewise.
        largest: how many numbers the largest tensor had that was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.weights: Counter[int] = Counter()
        self.largest = 0
        self.made: list[weakref.ref[Any]] = []
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.names[func._schema.name] += 1
        if func is torch.ops.aten.convolution.default:
            self.weights[args[1].untyped_storage()._cdata] += 1
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    weakref.finalize(storage, self.known.discard, storage._cdata)
                    self.made.append(weakref.ref(storage))
        return output

    def living(self, *aside: Tensor) -> int:
        """The bytes of all that was made and is still there, each storage once; some aside."""
        held = {s._cdata: s.nbytes() for s in (ref() for ref in self.made) if s is not None}
        for tensor in aside:
            held.pop(tensor.untyped_storage()._cdata, None)
        return sum(held.values())


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts kernels, projections and resizings while it is open."""
    found: Counter[str] = Counter()
    original = pacswap.ops.adapting_kernel

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        found["kernels"] += 1
        return original(*args, **kwargs)

    projected = [m.project for m in model.modules() if isinstance(m, pacswap.nn.Guidance)]
    weights = [p.weight.untyped_storage()._cdata for p in projected if p is not None]
    with pytest.MonkeyPatch.context() as patch, Operations() as operations:
        patch.setattr(pacswap.ops, "adapting_kernel", kernel)
        yield found
    found["projections"] = sum(operations.weights[weight] for weight in weights)
    found["resizings"] = sum(n for name, n in operations.names.items() if "upsample" in name)


def assert_computed(model: nn.Module, kernels: int, projections: int, resizings: int) -> None:
    """One forward pass computes so many of each."""
    with counted(model) as found:
        model(IMAGES)
    seen = (found["kernels"], found["projections"], found["resizings"])
    expected = (kernels, projections, resizings)
    assert seen == expected, f"kernels, projections, resizings: {seen}, expected {expected}"


def gradients(model: nn.Module, images: Tensor = IMAGES) -> dict[str, Tensor | None]:
    model.zero_grad()
    model(images).float().pow(2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def freeze(*layers: Any) -> None:
    """What a user does to layers that are not to adapt."""
    for layer in layers:
        with torch.no_grad():
            layer.blend.zero_()
        layer.blend.requires_grad_(False)
