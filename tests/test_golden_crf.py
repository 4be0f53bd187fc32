"""The CRF against the paper's public reference implementation, to a relative 1e-10."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import BACKENDS, DIFFERS, assert_all_close64, assert_close64, fresh_memory_is_nan
from test_golden import FOLDER, load, needs_folder
from torch import Tensor

from pacswap.nn import PacCRF, PairwiseKernel
from pacswap.nn.pairwise import _gaussian
from pacswap.ops import backends

every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)

WORDS = {
    "op",
    "num_steps",
    "shared_steps",
    "final_output",
    "unary_weight",
    "pairwise_kernels",
    "rgb_scale",
    "yx_scale",
}
KERNEL_WORDS = {
    "kernel_size",
    "dilation",
    "blur",
    "compat_type",
    "spatial_filter",
    "pairwise_weight",
}
TENSORS = {"unary", "image", "edge_feature", "output", "cotangent", "grad_unary"}
FILES = sorted(FOLDER.glob("crf_*.npz"))


def of_files(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "path",
        [pytest.param(path, id=path.stem) for path in paths]
        or [pytest.param(FOLDER, marks=needs_folder, id="no_files")],
    )


every_file = of_files(FILES)


def is_regular(path: Path) -> bool:
    """Whether the scales are single numbers and every blurred pixel averages a full block.

    In a block that hangs over the border the reference averages fewer positions, which moves the
    blurred pixel; the closed form leaves it where it is.
    """
    config, given = load(path)
    numbers = all(
        isinstance(config[name], float | int | None) for name in ("rgb_scale", "yx_scale")
    )
    blurs = {kernel["blur"] for kernel in config["pairwise_kernels"]}
    whole = all(n % blur == 0 for blur in blurs for n in given["unary"].shape[2:])
    return numbers and (whole or config["yx_scale"] is None)


REGULAR = [path for path in FILES if is_regular(path)]


def pairwise(words: dict[str, Any], **scales: float | None) -> PairwiseKernel:
    """A pairwise kernel in the reference's words."""
    filtered, kind = words["spatial_filter"], words["compat_type"]
    weight = words["pairwise_weight"]
    if kind == "potts" and not filtered:
        weight = torch.tensor(weight, dtype=torch.float32).item()  # the only one it learns
    return PairwiseKernel(
        kernel_size=words["kernel_size"],
        dilation=words["dilation"],
        blur=words["blur"],
        compatibility=kind,
        spatial_filter=filtered or kind == "4d",  # where the reference does not ask
        weight=weight,
        **scales,
    )


def rounded_gaussian(size: int) -> Tensor:
    """The spatial filter as NumPy rounds it in float32, which from 7×7 on is not as torch does."""
    along = np.arange(size, dtype=np.float32) - size // 2
    side = np.exp(-0.5 * along**2 / (size / 4) ** 2)
    plane = np.outer(side, side)
    plane = plane / plane.sum() * size * size
    plane[size // 2, size // 2] = 0
    return torch.from_numpy(plane).double()


def crf_of(config: dict[str, Any], channels: int, **scales: float | None) -> PacCRF:
    """A CRF that starts as the reference's does, to the last bit of its float32."""
    crf = made_of(config, channels, **scales)
    for term in crf.terms:
        if term.weight is None:
            continue
        rounding = rounded_gaussian(term.options.kernel_size)
        ours = _gaussian(term.options.kernel_size)
        assert_close64(ours, rounding, relative=4e-7)  # three roundings to float32
        with torch.no_grad():
            term.weight.mul_(torch.where(ours == 0, 1, rounding / ours))
    return crf


def made_of(config: dict[str, Any], channels: int, **scales: float | None) -> PacCRF:
    return PacCRF(
        channels,
        [pairwise(words, **scales) for words in config["pairwise_kernels"]],
        steps=config["num_steps"],
        shared_steps=config["shared_steps"],
        unary_weight=config["unary_weight"],
        output=config["final_output"].lower(),
        dtype=torch.float64,
    )


def computed(
    config: dict[str, Any], given: dict[str, Tensor], guidance: str, **scales: float | None
) -> dict[str, Tensor]:
    """What pacswap makes of a file's inputs, under the file's names."""
    unary = given["unary"].clone().requires_grad_()
    output = crf_of(config, unary.shape[1], **scales)(unary, given[guidance])
    (grad,) = torch.autograd.grad(output, unary, given["cotangent"])
    return {"output": output.detach(), "grad_unary": grad}


def expected(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name] for name in ("output", "grad_unary")}


def scales_of(config: dict[str, Any]) -> dict[str, float | None]:
    """Our scales in place of features that are scaled already."""
    color = 1.0 if config["rgb_scale"] is None else config["rgb_scale"]
    return {"color": color, "position": config["yx_scale"]}


@needs_folder
def test_some_files_are_collected():
    assert FILES
    assert REGULAR


@every_file
def test_no_word_of_a_file_is_ignored(path):
    config, given = load(path)
    assert config.keys() == WORDS
    assert all(kernel.keys() == KERNEL_WORDS for kernel in config["pairwise_kernels"])
    assert given.keys() == TENSORS


@every_backend
@every_file
def test_golden(path, backend, monkeypatch):
    def chosen(asked, task):
        return ("eager" if backends.why_not(backend, task) else backend), []

    monkeypatch.setattr(backends, "_chosen", chosen)
    config, given = load(path)
    values = computed(config, given, "edge_feature")
    assert_all_close64(values, expected(given), relative=1e-10)


@every_file
def test_golden_sees_single_precision(path):
    config, given = load(path)
    rough = {name: tensor.float().double() for name, tensor in given.items()}
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_all_close64(computed(config, rough, "edge_feature"), expected(given), relative=1e-10)


@of_files(REGULAR)
def test_golden_from_the_image(path):
    config, given = load(path)
    values = computed(config, given, "image", **scales_of(config))
    # The reference makes its positions, and one over its scales, in float32.
    assert_all_close64(values, expected(given), relative=1e-6)


@pytest.mark.parametrize("name", ["color", "position"])
@of_files(REGULAR)
def test_golden_sees_another_scale(path, name):
    config, given = load(path)
    scales = scales_of(config)
    if scales[name] is None:
        scales[name] = 100.0  # pixels; no file has an image so large
    else:
        scales[name] *= 1.001
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_all_close64(
            computed(config, given, "image", **scales), expected(given), relative=1e-6
        )
