"""PacConv2d: what it promises of the convolution it replaces, and of the modules that feed it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from numerics import (
    CASES,
    DIFFERS,
    FEW,
    HALVES,
    Case,
    all_cases,
    assert_as_good_as,
    assert_close64,
    assert_equal,
    few_cases,
    fresh_memory_is_nan,
    pac,
    wide,
)
from torch import Tensor, nn

from pacswap.errors import GuidanceError, ShapeError
from pacswap.nn import AdaptingKernel, PacConv2d

# torch says so of its own layer too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)
BASE = CASES["3x3_p1"]
ADDED = ["blend", "adapting_kernel.log_bandwidth"]
LIVE = {n: c for n, c in CASES.items() if c.window.taps > 1 and c.image[1:] != (1, 1)}
blends = pytest.mark.parametrize("blend", [0.0, 0.4], ids=["blend_0", "blend_0.4"])
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def pair(case: Case = BASE, *, dtype=torch.float32, **options) -> tuple[nn.Conv2d, PacConv2d]:
    """A convolution and the layer made of a twin of it."""
    conv = case.conv(dtype)
    return conv, PacConv2d.from_conv(copy.deepcopy(conv), **options)


def tensors(case: Case = BASE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    given = case.tensors(dtype)
    return given["input"], given["guidance"]


def attributes(conv: nn.Conv2d) -> dict[str, object]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    names += ("groups", "padding_mode", "training", "weight", "bias")
    return {name: getattr(conv, name) for name in names}


def same(one: nn.Conv2d, other: nn.Conv2d) -> bool:
    mine, theirs = attributes(one), attributes(other)
    tensors = all(mine.pop(name) is theirs.pop(name) for name in ("weight", "bias"))
    return tensors and mine == theirs


@trainings
@all_cases
def test_to_conv_undoes_from_conv(case, training):
    conv = case.conv().train(training)
    layer = PacConv2d.from_conv(conv)
    back = layer.to_conv()
    assert same(layer, conv)
    assert same(back, conv)
    assert type(back) is nn.Conv2d


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_stay_frozen(frozen):
    conv = BASE.conv()
    getattr(conv, frozen).requires_grad_(False)
    layer = PacConv2d.from_conv(conv)
    back = layer.to_conv()
    flags = [
        (m.weight.requires_grad, m.bias.requires_grad, getattr(m, frozen).requires_grad)
        for m in (layer, back)
    ]
    assert flags == [(frozen != "weight", frozen != "bias", False)] * 2
    assert layer.blend.requires_grad


def test_a_conv_without_bias_stays_without():
    conv = nn.Conv2d(2, 2, 3, bias=False)
    layer = PacConv2d.from_conv(conv)
    assert same(layer.to_conv(), conv)
    assert list(layer.state_dict()) == ["weight", *ADDED]


@pytest.mark.parametrize("name", [name for name in FEW if name != "3x3_p1"])
def test_sameness_of_convolutions_can_fail(name):
    assert not same(CASES[name].conv(), BASE.conv())
    assert not same(BASE.conv(), BASE.conv())  # equal, and yet not the same parameters


@trainings
@all_cases
def test_the_output_at_blend_0_is_the_convolutions_to_the_bit(case, training):
    conv, layer = pair(case)
    image, guidance = tensors(case)
    assert_equal(layer.train(training)(image, guidance), conv(image))


@trainings
@pytest.mark.parametrize("case", LIVE.values(), ids=LIVE)
def test_the_output_at_another_blend_is_not_the_convolutions(case, training):
    conv, layer = pair(case, blend=0.1)
    image, guidance = tensors(case)
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(layer.train(training)(image, guidance), conv(image))


def gradients(module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    image, *rest = inputs
    leaf = image.detach().requires_grad_()
    module(leaf, *rest).square().sum().backward()
    assert leaf.grad is not None
    return {"input": leaf.grad} | {n: p.grad for n, p in module.named_parameters()}


@all_cases
def test_the_gradients_at_blend_0_are_the_convolutions_to_the_bit(case):
    conv, layer = pair(case)
    image, guidance = tensors(case)
    grads = gradients(layer, image, guidance)
    for name, grad in gradients(conv, image).items():
        assert_equal(grads[name], grad, name=name)


@pytest.mark.parametrize("case", LIVE.values(), ids=LIVE)
def test_the_gradient_of_blend_at_0_is_alive_and_right(case):
    _, layer = pair(case, dtype=torch.float64)
    given = case.tensors() | {
        "blend": torch.zeros(()).double(),
        "bandwidth": torch.ones(()).double(),
    }
    output = pac(case, given, "reference", derivatives=False)["output"]
    truth = pac(case, given | {"cotangent": 2 * output}, "reference")["grad_blend"]
    grad = gradients(layer, given["input"], given["guidance"])["blend"]
    assert grad.abs() > 0.01
    assert_close64(grad, truth)


def test_the_gradient_of_blend_is_0_where_guidance_is_constant():
    _, layer = pair(CASES["3x3_valid"])
    image, guidance = tensors(CASES["3x3_valid"])
    assert gradients(layer, image, torch.ones_like(guidance))["blend"] == 0


def test_no_kernel_gradient_is_made_for_a_frozen_kernel():
    conv, layer = pair()
    layer.blend.requires_grad_(False)
    layer.adapting_kernel.requires_grad_(False)
    image, guidance = tensors()
    assert layer(image, guidance).grad_fn.name() == conv(image).grad_fn.name()
    layer.blend.requires_grad_(True)
    assert layer(image, guidance).grad_fn.name() != conv(image).grad_fn.name()


MAKERS = {
    "from_conv": (lambda conv: PacConv2d.from_conv(conv), False),
    "to_conv": (lambda conv: PacConv2d.from_conv(conv).to_conv(), False),
    "AdaptingKernel": (lambda conv: AdaptingKernel(3), False),
    "PacConv2d": (lambda conv: PacConv2d(2, 2, 3), True),
}


@pytest.mark.parametrize(("make", "consumes"), MAKERS.values(), ids=MAKERS)
def test_random_numbers_are_left_to_the_user(make, consumes):
    conv, before = nn.Conv2d(2, 2, 3), torch.get_rng_state()
    make(conv)
    assert torch.equal(torch.get_rng_state(), before) is not consumes


@blends
def test_an_in_place_activation_may_follow(blend):
    image, guidance = tensors()
    results = []
    for inplace in (False, True):
        module = nn.ModuleList([pair(blend=blend)[1], nn.ReLU(inplace)])
        output = module[1](module[0](image, guidance))
        output.square().sum().backward()
        results.append([output.detach(), *[p.grad for p in module.parameters()]])
    assert (results[0][0] == 0).any()
    for after, in_place in zip(*results, strict=True):
        assert_equal(in_place, after)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer))}


@blends
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_equal_and_independent(copied, blend):
    _, layer = pair(blend=blend)
    layer.guided_by = "'layer4.0.conv2'"
    image, guidance = tensors()
    expected = layer(image, guidance).detach()
    twin = copied(layer.eval())
    assert (twin.guided_by, twin.training, repr(twin)) == (layer.guided_by, False, repr(layer))
    assert_equal(twin(image, guidance).detach(), expected)
    with torch.no_grad():
        twin.weight.mul_(2)
        twin.blend.add_(1)
    assert_equal(layer(image, guidance).detach(), expected)
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(twin(image, guidance).detach(), expected)


DTYPES = pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)


@DTYPES
def test_a_converted_layer_is_the_converted_convolution_at_blend_0(dtype):
    conv, layer = pair()
    image, guidance = (t.to(dtype) for t in tensors())
    assert_equal(layer.to(dtype)(image, guidance), conv.to(dtype)(image))
    assert {p.dtype for p in layer.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@few_cases
def test_a_half_layer_is_as_good_as_the_reference(case, dtype):
    given = case.tensors(dtype)
    _, layer = pair(case, dtype=dtype, blend=0.7, bandwidth=1.6)
    truth = pac(case, wide(given), "reference", derivatives=False)["output"]
    baseline = pac(case, given, "reference", derivatives=False)["output"]
    output = layer(given["input"], given["guidance"])
    assert_as_good_as(output, truth, baseline, 2.0)


@few_cases
def test_autocast_gives_what_the_convolution_gives(case):
    conv, layer = pair(case)
    image, guidance = tensors(case)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(image, guidance)
        assert_equal(output, conv(image))
    output.float().square().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    assert layer.blend.grad != 0


def test_state_dict_keys():
    _, layer = pair()
    assert list(layer.state_dict()) == ["weight", "bias", *ADDED]


def test_state_dict_keys_without_a_kernel_of_its_own():
    _, layer = pair(own_kernel=False)
    assert list(layer.state_dict()) == ["weight", "bias", "blend"]


def test_an_old_state_dict_loads_and_leaves_the_rest():
    _, layer = pair(blend=0.3, bandwidth=2.0)
    old = nn.Conv2d(*BASE.channels, 3).state_dict()
    keys = layer.load_state_dict(old, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (ADDED, [])
    assert_equal(layer.weight.detach(), old["weight"])
    assert_equal(layer.bias.detach(), old["bias"])
    assert layer.blend == torch.tensor(0.3)
    assert layer.adapting_kernel.bandwidth == torch.tensor(2.0).log().exp()


def test_an_old_state_dict_is_not_a_whole_one():
    with pytest.raises(RuntimeError, match="Missing key"):
        pair()[1].load_state_dict(BASE.conv().state_dict())


@blends
@few_cases
def test_unbatched_is_a_batch_of_one(case, blend):
    _, layer = pair(case, blend=blend)
    image, guidance = tensors(case)
    assert_equal(layer(image[0], guidance[0]), layer(image[:1], guidance[:1])[0])


@blends
def test_a_kernel_in_place_of_the_guidance(blend):
    _, layer = pair(blend=blend)
    image, guidance = tensors()
    kernel = layer.adapting_kernel(guidance)
    assert_equal(layer(image, kernel=kernel), layer(image, guidance))
    assert_equal(layer(image[0], kernel=kernel[0]), layer(image[0], guidance[0]))


def test_the_layer_a_user_constructs_is_the_papers():
    layer = PacConv2d(*BASE.channels, 3, padding=1, dtype=torch.float64)
    given = BASE.tensors() | {"weight": layer.weight, "bias": layer.bias}
    given |= {"blend": torch.ones(()).double(), "bandwidth": torch.ones(()).double()}
    truth = pac(BASE, given, "reference", derivatives=False)["output"]
    output = layer(given["input"], given["guidance"]).detach()
    assert_close64(output, truth)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(output, layer.to_conv()(given["input"]).detach())


@blends
def test_a_compiled_layer(blend):
    conv, layer = pair(dtype=torch.float64, blend=blend)
    image, guidance = tensors(dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")(image, guidance).detach()
    assert_close64(compiled, layer(image, guidance).detach())
    if blend == 0:
        assert_close64(compiled, conv(image).detach())


CALLED = "PacConv2d was called without a guidance. Call it as layer(input, guidance)."
BOTH = "PacConv2d takes a guidance or a kernel, got both. Leave one out."
NAMED = (
    "'layer4.0.conv2' was called on a path through the model that does not compute its guidance. "
    "Call the model itself, or use `with pacswap.disabled(model):` to run that path as it was "
    "before the swap."
)
SHARED = (
    "this PacConv2d has no adapting kernel of its own: it shares another layer's, or its form is "
    "external. Call it with kernel=…"
)


@blends
@pytest.mark.parametrize(
    ("given", "guided_by", "own_kernel", "message"),
    [
        ((), None, True, CALLED),
        ((), "'layer4.0.conv2'", True, NAMED),
        (("guidance", "kernel"), None, True, BOTH),
        (("guidance",), None, False, SHARED),
    ],
    ids=["without", "named", "both", "shared"],
)
def test_guidance_errors(given, guided_by, own_kernel, message, blend):
    _, layer = pair(own_kernel=own_kernel, blend=blend)
    layer.guided_by = guided_by
    image, guidance = tensors()
    feeds = {"guidance": guidance, "kernel": torch.ones(2, 1, 9, 7, 8)}
    with pytest.raises(GuidanceError) as raised:
        layer(image, **{name: feeds[name] for name in given})
    assert str(raised.value) == message


@pytest.mark.parametrize("given", ["nothing", "guidance"])
@few_cases
def test_a_disabled_layer_is_the_convolution(case, given):
    conv, layer = pair(case, blend=1.0)
    image, guidance = tensors(case)
    layer.enabled = False
    feeds = () if given == "nothing" else (guidance,)
    assert_equal(layer(image, *feeds), conv(image))
    assert_equal(layer(image[0], *feeds), conv(image[0]))
    layer.enabled = True
    with pytest.raises(AssertionError, match="expected the same bits"):
        assert_equal(layer(image, guidance), conv(image))


def test_the_centre_of_a_1x1_window_is_all_it_has():
    conv, layer = pair(CASES["1x1"], blend=1.0)
    image, guidance = tensors(CASES["1x1"])
    torch.testing.assert_close(layer(image, guidance), conv(image))


@pytest.mark.parametrize("make", [PacConv2d.from_conv, lambda conv, **o: PacConv2d(2, 2, 3, **o)])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bandwidth": -1.0}, "bandwidth must be positive and finite, got -1.0."),
        ({"normalize": "means"}, "normalize='means' is unknown. Nearest: 'mean'."),
        ({"form": "laplace"}, "form='laplace' is unknown. Nearest: 'laplacian'."),
        ({"distance": "max"}, "distance='max' is unknown. Nearest: 'mean'."),
    ],
    ids=["bandwidth", "normalize", "form", "distance"],
)
def test_wrong_options_are_refused_at_once(make, option, message):
    with pytest.raises(ShapeError) as raised:
        make(nn.Conv2d(2, 2, 3), **option)
    assert str(raised.value) == message


def test_the_output_feeds_a_view_as_that_of_a_convolution():
    conv, layer = pair(blend=0.5)
    image, guidance = tensors()
    last = image.contiguous(memory_format=torch.channels_last)
    assert layer(last, guidance).stride() == conv(last).stride()
    assert F.relu(layer(image, guidance)).view(2, -1).shape == conv(image).view(2, -1).shape
