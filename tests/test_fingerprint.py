"""Digests of tensors: the same however a tensor lies in memory, another one for any other bit."""

from __future__ import annotations

import pytest
import torch

from pacswap.fingerprint import digest, digests

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64,
    torch.int64, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def numbers(dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) % 7).to(dtype)


def test_the_digits_are_those_in_files():
    assert digest(numbers(torch.float32)) == "fdfb00c08d424af5"
    assert digest(torch.tensor(3)) == "f155ead71dcd0271"
    assert digest(numbers(torch.bfloat16)) == "5449a1fa01c34b59"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layout_does_not_matter(dtype):
    tensor = numbers(dtype)
    spread = torch.zeros(2, 3, 4, 10, dtype=dtype)
    spread[..., ::2] = tensor
    others = [
        tensor.to(memory_format=torch.channels_last),
        tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        spread[..., ::2],
        torch.cat([tensor, tensor])[2:],
        torch.nn.Parameter(tensor, requires_grad=dtype.is_floating_point),
    ]
    assert {digest(other) for other in others} == {digest(tensor)}


def test_large_tensors_are_read_in_pieces():
    tensor = torch.randn(3, 1_500_000)
    assert digest(tensor.T.contiguous().T) == digest(tensor)
    assert digest(tensor.T) != digest(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_matters(dtype):
    tensor = numbers(dtype)
    seen = {digest(tensor)}
    for index in (0, 59, 119):
        other = tensor.clone()
        other.view(-1)[index] = 1 if other.view(-1)[index] == 0 else 0
        seen.add(digest(other))
    assert len(seen) == 4


def test_the_last_bit_matters():
    tensor = torch.rand(1000)
    other = tensor.clone()
    other[999] = torch.nextafter(other[999], torch.tensor(2.0))
    assert digest(other) != digest(tensor)
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0))


def test_shape_and_dtype_matter():
    tensor = torch.zeros(2, 3)
    others = [tensor.T, tensor.reshape(6), tensor[None], tensor.int(), tensor.half()]
    others += [torch.zeros(()), torch.zeros(0), torch.zeros(0, 3), torch.zeros(1)]
    assert len({digest(t) for t in [tensor, *others]}) == 10


def test_what_has_no_values_has_no_digest():
    state = {"a": torch.zeros(3), "b": torch.zeros(3, device="meta")}
    assert digests(state) is None
    assert digests({"a": torch.zeros(3), "extra": 5}) == {"a": digest(torch.zeros(3))}


def test_two_names_of_one_tensor():
    tensor = torch.randn(4, 4)
    found = digests({"a": tensor, "b": tensor, "c": tensor.T, "d": tensor[:2]})
    assert found == {
        "a": digest(tensor), "b": digest(tensor), "c": digest(tensor.T), "d": digest(tensor[:2])
    }  # fmt: skip
    assert len(set(found.values())) == 3
