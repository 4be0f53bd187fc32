"""What the workers of benchmarks/zoo_workers.py are given in tests; light to import."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any


def work(task: str) -> Iterator[dict[str, Any]]:
    yield {"first": task}
    if task == "dies":
        os._exit(9)
    if task == "sleeps":
        time.sleep(600)
    if task == "fails":
        yield {"failure": "ValueError: in words"}
    yield {"second": os.getpid()}
