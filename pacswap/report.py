"""What an upgrade did, in figures: as data, as JSON, as Markdown."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from pacswap.surgery import Group, Plan, Verification
from pacswap.surgery.modes import kept_modes
from pacswap.surgery.plan import PlannedLayer
from pacswap.surgery.spec import CRFSpec, FilterSpec
from pacswap.surgery.words import deed


@dataclass(frozen=True)
class Latency:
    """Forward passes of the original and the upgraded model, timed in turns.

    Attributes:
        before: median of the original, in seconds.
        after: median of the upgraded, in seconds.
        ratio: median of after/before over the pairs.
        lowest: smallest ratio of a pair.
        highest: largest ratio of a pair.
        pairs: how many pairs were timed.
        shape: of the input.
        device: where.
    """

    before: float
    after: float
    ratio: float
    lowest: float
    highest: float
    pairs: int
    shape: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class Report:
    """The record of an upgrade.

    Attributes:
        recipe: the recipe's file.
        model: the name in its library.
        plan: what was done.
        bandwidths: after calibration, by the layer that holds them.
        verification: the promises, measured.
        latency: before and after, at blend 0.5 so that the adaptive path is what is timed.
        versions: of Python and the libraries.
    """

    recipe: str
    model: str
    plan: Plan
    bandwidths: dict[str, float]
    verification: Verification
    latency: Latency
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plan = self.plan
        return {
            "recipe": self.recipe,
            "model": self.model,
            "passed": self.verification.passed,
            "plan": plan_as_dict(plan),
            "bandwidths": self.bandwidths,
            "checks": [asdict(check) for check in self.verification.checks],
            "latency": asdict(self.latency),
            "versions": self.versions,
        }

    def as_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"

    def as_markdown(self) -> str:
        """The report as a page for people."""
        latency = self.latency
        verdict = "all promises hold" if self.verification.passed else "A PROMISE IS BROKEN"
        checks = "\n".join(
            f"| {c.promise} | {c.name} | {'yes' if c.passed else '**no**'} | {c.measured} |"
            for c in self.verification.checks
        )
        widths = "\n".join(f"| `{k}` | {v:.3g} |" for k, v in self.bandwidths.items())
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"# {self.model}: {deed(self.plan)}, {verdict}\n\n"
            f"Recipe: `{self.recipe}`\n\n```text\n{self.plan}\n```\n\n"
            "## The promises, measured\n\n| | check | holds | measured |\n|---|---|---|---|\n"
            f"{checks}\n\n"
            "## Latency\n\n"
            f"Forward pass of {'×'.join(map(str, latency.shape))} on {latency.device}, "
            f"{latency.pairs} pairs in turns: before {1e3 * latency.before:.1f} ms, after "
            f"{1e3 * latency.after:.1f} ms, ratio {latency.ratio:.2f} "
            f"({latency.lowest:.2f} … {latency.highest:.2f}). Timed with every blend at 0.5; at 0 "
            "a swapped convolution runs as the plain one on the CPU.\n\n"
            + (f"## Bandwidths\n\n| layer | bandwidth |\n|---|---|\n{widths}\n\n" if widths else "")
            + f"Measured with {versions}.\n"
        )


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """A plan as plain data."""
    layers = []
    for layer in plan.layers:
        kernel, guidance = plan.kernels[layer.kernel], plan.guidance_of(layer)
        layers.append(
            {
                "name": layer.name,
                "operation": layer.operation,
                "what": layer.what,
                "place": layer.place,
                "guidance": list(guidance.sources),
                "guidance_channels": guidance.channels,
                "kernel": asdict(kernel.spec),
                **_inserted(plan.groups[layer.group], layer),
                "output_size": list(kernel.output_size),
            }
        )
    scopes = [{"module": s.module, "method": s.method, "class": s.kind} for s in plan.scopes]
    return {
        "model": plan.model,
        "input_shape": list(plan.input_shape),
        "layers": layers,
        "rewired": scopes,
        "added_parameters": plan.added_parameters(),
        "cost": asdict(plan.cost),
    }


def _inserted(group: Group, layer: PlannedLayer) -> dict[str, Any]:
    """The options of what is put behind a layer; nothing for one that is replaced."""
    if not layer.is_inserted:
        return {}
    if group.operation == "append":
        return {"crf": asdict(group.crf or CRFSpec())}
    return {"filter": asdict(group.filter or FilterSpec())}


def measure_latency(
    original: nn.Module,
    upgraded: nn.Module,
    example: Tensor,
    *,
    guidance: Tensor | None = None,
    seconds: float = 4.0,
) -> Latency:
    """Time both models in turns, A B A B …, in eval mode without gradients.

    Args:
        original: before the swap.
        upgraded: after it.
        example: the input, [B, C, H, W].
        guidance: an external guidance, if the model was upgraded with one.
        seconds: how long to measure, roughly; at least three pairs.
    """
    device = example.device
    with torch.inference_mode(), kept_modes(original), kept_modes(upgraded):
        original.eval()
        upgraded.eval()
        given = {} if guidance is None else {"guidance": guidance[: example.shape[0]]}
        _seconds(original, example, {})
        _seconds(upgraded, example, given)
        pairs: list[tuple[float, float]] = []
        began = time.perf_counter()
        while len(pairs) < 3 or (time.perf_counter() - began < seconds and len(pairs) < 50):
            before = _seconds(original, example, {})
            pairs.append((before, _seconds(upgraded, example, given)))
    ratios = [after / before for before, after in pairs]
    return Latency(
        statistics.median(before for before, _ in pairs),
        statistics.median(after for _, after in pairs),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        len(pairs),
        tuple(example.shape),
        device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
    )


def versions() -> dict[str, str]:
    """Of Python, pacswap and the libraries that decide the figures."""
    found = {"Python": platform.python_version()}
    found |= {name: version(name) for name in ("pacswap", "torch", "torchvision", "timm")}
    return found


def _seconds(model: Callable[..., Any], example: Tensor, given: dict[str, Tensor]) -> float:
    began = time.perf_counter()
    model(example, **given)
    if example.device.type == "cuda":
        torch.cuda.synchronize(example.device)
    return time.perf_counter() - began
