"""CVAE: completes a digit from one quadrant, in many different and plausible ways.

Paper    Learning Structured Output Representation using Deep Conditional Generative Models --
         Kihyuk Sohn, Honglak Lee, Xinchen Yan, December 2015, NeurIPS 28
Idea     A network that predicts each pixel of y from x alone blurs where several answers are
         right. A latent z, whose prior depends on x, decides between the answers; a recognition
         network that sees the true y teaches z in training: a VAE of y, all of it given x.
Figure   (Figure 1; 28x28 with one quadrant observed; B images, L samples, 50 latents)
         x (B, 196) --+--------> prior_net -------> p(z|x)   (B, 50) x 2 --+
                      |                                                    +-- KL (B,)
                      +-+-> recognition_net ------> q(z|x,y) (B, 50) x 2 --+
         y (B, 588) ----+                              |
                      |             z = mu + sigma eps (L, B, 50); at test time z ~ p(z|x),
                      |                                |           because y is not there
                      +-> generation_net(x, z) <-------+
                                 +-> logits of y (L, B, 588) --> log p(y|x,z) (L, B)
Symbols  x | x | observed pixels (B, x_dim)       y | y | pixels to predict, 0 or 1 (B, y_dim)
         z | z | latent (samples, B, z_dim)       L, S | L, S | samples in training, in evaluation
         prior | p_theta(z|x) | (mean, log-variance), each (B, z_dim)
         recognition | q_phi(z|x,y) | the same    generation | p_theta(y|x,z) | logits of y
         alpha | alpha | weight of the CVAE in the hybrid objective (1 CVAE, 0 GSNN)
Differs  Layer sizes and optimiser are ours; few settings were compared, on validation. Neither the
         recurrent connection from the baseline into the prior (Figure 1d) nor the multi-scale
         objective, which the paper describes for segmentation (Section 4.3). The quadrants come in
         the order of Pyro's rerun: bottom left, top left, top right. Pixels are Bernoulli(gray
         value), drawn anew for every batch. Every network, the baseline too, keeps its weights of
         the best validation score.
Run      python cvae.py                   # Section 5.1's table on 8x8 digits, 2 minutes (1 core)
         python cvae.py --data mnist.npz  # the same beside the paper's, some 26 minutes
         python cvae.py --load FILE       # no training: table and picture of a saved run
Expect   -log p(y|x) of the test split, nats per image, mean +- sd over seeds 0, 1, 2
         quadrants observed       1               2               3           MNIST in the paper
         pixel means        20.88           14.39            7.44
         NN (baseline)      18.94 +- .00    12.39 +- .02     5.75 +- .02     99.75 / 62.18 / 25.99
         CVAE Monte Carlo   16.59 +- .02    10.91 +- .02     5.32 +- .01     68.39 / 45.34 / 20.96
         CVAE importance    16.53 +- .01    10.90 +- .03     5.31 +- .01     63.91 / 44.73 / 20.95
         MNIST, seed 0: NN 103.86 / 64.82 / 27.55, Monte Carlo 90.91 / 52.81 / 21.12, importance
         62.60 / 43.27 / 19.97, level with the paper's. With one quadrant Monte Carlo's 100 draws
         from p(z|x) hardly ever meet the z that explain y: here prior and q lie further apart.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Gaussian = tuple[Tensor, Tensor]  # mean and log-variance (not standard deviation), (B, z_dim) each

# ---- 1. The two distributions: a diagonal Gaussian for z, Bernoulli pixels for y ----
#
# All of these are in nats and *summed* over z or over pixels; only images are averaged. A mean over
# pixels would divide log p(y|x,z) by y_dim but not the KL, which is a KL weight of y_dim: z dies.


def reparameterize(gaussian: Gaussian, n: int) -> Tensor:
    """n samples mu + sigma eps of each Gaussian: (B, z_dim) twice -> z (n, B, z_dim)."""
    mu, log_var = gaussian
    return mu + (0.5 * log_var).exp() * torch.randn(n, *mu.shape, device=mu.device)


def log_normal(z: Tensor, gaussian: Gaussian) -> Tensor:
    """log N(z; mu, sigma^2): z (..., B, z_dim) -> (..., B)."""
    mu, log_var = gaussian
    return -0.5 * (math.log(2 * math.pi) + log_var + (z - mu) ** 2 / log_var.exp()).sum(-1)


def kl_divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) >= 0 in closed form, (B,). With p = N(0, I) it is the VAE's."""
    (mu_q, log_var_q), (mu_p, log_var_p) = q, p
    log_ratio = log_var_q - log_var_p
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mu_q - mu_p) ** 2 / log_var_p.exp()).sum(-1)


def log_bernoulli(y: Tensor, logits: Tensor) -> Tensor:
    """log p(y) of pixels y (B, y_dim), 0 or 1, under logits (..., B, y_dim) -> (..., B)."""
    return (y * logits - F.softplus(logits)).sum(-1)  # never log(sigmoid): no log(0)


# ---- 2. The networks (Section 4, Figure 1) ----


def mlp(n_in: int, hidden: int, n_out: int, dropout: float) -> nn.Sequential:
    """Two hidden layers of ReLUs: (..., n_in) -> (..., n_out)."""
    first = nn.Linear(n_in, hidden), nn.ReLU(), nn.Dropout(dropout)
    second = nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout)
    return nn.Sequential(*first, *second, nn.Linear(hidden, n_out))


class BaselineNN(nn.Sequential):
    """Figure 1a, the baseline: one answer per input. x (B, x_dim) -> logits of y (B, y_dim)."""

    def __init__(self, x_dim=196, y_dim=588, hidden=500, dropout=0.0):
        super().__init__(*mlp(x_dim, hidden, y_dim, dropout))


class CVAE(nn.Module):
    """Figures 1b and 1c. The defaults fit 28x28 digits with one quadrant observed."""

    def __init__(self, x_dim=196, y_dim=588, z_dim=50, hidden=500, dropout=0.0):
        super().__init__()
        self.prior_net = mlp(x_dim, hidden, 2 * z_dim, dropout)
        self.recognition_net = mlp(x_dim + y_dim, hidden, 2 * z_dim, dropout)
        self.generation_net = mlp(x_dim + z_dim, hidden, y_dim, dropout)

    def prior(self, x: Tensor) -> Gaussian:
        """p(z|x). It must not see y: at test time there is none."""
        return self.prior_net(x).chunk(2, -1)

    def recognition(self, x: Tensor, y: Tensor) -> Gaussian:
        """q(z|x,y), for training and for importance sampling only."""
        return self.recognition_net(torch.cat([x, y], -1)).chunk(2, -1)

    def generation(self, x: Tensor, z: Tensor) -> Tensor:
        """p(y|x,z): x (B, x_dim), z (..., B, z_dim) -> logits of y (..., B, y_dim)."""
        # x again: else z would have to carry all that the input already says
        return self.generation_net(torch.cat([x.expand(*z.shape[:-1], -1), z], -1))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The one best guess (Section 4.1): p(y|x,z*) at z* = E[z|x], (B, y_dim) in 0..1."""
        return self.generation(x, self.prior(x)[0]).sigmoid()

    @torch.no_grad()
    def sample(self, x: Tensor, n: int = 1, pixels: bool = True) -> Tensor:
        """n completions of each x, (n, B, y_dim): pixels 0 or 1, or else their probabilities."""
        p = self.generation(x, reparameterize(self.prior(x), n)).sigmoid()
        return torch.bernoulli(p) if pixels else p


# ---- 3. Objectives (to maximise) and estimates of log p(y|x), all (B,) in nats ----


def cvae_bound(model: CVAE, x: Tensor, y: Tensor, L: int = 1) -> Tensor:
    """The empirical lower bound: -KL(q(z|x,y) || p(z|x)) + 1/L sum_l log p(y|x,z_l).  Eq. 3-4
    The weight of the KL is 1. Both networks of the KL get its gradient, the prior too."""
    q, p = model.recognition(x, y), model.prior(x)
    log_p = log_bernoulli(y, model.generation(x, reparameterize(q, L)))  # (L, B)
    return log_p.mean(0) - kl_divergence(q, p)


def gsnn_objective(model: CVAE, x: Tensor, y: Tensor, L: int = 1) -> Tensor:
    """Gaussian stochastic network, q = p: 1/L sum_l log p(y|x,z_l) with z_l ~ p(z|x).  Eq. 7
    Trains z the way that it is used at test time; nothing tells it yet which z led to this y."""
    return log_bernoulli(y, model.generation(x, reparameterize(model.prior(x), L))).mean(0)


def hybrid_objective(model: CVAE, x: Tensor, y: Tensor, alpha: float = 1.0, L: int = 1) -> Tensor:
    """alpha L_CVAE + (1 - alpha) L_GSNN.  Eq. 8"""
    cvae = alpha * cvae_bound(model, x, y, L) if alpha > 0 else 0.0
    return cvae + ((1 - alpha) * gsnn_objective(model, x, y, L) if alpha < 1 else 0.0)


def monte_carlo(model: CVAE, x: Tensor, y: Tensor, S: int = 100) -> Tensor:
    """log 1/S sum_s p(y|x,z_s) with z_s ~ p(z|x).  Eq. 5
    Too low, by a margin that shrinks with S: few z from the prior explain a given y."""
    log_p = log_bernoulli(y, model.generation(x, reparameterize(model.prior(x), S)))  # (S, B)
    return log_p.logsumexp(0) - math.log(S)


def importance_sampling(model: CVAE, x: Tensor, y: Tensor, S: int = 100) -> Tensor:
    """log 1/S sum_s p(y|x,z_s) p(z_s|x) / q(z_s|x,y) with z_s ~ q(z|x,y).  Eq. 6
    The same number as Eq. 5, too low by less: q finds the z that explain y."""
    q = model.recognition(x, y)
    z = reparameterize(q, S)
    log_ratio = log_normal(z, model.prior(x)) - log_normal(z, q)  # (S, B)
    return (log_bernoulli(y, model.generation(x, z)) + log_ratio).logsumexp(0) - math.log(S)


# ---- 4. Data: gray images whose pixels are the probabilities of ones ----


def quadrants(height: int, width: int, observed: int) -> tuple[Tensor, Tensor]:
    """Indices into a flat image: pixels of the first `observed` quadrants (x), all others (y).
    The order: bottom left, top left, top right, bottom right. Odd sizes: later half larger."""
    if observed not in (1, 2, 3) or min(height, width) < 2:
        raise ValueError(f"cannot observe {observed} quadrants of {height}x{width} pixels")
    number = torch.tensor([[1, 2], [0, 3]])  # of the quadrant, top row first
    down, right = torch.arange(height) >= height // 2, torch.arange(width) >= width // 2
    known = number[down.long()][:, right.long()].flatten() < observed
    return known.nonzero()[:, 0], (~known).nonzero()[:, 0]


def load_images(path: str) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 (N, H, W) for training, validation (the last sixth of the training set) and test."""
    if path == "digits":
        from sklearn.datasets import load_digits

        images = torch.tensor(load_digits().images * (255 / 16)).round().byte()
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
        train, test = images[:1200], images[1200:]
    else:
        import numpy as np

        with np.load(path, allow_pickle=False) as file:
            train, test = file["x_train"], file["x_test"]
        same = train.ndim == 3 and train.shape[1:] == test.shape[1:] and min(train.shape[1:]) > 1
        if not same or train.dtype != np.uint8 or test.dtype != np.uint8 or not len(test):
            raise ValueError(f"{path}: x_train, x_test must be uint8 (N, H, W), gray, of one size")
        train, test = torch.from_numpy(train), torch.from_numpy(test)
    cut = len(train) - len(train) // 6
    return train[:cut], train[cut:], test


def binarize(images: Tensor, seed: int, times: int = 1) -> Tensor:
    """Draws the pixels of all images `times` over, on the CPU: the same on every device."""
    g = torch.Generator().manual_seed(seed)
    return torch.bernoulli(images.flatten(1).repeat(times, 1).float() / 255, generator=g)


# ---- 5. Training: for 1, 2 and 3 quadrants a baseline and a CVAE, all six side by side ----


def objectives(models, splits, v: Tensor, alpha: float) -> dict[str, Tensor]:
    """What each network maximises, on flat images v (B, H W): name -> (B,) in nats."""
    values = {}
    for n, (known, unknown) in splits.items():
        x, y = v[:, known], v[:, unknown]
        values[f"nn{n}"] = log_bernoulli(y, models[f"nn{n}"](x))
        values[f"cvae{n}"] = hybrid_objective(models[f"cvae{n}"], x, y, alpha)
    return values


@torch.no_grad()
def validate(models, splits, val: Tensor, alpha: float) -> dict[str, float]:
    """The mean objectives on val, with the same noise at every call and no dropout."""
    models.eval()
    torch.manual_seed(0)
    parts = [objectives(models, splits, v, alpha) for v in val.split(1000)]
    models.train()
    return {name: torch.cat([p[name] for p in parts]).mean().item() for name in parts[0]}


def train_models(models, optimizer, splits, images, val, args, state) -> bool:
    """Trains until args.steps, keeps state (step, history, best) up to date. True: interrupted."""
    from tqdm import tqdm

    stop, start, t0 = [], state["step"], time.time()
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after this step
    for step in tqdm(range(start + 1, args.steps + 1), disable=None):
        torch.manual_seed(args.seed * 10**10 + step)  # all that is random here follows from these
        index = torch.randint(len(images), (args.batch_size,)).to(images.device)
        v = torch.bernoulli(images[index].flatten(1) / 255)  # (B, H W), new pixels at every step
        values = objectives(models, splits, v, args.alpha)
        loss = -sum(value.mean() for value in values.values())  # no weight is shared: six in one
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.zero_grad(); loss.backward(); optimizer.step()  # fmt: skip
        state["step"] = step
        if step == 1 or step % args.log_every == 0 or step == args.steps:
            scores = validate(models, splits, val, args.alpha)
            state["history"].append((step, loss.item(), scores))
            for name, score in scores.items():  # early stopping: the best weights count
                if name not in state["best"] or score > state["best"][name][0]:
                    state["best"][name] = (score, step, copy.deepcopy(models[name].state_dict()))
            now = f"step {step:5d}/{args.steps} | loss {loss:.2f} | val "
            now += " ".join(f"{name} {-score:.2f}" for name, score in scores.items())
            tqdm.write(f"{now} | {(time.time() - t0) / (step - start) * 1e3:.1f} ms/step")
        if args.save and (stop or step % args.log_every == 0 or step == args.steps):
            save(args, models, optimizer, state)
        if stop:
            break
    return bool(stop)


def save(args, models, optimizer, state):
    """Writes the checkpoint beside its place, then moves it there: a crash leaves the old one."""
    parts = {"models": models.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"script": "cvae", "args": vars(args), **parts, **state}, args.save + ".tmp")
    os.replace(args.save + ".tmp", args.save)


# ---- 6. Evaluation and picture ----


@torch.no_grad()
def evaluate(models, splits, p_mean: Tensor, test: Tensor, S: int) -> dict[str, list[float]]:
    """The table: name of the row -> negative log p(y|x) per image for 1, 2 and 3 quadrants."""
    rows = {"pixel means": [], "NN (baseline)": [], "CVAE bound": []}
    rows |= {"CVAE Monte Carlo": [], "CVAE importance": []}
    for n, (known, unknown) in splits.items():
        baseline, cvae, parts = models[f"nn{n}"], models[f"cvae{n}"], []
        for v in test.split(max(1, 20_000 // S)):
            x, y = v[:, known], v[:, unknown]
            some = [log_bernoulli(y, p_mean[unknown].logit()), log_bernoulli(y, baseline(x))]
            some += [f(cvae, x, y, S) for f in (cvae_bound, monte_carlo, importance_sampling)]
            parts.append(torch.stack(some))
        for row, value in zip(rows.values(), torch.cat(parts, 1).mean(1).tolist()):
            row.append(-value)
    return rows


@torch.no_grad()
def draw_picture(path, models, splits, test: Tensor, shape, samples: int = 6, digits: int = 8):
    """One panel per number of quadrants; a row: input, baseline, completions, truth."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(15, 5.5))
    for ax, (n, (known, unknown)) in zip(fig.subplots(1, 3), splits.items()):
        v, columns = test[:digits], []
        x = v[:, known]
        guesses = [models[f"nn{n}"](x).sigmoid(), *models[f"cvae{n}"].sample(x, samples, False)]
        for y in [torch.full_like(v[:, unknown], 0.3), *guesses, v[:, unknown]]:
            image = 1 - torch.stack([v] * 3, -1)  # (digits, H W, 3), black on white
            image[:, unknown] = 1 - y[..., None].expand(-1, -1, 3)
            image[:, known] *= image.new_tensor([0.75, 0.87, 1.0])  # what is given: on blue
            columns.append(F.pad(image.view(-1, *shape, 3), (0, 0, 1, 1, 1, 1), value=0.6))
        ax.imshow(torch.cat([torch.cat(list(c), 0) for c in columns], 1).cpu().numpy())
        names = ["input", "NN", *["CVAE"] * samples, "truth"]
        ax.set_xticks([(shape[1] + 2) * (i + 0.5) - 0.5 for i in range(len(names))], names)
        ax.xaxis.tick_top(), ax.set_yticks([])
        ax.set_title(f"{n} quadrant{'s' * (n > 1)} observed (blue)")
    title = "The baseline has one answer p(y|x), the CVAE one p(y|x,z) for every z ~ p(z|x)"
    fig.suptitle(title, y=0.97)
    fig.tight_layout(rect=(0, 0, 1, 0.98))
    fig.savefig(path, dpi=100)


# ---- 7. Command line ----


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default), or a .npz with uint8 x_train and x_test (paper: MNIST)")
    flag("--steps", type=int, help="default 10,000 for digits, 12,000 for a file")
    flag("--batch-size", type=int, help="default 128")
    flag("--lr", type=float, help="Adam's rate, falls to 0 as a cosine, default 1e-3")
    flag("--alpha", type=float, help="of Eq. 8, default 1: CVAE; 0: GSNN, leaves q untrained")
    flag("--hidden", type=int, help="units per hidden layer, default 128 for digits, else 500")
    flag("--z-dim", type=int, help="size of z, default 20 for digits, else 50")
    flag("--dropout", type=float, help="of all networks, default 0")
    flag("--samples", type=int, help="S of Eq. 5-6 at the end, default 1000 for digits, else 100")
    flag("--seed", type=int, help="default 0")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--log-every", type=int, default=500, help="steps between log lines and validations (500)")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the mean importance-sampling NLL is above this")
    args, loaded = parser.parse_args(argv), None
    try:
        saved, names = {}, ("steps", "batch_size", "lr", "alpha", "hidden", "z_dim", "dropout")
        if args.load:
            loaded = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict) or loaded.get("script") != "cvae":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
            saved = {**loaded["args"], "steps": loaded["step"]}
        args.data = args.data or saved.get("data", "digits")
        args.seed = saved.get("seed", 0) if args.seed is None else args.seed
        sizes = (10_000, 128, 1e-3, 1.0, 128, 20, 0.0)
        sizes = sizes if args.data == "digits" else (12_000, 128, 1e-3, 1.0, 500, 50, 0.0)
        for name, value in zip(names, (10, 32, 1e-3, 1.0, 32, 4, 0.0) if args.quick else sizes):
            if getattr(args, name) is None:
                setattr(args, name, saved.get(name, value))
        if args.samples is None:
            args.samples = 5 if args.quick else 1000 if args.data == "digits" else 100
        counts = args.steps, args.batch_size, args.hidden, args.z_dim, args.samples, args.log_every
        fit = 0 < args.lr < math.inf and 0 <= args.alpha <= 1 and 0 <= args.dropout < 1
        if min(counts) < 1 or not fit or abs(args.seed) > 10**8:
            raise ValueError("counts, --lr > 0; --alpha in 0..1, --dropout below 1; --seed < 10^8")
        data = load_images(args.data)
        if args.batch_size > len(data[0]) or not len(data[1]):
            raise ValueError(f"{args.data}: only {len(data[0])} images to train on")
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        torch.zeros(1, device=args.device)
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "cvae.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, loaded, data


def main(argv=None) -> int:
    args, loaded, (images, val, test) = parse(argv)
    t0, shape = time.time(), tuple(images.shape[1:])
    torch.manual_seed(args.seed)
    splits = {n: [i.to(args.device) for i in quadrants(*shape, n)] for n in (1, 2, 3)}
    models = nn.ModuleDict()
    for n, (known, unknown) in splits.items():
        sizes = len(known), len(unknown)
        models[f"nn{n}"] = BaselineNN(*sizes, args.hidden, args.dropout)
        models[f"cvae{n}"] = CVAE(*sizes, args.z_dim, args.hidden, args.dropout)
    models.to(args.device)
    optimizer = torch.optim.Adam(models.parameters(), args.lr, fused=True)
    state = {"step": 0, "history": [], "best": {}}
    try:
        if loaded:
            models.load_state_dict(loaded["models"])
            optimizer.load_state_dict(loaded["optimizer"])
            state = {key: loaded[key] for key in state}
    except Exception:
        print(f"cvae.py: error: {args.load} does not fit {args.data}", file=sys.stderr)
        return 2
    test = binarize(test[: 50 if args.quick else None], 2).to(args.device)  # same for every --seed
    count = sum(p.numel() for p in models["cvae1"].parameters()) / 1e6
    kind = f"{os.path.basename(args.data)} {len(images)}/{len(val)}/{len(test)}"
    print(f"cvae | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}", flush=True)
    p_mean = ((images.flatten(1) / 255.0).sum(0) + 1).div(len(images) + 2).to(args.device)
    val = binarize(val, 1, 1 + 1000 // len(val)).to(args.device)  # few images: drawn repeatedly
    images, stopped, handler = images.to(args.device), False, signal.getsignal(signal.SIGINT)
    try:
        if state["step"] < args.steps:
            stopped = train_models(models, optimizer, splits, images, val, args, state)
    except FloatingPointError as error:
        print(f"cvae.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, handler)
    for name, (_, _, weights) in state["best"].items():
        models[name].load_state_dict(weights)
    models.eval()
    torch.manual_seed(args.seed)
    rows = evaluate(models, splits, p_mean, test, args.samples)
    if shape == (28, 28):
        rows["paper, MNIST: NN"] = (99.75, 62.18, 25.99)
        rows["paper, Monte Carlo"] = (68.39, 45.34, 20.96)
        rows["paper, importance"] = (63.91, 44.73, 20.95)
    print(f"test -log p(y|x), nats per image, S = {args.samples} | 1, 2, 3 quadrants observed")
    for name, row in rows.items():
        print(f"{name:18s} |" + "".join(f"{value:8.2f}" for value in row))
    draw_picture(os.path.join(args.out, "cvae.png"), models, splits, test, shape)
    base, nn_, *_, best = ("/".join(f"{x:.2f}" for x in row) for row in list(rows.values())[:5])
    print(f"test NLL {best} | NN {nn_} | pixel means {base} | {time.time() - t0:.0f} s")
    missed = args.target is not None and sum(rows["CVAE importance"]) / 3 > args.target
    return 130 if stopped else int(missed)


if __name__ == "__main__":
    sys.exit(main())
