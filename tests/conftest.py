"""The same numbers for every test, and one thread: two wait for each other on shared cores."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
