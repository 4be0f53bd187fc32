"""PAC-CRF behind a real segmentation network on VOC images, beside pydensecrf where there is one.

    python benchmarks/crf_voc.py --shared ../shared [--taps 11] [--iterations 40]

Prints, for all images and for the half that the fit did not see: mIoU (of the classes that occur,
void ignored, counted over all images), boundary IoU (Cheng et al., CVPR 2021: only pixels within 2%
of the diagonal of their region's contour, at least one pixel) and seconds per image. The network
was trained on these images, so read the differences, not the levels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from pacswap.nn import PacCRF

CLASSES, VOID = 21, 255
SIDE = 513  # of the network's input, padded
CROP = 160  # pixels, of the fit
GAUSSIAN = {"sxy": 3, "compat": 3}
BILATERAL = {"sxy": 80, "srgb": 13, "compat": 10}
STEPS = 5

Method = Callable[[Tensor, Tensor], Tensor]


class Scene(NamedTuple):
    """One image: logits [1, C, H, W], pixels [1, 3, H, W] in 0..255, labels [H, W]."""

    logits: Tensor
    image: Tensor
    labels: Tensor


class DeepLab(nn.Module):
    """DeepLabV3 on MobileNetV2 at stride 8, as the weights were trained."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "mobilenetv2_100", features_only=True, output_stride=8, out_indices=(4,)
        )
        self.classifier = nn.Sequential(ASPP(320, [], 256), nn.Conv2d(256, CLASSES, 1))
        self.load_state_dict(load_file(weights))

    def forward(self, image: Tensor) -> Tensor:
        """Logits [1, C, H, W] of an image [1, 3, H, W] in 0..255, at its own resolution."""
        H, W = image.shape[-2:]
        size = [round(n * SIDE / max(H, W)) for n in (H, W)]
        small = F.interpolate(image, size=size, mode="bilinear", antialias=True)
        padded = F.pad(small / 127.5 - 1, (0, SIDE - size[1], 0, SIDE - size[0]))
        logits = self.classifier(self.backbone(padded)[0])
        logits = F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
        return F.interpolate(logits[:, :, : size[0], : size[1]], size=(H, W), mode="bilinear")


def load_scenes(shared: Path, most: int) -> list[Scene]:
    """The images with the network's logits."""
    assets = shared / "assets"
    net = DeepLab(assets / "weights" / "deeplabv3_mobilenetv2_voc21.safetensors").eval()
    scenes = []
    for path in sorted((assets / "voc_mini" / "masks").iterdir())[:most]:
        (photo,) = (assets / "voc_mini" / "images").glob(f"{path.stem}.*")
        pixels = np.array(Image.open(photo).convert("RGB"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        labels = torch.from_numpy(np.array(Image.open(path))).long()
        with torch.no_grad():
            scenes.append(Scene(net(image), image, labels))
    return scenes


def counts(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in the intersection and the union of each class, [2, C]: whole, then boundary."""
    valid = labels != VOID
    diagonal = (labels.shape[0] ** 2 + labels.shape[1] ** 2) ** 0.5
    width = max(1, round(0.02 * diagonal))
    regions = torch.arange(CLASSES)[:, None, None]
    truth, guess = labels == regions, predicted == regions
    both, either = [], []
    for one, other in ((truth, guess), (rim(truth, width), rim(guess, width))):
        both.append((one & other & valid).sum((1, 2)))
        either.append(((one | other) & valid).sum((1, 2)))
    return torch.stack(both), torch.stack(either)


def rim(regions: Tensor, width: int) -> Tensor:
    """The pixels of a region [C, H, W] within `width` of its contour; the image ends there too."""
    outside = F.pad((~regions).float(), [width] * 4, value=1.0)
    near = F.max_pool2d(outside[None], (2 * width + 1, 1), stride=1)
    near = F.max_pool2d(near, (1, 2 * width + 1), stride=1)[0]
    return regions & (near > 0)


class Score(NamedTuple):
    """mIoU and boundary IoU in percent, and seconds per image."""

    miou: float
    boundary: float
    seconds: float


class Result(NamedTuple):
    """What a method made of one image: pixels [2, C] as `counts` gives them, and the time."""

    both: Tensor
    either: Tensor
    seconds: float


def measure(scenes: list[Scene], method: Method) -> list[Result]:
    """Run a method, from logits and image to logits or probabilities, on each scene."""
    results = []
    for scene in scenes:
        start = time.perf_counter()
        with torch.no_grad():
            log_q = method(scene.logits, scene.image)
        spent = time.perf_counter() - start
        results.append(Result(*counts(log_q[0].argmax(0), scene.labels), spent))
    return results


def score(scenes: list[Scene], results: list[Result]) -> Score:
    """The figures over all of these scenes together, of the classes that occur in them."""
    labels = torch.cat([scene.labels[scene.labels != VOID] for scene in scenes])
    occurs = torch.bincount(labels, minlength=CLASSES) > 0
    both = torch.stack([result.both for result in results]).sum(0)
    either = torch.stack([result.either for result in results]).sum(0)
    iou = (both / either.clamp(min=1))[:, occurs].mean(1) * 100
    seconds = sum(result.seconds for result in results) / len(results)
    return Score(iou[0].item(), iou[1].item(), seconds)


def row(name: str, score: Score) -> str:
    """A line of the table."""
    return f"{name:24}{score.miou:8.2f}{score.boundary:10.2f}{score.seconds:9.2f}"


def fit(crf: PacCRF, scenes: list[Scene], iterations: int) -> None:
    """Adam on the CRF's own parameters, on crops; the network's logits stay as they are."""
    optimizer = torch.optim.Adam(crf.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, iterations)
    generator = torch.Generator().manual_seed(0)
    for i in range(iterations):
        scene = scenes[i % len(scenes)]
        H, W = scene.labels.shape
        y = int(torch.randint(H - CROP + 1, (), generator=generator))
        x = int(torch.randint(W - CROP + 1, (), generator=generator))
        at = (..., slice(y, y + CROP), slice(x, x + CROP))
        log_q = crf(scene.logits[at], scene.image[at])
        loss = F.cross_entropy(log_q, scene.labels[at][None], ignore_index=VOID)
        optimizer.zero_grad()
        if torch.isfinite(loss):  # a crop may be void altogether
            loss.backward()
            optimizer.step()
        schedule.step()


def pydensecrf() -> Method | None:
    """Pydensecrf with the same numbers, or None where it is not installed."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError:
        return None

    def infer(logits: Tensor, image: Tensor) -> Tensor:
        H, W = image.shape[-2:]
        energy = -F.log_softmax(logits, 1)[0].reshape(CLASSES, -1).contiguous().numpy()
        pixels = image[0].permute(1, 2, 0).byte().contiguous().numpy()
        crf = DenseCRF2D(W, H, CLASSES)
        crf.setUnaryEnergy(energy)
        crf.addPairwiseGaussian(**GAUSSIAN)
        crf.addPairwiseBilateral(**BILATERAL, rgbim=pixels)
        beliefs = np.array(crf.inference(STEPS)).reshape(CLASSES, H, W)
        return torch.from_numpy(beliefs)[None]

    return infer


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--taps", type=int, default=11)
    parser.add_argument("--blur", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    scenes = load_scenes(options.shared, options.images)
    seen, unseen = scenes[::2], scenes[1::2]

    def made() -> PacCRF:
        return PacCRF.from_densecrf(
            CLASSES,
            gaussian=[GAUSSIAN],
            bilateral=[BILATERAL],
            steps=STEPS,
            taps=options.taps,
            blur=options.blur,
        )

    methods: dict[str, Method] = {
        "network alone": lambda logits, image: logits,
        "PAC-CRF": made(),
    }
    dense = pydensecrf()
    if dense is not None:
        methods["pydensecrf"] = dense
    print(f"{len(scenes)} images, taps {options.taps}, blur {options.blur}, {STEPS} steps")
    print(f"{'':24}{'mIoU':>8}{'boundary':>10}{'s/image':>9}")
    results = {}
    for name, method in methods.items():
        results[name] = measure(scenes, method)
        print(row(name, score(scenes, results[name])), flush=True)
    fitted = made()
    start = time.perf_counter()
    fit(fitted, seen, options.iterations)
    spent = time.perf_counter() - start
    print(f"the {len(unseen)} images that the fit does not see")
    for name in methods:
        print(row(name, score(unseen, results[name][1::2])))
    print(row("PAC-CRF, fitted", score(unseen, measure(unseen, fitted))))
    print(f"fit: {options.iterations} crops of {CROP}×{CROP} in {spent:.0f} s")
    for name, parameter in fitted.named_parameters():
        value = parameter.detach().exp() if "log_" in name else parameter
        print(f"  {name.replace('log_', '')} {value.item():.3g}")


if __name__ == "__main__":
    main()
