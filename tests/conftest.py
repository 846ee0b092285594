"""One torch thread (tests run side by side with others) and the same start before every test."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the scripts that tests start

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start(monkeypatch):
    torch.manual_seed(0)
    # --device auto is the CPU here; test_devices.py names the GPU itself
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["pytest"])  # argparse's name, also in a worker of xdist


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="torch's Windows wheels lack the libuv that torchrun needs")
    for item in items:
        if sys.platform == "win32" and item.name.startswith("test_two_processes"):
            item.add_marker(skip)
