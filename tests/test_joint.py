"""Joint upsampling: the paper's network, and joint bilateral upsampling against plain loops."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import DIFFERS, assert_close64, fresh_memory_is_nan
from PIL import Image
from torch import Tensor, nn

from pacswap.errors import ShapeError
from pacswap.nn import PacConvTranspose2d
from pacswap.nn.joint import JointBilateralUpsample, JointUpsample

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "joint_upsampling.py"
# The figures of the paper, table 1.
PARAMETERS = {
    (4, "full"): 183_489,
    (8, "full"): 221_937,
    (16, "full"): 260_385,
    (4, "lite"): 55_509,
    (8, "lite"): 56_273,
    (16, "lite"): 55_777,
}
all_networks = pytest.mark.parametrize(
    ("factor", "width"), PARAMETERS, ids=[f"{w}_{f}x" for f, w in PARAMETERS]
)
fresh_memory = pytest.fixture(autouse=True, scope="module")(fresh_memory_is_nan)


def network(factor: int = 4, width: str = "lite", **options) -> JointUpsample:
    """A network whose output depends visibly on all that goes in."""
    made = JointUpsample(factor, width=width, **options).double().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # A freshly drawn one gives almost the same features everywhere.
            parameter.mul_(4 if name.startswith("guidance") else 2)
    return made


def maps(
    factor: int = 4, channels: int = 1, size: tuple[int, int] = (5, 6), batch: int = 2
) -> tuple[Tensor, Tensor]:
    """A target and its guidance."""
    H, W = size
    target = torch.rand(batch, channels, H, W, dtype=torch.float64)
    return target, torch.rand(batch, 3, H * factor, W * factor, dtype=torch.float64)


def by_layers(made: JointUpsample, target: Tensor, guidance: Tensor, *, plain: bool) -> Tensor:
    """The network again, of layers that have tests of their own."""
    features = made.guidance(guidance)
    output = made.target(target)
    for i, stage in enumerate(made.stages):
        share = features[:, i * made.features : (i + 1) * made.features]
        scale = 2.0 ** (i + 1) / made.factor
        if scale < 1:
            share = F.interpolate(share, scale_factor=scale, mode="bilinear", align_corners=False)
        convolution = nn.ConvTranspose2d(
            stage.in_channels, stage.out_channels, 5, 2, 2, 1, dtype=torch.float64
        )
        convolution.load_state_dict(stage.state_dict())
        if plain:
            output = convolution(output)
        else:
            output = PacConvTranspose2d.from_conv(convolution, blend=1.0)(output, share)
        output = torch.relu(output)
    return made.head(output)


@all_networks
def test_the_parameters_are_the_papers(factor, width):
    made = JointUpsample(factor, width=width)
    assert sum(p.numel() for p in made.parameters()) == PARAMETERS[factor, width]
    assert not list(made.buffers())


def test_the_state_dict_holds_weights_and_biases_only():
    layers = ["target.conv1", "target.conv2", "target.conv3"]
    layers += ["guidance.conv1", "guidance.conv2", "guidance.conv3"]
    layers += ["stages.0", "stages.1", "head.conv1", "head.conv2"]
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert list(JointUpsample(4).state_dict()) == names


@all_networks
def test_it_is_made_of_transposed_pacs(factor, width):
    made, given = network(factor, width), maps(factor)
    with torch.no_grad():
        assert_close64(made(*given), by_layers(made, *given, plain=False))


@all_networks
def test_the_comparison_sees_plain_stages(factor, width):
    made, given = network(factor, width), maps(factor)
    with torch.no_grad(), pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(made(*given), by_layers(made, *given, plain=True), relative=1e-6)


def test_constant_features_make_it_plain():
    made, given = network(), maps()
    with torch.no_grad():
        for layer in (made.guidance.conv1, made.guidance.conv2, made.guidance.conv3):
            layer.weight.zero_()
        assert_close64(made(*given), by_layers(made, *given, plain=True))


def test_each_stage_has_features_of_its_own():
    made, given = network(), maps()
    with torch.no_grad():
        before = made(*given)
        for i in range(2):
            changed = copy.deepcopy(made)
            changed.guidance.conv3.weight[i * made.features : (i + 1) * made.features] *= 2
            with pytest.raises(AssertionError, match=DIFFERS):
                assert_close64(changed(*given), before, relative=1e-6)


@pytest.mark.parametrize("channels", [2, 3])
def test_a_network_of_one_channel_treats_each_by_itself(channels):
    made = network()
    target, guidance = maps(channels=channels)
    with torch.no_grad():
        alone = [made(target[:, c : c + 1], guidance) for c in range(channels)]
        assert_close64(made(target, guidance), torch.cat(alone, 1))
        with pytest.raises(AssertionError, match=DIFFERS):
            assert_close64(made(target, guidance), torch.cat(alone[::-1], 1), relative=1e-6)


def test_a_network_of_two_channels_mixes_them():
    made = network(channels=2)
    target, guidance = maps(channels=2)
    other = torch.cat([target[:, :1], torch.rand_like(target[:, :1])], 1)
    with torch.no_grad(), pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(made(other, guidance)[:, :1], made(target, guidance)[:, :1], relative=1e-6)


def test_every_parameter_learns():
    made = network()
    made(*maps()).square().sum().backward()
    assert [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_an_image_does_not_depend_on_its_batch():
    made = network()
    target, guidance = maps(batch=3)
    with torch.no_grad():
        assert_close64(made(target, guidance)[1:2], made(target[1:2], guidance[1:2]))


def test_autocast_computes_in_half_precision():
    made = JointUpsample(4, width="lite").eval()
    target, guidance = (tensor.float() for tensor in maps())
    with torch.no_grad():
        exact = made(target, guidance)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = made(target, guidance)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.02 * exact.abs().max().item(), rtol=0)


def bilateral_by_loops(
    target: Tensor, guidance: Tensor, factor: int, side: int, space: float, color: float
) -> Tensor:
    """Kopf et al.'s sum, pixel by pixel."""
    (B, C, H, W), reach = target.shape, side // 2
    output = torch.zeros(B, C, H * factor, W * factor, dtype=torch.float64)
    for b, y, x in itertools.product(range(B), range(H * factor), range(W * factor)):
        total, sums = 0.0, torch.zeros(C, dtype=torch.float64)
        for i, j in itertools.product(range(H), range(W)):
            row, column = i * factor + (factor - 1) // 2, j * factor + (factor - 1) // 2
            if abs(row - y) > reach or abs(column - x) > reach:
                continue
            # The centres of both, in pixels of the input.
            away = ((y + 0.5) / factor - i - 0.5) ** 2 + ((x + 0.5) / factor - j - 0.5) ** 2
            unlike = (guidance[b, :, y, x] - guidance[b, :, row, column]).square().sum().item()
            weight = math.exp(-0.5 * away / space**2 - 0.5 * unlike / color**2)
            total, sums = total + weight, sums + weight * target[b, :, i, j]
        output[b, :, y, x] = sums / total
    return output


GEOMETRIES = {
    "1x": (1, 5),
    "2x": (2, 3),
    "2x_5": (2, 5),
    "3x_5": (3, 5),
    "3x_7": (3, 7),
    "4x_9": (4, 9),
    "5x_11": (5, 11),
}
all_geometries = pytest.mark.parametrize(
    ("factor", "side"), GEOMETRIES.values(), ids=list(GEOMETRIES)
)


@all_geometries
def test_joint_bilateral_upsampling_is_the_sum(factor, side):
    target, guidance = maps(factor, channels=2, size=(3, 4))
    made = JointBilateralUpsample(
        factor, kernel_size=side, sigma_space=0.8, sigma_color=0.3
    ).double()
    expected = bilateral_by_loops(target, guidance, factor, side, 0.8, 0.3)
    assert_close64(made(target, guidance), expected, relative=1e-7)  # σ is a float32


@all_geometries
@pytest.mark.parametrize(("space", "color"), [(0.9, 0.3), (0.8, 0.35)], ids=["space", "color"])
def test_the_sum_sees_the_widths(factor, side, space, color):
    target, guidance = maps(factor, channels=2, size=(3, 4))
    made = JointBilateralUpsample(
        factor, kernel_size=side, sigma_space=space, sigma_color=color
    ).double()
    expected = bilateral_by_loops(target, guidance, factor, side, 0.8, 0.3)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(made(target, guidance), expected, relative=1e-4)


def test_a_window_of_one_pixel_repeats_it():
    target, guidance = maps(3)
    made = JointBilateralUpsample(3, kernel_size=3, sigma_space=1, sigma_color=0.1).double()
    assert_close64(made(target, guidance), F.interpolate(target, scale_factor=3))


def test_far_colours_are_no_division_by_zero():
    target, guidance = maps()
    narrow = JointBilateralUpsample(4, kernel_size=9, sigma_space=1, sigma_color=1e-4).double()
    output = narrow(target, guidance)
    assert output.isfinite().all()
    assert output.min() >= target.min()
    assert output.max() <= target.max()


def test_it_keeps_an_edge_that_interpolation_blurs():
    picture = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    picture[..., 9:] = 1  # inside a block of 4
    truth = picture[:, :1]
    # The block that the edge cuts has the colour of its second pixel.
    low = truth[:, :, 1::4, 1::4]
    upsample = JointBilateralUpsample(4, kernel_size=9, sigma_space=1, sigma_color=0.05).double()
    assert_close64(upsample(low, picture), truth, relative=1e-6)
    with pytest.raises(AssertionError, match=DIFFERS):
        assert_close64(F.interpolate(low, scale_factor=4, mode="bilinear"), truth, relative=0.1)


def test_the_widths_learn_only_if_asked():
    options = {"kernel_size": 9, "sigma_space": 1.0, "sigma_color": 0.2}
    assert not list(JointBilateralUpsample(4, **options).parameters())
    made = JointBilateralUpsample(4, **options, learnable=True).double()
    made(*maps()).square().sum().backward()
    grads = {name: p.grad.item() for name, p in made.named_parameters()}
    assert sorted(name for name, grad in grads.items() if grad != 0) == [
        "log_sigma_color",
        "log_sigma_space",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_bilateral_upsampling_keeps_the_dtype(dtype):
    given = [tensor.to(dtype) for tensor in maps()]
    made = JointBilateralUpsample(4, kernel_size=9, sigma_space=1, sigma_color=0.2)
    assert made(*given).dtype == dtype


REFUSED = {
    "no power of two": (
        lambda: JointUpsample(6),
        "factor must be a power of two from 2 on, got 6. JointBilateralUpsample takes any.",
    ),
    "factor 1": (
        lambda: JointUpsample(1),
        "factor must be a power of two from 2 on, got 1. JointBilateralUpsample takes any.",
    ),
    "no such lite": (
        lambda: JointUpsample(2, width="lite"),
        "the lite network exists for factor 4, 8 and 16, got 2. Use width='full'.",
    ),
    "unknown width": (
        lambda: JointUpsample(4, width="light"),
        "width='light' is unknown. Nearest: 'lite'.",
    ),
    "no channels": (lambda: JointUpsample(4, 0), "channels must be at least 1, got 0."),
    "bilateral factor": (
        lambda: JointBilateralUpsample(0, kernel_size=3, sigma_space=1, sigma_color=1),
        "factor must be at least 1, got 0.",
    ),
    "even side": (
        lambda: JointBilateralUpsample(3, kernel_size=4, sigma_space=1, sigma_color=1),
        "kernel_size must be odd and at least 3, so that every window of factor=3 holds a pixel of "
        "the input, got 4.",
    ),
    "small side": (
        lambda: JointBilateralUpsample(4, kernel_size=3, sigma_space=1, sigma_color=1),
        "kernel_size must be odd and at least 5, so that every window of factor=4 holds a pixel of "
        "the input, got 3.",
    ),
    "width 0": (
        lambda: JointBilateralUpsample(4, kernel_size=9, sigma_space=1, sigma_color=0),
        "sigma_color must be positive and finite, got 0.",
    ),
    "guidance too small": (
        lambda: network()(maps()[0], torch.rand(2, 3, 20, 23)),
        "guidance must be [2, 3, 20, 24] for a target [2, 1, 5, 6] at factor=4, got "
        "[2, 3, 20, 23]. Resize or crop one of them.",
    ),
    "another batch": (
        lambda: network()(maps()[0], torch.rand(1, 3, 20, 24)),
        "guidance must be [2, 3, 20, 24] for a target [2, 1, 5, 6] at factor=4, got "
        "[1, 3, 20, 24]. Resize or crop one of them.",
    ),
    "guidance of one channel": (
        lambda: network()(maps()[0], torch.rand(2, 1, 20, 24)),
        "guidance must be [2, 3, 20, 24] for a target [2, 1, 5, 6] at factor=4, got "
        "[2, 1, 20, 24]. Resize or crop one of them.",
    ),
    "no batch": (
        lambda: network()(torch.rand(5, 6), torch.rand(2, 3, 20, 24)),
        "target must be [B, C, H, W] and guidance [B, C_g, H_out, W_out], got target [5, 6], "
        "guidance [2, 3, 20, 24].",
    ),
    "other channels": (
        lambda: network(channels=2)(*maps(channels=3)),
        "target must have the 2 channels of the network, got [2, 3, 5, 6].",
    ),
    "bilateral guidance": (
        lambda: JointBilateralUpsample(4, kernel_size=9, sigma_space=1, sigma_color=1)(
            maps()[0], torch.rand(2, 7, 20, 20)
        ),
        "guidance must be [2, 7, 20, 24] for a target [2, 1, 5, 6] at factor=4, got "
        "[2, 7, 20, 20]. Resize or crop one of them.",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refusals(call, message):
    with pytest.raises(ShapeError) as raised:
        call()
    assert str(raised.value) == message


def run_benchmark(monkeypatch, folder: Path, *words: str) -> None:
    spec = importlib.util.spec_from_file_location("joint_upsampling", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["joint_upsampling.py", "--data", str(folder), *words])
    module.main()


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Three pairs of a picture and a disparity that has its edges."""
    generator = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        blocks = generator.integers(0, 255, (5, 6), dtype=np.uint8)
        map_ = blocks.repeat(9, 0).repeat(9, 1)
        Image.fromarray(map_).save(tmp_path / f"{name}_disp.png")
        Image.fromarray(np.stack([map_, 255 - map_, map_], -1)).save(tmp_path / f"{name}_rgb.png")
    return tmp_path


def test_the_benchmark_gives_the_same_numbers_again(monkeypatch, capsys, pairs):
    tables = []
    for seed in "001":
        run_benchmark(monkeypatch, pairs, "--test", "two", "--steps", "2", "--seed", seed)
        tables.append([line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]])
    assert len(tables[0]) == 6
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def test_the_benchmark_refuses_pairs_that_are_not_there(monkeypatch, pairs):
    with pytest.raises(SystemExit) as raised:
        run_benchmark(monkeypatch, pairs, "--test", "four")
    assert str(raised.value) == "--test takes some of one, three, two, not all; got ['four']."
