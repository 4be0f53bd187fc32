"""Scores of a segmentation network, comparisons of arms, and how they are shown."""
