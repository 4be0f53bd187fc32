"""Triton's operators as torch and its compiler see them; `test_ops_triton.py` runs this file."""

# ruff: noqa: E501 (a message is one line)

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from numerics import DIFFERS, Case, assert_as_good_as, wide
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.testing._internal.optests.generate_tests import OpCheckError

from pacswap import ops
from pacswap.errors import BackendError
from pacswap.ops import handwritten
from pacswap.ops.backends import Task
from pacswap.ops.gpu import backend, dense, library, refusal, tuning
from pacswap.ops.gpu.geometry import Geometry

torch.set_num_threads(1)

CASE = Case((1, 2), stride=(2, 1), channels=(3, 4), image=(2, 5, 4))


def drawn() -> dict[str, Tensor]:
    given = CASE.tensors(torch.float32)
    B, _, *size = CASE.output_shape
    given["kernel"] = torch.rand(B, 1, 2, *size)
    given["centre"] = torch.randn(B, 3, *size)
    given["last"] = given["input"].to(memory_format=torch.channels_last)
    return given


GEOMETRY = list(Geometry.of(CASE.window, *CASE.image[1:]))
CALL = (GEOMETRY, 1)
DIFFERENTIABLE = {
    "pac_conv2d": (library.pac_conv2d, ("input", "kernel", "weight"), (*CALL, False)),
    "pac_conv2d last": (library.pac_conv2d, ("input", "kernel", "weight"), (*CALL, True)),
    "tap_distance": (library.tap_distance, ("guidance", None), (GEOMETRY, "square", False)),
    "tap_distance centre": (
        library.tap_distance,
        ("guidance", "centre"),
        (GEOMETRY, "absolute", True),
    ),
}
FINAL = {
    "pull": (library.pull, ("cotangent", "input", "kernel", "weight"), (*CALL, True, True)),
    "pull last": (library.pull, ("cotangent", "last", "kernel", "weight"), (*CALL, True, False)),
    "weight": (library.weight_gradient, ("cotangent", "input", "kernel", "weight"), CALL),
    "distance": (
        library.tap_distance_gradients,
        ("kernel", "guidance", "centre"),
        (GEOMETRY, "asymmetric", False),
    ),
}


def arguments(names: tuple[str | None, ...], others: tuple[Any, ...], learns: bool) -> list[Any]:
    given = drawn()
    tensors = [None if n is None else given[n].detach().requires_grad_(learns) for n in names]
    return [*tensors, *others]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own check looks
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name):
    operator, names, others = DIFFERENTIABLE[name]
    opcheck(operator, arguments(names, others, True))


@pytest.mark.parametrize("name", FINAL)
def test_opcheck(name):
    operator, names, others = FINAL[name]
    opcheck(operator, arguments(names, others, False))


@pytest.mark.parametrize("name", ["pac_conv2d", "pull"])
def test_opcheck_sees_a_wrong_shape(name, monkeypatch):
    right = library.empty

    def wrong(like: Tensor, size: tuple[int, ...], last: bool) -> Tensor:
        return right(like, (*size[:3], size[3] + 1), last)

    monkeypatch.setattr(library, "empty", wrong)
    operator, names, others = {**DIFFERENTIABLE, **FINAL}[name]
    with pytest.raises(OpCheckError, match="Shapes"):
        opcheck(operator, arguments(names, others, False), test_utils="test_faketensor")


def guided(input: Tensor, guidance: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    kernel = ops.adapting_kernel(guidance, CASE.kernel_size, **CASE.geometry, backend=backend)
    return ops.pac_conv2d(input, kernel, weight, bias, **CASE.options, backend=backend)


NAMES = ("input", "guidance", "weight", "bias")


def test_it_compiles_whole_with_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(guided, backend="aot_eager", fullgraph=True, dynamic=True)
    for image in (CASE.image, (1, 7, 6)):
        given = Case(CASE.kernel_size, CASE.stride, channels=(3, 4), image=image).tensors(
            torch.float32
        )
        leaves = [given[name].requires_grad_() for name in NAMES]
        made, expected = (f(*leaves, "triton") for f in (compiled, guided))
        grads = [torch.autograd.grad(y, leaves, given["cotangent"]) for y in (made, expected)]
        torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_the_compiled_graph_holds_the_operators():
    """And not those of the taps, which would compile too; `auto` prefers it where it can run."""
    torch._dynamo.reset()
    called = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    given = CASE.tensors(torch.float32)
    leaves = [given[name] for name in NAMES]
    torch.compile(guided, backend=keep, fullgraph=True)(*leaves, "triton")
    assert sum("pacswap" in name for name in called) == 2
    called.clear()
    torch._dynamo.reset()
    torch.compile(guided, backend=keep, fullgraph=True)(*leaves, "auto")
    assert sum("pacswap" in name for name in called) == 2
    called.clear()
    torch._dynamo.reset()
    torch.compile(guided, backend=keep, fullgraph=True)(*leaves, "taps")
    assert sum("pacswap" in name for name in called) == 0


def derivatives(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """The gradients with a graph of their own, and the gradients of their sum of squares."""
    leaves = [given[name].detach().requires_grad_() for name in NAMES[:3]]
    output = guided(*leaves, given["bias"], backend)
    grads = torch.autograd.grad(output, leaves, given["cotangent"], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    firsts = {f"grad_{n}": g.detach() for n, g in zip(NAMES, grads, strict=False)}
    return firsts | {f"second_{n}": g for n, g in zip(NAMES, second, strict=False)}


def assert_derivatives(made: dict[str, Tensor]) -> None:
    given = CASE.tensors(torch.float32)
    truth, baseline = derivatives(wide(given), "reference"), derivatives(given, "reference")
    for name, value in made.items():
        assert_as_good_as(value, truth[name], baseline[name], 3.0, name=name)


both_ways = pytest.mark.parametrize("watched", [False, True], ids=["eager", "operators"])


@both_ways
def test_second_derivatives(watched, monkeypatch):
    monkeypatch.setattr(backend, "_is_watched", lambda *tensors: watched)
    assert_derivatives(derivatives(CASE.tensors(torch.float32), "triton"))


@both_ways
def test_a_wrong_second_derivative_is_seen(watched, monkeypatch):
    right = library.differentiable_vjp

    def wrong(*args: Any) -> Any:
        # The value stays, its derivative is 1.001 times as large.
        return [None if g is None else g + 0.001 * (g - g.detach()) for g in right(*args)]

    monkeypatch.setattr(library if watched else handwritten, "differentiable_vjp", wrong)
    monkeypatch.setattr(backend, "_is_watched", lambda *tensors: watched)
    with pytest.raises(AssertionError, match=f"^second_input: {DIFFERS}"):
        assert_derivatives(derivatives(CASE.tensors(torch.float32), "triton"))


REFUSED = {
    "float64": (lambda x: x.double(), "it computes in float32, float16 and bfloat16, not in float64"),
    "many pixels": (lambda x: x[:1].expand(2**27, -1, -1, -1), "it counts the pixels of a batch in 32 bits, and there are more"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    change, reason = REFUSED[name]
    input = change(torch.zeros(2, 3, 5, 4))
    assert refusal.why_not_triton(input, None, CASE.window, 1) == reason
    with pytest.raises(BackendError) as raised:
        ops.explain("triton", Task((input,), CASE.window))
    assert str(raised.value).startswith(f"backend='triton' cannot run this call: {reason}. Can: ")


HERE = {
    "not installed": ({"INSTALLED": False}, "triton is not installed (pip install triton; Linux only)"),
    "old torch": ({"HAS_OLD_TRITON": True}, f"it needs torch 2.6 or above, and this is {torch.__version__}"),
    "AMD": ({"torch.version.hip": "7.0"}, "it is written for NVIDIA GPUs, and nobody has tried it on this build's AMD ones"),
    "exporting": ({"_exports": lambda: True}, "an exported graph must run where Triton is not installed"),
    "no GPU": ({"INTERPRETS": False}, "Triton needs a CUDA GPU, and torch sees none"),
}  # fmt: skip


@pytest.mark.parametrize("name", HERE)
def test_refusals_of_every_call(name, monkeypatch):
    changes, reason = HERE[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for attribute, value in changes.items():
        monkeypatch.setattr(f"pacswap.ops.gpu.refusal.{attribute}", value)
    assert refusal.why_not_here() == reason
    assert refusal.why_not_triton(torch.zeros(1, 3, 5, 4), None, None, 1) == reason
    with pytest.raises(BackendError) as raised:
        ops.explain("triton")
    assert str(raised.value).startswith(f"backend='triton' cannot run this call: {reason}. Can: ")


def test_a_window_with_more_taps_than_bits_is_refused_unless_depthwise():
    input, window = torch.zeros(1, 4, 5, 70), ops.make_window((1, 64))
    weight = torch.zeros(4, 4, 1, 64)
    reason = "its matrix products know windows of up to 63 taps a side"
    assert refusal.why_not_triton(input, weight, window, 1) == reason
    assert refusal.why_not_triton(input, weight[:, :1], window, 4) is None
    assert refusal.why_not_triton(input, None, window, 1) is None
    assert refusal.why_not_triton(input, weight[..., 1:], ops.make_window((1, 63)), 1) is None


def test_a_sequence_with_more_taps_than_bits_is_refused():
    input, kernel, weight = torch.ones(1, 2, 70), torch.ones(1, 1, 64, 7), torch.ones(3, 2, 64)
    with pytest.raises(BackendError, match="know windows of up to 63 taps a side"):
        ops.pac_conv1d(input, kernel, weight, backend="triton")
    made = ops.pac_conv1d(input[..., 1:], kernel[:, :, 1:], weight[..., 1:], backend="triton")
    assert made.eq(2 * 63).all()


def test_more_factors_than_32_bits_count_are_refused_unless_depthwise():
    input, weight = torch.zeros(1).expand(1, 4, 2**15, 2**15), torch.zeros(4, 4, 1, 3)
    window = ops.make_window((1, 3), padding=(0, 1))
    reason = "its matrix products count factors and weights in 32 bits, and there are more"
    assert refusal.why_not_triton(input, weight, window, 1) == reason
    assert refusal.why_not_triton(input, weight[:, :1], window, 4) is None
    assert refusal.why_not_triton(input[:, :, 2**14 :], weight, window, 1) is None
    assert (
        refusal.why_not_triton(input[..., :9], torch.zeros(1).expand(4, 2**29, 1, 3), window, 1)
        == reason
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_traces_and_transforms_hide_is_refused():
    given = CASE.tensors(torch.float32)
    tensors = [given["input"], drawn()["kernel"], given["weight"]]

    def convolved(*tensors: Tensor, backend: str = "triton") -> Tensor:
        window = ops.make_window(CASE.kernel_size, **CASE.geometry)
        return ops.conv.convolve(*tensors, None, window, 1, backend)

    def loss(weight: Tensor, backend: str) -> Tensor:
        return convolved(*tensors[:2], weight, backend=backend).sum()

    with pytest.raises(BackendError, match=r"its programs are opaque to torch\.func"):
        torch.func.vmap(convolved)(*(t[None] for t in tensors))
    with pytest.raises(BackendError, match=r"its programs are opaque to torch\.func"):
        torch.func.grad(loss)(tensors[2], "triton")
    with pytest.raises(BackendError, match=r"its programs are opaque to torch\.jit\.trace"):
        torch.jit.trace(convolved, tensors)
    made = torch.func.grad(loss)(tensors[2], "auto")
    weight = tensors[2].requires_grad_()
    (expected,) = torch.autograd.grad(loss(weight, "triton"), weight)
    torch.testing.assert_close(made, expected)


def test_fake_tensors_are_seen_outside_of_their_mode():
    mode, given = FakeTensorMode(), drawn()
    names = ("input", "kernel", "weight", "cotangent")
    *inputs, grad = (mode.from_tensor(given[name]) for name in names)
    assert backend.pac_conv2d(*inputs, None, CASE.window, 1).shape == given["cotangent"].shape
    grads = backend.gradients(tuple(inputs), grad, CASE.window, 1, (True, True, True))
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    guidance = mode.from_tensor(given["guidance"])
    made = backend.tap_distance(guidance, None, CASE.window, "square", False)
    assert made.shape == given["kernel"].shape
    found = backend.distance_gradients(guidance, None, made, CASE.window, "square", False)
    assert found[0].shape == guidance.shape


def test_one_call_is_measured_at_a_time():
    """Triton keeps the arguments of the call in the tuner."""

    class Tuner:
        best_config, inside, most = tuning.triton.Config({}), 0, 0

        def __getitem__(self, grid: Any) -> Any:
            return self

        def __call__(self, **arguments: Any) -> None:
            Tuner.inside += 1
            Tuner.most = max(Tuner.most, Tuner.inside)
            time.sleep(0.05)
            Tuner.inside -= 1

    program = tuning.Program(dense.forward.function, [tuning.triton.Config({})] * 2)
    vars(program)["_tuner"] = Tuner()
    with ThreadPoolExecutor(4) as pool:
        for size in range(4):
            given = dict.fromkeys(program._keys, size)
            pool.submit(program, lambda m: (1,), given, torch.zeros(1))
    assert (Tuner.most, len(program._fastest)) == (1, 4)


def test_a_tensor_on_the_cpu_is_refused_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(refusal, "INTERPRETS", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = refusal.why_not_triton(torch.zeros(1, 3, 5, 4), None, None, 1)
    assert reason == "the tensors are on cpu, not on a CUDA GPU"


def test_what_it_takes_is_not_refused():
    assert ops.explain("triton") == ("triton", "asked for by name")
    assert refusal.why_not_triton(torch.zeros(1, 3, 5, 4), None, CASE.window, 1) is None


def test_an_export_is_refused_in_words():
    class Net(torch.nn.Module):
        def forward(self, *given: Tensor) -> Tensor:
            return guided(*given, "triton")

    given = CASE.tensors(torch.float32)
    with pytest.raises(Exception, match="an exported graph must run where Triton is not"):
        torch.export.export(Net(), tuple(given[name] for name in NAMES))


def test_tf32_is_used_where_matrix_products_may(monkeypatch):
    assert torch.backends.cudnn.allow_tf32  # which is not asked
    assert tuning.precision() == "tf32x3"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert tuning.precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
