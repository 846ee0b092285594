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
         Gradients are clipped at norm 1, for a high rate and few steps; warm-up and cosine
         multiply. Fine-tuning is the recipe from scratch, too: beta_2 .95, turns of 10 degrees, and
         no layer-wise decay, stochastic depth, MixUp, CutMix, RandAugment, smoothing. The probe: a
         logistic regression on the mean of the patches' tokens, without batch norm.
         Demo: 16 patches of 8 pixels, so half of them hidden and not 75 %; targets not normalised.
Run      python mae.py                           # canvas digits, 8 minutes on one core
         python mae.py --data cifar10.npz --patch-size 4 --dim 96 --mask-ratio 0.75 --norm-pix 1
                --crop 0.2 --flip 0.5 --steps 3000 --tune-steps 500     # 37 minutes of one core
         torchrun --nproc-per-node 8 mae.py --data cifar10.npz          # splits the batch
         python mae.py --load mae_visualize_vit_base.pth --data FOLDER --mask-ratio 0.75  # official
Expect   Test accuracy after 800 steps of fine-tuning, seeds 0-2: 1,000 labels .783 +- .023, from
         scratch .367 +- .025; 100 labels .329 +- .037, from scratch .216 +- .013. Most of it is a
         head start: 1,600 steps from scratch gave .752 (1,000 labels, one seed). The 800 were
         chosen after test figures of 400 were seen (seed 2: MAE .711, scratch .251). Square error
         of hidden pixels .0075 +- .0004, of the visible mean .0247. Linear probe, 1,000 labels .321
         +- .006, all .362 +- .005 (random network .195, .236; grey centred pixels .149, .156); k-NN
         of 1,000 .184, below grey centred pixels' .502. Short runs with 25, 50, 75 % hidden: linear
         .198, .217, .223 (seed 0), .229, .224, .227 (seed 1), no clear trend; the encoder is 1.2,
         1.7, 2.7 times as fast as on all patches. CIFAR-10 (a JPEG copy), the 37 minutes' command,
         seed 0, 9 epochs: 1,000 labels fine-tuned .485, from scratch .380, 100 labels .325, .290;
         square error .0082, mean .0464; linear probe, all labels .526 (random network .403, raw
         pixels .397, trained with the labels alone .471), k-NN .424 (.301, .354, .397). 25, 50, 75
         % hidden: linear .486, .478, .473, 1.4, 2.0, 3.8 times as fast. Paper: ViT-B/L/H fine-tuned
         on ImageNet .836, .859, .869; a ViT-T on CIFAR-10, 2,000 epochs, .898 (from scratch .741);
         not run.
"""

import argparse
import math
import os
import signal
import sys
import time
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. A layer of encoder and decoder, pre-norm, with the names of vit.py ----


class Attention(nn.Module):
    """MSA, (B, N, D) -> (B, N, D). The rows of `qkv` are q, k, v, and head by head within each."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, h, D_h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, N, D_h)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp, hidden = Attention(dim, heads), nn.Sequential(), int(dim * mlp_ratio)
        self.mlp.fc1, self.mlp.act = nn.Linear(dim, hidden), nn.GELU()
        self.mlp.fc2 = nn.Linear(hidden, dim)

    def forward(self, z: Tensor) -> Tensor:
        z = z + self.attn(self.norm1(z))
        return z + self.mlp(self.norm2(z))


# ---- 2. Images as patches, places as waves ----


def pair(x) -> tuple[int, int]:
    return (x, x) if isinstance(x, int) else tuple(x)


def patchify(x: Tensor, patch) -> Tensor:
    """x (B, C, H, W) -> x_p (B, N, p q C): patches row by row, each with the channel last, unlike a
    convolution's filters: the order of `decoder_pred` in official weights."""
    p, q = pair(patch)
    x = x.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/q, q)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x_p: Tensor, patch, grid) -> Tensor:
    """The way back: x_p (B, N, p q C) -> x (B, C, H, W), for a grid of (H / p, W / q) patches."""
    x = x_p.unflatten(2, (*pair(patch), -1)).unflatten(1, tuple(grid))  # (B, H/p, W/q, p, q, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class PatchEmbed(nn.Module):
    """x (B, C, H, W) -> z (B, N, D). The weight is stored as the convolution's that it is."""

    def __init__(self, channels: int, patch, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, pair(patch), stride=pair(patch))

    def forward(self, x: Tensor) -> Tensor:
        x_p, E = patchify(x, self.proj.kernel_size), self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(x_p, E, self.proj.bias)


def sincos_positions(dim: int, grid) -> Tensor:
    """Fixed positions (1, 1 + N, dim): sines, cosines of the column, then of the row (A.1).
    The column comes first because official weights expect it so; the class token's row is zero."""
    if dim % 4:
        raise ValueError(f"dim {dim} is not a multiple of 4, which 2-D positions need")
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, cols = torch.cartesian_prod(*(torch.arange(n).double() for n in grid)).unbind(1)  # (N,)
    rows, cols = rows.outer(omega), cols.outer(omega)  # (N, dim / 4)
    places = torch.cat([cols.sin(), cols.cos(), rows.sin(), rows.cos()], 1)
    return F.pad(places, (0, 0, 1, 0)).float()[None]


# ---- 3. Masking and loss (Section 3, "Masking", "Simple implementation") ----


def random_masking(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """noise (B, N) -> ids_keep (B, n), mask (B, N) with 1 = hidden, ids_restore (B, N). The n = N
    (1 - ratio) patches of least noise stay, the same number in every image: no sparse operations.
    Place i of the image is entry ids_restore[i] of the shuffled list."""
    N = noise.shape[1]
    n = max(1, min(N - 1, round(N * (1 - ratio))))
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)  # the inverse permutation
    return ids_shuffle[:, :n], (ids_restore >= n).float(), ids_restore


def mae_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean square error of pred, target (B, N, p q C) over the hidden patches, mask (B, N) = 1. The
    visible ones are left out: painting what one sees teaches little, and accuracy drops."""
    return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


# ---- 4. Encoder and decoder (Section 3) ----


class Encoder(nn.Module):
    """Images (B, in_chans, H, W) -> tokens (B, 1 + n, dim), those in ids_keep (B, n) or all."""

    def __init__(self, image_size=224, patch_size=16, in_chans=3, dim=1024, depth=24, heads=16):
        super().__init__()
        (H, W), (p, q) = pair(image_size), pair(patch_size)
        if min(p, q) < 1 or H % p or W % q or H * W <= p * q:
            raise ValueError(f"two or more patches of {p} x {q} don't tile an image of {H} x {W}")
        self.image_shape, self.patch, self.grid = (in_chans, H, W), (p, q), (H // p, W // q)
        self.N = math.prod(self.grid)  # of patches
        self.patch_embed = PatchEmbed(in_chans, patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid), False)  # fixed
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def init_weights(self):
        """As the official code: Xavier for every matrix, E included, biases zero, tokens small."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view
        nn.init.normal_(self.cls_token, std=0.02)

    def forward_features(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        if x.shape[1:] != self.image_shape:
            raise ValueError(f"images are {tuple(x.shape[1:])}, the model wants {self.image_shape}")
        z = self.patch_embed(x) + self.pos_embed[:, 1:]  # (B, N, D): places before any goes
        if ids_keep is not None:
            z = z.gather(1, ids_keep[..., None].expand(-1, -1, z.shape[2]))  # (B, n, D)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        # no mask tokens in the encoder: less work, better features
        return self.norm(self.blocks(torch.cat([cls, z], 1)))

    def pooled(self, x: Tensor) -> Tensor:
        """x -> the mean of the patches' tokens (B, dim)."""
        return self.forward_features(x)[:, 1:].mean(1)


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
        self.norm_pix, width, layers = norm_pix, decoder_dim, range(decoder_depth)
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(width, self.grid), False)
        self.decoder_blocks = nn.Sequential(*(Block(width, decoder_heads) for _ in layers))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, math.prod(self.patch) * in_chans)
        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, z: Tensor, ids_restore: Tensor) -> Tensor:
        """z (B, 1 + n, D) of the visible patches -> pred (B, N, p q C) of all."""
        z, (B, N) = self.decoder_embed(z), ids_restore.shape
        hidden = self.mask_token.expand(B, 1 + N - z.shape[1], -1)  # (B, N - n, D_dec)
        y = torch.cat([z[:, 1:], hidden], 1)  # shuffled: the visible ones, then the hidden ones
        y = y.gather(1, ids_restore[..., None].expand(-1, -1, y.shape[2]))  # each at its place
        y = torch.cat([z[:, :1], y], 1) + self.decoder_pos_embed  # else mask tokens are all alike
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(y)))[:, 1:]

    def target(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, C, H, W) -> what to predict (B, N, p q C), and mean, sd (B, N, 1) taken out."""
        t = patchify(x, self.patch)
        mean, sd = t.mean(-1, keepdim=True), (t.var(-1, keepdim=True) + 1e-6).sqrt()
        if not self.norm_pix:
            mean, sd = torch.zeros_like(mean), torch.ones_like(sd)
        return (t - mean) / sd, mean, sd

    def forward(self, x: Tensor, ratio: float = 0.75, noise: Tensor | None = None):
        """noise (B, N) picks the patches; None: drawn here. Equal noise, equal masks."""
        if noise is None:
            noise = torch.rand(len(x), self.N, device=x.device)
        ids_keep, mask, ids_restore = random_masking(noise, ratio)
        pred = self.decode(self.forward_features(x, ids_keep), ids_restore)
        return mae_loss(pred, self.target(x)[0], mask), pred, mask

    def reconstruct(self, x: Tensor, pred: Tensor) -> Tensor:
        """pred as pixels (B, C, H, W), normalisation undone with mean and sd of x's patches."""
        _, mean, sd = self.target(x)
        return unpatchify(pred * sd + mean, self.patch, self.grid)

    @classmethod
    def from_state_dict(cls, w: dict, heads=None, decoder_heads=16, norm_pix=False) -> "MAE":
        """The model of official weights ({"model": ...}), with them. Heads leave no trace in those:
        D / 64, but 16 at D = 1280, if not given. `mae_visualize` is of plain pixels: norm_pix=False
        """
        w = w.get("model", w)
        if not {"patch_embed.proj.weight", "mask_token", "decoder_pred.weight"} <= set(w):
            raise ValueError("these are no weights of an MAE with its decoder")
        dim, C, *patch = w["patch_embed.proj.weight"].shape
        side, width = math.isqrt(w["pos_embed"].shape[1] - 1), w["mask_token"].shape[2]
        layers = [k.split(".")[0] for k in w if k.endswith("norm1.bias")]  # one name for each
        depth, decoder_depth = layers.count("blocks"), layers.count("decoder_blocks")
        heads = heads or (16 if dim == 1280 else max(1, dim // 64))
        size, decoder = [side * p for p in patch], (width, decoder_depth, decoder_heads)
        model = cls(size, patch, C, dim, depth, heads, *decoder, norm_pix)
        model.load_state_dict(w)
        return model


class Classifier(Encoder):
    """The encoder with a linear head on the mean of its patches: images -> logits (B, num_classes),
    sizes as Encoder's. As in the official fine-tuning, `fc_norm` takes the place of `norm`."""

    def __init__(self, num_classes=1000, **sizes):
        super().__init__(**sizes)
        self.norm, self.fc_norm = nn.Identity(), self.norm
        self.head = nn.Linear(self.cls_token.shape[2], num_classes)
        self.init_weights()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # the first loss is ln K

    def pooled(self, x: Tensor) -> Tensor:
        return self.fc_norm(super().pooled(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(x))


# ---- 5. Images and random views of them ----


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
    """The first eight images of a folder (jpg, png) or npy file -> uint8 (n, 3, *size)."""
    from pathlib import Path

    import numpy as np
    from matplotlib.image import imread

    kinds = (".jpg", ".jpeg", ".png")
    files = [file for file in sorted(Path(path).glob("*")) if file.suffix.lower() in kinds]
    images = [imread(f) for f in files[:8]] or list(np.load(path, allow_pickle=False)[:8])
    for k, x in enumerate(map(torch.tensor, images)):  # (H, W[, 1, 3 or 4]), uint8 or in [0, 1]
        x = x.float() * (1 if x.dtype == torch.uint8 else 255)
        x = x.view(1, *x.shape[:2], -1)[..., :3].permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        images[k] = F.interpolate(x, size, mode="bilinear", antialias=True).round().byte()
    return torch.cat(images)


def normalise(x: Tensor, pixels: str = "half", back: bool = False) -> Tensor:
    """[0, 1] -> [-1, 1], or ImageNet's units, as official weights expect; back: the way back."""
    imagenet = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    mean, sd = x.new_tensor(imagenet if pixels == "imagenet" else [[0.5], [0.5]]).view(2, -1, 1, 1)
    return x * sd + mean if back else (x - mean) / sd


def augment(x: Tensor, u: Tensor, crop: float, flip: float = 0.0, rotate: float = 0.0) -> Tensor:
    """Views of images x (B, 3, H, W) by u (B, 6), random numbers in [0, 1). crop: least share of
    the area (from .75 on less: the aspect ratio cuts, too); flip: probability; rotate: degrees.
    MAE needs no more, and no colours (Table 1e)."""
    u = u.to(x)
    s = 2 * u - 1  # (B, 6), in [-1, 1)
    area, ratio = crop + (1 - crop) * u[:, 0], (s[:, 1] * math.log(4 / 3)).exp()
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # (B, 2)
    place, angle = s[:, 2:4] * (1 - half), s[:, 4] * math.radians(rotate)
    mirror, sin, cos = torch.where(u[:, 5] < flip, -1.0, 1.0), angle.sin(), angle.cos()
    R = torch.stack([mirror * cos, -sin, mirror * sin, cos], 1).view(-1, 2, 2)
    M = torch.cat([half[..., None] * R, place[..., None]], 2)  # place in the view -> in the image
    grid = F.affine_grid(M, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


# ---- 6. Training: a batch depends on (seed, step) alone, so a resumed run is exact ----


def build(args, x: Tensor) -> MAE:
    """The untrained model of this seed for images x (N, 3, H, W)."""
    torch.manual_seed(args.seed)
    names = "patch_size dim depth heads decoder_dim decoder_depth decoder_heads norm_pix".split()
    return MAE(tuple(x.shape[2:]), **{name: getattr(args, name) for name in names}).to(x.device)


def make_optimizer(model: nn.Module, args, lr: float) -> torch.optim.Optimizer:
    groups = {True: [], False: []}  # matrices and filters decay; biases, norms, tokens don't
    for p in model.parameters():
        groups[p.ndim in (2, 4)].extend([p] if p.requires_grad else [])
    groups = [{"params": p, "weight_decay": k * args.weight_decay} for k, p in groups.items()]
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95))


def train(model, optimizer, x: Tensor, x_val: Tensor | None, args, state: dict, y=None):
    """Steps state["step"] + 1 to args.steps on images x uint8 (N, 3, H, W): of an MAE, with log and
    checkpoint, or with labels y (N,) of a Classifier. After Ctrl-C in a step: KeyboardInterrupt."""
    from tqdm import tqdm

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = slice(rank, None, world)  # all processes draw the same batch and each takes its rows
    n, first, stop, t0 = args.batch_size, state["step"], [], time.time()
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        for step in tqdm(range(first + 1, args.steps + 1), disable=True if rank else None):
            g = torch.Generator().manual_seed(args.seed * 10**10 + step)
            rows = torch.randint(len(x), (n,), generator=g)[mine].to(x.device)
            u, noise = (torch.rand(n, k, generator=g)[mine].to(x.device) for k in (6, model.N))
            views = normalise(augment(x[rows] / 255, u, args.crop, args.flip, args.rotate))
            if y is None:
                loss, _, _ = model(views, args.mask_ratio, noise)
            else:
                loss = F.cross_entropy(model(views), y[rows])
            rate = min(1, step / max(1, args.warmup * args.steps))  # times half a cosine down to 0
            for group in optimizer.param_groups:
                group["lr"] = args.lr * (rate * (1 + math.cos(math.pi * step / args.steps)) / 2)
            optimizer.zero_grad(); loss.backward()  # fmt: skip
            ended = torch.tensor(float(bool(stop)), device=x.device)  # Ctrl-C in one ends all
            if world > 1:  # mean over the processes: the gradient of the whole batch
                grads = [p.grad for p in model.parameters() if p.requires_grad]
                for tensor in [ended, loss.data, *grads]:
                    dist.all_reduce(tensor.div_(world))
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item() + norm.item()):
                raise FloatingPointError(f"loss {loss.item()} or gradient at step {step}")
            optimizer.step()
            due = ended or step % args.log_every == 0 or step == args.steps
            if due and rank == 0 and y is None:
                val, fill, _ = masked_error(model, x_val, args.mask_ratio)
                state |= {"step": step, "history": [*state["history"], (step, loss.item(), val)]}
                now = f"loss {loss.item():.4f} | val error {val:.4f} (filled with mean {fill:.4f})"
                ms = (time.time() - t0) / (step - first) * 1e3
                tqdm.write(f"step {step:5d}/{args.steps} | {now} | {ms:.0f} ms/step")
                if args.save:  # beside its place, then moved there: a crash leaves the old one
                    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    file = {"script": "mae", "args": vars(args), **state, **parts}
                    torch.save(file, args.save + ".tmp")
                    os.replace(args.save + ".tmp", args.save)
            if ended:
                raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)


def fine_tune(start: MAE | None, x: Tensor, y: Tensor, K: int, args) -> Classifier:
    """A classifier trained with labels y of uint8 images x: from `start`'s encoder or scratch."""
    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in ("patch_size", "dim", "depth", "heads")}
    model = Classifier(K, image_size=tuple(x.shape[2:]), **sizes).to(x.device)
    if start is not None:
        model.load_state_dict(start.state_dict(), strict=False)  # fc_norm and head are new
    tune = {"steps": args.tune_steps, "lr": args.tune_lr, "batch_size": min(64, len(x))}
    args = argparse.Namespace(**vars(args) | tune | {"warmup": 0.1, "crop": 0.7, "rotate": 10.0})
    train(model, make_optimizer(model, args, args.lr), x, None, args, {"step": 0}, y)
    return model


# ---- 7. Evaluation and picture ----


@torch.no_grad()
def masked_error(model: MAE, x: Tensor, ratio: float, pixels: str = "half"):
    """Images uint8 (n, 3, H, W) -> mean square error over hidden pixels in [0, 1] of the model and
    of the visible pixels' mean colour; the first eight images (n, 3, H, W): original, masked,
    painted. The masks are always the same."""
    g, sums, shown = torch.Generator().manual_seed(0), 0, []
    for part in x.split(256):
        x, noise = part / 255, torch.rand(len(part), model.N, generator=g).to(x.device)
        _, pred, mask = model(normalise(x, pixels), ratio, noise)
        painted = normalise(model.reconstruct(normalise(x, pixels), pred), pixels, back=True)
        hidden = unpatchify(mask[..., None].expand_as(pred), model.patch, model.grid)  # 1 = hidden
        mean = (x * (1 - hidden)).sum((2, 3), True) / (1 - hidden).sum((2, 3), True)
        errors = [((guess - x) ** 2 * hidden).sum() for guess in (painted, mean)]
        sums = sums + torch.stack([*errors, hidden.sum()])
        shown = shown or [x, *(torch.where(hidden > 0, t, x) for t in (0 * x + 0.5, painted))]
    error, fill, count = sums.tolist()
    return error / count, fill / count, [t[:8].cpu() for t in shown]


def encoder_speed(model: MAE, ratio: float, B: int = 128) -> float:
    """Milliseconds per 1,000 images of the encoder's forward and backward; the best of ten."""
    (weight, N), times = (model.norm.weight, model.N), []
    x, noise = torch.rand(B, *model.image_shape).to(weight), torch.rand(B, N).to(weight)
    keep = random_masking(noise, ratio)[0] if ratio else None
    for _ in range(11):
        t0 = time.time()
        model.forward_features(x, keep).sum().backward()
        weight.grad.sum().item()  # waits for a GPU
        times.append((time.time() - t0) / B * 1e6)
    return min(times[1:])


def grey_centred(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H W): grey, less its mean, of length one: no colour and no brightness."""
    x = x.mean(1).flatten(1)
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def of_pixels(net):
    """net, which takes images in [-1, 1], as a function of images in [0, 1]."""
    return lambda x: net(normalise(x))


@torch.no_grad()
def features(encoder, x: Tensor):
    """Images uint8 (n, 3, H, W) -> what encoder makes of them in [0, 1], as numpy (n, D)."""
    return torch.cat([encoder(t / 255).flatten(1) for t in x.split(256)]).cpu().numpy()


def evaluate(encoder, data, rows: Tensor) -> list[float]:
    """Test accuracy of 5-NN (cosine) and of logistic regression (standardised) on frozen features,
    both with the labels of these rows of the training images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    x, y, x_test, y_test = data
    (a, b), y = (features(encoder, t) for t in (x[rows], x_test)), y[rows].cpu()
    mean, sd = a.mean(0), a.std(0) + 1e-6
    knn = KNeighborsClassifier(min(5, len(a)), metric="cosine").fit(a, y)
    warnings.filterwarnings("ignore", "lbfgs failed to converge")  # 100 steps will do
    linear = LogisticRegression(max_iter=100).fit((a - mean) / sd, y)
    return [knn.score(b, y_test.cpu()), linear.score((b - mean) / sd, y_test.cpu())]


def study(model: MAE, data, x_val: Tensor, args):
    """What pre-training is worth, printed: fine-tuning on few labels against the same recipe from
    scratch (Section 4), frozen features, and short runs at three mask ratios (Figure 5) with the
    encoder's time (Table 2). -> accuracies by (labels, start), [(ratio, linear, ms)]."""
    (x, y, x_test, y_test), random, accs, nets, curve = data, build(args, data[0]), {}, {}, []
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed)).to(x.device)
    few, every = min(1000, len(x)), len(x)
    for n in dict.fromkeys((min(100, few), few, every)):
        rows = order[:n]  # no other label is seen; all of them: for the row "supervised" below
        for name, start in (("MAE", model), ("scratch", None))[n > few :]:
            net = nets[n, name] = fine_tune(start, x[rows], y[rows], int(y.max()) + 1, args)
            guess = features(of_pixels(net), x_test).argmax(1)
            accs[n, name] = float((guess == y_test.cpu().numpy()).mean())
        now = " | ".join(f"{name} {acc:.3f}" for (k, name), acc in accs.items() if k == n)
        print(f"test acc, {args.tune_steps} steps with {n:5d} labels | {now}", flush=True)
    frozen = {"MAE": of_pixels(model.pooled), "random network": of_pixels(random.pooled)}
    frozen |= {"supervised": None, "raw pixels": lambda x: x, "grey centred pixels": grey_centred}
    print("test acc, frozen features    k-NN 1,000  linear 1,000   k-NN all  linear all")
    for name, f in frozen.items():
        row = []
        for n in (few, every):
            row += evaluate(f or of_pixels(nets[n, "scratch"].pooled), data, order[:n])
        print(f"{name:24s}" + "".join(f"{acc:12.3f}" for acc in row), flush=True)
    full = encoder_speed(random, 0)
    for ratio in (0.25, 0.5, 0.75):
        short = {"steps": max(1, args.steps // 6), "mask_ratio": ratio, "save": None}
        short = argparse.Namespace(**vars(args) | short)
        other, state = build(args, x), {"step": 0, "history": []}
        train(other, make_optimizer(other, short, short.lr), x, x_val, short, state)
        acc, ms = evaluate(of_pixels(other.pooled), data, order)[1], encoder_speed(other, ratio)
        curve.append((ratio, acc, ms))
        now = f"{ms:.0f} ms per 1,000 images, {full / ms:.1f} times as fast as on all patches"
        print(f"mask ratio {ratio:.2f} | linear, all labels {acc:.3f} | encoder {now}", flush=True)
    return accs, curve


def draw_picture(args, shown, accs, curve):
    """Masked input, painted, original; right: fine-tuning against scratch, and the ratio curve."""
    from matplotlib.figure import Figure  # without pyplot no window is opened

    fig = Figure(figsize=(13 if accs else 10, 4.2), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1.7, 1]) if accs else (fig, None)
    names = f"{args.mask_ratio:.0%} hidden", "painted", "original"
    axes = left.subplots(3, len(shown[0]), squeeze=False)
    for row, name, images in zip(axes, names, (*shown[1:], shown[0])):
        row[0].set_ylabel(name)
        for axis, image in zip(row, images):
            axis.imshow(image.clamp(0, 1).permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
    if accs:
        a, b = right.subplots(2, 1)
        labels = [n for n, name in accs if name == "MAE"]
        for name, width in ("MAE", -0.4), ("scratch", 0.4):  # to the left and right of the tick
            places, heights = [f"{n:,} labels" for n in labels], [accs[n, name] for n in labels]
            a.bar_label(a.bar(places, heights, width, align="edge", label=name), fmt="%.2f")
        a.set(title="test accuracy, fine-tuned", ylim=(0, 1.1))
        a.legend(loc="upper left")
        ratios, accuracies, times = zip(*curve)
        b.plot(ratios, accuracies, "o-")
        b.set_xticks(ratios, [f"{ratio:.0%}, {ms:.0f} ms" for ratio, _, ms in curve])
        b.set(title="short runs (Fig. 5)", xlabel="hidden, encoder's time per 1,000 images")
        b.set_ylabel("linear probe")
    fig.savefig(os.path.join(args.out, "mae.png"), dpi=90)


# ---- 8. Command line ----

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
    "crop": (0.6, 0.01, 1, "least area of a crop (paper: 0.2); from 0.75 on less, even at 1"),
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
}


def parse(argv):
    """-> args, data, model, optimizer, state; with official weights the last two are None, and data
    is the images to paint. Bad input: one line on stderr, exit 2."""
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
    flag("--target", type=float, default=0, help="exit 1 if 1,000 labels give less, fine-tuned")
    parser.set_defaults(rotate=0.0)  # degrees; fine-tuning has some
    args, ckpt, optimizer, state = parser.parse_args(argv), {}, None, None
    try:
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=args.device)
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script", "mae") != "mae":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own = ckpt["args"] | {"steps": ckpt["step"]} if "args" in ckpt else {}
        short = {"steps": 4, "tune_steps": 2, "dim": 16, "depth": 2} if args.quick else {}
        args.data = args.data or own.get("data", "digits")
        for name, (value, low, high, _) in DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, short.get(name, value)))
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        if ckpt and not own:
            model = MAE.from_state_dict(ckpt, norm_pix=bool(args.norm_pix)).to(args.device)
            data = load_images(args.data, model.image_shape[1:]).to(args.device)
        else:
            x, y, x_test, y_test = load_data(args.data)
            n = len(x) * 9 // 10  # the last tenth is held out, for every choice
            data = [x[:n], y[:n], *((x[n:], y[n:]) if args.validate else (x_test, y_test)), x[n:]]
            data = [t[: 300 if args.quick else None].to(args.device) for t in data]
            world = int(os.environ.get("WORLD_SIZE", 1))
            if args.batch_size > len(data[0]) or args.batch_size % world:
                raise ValueError(f"--batch-size: a multiple of {world}, at most {len(data[0])}")
            model, state = build(args, data[0]), {"step": 0, "history": []}
            optimizer = make_optimizer(model, args, args.lr)
            if ckpt:
                model.load_state_dict(ckpt["model"])
                optimizer.load_state_dict(ckpt["optimizer"])
                optimizer.param_groups[0]["weight_decay"] = args.weight_decay  # the flag goes first
                state = {k: ckpt[k] for k in state}
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "mae.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, data, model, optimizer, state


def main(argv=None) -> int:
    rank, world = (int(os.environ.get(*k)) for k in (("RANK", 0), ("WORLD_SIZE", 1)))
    args, data, model, optimizer, state = parse(argv)
    if world > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    t0, accs, curve, stopped = time.time(), {}, [], False
    x_test, pixels = (data[2], "half") if state else (data, "imagenet")
    if rank == 0:
        count = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
        sizes = f"{os.path.basename(args.data)} {len(data[0])}/{len(x_test)}"
        print(f"mae | {count} | {args.device} | seed {args.seed} | {sizes}", flush=True)
    try:
        if state and state["step"] < args.steps:
            train(model, optimizer, data[0], data[4], args, state)
        if world > 1:
            dist.destroy_process_group()
        if state and rank == 0:
            accs, curve = study(model, data[:4], data[4], args)
    except FloatingPointError as error:
        print(f"mae.py: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        stopped = True
    if rank:  # the other processes of torchrun are done
        return 0
    if stopped:
        print("stopped by Ctrl-C; the picture has what was trained so far")
    error, fill, _ = masked_error(model, x_test, args.mask_ratio, pixels)
    eight = masked_error(model, x_test[:: max(1, len(x_test) // 8)], args.mask_ratio, pixels)[2]
    draw_picture(args, eight, accs, curve)
    line = f"masked-pixel error {error:.4f} | filled with mean {fill:.4f}"
    for n in [n for n, name in accs if name == "MAE"]:  # the largest comes first
        now = f"fine-tuned on {n} labels {accs[n, 'MAE']:.4f}"
        line = f"{now} | from scratch {accs[n, 'scratch']:.4f} | {line}"
    if state:
        line = f"test acc {line} | chance {1 / (int(data[1].max()) + 1):.3f}"
    print(f"{line} | {time.time() - t0:.0f} s")
    few = accs.get((min(1000, len(data[0])), "MAE"), 0.0)
    return 130 if stopped else int(few < args.target)


if __name__ == "__main__":
    sys.exit(main())
