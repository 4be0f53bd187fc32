"""torch.func, many gradients at once and forward-mode derivatives of pixel-adaptive layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counts import IMAGES, WAY, four
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import pacswap
from pacswap import ops
from pacswap.errors import BackendError
from pacswap.nn import PacConv1d, PacConv2d, PacConv3d, PacConvTranspose2d, PacPool2d
from pacswap.ops.backends import BACKENDS, why_not

BOTH = {"padding": 1, "dtype": torch.float64}
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda **k: PacConv1d(3, 3, 3, **BOTH, **k), (7,)),
    "conv2d": (lambda **k: PacConv2d(3, 3, 3, **BOTH, **k), (6, 7)),
    "conv3d": (lambda **k: PacConv3d(3, 3, 3, **BOTH, **k), (3, 4, 3)),
    "transposed": (lambda **k: PacConvTranspose2d(3, 3, 3, **BOTH, **k), (6, 7)),
    "pool": (lambda **k: PacPool2d(3, stride=1, padding=1, **k).double(), (6, 7)),
    "recomputed": (lambda **k: PacConv2d(3, 3, 3, recompute=True, **BOTH, **k), (6, 7)),
}
# Forward mode loads decompositions that torch has scripted.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

EACH = pytest.mark.parametrize("kind", list(LAYERS))
BLENDS = pytest.mark.parametrize("blend", [0.0, 0.6], ids=["at 0", "awake"])


def made(kind: str, blend: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, what it filters and its guidance."""
    make, size = LAYERS[kind]
    torch.manual_seed(0)
    layer = make(blend=blend)
    return layer, torch.rand(2, 3, *size).double(), torch.rand(2, 4, *size).double()


def per_image(layer: nn.Module, x: Tensor, guidance: Tensor) -> Tensor:
    """A number for each image, of which no derivative is constant."""
    return layer(x, guidance).square().flatten(1).sum(1)


def one_by_one(outputs: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of each output, each by a backward pass of its own."""
    found = [torch.autograd.grad(y, inputs, retain_graph=True)[0] for y in outputs]
    assert torch.stack(found).abs().sum() > 0
    return torch.stack(found)


@EACH
@BLENDS
def test_many_gradients_at_once(kind: str, blend: float) -> None:
    layer, x, guidance = made(kind, blend)
    for inputs in (x.requires_grad_(), guidance.requires_grad_()):
        outputs = per_image(layer, x, guidance)
        if blend == 0 and inputs is guidance:
            continue  # it has none there
        expected = one_by_one(outputs, inputs)
        (found,) = torch.autograd.grad(
            outputs, inputs, torch.eye(2).double(), is_grads_batched=True
        )
        torch.testing.assert_close(found, expected)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(found.flip(0), expected)
    made_again = torch.autograd.functional.jacobian(
        lambda v: per_image(layer, v, guidance), x, vectorize=True
    )
    torch.testing.assert_close(made_again, one_by_one(per_image(layer, x, guidance), x))


@EACH
@BLENDS
def test_each_image_by_vmap(kind: str, blend: float) -> None:
    layer, x, guidance = made(kind, blend)
    alone = vmap(lambda v, f: layer(v[None], f[None])[0])
    torch.testing.assert_close(alone(x, guidance), layer(x, guidance))
    with torch.no_grad():
        torch.testing.assert_close(alone(x, guidance), layer(x, guidance))
        if blend:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(alone(x, guidance.flip(0)), layer(x, guidance))


@EACH
@BLENDS
def test_the_gradient_of_each_image(kind: str, blend: float) -> None:
    layer, x, guidance = made(kind, blend)
    parameters = dict(layer.named_parameters())

    def cost(given: dict[str, Tensor], v: Tensor, f: Tensor) -> Tensor:
        return functional_call(layer, given, (v[None], f[None])).square().sum()

    found = vmap(grad(cost), in_dims=(None, 0, 0))(parameters, x, guidance)
    outputs = per_image(layer, x, guidance)
    assert parameters["blend"].requires_grad
    for name, parameter in parameters.items():
        each = [torch.autograd.grad(y, parameter, retain_graph=True)[0] for y in outputs]
        torch.testing.assert_close(found[name], torch.stack(each))
    assert found["blend"].abs().min() > 0


@EACH
@BLENDS
def test_forward_and_second_derivatives_of_the_blend(kind: str, blend: float) -> None:
    """At blend 0 too, where nothing of the value says that the blend matters."""
    layer, x, guidance = made(kind, blend)

    def cost(value: Tensor) -> Tensor:
        return functional_call(layer, {"blend": value}, (x, guidance)).square().sum()

    at, one = layer.blend.detach(), torch.ones_like(layer.blend)
    expected = torch.autograd.grad(cost(layer.blend), layer.blend, create_graph=True)[0]
    assert expected.abs() > 0
    torch.testing.assert_close(jvp(cost, (at,), (one,))[1], expected)
    torch.testing.assert_close(jacrev(cost)(at), expected)
    with forward_ad.dual_level():
        dual = cost(forward_ad.make_dual(at, one))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    second = torch.autograd.grad(expected, layer.blend)[0]
    torch.testing.assert_close(hessian(cost)(at), second)
    assert second.abs() > 0


@WAY
def test_networks_are_transformed(way: str) -> None:
    model = four(way)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def cost(given: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, given, (image[None],)).square().sum()

    found = vmap(grad(cost), in_dims=(None, 0))(parameters, IMAGES)
    for index, image in enumerate(IMAGES):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-4, atol=1e-5)
    plain = vmap(lambda image: pacswap.revert(model)(image[None])[0])(IMAGES)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(vmap(lambda image: model(image[None])[0])(IMAGES), plain)


def test_an_attached_gradient_is_transformed() -> None:
    x, weight = torch.rand(2, 3, 6, 7), torch.rand(4, 3, 3, 3)
    kernel, window = torch.ones(2, 1, 9, 6, 7), ops.make_window(3, padding=1)

    def attached(K: Tensor, v: Tensor) -> Tensor:
        output = nn.functional.conv2d(v, weight, padding=1)
        return ops.attach_kernel_gradient(output, v, K, weight, window=window, groups=1)

    assert torch.equal(
        vmap(lambda K, v: attached(K[None], v[None])[0])(kernel, x), attached(kernel, x)
    )
    expected = kernel.clone().requires_grad_()
    attached(expected, x).square().sum().backward()
    found = grad(lambda K: attached(K, x).square().sum())(kernel)
    torch.testing.assert_close(found, expected.grad)
    assert found.abs().sum() > 0


@pytest.mark.parametrize(
    ("backend", "what"), [("eager", "its hand-written backward is"), ("loops", "its loops are")]
)
def test_what_cannot_be_transformed_says_so(backend: Any, what: str) -> None:
    said: list[str | None] = []
    vmap(lambda x: (said.append(why_not(backend)), x)[1])(IMAGES)
    with forward_ad.dual_level():
        said.append(why_not(backend))
        with pytest.raises(BackendError) as raised:
            ops.explain(backend)
        assert ops.explain()[0] == "taps"
    assert said == [
        f"{what} opaque to torch.func",
        f"{what} opaque to forward-mode differentiation",
    ]
    assert str(raised.value) == (
        f"backend='{backend}' cannot run this call: {said[1]}. Can: 'reference', 'taps'."
    )
    assert why_not(backend) is None
    assert {"reference", "taps"} < set(BACKENDS)
