"""Building networks by name: what is known, what is refused, and whose code runs."""

from __future__ import annotations

import http.client
import shutil
import urllib.error
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from pacswap.errors import ModelError, PacswapError, WeightsError, nearest_hint
from pacswap.zoo import (
    Source,
    bare,
    build,
    identify,
    input_size,
    model_names,
    normalization,
)

SQUEEZENET = Source("torchvision", "squeezenet1_1")
RESNET = Source("timm", "resnet18")
SCENE_NET = Source("pacswap", "scene_net")
FACTORY = Source("python", f"{__name__}:Factory")


class Factory(nn.Module):
    """A user's network, small enough for every file below."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 1)


def error_of(error: type[PacswapError], function, *args, **kwargs) -> str:
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    assert type(raised.value) is error
    return str(raised.value)


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """Every download fails at once; nothing is found in a cache."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", refuse)


# What is built, and a layer whose weight shows that it was built as asked.
BUILDS = {
    "timm": (RESNET, "fc.weight", (1000, 512)),
    "timm, args": (replace(RESNET, args={"num_classes": 7}), "fc.weight", (7, 512)),
    "timm, tag": (replace(RESNET, name="resnet18.tv_in1k"), "fc.weight", (1000, 512)),
    "timm, features": (
        Source("timm", "mobilenetv2_100", None, {"features_only": True, "out_indices": [0, 1]}),
        "conv_stem.weight",
        (32, 3, 3, 3),
    ),
    "torchvision": (SQUEEZENET, "classifier.1.weight", (1000, 512, 1, 1)),
    "torchvision, args": (
        Source("torchvision", "fcn_resnet50", None, {"num_classes": 3}),
        "classifier.4.weight",
        (3, 512, 1, 1),
    ),
    "torchvision, computing": (  # its constructor computes with tensors, which meta cannot
        Source("torchvision", "regnet_y_400mf"),
        "fc.weight",
        (1000, 440),
    ),
    "pacswap": (SCENE_NET, "head.classifier.weight", (6, 48, 1, 1)),
    "python": (replace(FACTORY, args={"width": 5}), "conv.weight", (5, 3, 1, 1)),
}


@pytest.mark.parametrize("meta", [False, True], ids=["", "meta"])
@pytest.mark.parametrize("case", BUILDS)
def test_build(case, meta):
    source, name, shape = BUILDS[case]
    model = build(source, meta=meta, trust_python=True)
    weight = model.state_dict()[name]
    assert tuple(weight.shape) == shape
    assert weight.is_meta == (meta and "computing" not in case)
    assert identify(model) == source


def test_model_names():
    names = model_names()
    assert list(names) == ["pacswap", "timm", "torchvision"]
    assert "resnet18" in names["timm"]
    assert "fcn_resnet50" in names["torchvision"]
    assert names["pacswap"] == ["deeplabv3", "scene_net"]
    assert model_names("torchvision") == {"torchvision": names["torchvision"]}


@pytest.mark.parametrize(
    ("source", "size", "mean"),
    [
        (SCENE_NET, (3, 96, 128), 0.485),
        (RESNET, (3, 224, 224), 0.485),
        (Source("timm", "inception_v3.tf_in1k"), (3, 299, 299), 0.5),
        (SQUEEZENET, None, 0.485),
    ],
    ids=lambda value: value.name if isinstance(value, Source) else "",
)
def test_what_images_it_takes(source, size, mean):
    model = build(source, meta=True)
    assert input_size(source, model) == size
    assert normalization(model)[0][0] == mean


NO_TAG = "has no weights 'NOPE'. Known: {}. Or set a file, or null for random ones."
TIMM_TAGS = ", ".join(f"'{k.partition('.')[2]}'" for k in timm.list_pretrained("resnet18.*"))


def near(name: str, library: ModuleType) -> str:
    """The names of the installed version; ours are the ones asked for."""
    hint = nearest_hint(name, library.list_models())
    assert hint.startswith(f"Nearest: '{name[:-1]}")
    return hint


# The source, the error, the message; nothing of this needs a network.
REFUSALS = {
    "library": (Source("keras", "x"), ModelError,
        "library 'keras' is unknown. Known: 'timm', 'torchvision', 'python', 'pacswap'."),
    "misspelt library": (Source("torchvison", "x"), ModelError,
        "library 'torchvison' is unknown. Nearest: 'torchvision', 'python'."),
    "timm name": (Source("timm", "mobilenetv2_1000"), ModelError,
        f"timm has no model 'mobilenetv2_1000'. {near('mobilenetv2_1000', timm)} List them: "
        "pacswap ls models timm"),
    "timm name far off": (Source("timm", "/"), ModelError,
        "timm has no model '/'. List them: pacswap ls models timm"),
    "torchvision name": (Source("torchvision", "fcn_resnet51"), ModelError,
        f"torchvision has no model 'fcn_resnet51'. {near('fcn_resnet51', torchvision.models)} List "
        "them: pacswap ls models torchvision"),
    "pacswap name": (Source("pacswap", "scenenet"), ModelError,
        "pacswap has no model 'scenenet'. Nearest: 'scene_net'. List them: pacswap ls models "
        "pacswap"),
    "timm tag": (replace(RESNET, weights="NOPE"), WeightsError,
        f"timm model 'resnet18' {NO_TAG.format(TIMM_TAGS)}"),
    "timm tag in the name": (replace(RESNET, name="resnet18.NOPE"), WeightsError,
        f"timm model 'resnet18.NOPE' {NO_TAG.format(TIMM_TAGS)}"),
    "torchvision tag": (replace(SQUEEZENET, weights="NOPE"), WeightsError,
        "torchvision model 'squeezenet1_1' " + NO_TAG.format("'IMAGENET1K_V1', 'DEFAULT'")),
    "pacswap tag": (replace(SCENE_NET, weights="NOPE"), WeightsError,
        "pacswap model 'scene_net' " + NO_TAG.format("'DEFAULT'")),
    "python tag": (replace(FACTORY, weights="NOPE"), WeightsError,
        "a python factory has no weights by tag, got 'NOPE'. Set weights to a file, to DEFAULT "
        "(whatever the factory loads) or to null."),
    "pretrained in args": (replace(RESNET, args={"pretrained": True}), ModelError,
        "model.args of 'resnet18' has 'pretrained': weights are chosen by model.weights. Take it "
        "out of args."),
    "weights in args": (replace(SQUEEZENET, args={"weights": "DEFAULT"}), ModelError,
        "model.args of 'squeezenet1_1' has 'weights': weights are chosen by model.weights. Take it "
        "out of args."),
    "misspelt argument": (replace(SQUEEZENET, args={"num_clases": 3}), ModelError,
        "cannot build torchvision model 'squeezenet1_1' with args {'num_clases': 3}: TypeError: "
        "SqueezeNet.__init__() got an unexpected keyword argument 'num_clases'. Mend model.args."),
    "wrong value": (replace(SQUEEZENET, args={"num_classes": -1}), ModelError,
        "cannot build torchvision model 'squeezenet1_1' with args {'num_classes': -1}: "
        "RuntimeError: Trying to create tensor with negative dimension -1: [-1, 512, 1, 1]. Mend "
        "model.args."),
    "an assertion without words": (replace(RESNET, args={"output_stride": 5}), ModelError,
        "cannot build timm model 'resnet18' with args {'output_stride': 5}: AssertionError. Mend "
        "model.args."),
    "head and weights at odds": (
        Source("torchvision", "squeezenet1_1", "DEFAULT", {"num_classes": 3}), ModelError,
        "cannot build torchvision model 'squeezenet1_1' with args {'num_classes': 3}: ValueError: "
        "The parameter 'num_classes' expected value 1000 but got 3 instead. Mend model.args."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    source, error, message = REFUSALS[case]
    assert error_of(error, build, source, trust_python=True) == message


@pytest.mark.parametrize("case", [c for c, (s, *_) in REFUSALS.items() if s.weights == "NOPE"])
def test_an_unknown_tag_is_refused_before_anything_is_fetched(case):
    source, error, message = REFUSALS[case]
    assert error_of(error, build, source, meta=True, trust_python=True) == message


def test_a_network_without_weights():
    tagless = next(n for n in timm.list_models("res*") if not timm.list_pretrained(f"{n}.*"))
    assert error_of(WeightsError, build, Source("timm", tagless, "DEFAULT"), meta=True) == (
        f"timm has no weights for '{tagless}'. Set weights to a file, or to null for random ones."
    )


NO_NETWORK = (
    "cannot get weights '{}' of {} model '{}': {}. Check the network, or put the file on this "
    "machine and set model.weights to its path, or to null for random weights."
)
NO_ROUTE = "URLError: <urlopen error no route to host>"


@pytest.mark.parametrize("source", [RESNET, SQUEEZENET], ids=["timm", "torchvision"])
def test_no_network(source):
    message = error_of(WeightsError, build, replace(source, weights="DEFAULT"))
    assert message == NO_NETWORK.format("DEFAULT", source.library, source.name, NO_ROUTE)


def test_no_network_for_a_backbone():
    source = Source("torchvision", "fcn_resnet50", None, {"weights_backbone": "DEFAULT"})
    message = error_of(WeightsError, build, source)
    assert message == NO_NETWORK.format("DEFAULT", "torchvision", "fcn_resnet50", NO_ROUTE)
    assert build(source, meta=True).state_dict()["classifier.4.weight"].is_meta
    assert bare(source) == Source("torchvision", "fcn_resnet50")


def test_a_connection_that_breaks_off(monkeypatch):
    def break_off(*args: object, **kwargs: object) -> None:
        raise http.client.IncompleteRead(b"", 9)

    monkeypatch.setattr(torch.hub, "download_url_to_file", break_off)
    assert error_of(WeightsError, build, replace(SQUEEZENET, weights="DEFAULT")) == (
        NO_NETWORK.format("DEFAULT", "torchvision", "squeezenet1_1", "IncompleteRead: "
        "IncompleteRead(0 bytes read, 9 more expected)")
    )  # fmt: skip


def test_a_damaged_cache(tmp_path):
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / Path(url).name
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"<html>404</html>")
    message = error_of(WeightsError, build, replace(SQUEEZENET, weights="DEFAULT"))
    assert message.startswith("cannot get weights 'DEFAULT' of torchvision model 'squeezenet1_1': ")


def test_weights_that_torchvision_downloads(tmp_path, monkeypatch):
    theirs = torchvision.models.squeezenet1_1()
    torch.save(theirs.state_dict(), "there.pth")
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, dst, *_, **__: shutil.copy("there.pth", dst)
    )
    assert_loaded(build(replace(SQUEEZENET, weights="IMAGENET1K_V1")), theirs)


def test_weights_that_timm_downloads(tmp_path, monkeypatch):
    theirs = timm.create_model("resnet18")
    safetensors.torch.save_file(theirs.state_dict(), "there.safetensors")
    asked = []

    def fetch(repo_id: str, **_: object) -> str:
        asked.append(repo_id)
        return "there.safetensors"

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", fetch)
    model = build(replace(RESNET, weights="tv_in1k"))
    assert_loaded(model, theirs)
    assert asked == ["timm/resnet18.tv_in1k"]
    assert model.pretrained_cfg["tag"] == "tv_in1k"
    # The tag stays with the name: it says how images are normalised.
    assert identify(model) == bare(replace(RESNET, weights="tv_in1k"))
    assert identify(model).name == "resnet18.tv_in1k"


def assert_loaded(model: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_random_weights_differ():
    with pytest.raises(AssertionError):
        assert_loaded(build(SQUEEZENET), build(SQUEEZENET))
