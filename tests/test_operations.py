"""The five promises for pool, upsample and append, on tiny networks and a zoo.

Nothing here uses `pacswap.verify`, which is compared with these results in the end.
"""

from __future__ import annotations

import copy

import pytest
import torch
from operations import CASES, TINY, adaptive, learned, pair
from same import assert_bits, assert_differ, assert_same, backward, run
from torch import Tensor, nn

import pacswap

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


# One network after the other, so that each is built and changed once.
@pytest.fixture(scope="module", params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> str:
    return request.param


def added(model: nn.Module, original: nn.Module) -> dict[str, nn.Parameter]:
    known = dict(original.named_parameters(remove_duplicate=False))
    return {n: p for n, p in model.named_parameters() if n not in known}


def runs(model: nn.Module, images: Tensor, training: bool) -> tuple[object, dict[str, Tensor]]:
    """Output and buffers with gradients: without them a resting layer has a shorter way."""
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(3)
    output = twin(images.clone())
    return output, dict(twin.named_buffers())


# ---- 1. nothing changes


@MODES
def test_output_and_statistics_keep_their_bits(name: str, training: bool) -> None:
    original, upgraded = pair(name)
    args = (CASES[name].images(),)
    before, after = (run(model, args, training=training) for model in (original, upgraded))
    assert_same(before[0], after[0], tolerance=0)
    assert_bits(before[1], {key: after[1][key] for key in before[1]})


@MODES
def test_they_keep_them_while_gradients_are_recorded(tiny: str, training: bool) -> None:
    original, upgraded = pair(tiny)
    images = CASES[tiny].images()
    before, after = (runs(model, images, training) for model in (original, upgraded))
    assert_same(before[0], after[0], tolerance=0)


@MODES
def test_they_keep_them_at_an_odd_size(name: str, training: bool) -> None:
    original, upgraded = pair(name)
    args = (CASES[name].images(CASES[name].odd),)
    before, after = (run(model, args, training=training)[0] for model in (original, upgraded))
    assert_same(before, after, tolerance=0)


def test_a_learned_blend_changes_the_output(name: str) -> None:
    """… at either size, so that the comparisons above can fail."""
    original, upgraded = pair(name)
    for size in (CASES[name].size, CASES[name].odd):
        args = (CASES[name].images(size),)
        assert_differ(run(original, args)[0], run(learned(upgraded), args)[0])


def test_each_learned_blend_alone_changes_it(tiny: str) -> None:
    original, upgraded = pair(tiny)
    args = (CASES[tiny].images(),)
    before = run(original, args)[0]
    for layer in adaptive(upgraded):
        twin = copy.deepcopy(upgraded)
        nn.init.constant_(adaptive(twin)[layer].blend, 0.5)
        assert_differ(before, run(twin, args)[0])


def test_another_guidance_changes_the_output(tiny: str) -> None:
    _, upgraded = pair(tiny)
    args = (CASES[tiny].images(),)
    before = run(learned(upgraded), args)[0]
    shuffled = learned(upgraded)
    for module in shuffled.modules():
        if isinstance(module, pacswap.nn.Guidance):
            module.register_forward_hook(turned)
    assert_differ(before, run(shuffled, args)[0])


def turned(module: nn.Module, args: tuple[Tensor, ...], features: Tensor) -> Tensor:
    """The same features at other pixels."""
    pixels = torch.randperm(features[0, 0].numel(), generator=torch.Generator().manual_seed(0))
    return features.flatten(2)[..., pixels].view_as(features)


# ---- 2. everything can learn


def test_every_blend_has_a_gradient_at_once(name: str) -> None:
    twin = copy.deepcopy(pair(name)[1]).train()
    backward(twin, (CASES[name].images(),))
    for layer, module in adaptive(twin).items():
        assert module.blend.grad is not None, layer
        assert module.blend.grad.abs() > 1e-12, layer


def test_all_that_was_added_learns_after_a_step(name: str) -> None:
    original, upgraded = pair(name)
    twin = copy.deepcopy(upgraded).train()
    images = CASES[name].images()
    backward(twin, (images,))
    parameters = added(twin, original)
    longest = max(p.grad.abs().max() for p in parameters.values() if p.grad is not None)
    torch.optim.SGD(parameters.values(), lr=0.1 / longest.item()).step()
    twin.zero_grad()
    backward(twin, (images,))
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 1e-12, key


def test_before_that_step_only_the_blends_do(tiny: str) -> None:
    """… which shows that the gradients above are not noise."""
    original, upgraded = pair(tiny)
    twin = copy.deepcopy(upgraded).train()
    backward(twin, (CASES[tiny].images(),))
    for key, parameter in added(twin, original).items():
        if not key.endswith("blend"):
            assert parameter.grad is None or not parameter.grad.any(), key


@MODES
def test_the_original_parameters_have_their_gradients(tiny: str, training: bool) -> None:
    original, upgraded = (copy.deepcopy(model).train(training) for model in pair(tiny))
    args = (CASES[tiny].images(),)
    backward(original, args)
    backward(upgraded, args)
    found = dict(upgraded.named_parameters())
    for key, parameter in original.named_parameters():
        assert_same(parameter.grad, found[key].grad, tolerance=1e-4)


# ---- 3. old checkpoints load


def test_keys_and_values_are_kept_and_what_is_added_was_planned(name: str) -> None:
    original, upgraded = pair(name)
    before, after = original.state_dict(), upgraded.state_dict()
    assert_bits(dict(before), {key: after[key] for key in before})
    plan = CASES[name].plan(original)
    assert sorted(after.keys() - before.keys()) == plan.added_parameters()
    figure = sum(p.numel() for p in upgraded.parameters())
    figure -= sum(p.numel() for p in original.parameters())
    assert plan.cost.added_parameters == figure


def test_an_old_checkpoint_loads_strictly(name: str) -> None:
    original, upgraded = pair(name)
    checkpoint = {
        k: v + 1 if v.is_floating_point() else v for k, v in original.state_dict().items()
    }
    twin = learned(upgraded)
    incompatible = twin.load_state_dict(checkpoint)
    assert (incompatible.missing_keys, incompatible.unexpected_keys) == ([], [])
    state = twin.state_dict()
    assert_bits(checkpoint, {key: state[key] for key in checkpoint})
    assert all(layer.blend == 0.5 for layer in adaptive(twin).values())


def test_a_new_checkpoint_loads_and_a_damaged_one_does_not(tiny: str) -> None:
    original, upgraded = pair(tiny)
    twin = copy.deepcopy(upgraded)
    state = dict(learned(upgraded).state_dict())
    twin.load_state_dict(state)
    assert_bits(state, dict(twin.state_dict()))
    del state[max(state.keys() - original.state_dict().keys())]
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict(state)


# ---- 4. it can be undone


def test_revert_gives_the_original_back_with_the_weights_of_now(name: str) -> None:
    original, upgraded = pair(name)
    twin = learned(upgraded)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.25)
    plain = pacswap.revert(twin)
    state = dict(plain.state_dict())
    assert list(state) == list(original.state_dict())
    assert_bits(state, {key: twin.state_dict()[key] for key in state})
    for (path, before), (other, after) in zip(
        original.named_modules(remove_duplicate=False),
        plain.named_modules(remove_duplicate=False),
        strict=True,
    ):
        assert path == other
        assert type(after) is type(before), path
        assert vars(after).keys() == vars(before).keys(), path
        assert after.extra_repr() == before.extra_repr(), path


def test_what_is_reverted_at_once_computes_the_same(name: str) -> None:
    original, upgraded = pair(name)
    args = (CASES[name].images(CASES[name].odd),)
    assert_same(
        run(original, args)[0], run(pacswap.revert(learned(upgraded)), args)[0], tolerance=0
    )


@MODES
def test_disabled_is_the_original_for_the_moment(name: str, training: bool) -> None:
    original, upgraded = pair(name)
    twin, args = learned(upgraded), (CASES[name].images(),)
    with pacswap.disabled(twin):
        inside = run(twin, args, training=training)[0]
    assert_same(run(original, args, training=training)[0], inside, tolerance=0)
    if not training:
        assert_differ(inside, run(twin, args)[0])


# ---- 5. and `verify` says so


def test_verify_agrees(tiny: str) -> None:
    original, upgraded = pair(tiny)
    report = pacswap.verify(original, upgraded, CASES[tiny].images())
    assert report.passed, str(report)
    broken = learned(upgraded)
    with torch.no_grad():
        next(iter(broken.parameters())).add_(1)
    assert not pacswap.verify(original, broken, CASES[tiny].images()).passed


def test_no_tensor_is_shared_with_the_given_model(tiny: str) -> None:
    original, upgraded = pair(tiny)
    ours = {tensor.data_ptr() for tensor in original.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in upgraded.state_dict().values()}
