"""Model directories: what is saved comes back to the last bit, what is damaged is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import fresh
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pacswap
from pacswap.errors import CheckpointError, ModelError, PlanError, RecipeError
from pacswap.surgery import pac_layers, plan_of
from pacswap.zoo import Source, build

SEGMENTATION = torchvision.models.segmentation
PLAIN = {"weights": None, "weights_backbone": None}
LIVE = {"zero_init_last": False}  # a block scaled by 0 has no gradient inside


def scene_net(channels: int = 4, **args: int) -> nn.Module:
    """The quickstart's network, upgraded: the smallest thing that can be saved."""
    net = build(Source("pacswap", "scene_net", None, args))
    return pacswap.swap(net, "head.conv", {"from": "layer1", "channels": channels})


# What is built, what is swapped, by what it is guided.
NETWORKS = {
    "timm resnet18": (lambda: timm.create_model("resnet18", **LIVE), "layer4.*.conv2", "layer1"),
    "timm of another tag and head": (
        lambda: timm.create_model("resnet18.tv_in1k", num_classes=7, **LIVE),
        "layer4.1.conv2",
        {"from": ["layer1", "layer2"], "channels": 4},
    ),
    "timm features at stride 8": (
        lambda: timm.create_model("mobilenetv2_100", features_only=True, output_stride=8),
        "blocks.5.*.conv_dw",
        "blocks.1",
    ),
    "torchvision fcn with an auxiliary head": (
        lambda: SEGMENTATION.fcn_resnet50(num_classes=5, aux_loss=True, **PLAIN),
        ["backbone.layer4.2.conv2", "aux_classifier.0"],
        {"from": "backbone.layer1", "channels": 4},
    ),
    "torchvision lraspp": (
        lambda: SEGMENTATION.lraspp_mobilenet_v3_large(num_classes=4, **PLAIN),
        "backbone.15.block.1.0",
        "backbone.3",
    ),
    "torchvision squeezenet": (
        lambda: torchvision.models.squeezenet1_1(num_classes=9),
        "features.12.expand3x3",
        "features.2",
    ),
    "quickstart": (lambda: build(Source("pacswap", "scene_net", "DEFAULT")), "head.conv", "layer1"),
}


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 48, 48, generator=generator).to(dtype)


def train_a_step_(model: nn.Module) -> None:
    """Move every parameter that has a gradient, and the running statistics."""
    model.train()
    outputs = pytree.tree_leaves(model(images()))
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad / (parameter.grad.abs().max() + 1e-9), alpha=0.1)
    model.zero_grad()
    model.eval()


def assert_same(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """The same class, the same tensors, the same outputs, to the last bit."""
    assert type(ours) is type(theirs)
    states = ours.state_dict(), theirs.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype, name
        assert torch.equal(tensor, states[1][name]), name
    with torch.inference_mode():
        outputs = [pytree.tree_leaves(model(images(dtype))) for model in (ours, theirs)]
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def error_of(error: type[Exception], function, *args, **kwargs) -> str:
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    return str(raised.value)


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A saved model that no test may change."""
    return pacswap.save(scene_net(), tmp_path_factory.mktemp("kept") / "model")


@pytest.fixture
def saved(kept, in_a_folder):
    """A copy of it to be damaged, in the working directory."""
    shutil.copytree(kept, "model")
    return Path("model")


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(name, tmp_path):
    make, layers, guidance = NETWORKS[name]
    torch.manual_seed(0)
    upgraded = pacswap.swap(make(), layers, guidance, example_input=images())
    train_a_step_(upgraded)
    assert all(layer.blend != 0 for layer in pac_layers(upgraded).values())
    loaded = pacswap.load(pacswap.save(upgraded, tmp_path / "model"))
    assert not loaded.training
    assert_same(upgraded, loaded)
    assert plan_of(loaded) == plan_of(upgraded)
    assert getattr(loaded, "pretrained_cfg", 0) == getattr(upgraded, "pretrained_cfg", 0)


def test_a_difference_is_seen(kept):
    ours, theirs = pacswap.load(kept), pacswap.load(kept)
    assert_same(ours, theirs)
    with torch.no_grad():
        theirs.head.conv.blend.fill_(1e-3)
    with pytest.raises(AssertionError):
        assert_same(ours, theirs)


def test_a_fresh_process_needs_nothing_of_ours(in_a_folder):
    upgraded = scene_net()
    train_a_step_(upgraded)
    pacswap.save(upgraded, "model")
    expected = {"images": images(), "logits": upgraded(images()).detach()}
    safetensors.torch.save_file(expected, "expected.safetensors")
    code = (
        "import pacswap, safetensors.torch, torch\n"
        "expected = safetensors.torch.load_file('expected.safetensors')\n"
        "logits = pacswap.load('model')(expected['images'])\n"
        "print(torch.equal(logits, expected['logits']), torch.equal(logits, logits + 1e-3))\n"
    )
    run = fresh.run("-I", "-c", code)
    assert run.stdout.split() == ["True", "False"], run.stderr


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:]
)
def test_dtypes_are_kept(dtype, tmp_path):
    upgraded = scene_net().eval().to(dtype)
    assert_same(upgraded, pacswap.load(pacswap.save(upgraded, tmp_path / "model")), dtype)


def test_mixed_dtypes_are_kept(tmp_path):
    upgraded = scene_net().eval()
    upgraded.head.classifier.bfloat16()
    upgraded.layer3[0].bn1.double()
    loaded = pacswap.load(pacswap.save(upgraded, tmp_path / "model"))
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in upgraded.state_dict().items()
    }
    assert loaded.head.classifier.weight.dtype == torch.bfloat16


def test_tied_weights(tmp_path):
    net = build(Source("pacswap", "scene_net"))
    net.layer3[1].conv2.weight = net.layer3[1].conv1.weight
    upgraded = pacswap.swap(net, "layer3.1.conv2", "layer1").eval()
    folder = pacswap.save(upgraded, tmp_path / "model")
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert len(stored) == len(upgraded.state_dict()) - 1
    assert_same(upgraded, pacswap.load(folder))


def test_a_head_changed_after_the_network_was_built(tmp_path):
    upgraded = pacswap.swap(build(Source("timm", "resnet18")), "layer4.1.conv2", "layer1")
    upgraded.reset_classifier(5)
    assert_same(upgraded.eval(), pacswap.load(pacswap.save(upgraded, tmp_path / "model")))


class Foreign(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


FOREIGN = {"library": "python", "name": f"{__name__}:Foreign", "args": {"width": 6}}
UNKNOWN = (
    "cannot tell how this {} is built, so load could not rebuild it. Say it: pacswap.save(model, "
    'folder, source={{"library": "timm", "name": "resnet50", "args": {{"num_classes": 10}}}}); '
    "library is timm, torchvision or python (package.module:factory)."
)


def test_a_source_given(in_a_folder):
    upgraded = pacswap.swap(Foreign(6), "b", "a").eval()
    pacswap.save(upgraded, "model", source=FOREIGN)
    assert error_of(ModelError, pacswap.load, "model") == (
        f"library 'python' runs the code of '{__name__}:Foreign'. If you trust it, say so: "
        "--trust-python on the command line, trust_python=True in Python."
    )
    assert_same(upgraded, pacswap.load("model", trust_python=True))


def test_a_network_of_nobody(in_a_folder):
    upgraded = pacswap.swap(Foreign(), "b", "a")
    assert error_of(CheckpointError, pacswap.save, upgraded, "m") == UNKNOWN.format("Foreign")
    changed = scene_net()
    changed.head.classifier = nn.Sequential(changed.head.classifier)
    assert error_of(CheckpointError, pacswap.save, changed, "m") == UNKNOWN.format("SceneNet")
    shared = build(Source("pacswap", "scene_net"))
    shared.layer3[1].conv1 = shared.layer3[1].conv2
    shared = pacswap.swap(shared, "layer3.1.conv1", "layer1")
    assert error_of(CheckpointError, pacswap.save, shared, "m") == UNKNOWN.format("SceneNet")
    assert list(in_a_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            {"library": "timm"},
            CheckpointError,
            "source: expected library, name and args, got {'library': 'timm'}.",
        ),
        (
            {"library": "keras", "name": "x"},
            ModelError,
            "library 'keras' is unknown. Known: 'timm', 'torchvision', 'python', 'pacswap'.",
        ),
        (
            {"library": "pacswap", "name": "scene_net", "args": {"num_classes": 2}},
            CheckpointError,
            "source builds another network than this SceneNet: the network is SceneNet() "
            "{'num_classes': 2} there and SceneNet() {'num_classes': 6} here. Mend its name or "
            "args (num_classes?).",
        ),
    ],
    ids=["incomplete", "unknown library", "another network"],
)
def test_a_wrong_source(source, error, message, in_a_folder):
    assert error_of(error, pacswap.save, scene_net(), "m", source=source) == message
    assert list(in_a_folder.iterdir()) == []


def test_a_plain_network_is_not_saved(tmp_path):
    plain = pacswap.revert(scene_net())
    assert error_of(PlanError, pacswap.save, plain, tmp_path / "m") == (
        "this SceneNet was not upgraded by pacswap: there is nothing to undo or save. Upgrade it "
        "first: pacswap.swap(model, layers=…, guidance=…)."
    )


def test_no_data_no_file(in_a_folder):
    message = error_of(CheckpointError, pacswap.save, scene_net().to("meta"), "m")
    assert message == (
        "the model's tensors cannot be stored as safetensors: Cannot copy out of meta tensor; no "
        "data!"
    )
    assert list(in_a_folder.iterdir()) == []


MISSING = "Name one that pacswap.save or pacswap apply -o wrote."
NOT_OURS = "exists and is not a model directory; it is not replaced. Name another one."


@pytest.mark.parametrize(
    "names", ["model.safetensors", "recipe.yaml", "recipe.yaml model.safetensors"]
)
def test_a_missing_file(names, saved):
    for name in names.split():
        (saved / name).unlink()
    lacks = " and no ".join(names.split())
    message = f"'model' is not a model directory: it has no {lacks}. {MISSING}"
    assert error_of(CheckpointError, pacswap.load, saved) == message


@pytest.mark.parametrize("length", [0, 7, 5000, -1])
def test_truncated_weights(length, saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    message = error_of(CheckpointError, pacswap.load, saved)
    assert message.startswith(f"'{weights}' is not a readable safetensors file: ")
    assert message.endswith(". It may be truncated; write the model directory again.")
    assert "\n" not in message


# id: (what of the recipe is replaced, by what, the error, the message)
DOES_NOT_FIT = "'model/model.safetensors' does not fit the network of its recipe: "
CHANGED = ". The library may have changed since; install the version that wrote it."
TAMPERED = {
    "misspelt layer": ("[head.conv]", "[head.convv]", CheckpointError,
        "'model' cannot be rebuilt with the installed libraries: cannot upgrade SceneNet: layers: "
        "'head.convv' matches no convolution (17 found). Nearest: 'head.conv', 'stem.conv', "
        "'layer3.1.conv2'. List them: pacswap.layers(model)."),
    "another layer": ("[head.conv]", "[layer3.1.conv2]", CheckpointError, DOES_NOT_FIT +
        "3 of 101 tensors missing ('layer3.1.conv2.blend', 'layer3.1.conv2.adapting_kernel."
        "log_bandwidth', 'layer3.1.conv2.guidance.project.weight'); 3 unknown "
        "('head.conv.adapting_kernel.log_bandwidth', 'head.conv.blend', "
        "'head.conv.guidance.project.weight')" + CHANGED),
    "more channels": ("channels: 4", "channels: 5", CheckpointError, DOES_NOT_FIT +
        "1 of another shape ('head.conv.guidance.project.weight' [4, 24, 1, 1] (expected [5, 24, 1,"
        " 1]))" + CHANGED),
    "another head": ("args: {}", "args: {num_classes: 7}", CheckpointError, DOES_NOT_FIT +
        "2 of another shape ('head.classifier.weight' [6, 48, 1, 1] (expected [7, 48, 1, 1]), "
        "'head.classifier.bias' [6] (expected [7]))" + CHANGED),
    "unknown model": ("name: scene_net", "name: scene_nett", ModelError,
        "pacswap has no model 'scene_nett'. Nearest: 'scene_net'. List them: pacswap ls models "
        "pacswap"),
    "another model": ("pacswap\n  name: scene_net", "torchvision\n  name: alexnet",
        CheckpointError, "'model' cannot be rebuilt with the installed libraries: cannot upgrade "
        "AlexNet: layers: 'head.conv' matches no convolution (5 found). List them: "
        "pacswap.layers(model)."),
    "misspelt key": ("swap:", "swop:", RecipeError,
        "model/recipe.yaml:10:1: swop: unknown key. Nearest: 'swap'."),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERED)
def test_a_recipe_tampered_with(case, saved):
    old, new, error, message = TAMPERED[case]
    recipe = saved / "recipe.yaml"
    text = recipe.read_text()
    assert text.count(old) == 1
    recipe.write_text(text.replace(old, new))
    assert error_of(error, pacswap.load, saved) == message
