"""What the paper's public reference implementation computed, to a relative 1e-10."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import BACKENDS, DIFFERS, assert_all_close64, fresh_memory_is_nan
from torch import Tensor

from pacswap import ops

FOLDER = Path(
    os.environ.get("PACSWAP_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
)
every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
needs_folder = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no golden numbers in {FOLDER}; set PACSWAP_GOLDEN to their folder"
)
fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's options and its tensors."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    config = json.loads(str(arrays.pop("config")))
    return config, {name: torch.from_numpy(array) for name, array in arrays.items()}


def is_supported(path: Path) -> bool:
    """Whether pacswap has today what this file of the convolution's family needs."""
    config, tensors = load(path)
    return (
        config["op"] == "conv"
        and config["kernel_type"] == "gaussian"
        and config["smooth_kernel_type"] == "none"
        and not config["shared_filters"]
        and "mask" not in tensors
    )


FILES = [path for path in sorted(FOLDER.glob("conv_*.npz")) if is_supported(path)]
every_file = pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in FILES]
    or [pytest.param(FOLDER, marks=needs_folder, id="no_files")],
)


def computed(config: dict[str, Any], given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """What pacswap makes of a file's inputs, under the file's names."""
    names = [n for n in ("input", "guide", "weight", "bias") if n in given]
    leaves = {name: given[name].clone().requires_grad_() for name in names}
    geometry = {name: config[name] for name in ("stride", "padding", "dilation")}
    kernel = ops.adapting_kernel(
        leaves["guide"],
        config["kernel_size"],
        **geometry,
        normalize="sum" if config["normalize_kernel"] else "none",
        backend=backend,
    )
    output = ops.pac_conv2d(
        leaves["input"], kernel, leaves["weight"], leaves.get("bias"), **geometry, backend=backend
    )
    grads = torch.autograd.grad(output, list(leaves.values()), given["cotangent"])
    results = {"kernel": kernel.detach(), "output": output.detach()}
    return results | {f"grad_{n}": g for n, g in zip(names, grads, strict=True)}


def expected(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that a file holds beside its inputs, in the order of `computed`."""
    order = ["kernel", "output", "grad_input", "grad_guide", "grad_weight", "grad_bias"]
    inputs = {"input", "guide", "weight", "bias", "cotangent"}
    unknown = given.keys() - inputs - set(order)
    assert not unknown, f"nothing is compared with {unknown}"
    return {name: given[name] for name in order if name in given}


@needs_folder
def test_some_files_are_collected():
    assert FILES


@every_backend
@every_file
def test_golden(path, backend):
    config, given = load(path)
    assert_all_close64(computed(config, given, backend), expected(given), relative=1e-10)


@every_backend
@every_file
def test_golden_sees_single_precision(path, backend):
    config, given = load(path)
    rough = {name: tensor.float().double() for name, tensor in given.items()}
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_all_close64(computed(config, rough, backend), expected(given), relative=1e-10)
