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
Differs  The demo balances the teacher's outputs by Sinkhorn-Knopp (--balance center: the paper's
         Eq. 4): a short run with the centre learned hardly more than place and size (see Expect).
         Its teacher's momentum starts at .8: a short run needs many generations of teachers. Its
         head has batch norm (--head plain: the paper's), its backbone starts with convolutions
         (--stem patch). No local crops (--local-views), as a third of a canvas shows no digit;
         rotation and more hue, no blur, solarising and flips. Weights start at Xavier's scale.
Run      python dino.py                    # canvas digits, 8 minutes on one core
         python dino.py --data cifar10.npz --patch-size 4 --dim 192 --depth 9 --heads 3 --flip 0.5
                --K 4096 --hidden 1024 --bottleneck 256 --rotate 0 --hue 0.1 --grey 0.2
                --crop 0.4 --local-crop 0.1 --local-views 6 --momentum 0.996 --batch-size 256
                --balance center --lr 5e-4 --steps 40000 --short 0    # long, not measured
         python dino.py --load dino_deitsmall8_pretrain.pth --data FOLDER   # official: attention
         torchrun --nproc-per-node 8 dino.py --data cifar10.npz             # splits the batch
Expect   Seeds 0-2, digits never seen in training. Linear probe with 1,000 labels: teacher .827 +-
         .040, random network .177 +- .006, grey centred pixels .149, the same network after 300
         steps with labels .510 +- .063; all labels .860 +- .030. k-NN: .730 +- .046, random .130,
         grey centred pixels .502 (all labels: .785 +- .051, .174, .737). Attention on the digit:
         .295 +- .100 of it, of the random network's .146, of the area .152. With the centre in
         place of Sinkhorn-Knopp, on validation digits, seed 0: linear .211, k-NN .133.
         Collapse (Figure 7, 150 steps): centring only, entropy ln K = 4.85, KL .00; sharpening
         only, entropy .06 +- .10, KL .07; both 2.27 +- .80, KL .89. What helped was found on
         validation digits. Paper (ImageNet, ViT-S/16): 77.0 % linear, 74.5 % k-NN.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
from collections import OrderedDict, namedtuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm

# ---- 1. A Vision Transformer for views of any size, with the names of vit.py ----


class Attention(nn.Module):
    """MSA, (B, N, D) -> (B, N, D). The rows of `qkv` are q, k, v, and head by head within each."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, weights: list | None = None) -> Tensor:
        """A (B, h, N, N) goes into the list `weights`, if there is one."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, D_h)
        if weights is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            A = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D // self.heads), -1)
            weights.append(A)
            y = A @ v
        return self.proj(y.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """One layer: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        mlp = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "fc2": nn.Linear(hidden, dim)}
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(self, z: Tensor, weights: list | None = None) -> Tensor:
        z = z + self.attn(self.norm1(z), weights)
        return z + self.mlp(self.norm2(z))


def pair(x) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else tuple(x)


def conv_net(C: int, layers) -> nn.Sequential:
    """3 x 3 convolutions of (width, stride) each: a stem, whose map takes the image's place."""
    net = nn.Sequential()
    for width, stride in layers:
        conv = nn.Conv2d(C, width, 3, stride, 1, bias=False)
        net.extend([conv, nn.GroupNorm(8, width), nn.ReLU()])
        C = width
    return net


class PatchEmbed(nn.Module):
    """x (B, C, H, W) -> tokens (B, N, D), row by row, and their grid (H / p, W / q)."""

    def __init__(self, channels: int, patch, dim: int, backbone: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone or nn.Identity()
        self.proj = nn.Conv2d(channels, dim, pair(patch), stride=pair(patch))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        z = self.proj(self.backbone(x))
        return z.flatten(2).transpose(1, 2), tuple(z.shape[2:])


class ViT(nn.Module):
    """Images (B, in_chans, H, W) -> class token of the last layer (B, dim).

    H and W may differ from image_size: the positions, learned for that, are then interpolated
    (bicubic; a local crop is a small image to it). Names and shapes are those of the official
    backbones. stem: a CNN whose map takes the image's place; patch_size then counts its pixels.
    """

    def __init__(
        self, image_size=224, patch_size=16, in_chans=3, dim=384, depth=12, heads=6, mlp_ratio=4.0,
        stem=None,
    ):  # fmt: skip
        super().__init__()
        C, *size = (in_chans, *pair(image_size))
        if stem is not None:
            with torch.no_grad():
                C, *size = stem(torch.zeros(1, C, *size)).shape[1:]
        if min(pair(patch_size)) < 1 or any(n % p for n, p in zip(size, pair(patch_size))):
            raise ValueError(f"patches of {patch_size} don't tile an image of {size}")
        self.image_shape = (in_chans, *pair(image_size))
        self.grid = tuple(n // p for n, p in zip(size, pair(patch_size)))
        self.patch_embed = PatchEmbed(C, patch_size, dim, stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        for name, p in self.named_parameters():
            if name in ("cls_token", "pos_embed"):
                nn.init.trunc_normal_(p, std=0.02)
            elif name.startswith("blocks") and p.ndim == 2:
                nn.init.xavier_uniform_(p)
            elif name.startswith("blocks") and name.endswith("bias"):
                nn.init.zeros_(p)

    def positions(self, grid) -> Tensor:
        """pos_embed for another grid of patches (1, 1 + N, D); the class token's row stays."""
        if grid == self.grid:
            return self.pos_embed
        places = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid)  # (1, D, h, w)
        places = F.interpolate(places, grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], places.flatten(2).transpose(1, 2)], 1)

    def forward_features(self, x: Tensor, weights: list | None = None) -> Tensor:
        """x (B, C, H, W) -> tokens [cls, patches] of the last layer (B, 1 + N, D)."""
        z, grid = self.patch_embed(x)
        z = torch.cat([self.cls_token.expand(len(x), -1, -1), z], 1) + self.positions(grid)
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
        return weights[-1][:, :, 0, 1:].unflatten(2, self.patch_embed(x)[1])

    @classmethod
    def from_state_dict(cls, w: dict, heads=None) -> "ViT":
        """The backbone that fits official weights: its own file or a full checkpoint's teacher.

        Heads leave no trace in weights: D / 64, if they aren't given.
        """
        w = next((w[k] for k in ("teacher", "state_dict", "model") if k in w), w)
        w = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in w.items()}
        w = {k: v for k, v in w.items() if not k.startswith("head.")}
        if not {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} <= set(w):
            raise ValueError("these are no weights of a ViT")
        dim, C, *patch = w["patch_embed.proj.weight"].shape
        side = math.isqrt(w["pos_embed"].shape[1] - 1)  # of a square grid
        model = cls(
            (side * patch[0], side * patch[1]), patch, C, dim,
            depth=1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks.")),
            heads=heads or max(1, dim // 64), mlp_ratio=len(w["blocks.0.mlp.fc1.weight"]) / dim,
        )  # fmt: skip
        model.load_state_dict(w)
        return model


# ---- 2. One batch over many processes (torchrun) ----


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(x: Tensor) -> Tensor:
    """The sum of all processes' x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


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


class BatchNorm(nn.BatchNorm1d):
    """Over the rows (n, C) of all processes: each of them normalises all, and takes its own."""

    def forward(self, x):
        rank, world = rank_and_world()
        return super().forward(gather(x).flatten(0, 1)).chunk(world)[rank]


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


# ---- 3. Projection head (Section 3.1, Appendix C) ----


class DINOHead(nn.Module):
    """Features (B, dim) -> outputs (B, K): three layers, length one, a weight-normalised layer.

    The rows of `last_layer` have length one, too (its norms `weight_g` are 1 and fixed), so that an
    output is a cosine. Loads official heads, whose names are last_layer.weight_g and weight_v.
    batch_norm: after the first two layers (the official code's option). An untrained network says
    nearly the same of all images; this takes the common part out, and a short run learns at once.
    """

    def __init__(self, dim: int, K=65536, hidden=2048, bottleneck=256, batch_norm=False):
        super().__init__()
        norm = [BatchNorm] if batch_norm else []
        layers = [nn.Linear(dim, hidden), *[m(hidden) for m in norm], nn.GELU()]
        layers += [nn.Linear(hidden, hidden), *[m(hidden) for m in norm], nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, K, bias=False))
        self.last_layer.parametrizations.weight.original0.data.fill_(1)
        self.last_layer.parametrizations.weight.original0.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Network(nn.Module):
    """g: a list of views (B, 3, H_i, W_i) -> outputs (V B, K), view by view."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views: list[Tensor]) -> Tensor:
        sizes = [x.shape[2:] for x in views]
        runs = [[x for x in views if x.shape[2:] == size] for size in dict.fromkeys(sizes)]
        return self.head(torch.cat([self.backbone(torch.cat(run)) for run in runs]))


# ---- 4. Objective (Section 3.1, Eq. 1-4, Algorithm 1) ----


class DINOLoss(nn.Module):
    """Cross-entropy between what the teacher says of two views and the student of all others.

    sinkhorn: not the centre, but Sinkhorn-Knopp keeps the outputs in balance (Caron et al. 2020,
    SwAV; the paper's Table 7 has it, too): a batch must use all of them alike, which is stricter.
    """

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
            P = P / total(P.sum(0, keepdim=True)).clamp(min=1e-12)  # each output is used alike,
            P = P / P.sum(1, keepdim=True)  # each image says something
        return P

    def forward(self, s: Tensor, t: Tensor, tau_t: float) -> Tensor:
        """s (V B, K), t (2 B, K), both view by view with the global views first -> the loss."""
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
        """c <- m c + (1 - m) mean(t), over the batch of all processes (Eq. 4)."""
        mean = total(t.mean(0, keepdim=True)) / rank_and_world()[1]
        self.center.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, m: float):
    """theta_t <- m theta_t + (1 - m) theta_s, for all parameters (Section 3.1)."""
    for p_t, p_s in zip(teacher.parameters(), student.parameters()):
        p_t.mul_(m).add_(p_s, alpha=1 - m)


@torch.no_grad()
def collapse_measures(s: Tensor, t: Tensor, loss_fn: DINOLoss, tau_t: float):
    """-> entropy h(P_t), KL(P_t | P_s) in nats, means over the two pairs of global views (Eq. 5).

    Their sum is the loss. Collapse is a KL of 0: at h = 0 one output has taken all, at h = ln K
    all outputs are the same (Figure 7).
    """
    B = len(t) // 2
    P_t = loss_fn.teacher_probabilities(t, tau_t)
    log_P_s = F.log_softmax(torch.cat([s[B : 2 * B], s[:B]]) / loss_fn.tau_s, -1)  # swapped
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


# ---- 5. Views (Section 3.1, "multi-crop"; Appendix C) ----


def augment(x: Tensor, u: Tensor, crop=(0.4, 1.0), size=None, rotate=0.0, flip=0.5, jitter=0.4,
            hue=0.1, grey=0.2, blur=0.5) -> Tensor:  # fmt: skip
    """Random views (B, 3, *size) of images x (B, 3, H, W) in [0, 1], as u (B, 16) in [0, 1) says.

    crop: share of the area, from and to, resized to `size` (None: that of x), aspect 3/4 to 4/3;
    rotate: degrees either way; flip, grey, blur: probabilities; jitter: brightness, contrast and
    saturation by factors of up to 1 +- jitter, and hue by up to this share of the circle, in 4 of 5
    views. All geometry is one warp, all colour one 3 x 3 matrix per image.
    """
    (B, C, H, W), u = x.shape, u.to(x)
    s = 2 * u - 1  # uniform in [-1, 1)
    area = (crop[0] + (crop[1] - crop[0]) * u[:, 0]).log()
    ratio = torch.clamp(s[:, 1] * math.log(4 / 3), area, -area)  # no side longer than the image's
    half = torch.stack([(area + ratio) / 2, (area - ratio) / 2], 1).exp()  # (B, 2), x and y
    place, angle = s[:, 2:4] * (1 - half), s[:, 4] * math.radians(rotate)
    mirror, sin, cos = 1 - 2.0 * (u[:, 5] < flip), angle.sin(), angle.cos()
    R = torch.stack([mirror * cos, -sin, mirror * sin, cos], 1).view(B, 2, 2)
    M = torch.cat([half[..., None] * R, place[..., None]], 2)  # place in the view -> in the image
    H, W = pair(size or (H, W))
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


# ---- 6. Data ----


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


def load_images(path: str, size) -> Tensor:
    """The first eight images of a folder (jpg, png) or npy file -> (n, 3, *size) in [0, 1]."""
    import matplotlib.image
    import numpy as np

    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    names = [n for n in names if n.lower().endswith((".jpg", ".jpeg", ".png"))][:8]
    images = [matplotlib.image.imread(os.path.join(path, n)) for n in names]
    images = images or list(np.load(path, allow_pickle=False)[:8])  # a folder without any: an error
    images = [torch.tensor(i / 255 if i.dtype == np.uint8 else i).float() for i in images]
    images = [i.reshape(1, *i.shape[:2], -1)[..., :3].permute(0, 3, 1, 2) for i in images]
    how = {"mode": "bilinear", "antialias": True}
    return torch.cat([F.interpolate(i, size, **how).expand(-1, 3, -1, -1) for i in images])


def to_float(x: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [0, 1]."""
    return x.permute(0, 3, 1, 2) / 255


def normalise(x: Tensor, pixels: str = "half") -> Tensor:
    """[0, 1] -> [-1, 1], or ImageNet's units, as official weights expect."""
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    mean, sd = x.new_tensor(imagenet if pixels == "imagenet" else [[0.5], [0.5]]).view(2, -1, 1, 1)
    return (x - mean) / sd


# ---- 7. Training: a batch and its views depend on (seed, step) alone: a resumed run is exact ----

# labels: how many it may see, 0 for DINO; center, sharp: which of the two remedies are switched on
Run = namedtuple("Run", "student teacher loss_fn optimizer steps labels center sharp")


def build(args, x: Tensor, K: int) -> dict:
    """-> runs by name: DINO, the collapse study (Figure 7), the network trained with labels."""
    runs, all_labels = {}, len(x)
    for name, steps, labels, center, sharp in (
        ("DINO", args.steps, 0, True, True),
        ("centring only", args.short, 0, True, False),
        ("sharpening only", args.short, 0, False, True),
        ("both", args.short, 0, True, True),
        ("few labels", args.label_steps, args.few, False, False),
        ("all labels", args.label_steps, all_labels, False, False),
    ):
        if steps:
            torch.manual_seed(args.seed)
            halvings = round(math.log2(args.patch_size)) if args.stem == "conv" else 0
            if args.patch_size % 2**halvings:
                raise ValueError("with --stem conv, --patch-size must be a power of two")
            conv = [(args.dim // 2, 2), *[(args.dim, 2)] * (halvings - 1)][:halvings]
            patch = args.patch_size // 2**halvings
            stem, size = conv_net(3, conv) if conv else None, tuple(x.shape[1:3])
            vit = ViT(size, patch, 3, args.dim, args.depth, args.heads, stem=stem)
            head = DINOHead(args.dim, args.K, args.hidden, args.bottleneck, args.head == "bn")
            student = Network(vit, nn.Linear(args.dim, K) if labels else head).to(x.device)
            teacher = copy.deepcopy(student).requires_grad_(False)  # equal weights, other object
            sinkhorn = name == "DINO" and args.balance == "sinkhorn"
            loss_fn = DINOLoss(args.K, args.tau_s, args.center_momentum, sinkhorn).to(x.device)
            groups = {True: [], False: []}  # matrices and filters decay; biases, tokens don't
            for p in student.parameters():
                groups[p.ndim in (2, 4)].extend([p] if p.requires_grad else [])
            optimizer = torch.optim.AdamW([{"params": p} for p in groups.values()], args.lr)
            runs[name] = Run(student, teacher, loss_fn, optimizer, steps, labels, center, sharp)
    return runs


def train(runs, data, args, done=(), history=()):
    """Trains one run after the other -> steps done, [(name, step, loss, h, KL)], stopped."""
    from tqdm import tqdm

    (x, y), (rank, world), stop = data, rank_and_world(), []
    done, history = dict(done), list(history)
    colours = "rotate", "flip", "jitter", "hue", "grey", "blur"
    colours = {name: getattr(args, name) for name in colours}
    V, B = 2 + args.local_views, args.batch_size
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(1))  # Ctrl-C: ends after a step
    try:
        for name, run in runs.items():
            student, teacher, loss_fn, optimizer, steps, labels, center, sharp = run
            first, t0, known = done.get(name, 0), time.time(), labelled(x, labels, args.seed)
            h = kl = 0.0
            for step in tqdm(range(first + 1, steps + 1), name, disable=rank > 0 or None):
                g = torch.Generator().manual_seed(args.seed * 10**10 + step)
                rows = torch.randint(labels or len(x), (B,), generator=g)[rank::world].to(x.device)
                u = torch.rand(V, B, 16, generator=g)[:, rank::world]
                image = to_float(x[known[rows] if labels else rows])
                kinds = [((args.crop, 1.0), None)] * 2
                kinds += [((args.local_crop, args.crop), args.local_size)] * args.local_views
                views = [normalise(augment(image, r, *kind, **colours))
                         for r, kind in zip(u[: 1 if labels else V], kinds)]  # fmt: skip
                s = student(views)
                if labels:
                    loss = F.cross_entropy(s, y[known[rows]])
                else:
                    tau_t = cosine(args.tau_start, args.tau_t, step, args.tau_warmup * steps)
                    tau_t = tau_t if sharp else args.tau_s
                    with torch.no_grad():
                        t = teacher(views[:2])  # the teacher sees the global views only
                    loss = loss_fn(s, t, tau_t)  # Eq. 3
                    if step % 10 == 0 or step in (first + 1, steps):
                        h, kl = collapse_measures(s.detach(), t, loss_fn, tau_t)
                warm, lr = step / max(1, args.warmup * steps), args.label_lr if labels else args.lr
                strong = cosine(args.weight_decay, args.weight_decay_end, step, steps)
                for group, decay in zip(optimizer.param_groups, (strong, 0.0)):
                    rate = min(1.0, warm) * cosine(lr, lr * 1e-3, step, steps)
                    group.update(lr=rate, weight_decay=decay)
                optimizer.zero_grad(); loss.backward()  # fmt: skip
                now, h, kl, stopped, norm = average(student, loss.item(), h, kl, float(len(stop)))
                if not math.isfinite(now + norm):
                    raise FloatingPointError(f"{name}: loss {now}, gradient {norm} at step {step}")
                if not labels and step <= args.freeze * steps:  # the last layer starts frozen
                    student.head.last_layer.zero_grad()
                clip_gradients(student, args.clip)
                optimizer.step()
                if not labels:
                    update_teacher(teacher, student, cosine(args.momentum, 1.0, step, steps))
                if center and not labels:
                    loss_fn.update_center(t)  # Eq. 4
                if stopped or step % 10 == 0 or step == steps:
                    history.append((name, step, now, h, kl))
                if stopped or step % args.log_every == 0 or step == steps:
                    done[name], ms = step, (time.time() - t0) / (step - first) * 1e3
                    row = f" | entropy {h:.3f} of {math.log(args.K):.3f} | KL {kl:.3f}"
                    row = f"{name} loss {now:.4f}{'' if labels else row} | {ms:.0f} ms/step"
                    if rank == 0:
                        tqdm.write(f"step {step:5d}/{steps} | {row}")
                    if rank == 0 and args.save:
                        save(args, runs, done, history)
                if stopped:
                    return done, history, True
    finally:
        signal.signal(signal.SIGINT, before)
    return done, history, False


def save(args, runs, done, history):
    """Writes the checkpoint beside its place, then moves it there: a crash leaves the old one."""
    state = {"script": "dino", "args": vars(args), "step": done.get("DINO", 0)}
    state |= {"done": done, "history": history}
    for part in ("student", "teacher", "loss_fn", "optimizer"):
        state[part] = {name: getattr(run, part).state_dict() for name, run in runs.items()}
    torch.save(state, args.save + ".tmp")
    os.replace(args.save + ".tmp", args.save)


# ---- 8. Evaluation and picture ----


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


def digit_share(A: Tensor, x: Tensor) -> tuple[list[float], float]:
    """Where class tokens look: the share of attention on the digit, by head, and that of its area.

    A (n, heads, h, w) on canvases x uint8 (n, H, W, 3). A patch's attention spreads evenly over its
    pixels. Looking everywhere alike, a head's share would be the area's.
    """
    ink = (x.amax(-1, keepdim=True).permute(0, 3, 1, 2) > 0.3 * 255).float()  # canvas: 0.1
    area = F.adaptive_avg_pool2d(ink, A.shape[2:])  # (n, 1, h, w), share of each patch
    share = (A * area).sum((2, 3)) / A.sum((2, 3))
    return share.mean(0).tolist(), area.mean().item()


def attention(vit: ViT, x: Tensor, pixels: str = "half") -> Tensor:
    """uint8 (n, H, W, 3) or images (n, 3, H, W) in [0, 1] -> attention (n, heads, h, w)."""
    images = (part if part.is_floating_point() else to_float(part) for part in x.split(256))
    return torch.cat([vit.attention(normalise(part, pixels)) for part in images])


def draw_picture(args, x, maps, history=(), table=None):
    """Images x (n, 3, H, W) over attention maps {row: (n, h, w)}; right: collapse, accuracies."""
    from matplotlib.figure import Figure  # without pyplot no window is opened

    n, rows = len(x), 1 + len(maps)
    fig = Figure(figsize=(n + 7 * bool(history), 1.05 * rows), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[n, 6.5]) if history else (fig, None)
    axes = left.subplots(rows, n, squeeze=False)
    for row, (name, images) in enumerate({"image": x, **maps}.items()):
        for axis, image in zip(axes[row], images.cpu()):
            axis.imshow(image.permute(1, 2, 0) if image.ndim == 3 else image, cmap="inferno")
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    if history:
        a, b, c = right.subplots(3, 1)
        for name in dict.fromkeys(name for name, *_ in history if "labels" not in name):
            steps, _, h, kl = zip(*[row[1:] for row in history if row[0] == name])
            a.plot(steps, h, label=name)
            b.plot(steps, kl, label=name)
        a.axhline(math.log(args.K), color="gray", ls=":")
        a.set(title="entropy of the teacher, start of training (dotted: ln K; Fig. 7)")
        b.set(title="KL between teacher and student: 0 is collapse", xlabel="step")
        for axis in (a, b):
            axis.set(ylim=(0, None), xlim=(0, 2 * args.short or None))
        a.legend(fontsize="small")
        bars = c.barh(list(table), [row[1] for row in table.values()], color="tab:blue")
        c.bar_label(bars, fmt="%.2f")
        c.invert_yaxis()
        c.set(title=f"linear probe, {args.few} labels", xlim=(0, 1.1))
    fig.savefig(os.path.join(args.out, "dino.png"), dpi=80)


# ---- 9. Command line ----

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


def parse(argv):
    """-> args, checkpoint or {}, data, runs (official weights: the backbone, to draw with)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or FILE.npz; official weights: an image folder or .npy")
    for name, (value, _, _, text) in DEFAULTS.items():
        flag(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}: {text}")
    flag("--stem", choices=["conv", "patch"], help="default conv: convolutions (paper: patch)")
    flag("--head", choices=["bn", "plain"], help="default bn: with batch norm (paper: plain)")
    flag("--balance", choices=["sinkhorn", "center"], help="default sinkhorn (paper: center)")
    flag("--validate", action="store_true", help="judge on the last tenth of the training images")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate, to go on with (more --steps), or official weights")
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
            if not isinstance(ckpt, dict) or ckpt.get("script", "dino") != "dino":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        official = bool(args.load) and "script" not in ckpt
        own, heads = {} if official else ckpt.get("args", {}), args.heads
        quick = {"steps": 4, "short": 2, "label_steps": 2, "batch_size": 8, "dim": 16, "depth": 2}
        default = {"data": "digits", "stem": "conv", "head": "bn", "balance": "sinkhorn"}
        default |= {k: v[0] for k, v in DEFAULTS.items()}
        for name, value in (default | (quick if args.quick else {})).items():
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, value))
        for name, (_, low, high, _) in DEFAULTS.items():
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        if official:
            runs = ViT.from_state_dict(ckpt, heads).to(args.device)
            data = [load_images(args.data, runs.image_shape[1:])]
        else:
            x, y, x_test, y_test = load_data(args.data)
            n = len(x) * 9 // 10
            data = [x[:n], y[:n], *((x[n:], y[n:]) if args.validate else (x_test, y_test))]
            data = [t[: 300 if args.quick else None].to(args.device) for t in data]
            args.few = min(args.few, len(data[0]))
            if args.batch_size > len(data[0]) or args.batch_size % world:
                most = f"must divide by {world} and be at most {len(data[0])}"
                raise ValueError(f"--batch-size {most}")
            if args.local_size % args.patch_size or args.local_crop > args.crop:
                raise ValueError("--local-size or --local-crop doesn't fit --patch-size or --crop")
            runs = build(args, data[0], int(y.max()) + 1)
            for name, run in runs.items() if own else ():
                for part in ("student", "teacher", "loss_fn", "optimizer"):
                    getattr(run, part).load_state_dict(ckpt[part][name])
        if args.save and os.path.isdir(args.save):
            raise ValueError(f"--save {args.save} is a folder")
        os.makedirs(args.out, exist_ok=True)
        for folder in (args.out, os.path.dirname(args.save or "") or "."):
            if not os.access(folder, os.W_OK):  # fails now, not after the training
                raise ValueError(f"cannot write to the folder {folder}")
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, ckpt, [t.to(args.device) for t in data], runs


def main(argv=None) -> int:
    args, ckpt, data, runs = parse(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    t0, rank, official = time.time(), rank_and_world()[0], isinstance(runs, ViT)
    vit = runs if official else runs["DINO"].teacher.backbone
    count = sum(p.numel() for p in vit.parameters()) / 1e6
    if rank == 0:
        sizes = len(data[0]) if official else f"{len(data[0])}/{len(data[2])}"
        kind = f"{args.device} | seed {args.seed} | {os.path.basename(args.data)} {sizes}"
        print(f"dino | {count:.2f}M parameters | {kind}", flush=True)
    if official:
        A = attention(vit, data[0], "imagenet")
        maps = {f"head {k}": A[:, k] for k in range(A.shape[1])}
        draw_picture(args, data[0], {"all heads": A.mean(1), **maps})
        print(f"drew {args.data} in {args.out}/dino.png | {time.time() - t0:.0f} s")
        return 0
    start = build(args, data[0], int(data[1].max()) + 1)["DINO"].teacher.backbone
    try:
        state = ckpt.get("done", {}), ckpt.get("history", [])
        done, history, stopped = train(runs, data[:2], args, *state)
    except FloatingPointError as error:
        print(f"dino.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank:
        return 0
    encoders = {"raw pixels": lambda x: x, "grey centred": grey_centred}
    encoders["random network"] = lambda x: start(normalise(x))
    if args.label_steps:
        nets = {args.few: runs["few labels"].student, len(data[0]): runs["all labels"].student}
        encoders["labels alone"] = {
            n: (lambda x, net=net: net.backbone(normalise(x))) for n, net in nets.items()
        }
    encoders["DINO student"] = lambda x: runs["DINO"].student.backbone(normalise(x))
    encoders["DINO teacher"] = lambda x: vit(normalise(x))
    table = evaluate(encoders, data, args.few, args.seed)
    few, every = f"{args.few} labels", f"{len(data[0])} labels"
    print(f"{'test accuracy':26} k-NN {few:>12} {every:>12} | linear {few:>12} {every:>12}")
    for name, (knn, linear, knn_all, linear_all) in table.items():
        print(f"{name:26} {knn:17.4f} {knn_all:12.4f} | {linear:19.4f} {linear_all:12.4f}")
    x, line = data[2], ""
    A, A_0 = attention(vit, x), attention(start, x)
    spread = slice(0, None, max(1, len(x) // 8))
    maps = {"random": A_0[spread][:8].mean(1), "trained": A[spread][:8].mean(1)}
    maps |= {f"head {k}": A[spread][:8, k] for k in range(args.heads)}
    if args.data == "digits":
        (share, area), (share_0, _) = digit_share(A, x), digit_share(A_0, x)
        heads = [" ".join(f"{v:.3f}" for v in values) for values in (share, share_0)]
        print(f"attention on the digit, by head: {heads[0]} | random network {heads[1]}")
        now, before = sum(share) / args.heads, sum(share_0) / args.heads
        line = f" | attention on the digit {now:.3f}, random network {before:.3f}, area {area:.3f}"
    draw_picture(args, to_float(x[spread][:8]), maps, history, table)
    parts = [f"{name} {row[1]:.4f}" for name, row in table.items()][::-1]
    print(f"test acc linear {few} {' | '.join(parts)}{line} | {time.time() - t0:.0f} s")
    missed = args.target is not None and table["DINO teacher"][1] < args.target
    return 130 if stopped else int(missed)


if __name__ == "__main__":
    sys.exit(main())
