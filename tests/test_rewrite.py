"""The five promises, measured by the public names alone, on every tiny network and a zoo.

Nothing here uses `pacswap.verify`, which has tests of its own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from same import assert_bits, assert_differ, assert_same, backward, run
from swaps import SWAPS, TINY, learned, pair
from torch import Tensor, nn

import pacswap

NAMES = list(SWAPS)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


# One network after the other, so that each is built and swapped once.
@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> str:
    return request.param


def pac_layers(model: nn.Module) -> dict[str, pacswap.nn.PacConv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, pacswap.nn.PacConv2d)}


def added(model: nn.Module, original: nn.Module) -> dict[str, nn.Parameter]:
    known = dict(original.named_parameters(remove_duplicate=False))
    return {n: p for n, p in model.named_parameters() if n not in known}


def shuffle(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same features at other pixels."""
    (guidance,) = args
    pixels = torch.randperm(guidance[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    return (guidance.flatten(2)[..., pixels].view_as(guidance),)


def shuffled(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, pacswap.nn.AdaptingKernel):
            module.register_forward_pre_hook(shuffle)
    return model


# ---- 1. nothing changes at the swap


@MODES
def test_output_and_statistics_stay(name: str, training: bool) -> None:
    original, upgraded = pair(name)
    args = SWAPS[name].arguments()
    assert_same(run(original, args, training=training), run(upgraded, args, training=training))


@MODES
def test_they_stay_in_double_precision(tiny: str, training: bool) -> None:
    original, upgraded = pair(tiny, torch.float64)
    args = SWAPS[tiny].arguments(torch.float64)
    assert_same(run(original, args, training=training), run(upgraded, args, training=training))


def test_they_stay_at_another_batch_and_an_odd_size(name: str) -> None:
    original, upgraded = pair(name)
    args = SWAPS[name].arguments(size=SWAPS[name].odd, batch=3)
    assert_same(run(original, args), run(upgraded, args))


@pytest.mark.parametrize("size", [(18, 30), (17, 21), (16, 19), (31, 16)], ids=str)
def test_they_stay_at_every_rounding(tiny: str, size: tuple[int, int]) -> None:
    original, upgraded = pair(tiny)
    args = SWAPS[tiny].arguments(size=size)
    assert_same(run(original, args, training=True), run(upgraded, args, training=True))


@pytest.mark.parametrize("size", [(18, 30), (17, 21), (16, 19), (31, 16)], ids=str)
def test_a_learned_network_takes_every_rounding(tiny: str, size: tuple[int, int]) -> None:
    original, _ = pair(tiny)
    args = SWAPS[tiny].arguments(size=size)
    before, after = run(original, args)[0], run(learned(tiny), args)[0]
    assert_differ(before, after)
    assert_same(before, after, tolerance=float("inf"))


def test_a_learned_blend_changes_the_output(name: str) -> None:
    original, _ = pair(name)
    args = SWAPS[name].arguments()
    assert_differ(run(original, args)[0], run(learned(name), args)[0])


def test_shuffled_guidance_changes_the_output(tiny: str) -> None:
    args = SWAPS[tiny].arguments()
    assert_differ(run(learned(tiny), args)[0], run(shuffled(learned(tiny)), args)[0])


# ---- 2. everything can learn


def test_every_layer_learns_at_once(name: str) -> None:
    _, upgraded = pair(name)
    twin = copy.deepcopy(upgraded).train()
    backward(twin, SWAPS[name].arguments())
    for layer, module in pac_layers(twin).items():
        assert module.blend.grad is not None, layer
        assert module.blend.grad.abs() > 1e-12, layer


def test_all_that_was_added_learns_after_a_step(name: str) -> None:
    original, upgraded = pair(name)
    twin = copy.deepcopy(upgraded).train()
    backward(twin, SWAPS[name].arguments())
    parameters = added(twin, original)
    longest = max(p.grad.abs().max() for p in parameters.values() if p.grad is not None)
    torch.optim.SGD(parameters.values(), lr=0.1 / longest.item()).step()
    twin.zero_grad()
    backward(twin, SWAPS[name].arguments())
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 1e-12, key


def test_before_that_step_the_bandwidths_do_not(tiny: str) -> None:
    """… which shows that the gradients above are not noise."""
    _, upgraded = pair(tiny)
    twin = copy.deepcopy(upgraded).train()
    backward(twin, SWAPS[tiny].arguments())
    for key, parameter in twin.named_parameters():
        if key.endswith("log_bandwidth"):
            assert parameter.grad is None or parameter.grad == 0, key


@MODES
def test_the_original_parameters_have_their_gradients(tiny: str, training: bool) -> None:
    original, upgraded = (copy.deepcopy(model).train(training) for model in pair(tiny))
    args = SWAPS[tiny].arguments()
    if any(p.requires_grad for p in original.parameters()):
        backward(original, args)
    backward(upgraded, args)
    found = dict(upgraded.named_parameters())
    for key, parameter in original.named_parameters():
        assert_same(parameter.grad, found[key].grad, tolerance=1e-4)


# ---- 3. old checkpoints load


def test_keys_and_values_are_kept(name: str) -> None:
    original, upgraded = pair(name)
    before, after = original.state_dict(), upgraded.state_dict()
    assert_bits(dict(before), {key: after[key] for key in before})
    names = ("blend", "adapting_kernel.log_bandwidth", "guidance.project.weight")
    assert all(key.endswith(names) for key in after.keys() - before.keys())
    assert after.keys() - before.keys() >= added(upgraded, original).keys()


def test_an_old_checkpoint_loads_strictly(name: str) -> None:
    original, _ = pair(name)
    checkpoint = {
        k: v + 1 if v.is_floating_point() else v for k, v in original.state_dict().items()
    }
    twin = learned(name)
    incompatible = twin.load_state_dict(checkpoint)
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == ([], [])
    state = twin.state_dict()
    assert_bits(checkpoint, {key: state[key] for key in checkpoint})
    assert all(layer.blend == 0.5 for layer in pac_layers(twin).values())


def test_a_new_checkpoint_loads_strictly(tiny: str) -> None:
    _, upgraded = pair(tiny)
    source, twin = learned(tiny), copy.deepcopy(upgraded)
    twin.load_state_dict(source.state_dict())
    assert_bits(dict(source.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("kind", ["old", "new"])
def test_a_damaged_checkpoint_is_refused(tiny: str, kind: str) -> None:
    original, upgraded = pair(tiny)
    checkpoint = dict(upgraded.state_dict())
    gone = sorted(checkpoint.keys() - (original.state_dict().keys() if kind == "new" else set()))
    if kind == "old":
        checkpoint, gone = dict(original.state_dict()), list(original.state_dict())
    del checkpoint[gone[0]]
    with pytest.raises(RuntimeError, match="Missing key"):
        copy.deepcopy(upgraded).load_state_dict(checkpoint)


def as_part(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"backbone": copy.deepcopy(model), "head": nn.Linear(2, 2)})


def test_an_old_checkpoint_loads_where_the_network_is_a_part() -> None:
    original, upgraded = (as_part(model) for model in pair("body"))
    upgraded.load_state_dict(original.state_dict())


def test_a_damaged_one_is_refused_there_too() -> None:
    original, upgraded = (as_part(model) for model in pair("body"))
    damaged = original.state_dict() | {"backbone.target.blend": torch.zeros(())}
    with pytest.raises(RuntimeError, match="adapting_kernel"):
        upgraded.load_state_dict(damaged)


# ---- 4. it can be undone


def test_revert_gives_the_original_back(name: str) -> None:
    original, upgraded = pair(name)
    plain = pacswap.revert(upgraded)
    assert_bits(dict(original.state_dict()), dict(plain.state_dict()))
    for (path, before), (other, after) in zip(
        original.named_modules(remove_duplicate=False),
        plain.named_modules(remove_duplicate=False),
        strict=True,
    ):
        assert path == other
        assert type(after) is type(before), path
        assert after.training == before.training, path
        assert vars(after).keys() == vars(before).keys(), path
        assert [len(getattr(after, hooks)) for hooks in HOOKS] == [
            len(getattr(before, hooks)) for hooks in HOOKS
        ], path


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_post_hooks")


def test_revert_keeps_what_was_learned(tiny: str) -> None:
    twin = learned(tiny)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.5)
    state = pacswap.revert(twin).state_dict()
    assert_bits(dict(state), {key: twin.state_dict()[key] for key in state})


@MODES
def test_disabled_is_the_original_for_the_moment(tiny: str, training: bool) -> None:
    original, _ = pair(tiny)
    twin, args = learned(tiny), SWAPS[tiny].arguments()
    with pacswap.disabled(twin) as same:
        assert same is twin
        inside = run(twin, args, training=training)
    assert_same(run(original, args, training=training)[0], inside[0], tolerance=0)


def test_after_disabled_the_blend_counts_again(tiny: str) -> None:
    twin, args = learned(tiny), SWAPS[tiny].arguments()
    before = run(twin, args)
    with pytest.raises(ZeroDivisionError), pacswap.disabled(twin):
        raise ZeroDivisionError
    assert_same(before, run(twin, args), tolerance=0)


def test_no_tensor_is_shared_with_the_given_model(tiny: str) -> None:
    original, upgraded = pair(tiny)
    ours = {tensor.data_ptr() for tensor in original.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in upgraded.state_dict().values()}
