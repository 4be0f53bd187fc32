"""Planning what the meta device cannot run: shapes and costs as they are, sums not computed."""

from __future__ import annotations

import contextlib
from typing import Any

import models as m
import pytest
import torch
import torch.nn.functional as F
from refusals import IMAGES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pacswap
from pacswap.errors import PlanError
from pacswap.surgery import modes
from pacswap.surgery.skeleton import look


class Boxes(m.Body):
    """A head that runs on as many regions as there are bright pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.target(self.norm(self.stem(x)))
        return self.head(y.permute(0, 2, 3, 1)[x[:, 0] > 0.5])


class Picky(m.Sparse):
    """Fails on numbers that no sum of the stem gives."""

    def forward(self, x: Tensor) -> Tensor:
        bias = F.conv2d(torch.zeros_like(x), self.stem.weight, self.stem.bias)[0, :, 5, 5]
        if not torch.allclose(bias, self.stem.bias):
            raise IndexError("out of range")
        return super().forward(x)


class Computed(TorchDispatchMode):
    """Notes the sums that are really computed, below whatever stands in for them."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        real = isinstance(args[0], Tensor) and not args[0].is_meta if args else False
        if real and func in modes._SUMS:
            self.done.append(func.__name__)
        return func(*args, **(kwargs or {}))


NETWORKS = pytest.mark.parametrize("cls", [m.Sparse, Boxes])


@NETWORKS
def test_no_sum_is_computed_and_the_plan_is_the_same(
    cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cls()
    with Computed() as quick:
        ours = pacswap.plan(model, "target", "stem", example_input=IMAGES)
    assert quick.done == []
    monkeypatch.setattr(modes, "QuickSums", contextlib.nullcontext)
    with Computed() as exact:
        theirs = pacswap.plan(model, "target", "stem", example_input=IMAGES)
    assert len(exact.done) > 0
    assert str(ours) == str(theirs)
    assert ours.cost == theirs.cost


def test_a_network_that_needs_its_sums_gets_them() -> None:
    with Computed() as done:
        plan = pacswap.plan(Picky(), "target", "stem", example_input=IMAGES)
    assert len(done.done) > 0
    assert [layer.name for layer in plan.layers] == ["target"]


def test_a_network_that_fails_with_its_sums_says_so_itself() -> None:
    class Failing(m.Sparse):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            raise IndexError(f"no box for image {len(y) * 0}")

    with pytest.raises(PlanError) as caught:
        pacswap.plan(Failing(), "target", "stem", example_input=IMAGES)
    assert str(caught.value) == (
        "Failing does not run on an example input of shape (2, 3, 16, 20): IndexError: no box for "
        "image 0. Pass example_input=… with a shape that the model takes."
    )


def test_what_is_made_up_has_the_shape_and_dtype() -> None:
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1).to(torch.float64)
    x = torch.rand(2, 3, 17, 20, dtype=torch.float64)
    expected = conv(x)
    with torch.no_grad(), modes.QuickSums():
        found, again = conv(x), conv(2 * x)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found, again)
    assert found.abs().max() <= 1
    assert found.std() > 0.1
    assert not torch.allclose(found, expected)


def test_a_real_look_leaves_the_random_state() -> None:
    model, state = m.Sparse(), torch.get_rng_state()
    look(model, IMAGES)
    assert torch.equal(state, torch.get_rng_state())
