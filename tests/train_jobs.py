"""Small trainings for tests: a network of a few thousand numbers on drawn scenes."""

from __future__ import annotations

import copy
import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pacswap
from pacswap.errors import TrainingError
from pacswap.recipes import DataSection, FinetuneSection
from pacswap.scenes import CLASSES, MEAN, STD
from pacswap.surgery import plan_of
from pacswap.train.data.split import Split, open_data
from pacswap.train.engine.events import Event, Note
from pacswap.train.engine.groups import Roles, roles_of
from pacswap.train.engine.loop import Job, Outcome, train

SIZE = (24, 32)


class Net(nn.Module):
    """A stem, two convolutions, a head; logits at half the size, upsampled."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(8, len(CLASSES), 1)

    def forward(self, input: Tensor) -> Tensor:
        logits = self.classifier(self.dropout(self.body(self.stem(input))))
        return F.interpolate(logits, size=input.shape[-2:], mode="bilinear", align_corners=False)


class Wide(Net):
    """In float64, whatever it is given, and with a parameter that nothing depends on."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            super().__init__()
        self.idle = nn.PReLU(1)
        self.double()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.double())


def upgraded(dropout: float = 0.0) -> nn.Module:
    """The network with its second and third convolution pixel-adaptive; always the same."""
    return copy.deepcopy(_upgraded(dropout))


@functools.lru_cache
def _upgraded(dropout: float) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = Net(dropout)
        example = torch.zeros(1, 3, *SIZE)
        return pacswap.swap(
            net,
            layers=["body.0", "body.3"],
            guidance=pacswap.GuidanceSpec(source="stem", channels=4),
            example_input=example,
        )


def section(**keys: Any) -> FinetuneSection:
    """A recipe's `finetune` on eight drawn scenes; a key replaces a whole section."""
    base: dict[str, Any] = {
        "batch_size": 4,
        "workers": 0,
        "data": {"format": "scenes", "count": [8, 2], "resize": list(SIZE)},
        "stages": [{"name": "all", "train": ["all"], "steps": 6, "lr": 0.01}],
    }
    return FinetuneSection.model_validate(base | keys)


def job(
    folder: Path,
    model: nn.Module | None = None,
    *,
    roles: Roles | None = None,
    seed: int = 0,
    arm: str = "upgraded",
    **keys: Any,
) -> Job:
    """A training of the upgraded network, or of another."""
    model = upgraded() if model is None else model
    given = section(**keys)
    learnt, val = _opened(given.data.model_dump_json(), folder if given.data.root else Path())
    if roles is None:
        roles = roles_of(model, plan_of(model))
    return Job(model, given, learnt, val, roles, seed, folder, MEAN, STD, arm)


@functools.lru_cache
def _opened(data: str, folder: Path) -> tuple[Split, Split]:
    """Drawn once for all tests of a process."""
    return open_data(DataSection.model_validate_json(data), folder)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(before: Mapping[str, Tensor], model: nn.Module) -> set[str]:
    """What differs in any bit."""
    after = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def losses(folder: Path) -> list[str]:
    """The loss of each step as `log.csv` has it."""
    rows = (folder / "log.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss")
    return [row.split(",")[column] for row in rows[1:]]


def stage(name: str = "all", train: Any = ("all",), **keys: Any) -> dict[str, Any]:
    """A stage of three steps, or as long as `epochs` or `steps` say."""
    length = {} if "epochs" in keys else {"steps": 3}
    return {"name": name, "train": list(train), "lr": 0.05, **length, **keys}


def events(given: Job, **options: Any) -> tuple[Outcome, list[Event]]:
    """Train, and what was told of it."""
    said: list[Event] = []
    return train(given, progress=said.append, **options), said


def notes(said: list[Event]) -> list[str]:
    """The sentences among it."""
    return [event.text for event in said if isinstance(event, Note)]


def refused(given: Job, **options: Any) -> str:
    """The words of a refusal, which leaves the network as it was."""
    before = weights(given.model)
    with pytest.raises(TrainingError) as raised:
        train(given, **options)
    assert moved(before, given.model) == set()
    return str(raised.value)


def rows(path: Path) -> list[dict[str, str]]:
    """A CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))
