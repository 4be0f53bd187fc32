"""Which layers would gain from which guidance: |dL/dblend| of every pair on a few batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from pacswap.errors import PlanError, TrainingError
from pacswap.surgery import (
    Group,
    GuidanceSpec,
    KernelSpec,
    Plan,
    calibrate,
    pac_layers,
    plan_groups,
    rewrite,
)
from pacswap.surgery.cost import added_cost
from pacswap.surgery.modes import kept_random
from pacswap.surgery.plan import names
from pacswap.surgery.request import as_groups
from pacswap.surgery.skeleton import look
from pacswap.surgery.spec import Layers, Operation
from pacswap.surgery.table import columns, quantity
from pacswap.surgery.targets import KINDS, why_not
from pacswap.train.candidates import named, stage_ends

Loss = Callable[[Any, Tensor], Tensor]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Answer:
    """How a layer answers to a guidance.

    Attributes:
        layer: dotted name, or the label of a call.
        guidance: its sources, as a recipe writes them.
        gradient: mean of |dL/dblend| over the batches, at blend 0. A blend has no unit and means
            the same in every layer (0 is the layer as it was, 1 the paper's), so these compare: by
            how much the loss would fall, per unit, if the blend began to move.
        error: standard error of that mean over the batches; None of a single batch.
        slope: mean of dL/dblend with its sign. Far from ±`gradient`, the batches disagree on the
            direction, and there is less to gain than the magnitude says.
        macs: multiply-accumulates that this layer alone would add for one image.
        share: that as a share of the network's.
    """

    layer: str
    guidance: str
    gradient: float
    error: float | None
    slope: float
    macs: int
    share: float


@dataclass(frozen=True)
class Probed:
    """Every layer with every guidance that it could have, best first.

    Attributes:
        model: the class name.
        operation: what would be done.
        answers: by falling |dL/dblend|.
        left_out: (layer or guidance, why) of what could not be probed.
        batches: how many were looked at.
        plans: what was tried, by the guidance.
    """

    model: str
    operation: Operation
    answers: tuple[Answer, ...]
    left_out: tuple[tuple[str, str], ...]
    batches: int
    plans: Mapping[str, Plan]

    def best(self, top: int, max_cost: float | None = None) -> tuple[str, ...]:
        """The layers that answer most, together within a budget, in the order in which they run.

        Args:
            top: at most so many.
            max_cost: the most that they may add to the network's multiply-accumulates, as a share
                of these; a layer that would exceed it is passed over. What layers share counts
                once.

        Raises:
            PlanError: several guidances were probed, or no layer is cheap enough.
        """
        if len(self.plans) != 1:
            raise PlanError(f"best: expected one guidance, got {len(self.plans)}. Probe one.")
        (plan,) = self.plans.values()
        chosen: list[str] = []
        for answer in self.answers:
            within = max_cost is None or _share(plan, [*chosen, answer.layer]) <= max_cost
            if within and len(chosen) < top:
                chosen.append(answer.layer)
        if not chosen:
            least = min(answer.share for answer in self.answers)
            raise PlanError(
                f"no layer fits into max_cost {100 * (max_cost or 0):g}%: the cheapest of "
                f"{len(self.answers)} adds {_percent(least)} of the network's MACs. Raise "
                "max_cost, or project the guidance to fewer channels."
            )
        return tuple(name for name in names(plan.layers) if name in chosen)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "model": self.model,
            "operation": self.operation,
            "batches": self.batches,
            "answers": [vars(answer) for answer in self.answers],
            "left_out": [{"name": name, "why": why} for name, why in self.left_out],
        }

    def __str__(self) -> str:
        """A table, best first."""
        rows = []
        for answer in self.answers:
            error = "" if answer.error is None else f" ± {answer.error:.1e}"
            figure = f"{answer.gradient:.2e}{error}"
            cost = f"{quantity(answer.macs)} ({_percent(answer.share)})"
            rows.append([answer.layer, answer.guidance, figure, f"{answer.slope:+.1e}", cost])
        count = f"{self.batches} batch{'es' if self.batches > 1 else ''}"
        error = ", ± standard error" if self.batches > 1 else ""
        noun = KINDS[self.operation].noun
        lines = [
            f"{self.model}: |dL/dblend| of each {noun} and guidance, mean over {count}{error}",
            "",
            *columns([noun, "guidance", "|dL/dblend|", "dL/dblend", "added MACs"], rows),
        ]
        if self.left_out:
            lines += ["", f"  left out: {len(self.left_out)}"]
            lines += [f"    {name}: {why}" for name, why in self.left_out]
        return "\n".join(lines)


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    operation: Operation = "swap",
    layers: Layers | list[Any] | Mapping[str, Any] = "*",
    guidance: str | Mapping[str, Any] | GuidanceSpec | Sequence[Any] | None = None,
    kernel: KernelSpec | Mapping[str, Any] | None = None,
    most: int = 4,
    progress: Progress = lambda done, of, what: None,
) -> Probed:
    """Rank every layer × guidance by |dL/dblend| on a few batches of the user's data.

    For each guidance all layers that can have it are swapped at once, on a copy: each has a blend
    of its own, held at 0, where the network still is the original. One forward and one backward
    pass per batch in eval mode (fixed statistics, no dropout) then give all gradients. Bandwidths
    that are `auto` are calibrated on the first batch. The model is left as it was.

    Args:
        model: the original network.
        batches: (images, masks) or objects with those two attributes; images normalised, as the
            model takes them, [B, C, H, W].
        loss: from the model's output and the masks to a scalar tensor.
        operation: `"swap"`, `"pool"`, `"upsample"` or `"append"`.
        layers: which of the layers that the operation can change; those that it refuses are left
            out, with the reason.
        guidance: a list of candidates, each as `pacswap.swap` takes a guidance (a list in the list
            is concatenated), or a single one. By default `input` and the last layer at each
            resolution (1/2, 1/4 …) before the network goes coarser. A candidate that comes too late
            for a layer is not offered to it.
        kernel: how the kernels are made; its blend is not looked at.
        most: how many batches are taken.
        progress: called with (passes done, all passes, the guidance) before each pass and at the
            end.

    Raises:
        PlanError: no layer can be changed, a pattern matches nothing, or a given guidance can feed
            none of the layers.
        TrainingError: there is no batch, or the loss is not a finite scalar that depends on the
            layers.
    """
    taken = pairs(batches, most)
    example = torch.empty_like(taken[0][0], device="meta")
    specs = _candidates(model, guidance, example, operation)
    (asked,) = as_groups(layers, "input", kernel=kernel, operation=operation)
    asked = replace(asked, kernel=replace(asked.kernel, blend=0.0))
    eligible, left_out = _eligible(model, asked, example)
    answers: list[Answer] = []
    plans: dict[str, Plan] = {}
    fed: set[str] = set()
    for number, spec in enumerate(specs):
        group = replace(asked, layers=tuple(eligible), guidance=spec)
        title = _title(spec)

        def step(done: int, number: int = number, title: str = title) -> None:
            progress(number * len(taken) + done, len(specs) * len(taken), title)

        try:
            plan = _fed(model, group, example)
            gradients = _gradients(model, plan, taken, loss, step)
        except PlanError as error:
            if guidance is not None:
                raise
            left_out.append((title, str(error)))
            continue
        plans[title] = plan.record()
        fed.update(names(plan.layers))
        answers += [_answer(plan, name, title, gradients[name]) for name in gradients]
        resting = [name for name in names(plan.layers) if name not in gradients]
        left_out += [(name, "it rests in eval mode") for name in resting]
    unfed = [name for name in eligible if name not in fed]
    left_out += [(name, "no guidance that was tried can feed it") for name in unfed]
    if not answers:
        listed = "\n".join(f"  - {name}: {why}" for name, why in left_out)
        raise PlanError(f"nothing of {type(model).__name__} could be probed:\n{listed}")
    progress(len(specs) * len(taken), len(specs) * len(taken), "")
    answers.sort(key=lambda answer: -answer.gradient)
    unique = tuple(dict.fromkeys(left_out))
    return Probed(type(model).__name__, operation, tuple(answers), unique, len(taken), plans)


def pairs(batches: Iterable[Any], most: int) -> list[tuple[Tensor, Tensor]]:
    """The first few batches as (images, masks).

    Raises:
        TrainingError: there are none, or they are something else.
    """
    taken = [_pair(batch) for batch in islice(batches, most)]
    if not taken:
        raise TrainingError("there is no batch to probe on. Give at least one (images, masks).")
    return taken


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if hasattr(batch, "images") and hasattr(batch, "masks"):
        return batch.images, batch.masks
    if isinstance(batch, tuple | list) and len(batch) >= 2 and isinstance(batch[0], Tensor):
        return batch[0], batch[1]
    raise TrainingError(f"expected batches of (images, masks), got {type(batch).__name__}.")


def _candidates(
    model: nn.Module, guidance: Any, example: Tensor, operation: Operation
) -> list[GuidanceSpec]:
    """The guidances to try, as surgery takes them."""
    if guidance is None:
        _, seen = look(model, example)
        ends = stage_ends(seen, (example.shape[-2], example.shape[-1]))
        return [GuidanceSpec(source) for source in ("input", *ends)]
    many = isinstance(guidance, Sequence) and not isinstance(guidance, str)
    given = list(guidance) if many else [guidance]
    specs = [as_groups("*", one, operation=operation)[0].guidance for one in given]
    if not specs:
        raise PlanError("guidance: expected at least one candidate, got an empty list.")
    if any("external" in (s.source if isinstance(s.source, tuple) else (s.source,)) for s in specs):
        raise PlanError(
            "an external guidance cannot be probed: batches hold images and masks only. Leave it "
            "out of the candidates."
        )
    return list(dict.fromkeys(specs))


def _title(spec: GuidanceSpec) -> str:
    """A guidance in a table: its sources, and what is not as by default."""
    words = ", ".join((spec.source,) if isinstance(spec.source, str) else spec.source)
    words += f" → {spec.channels}" if spec.channels is not None else ""
    words += f" ({spec.resize})" if spec.resize != GuidanceSpec.resize else ""
    return words + (" (detached)" if spec.detach else "")


def _eligible(
    model: nn.Module, asked: Group, example: Tensor
) -> tuple[list[str], list[tuple[str, str]]]:
    """The layers that the operation can change, and (name, why) of those that it cannot."""
    chosen, faults = named(model, asked, example)
    if faults:
        raise PlanError("\n".join(faults))
    eligible, left_out = [], []
    for target in chosen:
        reason = why_not(asked.operation, target)
        if reason is None:
            eligible.append(target.name)
        elif asked.layers != "*" or (target.is_spatial and asked.operation != "append"):
            # Asked for everything, nobody means 1×1 convolutions, or a CRF behind every layer.
            left_out.append((target.name, reason))
    if not eligible:
        refused = "".join(f"\n  - {name}: {why}" for name, why in left_out)
        nouns = KINDS[asked.operation].nouns
        raise PlanError(f"{type(model).__name__} has no {nouns} that could be changed.{refused}")
    return eligible, left_out


def _fed(model: nn.Module, group: Group, example: Tensor) -> Plan:
    """A plan for all layers of a group that its guidance can feed.

    Raises:
        PlanError: there are none, or the guidance is no layer.
    """
    try:
        return plan_groups(model, [group], example)
    except PlanError:
        # A group for each layer, so that every fault says whose it is.
        listed = cast("tuple[str, ...]", group.layers)
        each = [replace(group, layers=(name,)) for name in listed]
        try:
            plan_groups(model, each, example)
        except PlanError as error:
            faulty = {fault.group for fault in error.faults}
            rest = tuple(name for number, name in enumerate(listed) if number not in faulty)
            if not rest or None in faulty or not faulty:
                raise
            return _fed(model, replace(group, layers=rest), example)
        raise


def _gradients(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss: Loss,
    step: Callable[[int], None],
) -> dict[str, list[float]]:
    """dL/dblend on each batch, by the layer's name; without those that did not run."""
    upgraded = rewrite(model, plan).eval()
    parameter = next(upgraded.parameters())
    calibrate(upgraded, plan, batches[0][0])
    found = pac_layers(upgraded)
    blends = {layer.name: found[layer.place].blend for layer in plan.layers}
    upgraded.requires_grad_(False)
    for blend in blends.values():
        blend.requires_grad_(True)
    gradients: dict[str, list[float]] = {name: [] for name in blends}
    for number, (images, masks) in enumerate(batches):
        step(number)
        with kept_random(), torch.enable_grad():
            value = loss(upgraded(images.to(parameter)), masks.to(parameter.device))
            _check(value, number)
            parts = torch.autograd.grad(value, list(blends.values()), allow_unused=True)
        for name, part in zip(blends, parts, strict=True):
            if part is not None:
                gradients[name].append(part.item())
    return {name: each for name, each in gradients.items() if each}


def _check(value: Any, number: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TrainingError(f"loss: expected a scalar tensor, got {shown}.")
    if not value.requires_grad:
        raise TrainingError(
            "the loss has no gradient: it does not depend on what the network returns, or was "
            "computed without gradients."
        )
    if not value.isfinite():
        raise TrainingError(
            f"the loss of batch {number} is {value.item()}. Look at its masks (are all labels "
            "ignored?) and at the normalisation of its images."
        )


def _answer(plan: Plan, name: str, guidance: str, gradients: Sequence[float]) -> Answer:
    count = len(gradients)
    sizes = [abs(g) for g in gradients]
    mean = math.fsum(sizes) / count
    error = None
    if count > 1:
        error = math.sqrt(math.fsum((s - mean) ** 2 for s in sizes) / (count - 1) / count)
    macs = _macs(plan, [name])
    slope = math.fsum(gradients) / count
    share = macs / plan.cost.macs if plan.cost.macs else 0.0
    return Answer(name, guidance, mean, error, slope, macs, share)


def _macs(plan: Plan, chosen: Sequence[str]) -> int:
    """Multiply-accumulates that some of a plan's layers add; what they share counts once."""
    kept = [layer for layer in plan.layers if layer.name in chosen]
    kernels = [plan.kernels[i] for i in sorted({i for layer in kept for i in layer.kernels})]
    used = sorted({kernel.guidance for kernel in kernels})
    place = {index: number for number, index in enumerate(used)}
    kernels = [replace(kernel, guidance=place[kernel.guidance]) for kernel in kernels]
    return added_cost(kept, kernels, [plan.guidances[i] for i in used], 4)[1]


def _share(plan: Plan, chosen: Sequence[str]) -> float:
    return _macs(plan, chosen) / plan.cost.macs if plan.cost.macs else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 1e-4 else "under 0.01 %"
