"""Tiny networks, one hazard each: `stem` guides, `target` is swapped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Body(nn.Module):
    """conv → norm → ReLU, twice: `stem` guides, `target` is swapped."""

    def __init__(self, channels: int = 4, **geometry: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.target = nn.Conv2d(channels, channels, **({"kernel_size": 3, "padding": 1} | geometry))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.target(F.relu(self.norm(self.stem(x)))))


class InPlace(Body):
    """The tapped convolution's output is overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.target(F.relu(x, inplace=True) * 0.5)


class InPlaceInput(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.norm(self.stem(x.sub_(0.25))))


class InPlaceAfter(Body):
    """The swapped convolution's output is overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.target(self.norm(self.stem(x))), inplace=True)


class Assigned(Body):
    """`y += x` on a tensor that has a second name."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y = x * 2
        other = y
        y += x
        y *= x
        return self.target(y) * other


class Dropping(Body):
    """Functional dropout, and a drop path, both by `self.training`."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.norm(self.stem(x)), 0.5, self.training)
        return self.target(drop_path(x, 0.5, self.training)) + x


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    if not training:
        return x
    return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - rate)


class CalledTwice(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.target(F.relu(self.target(self.norm(self.stem(x)))))


class CalledAtTwoSizes(Body):
    """A head shared by two levels of a pyramid."""

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.norm(self.stem(x))
        return [self.target(x), self.target(F.max_pool2d(x, 2))]


class TwoNames(Body):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.target

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(F.relu(self.norm(self.stem(x))))


class Tied(Body):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.target.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(super().forward(x)))


class Auxiliary(Body):
    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.stem(x)))
        if self.training:
            return self.target(x), self.auxiliary(x)
        return self.target(x)


class Pair(NamedTuple):
    out: Tensor
    side: Tensor


PACKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda out, side: {"out": out, "more": {"side": side, "none": None}},
    "ordered_dict": lambda out, side: OrderedDict(out=out, side=side),
    "list": lambda out, side: [out, side],
    "tuple": lambda out, side: (out, (side,)),
    "namedtuple": Pair,
}


class Packed(Body):
    def __init__(self, pack: str) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.stem(x))
        return PACKS[self.pack](self.target(x), x)


class Optional(Body):
    """Arguments with defaults, positional and by keyword only."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        x = self.norm(self.stem(x)) * scale
        return self.target(x if mask is None else x * mask)


class TwoInputs(Body):
    """An image and an index of classes, which must stay whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        x = self.norm(self.stem(x)) + self.embedding(index)[:, :, None, None]
        return self.target(x)


class Branching(nn.Module):
    """Looks at the size of its input, which a trace cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[-1] % 2 == 0 else x


class BranchInBlock(Body):
    """Control flow that a trace need not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.branching = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.branching(super().forward(x))


class BranchAtRoot(nn.Module):
    """Control flow around a body that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if x.shape[-1] % 2 == 0 else x[..., :-1])


class Detector(nn.Module):
    """A loop over a list of images of different sizes, one call of the body for each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [{"scores": self.body(image[None])[0]} for image in images]


class Sparse(Body):
    """As many outputs as the values want: the meta device cannot run it."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.9)
        y = self.target(self.norm(self.stem(x)))
        return y[x.mean(1, keepdim=True).expand_as(y) > 0.5]


class Split(Body):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        return Body.forward(self, x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((-2, -1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SplitMore(Split):
    """… with a path of its own that no graph feeds."""

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        return [x, self.target(self.norm(x))]


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1),
    )


def frozen() -> nn.Module:
    """A BatchNorm in eval mode inside a network in train mode, and nothing to be trained."""
    model = Body().train()
    model.norm.eval()
    return model.requires_grad_(False)


def normed() -> nn.Module:
    model = BranchInBlock()
    parametrizations.weight_norm(model.branching.conv)
    return model


def hooked() -> nn.Module:
    """Hooks that change values, on modules that are not swapped."""
    model = Body()
    model.norm.register_forward_hook(doubled)
    model.stem.register_forward_pre_hook(shifted)
    return model


def own_forward() -> nn.Module:
    """A forward set on the instance of a module that is not swapped."""
    model = Body()
    model.norm.forward = MethodType(negative, model.norm)
    return model


def negative(module: nn.Module, x: Tensor) -> Tensor:
    return -nn.BatchNorm2d.forward(module, x)


def doubled(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 2


def shifted(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] + 0.5,)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Renamed(nn.Conv2d):
    """A subclass that computes the same."""


class OtherConvs(Body):
    """Convolutions of other kinds beside the one that is swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.volume = nn.Conv3d(4, 4, 3, padding=1)
        self.standardized = Standardized(4, 4, 3, padding=1)
        self.renamed = Renamed(4, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.renamed(self.point(self.standardized(super().forward(x))))
        x = x + self.line(x.flatten(2)).view_as(x) + self.volume(x[:, :, None])[:, :, 0]
        return self.up(x)


class TwoBranches(nn.Module):
    """Two branches of one size at 16 pixels, of two sizes at 15."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.floor = nn.MaxPool2d(2)
        self.ceil = nn.MaxPool2d(2, ceil_mode=True)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        return self.left(self.floor(x)), self.right(self.ceil(x))


class TwoRoundings(TwoBranches):
    """Branches whose sizes differ at every fourth size only."""

    def __init__(self, kernel_size: int = 3) -> None:
        super().__init__()
        self.right = nn.Conv2d(4, 4, kernel_size, padding=kernel_size // 2)
        self.floor = nn.MaxPool2d(4)
        self.ceil = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2))


class Checkpointing(Body):
    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False


class ConstantInBlock(Body):
    """A tensor made from numbers, in a module that a trace need not enter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.target(self.scale(self.norm(self.stem(x))))


class Scale(nn.Module):
    """Its tensor is on the CPU whatever the input is on: the meta device cannot run it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None].to(x.dtype)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x))


class Shared(nn.Module):
    """One convolution in two blocks: first under a name outside the block that runs it first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        conv = nn.Conv2d(4, 4, 3, padding=1)
        self.late, self.early = Wrapped(conv), Wrapped(conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.early(self.stem(x)))


class NamedOutside(nn.Module):
    """A body's convolution that the model registers under a name of its own first."""

    def __init__(self) -> None:
        super().__init__()
        body = Body()
        self.conv = body.target
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * x.shape[-1]
