"""SimCLR: two random views of an image are to agree, against all other images of the batch.

Paper    A Simple Framework for Contrastive Learning of Visual Representations -- Ting Chen, Simon
         Kornblith, Mohammad Norouzi, Geoffrey Hinton, February 2020, arXiv:2002.05709v3
Idea     Whatever two crops in two colourings share is what the image shows. So a network that finds
         a view's partner among 2 N - 1 others has to name the content, without a single label. The
         batch supplies the negatives; the augmentation decides what counts as content.
Figure   (Figure 2, Algorithm 1)

         x (N, 3, H, W)
           |-- view t  --> (N, 3, H, W) -- f --> h (N, D) -- g --> z (N, d) --+
           |                               | same f and g |                   | cos / T
           +-- view t' --> (N, 3, H, W) -- f --> h (N, D) -- g --> z (N, d) --+--> (2 N, 2 N)
                                           |                                           |
                     kept: the features h -+     softmax over each row but its diagonal,
                     thrown away after training: g           the partner is the answer: NT-Xent
Symbols  encoder | f(.) | a ResNet, x -> h (B, D)      head | g(.) | MLP, h -> z (B, d)
         z1, z2 | z_2k-1, z_2k | views' outputs (N, d)  temperature | tau | > 0
         sim | sim(z_i, z_j) | cosines (2 N, 2 N)       u | t ~ T | random numbers of a view (B, 16)
Differs  Colour jitter is one 3 x 3 matrix per image, in a fixed order, hue as a turn in YIQ.
         g has a batch norm in its hidden layer, as the official code (the paper doesn't say). The
         demo: a ResNet of three blocks, 1,161 digits, AdamW, stronger hue, crops from half the area
         on (smaller ones lose the digit), rotation, no blur. `--data` takes the paper's CIFAR-10
         recipe (Appendix B.9), with LARS.
Run      python simclr.py                  # canvas digits, some 5 minutes on one core
         python simclr.py --data cifar10.npz --save cifar.pt          # ResNet-18, long; a GPU
         torchrun --nproc-per-node 8 simclr.py --data cifar10.npz     # negatives of all processes
Expect   Linear probe with 1,000 labels, test digits never seen, 3 seeds: .830 +- .004, with all
         labels .868 +- .008 (k-NN .705, .778). Raw pixels .143, grey centred .149, random network
         .206, the same network trained with the 1,000 labels .873 +- .015; k-NN with all labels:
         raw .591, grey .737. Figure 5, 250 steps each: both .514, colour only .402, crop only .197.
         Figure 8: with all labels h is ahead of z, .868 to .854 +- .012; with 1,000 they are equal
         (.830, .827) and in k-NN z leads: less than the paper's 10 %. ImageNet 69.3 %; not run.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections import namedtuple
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Views (Section 3, Appendix A): what differs between them, h learns to ignore ----


def augment(x: Tensor, u: Tensor, crop=0.08, rotate=0.0, flip=0.5, jitter=0.8, hue=0.2, grey=0.2,
            blur=0.5) -> Tensor:  # fmt: skip
    """Random views of images x (B, 3, H, W) in [0, 1], as u (B, 16), uniform in [0, 1), says.

    crop: least share of the area, resized back, aspect 3/4 to 4/3; rotate: degrees either way;
    flip, grey, blur: probabilities; jitter: brightness, contrast and saturation by factors of up to
    1 +- jitter, and hue by up to this share of the circle, in 4 of 5 views (the paper's s (.8, .8,
    .8, .2)). All geometry is one warp, all colour one 3 x 3 matrix per image.
    """
    (B, C, H, W), u = x.shape, u.to(x)
    s = 2 * u - 1  # uniform in [-1, 1)
    area = (crop + (1 - crop) * u[:, 0]).log()
    ratio = torch.clamp(s[:, 1] * math.log(4 / 3), area, -area)  # no side longer than the image's
    half = torch.stack([(area + ratio) / 2, (area - ratio) / 2], 1).exp()  # (B, 2), x and y
    place, angle = s[:, 2:4] * (1 - half), s[:, 4] * math.radians(rotate)
    mirror, sin, cos = 1 - 2.0 * (u[:, 5] < flip), angle.sin(), angle.cos()
    R = torch.stack([mirror * cos, -sin, mirror * sin, cos], 1).view(B, 2, 2)
    M = torch.cat([half[..., None] * R, place[..., None]], 2)  # place in the view -> in the image
    grid = F.affine_grid(M, [B, C, H, W], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    yiq = [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
    yiq, on = x.new_tensor(yiq), (u[:, 6] < 0.8).to(x)
    bright, contrast, vivid = (1 + jitter * s[:, 7:10] * on[:, None]).unbind(1)
    vivid, turn = vivid * (u[:, 11] >= grey), 2 * math.pi * hue * s[:, 10] * on
    a, b, zero = vivid * turn.cos(), vivid * turn.sin(), torch.zeros_like(on)
    T = torch.stack([zero + 1, zero, zero, zero, a, -b, zero, b, a], 1).view(B, 3, 3)  # on Y, I, Q
    A = torch.linalg.inv(yiq) @ T @ yiq * (bright * contrast).view(B, 1, 1)  # on R, G, B
    level = (x.mean((2, 3)) @ yiq[0]) * bright * (1 - contrast)  # contrast leaves the mean grey
    x = (A @ x.flatten(2) + level.view(B, 1, 1)).view(B, C, H, W).clamp(0, 1)
    if not blur:
        return x
    k = round(H / 20)  # the kernel is a tenth of the side
    ticks = torch.arange(-k, k + 1).to(x)
    w = (-(ticks**2) / (2 * (0.1 + 1.9 * u[:, 12:13]) ** 2)).exp()  # sigma from 0.1 to 2
    w = torch.where(u[:, 13:14] < blur, w / w.sum(1, keepdim=True), (ticks == 0).to(x))
    w = w.repeat_interleave(C, 0)[:, None]  # (B C, 1, 2 k + 1)
    x = F.pad(x, (k, k, k, k), mode="replicate").view(1, B * C, H + 2 * k, W + 2 * k)
    x = F.conv2d(F.conv2d(x, w[:, :, None], groups=B * C), w[..., None], groups=B * C)
    return x.view(B, C, H, W)


# ---- 2. One batch over many processes (Section 2.2, "Global BN"; torchrun) ----


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Gather(torch.autograd.Function):
    """x -> (world, *x.shape), the x of all processes, with gradients.

    dist.all_gather alone has none: each z would then only be pulled as a query, and not as a key.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(rank_and_world()[1])]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)  # what all processes' losses ask of my x
        return grad[rank_and_world()[0]]


def gather(x: Tensor) -> Tensor:
    return Gather.apply(x) if rank_and_world()[1] > 1 else x[None]


class BatchNorm(nn.BatchNorm2d):
    """Over (B, C) or (B, C, H, W) of all processes: local statistics would give partners away."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        world = rank_and_world()[1]
        if not self.training or world == 1:
            return super().forward(x)
        dims, shape = [0, *range(2, x.ndim)], (-1, *[1] * (x.ndim - 2))
        mean, var = gather(torch.stack([x.mean(dims), x.var(dims, correction=0)])).unbind(1)
        var = (var + (mean - mean.mean(0)) ** 2).mean(0)  # within and between the processes
        mean, n = mean.mean(0), world * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


def average(model: nn.Module, *values: float) -> list[float]:
    """Averages all gradients, and values beside them, over the processes -> values, |gradient|."""
    world, params = rank_and_world()[1], [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([params[0].new_tensor(values), *[p.grad.flatten() for p in params]])
    if world > 1:
        dist.all_reduce(flat)
        flat /= world
        parts = flat[len(values) :].split([p.numel() for p in params])
        for p, part in zip(params, parts):
            p.grad.copy_(part.view_as(p))
    return [*flat[: len(values)].tolist(), flat[len(values) :].norm().item()]


# ---- 3. Base encoder f: a ResNet (arXiv:1512.03385) ----


class Block(nn.Module):
    """Basic, two 3 x 3, or bottleneck, 1 x 1, 3 x 3, 1 x 1: (B, c_in, H, W) -> (B, c, H', W')."""

    def __init__(self, c_in: int, c: int, stride: int, bottleneck: bool):
        super().__init__()
        a, out = (c_in, c), c * (4 if bottleneck else 1)
        self.conv1 = nn.Conv2d(*a, 1 if bottleneck else 3, 1 if bottleneck else stride,
                               0 if bottleneck else 1, bias=False)  # fmt: skip
        self.bn1 = BatchNorm(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride if bottleneck else 1, 1, bias=False)
        self.bn2 = BatchNorm(c)
        self.conv3 = nn.Conv2d(c, out, 1, bias=False) if bottleneck else None
        self.bn3 = BatchNorm(out) if bottleneck else None
        self.downsample = None
        if stride > 1 or c_in != out:
            conv = nn.Conv2d(c_in, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, BatchNorm(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.conv3 is not None:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> h (B, dim), the mean over places of the last feature map.

    stem: "imagenet" (7 x 7, stride 2, max-pool), "cifar" (3 x 3, stride 1, no pool; Appendix B.9)
    or "small" (3 x 3, stride 2, max-pool). Names and shapes are torchvision's, without its `fc`.
    """

    def __init__(self, layers=(2, 2, 2, 2), width=64, bottleneck=False, stem="cifar"):
        super().__init__()
        k, stride = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}[stem]
        self.conv1, self.bn1 = nn.Conv2d(3, width, k, stride, k // 2, bias=False), BatchNorm(width)
        self.pool, self.depth, c_in = stem != "cifar", len(layers), width
        for i, n in enumerate(layers):
            c, blocks = width * 2**i, []
            for j in range(n):
                blocks.append(Block(c_in, c, 2 if i and not j else 1, bottleneck))
                c_in = c * (4 if bottleneck else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.dim = c_in
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.pool else x
        for i in range(self.depth):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x.mean((2, 3))


ENCODERS = {
    "small": partial(ResNet, (1, 1, 1), 32, stem="small"),
    "resnet18": ResNet,
    "resnet50": partial(ResNet, (3, 4, 6, 3), bottleneck=True),
}


# ---- 4. SimCLR: projection head g, NT-Xent, LARS (Section 2) ----


class SimCLR(nn.Module):
    """x (B, 3, H, W) -> h (B, D), to keep, and z (B, d), for the loss."""

    def __init__(self, encoder: nn.Module, dim: int = 128, head: nn.Module | None = None):
        super().__init__()
        D = encoder.dim
        mlp = [nn.Linear(D, D, bias=False), BatchNorm(D), nn.ReLU(), nn.Linear(D, dim, bias=False)]
        self.encoder, self.head = encoder, head or nn.Sequential(*mlp)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return h, self.head(h)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Eq. 1, the mean over my 2 n views; z1, z2 (n, d), row i of both from one image -> ().

    Under torchrun the rows are those of this process, the columns the views of all of them; the
    mean over processes is the loss of the whole batch. At chance it is ln(2 N - 1).
    """
    n, rank = len(z1), rank_and_world()[0]
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2 n, d)
    sim = z @ gather(z).flatten(0, 1).T / temperature  # (2 n, 2 N)
    i = torch.arange(2 * n, device=z.device)
    me, partner = 2 * n * rank + i, 2 * n * rank + (i + n) % (2 * n)
    # 1[k != i]: a view is its own best match, cosine 1, and would drown the others
    sim = sim.scatter(1, me[:, None], -math.inf)
    return F.cross_entropy(sim, partner)


def nt_xent_ref(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Algorithm 1, pair by pair: the slow obvious form of nt_xent in one process."""
    z, N, total = torch.stack([z1, z2], 1).flatten(0, 1), len(z1), 0.0  # views 2 k, 2 k + 1
    s = [[a @ b / (a.norm() * b.norm()) for b in z] for a in z]
    for i in range(2 * N):
        j = i + 1 if i % 2 == 0 else i - 1
        others = sum(torch.exp(s[i][k] / temperature) for k in range(2 * N) if k != i)
        total = total - torch.log(torch.exp(s[i][j] / temperature) / others)  # l(i, j)
    return total / (2 * N)


class LARS(torch.optim.Optimizer):
    """SGD whose steps are scaled to each weight's norm (arXiv:1708.03888), for large batches.

    g = grad + weight_decay w, v = momentum v + lr eta |w| / |g| g, w -= v. Biases and norms
    (one-dimensional) take plain momentum steps, without decay.
    """

    def __init__(self, params, lr: float, momentum=0.9, weight_decay=1e-6, eta=1e-3):
        super().__init__(params, {"lr": lr, "m": momentum, "wd": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in (p for p in group["params"] if p.grad is not None):
                g, v = w.grad, self.state[w].setdefault("v", torch.zeros_like(w))
                if w.ndim > 1:
                    g = g + group["wd"] * w
                    trust = group["eta"] * w.norm() / g.norm()
                    g = g * torch.where((w.norm() > 0) & (g.norm() > 0), trust, 1.0)
                v.mul_(group["m"]).add_(group["lr"] * g)
                w.sub_(v)


# ---- 5. Data ----


def canvas_digits(x: Tensor, seed: int) -> Tensor:
    """Digits x (N, 8, 8) in [0, 1] -> uint8 (N, 32, 32, 3), each pasted once.

    It is enlarged to 14-22 pixels, turned by up to 15 degrees, painted in a bright random colour
    and put at a random place of a dark canvas with some noise.
    """
    g, N = torch.Generator().manual_seed(seed), len(x)
    share = (14 + 8 * torch.rand(N, 1, 1, generator=g)) / 32  # of the canvas's side
    place = (2 * torch.rand(N, 2, 1, generator=g) - 1) * (1 - share)
    angle = (2 * torch.rand(N, generator=g) - 1) * math.pi / 12
    A = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(N, 2, 2) / share
    grid = F.affine_grid(torch.cat([A, -A @ place], 2), [N, 1, 32, 32], align_corners=False)
    ink = F.grid_sample(x[:, None], grid, align_corners=False)  # (N, 1, 32, 32)
    colour = torch.rand(N, 3, 1, 1, generator=g)
    colour = colour / colour.amax(1, keepdim=True)
    x = 0.1 * (1 - ink) + colour * ink + 0.02 * torch.randn(N, 3, 32, 32, generator=g)
    return (x.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()


def load_data(path: str) -> list[Tensor]:
    """A Keras-style npz, or digits -> x_train uint8 (N, H, W, 3), y_train (N,), x_test, y_test.

    digits: canvases, five of each of 1,290 digits in their order, so that the last tenth shows
    digits that the rest doesn't; three of each of the 500 test digits.
    """
    if path == "digits":
        from sklearn.datasets import load_digits

        x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
        x, y = x.view(-1, 8, 8).float() / 16, y.long()
        (x, x_test), (y, y_test) = (
            (t[:1290].repeat_interleave(5, 0), t[1297:].repeat_interleave(3, 0)) for t in (x, y)
        )
        return [canvas_digits(x, 0), y, canvas_digits(x_test, 1), y_test]
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        x, y, x_test, y_test = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    y, y_test = y.reshape(len(x), -1)[:, 0], y_test.reshape(len(x_test), -1)[:, 0]
    good = x.dtype == x_test.dtype == np.uint8 and x.shape[3:] in ((), (1,), (3,)) and len(x_test)
    good = good and x.ndim > 2 and x.shape[1:] == x_test.shape[1:] and y_test.max() <= y.max()
    if not good or {y.dtype.kind, y_test.dtype.kind} - {"i", "u"} or min(y.min(), y_test.min()) < 0:
        raise ValueError(f"{path}: images must be uint8 (N, H, W[, 3]), labels 0 .. K - 1")
    x, x_test = (torch.from_numpy(a).reshape(*a.shape[:3], -1).expand(-1, -1, -1, 3)
                 for a in (x, x_test))  # fmt: skip
    return [x, torch.tensor(y.astype("i8")), x_test, torch.tensor(y_test.astype("i8"))]


def to_float(x: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [0, 1]."""
    return x.permute(0, 3, 1, 2) / 255


# ---- 6. Training: a batch and its views depend on (seed, step) alone: a resumed run is exact ----

VIEWS = ("crop", "rotate", "flip", "jitter", "hue", "grey", "blur")
Run = namedtuple("Run", "model optimizer views steps lr labels")  # labels: how many it may see


def build(args, K: int) -> dict:
    """-> runs by name: SimCLR, the short ones of Figure 5, the network trained with labels."""
    views, runs = {name: getattr(args, name) for name in VIEWS}, {}
    crop_only = {**views, "jitter": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.0}
    colour_only = {**views, "crop": 1.0, "rotate": 0.0, "flip": 0.0}
    for name, recipe, steps, labels in (
        ("SimCLR", views, args.steps, 0),
        ("crop only", crop_only, args.short, 0),
        ("colour only", colour_only, args.short, 0),
        ("both", views, args.short, 0),
        ("few labels", views, args.label_steps, args.few),
        ("all labels", views, args.label_steps, args.images),
    ):
        if steps:
            torch.manual_seed(args.seed)
            encoder = ENCODERS[args.encoder]()
            model = SimCLR(encoder, args.dim, nn.Linear(encoder.dim, K) if labels else None)
            model = model.to(args.device, memory_format=torch.channels_last)
            lars, lr = args.optimizer == "lars" and not labels, 3e-3 if labels else args.lr
            kind = LARS if lars else torch.optim.AdamW
            optimizer = kind(model.parameters(), lr, weight_decay=args.weight_decay)
            runs[name] = Run(model, optimizer, recipe, steps, lr, labels)
    return runs


def train(runs, data, args, done=(), history=()):
    """Trains one run after the other -> steps done by name, [(name, step, loss)], stopped."""
    from tqdm import tqdm

    (x, y), (rank, world), stop = data, rank_and_world(), []
    done, history = dict(done), list(history)
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(1))  # Ctrl-C: ends after a step
    try:
        for name, (model, optimizer, views, steps, lr, labels) in runs.items():
            first, t0, known = done.get(name, 0), time.time(), labelled(x, labels, args.seed)
            model.train()
            for step in tqdm(range(first + 1, steps + 1), name, disable=rank > 0 or None):
                g = torch.Generator().manual_seed(args.seed * 10**10 + step)
                rows = torch.randint(labels or len(x), (args.batch_size,), generator=g)
                u = torch.rand(2, args.batch_size, 16, generator=g).chunk(world, 1)[rank]
                rows = rows.chunk(world)[rank].to(x.device)
                if labels:
                    rows = known[rows]
                    views_1 = augment(to_float(x[rows]), u[0], **views)
                    loss = F.cross_entropy(model(views_1)[1], y[rows])
                else:  # one pass for all views, so that they share the batch norm's statistics
                    both = to_float(x[rows]).repeat(2, 1, 1, 1)
                    _, z = model(augment(both, u.flatten(0, 1), **views))
                    loss = nt_xent(*z.chunk(2), args.temperature)  # Eq. 1
                rate = min(1.0, step / max(1, args.warmup * steps))
                for group in optimizer.param_groups:
                    group["lr"] = lr * rate * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad(); loss.backward()  # fmt: skip
                now, stopped, norm = average(model, loss.item(), float(len(stop)))
                if not math.isfinite(now + norm):
                    raise FloatingPointError(f"{name}: loss {now}, gradient {norm} at step {step}")
                optimizer.step()
                if stopped or step % args.log_every == 0 or step == steps:
                    history.append((name, step, now))
                    done[name], ms = step, (time.time() - t0) / (step - first) * 1e3
                    if rank == 0:
                        row = f"step {step:5d}/{steps} | {name} loss {now:.4f} | {ms:.0f} ms/step"
                        tqdm.write(row)
                    if rank == 0 and args.save:
                        save(args, runs, done, history)
                if stopped:
                    return done, history, True
    finally:
        signal.signal(signal.SIGINT, before)
    return done, history, False


def save(args, runs, done, history):
    """Writes the checkpoint beside its place, then moves it there: a crash leaves the old one."""
    state = {"script": "simclr", "args": vars(args), "step": done.get("SimCLR", 0)}
    state |= {"done": done, "history": history}
    state["models"] = {name: run.model.state_dict() for name, run in runs.items()}
    state["optimizers"] = {name: run.optimizer.state_dict() for name, run in runs.items()}
    torch.save(state, args.save + ".tmp")
    os.replace(args.save + ".tmp", args.save)


# ---- 7. Evaluation and picture ----


def grey_centred(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H W): grey, less its mean, of length one: no colour and no brightness."""
    x = x.mean(1).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def labelled(x: Tensor, n: int, seed: int) -> Tensor:
    """The rows of x whose labels may be seen: n of them, drawn by seed."""
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return rows[:n].to(x.device)


@torch.no_grad()
def features(encoder, x: Tensor):
    """Images uint8 (N, H, W, 3) -> what encoder(x) says of x (B, 3, H, W) in [0, 1], as numpy."""
    return torch.cat([encoder(to_float(part)).flatten(1) for part in x.split(256)]).cpu().numpy()


def evaluate(encoders: dict, data, few: int = 1000, seed: int = 0) -> dict:
    """encoders by name -> accuracies (k-NN few, linear few, k-NN all, linear all) on the test part.

    few: how many training images have labels, drawn by seed. An encoder is a function of images, or
    a dict of them by number of labels (for a network that was trained with them). Its features
    stay as they are; linear: logistic regression on them, standardised; k-NN: cosine, k = 5.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    (x, y, x_test, y_test), table = data, {}
    for name, encoder in encoders.items():
        table[name] = ()
        for n in (min(few, len(x)), len(x)):
            f = encoder[n] if isinstance(encoder, dict) else encoder
            rows = labelled(x, n, seed)
            (a, b), (t, t_test) = (
                (features(f, part) for part in (x[rows], x_test)),
                (y[rows], y_test),
            )
            mean, sd = a.mean(0), a.std(0) + 1e-6
            for model, p, q in (
                (KNeighborsClassifier(min(5, n), metric="cosine"), a, b),
                (LogisticRegression(max_iter=100), (a - mean) / sd, (b - mean) / sd),
            ):
                table[name] += (model.fit(p, t.cpu()).score(q, t_test.cpu()),)
    return table


@torch.no_grad()
def draw_picture(args, model, start, data, table):
    """Views, cosines of a batch's views before and after, the features in the plane, accuracies."""
    from matplotlib.figure import Figure  # without pyplot no window is opened
    from sklearn.manifold import TSNE

    x, y, x_test, y_test = data
    fig = Figure(figsize=(15, 7.5), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1, 1.5])
    g, views = torch.Generator().manual_seed(args.seed), {n: getattr(args, n) for n in VIEWS}
    rows = torch.randperm(len(x), generator=g)[:50].to(x.device)
    rows = rows[y[rows].argsort()]
    image = to_float(x[rows])
    pair = [augment(image, torch.rand(len(rows), 16, generator=g), **views) for _ in range(2)]
    for j, axis in enumerate(top.subplots(3, 14).T.flat):
        part = [image, *pair][j % 3][j // 3 * len(rows) // 14]
        axis.imshow(part.permute(1, 2, 0).cpu())
        axis.set(xticks=[], yticks=[], ylabel=("image", "view 1", "view 2")[j] if j < 3 else "")
    axes = bottom.subplots(1, 4, width_ratios=[1, 1, 1, 1.1])
    for axis, m, title in zip(axes, (start, model), ("before training", "after")):
        z1, z2 = (F.normalize(m(part)[1], dim=1) for part in pair)
        shown = axis.imshow((z1 @ z2.T).cpu(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(title=f"cosine of views, {title}", xlabel="views 2, by class", ylabel="views 1")
    bottom.colorbar(shown, ax=list(axes[:2]), shrink=0.6)
    h = torch.tensor(features(lambda part: model(part)[0], x_test[:900]))
    place = TSNE(perplexity=min(30, len(h) / 4), random_state=0).fit_transform(
        F.normalize(h, dim=1)
    )
    axes[2].scatter(*place.T, c=y_test[: len(h)].cpu(), cmap="tab10", s=6)
    axes[2].set(title="h of unseen images (t-SNE), by class", xticks=[], yticks=[])
    bars = axes[3].barh(list(table), [row[1] for row in table.values()], color="tab:blue")
    axes[3].bar_label(bars, fmt="%.2f")
    axes[3].invert_yaxis()
    axes[3].set(title=f"linear probe, {args.few} labels", xlim=(0, 1.1))
    fig.savefig(os.path.join(args.out, "simclr.png"), dpi=80)


# ---- 8. Command line ----

DEFAULTS = {  # on digits, on an npz (the paper on CIFAR-10), least, most, meaning
    "seed": (0, 0, 0, 10**8, "of weights, batches, views, labels"),
    "log_every": (250, 250, 1, math.inf, "steps between log lines"),
    "steps": (1500, 97000, 1, math.inf, "1000 epochs"),
    "short": (250, 0, 0, math.inf, "steps of each run of Figure 5, 0: none"),
    "label_steps": (300, 4000, 0, math.inf, "steps with labels alone, 0: none"),
    "few": (1000, 1000, 10, math.inf, "labels of the first two columns"),
    "batch_size": (128, 512, 2, math.inf, "images over all processes (ImageNet: 4096)"),
    "lr": (3e-3, 1.0, 1e-12, 1e32, "peak rate (ImageNet: 0.3 batch / 256)"),
    "weight_decay": (1e-4, 1e-6, 0, 99, "decay"),
    "warmup": (0.05, 0.01, 0, 1, "share of the steps over which the rate rises"),
    "temperature": (0.2, 0.5, 1e-3, 99, "tau (ImageNet: 0.1)"),
    "dim": (64, 128, 1, math.inf, "width of z"),
    "crop": (0.5, 0.08, 0.01, 1, "least area of a crop, 1: none"),
    "rotate": (20.0, 0.0, 0, 180, "degrees"),
    "flip": (0.0, 0.5, 0, 1, "probability"),
    "jitter": (0.5, 0.4, 0, 1, "brightness, contrast, saturation (ImageNet: 0.8)"),
    "hue": (0.5, 0.1, 0, 0.5, "share of the colour circle (ImageNet: 0.2)"),
    "grey": (0.4, 0.2, 0, 1, "probability"),
    "blur": (0.0, 0.0, 0, 1, "probability (ImageNet: 0.5)"),
}


def parse(argv):
    """-> args, checkpoint or {}, data, runs. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or FILE.npz in the format of Keras's cifar10")
    for name, (value, npz, _, _, text) in DEFAULTS.items():
        text = f"default {value}, npz and paper {npz}: {text}"
        flag(f"--{name.replace('_', '-')}", type=type(value), help=text)
    flag("--encoder", choices=list(ENCODERS), help="default small, npz resnet18 (paper: resnet50)")
    flag("--optimizer", choices=["adamw", "lars"], help="default adamw, npz lars (paper: lars)")
    flag("--validate", action="store_true", help="judge on the last tenth of the training images")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate, or to go on with (more --steps)")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the linear probe with few labels is below this")
    args, ckpt, world = parser.parse_args(argv), {}, int(os.environ.get("WORLD_SIZE", 1))
    try:
        if args.device == "auto":
            cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
            args.device = "cuda" if cuda else "mps" if mps else "cpu"
        if args.device == "cuda" and world > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=args.device)
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "simclr":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own, npz = ckpt.get("args", {}), (args.data or "").endswith(".npz")
        npz = npz or not args.data and own.get("data", "digits") != "digits"
        quick = {"steps": 4, "short": 2, "label_steps": 2, "batch_size": 16} if args.quick else {}
        default = {name: value[npz] for name, value in DEFAULTS.items()} | quick
        default |= {"data": "digits", "encoder": "resnet18" if npz else "small"}
        default |= {"optimizer": "lars" if npz else "adamw"}
        for name, value in default.items():
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, value))
        for name, (_, _, low, high, _) in DEFAULTS.items():
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        x, y, x_test, y_test = load_data(args.data)
        n = len(x) * 9 // 10
        data = [x[:n], y[:n], *((x[n:], y[n:]) if args.validate else (x_test, y_test))]
        data = [t[: 300 if args.quick else None] for t in data]
        args.images, args.few = len(data[0]), min(args.few, len(data[0]))
        if args.batch_size > args.images or args.batch_size % world:
            raise ValueError(f"--batch-size must divide by {world} and be at most {args.images}")
        runs = build(args, int(y.max()) + 1)
        for name, run in runs.items() if own else ():
            run.model.load_state_dict(ckpt["models"][name])
            run.optimizer.load_state_dict(ckpt["optimizers"][name])
        if args.save and os.path.isdir(args.save):
            raise ValueError(f"--save {args.save} is a folder")
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save and args.save + ".tmp", args.out + "/simclr.png")):
            open(path, "ab").close()  # fails now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, ckpt, [t.to(args.device) for t in data], runs


def main(argv=None) -> int:
    args, ckpt, data, runs = parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    t0, rank = time.time(), rank_and_world()[0]
    model, start = runs["SimCLR"].model, build(args, 1)["SimCLR"].model.eval()
    count = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    if rank == 0:
        kind = f"{args.data} {args.images}/{len(data[2])}"
        print(f"simclr | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}")
    try:
        state = ckpt.get("done", {}), ckpt.get("history", [])
        done, history, stopped = train(runs, data[:2], args, *state)
    except FloatingPointError as error:
        print(f"simclr.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank:
        return 0
    for run in runs.values():
        run.model.eval()
    encoders = {"raw pixels": lambda x: x, "grey centred": grey_centred}
    encoders["random network"] = start.encoder
    if args.label_steps:
        kinds = {"few labels": args.few, "all labels": args.images}
        encoders["labels alone"] = {n: runs[name].model.encoder for name, n in kinds.items()}
    short = ("crop only", "colour only", "both") if args.short else ()
    encoders |= {f"{name}, {args.short} steps": runs[name].model.encoder for name in short}
    encoders |= {"SimCLR z": lambda x: model(x)[1], "SimCLR h": model.encoder}
    table = evaluate(encoders, data, args.few, args.seed)
    few, every = f"{args.few} labels", f"{args.images} labels"
    print(f"{'test accuracy':26} k-NN {few:>12} {every:>12} | linear {few:>12} {every:>12}")
    for name, (knn, linear, knn_all, linear_all) in table.items():
        print(f"{name:26} {knn:17.4f} {knn_all:12.4f} | {linear:19.4f} {linear_all:12.4f}")
    draw_picture(args, model, start, data, table)
    parts = [f"{name} {row[1]:.4f}" for name, row in table.items() if "steps" not in name][::-1]
    print(f"test acc linear {few} {' | '.join(parts)} | {time.time() - t0:.0f} s")
    missed = args.target is not None and table["SimCLR h"][1] < args.target
    return 130 if stopped else int(missed)


if __name__ == "__main__":
    sys.exit(main())
