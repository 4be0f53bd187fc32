"""Writing a run's files so that a reader finds either the old or the new one, never half of one."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from pacswap.errors import TrainingError


def write_file(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all; its folder is made where it is missing.

    Args:
        path: the file, which is replaced if it exists.
        content: text, written as UTF-8, or bytes.

    Returns:
        `path`.

    Raises:
        TrainingError: the disk is full or the folder cannot be written.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise TrainingError(
            f"cannot write '{path}': {error.strerror or error}. Free some space or name another "
            "folder; what was there before is untouched."
        ) from error
    finally:
        with suppress(OSError):  # it has become the file, or could never be made
            draft.unlink()
    return path
