"""`torch.compile` takes an upgraded network as one graph, for every size, with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from ecosystem import NETWORKS, images
from same import assert_differ, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

SIZES = [(16, 20), (19, 23), (21, 18), (30, 31)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(model: nn.Module, sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    with torch.no_grad():
        return [model(images(*size)) for size in sizes]


@pytest.mark.parametrize("blend", [0.0, 0.5])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_one_graph_serves_every_size(name: str, blend: float) -> None:
    model, counter = NETWORKS[name].upgraded(blend), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_same(outputs(model), outputs(compiled))
    # The first size by itself, the second makes the sizes symbols, the others find it there.
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["dense", "relayed"])
def test_a_blend_that_moves_is_not_compiled_in(name: str) -> None:
    model = NETWORKS[name].upgraded(0.0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = outputs(compiled, SIZES[:1])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("blend"):
                parameter.fill_(0.5)
    after = outputs(compiled, SIZES[:1])
    assert_differ(before, after)
    assert_same(after, outputs(model, SIZES[:1]))


def gradients(model: nn.Module, run: Callable[..., Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run(images()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("blend", [0.0, 0.5])
@pytest.mark.parametrize("name", ["same", "scaled", "upsample", "relayed"])
def test_gradients_are_those_of_eager(name: str, blend: float) -> None:
    model = NETWORKS[name].upgraded(blend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = gradients(model, model), gradients(model, compiled)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert_same(expected, found, tolerance=1e-4)
    assert all(found[key].abs() > 0 for key in found if key.endswith("blend"))


@pytest.mark.parametrize(
    ("name", "dynamic", "sizes"),
    [("dense", True, SIZES[:3]), ("relayed_image", False, SIZES[:1])],
)
def test_inductor_compiles_it(name: str, dynamic: bool, sizes: list[tuple[int, int]]) -> None:
    model = NETWORKS[name].upgraded(0.5)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    outputs(compiled, sizes[:1])
    at_first = counter.frame_count
    assert_same(outputs(model, sizes), outputs(compiled, sizes))
    assert counter.frame_count == at_first > 0
