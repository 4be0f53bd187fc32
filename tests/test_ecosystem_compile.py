"""`torch.compile` takes an upgraded network as one graph, for every size, with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from ecosystem import NETWORKS, images
from same import assert_differ, assert_same
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

SIZES = [(19, 23), (16, 20), (21, 18), (30, 31)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(model: nn.Module, sizes: list[tuple[int, int]] = SIZES) -> list[Tensor]:
    with torch.no_grad():
        return [model(images(*size)) for size in sizes]


def blends(*models: nn.Module) -> Iterator[float]:
    """0 and 0.5, set in the models as they are yielded."""
    for blend in (0.0, 0.5):
        with torch.no_grad():
            for model in models:
                named = dict(model.named_parameters())
                moved = [parameter for key, parameter in named.items() if key.endswith("blend")]
                assert moved
                for parameter in moved:
                    parameter.fill_(blend)
        yield blend


# Of "dense" below code is made for any size.
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "dense"])
def test_one_graph_serves_every_size_and_blend(name: str) -> None:
    model, counter, found = NETWORKS[name].upgraded(0.0), CompileCounter(), []
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for _ in blends(model):
        found.append(outputs(model))
        assert_same(found[-1], outputs(compiled))
    assert_differ(*found)
    assert counter.frame_count == 1


def gradients(model: nn.Module, run: Callable[..., Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run(images()).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["same", "scaled", "upsample", "relayed"])
def test_gradients_are_those_of_eager(name: str) -> None:
    model = NETWORKS[name].upgraded(0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in blends(model):
        expected, found = gradients(model, model), gradients(model, compiled)
        assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
        assert_same(expected, found, tolerance=1e-4)
        assert all(found[key].abs() > 0 for key in found if key.endswith("blend"))


# Code is made once; what is handed to the backend is the same kind of graph for the others.
@pytest.mark.parametrize(
    ("name", "backend", "dynamic", "sizes"),
    [
        ("dense", "inductor", True, SIZES[:3]),
        ("relayed_image", "aot_eager", False, SIZES[:1]),
    ],
)
def test_a_backend_compiles_it(
    name: str, backend: str, dynamic: bool, sizes: list[tuple[int, int]]
) -> None:
    model = NETWORKS[name].upgraded(0.5)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    outputs(compiled, sizes[:1])
    at_first = counter.frame_count
    assert_same(outputs(model, sizes), outputs(compiled, sizes))
    assert counter.frame_count == at_first > 0
