"""Copies, files, dtypes, devices and compilers take an upgraded model for the model that it is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from same import assert_differ, assert_same, run
from swaps import SWAPS, learned, pair
from torch import nn

import pacswap

# ---- copies

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle_2": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "pickle_highest": lambda m: pickle.loads(pickle.dumps(m, protocol=pickle.HIGHEST_PROTOCOL)),
    "torch_save": lambda m: _saved(m),
    "twice": lambda m: pickle.loads(pickle.dumps(copy.deepcopy(_saved(m)))),
}


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", list(COPIES))
@pytest.mark.parametrize(
    "name",
    ["sequential", "split", "auxiliary", "projected", "detector", "namedtuple", "timm_resnet18"],
)
def test_copies_do_the_same(name: str, way: str) -> None:
    model = learned(name)
    twin = COPIES[way](model)
    args = SWAPS[name].arguments()
    assert type(twin) is type(model)
    assert_same(run(model, args, training=True), run(twin, args, training=True), tolerance=0)
    assert_same(
        dict(pacswap.revert(model).state_dict()),
        dict(pacswap.revert(twin).state_dict()),
        tolerance=0,
    )


@pytest.mark.parametrize("way", list(COPIES))
def test_copies_share_nothing(way: str) -> None:
    model = learned("projected")
    args = SWAPS["projected"].arguments()
    before = run(model, args)
    for parameter in COPIES[way](model).parameters():
        nn.init.constant_(parameter, 3.0)
    assert_same(before, run(model, args), tolerance=0)


# ---- dtypes, layouts, devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["body", "projected", "in_place_input", "timm_resnet18"])
def test_it_moves_to_other_dtypes(name: str, dtype: torch.dtype) -> None:
    original, upgraded = (copy.deepcopy(model).to(dtype) for model in pair(name))
    args = SWAPS[name].arguments(dtype)
    output = run(upgraded, args)
    assert output[0].dtype == dtype
    assert_same(run(original, args), output, tolerance=0)
    moved = run(learned(name).to(dtype), args)[0]
    assert_differ(output[0].double(), moved.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_dtype_is_swapped_in_that_dtype(dtype: torch.dtype) -> None:
    original, upgraded = pair("projected", dtype)
    assert {p.dtype for p in upgraded.parameters()} == {dtype}
    args = SWAPS["projected"].arguments(dtype)
    assert_same(run(original, args), run(upgraded, args), tolerance=0)


@pytest.mark.parametrize("name", ["body", "timm_resnet18"])
def test_channels_last_stays(name: str) -> None:
    original, upgraded = (
        copy.deepcopy(m).to(memory_format=torch.channels_last) for m in pair(name)
    )
    args = (SWAPS[name].arguments()[0].to(memory_format=torch.channels_last),)
    assert_same(run(original, args), run(upgraded, args))


@pytest.mark.parametrize("name", ["body", "projected", "timm_resnet18"])
def test_autocast_stays(name: str) -> None:
    args = SWAPS[name].arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before, after = (run(model, args) for model in pair(name))
        assert after[0].dtype == torch.bfloat16
        assert_same(before, after, tolerance=0)
        assert_differ(after[0].float(), run(learned(name), args)[0].float())


def test_it_moves_to_another_device() -> None:
    upgraded = learned("projected").to("meta")
    output = upgraded(torch.empty(2, 3, 33, 35, device="meta"))
    assert (output.shape, output.device.type) == ((2, 4, 33, 35), "meta")


# ---- compilers


@pytest.mark.parametrize("name", ["body", "two_roundings", "auxiliary"])
def test_it_compiles_without_a_break(name: str) -> None:
    torch._dynamo.reset()
    model = learned(name).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in (SWAPS[name].size, SWAPS[name].odd):
        args = SWAPS[name].arguments(size=size)
        with torch.no_grad():
            assert_same(model(*args), compiled(*args))


@pytest.mark.parametrize(
    "name", ["body", "two_roundings", "split", "auxiliary", "dict", "projected"]
)
def test_it_exports(name: str) -> None:
    model, args = learned(name).eval(), SWAPS[name].arguments()
    exported = torch.export.export(model, args).module()
    with torch.no_grad():
        assert_same(model(*args), exported(*args))


def test_functional_calls_reach_the_added_parameters() -> None:
    model, args = copy.deepcopy(pair("projected")[1]).eval(), SWAPS["projected"].arguments()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    output = torch.func.functional_call(model, parameters, args)
    assert_same(model(*args), output)
    parameters["target.blend"] = torch.tensor(0.5)
    assert_differ(output, torch.func.functional_call(model, parameters, args))
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, args).sum())(parameters)
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "norm" not in name)
