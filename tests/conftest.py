"""One torch thread (tests run side by side with others) and the same seed before every test."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the scripts that tests start

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
