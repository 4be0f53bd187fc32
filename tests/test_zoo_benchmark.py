"""The machinery of benchmarks/zoo.py: each of its checks can fail, and no model gets lost."""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict, namedtuple

import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo_checks import CHECKS, SWAP, Subject, check, checks, difference
from zoo_models import (
    Example,
    Model,
    built,
    convolutions,
    cuts_patches,
    fitting_example,
    seeing,
    settle,
)
from zoo_reach import NOT_LISTED, Reach, general, groups, reached, spread
from zoo_swap import Options, examine, swap_checks
from zoo_table import table
from zoo_work import work
from zoo_workers import worked

import pacswap

MODEL = Model("timm", "test_resnet")
GUIDANCE = {"layer1.0.conv2": "conv1.0", "layer3.0.conv2": "conv1.0"}


@pytest.fixture(scope="module")
def made() -> Subject:
    network = built(MODEL)
    example = fitting_example(MODEL, network)
    settle(network, example)
    upgraded = pacswap.swap(network.eval(), groups=groups(GUIDANCE), example_input=example.shown)
    return Subject(network, upgraded, tuple(GUIDANCE), example)


@pytest.fixture
def subject(made) -> Subject:
    return Subject(*copy.deepcopy((made.original, made.upgraded)), made.layers, made.example)


def test_all_checks_pass(subject):
    before = copy.deepcopy(subject.upgraded.state_dict())
    assert [found for found in checks(subject) if not found.passed] == []
    assert difference(before, subject.upgraded.state_dict()) == 0  # each leaves it as it was


class Tampering:
    """Ways to break one network of a subject, by the check that has to see it."""

    def blend(self, subject: Subject) -> None:
        self.layer(subject).blend.data.fill_(0.5)

    def statistics(self, subject: Subject) -> None:
        subject.upgraded.bn1.momentum = 0.7

    def deaf(self, subject: Subject) -> None:
        self.layer(subject).blend.requires_grad_(False)

    def unswapped(self, subject: Subject) -> None:
        subject.upgraded.layer3[0].conv2 = nn.Conv2d(64, 64, 3)

    def another(self, subject: Subject) -> None:
        subject.upgraded.layer1[0].conv1 = nn.Identity()

    def value(self, subject: Subject) -> None:
        self.layer(subject).weight.data.add_(1)

    def tensor(self, subject: Subject) -> None:
        subject.upgraded.register_buffer("more", torch.zeros(1))

    def other_class(self, subject: Subject) -> None:
        kind = type(subject.original)
        subject.original.__class__ = type("Other", (kind,), {})

    def attribute(self, subject: Subject) -> None:
        subject.original.only_here = 1

    def constant(self, subject: Subject) -> None:
        subject.original.conv1[0].weight.data.zero_()
        subject.upgraded.conv1[0].weight.data.zero_()

    def unpicklable(self, subject: Subject) -> None:
        subject.upgraded.function = lambda: None

    def uncopyable(self, subject: Subject) -> None:
        subject.upgraded.generator = (number for number in range(1))

    def hooked(self, subject: Subject) -> None:
        """A file of weights does not have it."""
        subject.upgraded.register_forward_hook(lambda module, args, output: output * 2)

    def layer(self, subject: Subject) -> nn.Module:
        return subject.upgraded.get_submodule(subject.layers[0])


TAMPERED = {
    "same output in eval mode": [Tampering.blend, Tampering.hooked],
    "same output in train mode": [Tampering.blend, Tampering.statistics],
    "every swapped layer learns": [Tampering.deaf],
    "the named layers are swapped": [Tampering.unswapped, Tampering.another],
    "state_dict keys and values kept": [Tampering.value],
    "the original checkpoint loads": [Tampering.tensor],
    "the class is kept": [Tampering.other_class],
    "attributes and methods are kept": [Tampering.attribute],
    "revert gives the original back": [Tampering.value, Tampering.tensor, Tampering.other_class],
    "output moves with the blends": [Tampering.constant],
    "torch.save and torch.load": [Tampering.unpicklable],
    "copy.deepcopy": [Tampering.uncopyable],
    "pacswap.save and pacswap.load": [Tampering.hooked],
}


@pytest.mark.parametrize(
    ("name", "tamper"),
    [(name, tamper) for name, tampers in TAMPERED.items() for tamper in tampers],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_check_can_fail(subject, name, tamper):
    tamper(Tampering(), subject)
    found = check(name, subject)
    assert found.passed is False
    assert found.figure


def test_every_check_has_a_twin_that_fails():
    assert list(TAMPERED) == list(CHECKS)


def test_a_swap_that_is_refused_is_a_failed_check(subject):
    (found,) = swap_checks(subject.original, {"layer9": "conv1.0"}, subject.example)
    assert found[:2] == (SWAP, False)
    assert found.figure.startswith("PlanError: cannot upgrade ResNet: layers: 'layer9'")


def test_a_network_that_cannot_be_identified(subject):
    del vars(subject.original)["_pacswap_source"]
    subject.original.fc = nn.Sequential(nn.Linear(96, 7), nn.ReLU())
    assert check("pacswap.save and pacswap.load", subject).passed is None


Pair = namedtuple("Pair", "a b")
ONE = torch.tensor([1.0, -4.0])
DIFFERENCES = {
    "same": ([ONE, 1, None], [ONE.clone(), 1, None], 0.0),
    "value": ({"a": ONE}, {"a": ONE + torch.tensor([1.0, 0.0])}, 0.25),
    "the worst": (Pair(ONE, ONE), Pair(ONE, ONE * 2), 1.0),
    "dtype": (ONE, ONE.double(), math.inf),
    "shape": (ONE, ONE[:1], math.inf),
    "NaN": (ONE * math.nan, ONE * math.nan, math.inf),
    "empty": (ONE[:0], ONE[:0], 0.0),
    "length": ((ONE,), (ONE, ONE), math.inf),
    "container": ((ONE, ONE), Pair(ONE, ONE), math.inf),
    "order": ({"a": ONE, "b": ONE}, {"b": ONE, "a": ONE}, math.inf),
    "ordered": (OrderedDict(a=ONE), {"a": ONE}, math.inf),
    "no tensor": ({"a": 1}, {"a": 2}, math.inf),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_difference(case):
    before, after, wanted = DIFFERENCES[case]
    assert difference(before, after) == wanted


class Conv2dSame(nn.Conv2d):
    """Named as timm's, which pads when it runs."""


@pytest.mark.parametrize(
    ("conv", "cuts"),
    [
        (nn.Conv2d(1, 1, 4, 4), True),
        (nn.Conv2d(1, 1, 4, 4, padding=1), False),
        (nn.Conv2d(1, 1, 4, 2), False),
        (nn.Conv2d(1, 1, 3, padding="same"), False),
        (nn.Conv2d(1, 1, 4, 4, padding="valid"), True),
        (nn.Conv3d(1, 1, (1, 2, 2), (1, 2, 2)), True),
        (Conv2dSame(1, 1, 2, 2), False),
    ],
    ids=["patches", "padded", "overlapping", "same", "valid", "clips", "timm's"],
)
def test_what_cuts_patches(conv, cuts):
    assert cuts_patches(conv) is cuts
    assert list(convolutions(nn.Sequential(conv, nn.Conv2d(1, 1, 1)))) == ["0"] * (not cuts)


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Mixed(nn.Module):
    """Some that can be swapped, one of a class of its own, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(3, 4, 3)
        self.stem = nn.Conv2d(3, 4, 3)
        self.own = Own(4, 4, 3)
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.stem(x) + self.right(self.own(self.stem(x)))[..., :1, :1]


def test_reach():
    found = reached(Model("torchvision", "resnet18"), Mixed())
    assert found.guidance == {"left": "input", "stem": "left", "right": "left"}
    assert found.refused.keys() == {"own", "unused"}
    assert found.refused["unused"] == "cannot swap 'LAYER': it never runs when the model does."
    assert "Own" in found.refused["own"]
    assert found.row()["reachable"] == 3
    assert found.row()["by_image"] == 1
    assert found.spread() == {"stem": "left", "right": "left"}
    assert NOT_LISTED not in found.refused.values()


def test_nothing_is_closed():
    """ConvNeXt scales its blocks by 1e-6, norms have biases of 0."""
    network = built(Model("timm", "test_convnext"))
    assert network.stages[1].blocks[0].gamma.min() == 0.5
    assert network.stages[1].blocks[0].norm.bias.std() > 0.01
    again = built(Model("timm", "test_convnext"))
    assert difference(network.state_dict(), again.state_dict()) == 0


class Dilated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = (nn.Conv2d(3, 3, 3, padding=d, dilation=d) for d in (1, 8))
        self.pooled = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.far(self.near(x)) + self.pooled(x.mean((2, 3), keepdim=True))


def test_a_window_on_one_pixel_is_not_swapped():
    images = (torch.rand(2, 3, 8, 8),)
    seen = seeing(Dilated(), Example(images, images, ""))
    assert seen == {"near"}
    found = Reach({}, {"near": "input", "far": "near", "pooled": "near"})
    assert found.spread(seen) == {"near": "input"}
    assert list(found.spread()) == ["far", "pooled"]
    assert list(found.spread(set())) == ["far", "pooled"]


def test_spread():
    assert spread([*"abcdefg"]) == ["a", "d", "g"]
    assert spread(["a", "b"]) == ["a", "b"]
    assert spread([]) == []


def test_reasons_without_names():
    said = "cannot upgrade ResNet: 'a.b' runs late,\n shape (1, 2). Earlier: 'a', 'c'. See 'd'."
    wanted = (
        "cannot upgrade the network: 'LAYER' runs late, shape SIZE. Earlier: 'LAYER', …. See 'd'."
    )
    assert general(said, {"a", "a.b", "c"}) == wanted


def test_what_dies_or_sleeps_has_a_row():
    tasks = ["sleeps", "dies", "fails", "lives"]
    found = dict(worked(work, tasks, jobs=2, limit=5))
    assert {row["first"] for row in found.values()} == set(tasks)
    assert found["sleeps"]["failure"] == "it took more than 5 s"
    assert found["dies"]["failure"] == "its process died with exit code 9"
    assert found["fails"]["failure"] == "ValueError: in words"
    assert set(found["lives"]) == {"first", "second"}


def test_an_error_is_a_part_of_the_row():
    parts = list(examine(Model("timm", "resnet19"), Options()))
    assert [list(part) for part in parts] == [["failure"], ["seconds"]]
    assert "resnet19" in parts[0]["failure"]


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    given = []

    def pretend(work, tasks, **options):
        given.extend(tasks)
        return ((task, {"convolutions": 0, "reachable": 0}) for task in tasks)

    monkeypatch.setattr(zoo, "worked", pretend)
    out = tmp_path / "zoo.jsonl"
    zoo.main(["--run", str(out), "--models", "resnet18", "--library", "timm"])
    out.write_text(out.read_text() + '{"library": "timm", "na')  # killed while it wrote
    zoo.main(["--run", str(out), "--models", "resnet18", "resnet34", "--library", "timm"])
    assert given == [Model("timm", "resnet18"), Model("timm", "resnet34")]
    assert "1/1 timm resnet34: 0 of 0 reachable; 0 min left" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="nothing to do"):
        zoo.main(["--run", str(out), "--models", "resnet34", "--library", "timm"])


def line(name: str, **parts: object) -> dict[str, object]:
    made = {"library": "timm", "name": name, "family": "timm f"}
    return made | {"options": vars(Options()), "versions": {"torch": "9"}} | parts


REASON = {"reason": "it is | so", "count": 2, "example": "a.b"}
ROWS = [
    line("dead", failure="it took more than 5 s"),
    line("none", convolutions=0, reachable=0, refused=[]),
    line("reached", convolutions=5, reachable=3, refused=[REASON], swap={"skipped": "too large"}),
    line("broken", convolutions=9, reachable=9, refused=[], swap={"layers": {"a": "b"},
         "checks": [[SWAP, True, ""], *([name, name != "the class is kept", "figure"]
                                        for name in CHECKS)]}),
    line("stopped", convolutions=1, reachable=1, refused=[], swap={"layers": {"a": "b"},
         "checks": [[SWAP, False, "PlanError: no"]]}),
]  # fmt: skip


def test_the_table(tmp_path, capsys):
    out = tmp_path / "zoo.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in [line("dead"), *ROWS]))
    zoo.main(["--table", str(out)])
    page = capsys.readouterr().out
    assert page == table(ROWS, "zoo.jsonl")
    assert "Examined so far: 5 of the" in page
    assert "1 of\nthem have no convolution to swap" in page
    assert "| timm f | 4 (1 failed) | 15 | 13 | 1 of 2 | 1 | 1/1 | 1/1 | 0/1 | 2: [1] |" in page
    assert "1. 2 in 1 models, such as `a.b` of timm reached: it is | so" in page
    assert "- timm broken, the class is kept: figure" in page
    assert "- timm stopped, pacswap.swap: PlanError: no" in page
    assert "- timm dead: it took more than 5 s" in page
    assert "- 1 models: too large" in page
    zoo.main(["--refusals", str(out)])
    assert json.loads(capsys.readouterr().out) == {"timm reached": {"it is | so": 2}}
