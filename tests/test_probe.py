"""The probe: its figures are the gradients, its costs the plan's, and the model stays as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same import Untouched
from torch import Tensor, nn

import pacswap
from pacswap import scenes
from pacswap.errors import PlanError, TrainingError
from pacswap.surgery import pac_layers
from pacswap.train.candidates import stage_ends
from pacswap.train.probe import Probed, probe
from pacswap.zoo import Source, build

SIZE = (48, 64)
PIXEL = "it is 1×1: a single tap has no neighbours to weigh. Name the spatial convolutions only"
GUIDANCE = {"from": "layer1", "channels": 8}


def batch(number: int) -> tuple[Tensor, Tensor]:
    images, masks = scenes.draw_batch([2 * number, 2 * number + 1], SIZE)
    return scenes.normalize(images), masks


BATCHES = [batch(0), batch(1), batch(2)]


def loss(output: Tensor, masks: Tensor) -> Tensor:
    return F.cross_entropy(output, masks)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    model = build(Source("pacswap", "scene_net"))
    model.layer3[0].bn1.eval()  # a frozen norm stays so
    model.stem.conv.weight.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def probed(net) -> Probed:
    untouched = Untouched(net)
    found = probe(net, BATCHES, loss)
    untouched.check()
    return found


def test_default_candidates_are_the_image_and_the_ends_of_the_resolutions(probed):
    assert list(probed.plans) == ["input", "layer1", "layer2"]
    pairs = {(answer.layer, answer.guidance) for answer in probed.answers}
    assert ("layer2.0.conv1", "layer1") in pairs
    assert ("layer2.0.conv1", "layer2") not in pairs  # it comes too late
    assert ("stem.conv", "input") in pairs
    assert len(pairs) == len(probed.answers) == 14 + 9 + 5


def test_the_best_come_first(probed):
    gradients = [answer.gradient for answer in probed.answers]
    assert gradients == sorted(gradients, reverse=True)
    assert gradients[-1] > 0


def test_a_probe_is_the_same_each_time(net, probed):
    again = probe(net, iter(BATCHES), loss, guidance="layer1")
    ours = [answer for answer in probed.answers if answer.guidance == "layer1"]
    assert list(again.answers) == ours
    torch.manual_seed(7)
    assert probe(net, BATCHES, loss, guidance="layer1").answers == again.answers


def test_figures_are_the_gradients_of_a_swapped_network(net, probed):
    """One layer alone, all parameters free, in the words of the public interface."""
    each = []
    for images, masks in BATCHES:
        model = pacswap.swap(
            net, "head.conv", "layer2", example_input=images, calibration=BATCHES[0][0]
        ).eval()
        loss(model(images), masks).backward()
        each.append(pac_layers(model)["head.conv"].blend.grad.item())
    found = next(a for a in probed.answers if (a.layer, a.guidance) == ("head.conv", "layer2"))
    assert found.slope == pytest.approx(math.fsum(each) / 3, rel=1e-4)
    mean = math.fsum(map(abs, each)) / 3
    assert found.gradient == pytest.approx(mean, rel=1e-4)
    spread = math.fsum((abs(g) - mean) ** 2 for g in each) / 2
    assert found.error == pytest.approx(math.sqrt(spread / 3), rel=1e-3)
    assert found.gradient != pytest.approx(abs(each[0]), rel=1e-4)  # so that a mean is seen


def test_costs_are_those_of_the_plan(net, probed):
    for answer in (probed.answers[0], probed.answers[-1]):
        plan = pacswap.plan(net, answer.layer, answer.guidance, example_input=BATCHES[0][0])
        assert answer.macs == plan.cost.added_macs
        assert answer.share == plan.cost.added_macs / plan.cost.macs


def test_one_batch_has_no_error(net):
    found = probe(net, BATCHES, loss, guidance="input", layers="head.conv", most=1)
    (answer,) = found.answers
    assert (found.batches, answer.error) == (1, None)
    assert "±" not in str(found)
    assert abs(answer.slope) == answer.gradient


def test_batches_may_be_objects_and_endless(net):
    class Batch:
        images, masks = BATCHES[0]

    def endless():
        while True:
            yield Batch()

    seen = []
    found = probe(
        net,
        endless(),
        loss,
        guidance="layer1",
        layers="head.conv",
        most=2,
        progress=lambda done, of, what: seen.append((done, of, what)),
    )
    assert found.batches == 2
    assert seen == [(0, 2, "layer1"), (1, 2, "layer1"), (2, 2, "")]


def test_the_table(net):
    found = probe(net, BATCHES, loss, guidance=[GUIDANCE], layers=["head.conv", "layer3.1.conv2"])
    lines = str(found).splitlines()
    assert lines[0] == (
        "SceneNet: |dL/dblend| of each convolution and guidance, mean over 3 batches, ± standard "
        "error"
    )
    assert lines[2].split() == ["convolution", "guidance", "|dL/dblend|", "dL/dblend", "added", "MACs"]  # fmt: skip  # noqa: E501
    first = found.answers[0]
    cells = [first.layer, "layer1 → 8", f"{first.gradient:.2e} ± {first.error:.1e}"]
    assert lines[4].startswith(f"  {cells[0]:<14}  {cells[1]}")
    assert cells[2] in lines[4]
    assert len(lines) == 6


def test_as_data(net):
    found = probe(net, BATCHES, loss, guidance="layer1", layers="layer3.*")
    data = found.as_dict()
    assert (data["model"], data["operation"], data["batches"]) == ("SceneNet", "swap", 3)
    assert data["answers"][0] == vars(found.answers[0])
    assert data["left_out"] == [{"name": "layer3.0.downsample.0", "why": PIXEL}]


@pytest.mark.parametrize(
    ("operation", "layers", "names"),
    [("upsample", "*", {"interpolate"}), ("append", "interpolate", {"interpolate"})],
)
def test_other_operations(net, operation, layers, names):
    found = probe(net, BATCHES[:1], loss, operation=operation, layers=layers, guidance="input")
    assert {answer.layer for answer in found.answers} == names
    assert found.answers[0].gradient > 0


class Mixed(nn.Module):
    """One convolution that cannot be swapped, one that rests in eval mode, one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.pixel = nn.Conv2d(3, 4, 1)
        self.hooked = nn.Conv2d(4, 4, 3, padding=1, padding_mode="zeros")
        self.hooked.register_forward_hook(lambda *_: None)
        self.one_d = nn.Conv1d(4, 4, 3, padding=1)
        self.target = nn.Conv2d(4, 6, 3, padding=1)
        self.resting = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pixel(x)
        x = x + self.one_d(x.mean(2))[:, :, None]
        y = self.target(x)
        return y + self.resting(x) if self.training else y


def test_what_cannot_be_probed_is_said():
    torch.manual_seed(0)
    found = probe(Mixed(), BATCHES[:1], loss, guidance="input")
    assert [answer.layer for answer in found.answers] == ["target"]
    left_out = dict(found.left_out)
    assert set(left_out) == {"hooked", "one_d", "resting"}
    assert "left out" in str(found)


def test_the_blend_of_the_kernel_is_not_looked_at(net):
    half = probe(net, BATCHES, loss, guidance="layer1", layers="head.conv", kernel={"blend": 0.5})
    none = probe(net, BATCHES, loss, guidance="layer1", layers="head.conv")
    assert half.answers == none.answers
    wide = {"bandwidth": 2.0}
    other = probe(net, BATCHES, loss, guidance="layer1", layers="head.conv", kernel=wide)
    assert other.answers != none.answers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "there is no batch to probe on. Give at least one (images, masks)."),
        ({"batches": [3]}, "expected batches of (images, masks), got int."),
        (
            {"loss": lambda output, masks: output},
            "loss: expected a scalar tensor, got a tensor [2, 6, 48, 64].",
        ),
        ({"loss": lambda output, masks: 0.5}, "loss: expected a scalar tensor, got 0.5."),
        (
            {"loss": lambda output, masks: output.detach().mean()},
            "the loss has no gradient: it does not depend on what the network returns, or was "
            "computed without gradients.",
        ),
        (
            {"loss": lambda output, masks: output.sum() * math.nan},
            "the loss of batch 0 is nan. Look at its masks (are all labels ignored?) and at the "
            "normalisation of its images.",
        ),
    ],
    ids=["none", "numbers", "not reduced", "a float", "detached", "nan"],
)
def test_batches_and_losses_that_cannot_be_used(net, options, message):
    given: dict[str, Any] = {"batches": BATCHES, "loss": loss, "guidance": "input"} | options
    with pytest.raises(TrainingError) as raised:
        probe(net, given.pop("batches"), given.pop("loss"), layers="head.conv", **given)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": "layer9.*"},
            "'layer9.*' matches no convolution (17 found). Nearest: 'layer3.1.conv2', "
            "'layer3.1.conv1', 'layer3.0.conv2'. List them: pacswap.layers(model).",
        ),
        (
            {"layers": "head.classifier"},
            f"SceneNet has no convolutions that could be changed.\n  - head.classifier: {PIXEL}",
        ),
        (
            {"guidance": "external"},
            "an external guidance cannot be probed: batches hold images and masks only. Leave it "
            "out of the candidates.",
        ),
        (
            {"guidance": "layer3", "layers": "layer2.*"},
            "cannot upgrade SceneNet",
        ),
        ({"guidance": []}, "guidance: expected at least one candidate, got an empty list."),
    ],
    ids=["no layer", "refused", "external", "too late", "none"],
)
def test_requests_that_cannot_be_met(net, options, message):
    with pytest.raises(PlanError) as raised:
        probe(net, BATCHES, loss, **options)
    if message.endswith("SceneNet"):
        assert str(raised.value).startswith(message)
        assert "ready only after the layer has run" in str(raised.value)
    else:
        assert str(raised.value) == message


def test_stage_ends_of_networks():
    import timm
    import torchvision

    from pacswap.surgery.skeleton import look

    def ends(model: nn.Module) -> list[str]:
        return stage_ends(look(model, torch.empty(2, 3, 64, 96, device="meta"))[1], (64, 96))

    assert ends(timm.create_model("resnet18")) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert ends(timm.create_model("convnext_atto"))[:3] == ["stages.0", "stages.1", "stages.2"]
    fcn = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
    assert ends(fcn) == ["backbone.relu", "backbone.layer1", "backbone.layer2"]


def test_the_best_within_a_budget(net):
    found = probe(net, BATCHES, loss, guidance=GUIDANCE)
    ranked = [answer.layer for answer in found.answers]
    assert set(found.best(3)) == set(ranked[:3])
    order = [layer.name for layer in found.plans["layer1 → 8"].layers]
    assert list(found.best(3)) == [name for name in order if name in ranked[:3]]
    cost = next(iter(found.plans.values())).cost

    def added(names: list[str]) -> float:
        plan = pacswap.plan(net, names, GUIDANCE, example_input=BATCHES[0][0])
        return plan.cost.added_macs / cost.macs

    both = added(ranked[:2])
    assert set(found.best(2, both)) == set(ranked[:2])
    tight = found.best(2, both * 0.999)
    assert ranked[0] in tight
    assert ranked[1] not in tight
    assert added(list(tight)) <= both * 0.999
    with pytest.raises(PlanError) as raised:
        found.best(2, 1e-6)
    least = min(answer.share for answer in found.answers)
    assert str(raised.value) == (
        f"no layer fits into max_cost 0.0001%: the cheapest of 9 adds {100 * least:.2g} % of the "
        "network's MACs. Raise max_cost, or project the guidance to fewer channels."
    )
