"""MoCo: contrastive learning with small batches: the negatives wait in a queue.

Paper    Momentum Contrast for Unsupervised Visual Representation Learning -- Kaiming He, Haoqi Fan,
         Yuxin Wu, Saining Xie, Ross Girshick, November 2019, arXiv:1911.05722v3; and its v2 (MLP
         head, blur, cosine) -- Xinlei Chen, Haoqi Fan, Ross Girshick, Kaiming He, arXiv:2003.04297
Idea     A contrastive loss is a look-up: a view's query has to find the key of the other view among
         K others. A queue keeps the keys of past batches, so K doesn't depend on the batch. Old and
         new keys stay comparable as the key encoder is a slow average of the query encoder.
Figure   (Figure 2c, Algorithm 1)

         x_q (n, 3, H, W) -- f_q --> q (n, d) ----------+-- q k   (n, 1) --+
                              | |                       |                  +-- / T, softmax: the
         gradient <-----------+ | theta_k = m theta_k   +-- q queue (n, K) +   first is the answer
                                |         + (1 - m) theta_q     |
         x_k (n, 3, H, W) -- f_k --> k (n, d), no gradient -----+--> queue (d, K): the newest n in,
              shuffled among GPUs                                                  the oldest n out
Symbols  encoder_q, encoder_k | f_q, f_k | ResNets with their head fc     m | m | momentum, 0 to 1
         q, k | q, k+ | (n, d), length one       queue | k_1 .. k_K | (d, K), length one
         queue_ptr | - | the column to replace next      temperature | tau | > 0
Differs  Colour jitter is one 3 x 3 matrix per image, in a fixed order, hue as a turn in YIQ. With
         no GPUs to shuffle between, `--groups` parts of a batch are normalised apart, shuffled. The
         demo: a ResNet of three blocks, 1,161 digits, MLP head (v2), warm-up, stronger hue, crops
         from half the area on, rotation, no blur; m = .99 for its short training, K = 256 for its
         5,805 images, drawn with replacement: among thousands of keys many are of the same image.
Run      python moco.py                    # canvas digits, some 6 minutes on one core
         python moco.py --data cifar10.npz --save cifar.pt            # ResNet-18, long; a GPU
         torchrun --nproc-per-node 8 moco.py --data cifar10.npz       # shuffles across processes
Expect   Seeds 0-2, linear probe with 1,000 labels, unseen test digits: .792 +- .010, with
         all labels .833 +- .012 (k-NN .687 +- .039, .764 +- .026). The aim, .80, is missed by .01.
         Raw pixels .143, grey centred .149, random network .206 +- .022, the same network trained
         with the labels alone .829 +- .012. After 400 steps: m = 0 .200 +- .030, its loss stays at
         ln(K + 1); K = 16 .297 +- .018, K = 256 .335 +- .025 (the paper: m = 0 fails, a larger K
         helps). The temperature was chosen on validation digits, after test figures of tau = .2
         (.728, .751) had been seen. ImageNet, ResNet-50: 60.6 % (v1), 71.1 % (v2); not run.
"""

import argparse
import copy
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

# ---- 1. Views: MoCo v1's are the paper's [Technical details], v2 adds blur ----


def augment(x: Tensor, u: Tensor, crop=0.2, rotate=0.0, flip=0.5, jitter=0.4, hue=0.4, grey=0.2,
            blur=0.0) -> Tensor:  # fmt: skip
    """Random views of images x (B, 3, H, W) in [0, 1], as u (B, 16), uniform in [0, 1), says.

    crop: least share of the area, resized back, aspect 3/4 to 4/3; rotate: degrees either way;
    flip, grey, blur: probabilities; jitter: brightness, contrast and saturation by factors of up to
    1 +- jitter, and hue by up to this share of the circle, in 4 of 5 views. The defaults are v1's;
    v2: hue .1, blur .5. All geometry is one warp, all colour one 3 x 3 matrix per image.
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


# ---- 2. Encoders f_q and f_k: a ResNet (arXiv:1512.03385) with its head as `fc` ----


class Block(nn.Module):
    """Basic, two 3 x 3, or bottleneck, 1 x 1, 3 x 3, 1 x 1: (B, c_in, H, W) -> (B, c, H', W')."""

    def __init__(self, c_in: int, c: int, stride: int, bottleneck: bool):
        super().__init__()
        a, out = (c_in, c), c * (4 if bottleneck else 1)
        self.conv1 = nn.Conv2d(*a, 1 if bottleneck else 3, 1 if bottleneck else stride,
                               0 if bottleneck else 1, bias=False)  # fmt: skip
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride if bottleneck else 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, out, 1, bias=False) if bottleneck else None
        self.bn3 = nn.BatchNorm2d(out) if bottleneck else None
        self.downsample = None
        if stride > 1 or c_in != out:
            conv = nn.Conv2d(c_in, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.conv3 is not None:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> fc of the features h (B, D), the mean over the last map's places.

    head: "linear" (MoCo), "mlp" (v2) to `dim` outputs, or "none". stem: "imagenet" (7 x 7, stride
    2, max-pool), "cifar" (3 x 3, stride 1, no pool) or "small" (3 x 3, stride 2, max-pool). Names
    and shapes are torchvision's, and those of the official checkpoints.
    """

    def __init__(self, layers=(2, 2, 2, 2), width=64, bottleneck=False, stem="cifar", dim=128,
                 head="linear"):  # fmt: skip
        super().__init__()
        k, stride = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}[stem]
        self.conv1 = nn.Conv2d(3, width, k, stride, k // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool, self.depth, c_in = stem != "cifar", len(layers), width
        for i, n in enumerate(layers):
            c, blocks = width * 2**i, []
            for j in range(n):
                blocks.append(Block(c_in, c, 2 if i and not j else 1, bottleneck))
                c_in = c * (4 if bottleneck else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        mlp = [nn.Linear(c_in, c_in), nn.ReLU()] if head == "mlp" else []
        self.fc, self.dim = nn.Sequential(*mlp, nn.Linear(c_in, dim)), c_in
        if head != "mlp":
            self.fc = self.fc[0] if head == "linear" else nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.pool else x
        for i in range(self.depth):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


ENCODERS = {
    "small": partial(ResNet, (1, 1, 1), 32, stem="small"),
    "resnet18": ResNet,
    "resnet50": partial(ResNet, (3, 4, 6, 3), bottleneck=True),
}


# ---- 3. Momentum Contrast (Section 3, Algorithm 1) ----


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """Eq. 1: q, k (n, d) and queue (d, K) of length one -> (). At chance it is ln(K + 1).

    Each q is to pick its own k among it and the K keys of other, earlier images.
    """
    l_pos = (q * k).sum(1, keepdim=True)  # (n, 1)
    l_neg = q @ queue  # (n, K)
    logits = torch.cat([l_pos, l_neg], 1) / temperature
    return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))


class MoCo(nn.Module):
    """encoder_q learns by gradient, encoder_k follows it, the queue remembers K of its keys.

    groups: in how many parts a process normalises a batch (batch norm), as that many GPUs would;
    with 1 group on 1 process shuffling does nothing, and a query's own key is in its statistics.
    """

    def __init__(self, encoder: nn.Module, dim=128, K=65536, m=0.999, temperature=0.07, groups=1):
        super().__init__()
        self.encoder_q, self.m, self.temperature, self.groups = encoder, m, temperature, groups
        # the same weights at the start; no gradient ever (Section 3.2)
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, x_q: Tensor, x_k: Tensor, shuffle: Tensor) -> tuple[Tensor, Tensor]:
        """Views of my images (n, 3, H, W), a permutation of all N -> my loss, all keys (N, d)."""
        rank, world = rank_and_world()
        q = F.normalize(self.grouped(self.encoder_q, x_q), dim=1)
        with torch.no_grad():  # no gradient to keys: encoder_k only follows (Eq. 2)
            k = self.keys(x_k, shuffle)
        loss = info_nce(q, k.chunk(world)[rank], self.queue.clone(), self.temperature)
        return loss, k

    @torch.no_grad()
    def keys(self, x_k: Tensor, shuffle: Tensor) -> Tensor:
        """Shuffled BN (Section 3.3): keys are normalised in the company of other images' keys.

        Beside its query's, the group's statistics would tell which key belongs: a short cut.
        """
        rank, world = rank_and_world()
        mine = gather(x_k)[shuffle].chunk(world)[rank]
        k = F.normalize(self.grouped(self.encoder_k, mine), dim=1)
        return gather(k)[shuffle.argsort()]

    def grouped(self, encoder: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([encoder(part) for part in x.chunk(self.groups)])

    @torch.no_grad()
    def update_key_encoder(self):
        """Eq. 2. Batch norm's running statistics are each encoder's own."""
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.lerp_(q, 1 - self.m)  # theta_k = m theta_k + (1 - m) theta_q

    @torch.no_grad()
    def enqueue(self, k: Tensor):
        """k (N, d) replaces the oldest N keys: first in, first out, round the end if need be."""
        K, N = self.queue.shape[1], len(k)
        place = (self.queue_ptr + torch.arange(N, device=k.device)) % K
        self.queue[:, place[-K:]] = k[-K:].T  # of a batch larger than the queue the last K stay
        self.queue_ptr.copy_((self.queue_ptr + N) % K)

    @classmethod
    def from_checkpoint(cls, path: str, **kwargs) -> "MoCo":
        """The model of an official file, {"state_dict": {"module.encoder_q.conv1.weight": ...}}."""
        w = torch.load(path, map_location="cpu", weights_only=True)
        w = {k.removeprefix("module."): v for k, v in w.get("state_dict", w).items()}
        if "encoder_q.conv1.weight" not in w:
            raise ValueError(f"{path} has no weights of MoCo")
        names, q = {tuple(k.split(".")[1:3]) for k in w}, "encoder_q."
        layers = [sum(n[:1] == (f"layer{i}",) for n in names) for i in range(1, 5)]
        width, _, side, _ = w[q + "conv1.weight"].shape
        mlp, stem = q + "fc.2.weight" in w, "imagenet" if side == 7 else "cifar"
        dim = len(w[q + ("fc.2.bias" if mlp else "fc.bias")])
        encoder = ResNet([n for n in layers if n], width, q + "layer1.0.conv3.weight" in w, stem,
                         dim, "mlp" if mlp else "linear")  # fmt: skip
        model = cls(encoder, dim, w["queue"].shape[1] if "queue" in w else 65536, **kwargs)
        if not any(k.startswith("encoder_k.") for k in w):  # a file of queries alone
            w |= {"encoder_k." + k.removeprefix(q): v for k, v in w.items() if k.startswith(q)}
        model.load_state_dict({"queue": model.queue, "queue_ptr": model.queue_ptr} | w)
        return model


# ---- 4. Many processes: keys come from all of them, gradients are averaged ----


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """x (n, ...) -> the x of all processes (N, ...), without gradient: keys need none."""
    parts = [torch.empty_like(x) for _ in range(rank_and_world()[1])]
    if len(parts) == 1:
        return x
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


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
Run = namedtuple("Run", "model optimizer steps lr labels")  # labels: how many it may see


def build(args, classes: int) -> dict:
    """-> runs by name: MoCo, short ones for Section 4.1, the network trained with labels."""
    runs, head = {}, {"dim": args.dim, "head": args.head}
    for name, m, K, steps, labels in (
        ("MoCo", args.m, args.queue, args.steps, 0),
        ("m = 0", 0.0, args.queue, args.short, 0),
        ("small K", args.m, args.small_queue, args.short, 0),
        ("large K", args.m, args.queue, args.short, 0),
        ("few labels", 0, 0, args.label_steps, args.few),
        ("all labels", 0, 0, args.label_steps, args.images),
    ):
        if steps:
            torch.manual_seed(args.seed)
            model = ENCODERS[args.encoder](**({"dim": classes} if labels else head))
            if not labels:
                model = MoCo(model, args.dim, K, m, args.temperature, args.groups)
            model = model.to(args.device, memory_format=torch.channels_last)
            params = [p for p in model.parameters() if p.requires_grad]
            if args.optimizer == "sgd" and not labels:
                lr, optimizer = args.lr, torch.optim.SGD(params, args.lr, 0.9)
            else:
                lr = 3e-3 if labels else args.lr
                optimizer = torch.optim.AdamW(params, lr)
            optimizer.param_groups[0]["weight_decay"] = args.weight_decay
            runs[name] = Run(model, optimizer, steps, lr, labels)
    return runs


def train(runs, data, args, done=(), history=()):
    """Trains one run after the other -> steps done by name, [(name, step, loss)], stopped."""
    from tqdm import tqdm

    (x, y), (rank, world), stop = data, rank_and_world(), []
    done, history = dict(done), list(history)
    views = {name: getattr(args, name) for name in VIEWS}
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(1))  # Ctrl-C: ends after a step
    try:
        for name, (model, optimizer, steps, lr, labels) in runs.items():
            first, t0, known = done.get(name, 0), time.time(), labelled(x, labels, args.seed)
            model.train()
            for step in tqdm(range(first + 1, steps + 1), name, disable=rank > 0 or None):
                g = torch.Generator().manual_seed(args.seed * 10**10 + step)
                rows = torch.randint(labels or len(x), (args.batch_size,), generator=g)
                u = torch.rand(2, args.batch_size, 16, generator=g).chunk(world, 1)[rank]
                shuffle = torch.randperm(args.batch_size, generator=g).to(x.device)
                rows = rows.chunk(world)[rank].to(x.device)
                if labels:
                    rows = known[rows]
                    views_1 = augment(to_float(x[rows]), u[0], **views)
                    loss = F.cross_entropy(model(views_1), y[rows])
                else:
                    both = to_float(x[rows]).repeat(2, 1, 1, 1)
                    x_q, x_k = augment(both, u.flatten(0, 1), **views).chunk(2)
                    loss, k = model(x_q, x_k, shuffle)  # Eq. 1
                rate = min(1.0, step / max(1, args.warmup * steps))
                for group in optimizer.param_groups:
                    group["lr"] = lr * rate * (1 + math.cos(math.pi * step / steps)) / 2
                optimizer.zero_grad(); loss.backward()  # fmt: skip
                now, stopped, norm = average(model, loss.item(), float(len(stop)))
                if not math.isfinite(now + norm):
                    raise FloatingPointError(f"{name}: loss {now}, gradient {norm} at step {step}")
                optimizer.step()
                if not labels:
                    model.update_key_encoder()  # Eq. 2
                    model.enqueue(k)  # and dequeue: the oldest are overwritten
                if stopped or step % args.log_every == 0 or step == steps:
                    history.append((name, step, now))
                    done[name], ms = step, (time.time() - t0) / (step - first) * 1e3
                    if rank == 0:
                        row = f"step {step:5d}/{steps} | {name} loss {now:.4f}"
                        row += "" if labels else f" ({math.log(model.queue.shape[1] + 1):.2f})"
                        tqdm.write(f"{row} | {ms:.0f} ms/step")
                    if rank == 0 and args.save:
                        save(args, runs, done, history)
                if stopped:
                    return done, history, True
    finally:
        signal.signal(signal.SIGINT, before)
    return done, history, False


def save(args, runs, done, history):
    """Writes the checkpoint beside its place, then moves it there: a crash leaves the old one."""
    state = {"script": "moco", "args": vars(args), "step": done.get("MoCo", 0)}
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
def draw_picture(args, runs, history, data, table):
    """Views, loss beside ln(K + 1), the features in the plane, accuracies."""
    from matplotlib.figure import Figure  # without pyplot no window is opened
    from sklearn.manifold import TSNE

    x, _, x_test, y_test = data
    fig = Figure(figsize=(15, 7.5), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1, 1.5])
    g, views = torch.Generator().manual_seed(args.seed), {n: getattr(args, n) for n in VIEWS}
    image = to_float(x[torch.randperm(len(x), generator=g)[:14].to(x.device)])
    pair = [augment(image, torch.rand(len(image), 16, generator=g), **views) for _ in range(2)]
    for j, axis in enumerate(top.subplots(3, 14).T.flat):
        axis.imshow([image, *pair][j % 3][j // 3].permute(1, 2, 0).cpu())
        axis.set(xticks=[], yticks=[], ylabel=("image", "query", "key")[j] if j < 3 else "")
    a, b, c = bottom.subplots(1, 3, width_ratios=[1.3, 1, 1.1])
    for i, (name, run) in enumerate((n, r) for n, r in runs.items() if not r.labels):
        K = run.model.queue.shape[1]
        rows = [(step, loss) for n, step, loss in history if n == name]
        a.plot(*zip(*rows), f"C{i}.-", label=f"{name} (m {run.model.m}, K {K})")
        a.axhline(math.log(K + 1), color=f"C{i}", ls=":")
    a.set(title="loss; dotted: ln(K + 1), chance", xlabel="step", ylim=(0, None))
    a.legend()
    model = runs["MoCo"].model.encoder_q
    h = torch.tensor(features(model.features, x_test[:900]))
    place = TSNE(perplexity=min(30, len(h) / 4), random_state=0).fit_transform(
        F.normalize(h, dim=1)
    )
    b.scatter(*place.T, c=y_test[: len(h)].cpu(), cmap="tab10", s=6)
    b.set(title="features of unseen images (t-SNE), by class", xticks=[], yticks=[])
    bars = c.barh(list(table), [row[1] for row in table.values()], color="tab:blue")
    c.bar_label(bars, fmt="%.2f")
    c.invert_yaxis()
    c.set(title=f"linear probe, {args.few} labels", xlim=(0, 1.1))
    fig.savefig(os.path.join(args.out, "moco.png"), dpi=80)


# ---- 8. Command line ----

DEFAULTS = {  # on digits, on an npz, least, most, meaning and the paper's value
    "seed": (0, 0, 0, 10**8, "of weights, batches, views, labels"),
    "log_every": (100, 200, 1, math.inf, "steps between log lines"),
    "steps": (6000, 35000, 1, math.inf, "paper: 200 epochs of ImageNet"),
    "short": (400, 0, 0, math.inf, "steps of each ablation, 0: none"),
    "label_steps": (300, 4000, 0, math.inf, "steps with labels alone, 0: none"),
    "few": (1000, 1000, 10, math.inf, "labels of the first two columns"),
    "batch_size": (64, 256, 2, math.inf, "images over all processes (paper: 256)"),
    "groups": (2, 4, 1, math.inf, "parts of a process's batch for batch norm (paper: 8 GPUs)"),
    "lr": (0.1, 0.03, 1e-12, 1e32, "peak rate (paper: 0.03)"),
    "weight_decay": (1e-4, 5e-4, 0, 99, "decay (paper: 1e-4)"),
    "warmup": (0.05, 0.0, 0, 1, "share of the steps over which the rate rises (paper: 0)"),
    "temperature": (0.1, 0.1, 1e-3, 99, "tau (paper: 0.07, v2: 0.2)"),
    "m": (0.99, 0.99, 0, 1, "momentum of the key encoder (paper: 0.999)"),
    "queue": (256, 4096, 1, math.inf, "its length K (paper: 65536)"),
    "small_queue": (16, 64, 1, math.inf, "K of the ablation"),
    "dim": (64, 128, 1, math.inf, "width of q and k (paper: 128)"),
    "crop": (0.5, 0.2, 0.01, 1, "least area of a crop, 1: none (paper: 0.2)"),
    "rotate": (20.0, 0.0, 0, 180, "degrees (paper: 0)"),
    "flip": (0.0, 0.5, 0, 1, "probability (paper: 0.5)"),
    "jitter": (0.5, 0.4, 0, 1, "brightness, contrast, saturation (paper: 0.4)"),
    "hue": (0.5, 0.1, 0, 0.5, "share of the colour circle (paper: 0.4, v2: 0.1)"),
    "grey": (0.4, 0.2, 0, 1, "probability (paper: 0.2)"),
    "blur": (0.0, 0.0, 0, 1, "probability (paper: 0, v2: 0.5)"),
}


def parse(argv):
    """-> args, checkpoint or {}, data, runs. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or FILE.npz in the format of Keras's cifar10")
    for name, (value, npz, _, _, text) in DEFAULTS.items():
        text = f"default {value}, npz {npz}: {text}"
        flag(f"--{name.replace('_', '-')}", type=type(value), help=text)
    flag("--encoder", choices=list(ENCODERS), help="default small, npz resnet18 (paper: resnet50)")
    flag("--head", choices=["linear", "mlp"], help="default mlp, of v2 (paper: linear)")
    flag("--optimizer", choices=["adamw", "sgd"], help="default sgd (paper: sgd)")
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
            if not isinstance(ckpt, dict) or ckpt.get("script") != "moco":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own, npz = ckpt.get("args", {}), (args.data or "").endswith(".npz")
        npz = npz or not args.data and own.get("data", "digits") != "digits"
        quick = (
            {"steps": 4, "short": 2, "label_steps": 2, "batch_size": 16, "queue": 40}
            if args.quick
            else {}
        )
        default = {name: value[npz] for name, value in DEFAULTS.items()} | quick
        default |= {"data": "digits", "encoder": "resnet18" if npz else "small"}
        default |= {"optimizer": "sgd", "head": "mlp"}
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
        parts = world * args.groups
        if args.batch_size > args.images or args.batch_size % parts or args.batch_size < 2 * parts:
            raise ValueError(
                f"--batch-size: at most {args.images}, a multiple of {parts}, not {parts}"
            )
        runs = build(args, int(y.max()) + 1)
        for name, run in runs.items() if own else ():
            run.model.load_state_dict(ckpt["models"][name])
            run.optimizer.load_state_dict(ckpt["optimizers"][name])
        if args.save and os.path.isdir(args.save):
            raise ValueError(f"--save {args.save} is a folder")
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save and args.save + ".tmp", args.out + "/moco.png")):
            open(path, "ab").close()  # fails now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, ckpt, [t.to(args.device) for t in data], runs


def main(argv=None) -> int:
    args, ckpt, data, runs = parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    t0, rank = time.time(), rank_and_world()[0]
    count = sum(p.numel() for p in runs["MoCo"].model.encoder_q.parameters()) / 1e6
    if rank == 0:
        kind = f"{args.data} {args.images}/{len(data[2])}"
        print(f"moco | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}")
    try:
        state = ckpt.get("done", {}), ckpt.get("history", [])
        done, history, stopped = train(runs, data[:2], args, *state)
    except FloatingPointError as error:
        print(f"moco.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank:
        return 0
    nets = {name: run.model if run.labels else run.model.encoder_q for name, run in runs.items()}
    nets["start"] = build(args, 1)["MoCo"].model.encoder_q
    nets = {name: net.eval().features for name, net in nets.items()}
    encoders = {"raw pixels": lambda x: x, "grey centred": grey_centred}
    encoders["random network"] = nets["start"]
    if args.label_steps:
        kinds = {args.few: nets["few labels"], args.images: nets["all labels"]}
        encoders["labels alone"] = kinds
    short = ("m = 0", "small K", "large K") if args.short else ()
    encoders |= {f"{name}, {args.short} steps": nets[name] for name in short}
    encoders["MoCo"] = nets["MoCo"]
    table = evaluate(encoders, data, args.few, args.seed)
    few, every = f"{args.few} labels", f"{args.images} labels"
    print(f"{'test accuracy':26} k-NN {few:>12} {every:>12} | linear {few:>12} {every:>12}")
    for name, (knn, linear, knn_all, linear_all) in table.items():
        print(f"{name:26} {knn:17.4f} {knn_all:12.4f} | {linear:19.4f} {linear_all:12.4f}")
    draw_picture(args, runs, history, data, table)
    parts = [f"{name} {row[1]:.4f}" for name, row in table.items() if "steps" not in name][::-1]
    print(f"test acc linear {few} {' | '.join(parts)} | {time.time() - t0:.0f} s")
    missed = args.target is not None and table["MoCo"][1] < args.target
    return 130 if stopped else int(missed)


if __name__ == "__main__":
    sys.exit(main())
