"""Mamba: a state space model whose step size, input and output matrices depend on the token.

Paper    Mamba: Linear-Time Sequence Modeling with Selective State Spaces -- Albert Gu, Tri Dao,
         December 2023, arXiv:2312.00752v2
Idea     A linear time-invariant SSM mixes every token into its state with the same weights, so it
         cannot pick what to remember. Mamba computes Delta, B and C from the token: a large Delta
         writes it, a small one lets it pass. The convolution is lost; a fused scan replaces it.
Figure   (Figure 3; one of n_layer equal layers)

         ids (B, L) -> embedding -> x (B, L, d_model) --------------------------+
                                    RMSNorm                                     |
                        +------------- in_proj -------------+                   |
                   x (B, L, D)                          z (B, L, D)             | residual
             causal conv1d, SiLU                          SiLU                  | (fp32)
                        | u (B, L, D)                       |                   |
          x_proj: dt (B, L, D), B, C (B, L, N)              |                   |
          selective scan, state h (B, D, N) -- y (B, L, D) -*                   |
                                                        out_proj -> (B, L, d) --+-> next layer
Symbols  u | x | input of the SSM (B, L, D)            dt | Delta | step size (B, L, D), > 0
         A | A | diagonal of the state matrix (D, N)   h | h | state (B, D, N)
         B, C | B, C | input / output matrix (B, L, N) D | D | skip weight (D,); also D = d_inner
         A_bar, B_bar | discretised A, B: exp(dt A) and dt B          z | gate branch (B, L, D)
Differs  As the official code: B_bar = dt B, not Eq. 4's ZOH; dt starts log-uniform, not uniform.
         The copying demo has length 104 and not 4096, 8 data tokens and not 16, 1,500 steps and
         not 400,000, and sequences that grow in training: it has to end in minutes. Its LTI model
         keeps gate and convolution (Table 1's "Mamba block + S4"); its SSM is real and diagonal.
Run      python mamba.py                           # selective copying, 5 minutes on 2 cores
         python mamba.py --task induction          # Table 2: accuracy from 64 to 65,536 tokens
         python mamba.py --task lm --data FILE     # bytes of a text file; prints a sample
         torchrun --nproc-per-node 2 mamba.py      # the batch shared out between processes
Expect   copying, seeds 0-2 on two threads, 0-1 on one (other roundings): selective .9994 +- .0004
         (.9997 .9990 .9997, .9989 .9995) | LTI .641 +- .031 | chance .071 | paper .998, .564.
         lm, tinyshakespeare, seed 0: 1.55 nats per byte (2.24 bits) on the held-out tail, 1.56 in
         windows of 64; a transformer of that size and number of tokens: 1.88 (nanoGPT).
         induction, seed 0 (64 samples): 1.00 up to 1,024, .83 at 4,096, .39 at 65,536 (paper
         1.00 throughout, after far longer training): the short run holds to 4 times its length.
"""

import argparse
import functools
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Selective scan, the form to read (Algorithm 2) ----


def selective_scan_ref(u, dt, A, B, C, D, h0=None) -> tuple[Tensor, Tensor]:
    """Algorithm 2 line by line; shapes as in `selective_scan`. Returns y (B, L, D), h (B, D, N)."""
    A_bar = torch.exp(dt[..., None] * A)  # (B, L, D, N)  Eq. 4
    B_bar = dt[..., None] * B[:, :, None]  # (B, L, D, N)  Eq. 4 to first order in dt
    h = torch.zeros_like(A_bar[:, 0]) if h0 is None else h0
    ys = []
    # unbind, not A_bar[:, t]: the backward of an index zero-fills the whole tensor, every step
    for a, bx, c in zip(A_bar.unbind(1), (B_bar * u[..., None]).unbind(1), C.unbind(1)):
        h = a * h + bx  # (B, D, N)  Eq. 2a
        ys.append((h * c[:, None]).sum(-1))  # (B, D)  Eq. 2b
    return torch.stack(ys, 1) + D * u, h


# ---- 2. Selective scan, the form to run (Section 3.3.2) ----
#
# The loop above is right and slow, for three reasons; the paper's answers, and what they are here:
#
# Scan          h_t = a_t h_(t-1) + b_t is associative: the pair (a, b) of a stretch of time sums it
#               up, and stretches combine as (a2 a1, a2 b1 + b2). So L steps need not run one after
#               another: cut time into S splits, run all from h = 0 side by side, carry the true
#               states over the S ends, and run again from those. It costs the work twice, so S > 1
#               only where B x D x N alone leaves the machine idle (small batches, GPUs).
# Fusion        A_bar, B_bar and h are N times larger than u or y. Written to memory, they cost
#               more than the arithmetic. `torch.compile` turns a chunk of 16 unrolled steps into
#               one kernel: h enters, sixteen y leave, the rest never travels beyond the cache.
#               (On a CPU a chunk's A_bar is made just before it: torch's own exp has ten times the
#               speed of that in compiled code. And a large batch is run a few rows at a time.)
# Recomputation The backward needs every h_t. Keeping them is (B, L, D, N) again; instead one h per
#               chunk is kept, and the backward kernel redoes its 16 steps before it reverses them.
#
# State and A lie as (N, D) here, the long axis last: sums over N then add whole vectors.


def _chunk_forward(A_bar, u, dt, B, C, h):
    """A_bar (M, T, N, D), u, dt (M, T, D), B, C (M, T, N), h (M, N, D) -> y (M, T, D), last h."""
    A_bar, bu, hs = _decay(dt, A_bar), dt * u, []
    for t in range(u.shape[1]):
        h = A_bar[:, t] * h + bu[:, t, None] * B[:, t, :, None]  # (M, N, D)  Eq. 2a
        hs.append(h)
    return (torch.stack(hs, 1) * C[..., None]).sum(2), h  # Eq. 2b


def _chunk_backward(A_bar, u, dt, B, C, h, dy, A, g, dA):
    """Gradients of one chunk. g (M, N, D) is dloss/dh at its end and, returned, at its start."""
    A_bar, bu, hs = _decay(dt, A_bar), dt * u, [h]
    for t in range(u.shape[1]):  # recompute what the forward did not keep
        hs.append(A_bar[:, t] * hs[t] + bu[:, t, None] * B[:, t, :, None])
    gs, es = [], []
    for t in reversed(range(u.shape[1])):
        g = g + C[:, t, :, None] * dy[:, t, None]  # dloss/dh_t
        gs.append(g)
        g = A_bar[:, t] * g  # what reaches h_(t-1)
        es.append(g * hs[t])  # dloss/d(dt_t A), because d exp(x) = exp(x) dx
        dA = dA + es[-1] * dt[:, t, None]
    G, E, H = torch.stack(gs[::-1], 1), torch.stack(es[::-1], 1), torch.stack(hs[1:], 1)
    dbu = (G * B[..., None]).sum(2)  # (M, T, D)
    ddt = (E * A).sum(2) + dbu * u
    dB, dC = (G * bu[:, :, None]).sum(3), (H * dy[:, :, None]).sum(3)  # (M, T, N)
    return dbu * dt, ddt, dB, dC, g, dA


@functools.cache
def _compiled(kernel):
    """torch.compile(kernel); where that fails, a line on stderr, and it runs as it is, eagerly."""
    run = torch.compile(kernel)

    def call(*args):
        nonlocal run
        try:
            return run(*args)
        except Exception as error:
            if run is kernel or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            print(f"mamba: no compiler for the scan ({reason}); it runs eagerly", file=sys.stderr)
            run = kernel
            return run(*args)

    return call


def _decay(dt, A):
    """A_bar of one chunk (Eq. 4): dt (M, T, D), A (N, D) -> (M, T, N, D); A_bar itself stays."""
    return (dt[:, :, None] * A).exp_() if A.dim() == 2 else A


def _cut(x, S, T):
    """(B, L, d) -> L / (S T) chunks of (B S, T, d). Padding is neutral: dt = 0 leaves h alone."""
    pad = -x.shape[1] % (S * T)
    x = F.pad(x, (0, 0, 0, pad)) if pad else x
    return x.reshape(x.shape[0] * S, -1, x.shape[2]).split(T, 1)


def _ready(chunk, A):
    """What a kernel takes first: A_bar (on a GPU A: there the kernel makes it) and the chunk, as
    copies: their memory is used again for every chunk, so it stays in the cache, and their strides
    don't depend on L, for which the kernels would be compiled again."""
    chunk = [x.clone(memory_format=torch.contiguous_format) for x in chunk]
    return [_decay(chunk[1], A) if A.device.type == "cpu" else A, *chunk]


def _carry(end, dt_sum, A, h, backwards=False):
    """The splits' ends, run from zero (B S, N, D), and the first h -> h at the start of each."""
    end = end.unflatten(0, (h.shape[0], -1))  # (B, S, N, D)
    decay, out = torch.exp(dt_sum[:, None] * A).view_as(end), torch.empty_like(end)
    for s in reversed(range(end.shape[1])) if backwards else range(end.shape[1]):
        out[:, s] = h
        h = decay[:, s] * h + end[:, s]
    return out.flatten(0, 1)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, h0, T, compile):
        batch, L, _ = u.shape
        lanes, enough = max(1, batch * A.numel()), 2**13 if u.device.type == "cpu" else 2**18
        # S > 1 costs the work twice: only for a machine that is far from busy, then generously
        S = 1 if lanes >= enough else max(1, min(8 * enough // lanes, L // (2 * T)))
        A_t, h = A.t().contiguous(), h0.transpose(1, 2).contiguous()  # (N, D), (B, N, D)
        chunks = list(zip(*(_cut(x, S, T) for x in (u, dt, B, C))))
        kernel = _compiled(_chunk_forward) if compile else _chunk_forward
        if S > 1:
            end = h.new_zeros(batch * S, *A_t.shape)
            for chunk in chunks:
                _, end = kernel(*_ready(chunk, A_t), end)
            h = _carry(end, sum(c[1].sum(1) for c in chunks), A_t, h)
        hs = h.new_empty(len(chunks), *h.shape)  # kept: the state before each chunk
        ys = u.new_empty(batch * S, len(chunks) * T, u.shape[2])
        for chunk, before, y in zip(chunks, hs, ys.split(T, 1)):
            before.copy_(h)
            out, h = kernel(*_ready(chunk, A_t), h)
            y.copy_(out)
        ctx.save_for_backward(u, dt, A, B, C, hs)
        ctx.S, ctx.T, ctx.compile = S, T, compile
        h = h.unflatten(0, (batch, S))[:, -1].transpose(1, 2).contiguous()
        return ys.reshape(batch, -1, u.shape[2])[:, :L], h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        u, dt, A, B, C, hs = ctx.saved_tensors
        A_t, g, T = A.t().contiguous(), dh.transpose(1, 2).contiguous(), ctx.T
        cut = [_cut(x, ctx.S, T) for x in (u, dt, B, C, dy)]
        chunks = list(zip(*cut[:4], hs, cut[4]))[::-1]
        kernel = _compiled(_chunk_backward) if ctx.compile else _chunk_backward
        zero, start = torch.zeros_like(hs[0]), torch.zeros_like(hs[0])
        if ctx.S > 1:  # the same two passes, from the end of time to its start
            for chunk in chunks:
                start = kernel(*_ready(chunk, A_t), A_t, start, zero)[4]
            g = _carry(start, sum(c[1].sum(1) for c in chunks), A_t, g, backwards=True)
        grads, dA = [x.new_empty(len(zero), len(hs) * T, x.shape[2]) for x in (u, dt, B, C)], zero
        for chunk, *parts in zip(chunks, *(x.split(T, 1)[::-1] for x in grads)):
            *grad, g, dA = kernel(*_ready(chunk, A_t), A_t, g, dA)
            for part, x in zip(parts, grad):
                part.copy_(x)
        du, ddt, dB, dC = (x.reshape(len(u), -1, x.shape[2])[:, : u.shape[1]] for x in grads)
        dh0 = g.unflatten(0, (u.shape[0], ctx.S))[:, 0].transpose(1, 2)
        return du, ddt, dA.sum(0).t(), dB, dC, dh0, None, None


@torch.compiler.disable(recursive=False)
def selective_scan(u, dt, A, B, C, D, h0=None, return_state=False, chunk=16, compile=True):
    """y_t = C_t h_t + D u_t with h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t (Eq. 2, Algorithm 2).

    u, dt (B, L, D); A (D, N), negative; B, C (B, L, N); D (D,); h0 (B, D, N) or None for zeros.
    Returns y (B, L, D) in u's dtype, with return_state also the last h (B, D, N). Both are
    differentiable (once) in all inputs. The state is float32, or float64 for float64 inputs. Kept
    for the backward: the inputs and L / chunk states. Fewer steps than a chunk (a token at a time,
    in generation) take the plain loop. Raises ValueError where shapes don't fit.
    """
    (batch, L, d), N = u.shape, A.shape[-1]
    want = {"dt": (batch, L, d), "A": (d, N), "B": (batch, L, N), "C": (batch, L, N), "D": (d,)}
    for (name, shape), x in zip(want.items(), (dt, A, B, C, D)):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    if h0 is not None and tuple(h0.shape) != (batch, d, N):
        raise ValueError(f"h0 has shape {tuple(h0.shape)}, expected {(batch, d, N)}")
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    h0 = u.new_zeros(batch, d, N) if h0 is None else h0
    x, dt, A, B, C, D, h0 = (x.to(wide) for x in (u, dt, A, B, C, D, h0))
    if L < chunk:
        y, h = selective_scan_ref(x, dt, A, B, C, D, h0)
    else:
        # rows of the batch whose chunk fits a core's cache; a GPU takes all at once
        rows = max(1, 2**15 // A.numel()) if u.device.type == "cpu" else batch
        parts = zip(*(t.split(rows) for t in (x, dt, B, C, h0)))
        parts = [_SelectiveScan.apply(*t[:2], A, *t[2:], chunk, compile) for t in parts]
        y, h = map(torch.cat, zip(*parts)) if len(parts) > 1 else parts[0]
        y = torch.addcmul(y, D, x)
    return (y.to(u.dtype), h) if return_state else y.to(u.dtype)


def lti_convolution(u, dt, A, B, C, D) -> Tensor:
    """The SSM without selection: u (B, L, D), dt, D (D,), A, B, C (D, N) -> y (B, L, D).

    Constant A_bar, B_bar, C make the recurrence one long convolution y = u * K_bar with
    K_bar = (C B_bar, C A_bar B_bar, ...), Eq. 3: what S4 computes, and what selection gives up.
    """
    L = u.shape[1]
    powers = torch.exp((dt[:, None] * A)[..., None] * torch.arange(L, device=u.device))  # (D, N, L)
    K_bar = ((C * dt[:, None] * B)[..., None] * powers).sum(1)  # (D, L)  Eq. 3a
    U, K = torch.fft.rfft(u.transpose(1, 2), 2 * L), torch.fft.rfft(K_bar, 2 * L)
    return torch.fft.irfft(U * K, 2 * L)[..., :L].transpose(1, 2) + D * u  # Eq. 3b


# ---- 3. The Mamba block (Section 3.4, Figure 3) ----


class MambaBlock(nn.Module):
    """One mixer: (B, L, d_model) -> (B, L, d_model). selective=False is the LTI ablation.

    The state is a pair: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, D) and
    h (B, D, N). Parameter names, shapes and initialisation are those of state-spaces/mamba.
    """

    def __init__(
        self, d_model, d_state=16, d_conv=4, expand=2, dt_rank=None, selective=True, compile=True
    ):
        super().__init__()
        D, N = expand * d_model, d_state
        self.D_inner, self.N, self.selective, self.compile = D, N, selective, compile
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * D, bias=False)
        self.conv1d = nn.Conv1d(D, D, d_conv, groups=D)
        self.out_proj = nn.Linear(D, d_model, bias=False)
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(D, 1))  # S4D-real: A = -n
        self.D = nn.Parameter(torch.ones(D))
        # softplus(bias) is log-uniform in [1e-3, 1e-1]: memories of 10 to 1,000 steps. Section 3.6
        # says uniform; this is the official code's
        dt = torch.exp(torch.empty(D).uniform_(math.log(1e-3), math.log(1e-1))).clamp(min=1e-4)
        inverse_softplus = dt + torch.log(-torch.expm1(-dt))
        if selective:
            self.x_proj = nn.Linear(D, self.dt_rank + 2 * N, bias=False)
            self.dt_proj = nn.Linear(self.dt_rank, D)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.data.copy_(inverse_softplus)
        else:
            self.dt_bias = nn.Parameter(inverse_softplus)
            self.B, self.C = nn.Parameter(torch.ones(D, N)), nn.Parameter(torch.randn(D, N))

    def select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The selection (Algorithm 2, lines 2-4): u (B, L, D) -> dt (B, L, D), B, C (B, L, N)."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.N, self.N], -1)
        dt = F.linear(dt, self.dt_proj.weight).float() + self.dt_proj.bias.float()
        return F.softplus(dt), B, C  # fp32: bf16 would be off by up to 2 % in dt

    def forward(self, x: Tensor, state=None, mask: Tensor | None = None):
        """x (B, L, d_model), mask (B, L) with 0 on padding -> y (B, L, d_model), state."""
        x, z = self.in_proj(x).chunk(2, -1)
        if mask is not None:  # padding neither enters the convolution nor, with dt = 0, moves h
            x = x * mask[..., None].to(x.dtype)
        K = self.conv1d.weight.shape[-1]
        past = x.new_zeros(x.shape[0], K - 1, x.shape[2]) if state is None else state[0].to(x.dtype)
        x = torch.cat([past, x], 1)
        past = x[:, x.shape[1] - K + 1 :]
        u = F.silu(self.conv1d(x.transpose(1, 2))).transpose(1, 2)  # causal: no padding behind
        A, h = -torch.exp(self.A_log.float()), None if state is None else state[1]
        if self.selective:
            dt, B, C = self.select(u)
            if mask is not None:
                dt = dt * mask[..., None]
            y, h = selective_scan(u, dt, A, B, C, self.D.float(), h, True, compile=self.compile)
        else:
            if state is not None:
                raise ValueError("the LTI ablation runs as a convolution and takes no state")
            u = u if mask is None else u * mask[..., None]  # its step is fixed: no input instead
            y = lti_convolution(u.float(), F.softplus(self.dt_bias), A, self.B, self.C, self.D)
        return self.out_proj(y.to(z.dtype) * F.silu(z)), (past, h)


# ---- 4. The language model ----


class Mamba(nn.Module):
    """ids (B, L) -> logits (B, L, vocab). Loads state-spaces/mamba-* checkpoints unchanged."""

    def __init__(self, vocab_size: int, d_model: int, n_layer: int, **block):
        """`block`: d_state=16, d_conv=4, expand=2 and the other arguments of MambaBlock."""
        super().__init__()
        embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(embedding.weight, std=0.02)
        layers = nn.ModuleList()
        for _ in range(n_layer):
            mixer = MambaBlock(d_model, **block)
            mixer.out_proj.weight.data /= math.sqrt(n_layer)  # as GPT-2: bounds the residual's sum
            layers.append(nn.ModuleDict({"norm": nn.RMSNorm(d_model, 1e-5), "mixer": mixer}))
        norm_f = nn.RMSNorm(d_model, 1e-5)
        self.backbone = nn.ModuleDict({"embedding": embedding, "layers": layers, "norm_f": norm_f})
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.lm_head.weight = embedding.weight  # tied

    @classmethod
    def from_checkpoint(cls, path: str, **block) -> "Mamba":
        """Builds the model with the sizes that the state dict in the file shows, and loads it."""
        w = torch.load(path, map_location="cpu", weights_only=True)
        (vocab, d_model), layer = w["backbone.embedding.weight"].shape, "backbone.layers.0.mixer."
        n_layer = 1 + max(int(k.split(".")[2]) for k in w if k.startswith("backbone.layers."))
        (D, block["d_state"]), conv = w[layer + "A_log"].shape, w[layer + "conv1d.weight"]
        block |= {"d_conv": conv.shape[2], "expand": D // d_model}
        block["dt_rank"] = w[layer + "dt_proj.weight"].shape[1]
        model = cls(vocab, d_model, n_layer, **block)
        model.load_state_dict({"lm_head.weight": w["backbone.embedding.weight"], **w})
        return model

    def forward(self, ids: Tensor, state=None, mask=None, return_state: bool = False):
        """ids (B, L) -> logits (B, L, vocab). `state` from a call before continues its sequence.

        mask (B, L), 0 on padding: sequences padded on the left get the logits they get alone.
        """
        x = self.backbone["embedding"](ids).float()  # the residual stream stays fp32
        dtype, states = self.lm_head.weight.dtype, []
        for i, layer in enumerate(self.backbone["layers"]):
            past = None if state is None else state[i]
            y, past = layer["mixer"](layer["norm"](x).to(dtype), past, mask)
            x = x + y
            states.append(past)
        logits = self.lm_head(self.backbone["norm_f"](x).to(dtype))
        return (logits, states) if return_state else logits

    def init_state(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """The empty state: per layer (B, d_conv - 1, D) and (B, D, N), all zero."""
        zeros, state = self.lm_head.weight.new_zeros, []
        for m in (layer["mixer"] for layer in self.backbone["layers"]):
            past = zeros(batch, m.conv1d.kernel_size[0] - 1, m.D_inner)
            state.append((past, zeros(batch, *m.A_log.shape).float()))
        return state

    def step(self, ids: Tensor, state) -> tuple[Tensor, list]:
        """One token by the recurrence, O(1) in time and memory: ids (B,) -> logits (B, vocab)."""
        logits, state = self(ids[:, None], state, return_state=True)
        return logits[:, 0], state

    @torch.no_grad()
    def generate(self, ids: Tensor, n: int, temperature=1.0, top_k=None, generator=None) -> Tensor:
        """Appends n sampled tokens to ids (B, L): one parallel pass, then n steps of recurrence.

        temperature 0 takes the most likely token; top_k keeps only the k most likely.
        """
        logits, state = self(ids, return_state=True)
        logits = logits[:, -1]
        for _ in range(n):
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            p = F.softmax(logits.float() / (temperature or 1), -1)
            greedy, sampled = p.argmax(-1, True), torch.multinomial(p, 1, generator=generator)
            token = sampled if temperature else greedy
            ids = torch.cat([ids, token], 1)
            logits, state = self.step(token[:, 0], state)
        return ids


# ---- 5. Data: a batch depends on (seed, step) alone, so a resumed run sees what it would have ----


def copying_batch(n: int, length: int, g: torch.Generator, data: int = 8, vocab: int = 16):
    """Selective copying (Section 4.1.1) -> ids (n, length + data), answers (n, data).

    `data` random tokens at random places among blanks (0), then as many copy markers (vocab - 1),
    at which the model names the tokens in order. Chance is 1 / (vocab - 2).
    """
    ids = torch.zeros(n, length + data, dtype=torch.long)
    ids[:, length:] = vocab - 1
    place = torch.rand(n, length, generator=g).argsort(1)[:, :data].sort(1).values
    answers = torch.randint(1, vocab - 1, (n, data), generator=g)
    return ids.scatter_(1, place, answers), answers


def induction_batch(n: int, length: int, g: torch.Generator, vocab: int = 16):
    """Induction heads (Section 4.1.2) -> ids (n, length), answers (n, 1).

    The marker (vocab - 1) stands once among random tokens and again at the end, where the model
    names the token that followed it the first time. Chance is 1 / (vocab - 1).
    """
    ids = torch.randint(0, vocab - 1, (n, length), generator=g)
    place = torch.randint(0, length - 2, (n, 1), generator=g)
    ids.scatter_(1, place, vocab - 1)[:, -1] = vocab - 1
    return ids, ids.gather(1, place + 1)


def text_batch(n: int, length: int, g: torch.Generator, text: Tensor):
    """Random windows of a text's bytes -> ids (n, length), the bytes that follow (n, length)."""
    window = torch.randint(0, len(text) - length, (n, 1), generator=g) + torch.arange(length + 1)
    return text[window][:, :-1], text[window][:, 1:]


def batch(args, step: int, length: int | None = None):
    """The batch of a step, on the device; of `length` tokens, else as long as training has it."""
    g = torch.Generator().manual_seed(args.seed * 10**10 + step)
    if args.task == "lm":
        ids = text_batch(args.batch_size, args.length, g, args.text)
    else:  # a curriculum, the same for all models: sequences grow, a chunk of the scan at a time
        part = min(1.0, step / ((0.9 if args.task == "copying" else 0.75) * args.steps))
        least = 16 + args.length % 16
        length = length or least + int((args.length - least) * part**2) // 16 * 16
        make = copying_batch if args.task == "copying" else induction_batch
        ids = make(args.batch_size, length, g)
    return [t.to(args.device) for t in ids]


# ---- 6. Training ----


def train(models, optimizers, args, state) -> bool:
    """Trains all models on the same batches, on from `state`. Returns whether Ctrl-C ended it."""
    from tqdm import tqdm

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first, stop, t0 = state["step"], [], time.time()
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after the step
    for step in tqdm(range(first + 1, args.steps + 1), disable=rank > 0 or None):
        x, y = (t[rank::world] for t in batch(args, step))  # each process takes its share
        part = step / args.steps  # warm-up, then half a cosine
        lr = args.lr * min(1.0, part / 0.05) * (1 + math.cos(math.pi * part)) / 2
        for name, model in models.items():
            logits = model(x)[:, -y.shape[1] :]  # the answers are read off the last positions
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            optimizers[name].param_groups[0]["lr"] = lr
            optimizers[name].zero_grad(); loss.backward()  # fmt: skip
            right = (logits.argmax(-1) == y).float().mean()
            now = torch.stack([loss.detach(), right, loss.new_tensor(float(len(stop)))])
            if world > 1:  # means over the processes: the whole batch's
                for t in (now, *(p.grad for p in model.parameters())):
                    dist.all_reduce(t.div_(world))
            loss, acc, stopped = now.tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the {name} model's loss is {loss} at step {step}")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            state["history"].append((step, name, loss, acc))
        state["step"] = step
        if rank == 0 and (stopped or step % args.log_every == 0 or step == args.steps):
            rows = state["history"][-len(models) :]
            now = " | ".join(f"{n} loss {l:.4f} acc {a:.3f}" for _, n, l, a in rows)
            ms = (time.time() - t0) / (step - first) * 1e3
            tqdm.write(f"step {step:5d}/{args.steps} | {now} | {ms:.0f} ms/step")
            if args.save:  # beside its place, then moved there: a crash leaves the old one
                for key, things in {"models": models, "optimizers": optimizers}.items():
                    state[key] = {name: thing.state_dict() for name, thing in things.items()}
                torch.save(state, args.save + ".tmp")
                os.replace(args.save + ".tmp", args.save)
        if stopped:
            return True
    return False


# ---- 7. Evaluation and picture ----


@torch.no_grad()
def read(model, ids: Tensor, last: int, piece: int = 1024) -> Tensor:
    """Logits of the last positions of ids (B, L), read piece by piece with the state handed on."""
    if not model.backbone["layers"][0]["mixer"].selective:
        return model(ids)[:, -last:]
    state, tail = None, ids.new_empty(len(ids), 0, model.lm_head.out_features)
    for part in ids.split(piece, 1):
        logits, state = model(part, state, return_state=True)
        tail = torch.cat([tail, logits], 1)[:, -last:]
    return tail


def accuracy(model, args, batches: int, length: int) -> float:
    """Share of right answers on fresh batches: of steps 10^9 on, which training never reaches."""
    fresh = [batch(args, 10**9 + i, length) for i in range(batches)]
    right = [read(model, x, y.shape[1]).argmax(-1) == y for x, y in fresh]
    return torch.cat(right).float().mean().item()


def text_loss(model, text: Tensor, length: int) -> float:
    """Nats per byte of a text cut into windows of `length`, each read from an empty state."""
    n = (len(text) - 1) // length
    x, y = (t[: n * length].view(n, length) for t in (text[:-1], text[1:]))
    logits = torch.cat([read(model, rows, length).flatten(0, 1) for rows in x.split(64)])
    return F.cross_entropy(logits, y.flatten()).item()


def draw_picture(args, models, history, x, table):
    """Left: learning curves. Right: accuracy by length, or the step size Delta over sequence x."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(12, 4), layout="tight")
    a, b = fig.subplots(1, 2, width_ratios=[1, 1.6])
    for name in models:
        acc = [acc for _, n, _, acc in history if n == name]
        k = min(20, len(acc))
        a.plot(range(k, len(acc) + 1), torch.tensor(acc).unfold(0, k, 1).mean(-1), label=name)
    a.set(title=f"{args.task}: training accuracy (mean of {k})", xlabel="step", ylim=(0, 1.02))
    a.legend(loc="lower right")
    if table:
        b.semilogx(*zip(*table), "o-", base=2)
        b.set(title="accuracy by length (dotted: trained)", xlabel="tokens", ylim=(0, 1.02))
        b.axvline(args.length, color="gray", ls=":")
    else:
        mixer, seen = models["selective"].backbone["layers"][-1]["mixer"], []
        hook = mixer.x_proj.register_forward_pre_hook(lambda _, u: seen.append(u[0]))
        with torch.no_grad():
            models["selective"](x[None])
            dt = mixer.select(seen[0])[0][0].median(-1).values.cpu()
        hook.remove()
        b.set(title="step size Delta in the last layer, median of the channels", xlabel="position")
        bars = b.bar(range(len(dt)), dt, 1.0, color="lightgray")
        if args.task == "copying":
            color = {"data": "tab:red", "the 3 places after it": "lightsalmon"}
            color["marker"] = "tab:blue"
            data = (x > 0) & (x < 15)  # the convolution shows a token to four positions
            near = F.pad(data[None].float(), (3, 0)).unfold(1, 4, 1).amax(-1)[0]
            for bar, hit, by, t in zip(bars, data, near, x):
                kind = "data" if hit else "marker" if t == 15 else "the 3 places after it"
                bar.set_color(color[kind] if hit or by or t == 15 else "lightgray")
            b.legend([b.bar(0, 0, color=c) for c in color.values()], color, loc="upper center")
        else:
            b.set_xticks(range(len(dt)), [chr(t) if 32 < t < 127 else " " for t in x.tolist()])
    fig.savefig(os.path.join(args.out, "mamba.png"), dpi=110)


# ---- 8. Command line ----

TASKS = ["copying", "induction", "lm"]
DEFAULTS = {  # by task, --quick, least, most, meaning
    "steps": (1500, 2000, 2000, 4, 1, 10**8, "of training (paper: 400,000 for copying)"),
    "batch_size": (48, 32, 12, 4, 1, 10**6, "sequences (paper: 64, induction 8)"),
    "length": (104, 256, 64, 40, 20, 10**7, "tokens (paper: 4096, 256)"),
    "lr": (6e-3, 3e-3, 4e-3, 1e-3, 1e-12, 9.0, "peak rate (paper: 1e-4, 1e-3)"),
    "seed": (0, 0, 0, 0, 0, 10**8, "of weights and batches"),
    "log_every": (100, 100, 100, 100, 1, 10**8, "steps between log lines"),
}


def parse(argv):
    """-> args, models, optimizers, state, fresh or loaded. Bad input: one line, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--task", choices=TASKS, help="default copying; other defaults follow this order")
    flag("--data", help="for --task lm: a text's bytes, its last tenth (128 kB at most) the test")
    for name, (*values, _, _, _, text) in DEFAULTS.items():
        shown = values if len({*values}) > 1 else values[:1]
        text = f"default {' / '.join(f'{v:g}' for v in shown)}: {text}"
        flag(f"--{name.replace('_', '-')}", type=type(values[0]), help=text)
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the metric of the last line misses this")
    flag("--no-compile", action="store_true", help="run the scan eagerly: no compiler, no warm-up")
    args, state = parser.parse_args(argv), {"step": 0, "history": []}
    try:
        if args.load:
            state = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("script") != "mamba":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own = state["args"] | {"steps": state["step"]} if args.load else {}
        args.task = args.task or own.get("task", "copying")
        if args.task != own.get("task", args.task):
            raise ValueError(f"{args.load} was trained on --task {own['task']}")
        args.data = args.data or own.get("data")
        for name, (*values, quick, low, high, _) in DEFAULTS.items():
            if getattr(args, name) is None:
                default = quick if args.quick else values[TASKS.index(args.task)]
                setattr(args, name, own.get(name, default))
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        if args.batch_size % int(os.environ.get("WORLD_SIZE", 1)):
            raise ValueError("--batch-size must be a multiple of the number of processes")
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "mamba.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.zeros(1, device=args.device)
        if args.task == "lm":
            if not args.data:
                raise ValueError("--task lm needs --data FILE")
            with open(args.data, "rb") as file:
                text = torch.frombuffer(bytearray(file.read() or b" "), dtype=torch.uint8).long()
            if len(text) < 20 * args.length:
                raise ValueError(f"{args.data} is too short: needs {20 * args.length} bytes")
        args.no_compile |= args.quick
        torch.manual_seed(args.seed)
        size, models, optimizers = ((256, 128, 6) if args.task == "lm" else (16, 64, 2)), {}, {}
        for name in ["selective", "LTI"][: 2 if args.task == "copying" else 1]:
            model = Mamba(*size, selective=name == "selective", compile=not args.no_compile)
            models[name] = model.to(args.device)
            # no weight decay: it would draw A and D, and with them the memory's length, to zero
            optimizers[name] = torch.optim.Adam(model.parameters(), args.lr, betas=(0.9, 0.98))
            if args.load:
                model.load_state_dict(state["models"][name])
                optimizers[name].load_state_dict(state["optimizers"][name])
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    state |= {"script": "mamba", "args": dict(vars(args))}
    if args.task == "lm":
        args.text, args.test = text[: -len(text) // 10], text[-len(text) // 10 :].to(args.device)
    return args, models, optimizers, state


def main(argv=None) -> int:
    args, models, optimizers, state = parse(argv)
    t0, best, table, stopped = time.time(), models["selective"], [], False
    few, lm, rank = 2 if args.quick else 16, args.task == "lm", int(os.environ.get("RANK", 0))
    count = sum(p.numel() for p in best.parameters()) / 1e6
    kind = f"bytes {len(args.text)}/{len(args.test)}" if lm else f"{args.task} length {args.length}"
    if rank == 0:
        print(f"mamba | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}")
        if state["step"] < args.steps and not args.no_compile:
            print("compiling the scan: some 20 s the first time, then from its cache", flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    before = signal.getsignal(signal.SIGINT)
    try:
        stopped = train(models, optimizers, args, state)
    except FloatingPointError as error:
        print(f"mamba.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank:  # the other processes of torchrun are done
        return 0
    seconds, x = time.time() - t0, None if lm else batch(args, 10**9, args.length)[0][0]
    if lm:
        g, test = torch.Generator(args.device).manual_seed(args.seed), args.test
        test = test[: max(500 * few**2, 2 * args.length)]
        sample = best.generate(test[None, :1], 20 * few, generator=g, top_k=40)
        if hasattr(sys.stdout, "reconfigure"):  # not every terminal has every character
            sys.stdout.reconfigure(errors="replace")
        print(bytes(sample[0].tolist()).decode("utf-8", "replace"))
        nats, windows = text_loss(best, test, len(test) - 1), text_loss(best, test, args.length)
        p = args.text.bincount(minlength=256) / len(args.text)
        metric, x = nats / math.log(2), test[:96]
        line = f"test bits per byte {metric:.3f} (nats {nats:.3f}; in windows of {args.length} "
        line += f"{windows:.3f}) | byte frequencies {torch.special.entr(p).sum() / math.log(2):.3f}"
    elif args.task == "induction":
        for length in [2**k for k in range(6, 9 if args.quick else 17)]:
            table.append((length, accuracy(best, args, max(1, few // 8), length)))
            print(f"length {length:6d} | test acc {table[-1][1]:.3f}", flush=True)
        metric = table[-1][1]
        line = f"test acc at {length} {metric:.3f} | chance {1 / 15:.3f} | paper 1.000"
    else:
        metric, lti = (accuracy(model, args, few, args.length) for model in models.values())
        line = f"test acc selective {metric:.4f} | LTI {lti:.4f} | chance {1 / 14:.3f}"
        line += " | paper .998 / .564"
    draw_picture(args, models, state["history"], x, table)
    print(f"{line} | {seconds:.0f} s")
    missed = args.target is not None and (metric > args.target if lm else metric < args.target)
    return 130 if stopped else int(missed)


if __name__ == "__main__":
    sys.exit(main())
