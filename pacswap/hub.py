"""Upgraded networks on the Hugging Face Hub, by huggingface_hub's own mixin.

A repository holds a model directory as `pacswap.save` writes it, a model card and the mixin's
`config.json`. `pacswap.load("hf-hub:owner/name")` reads it too.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from torch import nn

from pacswap.checkpoint import ADDED, RECIPE, WEIGHTS, save
from pacswap.checkpoint.api import load_folder
from pacswap.checkpoint.describe import without_files
from pacswap.checkpoint.remote import fetched
from pacswap.recipes import dump_recipe, load_recipe
from pacswap.recipes.schema import ModelSection
from pacswap.surgery import plan_of

__all__ = ["HubModel"]

CARD = """---
{{ card_data }}
---

# {{ name }}, upgraded by pacswap

Some layers of this network are pixel-adaptive ([Su et al., CVPR 2019]({{ paper_url }})): how much
each neighbour counts is decided from pixel to pixel by the features of an earlier layer.

```text
{{ plan }}
```

## Load it

```python
import pacswap

model = pacswap.load({{ call }})
```

{{ contents }}

Nothing of this repository is run as code; the files are safetensors and a recipe in YAML.

## What is not known

This card was written by pacswap {{ version }} from the network alone. How it was trained, on which
data, how good it is and under which licence it stands is for its author to say; the weights of the
original network have a licence of their own.
"""


class HubModel(
    ModelHubMixin,
    library_name="pacswap",
    tags=["pacswap", "pixel-adaptive-convolution"],
    paper_url="https://arxiv.org/abs/1904.05373",
    model_card_template=CARD,
):
    """An upgraded network that can be pushed to the Hub and pulled from it.

    `push_to_hub(repo_id)`, `save_pretrained(folder)` and `from_pretrained(repo_id or folder)` are
    huggingface_hub's; `from_pretrained` also takes `base`, `device` and `trust_python`, as
    `pacswap.load` does. A download never says by itself that its code is trusted.

    Args:
        model: an upgraded network.
        added_only: keep only what was added and what has changed since the swap. Where the base's
            weights are a file of this machine, nobody else could find it: they are not named then,
            and who loads the model has to give the base.

    Raises:
        PlanError: the model was not upgraded by pacswap.
    """

    def __init__(self, model: nn.Module, added_only: bool = True) -> None:
        plan_of(model)
        self.model = model
        self.added_only = added_only
        self._section: ModelSection | None = None  # of what was written last, for its card

    def _save_pretrained(self, save_directory: Path) -> None:
        """Put a model directory into a folder that may hold an earlier one.

        Raises:
            CheckpointError: it cannot be written.
        """
        with tempfile.TemporaryDirectory(dir=save_directory) as draft:
            made, self._section = self._made(Path(draft))
            (save_directory / (WEIGHTS if self.added_only else ADDED)).unlink(missing_ok=True)
            for file in sorted(made.iterdir()):
                file.replace(save_directory / file.name)

    def _made(self, draft: Path) -> tuple[Path, ModelSection]:
        """A model directory that names no file of this machine, and the network it names."""
        made = save(self.model, draft / "model", added_only=self.added_only)
        recipe = without_files(load_recipe(made / RECIPE).recipe)
        (made / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
        return made, recipe.model

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of the repository; the mixin writes it unless there is one.

        Args:
            args: the mixin's.
            kwargs: what a template of one's own asks for besides.

        Returns:
            The card.

        Raises:
            CheckpointError: the network cannot be saved.
        """
        section, self._section = self._section, None
        if section is None:  # asked for by itself
            with tempfile.TemporaryDirectory() as draft:
                section = self._made(Path(draft))[1]
        arguments = ['"hf-hub:OWNER/NAME"']
        arguments += ["base=network"] if self.added_only and section.weights is None else []
        arguments += ["trust_python=True"] if _runs_python(section, self.added_only) else []
        own = {
            "name": section.name,
            "plan": str(plan_of(self.model)),
            "call": ", ".join(arguments),
            "contents": _contents(section, self.added_only),
            "version": version("pacswap"),
        }
        return super().generate_model_card(*args, **{**own, **kwargs})

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # an unknown option is an error
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        base: nn.Module | None = None,
        device: str | torch.device = "cpu",
        trust_python: bool = False,
        model: object = None,
        added_only: object = None,
    ) -> HubModel:
        """Load a model directory; `model` and `added_only` of its config.json say nothing new.

        Raises:
            CheckpointError: it cannot be had, or is damaged.
        """
        folder = Path(model_id)
        is_remote = not folder.is_dir()
        if is_remote:
            folder = fetched(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        upgraded = load_folder(
            folder,
            base=base,
            device=device,
            trust_python=trust_python,
            trust_files=not is_remote,
        )
        return cls(upgraded, added_only=(folder / ADDED).is_file())


def _runs_python(section: ModelSection, added_only: bool) -> bool:
    """Whether loading calls a factory of the author's; not where the base has to be given."""
    return section.library == "python" and not (added_only and section.weights is None)


def _contents(section: ModelSection, added_only: bool) -> str:
    if not added_only:
        return f"`{WEIGHTS}` is the whole network."
    held = f"`{ADDED}` holds only what the swap added and what has changed since."
    compared = "Each of its tensors is compared with a digest that was taken at the swap."
    if section.weights is None:
        return (
            f"{held} The rest is the network that was upgraded, and where its weights are is not "
            f"known here: give it as `base`. {compared}"
        )
    where = f"`{section.weights}` of {section.library}'s `{section.name}`"
    return f"{held} The rest are the weights {where}, which `load` gets from there. {compared}"
