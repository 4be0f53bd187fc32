"""Every way to look at a picture gives one answer; processes share pictures and agree."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import fresh
import pytest
import torch
from numerics import DIFFERS, assert_close64, assert_equal
from torch import Tensor, nn

from pacswap.errors import TrainingError
from pacswap.recipes import EvaluateSection
from pacswap.train.measure.infer import _places, evaluate, normalized, predict, share
from pacswap.train.measure.metrics import Scores, count

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLASSES = ("dark", "grey", "bright")


@dataclass(frozen=True)
class Named:
    name: str


class Drawn:
    """A split of small pictures: the label is how bright a block is."""

    classes = CLASSES
    ignore_index = 255
    palette = ((0, 0, 0), (128, 128, 128), (255, 255, 255))

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes
        self.samples = tuple(Named(f"picture {i}") for i in range(len(sizes)))
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads.append(index)
        generator = torch.Generator().manual_seed(index)
        H, W = self.sizes[index]
        blocks = torch.randint(0, 3, (H // 8 + 1, W // 8 + 1), generator=generator)
        mask = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)[:H, :W].clone()
        noise = torch.randint(-70, 70, (3, H, W), generator=generator)
        image = (40 + 85 * mask + noise).clamp(0, 255).to(torch.uint8)
        mask[:2, :2] = 255
        return image, mask


SIZES = [(40, 56), (40, 56), (33, 47), (40, 56), (24, 70)]


class Brightness(nn.Module):
    """Logits of each pixel's own colour: what a picture's other pixels are changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.norm = nn.BatchNorm2d(3).eval()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        level = self.norm(self.drop(images)).mean(1, keepdim=True)
        return {"out": torch.cat([-(level - centre).square() for centre in (-1, 0.2, 1.5)], 1)}


class Placed(Brightness):
    """The same, but a pixel's place in what the network sees counts too."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        logits = super().forward(images)["out"]
        ramp = torch.linspace(0, 4, images.shape[-1])
        return {"out": logits + ramp * torch.tensor([1.0, 0, -1])[:, None, None]}


def images(size: tuple[int, int] = (40, 56), *, flat: bool = False) -> Tensor:
    """Two pictures; flat ones have one colour each, so that no resize changes them."""
    if flat:
        return torch.tensor([0.7, -0.4])[:, None, None, None].expand(2, 3, *size)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


WAYS = {
    "flip": {"flip": True},
    "windows": {"window": (16, 24)},
    "windows apart": {"window": (16, 24), "overlap": 0.0},
    "windows all but on each other": {"window": (30, 30), "overlap": 0.97},
    "window as large": {"window": (40, 56)},
    "window higher": {"window": (64, 20)},
    "window larger": {"window": (64, 80)},
    "all": {"window": (16, 24), "flip": True},
}
SCALED = {
    "scales": {"scales": (0.5, 1.0, 1.75)},
    "scales and flip": {"scales": (0.75, 1.25), "flip": True},
    "all": {"scales": (0.3, 1.0, 1.3), "flip": True, "window": (16, 24)},
}
# In one window as large as the picture every pixel has the place that it has in the picture.
OTHERWISE = {**WAYS, **{f"{name}, scaled": way for name, way in SCALED.items()}}
del OTHERWISE["window as large"]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_gives_one_answer(way):
    model = Brightness().eval()
    whole, found = predict(model, images()), predict(model, images(), EvaluateSection(**way))
    # the float32 sum of 297 windows
    assert_close64(found.double(), whole.double(), relative=1e-5)


@pytest.mark.parametrize("way", SCALED.values(), ids=SCALED)
def test_every_size_gives_one_answer(way):
    model, given = Brightness().eval(), images(flat=True)
    whole, found = predict(model, given), predict(model, given, EvaluateSection(**way))
    assert_close64(found.double(), whole.double(), relative=1e-6)


@pytest.mark.parametrize("way", OTHERWISE.values(), ids=OTHERWISE)
def test_a_network_that_looks_at_places_answers_otherwise(way):
    model, given = Placed().eval(), images(flat=True)
    whole, found = predict(model, given), predict(model, given, EvaluateSection(**way))
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(found.double(), whole.double(), relative=1e-3)


def test_probabilities_are_averaged_and_add_up():
    model, given = Placed().eval(), images()
    found = predict(model, given, EvaluateSection(flip=True))
    mirrored = predict(model, given.flip(-1)).flip(-1)
    assert_close64(found.double(), (predict(model, given) + mirrored).double() / 2, relative=1e-6)
    assert_close64(found.sum(1).double(), torch.ones(2, 40, 56).double(), relative=1e-6)
    logits = [model(given)["out"], model(given.flip(-1))["out"].flip(-1)]
    with pytest.raises(AssertionError, match=DIFFERS):  # not the logits
        averaged = ((logits[0] + logits[1]) / 2).softmax(1)
        assert_close64(found.double(), averaged.double(), relative=1e-3)


def test_small_logits_grow_to_the_picture():
    coarse = nn.Conv2d(3, 4, 3, stride=4, padding=1)
    found = predict(coarse, images((41, 57)))
    truth = nn.functional.interpolate(coarse(images((41, 57))), (41, 57), mode="bilinear")
    assert_close64(found.double(), truth.softmax(1).double(), relative=1e-6)


@pytest.mark.parametrize("length", [1, 5, 16, 17, 40, 101])
@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 0.99])
def test_windows_cover_everything_and_stay_inside(length, overlap):
    places = _places(length, 16, overlap)
    seen = torch.zeros(max(length, 16), dtype=torch.int64)
    for place in places:
        assert place + 16 <= len(seen)
        seen[place : place + 16] += 1
    assert seen.min() > 0
    assert sorted(set(places)) == places
    steps = [after - before for before, after in pairwise(places)]
    assert all(step <= max(1, int(16 * (1 - overlap))) for step in steps)


def test_pictures_are_normalised():
    found = normalized(torch.tensor([[[255]], [[102]], [[0]]], dtype=torch.uint8), MEAN, STD)
    truth = torch.tensor([0.5 / 0.2, 0.0, -0.3 / 0.3], dtype=torch.float64)[:, None, None]
    assert_close64(found.double(), truth, relative=1e-6)


def measured(split: Drawn, *, section: EvaluateSection | None = None, **options) -> Scores:
    given = {"mean": MEAN, "std": STD, "device": "cpu", **options}
    return evaluate(Brightness().eval(), split, section or EvaluateSection(), **given)


def test_evaluate_counts_every_picture_once_in_order():
    split = Drawn(SIZES)
    found = measured(split)
    assert sorted(split.reads) == list(range(len(SIZES)))
    assert found.pictures == tuple(f"picture {i}" for i in range(len(SIZES)))
    for index, tally in enumerate(found.tallies):
        image, mask = split.read(index)
        answer = predict(Brightness().eval(), normalized(image[None], MEAN, STD))[0].argmax(0)
        assert_equal(tally, count(answer, mask, classes=3).tally)
    assert 0.5 < found.miou < 0.999
    assert_equal(found.confusion.sum(1), found.tallies[:, 1].sum(0))


@pytest.mark.parametrize("batch", [2, 3, 50])
def test_batches_change_nothing(batch):
    seen: list[int] = []

    class Listening(Brightness):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    given = {"mean": MEAN, "std": STD, "device": "cpu"}
    found = evaluate(Listening().eval(), Drawn(SIZES), EvaluateSection(), batch=batch, **given)
    assert_equal(found.tallies, measured(Drawn(SIZES)).tallies)
    assert seen == [2, 1, 1, 1]  # only neighbours of one size go together


def test_the_section_decides_what_is_counted():
    found = measured(Drawn(SIZES))
    for other in ({"band": 3}, {"boundary": 0.1}):
        section = EvaluateSection(**other)
        with pytest.raises(AssertionError, match="differ by"):
            assert_equal(measured(Drawn(SIZES), section=section).tallies, found.tallies)


def test_progress_is_told():
    told: list[tuple[int, int]] = []
    measured(Drawn(SIZES), progress=lambda done, all: told.append((done, all)))
    assert told == [(i, 5) for i in range(1, 6)]


def test_modes_are_left_as_they_were():
    model = Brightness().train()
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"mean": MEAN, "std": STD, "device": "cpu"}
    first = evaluate(model, Drawn(SIZES), EvaluateSection(), **given)
    assert [m.training for m in model.modules()] == [True, True, False]
    assert_equal(first.tallies, measured(Drawn(SIZES)).tallies)  # dropout off
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, before[name])


def test_modes_are_restored_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Dropout()).train()
    with pytest.raises(TrainingError) as raised:
        evaluate(model, Drawn(SIZES), EvaluateSection(), mean=MEAN, std=STD, device="cpu")
    assert str(raised.value) == (
        "the network tells 5 classes apart, the data has 3. Give the model as many: "
        "model.args.num_classes."
    )
    assert model[1].training


def test_an_answer_that_is_not_finite_is_refused():
    model = nn.Conv2d(3, 3, 1)
    nn.init.constant_(model.bias, torch.nan)
    with pytest.raises(TrainingError) as raised:
        evaluate(model, Drawn(SIZES), EvaluateSection(), mean=MEAN, std=STD, device="cpu")
    assert str(raised.value) == (
        "the network's answer to 'picture 0' is not finite: its weights or its inputs are damaged. "
        "Try precision: fp32, or an earlier checkpoint."
    )


class Half:
    """What `evaluate` asks of an accelerator, in bfloat16."""

    process_index, num_processes = 0, 1

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model.inside

    def autocast(self):
        return torch.autocast("cpu", torch.bfloat16)


def test_an_accelerator_decides_the_precision_and_is_unwrapped():
    seen: list[torch.dtype] = []

    class Listening(nn.Conv2d):
        def forward(self, images):
            logits = super().forward(images)
            seen.append(logits.dtype)
            return logits

    model = nn.Module()  # cannot be called itself
    model.inside = Listening(3, 3, 1)
    given = {"mean": MEAN, "std": STD, "device": "cpu"}
    evaluate(model, Drawn(SIZES[:2]), EvaluateSection(), accelerator=Half(), **given)
    evaluate(model.inside, Drawn(SIZES[:1]), EvaluateSection(), **given)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_a_fault_in_reading_comes_through():
    class Broken(Drawn):
        def read(self, index):
            if index == 3:
                raise OSError("picture 3 is gone")
            return super().read(index)

    with pytest.raises(OSError, match="picture 3 is gone"):
        measured(Broken(SIZES))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("number", [0, 1, 5, 101])
def test_shares_are_a_partition(number, world):
    shares = [share(number, rank, world) for rank in range(world)]
    assert sorted(index for mine in shares for index in mine) == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


WORKER = """
import sys
from pathlib import Path
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from test_train_infer import *

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = accelerator.prepare(nn.Sequential(Brightness(), Last()).train())
assert isinstance(model, DistributedDataParallel)
split = Drawn(SIZES)
scores = evaluate(
    model, split, EvaluateSection(), mean=MEAN, std=STD, device="cpu", accelerator=accelerator
)
assert all(module.training for module in model.module.modules() if not isinstance(module, Frozen))
scores.write(Path(sys.argv[1]) / f"{accelerator.process_index}.scores")
Path(sys.argv[1], f"{accelerator.process_index}.reads").write_text(repr(sorted(split.reads)))
accelerator.end_training()
"""

Frozen = nn.BatchNorm2d


class Last(nn.Module):
    """A parameter, without which there is nothing to wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, given: dict[str, Tensor]) -> Tensor:
        return given["out"] * self.scale


def test_two_processes_share_the_pictures_and_agree(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    fresh.run_pair("-c", WORKER, str(tmp_path))
    alone = measured(Drawn(SIZES))
    for rank in range(2):
        found = Scores.read(tmp_path / f"{rank}.scores")
        assert_equal(found.tallies, alone.tallies)
        assert_equal(found.confusion, alone.confusion)
        assert found.pictures == alone.pictures
    reads = [(tmp_path / f"{rank}.reads").read_text() for rank in range(2)]
    assert reads == ["[0, 2, 4]", "[1, 3]"]
