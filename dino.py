"""DINO: a network taught by its own moving average, without labels and without collapse.

Paper    Emerging Properties in Self-Supervised Vision Transformers -- Mathilde Caron, Hugo Touvron,
         Ishan Misra, Herve Jegou, Julien Mairal, Piotr Bojanowski, Armand Joulin, April 2021,
         arXiv:2104.14294v2
Idea     A student names what it sees in a part of an image (K outputs, a softmax) and must agree
         with the teacher, its own slow average, who sees most of it. That both always say the same
         would satisfy them; centring the teacher's outputs keeps one name from taking all,
         sharpening keeps the names from becoming equal, and the two balance out.
Figure   (Figure 2; Algorithm 1)

         image (B, 3, H, W) -- random crops and colours --> 2 global (B, 3, H, W), V - 2 local views
           | all V views                                      | the 2 global views
         student g_s: ViT --> class token (B, D)            teacher g_t: the same, other weights
           | head: MLP, length one (B, 256), last_layer       | head
         s (V B, K) -- / tau_s, softmax --> P_s             t (2 B, K) -- - center, / tau_t, softmax
           |                                                  |                      --> P_t
           +----> cross-entropy of all pairs but equal views <+ no gradient
           | gradient                                         |
         theta_s -- theta_t <- m theta_t + (1 - m) theta_s ---+   center <- mean of t, slowly
Symbols  student, teacher | g_s, g_t | backbone and head: images (B, 3, H, W) -> (B, K)
         s, t | g_s(x'), g_t(x) | outputs (V B, K), (2 B, K)   center | c | (1, K), mean of t
         tau_s, tau_t | tau_s, tau_t | temperatures        P_s, P_t | P_s, P_t | softmax (n, B, K)
         m | lambda | momentum of the teacher              center_momentum | m | of the centre
         K | K | outputs                                   A | A | attention (B, h, N + 1, N + 1)
Differs  The demo balances the teacher's outputs by Sinkhorn-Knopp (--balance center: Eq. 4): with
         the centre a short run learned hardly more than place and size (see Expect). The teacher's
         momentum starts at .8: a short run needs many generations. The head has batch norm (--head
         plain: the paper's), the backbone starts with convolutions (--stem patch). No local crops
         (--local-views): a third of a canvas shows no digit. Rotation and more hue, no blur, no
         solarising, no flips. Weights start at Xavier's scale. Warm-up and cosine multiply.
Run      python dino.py                    # canvas digits, 8 minutes on one core
         python dino.py --data cifar10.npz --dim 96 --depth 3 --K 512 --momentum 0.9 --crop 0.4
                --rotate 0 --flip 0.5 --hue 0.1 --grey 0.2 --short 0 --steps 9000
                --label-steps 1000                              # 43 minutes of one core
         python dino.py --load dino_deitsmall8_pretrain.pth --data FOLDER   # official: attention
         torchrun --nproc-per-node 8 dino.py --data cifar10.npz             # splits the batch
Expect   Seeds 0-2, unseen digits; choices made on validation digits. Linear probe, 1,000 labels:
         teacher .827 +- .040, random network .177 +- .006, grey centred pixels .149, labels alone
         (300 steps) .510 +- .063; all labels: .860 +- .030. k-NN: .730 +- .046, random .130, grey
         .502 (all labels: .785 +- .051, .174, .737). Attention on the digit: .295 +- .100 of it, of
         the random network's .146, of the area .152. Balanced by the centre, on validation digits,
         seed 0: linear .211, k-NN .133. Collapse (Figure 7, 150 steps; ln K = 4.85): centring only,
         entropy 4.85, KL .00; sharpening only .06 +- .10, .07; both 2.27 +- .80, .89. CIFAR-10 (a
         JPEG copy), the 43 minutes' command, seed 0, 13 epochs: with all labels linear .559, k-NN
         .500; random network .357, .263, raw pixels .396, .354, labels alone .525, .475; with 1,000
         labels .487, .393 (the others .280, .215; .264, .233; .431, .424). Elsewhere: lightly's
         ResNet-18, 200 epochs, k-NN .813; ImageNet, ViT-S/16, .770, k-NN .745; not run.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
import warnings
from collections import OrderedDict, namedtuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

# ---- 1. A Vision Transformer for views of any size, with the names of vit.py ----


class Block(nn.Module):
    """One layer: (B, N, D) -> (B, N, D). The rows of `attn.qkv` are q, k, v, and in each head by
    head. A (B, h, N, N) goes into the list `weights`, if there is one."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads, hidden = heads, int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        attn = {"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)}
        mlp = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, dim)}
        self.attn, self.mlp = nn.ModuleDict(attn), nn.Sequential(OrderedDict(mlp))

    def forward(self, z: Tensor, weights: list | None = None) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(z)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, N, D_h)
        if weights is not None:
            weights.append(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1))
        y = F.scaled_dot_product_attention(q, k, v)  # A v
        z = z + self.attn["proj"](y.transpose(1, 2).flatten(2))
        return z + self.mlp(self.norm2(z))


def pair(x) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else tuple(x)


def xavier(layer: nn.Module):
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def conv_net(C: int, layers) -> nn.Sequential:
    """A stem: 3 x 3 convolutions, (B, C, H, W) -> (B, width, H', W'), of (width, stride) each."""
    net = nn.Sequential()
    for width, stride in layers:
        conv = nn.Conv2d(C, width, 3, stride, 1, bias=False)
        net, C = net.extend([conv, nn.GroupNorm(8, width), nn.ReLU()]), width
    return net


class ViT(nn.Module):
    """Images (B, in_chans, H, W) -> class token of the last layer (B, dim). H and W may differ from
    image_size: the positions, learned for that, are then interpolated (bicubic; a local crop is a
    small image to it). stem: a CNN whose map takes the image's place; patch_size then counts its
    pixels. Names are those of the official backbones. ValueError: patches or heads don't fit."""

    def __init__(self, image_size=224, patch_size=16, in_chans=3, dim=384, depth=12, heads=6,
                 mlp_ratio=4.0, stem=None):  # fmt: skip
        super().__init__()
        self.image_size, patch, stem = pair(image_size), pair(patch_size), stem or nn.Identity()
        C, *size = stem(torch.zeros(1, in_chans, *self.image_size)).shape[1:]
        if min(patch) < 1 or any(n % p for n, p in zip(size, patch)):
            raise ValueError(f"patches of {patch_size} don't tile an image of {size}")
        self.grid = tuple(n // p for n, p in zip(size, patch))
        embed = {"backbone": stem, "proj": nn.Conv2d(C, dim, patch, patch)}
        self.patch_embed = nn.Sequential(OrderedDict(embed))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks.apply(xavier)

    def positions(self, grid) -> Tensor:
        """pos_embed for another grid of patches (1, 1 + N, D); the class token's row stays."""
        if grid == self.grid:
            return self.pos_embed
        places = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)  # (1, D, h, w)
        places = F.interpolate(places, grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], places.flatten(2).transpose(1, 2)], 1)

    def forward_features(self, x: Tensor, weights: list | None = None) -> Tensor:
        """x (B, C, H, W) -> tokens [cls, patches] of the last layer (B, 1 + N, D)."""
        z = self.patch_embed(x)  # (B, D, h, w), N = h w
        pos, cls = self.positions(z.shape[2:]), self.cls_token.expand(len(x), -1, -1)
        z = torch.cat([cls, z.flatten(2).transpose(1, 2)], 1) + pos
        for block in self.blocks:
            z = block(z, weights)
        return self.norm(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)[:, 0]

    @torch.no_grad()
    def attention(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> attention of the last class token to the patches (B, heads, h, w)."""
        weights: list[Tensor] = []
        self.forward_features(x, weights)
        return weights[-1][:, :, 0, 1:].unflatten(2, self.patch_embed(x).shape[2:])

    @classmethod
    def from_state_dict(cls, w: dict, heads=None) -> "ViT":
        """The backbone that fits official weights: its own file or a full checkpoint's teacher.
        Heads leave no trace in weights: D / 64, if they aren't given. ValueError: no ViT's."""
        w = next((w[k] for k in ("teacher", "state_dict", "model") if k in w), w)
        w = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in w.items()}
        w = {k: v for k, v in w.items() if not k.startswith("head.")}
        if not {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} <= set(w):
            raise ValueError("these are no weights of a ViT")
        dim, C, *patch = w["patch_embed.proj.weight"].shape
        side = math.isqrt(w["pos_embed"].shape[1] - 1)  # of a square grid
        depth = len({k.split(".")[1] for k in w if k.startswith("blocks.")})
        heads, ratio = heads or max(1, dim // 64), len(w["blocks.0.mlp.fc1.weight"]) / dim
        model = cls([side * p for p in patch], patch, C, dim, depth, heads, ratio)
        model.load_state_dict(w)
        return model


# ---- 2. Projection head (Section 3.1, Appendix C), its batch norm over many processes ----


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(x: Tensor) -> Tensor:
    """The mean of all processes' x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class Gather(torch.autograd.Function):
    """x (n, C) -> that of all processes (world n, C). dist.all_gather alone passes no gradient on,
    and what the others' losses ask of my x, which is in their statistics, would be lost."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad := grad.clone())
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class BatchNorm(nn.BatchNorm1d):
    """Over the rows (n, C) of all processes: each of them normalises all, and takes its own."""

    def forward(self, x):
        rank, world = rank_and_world()
        return super().forward(Gather.apply(x) if world > 1 else x).chunk(world)[rank]


class DINOHead(nn.Module):
    """Features (B, dim) -> outputs (B, K): three layers, length one, and `last_layer`, whose rows
    have length one, too (its norms `weight_g` are 1 and fixed): an output is a cosine. Loads
    official heads, with last_layer.weight_g and weight_v. batch_norm: in the first two layers (the
    official code's option). An untrained network says nearly the same of all images; this takes
    the common part out, and a short run learns at once."""

    def __init__(self, dim: int, K=65536, hidden=2048, bottleneck=256, batch_norm=False):
        super().__init__()
        self.mlp = nn.Sequential()
        for width in (dim, hidden):
            norm = [BatchNorm(hidden)] if batch_norm else []
            self.mlp.extend([nn.Linear(width, hidden), *norm, nn.GELU()])
        self.mlp.append(nn.Linear(hidden, bottleneck)).apply(xavier)
        self.last_layer = weight_norm(nn.Linear(bottleneck, K, bias=False))
        nn.init.ones_(self.last_layer.parametrizations.weight.original0).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """g: a list of views (B, 3, H_i, W_i) -> outputs (V B, K), view by view. Views of one size must
    stand together in the list."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: list[Tensor]) -> Tensor:
        sizes = dict.fromkeys(x.shape[2:] for x in views)  # one pass for all views of a size
        runs = [torch.cat([x for x in views if x.shape[2:] == size]) for size in sizes]
        return self.head(torch.cat([self.backbone(run) for run in runs]))


# ---- 3. Objective (Section 3.1, Eq. 1-4, Algorithm 1) ----


class DINOLoss(nn.Module):
    """Cross-entropy between what the teacher says of two views and the student of all others.
    sinkhorn: not the centre, but Sinkhorn-Knopp keeps the outputs in balance (Caron et al. 2020,
    SwAV; the paper's Table 7 has it, too): a batch must use all of them alike: stricter."""

    def __init__(self, K: int, tau_s=0.1, center_momentum=0.9, sinkhorn=False):
        super().__init__()
        self.tau_s, self.momentum, self.sinkhorn = tau_s, center_momentum, sinkhorn
        self.register_buffer("center", torch.zeros(1, K))

    def teacher_probabilities(self, t: Tensor, tau_t: float) -> Tensor:
        """t (n, K) -> P_t (n, K), centred and sharpened; no gradient reaches the teacher."""
        if not self.sinkhorn:
            return torch.softmax((t.detach() - self.center) / tau_t, -1)
        P = torch.softmax(t.detach() / tau_t, -1)
        for _ in range(3):
            P = P / average(P.sum(0, keepdim=True)).clamp(min=1e-12)  # all outputs are used alike,
            P = P / P.sum(1, keepdim=True)  # each image says something
        return P

    def forward(self, s: Tensor, t: Tensor, tau_t: float) -> Tensor:
        """s (V B, K), t (2 B, K), both view by view with the global views first -> the loss ()."""
        B = len(t) // 2
        log_P_s = F.log_softmax(s / self.tau_s, -1).split(B)  # V of (B, K)  Eq. 1
        P_t = self.teacher_probabilities(t, tau_t).split(B)
        pairs = [
            -(p * q).sum(-1).mean()  # Eq. 2
            for i, p in enumerate(P_t)
            for j, q in enumerate(log_P_s)
            if i != j  # a view isn't compared with itself: Eq. 3
        ]
        return sum(pairs) / len(pairs)

    @torch.no_grad()
    def update_center(self, t: Tensor):
        """c <- m c + (1 - m) mean(t), over the batch of all processes (Eq. 4); m = 1: no centre."""
        mean = average(t.mean(0, keepdim=True))
        self.center.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, m: float):
    """theta_t <- m theta_t + (1 - m) theta_s, for all parameters (Section 3.1)."""
    for p_t, p_s in zip(teacher.parameters(), student.parameters()):
        p_t.mul_(m).add_(p_s, alpha=1 - m)


@torch.no_grad()
def collapse_measures(s: Tensor, t: Tensor, loss_fn: DINOLoss, tau_t: float):
    """-> entropy h(P_t), KL(P_t | P_s) in nats, means over the two pairs of global views; their sum
    is the loss (Eq. 5). Collapse is a KL of 0: at h = 0 one output has taken all, at h = ln K all
    outputs are the same (Figure 7)."""
    P_t, (a, b) = loss_fn.teacher_probabilities(t, tau_t), s[: len(t)].chunk(2)
    log_P_s = F.log_softmax(torch.cat([b, a]) / loss_fn.tau_s, -1)  # swapped: of the other view
    h = torch.special.entr(P_t).sum(-1).mean()
    return h.item(), (-(P_t * log_P_s).sum(-1).mean() - h).item()


def clip_gradients(model: nn.Module, limit: float):
    """Scales each parameter's gradient to a norm of at most `limit`, by itself (official code)."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_((limit / (p.grad.norm() + 1e-6)).clamp(max=1))


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """From start at step 0 to end at `steps` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


# ---- 4. Views (Section 3.1, "multi-crop"; Appendix E) and data ----


def augment(x: Tensor, u: Tensor, crop=(0.4, 1.0), size=None, rotate=0.0, flip=0.5, jitter=0.4,
            hue=0.1, grey=0.2, blur=0.5) -> Tensor:  # fmt: skip
    """Random views (B, 3, *size) of images x (B, 3, H, W) in [0, 1], as u (B, 16) in [0, 1) says.
    crop: share of the area, from and to, resized to `size` (None: that of x), aspect 3/4 to 4/3;
    rotate: degrees either way; flip, grey, blur: probabilities; jitter: brightness, contrast and
    saturation by factors of up to 1 +- jitter, and hue by up to this share of the circle, in 4 of 5
    views. All geometry is one warp, all colour one 3 x 3 matrix per image."""
    (B, C, *old), u = x.shape, u.to(x)
    s = 2 * u - 1  # uniform in [-1, 1)
    area = (crop[0] + (crop[1] - crop[0]) * u[:, 0]).log()
    ratio = torch.clamp(s[:, 1] * math.log(4 / 3), area, -area)  # no side longer than the image's
    half = torch.stack([(area + ratio) / 2, (area - ratio) / 2], 1).exp()  # (B, 2), x and y
    place, angle = s[:, 2:4] * (1 - half), s[:, 4] * math.radians(rotate)
    mirror, sin, cos = 1 - 2.0 * (u[:, 5] < flip), angle.sin(), angle.cos()
    R = torch.stack([mirror * cos, -sin, mirror * sin, cos], 1).view(B, 2, 2)
    M = torch.cat([half[..., None] * R, place[..., None]], 2)  # place in the view -> in the image
    grid = F.affine_grid(M, [B, C, *pair(size or old)], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    yiq = [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
    yiq, on = x.new_tensor(yiq), (u[:, 6] < 0.8).to(x)
    bright, contrast, vivid = (1 + jitter * s[:, 7:10] * on[:, None]).unbind(1)
    vivid, turn = vivid * (u[:, 11] >= grey), 2 * math.pi * hue * s[:, 10] * on
    a, b, zero = vivid * turn.cos(), vivid * turn.sin(), torch.zeros_like(on)
    T = torch.stack([zero + 1, zero, zero, zero, a, -b, zero, b, a], 1).view(B, 3, 3)  # on Y, I, Q
    A = torch.linalg.inv(yiq) @ T @ yiq * (bright * contrast).view(B, 1, 1)  # on R, G, B
    level = (x.mean((2, 3)) @ yiq[0]) * bright * (1 - contrast)  # contrast leaves the mean grey
    x = (A @ x.flatten(2) + level.view(B, 1, 1)).view(x.shape).clamp(0, 1)
    sigma = ((0.1 + 1.9 * u[:, 12]) * (u[:, 13] < blur)).clamp(min=1e-3).view(B, 1, 1, 1)
    for _ in range(2 if blur else 0):  # rows, then columns, with pixels of weight w
        d = torch.arange(x.shape[2]).to(x)
        w = torch.softmax(-((d - d[:, None]) ** 2) / (2 * sigma**2), -1)  # (B, 1, H, H)
        x = (w @ x).transpose(2, 3)
    return x


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


def load_images(path: str, size) -> Tensor:
    """The first eight images of a folder (jpg, png) or npy file -> (n, 3, *size) in [0, 1]."""
    import numpy as np
    from matplotlib.image import imread

    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    names = [n for n in names if n.lower().endswith((".jpg", ".jpeg", ".png"))][:8]
    images = [imread(os.path.join(path, n)) for n in names]
    images = images or [*np.load(path, allow_pickle=False)[:8]]  # of an empty folder: an error
    for i, x in enumerate(images):
        x = torch.tensor(x / 255 if x.dtype == np.uint8 else x).float()
        x = x.reshape(1, *x.shape[:2], -1)[..., :3].permute(0, 3, 1, 2)  # grey or with alpha, too
        images[i] = F.interpolate(x, size, mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
    return torch.cat(images)


# ---- 5. The demo: a batch and its views depend on (seed, step) alone: a resumed run is exact ----

# known: rows of the images it sees; labels: how many it learns from, 0: DINO; tau: tau_t, from, to
Run = namedtuple("Run", "student teacher loss_fn optimizer steps known labels tau")
PARTS = "student", "teacher", "loss_fn", "optimizer"  # of a checkpoint


def build(args, x: Tensor, K: int) -> dict:
    """-> runs by name: DINO, the collapse study (Figure 7), the same backbone taught K labels."""
    halvings = round(math.log2(args.patch_size)) if args.stem == "conv" else 0
    if args.patch_size % 2**halvings:
        raise ValueError("with --stem conv, --patch-size must be a power of two")
    convs = [(args.dim // 2, 2), *[(args.dim, 2)] * (halvings - 1)][:halvings]
    image = x.shape[2:], args.patch_size // 2**halvings, 3
    shape = args.dim, args.K, args.hidden, args.bottleneck, args.head == "bn"
    m, sharp, runs = args.center_momentum, (args.tau_start, args.tau_t), {}
    study = {  # name: steps, labels seen, momentum of the centre (1: none), tau_t
        "DINO": (args.steps, 0, m, sharp),
        "centring only": (args.short, 0, m, (args.tau_s, args.tau_s)),
        "sharpening only": (args.short, 0, 1.0, sharp),
        "both": (args.short, 0, m, sharp),
        "few labels": (args.label_steps, args.few, m, sharp),
        "all labels": (args.label_steps, len(x), m, sharp),
    }
    for name, (steps, labels, m, tau) in study.items():
        torch.manual_seed(args.seed)
        vit = ViT(*image, args.dim, args.depth, args.heads, stem=conv_net(3, convs))
        head = DINOHead(*shape)  # made in any case: the same random numbers
        student = Network(vit, nn.Linear(args.dim, K) if labels else head)
        teacher = copy.deepcopy(student.to(x.device)).requires_grad_(False)  # not the same object
        sinkhorn = name == "DINO" and args.balance == "sinkhorn"
        loss_fn = DINOLoss(args.K, args.tau_s, m, sinkhorn).to(x.device)
        groups = [], []  # matrices and filters, which decay; biases, tokens, which don't
        for p in (p for p in student.parameters() if p.requires_grad):
            groups[p.ndim not in (2, 4)].append(p)
        optimizer = torch.optim.AdamW([{"params": group} for group in groups], args.lr)
        g = torch.Generator().manual_seed(args.seed)
        known = torch.randperm(len(x), generator=g)[:labels] if labels else torch.arange(len(x))
        known = known.to(x.device)
        runs[name] = Run(student, teacher, loss_fn, optimizer, steps, known, labels, tau)
    return runs


def train(runs: dict, data, args, state: dict | None = None) -> bool:
    """Trains one run after the other, each from where `state` left it -> stopped by Ctrl-C?"""
    from tqdm import tqdm

    state = state or {"done": {}, "history": [], "stop": []}
    (x, y), (rank, world) = data, rank_and_world()
    colours = {k: getattr(args, k) for k in ("rotate", "flip", "jitter", "hue", "grey", "blur")}
    crops = [((args.crop, 1.0), None)] * 2
    crops += [((args.local_crop, args.crop), args.local_size)] * args.local_views
    for name, (student, teacher, loss_fn, optimizer, steps, known, labels, tau) in runs.items():
        first, t0, h, kl = state["done"].get(name, 0), time.time(), 0.0, 0.0
        for step in tqdm(range(first + 1, steps + 1), name, disable=rank > 0 or None):
            g = torch.Generator().manual_seed(args.seed * 10**10 + step)
            rows = torch.randint(len(known), (args.batch_size,), generator=g)
            rows = known[rows[rank::world].to(x.device)]
            u = torch.rand(len(crops), args.batch_size, 16, generator=g)[:, rank::world]
            image, kinds = x[rows] / 255, crops[: 1 if labels else None]
            views = [2 * augment(image, r, *crop, **colours) - 1 for r, crop in zip(u, kinds)]
            s = student(views)
            if labels:
                loss, lr = F.cross_entropy(s, y[rows]), args.label_lr
            else:
                with torch.no_grad():
                    t = teacher(views[:2])  # the teacher sees the global views only
                part = min(1.0, step / (args.tau_warmup * steps))  # linear, as the paper's
                tau_t, lr = tau[0] + (tau[1] - tau[0]) * part, args.lr
                loss = loss_fn(s, t, tau_t)  # Eq. 3
                h, kl = collapse_measures(s.detach(), t, loss_fn, tau_t)
            optimizer.zero_grad(); loss.backward()  # fmt: skip
            grads = [p.grad for p in student.parameters() if p.grad is not None]
            flat = average(nn.utils.parameters_to_vector(grads))  # over the processes
            nn.utils.vector_to_parameters(flat, grads)
            row = [loss.item(), h, kl, len(state["stop"])]
            now, h, kl, stopped = average(s.new_tensor(row)).tolist()
            if not math.isfinite(now + (norm := flat.norm().item())):
                raise FloatingPointError(f"{name}: loss {now}, gradient {norm} at step {step}")
            rate = cosine(lr, lr * 1e-3, step, steps) * min(1.0, step / max(1, args.warmup * steps))
            decay = cosine(args.weight_decay, args.weight_decay_end, step, steps)
            for group, strength in zip(optimizer.param_groups, (decay, 0.0)):
                group.update(lr=rate, weight_decay=strength)
            if not labels and step <= args.freeze * steps:  # the last layer starts frozen
                student.head.last_layer.zero_grad()
            clip_gradients(student, args.clip)
            optimizer.step()
            if not labels:
                update_teacher(teacher, student, cosine(args.momentum, 1.0, step, steps))
                loss_fn.update_center(t)  # Eq. 4
            state["history"].append((name, step, now, h, kl))
            if stopped or step % args.log_every == 0 or step == steps:
                state["done"][name], ms = step, (time.time() - t0) / (step - first) * 1e3
                line = f" | entropy {h:.3f} of {math.log(args.K):.3f} | KL {kl:.3f}"
                line = f"{name} loss {now:.4f}{'' if labels else line} | {ms:.0f} ms/step"
                if rank == 0:
                    tqdm.write(f"step {step:5d}/{steps} | {line}")
                if rank == 0 and args.save:
                    state["step"] = state["done"]["DINO"]
                    for part in PARTS:
                        state[part] = {k: getattr(r, part).state_dict() for k, r in runs.items()}
                    torch.save(state, args.save + ".tmp")  # then moved: a crash leaves the old one
                    os.replace(args.save + ".tmp", args.save)
            if stopped:
                return True
    return False


# ---- 6. Evaluation and picture ----


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


def digit_share(A: Tensor, x: Tensor) -> tuple[list[float], float]:
    """Where class tokens look: the share of attention on the digit, by head, and that of its area,
    which a head that looks everywhere alike would have. A (n, heads, h, w) of canvases x uint8
    (n, 3, H, W); a patch's attention spreads evenly over its pixels."""
    ink = (x.amax(1, keepdim=True) > 0.3 * 255).float()  # canvas: 0.1
    area = F.adaptive_avg_pool2d(ink, A.shape[2:])  # (n, 1, h, w), share of each patch
    share = (A * area).sum((2, 3)) / A.sum((2, 3))
    return share.mean(0).tolist(), area.mean().item()


def draw_picture(args, x, maps: dict, history=(), table=None):
    """Eight images x (n, 3, H, W) over maps {row: (n, h, w)}; right: collapse, accuracies."""
    from matplotlib.figure import Figure  # without pyplot no window is opened

    rows = {"image": x.permute(0, 2, 3, 1), **maps}
    which = range(0, len(x), max(1, len(x) // 8))[:8]
    n, wide = len(which), 6.5 if table else 0
    fig = Figure(figsize=(n + wide, 1.05 * len(rows)), layout="constrained")
    left, *right = fig.subfigures(1, 2, width_ratios=[n, wide]) if table else [fig]
    for axes, (name, images) in zip(left.subplots(len(rows), n, squeeze=False), rows.items()):
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axis, i in zip(axes, which):
            axis.imshow(images[i].cpu(), cmap="inferno")
            axis.set(xticks=[], yticks=[])
    for a, b, c in (part.subplots(3, 1) for part in right):
        for name in dict.fromkeys(name for name, *_ in history if "labels" not in name):
            steps, _, h, kl = zip(*[row[1:] for row in history if row[0] == name])
            a.plot(steps, h, label=name)
            b.plot(steps, kl, label=name)
        a.axhline(math.log(args.K), color="gray", ls=":")
        a.legend(fontsize="small")
        title = "entropy of the teacher, start of training (dotted: ln K; Fig. 7)"
        a.set(title=title, ylim=(0, None), xlim=(0, 2 * args.short or None))
        title = "KL between teacher and student: 0 is collapse"
        b.set(title=title, xlabel="step", ylim=(0, None), xlim=a.get_xlim())
        c.bar_label(c.barh([*table], [row[1] for row in table.values()]), fmt="%.2f")
        c.invert_yaxis()
        c.set(title=f"linear probe, {args.few} labels", xlim=(0, 1.1))
    fig.savefig(os.path.join(args.out, "dino.png"), dpi=80)


# ---- 7. Command line ----

DEFAULTS = {  # default, least, most, meaning
    "seed": (0, 0, 10**8, "of weights, batches, views, labels"),
    "log_every": (100, 1, math.inf, "steps between log lines"),
    "steps": (4000, 1, math.inf, "paper: 100 to 800 epochs of ImageNet"),
    "short": (150, 0, math.inf, "steps of each run of the collapse study, 0: none"),
    "label_steps": (300, 0, math.inf, "steps with labels alone, 0: none"),
    "few": (1000, 10, math.inf, "labels of the first two columns"),
    "batch_size": (64, 1, math.inf, "images over all processes (paper: 1024)"),
    "lr": (2e-3, 1e-12, 1e32, "peak rate (paper: 5e-4 per 256 images)"),
    "label_lr": (1e-3, 1e-12, 1e32, "peak rate of the runs with labels"),
    "weight_decay": (0.04, 0, 99, "decoupled weight decay at the start (paper: 0.04)"),
    "weight_decay_end": (0.1, 0, 99, "and at the end (paper: 0.4)"),
    "warmup": (0.1, 0, 1, "share of the steps over which the rate rises (paper: 10 epochs)"),
    "freeze": (0.03, 0, 1, "share of the steps with the last layer frozen (paper: one epoch)"),
    "clip": (3.0, 1e-6, math.inf, "largest gradient norm of a parameter (paper: 3)"),
    "K": (128, 2, math.inf, "outputs (paper: 65536)"),
    "hidden": (256, 1, math.inf, "the head's width (paper: 2048)"),
    "bottleneck": (64, 1, math.inf, "the width before its last layer (paper: 256)"),
    "tau_s": (0.1, 1e-3, 99, "the student's temperature (paper: 0.1)"),
    "tau_t": (0.04, 1e-3, 99, "the teacher's (paper: 0.07)"),
    "tau_start": (0.04, 1e-3, 99, "the teacher's at the start (paper: 0.04)"),
    "tau_warmup": (0.3, 1e-6, 1, "share of the steps in between (paper: 30 epochs)"),
    "momentum": (0.8, 0, 1, "the teacher's at the start; at the end 1 (paper: 0.996)"),
    "center_momentum": (0.9, 0, 1, "the centre's (paper: 0.9)"),
    "local_views": (0, 0, 99, "small crops, for the student alone (paper: 8)"),
    "local_size": (16, 1, math.inf, "their pixels (paper: 96 of 224)"),
    "crop": (0.5, 0.01, 1, "least area of a global crop, most of a local one (paper: 0.4)"),
    "local_crop": (0.35, 0.01, 1, "least area of a local crop (paper: 0.05)"),
    "rotate": (20.0, 0, 180, "degrees (paper: 0)"),
    "flip": (0.0, 0, 1, "probability (paper: 0.5, which digits don't bear)"),
    "jitter": (0.5, 0, 1, "brightness, contrast, saturation (paper: 0.4, 0.4, 0.2)"),
    "hue": (0.5, 0, 0.5, "share of the colour circle (paper: 0.1)"),
    "grey": (0.4, 0, 1, "probability (paper: 0.2)"),
    "blur": (0.0, 0, 1, "probability (paper: 1, 0.1 and 0.5, and solarising)"),
    "patch_size": (8, 1, math.inf, "pixels (paper: 8 or 16 of 224)"),
    "dim": (64, 1, math.inf, "width D (paper: 384)"),
    "depth": (2, 1, math.inf, "layers (paper: 12)"),
    "heads": (4, 1, math.inf, "attention heads (paper: 6); official weights: D / 64"),
}
CHOICES = {"stem": ("conv", "patch"), "head": ("bn", "plain"), "balance": ("sinkhorn", "center")}
QUICK = {"steps": 4, "short": 2, "label_steps": 2, "batch_size": 8, "dim": 16, "depth": 2}


def parse(argv):
    """-> args, state, data, runs (official weights: the ViT). Bad input: one line, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or FILE.npz; official weights: an image folder or .npy")
    for name, (value, _, _, text) in DEFAULTS.items():
        flag(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}: {text}")
    for name, values in CHOICES.items():
        flag(f"--{name}", choices=values, help="default {} (paper: {})".format(*values))
    flag("--validate", action="store_true", help="judge on the last tenth of the training images")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint: the rest of its --steps, then judged; or official weights")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the linear probe with few labels is below this")
    args, ckpt, world = parser.parse_args(argv), {}, int(os.environ.get("WORLD_SIZE", 1))
    try:
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda" and world > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=args.device)
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script", "dino") != "dino":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        official, heads = bool(args.load) and "script" not in ckpt, args.heads
        default = {name: row[0] for name, row in (DEFAULTS | CHOICES).items()} | {"data": "digits"}
        default |= (QUICK if args.quick else {}) | ({} if official else ckpt.get("args", {}))
        for name in ("data", *DEFAULTS, *CHOICES):
            if getattr(args, name) is None:
                setattr(args, name, default[name])
        for name, (_, low, high, _) in DEFAULTS.items():
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        if official:
            runs = ViT.from_state_dict(ckpt, heads).to(args.device)
            data = [load_images(args.data, runs.image_size)]
        else:
            x, y, x_test, y_test = load_data(args.data)
            n = len(x) * 9 // 10
            data = [x[:n], y[:n], *((x[n:], y[n:]) if args.validate else (x_test, y_test))]
            data = [t[: 300 if args.quick else None].to(args.device) for t in data]
            n = len(data[0])
            args.few = min(args.few, n)
            if args.batch_size > n or args.batch_size % world:
                raise ValueError(f"--batch-size must divide by {world} and be at most {n}")
            if args.local_size % args.patch_size or args.local_crop > args.crop:
                raise ValueError("--local-size or --local-crop doesn't fit --patch-size or --crop")
            for name, old in ckpt.get("args", {}).items():
                if name in ("seed", "few") and getattr(args, name) != old:
                    raise ValueError(f"{args.load} was trained with --{name} {old}")
            runs = build(args, data[0], int(y.max()) + 1)
            for part in PARTS if ckpt else ():
                for name, run in runs.items():
                    getattr(run, part).load_state_dict(ckpt[part][name])
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "dino.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    state = {"done": {}, "history": []} | ckpt | {"script": "dino", "args": vars(args), "stop": []}
    return args, state, [t.to(args.device) for t in data], runs


def main(argv=None) -> int:
    args, state, data, runs = parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    t0, rank, official, x = time.time(), rank_and_world()[0], isinstance(runs, ViT), data[0]
    vit = runs if official else runs["DINO"].teacher.backbone
    if rank == 0:
        count = sum(p.numel() for p in vit.parameters()) / 1e6
        sizes = "/".join(str(len(part)) for part in data[::2])
        kind = f"{args.device} | seed {args.seed} | {os.path.basename(args.data)} {sizes}"
        print(f"dino | {count:.2f}M parameters | {kind}", flush=True)
    if official:
        mean, sd = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        A = vit.attention((x - mean) / sd)  # ImageNet's units, which official weights expect
        maps = {f"head {k}": A[:, k] for k in range(A.shape[1])}
        draw_picture(args, x, {"all heads": A.mean(1), **maps})
        print(f"drew {args.data} in {args.out}/dino.png | {time.time() - t0:.0f} s")
        return 0
    start = build(args, x, int(data[1].max()) + 1)["DINO"].teacher.backbone
    before = signal.signal(signal.SIGINT, lambda *_: state["stop"].append(1))  # ends after a step
    try:
        stopped = train(runs, data[:2], args, state)
    except FloatingPointError as error:
        print(f"dino.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank:
        return 0
    if stopped:
        print("stopped by Ctrl-C; the table has what was trained so far")
    table = {}
    for run in runs["few labels"], runs["all labels"]:  # which know the rows that have labels
        encoders = {"raw pixels": nn.Identity(), "grey centred": grey_centred}
        nets = {"random network": start, "labels alone": run.student.backbone}
        nets |= {"DINO student": runs["DINO"].student.backbone, "DINO teacher": vit}
        encoders |= {k: lambda x, net=net: net(2 * x - 1) for k, net in nets.items()}
        for name, encoder in encoders.items():
            if name != "labels alone" or "all labels" in state["done"]:
                row = evaluate(encoder, x[run.known], data[1][run.known], *data[2:])
                table[name] = table.get(name, ()) + row
    few, every = f"{args.few} labels", f"{len(x)} labels"
    print(f"{'test accuracy':26} k-NN {few:>12} {every:>12} | linear {few:>12} {every:>12}")
    for name, (knn, linear, knn_all, linear_all) in table.items():
        print(f"{name:26} {knn:17.4f} {knn_all:12.4f} | {linear:19.4f} {linear_all:12.4f}")
    x, line = data[2], ""
    scaled = [2 * (part / 255) - 1 for part in x.split(256)]
    A, A_0 = (torch.cat([net.attention(part) for part in scaled]) for net in (vit, start))
    if args.data == "digits":
        (share, area), (share_0, _) = digit_share(A, x), digit_share(A_0, x)
        heads = [" ".join(f"{v:.3f}" for v in values) for values in (share, share_0)]
        print(f"attention on the digit, by head: {heads[0]} | random network {heads[1]}")
        now, random = sum(share) / args.heads, sum(share_0) / args.heads
        line = f" | attention on the digit {now:.3f}, random network {random:.3f}, area {area:.3f}"
    maps = {"random": A_0.mean(1), "trained": A.mean(1)}
    maps |= {f"head {k}": A[:, k] for k in range(args.heads)}
    draw_picture(args, x, maps, state["history"], table)
    parts = [f"{name} {row[1]:.4f}" for name, row in table.items()][::-1]
    print(f"test acc linear {few} {' | '.join(parts)}{line} | {time.time() - t0:.0f} s")
    missed = args.target is not None and table["DINO teacher"][1] < args.target
    return 130 if stopped else int(missed)


if __name__ == "__main__":
    sys.exit(main())
