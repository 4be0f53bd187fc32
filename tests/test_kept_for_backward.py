"""What a pixel-adaptive convolution keeps for its backward pass, and the largest tensor it makes.

Written so that it holds for any backend that works in blocks or tap by tap; the reference, which
gathers all taps at once, has to fail it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from counts import Operations
from torch import Tensor, nn

import pacswap
from pacswap import ops
from pacswap.nn import PacConv2d

SMALL = 1024  # numbers: scalars, biases
SHAPES = {
    # C_in, C_out, side of the window, side of the image
    "dense": (32, 32, 3, 128),
    "wide": (64, 16, 3, 96),
    "few_channels": (8, 8, 5, 256),
}
SHAPE = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))


class Kept:
    """The storages that autograd keeps.

    Attributes:
        sizes: by the storage, its size in numbers.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def note(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):  # a reference to it is no copy
            self.tensors.append(tensor)
        return tensor

    @property
    def sizes(self) -> dict[int, int]:
        storages = ((t.untyped_storage(), t.element_size()) for t in self.tensors)
        return {s._cdata: s.nbytes() // size for s, size in storages}


@contextmanager
def keeping() -> Iterator[Kept]:
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor):
        yield kept


def made(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Input, K, W and padding."""
    C_in, C_out, k, side = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((1, C_in, side, side), (1, 1, k * k, side, side), (C_out, C_in, k, k))
    x, kernel, weight = (torch.rand(s, generator=generator).requires_grad_() for s in sizes)
    return x, kernel, weight, k // 2


def assert_keeps_little(shape: tuple[int, int, int, int], backend: str) -> None:
    """The operation keeps input, K and W, and what is small."""
    x, kernel, weight, padding = made(shape)
    with keeping() as kept:
        ops.pac_conv2d(x, kernel, weight, padding=padding, backend=backend)
    numbers = sum(size for size in kept.sizes.values() if size > SMALL)
    most = x.numel() + kernel.numel() + weight.numel()
    assert numbers <= most, f"{numbers} numbers are kept, at most {most} expected"


def assert_makes_nothing_large(run: Callable[[], object], shape: tuple[int, int, int, int]) -> None:
    """No tensor of half of KH·KW·C_in·H·W numbers is made."""
    C_in, _, k, side = shape
    with Operations() as operations:
        run()
    product = k * k * C_in * side * side
    largest = operations.largest
    assert largest < product / 2, (
        f"a tensor of {largest} numbers is made, the product has {product}"
    )


@SHAPE
def test_the_operation_keeps_input_kernel_and_weight(shape: tuple[int, int, int, int]) -> None:
    assert_keeps_little(shape, "eager")
    assert_keeps_little(shape, "auto")


@SHAPE
def test_the_reference_keeps_more(shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(AssertionError, match="numbers are kept"):
        assert_keeps_little(shape, "reference")


@SHAPE
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_no_product_of_all_taps_is_made(shape: tuple[int, int, int, int], way: str) -> None:
    assert_makes_nothing_large(lambda: forward(shape, "eager", way == "backward"), shape)


@SHAPE
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_the_reference_makes_one(shape: tuple[int, int, int, int], way: str) -> None:
    with pytest.raises(AssertionError, match="numbers is made, the product has"):
        assert_makes_nothing_large(lambda: forward(shape, "reference", way == "backward"), shape)


def forward(shape: tuple[int, int, int, int], backend: str, backward: bool) -> None:
    x, kernel, weight, padding = made(shape)
    output = ops.pac_conv2d(x, kernel, weight, padding=padding, backend=backend)
    if backward:
        output.sum().backward()


def layers_of(shape: tuple[int, int, int, int], count: int, blend: float) -> list[PacConv2d]:
    C_in, C_out, k, _ = shape
    torch.manual_seed(0)
    options = {"padding": k // 2, "blend": blend, "form": "external"}
    return [PacConv2d(C_in, C_out, k, **options) for _ in range(count)]


def layer_numbers(shape: tuple[int, int, int, int], count: int, blend: float) -> int:
    """What so many layers keep beside each other that share a kernel."""
    x, kernel, _, _ = made(shape)
    inputs = [x.detach().clone().requires_grad_() for _ in range(count)]
    with keeping() as kept:
        for layer, input in zip(layers_of(shape, count, blend), inputs, strict=True):
            layer(input, kernel=kernel)
    return sum(size for size in kept.sizes.values() if size > SMALL)


def assert_a_layer_keeps_little(shape: tuple[int, int, int, int], blend: float) -> None:
    x, kernel, weight, _ = made(shape)
    one, three = (layer_numbers(shape, count, blend) for count in (1, 3))
    each = (three - one) // 2
    most = x.numel() + kernel.numel() + weight.numel()
    assert each <= most, f"each layer keeps {each} numbers, at most {most} expected"


@SHAPE
@pytest.mark.parametrize("blend", [0.0, 0.7])
def test_each_layer_keeps_input_kernel_and_weight(
    shape: tuple[int, int, int, int], blend: float
) -> None:
    assert_a_layer_keeps_little(shape, blend)


@SHAPE
def test_a_layer_on_the_reference_keeps_more(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    convolve = ops.convolve
    monkeypatch.setattr(ops, "convolve", lambda *args: convolve(*args[:-1], "reference"))
    with pytest.raises(AssertionError, match="each layer keeps"):
        assert_a_layer_keeps_little(shape, 0.7)


@SHAPE
@pytest.mark.parametrize("blend", [0.0, 0.7])
def test_a_layer_makes_nothing_large(shape: tuple[int, int, int, int], blend: float) -> None:
    (layer,) = layers_of(shape, 1, blend)
    x, kernel, _, _ = made(shape)
    assert_makes_nothing_large(lambda: layer(x, kernel=kernel), shape)
    assert_makes_nothing_large(lambda: layer(x, kernel=kernel).sum().backward(), shape)


def test_an_upgraded_network_makes_nothing_large() -> None:
    """Its kernels neither: distances are summed channel by channel, or tap by tap."""
    C, side = 32, 128

    def network() -> nn.Module:
        torch.manual_seed(0)
        convs = [nn.Conv2d(C if i else 3, C, 3, padding=1) for i in range(3)]
        return nn.Sequential(*convs)

    images = torch.rand(1, 3, side, side)
    kernel = {"blend": 0.7, "bandwidth": 1.0}
    model = pacswap.swap(network(), ["1", "2"], "0", kernel=kernel, example_input=images)
    assert_makes_nothing_large(lambda: model(images).sum().backward(), (C, C, 3, side))
