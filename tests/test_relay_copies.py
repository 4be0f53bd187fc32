"""Relayed networks in copies, threads and replicas; external guidance; what `verify` sees."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import models as m
import pytest
import refusals as r
import torch
from refusals import IMAGES, KERNEL, relayed_body, untraceable
from same import assert_differ, assert_same, backward, run
from swaps import Swap, settled
from torch import Tensor, nn

import pacswap
from pacswap.errors import GuidanceError
from pacswap.surgery import relay

# ---- errors, threads, copies


class Failing(m.Body):
    fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) if x.shape[-1] > 0 else x
        if self.fails:
            raise ZeroDivisionError
        return self.target(x)


def test_an_error_in_the_network_leaves_no_frame_open() -> None:
    model = pacswap.swap(Failing(), "target", "stem", kernel=KERNEL, example_input=IMAGES)
    before = model(IMAGES)
    model.fails = True
    with pytest.raises(ZeroDivisionError):
        model(IMAGES)
    assert relay.local.frames == []
    model.fails = False
    assert_same(before, model(IMAGES), tolerance=0)


def test_two_threads_have_frames_of_their_own() -> None:
    model = relayed_body().eval()
    pictures = [torch.rand(2, 3, 16 + i, 20) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in pictures]
    barrier, found = threading.Barrier(len(pictures)), {}

    def meet(*_: Any) -> None:
        barrier.wait(20)

    model.stem.register_forward_hook(meet)

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = model(pictures[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pictures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(expected, [found[i] for i in range(len(pictures))], tolerance=0)


def test_replicas_of_data_parallel_use_their_own_parameters() -> None:
    """Built as `torch.nn.parallel.replicate` builds them, which needs GPUs to do so."""
    model = pacswap.swap(r.Branch(), "target", "stem", kernel=KERNEL, example_input=IMAGES).eval()
    expected = model(IMAGES)
    replica = _replica(model)
    assert_same(expected, replica(IMAGES), tolerance=0)
    replica.target.blend = torch.zeros(())
    assert_differ(expected, replica(IMAGES))
    assert_same(expected, model(IMAGES), tolerance=0)


def _replica(module: nn.Module) -> nn.Module:
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, _replica(child) if child is not None else None)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    return replica


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", list(COPIES))
def test_copies_do_the_same_by_themselves(way: str) -> None:
    model = pacswap.swap(r.Branch(), "target", "stem", kernel=KERNEL, example_input=IMAGES)
    twin = COPIES[way](model)
    assert_same(run(model, (IMAGES,)), run(twin, (IMAGES,)), tolerance=0)
    nn.init.zeros_(twin.target.blend)
    assert_differ(run(model, (IMAGES,))[0], run(twin, (IMAGES,))[0])


def test_a_pickle_is_read_in_another_process(tmp_path: Path) -> None:
    model = pacswap.swap(r.Branch(), "target", "stem", kernel=KERNEL, example_input=IMAGES).eval()
    torch.save((model, IMAGES, model(IMAGES).detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]);"
        "model, x, y = torch.load(sys.argv[2], weights_only=False);"
        "assert torch.equal(model(x), y)"
    )
    here = str(Path(__file__).parent)
    reader = fresh.run("-c", code, here, str(tmp_path / "model.pt"))
    assert reader.returncode == 0, reader.stderr


def test_images_that_were_filtered_are_as_before() -> None:
    model, x = relayed_body(), IMAGES.clone()
    backward(model.train(), (x,))
    model(x).sum().backward()
    assert vars(x) == {}


# ---- disabled, verified, external


def test_verify_measures_the_promises() -> None:
    model = settled(r.Branch(), (IMAGES,))
    upgraded = pacswap.swap(model, "target", "stem", example_input=IMAGES, calibration=IMAGES)
    pacswap.verify(model, upgraded, IMAGES).raise_if_failed()
    assert upgraded.target.adapting_kernel.log_bandwidth != 0  # calibrated through the relay
    with torch.no_grad():
        upgraded.target.weight.mul_(1.5)
    with pytest.raises(pacswap.errors.VerificationError):
        pacswap.verify(model, upgraded, IMAGES).raise_if_failed()


def test_external_guidance_guides() -> None:
    model, features = relayed_body(guidance="external"), torch.rand(2, 5, 9, 11)
    one = run(model, (IMAGES,), guidance=features)[0]
    assert_differ(one, run(model, (IMAGES,), guidance=features.flip(-1))[0])
    twin = pacswap.swap(_plain(model), "target", "external", kernel=KERNEL, example_input=IMAGES)
    assert_same(one, run(twin, (IMAGES,), guidance=features)[0])


def _plain(model: nn.Module) -> nn.Module:
    body = m.Body()
    body.load_state_dict(pacswap.revert(model).state_dict())
    return body.train(model.training)


def test_without_external_guidance_is_an_error_unless_disabled() -> None:
    model = relayed_body(guidance="external")
    with pytest.raises(GuidanceError) as caught:
        model(IMAGES)
    assert str(caught.value) == (
        "this network was upgraded with an external guidance and was called without one. Call it "
        "as model(input, guidance=features)."
    )
    with pacswap.disabled(model):
        assert_same(run(_plain(model), (IMAGES,))[0], run(model, (IMAGES,))[0])


class Masked(m.Body):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        return x if mask is None else x * mask


def test_the_image_is_the_first_parameter_in_whatever_order_it_is_given() -> None:
    model, mask = Swap(untraceable(Masked)).build(), torch.rand(2, 1, 16, 20)
    upgraded = pacswap.swap(model, "target", "input", kernel=KERNEL, example_input=IMAGES).eval()
    assert_same(upgraded(IMAGES, mask), upgraded(mask=mask, x=IMAGES), tolerance=0)


class OneActivation(m.Body):
    """A Sequential whose last entry runs elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.first, self.act = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), act), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.target(self.first(x)))


def test_a_sequential_that_ends_in_a_shared_module_guides() -> None:
    model = relayed_body(OneActivation, guidance="first")
    assert_differ(run(model, (IMAGES,))[0], run(pacswap.revert(model), (IMAGES,))[0])
