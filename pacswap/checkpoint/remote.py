"""Model directories on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from pacswap.checkpoint.folders import ADDED, CLASSES, RECIPE, WEIGHTS
from pacswap.errors import CheckpointError

PREFIX = "hf-hub:"


def fetched(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Where the model directory of a repository lies once it is downloaded.

    Only the files of a model directory are; nothing of it is run.

    Args:
        name: `owner/name`, `owner/name@revision`, or either after `hf-hub:`.
        revision: a branch, a tag or a commit.
        cache_dir: where downloads are kept; huggingface_hub's own by default.
        force_download: even if it is there.
        local_files_only: never download.
        token: for private repositories; huggingface_hub's own by default.

    Raises:
        CheckpointError: there is no such repository, or it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, pinned = name.removeprefix(PREFIX).partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or pinned or None,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
                allow_patterns=[RECIPE, WEIGHTS, ADDED, CLASSES],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [""])[0].removesuffix(".")
        raise CheckpointError(
            f"cannot get '{repository}' from the Hugging Face Hub: {type(error).__name__}: {first}."
            " Check the name, the network and, for a private one, `hf auth login`."
        ) from error
