"""The training loop: what moves, how fast, and what is told of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_data import write_folder
from train_jobs import (
    Net,
    events,
    job,
    losses,
    moved,
    notes,
    refused,
    rows,
    stage,
    upgraded,
    weights,
)

from pacswap.errors import TrainingError
from pacswap.surgery import plan_of
from pacswap.train.engine.device import is_batch_norm, seed_step, synchronised
from pacswap.train.engine.events import Evaluated, StageBegun, StepDone
from pacswap.train.engine.groups import roles_of
from pacswap.train.engine.loop import train

STATISTICS = {
    f"{place}.{name}"
    for place in ("stem.1", "body.1")
    for name in ("running_mean", "running_var", "num_batches_tracked")
}


@pytest.mark.parametrize("norm", ["train", "frozen"])
@pytest.mark.parametrize(
    "group", ["added", "swapped", "guidance", "head", "norm", "all", "body.0.weight"]
)
def test_only_what_learns_moves(tmp_path, group, norm):
    model = upgraded(dropout=0.2)
    roles = roles_of(model, plan_of(model))
    every = {name for name, _ in model.named_parameters()}
    named = {"all": every, "body.0.weight": {"body.0.weight"}}
    learning = named[group] if group in named else roles.named(group)
    frozen = model.stem[0].weight.requires_grad_(False)  # by the user, before
    model.body[1].eval()
    if group == "guidance":  # which learns nothing while the blend stays at 0
        model.body[0].blend.data.fill_(0.5)
    before = weights(model)
    given = job(tmp_path, model, stages=[stage(train=[group])], batch_norm=norm)
    train(given)
    gathers = norm == "train" and not learning <= roles.added  # else the control would lack it
    expected = set(learning) | (STATISTICS if gathers else set())
    assert moved(before, model) == expected
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert all(p.grad is None for p in model.parameters())
    assert model.body[1].training is False
    assert model.training


def test_what_guides_a_layer_whose_blend_stays_at_0_is_not_trained_in_silence(tmp_path):
    with pytest.raises(TrainingError) as raised:
        train(job(tmp_path, upgraded(), stages=[stage(train=["guidance"])]))
    assert str(raised.value) == (
        "the loss depends on none of 'body.0.guidance.project.weight', which are all that this "
        "stage trains. Let it train something on the path to the logits; what guides a layer "
        "learns nothing while the layer's blend stays at 0."
    )


def test_stages_follow_each_other(tmp_path):
    model = upgraded()
    stages = [stage("a", ["head"], steps=3), stage("b", ["added"], steps=4, lr=0.1)]
    _, said = events(job(tmp_path, model, stages=stages))
    begun = [event for event in said if isinstance(event, StageBegun)]
    assert begun == [StageBegun("a", 0, 3, 54), StageBegun("b", 3, 7, 35)]
    done = [event for event in said if isinstance(event, StepDone)]
    assert [event.step for event in done] == list(range(1, 8))
    assert {event.total for event in done} == {7}
    assert [event.lr for event in done] == [0.05] * 3 + [0.1] * 4
    log = rows(tmp_path / "log.csv")
    assert [row["stage"] for row in log] == list("aaabbbb")
    assert [float(row["loss"]) for row in log] == [event.loss for event in done]
    assert [row["epoch"] for row in log] == list("1122334")


def test_each_learning_rate_has_a_column(tmp_path):
    stages = [
        stage("a", ["head"], lr={"default": 0.1, "head": 0.2}),
        stage("b", ["all"], lr={"default": 0.3, "body.*": 0.4}, schedule="poly", power=1.0),
    ]
    train(job(tmp_path, stages=stages))
    log = rows(tmp_path / "log.csv")
    assert list(log[0]) == ["step", "stage", "epoch", "loss", "lr/head", "lr/default", "lr/body.*"]
    assert [log[0]["lr/head"], log[0]["lr/default"], log[0]["lr/body.*"]] == ["0.2", "", ""]
    assert [float(row["lr/default"]) for row in log[3:]] == pytest.approx([0.3, 0.2, 0.1])
    assert [float(row["lr/body.*"]) for row in log[3:]] == pytest.approx([0.4, 0.8 / 3, 0.4 / 3])


@pytest.mark.parametrize("source", ["scenes", "folder"])
def test_the_loss_falls_in_20_steps(tmp_path, source):
    data = {"format": "scenes", "count": [8, 2], "resize": [24, 32]}
    if source == "folder":
        root = write_folder(tmp_path / "data", size=(24, 32))
        data = {"format": "folder", "root": str(root), "classes": "classes.txt"}
    keys = {"stages": [stage(steps=20, lr=0.02)], "evaluate": {"every": 100}, "data": data}
    run = tmp_path / "run"
    train(job(run, **keys))
    found = [float(loss) for loss in losses(run)]
    assert sum(found[-4:]) < 0.8 * sum(found[:4])
    still = tmp_path / "still"
    train(job(still, **keys | {"stages": [stage(steps=20, lr=1e-12)]}))
    found = [float(loss) for loss in losses(still)]
    assert not sum(found[-4:]) < 0.8 * sum(found[:4])


def test_the_same_seed_is_the_same_training(tmp_path):
    data = {"format": "scenes", "count": [8, 2], "resize": [24, 32], "transforms": {"flip": 0.5}}
    found = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(found))
        model = upgraded(dropout=0.3)
        train(job(tmp_path / name, model, seed=seed, data=data))
        found[name] = (weights(model), losses(tmp_path / name))
    assert moved(found["a"][0], upgraded()) != set()
    assert all(torch.equal(t, found["b"][0][name]) for name, t in found["a"][0].items())
    assert found["a"][1] == found["b"][1] != found["c"][1]


def test_random_numbers_differ_from_step_to_step_and_between_processes():
    drawn = set()
    for seed, step, rank in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]:
        seed_step(seed, step, rank)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 4


def test_a_control_passes_over_what_only_a_swap_has(tmp_path):
    stages = [stage("adapt", ["added"], steps=4), stage("joint", ["added", "swapped"], steps=3)]
    swap = upgraded()
    roles = roles_of(swap, plan_of(swap))
    net = Net()
    before = weights(net)
    control = roles_of(net, None, swapped=roles.swapped)
    outcome, said = events(job(tmp_path / "c", net, roles=control, arm="control", stages=stages))
    assert notes(said) == [
        "stage 'adapt' is passed over in the control arm: it trains added, which this network "
        "lacks."
    ]
    assert moved(before, net) - STATISTICS == roles.swapped
    assert outcome.steps == 7
    log = rows(tmp_path / "c" / "log.csv")
    assert [row["step"] for row in log] == ["5", "6", "7"]
    # Its pictures are those that the upgraded network sees at the same steps.
    asked: list[tuple[str, ...]] = []
    train(job(tmp_path / "u", Listening(swap, asked), roles=prefixed(roles), stages=stages))
    seen: list[tuple[str, ...]] = []
    net = Listening(Net(), seen)
    given = job(tmp_path / "d", net, roles=prefixed(control), arm="control", stages=stages)
    train(given)
    assert seen[-3:] == asked[-3:]
    assert len(set(asked)) > 3


class Listening(nn.Module):
    """A network, and what it was shown while it trained."""

    def __init__(self, net: nn.Module, seen: list[Any]) -> None:
        super().__init__()
        self.net, self.seen = net, seen

    def forward(self, input: Tensor) -> Any:
        if self.training:
            self.seen.append(tuple(input.sum((1, 2, 3)).tolist()))
        return self.net(input)


def prefixed(roles: Any) -> Any:
    found = {
        key: frozenset(f"net.{name}" for name in roles.named(key))
        for key in ("added", "swapped", "guidance", "head", "norm")
    }
    return type(roles)(**found, lacking=roles.lacking)


def test_what_the_loss_does_not_depend_on_stays(tmp_path):
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    model = Idle()
    before = weights(model)
    stages = [stage(train=["head"])]
    _, said = events(job(tmp_path, model, roles=roles_of(model, None), stages=stages))
    assert notes(said) == [
        "stage 'all' trains 'head.weight', 'head.bias', on which the loss does not depend; they "
        "stay as they are."
    ]
    assert moved(before, model) - STATISTICS == {"classifier.weight", "classifier.bias"}
    given = job(
        tmp_path / "b", model, roles=roles_of(model, None), stages=[stage(train=["head.*"])]
    )
    assert refused(given) == (
        "the loss depends on none of 'head.weight', 'head.bias', which are all that this stage "
        "trains. Let it train something on the path to the logits; what guides a layer learns "
        "nothing while the layer's blend stays at 0."
    )


def test_an_average_is_measured_and_kept(tmp_path):
    plain, averaged = upgraded(), upgraded()
    train(job(tmp_path / "a", plain))
    outcome = train(job(tmp_path / "b", averaged, ema=0.5))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert moved(weights(plain), averaged) != set()
    found = torch.load(tmp_path / "b" / "checkpoints" / "step-0000006" / "state.pt")
    assert moved(found["model"], plain) == set()
    assert moved(found["average"], averaged) == set()
    assert outcome.scores.miou == float(rows(tmp_path / "b" / "val.csv")[-1]["miou"])


def test_measures_are_told_and_logged(tmp_path):
    outcome, said = events(job(tmp_path))
    found = [event for event in said if isinstance(event, Evaluated)]
    assert [event.step for event in found] == [2, 4, 6]
    val = rows(tmp_path / "val.csv")
    assert [float(row["miou"]) for row in val] == [event.scores.miou for event in found]
    assert [entry["miou"] for entry in outcome.history] == [event.scores.miou for event in found]
    assert outcome.scores is found[-1].scores
    best = max(found, key=lambda event: event.scores.miou)
    assert (best.step, best.best) == (outcome.best_step, True)
    assert list(val[0])[-6:] == [f"iou/{name}" for name in outcome.scores.classes]
    folder = tmp_path / "checkpoints"
    assert json.loads((folder / "best.json").read_text())["step"] == outcome.best_step
    assert (folder / f"step-{outcome.best_step:07d}" / "scores.safetensors").is_file()


def test_tensorboard_has_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(job(tmp_path))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curve = board.Scalars("loss/train")
    assert [event.step for event in curve] == list(range(1, 7))
    assert [event.value for event in curve] == pytest.approx([float(x) for x in losses(tmp_path)])
    assert {"lr/default", "val/miou", "val/iou/sky"} <= set(board.Tags()["scalars"])


def test_precisions_one_after_another(tmp_path):
    found = {}
    for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", "fp32")):
        train(job(tmp_path / name, precision=precision))
        found[name] = losses(tmp_path / name)
    assert found["a"] == found["c"] != found["b"]
    assert [float(x) for x in found["b"]] == pytest.approx([float(x) for x in found["a"]], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_falls_on_cuda(tmp_path, precision):
    keys = {"stages": [stage(steps=20, lr=0.02)], "precision": precision, "clip_grad": 1.0}
    given = job(tmp_path, **keys)
    train(given)
    found = [float(loss) for loss in losses(tmp_path)]
    assert sum(found[-4:]) < 0.8 * sum(found[:4])
    assert next(given.model.parameters()).is_cuda
    train(job(tmp_path, **keys), resume=True)


def test_balanced_weights_are_used(tmp_path):
    for name, given in (("a", "balanced"), ("b", None)):
        train(job(tmp_path / name, loss={"class_weights": given}))
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_auxiliary_heads_learn(tmp_path):
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aux_classifier = nn.Conv2d(8, 6, 1)

        def forward(self, input: Tensor) -> Any:
            x = self.stem(input)
            return {"out": self.classifier(self.body(x)), "aux": self.aux_classifier(x)}

    for weight, expected in ((0.4, True), (0.0, False)):
        model = Two()
        before = weights(model)
        keys = {"loss": {"auxiliary": weight}, "optimizer": {"weight_decay": 0.5}}
        train(job(tmp_path / str(weight), model, roles=roles_of(model, None), **keys))
        assert ("aux_classifier.weight" in moved(before, model)) is expected


def test_clipping_bounds_the_step(tmp_path):
    """Plain gradient descent at a learning rate of 1: a step is as long as the gradient."""
    keys = {"optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}}
    keys["stages"] = [stage(steps=1, lr=1.0)]
    lengths = []
    for clip in (1e-3, None):
        model = upgraded()
        before = weights(model)
        train(job(tmp_path / str(clip), model, clip_grad=clip, **keys))
        ways = [(p - before[name]).square().sum() for name, p in model.named_parameters()]
        lengths.append(torch.stack(ways).sum().sqrt().item())
    assert lengths[0] == pytest.approx(1e-3, rel=0.01)
    assert lengths[1] > 0.01


def test_norms_are_shared_and_given_back():
    model = upgraded()
    own = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    images = torch.rand(2, 3, 24, 32)
    truth = model.eval()(images)
    with synchronised(model, wanted=True):
        names = {n for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)}
        assert names == set(own)
        assert torch.equal(model(images), truth)
        model.stem[1].running_mean.add_(1)
    assert {n: m for n, m in model.named_modules() if is_batch_norm(m)} == own
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    assert not torch.equal(model(images), truth)
