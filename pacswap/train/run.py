"""`finetune`: from a recipe's file to trained networks, a comparison and a report."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pacswap.checkpoint import source_of
from pacswap.errors import TrainingError
from pacswap.recipes import StageSection, find_recipe, load_recipe
from pacswap.report import Latency, measure_latency, versions
from pacswap.surgery import Plan, disabled, verify
from pacswap.surgery.words import deed
from pacswap.train.arms import Arm, make_arm
from pacswap.train.choose import decided
from pacswap.train.data.batches import Batches
from pacswap.train.data.split import shared_pictures
from pacswap.train.diagnose import diagnose
from pacswap.train.engine.begin import checked_groups
from pacswap.train.engine.device import on_main
from pacswap.train.engine.events import Event, Note
from pacswap.train.engine.job import Job
from pacswap.train.engine.loop import train
from pacswap.train.measure.curves import draw_curves
from pacswap.train.measure.infer import evaluate
from pacswap.train.measure.metrics import Scores
from pacswap.train.measure.summary import (
    CAPACITY,
    CONTROL,
    UPGRADED,
    ArmResult,
    RunSummary,
    write_report,
)
from pacswap.train.probe import Probed
from pacswap.train.setting import (
    CURVES,
    MODEL,
    PICTURES,
    ArmBegun,
    Phase,
    RunProgress,
    Setting,
    check_classes,
    prepare,
    scales_of,
    some_images,
)
from pacswap.train.trained import keep_model
from pacswap.train.views import Views
from pacswap.upgrade import built, calibration_images, half_blended, planned
from pacswap.zoo import has_trained_head

LOG = "log.csv"
_BEFORE = "before fine-tuning"
_PLAIN = "plain layers"
_CALIBRATION = 8  # pictures on which bandwidths are set and the promises measured


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` gives.

    Attributes:
        model: the upgraded network of the first seed, trained, in eval mode.
        plan: what was done to it.
        summary: the figures.
        folder: the run's.
        main: whether this process is the one that wrote; others hold the same figures.
    """

    model: nn.Module
    plan: Plan
    summary: RunSummary
    folder: Path
    main: bool = True


@dataclass
class _Run:
    """What a run gathers."""

    setting: Setting
    arms: list[str]
    seeds: tuple[int, ...]
    views: Views
    results: list[ArmResult] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kept: Arm | None = None
    before: Scores | None = None
    latency: Latency | None = None

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


def finetune(
    recipe: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    output: str | os.PathLike[str] | None = None,
    control: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    trust_python: bool = False,
    progress: RunProgress = lambda event: None,
) -> Finetuned:
    """Train an upgraded network as a recipe says, and find out what the swap brought.

    Under `accelerate launch` or `torchrun` every process calls this; the first one writes.

    Args:
        recipe: a file with a `finetune` section, or the name of a shipped recipe.
        overrides: `key=value`, such as `finetune.data.root=data`.
        output: the run's folder; `runs/` and the recipe's name by default.
        control: also train the untouched network alike, as a recipe with `control:` does.
        resume: go on with a run that was interrupted.
        overwrite: replace the run that lies there.
        trust_python: allow `library: python`, which runs the code that the recipe names.
        progress: told of every phase, arm, step and measure.

    Returns:
        The trained network, its plan and the figures; the same lies in the run's folder.

    Raises:
        RecipeError: the recipe is wrong, or asks for what the network cannot give.
        ModelError: the network cannot be built.
        WeightsError: its weights cannot be had.
        DataError: pictures are missing, damaged or mislabelled.
        VerificationError: the swap breaks a promise; nothing is trained then.
        TrainingError: the training cannot begin or go on; the message says what is kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; the message says how to go on.
    """
    began = time.perf_counter()
    loaded = load_recipe(find_recipe(recipe), overrides)
    folder = Path(output) if output is not None else Path("runs") / loaded.path.stem
    setting = prepare(
        loaded,
        folder,
        resume=resume,
        overwrite=overwrite,
        trust_python=trust_python,
        say=progress,
    )
    asked = setting.section.control
    arms = [UPGRADED] if asked is None and not control else [CONTROL, UPGRADED]
    arms += [CAPACITY] if asked is not None and asked.capacity else []
    seeds = (asked.seeds if asked is not None else None) or (setting.section.seed,)
    run = _Run(setting, arms, seeds, Views(setting.val, setting.section.evaluate))
    shared = shared_pictures(setting.train, setting.val)
    if shared is not None:
        run.warn(shared)
    _prove(run)
    _train_all(run, resume=resume)
    assert run.kept is not None and run.kept.plan is not None
    model = run.kept.model.eval()
    _look_inside(run, model)
    again = f"{os.fspath(folder)}-again"  # the run's own folder is taken by then
    words = ["pacswap", "finetune", os.fspath(recipe), *overrides, "-o", again]
    words += ["--control"] * control + ["--trust-python"] * trust_python
    summary = _report(run, shlex.join(words), began)
    return Finetuned(model, run.kept.plan, summary, folder, setting.main)


def _prove(run: _Run) -> None:
    """Before anything is trained: the promises, the classes, the price, the score to start from."""
    setting = run.setting
    setting.say(Phase("verifying the promises"))
    loaded, seed = setting.loaded, run.seeds[0]
    device = setting.accelerator.device
    original = built(loaded, setting.trust_python, seed=seed).eval().to(device)
    scales = scales_of(setting.section.data, original)
    height, width = setting.val.read(0)[0].shape[-2:]
    images = some_images(setting.train, 2, (height, width), scales).to(device)
    check_classes(original, loaded.recipe, images[:1], len(setting.val.classes))

    def tell(group: str, probed: Probed) -> None:
        setting.say(Note(f"{group}: a probe of the data chooses among\n{probed}"))

    chosen = decided(loaded, setting.section, setting.train, original, tell)
    run.setting = setting = replace(setting, loaded=chosen)
    arms = {name: _arm(setting, name, seed) for name in run.arms}
    arm = arms[UPGRADED]
    assert arm is not None and arm.plan is not None
    if any(guidance.is_external for guidance in arm.plan.guidances):
        raise TrainingError(
            f"{loaded.path} asks for an external guidance, which no labelled data brings along. "
            "Name a layer or 'input', or train in a loop of your own: docs/own_loop.md."
        )
    for each in filter(None, arms.values()):
        _check(run, each, scales)
    pair = torch.cat([images, images])[:2]  # in train mode one picture would not do
    verify(original, arm.model, pair).raise_if_failed()
    setting.say(Phase("measuring the latency"))
    run.latency = measure_latency(original, half_blended(arm.model), images[:1])
    if has_trained_head(source_of(loaded.recipe)):
        setting.say(Phase("measuring the network before fine-tuning"))
        run.before = evaluate(
            original,
            setting.val,
            setting.section.evaluate,
            mean=scales[0],
            std=scales[1],
            device=device,
            accelerator=setting.accelerator,
        )
        run.views.add(_BEFORE, original, *scales)


def _check(run: _Run, arm: Arm, scales: tuple[Sequence[float], Sequence[float]]) -> None:
    """What training an arm would complain of, before anything is trained."""
    setting, section = run.setting, run.setting.section
    job = _job(setting, arm, run.seeds[0], scales)
    checked_groups(job, setting.accelerator)
    Batches(
        job.train,
        section.data.transforms,
        batch_size=section.batch_size,
        seed=job.seed,
        mean=job.mean,
        std=job.std,
        rank=setting.accelerator.process_index,
        world=setting.accelerator.num_processes,
    )


def _job(
    setting: Setting, arm: Arm, seed: int, scales: tuple[Sequence[float], Sequence[float]]
) -> Job:
    return Job(
        model=arm.model,
        section=setting.section,
        train=setting.train,
        val=setting.val,
        roles=arm.roles,
        seed=seed,
        folder=setting.place_of(arm.name, seed),
        mean=scales[0],
        std=scales[1],
        arm=arm.name,
    )


def _arm(setting: Setting, name: str, seed: int) -> Arm | None:
    """A network of that name, its bandwidths set on pictures that it will learn from."""
    loaded, device = setting.loaded, setting.accelerator.device
    plain = built(loaded, setting.trust_python, seed=seed).to(device)
    section = loaded.recipe.calibration
    if section is not None and section.images is not None:
        images = calibration_images(loaded, plain, planned(loaded, plain))
    else:
        scales = scales_of(setting.section.data, plain)
        size = setting.val.read(0)[0].shape[-2:]
        images = some_images(setting.train, _CALIBRATION, size, scales)
    return make_arm(name, loaded, plain, images.to(device))


def _train_all(run: _Run, *, resume: bool) -> None:
    """Every arm with every seed; the first upgraded network is kept as soon as it is trained."""
    setting, section = run.setting, run.setting.section
    of = len(run.arms) * len(run.seeds)
    for number, (seed, name) in enumerate([(s, n) for s in run.seeds for n in run.arms], start=1):
        setting.say(ArmBegun(name, seed, number, of))
        arm = _arm(setting, name, seed)
        if arm is None:
            run.warn(
                "No capacity control was trained: with every kernel constant the recipe adds "
                "nothing, and the control is that network already."
            )
            continue
        mean, std = scales_of(section.data, arm.model)
        job = _job(setting, arm, seed, (mean, std))

        def say(event: Event) -> None:
            if isinstance(event, Note) and event.warning:
                run.warn(event.text)
            setting.say(event)

        done = train(job, resume=resume, progress=say)
        result = ArmResult(
            name, seed, done.scores, done.steps, done.seconds, done.best_step, job.folder / LOG
        )
        run.results.append(result)
        if seed == run.seeds[0]:
            run.views.add(name, arm.model, mean, std)
        if seed == run.seeds[0] and name == UPGRADED:
            run.kept = arm
            assert arm.plan is not None
            keep = partial(
                keep_model, arm.model, setting.loaded, arm.plan, setting.val, setting.folder / MODEL
            )
            on_main(setting.accelerator, keep)


def _look_inside(run: _Run, model: nn.Module) -> None:
    """Warn of layers that do not adapt; and see, where nothing else is, what plain ones would."""
    setting = run.setting
    scales = scales_of(setting.section.data, model)
    size = setting.val.read(0)[0].shape[-2:]
    images = some_images(setting.val, 4, size, scales).to(next(model.parameters()).device)
    for finding in diagnose(model, images.split(1)):
        run.warn(str(finding))
    if CONTROL not in run.views.seen and _BEFORE not in run.views.seen:
        with disabled(model):
            run.views.add(_PLAIN, model, *scales)


def _report(run: _Run, command: str, began: float) -> RunSummary:
    """Draw and write what came of the run."""
    setting, loaded = run.setting, run.setting.loaded
    setting.say(Phase("writing the report"))
    assert run.kept is not None and run.kept.plan is not None
    plan, section = run.kept.plan, setting.section
    pictures: tuple[Path, ...] = ()
    curves: tuple[Path, ...] = ()
    if setting.main:
        before = next(n for n in (CONTROL, _BEFORE, _PLAIN) if n in run.views.seen)
        pictures = run.views.draw(before, UPGRADED, setting.folder / PICTURES)
        logs: dict[str, list[Path]] = {}
        for result in run.results:
            logs.setdefault(result.name, []).append(setting.place_of(result.name, result.seed))
        try:
            curves = (draw_curves(logs, setting.folder / CURVES),)
        except TrainingError as error:  # the run is not lost for want of a picture
            run.warn(str(error))
    summary = RunSummary(
        recipe=str(loaded.path),
        model=loaded.recipe.model.name,
        change=deed(plan),
        plan=str(plan),
        data=_data_in_words(setting),
        training=tuple(map(_in_words, section.stages)),
        evaluate=section.evaluate,
        command=command,
        arms=tuple(run.results),
        seconds=time.perf_counter() - began,
        device=f"{setting.accelerator.device} in {section.precision}",
        versions=versions(),
        parameters=(plan.cost.parameters, plan.cost.parameters + plan.cost.added_parameters),
        before=run.before,
        latency=run.latency,
        warnings=tuple(run.warnings),
        pictures=pictures,
        curves=curves,
    )
    on_main(setting.accelerator, lambda: write_report(summary, setting.folder))
    return summary


def _data_in_words(setting: Setting) -> str:
    data = setting.section.data
    where = "drawn scenes" if data.root is None else f"{data.format} data in `{data.root}`"
    return (
        f"{len(setting.train)} pictures to learn from and {len(setting.val)} to measure on, "
        f"{len(setting.val.classes)} classes, {where}."
    )


def _in_words(stage: StageSection) -> str:
    length = f"{stage.epochs} epochs" if stage.epochs is not None else f"{stage.steps} steps"
    rates = (
        f"{stage.lr:g}"
        if isinstance(stage.lr, float)
        else ", ".join(f"{name} {rate:g}" for name, rate in stage.lr.items())
    )
    return (
        f"`{stage.name}`: {', '.join(stage.train)} learn for {length}; learning rate {rates}, "
        f"{stage.schedule}."
    )
