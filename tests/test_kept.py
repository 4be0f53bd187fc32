"""Model directories of every released version still load, and give what they gave."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import safetensors.torch
import torch

import pacswap
from pacswap.surgery import pac_layers
from pacswap.zoo import Source, build

KEPT = Path(__file__).parent / "kept"
VERSIONS = sorted(path.name for path in KEPT.iterdir() if path.is_dir() and path.name[0].isdigit())
KINDS = ("added", "full")
BOUND = 1e-5

written = runpy.run_path(str(KEPT / "write.py"), run_name="write")


def expected(version: str, kind: str) -> torch.Tensor:
    return safetensors.torch.load_file(KEPT / version / "expected.safetensors")[kind]


def assert_gives(model: torch.nn.Module, version: str, kind: str) -> None:
    wanted = expected(version, kind)
    assert wanted.numel() > 100
    assert wanted.abs().max() > 0.5
    torch.testing.assert_close(written["numbers"](model), wanted, rtol=0, atol=BOUND)


def test_the_first_version_is_there():
    assert VERSIONS[0] == "0.1.0"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_it_loads_and_gives_what_it_gave(version, kind):
    assert_gives(pacswap.load(KEPT / version / kind), version, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_added_matters_to_it(version, kind):
    """The comparison sees each layer: without its adapting, the numbers are others."""
    model = pacswap.load(KEPT / version / kind)
    layers = pac_layers(model)
    assert len(layers) >= 4
    for layer in layers.values():
        before = layer.blend.detach().clone()
        with torch.no_grad():
            layer.blend.zero_()
        with pytest.raises(AssertionError, match="not close"):
            assert_gives(model, version, kind)
        with torch.no_grad():
            layer.blend.copy_(before)
    assert_gives(model, version, kind)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_added_one_takes_a_base(version):
    base = pacswap.revert(pacswap.load(KEPT / version / "added"))
    shipped = build(Source("pacswap", "scene_net", "DEFAULT"))
    assert not torch.equal(base.head.bn.running_mean, shipped.head.bn.running_mean)
    assert_gives(pacswap.load(KEPT / version / "added", base=shipped), version, "added")


@pytest.mark.parametrize("version", VERSIONS)
def test_they_are_small(version):
    sizes = {kind: sum(p.stat().st_size for p in (KEPT / version / kind).iterdir())
             for kind in KINDS}  # fmt: skip
    assert sizes["added"] < 16_000
    assert sizes["full"] < 1_500_000


def test_they_are_not_written_again(monkeypatch):
    monkeypatch.setattr(pacswap, "__version__", VERSIONS[0])
    with pytest.raises(FileExistsError):
        written["main"]()
