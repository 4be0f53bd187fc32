"""The Hugging Face Hub: huggingface_hub's own mixin, against folders and a Hub made of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.hub_mixin import HfApi
from same import assert_bits
from torch import Tensor, nn

import pacswap
from pacswap.errors import CheckpointError, ModelError, PlanError
from pacswap.hub import HubModel
from pacswap.recipes import load_recipe
from pacswap.zoo import Source, build

FILES = {"README.md", "config.json", "recipe.yaml"}
MORE = {True: "added.safetensors", False: "model.safetensors"}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def upgraded(net: nn.Module, blend: float = 0.3) -> nn.Module:
    guidance = {"from": "layer1", "channels": 4}
    example = torch.zeros(1, 3, 48, 64)
    model = pacswap.swap(net, "head.conv", guidance, example_input=example).eval()
    with torch.no_grad():
        model.head.conv.blend.fill_(blend)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return upgraded(build(Source("pacswap", "scene_net", "DEFAULT")))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    assert_bits(ours.state_dict(), theirs.state_dict())
    image = torch.rand(1, 3, 48, 64)
    with torch.inference_mode():
        assert torch.equal(ours(image), theirs(image))


def names(folder: str | Path) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


class Hub:
    """A Hub in a folder: what HfApi and huggingface_hub's downloads would ask of the real one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, _: HfApi, repo_id: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, _: HfApi, repo_id: str, folder_path: Path, **options: Any) -> str:
        self.calls.append(("upload", {"repo_id": repo_id, **options}))
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("snapshot", {"repo_id": repo_id, **options}))
        return str(self.root / repo_id)

    def hf_hub_download(self, repo_id: str, filename: str, **options: Any) -> str:
        return str(self.root / repo_id / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(HfApi, "create_repo", lambda *a, **k: hub.create_repo(*a, **k))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *a, **k: hub.upload_folder(*a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", hub.hf_hub_download)
    return hub


@pytest.mark.parametrize("added_only", [True, False], ids=["added", "whole"])
def test_to_a_folder_and_back(model, added_only):
    HubModel(model, added_only=added_only).save_pretrained("net")
    assert names("net") == FILES | {MORE[added_only]}
    assert json.loads(Path("net/config.json").read_text()) == {"added_only": added_only}
    pulled = HubModel.from_pretrained("net")
    assert pulled.added_only is added_only
    assert_same(model, pulled.model)
    assert_same(model, pacswap.load("net"))


def test_a_difference_is_seen(model):
    HubModel(model).save_pretrained("net")
    other = upgraded(build(Source("pacswap", "scene_net", "DEFAULT")), blend=0.4)
    with pytest.raises(AssertionError, match=r"head\.conv\.blend differs"):
        assert_same(other, HubModel.from_pretrained("net").model)


@pytest.mark.parametrize("added_only", [True, False], ids=["added", "whole"])
def test_push_and_pull(model, added_only, hub):
    url = HubModel(model, added_only).push_to_hub("me/net", private=True, commit_message="Mine.")
    assert url == "https://hub/me/net/commit/1"
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert hub.calls[0][1] == {"repo_id": "me/net", "private": True, "exist_ok": True}
    assert hub.calls[1][1]["commit_message"] == "Mine."
    assert names(hub.root / "me/net") == FILES | {MORE[added_only]}
    assert_same(model, HubModel.from_pretrained("me/net", revision="v1", token="hf_x").model)
    assert_same(model, pacswap.load("hf-hub:me/net"))
    assert_same(model, pacswap.load("hf-hub:me/net@v2"))
    asked = [call for name, call in hub.calls if name == "snapshot"]
    assert [call["revision"] for call in asked] == ["v1", None, "v2"]
    assert [call["token"] for call in asked] == ["hf_x", None, None]
    assert {call["repo_id"] for call in asked} == {"me/net"}
    patterns = ["recipe.yaml", "model.safetensors", "added.safetensors", "classes.json"]
    assert all(call["allow_patterns"] == patterns for call in asked)


def test_another_kind_takes_the_place_of_the_first(model):
    HubModel(model, added_only=True).save_pretrained("net")
    HubModel(model, added_only=False).save_pretrained("net")
    assert names("net") == FILES | {"model.safetensors"}
    HubModel(model, added_only=True).save_pretrained("net")
    assert names("net") == FILES | {"added.safetensors"}
    assert_same(model, pacswap.load("net"))


def test_a_base_of_ones_own():
    net = build(Source("pacswap", "scene_net"))
    model = upgraded(net)
    HubModel(model).save_pretrained("net")
    assert_same(model, HubModel.from_pretrained("net", base=net).model)
    with pytest.raises(CheckpointError) as raised:
        HubModel.from_pretrained("net")
    assert str(raised.value) == (
        "'net' holds only what was added to a scene_net, and does not say where that network's "
        "weights are. Give the network that was upgraded: pacswap.load(folder, base=network)."
    )
    card = Path("net/README.md").read_text()
    assert 'model = pacswap.load("hf-hub:OWNER/NAME", base=network)' in card
    assert "where its weights are is not known here: give it as `base`." in card


def test_no_file_of_this_machine_is_named(hub):
    net = build(Source("pacswap", "scene_net"))
    safetensors.torch.save_model(net, "secret_project.safetensors")
    model = upgraded(build(Source("pacswap", "scene_net", "secret_project.safetensors")))
    HubModel(model).push_to_hub("me/net")
    folder = hub.root / "me/net"
    assert load_recipe(folder / "recipe.yaml").recipe.model.weights is None
    assert not any(b"secret_project" in path.read_bytes() for path in folder.iterdir())
    assert_same(model, pacswap.load("hf-hub:me/net", base=net))


def test_a_download_names_no_file_of_this_machine(model, hub, tmp_path):
    """A stranger's recipe does not choose what is read here."""
    HubModel(model).push_to_hub("evil/net")
    recipe = hub.root / "evil/net/recipe.yaml"
    mine = tmp_path / "mine.pth"
    recipe.write_text(recipe.read_text().replace("weights: DEFAULT", f"weights: {mine}"))
    for load in (pacswap.load, HubModel.from_pretrained):
        name = "hf-hub:evil/net" if load is pacswap.load else "evil/net"
        with pytest.raises(CheckpointError, match="does not say where that network's weights are"):
            load(name)
    with pytest.raises(CheckpointError, match="no weights file"):  # but a file of one's own does
        pacswap.load(hub.root / "evil/net")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_download_does_not_trust_itself(hub):
    net = build(Source("python", f"{__name__}:Tiny", "DEFAULT"), trust_python=True)
    model = pacswap.swap(net, "b", "a", example_input=torch.zeros(1, 3, 32, 32)).eval()
    HubModel(model, added_only=False).push_to_hub("evil/net")
    config = hub.root / "evil/net/config.json"
    config.write_text(json.dumps({"trust_python": True, "model": "x", "added_only": 7, "base": 1}))
    message = f"library 'python' runs the code of '{__name__}:Tiny'. If you trust it, say so: "
    with pytest.raises(ModelError, match=message.replace(".", r"\.")):
        HubModel.from_pretrained("evil/net")
    with pytest.raises(ModelError, match=message.replace(".", r"\.")):
        pacswap.load("hf-hub:evil/net")
    trusted = HubModel.from_pretrained("evil/net", trust_python=True)
    assert_bits(model.state_dict(), trusted.model.state_dict())
    assert ", trust_python=True)" in (hub.root / "evil/net/README.md").read_text()


CARD = """\
---
library_name: pacswap
tags:
- model_hub_mixin
- pacswap
- pixel-adaptive-convolution
---

# scene_net, upgraded by pacswap

Some layers of this network are pixel-adaptive ([Su et al., CVPR \
2019](https://arxiv.org/abs/1904.05373)): how much
each neighbour counts is decided from pixel to pixel by the features of an earlier layer.

```text
{plan}
```

## Load it

```python
import pacswap

model = pacswap.load("hf-hub:OWNER/NAME")
```

`added.safetensors` holds only what the swap added and what has changed since. The rest are the \
weights `DEFAULT` of pacswap's `scene_net`, which `load` gets from there. Each of its tensors is \
compared with a digest that was taken at the swap.

Nothing of this repository is run as code; the files are safetensors and a recipe in YAML.

## What is not known

This card was written by pacswap {version} from the network alone. How it was trained, on which
data, how good it is and under which licence it stands is for its author to say; the weights of the
original network have a licence of their own.
"""


def test_the_card(model):
    HubModel(model).save_pretrained("net")
    card = Path("net/README.md").read_text()
    plan = str(pacswap.surgery.plan_of(model))
    assert "head.conv  Conv2d 72→48 3×3" in plan
    assert card.rstrip() == CARD.format(plan=plan, version=pacswap.__version__).rstrip()
    Path("net/README.md").write_text("Mine.")
    HubModel(model, added_only=False).save_pretrained("net")
    assert Path("net/README.md").read_text() == "Mine."
    assert str(HubModel(model, added_only=False).generate_model_card()).count("whole network") == 1


def test_only_upgraded_networks():
    with pytest.raises(PlanError, match="was not upgraded by pacswap"):
        HubModel(Tiny())


GET = "cannot get '{}' from the Hugging Face Hub: {}. Check the name, the network and, for a " + (
    "private one, `hf auth login`."
)


def test_no_such_repository(monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to host.\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as raised:
        pacswap.load("hf-hub:me/net@main")
    assert str(raised.value) == GET.format("me/net", "ConnectionError: no route to host")


def test_no_such_name():
    with pytest.raises(CheckpointError) as raised:
        pacswap.load("hf-hub:me/net/work")
    assert str(raised.value) == GET.format(
        "me/net/work",
        "HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'me/net/work'. Use `repo_type` argument if needed",
    )


def test_a_repository_of_somebody_else(hub):
    (hub.root / "me/net").mkdir(parents=True)
    (hub.root / "me/net/pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError) as raised:
        pacswap.load("hf-hub:me/net")
    assert str(raised.value).endswith(
        "is not a model directory: it has no recipe.yaml and no model.safetensors. Name one that "
        "pacswap.save or pacswap apply -o wrote."
    )
