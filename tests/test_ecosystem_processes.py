"""Other processes and threads: DDP, workers of a DataLoader, threads, a file read elsewhere."""

from __future__ import annotations

import copy
import threading
from itertools import product
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from ecosystem import NETWORKS, images
from safetensors.torch import load_file, save_file
from same import assert_differ, assert_same
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import pacswap

HERE = Path(__file__).parent
FED = ["strided", "relayed"]


def frozen_norms(model: nn.Module) -> nn.Module:
    """Statistics of half a batch are not those of the whole."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def gradients(model: nn.Module, batch: Tensor) -> dict[str, Tensor | None]:
    model(batch).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


BLENDS = [0.0, 0.5]


def learn(folder: str) -> None:
    """What one of two processes does, for all cases: it saves its gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    batch = images(batch=4)[2 * rank : 2 * rank + 2]
    for name, blend in product(FED, BLENDS):
        model = frozen_norms(NETWORKS[name].upgraded(blend))
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        for _ in range(2):  # the second pass is where a parameter that was left out is noticed
            wrapped.zero_grad()
            found = gradients(wrapped, batch)
        torch.save(found, f"{folder}/{name}.{blend}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learnt")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_ecosystem_processes as here"
    fresh.run_pair("-c", f"{code}; here.learn(sys.argv[2])", str(HERE), str(folder))
    return folder


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("name", FED)
def test_two_processes_learn_what_one_does(name: str, blend: float, learnt: Path) -> None:
    first, second = (torch.load(learnt / f"{name}.{blend}.{rank}") for rank in (0, 1))
    model = frozen_norms(NETWORKS[name].upgraded(blend))
    expected = gradients(model, images(batch=4))
    assert [key for key, grad in first.items() if grad is None] == []
    assert_same(first, second, tolerance=0)
    assert_same(expected, first, tolerance=1e-4)
    model.zero_grad()
    assert_differ(expected, gradients(model, images(batch=4)[:2]))


class Features(Dataset):
    """Runs a network on each of its pictures."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(images(batch=4)[index : index + 1])[0]


def alone(worker: int) -> None:
    torch.set_num_threads(1)


# What is spawned imports all again: one network that is pickled is enough here.
@pytest.mark.parametrize(
    ("name", "context"), [*((name, "fork") for name in FED), ("relayed", "spawn")]
)
def test_workers_of_a_data_loader_run_it(name: str, context: str) -> None:
    model = NETWORKS[name].upgraded(0.5)
    loader = DataLoader(
        Features(model),
        2,
        num_workers=1 if context == "spawn" else 2,
        multiprocessing_context=context,
        worker_init_fn=alone,
    )
    with torch.no_grad():
        assert_same(model(images(batch=4)), torch.cat(list(loader)))


@pytest.mark.parametrize("name", FED)
def test_two_threads_get_what_each_gets_alone(name: str) -> None:
    model = NETWORKS[name].upgraded(0.5)
    batches = [images(16, 20), images(19, 23).flip(-1)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    assert_differ(expected[0], model(batches[0].flip(-1)))
    barrier = threading.Barrier(2)

    def meet(*_: Any) -> None:
        """Both stand between the guidance and the layers that it feeds."""
        barrier.wait(timeout=60)

    model.stem.register_forward_hook(meet)
    found: list[Any] = [None, None]

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = model(batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(expected, found, tolerance=0)


READER = """
import sys, warnings
warnings.simplefilter("error")
import torch
torch.set_num_threads(1)
model = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


@pytest.mark.parametrize("name", [*FED, "same", "upsample"])
def test_a_fresh_process_unpickles_it(name: str, tmp_path: Path) -> None:
    model, batch = NETWORKS[name].upgraded(0.5), images()
    files = [str(tmp_path / name) for name in ("model.pt", "batch.pt", "output.pt")]
    torch.save(model, files[0])
    torch.save(batch, files[1])
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n{READER}"
    reader = fresh.run("-c", code, *files)
    assert reader.returncode == 0, reader.stderr
    with torch.no_grad():
        assert_same(model(batch), torch.load(files[2]), tolerance=0)


@pytest.mark.parametrize("name", ["same", "scaled", "relayed", "relayed_image", "upsample"])
def test_weights_go_both_ways_by_safetensors(name: str, tmp_path: Path) -> None:
    model, batch = NETWORKS[name].upgraded(0.5), images()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = NETWORKS[name].upgraded(0.0)
    with torch.no_grad():
        assert_differ(model(batch), other(batch))
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        assert_same(model(batch), other(batch), tolerance=0)
        before = NETWORKS[name].original()
        other.load_state_dict(before.state_dict())
        with pacswap.disabled(other):
            assert_same(before(batch), other(batch), tolerance=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["same", "scaled", "relayed", "relayed_image"])
def test_half_precisions_keep_their_bits_at_blend_0(name: str, dtype: torch.dtype) -> None:
    original, upgraded = NETWORKS[name].original(), NETWORKS[name].upgraded(0.0)
    batch = images()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(original(batch), upgraded(batch), tolerance=0)
        moved = copy.deepcopy(NETWORKS[name].upgraded(0.5)).to(dtype)
        before, after = (m.to(dtype)(batch.to(dtype)) for m in (original, upgraded))
        assert_same(before, after, tolerance=0)
        assert_differ(before.float(), moved(batch.to(dtype)).float())


@pytest.mark.parametrize("name", ["same", "scaled", "relayed"])
def test_channels_last_stays(name: str) -> None:
    last = {"memory_format": torch.channels_last}
    original, upgraded = NETWORKS[name].original(), NETWORKS[name].upgraded(0.0)
    original, upgraded = original.to(**last), upgraded.to(**last)
    batch = images().to(**last)
    with torch.no_grad():
        assert_same(original(batch), upgraded(batch), tolerance=0)
        assert upgraded(batch).is_contiguous(**last)
        adapted = NETWORKS[name].upgraded(0.5).to(**last)
        assert adapted(batch).is_contiguous(**last)
        assert_same(NETWORKS[name].upgraded(0.5)(images()), adapted(batch))
