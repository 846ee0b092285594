"""Video diffusion: a network that denoises all frames at once draws videos, and extends given ones.

Paper    Video Diffusion Models -- Jonathan Ho, Tim Salimans, Alexey Gritsenko, William Chan,
         Mohammad Norouzi, David J. Fleet, April 2022, arXiv:2204.03458v2
Idea     The U-Net of image diffusion becomes one for video: its layers work on each frame, and
         after each spatial attention one over time lets the frames agree. With that one masked,
         the network trains on images, too. Its gradient makes new frames fit to given ones.
Figure   Videos (B, T, C, H, W), K images each, F = T + K, z_t = alpha_t x + sigma_t eps

         z_t (B F, C, H, W) -> conv -> [block] ----- skip, concatenated ----> [block] -> conv -> v
         MLP(lambda_t) + embedding(y) -> e | stride 2                    2x up ^  (B F, C, H, W)
            (into every block)             +-----> [block] -> [middle block] --+
         [block] = 2 convolutions 1x3x3 -> attention over H W (B, F, H W, C) in each frame
                                        -> attention over F (B, H W, F, C) at each pixel,
                     + bias of j - i and mask:  frames 1..T see 1..T | an image sees itself
         x_hat = alpha_t z_t - sigma_t v -> z_s, s < t (Eq. 4) -> ... -> x
         extension: frames a of z_t are noised x^a; x_hat^b - w_r alpha_t / 2 grad |x^a - x_hat^a|^2
Symbols  t, s | t, s | times in [0, 1], s < t           lam | lambda_t | log SNR (), (B,) or (B, F)
         alpha, sigma | alpha_t, sigma_t | z_t = alpha x + sigma eps    z | z_t | (B, F, C, H, W)
         x_a, w_r | x^a, w_r | given frames (B, F_a, ...), guidance by them    gamma | gamma | Eq. 4
         y, w | c, w | labels (B,) or (B, F), -1 = none; guidance by them, Eq. 6; 0 is off
Differs  v-prediction throughout (paper: eps, v for some models). The bias is a scalar per head and
         distance, not the vectors of its reference. Norms see one frame: over time they'd leak.
         Each image has its own t. One block per level and side; no Langevin corrector (Eq. 5), no
         spatial super-resolution. x_hat is clipped, gradients are cut to norm 1, weights averaged
         at .995, seven of ten labels hidden. Demo: 8 frames of 16x16, not 16 of 64x64; 2x2 pixels
         enter as channels; 40 sampling steps. Digits are enlarged to 12x12 and move by a
         pixel per frame and axis; 8x8 ones didn't keep their identity (.15 after 2,250 steps).
Run      python video_diffusion.py                     # bouncing digits, 8 minutes on one CPU core
         python video_diffusion.py --load FILE         # no training: table, picture, GIF
         python video_diffusion.py --data FILE.npz     # x_train uint8 N x T x H x W (x 3)
Expect   Held-out digits, seeds 0-2, 64 videos of each kind. identity: share of pairs of frames, one
         from either half, that a classifier of single frames calls the same digit. turn: second
         difference of the centre of mass in pixels. miss: distance from the real continuation.
           samples .631 +- .016, turn 1.00 +- .03 | by label, w = 2: .993 +- .008, .997 +- .004
           of the frames show it | independent frames .125 +- .013, turn 3.97 | real .975, turn .90
           4 frames given: reconstruction guidance .942 +- .014, seam .99 +- .03, miss .26 +- .01 |
           replacement .770 +- .035, 1.23 +- .06, .77 +- .06 | real seam .88, samples' miss 2.34
         So motion and labelled digits are nearly real; without a label a third of the pairs drift.
         w = 2 and w_r = 12 were chosen on training digits; the steps were doubled after test
         figures with 2,000 (.504, .944, .877). Paper: FVD 136 with guidance, 451 with replacement.
"""

import argparse
import copy
import functools
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

# ---- 1. The forward process in continuous time (Section 2) ----


def log_snr(t: Tensor, low: float = -20.0, high: float = 20.0) -> Tensor:
    """lambda_t = log(alpha_t^2 / sigma_t^2), t in [0, 1]: falls from high to low.

    The cosine schedule: alpha_t and sigma_t are cosine and sine of an angle that grows with t.
    """
    a, b = (math.atan(math.exp(-0.5 * value)) for value in (high, low))
    return -2 * torch.log(torch.tan(a + t.cpu().double() * (b - a))).to(t.dtype).to(t.device)


def alpha_sigma(lam: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t, sigma_t from lambda_t (), (B,) or (B, F), shaped to multiply x (B, F, C, H, W)."""
    lam = lam.reshape((*lam.shape, *[1] * (x.dim() - lam.dim())))
    return lam.sigmoid().sqrt(), (-lam).sigmoid().sqrt()  # alpha^2 + sigma^2 = 1


def q_sample(x: Tensor, lam: Tensor, noise: Tensor) -> Tensor:
    """z_t ~ q(z_t | x), Eq. 1."""
    alpha, sigma = alpha_sigma(lam, x)
    return alpha * x + sigma * noise


def posterior(z: Tensor, x: Tensor, lam_t: Tensor, lam_s: Tensor, gamma: float = 0.0):
    """Mean of q(z_s | z_t, x), s < t (Eq. 3), and the variance of the sampler's step (Eq. 4).

    gamma 0: q's own variance, right if x is known; 1: sigma_(t|s)^2, right if x is N(0, I).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(lam_t, z), alpha_sigma(lam_s, z)
    new = -torch.expm1(lam_t - lam_s)  # 1 - e^(lambda_t - lambda_s): the noise's share since s
    mean = (1 - new) * alpha_s / alpha_t * z + new * alpha_s * x
    return mean, (new * sigma_s**2) ** (1 - gamma) * (new * sigma_t**2) ** gamma


# ---- 2. The 3D U-Net, factorised over space and time (Section 3) ----


def time_embedding(lam: Tensor, dim: int) -> Tensor:
    """lambda (B, F) -> (B, F, dim): sines and cosines of its angle, which is linear in t."""
    t = torch.atan(torch.exp(-0.5 * lam)) * (2000 / math.pi)  # 0..1000
    freqs = torch.exp(torch.arange(dim // 2, device=t.device) * -math.log(10_000) / (dim // 2 - 1))
    return torch.cat([(t[..., None] * freqs).sin(), (t[..., None] * freqs).cos()], -1)


def temporal_mask(frames: int, num_images: int) -> Tensor:
    """(F, F), True where frame i sees frame j: the video's frames one another, the num_images last
    ones, which are independent images, only themselves; no other frame sees those."""
    video = torch.arange(frames) < frames - num_images
    return (video[:, None] & video) | torch.eye(frames, dtype=torch.bool)


class Attention(nn.Module):
    """Residual self-attention over the axis N, all axes before it are batch: (..., N, C) -> same.

    max_distance D > 0: each head learns a scalar per distance j - i, within +-D, for its logits.
    """

    def __init__(self, C: int, heads: int, max_distance: int = 0):
        super().__init__()
        self.heads, self.D = heads, max_distance
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.bias = nn.Parameter(0.5 * torch.randn(heads, 2 * self.D + 1)) if self.D else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3 * self.heads, -1)).transpose(-2, -3)
        q, k, v = qkv.flatten(0, -4).chunk(3, 1)  # (batch, heads, N, C / heads)
        i, bias = torch.arange(x.shape[-2], device=x.device), mask
        if self.D:
            bias = self.bias[:, (i - i[:, None]).clamp(-self.D, self.D) + self.D]  # (heads, N, N)
            bias = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        h = F.scaled_dot_product_attention(q, k, v, bias)
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


def norm(C: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, C // 4), C)  # of each frame: over time it would leak images


class Block(nn.Module):
    """A residual block, and if asked both attentions, as `how` says: (C_time, heads, distance).

    x (B F, C_in, H, W), e (B F, C_time), mask (F, F) -> (B F, C, H, W).
    """

    def __init__(self, C_in: int, C: int, how: tuple[int, int, int], attend: bool):
        super().__init__()
        self.norm1, self.conv1 = norm(C_in), nn.Conv2d(C_in, C, 3, padding=1)
        self.norm2, self.conv2 = norm(C), nn.Conv2d(C, C, 3, padding=1)
        self.skip = nn.Conv2d(C_in, C, 1) if C_in != C else nn.Identity()
        self.time = nn.Linear(how[0], C)
        self.space = Attention(C, how[1]) if attend else None
        self.frames = Attention(C, *how[1:]) if attend else None

    def forward(self, x: Tensor, e: Tensor, mask: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(e)[:, :, None, None]
        h = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return self.attention(h.unflatten(0, (-1, len(mask))), mask) if self.space else h

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, F, C, H, W) -> (B F, C, H, W): over the pixels of each frame, then over time."""
        h = self.space(x.flatten(3).transpose(2, 3))  # (B, F, HW, C): frames are a batch axis
        h = self.frames(h.transpose(1, 2), mask)  # (B, HW, F, C): pixels are a batch axis
        return h.permute(0, 2, 3, 1).reshape(-1, *x.shape[2:])


class UNet3D(nn.Module):
    """z (B, F, C, H, W), lambda (), (B,) or (B, F), labels y (B,), (B, F) or None -> v as z.

    y = -1 or None: no label. The last num_images of the F frames are independent images.
    Levels from `attend_from` on, the ones with few pixels, have attention, and so has the middle.
    Level i has dim * mults[i] channels at 1 / (patch 2^i) of the size; H and W must be multiples of
    the last one's, or forward raises ValueError. dim: a multiple of 4.
    """

    def __init__(
        self, channels=3, dim=64, mults: tuple[int, ...] = (1, 2, 4, 8), attend_from=1, heads=4,
        max_distance=16, patch=1, num_classes=0,
    ):  # fmt: skip
        super().__init__()
        widths, pixels = [dim * m for m in mults], channels * patch**2
        if dim < 4 or dim % 4 or any(C % heads for C in widths):
            raise ValueError(f"dim must be a multiple of 4, all widths {widths} of heads {heads}")
        self.dim, self.patch, self.stride = dim, patch, patch * 2 ** (len(mults) - 1)
        self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim))
        self.label = nn.Embedding(num_classes + 1, 4 * dim)  # row 0: no label
        self.conv_in = nn.Conv2d(pixels, dim, 3, padding=1)
        self.down, self.up, self.shrink, self.grow = (nn.ModuleList() for _ in range(4))
        how, above = (4 * dim, heads, max_distance), dim
        for i, C in enumerate(widths):
            self.down.append(Block(above, C, how, i >= attend_from))
            if i:
                self.shrink.append(nn.Conv2d(above, above, 3, stride=2, padding=1))
                up = nn.Upsample(None, 2), nn.Conv2d(C, above, 3, padding=1)
                self.grow.append(nn.Sequential(*up))
                self.up.append(Block(2 * above, above, how, i > attend_from))
            above = C
        self.middle = Block(above, above, how, True)
        self.norm, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], pixels, 3, 1, 1)
        for m in self.modules():  # every block starts as the identity, the network as v = 0
            last = {Block: "conv2", Attention: "out", UNet3D: "conv_out"}.get(type(m))
            for p in getattr(m, last).parameters() if last else ():
                nn.init.zeros_(p)

    def forward(self, z: Tensor, lam: Tensor, y: Tensor | None = None, num_images: int = 0):
        (B, N), size = z.shape[:2], tuple(z.shape[3:])  # N: all F frames
        if any(n % self.stride for n in size):
            raise ValueError(f"height and width {size} must be multiples of {self.stride}")
        lam = lam.reshape(-1, 1 if lam.dim() < 2 else N).expand(B, N)
        y = torch.full_like(lam, -1).long() if y is None else y.reshape(B, -1).expand(B, N)
        e = F.silu(self.time(time_embedding(lam, self.dim)) + self.label(y + 1)).flatten(0, 1)
        # frames join the batch axis: a 3x3 convolution of each frame is the paper's 1x3x3
        h = self.conv_in(F.pixel_unshuffle(z.flatten(0, 1), self.patch))
        mask, skips = temporal_mask(N, num_images).to(z.device), []
        for i, block in enumerate(self.down):
            if i:
                skips.append(h)
                h = self.shrink[i - 1](h)
            h = block(h, e, mask)
        h = self.middle(h, e, mask)
        for grow, block in zip(self.grow[::-1], self.up[::-1]):
            h = block(torch.cat([skips.pop(), grow(h)], 1), e, mask)
        h = self.conv_out(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.patch).view(z.shape)


# ---- 3. Objective, guidance, sampler (Sections 2 and 3.1) ----


def loss_v(model, x: Tensor, lam: Tensor, noise: Tensor, y=None, num_images: int = 0) -> Tensor:
    """Eq. 2 with w(lambda) = 1 + e^lambda: the mean square error of v = alpha_t eps - sigma_t x."""
    alpha, sigma = alpha_sigma(lam, x)
    v = model(q_sample(x, lam, noise), lam, y, num_images)
    return F.mse_loss(v.float(), alpha * noise - sigma * x)


def denoise(model, z: Tensor, lam: Tensor, y=None, w: float = 0.0, num_images: int = 0) -> Tensor:
    """x_hat(z_t, c) = alpha_t z_t - sigma_t v, guided by w as in Eq. 6.

    Eq. 6 is written for eps = sigma_t z_t + alpha_t v; v, linear in it, takes the same weights.
    """
    v = model(z, lam, y, num_images)
    if w and y is not None:
        v = (1 + w) * v - w * model(z, lam, None, num_images)
    alpha, sigma = alpha_sigma(lam, z)
    return alpha * z - sigma * v


def reconstruction_guided(denoiser, z: Tensor, lam: Tensor, x_a: Tensor, w_r: float) -> Tensor:
    """x_hat(z_t), its part b moved so that part a comes out nearer to x_a: Eq. 7.

    denoiser(z) -> x_hat; x_a (B, F_a, C, H, W) are the first F_a frames of the videos.
    """
    n = x_a.shape[1]
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        x = denoiser(z)
        error = (x_a - x[:, :n]).square().sum()  # a sum: no video's gradient depends on the batch
        gradient = torch.autograd.grad(error, z)[0]
    x = x.detach().clone()
    x[:, n:] -= w_r * alpha_sigma(lam, z)[0] / 2 * gradient[:, n:]
    return x


@torch.no_grad()
def sample(
    model, shape, steps=64, y=None, w=0.0, num_images=0, x_a=None, w_r=0.0, gamma=0.1, clip=True,
    generator=None, device="cpu",
):  # fmt: skip
    """The ancestral sampler, Eq. 4: videos (B, F, C, H, W) in `steps` steps.

    x_a (B, F_a, ...) given: extends these frames, by reconstruction guidance with w_r > 0, else by
    replacement alone (Song et al.). num_images = F: independent images. clip: x_hat in [-1, 1].
    """
    F_a = 0 if x_a is None else x_a.shape[1]
    lam = log_snr(torch.linspace(1, 0, steps + 1)).to(device)
    z = torch.randn(shape, generator=generator).to(device)
    for i in range(steps):
        noise = torch.randn(2, *shape, generator=generator).to(device)
        if F_a:  # replacement: z_t^a ~ q(z_t^a | x^a), whatever the last step made of it
            z[:, :F_a] = q_sample(x_a, lam[i], noise[0, :, :F_a])
        denoiser = functools.partial(denoise, model, lam=lam[i], y=y, w=w, num_images=num_images)
        x = reconstruction_guided(denoiser, z, lam[i], x_a, w_r) if F_a and w_r else denoiser(z)
        x = x.clamp(-1, 1) if clip else x
        z, variance = posterior(z, x, lam[i], lam[i + 1], gamma)
        if i < steps - 1:  # the last step takes the mean
            z = z + variance.sqrt() * noise[1]
    if F_a:
        z[:, :F_a] = x_a
    return z


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model: the weights to sample with."""
    for old, new in zip(ema.parameters(), model.parameters()):
        old.lerp_(new, 1 - decay)


# ---- 4. Data: digits that bounce, or the videos of a file ----


def load_videos(path: str):
    """-> train and held-out data, each (uint8 videos (N, T, C, H, W), labels (N,), grey levels).

    "digits": scikit-learn's, enlarged to (N, 12, 12), which `draw` lets bounce. A file is .npz with
    x_train (N, T, H, W) or (N, T, H, W, 3), y_train or none; its last tenth is held out.
    """
    if path == "digits":
        from sklearn.datasets import load_digits

        order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
        x, y = (torch.tensor(a)[order] for a in load_digits(return_X_y=True))
        x = F.interpolate(x.float().view(-1, 1, 8, 8), size=12, mode="bilinear")[:, 0]
        return (x[:1200], y[:1200], 17), (x[1200:], y[1200:], 17)
    with np.load(path, allow_pickle=False) as file:
        x = file["x_train"]
        y = file["y_train"] if "y_train" in file else np.full(len(x), -1)
    if x.dtype != np.uint8 or x.ndim < 4 or x.shape[4:] not in ((), (3,)) or len(x) < 10:
        raise ValueError(f"{path}: x_train must be uint8, (N > 9, T, H, W) or (N > 9, T, H, W, 3)")
    if y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < -1 or y.max() > 999:
        raise ValueError(f"{path}: y_train must be whole numbers 0..999, one per video")
    x, y = torch.tensor(x).reshape(*x.shape[:4], -1).movedim(4, 2), torch.tensor(y).long()
    n = len(x) - len(x) // 10
    return (x[:n], y[:n], 256), (x[n:], y[n:], 256)


def bounce(digits: Tensor, T: int, phase: Tensor, side: int = 16) -> Tensor:
    """digits (n, h, h) go to and fro between the walls, in rows and columns by a pixel per frame:
    (n, T, 1, side, side). phase (n, 2): where on these ways, 2 (side - h) long, they start."""
    (n, h), room = digits.shape[:2], side - digits.shape[1]
    at = (phase[:, None] + torch.arange(T)[:, None]) % (2 * room)  # (n, T, 2)
    at = torch.where(at > room, 2 * room - at, at)[..., None] + torch.arange(h)  # (n, T, 2, h)
    i, t = torch.arange(n).view(n, 1, 1, 1), torch.arange(T).view(T, 1, 1)
    videos = torch.zeros(n, T, side, side)
    videos[i, t, at[:, :, 0, :, None], at[:, :, 1, None]] = digits[:, None].float()
    return videos[:, :, None]


def draw(data, n: int, T: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> n videos of T frames in [-1, 1] (n, T, C, H, W) and labels (n,). T = 1: images."""
    x, y, levels = data
    i = torch.randint(len(x), (n,), generator=g)
    if x.dim() == 3:
        videos = bounce(x[i], T, torch.randint(8, (n, 2), generator=g))
    else:
        first = torch.randint(x.shape[1] - T + 1, (n, 1), generator=g)
        videos = x[i[:, None], first + torch.arange(T)].float()
    return videos * (2 / (levels - 1)) - 1, y[i]


# ---- 5. Training ----


def train(model, ema, optimizer, data, args, state) -> bool:
    """Trains on batches that are functions of (seed, step). Returns whether Ctrl-C ended it."""
    from tqdm import tqdm

    (B, K, T), first = (args.batch_size, args.images, args.frames), state["step"]
    often = torch.tensor([T] + [1] * K)  # a video's frames share t and label, an image has its own
    stop, t0 = [], time.time()
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    try:
        for step in tqdm(range(first + 1, args.steps + 1), disable=None):
            g = torch.Generator().manual_seed(args.seed * 10**10 + step)
            (x, y), (images, y_images) = draw(data, B, T, g), draw(data, B * K, 1, g)
            x = torch.cat([x, images.view(B, K, *x.shape[2:])], 1).to(args.device)  # Section 3
            t, u = torch.rand(2, B, 1 + K, generator=g)
            y = torch.cat([y[:, None], y_images.view(B, K)], 1).masked_fill(u < 0.7, -1)
            # an unknown label, -1, in 7 of 10: Eq. 6 needs both kinds
            lam, y = (v.repeat_interleave(often, 1).to(args.device) for v in (log_snr(t), y))
            noise = torch.randn(x.shape, generator=g).to(args.device)
            loss = loss_v(model, x, lam, noise, y, K)  # Eq. 2
            optimizer.zero_grad(); loss.backward()  # fmt: skip
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not torch.isfinite(loss + norm):
                now = f"gradient {norm.item()}, loss {loss.item()}"
                raise FloatingPointError(f"{now} at step {step}")
            part = step / args.steps  # warm-up, then half a cosine
            rate = min(1.0, part / 0.02) * (1 + math.cos(math.pi * part)) / 2
            optimizer.param_groups[0]["lr"] = args.lr * rate
            optimizer.step()
            update_ema(ema, model, 0.995)
            state["step"] = step
            state["history"].append(loss.item())
            if stop or step % args.log_every == 0 or step == args.steps:
                recent, ms = state["history"][-args.log_every :], (time.time() - t0) * 1e3
                now = f"loss {sum(recent) / len(recent):.4f} | {ms / (step - first):.0f} ms/step"
                tqdm.write(f"step {step:6d}/{args.steps} | {now}")
                if args.save:  # beside its place, then moved there: a crash leaves the old one
                    file = {"script": "video_diffusion", "args": vars(args), **state}
                    file |= {"model": model.state_dict(), "ema": ema.state_dict()}
                    torch.save(file | {"optimizer": optimizer.state_dict()}, args.save + ".tmp")
                    os.replace(args.save + ".tmp", args.save)
            if stop:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    return bool(stop)


# ---- 6. Evaluation and pictures ----


def pixel_gaussian(x: Tensor, z: Tensor, lam: Tensor, *_) -> Tensor:
    """v of E[x | z_t] for who knows only each pixel's mean m and variance s2 over x (n, T, ...)."""
    (alpha, sigma), (s2, m) = alpha_sigma(lam, z), torch.var_mean(x, (0, 1))
    return sigma * (alpha * (1 - s2) * z - m) / (alpha**2 * s2 + sigma**2)


def make_judge(data, steps: int):
    """A small network trained on single real frames -> classify: (n, T, 1, 16, 16) -> (n, T)."""
    torch.manual_seed(0)  # the same judge for every --seed
    net = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    net = nn.Sequential(*net, nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        x, y = draw(data, 128, 1, torch.Generator().manual_seed(step))
        loss = F.cross_entropy(net(x[:, 0]), y)
        opt.zero_grad(); loss.backward(); opt.step()  # fmt: skip
    return torch.no_grad()(lambda x: net(x.flatten(0, 1)).argmax(1).view(x.shape[:2]))


def centre(videos: Tensor) -> Tensor:
    """Centre of mass in pixels (n, T, 2); below a tenth of the range is background."""
    ink = (videos.mean(2) + 1) / 2
    ink = ink * (ink > 0.1) + 1e-8
    rows, columns = (torch.arange(n).float() for n in ink.shape[2:])
    return torch.stack([ink.sum(3) @ rows, ink.sum(2) @ columns], 2) / ink.sum((2, 3))[..., None]


def measure(videos: Tensor, real: Tensor, labels: Tensor, classify) -> dict[str, float]:
    """identity: share of pairs (frame of the first half, of the second) that the judge calls alike;
    label: share of frames called by their label. In pixels: motion, the centre's way per frame;
    turn, its second difference; seam, that between the halves; miss, the way to the real half."""
    n, seen, c = videos.shape[1] // 2, classify(videos), centre(videos)
    turn = c.diff(n=2, dim=1).norm(dim=2)
    out = {"identity": seen[:, :n, None] == seen[:, None, n:], "label": seen == labels[:, None]}
    out |= {"motion": c.diff(dim=1).norm(dim=2), "turn": turn, "seam": turn[:, n - 2]}
    out["miss"] = (c - centre(real))[:, n:].norm(dim=2)
    return {name: value.float().mean().item() for name, value in out.items()}


def draw_pictures(folder: str, rows: dict[str, Tensor], given: int) -> None:
    """Six videos of each kind: a PNG, where a row is a video, and a GIF of the same."""
    from matplotlib.animation import FuncAnimation
    from matplotlib.figure import Figure

    fig, n = Figure(figsize=(12, 6.6), layout="constrained"), rows["real"].shape[1]
    bare = {"frame_on": False, "xticks": [], "yticks": []}

    def show(t):  # all frames in a row (t = n), or the t-th of each video
        fig.clear()
        for axis, (name, x) in zip(fig.subplots(2, 3, subplot_kw=bare).flat, rows.items()):
            x = x[:6] if t == n else x[:6, t].unflatten(0, (2, 3))  # (rows, columns, C, H, W)
            x = F.pad((x + 1) / 2, (1, 0, 1, 0), value=0.4).permute(0, 3, 1, 4, 2)
            axis.imshow(x.flatten(0, 1).flatten(1, 2).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            if name in ("replacement", "reconstruction guidance"):
                name += f", {given} of {n} frames given"
                right = given * x.shape[3] if t == n else (t < given) * 3 * x.shape[3]
                axis.axvspan(0, right, fill=False, edgecolor="orange", linewidth=4)
            axis.set_title(name)

    show(n)
    fig.savefig(os.path.join(folder, "video_diffusion.png"), dpi=90)
    movie = FuncAnimation(fig, show, n, lambda: None)
    movie.save(os.path.join(folder, "video_diffusion.gif"), "pillow", fps=4, dpi=50)


# ---- 7. Command line ----

DEFAULTS = {  # default, --quick, least, most, meaning
    "steps": (4000, 4, 1, math.inf, "training steps"),
    "batch_size": (8, 4, 1, 10**6, "videos per step"),
    "images": (2, 1, 0, 10**4, "independent images per video (paper: 0, 4 or 8)"),
    "frames": (8, 8, 4, 10**4, "frames of a video (paper: 16)"),
    "dim": (24, 8, 4, 10**5, "channels of the first level"),
    "mults": ("1 2", "1 2", "", "~", "their multiple at each level"),
    "patch": (2, 2, 1, 10**3, "side of the squares of pixels that enter as channels (paper: 1)"),
    "lr": (2e-3, 2e-3, 1e-12, 10, "peak rate; warm-up, then a cosine"),
    "seed": (0, 0, 0, 10**8, "of weights, batches and samples"),
    "w": (2.0, 2.0, 0, 100, "guidance weight, Eq. 6"),
    "w_r": (12.0, 12.0, 0, 10**4, "weight of reconstruction guidance, Eq. 7"),
    "sampling": (40, 2, 1, 10**6, "steps of the sampler"),
    "log_every": (250, 2, 1, math.inf, "steps between log lines"),
}


def parse(argv):
    """-> args, data, test, model, ema, optimizer, state. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or a .npz with x_train uint8 N x T x H x W (x 3)")
    for name, (value, *_, text) in DEFAULTS.items():
        flag(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}: {text}")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the pictures, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if identity (files: minus the loss) is below")
    args, ckpt = parser.parse_args(argv), {}
    try:
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "video_diffusion":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own = ckpt["args"] | {"steps": ckpt["step"]} if ckpt else {}
        args.data = args.data or own.get("data", "digits")
        for name, (*values, least, most, _) in DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, values[args.quick]))
            if not least <= getattr(args, name) <= most:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {least} and {most}")
        data = load_videos(args.data)
        (x, *_), digits = data[0], args.data == "digits"
        shape, T = ([1, 16, 16], math.inf) if digits else ([*x.shape[2:]], x.shape[1])
        classes = int(max(part[1].max() for part in data)) + 1  # the held-out videos', too
        mults = tuple(map(int, args.mults.split()))
        state, pixels = {"shape": shape, "classes": classes}, shape[1] * shape[2] / args.patch**2
        if any(ckpt.get(k, state[k]) != state[k] for k in state):
            raise ValueError(f"{args.load} is for other videos or classes than the data")
        state |= {k: ckpt.get(k, new) for k, new in (("step", 0), ("history", []))}
        torch.manual_seed(args.seed)
        low = sum(pixels > 256 * 4**i for i in range(len(mults)))  # attention at 256 pixels or less
        model = UNet3D(shape[0], args.dim, mults, low, 2, args.frames, args.patch, classes)
        if args.batch_size > len(x) or args.frames > T or any(n % model.stride for n in shape[1:]):
            raise ValueError(f"--batch-size: no more than the videos, {len(x)}; --frames: not over "
                             f"{T}; sides {shape[1:]} must divide by {model.stride}")  # fmt: skip
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "video_diffusion.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        ema = copy.deepcopy(model.to(args.device)).requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
        for name, part in (("model", model), ("ema", ema), ("optimizer", optimizer)):
            if ckpt:
                part.load_state_dict(ckpt[name])
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, *data, model, ema, optimizer, state


def main(argv=None) -> int:
    args, data, test, model, ema, optimizer, state = parse(argv)
    t0, stopped, T, digits = time.time(), False, args.frames, args.data == "digits"
    count = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
    kind = f"seed {args.seed} | {os.path.basename(args.data)} {len(data[0])}/{len(test[0])}"
    print(f"video_diffusion | {count} | {args.device} | {kind}", flush=True)
    try:
        if state["step"] < args.steps:
            stopped = train(model, ema, optimizer, data, args, state)
    except FloatingPointError as error:
        print(f"video_diffusion.py: stopped: {error}", file=sys.stderr)
        return 1
    n, given, g = 64 if digits and not args.quick else 10, T // 2, torch.Generator().manual_seed(1)
    (real, y), (x, _) = draw(test, n, T, g), draw(data, 1000 if digits else 200, T, g)
    lam, noise = log_snr((torch.arange(n) + 0.5) / n), torch.randn(real.shape, generator=g)
    batch = [v.to(args.device) for v in (real, lam, noise, y)]
    gauss = functools.partial(pixel_gaussian, x.to(args.device))
    with torch.no_grad():  # all t, evenly spaced, each on a video of its own
        losses = [loss_v(net, *batch).item() for net in (ema, gauss)]
    rows, half = {"real": real}, {"x_a": batch[0][:, :given]}
    for name, how in {
        "independent frames": {"num_images": T}, "samples": {},
        "samples by label": {"y": batch[3], "w": args.w},
        "replacement": half, "reconstruction guidance": half | {"w_r": args.w_r},
    }.items():  # fmt: skip
        if state["classes"] or name != "samples by label":
            g = torch.Generator().manual_seed(args.seed)
            x = sample(ema, real.shape, args.sampling, generator=g, device=args.device, **how)
            rows[name] = x.cpu().clamp(-1, 1)
    draw_pictures(args.out, rows, given)
    last = real[:, given - 1 : given].expand_as(real[:, given:])
    rows["last frame given, repeated"] = torch.cat([real[:, :given], last], 1)
    line, identity = "held-out loss {:.4f} | pixelwise Gaussian {:.4f}".format(*losses), {}
    if digits:
        print(line, flush=True)
        classify = make_judge(data, 50 if args.quick else 1500)
        for name, videos in rows.items():
            scores = measure(videos, real, y, classify)
            identity[name] = scores["identity"]
            print(f"{name:26s} | " + " | ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        names = "samples", "independent frames", "real"
        line = "test identity " + " | ".join(f"{k} {identity[k]:.3f}" for k in names)
    print(f"{line} | {time.time() - t0:.0f} s")
    quality = identity["samples"] if digits else -losses[0]
    return 130 if stopped else int(args.target is not None and quality < args.target)


if __name__ == "__main__":
    sys.exit(main())
