"""Images per second of a whole training step of simclr, moco, dino and mae, augmentation included.

    python tests/benchmark_ssl.py              # the demos' sizes, every method at its defaults
    python tests/benchmark_ssl.py --encoder resnet18 --batch-size 256 --device cuda

The four train in turns, a few steps at a time; the figures are medians over the rounds: images per
second (an image counts once, however many views are made of it) and the share of the time that the
augmentation takes. The aim is a share of at most 15 %.
"""

import argparse
import contextlib
import importlib
import io
import pathlib
import statistics
import sys
import tempfile
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))


class Method:
    """One script's own training loop, with a clock around its `augment`."""

    def __init__(self, name: str, flags: list[str], steps: int):
        self.name, self.steps, self.seconds = name, steps, 0.0
        self.module = importlib.import_module(name)
        self.augment, self.module.augment = self.module.augment, self.timed
        self.out = tempfile.mkdtemp()
        short = [] if name == "mae" else ["--short", "0", "--label-steps", "0"]
        flags = [*flags, *short, "--steps", str(steps), "--out", self.out]
        if name == "mae":
            self.args, self.data, *_ = self.module.parse(flags)
        else:
            self.args, _, self.data, self.runs = self.module.parse(flags)
        self.args.log_every = 10**9
        self.data = [t.to(self.args.device) for t in self.data]
        self.device = self.data[0].device

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, *args, **kwargs):
        t0 = self.clock()
        views = self.augment(*args, **kwargs)
        self.seconds += self.clock() - t0
        return views

    def round(self) -> tuple[float, float]:
        """-> images per second, share of augmentation, over `steps` steps."""
        self.seconds, (x, y) = 0.0, self.data[:2]
        if self.name == "mae":
            model = self.module.build(self.args, x)
            optimizer = self.module.make_optimizer(model, self.args, self.args.lr)
            inputs = model, optimizer, x, x[:2], self.args, {"step": 0, "history": []}
        else:
            inputs = self.runs, (x, y), self.args
        with contextlib.redirect_stdout(io.StringIO()):  # the loop's own log line
            t0 = self.clock()
            self.module.train(*inputs)
            seconds = self.clock() - t0
        return self.args.batch_size * self.steps / seconds, self.seconds / seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, default 5")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round, default 8")
    parser.add_argument("--batch-size", help="default: the demos'")
    parser.add_argument("--encoder", help="of simclr and moco, default the demos' small one")
    parser.add_argument("--methods", nargs="+", default=["simclr", "moco", "dino", "mae"])
    args = parser.parse_args()
    methods = []
    for name in args.methods:
        flags = ["--device", args.device]
        flags += ["--batch-size", args.batch_size] if args.batch_size else []
        flags += ["--encoder", args.encoder] if args.encoder and name in ("simclr", "moco") else []
        methods.append(Method(name, flags, args.steps))
    figures = {method.name: [] for method in methods}
    for turn in range(args.rounds + 1):
        for method in methods:
            row = method.round()
            if turn:  # the first round warms up
                figures[method.name].append(row)
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for method in methods:
        speed, share = (statistics.median(column) for column in zip(*figures[method.name]))
        what = f"batch {method.args.batch_size:4d} | {speed:8.0f} images/s"
        print(f"{method.name:7s} {what} | augmentation {share:5.1%}")


if __name__ == "__main__":
    main()
