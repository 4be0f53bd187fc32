"""What is refused of a directory that holds only what was added: other bases, damage, malice."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from same import Untouched
from torch import Tensor, nn

import pacswap
from pacswap.cli import main
from pacswap.errors import CheckpointError, ModelError, PacswapError
from pacswap.zoo import Source, build

FILE = Path("m/added.safetensors")
OTHER_BASE = (
    "'m' belongs to another base: this SceneNet is not what was upgraded, {} of 98 tensors differ "
    "({}). Give the network with the weights that it had before the swap."
)
DAMAGED = (
    "'m/added.safetensors' is damaged: its metadata is not what pacswap writes. Write the model "
    "directory again."
)
FITS_NOT = "'m/added.safetensors' does not fit the network of its recipe with what the swap adds: "
GIVE = ". Give the network that was upgraded: pacswap.load(folder, base=network)."


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as raised:
        function(*args, **kwargs)
    return str(raised.value)


@pytest.fixture(scope="module")
def shipped() -> nn.Module:
    return build(Source("pacswap", "scene_net", "DEFAULT"))


@pytest.fixture(scope="module")
def kept(shipped, tmp_path_factory) -> Path:
    example = torch.zeros(1, 3, 48, 64)
    guidance = {"from": "layer1", "channels": 4}
    model = pacswap.swap(shipped, "head.conv", guidance, example_input=example)
    return pacswap.save(model, tmp_path_factory.mktemp("kept") / "m", added_only=True)


@pytest.fixture(autouse=True)
def saved(kept, tmp_path, monkeypatch) -> None:
    """A copy of the directory to be damaged, in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept, "m")


@pytest.fixture
def base(shipped) -> nn.Module:
    """A copy of the base to be changed."""
    return copy.deepcopy(shipped)


def contents() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safetensors.safe_open(FILE, "pt") as file:
        return safetensors.torch.load_file(FILE), json.loads(file.metadata()["pacswap"])


def write(state: dict[str, Tensor], notes: object) -> None:
    text = notes if isinstance(notes, str) else json.dumps(notes)
    safetensors.torch.save_file(state, FILE, {"pacswap": text})


def flip_(tensor: Tensor) -> None:
    """The last bit of every number."""
    tensor.view(torch.int32).bitwise_xor_(1)


# Which tensor of the base is changed, and how.
TAMPERED = {
    "a weight, in its last bit": (
        "stem.conv.weight",
        lambda t: t.view(torch.int32).bitwise_xor_(1),
    ),
    "a bias": ("head.classifier.bias", lambda t: t.add_(1)),
    "the weight that was swapped": ("head.conv.weight", lambda t: t.mul_(1.01)),
    "a running mean": ("layer1.0.bn1.running_mean", lambda t: t.add_(1e-3)),
    "a counter": ("layer1.0.bn1.num_batches_tracked", lambda t: t.add_(1)),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_one_tensor_of_the_base_is_another(case, base):
    name, change_ = TAMPERED[case]
    pacswap.load("m", base=base)  # as it is, it is taken
    with torch.no_grad():
        change_(base.state_dict()[name])
    untouched = Untouched(base)
    assert error_of(pacswap.load, "m", base=base) == OTHER_BASE.format(1, f"'{name}'")
    untouched.check()


def test_many_tensors_are_counted(base):
    with torch.no_grad():
        for parameter in base.layer3.parameters():
            parameter.add_(1)
    names = "'layer3.0.conv1.weight', 'layer3.0.bn1.weight', 'layer3.0.bn1.bias', …"
    count = len(list(base.layer3.parameters()))
    assert error_of(pacswap.load, "m", base=base) == OTHER_BASE.format(count, names)


def test_another_precision_is_another_base(base):
    message = error_of(pacswap.load, "m", base=base.half())
    assert message.startswith("'m' belongs to another base: this SceneNet is not what was upgraded")


def test_the_librarys_weights_are_others_now(monkeypatch):
    recipe = Path("m/recipe.yaml")
    net = build(Source("pacswap", "scene_net"))
    safetensors.torch.save_model(net, "m/other.safetensors")
    recipe.write_text(recipe.read_text().replace("weights: DEFAULT", "weights: other.safetensors"))
    message = error_of(pacswap.load, "m")
    assert message.startswith(
        "'m' belongs to another base: the weights 'other.safetensors' of scene_net are not what "
        "was upgraded, "
    )
    assert message.endswith(GIVE.removeprefix("."))


BASES = {
    "no network": (
        lambda net: {"stem": 1},
        "base: expected the network that was upgraded, got dict.",
    ),
    "an upgraded one": (
        lambda net: pacswap.load("m"),
        "base: this SceneNet is upgraded already, expected the network before. Take "
        "pacswap.revert(base), if its weights are those of before the swap.",
    ),
    "on meta": (
        lambda net: net.to("meta"),
        "base: this SceneNet has no values, it is on the meta device. Give the network with the "
        "weights that it was upgraded with.",
    ),
    "wrapped": (
        lambda net: nn.DataParallel(net),
        "base: cannot upgrade DataParallel: the model is wrapped in DataParallel: swap before "
        "wrapping the model for several devices.",
    ),
    "of other classes": (
        lambda net: build(Source("pacswap", "scene_net", None, {"num_classes": 9})),
        "base: this SceneNet is not a scene_net as it was upgraded: the network is SceneNet() "
        "{'num_classes': 6} there and SceneNet() {'num_classes': 9} here. Build it as it was then "
        "(num_classes?).",
    ),
    "of another library": (
        lambda net: timm.create_model("resnet18"),
        "base: this ResNet is not a scene_net as it was upgraded: the network is SceneNet() "
        "{'num_classes': 6} there and ResNet() {'num_classes': 1000} here. Build it as it was then "
        "(num_classes?).",
    ),
}


@pytest.mark.parametrize("case", BASES)
def test_no_such_base(case, base):
    make, message = BASES[case]
    other = make(base)
    found = error_of(pacswap.load, "m", base=other)
    if case == "of another library":  # timm's options are many
        start, end = message.split("{'num_classes': 1000}")
        assert found.startswith(start)
        assert found.endswith(end)
    else:
        assert found == message


def test_a_base_for_a_whole_model(base):
    pacswap.save(pacswap.load("m"), "whole")
    assert error_of(pacswap.load, "whole", base=base) == (
        "'whole' holds the whole model, which takes nothing from a base. Leave out base=."
    )


def test_both_kinds_in_one_directory():
    pacswap.save(pacswap.load("m"), "whole")
    shutil.copy("whole/model.safetensors", "m")
    assert error_of(pacswap.load, "m") == (
        "'m' holds a whole model and an added part, model.safetensors and added.safetensors. "
        "Remove the one that is not meant."
    )


@pytest.mark.parametrize("length", [0, 7, 900, -1])
def test_a_truncated_file(length):
    FILE.write_bytes(FILE.read_bytes()[:length])
    message = error_of(pacswap.load, "m")
    assert message.startswith(f"'{FILE}' is not a readable safetensors file: ")
    assert message.endswith(". It may be truncated; write the model directory again.")


GARBAGE = {
    "no JSON": "{",
    "too deep": "[" * 100_000,
    "a list": [],
    "a number": "7",
    "no version": {"base": {}},
    "a version of text": {"version": "1", "base": {}},
    "version true": {"version": True, "base": {}},
    "a base of numbers": {"version": 1, "base": {"stem.conv.weight": 7}},
    "a base that is a list": {"version": 1, "base": ["stem.conv.weight"]},
    "aliases of lists": {"version": 1, "base": {}, "aliases": {"a": []}},
    "aliases that are none": {"version": 1, "base": {}, "aliases": None},
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_the_metadata(case):
    write(contents()[0], GARBAGE[case])
    assert error_of(pacswap.load, "m") == DAMAGED


def test_no_metadata():
    safetensors.torch.save_file(contents()[0], FILE)
    assert error_of(pacswap.load, "m") == (
        "'m/added.safetensors' does not say which base it belongs to. It is damaged or not one of "
        "pacswap's; write the model directory again."
    )


def test_a_later_format():
    state, notes = contents()
    write(state, {**notes, "version": 2, "new": "things"})
    assert error_of(pacswap.load, "m") == (
        "'m/added.safetensors' has format 2, this pacswap reads 1. Upgrade: pip install --upgrade "
        "pacswap"
    )


def tampered(case: str) -> None:
    state, notes = contents()
    if case == "an added tensor is missing":
        del state["head.conv.blend"]
    elif case == "a base tensor is missing":
        del notes["base"]["stem.conv.weight"]
    elif case == "a tensor too many":
        state["head.conv.evil"] = torch.zeros(3)
    elif case == "a digest too many":
        notes["base"]["evil"] = "0" * 16
    elif case == "a digest of what was added":
        notes["base"]["head.conv.blend"] = "0" * 16
        del state["head.conv.blend"]
    elif case == "another shape":
        state["head.conv.blend"] = torch.zeros(2)
    elif case == "an alias of nothing":
        del state["head.conv.blend"]
        notes["aliases"] = {"head.conv.blend": "nothing"}
    elif case == "a wrong digest":
        notes["base"]["stem.conv.weight"] = "../../etc"
    elif case == "whole numbers":
        state["head.conv.blend"] = torch.zeros((), dtype=torch.int64)
    elif case == "complex numbers":
        state["head.conv.blend"] = torch.zeros((), dtype=torch.complex64)
    write(state, notes)


MALICE = {
    "an added tensor is missing": FITS_NOT + "1 of 101 tensors missing ('head.conv.blend')" + GIVE,
    "an alias of nothing": FITS_NOT + "1 of 101 tensors missing ('head.conv.blend')" + GIVE,
    "a base tensor is missing": FITS_NOT + "1 of 101 tensors missing ('stem.conv.weight')" + GIVE,
    "a tensor too many": FITS_NOT + "1 unknown ('head.conv.evil')" + GIVE,
    "a digest too many": FITS_NOT + "1 unknown ('evil')" + GIVE,
    "another shape": FITS_NOT
    + "1 of another shape ('head.conv.blend' [2] (expected []))" + GIVE,
    "a wrong digest": "'m' belongs to another base: the weights 'DEFAULT' of scene_net are not "
    "what was upgraded, 1 of 98 tensors differ ('stem.conv.weight')" + GIVE,
    "a digest of what was added": "'m' belongs to another base: the weights 'DEFAULT' of scene_net "
    "are not what was upgraded, 1 of 99 tensors differ ('head.conv.blend')" + GIVE,
    "whole numbers": "'m/added.safetensors' holds other kinds of numbers than the network: "
    "'head.conv.blend' is int64 (expected float32). It may be damaged; write the model directory "
    "again.",
    "complex numbers": "'m/added.safetensors' holds other kinds of numbers than the network: "
    "'head.conv.blend' is complex64 (expected float32). It may be damaged; write the model "
    "directory again.",
}  # fmt: skip


@pytest.mark.parametrize("case", MALICE)
def test_a_file_tampered_with(case):
    tampered(case)
    assert error_of(pacswap.load, "m") == MALICE[case]


# What of the recipe is replaced, by what, and how the message begins.
RECIPES = {
    "misspelt layer": ("[head.conv]", "[head.convv]", "'m' cannot be put on the network of its "
        "recipe: cannot upgrade SceneNet: layers: 'head.convv' matches no convolution"),
    "another layer": ("[head.conv]", "[layer3.1.conv2]", FITS_NOT + "3 of 101 tensors missing "
        "('layer3.1.conv2.blend'"),
    "another network": ("args: {}", "args: {num_classes: 7}", "'m' holds only what was added, and "
        "the base cannot be built: "),
    "code": ("library: pacswap", "library: python", "library 'python' runs the code of "
        "'scene_net'. If you trust it, say so: "),
    "a stranger's weights": ("library: pacswap\n  name: scene_net\n  weights: DEFAULT\n  args: {}",
        "library: timm\n  name: resnet18\n  weights: a1_in1k\n  args: {pretrained_cfg_overlay: "
        "{hf_hub_id: evil/net}}", "model.args of 'resnet18' has 'pretrained_cfg_overlay': weights "
        "are chosen by model.weights. Take it out of args."),
    "a stranger's backbone": ("name: scene_net\n  weights: DEFAULT\n  args: {}",
        "name: deeplabv3\n  weights: DEFAULT\n  args: {backbone: 'hf-hub:evil/net'}",
        "model.args.backbone: expected the name of a timm model, got 'hf-hub:evil/net'. List them: "
        "pacswap ls models timm"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_tampered_with(case):
    old, new, message = RECIPES[case]
    recipe = Path("m/recipe.yaml")
    assert recipe.read_text().count(old) == 1
    recipe.write_text(recipe.read_text().replace(old, new))
    with pytest.raises(PacswapError) as raised:
        pacswap.load("m")
    assert isinstance(raised.value, CheckpointError | ModelError)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("overwrite", [False, True], ids=["nothing there", "an old one there"])
def test_nothing_is_left_of_a_failure(overwrite, monkeypatch):
    model = pacswap.load("m")
    before = {path.name: path.read_bytes() for path in Path("m").iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    target = "m" if overwrite else "n"
    assert error_of(pacswap.save, model, target, added_only=True, overwrite=overwrite) == (
        f"cannot write '{target}': [Errno 28] No space left on device."
    )
    assert [path.name for path in Path().iterdir()] == ["m"]
    assert {path.name: path.read_bytes() for path in Path("m").iterdir()} == before


class Counting(nn.Module):
    """A network whose state_dict holds more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize("added_only", [False, True], ids=["whole", "added"])
def test_more_than_tensors(added_only):
    model = pacswap.swap(Counting(), "b", "a", example_input=torch.zeros(1, 3, 32, 32))
    source = {"library": "python", "name": f"{__name__}:Counting"}
    assert error_of(pacswap.save, model, "n", added_only=added_only, source=source) == (
        "the state_dict of this Counting holds more than tensors ('_extra_state'), which a model "
        "directory has no place for."
    )


def test_the_commands_take_it(capsys):
    from PIL import Image

    Image.new("RGB", (64, 48), (200, 90, 30)).save("image.png")
    main(["show", "m", "image.png", "-o", "looks"])
    assert list(Path("looks").iterdir())
    tampered("a wrong digest")
    with pytest.raises(SystemExit) as ended:
        main(["show", "m", "image.png", "-o", "more"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith(MALICE["a wrong digest"])
