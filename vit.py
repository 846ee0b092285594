"""ViT: an image cut into patches, read as words by an unchanged Transformer encoder.

Paper    An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale -- Alexey
         Dosovitskiy, Lucas Beyer, Alexander Kolesnikov et al., October 2020, arXiv:2010.11929v2
         and its recipe without pre-training, DeiT -- Hugo Touvron et al., arXiv:2012.12877v2
Idea     Attention between all pixels is too dear, between 16 x 16 patches it isn't. Nothing but the
         cut and the positions knows that the input is an image. What a CNN has built in, a ViT
         learns: from more data, or, DeiT, from strong augmentation and regularisation.
Figure   (Figure 1; one of `depth` equal layers)

         image (B, C, H, W)
           | patchify: N = H W / P^2 patches          class token (1, 1, D)
         x_p (B, N, C P^2) -- E --> (B, N, D) -- concat --+ (B, N + 1, D) + pos_embed
                                                          |
           +----------------------------------------------+ z (B, N + 1, D)
           |-- LayerNorm -- attention, h heads, A (B, h, N + 1, N + 1) -- + --+
           |                                                                  |
           +-- LayerNorm -- MLP, GELU, 4 D wide ------------------------- + --+--> next layer
         ... last: LayerNorm -- token 0 (B, D) -- head --> logits (B, K)
Symbols  z | z | tokens (B, N + 1, D)              x_p | x_p | flat patches (B, N, C P^2)
         E | E | patch embedding (D, C P^2)         pos_embed | E_pos | positions (1, N + 1, D)
         q, k, v | q, k, v | (B, h, N + 1, D_h)     A | A | attention weights (B, h, N + 1, N + 1)
         dim, heads, depth | D, k, L                R | - | attention rollout (B, N + 1, N + 1)
Differs  One linear layer as the head (the paper's for fine-tuning), not the MLP of pre-training.
         Stochastic depth, MixUp, CutMix, RandAugment, smoothing, distillation are DeiT's; decay
         leaves out biases, norms, tokens and positions. The demo: 1,167 images and not ImageNet.
         The paper just says that positions are interpolated; here bicubic with antialias.
Run      python vit.py                     # three models on canvas digits, 5 minutes, one core
         python vit.py --data mnist.npz --patch-size 4 --steps 12000    # half an hour of a core
         python vit.py --data cifar10.npz --patch-size 4 --dim 96 --depth 6 --flip 1 --steps 6500
         python vit.py --load deit_tiny.pth --data FOLDER     # official weights: where they look
Expect   Test accuracy on 1,500 canvases of 500 digits never trained on, seeds 0-2: ViT with
         augmentation .728 +- .032, without .367 +- .012, a CNN of its size, without, .813 +- .025;
         chance .100, raw-pixel k-NN .341. So augmentation makes up most of what a ViT lacks on
         1,167 digits, not all; the CNN learns faster, too. MNIST, .21M parameters: .9930 +- .0005
         (longer trained ones of that size: .995). CIFAR-10 (a JPEG copy), .68M, 9 epochs in some 48
         minutes: .576 +- .008 (raw-pixel k-NN .334; after 200 epochs .86 with .82M, .91 with 3.7M).
"""

import argparse
import math
import os
import signal
import sys
import time
from collections import OrderedDict
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Encoder: multi-head self-attention and MLP, pre-norm (Section 3.1, Appendix A) ----


class Attention(nn.Module):
    """MSA, (B, N, D) -> (B, N, D). The rows of `qkv` are q, k, v, and head by head within each."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, weights: list | None = None) -> Tensor:
        """A (B, h, N, N) goes into the list `weights`, if there is one."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, D_h)  Eq. 5
        if weights is None:
            y = F.scaled_dot_product_attention(q, k, v)  # Eq. 6 and 7, fused
        else:
            weights.append(torch.softmax(q @ k.mT / math.sqrt(D // self.heads), -1))  # Eq. 6
            y = weights[-1] @ v  # Eq. 7
        return self.drop(self.proj(y.transpose(1, 2).reshape(B, N, D)))  # Eq. 8


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): drops whole samples of x (B, N, D), keeps the mean."""
    if rate == 0 or not training:
        return x
    return x * (torch.rand(x.shape[0], 1, 1, device=x.device) >= rate) / (1 - rate)


class Block(nn.Module):
    """One layer: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads, mlp_ratio=4.0, dropout=0.0, drop_path=0.0):
        super().__init__()
        hidden, self.rate = int(dim * mlp_ratio), drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, dropout)
        mlp = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "drop1": nn.Dropout(dropout)}
        mlp |= {"fc2": nn.Linear(hidden, dim), "drop2": nn.Dropout(dropout)}
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(self, z: Tensor, weights: list | None = None) -> Tensor:
        z = z + drop_path(self.attn(self.norm1(z), weights), self.rate, self.training)  # Eq. 2
        return z + drop_path(self.mlp(self.norm2(z)), self.rate, self.training)  # Eq. 3


# ---- 2. Images as tokens (Section 3.1, Eq. 1; hybrid: "Hybrid Architecture") ----


def pair(x) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else tuple(x)


def patchify(x: Tensor, patch) -> Tensor:
    """x (B, C, H, W) -> x_p (B, N, C p q): patches row by row, each flattened channel first."""
    (B, C, H, W), (p, q) = x.shape, pair(patch)
    x = x.reshape(B, C, H // p, p, W // q, q).permute(0, 2, 4, 1, 3, 5)  # (B, H/p, W/q, C, p, q)
    return x.reshape(B, (H // p) * (W // q), C * p * q)


def conv_net(C: int, layers=((64, 2), (64, 2), (64, 2))) -> nn.Sequential:
    """3 x 3 convolutions of (width, stride) each, the stem of a hybrid or a small CNN's body: x (B,
    C, H, W) -> (B, width, H / strides, W / strides). GroupNorm as in the paper's ResNets."""
    net = nn.Sequential()
    for width, stride in layers:
        conv = nn.Conv2d(C, width, 3, stride, 1, bias=False)
        net.extend([conv, nn.GroupNorm(8, width), nn.ReLU()])
        C = width
    return net


class PatchEmbed(nn.Module):
    """x (B, C, H, W) -> x_p E (B, N, D). E is stored as the convolution that checkpoints have."""

    def __init__(self, channels: int, patch, dim: int, backbone: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone or nn.Identity()
        self.proj = nn.Conv2d(channels, dim, pair(patch), stride=pair(patch))

    def forward(self, x: Tensor) -> Tensor:
        x_p, E = patchify(self.backbone(x), self.proj.kernel_size), self.proj.weight.flatten(1)
        return F.linear(x_p, E, self.proj.bias)


def resize_pos_embed(pos: Tensor, grid, new_grid, prefix: int = 1) -> Tensor:
    """pos (1, prefix + h w, D) learned for grid (h, w) -> the same for new_grid (Section 3.2).
    Bicubic with antialias, as timm; DeiT and MAE use torch's plain bicubic (another kernel, up to
    8 % apart). The first `prefix` rows belong to tokens without a place and stay. Slicing
    pos[:, :n] instead gives every patch but those of the first row a wrong place, silently."""
    if pos.shape[1] != prefix + math.prod(pair(grid)):
        raise ValueError(f"{pos.shape[1]} positions are not {prefix} + those of grid {grid}")
    places = pos[:, prefix:].float().cpu().transpose(1, 2).unflatten(2, pair(grid))  # (1, D, h, w)
    places = F.interpolate(places, pair(new_grid), mode="bicubic", antialias=True)
    return torch.cat([pos[:, :prefix], places.flatten(2).transpose(1, 2).to(pos)], 1)


# ---- 3. The Vision Transformer ----


class ViT(nn.Module):
    """Images (B, in_chans, H, W) -> logits (B, num_classes); num_classes=0: features (B, D).
    image_size, patch_size: an int or a pair (height, width); the patch has to divide the image.
    pool: "cls" (Eq. 4) or "mean" over the patches (Appendix D.3; `fc_norm` then replaces `norm`, as
    in MAE and timm, and class_token=False leaves the token out). stem: a CNN whose feature map
    takes the image's place (hybrid); patch_size then counts its pixels. distilled: DeiT's second
    token and head; in training the output is the pair of logits, in evaluation their mean.
    dropout: after the embedding and each dense layer but qkv (Appendix B.1). drop_path: the rate of
    the last layer, linear from 0. Names and shapes are those of timm, DeiT, DINO and MAE."""

    def __init__(
        self, image_size=224, patch_size=16, in_chans=3, num_classes=1000, dim=768, depth=12,
        heads=12, mlp_ratio=4.0, pool="cls", class_token=True, distilled=False, stem=None,
        dropout=0.0, drop_path=0.0,
    ):  # fmt: skip
        super().__init__()
        if not (pool == "cls" and class_token or pool == "mean" and not distilled):
            raise ValueError('pool must be "cls" with a class token or "mean" without distillation')
        self.image_shape, (p, q) = (in_chans, *pair(image_size)), pair(patch_size)
        stem = nn.Identity() if stem is None else stem
        C, H, W = stem(torch.zeros(1, *self.image_shape)).shape[1:]  # what is cut into patches
        if min(p, q) < 1 or H % p or W % q:
            raise ValueError(f"patches of {p} x {q} don't tile an image of {H} x {W}")
        self.grid, self.prefix = (H // p, W // q), int(class_token) + int(distilled)
        self.pool, self.distilled = pool, distilled
        self.patch_embed = PatchEmbed(C, patch_size, dim, stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + H // p * (W // q), dim))
        self.pos_drop = nn.Dropout(dropout)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, dropout, r) for r in rates)
        norm = nn.LayerNorm(dim, eps=1e-6)
        self.norm, self.fc_norm = (norm, None) if pool == "cls" else (nn.Identity(), norm)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.head_dist = nn.Linear(dim, num_classes) if distilled and num_classes else None
        self.init_weights()

    def init_weights(self):
        """As the official JAX code: Xavier for q, k, v and MLP, LeCun for E, the heads zero."""
        for name, p in self.named_parameters():
            if name in ("pos_embed", "dist_token"):
                nn.init.normal_(p, std=0.02)
            elif name.startswith("head") or name.endswith("bias"):
                nn.init.zeros_(p)  # a zero head: the first loss is ln K, whatever the image
            elif name.startswith("blocks") and p.ndim == 2:
                for w in p.chunk(3) if "qkv" in name else [p]:  # three square matrices, not one
                    nn.init.xavier_uniform_(w)
        E = self.patch_embed.proj.weight
        nn.init.trunc_normal_(E, std=E[0].numel() ** -0.5)

    def forward_features(self, x: Tensor, weights: list | None = None) -> Tensor:
        """x (B, C, H, W) -> tokens [cls, dist, patches] of the last layer (B, prefix + N, D)."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images are {tuple(x.shape[1:])}, the model wants {self.image_shape}")
        tokens = [t for t in (self.cls_token, self.dist_token) if t is not None]
        z = [t.expand(x.shape[0], -1, -1) for t in tokens] + [self.patch_embed(x)]
        z = self.pos_drop(torch.cat(z, 1) + self.pos_embed)  # (B, prefix + N, D)  Eq. 1
        for block in self.blocks:
            z = block(z, weights)
        return self.norm(z)

    def forward(self, x: Tensor):
        z = self.forward_features(x)
        if self.distilled:
            y, y_dist = self.head(z[:, 0]), (self.head_dist or self.head)(z[:, 1])
            return (y, y_dist) if self.training else (y + y_dist) / 2
        if self.pool == "mean":
            return self.head(self.fc_norm(z[:, self.prefix :].mean(1)))
        return self.head(z[:, 0])  # Eq. 4

    @torch.no_grad()
    def attention(self, x: Tensor) -> list[Tensor]:
        """x (B, C, H, W) -> for every layer A (B, h, prefix + N, prefix + N); rows sum to one."""
        weights: list[Tensor] = []
        self.forward_features(x, weights)
        return weights

    @classmethod
    def from_state_dict(cls, w: dict, image_size=None, heads=None, **kwargs) -> "ViT":
        """The model that fits these weights of timm, DeiT ({"model": ...}), DINO or MAE, with them.
        Another image_size than theirs resizes the positions. The number of heads leaves no trace in
        weights: 16 at D = 1280, else D / 64, if it isn't given."""
        w = next((w[k] for k in ("model", "state_dict", "teacher") if k in w), w)
        w = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in w.items()}
        other = ("decoder_", "mask_token", "head.mlp", "head.last_layer")  # of MAE and DINO
        w = {k: v for k, v in w.items() if not k.startswith(other)}
        if not {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} <= set(w):
            raise ValueError("these are no weights of a ViT")
        (dim, C, *patch), head = w["patch_embed.proj.weight"].shape, w.get("head.weight", ())
        cls_, dist = "cls_token" in w, "dist_token" in w
        side = math.isqrt(w["pos_embed"].shape[1] - cls_ - dist)  # of a square grid
        model = cls(
            image_size or (side * patch[0], side * patch[1]), patch, C, len(head), dim,
            depth=1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks.")),
            heads=heads or (16 if dim == 1280 else max(1, dim // 64)),
            mlp_ratio=len(w["blocks.0.mlp.fc1.weight"]) / dim,
            pool="mean" if "fc_norm.weight" in w else "cls",
            class_token=cls_, distilled=dist, **kwargs,
        )  # fmt: skip
        if len(w["pos_embed"][0]) == side**2 + cls_ + dist and model.grid != (side, side):
            w["pos_embed"] = resize_pos_embed(w["pos_embed"], side, model.grid, cls_ + dist)
        model.load_state_dict(w)
        return model


# The paper's sizes (Table 1; Ti and S from DeiT). All keywords of ViT can be given or overridden.
ViT_Ti16 = partial(ViT, patch_size=16, dim=192, depth=12, heads=3)
ViT_S16 = partial(ViT, patch_size=16, dim=384, depth=12, heads=6)
ViT_B16 = partial(ViT, patch_size=16, dim=768, depth=12, heads=12)
ViT_L16 = partial(ViT, patch_size=16, dim=1024, depth=24, heads=16)
ViT_H14 = partial(ViT, patch_size=14, dim=1280, depth=32, heads=16)


def attention_rollout(weights: list[Tensor]) -> Tensor:
    """A (B, h, N, N) of every layer -> what each output saw of each input (B, N, N) (Figure 6).
    arXiv:2005.00928: mean over heads, residual as half: R = A_L' ... A_1', A' = (A + I) / 2."""
    R = I = torch.eye(weights[0].shape[-1], device=weights[0].device)
    for A in weights:
        R = (A.mean(1) + I) / 2 @ R
    return R


# ---- 4. Objective, and training without pre-training in plain torch (DeiT, Sections 4 and 6) ----
# F.cross_entropy(logits (B, K), target), with target (B,) or, smoothed or mixed, (B, K).


def hard_distillation_loss(outputs, target: Tensor, teacher_logits: Tensor) -> Tensor:
    """DeiT (arXiv:2012.12877) Eq. 3. outputs: the two (B, K) that a distilled model trains with."""
    y, y_dist = outputs
    y_t = teacher_logits.argmax(-1)  # hard decision, which no gradient passes
    return F.cross_entropy(y, target) / 2 + F.cross_entropy(y_dist, y_t) / 2


def rand_augment(x: Tensor, ops: int = 2, magnitude: float = 0.5, flip: bool = False) -> Tensor:
    """RandAugment (arXiv:1909.13719): images x (B, C, H, W) in [0, 1] -> the same.
    Each gets `ops` of eleven operations, random in strength up to `magnitude` (0..1), and is moved
    by up to an eighth; `flip` mirrors half of them. One warp at the end does all geometry."""
    B, warps = len(x), torch.zeros(11, 9)  # operation k warps by exp(s W_k), W_k (3, 3)
    warps[range(4), [1, 3, 2, 5]] = 0.6  # 0, 1: shear x, y; 2, 3: translate x, y
    warps[4, [1, 3]] = torch.tensor([-1.0, 1.0])  # 4: rotate, by up to one radian
    M = torch.eye(3).repeat(B, 1, 1)  # output place -> input place, both in [-1, 1]
    M[:, :2, 2] = (2 * torch.rand(B, 2) - 1) / 4
    if flip:
        M[:, 0, 0] = 2.0 * torch.randint(0, 2, (B,)) - 1
    for _ in range(ops):
        k, s = torch.randint(0, 11, (B,)), (2 * torch.rand(B) - 1) * magnitude
        M = M @ torch.matrix_exp((s[:, None] * warps[k]).view(B, 3, 3))
        k, s = k.view(B, 1, 1, 1).to(x.device), s.view(B, 1, 1, 1).to(x)
        # 5, 6, 7: brightness, contrast, saturation, away from black, from the mean and from grey
        base = (k == 6) * x.mean((1, 2, 3), keepdim=True) + (k == 7) * x.mean(1, keepdim=True)
        x = torch.where((k > 4) & (k < 8), base + (x - base) * (1 + s), x)
        x = torch.where((k == 8) & (x > 1 - s.abs()), 1 - x, x)  # solarise
        levels = (8 * (1 - s.abs())).round().clamp(min=2)
        x = torch.where(k == 9, (x * levels).round() / levels, x).clamp(0, 1)  # posterise; 10: none
    grid = F.affine_grid(M[:, :2].to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def mix(x: Tensor, target: Tensor, mixup: float = 0.8, cutmix: float = 1.0):
    """MixUp (arXiv:1710.09412) or CutMix (1905.04899), by a coin where both alphas are > 0.
    x (B, C, H, W), target (B, K): each image is blended with another, or a box of it is pasted in;
    the image's own share is Beta(alpha, alpha). The targets mix as the pixels do."""
    if not mixup and not cutmix:
        return x, target
    (B, _, H, W), other = x.shape, torch.randperm(len(x)).to(x.device)
    cut = bool(cutmix) and (not mixup or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor(float(cutmix if cut else mixup))
    keep = torch.distributions.Beta(alpha, alpha).sample((B, 1, 1, 1))  # the image's own share
    if cut:
        cy, cx = torch.rand(2, B, 1, 1, 1)
        ys, xs = (torch.arange(H)[:, None] + 0.5) / H, (torch.arange(W) + 0.5) / W
        half = (1 - keep).sqrt() / 2
        keep = 1 - (((ys - cy).abs() < half) & ((xs - cx).abs() < half)).float()  # (B, 1, H, W)
    keep = keep.to(x.device)
    share = keep.mean((2, 3))  # (B, 1): the border may have cut the box, so its pixels are counted
    return keep * x + (1 - keep) * x[other], share * target + (1 - share) * target[other]


# ---- 5. Data ----


def canvas_digits(x: Tensor, seed: int) -> Tensor:
    """Digits x (N, 8, 8) in [0, 1] -> uint8 (N, 32, 32, 3): each enlarged to 14-22 pixels, turned
    by up to 15 degrees, brightly coloured and put somewhere on a dark canvas with some noise."""
    g, N = torch.Generator().manual_seed(seed), len(x)
    share = (14 + 8 * torch.rand(N, 1, 1, generator=g)) / 32  # of the canvas's side
    place = (2 * torch.rand(N, 2, 1, generator=g) - 1) * (1 - share)
    angle = (2 * torch.rand(N, generator=g) - 1) * math.pi / 12
    A = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(N, 2, 2) / share
    grid = F.affine_grid(torch.cat([A, -A @ place], 2), [N, 1, 32, 32], align_corners=False)
    ink = F.grid_sample(x[:, None], grid, align_corners=False)  # (N, 1, 32, 32)
    colour = (c := torch.rand(N, 3, 1, 1, generator=g)) / c.amax(1, keepdim=True)
    x = 0.1 * (1 - ink) + colour * ink + 0.02 * torch.randn(N, 3, 32, 32, generator=g)
    return (x.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()


def load_data(path: str) -> list[Tensor]:
    """digits or a Keras-style npz -> x_train uint8 (N, H, W, C), y_train (N,), x_test, y_test. A
    folder (jpg, png) or npy file -> its first eight images, uint8 (1, H, W, 1 or 3) each."""
    if path == "digits":
        from sklearn.datasets import load_digits

        x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
        x, y = x.view(-1, 8, 8).float() / 16, y.long()  # the test: digits 1297 on, three times each
        test = canvas_digits(x[1297:].repeat(3, 1, 1), 1)
        return [canvas_digits(x[:1297], 0), y[:1297], test, y[1297:].repeat(3)]
    import numpy as np

    if not path.endswith(".npz"):
        from matplotlib.image import imread

        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
        images = [n for n in names if n.lower().endswith((".jpg", ".jpeg", ".png"))][:8]
        images = [imread(os.path.join(path, n)) for n in images] or np.load(path)[:8]
        images = [i if i.dtype.kind != "f" else (i * 255).astype("u1") for i in images]
        return [torch.tensor(i).reshape(1, *i.shape[:2], -1)[..., :3] for i in images]
    with np.load(path, allow_pickle=False) as file:
        names = ("x_train", "y_train", "x_test", "y_test")
        x, y, x_test, y_test = (torch.from_numpy(file[name]) for name in names)
    x, x_test = (t.reshape(*t.shape[:3], -1) for t in (x, x_test))
    y, y_test = y.reshape(len(x)), y_test.reshape(len(x_test))  # Keras's CIFAR-10 has (N, 1)
    good = x.dtype == x_test.dtype == torch.uint8 and x.shape[1:] == x_test.shape[1:]
    good = good and x.shape[3:] in ((1,), (3,)) and 0 <= y_test.min() <= y_test.max() <= y.max()
    if not good or y.min() < 0 or y.is_floating_point() or y_test.is_floating_point():
        raise ValueError(f"{path}: images must be uint8 (N, H, W[, 3]), labels 0 .. K - 1")
    return [x, y.long(), x_test, y_test.long()]


def to_float(x: Tensor, model=None) -> Tensor:
    """uint8 (B, H, W, C) -> (B, C, H, W) in [0, 1], in the size and the channels of a ViT."""
    x = x.permute(0, 3, 1, 2) / 255
    C, *size = getattr(model, "image_shape", x.shape[1:])
    if (C, *size) != x.shape[1:]:
        x = x.mean(1, keepdim=True) if C == 1 else x
        x = F.interpolate(x, size, mode="bilinear", antialias=True).expand(-1, C, -1, -1)
    return x


def normalise(x: Tensor, pixels: str = "half") -> Tensor:
    """[0, 1] -> [-1, 1], as in the paper's code, or ImageNet's units, as DeiT, DINO and MAE."""
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    mean, sd = x.new_tensor(imagenet if pixels == "imagenet" else [[0.5], [0.5]]).view(2, -1, 1, 1)
    return (x - mean) / sd


# ---- 6. The demo: a batch depends on (seed, step) alone, so that a resumed run is exact ----


def build(args, shape) -> dict:
    """Images of shape (H, W, C) -> {name: (model, optimizer, recipe)}."""
    (H, W, C), K, runs = shape, args.classes, {}
    for name in args.models.split(","):  # `plain` is `regularised` with every switch at 0
        torch.manual_seed(args.seed)
        r = {k: getattr(args, k) if name == "regularised" else 0 for k in RECIPE}
        if name == "cnn":  # the opponent, of as many parameters and milliseconds as the demo's ViT
            body = conv_net(C, ((32, 2), (64, 2), (128, 2), (128, 1)))
            model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, K))
        else:
            size = (H, W), args.patch_size, C, K, args.dim, args.depth, args.heads, 4.0, args.pool
            model = ViT(*size, dropout=r["dropout"], drop_path=r["drop_path"])
        groups = {True: [], False: []}  # matrices and filters decay; biases, norms, tokens don't
        for p in model.to(args.device).parameters():
            groups[p.ndim in (2, 4)].append(p)
        groups = [{"params": p, "weight_decay": k * r["weight_decay"]} for k, p in groups.items()]
        runs[name] = model, torch.optim.AdamW(groups, args.lr), r
    return runs


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, pixels: str = "half") -> float:
    """The share of the images x uint8 (N, H, W, C) that the model gives their label y (N,)."""
    model.eval()
    xs = (normalise(to_float(part, model), pixels) for part in x.split(256))
    return (torch.cat([model(x).argmax(-1) for x in xs]) == y).float().mean().item()


def train(args, data, runs, state) -> int:
    """Trains all on the same batches -> exit status: 1 if a loss isn't finite, 130 on Ctrl-C."""
    from tqdm import tqdm

    x_train, y_train, x_val, y_val, *_ = data
    first, t0, stop, stopped = state["step"], time.time(), [], False
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    for step in tqdm(range(first + 1, args.steps + 1), disable=args.rank > 0 or None):
        seed, rows = args.seed * 10**10 + step, []
        g = torch.Generator().manual_seed(seed)
        batch = torch.randint(len(x_train), (args.batch_size,), generator=g).to(x_train.device)
        lr = args.lr * min(1, step / max(1, args.warmup * args.steps))  # warm-up, and a cosine:
        lr = lr * (1 + math.cos(math.pi * step / args.steps)) / 2
        for name, (model, optimizer, r) in runs.items():
            torch.manual_seed(seed)  # for augmentation, dropout and drop_path
            x, target = to_float(x_train[batch]), F.one_hot(y_train[batch], args.classes)
            target = target * (1 - r["smoothing"]) + r["smoothing"] / args.classes
            if r["augment"] or r["flip"]:
                x = rand_augment(x, r["augment"], r["magnitude"], r["flip"])
            x, target = mix(x, target, r["mixup"], r["cutmix"])
            if args.world > 1:  # a process's share of the batch, once mixed, and its own dropout
                x, target = x[args.rank :: args.world], target[args.rank :: args.world]
                torch.manual_seed(seed + args.rank * 10**8)
            loss = F.cross_entropy(model.train()(normalise(x, args.pixels)), target)
            optimizer.zero_grad(); loss.backward()  # fmt: skip
            now = torch.stack([loss.detach(), loss.new_tensor(float(len(stop)))])
            if args.world > 1:  # means over the processes: the whole batch's
                for t in (now, *(p.grad for p in model.parameters())):
                    dist.all_reduce(t.div_(args.world))
            loss, stopped = now.tolist()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Appendix B.1
            if not math.isfinite(loss + norm):
                why = f"{name}: loss {loss:.4g}, gradient {norm:.4g} at step {step}"
                print(f"vit.py: stopped: {why}", file=sys.stderr)
                return 1
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            rows.append((step, name, loss))
        if args.rank == 0 and (stopped or step % args.log_every == 0 or step == args.steps):
            accs = [accuracy(runs[name][0], x_val, y_val, args.pixels) for _, name, _ in rows]
            rows = [(*row, acc) for row, acc in zip(rows, accs)]
            now = [f"{name} loss {loss:.3f} val acc {acc:.3f}" for _, name, loss, acc in rows]
            now.append(f"{(time.time() - t0) / (step - first) * 1e3:.0f} ms/step")
            tqdm.write(" | ".join([f"step {step:5d}/{args.steps}", *now]))
            state["history"] += rows
            if args.save:  # beside its place, then moved there: a crash leaves the old one
                state["step"], state["args"] = step, vars(args)
                state["models"] = {name: m.state_dict() for name, (m, *_) in runs.items()}
                state["optimizers"] = {name: o.state_dict() for name, (_, o, _) in runs.items()}
                torch.save(state, args.save + ".tmp")
                os.replace(args.save + ".tmp", args.save)
        if stopped:
            return 130
    return 0


@torch.no_grad()
def draw_picture(args, model: ViT, x: Tensor, truth, history):
    """Curves, filters, similarity of positions, rollout of eight images: uint8 or as `to_float`."""
    from matplotlib.figure import Figure  # without pyplot no window is opened

    (h, w), n = model.grid, model.prefix
    x = x if x.is_floating_point() else to_float(x[:8], model)
    fig = Figure(figsize=(13, 7.5), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[1.15, 1])
    a, b, c = top.subplots(1, 3)
    for name in dict.fromkeys(row[1] for row in history):
        a.plot(*zip(*[(row[0], row[3]) for row in history if row[1] == name]), ".-", label=name)
    a.set(title="accuracy on held-out training images", xlabel="step", ylim=(0, 1.02))
    a.legend() if history else a.set_visible(False)
    E = model.patch_embed.proj.weight.float().cpu()  # (D, C, p, q)
    V = torch.linalg.svd(E.flatten(1), full_matrices=False).Vh[:28].unflatten(1, E.shape[1:])
    V = F.pad(V / V.abs().amax((1, 2, 3), keepdim=True), (1,) * 4, value=1.0) / 2 + 0.5
    V = torch.cat([V, V.new_ones(-len(V) % 7, *V.shape[1:])]).unflatten(0, (-1, 7))
    b.imshow(V.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2), cmap="gray")  # seven to a row
    b.set(title="filters: principal components of E (Fig. 7, left)", xticks=[], yticks=[])
    pos = F.normalize(model.pos_embed[0, n:].float().cpu(), dim=-1)
    maps = F.pad((pos @ pos.T).view(h, w, h, w), (0, 1, 0, 1), value=math.nan)
    top.colorbar(c.imshow(maps.transpose(1, 2).flatten(2).flatten(0, 1), vmin=-1, vmax=1), ax=c)
    c.set(title="cosine of positions, by patch (Fig. 7, centre)", xticks=[], yticks=[])
    inputs = normalise(x, args.pixels)
    R = attention_rollout(model.eval().attention(inputs))  # (B, prefix + N, prefix + N)
    R = (R[:, 0, n:] if model.pool == "cls" else R[:, n:, n:].mean(1)).view(-1, 1, h, w)
    R = F.interpolate(R / R.amax((2, 3), keepdim=True), x.shape[2:], mode="bilinear")
    guess = model(inputs).argmax(-1) if isinstance(model.head, nn.Linear) else "-" * 8
    bottom.suptitle("images with answer (truth), and where it looked: attention rollout (Fig. 6)")
    for i, axes in enumerate(bottom.subplots(2, len(x), squeeze=False).T):
        for axis in axes:
            axis.imshow(x[i].permute(1, 2, 0).cpu(), cmap="gray", vmin=0, vmax=1)
            axis.axis("off")
        axes[1].imshow(R[i, 0].cpu(), cmap="inferno", alpha=0.6)
        axes[0].set_title(f"{guess[i]} ({truth[i]})")
    fig.savefig(os.path.join(args.out, "vit.png"), dpi=80)


RECIPE = {  # what the regularised ViT has and the plain one has not: default, least, most, meaning
    "augment": (1, 0, 99, "RandAugment operations per image (DeiT: 2)"),
    "magnitude": (0.5, 0, 1, "their strength (DeiT: 0.9)"),
    "flip": (0, 0, 1, "1: mirror with probability 1/2, which digits don't bear (DeiT: 1)"),
    "mixup": (0.0, 0, 99, "MixUp's alpha (DeiT: 0.8)"),
    "cutmix": (0.0, 0, 99, "CutMix's alpha (DeiT: 1)"),
    "smoothing": (0.1, 0, 0.99, "label smoothing (DeiT: 0.1)"),
    "drop_path": (0.0, 0, 0.99, "stochastic depth (DeiT: 0.1)"),
    "dropout": (0.0, 0, 0.99, "dropout (paper: 0.1, DeiT: 0)"),
    "weight_decay": (0.05, 0, 99, "decoupled weight decay (paper: 0.03 to 0.3, DeiT: 0.05)"),
}
DEFAULTS = {
    "seed": (0, 0, 10**8, "of weights, batches, augmentation"),
    "log_every": (100, 1, math.inf, "steps between log lines"),
    "steps": (2000, 1, math.inf, "paper: 300 epochs of ImageNet"),
    "batch_size": (64, 1, math.inf, "paper: 4096"),
    "lr": (2e-3, 1e-12, 1e32, "peak rate (paper: 3e-3)"),
    "warmup": (0.05, 0, 1, "share of the steps over which the rate rises, 0: none"),
    "patch_size": (8, 1, math.inf, "pixels (paper: 14, 16 or 32 of 224)"),
    "dim": (64, 1, math.inf, "width D (paper: 768 to 1280)"),
    "depth": (4, 1, math.inf, "layers (paper: 12 to 32)"),
    "heads": (4, 0, math.inf, "attention heads (paper: 12 or 16); official weights: 0, for D / 64"),
    **RECIPE,
}


def parse(argv):
    """-> args, data, runs (as `build`), state. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", default="digits", help="default digits; FILE.npz; to draw, a folder or .npy")
    flag("--models", help="default regularised,plain,cnn on digits, else regularised alone")
    for name, (value, *_, text) in DEFAULTS.items():
        name, text = f"--{name.replace('_', '-')}", f"default {value}: {text}"
        flag(name, type=type(value), default=value, help=text)
    flag("--pool", choices=["cls", "mean"], default="cls", help="default cls (paper: cls)")
    flag("--image-size", type=int, help="official weights: resize their positions for this size")
    text = "default half; official weights: imagenet, for Google's (timm's vit_*) say half"
    flag("--pixels", choices=["half", "imagenet"], default="half", help=text)
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate, to go on with (more --steps), or official weights")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, default=0, help="exit 1 if the first test accuracy is below this")
    args, ckpt = parser.parse_args(argv), {}
    try:
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script", "vit") != "vit":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        if own := ckpt.get("args", {}):
            known = {k: own[k] for k in ("data", "models", "pool", "pixels", *DEFAULTS)}
            parser.set_defaults(**known | {"steps": ckpt["step"]})
        elif args.load:  # official weights
            parser.set_defaults(pixels="imagenet", heads=0)
        elif args.quick:
            parser.set_defaults(steps=4)
        args = parser.parse_args(argv)  # again: what the command line says goes first
        for name, (_, low, high, _) in DEFAULTS.items():
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=args.device)
        args.rank, args.world = (int(os.environ.get(*k)) for k in (("RANK", 0), ("WORLD_SIZE", 1)))
        data, labels = load_data(args.data), args.data == "digits" or args.data.endswith(".npz")
        if labels:
            args.classes, size = int(data[1].max()) + 1, 200 if args.quick else None
            x, y, *test = (t[:size].to(args.device) for t in data)
            n = len(x) * 9 // 10  # the last tenth is held out
            data = [x[:n], y[:n], x[n:], y[n:], *test]
        if labels and (own or not args.load):
            args.models = args.models or "regularised" + ",plain,cnn" * (args.data == "digits")
            if args.image_size or (args.pixels == "imagenet" and x.shape[3] == 1):
                raise ValueError("--image-size needs official weights, --pixels imagenet colour")
            if not set(args.models.split(",")) <= {"regularised", "plain", "cnn"}:
                raise ValueError("--models takes regularised, plain and cnn")
            if args.batch_size > n or args.batch_size % args.world:
                raise ValueError(f"--batch-size must be at most {n}, a multiple of the processes")
            runs = build(args, data[0].shape[1:])
            for name, (model, optimizer, r) in runs.items() if own else ():
                model.load_state_dict(ckpt["models"][name])
                optimizer.load_state_dict(ckpt["optimizers"][name])
                optimizer.param_groups[0]["weight_decay"] = r["weight_decay"]  # the flag goes first
        else:
            weights = [w for name, w in ckpt.get("models", {"": ckpt}).items() if name != "cnn"]
            model = ViT.from_state_dict(weights[0], args.image_size, args.heads).to(args.device)
            if labels and isinstance(model.head, nn.Identity):
                raise ValueError("weights without a head (DINO, MAE) can only draw: give a folder")
            if not labels:
                data = [torch.cat([to_float(i.to(args.device), model) for i in data]), "?" * 8]
            runs = {"loaded": (model, None, None)}
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "vit.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, data, runs, ckpt if own else {"script": "vit", "step": 0, "history": []}


def main(argv=None) -> int:
    args, (*train_val, x_test, y_test), runs, state = parse(argv)
    model, trained, _ = next(iter(runs.values()))
    t0, status, accs, line = time.time(), 0, {}, f"drew {args.data}"
    count, kind = sum(p.numel() for p in model.parameters()) / 1e6, os.path.basename(args.data)
    kind += f" {len(train_val[0])}/{len(x_test)}" if train_val else ""
    if args.rank == 0:
        text = f"vit | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}"
        print(text, flush=True)
    if trained and state["step"] < args.steps:
        if args.world > 1:  # started by torchrun
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        before = signal.getsignal(signal.SIGINT)
        try:
            status = train(args, train_val, runs, state)
        finally:
            signal.signal(signal.SIGINT, before)
        if args.world > 1:
            dist.destroy_process_group()
    if status == 1 or args.rank:  # not finite, or one of torchrun's other processes: after Ctrl-C
        return int(status == 1)  # these return 0, or torchrun would stop the first, which saves
    if train_val:
        for name, (m, *_) in runs.items():
            accs[name] = accuracy(m, x_test, y_test, args.pixels)
        line = "test acc " + " | ".join(f"{name} {acc:.4f}" for name, acc in accs.items())
    if trained:
        from sklearn.neighbors import KNeighborsClassifier

        x, x_new = (t.cpu().flatten(1).numpy().astype("f4") for t in (train_val[0], x_test))
        knn = KNeighborsClassifier(5).fit(x, train_val[1].cpu()).score(x_new, y_test.cpu())
        line += f" | chance {1 / args.classes:.3f} | raw-pixel k-NN {knn:.4f}"
    for shown in [m for m, *_ in runs.values() if isinstance(m, ViT)][:1]:
        draw_picture(args, shown, x_test, y_test, state["history"])
    print(f"{line} | {time.time() - t0:.0f} s")
    return status or int(next(iter(accs.values()), 0.0) < args.target)


if __name__ == "__main__":
    sys.exit(main())
