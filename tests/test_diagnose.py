"""What `diagnose` says of a trained network: each fault is found and named, a healthy one has none.

The networks are tiny; their blends are set by hand, as training would have left them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from same import Untouched
from torch import Tensor, nn

import pacswap
from pacswap import scenes
from pacswap.errors import PlanError
from pacswap.nn import PacConv2d
from pacswap.surgery import pac_layers
from pacswap.surgery.watch import Seen, watch
from pacswap.train.diagnose import Finding, diagnose
from pacswap.zoo import Source, build

SIZE = (48, 64)
LAYERS = ["layer3.1.conv2", "head.conv"]


def images(*seeds: int) -> Tensor:
    return scenes.normalize(scenes.draw_batch(list(seeds), SIZE)[0])


@pytest.fixture(scope="module")
def healthy() -> nn.Module:
    """Two convolutions with a kernel of their own resolution's, blends away from 0."""
    torch.manual_seed(0)
    net = build(Source("pacswap", "scene_net"))
    model = pacswap.swap(
        net,
        groups=[{"layers": name, "guidance": "layer1"} for name in LAYERS],
        example_input=images(0, 1),
        calibration=images(0, 1),
    )
    for layer in pac_layers(model).values():
        layer.blend.data.fill_(0.3)
    return model.train()


@pytest.fixture
def model(healthy: nn.Module) -> nn.Module:
    return copy.deepcopy(healthy)


def kinds(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.layer, finding.kind) for finding in findings]


def test_a_healthy_network_has_no_findings(model):
    untouched = Untouched(model)
    assert diagnose(model, images(2, 3)) == []
    assert diagnose(model, [images(2), images(3, 4)]) == []
    untouched.check()


def test_a_blend_that_stayed_at_zero(model):
    pac_layers(model)["head.conv"].blend.data.fill_(-3e-5)
    (found,) = diagnose(model, images(2))
    assert (found.layer, found.kind) == ("head.conv", "blend")
    assert found.value == pytest.approx(-3e-5)
    assert str(found) == (
        "'head.conv': blend is -3.0e-05 after training (below 1e-04), so the layer is still what "
        "it was before the swap and its adapting kernel changes nothing. See that a stage trains "
        "'added', raise its learning rate (lr: {default: …, added: 1e-2}) or train longer; if it "
        "stays there, leave the layer out: `pacswap probe` shows which layers answer."
    )


def test_a_blend_just_off_zero_is_no_finding(model):
    pac_layers(model)["head.conv"].blend.data.fill_(-1.1e-4)
    assert diagnose(model, images(2)) == []


def test_a_kernel_stuck_at_zero(model):
    pac_layers(model)["head.conv"].adapting_kernel.log_bandwidth.data.fill_(-4)
    (found,) = diagnose(model, images(2))
    assert (found.layer, found.kind) == ("head.conv", "kernel")
    assert found.value < 0.02
    assert found.text == (
        f"'head.conv': the adapting kernel is stuck at 0 (median K of the neighbours "
        f"{found.value:.4f}, below 0.02), so the layer hardly sees beyond its centre tap and its "
        "bandwidth gets no gradient. Calibrate on images like these (kernel: {bandwidth: auto} "
        "and calibration: {images: …}), or lower the learning rate of 'added'."
    )


def test_a_kernel_stuck_at_one(model):
    pac_layers(model)["layer3.1.conv2"].adapting_kernel.log_bandwidth.data.fill_(4)
    (found,) = diagnose(model, images(2))
    assert (found.layer, found.kind) == ("layer3.1.conv2", "kernel")
    assert found.value > 0.98
    assert found.text == (
        f"'layer3.1.conv2': the adapting kernel is stuck at 1 (median K of the neighbours "
        f"{found.value:.4f}, above 0.98), so all pixels look alike to it and the layer is a plain "
        "one. Calibrate on images like these (kernel: {bandwidth: auto} and calibration: {images: "
        "…}), set standardize: true, or choose another guidance: `pacswap probe` ranks them."
    )


class Level(nn.Module):
    """A guidance that is the same at every pixel, dead or merely level."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.side = nn.Conv2d(3, 4, 1)
        self.target = nn.Conv2d(3, 4, 3, padding=1)
        nn.init.zeros_(self.side.weight)
        nn.init.constant_(self.side.bias, level)

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x)
        return self.target(x) + 0 * side


@pytest.mark.parametrize("level", [0.0, 5.0])
@pytest.mark.parametrize("normalize", ["none", "sum"])
def test_a_guidance_that_is_constant(level, normalize):
    model = pacswap.swap(
        Level(level),
        "target",
        "side",
        kernel={"bandwidth": 1.0, "blend": 0.5, "normalize": normalize},
        example_input=images(0, 1),
    )
    (found,) = diagnose(model, images(2))  # and no second one, of the kernel that follows from it
    assert (found.layer, found.kind) == ("target", "guidance")
    assert found.text == (
        f"'target': the guidance is constant: no channel varies over an image by more than "
        f"{found.value:.1e} of its size (below 1e-04), so K is 1 everywhere and the layer is a "
        "plain one. Choose another guidance, such as an earlier layer or 'input': `pacswap probe` "
        "ranks them."
    )
    with torch.no_grad():
        model.side.weight.normal_()
    assert "guidance" not in {f.kind for f in diagnose(model, images(2))}


def test_all_kinds_at_once_are_in_the_order_of_the_layers(model):
    layers = pac_layers(model)
    layers["head.conv"].adapting_kernel.log_bandwidth.data.fill_(-4)
    for layer in layers.values():
        layer.blend.data.zero_()
    assert kinds(diagnose(model, images(2))) == [
        ("layer3.1.conv2", "blend"),
        ("head.conv", "blend"),
        ("head.conv", "kernel"),
    ]


@pytest.fixture(scope="module")
def family() -> nn.Module:
    """A pooling, a guided upsampling and a CRF, one kernel shared and one held constant."""
    torch.manual_seed(0)
    net = Family()
    return pacswap.swap(
        net,
        groups=[
            {"operation": "pool", "layers": "pool", "guidance": "stem", "kernel": {"blend": 0.4}},
            {
                "operation": "upsample",
                "layers": "interpolate",
                "guidance": "input",
                "kernel": {"blend": 0.4},
            },
            {
                "operation": "append",
                "layers": "interpolate",
                "guidance": "input",
                "kernel": {"blend": 0.4},
                "crf": {"kernels": [{"guided": False}, {"blur": 2}]},
            },
        ],
        example_input=images(0, 1),
        calibration=images(0, 1),
    )


class Family(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.pool(self.stem(x)))
        return nn.functional.interpolate(y, size=x.shape[-2:], mode="bilinear")


def test_every_operation_is_looked_into(family):
    seen: list[Seen] = []
    watch(family, images(2), seen.append)
    assert [one.name for one in seen] == ["pool", "guided_interpolate", "crf_interpolate.kernels.1"]
    assert seen[2].features.shape[-2:] == (24, 32)  # blurred by 2
    assert diagnose(family, images(2, 3)) == []


def test_a_term_of_a_crf_is_named(family):
    model = copy.deepcopy(family)
    model.crf_interpolate.terms[1].adapting_kernel.log_bandwidth.data.fill_(-5)
    (found,) = diagnose(model, images(2))
    assert (found.layer, found.kind) == ("crf_interpolate.kernels.1", "kernel")


def test_a_constant_kernel_is_a_control_and_no_fault():
    model = pacswap.swap(
        Family(),
        "interpolate",
        "input",
        operation="upsample",
        kernel={"form": "constant", "blend": 0.4},
        example_input=images(0, 1),
    )
    assert diagnose(model, images(2)) == []


class Own(nn.Module):
    """A network whose writer calls the layer himself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PacConv2d(3, 3, 3, padding=1, bandwidth=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def test_a_layer_in_a_network_of_ones_own():
    assert kinds(diagnose(Own(), images(2))) == [("layer", "kernel")]


def test_the_factors_seen_are_those_of_the_kernel(model):
    seen: list[Seen] = []
    watch(model, images(2), seen.append)
    made = seen[0].kernel(seen[0].features)
    assert torch.equal(seen[0].factors(), made)
    assert not torch.equal(seen[0].factors(), seen[1].kernel(seen[1].features))
    assert not seen[0].neighbours()[0, :, 0, 0].all()  # the corner has taps outside
    assert seen[0].neighbours()[0, :, 6, 8].tolist() == [True] * 4 + [False] + [True] * 4


def test_a_plain_network_is_refused():
    with pytest.raises(PlanError) as raised:
        diagnose(nn.Conv2d(3, 3, 3), images(2))
    assert str(raised.value) == (
        "this Conv2d has no pixel-adaptive layers to look at. Upgrade it first: "
        "pacswap.swap(model, layers=…, guidance=…)."
    )
