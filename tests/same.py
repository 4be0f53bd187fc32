"""How surgery tests compare models: every helper raises with what differs."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_same(ours: Any, theirs: Any, *, tolerance: float | None = None) -> None:
    """The same containers, shapes and dtypes; values within rounding of the largest one."""
    (a, structure), (b, other) = pytree.tree_flatten(ours), pytree.tree_flatten(theirs)
    assert str(structure) == str(other), f"containers: {structure} and {other}"
    for one, two in zip(a, b, strict=True):
        assert type(one) is type(two), f"{type(one).__name__} and {type(two).__name__}"
        if not isinstance(one, Tensor):
            assert one == two, f"{one!r} and {two!r}"
            continue
        assert one.shape == two.shape, f"{list(one.shape)} and {list(two.shape)}"
        assert one.dtype == two.dtype, f"{one.dtype} and {two.dtype}"
        assert not torch.isnan(one).any(), "NaN"
        if torch.equal(one, two):
            continue
        bound = TOLERANCE[one.dtype] if tolerance is None else tolerance
        error = ((one - two).abs().max() / one.abs().max()).item()
        assert error <= bound, f"relative difference {error:.1e}, bound {bound:.0e}"


def assert_differ(ours: Any, theirs: Any) -> None:
    """Some value differs by far more than rounding."""
    pairs = zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    error = max(((a - b).abs().max() / a.abs().max()).item() for a, b in tensors)
    assert error > 1e-4, f"relative difference {error:.1e}"


def assert_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same keys in the same order, the same bits."""
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), f"{key} differs"


def run(model: nn.Module, args: tuple[Any, ...], *, training: bool = False, **named: Any) -> Any:
    """Output and buffers of a copy, under one seed; frozen norms stay frozen."""
    twin = copy.deepcopy(model)
    if training != model.training:
        twin.train(training)
    torch.manual_seed(3)
    with torch.no_grad():
        output = twin(*copy.deepcopy(args), **named)
    return output, dict(twin.named_buffers())


def backward(model: nn.Module, args: tuple[Any, ...], **named: Any) -> None:
    """Back-propagate a fixed random projection of all outputs, in the model's own mode."""
    torch.manual_seed(3)
    output = model(*copy.deepcopy(args), **named)
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            total = total + (leaf * torch.randn(leaf.shape, generator=generator)).sum()
    total.backward()


class Untouched:
    """A model as it was: `check` raises if anything about it, or the random state, changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = copy.deepcopy(dict(model.state_dict(keep_vars=False)))
        self.surface = _surface(model)
        self.random = (torch.get_rng_state(), random.getstate())

    def check(self) -> None:
        assert_bits(self.tensors, dict(self.model.state_dict()))
        now = _surface(self.model)
        assert list(now) == list(self.surface)
        for name, before in self.surface.items():
            assert now[name] == before, f"'{name}' changed: {before} → {now[name]}"
        assert torch.equal(torch.get_rng_state(), self.random[0]), "torch's random state moved"
        assert random.getstate() == self.random[1], "Python's random state moved"


def _surface(model: nn.Module) -> dict[str, Any]:
    """Of every module: class, mode, attributes and registries by identity, gradients."""
    return {
        name: (
            type(module),
            module.training,
            {k: _identities(v) for k, v in vars(module).items()},
            [(p.requires_grad, p.grad is None) for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _identities(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    return id(value)
