"""Trains in processes of their own, which can be killed or be several at once.

    python train_worker.py '[{"folder": "a"}, {"folder": "b", "kills": ["at step 5"]}]'

Each training is a fork, so that nothing is imported again; under torchrun it runs in the process
itself. A training is killed and resumed as often as it has `kills`, by SIGKILL: some seconds after
its first stage began, as a step is done, or as a file is brought to the disk, of which half is then
there. What it ended with is in FOLDER/found.json, its weights are in FOLDER/final.pt.

Keys: `folder`; `keys` of the recipe; `dropout`; `kills`; `forget`, to lose the optimizer's state in
a resume; `wide`, to train in float64 without a swap; `limit`, the greatest size of a file in bytes.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import timm.optim
import timm.scheduler
import torch
import torch.utils.tensorboard
import torchmetrics.functional.classification
from accelerate.optimizer import AcceleratedOptimizer
from train_jobs import Wide, job, upgraded, weights

from pacswap.errors import TrainingError
from pacswap.train.engine.events import Event, Note, StageBegun, StepDone
from pacswap.train.engine.groups import roles_of
from pacswap.train.engine.loop import train

# Imported once for all forks, which would each import them at their first use.
EARLY = (timm.optim, timm.scheduler, torch.utils.tensorboard, torchmetrics.functional)
RANK = int(os.environ.get("RANK", "-1"))


def main(runs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for run in runs:
        if RANK >= 0:
            attempt(run)
            continue
        kills = [*run.get("kills", []), ""]
        for number, kill in enumerate(kills):
            child = os.fork()
            if child == 0:
                attempt(run, resume=number > 0, kill=kill)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            # A timer may come too late, when all is done.
            assert killed or (os.waitstatus_to_exitcode(status) == 0), (run, kill, status)
            assert killed == kill.startswith("at ") or kill.startswith("after "), (run, kill)


def attempt(run: dict[str, Any], resume: bool = False, kill: str = "") -> None:
    folder = Path(run["folder"])
    wide = Wide() if run.get("wide") else None
    model = upgraded(run.get("dropout", 0.0)) if wide is None else wide
    roles = None if wide is None else roles_of(wide, None)
    given = job(folder, model, roles=roles, **run.get("keys", {}))
    watch = Watch(kill)
    if run.get("forget"):
        AcceleratedOptimizer.load_state_dict = lambda self, state: None
    if "limit" in run:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (run["limit"],) * 2)
    found: dict[str, Any] = {"steps": watch.steps, "notes": watch.notes}
    try:
        outcome = train(given, resume=resume, progress=watch)
        found |= {"miou": outcome.scores.miou}
    except TrainingError as error:
        found |= {"error": str(error)}
    suffix = f".{RANK}" if RANK > 0 else ""
    torch.save(weights(model), folder / f"final.pt{suffix}")
    (folder / f"found.json{suffix}").write_text(json.dumps(found))


class Watch:
    """Listens to a training, and ends it."""

    def __init__(self, kill: str) -> None:
        self.kill = kill
        self.steps: list[int] = []
        self.notes: list[str] = []
        if kill.startswith("at fsync "):
            kill_at_fsync(int(kill.removeprefix("at fsync ")))

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        if isinstance(event, StageBegun) and self.kill.startswith("after "):
            threading.Timer(float(self.kill.removeprefix("after ")), die).start()
        if isinstance(event, StepDone):
            self.steps.append(event.step)
            if self.kill == f"at step {event.step}":
                die()


def kill_at_fsync(number: int) -> None:
    count, plain = iter(range(1, 10**6)), os.fsync

    def fsync(handle: int) -> None:
        if next(count) == number:
            path = Path(f"/proc/self/fd/{handle}").resolve()
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            die()
        plain(handle)

    os.fsync = fsync


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
