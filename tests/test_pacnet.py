"""Weights of the reference implementation: its names and shapes, as it publishes them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import DIFFERS, assert_close64, fresh_memory_is_nan
from safetensors.torch import save_file
from torch import Tensor

from pacswap.errors import WeightsError
from pacswap.nn import PacConv2d, PacConvTranspose2d, PacPool2d
from pacswap.nn.crf import PacCRF
from pacswap.nn.pairwise import PairwiseKernel
from pacswap.pacnet import load_fcn8s, load_joint_upsample, load_layer

FOLDER = Path(
    os.environ.get("PACSWAP_GOLDEN", Path(__file__).resolve().parents[2] / "shared" / "golden")
)
fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)


def table(text: str) -> list[tuple[str, ...]]:
    """Layers by name, C_out and C_in (of `up_convts` C_in and C_out), and side."""
    return [tuple(entry.split()) for entry in text.split(",")]


LITE_4 = table(
    """branch_t.conv1 12 1, branch_t.conv2 16 12, branch_t.conv3 22 16, branch_g.conv1 12 3,
    branch_g.conv2 22 12, branch_g.conv3 24 22, up_convts.0 22 12, up_convts.1 12 16,
    branch_f.conv1 22 16, branch_f.conv2 1 22"""
)
FULL_8 = table(
    """branch_t.conv1 32 1, branch_t.conv2 32 32, branch_t.conv3 32 32, branch_g.conv1 32 3,
    branch_g.conv2 32 32, branch_g.conv3 48 32, up_convts.0 32 32, up_convts.1 32 32,
    up_convts.2 32 32, branch_f.conv1 32 32, branch_f.conv2 1 32"""
)
NETWORKS = {"lite_4x": (LITE_4, 4, "lite"), "full_8x": (FULL_8, 8, "full")}
FCN8S = table(
    """conv1_1 64 3 3, conv1_2 64 64 3, conv2_1 128 64 3, conv2_2 128 128 3, conv3_1 256 128 3,
    conv3_2 256 256 3, conv3_3 256 256 3, conv4_1 512 256 3, conv4_2 512 512 3, conv4_3 512 512 3,
    conv5_1 512 512 3, conv5_2 512 512 3, conv5_3 512 512 3, fc6 4096 512 7, fc7 4096 4096 1,
    score_fr 21 4096 1, score_pool3 21 256 1, score_pool4 21 512 1"""
)
FCN8S_CRF = {"crf.unary_weight": [], "feat_scales.0": [3], "feat_scales.1": [3]}
FCN8S_CRF |= {f"crf.messengers.{i}.weight": [21, 21, 5, 5] for i in range(2)}
FCN8S_CRF |= {f"crf.pairwise_weights.{i}": [] for i in range(2)}


def joint(layers: list[tuple[str, ...]] = LITE_4) -> dict[str, Tensor]:
    """A published joint upsampling network, with random numbers."""
    state = {}
    for name, *sides in layers:
        first, second = map(int, sides)
        biases = second if name.startswith("up_convts") else first
        state[f"{name}.weight"] = torch.randn(first, second, 5, 5) / 10
        state[f"{name}.bias"] = torch.randn(biases) / 10
    return state


def fcn8s(*, crf: bool = False) -> dict[str, Tensor]:
    """A published segmentation network; its tensors are all one number, repeated."""
    begin = "backbone." if crf else ""
    shapes: dict[str, list[int]] = {}
    for name, *sides in FCN8S:
        c_out, c_in, side = map(int, sides)
        shapes |= {f"{begin}{name}.weight": [c_out, c_in, side, side]}
        shapes |= {f"{begin}{name}.bias": [c_out]}
    for name, side in (("upscore2", 4), ("upscore8", 16), ("upscore_pool4", 4)):
        shapes[f"{begin}{name}.weight"] = [21, 21, side, side]
    shapes |= FCN8S_CRF if crf else {}
    return {name: torch.rand(()).expand(shape) for name, shape in shapes.items()}


def refusal(call, *given: Any) -> str:
    with pytest.raises(WeightsError) as raised:
        call(*given)
    return str(raised.value)


@pytest.mark.parametrize(("layers", "factor", "width"), NETWORKS.values(), ids=list(NETWORKS))
def test_a_network_is_recognised(layers, factor, width):
    state = joint(layers)
    made = load_joint_upsample(state)
    assert (made.factor, made.width, made.channels, made.guidance_channels) == (factor, width, 1, 3)
    assert not made.training
    assert sum(p.numel() for p in made.parameters()) == sum(t.numel() for t in state.values())
    assert made(torch.rand(1, 1, 4, 4), torch.rand(1, 3, 4 * factor, 4 * factor)).isfinite().all()


def test_each_tensor_goes_where_it_belongs():
    state = joint()
    made = load_joint_upsample(state).state_dict()
    ours = {"branch_t": "target", "branch_g": "guidance", "up_convts": "stages"}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        wanted = tensor.flip(2, 3) if name.startswith("up_convts") and tensor.dim() > 1 else tensor
        assert torch.equal(made.pop(f"{ours.get(first, 'head')}.{rest}"), wanted), name
    assert not made


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "module.", "both"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_are_read(tmp_path, wrap, suffix):
    state, path = joint(), tmp_path / f"x4{suffix}"
    written = state
    if wrap in ("module.", "both"):
        written = {f"module.{name}": tensor for name, tensor in state.items()}
    if suffix == ".safetensors":
        save_file(written, path)
    else:
        torch.save({"state_dict": written} if wrap in ("state_dict", "both") else written, path)
    expected = load_joint_upsample(state).state_dict()
    for name, tensor in load_joint_upsample(path).state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "x4.pth"
    torch.save({"state_dict": joint(), "hook": os.system}, path)
    assert "holds more than tensors (posix.system)" in refusal(load_joint_upsample, path)


def test_a_missing_file():
    assert refusal(load_joint_upsample, "none.pth") == (
        "no weights file 'none.pth'. The README of NVlabs/pacnet says where the published ones are."
    )


def test_a_state_dict_of_tensors_only():
    assert refusal(load_joint_upsample, {"state_dict": joint()}) == (
        "the state dict holds more than tensors. Give the tensors by name."
    )


def test_all_that_does_not_fit_is_listed():
    state = joint()
    del state["up_convts.1.bias"], state["branch_t.conv2.weight"]
    state["branch_f.conv2.weight"] = torch.rand(2, 22, 5, 5)
    state["branch_g.conv1.bias"] = torch.arange(12)
    state |= {"up_bns.0.weight": torch.rand(12), "epoch": torch.rand(())}
    assert refusal(load_joint_upsample, state) == (
        "the state dict does not fit the reference's joint upsampling network (4×, lite). missing: "
        "'branch_t.conv2.weight', 'up_convts.1.bias'; unknown: 'up_bns.0.weight', 'epoch'; of "
        "another shape: 'branch_f.conv2.weight' [2, 22, 5, 5] (expected [1, 22, 5, 5]); no "
        "floating-point numbers: 'branch_g.conv1.bias'. Give a file as it was published, or mend "
        "the options."
    )


@pytest.mark.parametrize("shape", [[], [0, 1, 5, 5], [32, 0, 5, 5], [10**9, 1, 5, 5]], ids=str)
def test_no_shape_breaks_the_reading(shape):
    state = joint() | {"branch_t.conv1.weight": torch.rand(()).expand(shape)}
    assert f"'branch_t.conv1.weight' {shape} (expected" in refusal(load_joint_upsample, state)


def test_too_many_stages_are_no_network():
    state = joint() | {f"up_convts.{i}.weight": torch.rand(1) for i in range(2, 99)}
    assert "(256×, full)" in refusal(load_joint_upsample, state)


def test_djif_is_refused_by_name():
    state = {"branch_t.0.weight": torch.rand(1), "branch_joint.0.weight": torch.rand(1)}
    assert refusal(load_joint_upsample, state) == (
        "the state dict holds a DJIF network, which has no pixel-adaptive layer and which pacswap "
        "does not build. Use a file with 'pac' or 'paclite' in its name."
    )


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = FOLDER / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no golden numbers {path}; set PACSWAP_GOLDEN to their folder")
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    config = json.loads(str(arrays.pop("config")))
    return config, {key: torch.from_numpy(array) for key, array in arrays.items()}


def twin(config: Mapping[str, Any], given: Mapping[str, Tensor]) -> Any:
    """Our layer of a file's options, with numbers of its own."""
    words = config["kernel_type"].split("_")
    smooth = config["smooth_kernel_type"].split("_")
    kinds = {"none": "none", "gaussian": "gaussian", "average": "box", "full": "learned"}
    options: dict[str, Any] = {
        "form": "inverse" if words[0] == "inv" else "gaussian",
        "asymmetric": "asym" in words,
        "smoothing": kinds[smooth[0]],
        "smoothing_size": int(smooth[1]) if len(smooth) > 1 else 3,
        "normalize": "sum" if config["normalize_kernel"] else "none",
        "bandwidth": 3.0,  # which loading mends, like the blend
        "blend": 0.3,
    }
    geometry = [config[name] for name in ("kernel_size", "stride", "padding")]
    if config["op"] == "pool":
        options |= {"channel_wise": config["channel_wise"], "channels": given["input"].shape[1]}
        return PacPool2d(*geometry, **options).double()
    options |= {"dilation": config["dilation"], "bias": "bias" in given}
    if config["op"] == "conv":
        C_in, C_out = given["input"].shape[1], given["output"].shape[1]
        options["shared_filters"] = config["shared_filters"]
        return PacConv2d(C_in, C_out, *geometry, **options).double()
    options["output_padding"] = config["output_padding"]
    return PacConvTranspose2d(*given["weight"].shape[:2], *geometry, **options).double()


LAYERS = ["convT_k3_s2_d1", "convT_k3_s2_d2", "convT_k5_s2", "convT_k5_s4_normalized"]
LAYERS += ["conv_3x3_p1", "conv_3x3_nopad_nobias", "conv_inv", "conv_inv_asym_smooth_average"]
LAYERS += ["conv_shared_filters", "conv_smooth_full", "conv_smooth_gaussian"]
LAYERS += ["pool_k3_s1", "pool_inv_asym_smooth_normalized"]
NUMBERS = ("weight", "bias", "inv_alpha", "inv_lambda", "smooth_kernel")


def close(layer: Any, given: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        output = layer(given["input"], given["guide"])
    assert_close64(output, given["output"], relative=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_the_reference_does(name):
    config, given = golden(name)
    layer = twin(config, given)
    state = {f"net.{key}": given[key] for key in NUMBERS if key in given}
    load_layer(layer, state | {"other.weight": torch.rand(1)}, prefix="net.")
    close(layer, given)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv")])
def test_a_weight_that_is_not_turned_is_seen(name):
    config, given = golden(name)
    layer = twin(config, given)
    state = {key: given[key] for key in NUMBERS if key in given}
    load_layer(layer, {**state, "weight": state["weight"].flip(2, 3)})
    with pytest.raises(AssertionError, match=DIFFERS):
        close(layer, given)


CRFS = ["crf_4d", "crf_2d_yxrgb", "crf_potts", "crf_loose", "crf_two_kernels_blur"]


def reference_crf(config: Mapping[str, Any], channels: int) -> dict[str, Tensor]:
    """The state dict of a file's CRF: the initial weights that the paper gives."""
    state: dict[str, Tensor] = {}
    own = 0 if config["shared_steps"] else config["num_steps"]
    for begin in [f"steps.{step}." for step in range(own)] or [""]:
        state[f"{begin}unary_weight"] = torch.tensor(config["unary_weight"])
        for i, kernel in enumerate(config["pairwise_kernels"]):
            k, kind = kernel["kernel_size"], kernel["compat_type"]
            along = torch.arange(k, dtype=torch.float32) - k // 2
            # In float32, as it is made there.
            gauss = torch.exp(-0.5 * along.square() / (k / 4) ** 2)
            filter = gauss[:, None] * gauss / gauss.sum() ** 2 * k * k
            filter = filter if kernel["spatial_filter"] else torch.ones(k, k)
            filter[k // 2, k // 2] = 0
            unlike = 1 - torch.eye(channels)[:, :, None, None]
            filter = unlike * filter if kind == "4d" else filter[None, None]
            state[f"{begin}messengers.{i}.weight"] = filter
            if kind == "2d":
                state[f"{begin}compat.{i}.weight"] = unlike
            sign = -1 if kind == "potts" else 1
            state[f"{begin}pairwise_weights.{i}"] = torch.tensor(sign * kernel["pairwise_weight"])
    return state


def twin_crf(config: Mapping[str, Any], channels: int, **changes: Any) -> PacCRF:
    kernels = []
    for kernel in config["pairwise_kernels"]:
        options = {name: kernel[name] for name in ("kernel_size", "dilation", "blur")}
        options |= {"compatibility": kernel["compat_type"], "color": 3.0, "weight": 0.1}
        kernels.append(PairwiseKernel(**options, spatial_filter=kernel["spatial_filter"]))
    changes |= {"steps": config["num_steps"], "shared_steps": config["shared_steps"]}
    return PacCRF(channels, kernels, output=config["final_output"].lower(), **changes)


def close_crf(crf: PacCRF, given: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        output = crf.double()(given["unary"], given["edge_feature"])
    # The weights are float32 there too, and here their product with the strength.
    assert_close64(output, given["output"], relative=1e-6)


@pytest.mark.parametrize("name", CRFS)
def test_a_crf_computes_what_the_reference_does(name):
    config, given = golden(name)
    crf = twin_crf(config, given["unary"].shape[1], blend=0.3)
    load_layer(crf, reference_crf(config, crf.channels))
    close_crf(crf, given)


@pytest.mark.parametrize("name", CRFS)
@pytest.mark.parametrize("part", ["unary_weight", "pairwise_weights"])
def test_each_part_of_a_crf_counts(name, part):
    config, given = golden(name)
    crf = twin_crf(config, given["unary"].shape[1])
    state = reference_crf(config, crf.channels)
    load_layer(crf, {key: t * 1.01 if part in key else t for key, t in state.items()})
    with pytest.raises(AssertionError, match=DIFFERS):
        close_crf(crf, given)


CONV = {"weight": torch.ones(4, 2, 3, 3), "bias": torch.zeros(4)}
WRONG = {
    "shapes and names": (
        lambda: PacConv2d(2, 5, 3),
        {"weight": CONV["weight"], "smooth_kernel": torch.ones(1, 1, 3, 3)},
        "the state dict does not fit the reference's twin of this PacConv2d. missing: 'bias'; "
        "unknown: 'smooth_kernel'; of another shape: 'weight' [4, 2, 3, 3] (expected [5, 2, 3, 3])"
        ". Give a file as it was published, or mend the options.",
    ),
    "options": (
        lambda: PacConv2d(2, 4, 3, form="laplacian", distance="mean"),
        CONV,
        "the state dict does not fit the reference's twin of this PacConv2d. form must be "
        "'gaussian' or 'inverse', got 'laplacian'; distance must be 'sum' and standardize False. "
        "Give a file as it was published, or mend the options.",
    ),
    "a kernel of another layer": (
        lambda: PacConv2d.from_conv(torch.nn.Conv2d(2, 4, 3), own_kernel=False),
        CONV,
        "the state dict does not fit the reference's twin of this PacConv2d. adapting_kernel is "
        "None, and the reference has one. Give a file as it was published, or mend the options.",
    ),
    "another fixed filter": (
        lambda: PacPool2d(3, smoothing="gaussian"),
        {"smooth_kernel": torch.full((1, 1, 3, 3), 1 / 9)},
        "the state dict does not fit the reference's twin of this PacPool2d. 'smooth_kernel' has "
        "other values than this layer's, which are fixed. Give a file as it was published, or "
        "mend the options.",
    ),
    "a crf": (
        lambda: PacCRF(
            2, [PairwiseKernel(3, color=None), PairwiseKernel(3, position=2.0)], normalize="sum"
        ),
        {"unary_weight": torch.ones(())},
        "the state dict does not fit the reference's twin of this PacCRF. missing: "
        "'messengers.0.weight', 'pairwise_weights.0', 'messengers.1.weight', "
        "'pairwise_weights.1'; kernels.0.adapting_kernel is None, and the reference has one; "
        "kernels.1.position must be None: give the positions in the guidance; "
        "kernels.1.normalize must be 'none', got 'sum'. Give a file as it was published, or mend "
        "the options.",
    ),
}


@pytest.mark.parametrize(("make", "state", "message"), WRONG.values(), ids=list(WRONG))
def test_a_layer_that_does_not_fit_stays_as_it_is(make, state, message):
    layer = make()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert refusal(load_layer, layer, state) == message
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_segmentation_network():
    state = fcn8s()
    assert load_fcn8s(state) == (state, {}, [])


def test_a_segmentation_network_with_a_crf(tmp_path):
    torch.save(fcn8s(crf=True), tmp_path / "fcn8s_paccrf.pth")
    made = load_fcn8s(tmp_path / "fcn8s_paccrf.pth")
    assert sorted(made.network) == sorted(fcn8s())
    assert [list(scale.shape) for scale in made.scales] == [[3], [3]]
    crf = PacCRF(21, [PairwiseKernel(5, d, compatibility="4d") for d in (64, 16)])
    load_layer(crf, made.crf)
    product = made.crf["messengers.1.weight"] * made.crf["pairwise_weights.1"]
    assert torch.equal(crf.kernels[1].weight, product)


def test_the_constant_of_the_guidance_is_a_bandwidth():
    features, image = torch.rand(1, 3, 6, 6).double() * 2e4, torch.rand(1, 2, 6, 6).double()
    layer = PacConv2d(2, 4, 3, padding=1, bandwidth=1e4).double()
    scaled = PacConv2d(2, 4, 3, padding=1).double()
    scaled.load_state_dict(layer.state_dict() | {"adapting_kernel.log_bandwidth": torch.zeros(())})
    with torch.no_grad():
        # log 10⁴ was rounded to float32
        assert_close64(scaled(image, features * 1e-4), layer(image, features), relative=1e-5)
        with pytest.raises(AssertionError, match=DIFFERS):
            assert_close64(scaled(image, features), layer(image, features), relative=1e-5)


def test_a_segmentation_network_that_does_not_fit():
    state = fcn8s(crf=True)
    del state["backbone.conv3_3.bias"], state["feat_scales.1"]
    state |= {"backbone.conv6.weight": torch.rand(1), "crf.compat.weight": torch.rand(1)}
    state["feat_scales.0"] = torch.rand(5)
    assert refusal(load_fcn8s, state) == (
        "the state dict does not fit an FCN-8s of the reference. missing: 'backbone.conv3_3.bias', "
        "'feat_scales.1'; unknown: 'backbone.conv6.weight', 'crf.compat.weight'; of another "
        "shape: 'feat_scales.0' [5] (expected [3]). Give a file as it was published, or mend the "
        "options."
    )
