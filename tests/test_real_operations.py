"""Pooling, guided upsampling and a CRF in pretrained networks, on photographs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from test_real_weights import CALIBRATION, NETS, OTHERS, blended, difference, outputs
from test_real_weights import pytestmark as pytestmark
from torch import nn

import pacswap

GROUPS: dict[str, list[dict[str, Any]]] = {
    "squeezenet": [
        {
            "operation": "pool",
            "layers": {"type": "MaxPool2d"},
            "guidance": {"from": "features.1", "channels": 8},
        }
    ],
    "deeplab": [
        {
            "operation": "upsample",
            "layers": "interpolate",
            "guidance": {"from": ["input", "backbone.blocks.0"], "channels": 8},
            "filter": {"weights": "full"},
        },
        {
            "operation": "append",
            "layers": "interpolate",
            "guidance": "input",
            "crf": {
                "kernels": [{"dilation": 4}, {"guided": False, "position": 3.0}],
                "steps": 2,
            },
        },
    ],
}
every_net = pytest.mark.parametrize("name", GROUPS)


@functools.cache
def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A network and its upgraded twin, calibrated on photographs. Not to be changed."""
    original = NETS[name].make().eval()
    images = NETS[name].images(CALIBRATION[:4])
    return original, pacswap.swap(
        original, groups=GROUPS[name], example_input=images, calibration=images
    ).eval()


@every_net
def test_the_five_promises(name):
    verification = pacswap.verify(*pair(name), NETS[name].images(OTHERS[:2], size=97))
    assert [check for check in verification.checks if not check.passed] == []
    assert {check.promise for check in verification.checks} == {1, 2, 3, 4, 5}


@every_net
def test_nothing_changes_until_a_blend_does(name):
    original, upgraded = pair(name)
    images = NETS[name].images(OTHERS[:2])
    assert difference(original, upgraded, images) == 0
    assert difference(original, blended(upgraded, 0.5), images) > 1e-3


@every_net
def test_save_and_load(name, tmp_path):
    net, (original, upgraded) = NETS[name], pair(name)
    adaptive = blended(upgraded, 0.5)
    folder = pacswap.save(adaptive, tmp_path / "model", source=net.source)
    loaded = pacswap.load(folder, trust_python=net.source is not None)
    images = net.images(OTHERS[:1])
    assert difference(adaptive, loaded, images) == 0
    assert difference(original, pacswap.revert(loaded), images) == 0


def test_a_guided_upsampling_moves_edges_and_little_else():
    """At a full blend the untrained filter is an average over neighbours that look alike."""
    original, upgraded = pair("deeplab")
    images = NETS["deeplab"].images(OTHERS[:2])
    sharpened = blended(upgraded, 0.0)
    nn.init.ones_(sharpened.guided_interpolate.blend)
    before, after = (outputs(m, images)[0].argmax(1) for m in (original, sharpened))
    changed = (before != after).float().mean().item()
    assert 0 < changed < 0.05
    nn.init.zeros_(sharpened.guided_interpolate.weight)
    assert not torch.equal(outputs(sharpened, images)[0].argmax(1), before)
