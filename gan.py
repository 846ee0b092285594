"""GAN: a generator learns to draw data by fooling a discriminator that learns to tell them apart.

Paper    Generative Adversarial Networks -- Goodfellow, Pouget-Abadie, Mirza, Xu, Warde-Farley,
         Ozair, Courville, Bengio, June 2014, arXiv:1406.2661v1
Idea     The likelihood of a network that turns noise z into an image is out of reach. So let a
         second network D judge: D learns to tell data from G(z), and G follows D's gradient. With D
         at its best, G descends the Jensen-Shannon divergence; once it is 0, D can only say 1/2.
Figure   noise z (B, z_dim) ~ N(0, 1)
              |  G: perceptron or DCGAN
         G(z) (B, C, H, W) in (-1, 1)          data x (B, C, H, W) in [-1, 1]
              +---------------+----------------------+
                              |  D: perceptron or DCGAN
                   logits a (B,),  D = sigmoid(a) = P(it is data)
                              |
         D climbs     V = E log D(x) + E log(1 - D(G(z)))     k steps, G held
         G descends   -log D(G(z)), or saturating log(1 - D(G(z)))     one step, D held
Symbols  G, D | G(z; theta_g), D(x; theta_d) | the players    a | - | D's logit (B,)
         x, z | x, z | data, noise                            y | c | labels (B,), if conditional
         value | V(D, G) | Eq. 1                              k, batch_size | k, m | Algorithm 1
         p_data, p_g | p_data, p_g | densities of x and of G(z)
Differs  Leaky ReLU for maxout in D, no dropout; tanh and data in [-1, 1]; Adam for momentum.
         G's default loss is Section 3's -log D and not Algorithm 1's; the pair named "GAN" adds two
         later finds, R1 and an average of G. "Algorithm 1" has neither and saturates. DCGAN's pair
         keeps torch's initialisation (its paper: std .02) and, for R1, no batch norm in D.
         8x8 digits. Parzen: 1,000 samples; sigma is chosen on the last sixth of the training images
         (1,000 at most), which G has seen, too.
Run      python gan.py                     # both pairs on 8x8 digits, about 2 minutes, one core
         python gan.py --data mnist.npz    # DCGAN pair, 28x28, about 13 minutes, one core
         python gan.py --load gan.pt --samples 64   # out/gan_samples.npz, without data or training
Expect   Test FD (0 is perfect), seeds 0-2: GAN 0.24 +- 0.04 | Algorithm 1 0.94 +- 0.28 | a Gaussian
         per class 0.43 | one Gaussian 1.46 | training images, the floor, 0.17. Parzen (8x8, not
         comparable with 225 +- 2 in Table 1) 21.4 | 19.9 | training images 28.1
         MNIST, seed 0: FD 0.85 | a Gaussian per class 1.59 | one 5.74 | floor 0.39; precision .82,
         recall .92; every class in 6 to 13 % of 1,000 samples; Parzen 31.1 | training images 114.5
"""

import argparse
import copy
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. The players (Section 3; the paper leaves their sizes open) ----


def append_label(x: Tensor, y: Tensor | None, num_classes: int) -> Tensor:
    """x (B, C, ...), y (B,) -> (B, C + num_classes, ...): all that a conditional GAN changes
    (Section 7; Mirza & Osindero 2014). One-hot, in images as constant maps. A label that is missing
    or not expected raises ValueError."""
    if (y is None) != (num_classes == 0):
        raise ValueError(f"num_classes={num_classes} {'needs' if y is None else 'takes no'} labels")
    if y is None:
        return x
    maps = F.one_hot(y, num_classes).to(x.dtype).view(len(y), -1, *[1] * (x.ndim - 2))
    return torch.cat([x, maps.expand(-1, -1, *x.shape[2:])], 1)


class Generator(nn.Module):
    """G: z (B, z_dim), labels y (B,) if num_classes -> x (B, C, H, W) in (-1, 1).

    conv=True: that of DCGAN (Radford et al. 2015), for sides that divide by 4; dim is then the
    number of channels at half the resolution and not the perceptron's width.
    """

    def __init__(self, image_shape=(1, 28, 28), z_dim=100, dim=256, num_classes=0, conv=False):
        super().__init__()
        (C, H, W), n_in, self.num_classes = image_shape, z_dim + num_classes, num_classes
        if conv and (H % 4 or W % 4):
            raise ValueError(f"the convolutional G needs sides that divide by 4, not {H}x{W}")
        if conv:
            h, w = H // 4, W // 4
            layers = [nn.Linear(n_in, 2 * dim * h * w), nn.Unflatten(1, (2 * dim, h, w))]
            layers += [nn.BatchNorm2d(2 * dim), nn.ReLU()]
            # kernel 4 = 2 strides: each pixel is written by equally many inputs, no checkerboard
            layers += [nn.ConvTranspose2d(2 * dim, dim, 4, 2, 1), nn.BatchNorm2d(dim), nn.ReLU()]
            layers += [nn.ConvTranspose2d(dim, C, 4, 2, 1)]
        else:
            layers = [nn.Linear(n_in, dim), nn.LeakyReLU(0.2), nn.Linear(dim, dim)]
            layers += [nn.LeakyReLU(0.2), nn.Linear(dim, C * H * W), nn.Unflatten(1, (C, H, W))]
        self.net = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.net(append_label(z, y, self.num_classes))


class Discriminator(nn.Module):
    """x (B, C, H, W), labels y (B,) if num_classes -> logits a (B,); D(x) = sigmoid(a).

    norm=True adds DCGAN's batch norm to the convolutions. Not with R1, which differentiates D at
    one image: batch norm makes D's answer depend on the others in the batch.
    """

    def __init__(self, image_shape=(1, 28, 28), dim=256, num_classes=0, conv=False, norm=False):
        super().__init__()
        (C, H, W), act = image_shape, nn.LeakyReLU(0.2)  # no dead units: they would teach G nothing
        self.conv, self.num_classes = conv, num_classes
        if conv:
            layers = [nn.Conv2d(C + num_classes, dim, 4, 2, 1), act]
            layers += [nn.Conv2d(dim, 2 * dim, 4, 2, 1)] + [nn.BatchNorm2d(2 * dim)] * norm
            layers += [act, nn.Flatten(), nn.Linear(2 * dim * (H // 4) * (W // 4), 1)]
        else:
            layers = [nn.Linear(C * H * W + num_classes, dim), act, nn.Linear(dim, dim), act]
            layers += [nn.Linear(dim, 1)]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = append_label(x if self.conv else x.flatten(1), y, self.num_classes)
        return self.net(x).squeeze(1)


# ---- 2. The game (Eq. 1) and its theory (Section 4.1) ----
#
# Players pass logits: with D = sigmoid(a), log D = -softplus(-a) and log(1 - D) = -softplus(a) are
# finite for every a, while sigmoid rounds to 0 or 1 and its log to -inf where D is sure.


def value(a_real: Tensor, a_fake: Tensor) -> Tensor:
    """V(D, G), Eq. 1, on D's logits (B,) for data and for samples, in nats: D climbs it, from
    -log 4 = -1.386 if it always says 1/2, towards 0 if it is always right."""
    return -F.softplus(-a_real).mean() - F.softplus(a_fake).mean()


def generator_loss(a_fake: Tensor, saturating: bool = False) -> Tensor:
    """What G descends: -log D(G(z)) (Section 3), or log(1 - D(G(z))) as Algorithm 1 has it. Where D
    is sure of a fake (a << 0) the slope in a of the second is -D = 0, that of the first -(1 - D) =
    -1: early on, only the first still tells G where to go."""
    return -F.softplus(a_fake).mean() if saturating else F.softplus(-a_fake).mean()


def optimal_discriminator(p_data: Tensor, p_g: Tensor) -> Tensor:
    """D*_G = p_data / (p_data + p_g), Eq. 2 (Proposition 1)."""
    return p_data / (p_data + p_g)


def virtual_criterion(p_data: Tensor, p_g: Tensor) -> Tensor:
    """C(G) = max_D V(D, G), Eq. 4, for distributions (n,); = -log 4 + 2 JSD (Theorem 1, Eq. 6)."""
    D = optimal_discriminator(p_data, p_g).nan_to_num(0.5)  # 0 / 0 where neither ever is
    return torch.xlogy(p_data, D).sum() + torch.xlogy(p_g, 1 - D).sum()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """JSD(p || q) in nats, from 0 to log 2: the mean of both KL to the mixture (Eq. 5)."""
    m = (p + q) / 2
    return sum((torch.xlogy(r, r) - torch.xlogy(r, m)).sum() for r in (p, q)) / 2


# ---- 3. Algorithm 1: its two halves, and two options that the field added ----


def discriminator_step(G, D, opt, x, z, y=None, r1: float = 0.0) -> tuple[float, float, float]:
    """D climbs V on data x, noise z, labels y (Algorithm 1, inner loop; k times per step of G).
    Returns V and the means of D(x) and D(G(z)), as they were before the step."""
    with torch.no_grad():  # G is held: else its gradient would pile up here, and cost as much again
        fake = G(z, y)
    x = x.detach().requires_grad_(r1 > 0)
    a_real, a_fake = D(x, y), D(fake, y)
    v = value(a_real, a_fake)
    loss = r1 / 2 * r1_penalty(a_real, x) - v if r1 else -v
    opt.zero_grad(); loss.backward(); opt.step()  # fmt: skip
    return v.item(), a_real.sigmoid().mean().item(), a_fake.sigmoid().mean().item()


def generator_step(G, D, opt, z, y=None, saturating: bool = False) -> float:
    """G descends its loss (Algorithm 1, last line); returns the loss as it was before the step."""
    D.requires_grad_(False)  # D is held; the gradient still passes through it on its way to G
    loss = generator_loss(D(G(z, y), y), saturating)
    opt.zero_grad(); loss.backward(); opt.step()  # fmt: skip
    D.requires_grad_(True)
    return loss.item()


def r1_penalty(a_real: Tensor, x: Tensor) -> Tensor:
    """E |grad_x a(x)|^2 on data, times r1 / 2 in D's loss (Mescheder et al. 2018). At the solution
    D is flat; nothing in V says so, and without it the players circle around it."""
    (grad,) = torch.autograd.grad(a_real.sum(), x, create_graph=True)
    return grad.square().flatten(1).sum(1).mean()


@torch.no_grad()
def update_average(average: nn.Module, G: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) G: the centre of the circles that G runs in (EMA)."""
    for p, q in zip(average.parameters(), G.parameters()):
        p.lerp_(q, 1 - decay)
    for p, q in zip(average.buffers(), G.buffers()):  # batch norm's statistics are averages already
        p.copy_(q)


@torch.no_grad()
def sample(G: nn.Module, z: Tensor, y: Tensor | None = None) -> Tensor:
    """z (n, z_dim), labels y (n,) if conditional -> images (n, C, H, W) in [0, 1]."""
    was, _ = G.training, G.eval()  # batch norm's running statistics: no image depends on the others
    x = G(z, y)
    G.train(was)
    return x / 2 + 0.5


# ---- 4. Data and training ----


def load_data(path: str):
    """-> x_train, y_train, x_test, y_test: uint8 (N, C, H, W), int64 (N,). path: a Keras-style npz,
    or "digits", scikit-learn's: 8x8, 1,200 for training and 597 for testing."""
    if path == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(y))
        x, y = (x * 255 / 16).round().astype(np.uint8).reshape(-1, 8, 8)[order], y[order]
        arrays = x[:1200], y[:1200], x[1200:], y[1200:]
    else:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[f"{a}_{b}"] for b in ("train", "test") for a in "xy"]
    for x, y in (arrays[:2], arrays[2:]):
        fits = x.dtype == np.uint8 and x.ndim > 2 and x.shape[3:] in ((), (3,)) and x.size
        if not fits or x.shape[1:] != arrays[0].shape[1:] or len(x) < 50:
            raise ValueError(f"{path}: images must be uint8, N > 49 of (H, W) or (H, W, 3), alike")
        if y.dtype.kind not in "iu" or y.size != len(x) or y.min() < 0 or y.max() > 999:
            raise ValueError(f"{path}: labels must be whole numbers 0..999, one per image")
    x, y, x_test, y_test = (torch.tensor(a) for a in arrays)
    x, x_test = (t[:, None] if t.ndim == 3 else t.permute(0, 3, 1, 2) for t in (x, x_test))
    return x.contiguous(), y.flatten().long(), x_test.contiguous(), y_test.flatten().long()


def train(pairs, data, args, state) -> bool:
    """All pairs on the same batches, functions of (seed, step). Returns whether Ctrl-C ended it."""
    from tqdm import tqdm

    how = {"GAN": (args.r1, args.saturating, args.ema), "Algorithm 1": (0.0, True, 0.0)}
    x, y, stop, t0, first = *(t.to(args.device) for t in data[:2]), [], time.time(), state["step"]
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    for step in tqdm(range(first + 1, args.steps + 1), disable=None):
        g, batches = torch.Generator().manual_seed(args.seed * 10**10 + step), []
        for _ in range(args.k + 1):  # k for D, the last for G
            i = torch.randint(len(x), (args.batch_size,), generator=g).to(x.device)
            z = torch.randn(args.batch_size, args.z_dim, generator=g).to(x.device)
            batches.append((x[i] / 127.5 - 1, z, y[i] if args.conditional else None))
        for name, (G, D, average, opt_G, opt_D) in pairs.items():
            r1, saturating, decay = how[name]
            for opt in (opt_G, opt_D):
                opt.param_groups[0]["lr"] = args.lr * (1 - 0.9 * step / args.steps)
            for batch in batches[:-1]:
                game = discriminator_step(G, D, opt_D, *batch, r1)
            loss = generator_step(G, D, opt_G, *batches[-1][1:], saturating)
            update_average(average, G, decay)
            if not math.isfinite(game[0] + loss):
                raise FloatingPointError(f"{name}: V {game[0]}, loss of G {loss} at step {step}")
            state["history"].append((step, name, *game))
        state["step"] = step
        if stop or step % args.log_every == 0 or step == args.steps:
            line, ms = f"step {step:5d}/{args.steps} | ", (time.time() - t0) / (step - first) * 1e3
            for _, name, v, real, fake in state["history"][-len(pairs) :]:
                line += f"{name} V {v:.2f} D(x) {real:.2f} D(G(z)) {fake:.2f} | "
            tqdm.write(f"{line}{ms:.1f} ms/step")
            if args.save:  # beside its place, then moved there: a crash leaves the old one
                file = {name: [p.state_dict() for p in parts] for name, parts in pairs.items()}
                file |= {"script": "gan", "args": vars(args), **state}
                torch.save(file, args.save + ".tmp")
                os.replace(args.save + ".tmp", args.save)
        if stop:
            break
    return bool(stop)


# ---- 5. Judge (the same in every generator here; it sees labels, the model does not) ----


def make_judge(train: Tensor, labels: Tensor, test: Tensor):
    """Images in [0, 1], train (N, ...) with labels (N,), test (M, ...) -> (score, classify).

    score(images) is a dict, on 32 features of a small classifier, standardised by the train split:
    FD: Frechet distance |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^1/2) to the test split.
    precision: share of images within the 5th-neighbour radius of a test image; recall: of test
    images within that of an image. novelty: median pixel distance to the nearest train image over
    the test split's own: 0 is memorised, about 1 is like new data. classify(images) -> labels (n,).
    """
    test = test[:: -(-len(test) // 2000)]  # at most 2,000, spread over the split
    train, test, labels = *(x.flatten(1).float().cpu() for x in (train, test)), labels.cpu().long()
    with torch.random.fork_rng(devices=[]):  # the same judge for every --seed
        torch.default_generator.manual_seed(0)
        net = [nn.Linear(train.shape[1], 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU()]
        net = nn.Sequential(*net, nn.Linear(32, int(labels.max()) + 1))
        opt = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(max(500, 3 * len(train) // 128)):
            i = torch.randint(len(train), (128,))
            loss = F.cross_entropy(net(train[i]), labels[i])
            opt.zero_grad(); loss.backward(); opt.step()  # fmt: skip
    body = net.requires_grad_(False)[:3].double()  # to before the second ReLU
    std, mean = torch.std_mean(body(train.double()), 0)
    r = (body(test.double()) - mean) / std.clamp(min=1e-6)

    def to_train(x):
        return torch.cat([torch.cdist(p, train).amin(1) for p in x.split(200)]).median()

    def score(images: Tensor) -> dict[str, float]:
        x = images.flatten(1).float().cpu()
        g = (body(x.double()) - mean) / std.clamp(min=1e-6)
        S_r, S_g = torch.cov(r.T), torch.cov(g.T)  # S_r S_g has real eigenvalues >= 0
        root = torch.linalg.eigvals(S_r @ S_g).real.clamp(min=0).sqrt().sum()
        near = torch.cdist(r, g)  # radii: the 6th nearest, as the first is the point itself
        radius_r, radius_g = (torch.cdist(a, a).kthvalue(6).values for a in (r, g))
        out = {"FD": (r.mean(0) - g.mean(0)).square().sum() + (S_r + S_g).trace() - 2 * root}
        out["precision"] = (near < radius_r[:, None]).any(0).double().mean()
        out["recall"] = (near < radius_g).any(1).double().mean()
        out["novelty"] = to_train(x) / to_train(test)
        return {name: float(value) for name, value in out.items()}

    return score, lambda images: net.double()(images.flatten(1).cpu().double()).argmax(1)


def gaussian_images(train: Tensor, labels: Tensor, n: int) -> Tensor:
    """n draws (n, D) in [0, 1] from a full Gaussian per class; labels all 0: from one for all."""
    g, out = torch.Generator().manual_seed(0), []
    chosen = labels[torch.randint(len(labels), (n,), generator=g)]
    for c in labels.unique():
        a = train[labels == c].flatten(1).float()
        noise = torch.randn(int((chosen == c).sum()), len(a), generator=g) / len(a) ** 0.5
        out.append(a.mean(0) + noise @ (a - a.mean(0)))  # covariance of a, without forming it
    return torch.cat(out).clamp(0, 1)


def parzen(samples: Tensor, valid: Tensor, test: Tensor) -> str:
    """Table 1's score: log p of `test` under Gaussians around samples (n, ...) in [0, 1]; nats per
    image, mean +- standard error. sigma is the one that suits `valid` best. The authors call it
    high in variance and poor in many dimensions; it can rank samples above real images."""
    samples, valid, test = (x.flatten(1).float().cpu() for x in (samples, valid, test))

    def log_p(x, sigma):
        e, (n, D) = torch.cdist(x, samples).square() / (2 * sigma**2), samples.shape
        return (-e).logsumexp(1) - D * math.log(sigma * math.sqrt(2 * math.pi)) - math.log(n)

    p = log_p(test, max((s / 50 for s in range(2, 26)), key=lambda s: log_p(valid, s).mean()))
    return f"{p.mean():.1f} +- {p.std() / math.sqrt(len(p)):.1f}"


# ---- 6. Evaluation and picture ----


def noise(args, n: int, seed: int):
    """z (n, z_dim), and the labels 0, 1, ... in turn where the pair is conditional (else None)."""
    z = torch.randn(n, args.z_dim, generator=torch.Generator().manual_seed(seed)).to(args.device)
    return z, torch.arange(n, device=args.device) % args.classes if args.conditional else None


def evaluate(pairs, data, args):
    """Prints every score -> {name: FD}, the samples of the pair "GAN"."""
    real, labels, test = data[0] / 255, data[1], data[2] / 255
    score, classify = make_judge(real, labels, test)
    z, y = noise(args, 200 if args.quick else 1000, args.seed)
    samples = {name: sample(average, z, y).cpu() for name, (_, _, average, *_) in pairs.items()}
    rows = samples | {"Gaussian per class": gaussian_images(real, labels, 1000)}
    rows |= {"one Gaussian": gaussian_images(real, 0 * labels, 1000), "floor (train)": real[:1000]}
    for name, x in rows.items():
        rows[name] = score(x)
        print(f"{name:20s} | " + " | ".join(f"{k} {v:.2f}" for k, v in rows[name].items()))
    for name, x in samples.items():
        share = classify(x).bincount(minlength=args.classes) / len(x)
        print(f"{name}: share of each class " + " ".join(f"{s:.3f}" for s in share))
        if y is not None:
            print(f"{name}: label accuracy {(classify(x) == y.cpu()).float().mean():.3f}")
    held = min(1000, len(real) // 6)  # of the training images: they choose sigma, not p
    balls = samples | {"train images": real[:-held][: len(z)]}
    text = " | ".join(f"{name} {parzen(x, real[-held:], test)}" for name, x in balls.items())
    print(f"Parzen log-likelihood (Table 1; trust the FD instead) {text}")
    return {name: row["FD"] for name, row in rows.items()}, samples["GAN"]


def draw_picture(args, pairs, history, x, real):
    """Samples x over their nearest training images; paths through z; D over time."""
    from matplotlib.figure import Figure  # without pyplot: needs no display

    fig, x = Figure(figsize=(15, 5), layout="tight"), x[:40]
    a, b, c = fig.subplots(1, 3, width_ratios=[1, 1, 1.2])
    near = real[torch.cdist(x.flatten(1), real.flatten(1)).argmin(1)]
    nearest = torch.stack([x, near]).unflatten(1, (-1, 10)).transpose(0, 1).flatten(0, 2)
    start, end = noise(args, 16, args.seed + 1)[0].view(2, 8, 1, -1)
    t = torch.linspace(0, math.pi / 2, 10, device=args.device)[:, None]
    # along an arc: the middle of a straight line is shorter than any z that G was trained on
    z = (start * t.cos() + end * t.sin()).flatten(0, 1)
    y = torch.arange(80).to(z.device) // 10 % args.classes if args.conditional else None
    a.set_title("odd rows: samples; even rows: the\nnearest training images to those above")
    b.set_title("from one z (left) to another (right)")
    for axis, images in (a, nearest), (b, sample(pairs["GAN"][2], z, y).cpu()):
        tiles = F.pad(images, (1, 0, 1, 0), value=1.0).unflatten(0, (-1, 10))  # (8, 10, C, H, W)
        tiles = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (8 H, 10 W, C)
        axis.imshow(tiles.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.axis("off")
    for name, style in zip(pairs, ("-", ":")):
        curve = torch.tensor([row[3:] for row in history if row[1] == name])  # (steps, 2)
        width = -(-len(curve) // 100)  # means over 1/100 of the run: one batch says little
        curve = torch.stack([part.mean(0) for part in curve.split(width)])
        steps = [width * (i + 1) for i in range(len(curve))]
        for i, what, color in ((0, "D(x)", "C0"), (1, "D(G(z))", "C3")):
            c.plot(steps, curve[:, i], style, color=color, label=f"{name}: {what}")
    c.axhline(0.5, color="gray", lw=0.8)
    c.set(title="D over time: 1/2 on both once p_g is the data", xlabel="step", ylim=(0, 1))
    c.legend(ncol=2, fontsize=8)
    fig.savefig(os.path.join(args.out, "gan.png"), dpi=100)


# ---- 7. Command line ----

DEFAULTS = {  # for digits, for a file, least, most, meaning
    "steps": (15_000, 8_000, 1, math.inf, "of G (paper: not stated)"),
    "batch_size": (64, 64, 1, 10**6, "m (paper: not stated)"),
    "lr": (1e-3, 5e-4, 1e-12, 10, "Adam's, falls to a tenth; mlp the first, dcgan the second"),
    "k": (1, 1, 1, 10**4, "steps of D per step of G (paper: 1)"),
    "r1": (1.0, 1.0, 0, 10**9, "weight of the R1 penalty (paper: 0)"),
    "ema": (0.999, 0.999, 0, 1 - 1e-9, "decay of the average of G (paper: 0, none)"),
    "saturating": (False, False, 0, 1, "G descends log(1 - D) (Algorithm 1: yes)"),
    "conditional": (False, False, 0, 1, "both players see the labels"),
    "seed": (0, 0, 0, 10**8, "of weights, batches and samples"),
    "log_every": (1000, 1000, 1, math.inf, "steps between log lines"),
}


def parse(argv):
    """-> args, data (None with --samples), pairs, state. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag, onoff = parser.add_argument, {"action": argparse.BooleanOptionalAction}
    for name, (value, npz, *_, text) in DEFAULTS.items():
        also = f", npz {npz}" * (npz != value)
        kind = onoff if value is False else {"type": type(value)}
        flag(f"--{name.replace('_', '-')}", **kind, help=f"default {value}{also}: {text}")
    flag("--data", help="digits (default: scikit-learn's, 8x8) or a Keras-style npz file")
    flag("--net", choices=["mlp", "dcgan"], help="default mlp, as in the paper; dcgan for files")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--samples", type=int, help="with --load: only write this many samples; needs no data")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the FD is larger")
    args, loaded, own, data, pairs = parser.parse_args(argv), {}, {}, None, {}
    state = {"step": 0, "history": []}
    try:
        if args.load:
            loaded = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict) or loaded.get("script") != "gan":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
            own, state = loaded["args"] | {"steps": loaded["step"]}, {k: loaded[k] for k in state}
        args.data = args.data or own.get("data", "digits")
        npz = args.data != "digits"
        args.net = args.net or own.get("net", "dcgan" if npz else "mlp")
        conv, quick = args.net == "dcgan", {"steps": 8, "batch_size": 32} if args.quick else {}
        for name, (*values, low, high, _) in DEFAULTS.items():
            value = quick.get(name, values[conv if name == "lr" else npz])
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, value))
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        args.image_shape, args.classes = own.get("image_shape"), own.get("classes")
        if args.samples is None:
            data = load_data(args.data)
            args.image_shape = tuple(data[0].shape[1:])
            args.classes = int(max(data[1].max(), data[3].max())) + 1
            if args.batch_size > len(data[0]):
                raise ValueError(f"--batch-size is more than the {len(data[0])} training images")
        elif not loaded or args.samples < 1:
            raise ValueError("--samples must be > 0 and needs --load FILE")
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        torch.manual_seed(args.seed)
        names = loaded or (["GAN"] if npz else ["GAN", "Algorithm 1"])
        (args.z_dim, dim), labels = ((64, 32), (16, 128))[not conv], args.classes * args.conditional
        for name in (n for n in names if n in ("GAN", "Algorithm 1")):
            G = Generator(args.image_shape, args.z_dim, dim, labels, conv).to(args.device)
            D = Discriminator(args.image_shape, dim, labels, conv).to(args.device)
            # beta1 .5 and not .9: momentum carries a player on to where its rival was, in circles
            adam = {"lr": args.lr, "betas": (0.5, 0.999), "fused": True}
            adam = [torch.optim.Adam(m.parameters(), **adam) for m in (G, D)]
            pairs[name] = G, D, copy.deepcopy(G).requires_grad_(False), *adam
            for part, weights in zip(pairs[name], loaded.get(name, [])):
                part.load_state_dict(weights)
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "gan.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, data, pairs, state


def main(argv=None) -> int:
    args, data, pairs, state = parse(argv)
    t0, stopped, (G, D, average, *_) = time.time(), False, pairs["GAN"]
    count = sum(p.numel() for m in (G, D) for p in m.parameters()) / 1e6
    sizes = f"{len(data[0])}/{len(data[2])}" if data else f"step {state['step']}"
    kind = f"{os.path.basename(args.data if data else args.load)} {sizes}"
    print(f"gan | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}", flush=True)
    if not data:
        z, y = noise(args, args.samples, args.seed)
        parts = zip(z.split(500), [None] * len(z) if y is None else y.split(500))
        x = torch.cat([sample(average, *part) for part in parts])
        x = (x * 255).round().byte().permute(0, 2, 3, 1).squeeze(-1)
        labels = {} if y is None else {"y": y.cpu()}
        np.savez(os.path.join(args.out, "gan_samples.npz"), x=x.cpu(), **labels)
        print(f"{args.samples} samples in {args.out}/gan_samples.npz")
        return 0
    before = signal.getsignal(signal.SIGINT)
    try:
        if state["step"] < args.steps:
            stopped = train(pairs, data, args, state)
    except FloatingPointError as error:
        print(f"gan.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
    fd, x = evaluate(pairs, data, args)
    draw_picture(args, pairs, state["history"], x, data[0] / 255)
    line = " | ".join(f"{name} {v:.2f}" for name, v in fd.items())
    print(f"test FD {line} | {time.time() - t0:.0f} s")
    return 130 if stopped else int(args.target is not None and fd["GAN"] > args.target)


if __name__ == "__main__":
    sys.exit(main())
