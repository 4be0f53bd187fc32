"""PacCRF as a layer: what it computes once, dtypes, compilers, checkpoints, refusals."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from numerics import HALVES, assert_close64, assert_equal, error, fresh_memory_is_nan, scale
from test_crf import C, densecrf, kernel_of, shaken, tensors
from torch import nn

from pacswap.errors import GuidanceError, ShapeError
from pacswap.nn import AdaptingKernel, PacCRF, PairwiseKernel
from pacswap.nn.pairwise import PairwiseTerm

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)


@pytest.mark.parametrize("output", ["log_q", "softmax", "log_softmax"])
def test_disabled_is_the_unary(output):
    crf = PacCRF(C, kernel_of(), output=output)
    unary, _ = tensors(torch.float32)
    crf.enabled = False
    kinds = {"log_q": lambda x, dim: x, "softmax": F.softmax, "log_softmax": F.log_softmax}
    assert_equal(crf(unary), kinds[output](unary, dim=1))


def test_adapting_kernels_are_computed_once():
    crf = PacCRF(C, [kernel_of("4d"), kernel_of("2d", blur=2)], steps=4, shared_steps=False)
    calls = []
    for module in crf.modules():
        if isinstance(module, AdaptingKernel):
            module.register_forward_hook(lambda *args: calls.append(args[0]))
    crf(*tensors(torch.float32))
    assert len(calls) == 2


@torch.no_grad()
def test_a_guidance_for_each_kernel():
    kernels = [kernel_of(), kernel_of("potts", "position"), kernel_of("2d", blur=2)]
    crf = PacCRF(C, kernels, steps=2, dtype=torch.float64)
    unary, guidance = tensors()
    one = crf(unary, guidance)
    assert_equal(crf(unary, [guidance, None, guidance.clone()]), one)
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(crf(unary, [guidance, None, 2 * guidance]), one)


def test_smoothness_needs_no_guidance():
    crf = PacCRF(C, kernel_of("potts", "position"))
    unary, guidance = tensors(torch.float32)
    assert_equal(crf(unary).detach(), crf(unary, guidance).detach())
    assert crf.kernels[0].adapting_kernel is None


@torch.no_grad()
def test_a_term_learned_or_not_sums_the_same():
    """Two one-dimensional filters and a two-dimensional one: the same smoothness."""
    fixed = PacCRF(C, kernel_of("potts_unfiltered", "position", dilation=2), dtype=torch.float64)
    free = PacCRF(C, kernel_of("potts", "position", dilation=2), dtype=torch.float64)
    free.kernels[0].weight.fill_(1.0)[..., 3, 3] = 0
    unary, _ = tensors(size=(9, 8))
    assert_close64(fixed(unary), free(unary))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("blur", [1, 2])
@torch.no_grad()
def test_half_precision(dtype, blur):
    kernels = [kernel_of("2d", blur=blur), kernel_of("potts_unfiltered", "position")]
    crf = PacCRF(C, kernels, steps=3, normalize="sum", dtype=torch.float64)
    unary, guidance = (t.to(dtype) for t in tensors(size=(9, 11)))
    truth = crf(unary.double(), guidance.double())
    value = crf.to(dtype)(unary, guidance)
    assert value.dtype == dtype
    # Beliefs and messages are rounded in each step; log Q is not.
    assert error(value, truth) <= 8 * torch.finfo(dtype).eps * scale(truth)
    assert error(value.roll(1, -1), truth) > 8 * torch.finfo(dtype).eps * scale(truth)


def test_autocast():
    crf = PacCRF(C, [kernel_of("2d", blur=2), kernel_of("potts", "position")], steps=2)
    unary, guidance = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = crf(unary, guidance)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert error(value, crf(unary, guidance)) < 0.1


EVERY = [kernel_of("4d"), kernel_of("2d", blur=2), kernel_of("potts_unfiltered", "position")]


# A compiler sees every tap of every step: few are enough.
SMALL = [replace(kernel, kernel_size=3) for kernel in EVERY[1:]]


def test_compile():
    crf = PacCRF(C, SMALL, steps=1, normalize="sum")
    given = tensors(torch.float32, size=(9, 10))
    compiled = torch.compile(crf, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), crf(*given))


def test_export_with_dynamic_sizes():
    crf = PacCRF(C, SMALL, steps=1, normalize="sum", blend=0.0).eval()
    sides = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(
        crf, tensors(torch.float32, size=(9, 10)), dynamic_shapes=(sides, sides)
    )
    with torch.no_grad():
        program.state_dict["blend"].fill_(1.0)
        crf.blend.fill_(1.0)
    other = tensors(torch.float32, size=(12, 7))
    torch.testing.assert_close(program.module()(*other), crf(*other))


def test_state_dict():
    crf = PacCRF(C, EVERY, shared_steps=False, steps=4)
    shapes = {name: list(tensor.shape) for name, tensor in crf.state_dict().items()}
    assert shapes == {
        "blend": [],
        "unary_weight": [4],
        "kernels.0.weight": [4 * C, C, 7, 7],
        "kernels.0.adapting_kernel.log_bandwidth": [],
        "kernels.1.weight": [4, 1, 7, 7],
        "kernels.1.compatibility": [4 * C, C, 1, 1],
        "kernels.1.adapting_kernel.log_bandwidth": [],
        "kernels.2.strength": [4],
        "kernels.2.log_position": [],
    }


def test_scales_that_do_not_learn_are_kept():
    crf = PacCRF(C, kernel_of("potts", "color_position"), learnable=False)
    names = [name for name, _ in crf.named_parameters()]
    assert names == ["unary_weight", "blend", "kernels.0.weight"]
    kept = {"kernels.0.log_position", "kernels.0.adapting_kernel.log_bandwidth"}
    assert kept <= crf.state_dict().keys()


def test_copies_compute_the_same():
    crf = shaken(PacCRF(C, EVERY, steps=2))
    given = tensors(torch.float32)
    for twin in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert_equal(twin(*given).detach(), crf(*given).detach())


def test_macs_count_what_runs():
    crf = PacCRF(C, [kernel_of("4d"), kernel_of("2d"), kernel_of("potts", "nothing")], steps=2)
    each = [49 * (C + C * C), 49 * 2 * C + C * C, 49 * C]
    assert crf.macs(10) == 2 * 10 * sum(each)


def refuse(error: type[Exception], message: str, call, *args, **options) -> None:
    with pytest.raises(error) as raised:
        call(*args, **options)
    assert str(raised.value) == message


KERNEL_REFUSALS = {
    "kernel_size must be an int of at least 3, got 1.": {"kernel_size": 1},
    "kernel_size must be odd, got 4: no tap is the centre.": {"kernel_size": 4},
    "dilation must be an int of at least 1, got 0.": {"dilation": 0},
    "blur must be an int of at least 1, got 2.0.": {"blur": 2.0},
    "compatibility='pots' is unknown. Nearest: 'potts'.": {"compatibility": "pots"},
    "compatibility='4d' has a matrix at every tap, which is its spatial filter: leave "
    "spatial_filter at True, or use '2d'.": {"compatibility": "4d", "spatial_filter": False},
    "weight must be finite, got nan.": {"weight": math.nan},
    "color must be positive and finite, or None, got 0.": {"color": 0},
    "position must be positive and finite, or None, got -1.": {"position": -1},
}


@pytest.mark.parametrize("message", KERNEL_REFUSALS)
def test_pairwise_kernel_refuses(message):
    refuse(ShapeError, message, PairwiseKernel, **KERNEL_REFUSALS[message])


REFUSALS = {
    "channels must be an int of at least 1, got 0.": {"channels": 0},
    "steps must be an int of at least 1, got 0.": {"steps": 0},
    "kernels must be one or more PairwiseKernel, got [].": {"kernels": []},
    "unary_weight must be finite, got inf.": {"unary_weight": math.inf},
    "output='Softmax' is unknown. Nearest: 'softmax', 'log_softmax'.": {"output": "Softmax"},
    "the bandwidth of a pairwise kernel is its color, got bandwidth=2.0. Give "
    "PairwiseKernel(color=…).": {"bandwidth": 2.0},
    "normalize='Sum' is unknown. Nearest: 'sum'.": {"normalize": "Sum"},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_crf_refuses(message):
    refuse(ShapeError, message, PacCRF, **{"channels": 3, **REFUSALS[message]})


def test_calls_without_guidance_are_refused():
    crf = PacCRF(C, [kernel_of(), kernel_of("potts", "position")])
    unary, guidance = tensors(torch.float32)
    missing = "PacCRF was called without a guidance. Call it as layer(input, guidance)."
    refuse(GuidanceError, missing, crf, unary)
    refuse(GuidanceError, missing, crf, unary, [None, guidance])
    crf.guided_by = "'head.crf'"
    message = (
        "'head.crf' was called on a path through the model that does not compute its guidance. "
        "Call the model itself, or use `with pacswap.disabled(model):` to run that path as it "
        "was before the swap."
    )
    refuse(GuidanceError, message, crf, unary)


def test_calls_that_disagree_are_refused():
    crf = PacCRF(C, [kernel_of(), kernel_of("potts", "position")])
    unary, guidance = tensors(torch.float32)
    message = f"unary must be [B, C, H, W] with C = {C}, got [2, 2, 3, 4]."
    refuse(ShapeError, message, crf, unary[:, :2], guidance)
    message = (
        "this PacCRF has 2 kernels, got 1 guidances. Give one for each, or one tensor for all."
    )
    refuse(ShapeError, message, crf, unary, [guidance])
    message = (
        "guidance must be [B, D, H, W] = [2, D, 3, 4], as large as the unary, got [2, 2, 3, 3]."
    )
    refuse(ShapeError, message, crf, unary, guidance[..., :3])
    crf.kernels[0].adapting_kernel.enabled = False
    message = (
        "the adapting kernel of this PacCRF is disabled and the layer is not. Disable both: "
        "`with pacswap.disabled(model):`."
    )
    refuse(GuidanceError, message, crf, unary, guidance)


def test_every_term_is_listed():
    crf = PacCRF(C, EVERY)
    assert all(isinstance(term, PairwiseTerm) for term in crf.kernels)
    assert isinstance(crf.kernels, nn.ModuleList)
    assert len(crf.terms) == len(EVERY)


DENSE_REFUSALS = {
    "taps must be an odd int of at least 3, got 10.": {"taps": 10},
    "reach must be positive and finite, got 0.": {"reach": 0},
    "a term needs 'sxy', 'compat', got 'compat', 'sx'.": {"gaussian": [{"sx": 3, "compat": 3}]},
    "srgb must be a positive number, got (3, 3, 3).": {
        "bilateral": [{"sxy": 80, "srgb": (3, 3, 3), "compat": 1}]
    },
    "compat must be a number, [C] = [3] or [C, C], got [2].": {
        "gaussian": [{"sxy": 3, "compat": [1, 2]}]
    },
}


@pytest.mark.parametrize("message", DENSE_REFUSALS)
def test_from_densecrf_refuses(message):
    refuse(ShapeError, message, densecrf, **DENSE_REFUSALS[message])
