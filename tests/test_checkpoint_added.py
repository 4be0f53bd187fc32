"""Directories of what was added come back to the last bit, on the base that they belong to."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import fresh
import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from same import Untouched, assert_bits
from torch import Tensor, nn

import pacswap
from pacswap.errors import CheckpointError, WeightsError
from pacswap.recipes import load_recipe
from pacswap.surgery.base import base_of
from pacswap.zoo import Source, build

SHIPPED = Source("pacswap", "scene_net", "DEFAULT")
ADDED = {"added.safetensors", "recipe.yaml"}
ONLY_ADDED = ("blend", "adapting_kernel", "guidance.")
UNKNOWN = (
    "'m' holds only what was added to a {}, and does not say where that network's weights are. "
    "Give the network that was upgraded: pacswap.load(folder, base=network)."
)


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def shipped() -> nn.Module:
    return build(SHIPPED)


def images() -> Tensor:
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def upgraded(net: nn.Module) -> nn.Module:
    layers = ["layer3.1.conv2", "head.conv"]
    guidance = {"from": "layer1", "channels": 4}
    example = images()[:1].to(next(net.parameters()).dtype)
    return pacswap.swap(net, layers, guidance, example_input=example).eval()


def train_(model: nn.Module, names: tuple[str, ...] = ONLY_ADDED, *, norms: str = "none") -> None:
    """Two real steps of the parameters that these words are in; `norms` that train beside."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in names))
    model.eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and norms in name:
            module.train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=0.1)
    like = next(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        output = model(images().to(like))
        output.float().square().mean().backward()
        optimizer.step()
    model.eval()


def stored(folder: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(Path(folder) / "added.safetensors")


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    assert type(ours) is type(theirs)
    assert not theirs.training
    assert_bits(ours.state_dict(), theirs.state_dict())
    like = next(ours.parameters())
    with torch.inference_mode():
        assert torch.equal(ours(images().to(like)), theirs(images().to(like)))


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as raised:
        function(*args, **kwargs)
    return str(raised.value)


# What is trained, which norms move, and what besides the added tensors is in the file then.
TRAININGS = {
    "nothing": ((), "none", set()),
    "what was added": (ONLY_ADDED, "none", set()),
    "and a norm moves": (
        ONLY_ADDED,
        "head.bn",
        {"head.bn.running_mean", "head.bn.running_var", "head.bn.num_batches_tracked"},
    ),
    "and the classifier": (
        (*ONLY_ADDED, "head.classifier"),
        "none",
        {"head.classifier.weight", "head.classifier.bias"},
    ),
}


@pytest.mark.parametrize("given", [False, True], ids=["its weights", "base="])
@pytest.mark.parametrize("case", TRAININGS)
def test_round_trip(case, given, shipped):
    names, norms, others = TRAININGS[case]
    model = upgraded(shipped)
    if names:
        train_(model, names, norms=norms)
    assert pacswap.save(model, "m", added_only=True) == Path("m")
    assert {path.name for path in Path("m").iterdir()} == ADDED
    assert set(stored("m")) == others | set(pacswap.surgery.plan_of(model).added_parameters())
    base = Untouched(shipped)
    loaded = pacswap.load("m", base=shipped if given else None)
    base.check()
    assert_same(model, loaded)
    assert Path("m/added.safetensors").stat().st_size < 12_000


def test_all_trained(shipped):
    model = upgraded(shipped)
    train_(model, ("",), norms="")
    pacswap.save(model, "m", added_only=True)
    assert set(stored("m")) == set(model.state_dict())
    assert_same(model, pacswap.load("m", base=shipped))
    assert_same(model, pacswap.load("m", base=build(Source("pacswap", "scene_net"))))


def test_a_difference_is_seen(shipped):
    """Twin of the round trips: the comparison compares something."""
    model = upgraded(shipped)
    pacswap.save(model, "m", added_only=True)
    train_(model)
    with pytest.raises(AssertionError, match="differs"):
        assert_same(model, pacswap.load("m"))


class Foreign(nn.Module):
    """A network that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1))
        self.c = nn.Conv2d(6, 6, 3, padding=1)
        self.c.weight = self.a_twin = nn.Parameter(torch.randn(6, 6, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


# What is built, the layer, its guidance, and its name in the message.
BASES = {
    "a network of nobody": (Foreign, "b.1", "a", f"{__name__}:Foreign"),
    "timm": (lambda: timm.create_model("resnet18"), "layer4.1.conv2", "layer1", "resnet18.a1_in1k"),
    "torchvision": (
        lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=4
        ),
        "backbone.15.block.1.0",
        "backbone.3",
        "lraspp_mobilenet_v3_large",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_weights_of_the_users_own(case):
    make, layers, guidance, name = BASES[case]
    net = make().eval()
    model = pacswap.swap(net, layers, guidance, example_input=images()).eval()
    with torch.no_grad():
        for layer in pacswap.surgery.pac_layers(model).values():
            layer.blend.fill_(0.5)
    pacswap.save(model, "m", added_only=True)
    assert load_recipe("m/recipe.yaml").recipe.model.weights is None
    assert error_of(pacswap.load, "m") == UNKNOWN.format(name)
    assert_bits(model.state_dict(), pacswap.load("m", base=net).state_dict())
    assert (Path("m/added.safetensors").stat().st_size) < 50_000


def test_tied_weights_are_stored_once():
    net = Foreign()
    model = pacswap.swap(net, "b.1", "a", example_input=images())
    before = len(model.state_dict())
    with torch.no_grad():
        model.a_twin.add_(1)
    pacswap.save(model, "m", added_only=True)
    assert "c.weight" not in stored("m")
    assert torch.equal(stored("m")["a_twin"], model.c.weight)
    loaded = pacswap.load("m", base=net)
    assert loaded.a_twin is loaded.c.weight
    assert_same(model.eval(), loaded)
    assert len(loaded.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_precision(dtype):
    net = build(SHIPPED).to(dtype)
    model = upgraded(net)
    train_(model)
    pacswap.save(model, "m", added_only=True)
    assert len(stored("m")) == 5
    assert_same(model, pacswap.load("m", base=net))
    assert error_of(pacswap.load, "m") == UNKNOWN.format("scene_net")


def test_precision_changed_after_the_swap(shipped):
    model = upgraded(shipped).half()
    pacswap.save(model, "m", added_only=True)
    assert len(stored("m")) > 80  # each number is another one now: only the counters are as before
    assert_same(model, pacswap.load("m", base=shipped))


def test_copies_and_pickles_know_their_base(shipped):
    model = upgraded(shipped)
    known = base_of(model)
    assert set(known) == set(shipped.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert base_of(other) == known
    assert base_of(pacswap.revert(model)) is None


def test_a_loaded_model_is_saved_again(shipped):
    model = upgraded(shipped)
    pacswap.save(model, "1", added_only=True)
    loaded = pacswap.load("1")
    train_(loaded)
    pacswap.save(loaded, "2", added_only=True)
    assert set(stored("2")) == set(stored("1"))
    assert_same(loaded, pacswap.load("2"))


def test_a_whole_model_becomes_a_small_one():
    pacswap.apply("quickstart", output="whole")
    model = pacswap.load("whole")
    train_(model)
    pacswap.save(model, "small", added_only=True)
    assert Path("small/added.safetensors").stat().st_size < 12_000
    assert_same(model, pacswap.load("small"))
    pacswap.save(model, "whole", overwrite=True, added_only=True)  # in the place of the whole one
    assert {path.name for path in Path("whole").iterdir()} == ADDED


def test_a_checkpoint_of_before_the_swap_is_the_base_from_then_on(shipped):
    other = build(Source("pacswap", "scene_net"))
    model = upgraded(shipped)
    model.load_state_dict(other.state_dict())
    pacswap.save(model, "m", added_only=True)
    assert len(stored("m")) == 5
    assert error_of(pacswap.load, "m") == UNKNOWN.format("scene_net")  # no longer the shipped ones
    assert_same(model, pacswap.load("m", base=other))
    assert error_of(pacswap.load, "m", base=shipped).startswith(
        "'m' belongs to another base: this SceneNet is not what was upgraded, "
    )


def test_a_checkpoint_of_after_the_swap_is_no_base(shipped):
    model = upgraded(shipped)
    trained = upgraded(shipped)
    train_(trained, ("layer2",))
    known = base_of(model)
    model.load_state_dict(trained.state_dict())
    partial = {"stem.conv.weight": torch.zeros(24, 3, 3, 3)}
    model.load_state_dict(partial, strict=False)
    assert base_of(model) == known
    pacswap.save(model, "m", added_only=True)
    assert_same(model, pacswap.load("m"))


def test_what_the_library_draws_anew_is_in_the_file():
    source = Source("pacswap", "scene_net", "DEFAULT", {}, 4)
    torch.manual_seed(3)
    model = upgraded(build(source))
    torch.manual_seed(3)
    pacswap.save(model, "m", added_only=True)
    assert {n for n in stored("m") if "classifier" in n} == {
        "head.classifier.weight", "head.classifier.bias"
    }  # fmt: skip
    assert_same(model, pacswap.load("m"))


def test_what_was_trained_before_the_swap_is_in_the_file():
    net = build(SHIPPED)
    with torch.no_grad():
        net.head.classifier.bias.add_(1)
    model = upgraded(net)
    pacswap.save(model, "m", added_only=True)
    assert "head.classifier.bias" in stored("m")
    assert_same(model, pacswap.load("m"))


def test_weights_of_a_file():
    net = build(Source("pacswap", "scene_net"))
    safetensors.torch.save_model(net, "mine.safetensors")
    model = upgraded(build(Source("pacswap", "scene_net", "mine.safetensors")))
    train_(model)
    pacswap.save(model, "deep/m", added_only=True)
    weights = load_recipe("deep/m/recipe.yaml").recipe.model.weights
    assert weights == str(Path("mine.safetensors").resolve())
    assert_same(model, pacswap.load("deep/m"))
    Path("mine.safetensors").unlink()
    assert error_of(pacswap.load, "deep/m") == (
        "'deep/m' holds only what was added, and the base cannot be built: no weights file "
        f"'{weights}'. Paths in a recipe start at the recipe's folder; set model.weights to an "
        "existing file, a tag, or null for random weights. Or give the network that was upgraded: "
        "pacswap.load(folder, base=network)."
    )
    assert_same(model, pacswap.load("deep/m", base=net))


def test_weights_that_the_user_names():
    net = build(Source("pacswap", "scene_net"))
    safetensors.torch.save_model(net, "mine.safetensors")
    model = upgraded(net)
    source = {"library": "pacswap", "name": "scene_net", "weights": "mine.safetensors"}
    pacswap.save(model, "m", added_only=True, source=source)
    assert_same(model, pacswap.load("m"))
    wrong = {**source, "weights": "DEFAULT"}
    assert error_of(pacswap.save, model, "n", added_only=True, source=wrong) == (
        "source: no tensor of the network that was upgraded is that of weights 'DEFAULT'. Name "
        "the weights that it was built with, or leave them out and give load the network as base=."
    )
    with pytest.raises(WeightsError, match=r"^no weights file '.*none\.pth'"):
        gone = {**source, "weights": "none.pth"}
        pacswap.save(model, "n", added_only=True, source=gone)
    assert not Path("n").exists()


def test_no_values_no_digests(shipped):
    model = upgraded(copy.deepcopy(shipped).to("meta"))
    message = (
        "this SceneNet does not know what its tensors were at the swap, so what was added cannot "
        "be told from them: they had no values then (the meta device), or it was loaded from a "
        "file that does not say. Save the whole model: added_only=False."
    )
    assert error_of(pacswap.save, model, "m", added_only=True) == message
    model.to_empty(device="cpu").load_state_dict(upgraded(shipped).state_dict())
    assert error_of(pacswap.save, model, "m", added_only=True) == message
    assert list(Path().iterdir()) == []


def test_two_processes(shipped):
    model = upgraded(shipped)
    train_(model, norms="head.bn")
    pacswap.save(model, "m", added_only=True)
    expected = {"images": images(), "logits": model(images()).detach()}
    safetensors.torch.save_file(expected, "expected.safetensors")
    code = (
        "import pacswap, safetensors.torch, torch\n"
        "expected = safetensors.torch.load_file('expected.safetensors')\n"
        "logits = pacswap.load('m')(expected['images'])\n"
        "print(torch.equal(logits, expected['logits']), torch.equal(logits, logits + 1e-3))\n"
    )
    run = fresh.run("-c", code)
    assert run.stdout.split() == ["True", "False"], run.stderr


def test_the_same_model_gives_the_same_files(shipped):
    model = upgraded(shipped)
    for added_only in (False, True):
        for name in ("a", "b"):
            pacswap.save(model, f"{name}{added_only}", added_only=added_only)
        files = [
            {p.name: p.read_bytes() for p in Path(f"{n}{added_only}").iterdir()} for n in ("a", "b")
        ]
        assert files[0] == files[1]
    with safetensors.safe_open("aTrue/added.safetensors", "pt") as file:
        notes = json.loads(file.metadata()["pacswap"])
    assert notes["version"] == 1
    assert notes["base"] == base_of(model)
