"""Labelled pictures: finding them, checking them, and batches to learn from."""

from pacswap.train.data.split import Sample, Split, open_data

__all__ = ["Sample", "Split", "open_data"]
