"""What layers share is computed once, and training computes nothing that it does not need."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from counts import IMAGES, STEM, WAY, Operations, assert_computed, counted, four
from torch import nn

import pacswap

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
KERNELS = ({"blend": 0.7, "bandwidth": 1.0}, {"blend": 0.7, "bandwidth": 2.0})
SECOND = {"layers": ["b", "d"], "kernel": KERNELS[1]}


@WAY
@MODES
def test_all_is_computed_once_for_layers_that_share_it(way: str, training: bool) -> None:
    model = four(way).train(training)
    assert_computed(model, kernels=2, projections=1, resizings=2)
    assert_computed(model, kernels=2, projections=1, resizings=2)
    with torch.no_grad():
        assert_computed(model, kernels=2, projections=1, resizings=2)


@WAY
@MODES
def test_groups_with_projections_and_options_of_their_own_share_nothing(
    way: str, training: bool
) -> None:
    first = {"layers": ["a", "c"], "guidance": STEM}
    model = four(way, first, {**SECOND, "guidance": STEM}).train(training)
    with pytest.raises(AssertionError, match=r"kernels, projections, resizings: \(4, 2, 4\)"):
        assert_computed(model, kernels=2, projections=1, resizings=2)


@WAY
@MODES
def test_groups_whose_guidance_nothing_projects_share_its_resizing(
    way: str, training: bool
) -> None:
    first = {"layers": ["a", "c"], "guidance": "stem"}
    model = four(way, first, {**SECOND, "guidance": "stem"}).train(training)
    assert_computed(model, kernels=4, projections=0, resizings=2)
    nearest = {**SECOND, "guidance": {"from": "stem", "resize": "nearest"}}
    assert_computed(four(way, first, nearest).train(training), 4, 0, 4)


@WAY
@MODES
def test_two_geometries_have_two_kernels_of_one_resized_guidance(way: str, training: bool) -> None:
    model = four(way, second=5).train(training)
    assert_computed(model, kernels=4, projections=1, resizings=2)


@WAY
def test_shared_and_not_shared_compute_the_same(way: str) -> None:
    """The groups that share a resizing give what each gives alone, options apart."""
    one = {"layers": ["a", "b", "c", "d"], "guidance": "stem"}
    first = {"layers": ["a", "c"], "guidance": "stem"}
    same = {"layers": ["b", "d"], "guidance": "stem"}
    expected = four(way, one)(IMAGES)
    assert torch.equal(four(way, first, same)(IMAGES), expected)
    other = four(way, first, {**same, "kernel": KERNELS[1]})(IMAGES)
    assert (other - expected).abs().max() > 1e-4


def operations_of(model: nn.Module) -> Counter[str]:
    """The operations of a forward pass; views and what autograd asks of them cost nothing."""
    with Operations() as operations:
        model(IMAGES)
    free = ("view", "detach", "alias", "t", "permute", "slice", "select", "expand", "unsqueeze")
    names = operations.names
    return Counter({n: c for n, c in names.items() if n.removeprefix("aten::") not in free})


@WAY
@pytest.mark.parametrize("normalize", ["none", "mean"])
def test_a_training_forward_pass_computes_what_inference_does(way: str, normalize: str) -> None:
    model = four(way, normalize=normalize)
    trained = operations_of(model.train())
    model.eval()
    with torch.no_grad():
        assert trained == operations_of(model)
    # It sees what is computed twice.
    model.b.register_forward_hook(lambda layer, args, y: y + torch.lerp(y, y, 0.5))
    assert trained != operations_of(model)


@WAY
def test_at_blend_0_only_training_blends_a_kernel(way: str) -> None:
    model = four(way, blend=0.0)
    assert operations_of(model.train())["aten::lerp"] == 4
    with torch.no_grad():
        assert operations_of(model.eval())["aten::lerp"] == 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert operations_of(model.train())["aten::lerp"] == 0


def test_a_blend_keeps_the_kernel_and_nothing_as_large_beside_it() -> None:
    layer = pacswap.nn.PacConv2d(4, 4, 3, padding=1, blend=0.7, form="external")
    kernel = torch.rand(2, 1, 9, 32, 32, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer._blended(kernel, torch.float32)
    assert {t.data_ptr() for t in kept if t.numel() > 1} == {kernel.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pacswap.ops.blended(kernel, torch.tensor(0.7, requires_grad=True))
    assert {t.data_ptr() for t in kept if t.numel() > 1} != {kernel.data_ptr()}


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_blend_is_the_equation(blend: float, dtype: torch.dtype) -> None:
    layer = pacswap.nn.PacConv2d(4, 4, 3, padding=1, blend=blend, form="external", dtype=dtype)
    kernel = torch.rand(2, 1, 9, 8, 8).to(dtype)
    made = layer._blended(kernel, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 4 * torch.finfo(dtype).eps
    expected = 1 + layer.blend.to(wide) * (kernel.to(wide) - 1)
    torch.testing.assert_close(made.to(wide), expected, rtol=bound, atol=bound)
    if blend in (0.0, 1.0):
        assert torch.equal(made, torch.ones_like(kernel) if blend == 0 else kernel)


def test_the_counter_counts() -> None:
    model = four()
    with counted(model) as found:
        pass
    assert sum(found.values()) == 0
