"""One torch thread (tests run side by side with others) and the same start before every test."""

import multiprocessing
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


WARM = ["torch._dynamo", "sklearn.linear_model", "sklearn.manifold", "sklearn.neighbors"]
WARM += ["sklearn.datasets", "matplotlib.figure", "matplotlib.backends.backend_agg", "tqdm"]


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """torchrun --nproc-per-node 2 script *argv, from this process -> what the two printed.

    torchrun starts its workers as commands, which import torch and the rest anew each time. Here
    they are forks of one server that has imported it all, where forks are safe: seconds less.
    """
    from torch.distributed import run as elastic

    names = [s for s in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, s)]
    before = {s: signal.getsignal(getattr(signal, s)) for s in names}  # torchrun leaves its own
    logs = tmp_path / "torchrun"

    def run(script, *argv, command=False) -> str:
        """command: with workers as torchrun itself starts them."""
        argv, parsed = [str(script), *map(str, argv)], elastic.config_from_args

        def as_function(args):
            config = parsed(args)[0]
            config.start_method = "forkserver"
            # exec, because it returns nothing: what comes back has to be pickled
            return config, exec, (f"import runpy; runpy.run_path({argv[0]!r}, None, '__main__')",)

        if sys.platform == "linux" and not command:
            multiprocessing.set_forkserver_preload(WARM)
            monkeypatch.setattr(elastic, "config_from_args", as_function)
            monkeypatch.setattr(sys, "argv", argv)  # the workers get it
        flags = ["--standalone", "--nproc-per-node", "2", "--redirects", "1", "--log-dir", logs]
        elastic.main([*map(str, flags), *argv])
        return "".join(path.read_text() for path in sorted(logs.rglob("stdout.log")))

    yield run
    for s, handler in before.items():
        signal.signal(getattr(signal, s), handler)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="torch's Windows wheels lack the libuv that torchrun needs")
    for item in items:
        if sys.platform == "win32" and item.name.startswith("test_two_processes"):
            item.add_marker(skip)
