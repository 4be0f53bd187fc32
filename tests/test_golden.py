"""What the paper's public reference implementation computed, to a relative 1e-10."""

from __future__ import annotations

import json
import os
import re
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
# Files of the other operation, the CRF, are compared in test_golden_crf.py.
FILES = [path for path in sorted(FOLDER.glob("*.npz")) if not path.name.startswith("crf_")]
OPERATIONS = ("conv", "conv_transpose", "pool")
LEARNED = ("input", "guide", "weight", "bias", "inv_alpha", "inv_lambda", "smooth_kernel")
COMPARED = ("kernel", "output", "output_mask", *(f"grad_{name}" for name in LEARNED))
OPTIONS = {
    "op", "kernel_size", "stride", "padding", "dilation", "output_padding", "kernel_type",
    "smooth_kernel_type", "normalize_kernel", "channel_wise", "shared_filters",
}  # fmt: skip
INVERSE = re.compile(r"inv_([-+.e\d]+)_([-+.e\d]+)((?:_asym|_fixed)*)")
SMOOTHED = re.compile(r"gaussian|average_\d+|full_\d+")

every_backend = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
needs_folder = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no golden numbers in {FOLDER}; set PACSWAP_GOLDEN to their folder"
)
every_file = pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in FILES]
    or [pytest.param(FOLDER, marks=needs_folder, id="no_files")],
)
fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's options and its tensors."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    config = json.loads(str(arrays.pop("config")))
    return config, {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def check(config: dict[str, Any], given: dict[str, Tensor]) -> None:
    """Raise if a file says or holds anything that nothing here reads."""
    unread = config.keys() - OPTIONS
    assert not unread, f"unknown options {unread}"
    assert config["op"] in OPERATIONS, f"unknown op {config['op']!r}"
    unread = given.keys() - {*LEARNED, *COMPARED, "mask", "cotangent"}
    assert not unread, f"nothing is compared with {unread}"
    smoothing, form = config["smooth_kernel_type"], config["kernel_type"]
    assert smoothing == "none" or SMOOTHED.fullmatch(smoothing), f"unknown smoothing {smoothing!r}"
    assert (smoothing == "none") == ("smooth_kernel" not in given), "smoothing without its filter"
    assert form == "gaussian" or INVERSE.fullmatch(form), f"unknown kernel_type {form!r}"


def geometry_of(config: dict[str, Any]) -> dict[str, Any]:
    names = ["stride", "padding", "dilation"]
    return {n: config[n] for n in names + ["output_padding"] * (config["op"] == "conv_transpose")}


def kernel_options(config: dict[str, Any], leaves: dict[str, Tensor]) -> dict[str, Any]:
    """The file's adapting kernel in pacswap's words."""
    options: dict[str, Any] = {
        "normalize": "sum" if config["normalize_kernel"] else "none",
        "channel_wise": config.get("channel_wise", False),
    }
    inverse = INVERSE.fullmatch(config["kernel_type"])
    if inverse is not None:
        alpha, lambd, flags = inverse.groups()
        options |= {
            "form": "inverse",
            "alpha": leaves.get("inv_alpha", float(alpha)),
            "lambd": leaves.get("inv_lambda", float(lambd)),
            "asymmetric": "_asym" in flags,
        }
    if "smooth_kernel" in leaves:
        options["smoothing"] = leaves["smooth_kernel"][0, 0]
    return options


def transposed(
    config: dict[str, Any], leaves: dict[str, Tensor], mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The adapting kernel and the output of a transposed convolution."""
    geometry, input = geometry_of(config), leaves["input"]
    guided = ops.guidance_window(config["kernel_size"], config["dilation"])
    window, steps = ops.transposed_window(config["kernel_size"], **geometry)
    options = kernel_options(config, leaves)
    if mask is not None or config["normalize_kernel"]:
        image = torch.ones_like(input[:1, :1])
        options["mask"] = seen(image if mask is None else mask, window, steps)
    kernel = ops.adapting_kernel(leaves["guide"], guided, **options, backend=backend)
    if mask is not None and not config["normalize_kernel"]:
        # Of the taps inside the plane, only those on a pixel and not on an inserted zero count.
        plane = ops.valid_taps(torch.ones_like(leaves["guide"][:1, :1]), guided)
        pixels = seen(image, window, steps).sum(2, keepdim=True)
        kernel = kernel * (pixels.double() / plane.sum(2, keepdim=True))
    # The reference's weight is that of the convolution over the inserted zeros.
    weight = leaves["weight"].flip(2, 3)
    output = ops.pac_conv_transpose2d(
        input, kernel, weight, leaves.get("bias"), **geometry, backend=backend
    )
    return kernel, output


def seen(mask: Tensor, window: ops.Window, steps: tuple[int, int]) -> Tensor:
    """Which taps of a transposed convolution are on a valid pixel, 1 or 0."""
    return ops.valid_taps(ops.insert_zeros(mask, steps), window).double()


def forward(
    config: dict[str, Any], leaves: dict[str, Tensor], mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The adapting kernel and the output of a convolution or a pooling."""
    geometry, input, size = geometry_of(config), leaves["input"], config["kernel_size"]
    options = kernel_options(config, leaves)
    kernel = ops.adapting_kernel(
        leaves["guide"], size, **geometry, **options, mask=mask, backend=backend
    )
    if config["op"] == "pool":
        return kernel, ops.pac_pool2d(input, kernel, size, **geometry, backend=backend)
    weight, groups = leaves["weight"], 1
    if config["shared_filters"]:
        groups = input.shape[1]
        weight = weight.expand(groups, -1, -1, -1)
    output = ops.pac_conv2d(
        input, kernel, weight, leaves.get("bias"), **geometry, groups=groups, backend=backend
    )
    return kernel, output


def computed(config: dict[str, Any], given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """What pacswap makes of a file's inputs, under the file's names."""
    check(config, given)
    leaves = {name: given[name].clone().requires_grad_() for name in LEARNED if name in given}
    made = transposed if config["op"] == "conv_transpose" else forward
    kernel, output = made(config, leaves, given.get("mask"), backend)
    if "output_mask" in given:
        output = without_invalid(output, mask_of(config, given["mask"]), given["output"])
    results = {"kernel": kernel.detach(), "output": output.detach()}
    if "output_mask" in given:
        # The reference marks every channel of a channel-wise kernel, always alike.
        made_mask = mask_of(config, given["mask"])[:, :, None, None]
        results["output_mask"] = made_mask.expand_as(given["output_mask"])
    grads = torch.autograd.grad(output, list(leaves.values()), given["cotangent"])
    results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    # What is a buffer in the reference ("fixed", smoothing that is not learned) has no gradient.
    return {name: silent(results[name]) for name in COMPARED if name in given}


def without_invalid(output: Tensor, seen: Tensor, wanted: Tensor) -> Tensor:
    """The output as the file has it where nothing valid is seen: 0, as the paper says, or the bias.

    The reference returns the bias there, and so does `ops.pac_conv2d`; the layer returns 0.
    """
    invalid = (seen == 0).expand_as(wanted)
    return torch.where(invalid, 0.0, output) if not wanted[invalid].any() else output


def mask_of(config: dict[str, Any], mask: Tensor) -> Tensor:
    """Which outputs see a valid pixel, [B, 1, H_out, W_out]."""
    geometry = geometry_of(config)
    if config["op"] == "conv_transpose":
        window, steps = ops.transposed_window(config["kernel_size"], **geometry)
        return ops.output_mask(ops.insert_zeros(mask, steps), window)
    return ops.output_mask(mask, ops.make_window(config["kernel_size"], **geometry))


def expected(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that a file holds beside its inputs, in the order of `computed`."""
    return {name: silent(given[name]) for name in COMPARED if name in given}


def silent(value: Tensor) -> Tensor:
    """0 for what is 0 but for rounding, such as the gradient of one tap divided by itself."""
    return torch.zeros_like(value) if value.abs().max() < 1e-13 else value


@needs_folder
def test_files_are_collected():
    assert FILES


GIVEN = {name: torch.zeros(1) for name in ("input", "guide", "cotangent")}
PLAIN = {"op": "pool", "kernel_type": "gaussian", "smooth_kernel_type": "none"}


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ({"op": "conv3d"}, {}, "unknown op 'conv3d'"),
        ({"blur": 2}, {}, "unknown options {'blur'}"),
        ({"kernel_type": "inv_1_2_sym"}, {}, "unknown kernel_type 'inv_1_2_sym'"),
        ({"smooth_kernel_type": "median_3"}, {}, "unknown smoothing 'median_3'"),
        ({"smooth_kernel_type": "full_3"}, {}, "smoothing without its filter"),
        ({}, {"grad_mask": torch.zeros(1)}, "nothing is compared with {'grad_mask'}"),
    ],
)
def test_unknown_words_are_not_skipped(config, given, message):
    check(PLAIN, GIVEN)
    with pytest.raises(AssertionError, match=re.escape(message)):
        check({**PLAIN, **config}, {**GIVEN, **given})


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
