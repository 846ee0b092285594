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
         Figure 5's runs change both views; "crop only" turns, too. Warm-up and cosine multiply.
         g has a batch norm in its hidden layer (the paper doesn't say; the official code normalises
         z, too). The demo: a ResNet of three blocks, 1,161 digits, AdamW, stronger hue, crops from
         half the area on (smaller ones lose the digit), rotation, no blur. `--data` takes the
         paper's CIFAR-10 recipe (Appendix B.9), with LARS.
Run      python simclr.py                  # canvas digits, some 5 minutes on one core
         python simclr.py --data cifar10.npz --amp --save cifar.pt    # ResNet-18, long; a GPU
         python simclr.py --data cifar10.npz --encoder small --optimizer adamw --lr 3e-3
                --weight-decay 1e-4 --warmup 0.05 --temperature 0.2 --batch-size 256
                --steps 12000 --label-steps 2000                      # an hour of one core
         torchrun --nproc-per-node 8 simclr.py --data cifar10.npz     # negatives of all processes
Expect   Linear probe with 1,000 labels, test digits never seen, seeds 0-2: .834 +- .010, with all
         labels .867 +- .003 (k-NN .714, .788). Raw pixels .143, grey centred .149, random network
         .206, the same network trained with the 1,000 labels .879 +- .020; k-NN with all labels:
         raw .591, grey .737. Figure 5, 250 steps each: both .532, colour only .406, crop only .201.
         Section 4.2: with all labels h leads z, .867 to .852 +- .004; with 1,000 they are equal
         (.834, .828) and in k-NN z leads: less than the paper's 10 %. CIFAR-10 (a JPEG copy), the
         hour's command, seed 0, 68 epochs: with all labels h .618, z .581, random network .404, raw
         pixels .396, labels alone .711; k-NN h .570, z .550, random network .328; with 1,000 labels
         h .493, z .521, random network .295, labels alone .552; k-NN h .460, z .469.
         ResNet-18 on a GPU, --amp --steps 17600 --lr 1 --label-steps 0, seed 0, stopped after 197
         epochs of 200; h, z and random network: linear .785 .740 .463, k-NN .740 .723 .380; with
         1,000 labels .708 .708 .308, .678 .679 .275. lightly's ResNet-18, SGD, 200 epochs: k-NN
         .848. That rate was half of the official code's, which is now the default but has not been
         run. ImageNet, not run: 69.3 %.
"""

import argparse
import math
import os
import signal
import sys
import time
import warnings
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
    """Random views of images x (B, 3, H, W) in [0, 1], as u (B, 16), uniform in [0, 1), says. crop:
    least share of the area, resized back, aspect 3/4 to 4/3; rotate: degrees either way; flip,
    grey, blur: probabilities; jitter: brightness, contrast, saturation by factors of up to 1 +-
    jitter, hue by up to this share of the circle, in 4 of 5 views (paper: s (.8, .8, .8, .2))."""
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
    sigma = torch.where(u[:, 13] < blur, 0.1 + 1.9 * u[:, 12], 0.01).view(B, 1, 1, 1)
    for _ in range(2):  # along the rows, then along the columns
        i = torch.arange(x.shape[3]).to(x)
        gap = i - i[:, None]
        w = (-((gap / sigma) ** 2) / 2).exp() * (gap.abs() <= round(H / 20))  # a tenth of the side
        x = (x @ (w / w.sum(2, keepdim=True))).transpose(2, 3)
    return x


# ---- 2. One batch over many processes (Section 2.2, "Global BN"; torchrun) ----


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """x -> (world, *x.shape), the x of all processes, with gradients: dist.all_gather has none, so
    that each z would only be pulled as a query, and not as a key."""
    rank, world = rank_and_world()
    if world == 1:
        return x[None]
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.detach().contiguous())
    out = torch.stack([*parts[:rank], x, *parts[rank + 1 :]])

    def total(grad):  # what all processes' losses ask of my x
        dist.all_reduce(grad := grad.clone())
        return grad

    if out.requires_grad:  # not under no_grad
        out.register_hook(total)
    return out


class BatchNorm(nn.SyncBatchNorm):
    """Over (B, C) or (B, C, H, W) of all processes: local statistics would give partners away.
    torch's own does that on GPUs alone; on CPUs each process normalises all and takes its own."""

    def forward(self, x):
        rank, world = rank_and_world()
        if not self.training or world == 1 or x.is_cuda:
            return super().forward(x)
        self.num_batches_tracked += 1
        how = self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum
        return F.batch_norm(gather(x).flatten(0, 1), *how, self.eps).chunk(world)[rank]


# ---- 3. Base encoder f: a ResNet (arXiv:1512.03385) ----


class Block(nn.Module):
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 (bottleneck), and a way around them: (B, c_in,
    H, W) -> (B, c, H', W'), of a bottleneck (B, 4 c, H', W')."""

    def __init__(self, c_in: int, c: int, stride: int, bottleneck: bool):
        super().__init__()
        sizes = (c_in, c, 3, stride), (c, c, 3, 1)
        if bottleneck:
            sizes = (c_in, c, 1, 1), (c, c, 3, stride), (c, 4 * c, 1, 1)
        for i, (a, out, k, s) in enumerate(sizes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, out, k, s, k // 2, bias=False))
            self.add_module(f"bn{i}", BatchNorm(out))
        self.downsample, self.bottleneck = nn.Sequential(), bottleneck  # empty: the identity
        if stride > 1 or c_in != out:
            self.downsample.append(nn.Conv2d(c_in, out, 1, stride, bias=False))
            self.downsample.append(BatchNorm(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = self.bn3(self.conv3(F.relu(y))) if self.bottleneck else y
        return F.relu(y + self.downsample(x))


class ResNet(nn.Sequential):
    """Images (B, 3, H, W) -> h (B, dim), the mean over places of the last feature map. stem:
    "imagenet" (7 x 7, stride 2, max-pool), "cifar" (3 x 3, stride 1, no pool; Appendix B.9) or
    "small" (3 x 3, stride 2, max-pool). Names and shapes are torchvision's, without its `fc`."""

    def __init__(self, layers=(2, 2, 2, 2), width=64, bottleneck=False, stem="cifar"):
        super().__init__()
        k, stride = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}[stem]
        self.conv1 = nn.Conv2d(3, width, k, stride, k // 2, bias=False)
        self.bn1, self.relu, self.dim = BatchNorm(width), nn.ReLU(), width
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        for i, n in enumerate(layers):
            layer, c = nn.Sequential(), width * 2**i
            for j in range(n):
                layer.append(Block(self.dim, c, 2 if i and not j else 1, bottleneck))
                self.dim = 4 * c if bottleneck else c
            self.add_module(f"layer{i + 1}", layer)
        self.avgpool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


ENCODERS = {"small": partial(ResNet, (1, 1, 1), 32, stem="small"), "resnet18": ResNet}
ENCODERS["resnet50"] = partial(ResNet, (3, 4, 6, 3), bottleneck=True)


# ---- 4. SimCLR: projection head g, NT-Xent, LARS (Section 2) ----


class SimCLR(nn.Module):
    """x (B, 3, H, W) -> h (B, D), to keep, and z (B, dim), for the loss."""

    def __init__(self, encoder: nn.Module, dim: int = 128, head: nn.Module | None = None):
        super().__init__()
        D = encoder.dim
        mlp = nn.Linear(D, D, bias=False), BatchNorm(D), nn.ReLU(), nn.Linear(D, dim, bias=False)
        self.encoder, self.head = encoder, head or nn.Sequential(*mlp)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return h, self.head(h)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Eq. 1, the mean over my 2 n views; z1, z2 (n, d), row i of both from one image -> (). Under
    torchrun the rows are those of this process, the columns the views of all of them; the mean over
    processes is the loss of the whole batch. At chance it is ln(2 N - 1)."""
    n, rank = len(z1), rank_and_world()[0]
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # (2 n, d)
    sim = z @ gather(z).flatten(0, 1).T / temperature  # (2 n, 2 N)
    me = 2 * n * rank + torch.arange(2 * n, device=z.device)  # my columns
    # 1[k != i]: a view is its own best match, cosine 1, and would drown the others
    sim = sim.scatter(1, me[:, None], -math.inf)
    return F.cross_entropy(sim, me.roll(n))  # the answer: the partner


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
    """SGD whose steps are scaled to each weight's norm (arXiv:1708.03888), for large batches:
    g = grad + weight_decay w, v = momentum v + lr eta |w| / |g| g, w -= v. Biases and norms
    (one-dimensional) take plain momentum steps, without decay."""

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
                w.sub_(v.mul_(group["m"]).add_(group["lr"] * g))


# ---- 5. Data ----


def canvas_digits(x: Tensor, seed: int) -> Tensor:
    """Digits (N, 1, 8, 8) in [0, 1] -> uint8 (N, 3, 32, 32): each enlarged to 14-22 pixels, turned
    by up to 15 degrees, brightly coloured and put somewhere on a dark canvas with some noise."""
    g, N = torch.Generator().manual_seed(seed), len(x)
    share = (14 + 8 * torch.rand(N, 1, 1, generator=g)) / 32  # of the canvas's side
    place = (2 * torch.rand(N, 2, 1, generator=g) - 1) * (1 - share)
    angle = (2 * torch.rand(N, generator=g) - 1) * math.pi / 12
    A = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(N, 2, 2) / share
    grid = F.affine_grid(torch.cat([A, -A @ place], 2), [N, 1, 32, 32], align_corners=False)
    ink = F.grid_sample(x, grid, align_corners=False)  # (N, 1, 32, 32)
    colour = (c := torch.rand(N, 3, 1, 1, generator=g)) / c.amax(1, keepdim=True)
    x = 0.1 * (1 - ink) + colour * ink + 0.02 * torch.randn(N, 3, 32, 32, generator=g)
    return (x.clamp(0, 1) * 255).byte()


def load_data(path: str) -> list[Tensor]:
    """digits or a Keras-style npz -> x_train uint8 (N, 3, H, W), y_train (N,), x_test, y_test. Of
    1,290 digits five canvases each, in order: the last tenth is of others; of 500, three each."""
    if path == "digits":
        from sklearn.datasets import load_digits

        x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
        x, y = x.view(-1, 1, 8, 8).float() / 16, y.long()
        rows, test = torch.arange(1290), torch.arange(1297, 1797)
        rows, test = rows.repeat_interleave(5), test.repeat_interleave(3)
        return [canvas_digits(x[rows], 0), y[rows], canvas_digits(x[test], 1), y[test]]
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        images = [torch.from_numpy(file[k]) for k in ("x_train", "x_test")]
        labels = [torch.from_numpy(file[k]) for k in ("y_train", "y_test")]
    x, x_test = (t.view(*t.shape[:3], -1).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) for t in images)
    y, y_test = (t.reshape(len(t), -1)[:, 0].long() for t in labels)
    good = {t.dtype for t in images} == {torch.uint8} and x.shape[1:] == x_test.shape[1:]
    good = good and (len(x), len(x_test)) == (len(y), len(y_test)) and y_test.max() <= y.max()
    if not good or min(y.min(), y_test.min()) < 0 or any(map(torch.is_floating_point, labels)):
        raise ValueError(f"{path}: images must be uint8 (N, H, W[, 3]), labels 0 .. K - 1")
    return [x, y, x_test, y_test]


# ---- 6. The demo: a batch and its views depend on (seed, step) alone: a resumed run is exact ----

VIEWS = ("crop", "rotate", "flip", "jitter", "hue", "grey", "blur")
SHORT = {"crop only": {"jitter": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.0}}  # Figure 5
SHORT |= {"colour only": {"crop": 1.0, "rotate": 0.0, "flip": 0.0}, "both": {}}
Run = namedtuple("Run", "model optimizer views steps rows labels")  # rows: those it may see


def build(args, classes: int) -> dict:
    """-> runs by name: SimCLR, the short ones of Figure 5, the network trained with labels."""
    views, runs = {name: getattr(args, name) for name in VIEWS}, {}
    order = torch.randperm(args.images, generator=torch.manual_seed(args.seed)).to(args.device)
    every = order.sort().values
    plan = {"SimCLR": (views, args.steps, every), "random network": (views, 0, every)}
    plan |= {name: (views | off, args.short, every) for name, off in SHORT.items()}
    plan |= {"few labels": (views, args.label_steps, order[: args.few])}
    plan |= {"all labels": (views, args.label_steps, order)}
    for name, how in plan.items():
        torch.manual_seed(args.seed)  # one start for all
        encoder, labels = ENCODERS[args.encoder](), name.endswith("labels")
        model = SimCLR(encoder, args.dim, nn.Linear(encoder.dim, classes) if labels else None)
        model = model.to(args.device, memory_format=torch.channels_last)
        kind = LARS if args.optimizer == "lars" and not labels else torch.optim.AdamW
        optimizer = kind(model.parameters(), args.lr, weight_decay=args.weight_decay)
        runs[name] = Run(model, optimizer, *how, labels)
    return runs


def train(runs, data, args, state=(), stop=()) -> dict:
    """Trains one run after the other, from where `state` left it, until `stop` holds -> state."""
    from tqdm import tqdm

    (x, y), (rank, world) = data, rank_and_world()
    state = {"done": {}, "history": [], "models": {}, "optimizers": {}} | dict(state)
    for name, (model, optimizer, views, steps, rows, labels) in runs.items():
        first, t0 = state["done"].get(name, 0), time.time()
        model.train()
        for step in tqdm(range(first + 1, steps + 1), name, disable=rank > 0 or None):
            g = torch.Generator().manual_seed(args.seed * 10**10 + step)
            i = torch.randint(len(rows), (args.batch_size,), generator=g).chunk(world)[rank]
            u = torch.rand(2, args.batch_size, 16, generator=g).chunk(world, 1)[rank]
            i, k = rows[i.to(x.device)], 1 if labels else 2
            # one pass for both views, so that they share the batch norm's statistics
            both = augment((x[i] / 255).repeat(k, 1, 1, 1), u[:k].flatten(0, 1), **views)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                _, z = model(both)
                if labels:
                    loss = F.cross_entropy(z, y[i])
                else:
                    loss = nt_xent(*z.chunk(2), args.temperature)  # Eq. 1
            rate = (3e-3 if labels else args.lr) * min(1, step / max(1, args.warmup * steps))
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad(); loss.backward()  # fmt: skip
            now = loss.new_tensor([loss.item(), len(stop)])  # all stop at one step
            grads = [p.grad for p in model.parameters()]
            for t in (now, *grads) if world > 1 else ():  # their means over the processes
                dist.all_reduce(t.div_(world))
            (loss, stopped), norm = now.tolist(), nn.utils.get_total_norm(grads).item()
            if not math.isfinite(loss + norm):
                raise FloatingPointError(f"{name}: loss {loss}, gradient {norm} at step {step}")
            optimizer.step()
            if stopped or step % args.log_every == 0 or step == steps:
                state["done"][name], ms = step, (time.time() - t0) / (step - first) * 1e3
                state["history"].append((name, step, loss))
                state["models"][name] = model.state_dict()
                state["optimizers"][name] = optimizer.state_dict()
                state |= {"script": "simclr", "args": vars(args), "step": state["done"]["SimCLR"]}
                if rank == 0:
                    row = f"step {step:5d}/{steps} | {name} loss {loss:.4f} | {ms:.0f} ms/step"
                    tqdm.write(row)
                    if args.save:  # beside its place, then moved there: a crash leaves the old one
                        torch.save(state, args.save + ".tmp")
                        os.replace(args.save + ".tmp", args.save)
            if stopped:
                return state
    return state


def grey_centred(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H W): grey, less its mean, of length one: no colour and no brightness."""
    x = x.mean(1).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


@torch.no_grad()
def evaluate(encoder, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> tuple[float, float]:
    """Test accuracies of k-NN (cosine, k = 5) and of logistic regression (standardised) on frozen
    features, what encoder says of images (B, 3, H, W) in [0, 1]. x uint8 (N, 3, H, W), y (N,)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    a, b = ([encoder(part / 255).flatten(1) for part in t.split(256)] for t in (x, x_test))
    a, b, y, y_test = (t.cpu().numpy() for t in (torch.cat(a), torch.cat(b), y, y_test))
    knn = KNeighborsClassifier(min(5, len(a)), metric="cosine").fit(a, y)
    mean, sd = a.mean(0), a.std(0) + 1e-6
    warnings.filterwarnings("ignore", "lbfgs failed to converge")  # 100 steps will do
    linear = LogisticRegression(max_iter=100).fit((a - mean) / sd, y)
    return knn.score(b, y_test), linear.score((b - mean) / sd, y_test)


@torch.no_grad()
def draw_picture(args, runs, data, table):
    """Views, cosines of a batch's views before and after, the features in the plane, accuracies."""
    from matplotlib.figure import Figure  # without pyplot no window is opened
    from sklearn.manifold import TSNE

    (x, y, x_test, y_test), g = data, torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(x), generator=g)[:50].to(x.device)
    image, u = x[rows[y[rows].argsort()]] / 255, torch.rand(2, len(rows), 16, generator=g)
    pair = [augment(image, numbers, **runs["SimCLR"].views) for numbers in u]
    fig = Figure(figsize=(15, 7.5), layout="constrained")
    top, low = fig.subfigures(2, 1, height_ratios=[1, 1.5])
    left, right = low.subfigures(1, 2, width_ratios=[2.1, 1])
    axes = dict(zip("abhvp", [*left.subplots(1, 3), top.subplots(), right.subplots()]))
    strip = torch.stack([image, *pair])[:, ::3].permute(0, 3, 1, 4, 2)  # (3, H, n, W, 3)
    axes["v"].imshow(strip.flatten(2, 3).flatten(0, 1).cpu())
    axes["v"].set(title="images, above two views of each", xticks=[], yticks=[])
    for key, name in (("a", "random network"), ("b", "SimCLR")):
        z1, z2 = (F.normalize(runs[name].model(part)[1], dim=1) for part in pair)
        shown = axes[key].imshow((z1 @ z2.T).cpu(), vmin=-1, vmax=1, cmap="RdBu_r")
        axes[key].set(title=f"cosines: {name}", xlabel="views 2, by class")
    left.colorbar(shown, ax=[axes["a"], axes["b"]], shrink=0.6)
    h = F.normalize(runs["SimCLR"].model.encoder(x_test[:900] / 255), dim=1).cpu()
    place = TSNE(perplexity=min(30, len(h) / 4), random_state=0).fit_transform(h)
    axes["h"].scatter(*place.T, c=y_test[: len(h)].cpu(), cmap="tab10", s=6)
    axes["h"].set(title="h of unseen images (t-SNE), by class", xticks=[], yticks=[])
    bars = axes["p"].barh(list(table), [row[1] for row in table.values()], color="tab:blue")
    axes["p"].bar_label(bars, fmt="%.2f")
    axes["p"].invert_yaxis()
    axes["p"].set(title=f"linear probe, {args.few} labels", xlim=(0, 1.1))
    fig.savefig(os.path.join(args.out, "simclr.png"), dpi=80)


QUICK = {"steps": 4, "short": 2, "label_steps": 2, "batch_size": 16}  # --quick
DEFAULTS = {  # on digits, on an npz (the paper on CIFAR-10), least, most, meaning
    "seed": (0, 0, 0, 10**8, "of weights, batches, views, labels"),
    "log_every": (250, 250, 1, math.inf, "steps between log lines"),
    "steps": (1500, 88000, 1, math.inf, "1000 epochs"),
    "short": (250, 0, 0, math.inf, "steps of each run of Figure 5, 0: none"),
    "label_steps": (300, 4000, 0, math.inf, "steps with labels alone, 0: none"),
    "few": (1000, 1000, 10, math.inf, "labels of the first two columns"),
    "batch_size": (128, 512, 2, math.inf, "images over all processes (ImageNet: 4096)"),
    "lr": (3e-3, 2.0, 1e-12, 1e32, "peak, adamw 3e-3 (1.0 batch / 256; ImageNet: 0.3 batch / 256)"),
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
    flag("--data", help="digits (default) or FILE.npz like Keras's cifar10, by the paper's recipe")
    for name, (value, npz, _, _, text) in DEFAULTS.items():
        text = f"default {value}{f', npz {npz}' * (npz != value)}: {text}"
        flag(f"--{name.replace('_', '-')}", type=type(value), help=text)
    flag("--encoder", choices=ENCODERS, help="default small, npz resnet18 (paper: resnet50)")
    flag("--optimizer", choices=["adamw", "lars"], help="default adamw, npz lars (paper: lars)")
    flag("--amp", action="store_true", help="bfloat16 autocast in training, for GPUs")
    flag("--validate", action="store_true", help="judge on the last tenth of the training images")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint: the rest of its --steps is done, then it is judged")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, default=0, help="exit 1 if h's linear probe (few labels) is lower")
    args, ckpt, world = parser.parse_args(argv), {}, int(os.environ.get("WORLD_SIZE", 1))
    try:
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda" and world > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=args.device)
        if args.load:
            ckpt = torch.load(args.load, map_location=args.device, weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "simclr":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own = (QUICK if args.quick else {}) | ckpt.get("args", {})
        args.data = args.data or own.get("data", "digits")
        npz = args.data != "digits"
        args.encoder = args.encoder or own.get("encoder", ("small", "resnet18")[npz])
        args.optimizer = args.optimizer or own.get("optimizer", ("adamw", "lars")[npz])
        for name, (*values, low, high, _) in DEFAULTS.items():
            value = 3e-3 if (name, args.optimizer) == ("lr", "adamw") else values[npz]
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, value))
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        x, y, x_test, y_test = load_data(args.data)
        n = len(x) * 9 // 10
        data = [x[:n], y[:n], *((x[n:], y[n:]) if args.validate else (x_test, y_test))]
        data = [t[: 300 if args.quick else None].to(args.device) for t in data]
        args.images, args.few = len(data[0]), min(args.few, len(data[0]))
        if args.batch_size > args.images or args.batch_size % world:
            raise ValueError(f"--batch-size must divide by {world} and be at most {args.images}")
        for name in ("optimizer", "seed", "few"):
            if getattr(args, name) != own.get(name, getattr(args, name)):
                raise ValueError(f"{args.load} was trained with --{name} {own[name]}")
        runs = build(args, int(y.max()) + 1)
        if len(data[1][runs["few labels"].rows].unique()) < 2:
            raise ValueError("the labelled images are all of one class; the probe needs two")
        for part in ("model", "optimizer"):
            for name, weights in ckpt.get(part + "s", {}).items():
                getattr(runs[name], part).load_state_dict(weights)
        for run in runs.values():
            group = run.optimizer.param_groups[0]
            group["wd" if "wd" in group else "weight_decay"] = args.weight_decay  # the flag's
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "simclr.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, ckpt, data, runs


def main(argv=None) -> int:
    args, ckpt, data, runs = parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    t0, rank, model, stop = time.time(), rank_and_world()[0], runs["SimCLR"].model, []
    if rank == 0:
        count = sum(p.numel() for p in model.encoder.parameters()) / 1e6
        kind = f"{os.path.basename(args.data)} {args.images}/{len(data[2])}"
        print(f"simclr | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}")
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(1))  # Ctrl-C: ends after a step
    try:
        done = train(runs, data[:2], args, ckpt, stop)["done"]
    except FloatingPointError as error:
        print(f"simclr.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank:
        return 0
    nets, table = {name: run.model.eval().encoder for name, run in runs.items()}, {}
    if stop:
        print("stopped by Ctrl-C; the table has what was trained so far")
    for k in ("few labels", "all labels"):
        encoders = {"raw pixels": nn.Identity(), "grey centred": grey_centred}
        encoders["random network"] = nets["random network"]
        encoders |= {"labels alone": nets[k]} if "all labels" in done else {}
        encoders |= {f"{name}, {done[name]} steps": nets[name] for name in SHORT if name in done}
        encoders |= {"SimCLR z": lambda x: model(x)[1], "SimCLR h": nets["SimCLR"]}
        for name, encoder in encoders.items():
            accs = evaluate(encoder, *(t[runs[k].rows] for t in data[:2]), *data[2:])
            table[name] = table.get(name, ()) + accs
    few, every = f"{args.few} labels", f"{args.images} labels"
    print(f"{'test accuracy':26} k-NN {few:>12} {every:>12} | linear {few:>12} {every:>12}")
    for name, (knn, linear, knn_all, linear_all) in table.items():
        print(f"{name:26} {knn:17.4f} {knn_all:12.4f} | {linear:19.4f} {linear_all:12.4f}")
    draw_picture(args, runs, data, table)
    parts = [f"{name} {row[1]:.4f}" for name, row in table.items() if "steps" not in name][::-1]
    print(f"test acc linear {few} {' | '.join(parts)} | {time.time() - t0:.0f} s")
    return 130 if stop else int(table["SimCLR h"][1] < args.target)


if __name__ == "__main__":
    sys.exit(main())
