"""The operations together, their kernels, their copies, and the figures of their plans."""

# ruff: noqa: E501 (a plan is as wide as it is)

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import operations as o
import pytest
import torch
import torch.nn.functional as F
from numerics import DIFFERS, assert_close64
from operations import CASES, Case, Everything, adaptive, group, learned, pair
from same import Untouched, assert_bits, assert_differ, assert_same, run
from torch import Tensor, nn

import pacswap
from pacswap.cli import main
from pacswap.nn import AdaptingKernel

EVERYTHING = CASES["everything"]
RECIPE = """\
version: 1
model: {library: pacswap, name: scene_net, weights: null, input_size: [3, 48, 48]}
upsample:
  - {layers: interpolate, guidance: input}
append:
  - {layers: head.classifier, guidance: layer1}
"""
PLAN = """\
Everything, input 3×16×20: 1 convolution, 1 pooling layer and 2 upsampling steps become pixel-adaptive, 1 CRF is appended

  operation  layer        what it is                           output  guided by
  ─────────  ───────────  ───────────────────────────────────  ──────  ───────────
  pool       pool         AvgPool2d 3×3 s2                     8×10    stem
  swap       body         Conv2d 4→4 3×3                       8×10    stem
  upsample   up           ConvTranspose2d 4→4 4×4 s2           8×10    input
  upsample   interpolate  interpolate bilinear ×2, 5 channels  16×20   input, stem
  append     interpolate  interpolate, 5 channels              16×20   interpolate

  guidance 1  stem, 4 channels at 16×20
  kernel      gaussian, normalised by the sum, blend 0 (as it was), bandwidth auto; one for all
  guidance 2  stem, 4 channels at 16×20
  kernel      gaussian, blend 0 (the plain convolution), bandwidth auto; one for all
  guidance 3  input, 3 channels at 16×20, with the position of each pixel → 3 (1×1 projection)
  kernel      gaussian, normalised by the mean, blend 0 (as it was), bandwidth auto; one for all
  guidance 4  input, 3 channels at 16×20 and stem, 4 channels at 16×20 → 4 (1×1 projection)
  kernel      gaussian, normalised by the sum, blend 0 (as it was), bandwidth auto; one for all
  filter      3×3 dilation 2, a C×C matrix at every tap, 2 steps
  guidance 5  interpolate, 5 channels at 16×20
  kernel      gaussian, blend 0 (as it was), bandwidth auto; one for all
  CRF         2 mean-field steps
              3×3, 2d, position within 4 px
              3×3, potts, smoothness only
  rewired     forward (Everything), the rest keeps its code
  parameters  701 + 540 (77 %)
  MACs        52.8 k + 327 k (619 %)
  memory      + 139 kB of activations for one image"""
COPIED = ("everything", "headed", "append", "transposed_3x3_s2_p1_op1", "pool_average_ceil")
copied = pytest.mark.parametrize("name", COPIED)
# What each operation changes in `Everything`, with how many channels.
PLACES = {"pool": ("pool", 4), "upsample": ("interpolate", 5), "append": ("classify", 5)}
operations = pytest.mark.parametrize("operation", [*PLACES, "transposed"])


def asked(operation: str, kernel: dict[str, Any], **guidance: Any) -> dict[str, Any]:
    """A group of one operation on `Everything`."""
    if operation == "transposed":
        return group("upsample", "up", {"from": "stem", **guidance}, kernel=kernel)
    layers, channels = PLACES[operation]
    guidance = {"channels": channels, **guidance} if kernel.get("channel_wise") else guidance
    return group(operation, layers, {"from": "stem", **guidance}, kernel=kernel)


def swapped(*groups: dict[str, Any], size: tuple[int, int] = (16, 20)) -> Any:
    """(the original in eval mode, the upgraded one, images)."""
    case = Case(Everything, groups, size)
    model = case.build().eval()
    return model, case.swap(model), case.images()


# ---- copies, precisions, compilers


@copied
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    model, args = learned(pair(name)[1]), (CASES[name].images(),)
    expected = run(model, args)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(expected, run(twin, args)[0], tolerance=0)
        assert_bits(dict(model.state_dict()), dict(twin.state_dict()))
    assert_differ(expected, run(learned(model, 0.75), args)[0])


@copied
def test_half_precisions_stay_what_they_were(name: str) -> None:
    original, upgraded = pair(name)
    for dtype in (torch.float16, torch.bfloat16):
        before, after = (copy.deepcopy(m).eval().to(dtype) for m in (original, upgraded))
        args = (CASES[name].images(dtype=dtype),)
        assert_same(run(before, args)[0], run(after, args)[0], tolerance=0)
        assert_differ(run(before, args)[0], run(learned(after), args)[0])


@copied
def test_double_precision_and_inference_mode(name: str) -> None:
    original, upgraded = pair(name, torch.float64)
    images = CASES[name].images(dtype=torch.float64)
    assert_same(run(original, (images,))[0], run(upgraded, (images,))[0], tolerance=0)
    model = learned(upgraded).eval()
    with torch.inference_mode():
        inside = model(images)
    assert_close64(inside.clone(), model(images).detach())


@copied
def test_channels_last_input(name: str) -> None:
    original, upgraded = (copy.deepcopy(model).double().eval() for model in pair(name))
    images = CASES[name].images(dtype=torch.float64)
    last = images.to(memory_format=torch.channels_last)
    assert_same(run(original, (last,))[0], run(upgraded, (last,))[0], tolerance=0)
    model = learned(upgraded)
    assert_close64(model(last).detach(), model(images).detach())


def test_channels_last_parameters() -> None:
    learned(pair("everything")[1]).to(memory_format=torch.channels_last)


def test_they_compile_as_one_graph() -> None:
    images = EVERYTHING.images()
    model = learned(pair("everything")[1]).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(model(images), compiled(images), tolerance=1e-4)
    assert_differ(model(images), learned(model, 0.75)(images))


def test_they_are_exported_at_any_size() -> None:
    groups = (group("pool", "pool", "stem"), group("upsample", "interpolate", "stem"))
    _, upgraded, images = swapped(*groups)
    model = learned(upgraded).eval()
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(
        model, (images,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    ).module()
    other = torch.rand(3, 3, 19, 23)
    assert_same(model(other), exported(other), tolerance=1e-4)


def test_a_saved_model_is_rebuilt(tmp_path: Path) -> None:
    groups = (
        group("append", "head.classifier", "head.classifier", crf=o.CRF),
        group("upsample", "interpolate", {"from": ["input", "stem"], "channels": 4}, filter=o.FULL),
    )
    network = pacswap.zoo.build(pacswap.zoo.Source("pacswap", "scene_net")).eval()
    images = torch.rand(2, 3, 48, 48)
    model = pacswap.swap(network, groups=groups, example_input=images, calibration=images)
    model = learned(model)
    rebuilt = pacswap.load(pacswap.save(model, tmp_path / "model"))
    assert_bits(dict(model.state_dict()), dict(rebuilt.state_dict()))
    assert_same(run(model, (images,))[0], run(rebuilt, (images,))[0], tolerance=0)
    assert_differ(run(network, (images,))[0], run(rebuilt, (images,))[0])


# ---- several operations on one network


def calls_of(model: nn.Module, images: Tensor, kind: type[nn.Module]) -> list[str]:
    """The modules of a kind, in the order in which they run."""
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    model(images)
    return seen


def test_the_filter_comes_before_the_crf() -> None:
    for groups in (EVERYTHING.groups, EVERYTHING.groups[::-1]):
        _, upgraded, images = swapped(*groups)
        ran = calls_of(learned(upgraded), images, pacswap.nn.Adaptive)  # type: ignore[type-abstract]
        assert ran == ["pool", "body", "pool", "up", "guided_interpolate", "crf_interpolate"]


def test_it_does_where_the_two_name_the_node_differently() -> None:
    groups = (group("append", "up", "stem", crf=o.CRF), group("upsample", "up.1", "stem"))
    case = Case(o.Headed, groups)
    ran = calls_of(learned(case.swap(case.build())), case.images(), pacswap.nn.Adaptive)  # type: ignore[type-abstract]
    assert ran == ["guided_up_1", "crf_up"]


def test_a_hook_on_a_pooling_runs_once_for_each_call() -> None:
    for model in (pair("pool_max")[1], pacswap.revert(pair("pool_max")[1])):
        twin = copy.deepcopy(model)
        seen: list[nn.Module] = []
        twin.pool.register_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        twin(CASES["pool_max"].images())
        assert seen == [twin.pool]


def test_two_steps_share_one_kernel() -> None:
    _, upgraded = pair("two_steps")
    images = CASES["two_steps"].images()
    assert len(calls_of(learned(upgraded), images, AdaptingKernel)) == 1
    assert len(calls_of(learned(upgraded), images, pacswap.nn.PacFilter2d)) == 2
    case = Case(o.TwoSteps, (group("upsample", "interpolate"), group("upsample", "interpolate_1")))
    apart = learned(case.swap(case.build()))
    assert len(calls_of(apart, images, AdaptingKernel)) == 2


def test_several_sources_are_projected_as_their_concatenation() -> None:
    groups = (group("upsample", "interpolate", {"from": ["input", "head"], "channels": 4}),)
    case = Case(o.Resized, groups)
    model = case.swap(case.build(torch.float64))
    guidance = adaptive(model)["guided_interpolate"].guidance
    image, small = torch.rand(2, 3, 16, 20).double(), torch.rand(2, 4, 8, 10).double()
    large = F.interpolate(small, size=(16, 20), mode="bilinear", align_corners=False)
    joined = guidance.project(torch.cat([image, large], 1)).detach()
    assert_close64(guidance(image, small).detach(), joined)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(guidance(image, small.flip(-1)).detach(), joined)


@operations
def test_detach_stops_the_gradient_of_the_guidance_alone(operation: str) -> None:
    grads = {}
    for detach in (False, True):
        _, upgraded, images = swapped(asked(operation, {}, detach=detach, channels=4))
        owner = next(iter(adaptive(upgraded).values()))
        with torch.no_grad():
            owner.blend.fill_(0.5)
        owner.guidance.register_full_backward_hook(
            lambda module, given, made, detach=detach: grads.update({detach: given[0]})
        )
        upgraded(images).square().sum().backward()
        assert owner.guidance.project.weight.grad.abs().max() > 0
    assert grads[False].abs().max() > 0
    assert grads.get(True) is None


# ---- kernels


@operations
@pytest.mark.parametrize("form", ["gaussian", "laplacian"])
def test_the_median_kernel_is_one_half(operation: str, form: str) -> None:
    """… with the distance written out here, at blends of 0."""
    # Called once: a kernel for two resolutions has one bandwidth.
    make = (lambda: o.Pooled(nn.MaxPool2d(3, 2, 1))) if operation == "pool" else Everything
    case = Case(make, (asked(operation, {"form": form}),), (48, 56))
    upgraded = case.swap(case.build().eval())
    medians: list[float] = []
    for module in upgraded.modules():
        if isinstance(module, AdaptingKernel):
            module.register_forward_hook(lambda k, a, _: medians.append(median(k, a[0])))
    upgraded(case.images())
    assert medians == [pytest.approx(0.5, abs=0.01)]
    (layer,) = adaptive(upgraded).values()
    assert layer.blend == 0
    for kernel in (m for m in upgraded.modules() if isinstance(m, AdaptingKernel)):
        assert kernel.log_bandwidth != 0  # where an uncalibrated one starts


def test_other_groups_leave_a_calibration_alone() -> None:
    """… of a layer that is called twice."""
    pool, more = group("pool", "pool", "stem"), group("upsample", "interpolate")
    alone, beside = swapped(pool)[1], swapped(pool, more)[1]
    widths = [m.pool.adapting_kernel.log_bandwidth for m in (alone, beside)]
    assert widths[0] == widths[1]
    other = swapped(group("pool", "pool", "input"))[1]
    assert other.pool.adapting_kernel.log_bandwidth != widths[0]


def median(kernel: AdaptingKernel, guidance: Tensor) -> float:
    """Of K off the centre, before it is normalised."""
    features = (guidance - guidance.mean((2, 3), keepdim=True)).double()
    features = features / features.square().mean((2, 3), keepdim=True).sqrt()
    w = kernel.window
    B, D = features.shape[:2]
    taps = F.unfold(features, w.kernel_size, dilation=w.dilation, stride=w.stride)
    taps = taps.view(B, D, w.taps, -1)
    difference = taps - taps[:, :, w.centre, None]
    width = kernel.log_bandwidth.double().exp()
    if kernel.form == "laplacian":
        values = torch.exp(-difference.abs().mean(1) / width)
    else:
        values = torch.exp(-0.5 * difference.square().mean(1) / width**2)
    off = [tap for tap in range(w.taps) if tap != w.centre]
    return values[:, off].median().item()


KERNELS: dict[str, dict[str, Any]] = {
    "laplacian": {"form": "laplacian"},
    "inverse": {"form": "inverse", "alpha": 0.1, "lambd": -2.0},
    "asymmetric": {"form": "inverse", "asymmetric": True, "smoothing": "gaussian"},
    "box": {"smoothing": "box", "smoothing_size": 5},
    "learned": {"smoothing": "learned"},
    "channel_wise": {"channel_wise": True},
    "channel_wise_inverse": {"channel_wise": True, "form": "inverse"},
    "fixed": {"learnable": False},
    "fixed_inverse": {"learnable": False, "form": "inverse"},
    "none": {"normalize": "none"},
    "sum": {"normalize": "sum"},
    "mean": {"normalize": "mean"},
}


@operations
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_keeps_the_promises(operation: str, kernel: str) -> None:
    wanted = asked(operation, KERNELS[kernel])
    original, upgraded, images = swapped(wanted)
    report = pacswap.verify(original, upgraded, images)
    assert report.passed, str(report)
    assert_same(run(original, (images,))[0], run(upgraded, (images,))[0], tolerance=0)
    plan = pacswap.plan(original, groups=[wanted], example_input=images)
    gained = sorted(upgraded.state_dict().keys() - original.state_dict().keys())
    assert gained == plan.added_parameters()
    names = {name.rpartition(".")[2] for name, _ in upgraded.named_parameters()}
    assert ("log_bandwidth" in names) is not kernel.startswith("fixed")
    assert any(key.endswith("log_bandwidth") for key in gained)


@pytest.mark.parametrize("operation", PLACES)
def test_a_constant_kernel_is_one_and_is_not_projected(operation: str) -> None:
    wanted = asked(operation, {"form": "constant", "normalize": "none"}, channels=3)
    original, upgraded, images = swapped(wanted)
    report = pacswap.verify(original, upgraded, images)
    assert report.passed, str(report)
    assert not any("project" in key for key in upgraded.state_dict())
    made: list[Tensor] = []
    model = learned(upgraded)
    for module in model.modules():
        if isinstance(module, AdaptingKernel):
            module.register_forward_hook(lambda *a: made.append(a[2]))
    shown = model(images)
    assert made
    assert all(bool((kernel == 1).all()) for kernel in made)
    assert_differ(original(images), shown)


# ---- the plan's figures


def test_a_plan_is_pure() -> None:
    model = EVERYTHING.build()
    before = Untouched(model)
    first, second = EVERYTHING.plan(model), EVERYTHING.plan(model)
    before.check()
    assert first.record() == second.record()
    assert str(first) == str(second)
    other = Case(Everything, EVERYTHING.groups[1:]).plan(model)
    assert other.record() != first.record()


def test_a_mixed_plan_in_words() -> None:
    assert str(EVERYTHING.plan(EVERYTHING.build())) == PLAN


def test_a_plan_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    main(["plan", str(tmp_path / "r.yaml"), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert set(data) >= {"model", "input_shape", "layers", "rewired", "added_parameters", "cost"}
    assert [(layer["operation"], layer["name"], layer["what"]) for layer in data["layers"]] == [
        ("append", "head.classifier", "Conv2d, 6 channels"),
        ("upsample", "interpolate", "interpolate bilinear ×4, 6 channels"),
    ]
    assert [layer["kernel"]["normalize"] for layer in data["layers"]] == ["none", "sum"]
    assert data["cost"]["added_parameters"] == 2 * 25 + 1 + 2 * 2


def test_macs_of_a_guided_interpolation_by_hand() -> None:
    case = Case(o.Resized, (group("upsample", "interpolate", filter={"steps": 3}),))
    pixels, taps, channels = 16 * 20, 25, 4
    distance = taps * 3 * pixels
    weigh_and_filter = 3 * taps * (channels + channels) * pixels
    assert case.plan(case.build()).cost.added_macs == distance + weigh_and_filter
    full = Case(o.Resized, (group("upsample", "interpolate", filter=o.FULL),))
    step = 9 * (channels + channels**2) * pixels
    assert full.plan(full.build()).cost.added_macs == 9 * 3 * pixels + 2 * step
