"""A new head on a pretrained segmentation network, and DeepLabV3 on a timm backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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
