"""dqn.py: network, objective, memory, Algorithm 1 on made-up and on real games, the script."""

import argparse
import functools
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dqn
from dqn import QNetwork, ReplayMemory, dqn_loss, epsilon_at, epsilon_greedy, lr_at


class Games:
    """What the loop needs of ale-py's vector environment, with NEXT_STEP autoreset.

    `seen` is the true list: (row, game) -> s, a, r, s', terminal, as the agent saw them.
    """

    def __init__(self, n, shape=(2, 2), ends=0.05, limit=10**9, seed=0):
        self.n, self.shape, self.ends, self.limit = n, shape, ends, limit
        self.g, self.seen, self.row = np.random.default_rng(seed), {}, -1

    def first(self, n):
        return self.g.integers(1, 256, self.shape)

    def play(self, n, action):
        """-> frame, reward, terminated: random ones here."""
        return self.first(n), self.g.integers(-3, 4), self.g.random() < self.ends

    def fresh(self, n):
        self.obs[n] = 0
        self.obs[n, -1], self.length[n], self.over[n] = self.first(n), 0, False

    def reset(self, seed=None):
        self.obs = np.zeros((self.n, 4, *self.shape), np.uint8)
        self.length, self.over, self.row = [0] * self.n, np.zeros(self.n, bool), self.row + 1
        for n in range(self.n):
            self.fresh(n)
        return self.obs.copy(), {}

    def send(self, actions):
        self.actions = actions

    def recv(self):
        reward = np.zeros(self.n, np.int32)
        terminated, truncated = np.zeros((2, self.n), bool)
        for n, action in enumerate(self.actions):
            if self.over[n]:  # the action is ignored
                self.fresh(n)
                continue
            s = self.obs[n].copy()
            frame, reward[n], terminated[n] = self.play(n, action)
            self.obs[n] = np.concatenate([s[1:], np.broadcast_to(frame, self.shape)[None]])
            self.length[n] += 1
            cut = self.length[n] >= self.limit or self.g.random() < self.ends and self.limit > 99
            truncated[n] = not terminated[n] and cut
            end = float(terminated[n])
            self.seen[self.row, n] = s, int(action), float(reward[n]), self.obs[n].copy(), end
        self.over, self.row = terminated | truncated, self.row + 1
        return self.obs.copy(), reward, terminated, truncated, {}


class Chain(Games):
    """Two states: action 1 moves from 0 to 1, and from 1 to the end for a reward of 1 (5: to be
    clipped); action 0 leads to 0. The screen is one pixel. Cut off after `limit` steps."""

    def first(self, n):
        self.at = {**getattr(self, "at", {}), n: 0}
        return np.full(self.shape, 100)

    def play(self, n, action):
        won = action == 1 and self.at[n] == 1
        self.at[n] = int(action == 1 and self.at[n] == 0)
        return np.full(self.shape, 200 if self.at[n] else 100), 5 * won, won


class Table(nn.Module):
    """Q(s, a) by the newest pixel alone: a state of the chain."""

    def __init__(self):
        super().__init__()
        self.Q = nn.Parameter(torch.zeros(2, 2))

    def forward(self, s):
        return self.Q[(s[:, -1, 0, 0] > 150).long()]


def settings(**changes):
    args = {name: value[0] for name, value in dqn.DEFAULTS.items()}
    args |= dict(device="cpu", save=None, save_memory=False, log_every=10**9, warmup=50)
    return argparse.Namespace(**(args | changes))


def start(n):
    over, score = torch.zeros(n, dtype=torch.bool), torch.zeros(n)
    return {"step": 0, "updates": 0, "history": [], "log": [], "score": score, "over": over}


# ---- network and objective ----


@pytest.mark.parametrize(
    "actions,network,count",
    [(4, "2013", 677_172), (6, "2013", 677_686), (18, "2013", 680_770), (6, "nature", 1_687_206)],
)
def test_parameter_counts(actions, network, count):
    q = QNetwork(actions, network)
    assert sum(p.numel() for p in q.parameters()) == count
    for B in (1, 3):
        assert q(torch.zeros(B, 4, 84, 84, dtype=torch.uint8)).shape == (B, actions)


def test_network_written_out():
    q, s = QNetwork(6), torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    q.mean.copy_(torch.rand(84, 84))
    before, (c1, _, c2, _, _, l1, _, l2) = s.clone(), q.net
    x = s.float() / 255 - q.mean
    x = F.relu(F.conv2d(x, c1.weight, c1.bias, 4))
    x = F.relu(F.conv2d(x, c2.weight, c2.bias, 2)).reshape(3, 2592)
    x = F.relu(x @ l1.weight.T + l1.bias) @ l2.weight.T + l2.bias
    torch.testing.assert_close(q(s), x, rtol=1e-4, atol=1e-5)
    assert torch.equal(s, before)  # the memory's bytes stay as they are


def test_initialisation():
    net = QNetwork(6, init="he").net
    assert net[5].weight.std().item() == pytest.approx(math.sqrt(2 / 2592), rel=0.02)
    assert net[-1].weight.std().item() == pytest.approx(0.1 * math.sqrt(2 / 256), rel=0.1)
    assert net[-1].bias.abs().max() == 0
    assert QNetwork(6, init="torch").net[5].weight.abs().max() <= 2592**-0.5


class Fixed(nn.Module):
    def __init__(self, Q):
        super().__init__()
        self.Q = nn.Parameter(torch.tensor(Q))

    def forward(self, s):
        return self.Q[s]


def test_target_and_loss_by_hand():
    """Rewards 7, -3, 0, 1 count as 1, -1, 0, 1; the second game ended, the third was cut off."""
    q = Fixed([[0.5, 2.0], [3.0, 0.0]])
    target = Fixed([[1.0, -1.0], [2.0, 4.0]])
    s, a, s2 = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, 0, 0])
    r, terminal = torch.tensor([7.0, -3.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    y = [1 + 0.9 * 4, -1, 0.9 * 1, 1 + 0.9 * 1]
    error = [0.5 - y[0], 2.0 - y[1], 3.0 - y[2], 0.0 - y[3]]
    loss = dqn_loss(q, target, (s, a, r, s2, terminal), 0.9, "squared")
    assert loss.item() == pytest.approx(sum(e**2 for e in error) / 4)
    loss = dqn_loss(q, target, (s, a, r, s2, terminal), 0.9, "huber")
    huber = [e**2 / 2 if abs(e) < 1 else abs(e) - 0.5 for e in error]
    assert loss.item() == pytest.approx(sum(huber) / 4)


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_is_that_of_a_fixed_target(shared):
    """Eq. 3: nothing reaches the target network, nor, where it is q itself, passes through y."""
    q = Fixed([[0.5, 2.0], [3.0, 0.0]])
    target = q if shared else Fixed([[0.5, 2.0], [3.0, 0.0]])
    one = torch.ones(1, dtype=torch.long)
    loss = dqn_loss(q, target, (0 * one, one, one.float(), one, 0.0 * one), 0.9, "squared")
    loss.backward()
    y = 1 + 0.9 * 3
    torch.testing.assert_close(q.Q.grad, torch.tensor([[0.0, 2 * (2.0 - y)], [0.0, 0.0]]))
    assert shared or target.Q.grad is None


def test_every_parameter_of_q_gets_a_gradient():
    q, target, s = QNetwork(3), QNetwork(3), torch.randint(0, 256, (8, 5, 84, 84)).byte()
    a, r = torch.arange(8) % 3, torch.ones(8)
    dqn_loss(q, target, (s[:, :-1], a, r, s[:, 1:], 0 * r)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in q.parameters())
    assert all(p.grad is None for p in target.parameters())


def test_first_loss_and_its_fall_on_one_batch():
    """Q starts near 0, so with rewards of 1 the Huber loss starts near a half."""
    q, target, s = QNetwork(3), QNetwork(3), torch.randint(0, 256, (8, 5, 84, 84)).byte()
    q.mean.fill_(0.5), target.mean.fill_(0.5)
    batch = s[:, :-1], torch.arange(8) % 3, torch.ones(8), s[:, 1:], torch.ones(8)
    opt, losses = torch.optim.Adam(q.parameters(), 1e-3), []
    for _ in range(30):
        losses.append(dqn_loss(q, target, batch))
        opt.zero_grad()
        losses[-1].backward()
        opt.step()
    assert losses[0].item() == pytest.approx(0.5, abs=0.2) and losses[-1] < losses[0] / 20


def test_schedule():
    assert epsilon_at(0, 0.1, 1000) == 1
    assert epsilon_at(500, 0.1, 1000) == pytest.approx(0.55)
    assert epsilon_at(1000, 0.1, 1000) == epsilon_at(10**6, 0.1, 1000) == pytest.approx(0.1)
    assert lr_at(0, 3e-4, 0.25) == lr_at(0.75, 3e-4, 0.25) == lr_at(0.99, 3e-4, 0) == 3e-4
    assert lr_at(0.9, 3e-4, 0.25) == pytest.approx(1.2e-4)


def test_epsilon_greedy():
    Q, g = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(8000, 1), torch.Generator().manual_seed(0)
    assert (epsilon_greedy(Q, 0.0, g) == 1).all()
    share = epsilon_greedy(Q, 0.4, g).bincount(minlength=4) / 8000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.7, 0.1, 0.1]), atol=0.02, rtol=0)


# ---- memory ----


def check(memory, seen):
    """Every transition that the memory can give, against the list of what the agent saw."""
    low = max(0, memory.count - memory.size) + 3
    high, N, found = memory.count - 1, memory.envs, 0
    assert len(memory) == (high - low) * N
    for t in range(low, high):
        for n in range(N):
            assert memory.over[t % memory.size, n] == ((t, n) not in seen)  # final states: none
            if (t, n) in seen:
                s, a, r, s2, terminal = memory.get(torch.tensor([t]), torch.tensor([n]))
                truth = seen[t, n]
                assert np.array_equal(s[0].numpy(), truth[0]), "s"
                assert np.array_equal(s2[0].numpy(), truth[3]), "s'"
                assert (a.item(), r.item(), terminal.item()) == (truth[1], truth[2], truth[4])
                found += 1
    return found


@pytest.mark.parametrize("capacity", [900, 9000])
def test_memory_equals_what_the_agent_saw(capacity):
    """Three games, 5,001 random steps of the real loop, games that end, are cut off and restart."""
    env, q = Games(3), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    memory, args = ReplayMemory(capacity, 3, (2, 2)), settings(envs=3, steps=5001, chapter=333)
    args.warmup, inner = 10**6, q.forward
    q.forward = lambda s: inner(s.float())
    dqn.train(env, q, q, None, memory, torch.zeros(1, 4, 2, 2), args, start(3))
    assert check(memory, env.seen) > capacity * 0.8 * min(1, 4000 / capacity)
    ends = [x[4] for x in env.seen.values()]
    assert sum(ends) > 100 and memory.over.sum() > 1.2 * memory.terminal.sum()  # all kinds of ends


def test_sample_draws_all_transitions_alike_and_nothing_else():
    env, memory = Games(2, ends=0.3), ReplayMemory(40, 2, (2, 2))
    obs, over = torch.from_numpy(env.reset()[0]), torch.zeros(2, dtype=torch.bool)
    for _ in range(33):
        action = torch.tensor([0, 1])
        env.send(action.numpy())
        frame, (obs, r, end, cut, _) = obs[:, -1], map(torch.as_tensor, [*env.recv()[:4], 0])
        memory.add(frame, action, r, end, over)
        over = end | cut
    count = check(memory, env.seen)
    rows = range(memory.count - memory.size + 3, memory.count - 1)
    known = {v[0].tobytes() + v[3].tobytes() for k, v in env.seen.items() if k[0] in rows}
    s, a, r, s2, terminal = memory.sample(200 * count, torch.Generator().manual_seed(0))
    drawn = {}
    for x, y in zip(s.numpy(), s2.numpy()):
        key = x.tobytes() + y.tobytes()
        drawn[key] = drawn.get(key, 0) + 1
    assert set(drawn) == known and len(drawn) == count
    assert min(drawn.values()) > 130 and max(drawn.values()) < 270  # 200 +- 5 sigma


def test_an_empty_memory_raises_and_does_not_hang():
    with pytest.raises(RuntimeError):
        ReplayMemory(100, 2).sample(1, torch.Generator())


def test_bytes_per_transition():
    memory = ReplayMemory(800, 8)
    kept = sum(v.numel() * v.element_size() for v in vars(memory).values() if torch.is_tensor(v))
    assert kept / 800 < 7100


# ---- the loop on the chain ----


@pytest.mark.parametrize("limit", [10**9, 3])
@pytest.mark.parametrize("target_every", [0, 20])
def test_chain_finds_the_known_values(limit, target_every):
    """gamma = .5: Q(1, 1) = 1, Q(0, 1) = .5, Q(0, 0) = Q(1, 0) = .25, games cut off or not."""
    args = settings(envs=6, steps=6000, epsilon_end=1.0, gamma=0.5, target_every=target_every)
    args.chapter, args.lr, q = 500, 0.02, Table()
    target = Table() if target_every else q
    env, memory = Chain(6, (1, 1), 0, limit), ReplayMemory(4000, 6, (1, 1))
    opt, run = torch.optim.Adam(q.parameters(), args.lr), start(6)
    dqn.train(env, q, target, opt, memory, torch.zeros(1, 4, 1, 1), args, run)
    truth = torch.tensor([[0.25, 0.5], [0.25, 1.0]])
    torch.testing.assert_close(q.Q.data, truth, atol=0.02, rtol=0)
    scores = [x for _, kind, x in run["history"] if kind == "score"]
    assert set(scores) == ({5.0} if limit > 99 else {0.0, 5.0})  # the true score, not the clipped
    assert run["step"] == 6000 and 1450 < run["updates"] < 1490  # one for 4 steps, after warm-up


def test_target_is_copied_every_so_many_updates():
    q, target, copies = Table(), Table(), []
    target.load_state_dict = lambda weights: copies.append(run["updates"])
    args = settings(envs=2, steps=1000, target_every=7, chapter=500)
    memory, opt, run = ReplayMemory(400, 2, (1, 1)), torch.optim.SGD(q.parameters(), 0.1), start(2)
    dqn.train(Chain(2, (1, 1), 0), q, target, opt, memory, torch.zeros(1, 4, 1, 1), args, run)
    assert copies == list(range(7, run["updates"] + 1, 7)) and len(copies) > 20


def test_the_rate_falls_in_the_last_quarter_also_after_a_load():
    """An update for each step of 4 games; the run is laid down at 340 steps and goes on to 400."""
    q, rates, run = Table(), [], start(4)
    memory, opt = ReplayMemory(400, 4, (1, 1)), torch.optim.SGD(q.parameters(), 1.0)
    opt.register_step_pre_hook(lambda *_: rates.append(opt.param_groups[0]["lr"]))
    args = settings(envs=4, lr=0.1, chapter=340)
    for args.steps, args.decay in ((340, 0), (400, 0.25)):
        dqn.train(Chain(4, (1, 1), 0), q, q, opt, memory, torch.zeros(1, 4, 1, 1), args, run)
    assert len(rates) > 60 and set(rates[:-15]) == {0.1}
    assert rates[-15:] == pytest.approx([0.1 * (400 - step) / 100 for step in range(340, 400, 4)])


# ---- real Atari ----


def test_memory_holds_what_real_games_showed():
    """Breakout, whose reset presses FIRE, cut off after 15 steps: the same zero-padded stacks."""
    args = settings(game="Breakout", paper=False, envs=4)
    env, memory = dqn.make_env(args, 4, 60), ReplayMemory(1000, 4)
    obs, over, truth = dqn.screens(env.reset(seed=3)[0]), torch.zeros(4, dtype=torch.bool), {}
    for t in range(120):
        action = torch.randint(4, (4,))
        new, r, end, cut, _ = env.step(action.numpy())
        new, r, end, cut = dqn.screens(new), *map(torch.from_numpy, (r, end, cut))
        memory.add(obs[:, -1], action, r, end, over)
        for n in (~over).nonzero()[:, 0].tolist():
            s, s2 = obs[n].numpy().copy(), new[n].numpy().copy()
            truth[t, n] = s, action[n].item(), r[n].item(), s2, end[n].item()
        obs, over = new, end | cut
    assert check(memory, truth) > 400 and memory.over.sum() > 15


def test_any_spelling_of_a_game_and_the_paper_s_look():
    assert dqn.game_id("Q*bert") == "ALE/Qbert-v5"
    assert dqn.game_id("space_invaders") == dqn.game_id("SpaceInvaders") == "ALE/SpaceInvaders-v5"
    with pytest.raises(ValueError, match="Pong"):
        dqn.game_id("Pnog")
    env = dqn.make_env(settings(paper=True), 2)
    assert dqn.screens(env.reset(seed=0)[0]).shape == (2, 4, 84, 84)


# ---- the script ----

QUICK = ["--quick", "--eval-frames", "40", "--envs", "2"]


@pytest.fixture
def light(monkeypatch):
    """Two games in evaluation and no picture, for tests that look at neither."""
    monkeypatch.setattr(dqn, "play", functools.partial(dqn.play, games=2))
    monkeypatch.setattr(dqn, "draw_picture", lambda *_: None)


def test_quick_runs_and_draws(tmp_path):
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path / "o")]
    run = subprocess.run(
        [sys.executable, dqn.__file__, *flags], capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert lines[0].startswith("dqn | 0.68M parameters | ") and lines[-1].startswith("test score ")
    assert "steps/s" in run.stdout and "updates/s" in run.stdout and "epsilon" in run.stdout
    assert (tmp_path / "o" / "dqn.png").stat().st_size > 20000
    assert (tmp_path / "o" / "dqn.gif").read_bytes()[:3] == b"GIF"


def test_save_interrupt_and_continue_equal_an_unbroken_run(tmp_path, monkeypatch, capsys, light):
    """The games restart every 100 steps; Ctrl-C comes amid such a chapter."""
    base = [*QUICK, "--out", str(tmp_path), "--save-memory"]
    more = [*base, "--chapter", "100", "--steps", "250", "--warmup", "60"]
    assert dqn.main([*more, "--save", str(tmp_path / "a.pt")]) == 0
    loss, calls = dqn.dqn_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(dqn, "dqn_loss", interrupted)
    assert dqn.main([*more, "--save", str(tmp_path / "b.pt")]) == 130
    assert "test score" in capsys.readouterr().out
    monkeypatch.setattr(dqn, "dqn_loss", loss)
    half = torch.load(tmp_path / "b.pt", weights_only=True)["run"]
    assert 100 < half["step"] < 200 and half["step"] - 100 == 2 * len(half["log"]) > 20
    more = ["--load", str(tmp_path / "b.pt"), "--steps", "250", "--save", str(tmp_path / "c.pt")]
    assert dqn.main([*base, *more]) == 0
    a, c = (torch.load(tmp_path / f, weights_only=True) for f in ("a.pt", "c.pt"))
    assert a["run"]["step"] == c["run"]["step"] == 250
    assert a["run"]["updates"] == c["run"]["updates"] > 40
    assert a["run"]["history"][-1] == c["run"]["history"][-1]  # the average Q at the end
    for name, value in a["models"]["q"].items():
        assert torch.equal(value, c["models"]["q"][name]), name
    for name in ("frame", "action", "reward", "over", "age"):
        rows = a["memory"]["count"]
        assert torch.equal(a["memory"][name][:rows], c["memory"][name][:rows]), name
    assert not list(tmp_path.glob("*.tmp"))


def test_load_alone_evaluates_and_without_memory_it_fills_a_new_one(tmp_path, capsys, light):
    base = [*QUICK, "--out", str(tmp_path)]
    assert dqn.main([*base, "--save", str(tmp_path / "a.pt")]) == 0
    first = capsys.readouterr().out.splitlines()
    assert dqn.main([*base, "--load", str(tmp_path / "a.pt")]) == 0
    again = capsys.readouterr().out.splitlines()
    assert len(again) == 2 and first[-1].split("|")[:4] == again[-1].split("|")[:4]
    size = os.path.getsize(tmp_path / "a.pt")
    more = ["--load", str(tmp_path / "a.pt"), "--steps", "600", "--save", str(tmp_path / "b.pt")]
    assert dqn.main([*base, *more, "--lr", "1e-4", "--decay", "0"]) == 0
    a, b = (torch.load(tmp_path / f, weights_only=True) for f in ("a.pt", "b.pt"))
    assert b["run"]["step"] == 600 and size < 2**24 and "frame" not in b["memory"]
    assert b["optimizers"]["q"]["param_groups"][0]["lr"] == 1e-4  # a new rate is not ignored
    _, _, (_, q, target, *_) = dqn.parse([*base, *more[:2], "--target-every", "0"])
    assert target is q  # and without a target network its weights do not displace those of q
    assert all(torch.equal(v, a["models"]["q"][k]) for k, v in q.state_dict().items())
    assert any(not torch.equal(v, a["models"]["target"][k]) for k, v in q.state_dict().items())


def test_same_seed_same_run(tmp_path, light):
    for name in "ab":
        args = ["--out", str(tmp_path), "--save", str(tmp_path / name), "--steps", "200"]
        assert dqn.main([*QUICK, *args]) == 0
    a, b = (torch.load(tmp_path / name, weights_only=True) for name in "ab")
    assert a["run"]["history"] == b["run"]["history"]
    assert all(torch.equal(v, b["models"]["q"][k]) for k, v in a["models"]["q"].items())


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys, light):
    loss, calls = dqn.dqn_loss, []

    def poisoned(*args):
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) == 60 else 1)

    monkeypatch.setattr(dqn, "dqn_loss", poisoned)
    save = ["--save", str(tmp_path / "a.pt"), "--out", str(tmp_path)]
    assert dqn.main([*QUICK, *save]) == 1
    assert "the loss is nan at step 3" in capsys.readouterr().err
    assert torch.load(tmp_path / "a.pt", weights_only=True)["run"]["step"] == 200


def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, light):
    monkeypatch.chdir(tmp_path)
    torch.save({"script": "vit"}, "other.pt")
    torch.save({"script": "dqn"}, "empty.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "file").write_bytes(b"abc")
    assert dqn.main([*QUICK, "--steps", "160", "--save", "a.pt"]) == 0
    capsys.readouterr()
    for bad, word in (
        (["--game", "Brakeout"], "Breakout"), (["--game", "zzzzzz"], "104 games"),
        (["--load", "other.pt"], "other.pt"), (["--load", "junk.pt"], ""),
        (["--load", "empty.pt"], ""), (["--load", "a.pt", "--envs", "4"], "--envs 4"),
        (["--load", "a.pt", "--game", "Breakout"], "--game Breakout"),
        (["--lr", "nan"], "--lr"), (["--minutes", "0"], "--minutes"), (["--gamma", "2"], "--gamma"),
        (["--warmup", "5000", "--memory", "2000"], "--warmup"), (["--memory", "9"], ""),
        (["--out", "file/x"], ""), (["--save", "no/such/folder.pt"], "no/such"),
        (["--save", "."], "cannot write"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            dqn.main(["--quick", *bad])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "error: " in err.splitlines()[-1], bad
        assert word in err.splitlines()[-1], bad


def test_paper_switches_every_deviation_back(tmp_path):
    out = ["--paper", "--memory", "8000", "--out", str(tmp_path)]
    args, _, (env, q, target, opt, memory, _) = dqn.parse(out)
    assert target is q and isinstance(opt, torch.optim.RMSprop) and args.loss == "squared"
    assert (args.envs, args.train_every, args.centre, args.init) == (1, 1, 0, "torch")
    assert (args.epsilon_end, args.epsilon_steps, args.steps) == (0.1, 10**6, 10**7)
    assert args.decay == 0
    assert dqn.DEFAULTS["memory"][1] == 10**6 and env.single_observation_space.shape[1] == 110


def test_minutes_end_a_run_and_target_decides_the_status(tmp_path, light):
    base = [*QUICK, "--out", str(tmp_path)]
    assert dqn.main([*base, "--minutes", "0.02", "--target", "100"]) == 1
    assert dqn.main([*base, "--steps", "160", "--target", "-100"]) == 0


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert dqn.main(["--out", str(tmp_path), "--target", "-10.4"]) == 0
