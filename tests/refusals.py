"""Wrong requests: how they are stated and checked, and tiny networks that no graph replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Body, BranchInBlock, CalledTwice, InPlace, Packed, Wrapped, doubled
from same import Untouched
from torch import Tensor, nn

import pacswap
from pacswap.errors import PlanError

KERNEL = {"blend": 0.7, "bandwidth": 1.0}
IMAGES = torch.rand(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Wrong:
    """A request and what is said to it."""

    message: str
    make: Callable[[], nn.Module] = Body
    layers: Any = "target"
    guidance: Any = "stem"
    more: dict[str, Any] = field(default_factory=dict)


def assert_refused(wrong: Wrong, door: Callable[..., Any]) -> None:
    """`door` (plan or swap) says the message, and leaves the model as it was."""
    model = wrong.make()
    before = Untouched(model)
    options = {"example_input": IMAGES} | wrong.more
    with pytest.raises(PlanError) as caught:
        door(model, wrong.layers, wrong.guidance, **options)
    before.check()
    assert str(caught.value) == wrong.message


def untraceable(cls: type[nn.Module]) -> type[nn.Module]:
    """The same network, which looks at the size of its input first."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **named: Any) -> Any:
        return cls.forward(self, x, *args, **named) if x.shape[-1] > 0 else x

    return type(f"Looking{cls.__name__}", (cls,), {"forward": forward})


def relayed_body(cls: type[nn.Module] = Body, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"kernel": KERNEL, "example_input": IMAGES} | options
    return pacswap.swap(
        untraceable(cls)(),
        options.pop("layers", "target"),
        options.pop("guidance", "stem"),
        **options,
    )


def changed(change: Callable[[Body], Any], model: type[Body] = Body) -> Callable[[], Body]:
    def make() -> Body:
        made = model()
        change(made)
        return made

    return make


class NoGrad(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.norm(self.stem(x))
        return self.target(x)


class Island(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.stem(x)
        return self.target(self.norm(x))


class Kind(Body):
    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            x = x * 2
        return super().forward(x)


class Warming(Body):
    """Does something else from its fourth call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x + 1 if self.calls > 3 else x)


class Constant(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.tensor(0.5))


class Collector(Body):
    """Returns what hooks collected, as timm's FeatureHookNet does."""

    def forward(self, x: Tensor) -> Any:
        found: list[Tensor] = []
        handle = self.target.register_forward_hook(lambda *args: found.append(args[2]))
        try:
            super().forward(x)
        finally:
            handle.remove()
        return found


class Guided(Body):
    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Uncopiable(Body):
    def __init__(self) -> None:
        super().__init__()
        self.generator = (i for i in range(3))


class Functional(Body):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.stem(x), self.target.weight)


class Branch(Body):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 or x.shape[-1] > 2 else x


class AfterPair(nn.Module):
    """A tuple comes before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Packed("tuple")
        self.target = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.pair(x)[0])


class Halved(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 0.5)


def hooked_block() -> nn.Module:
    model = Halved(Body())
    model.inner.register_forward_hook(doubled)
    return model


class Windows(Body):
    """Its second convolution sees halves of the image; it looks at the size."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        half = x.shape[-1] // 2 if x.shape[-1] > 2 else 1
        return self.target(torch.cat([x[..., :half], x[..., half : 2 * half]]))


class Again(Body):
    """Calls its stem twice, and looks at the size."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 2:
            x = x + self.stem(x).mean(1, keepdim=True)
        return super().forward(x)


class Counting(Wrapped):
    """Looks at the size before it runs what is inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > 2 else x


class InPlaceBranch(InPlace):
    """Overwrites its stem's output, and looks at the size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > 2 else x


class TwiceBranch(CalledTwice):
    """Calls its second convolution twice, and looks at the size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] > 2 else x


class EvenInBlock(BranchInBlock):
    """A convolution in a block that looks at the size."""

    def forward(self, x: Tensor) -> Tensor:
        x = Body.forward(self, x)
        return self.branching(x if x.shape[-1] % 2 == 0 else x[..., 1:])
