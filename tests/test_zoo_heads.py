"""A new head on a pretrained segmentation network, and DeepLabV3 on a timm backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pacswap
from pacswap.errors import ModelError, WeightsError
from pacswap.zoo import Source, build, identify, normalization
from pacswap.zoo.heads import renew_heads

HEADS = {
    "fcn_resnet50": ["classifier.4"],
    "deeplabv3_resnet50": ["classifier.4"],
    "deeplabv3_mobilenet_v3_large": ["classifier.4"],
    "lraspp_mobilenet_v3_large": ["classifier.low_classifier", "classifier.high_classifier"],
}
NET = Source("pacswap", "deeplabv3", None, {"backbone": "mobilenetv2_050"})


@pytest.mark.parametrize("name", HEADS)
def test_only_the_last_convolutions_are_new(name):
    before = build(Source("torchvision", name), meta=True)
    after = build(Source("torchvision", name, num_classes=11), meta=True)
    old, new = before.state_dict(), after.state_dict()
    assert list(old) == list(new)
    changed = {key.rpartition(".")[0] for key in old if old[key].shape != new[key].shape}
    assert changed == set(HEADS[name])
    assert all(after.get_submodule(head).out_channels == 11 for head in HEADS[name])


def test_an_auxiliary_head_is_renewed_too():
    net = build(Source("torchvision", "fcn_resnet50", None, {"aux_loss": True}, 5), meta=True)
    assert net.classifier[4].out_channels == net.aux_classifier[4].out_channels == 5


def test_all_weights_but_the_head_are_kept(tmp_path):
    net = build(NET)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded = build(
        Source("pacswap", "deeplabv3", "net.pth", NET.args, num_classes=3), folder=tmp_path
    )
    old, new = net.state_dict(), loaded.state_dict()
    differing = {key for key in old if not torch.equal(old[key], new[key])}
    assert differing == {"classifier.1.weight", "classifier.1.bias"}
    assert loaded.num_classes == 3


def test_a_head_of_the_same_size_is_renewed():
    net = build(NET)
    before = net.classifier[1].weight
    assert renew_heads(net, 21) == ["classifier.1"]
    assert net.classifier[1].weight.shape == before.shape
    assert not torch.equal(net.classifier[1].weight, before)


def test_a_network_without_a_head_is_refused():
    with pytest.raises(ModelError) as raised:
        build(Source("timm", "resnet18", num_classes=3), meta=True)
    assert str(raised.value) == (
        "cannot give ResNet a head of 3 classes: it has no convolution under 'classifier', "
        "'aux_classifier', 'auxiliary_head', 'decode_head', 'segmentation_head', 'head'. Take "
        "model.num_classes out, and let model.args or a factory of yours make the head."
    )


class Net(nn.Module):
    """16 channels of features, made by nothing, and a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.classifier = head

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(image)


class ClassifierFirst(nn.Module):
    """A head that registers what gives the logits before what feeds it."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(21, 21, 1)
        self.fpn = nn.Conv2d(16, 21, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.fpn(image))


def chain(*layers: nn.Module) -> nn.Module:
    return Net(nn.Sequential(*layers))


ENDS = {
    "16_21_21": (lambda: chain(nn.Conv2d(16, 21, 3), nn.Conv2d(21, 21, 1)), "classifier.1", 5),
    "16_16_16": (lambda: chain(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 1)), "classifier.1", 5),
    "depthwise": (lambda: chain(nn.Conv2d(16, 16, 3, groups=16)), "classifier.0", 32),
    "grouped": (lambda: chain(nn.Conv2d(16, 8, 1, groups=4), nn.ReLU()), "classifier.0", 12),
    "after_a_transposed": (
        lambda: chain(nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 8, 1), nn.Upsample(None, 2.0)),
        "classifier.1",
        5,
    ),
    "nested": (
        lambda: chain(nn.Conv2d(16, 8, 1), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())),
        "classifier.1.0",
        5,
    ),
    "bare": (lambda: Net(nn.Conv2d(16, 8, 1)), "classifier", 5),
    "classifier_first": (lambda: Net(ClassifierFirst()), "classifier.classifier", 5),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_head_with_a_new_end_runs(name):
    make, renewed, classes = ENDS[name]
    with torch.device("meta"):
        net, image = make(), torch.zeros(1, 16, 8, 8)
    kept = {key: value for key, value in net.named_parameters() if not key.startswith(renewed)}
    before = net.get_submodule(renewed)
    assert renew_heads(net, classes) == [renewed]
    after = net.get_submodule(renewed)
    assert after is not before
    assert after.groups == before.groups
    assert net(image).shape[1] == classes
    assert all(net.get_parameter(key) is value for key, value in kept.items())


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_as_many_classes_as_the_head_has_channels_inside(name):
    """Renewed twice: the second time, the convolutions inside have as many channels as the last."""
    channels = {"deeplabv3_resnet50": 256, "lraspp_mobilenet_v3_large": 128}[name]
    net = build(Source("torchvision", name, num_classes=channels), meta=True).eval()
    assert renew_heads(net, 7) == HEADS[name]
    image = torch.zeros(1, 3, 64, 64, device="meta")
    assert net(image)["out"].shape == (1, 7, 64, 64)


WAY_OUT = "Take model.num_classes out, and let model.args or a factory of yours make the head."
REFUSED = {
    "transposed": (
        lambda: chain(nn.Conv2d(16, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2)),
        "cannot give the network a head of 5 classes: classifier.1, which gives its logits, is a "
        f"ConvTranspose2d, not a Conv2d. {WAY_OUT}",
    ),
    "grouped": (
        lambda: chain(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=16)),
        "cannot give the network a head of 5 classes: classifier.1, which gives its logits, has 16 "
        f"groups, which do not divide 5. {WAY_OUT}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_that_cannot_be_renewed_is_refused(name):
    make, message = REFUSED[name]
    net = make()
    net.aux_classifier = nn.Conv2d(16, 8, 1)
    before = list(net.modules())
    with pytest.raises(ModelError) as raised:
        renew_heads(net, 5)
    assert str(raised.value) == message
    assert all(new is old for new, old in zip(net.modules(), before, strict=True))


def test_it_is_saved_and_loaded(tmp_path):
    net = build(Source("torchvision", "lraspp_mobilenet_v3_large", num_classes=4))
    upgraded = pacswap.swap(
        net, "interpolate", {"from": "input"}, operation="upsample", kernel={"bandwidth": 1.0}
    )
    pacswap.save(upgraded, tmp_path / "model")
    loaded = pacswap.load(tmp_path / "model")
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(upgraded.eval()(image)["out"], loaded(image)["out"])
    assert identify(pacswap.revert(loaded)).num_classes == 4


def test_deeplab_keeps_every_size_and_the_backbones_normalisation():
    net = build(Source("pacswap", "deeplabv3", None, {"backbone": "tf_efficientnet_lite0"}))
    assert normalization(net) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    net = build(Source("pacswap", "deeplabv3", None, {**NET.args, "atrous_rates": [6]})).eval()
    for size in ((64, 64), (65, 97)):
        assert net(torch.zeros(1, 3, *size)).shape == (1, 21, *size)
    assert sum(isinstance(m, nn.Conv2d) and m.dilation == (6, 6) for m in net.modules()) == 1


def test_deeplab_without_a_network_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as raised:
        build(replace(NET, weights="DEFAULT"))
    assert str(raised.value).startswith(
        "cannot get weights 'DEFAULT' of pacswap model 'deeplabv3': "
    )


def test_deeplab_has_no_weights_but_its_backbones():
    with pytest.raises(WeightsError) as raised:
        build(replace(NET, weights="VOC"))
    assert str(raised.value) == (
        "pacswap model 'deeplabv3' has no weights 'VOC'. Known: 'DEFAULT'. Or set a file, or null "
        "for random ones."
    )
    with pytest.raises(ModelError) as refused:
        build(replace(NET, args={"pretrained": True}))
    assert "weights are chosen by model.weights" in str(refused.value)
