"""One torch thread (tests run side by side with others) and the same start before every test."""

import os
import signal
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


@pytest.fixture
def torchrun(capfd):
    """torchrun --nproc-per-node 2, started from here, where torch is loaded -> what it printed."""
    from torch.distributed.run import main

    names = [s for s in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, s)]
    before = {s: signal.getsignal(getattr(signal, s)) for s in names}  # torchrun leaves its own

    def run(*argv) -> str:
        main(["--standalone", "--nproc-per-node", "2", *map(str, argv)])
        return capfd.readouterr().out

    yield run
    for s, handler in before.items():
        signal.signal(getattr(signal, s), handler)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="torch's Windows wheels lack the libuv that torchrun needs")
    for item in items:
        if sys.platform == "win32" and item.name.startswith("test_two_processes"):
            item.add_marker(skip)
