"""One training, from its first step or its last checkpoint to its end."""
