"""Diffusion: a network that only learns to remove Gaussian noise draws images out of pure noise.

Paper    Denoising Diffusion Probabilistic Models -- Jonathan Ho, Ajay Jain, Pieter Abbeel, June
         2020, arXiv:2006.11239v2. With it DDIM (Song et al., arXiv:2010.02502), the cosine schedule
         (Nichol, Dhariwal, 2102.09672), classifier-free guidance (Ho, Salimans, 2207.12598).
Idea     Adding noise T times destroys any image; the reverse of a small step is nearly Gaussian.
         The bound on log p(x_0) becomes T regressions: see a noisy image, name its noise. Any t is
         trained alone, because x_t follows from x_0 in one go.
Figure   x_0 --- q(x_t | x_(t-1)): shrink, add noise ---> x_t ---> ... ---> x_T ~ N(0, I)
         x_0 <-- p(x_(t-1) | x_t): remove a little <----- x_t <--- ... <--- x_T   each (B, C, H, W)
                                    ^ eps_theta(x_t, t), the U-Net:
         x_t (B, C, H, W) -> conv -> [block, block] ----- skips, concatenated ---> [3 blocks] -> eps
         t (B,) -> sines -> MLP        | stride 2: H/2                      2x up ^     (B, C, H, W)
         y (B,) -> embedding, added    +-> [block, block] -----------> [3 blocks] +
              (into every block)             with attention    ... [block, attention, block] ...
Symbols  T | T | number of steps, t = 1..T            beta | beta_t | variance added at t (T + 1,)
         alpha, alpha_bar | alpha_t, its product | signal kept in step t, and from 0 to t (T + 1,)
         beta_tilde | beta~_t | variance of q(x_(t-1) | x_t, x_0)    sigma2 | sigma_t^2 | p's
         x0, x | x_0, x_t | images in [-1, 1] (B, C, H, W)     noise, eps | eps, eps_theta(x_t, t)
         y | c | label (B,), -1 = none     w | w | guidance: eps = (1 + w) eps(c) - w eps; 0 is off
         eta | eta | DDIM's noise: 0 deterministic, 1 ancestral     S | S | DDIM's number of steps
Differs  One network, with and without labels (paper: none): three of four are hidden in training.
         Every table has an entry t = 0, no noise. Bound: L_0's variance is beta_1 for either
         sigma^2, as beta~_1 is 0. The linear schedule is steeper by 1000 / T if T is not 1000.
         `clip` (the authors' code, not the paper; here the demo) keeps the estimate of x_0 within
         [-1, 1]. Gradients are cut to norm 1 (their code again). Rate: warm-up, then a cosine to 0,
         so that a short run ends well; paper: constant. Demo: T = 200, cosine schedule, 8x8 digits.
Run      python diffusion.py                        # about 3 minutes on one CPU core
         python diffusion.py --save m.pt; python diffusion.py --load m.pt --samples 64 --ddim 20
         python diffusion.py --data mnist.npz       # 70 minutes; a 32x32 .npz: the paper's U-Net
         torchrun --nproc-per-node 8 diffusion.py --data cifar10.npz --amp
Expect   Test FD without labels, seeds 0-2: 0.28 +- 0.03 (200 steps; .280 .249 .308), DDIM with 20
         steps 0.44 +- 0.02; bound 2.60 bits/dim. By label: accuracy .860 (w = 0), .994 (w = 2).
         Floor, train against test, 0.21; a Gaussian per class 0.43; one Gaussian 1.45. The share of
         hidden labels was chosen on a part of the training digits, after test figures with two of
         four (0.35 +- 0.05) had been seen. Paper, CIFAR-10: FID 3.17, at most 3.75 bits/dim.
         MNIST, seed 0 (44 minutes of training, 24 of sampling): 0.54, DDIM 0.50; 2.30 bits/dim; by
         label .679, .973. Floor 0.39; a Gaussian per class 1.59; one Gaussian 5.74.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Noise schedules ----


def linear_schedule(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """beta_1..beta_T (T,), Section 4. Times 1000 / T: a short chain must end in noise, too."""
    return (torch.linspace(first, last, T, dtype=torch.float64) * 1000 / T).clamp(max=0.999)


def cosine_schedule(T: int = 1000, s: float = 0.008) -> Tensor:
    """beta_1..beta_T (T,) for an alpha_bar that falls as cos^2 (Improved DDPM, Eq. 17)."""
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)  # without the limit beta_T = 1 and alpha_T = 0


# ---- 2. Diffusion: the chains q and p, the objective, the samplers ----


def at(table: Tensor, t, x: Tensor) -> Tensor:
    """table[t] for t an int or (B,), on x's device and shaped to multiply x (B, ...)."""
    value = table[torch.as_tensor(t).cpu()].to(x.dtype).to(x.device)  # float64 up to here
    return value.view(-1, *[1] * (x.dim() - 1))


def gaussian_kl(mean1, var1, mean2, var2) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) in nats, elementwise."""
    return 0.5 * ((var2 / var1).log() + (var1 + (mean1 - mean2) ** 2) / var2 - 1)


def decoder_log_prob(x0: Tensor, mean: Tensor, sigma: float, levels: int) -> Tensor:
    """log p(x_0 | x_1), Eq. 13: the Gaussian's mass in x_0's bin; the end bins are infinite."""
    x0, mean, half = x0.cpu().double(), mean.cpu().double(), 1 / (levels - 1)
    a = torch.where(x0 - half < -1, -math.inf, (x0 - half - mean) / sigma)
    b = torch.where(x0 + half > 1, math.inf, (x0 + half - mean) / sigma)
    a, b = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)  # in the upper tail 1 - 1 = 0: flip
    low, high = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return high + torch.log1p(-torch.exp(low - high))


class Diffusion:
    """q and p_theta over t = 1..T. `model(x_t, t, y)`, or `model(x_t, t)`, predicts the noise.
    betas (T,); sigma2 "beta" or "beta_tilde", the two choices of Section 3.2 for p's variance."""

    def __init__(self, betas: Tensor, sigma2: str = "beta"):
        if sigma2 not in ("beta", "beta_tilde"):
            raise ValueError(f"sigma2 must be beta or beta_tilde, not {sigma2!r}")
        self.T = len(betas)
        self.beta = F.pad(betas.double().cpu(), (1, 0))  # index t is the paper's t; 0 is data
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)
        before = F.pad(self.alpha_bar[:-1], (1, 0), value=1.0)  # alpha_bar_(t-1)
        variance = (1 - before) / (1 - self.alpha_bar) * self.beta  # beta_tilde, Eq. 7; 0/0 at 0
        self.beta_tilde = F.pad(variance[1:], (1, 0))
        self.sigma2 = self.beta if sigma2 == "beta" else self.beta_tilde

    def q_sample(self, x0: Tensor, t, noise: Tensor) -> Tensor:
        """x_t from x_0 in one go: Eq. 4. t: 0..T, an int or (B,)."""
        noise = at((1 - self.alpha_bar).sqrt(), t, x0) * noise
        return at(self.alpha_bar.sqrt(), t, x0) * x0 + noise

    def posterior(self, x0: Tensor, x: Tensor, t) -> tuple[Tensor, Tensor]:
        """Mean (as x) and variance of q(x_(t-1) | x_t, x_0), Eq. 6-7. t: 1..T."""
        a, before = self.alpha_bar, self.alpha_bar.roll(1)
        mean = at(before.sqrt() * self.beta / (1 - a), t, x) * x0
        mean = mean + at(self.alpha.sqrt() * (1 - before) / (1 - a), t, x) * x
        return mean, at(self.beta_tilde, t, x)

    def predict_x0(self, x: Tensor, t, eps: Tensor) -> Tensor:
        """The x_0 that x_t and its noise imply: Eq. 15, which is Eq. 4 solved for x_0."""
        return (x - at((1 - self.alpha_bar).sqrt(), t, x) * eps) / at(self.alpha_bar.sqrt(), t, x)

    def p_mean(self, x: Tensor, t, eps: Tensor, clip: bool = False) -> Tensor:
        """mu_theta(x_t, t), Eq. 11; with clip Eq. 7 of a clipped x_0: equal where nothing clips."""
        if clip:
            return self.posterior(self.predict_x0(x, t, eps).clamp(-1, 1), x, t)[0]
        scale = at(self.beta / (1 - self.alpha_bar).sqrt(), t, x)
        return (x - scale * eps) / at(self.alpha.sqrt(), t, x)

    def loss(self, model, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """L_simple, Eq. 14: line 5 of Algorithm 1, whose lines 2-4 drew x_0, t (B,) uniform on
        1..T, and the noise. Mean over pixels, so an untrained network that returns 0 scores 1."""
        x = self.q_sample(x0, t, noise)
        t = t.to(x.device)
        eps = model(x, t) if y is None else model(x, t, y)
        return F.mse_loss(eps.float(), noise)

    def eps(self, model, x: Tensor, t: int, y: Tensor | None = None, w: float = 0.0) -> Tensor:
        """eps_theta(x_t, t, y). Guided by w (Ho & Salimans, Eq. 6); others call 1 + w the scale."""
        t = torch.full((len(x),), t, device=x.device)
        if y is None or w == 0:
            return (model(x, t) if y is None else model(x, t, y)).float()
        y = torch.cat([y, torch.full_like(y, -1)])
        with_y, without = model(x.repeat(2, 1, 1, 1), t.repeat(2), y).float().chunk(2)
        return (1 + w) * with_y - w * without

    @torch.no_grad()
    def sample(self, model, shape, y=None, w=0.0, clip=False, generator=None, device="cpu"):
        """Algorithm 2: x_0 (B, C, H, W) from T calls. y, w: see `eps`; clip: see `p_mean`."""
        x = torch.randn(shape, generator=generator).to(device)  # line 1
        for t in range(self.T, 0, -1):
            z = torch.randn(shape, generator=generator).to(device) if t > 1 else 0.0  # line 3
            eps = self.eps(model, x, t, y, w)
            x = self.p_mean(x, t, eps, clip) + at(self.sigma2.sqrt(), t, x) * z  # line 4
        return x

    @torch.no_grad()
    def ddim(
        self, model, shape, steps=50, eta=0, y=None, w=0, clip=False, generator=None, device="cpu"
    ):
        """DDIM: x_0 from `steps` calls (1..T), on evenly spaced t that include T. eta: 0..1; 1 with
        T steps is Algorithm 2 with sigma^2 = beta_tilde. Else ValueError."""
        if not 1 <= steps <= self.T or not 0 <= eta <= 1:
            raise ValueError(f"steps must be in 1..{self.T}, eta in 0..1; not {steps}, {eta}")
        tau = torch.linspace(0, self.T, steps + 1).round().long().tolist()
        x, a = torch.randn(shape, generator=generator).to(device), self.alpha_bar.tolist()
        for t, s in zip(tau[:0:-1], tau[-2::-1]):  # from t to the earlier s; the last s is 0
            eps = self.eps(model, x, t, y, w)
            x0 = self.predict_x0(x, t, eps)
            if clip:
                x0 = x0.clamp(-1, 1)
                eps = (x - a[t] ** 0.5 * x0) / (1 - a[t]) ** 0.5
            sigma = eta * ((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s])) ** 0.5  # DDIM, Eq. 16
            x = a[s] ** 0.5 * x0 + max(1 - a[s] - sigma**2, 0.0) ** 0.5 * eps  # DDIM, Eq. 12
            if sigma:
                x = x + sigma * torch.randn(shape, generator=generator).to(device)
        return x

    @torch.no_grad()
    def bits_per_dim(self, model, x0: Tensor, levels=256, y=None, generator=None) -> Tensor:
        """The variational bound, Eq. 5: -log2 p(x_0) per pixel and channel is at most this (B,).
        x0 in [-1, 1] on `levels` evenly spaced values. All T terms, each with one draw of x_t."""
        a, one = self.alpha_bar[self.T].float(), torch.tensor(1.0)
        nats = gaussian_kl(a.sqrt() * x0, 1 - a, 0.0, one).flatten(1).sum(1)  # L_T, about 0
        for t in range(self.T, 0, -1):
            noise = torch.randn(x0.shape, generator=generator).to(x0.device)
            x = self.q_sample(x0, t, noise)
            mu = self.p_mean(x, t, self.eps(model, x, t, y), clip=True)
            if t > 1:  # L_(t-1)
                kl = gaussian_kl(*self.posterior(x0, x, t), mu, at(self.sigma2, t, x))
            else:  # L_0
                kl = -decoder_log_prob(x0, mu, self.beta[1].item() ** 0.5, levels).to(x)
            nats = nats + kl.flatten(1).sum(1)
        return nats / (x0[0].numel() * math.log(2))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model (Appendix B): the weights to sample with."""
    for old, new in zip(ema.parameters(), model.parameters()):
        old.lerp_(new, 1 - decay)


# ---- 3. The U-Net (Section 4, Appendix B) ----


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """t (B,) -> (B, dim): sines, then cosines, of wavelengths from 2 pi to 20,000 pi."""
    freqs = torch.exp(torch.arange(dim // 2, device=t.device) * -math.log(10_000) / (dim // 2 - 1))
    angle = t[:, None].float() * freqs
    return torch.cat([angle.sin(), angle.cos()], 1)


def norm(C: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, C // 4), C, eps=1e-6)  # the paper's 32 where C allows it


class Attention(nn.Module):
    """Self-attention over all pixels, one head: (B, C, H, W) -> same."""

    def __init__(self, C: int):
        super().__init__()
        self.norm, self.qkv, self.out = norm(C), nn.Conv2d(C, 3 * C, 1), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)  # (B, HW, C)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, C, HW)
        return x + self.out(h.reshape(x.shape))


class Block(nn.Module):
    """Residual block: x (B, C_in, H, W), e (B, C_time) -> (B, C_out, H, W); attention if asked."""

    def __init__(self, C_in: int, C_out: int, C_time: int, dropout: float, attention: bool):
        super().__init__()
        self.norm1, self.conv1 = norm(C_in), nn.Conv2d(C_in, C_out, 3, padding=1)
        self.norm2, self.conv2 = norm(C_out), nn.Conv2d(C_out, C_out, 3, padding=1)
        self.time, self.dropout = nn.Linear(C_time, C_out), nn.Dropout(dropout)
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()
        self.attention = Attention(C_out) if attention else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(e)[:, :, None, None]
        return self.attention(self.skip(x) + self.conv2(self.dropout(F.silu(self.norm2(h)))))


class UNet(nn.Module):
    """x (B, C, H, W), t (B,), y (B,) labels or None -> eps as x. Defaults: the CIFAR-10 net.
    Level i has dim * mults[i] channels (dim: a multiple of 4) at 1/2^i of the size; `attention`
    names the levels that attend (1 is 16x16 of 32x32). y = -1 or None is "no label". Raises
    ValueError where H or W is no multiple of 2^(len(mults) - 1)."""

    def __init__(
        self, in_channels=3, dim=128, mults: tuple[int, ...] = (1, 2, 2, 2), num_blocks=2,
        attention: tuple[int, ...] = (1,), dropout=0.1, num_classes=0,
    ):  # fmt: skip
        super().__init__()
        if dim % 4 or min(dim, *mults) < 1:
            raise ValueError(f"dim must be a multiple of 4, mults > 0; not {dim}, {mults}")
        self.dim, self.stride, C_time, C, widths = dim, 2 ** (len(mults) - 1), 4 * dim, dim, [dim]
        self.time = nn.Sequential(nn.Linear(dim, C_time), nn.SiLU(), nn.Linear(C_time, C_time))
        self.label = nn.Embedding(num_classes + 1, C_time) if num_classes else None
        self.conv_in = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, mult in enumerate(mults):
            for _ in range(num_blocks):
                self.down.append(Block(C, mult * dim, C_time, dropout, i in attention))
                widths.append(C := mult * dim)
            if i < len(mults) - 1:
                self.down.append(nn.Conv2d(C, C, 3, stride=2, padding=1))
                widths.append(C)
        self.middle = nn.ModuleList(Block(C, C, C_time, dropout, i == 0) for i in range(2))
        for i, mult in reversed(list(enumerate(mults))):
            for _ in range(num_blocks + 1):
                self.up.append(Block(C + widths.pop(), mult * dim, C_time, dropout, i in attention))
                C = mult * dim
            if i:
                self.up.append(nn.Sequential(nn.Upsample(None, 2), nn.Conv2d(C, C, 3, padding=1)))
        self.norm, self.conv_out = norm(C), nn.Conv2d(C, in_channels, 3, padding=1)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() > 1 and p is not getattr(self.label, "weight", None):
                nn.init.xavier_uniform_(p)
            if name.endswith(("conv2.weight", "out.weight")):
                nn.init.zeros_(p)  # every block starts as the identity, the network as eps = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(f"sides {tuple(x.shape[2:])} must be multiples of {self.stride}: pad")
        if y is not None and self.label is None:
            raise ValueError("this U-Net was built with num_classes=0: it takes no labels")
        e = self.time(time_embedding(t, self.dim))  # (B, C_time)
        if self.label is not None:
            e = e + self.label(torch.zeros_like(t) if y is None else y + 1)  # row 0: no label
        e, h = F.silu(e), self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, e) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, e)
        for layer in self.up:
            block = isinstance(layer, Block)
            h = layer(torch.cat([h, skips.pop()], 1), e) if block else layer(h)
        return self.conv_out(F.silu(self.norm(h)))


# ---- 4. Data and training (Algorithm 1) ----


def load_images(path: str):
    """-> train images (N, C, H, W) uint8, labels (N,), test images, number of grey levels. "digits"
    is scikit-learn's, shuffled once; a file is .npz with x_train, y_train and x_test."""
    if path == "digits":
        from sklearn.datasets import load_digits

        order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
        x, y = (torch.tensor(a)[order] for a in load_digits(return_X_y=True))
        x = x.byte().view(-1, 8, 8, 1).movedim(3, 1)
        return x[:1200], y[:1200], x[1200:], 17
    with np.load(path, allow_pickle=False) as file:
        x, y, x_test = (torch.tensor(file[k]) for k in ("x_train", "y_train", "x_test"))
    fits = x.dtype == x_test.dtype == torch.uint8 and x.shape[1:] == x_test.shape[1:]
    fits = fits and x.ndim > 2 and x.shape[3:] in ((), (3,)) and x.numel()
    if not fits or min(len(x), len(x_test)) < 10:
        raise ValueError(f"{path}: images must be uint8, N > 9 of (H, W) or (H, W, 3), alike")
    if y.shape != x.shape[:1] or y.is_floating_point() or y.min() < 0 or y.max() > 999:
        raise ValueError(f"{path}: labels must be whole numbers 0..999, one per image")
    x, x_test = (t.reshape(*t.shape[:3], -1).movedim(3, 1) for t in (x, x_test))
    return x, y.long(), x_test, 256


def train(diffusion, model, ema, optimizer, data, args, state) -> bool:
    """Trains on batches that are functions of (seed, step). Returns whether Ctrl-C ended it."""
    from tqdm import tqdm

    (images, labels, _, levels), device, B = data, args.device, args.batch_size
    images, labels = images.to(device), labels.to(device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = slice(rank, None, world)  # all processes draw the same batch and each takes its rows
    stop, t0, first, parameters = [], time.time(), state["step"], list(model.parameters())
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    for step in tqdm(range(first + 1, args.steps + 1), disable=True if rank else None):
        g = torch.manual_seed(args.seed * 10**10 + step)  # dropout's too, so a resumed run is exact
        i = torch.randint(len(images), (B,), generator=g).to(device)
        x0, y = images[i].float() * (2 / (levels - 1)) - 1, labels[i]
        if x0.shape[1] == 3:  # colour photographs: the paper's random flips
            x0 = torch.where(torch.rand(B, 1, 1, 1, generator=g).to(device) < 0.5, x0.flip(3), x0)
        y = y.masked_fill(torch.rand(B, generator=g).to(device) < args.drop_label, -1)
        t = torch.randint(1, diffusion.T + 1, (B,), generator=g)
        noise = torch.randn(x0.shape, generator=g).to(device)
        if world > 1:  # for a dropout of its own
            torch.manual_seed(args.seed * 10**10 + step + (rank + 1) * 10**9)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.amp):
            loss = diffusion.loss(model, x0[mine], t[mine], noise[mine], y[mine])  # Eq. 14
        optimizer.zero_grad(); loss.backward()  # fmt: skip
        loss, ended = loss.detach(), torch.tensor(float(len(stop)), device=device)
        if world > 1:  # mean over the processes: the gradient of the whole batch
            for tensor in (loss, ended, *(p.grad for p in parameters)):
                dist.all_reduce(tensor.div_(world))
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if not torch.isfinite(loss + norm):
            raise FloatingPointError(f"gradient {norm.item()}, loss {loss.item()} at step {step}")
        rate = min(1, step / (0.02 * args.steps)) * (1 + math.cos(math.pi * step / args.steps)) / 2
        optimizer.param_groups[0]["lr"] = args.lr * rate
        optimizer.step()
        update_ema(ema, model, args.ema)
        state["step"] = step
        state["history"].append(loss.item())
        if rank == 0 and (ended or step % args.log_every == 0 or step == args.steps):
            recent, ms = state["history"][-args.log_every :], (time.time() - t0) / (step - first)
            now = f"L_simple {sum(recent) / len(recent):.4f} | {ms * 1e3:.0f} ms/step"
            tqdm.write(f"step {step:6d}/{args.steps} | {now}")
            if args.save:  # beside its place, then moved there: a crash leaves the old one
                file = {"script": "diffusion", "args": vars(args), **state}
                file |= {"model": model.state_dict(), "ema": ema.state_dict()}
                torch.save(file | {"optimizer": optimizer.state_dict()}, args.save + ".tmp")
                os.replace(args.save + ".tmp", args.save)
        if ended:
            break
    return bool(ended)


# ---- 5. Judge (the same in every generator here; it sees labels, the model does not) ----


def make_judge(train: Tensor, labels: Tensor, test: Tensor):
    """Images in [0, 1], train (N, ...) with labels (N,), test (M, ...) -> (score, classify).

    score(images) is a dict, on 32 features of a small classifier, standardised by the train split:
    FD: Frechet distance |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^1/2) to the test split.
    precision: share of images within the 5th-neighbour radius of a test image; recall: of test
    images within that of an image. novelty: median pixel distance to the nearest train image over
    the test split's own: 0 is memorised, about 1 is like new data. classify(images) -> labels (n,).
    """
    test = test[:: -(-len(test) // 2000)]  # at most 2,000, spread over the split
    train, test, labels = *(x.flatten(1).float().cpu() for x in (train, test)), labels.cpu().long()
    with torch.random.fork_rng(devices=[]):  # the same judge for every --seed
        torch.default_generator.manual_seed(0)
        net = [nn.Linear(train.shape[1], 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU()]
        net = nn.Sequential(*net, nn.Linear(32, int(labels.max()) + 1))
        opt = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(max(500, 3 * len(train) // 128)):
            i = torch.randint(len(train), (128,))
            loss = F.cross_entropy(net(train[i]), labels[i])
            opt.zero_grad(); loss.backward(); opt.step()  # fmt: skip
    body = net.requires_grad_(False)[:3].double()  # to before the second ReLU
    std, mean = torch.std_mean(body(train.double()), 0)
    r = (body(test.double()) - mean) / std.clamp(min=1e-6)

    def to_train(x):
        return torch.cat([torch.cdist(p, train).amin(1) for p in x.split(200)]).median()

    def score(images: Tensor) -> dict[str, float]:
        x = images.flatten(1).float().cpu()
        g = (body(x.double()) - mean) / std.clamp(min=1e-6)
        S_r, S_g = torch.cov(r.T), torch.cov(g.T)  # S_r S_g has real eigenvalues >= 0
        root = torch.linalg.eigvals(S_r @ S_g).real.clamp(min=0).sqrt().sum()
        near = torch.cdist(r, g)  # radii: the 6th nearest, as the first is the point itself
        radius_r, radius_g = (torch.cdist(a, a).kthvalue(6).values for a in (r, g))
        out = {"FD": (r.mean(0) - g.mean(0)).square().sum() + (S_r + S_g).trace() - 2 * root}
        out["precision"] = (near < radius_r[:, None]).any(0).double().mean()
        out["recall"] = (near < radius_g).any(1).double().mean()
        out["novelty"] = to_train(x) / to_train(test)
        return {name: float(value) for name, value in out.items()}

    return score, lambda images: net.double()(images.flatten(1).cpu().double()).argmax(1)


def gaussian_images(train: Tensor, labels: Tensor, n: int) -> Tensor:
    """n draws (n, D) in [0, 1] from a full Gaussian per class; labels all 0: from one for all."""
    g, out = torch.Generator().manual_seed(0), []
    chosen = labels[torch.randint(len(labels), (n,), generator=g)]
    for c in labels.unique():
        a = train[labels == c].flatten(1).float()
        noise = torch.randn(int((chosen == c).sum()), len(a), generator=g) / len(a) ** 0.5
        out.append(a.mean(0) + noise @ (a - a.mean(0)))  # covariance of a, without forming it
    return torch.cat(out).clamp(0, 1)


# ---- 6. Evaluation and picture ----


def generate(diffusion, ema, args, shape, y, steps=None, w=0.0) -> Tensor:
    """An image in [0, 1] for each of the labels y (n,): by DDIM in `steps` steps or Algorithm 2."""
    g, out = torch.Generator().manual_seed(args.seed), []
    how = {"clip": True, "generator": g, "device": args.device, "w": w}
    draw = partial(diffusion.ddim, steps=steps, eta=args.eta) if steps else diffusion.sample
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp):
        for part in y.split(500):
            out.append(draw(ema, (len(part), *shape), y=part.to(args.device), **how).cpu())
    return (torch.cat(out).clamp(-1, 1) + 1) / 2


def draw_picture(path, diffusion, free, guided, how, trace, x0):
    """Samples without and with labels; x0 (1, C, H, W) into noise; noise into an image."""
    from matplotlib.figure import Figure

    T, x0, g = diffusion.T, x0.expand(11, -1, -1, -1), torch.Generator().manual_seed(0)
    ts = torch.linspace(0, T, 11).round().long()
    trace = [*trace[:T], [2 * free[:1] - 1] * 2]  # of t = T, ..., 1 and 0, in this order
    x, eps = (torch.cat([trace[T - t][k].float().cpu() for t in ts.flip(0)]) for k in (0, 1))
    rows = [diffusion.q_sample(x0, ts, torch.randn(x0.shape, generator=g)), x]
    rows = torch.cat([*rows, diffusion.predict_x0(x, ts.flip(0), eps)]).clamp(-1, 1)
    fig = Figure(figsize=(11, 9.5), layout="constrained")
    grid = fig.add_gridspec(2, 2, height_ratios=[1.5, 1])
    top, right, below = (fig.add_subplot(g) for g in (grid[0, 0], grid[0, 1], grid[1, :]))
    for axis, images, columns in (top, free, 10), (right, guided, 10), (below, (rows + 1) / 2, 11):
        images = F.pad(images[: len(images) // columns * columns], (0, 1, 0, 1), value=1.0)
        images = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)  # rows, H, columns, W, C
        images = images.flatten(2, 3).flatten(0, 1).squeeze(-1)
        axis.imshow(images.numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    top.set_title(f"samples without a label: Algorithm 2, {T} steps")
    right.set_title(f"samples by label: {how}")
    below.set_title("rows: image to noise (q); noise to image (p_theta); the x_0 seen on the way")
    ticks = [(x0.shape[3] + 1) * (k + 0.5) for k in range(11)]
    below.set_xticks(ticks, [str(t) for t in ts.tolist()])
    below.set_xlabel("t of the top row; the rows below run from T to 0")
    fig.savefig(path, dpi=90)


# ---- 7. Command line ----

WORDS = {"schedule": {"linear": linear_schedule, "cosine": cosine_schedule}}
WORDS |= {"sigma2": ("beta", "beta_tilde")}
DEFAULTS = {  # for 8x8 images, up to 31x31, larger (the paper's), --quick; least, most; meaning
    "T": (200, 200, 1000, 10, 1, 10**6, "steps of the chain"),
    "schedule": ("cosine", "cosine", "linear", "cosine", "", "~", "of beta"),
    "sigma2": ("beta", "beta", "beta", "beta", "", "~", "variance of p (paper: both)"),
    "dim": (16, 16, 128, 8, 1, 10**4, "channels of the first level, a multiple of 4"),
    "mults": ("1 2", "1 2 4", "1 2 2 2", "1 2", "", "~", "their multiple at each level"),
    "blocks": (1, 1, 2, 1, 1, 99, "residual blocks per level"),
    "dropout": (0.0, 0.0, 0.1, 0.0, 0, 0.99, "in each block"),
    "drop_label": (0.75, 0.75, 0.75, 0.75, 0, 1, "share of labels hidden in training"),
    "steps": (3000, 5000, 800_000, 8, 1, math.inf, "of training"),
    "batch_size": (64, 64, 128, 8, 1, 10**6, "images per step"),
    "lr": (2e-3, 2e-3, 2e-4, 2e-3, 1e-12, 9, "peak rate, falls to 0"),
    "ema": (0.995, 0.999, 0.9999, 0.9, 0, 1 - 1e-9, "decay of the averaged weights"),
    "eta": (0.0, 0.0, 0.0, 0.0, 0, 1, "DDIM's noise"),
    "seed": (0, 0, 0, 0, -(10**8), 10**8, "of weights, batches and samples"),
    "log_every": (250, 250, 250, 250, 1, math.inf, "steps between log lines"),
}


def parse(argv):
    """-> args, data (None with --samples), model, ema, optimizer, state. Bad input: exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    for name, (a, b, c, *_, text) in DEFAULTS.items():
        larger = f", from 9x9 {b}, from 32x32 (and in the paper) {c}" if a != c else ""
        text = f"default {a}{larger}: {text}"
        flag(f"--{name.replace('_', '-')}", type=type(a), choices=WORDS.get(name), help=text)
    flag("--data", help="digits (default) or a .npz file as Keras's mnist.npz (paper: CIFAR-10)")
    flag("--ddim", type=int, help="DDIM's steps: default 20; with --samples: Algorithm 2")
    flag("--w", type=float, nargs=2, default=[0.0, 2.0], help="two guidance weights, default 0 2")
    flag("--samples", type=int, help="with --load: only write that many samples; needs no data")
    flag("--label", type=int, default=-1, help="class of --samples, guided by the second --w")
    flag("--amp", action="store_true", help="bfloat16 autocast, for GPUs")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if FD of the unlabelled samples is above this")
    args, loaded, own, data = parser.parse_args(argv), {}, {}, None
    world, state = int(os.environ.get("WORLD_SIZE", 1)), {"step": 0, "history": []}
    try:
        if args.load:
            loaded = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict) or loaded.get("script") != "diffusion":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
            own = loaded["args"] | {"steps": loaded["step"]}
            state = {k: loaded[k] for k in ("step", "history", "shape", "classes")}
        args.data = args.data or own.get("data", "digits")
        if args.samples is None:
            data = load_images(args.data)
            found = {"shape": list(data[0].shape[1:]), "classes": int(data[1].max()) + 1}
            if loaded and state | found != state:
                raise ValueError(f"{args.load} is for other images or classes than the data")
            state |= found
        elif not loaded or args.samples < 1:
            raise ValueError("--samples needs --load, and must be > 0")
        size = sum(max(state["shape"]) > side for side in (8, 31))
        for name, (*values, low, high, _) in DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, values[3 if args.quick else size]))
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        ddim = 1 if args.ddim is None else args.ddim
        if not 1 <= ddim <= args.T or not -1 <= args.label < state["classes"]:
            raise ValueError(f"--ddim must be in 1..T = {args.T}, --label a class of the data")
        if args.batch_size % world or data and args.batch_size > len(data[0]):
            raise ValueError("--batch-size is more than the images, or doesn't divide by processes")
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.manual_seed(args.seed)
        mults = tuple(int(m) for m in args.mults.split())
        net = state["shape"][0], args.dim, mults, args.blocks, (len(mults) - 1 if size < 2 else 1,)
        model = UNet(*net, args.dropout, state["classes"]).to(args.device)
        ema = copy.deepcopy(model).requires_grad_(False).eval()
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
        if loaded:
            for part, name in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
                part.load_state_dict(loaded[name])
        if any(side % model.stride for side in state["shape"][1:]):
            raise ValueError(f"sides {state['shape'][1:]} must be multiples of {model.stride}")
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "diffusion.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, data, model, ema, optimizer, state


def main(argv=None) -> int:
    rank, world = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))
    args, data, model, ema, optimizer, state = parse(argv)
    if world > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    t0, stopped, trace = time.time(), False, []
    diffusion = Diffusion(WORDS["schedule"][args.schedule](args.T), args.sigma2)
    draw = partial(generate, diffusion, ema, args, state["shape"])
    if args.samples and rank:
        return 0  # the first process draws them
    if args.samples:
        y, w = torch.full((args.samples,), args.label), args.w[1] * (args.label >= 0)
        images = draw(y, args.ddim, w).movedim(1, -1).squeeze(-1)
        path = os.path.join(args.out, "diffusion_samples.npz")
        np.savez(path, samples=(images * 255).round().byte().numpy())
        print(f"{args.samples} samples of {tuple(images.shape[1:])} in {path}")
        return 0
    images, labels, test, levels = data
    if rank == 0:
        count = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
        kind = f"seed {args.seed} | {os.path.basename(args.data)} {len(images)}/{len(test)}"
        print(f"diffusion | {count} | {args.device} | {kind}", flush=True)
    before = signal.getsignal(signal.SIGINT)
    try:
        if state["step"] < args.steps:
            stopped = train(diffusion, model, ema, optimizer, data, args, state)
    except FloatingPointError as error:
        print(f"diffusion.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
    if world > 1:
        dist.destroy_process_group()
    if rank:  # the other processes of torchrun are done
        return 0
    n, S = 60 if args.quick else 1000, args.ddim or min(20, args.T)
    images, y = images / (levels - 1), labels[:n]
    score, classify = make_judge(images, labels, test / (levels - 1))

    def keep(_, x_t, eps):  # copies: a view would keep its whole batch
        trace.append((x_t[0][:1].clone(), eps[:1].clone()))

    hook = ema.register_forward_hook(keep)
    rows = {"DDPM": draw(torch.full((n,), -1))}
    hook.remove()
    rows["DDIM"] = draw(torch.full((n,), -1), S)
    rows |= {f"DDIM, label, w = {w:g}": draw(y, S, w) for w in args.w}
    rows["Gaussian per class"] = gaussian_images(images, labels, n)
    rows["one Gaussian"] = gaussian_images(images, labels * 0, n)
    rows["train images (floor)"] = images[:n]
    fd = {}
    for name, row in rows.items():
        scores = score(row)
        fd[name] = scores["FD"]
        line = " | ".join(f"{k} {v:.2f}" for k, v in scores.items())
        if "label" in name or "train" in name:
            line += f" | label accuracy {(classify(row) == y).double().mean():.3f}"
        print(f"{name:20s} | {line}", flush=True)
    x0 = test[: 4 if args.quick else 128].to(args.device).float() * (2 / (levels - 1)) - 1
    bits = diffusion.bits_per_dim(ema, x0, levels, None, torch.Generator().manual_seed(0)).mean()
    each, path = torch.arange(state["classes"]).repeat_interleave(10), "diffusion.png"
    samples = rows["DDPM"][:100], draw(each[:100], S, args.w[1])
    how = f"DDIM, {S} steps, guidance w = {args.w[1]:g}"
    draw_picture(os.path.join(args.out, path), diffusion, *samples, how, trace, x0[:1].cpu())
    steps = {"DDPM": f" ({args.T} steps)", "DDIM": f" ({S} steps)"}
    line = [f"{k} {v:.3f}{steps.get(k, '')}" for k, v in fd.items() if "label" not in k]
    line = " | ".join(line) + f" | bound {bits:.2f} bits/dim (uniform {math.log2(levels):.2f})"
    print(f"test FD {line} | {time.time() - t0:.0f} s")
    return 130 if stopped else int(args.target is not None and fd["DDPM"] > args.target)


if __name__ == "__main__":
    sys.exit(main())
