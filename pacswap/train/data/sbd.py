"""Masks of the Semantic Boundaries Dataset, which are MATLAB files."""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path

import numpy as np

from pacswap.train.data.labels import Labels
from pacswap.train.data.pictures import Flaw, Raw, meant


def why_no_scipy() -> str | None:
    """Why MATLAB files cannot be read; None where they can."""
    if importlib.util.find_spec("scipy") is not None:
        return None
    return "format sbd needs SciPy to read its masks. Install it: pip install scipy"


def read_mat_mask(path: Path, labels: Labels) -> Raw:
    """The class numbers [H, W] in a file of the dataset's `cls` folder.

    Raises:
        Flaw: the file is damaged, or holds what is neither a class nor to be ignored.
    """
    matlab = import_module("scipy.io.matlab")
    try:
        raw = np.asarray(matlab.loadmat(path)["GTcls"][0]["Segmentation"][0])
    except (OSError, ValueError, TypeError, LookupError, matlab.MatReadError):
        raise Flaw("unreadable", str(path), "damaged, or not of the dataset") from None
    return meant(raw, labels, path)
