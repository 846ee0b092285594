"""MAE: hide three quarters of an image's patches, encode the rest, paint what was hidden.

Paper    Masked Autoencoders Are Scalable Vision Learners -- Kaiming He, Xinlei Chen, Saining Xie,
         Yanghao Li, Piotr Dollar, Ross Girshick, November 2021, arXiv:2111.06377v3
Idea     Pixels repeat what their neighbours say: a few missing patches are filled in by copying.
         With 75 % missing that fails, and the network has to learn what things look like. The
         encoder sees the visible quarter alone, so pre-training is also several times faster.
Figure   (Figure 1)

         image (B, C, H, W) -- patchify --> x_p (B, N, p q C) -- the masked ones --> target ----+
           | patch_embed, + pos_embed                                                           |
         z (B, N, D) -- keep n = N (1 - ratio) at random, class token --> (B, 1 + n, D)         |
           | encoder: depth layers on the visible patches only                                  |
         z (B, 1 + n, D) -- decoder_embed, N - n mask tokens, each token to its own place       |
           |                --> y (B, 1 + N, D_dec), + decoder_pos_embed                        |
           | decoder: few narrow layers, thrown away afterwards                                 |
         y (B, 1 + N, D_dec) -- decoder_pred --> pred (B, N, p q C) --> mean square error <-----+
Symbols  (the paper has no formulas)                 x_p, target | patches (B, N, p q C)
         z, y | tokens of the encoder (B, 1 + n, D) and of the decoder (B, 1 + N, D_dec)
         noise | (B, N), whose order decides which patches stay   mask | (B, N), 1 = hidden
         ids_keep | places of the visible patches (B, n)   ids_restore | (B, N) undoes the shuffle
         dim, depth, decoder_dim, decoder_depth | widths D, D_dec and numbers of layers
Differs  The number of visible patches is rounded, not cut off: 10 patches at 90 % leave 1, not 0.
         Gradients are clipped at norm 1, for a high rate and few steps. Fine-tuning has no
         layer-wise decay, MixUp, stochastic depth, so that it is the recipe from scratch, too; the
         probe is a logistic regression on the mean of the patches' tokens, without batch norm.
         Demo: 16 patches of 8 pixels, so half of them hidden and not 75 %; targets not normalised.
Run      python mae.py                           # canvas digits, 8 minutes on one core
         python mae.py --data cifar10.npz --patch-size 4 --dim 192 --depth 12 --heads 3 --flip 0.5
                --decoder-dim 96 --decoder-depth 2 --mask-ratio 0.75 --norm-pix 1 --crop 0.2
                --lr 1e-3 --steps 100000 --tune-steps 5000     # long, not measured
         python mae.py --load mae_visualize_vit_base.pth --data FOLDER   # official weights paint
         torchrun --nproc-per-node 8 mae.py --data cifar10.npz          # splits the batch
Expect   Test accuracy after 800 steps of fine-tuning, seeds 0-2: 1,000 labels .783 +- .023, from
         scratch .367 +- .025; 100 labels .329 +- .037, from scratch .216 +- .013. Most of it is a
         head start: from scratch, 1,600 steps on 1,000 labels reached .752 (one seed). The 800
         were chosen after test figures of 400 steps had been seen (seed 2: MAE .711, scratch .251).
         Mean square error of hidden pixels .0075 +- .0004; filled with the visible mean .0247.
         Linear probe, 1,000 labels .321 +- .006, all .362 +- .005 (random network .195, .236; grey
         centred pixels .149, .156). k-NN, 1,000 labels: .184, below grey centred pixels' .502.
         Short runs with 25, 50, 75 % hidden: linear .229, .224, .227 (seed 1), no trend to be
         seen; the encoder is 1.2, 1.7, 2.7 times as fast as on all patches.
         Paper: ViT-B/L/H fine-tuned on ImageNet 83.6 / 85.9 / 86.9 %.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Layers of a Vision Transformer, pre-norm, with the names of vit.py ----


class Attention(nn.Module):
    """MSA, (B, N, D) -> (B, N, D). The rows of `qkv` are q, k, v, and head by head within each."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, D_h)
        y = F.scaled_dot_product_attention(q, k, v)
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

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attn(self.norm1(z))
        return z + self.mlp(self.norm2(z))


# ---- 2. Images as patches, places as waves ----


def pair(x) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else tuple(x)


def patchify(x: Tensor, patch) -> Tensor:
    """x (B, C, H, W) -> x_p (B, N, p q C): patches row by row, each with the channel last.

    Channel last, unlike a convolution's filters: the order of `decoder_pred` in official weights.
    """
    (B, C, H, W), (p, q) = x.shape, pair(patch)
    x = x.reshape(B, C, H // p, p, W // q, q).permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/q, p, q, C)
    return x.reshape(B, (H // p) * (W // q), p * q * C)


def unpatchify(x_p: Tensor, patch, grid) -> Tensor:
    """The way back: x_p (B, N, p q C) -> x (B, C, H, W), for a grid of (H / p, W / q) patches."""
    (p, q), (h, w) = pair(patch), grid
    x = x_p.reshape(len(x_p), h, w, p, q, -1).permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, q)
    return x.reshape(len(x_p), -1, h * p, w * q)


class PatchEmbed(nn.Module):
    """x (B, C, H, W) -> z (B, N, D). The weight is stored as the convolution's that it is."""

    def __init__(self, channels: int, patch, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, pair(patch), stride=pair(patch))

    def forward(self, x: Tensor) -> Tensor:
        x_p, E = patchify(x, self.proj.kernel_size), self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x_p, E, self.proj.bias)


def sincos_positions(dim: int, grid) -> Tensor:
    """Fixed positions (1, 1 + N, dim): sines, cosines of the column, then of the row (Section 3).

    The column comes first because official weights expect it so; the class token's row is zero.
    """
    if dim % 4:
        raise ValueError(f"dim {dim} is not a multiple of 4, which 2-D positions need")
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = torch.meshgrid(*(torch.arange(n).double() for n in grid), indexing="ij")
    rows, cols = (t.reshape(-1, 1) * omega for t in (rows, cols))  # (N, dim / 4)
    places = torch.cat([cols.sin(), cols.cos(), rows.sin(), rows.cos()], 1)
    return F.pad(places, (0, 0, 1, 0)).float()[None]


# ---- 3. Masking (Section 3, "Masking" and "Simple implementation") ----


def random_masking(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """noise (B, N) -> ids_keep (B, n), mask (B, N) with 1 = hidden, ids_restore (B, N).

    The n = N (1 - ratio) patches of least noise stay, the same number in every image: no sparse
    operations. Place i of the image is entry ids_restore[i] of the shuffled list.
    """
    N = noise.shape[1]
    n = max(1, min(N - 1, round(N * (1 - ratio))))
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)  # the inverse permutation
    return ids_shuffle[:, :n], (ids_restore >= n).float(), ids_restore


# ---- 4. Encoder and decoder (Section 3) ----


class Encoder(nn.Module):
    """Images (B, in_chans, H, W) -> tokens (B, 1 + n, dim), those in ids_keep (B, n) or all."""

    def __init__(
        self, image_size=224, patch_size=16, in_chans=3, dim=1024, depth=24, heads=16
    ):  # fmt: skip
        super().__init__()
        (H, W), (p, q) = pair(image_size), pair(patch_size)
        if min(p, q) < 1 or H % p or W % q:
            raise ValueError(f"patches of {p} x {q} don't tile an image of {H} x {W}")
        self.image_shape, self.patch, self.grid = (in_chans, H, W), (p, q), (H // p, W // q)
        self.patch_embed = PatchEmbed(in_chans, patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(dim, self.grid)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def init_weights(self):
        """As the official code: Xavier for every matrix, E included, biases zero, tokens small."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view
        for name, p in self.named_parameters():
            if name in ("cls_token", "mask_token"):
                nn.init.normal_(p, std=0.02)

    def forward_features(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images are {tuple(x.shape[1:])}, the model wants {self.image_shape}")
        z = self.patch_embed(x) + self.pos_embed[:, 1:]  # (B, N, D): places before any goes
        if ids_keep is not None:
            z = z.gather(1, ids_keep[..., None].expand(-1, -1, z.shape[2]))  # (B, n, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        z = torch.cat([cls, z], 1)  # no mask tokens in the encoder: less work, better features
        for block in self.blocks:
            z = block(z)
        return self.norm(z)


class MAE(Encoder):
    """forward(x) -> loss, pred (B, N, p q C), mask (B, N). Defaults: ViT-L/16 as in the paper.

    norm_pix: each patch of the target gets mean 0 and variance 1 (Table 1d: better features; the
    picture then takes mean and variance from the original). Names and shapes are the official ones.
    """

    def __init__(
        self, image_size=224, patch_size=16, in_chans=3, dim=1024, depth=24, heads=16,
        decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pix=True,
    ):  # fmt: skip
        super().__init__(image_size, patch_size, in_chans, dim, depth, heads)
        if math.prod(self.grid) < 2:
            raise ValueError("an image of one patch has nothing to hide and something to see")
        self.norm_pix, width = norm_pix, decoder_dim
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sincos_positions(width, self.grid)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        blocks = (Block(width, decoder_heads) for _ in range(decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, math.prod(self.patch) * in_chans)
        self.init_weights()

    def decode(self, z: Tensor, ids_restore: Tensor) -> Tensor:
        """z (B, 1 + n, D) of the visible patches -> pred (B, N, p q C) of all."""
        z, (B, N) = self.decoder_embed(z), ids_restore.shape
        hidden = self.mask_token.expand(B, 1 + N - z.shape[1], -1)  # (B, N - n, D_dec)
        y = torch.cat([z[:, 1:], hidden], 1)  # shuffled: the visible ones, then the hidden ones
        y = y.gather(1, ids_restore[..., None].expand(-1, -1, y.shape[2]))  # each at its place
        y = torch.cat([z[:, :1], y], 1) + self.decoder_pos_embed  # else mask tokens are all alike
        for block in self.decoder_blocks:
            y = block(y)
        return self.decoder_pred(self.decoder_norm(y))[:, 1:]

    def target(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, C, H, W) -> what to predict (B, N, p q C), and mean, sd (B, N, 1) taken out."""
        t = patchify(x, self.patch)
        if not self.norm_pix:
            return t, torch.zeros_like(t[..., :1]), torch.ones_like(t[..., :1])
        mean, sd = t.mean(-1, keepdim=True), (t.var(-1, keepdim=True) + 1e-6).sqrt()
        return (t - mean) / sd, mean, sd

    def forward(self, x: Tensor, ratio: float = 0.75, noise: Tensor | None = None):
        """noise (B, N) picks the patches; None: drawn here. Equal noise, equal masks."""
        if noise is None:
            noise = torch.rand(len(x), math.prod(self.grid), device=x.device)
        ids_keep, mask, ids_restore = random_masking(noise, ratio)
        pred = self.decode(self.forward_features(x, ids_keep), ids_restore)
        return mae_loss(pred, self.target(x)[0], mask), pred, mask

    def reconstruct(self, x: Tensor, pred: Tensor) -> Tensor:
        """pred as pixels (B, C, H, W), normalisation undone with mean and sd of x's patches."""
        _, mean, sd = self.target(x)
        return unpatchify(pred * sd + mean, self.patch, self.grid)

    @classmethod
    def from_state_dict(cls, w: dict, heads=None, decoder_heads=None, norm_pix=False) -> "MAE":
        """The model that fits official weights ({"model": ...}), with them.

        Heads leave no trace in weights: D / 64 (16 at D = 1280) and 16 if they aren't given. The
        `mae_visualize` files were trained on plain pixels: norm_pix=False.
        """
        w = w.get("model", w)
        if not {"patch_embed.proj.weight", "mask_token", "decoder_pred.weight"} <= set(w):
            raise ValueError("these are no weights of an MAE with its decoder")
        dim, C, *patch = w["patch_embed.proj.weight"].shape
        side, width = math.isqrt(w["pos_embed"].shape[1] - 1), w["mask_token"].shape[2]
        depths = [sum(k.startswith(p) and k.endswith("norm1.bias") for k in w)
                  for p in ("blocks.", "decoder_blocks.")]  # fmt: skip
        model = cls(
            (side * patch[0], side * patch[1]), patch, C, dim, depths[0],
            heads or (16 if dim == 1280 else max(1, dim // 64)),
            width, depths[1], decoder_heads or 16, norm_pix,
        )  # fmt: skip
        model.load_state_dict(w)
        return model


class Classifier(Encoder):
    """The encoder with a linear head on the mean of its patches: images -> logits (B, K).

    As in the official fine-tuning (and vit.py with pool="mean"), `fc_norm` replaces `norm`.
    """

    def __init__(
        self, image_size=224, patch_size=16, in_chans=3, dim=1024, depth=24, heads=16,
        num_classes=1000,
    ):  # fmt: skip
        super().__init__(image_size, patch_size, in_chans, dim, depth, heads)
        self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.init_weights()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # the first loss is ln K

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc_norm(self.forward_features(x)[:, 1:].mean(1)))


# ---- 5. Objective (Section 3, "Reconstruction target") ----


def mae_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean square error of pred, target (B, N, p q C) over the hidden patches, mask (B, N) = 1.

    The visible ones are left out: painting what one sees teaches little, and accuracy drops.
    """
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


# ---- 6. Data: a batch is a function of (seed, step), so a resumed run sees what it would have ----


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


def normalise(x: Tensor, pixels: str = "half", back: bool = False) -> Tensor:
    """[0, 1] -> [-1, 1], or ImageNet's units, as official weights expect; back: the way back."""
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    mean, sd = x.new_tensor(imagenet if pixels == "imagenet" else [[0.5], [0.5]]).view(2, -1, 1, 1)
    return x * sd + mean if back else (x - mean) / sd


def augment(x: Tensor, u: Tensor, crop: float, flip: float = 0.0, rotate: float = 0.0) -> Tensor:
    """Random views of images x (B, 3, H, W) as u (B, 6), uniform in [0, 1), says: all of it a warp.

    crop: least share of the area, resized back, aspect 3/4 to 4/3; flip: probability; rotate:
    degrees either way. MAE needs no more (Table 1e), and no colours.
    """
    u, shape = u.to(x), list(x.shape)
    s = 2 * u - 1  # (B, 6), in [-1, 1)
    area, ratio = crop + (1 - crop) * u[:, 0], (s[:, 1] * math.log(4 / 3)).exp()
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # (B, 2)
    place, angle = s[:, 2:4] * (1 - half), s[:, 4] * math.radians(rotate)
    mirror = torch.where(u[:, 5] < flip, -1.0, 1.0)
    R = torch.stack([mirror * angle.cos(), -angle.sin(), mirror * angle.sin(), angle.cos()], 1)
    M = torch.cat([half[:, :, None] * R.view(-1, 2, 2), place[:, :, None]], 2)  # output -> input
    grid = F.affine_grid(M, shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


# ---- 7. Training ----


def build(args, x: Tensor) -> MAE:
    """The untrained model of this seed for images x uint8 (N, H, W, 3)."""
    torch.manual_seed(args.seed)
    names = "patch_size dim depth heads decoder_dim decoder_depth decoder_heads norm_pix".split()
    sizes = {name: getattr(args, name) for name in names}
    return MAE(tuple(x.shape[1:3]), in_chans=3, **sizes).to(x.device)


def make_optimizer(model: nn.Module, args, lr: float) -> torch.optim.Optimizer:
    groups = {True: [], False: []}  # matrices and filters decay; biases, norms, tokens don't
    for p in model.parameters():
        groups[p.ndim in (2, 4)].extend([p] if p.requires_grad else [])
    groups = [{"params": p, "weight_decay": k * args.weight_decay} for k, p in groups.items()]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95))


def schedule(optimizer, step: int, steps: int, lr: float, warmup: float):
    """Sets the rate of this step: linear warm-up, then half a cosine down to 0."""
    rate = min(1, step / max(1, warmup * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = lr * rate


def train(model: MAE, optimizer, x: Tensor, x_val: Tensor, args, state) -> bool:
    """Pre-trains up to args.steps, without labels; updates state. -> stopped by Ctrl-C?"""
    from tqdm import tqdm

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = slice(rank, None, world)  # all processes draw the same batch and each takes its rows
    N, B, first, last = math.prod(model.grid), args.batch_size, state["step"], args.steps
    stop, t0 = [], time.time()
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    try:
        for step in tqdm(range(first + 1, last + 1), disable=True if rank else None):
            g = torch.Generator().manual_seed(args.seed * 10**10 + step)
            rows = torch.randint(len(x), (B,), generator=g)[mine].to(x.device)
            u, noise = (torch.rand(B, n, generator=g)[mine].to(x.device) for n in (6, N))
            images = augment(to_float(x[rows]), u, args.crop, args.flip)
            loss, _, _ = model(normalise(images), args.mask_ratio, noise)
            schedule(optimizer, step, last, args.lr, args.warmup)
            optimizer.zero_grad(); loss.backward()  # fmt: skip
            if world > 1:  # mean over the processes: the gradient of the whole batch
                for tensor in [loss.data, *(p.grad for p in model.parameters() if p.requires_grad)]:
                    dist.all_reduce(tensor.div_(world))
                ended = torch.tensor(float(bool(stop)), device=x.device)
                dist.all_reduce(ended)  # Ctrl-C in one process ends all
                stop += [True] * int(ended)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item() + norm.item()):
                raise FloatingPointError(f"loss {loss.item()} or gradient at step {step}")
            optimizer.step()
            if rank == 0 and (stop or step % args.log_every == 0 or step == last):
                val, fill, _ = masked_error(model, x_val, args.mask_ratio)
                state |= {"step": step, "history": [*state["history"], (step, loss.item(), val)]}
                now = f"loss {loss.item():.4f} | val error {val:.4f} (filled with mean {fill:.4f})"
                ms = (time.time() - t0) / (step - first) * 1e3
                tqdm.write(f"step {step:5d}/{last} | {now} | {ms:.0f} ms/step")
                if args.save:
                    save(args, model, optimizer, state)
            if stop:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    return bool(stop)


def save(args, model, optimizer, state):
    """Writes the checkpoint beside its place, then moves it there: a crash leaves the old one."""
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"script": "mae", "args": vars(args), **state, **parts}, args.save + ".tmp")
    os.replace(args.save + ".tmp", args.save)


def fine_tune(start: MAE | None, x: Tensor, y: Tensor, K: int, args) -> Classifier:
    """A classifier trained with labels y of uint8 images x: from `start`'s encoder or scratch."""
    torch.manual_seed(args.seed)
    sizes = (tuple(x.shape[1:3]), args.patch_size, 3, args.dim, args.depth, args.heads)
    model = Classifier(*sizes, K).to(x.device)
    if start is not None:
        trunk = {k: v for k, v in start.state_dict().items() if k in model.state_dict()}
        model.load_state_dict(trunk, strict=False)  # all but fc_norm and head, which are new
    optimizer, steps = make_optimizer(model, args, args.tune_lr), args.tune_steps
    for step in range(1, steps + 1):
        g = torch.Generator().manual_seed(args.seed * 10**10 + step)
        rows = torch.randint(len(x), (min(len(x), 64),), generator=g).to(x.device)
        u = torch.rand(len(rows), 6, generator=g)
        images = augment(to_float(x[rows]), u, 0.7, args.flip, 10.0)
        loss = F.cross_entropy(model(normalise(images)), y[rows])
        schedule(optimizer, step, steps, args.tune_lr, 0.1)
        optimizer.zero_grad(); loss.backward()  # fmt: skip
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


# ---- 8. Evaluation and picture ----


@torch.no_grad()
def masked_error(model: MAE, x: Tensor, ratio: float, pixels: str = "half"):
    """Mean square errors over hidden pixels of images x uint8 (n, H, W, 3), pixels in [0, 1].

    -> the model's, that of filling with the visible pixels' mean colour, and of the first eight
    images (n, 3, H, W): original, masked, painted. The masks are always the same.
    """
    g, errors, shown = torch.Generator().manual_seed(0), [], []
    for part in x.split(256):
        part = part if part.is_floating_point() else to_float(part)
        noise = torch.rand(len(part), math.prod(model.grid), generator=g).to(part.device)
        inputs = normalise(part, pixels)
        _, pred, mask = model(inputs, ratio, noise)
        painted = normalise(model.reconstruct(inputs, pred), pixels, back=True)
        hidden = mask[..., None].expand(-1, -1, pred.shape[2])
        hidden = unpatchify(hidden, model.patch, model.grid)  # (B, 3, H, W), 1 = hidden
        mean = (part * (1 - hidden)).sum((2, 3), True) / (1 - hidden).sum((2, 3), True)
        pair_of_errors = [((guess - part) ** 2 * hidden).sum() for guess in (painted, mean)]
        errors.append(torch.stack([*pair_of_errors, hidden.sum()]))
        shown = shown or [
            part,
            torch.where(hidden > 0, 0.5, part),
            torch.where(hidden > 0, painted, part),
        ]
    error, fill, count = torch.stack(errors).sum(0).tolist()
    return error / count, fill / count, [t[:8].cpu() for t in shown]


def encoder_speed(model: MAE, ratio: float, B: int = 128) -> float:
    """Milliseconds per 1,000 images of the encoder's forward and backward; the best of ten."""
    N, times, device = math.prod(model.grid), [], model.cls_token.device
    x, noise = torch.rand(B, *model.image_shape, device=device), torch.rand(B, N, device=device)
    keep = random_masking(noise, ratio)[0] if ratio else None
    for _ in range(11):
        t0 = time.time()
        model.forward_features(x, keep).sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append((time.time() - t0) / B * 1e6)
    model.zero_grad()
    return min(times[1:])


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


def tokens(model: Encoder):
    """Frozen features for `evaluate`: images (B, 3, H, W) -> mean of the patches' tokens (B, D)."""
    return lambda x: model.forward_features(normalise(x))[:, 1:].mean(1)


def study(model: MAE, random: MAE, data, x_val: Tensor, args):
    """What pre-training is worth, printed -> accuracies by (labels, start), [(ratio, linear, ms)].

    Fine-tuning on few labels against the same recipe from scratch (Section 5), frozen features, and
    equal short runs at three mask ratios (Figure 5) with the encoder's time (Section 3, Table 2).
    """
    (x, y, x_test, y_test), K, accs, nets, curve = data, int(data[1].max()) + 1, {}, {}, []
    for n in dict.fromkeys(min(n, len(x)) for n in (100, 1000, len(x))):
        rows = labelled(x, n, args.seed)
        for name, start in (("MAE", model), ("scratch", None))[n > 1000 :]:
            net = nets[n, name] = fine_tune(start, x[rows], y[rows], K, args)
            logits = features(lambda x, net=net: net(normalise(x)), x_test)
            accs[n, name] = float((logits.argmax(1) == y_test.cpu().numpy()).mean())
        now = " | ".join(f"{name} {acc:.3f}" for (k, name), acc in accs.items() if k == n)
        print(f"test acc, {args.tune_steps} steps with {n:5d} labels | {now}", flush=True)
    supervised = {n: (lambda x, net=net: net.fc_norm(tokens(net)(x)))
                  for (n, name), net in nets.items() if name == "scratch"}  # fmt: skip
    frozen = {"MAE": tokens(model), "random network": tokens(random), "supervised": supervised}
    frozen |= {"raw pixels": lambda x: x, "grey centred pixels": grey_centred}
    print("test acc, frozen features    k-NN 1,000  linear 1,000   k-NN all  linear all")
    for name, encoder in frozen.items():
        row = evaluate({name: encoder}, data, seed=args.seed)[name]
        print(f"{name:24s}" + "".join(f"{acc:12.3f}" for acc in row), flush=True)
    full = encoder_speed(random, 0)
    for ratio in (0.25, 0.5, 0.75):
        short = vars(args) | {"steps": max(1, args.steps // 6), "mask_ratio": ratio, "save": None}
        short = argparse.Namespace(**short | {"log_every": math.inf})
        other = copy.deepcopy(random)
        state, optimizer = {"step": 0, "history": []}, make_optimizer(other, short, short.lr)
        if train(other, optimizer, x, x_val, short, state):
            raise KeyboardInterrupt
        acc, ms = evaluate({0: tokens(other)}, data)[0][3], encoder_speed(other, ratio)
        curve.append((ratio, acc, ms))
        now = f"{ms:.0f} ms per 1,000 images, {full / ms:.1f} times as fast as on all patches"
        print(f"mask ratio {ratio:.2f} | linear, all labels {acc:.3f} | encoder {now}", flush=True)
    return accs, curve


def draw_picture(args, shown, accs=None, curve=()):
    """Masked input, painted, original; right: fine-tuning against scratch, and the ratio curve."""
    from matplotlib.figure import Figure  # without pyplot no window is opened

    (x, masked, painted), names = shown, ("original", f"{args.mask_ratio:.0%} hidden", "painted")
    fig = Figure(figsize=(13, 4.2) if accs else (10, 4.2), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1.7, 1]) if accs else (fig, None)
    axes, order = left.subplots(3, len(x), squeeze=False), (masked, painted, x)
    for row, images in enumerate(order):
        for axis, image in zip(axes[row], images):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel((names[1], names[2], names[0])[row])
    if accs:
        a, b = right.subplots(2, 1)
        labels = [n for n, name in accs if name == "MAE"]
        for i, (name, colour) in enumerate((("MAE", "tab:blue"), ("scratch", "lightgray"))):
            places, heights = (
                [k + 0.4 * i for k in range(len(labels))],
                [accs[n, name] for n in labels],
            )
            a.bar_label(a.bar(places, heights, 0.4, color=colour, label=name), fmt="%.2f")
        a.set_xticks([k + 0.2 for k in range(len(labels))], [f"{n:,} labels" for n in labels])
        a.set(title="test accuracy, fine-tuned", ylim=(0, 1.1))
        a.legend(loc="upper left")
        ratios, accuracies, times = zip(*curve)
        b.plot(ratios, accuracies, "o-")
        b.set(title="short runs by mask ratio (Fig. 5)", xlabel="mask ratio", ylabel="linear probe")
        c = b.twinx()
        c.plot(ratios, times, "s:", color="tab:red")
        c.set_ylabel("encoder: ms per 1,000", color="tab:red")
        c.set_ylim(0)
    fig.savefig(os.path.join(args.out, "mae.png"), dpi=90)


# ---- 9. Command line ----

DEFAULTS = {  # default, least, most, meaning
    "seed": (0, 0, 10**8, "of weights, batches, masks"),
    "log_every": (300, 1, math.inf, "steps between log lines"),
    "steps": (2400, 1, math.inf, "paper: 800 to 1600 epochs of ImageNet"),
    "batch_size": (128, 1, math.inf, "paper: 4096"),
    "lr": (3e-3, 1e-12, 1e32, "peak rate (paper: 1.5e-4 per 256 images)"),
    "warmup": (0.1, 0, 1, "share of the steps over which the rate rises (paper: 40 epochs)"),
    "weight_decay": (0.05, 0, 99, "decoupled weight decay (paper: 0.05)"),
    "mask_ratio": (0.5, 0, 1, "share of the patches that are hidden (paper: 0.75)"),
    "norm_pix": (0, 0, 1, "1: normalise the target patch by patch (paper: 1)"),
    "crop": (0.6, 0.01, 1, "least share of the area in a crop (paper: 0.2)"),
    "flip": (0.0, 0, 1, "probability of mirroring (paper: 0.5, which digits don't bear)"),
    "patch_size": (8, 1, math.inf, "pixels (paper: 16 of 224)"),
    "dim": (64, 4, math.inf, "the encoder's width (paper: 1024)"),
    "depth": (4, 1, math.inf, "its layers (paper: 24)"),
    "heads": (4, 1, math.inf, "its attention heads (paper: 16)"),
    "decoder_dim": (64, 4, math.inf, "the decoder's width (paper: 512)"),
    "decoder_depth": (1, 1, math.inf, "its layers (paper: 8)"),
    "decoder_heads": (4, 1, math.inf, "its attention heads (paper: 16)"),
    "tune_steps": (800, 1, math.inf, "steps of each fine-tuning (paper: 50 to 100 epochs)"),
    "tune_lr": (2e-3, 1e-12, 1e32, "its peak rate (paper: 1e-3)"),
}  # fmt: skip


def parse(argv):
    """-> args, data, model, optimizer, state (None: official weights, to draw with)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or FILE.npz; official weights: an image folder or .npy")
    for name, (value, _, _, text) in DEFAULTS.items():
        flag(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}: {text}")
    flag("--validate", action="store_true", help="judge on the last tenth of the training images")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate, to go on with (more --steps), or official weights")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if fine-tuning on 1,000 labels has less accuracy")
    args, ckpt, state = parser.parse_args(argv), {}, {"step": 0, "history": []}
    try:
        if args.device == "auto":
            cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
            args.device = "cuda" if cuda else "mps" if mps else "cpu"
        torch.zeros(1, device=args.device)
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script", "mae") != "mae":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own, official = ckpt.get("args", {}), bool(args.load) and "args" not in ckpt
        short = {"steps": 4, "tune_steps": 2, "dim": 16, "depth": 2} if args.quick else {}
        own, default = own | ({"steps": ckpt["step"]} if own else {}), {"data": "digits"}
        for name, value in (default | {k: v[0] for k, v in DEFAULTS.items()}).items():
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, short.get(name, value)))
        for name, (_, low, high, _) in DEFAULTS.items():
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        if official:
            model = MAE.from_state_dict(ckpt, norm_pix=bool(args.norm_pix)).to(args.device)
            data, optimizer, state = load_images(args.data, model.image_shape[1:]), None, None
        else:
            x, y, x_test, y_test = load_data(args.data)
            n = len(x) * 9 // 10  # the last tenth is held out, for every choice
            data = [x[:n], y[:n], *((x[n:], y[n:]) if args.validate else (x_test, y_test)), x[n:]]
            data = [t[: 300 if args.quick else None].to(args.device) for t in data]
            if args.batch_size > len(data[0]):
                raise ValueError("--batch-size is more than the training images")
            if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
                raise ValueError("--batch-size must be a multiple of the number of processes")
            model = build(args, data[0])
            optimizer = make_optimizer(model, args, args.lr)
            if own:
                model.load_state_dict(ckpt["model"])
                optimizer.load_state_dict(ckpt["optimizer"])
                state = {k: ckpt[k] for k in state}
        if args.save and os.path.isdir(args.save):
            raise ValueError(f"--save {args.save} is a folder")
        os.makedirs(args.out, exist_ok=True)
        for folder in (args.out, os.path.dirname(args.save or "") or "."):
            if not os.access(folder, os.W_OK):  # fails now, not after the training
                raise ValueError(f"cannot write to the folder {folder}")
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, data, model, optimizer, state


def main(argv=None) -> int:
    world, rank = (int(os.environ.get(k, v)) for k, v in (("WORLD_SIZE", "1"), ("RANK", "0")))
    if world > 1:  # started by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    args, data, model, optimizer, state = parse(argv)
    t0, accs, curve = time.time(), {}, ()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    sizes = f"{len(data[0])}/{len(data[2])}" if state else len(data)
    if rank == 0:
        kind = f"{args.device} | seed {args.seed} | {os.path.basename(args.data)} {sizes}"
        print(f"mae | {count:.2f}M parameters | {kind}", flush=True)
    if state is None:  # official weights
        error, fill, shown = masked_error(model, data.to(args.device), args.mask_ratio, "imagenet")
        draw_picture(args, shown)
        line = f"masked-pixel error {error:.4f} | filled with mean {fill:.4f}"
        print(f"{line} | {time.time() - t0:.0f} s")
        return 0
    (*data, x_val), random, stopped = data, build(args, data[0]), False
    try:
        if state["step"] < args.steps:
            stopped = train(model, optimizer, data[0], x_val, args, state)
    except FloatingPointError as error:
        print(f"mae.py: stopped: {error}", file=sys.stderr)
        return 1
    if world > 1:
        dist.destroy_process_group()
    if rank:  # the other processes of torchrun are done
        return 0
    error, fill, _ = masked_error(model, data[2], args.mask_ratio)
    few = data[2][:: max(1, len(data[2]) // 8)]
    shown = masked_error(model, few, args.mask_ratio)[2]
    try:
        if not stopped:
            accs, curve = study(model.eval(), random, data, x_val, args)
    except KeyboardInterrupt:
        stopped = True
    draw_picture(args, shown, accs, curve)
    line = f"masked-pixel error {error:.4f} | filled with mean {fill:.4f}"
    for n in [n for n, name in accs if name == "MAE"]:  # the largest comes first
        now = f"fine-tuned on {n} labels {accs[n, 'MAE']:.4f}"
        line = f"{now} | from scratch {accs[n, 'scratch']:.4f} | {line}"
    print(f"test acc {line} | chance {1 / (int(data[1].max()) + 1):.3f} | {time.time() - t0:.0f} s")
    few = accs.get((min(1000, len(data[0])), "MAE"), 0.0)
    return 130 if stopped else int(args.target is not None and few < args.target)


if __name__ == "__main__":
    sys.exit(main())
