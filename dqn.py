"""DQN: a convolutional network learns to play Atari games from the screen and the score alone.

Paper    Playing Atari with Deep Reinforcement Learning -- Volodymyr Mnih, Koray Kavukcuoglu, David
         Silver et al., December 2013, arXiv:1312.5602v1
Idea     Q-learning with a neural network tends to diverge: successive screens are alike and every
         step of learning moves the target. DQN learns from random transitions of a large memory
         instead, with its targets held fixed, and one network gives the Q of all actions at once.
Figure   (Section 4.1 and Algorithm 1)

         emulator, 4 frames per action -> grey screen 84 x 84 -> the last four: s (B, 4, 84, 84)
            ^                 |              |
            | a               |              +-- conv 16 @ 8 x 8 / 4 -> (B, 16, 20, 20)
            |                 | r, s'            conv 32 @ 4 x 4 / 2 -> (B, 32, 9, 9)
         epsilon-greedy       v                  linear 256, linear  -> Q (B, actions)
            ^           replay memory D                        |
            |                 | 32 random (s, a, r, s')        |
            |                 v                                |
            +--- Q <- gradient of (r + gamma max_a' Q_target(s', a') - Q(s, a))^2
Symbols  s, s2 | phi_j, phi_(j+1) | stacks of four screens, uint8 (B, 4, 84, 84)   a | a | (B,)
         q, target | theta_i, theta_(i-1) | network, and the one that makes y      r | r | (B,)
         memory | D | replay memory        y | y | target (B,)    gamma | gamma | discount
         held_out | - | states of a random game, for the average max_a Q of Figure 2
Differs  `--paper` undoes this, for the paper's 10M frames (here: steps; days on a CPU, not run):
         Centring   the mean screen is subtracted, so that the layers see what makes states differ.
         Init       He, last layer x .1, biases 0: the first Q are near 0. The paper gives none.
         Optimiser  Adam for RMSProp, Huber for squared error: no step grows with the error.
         Rate       5e-4, falling to 0 over the last quarter of the run: one network is evaluated,
                    and how it plays changes with each step of learning. The paper names no rate.
         Target     a copy of the network every 100 updates (Nature 2015); the paper has none.
         Pace       8 games at once; an update every 4 steps (Nature), not each; epsilon to .05 in
                    40,000 steps, not to .1 in 1M; a memory of 100,000, not 1M.
         Screens    all of it at 84 x 84, maximum of two frames, up to 30 no-ops, FIRE at reset
                    (Nature, ale-py); the paper crops 110 x 84 to 84 x 84 and names no others.
         Either way gamma .99 and RMSProp's rates are Nature's, Space Invaders skips 4 frames, not
         3, and all games restart every 50,000 steps, so that --load with the same --steps goes on
         exactly after --save-memory.
Run      python dqn.py                            # Pong, some 17 minutes of one core's time
         python dqn.py --minutes 105 --lr 3e-4 --decay 0 --memory 400000 --save pong.pt    # long
         python dqn.py --load pong.pt --lr 1e-4 --target-every 500 --minutes 33 --save pong.pt
         python dqn.py --game SpaceInvaders --minutes 60 --memory 300000 --lr 1e-4
                --target-every 250
Expect   Pong, 160,000 steps, 10 games at epsilon .05, seeds 0-2: -10.0 +- .4 | random -20.0 +- .6 |
         paper 20, random -20.4, after 10M frames: 16 times as many or, if they are steps, 62. The
         rate was chosen on seed 3 (3e-4: -11.0, 5e-4: -5.9), the pace of target and epsilon with
         seeds 0 and 1. With --lr 3e-4 --decay 0: -11.2 +- 4.3 over six runs on two machines. The
         average Q rises above what a losing player can earn: the max overestimates.
         The long run, seed 0, its commands in the README: 11.1 after 859,328 steps (level from
         750,000 on), then with smaller steps 15.3, 17.1, 18.1, 16.9, 17.3, 18.9 (at 2,764,320; sd
         of ten games 1.3). Other games, seed 0, one core, 450,000 to 660,000 steps (random;
         paper): with 1e-4 and --target-every 250, CleanRL's values, Space Invaders 407 (139; 581),
         Breakout 17.5 (1.6; 168), Q*bert 488 (200; 1952); with the defaults Space Invaders 121 (its
         Q rose to 23, before to 7), Q*bert 578; with --lr 3e-4 --decay 0 47, 13.0 and 600.
"""

import argparse
import copy
import difflib
import math
import os
import signal
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. The network (Section 4.1) ----

CONVS = {"2013": [(16, 8, 4), (32, 4, 2)], "nature": [(32, 8, 4), (64, 4, 2), (64, 3, 1)]}


class QNetwork(nn.Module):
    """Q(s, a) of every action at once: s uint8 (B, 4, 84, 84) -> (B, actions).

    network: "2013" or "nature" (the larger one of 2015). init: "he" with a last layer ten times
    smaller, or "torch" for the layers' own. The screen `mean` (84, 84), in [0, 1], is subtracted.
    """

    def __init__(self, actions: int, network: str = "2013", init: str = "he"):
        super().__init__()
        layers, C, side, hidden = [], 4, 84, 512 if network == "nature" else 256
        for width, kernel, stride in CONVS[network]:
            layers += [nn.Conv2d(C, width, kernel, stride), nn.ReLU()]
            C, side = width, (side - kernel) // stride + 1
        layers += [nn.Flatten(), nn.Linear(C * side**2, hidden), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, actions))
        self.register_buffer("mean", torch.zeros(84, 84))
        if init == "he":
            for layer in (m for m in self.net if hasattr(m, "weight")):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            self.net[-1].weight.data *= 0.1
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def forward(self, s: Tensor) -> Tensor:
        x = torch.stack(s.unbind(1), -1).permute(0, 3, 1, 2).float()  # bytes move, then widen
        mean = self.mean.expand(x[:1].shape).contiguous(memory_format=torch.channels_last)
        return self.net(x.div_(255).sub_(mean))


def epsilon_greedy(Q: Tensor, epsilon: float, g: torch.Generator) -> Tensor:
    """Q (B, actions) -> actions (B,) on the CPU: random with probability epsilon, else the best."""
    B, actions = Q.shape
    explore = torch.rand(B, generator=g) < epsilon
    return torch.where(explore, torch.randint(actions, (B,), generator=g), Q.argmax(1).cpu())


def epsilon_at(step: int, end: float, steps: int) -> float:
    """Falls linearly from 1 to `end` over the first `steps` steps, then stays (Section 5)."""
    return max(end, 1 - (1 - end) * step / steps)


def lr_at(done: float, lr: float, decay: float) -> float:
    """Constant, then linearly to 0 over the last `decay` of the run, of which `done` is over."""
    return lr * min(1, (1 - done) / decay) if decay else lr


# ---- 2. Replay memory (Section 4, D in Algorithm 1) ----


class ReplayMemory:
    """The last `capacity` steps of `envs` games side by side; every frame is stored once.

    Row t holds, for each game, the newest frame of the state at t, the action taken there, and the
    reward and end that it brought. The stacks s and s' overlap in time and with each other, so they
    are put together only when drawn, from the frames t - 3 ... t + 1. A frame older than the
    episode (its `age` counts the frames before it) is zero, as in what the agent saw; a row with an
    episode's last state is `over` and starts no transition.
    """

    def __init__(self, capacity: int, envs: int, shape=(84, 84), stack: int = 4):
        self.size, self.envs, self.stack = capacity // envs, envs, stack
        self.count, self.clock = 0, torch.zeros(envs, dtype=torch.uint8)  # rows ever; next age
        self.frame = torch.empty(self.size, envs, *shape, dtype=torch.uint8)
        self.action, self.age = torch.zeros(2, self.size, envs, dtype=torch.uint8)
        self.reward = torch.zeros(self.size, envs)
        self.terminal, self.over = torch.zeros(2, self.size, envs, dtype=torch.bool)

    def add(self, frame, action, reward, terminal, over):
        """One row: frame (envs, H, W), the rest (envs,). The row after `over` starts an episode."""
        row = self.count % self.size
        self.frame[row], self.action[row], self.reward[row] = frame, action, reward
        self.terminal[row], self.over[row], self.age[row] = terminal, over, self.clock
        self.clock = torch.where(over, 0, self.clock.clamp(max=254) + 1)
        self.count += 1

    def __len__(self):
        """Rows times games that can be drawn: their stacks and the next frame are in the ring."""
        oldest = max(0, self.count - self.size)
        return max(0, self.count - 1 - (oldest + self.stack - 1)) * self.envs

    def get(self, t: Tensor, n: Tensor):
        """Transitions of rows t, games n (B,) -> s (B, 4, H, W), a, r, s2, terminal."""
        back = torch.arange(self.stack - 1, -2, -1)  # 3, 2, 1, 0 steps before t, and 1 after it
        place, row = (t[:, None] - back) % self.size * self.envs + n[:, None], t % self.size
        window = self.frame.flatten(0, 1).index_select(0, place.flatten()).unflatten(0, place.shape)
        window[(back > self.age[row, n, None]).nonzero(as_tuple=True)] = 0
        a, r, terminal = (x[row, n] for x in (self.action, self.reward, self.terminal))
        return window[:, :-1], a.long(), r, window[:, 1:], terminal.float()

    def sample(self, batch: int, g: torch.Generator):
        """`batch` transitions, each with the same probability, with replacement."""
        picked, high = torch.empty(0, dtype=torch.long), (self.count - 1) * self.envs
        while len(picked) < batch:  # an episode's last state starts none: drawn again
            i = torch.randint(high - len(self), high, (batch,), generator=g)
            i = i[~self.over.view(-1)[i % self.over.numel()]]
            picked = torch.cat([picked, i])[:batch]
        return self.get(picked // self.envs, picked % self.envs)


# ---- 3. Objective (Eq. 2 and 3) ----


def dqn_loss(q, target, batch, gamma: float = 0.99, loss: str = "huber") -> Tensor:
    """Eq. 2, loss "squared", or "huber". batch: s, a, r, s2, terminal as from ReplayMemory.sample.

    The target y_j of Algorithm 1: r, clipped to -1, 0 or 1, plus gamma max_a' Q(s', a') unless s'
    ended the game. A game that was merely cut off (truncated) is not terminal: it had a future.
    """
    s, a, r, s2, terminal = batch
    with torch.no_grad():  # Eq. 3 has no gradient of y: theta_(i-1) is "held fixed"
        y = r.sign() + gamma * (1 - terminal) * target(s2).amax(1)
    Q = q(s).gather(1, a[:, None])[:, 0]
    return F.smooth_l1_loss(Q, y) if loss == "huber" else F.mse_loss(Q, y)


# ---- 4. The games ----


def rng(seed: int, step: int) -> torch.Generator:
    """Every random number of a step comes from (seed, step), so a resumed run draws the same."""
    return torch.Generator().manual_seed(seed * 10**10 + step)


def game_id(name: str) -> str:
    """pong, Q*bert or space_invaders -> gymnasium's id; ValueError with the nearest names."""
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)
    ids = {i[4:-3].lower(): i for i in gymnasium.registry if i.startswith("ALE/") and "-v5" in i}
    key = "".join(filter(str.isalnum, name)).lower()
    if key not in ids:
        near = [ids[k][4:-3] for k in difflib.get_close_matches(key, ids, 3, 0.4)]
        raise ValueError(f"no game {name}; near: {', '.join(near) or 'none'} ({len(ids)} games)")
    return ids[key]


def make_env(args, envs: int, frames: int = 108000, **look):
    """ale-py's vector environment: `envs` games, cut off after `frames` frames of the emulator."""
    import gymnasium

    if args.paper:
        look = {"img_height": 110, "maxpool": False, "noop_max": 0, "use_fire_reset": False} | look
    return gymnasium.make_vec(
        game_id(args.game), num_envs=envs, max_num_frames_per_episode=frames, frameskip=4,
        repeat_action_probability=0.0, reward_clipping=False, **look,
        num_threads=max(1, min(envs, (os.cpu_count() or 2) - 1)),  # one core is left to learning
    )  # fmt: skip


def screens(obs) -> Tensor:
    """numpy (N, 4, H, W) -> tensor; of 110 rows (--paper) the 84 with the playing area."""
    obs = torch.from_numpy(obs)
    return obs[:, :, 18:102] if obs.shape[2] == 110 else obs


def restart(env, args, run) -> Tensor:
    """All games anew from a seed of (seed, step), then the actions since -> screens.

    The emulators' state can't be read, but it follows from these: so a run goes on exactly.
    """
    first = run["step"] - len(run["log"]) * args.envs
    obs, _ = env.reset(seed=int(torch.randint(2**30, (), generator=rng(args.seed, 10**9 + first))))
    for action in run["log"]:
        obs, *_ = env.step(action.long().numpy())
    return screens(obs)


# ---- 5. Training (Algorithm 1, with N games in the place of one) ----


def train(env, q, target, opt, memory, held_out, args, run) -> bool:
    """Changes run in place -> stopped. A step is one action of one game. env: as ale-py's."""
    from tqdm import tqdm

    N, stop, losses, done = args.envs, [], [], run["step"] / args.steps
    t0, chapter, first = time.time(), max(N, args.chapter // N * N), (run["step"], run["updates"])
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: after the step
    bar, obs = tqdm(total=100, disable=None, unit="%"), restart(env, args, run)
    try:
        while done < 1 and not stop:
            g = rng(args.seed, run["step"])
            epsilon = epsilon_at(run["step"], args.epsilon_end, args.epsilon_steps)
            with torch.no_grad():
                action = epsilon_greedy(q(obs.to(args.device)), epsilon, g)
            env.send(action.numpy())  # the emulators play in their own threads ...
            due = (run["step"] + N) // args.train_every - run["step"] // args.train_every
            for _ in range(due * (len(memory) >= args.warmup)):  # ... while the network learns
                batch = [x.to(args.device) for x in memory.sample(args.batch_size, g)]
                loss = dqn_loss(q, target, batch, args.gamma, args.loss)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"the loss is {losses[-1]} at step {run['step']}")
                opt.param_groups[0]["lr"] = lr_at(done, args.lr, args.decay)
                opt.zero_grad(); loss.backward(); opt.step()  # fmt: skip
                run["updates"] += 1
                if args.target_every and run["updates"] % args.target_every == 0:
                    target.load_state_dict(q.state_dict())
            frame, received = obs[:, -1], env.recv()
            obs = screens(received[0])
            reward, terminated, truncated = map(torch.from_numpy, received[1:4])
            # a game that was over before this step ignored the action and began anew
            memory.add(frame, action, reward, terminated, run["over"])
            run["step"] += N
            run["log"].append(action.byte())
            run["score"] += reward
            run["over"] = terminated | truncated
            for n in run["over"].nonzero()[:, 0].tolist():
                run["history"].append((run["step"], "score", run["score"][n].item()))
                run["score"][n] = 0
            if run["step"] % chapter == 0:  # so that a checkpoint has few actions to play again
                cut = torch.ones(N, dtype=torch.bool)
                memory.add(obs[:, -1], action, reward, ~cut, cut)
                run |= {"log": [], "score": torch.zeros(N), "over": ~cut}
                obs = restart(env, args, run)
            t = time.time() - t0
            done = max(run["step"] / args.steps, t / 60 / args.minutes)
            if run["step"] % args.log_every < N or done >= 1 or stop:
                with torch.no_grad():
                    Q = q(held_out.to(args.device)).amax(1).mean().item()
                run["history"].append((run["step"], "Q", Q))
                recent = [x for _, kind, x in run["history"] if kind == "score"][-20:] or [math.nan]
                line = f"step {run['step']:7d} | score {sum(recent) / len(recent):.1f} | Q {Q:.3f} "
                line += f"| epsilon {epsilon:.2f} | loss {sum(losses) / max(1, len(losses)):.5f}"
                steps, updates = ((run[k] - n) / t for k, n in zip(("step", "updates"), first))
                tqdm.write(f"{line} | {steps:.0f} steps/s | {updates:.0f} updates/s")
                bar.update(min(100, 100 * done) - bar.n)
                losses = []
                if args.save:  # beside its place, then moved there: a crash leaves the old one
                    file = {"script": "dqn", "args": vars(args), "run": run}
                    file["models"] = {"q": q.state_dict(), "target": target.state_dict()}
                    full = args.save_memory and (done >= 1 or stop)  # else the games' clocks alone
                    kept = {k: v for k, v in vars(memory).items() if full or k == "clock"}
                    file |= {"optimizers": {"q": opt.state_dict()}, "memory": kept}
                    torch.save(file, args.save + ".tmp")
                    os.replace(args.save + ".tmp", args.save)
    finally:
        signal.signal(signal.SIGINT, before)
    return bool(stop)


# ---- 6. Evaluation and picture ----


@torch.no_grad()
def play(q, args, epsilon: float, games: int = 10):
    """Games in parallel, the same starts for any q -> scores (games,), seed, trail, states.

    trail: action (T, games), Q (T, games, actions), reward (T, games). states: every 8th one.
    """
    env, g = make_env(args, games, args.eval_frames), rng(args.seed, 2 * 10**9)
    seed, trail, states = int(torch.randint(2**30, (), generator=g)), [], []
    obs, alive = screens(env.reset(seed=seed)[0]), torch.ones(games, dtype=torch.bool)
    while alive.any():
        if len(trail) % 8 == 0:
            states.append(obs[alive])
        Q = q(obs.to(args.device)).cpu()
        action = epsilon_greedy(Q, epsilon, g)
        obs, reward, terminated, truncated, _ = env.step(action.numpy())
        obs, reward = screens(obs), torch.from_numpy(reward) * alive
        trail.append((action, Q, reward))
        alive &= ~torch.from_numpy(terminated | truncated)
    trail = [torch.stack(x) for x in zip(*trail)]
    return trail[2].sum(0).float(), seed, trail, torch.cat(states)


def draw_picture(args, run, score, random, seed, trail):
    """dqn.png: scores and average Q over time, four screens with their Q. dqn.gif: that game."""
    from matplotlib.figure import Figure
    from PIL import Image

    best = int(score.argmax())
    action, Q, reward = (x[:, best] for x in trail)
    point = min(max(36, int((reward > 0).int().argmax())), len(action) - 1)  # the first that it won
    env = make_env(args, 1, grayscale=False, img_height=210, img_width=160, stack_num=1)
    films = [env.reset(seed=seed + best)[0]]  # that game again, in colour: there is no `render`
    films += [env.step(a[None].numpy())[0] for a in action[: point + 150]]
    fig = Figure(figsize=(13, 8), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1, 1.25])
    a, b = top.subplots(1, 2)
    curves = {k: [(t, x) for t, kind, x in run["history"] if kind == k] for k in ("score", "Q")}
    t, x = torch.tensor(curves["score"] or [(0, math.nan)]).T
    a.plot(t, x, ".", color="lightgray", label="a game in training")
    a.plot(t, [x[max(0, i - 20) : i].mean() for i in range(1, len(x) + 1)], label="mean of 20")
    a.axhline(random.mean(), color="gray", ls=":", label="random")
    a.plot(run["step"], score.mean(), "r*", ms=12, label="evaluation: 10 games, epsilon .05")
    a.set(title=f"{args.game}: score of a game", xlabel="steps (of 4 frames)")
    a.legend()
    b.plot(*zip(*curves["Q"]))
    b.set(title="average max Q over held-out states (Figure 2, right)", xlabel="steps")
    bottom.suptitle("an evaluation game up to the first point that it won, and Q of all actions")
    axes, names = bottom.subplots(1, 8), [x.name.lower() for x in env.ale.get_action_set()]
    for screen, bars, back in zip(axes[::2], axes[1::2], (36, 24, 12, 0)):
        t = max(0, point - back)
        screen.imshow(films[t][0, 0], aspect="auto")
        screen.set(title=f"step {t}: {names[action[t]]}", xticks=[], yticks=[])
        bars.barh(names, Q[t], color=["tab:red" if x == Q[t].max() else "tab:blue" for x in Q[t]])
        bars.tick_params(labelsize=7, labelleft=bars is axes[1])
        bars.set(title=f"max Q {Q[t].max():.2f}", xlim=(min(0, Q.min()), Q.max()))
    fig.savefig(os.path.join(args.out, "dqn.png"), dpi=80)
    image, *rest = (Image.fromarray(f[0, 0]).quantize(16) for f in films[max(0, point - 150) :])
    image.save(f"{args.out}/dqn.gif", save_all=True, append_images=rest, duration=60, loop=0)


# ---- 7. Command line ----

TABLE1 = {  # random, DQN (the paper's average scores at epsilon .05)
    "BeamRider": (354, 4092), "Breakout": (1.2, 168), "Enduro": (0, 470), "Pong": (-20.4, 20),
    "Qbert": (157, 1952), "Seaquest": (110, 1705), "SpaceInvaders": (179, 581),
}  # fmt: skip
DEFAULTS = {  # default, --paper, least and most or the choices, meaning
    "game": ("Pong", "Pong", None, "any of ale-py's, named as in gymnasium's ALE/<game>-v5"),
    "network": ("2013", "2013", list(CONVS), "nature: three convolutions, 512 units"),
    "init": ("he", "torch", ["he", "torch"], "initialisation"),
    "centre": (1, 0, (0, 1), "1: subtract the mean screen"),
    "optimizer": ("adam", "rmsprop", ["adam", "rmsprop"], "optimiser"),
    "loss": ("huber", "squared", ["huber", "squared"], "of Q against its target"),
    "envs": (8, 1, (1, 1024), "games at once"),
    "memory": (100_000, 1_000_000, (1, 10**9), "transitions, 7.1 kB each"),
    "warmup": (5000, 5000, (1, 10**9), "transitions before the first update"),
    "epsilon_end": (0.05, 0.1, (0, 1), "where epsilon's fall from 1 ends"),
    "epsilon_steps": (40_000, 1_000_000, (1, 10**12), "steps that it takes"),
    "train_every": (4, 1, (1, 10**6), "steps per update"),
    "target_every": (100, 0, (0, 10**9), "updates between copies to the target, 0: no target"),
    "gamma": (0.99, 0.99, (0, 1), "discount"),
    "batch_size": (32, 32, (1, 10**6), "transitions per update"),
    "lr": (5e-4, 2.5e-4, (1e-12, 1e3), "learning rate"),
    "decay": (0.25, 0.0, (0, 1), "share of the run, its last, over which the rate falls to 0"),
    "chapter": (50_000, 50_000, (1, 10**9), "steps after which all games restart"),
    "eval_frames": (18_000, 18_000, (8, 108_000), "longest game in evaluation (60 frames: 1 s)"),
    "steps": (160_000, 10**7, (1, 10**12), "actions in training, of all games together"),
    "minutes": (math.inf, math.inf, (1e-9, math.inf), "time for it; then --steps has no default"),
    "log_every": (5000, 5000, (1, 10**9), "steps between log lines"),
    "seed": (0, 0, (0, 10**8), "of weights, games, exploration and batches"),
}
QUICK = {"steps": 400, "memory": 2000, "warmup": 100, "target_every": 20, "batch_size": 8}
QUICK |= {"eval_frames": 200, "log_every": 200}
FIXED = ("paper", "game", "network", "init", "centre", "optimizer", "envs", "memory", "seed")


def parse(argv):
    """-> args, checkpoint or {}, what `train` needs. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    for name, (value, paper, bounds, text) in DEFAULTS.items():
        text += f": default {value}" + f", --paper {paper}" * (paper != value)
        among = bounds if isinstance(bounds, list) else None
        flag(f"--{name.replace('_', '-')}", type=type(value), choices=among, help=text)
    flag("--paper", action="store_true", help="all as in the paper, if not given here")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture and the GIF, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--save-memory", action="store_true", help="the last with the memory: resumes exactly")
    flag("--load", help="checkpoint to evaluate, or to go on with (more --steps, or --minutes)")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the mean score in evaluation is below this")
    args, ckpt = parser.parse_args(argv), {}
    try:
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "dqn":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own = ckpt.get("args", {})
        args.paper = args.paper or own.get("paper", False)
        values = {k: v[args.paper] for k, v in DEFAULTS.items()} | (QUICK if args.quick else {})
        values |= own | {"minutes": math.inf}
        if ckpt or args.minutes:
            values["steps"] = 10**12 if args.minutes else ckpt["run"]["step"]
        args.game = game_id(args.game or values["game"])[4:-3]
        for name, (_, _, bounds, _) in DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, values[name])
            if isinstance(bounds, tuple) and not bounds[0] <= getattr(args, name) <= bounds[1]:
                name = name.replace("_", "-")
                raise ValueError("--{} must lie between {} and {}".format(name, *bounds))
        for name in FIXED:
            if getattr(args, name) != own.get(name, getattr(args, name)):
                raise ValueError(f"--{name} {getattr(args, name)}: the checkpoint has {own[name]}")
        if args.warmup > (args.memory // args.envs - 5) * args.envs:
            raise ValueError(f"--warmup {args.warmup} is too much for a --memory of {args.memory}")
        torch.manual_seed(args.seed)
        env, N = make_env(args, args.envs), args.envs
        q = QNetwork(int(env.single_action_space.n), args.network, args.init).to(args.device)
        target = copy.deepcopy(q).requires_grad_(False) if args.target_every else q
        if args.optimizer == "adam":
            opt = torch.optim.Adam(q.parameters(), args.lr, fused=True)
        else:
            opt = torch.optim.RMSprop(q.parameters(), args.lr, alpha=0.95, eps=0.01, centered=True)
        memory, run = ReplayMemory(args.memory, N), {"step": 0, "updates": 0}
        run |= {"history": [], "log": [], "score": torch.zeros(N), "over": torch.zeros(N).bool()}
        if ckpt:
            target.load_state_dict(ckpt["models"]["target"])
            q.load_state_dict(ckpt["models"]["q"])  # after the target: without one it is q
            opt.load_state_dict(ckpt["optimizers"]["q"])
            vars(memory).update(ckpt["memory"])
            run |= ckpt["run"]
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "dqn.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, ckpt, (env, q, target, opt, memory, run)


def main(argv=None) -> int:
    args, ckpt, (env, q, target, opt, memory, run) = parse(argv)
    if args.device == "cpu":
        torch.set_num_threads(1)  # a second one gains little and takes the emulators' core
    t0, stopped = time.time(), False
    line = f"dqn | {sum(p.numel() for p in q.parameters()) / 1e6:.2f}M parameters | {args.device} "
    line += f"| seed {args.seed} | {args.game}, {q.net[-1].out_features} actions, {args.envs} games"
    print(line, flush=True)
    random, _, _, states = play(q, args, 1.0)
    held_out = states[torch.randperm(len(states), generator=rng(args.seed, 3 * 10**9))[:500]]
    if args.centre and not ckpt:
        q.mean.copy_(states[:, -1].float().mean(0) / 255)
        target.load_state_dict(q.state_dict())
    try:
        if args.steps > run["step"]:
            stopped = train(env, q, target, opt, memory, held_out, args, run)
    except FloatingPointError as error:
        print(f"dqn.py: stopped: {error}", file=sys.stderr)
        return 1
    score, seed, trail, _ = play(q, args, 0.05)
    draw_picture(args, run, score, random, seed, trail)
    paper = "{1}, random {0}".format(*TABLE1.get(args.game, ("-", "-")))
    line = f"test score {score.mean():.1f} (sd {score.std():.1f}, {len(score)} games) | "
    line += f"random {random.mean():.1f} | paper {paper} | {run['step']} steps"
    print(f"{line} | {time.time() - t0:.0f} s")
    return 130 if stopped else int(args.target is not None and score.mean() < args.target)


if __name__ == "__main__":
    sys.exit(main())
