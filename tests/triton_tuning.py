"""How a configuration is chosen, by Triton's own tuner; `test_ops_triton.py` runs this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from numerics import pac, wide
from triton_values import GEOMETRIES, SCALARS, assert_rule, kernel_of

from pacswap import ops
from pacswap.ops.gpu import dense, depthwise, distance, tuning


@pytest.fixture
def measured(monkeypatch):
    """Triton's own tuner, of two configurations, with measurements that only a GPU could make."""
    took: list[float] = []
    right = triton.autotune

    def autotune(configs: list[Any], key: list[str], prune_configs_by: dict[str, Any]) -> Any:
        def do_bench(run: Any, quantiles: Any) -> list[float]:
            run()
            took.append(-float(len(took)))  # the last is the fastest
            return [took[-1]] * 3

        options = {"prune_configs_by": prune_configs_by, "do_bench": do_bench}
        return right(configs=configs, key=key, **options)

    monkeypatch.setattr(triton, "autotune", autotune)
    modules = (dense, depthwise, distance)
    programs = [p for m in modules for p in vars(m).values() if isinstance(p, tuning.Program)]
    for program in programs:
        (one,) = program.configs
        other = triton.Config({name: 2 * side for name, side in one.kwargs.items()})
        monkeypatch.setattr(program, "configs", [one, other])
        monkeypatch.setattr(program, "_fastest", {})
    yield took
    for program in programs:
        vars(program).pop("_tuner", None)


@pytest.mark.parametrize("name", ["depthwise_blocks", "blocks_of_channels"])
def test_configurations_are_measured_once_for_each_layer(name, measured):
    """Each of a program's; what is computed is the same."""
    case = GEOMETRIES[name]
    given = case.tensors(torch.float32)
    truth, baseline = pac(case, wide(given), "reference"), pac(case, given, "reference")
    for times in range(2):
        made = pac(case, given, "triton")
        assert_rule(
            {n: v for n, v in made.items() if n not in SCALARS},
            {n: v for n, v in truth.items() if n not in SCALARS},
            {n: v for n, v in baseline.items() if n not in SCALARS},
        )
        if times == 0:
            first = len(measured)
            assert first >= 6  # programs
    assert len(measured) == first


def test_the_fastest_configuration_is_taken(measured):
    case = GEOMETRIES["blocks_of_channels"]
    given, kernel = case.tensors(torch.float32), kernel_of(case, 1, torch.float32)
    call = given["input"], kernel, given["weight"]
    for _ in range(2):
        ops.pac_conv2d(*call, **case.options, backend="triton")
    assert len(measured) == 2
    (chosen,) = dense.forward._fastest.values()
    assert chosen.items() >= dense.forward.configs[1].kwargs.items()
