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
Run      python moco.py                    # canvas digits, 6 minutes on 2 cores, 10 on one
         python moco.py --data cifar10.npz --amp --save cifar.pt      # ResNet-18, long; a GPU
         python moco.py --data cifar10.npz --encoder small --lr 0.1 --warmup 0.05 --steps 12000
                --label-steps 2000                                    # 46 minutes of one core
         torchrun --nproc-per-node 8 moco.py --data cifar10.npz       # shuffles across processes
Expect   Seeds 0-2, linear probe with 1,000 labels, unseen test digits: .828 +- .020, with all
         labels .869 +- .007 (k-NN .714 +- .015, .789 +- .014). Raw pixels .143, grey centred .149,
         random network .206 +- .022, the same network trained with the labels alone .837 +- .013.
         After 400 steps: m = 0 .195 +- .024, its loss stays at ln(K + 1); K = 16 .291 +- .024, K =
         256 .350 +- .036 (the paper: m = 0 fails, a larger K helps). The temperature was chosen on
         validation digits, after test figures of tau = .2 (.728, .751) had been seen, the number of
         steps after 6,000 had given .792. CIFAR-10 (a JPEG copy), the 46 minutes' command, seed 0,
         68 epochs: with all labels linear .598, k-NN .566; random network .404, .328, raw pixels
         .396, .354, labels alone .721, .700; with 1,000 labels .457, .424 (the others .295, .244;
         .264, .233; .547, .540). Elsewhere: lightly's ResNet-18, 200 epochs, k-NN .847; ImageNet,
         ResNet-50, .606, v2 .711; not run.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
import warnings
from collections import Counter, namedtuple
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Views: v1's [Technical details], but colours in 4 of 5 as in v2, which adds blur ----


def augment(x: Tensor, u: Tensor, crop=0.2, rotate=0.0, flip=0.5, jitter=0.4, hue=0.4, grey=0.2,
            blur=0.0) -> Tensor:  # fmt: skip
    """Random views of images x (B, 3, H, W) in [0, 1], as u (B, 16), uniform in [0, 1), says. crop:
    least share of the area, resized back, aspect 3/4 to 4/3; rotate: degrees either way; flip,
    grey, blur: probabilities; jitter: brightness, contrast, saturation by factors of up to 1 +-
    jitter, hue by up to this share of the circle, in 4 of 5 views. v2: hue .1, blur .5."""
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


# ---- 2. Encoders f_q and f_k: a ResNet (arXiv:1512.03385) with its head as `fc` ----


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
            self.add_module(f"bn{i}", nn.BatchNorm2d(out))
        self.downsample, self.bottleneck = nn.Sequential(), bottleneck  # empty: the identity
        if stride > 1 or c_in != out:
            self.downsample.append(nn.Conv2d(c_in, out, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = self.bn3(self.conv3(F.relu(y))) if self.bottleneck else y
        return F.relu(y + self.downsample(x))


class ResNet(nn.Sequential):
    """Images (B, 3, H, W) -> fc of the features h (B, D), the mean over places of the last map.
    stem: "imagenet" (7 x 7, stride 2, max-pool), "cifar" (3 x 3, stride 1, no pool) or "small"
    (3 x 3, stride 2, max-pool). head, to `dim` outputs: "linear" (MoCo), "mlp" (v2); or "none".
    Names and shapes are torchvision's, and those of the official checkpoints."""

    def __init__(self, layers=(2, 2, 2, 2), width=64, bottleneck=False, stem="cifar", dim=128,
                 head="linear"):  # fmt: skip
        super().__init__()
        k, stride = {"imagenet": (7, 2), "cifar": (3, 1), "small": (3, 2)}[stem]
        self.conv1 = nn.Conv2d(3, width, k, stride, k // 2, bias=False)
        self.bn1, self.relu, self.dim = nn.BatchNorm2d(width), nn.ReLU(), width
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
        mlp = [nn.Linear(self.dim, self.dim), nn.ReLU()] if head == "mlp" else []
        fc = nn.Linear(self.dim, dim)
        self.fc = nn.Identity() if head == "none" else nn.Sequential(*mlp, fc) if mlp else fc

    def features(self, x: Tensor) -> Tensor:
        for module in list(self)[:-1]:  # all but fc
            x = module(x)
        return x


ENCODERS = {"small": partial(ResNet, (1, 1, 1), 32, stem="small"), "resnet18": ResNet}
ENCODERS["resnet50"] = partial(ResNet, (3, 4, 6, 3), bottleneck=True)


# ---- 3. Momentum Contrast (Section 3, Algorithm 1) ----


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """Eq. 1: q, k (n, d) and queue (d, K) of length one -> (). At chance it is ln(K + 1). Each q is
    to pick its own k out of K + 1: that one and the K keys in the queue."""
    l_pos = (q * k).sum(1, keepdim=True)  # (n, 1)
    l_neg = q @ queue  # (n, K)
    logits = torch.cat([l_pos, l_neg], 1) / temperature
    return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))


class MoCo(nn.Module):
    """encoder_q learns by gradient, encoder_k follows it, the queue remembers K of its keys. In
    `groups` parts a process normalises a batch (batch norm), as that many GPUs would; with 1 group
    on 1 process shuffling does nothing: a query and its key are normalised over the same images."""

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
        """Shuffled BN (Section 3.3): a key is normalised among other images than its query. Among
        the same ones the statistics would tell which key belongs: a short cut."""
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
        k = k[-K:].to(self.queue)  # the last K, if there are more; autocast's are bfloat16
        self.queue[:, place[-K:]] = k.T
        self.queue_ptr.copy_((self.queue_ptr + N) % K)

    @classmethod
    def from_checkpoint(cls, path: str, **kwargs) -> "MoCo":
        """The model of an official file, {"state_dict": {"module.encoder_q.conv1.weight": ...}}."""
        w, q = torch.load(path, map_location="cpu", weights_only=True), "encoder_q."
        w = {k.removeprefix("module."): v for k, v in w.get("state_dict", w).items()}
        if q + "conv1.weight" not in w:
            raise ValueError(f"{path} has no weights of MoCo")
        blocks = {tuple(k.split(".")[1:3]) for k in w if k.startswith(q + "layer")}
        layers = [*Counter(layer for layer, _ in sorted(blocks)).values()]  # blocks in each
        width, _, side, _ = w[q + "conv1.weight"].shape
        last, stem = q + "fc.2.bias", "imagenet" if side == 7 else "cifar"
        head, last = ("mlp", last) if last in w else ("linear", q + "fc.bias")
        size = layers, width, q + "layer1.0.conv3.weight" in w, stem, len(w[last])
        encoder = ResNet(*size, head)
        encoder.load_state_dict({k.removeprefix(q): v for k, v in w.items() if k.startswith(q)})
        model = cls(encoder, len(w[last]), w["queue"].shape[1] if "queue" in w else 65536, **kwargs)
        model.load_state_dict(model.state_dict() | w)  # a file of queries alone: its keys are they
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
Run = namedtuple("Run", "model optimizer views steps rows labels")  # rows: those it may see


def build(args, classes: int) -> dict:
    """-> runs by name: MoCo, short ones for Section 4.1, the network trained with labels."""
    order = torch.randperm(args.images, generator=torch.manual_seed(args.seed)).to(args.device)
    every, views, runs = order.sort().values, {name: getattr(args, name) for name in VIEWS}, {}
    for name, m, K, steps, rows, labels in (
        ("MoCo", args.m, args.queue, args.steps, every, False),
        ("random network", args.m, args.queue, 0, every, False),
        ("m = 0", 0.0, args.queue, args.short, every, False),
        ("small K", args.m, args.small_queue, args.short, every, False),
        ("large K", args.m, args.queue, args.short, every, False),
        ("few labels", 0, 0, args.label_steps, order[: args.few], True),
        ("all labels", 0, 0, args.label_steps, order, True),
    ):
        torch.manual_seed(args.seed)  # one start for all
        head = {"dim": classes} if labels else {"dim": args.dim, "head": args.head}
        model = ENCODERS[args.encoder](**head)
        if not labels:
            model = MoCo(model, args.dim, K, m, args.temperature, args.groups)
        model = model.to(args.device, memory_format=torch.channels_last)
        sgd = args.optimizer == "sgd" and not labels
        kind = partial(torch.optim.SGD, momentum=0.9) if sgd else torch.optim.AdamW
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = kind(params, args.lr, weight_decay=args.weight_decay)
        runs[name] = Run(model, optimizer, views, steps, rows, labels)
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
            shuffle = torch.randperm(args.batch_size, generator=g).to(x.device)
            i, k = rows[i.to(x.device)], 1 if labels else 2
            both = augment((x[i] / 255).repeat(k, 1, 1, 1), u[:k].flatten(0, 1), **views)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
                if labels:
                    loss = F.cross_entropy(model(both), y[i])
                else:
                    loss, keys = model(*both.chunk(2), shuffle)  # Eq. 1
            rate = (3e-3 if labels else args.lr) * min(1, step / max(1, args.warmup * steps))
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad(); loss.backward()  # fmt: skip
            now = loss.new_tensor([loss.item(), len(stop)])  # all stop at one step
            grads = [p.grad for p in optimizer.param_groups[0]["params"]]
            for t in (now, *grads) if world > 1 else ():  # their means over the processes
                dist.all_reduce(t.div_(world))
            (loss, stopped), norm = now.tolist(), nn.utils.get_total_norm(grads).item()
            if not math.isfinite(loss + norm):
                raise FloatingPointError(f"{name}: loss {loss}, gradient {norm} at step {step}")
            optimizer.step()
            if not labels:
                model.update_key_encoder()  # Eq. 2
                model.enqueue(keys)  # and dequeue: the oldest are overwritten
            if stopped or step % args.log_every == 0 or step == steps:
                state["done"][name], ms = step, (time.time() - t0) / (step - first) * 1e3
                state["history"].append((name, step, loss))
                state["models"][name] = model.state_dict()
                state["optimizers"][name] = optimizer.state_dict()
                state |= {"script": "moco", "args": vars(args), "step": state["done"]["MoCo"]}
                if rank == 0:
                    row = f"step {step:5d}/{steps} | {name} loss {loss:.4f}"
                    row += "" if labels else f" ({math.log(model.queue.shape[1] + 1):.2f})"
                    tqdm.write(f"{row} | {ms:.0f} ms/step")
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
def draw_picture(args, runs, history, data, table):
    """Views, loss beside ln(K + 1), the features in the plane, accuracies."""
    from matplotlib.figure import Figure  # without pyplot no window is opened
    from sklearn.manifold import TSNE

    (x, _, x_test, y_test), g = data, torch.Generator().manual_seed(args.seed)
    image = x[torch.randperm(len(x), generator=g)[:17].to(x.device)] / 255
    u = torch.rand(2, len(image), 16, generator=g)
    pair = [augment(image, numbers, **runs["MoCo"].views) for numbers in u]
    fig = Figure(figsize=(15, 7.5), layout="constrained")
    axes = fig.subplot_mosaic("vvv;lhp", height_ratios=[1, 1.5], width_ratios=[1.3, 1, 1.1])
    strip = torch.stack([image, *pair]).permute(0, 3, 1, 4, 2)  # (3, H, n, W, 3)
    axes["v"].imshow(strip.flatten(2, 3).flatten(0, 1).cpu())
    axes["v"].set(title="images, above query and key of each", xticks=[], yticks=[])
    for i, name in enumerate(dict.fromkeys(n for n, *_ in history if not runs[n].labels)):
        m, K = runs[name].model.m, runs[name].model.queue.shape[1]
        rows = [(step, loss) for n, step, loss in history if n == name]
        axes["l"].plot(*zip(*rows), f"C{i}.-", label=f"{name} (m {m}, K {K})")
        axes["l"].axhline(math.log(K + 1), color=f"C{i}", ls=":")
    axes["l"].set(title="loss; dotted: ln(K + 1), chance", xlabel="step", ylim=(0, None))
    axes["l"].legend()
    h = F.normalize(runs["MoCo"].model.encoder_q.features(x_test[:900] / 255), dim=1).cpu()
    place = TSNE(perplexity=min(30, len(h) / 4), random_state=0).fit_transform(h)
    axes["h"].scatter(*place.T, c=y_test[: len(h)].cpu(), cmap="tab10", s=6)
    axes["h"].set(title="features of unseen images (t-SNE), by class", xticks=[], yticks=[])
    bars = axes["p"].barh(list(table), [row[1] for row in table.values()], color="tab:blue")
    axes["p"].bar_label(bars, fmt="%.2f")
    axes["p"].invert_yaxis()
    axes["p"].set(title=f"linear probe, {args.few} labels", xlim=(0, 1.1))
    fig.savefig(os.path.join(args.out, "moco.png"), dpi=80)


QUICK = {"steps": 4, "short": 2, "label_steps": 2, "batch_size": 16, "queue": 40}  # --quick
DEFAULTS = {  # on digits, on an npz, least, most, meaning and the paper's value
    "seed": (0, 0, 0, 10**8, "of weights, batches, views, labels"),
    "log_every": (100, 200, 1, math.inf, "steps between log lines"),
    "steps": (8000, 35000, 1, math.inf, "paper: 200 epochs of ImageNet"),
    "short": (400, 0, 0, math.inf, "steps of each ablation, 0: none"),
    "label_steps": (300, 4000, 0, math.inf, "steps with labels alone, 0: none"),
    "few": (1000, 1000, 10, math.inf, "labels of the first two columns"),
    "batch_size": (64, 256, 2, math.inf, "images over all processes (paper: 256)"),
    "groups": (2, 4, 1, math.inf, "parts of a process's batch for batch norm (paper: 8 GPUs)"),
    "lr": (0.1, 0.03, 1e-12, 1e32, "peak rate (adamw 3e-3; paper: 0.03)"),
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
        text = f"default {value}{f', npz {npz}' * (npz != value)}: {text}"
        flag(f"--{name.replace('_', '-')}", type=type(value), help=text)
    flag("--encoder", choices=ENCODERS, help="default small, npz resnet18 (paper: resnet50)")
    flag("--head", choices=["linear", "mlp"], help="default mlp, of v2 (paper: linear)")
    flag("--optimizer", choices=["adamw", "sgd"], help="default sgd (paper: sgd)")
    flag("--amp", action="store_true", help="bfloat16 autocast in training, for GPUs")
    flag("--validate", action="store_true", help="judge on the last tenth of the training images")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint: the rest of its --steps is done, then it is judged")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, default=0, help="exit 1 if the linear probe (few labels) is lower")
    args, ckpt, world = parser.parse_args(argv), {}, int(os.environ.get("WORLD_SIZE", 1))
    try:
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda" and world > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=args.device)
        if args.load:
            ckpt = torch.load(args.load, map_location=args.device, weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "moco":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own = (QUICK if args.quick else {}) | ckpt.get("args", {})
        args.data = args.data or own.get("data", "digits")
        npz = args.data != "digits"
        args.encoder = args.encoder or own.get("encoder", ("small", "resnet18")[npz])
        args.optimizer = args.optimizer or own.get("optimizer", "sgd")
        args.head = args.head or own.get("head", "mlp")
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
        parts, size = world * args.groups, args.batch_size
        if size > args.images or size % parts or size < 2 * parts:
            raise ValueError(f"--batch-size: {parts} times 2 or more, at most {args.images}")
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
            run.optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # the flag goes first
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "moco.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, ckpt, data, runs


def main(argv=None) -> int:
    args, ckpt, data, runs = parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    t0, rank, model, stop = time.time(), rank_and_world()[0], runs["MoCo"].model.encoder_q, []
    if rank == 0:
        count = sum(p.numel() for p in model.parameters()) / 1e6
        kind = f"{os.path.basename(args.data)} {args.images}/{len(data[2])}"
        print(f"moco | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}")
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(1))  # Ctrl-C: ends after a step
    try:
        state = train(runs, data[:2], args, ckpt, stop)
        done = state["done"]
    except FloatingPointError as error:
        print(f"moco.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank:
        return 0
    nets = {k: run.model if run.labels else run.model.encoder_q for k, run in runs.items()}
    nets, table = {name: net.eval().features for name, net in nets.items()}, {}
    if stop:
        print("stopped by Ctrl-C; the table has what was trained so far")
    for k in ("few labels", "all labels"):
        encoders = {"raw pixels": nn.Identity(), "grey centred": grey_centred}
        encoders["random network"] = nets["random network"]
        encoders |= {"labels alone": nets[k]} if "all labels" in done else {}
        short = [name for name in ("m = 0", "small K", "large K") if name in done]
        encoders |= {f"{name}, {done[name]} steps": nets[name] for name in short}
        encoders["MoCo"] = nets["MoCo"]
        for name, encoder in encoders.items():
            accs = evaluate(encoder, *(t[runs[k].rows] for t in data[:2]), *data[2:])
            table[name] = table.get(name, ()) + accs
    few, every = f"{args.few} labels", f"{args.images} labels"
    print(f"{'test accuracy':26} k-NN {few:>12} {every:>12} | linear {few:>12} {every:>12}")
    for name, (knn, linear, knn_all, linear_all) in table.items():
        print(f"{name:26} {knn:17.4f} {knn_all:12.4f} | {linear:19.4f} {linear_all:12.4f}")
    draw_picture(args, runs, state["history"], data, table)
    parts = [f"{name} {row[1]:.4f}" for name, row in table.items() if "steps" not in name][::-1]
    print(f"test acc linear {few} {' | '.join(parts)} | {time.time() - t0:.0f} s")
    return 130 if stop else int(table["MoCo"][1] < args.target)


if __name__ == "__main__":
    sys.exit(main())
