"""dqn.train beside a loop of CleanRL's kind: steps/s with learning, updates/s, bytes stored.

python tests/benchmark_dqn.py [--rounds 5] [--steps 2000] [--network nature]. The other loop is
written here: one game; act, step, store, learn, one after another; a memory of whole stacks, s and
s' apart; default layout, plain Adam. Emulator, network, batch, and ratio of updates to steps (1 to
4) are the same, and there is one torch thread. Rounds alternate; medians.

Where the time goes, 2013 network, one thread: an update takes some 16 ms (two forwards of 3.8, of
which 1.5 turn bytes into centred floats; the backward 5; Adam .8), a sample .9, the choice of 8
actions 1.9, a step of 8 emulators 3. With a second core that step hides behind the two updates that
are due beside it. The aim, twice the steps/s, is missed: what is left is the network's own
arithmetic, which the other loop has to do, too.
"""

import argparse
import copy
import pathlib
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import dqn

WARM = 500


class Plain:
    """One game, sequential, stacks stored twice."""

    def __init__(self, settings, capacity=2000):
        self.env, self.g = dqn.make_env(settings, 1), np.random.default_rng(0)
        self.q = dqn.QNetwork(6, settings.network).to(memory_format=torch.contiguous_format)
        self.q.forward = lambda s: self.q.net(s / 255.0)
        self.target = dqn.QNetwork(6, settings.network).to(memory_format=torch.contiguous_format)
        self.target.forward = lambda s: self.target.net(s / 255.0)
        self.opt = torch.optim.Adam(self.q.parameters(), 1e-4)
        self.s, self.s2 = np.zeros((2, capacity, 4, 84, 84), np.uint8)
        self.a, self.r, self.d = np.zeros((3, capacity), np.float32)
        self.obs, self.t, self.updates = self.env.reset(seed=0)[0], 0, 0
        kept = (self.s, self.s2, self.a, self.r, self.d)
        self.bytes = sum(x.nbytes for x in kept) / capacity

    def run(self, steps):
        for _ in range(steps):
            if self.g.random() < 0.5:
                action = self.g.integers(0, 6, 1)
            else:
                action = self.q(torch.tensor(self.obs)).argmax(1).numpy()
            obs, r, end, cut, _ = self.env.step(action)
            i = self.t % len(self.s)
            self.s[i], self.s2[i] = self.obs[0], obs[0]
            self.a[i], self.r[i], self.d[i] = action[0], r[0], end[0]
            self.obs, self.t = obs, self.t + 1
            if self.t > WARM and self.t % 4 == 0:
                rows = self.g.integers(0, min(self.t, len(self.s)), 32)
                s, s2, a, r, d = (
                    torch.tensor(x[rows]) for x in (self.s, self.s2, self.a, self.r, self.d)
                )
                with torch.no_grad():
                    y = r + 0.99 * self.target(s2).max(1).values * (1 - d)
                loss = F.mse_loss(y, self.q(s).gather(1, a.long()[:, None])[:, 0])
                self.opt.zero_grad()
                loss.backward()
                self.opt.step()
                self.updates += 1
                if self.updates % 500 == 0:
                    self.target.load_state_dict(self.q.state_dict())


class Ours:
    """dqn.train as it is; epsilon is held at .5 as in the other."""

    def __init__(self, settings):
        self.args, N = settings, settings.envs
        self.env = dqn.make_env(settings, N)
        self.q = dqn.QNetwork(6, settings.network)
        self.target = copy.deepcopy(self.q)
        self.opt = torch.optim.Adam(self.q.parameters(), 3e-4, fused=True)
        self.memory, over = dqn.ReplayMemory(settings.memory, N), torch.zeros(N, dtype=torch.bool)
        self.run_ = {"step": 0, "updates": 0, "history": [], "log": [], "over": over}
        self.run_["score"] = torch.zeros(N)
        kept = (v for v in vars(self.memory).values() if torch.is_tensor(v))
        self.bytes = sum(v.numel() * v.element_size() for v in kept) / settings.memory

    @property
    def updates(self):
        return self.run_["updates"]

    def run(self, steps):
        self.run_["log"], self.run_["over"] = [], torch.ones(self.args.envs, dtype=torch.bool)
        self.args.steps = self.run_["step"] + steps
        held = torch.zeros(1, 4, 84, 84, dtype=torch.uint8)
        dqn.train(self.env, self.q, self.target, self.opt, self.memory, held, self.args, self.run_)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help="agent steps per round")
    parser.add_argument("--network", choices=list(dqn.CONVS), default="2013")
    parser.add_argument("--envs", type=int, default=8)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = argparse.Namespace(**{name: value[0] for name, value in dqn.DEFAULTS.items()})
    changes = dict(paper=False, device="cpu", save=None, memory=16000, warmup=WARM, log_every=10**9)
    changes |= dict(epsilon_end=0.5, epsilon_steps=1, envs=flags.envs, network=flags.network)
    vars(settings).update(changes, chapter=10**9)
    loops = {"dqn.train": Ours(settings), "one game, stacks": Plain(settings)}
    speed = {name: [] for name in loops}
    for loop in loops.values():
        loop.run(2 * WARM)
    for _ in range(flags.rounds):
        for name, loop in loops.items():
            t0, before, cpu = time.perf_counter(), loop.updates, time.process_time()
            loop.run(flags.steps)
            t, cpu = time.perf_counter() - t0, time.process_time() - cpu
            speed[name].append((flags.steps / t, (loop.updates - before) / t, flags.steps / cpu))
    medians = {}
    for name, rows in speed.items():
        medians[name] = [statistics.median(column) for column in zip(*rows)]
        steps, updates, cpu = medians[name]
        print(f"{name:17s} {steps:6.0f} steps/s | {updates:5.1f} updates/s | {cpu:6.0f} steps per "
              f"second of CPU time | {loops[name].bytes / 1e3:.1f} kB per transition")  # fmt: skip
    ratio = [a / b for a, b in zip(*medians.values())]
    print(f"{flags.network} network: {ratio[0]:.2f}x the steps/s, {ratio[2]:.2f}x per CPU second")


if __name__ == "__main__":
    main()
