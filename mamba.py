"""Mamba: a state space model whose step size, input and output matrices depend on the token.

Paper    Mamba: Linear-Time Sequence Modeling with Selective State Spaces -- Albert Gu, Tri Dao,
         December 2023, arXiv:2312.00752v2
Idea     A model with a state of fixed size has to choose what to remember. A linear time-invariant
         SSM (S4) can't: it treats every token alike. Mamba computes Delta, B and C from the token:
         a large Delta writes the token into the state, Delta = 0 passes it by. This costs the
         convolution that made S4 fast; a scan that stores one state in 16 takes its place.
Figure   (Figure 3; one of n_layer equal layers; d is d_model)

         ids (B, L) -> embedding -> x (B, L, d_model) --------------------------+
                                    RMSNorm                                     |
                        +------------- in_proj -------------+                   |
                   x (B, L, D)                          z (B, L, D)             | residual
             causal conv1d, SiLU                          SiLU                  |
                        | u (B, L, D)                       |                   |
          x_proj, dt_proj: dt (B, L, D), B, C (B, L, N)     |                   |
          selective scan, state h (B, D, N) -- y (B, L, D) -*                   |
                                                        out_proj -> (B, L, d) --+-> next layer
Symbols  here | in the paper | what. In shapes: B sequences, L tokens, D channels, N states each
         u | x | input of the SSM (B, L, D)            dt | Delta | step size (B, L, D), > 0
         A | A | diagonal of the state matrix (D, N)   h | h | state (B, D, N)
         B, C | B, C | input / output matrix (B, L, N) D | - | weight of the skip D u (D,)
         A_bar, B_bar | discretised A and B (B, L, D, N)      z | - | gate branch (B, L, D)
Differs  As the official code: B_bar = dt B in place of Eq. 4's; a skip D u, which Eq. 2 and
         Algorithm 2 don't have; RMSNorm; dt starts log-uniform, not uniform.
         The copying demo is small, to end in minutes: length 104 (paper: 4096), 8 data tokens (16),
         3,000 steps (400,000) of 24 sequences (64), a rate of up to 6e-3 that rises and falls
         (1e-4, constant), sequences that grow during training.
         LTI, its baseline, is the same block with constant dt, B, C for each channel (Table 1:
         "Mamba, S4"), A real and diagonal as in Mamba; the models differ in size by 3 %.
Run      python mamba.py                           # selective copying, some 4 minutes on 2 cores
         python mamba.py --task lm --data FILE     # bytes of a text file; prints a sample
         torchrun --nproc-per-node 2 mamba.py      # the batch shared out between processes
Expect   copying, seeds 0-4: selective .9999 +- .0002, worst .9997 | LTI .716 +- .020 | chance
         .071 | paper .998, .564 (at 4,096 tokens). More: tests/RESULTS.md
"""

import argparse
import contextlib
import functools
import math
import os
import pathlib
import signal
import sys

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import cat, exp, stack

# ================================ PART ONE: THE PAPER =================================

# ---- 1. A state space model (Section 2) ----
#
# How can a network read a sequence of any length with a memory of fixed size? A state space model
# (SSM) keeps a state h of N numbers that a linear differential equation drives by the input x(t):
#
#     h'(t) = A h(t) + B x(t)       y(t) = C h(t)                                      (Eq. 1)
#
# A says how the state fades by itself, B how the input enters it, C how the output is read off it.
# Mamba has one such system for each of its D channels, and A is diagonal. So each of the N numbers
# is a leaky bucket of its own: with A < 0 it leaks, and what is left after a time T is exp(A T).
#
# Tokens come in steps, not in continuous time. Say the token x_t holds for a time Delta. Over this
# time Eq. 1 can be solved exactly (a zero-order hold), and what comes out is a recurrence:
#
#     h_t = A_bar h_(t-1) + B_bar x_t       y_t = C h_t                                (Eq. 2)
#     A_bar = exp(Delta A)          B_bar = (Delta A)^-1 (exp(Delta A) - 1) Delta B    (Eq. 4)
#
# Why go through continuous time at all? Because Delta then has a meaning: it is how long the model
# looks at a token. Delta = 0: A_bar = 1 and B_bar = 0, the token has passed in no time and the
# state is as it was. Large Delta: A_bar = 0, the old state has leaked away, and the token fills the
# new.
#
# The official code has B_bar = Delta B, and so have we (its weights expect it). For small Delta A
# the two are the same, as exp(r) - 1 is r for small r. In general Eq. 4 has one factor more,
# (exp(r) - 1) / r with r = Delta A: 1 at r = 0, 1/16 at r = -16. It weakens what enters the fast
# states at a large Delta. Leaving it out is simpler, needs no division by A, and what Delta means
# stays: B_bar is 0 where Delta is 0, and grows with it. How much of a token enters is learned
# through B and Delta in either case.


def wide(x):
    """x in float32, or in float64 if it is that already."""
    # bfloat16 knows no number between .996 and 1: an A_bar of .999 would be rounded to 1, and its
    # state would never fade. So Delta, A and the state are not computed in half precision.
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- 2. Why a time-invariant model can't select (Sections 2 and 3.1) ----
#
# In S4, Delta, A, B and C are the same at every step: the system is linear and time-invariant
# (LTI). Put Eq. 2 into itself, and the state is gone; y is one long convolution of x with a fixed
# kernel:
#
#     y_t = C B_bar x_t + C A_bar B_bar x_(t-1) + C A_bar^2 B_bar x_(t-2) + ...
#     y = x * K       K = (C B_bar, C A_bar B_bar, C A_bar^2 B_bar, ...)                (Eq. 3)
#
# An FFT computes this for all t at once. This is what made S4 fast, and what keeps it from
# choosing: the weight K_k of a token depends on how long ago it came, never on what it is. Take
# four tokens, and ask at the last one for the first token that is not a blank:
#
#     x_1 x_2 x_3 x_4       y_4 = K_3 x_1 + K_2 x_2 + K_1 x_3 + K_0 x_4
#      a   b   .   .        y_4 = a  needs  K_3 = 1, K_2 = 0
#      .   a   b   .        y_4 = a  needs  K_2 = 1, K_1 = 0        K_2 can't be both
#
# (The blank is 0 here.) If Delta were 0 at the blanks, then the state would not notice them, and
# both lines would be "a b" to it.


def lti_convolution(u, dt, A, B, C, D):
    """The SSM without selection (Eq. 3): u (B, L, D), dt, D (D,), A, B, C (D, N) -> y (B, L, D)."""
    L = u.shape[1]
    dt = dt[:, None]  # (D, 1)
    powers = exp((dt * A)[..., None] * torch.arange(L, device=u.device))  # (D, N, L)  A_bar^k
    # A is diagonal, so every product of matrices is a product of numbers.
    K = torch.einsum("dn,dnl->dl", C * dt * B, powers)  # (D, L)  Eq. 3a
    # A product of Fourier transforms is a convolution on a circle: the end would reach round to the
    # start, and the future into the past. L zeros behind the sequence keep the two apart.
    u_hat = torch.fft.rfft(u.mT, 2 * L)
    K_hat = torch.fft.rfft(K, 2 * L)
    y = torch.fft.irfft(u_hat * K_hat, 2 * L).mT[:, :L]  # (B, L, D)  Eq. 3b
    return y + D * u


# ---- 3. Selection (Sections 3.2 and 3.5, Algorithm 2) ----
#
# The paper's one change: Delta, B and C become functions of the token.
#
#     B_t = Linear(x_t)     C_t = Linear(x_t)     Delta_t = softplus(parameter + Linear(x_t))
#
# B_t decides what of a token is written into the state, C_t what is read out, and Delta_t is the
# strongest of the three: it decides whether the token is seen at all, and how much it erases.
# A stays a parameter. It only ever appears as Delta A, so it is selective through Delta.
#
# Why softplus? Take a state of one number, A = -1 and B = 1, and let a be the output of the linear
# layer. By Eq. 4 and softplus(a) = log(1 + e^a),
#
#     A_bar = exp(-log(1 + e^a)) = 1 / (1 + e^a) = 1 - sigmoid(a)       B_bar = 1 - A_bar
#     h_t = (1 - g_t) h_(t-1) + g_t x_t       with g_t = sigmoid(Linear(x_t))  (Theorem 1, Eq. 5)
#
# This is the gate of a gated recurrent network, out of nothing but a discretised SSM: g = 1 resets
# the state to the token, g = 0 keeps it. softplus is what makes Delta positive and g a sigmoid.
# (With B_bar = Delta B the factor of h is the same, 1 - g; that of x is softplus(a), which is near
# g where g is small, and may exceed 1.)
#
# The price: the weights of the recurrence change at every step, so there is no kernel K any more,
# and no convolution. What is left is the recurrence itself, in three forms. This is the first, the
# one to read: a loop.


def run_ssm(u, dt, B, C, A, D, h):
    """Lines 5 and 6 of Algorithm 2, with A (N, D) and h (B, N, D): -> y (B, L, D), last h."""
    # D stands last: numbers that lie side by side in memory are computed together, and the sum over
    # N then adds whole rows of them.
    hs = []
    # unbind, and not u[:, t]: the gradient of an index is a tensor of zeros as large as all of u,
    # so L of them would make the backward pass quadratic in L.
    for dt_t, dtu_t, B_t in zip(dt.unbind(1), (dt * u).unbind(1), B.unbind(1)):
        A_bar = exp(dt_t[:, None] * A)  # (B, N, D)  Eq. 4
        B_bar_u = B_t[..., None] * dtu_t[:, None]  # (B, N, D)
        h = A_bar * h + B_bar_u  # (B, N, D)  Eq. 2a
        hs.append(h)
    y = (stack(hs, 1) * C[..., None]).sum(2)  # (B, L, D)  Eq. 2b
    return y + D * u, h


def selective_scan_ref(u, dt, A, B, C, D, h0=None):
    """The loop, with the shapes of `selective_scan` -> y (B, L, D), last h (B, D, N)."""
    h = 0 if h0 is None else h0.mT
    y, h = run_ssm(u, dt, B, C, A.T, D, h)
    return y, h.mT


# ---- 4. The parallel scan: all states in log2(L) sweeps (Section 3.3) ----
#
# The loop has L steps, each too small to keep a machine busy. But h -> a h + b is a linear
# function, and two of them, one after the other, are again a linear function:
#
#     a2 (a1 h + b1) + b2  =  (a2 a1) h + (a2 b1 + b2)
#     (a1, b1) then (a2, b2)  =  (a2 a1, a2 b1 + b2)
#
# In numbers: (.5, 1) then (.5, 2) is (.25, 2.5). From h = 4: 4 -> 3 -> 3.5, and .25 * 4 + 2.5 is
# 3.5. So a pair (a, b) sums up a whole stretch of time. Neighbouring stretches may be joined in any
# grouping (the operation is associative); only their order in time has to stay. In each sweep,
# every position joins its stretch with the one that ends just before it. The stretches double in
# length, until all of them begin at position 1. Eight steps need three sweeps:
#
#     position      1     2     3     4     5     6     7     8
#     at first      1     2     3     4     5     6     7     8
#     step = 1      1   1-2   2-3   3-4   4-5   5-6   6-7   7-8
#     step = 2      1   1-2   1-3   1-4   2-5   3-6   4-7   5-8
#     step = 4      1   1-2   1-3   1-4   1-5   1-6   1-7   1-8
#
# With P the cumulative product of a, one line seems to do: h = P * cumsum(b / P). But P underflows:
# 100 steps with a = .3 are below the smallest float32, and h is NaN.


def parallel_scan(a, b):
    """a, b (B, L, ...) -> the pair of steps 1..t for every t, same shapes; h_t = a_t h_0 + b_t.

    With a = A_bar and b = B_bar u this is Eq. 2a. It is here to be read: it does log2(L) times the
    work of the loop, and needs all of a and b in memory. The next section uses its pairs.
    """
    step = 1
    while step < a.shape[1]:
        b_joined = a[:, step:] * b[:, :-step] + b[:, step:]
        a_joined = a[:, step:] * a[:, :-step]
        b = cat([b[:, :step], b_joined], 1)
        a = cat([a[:, :step], a_joined], 1)
        step *= 2
    return a, b


# ---- 5. The scan that runs: one state in 16 is stored (Section 3.3.2) ----
#
# A_bar, B_bar u and h are N times as large as u and y. One layer of mamba-130m, 8 sequences of
# 2,048 tokens: u is 100 MB, h is 1.6 GB. The arithmetic on them is nothing; moving them through
# memory is what takes the time, and keeping them for the backward pass is what takes the space. The
# paper's kernel makes them inside the GPU's fast memory and drops them again. Here is how this file
# does it:
#
# Fusion         `torch.compile` turns 16 steps of the loop into one kernel. It reads 16 tokens and
#                a state, and writes 16 outputs and a state; what lies between stays in the cache.
# Recomputation  The gradient needs every h_t. A chunk of 16 steps keeps only what it got: its
#                tokens and one state. When the gradient comes back to it, it runs its steps once
#                more, and differentiates this second run. Forward 1, gradients 2, second run 1:
#                a third more arithmetic, for 1/16 of the states.
# Parallelism    Few sequences do not keep a machine busy. Then the time is cut into S stretches
#                that run side by side, twice. The first run, from h = 0, gives the b of each
#                stretch's pair; its a is the product of all A_bar, the exponential of A times the
#                sum of dt. From h0, one h -> a h + b after the other gives the state in which each
#                stretch really starts, and the second run starts there.
#
# To copy the scan, take wide, run_ssm and this section; to copy the model, all of part one.


def run_ssm_backward(inputs, dy, dh):
    """Runs the steps again; from the gradients of y and of the last h, those of all the inputs."""
    # vjp runs the function, and returns a second one: gradients of the results -> of the inputs.
    # That of h goes on to the chunk before, whose last h it is.
    _, gradients = torch.func.vjp(run_ssm, *inputs)
    return gradients((dy, dh))


@functools.cache
def kernel(function, compile):
    """torch.compile(function). Where that fails it says so, once, and runs the function itself."""
    if not compile:
        return function
    # fullgraph: all of it or an error. By default, torch leaves parts uncompiled without a word, as
    # it does after 8 kernels; new shapes, dtypes or strides need some more.
    run = torch.compile(function, fullgraph=True, recompile_limit=64)

    def call(*inputs):
        nonlocal run
        try:
            return run(*inputs)
        except Exception as error:
            result = function(*inputs)  # if this fails as well, the fault is in the inputs
            print(f"mamba: the scan runs uncompiled, for {error!r:.99}", file=sys.stderr)
            run = function
            return result

    return call


class Chunk(torch.autograd.Function):
    """`run_ssm` on a chunk of steps, with recomputation: only its inputs are kept."""

    @staticmethod
    def forward(ctx, compile, *inputs):
        ctx.compile = compile
        ctx.save_for_backward(*inputs)
        run = kernel(run_ssm, compile)
        # Detached: otherwise a kernel is compiled for each mix of inputs with and without gradient.
        return run(*[x.detach() for x in inputs])

    @staticmethod
    def backward(ctx, dy, dh):
        run = kernel(run_ssm_backward, ctx.compile)
        gradients = run(ctx.saved_tensors, dy.contiguous(), dh.contiguous())
        return None, *gradients  # None: `compile` has no gradient


# A torch.compile of a whole model leaves this function out, but not the kernels it calls.
@torch.compiler.disable(recursive=False)
def selective_scan(u, dt, A, B, C, D, h0=None, return_state=False, chunk=16, compile=True):
    """y_t = C_t h_t + D u_t with h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t (Eq. 2, Algorithm 2).

    u, dt (B, L, D), dt > 0 (after softplus); A (D, N), negative; B, C (B, L, N); D (D,);
    h0 (B, D, N) or None for zeros. Returns y (B, L, D) in u's dtype, with return_state also the
    last h (B, D, N). Both are differentiable in all inputs. The state is float32, or float64 for
    float64 inputs. Kept for the backward: the inputs and L / chunk states (twice as many where
    S > 1). Raises ValueError where lengths differ.
    """
    batch, L, _ = u.shape
    if dt.shape != u.shape or B.shape != C.shape or B.shape[:2] != u.shape[:2]:
        raise ValueError("u and dt must have the shape (B, L, D), B and C (B, L, N)")
    if h0 is None:
        h0 = u.new_zeros(batch, *A.shape)
    A = A.T.contiguous()  # (N, D)
    h = h0.mT.contiguous()  # (B, N, D)
    dtype = u.dtype
    u, dt, B, C, A, D, h = map(wide, (u, dt, B, C, A, D, h))
    compile = compile and L >= chunk  # a single step, as in generation, is not worth a kernel
    # How many numbers of state keep the machine busy? On a CPU as many as a core's cache holds.
    # With far fewer, and a long sequence, the time is cut into S stretches of 8 chunks or more.
    # They cost twice the work, and more calls: less than five are left alone.
    busy = 32768 if u.is_cpu else 1048576
    S = min(busy // h.numel(), L // (8 * chunk))
    if S < 5:
        S = 1
    parts = []
    for x in (u, dt, B, C):  # (B, L, .) -> L / (S T) chunks (S B, T, .), T = chunk
        # A shorter last chunk would be a kernel of its own; so zeros behind the end. They change
        # nothing: where dt = 0, A_bar is 1, nothing enters, and the state stays as it is.
        if S > 1 or compile and L % chunk:
            x = F.pad(x, (0, 0, 0, -L % (S * chunk)))
            x = cat(x.chunk(S, 1))  # (S B, L / S, .)  the stretches as a larger batch
        # Copies: the strides of a view depend on L, and other strides would be another kernel.
        copies = [c.clone(memory_format=torch.contiguous_format) for c in x.split(chunk, 1)]
        parts.append(copies)

    def run(h):
        ys = []
        for inputs in zip(*parts):  # one chunk after the other: u, dt, B, C
            y, h = Chunk.apply(compile, *inputs, A, D, h)
            ys.append(y)
        return cat(ys, 1), h

    if S > 1:
        _, b = run(cat([torch.zeros_like(h)] * S))  # (S B, N, D)
        passed = sum(part.sum(1) for part in parts[1])  # (S B, D)  sum of dt over each stretch
        a = exp(passed[:, None] * A)  # (S B, N, D)  the product of its A_bar
        starts = [h]
        for a_s, b_s in zip(a.chunk(S), b.chunk(S)):
            starts.append(a_s * starts[-1] + b_s)  # (B, N, D)
        h = cat(starts[:-1])
    y, h = run(h)
    y = cat(y.chunk(S), 1)[:, :L].to(dtype)
    h = h[-batch:].mT  # of the last stretch
    return (y, h) if return_state else y


# ---- 6. The Mamba block (Section 3.4, Figure 3) ----
#
# Earlier SSM networks alternate an SSM layer that mixes positions with an MLP that mixes channels.
# Mamba has one block for both: in_proj widens the channels to D = 2 d_model, the scan mixes the
# positions of each channel, out_proj mixes the channels again. Two more parts stand beside the
# scan:
#
# conv1d   shows each position the three tokens before it as well. Delta, B and C can then depend on
#          the neighbourhood ("the token after a marker"), not on the single token alone.
# z        a gate on the output, silu(z): y counts where the token wants it to. This is not yet
#          selection (Section 4.1.1): it acts after the scan, at one position, when the state has
#          already taken in everything that came before. In the paper's Table 1 this block with an
#          S4 in it copies 56 %, with selection 99.8 %.


class MambaBlock(nn.Module):
    """One mixer: (B, L, d_model) -> (B, L, d_model). selective=False is the LTI baseline.

    The state is a pair: the last d_conv - 1 inputs of the convolution (B, d_conv - 1, D) and
    h (B, D, N). Parameter names, shapes and initialisation are those of state-spaces/mamba.
    """

    def __init__(
        self, d_model, d_state=16, d_conv=4, expand=2, dt_rank=None, selective=True, compile=True
    ):
        super().__init__()
        D = expand * d_model
        self.dt_rank = dt_rank or math.ceil(d_model / 16)
        self.d_state = d_state
        self.selective = selective
        self.compile = compile
        self.in_proj = nn.Linear(d_model, 2 * D, bias=False)
        self.conv1d = nn.Conv1d(D, D, d_conv, groups=D)  # each channel has a filter of its own
        self.out_proj = nn.Linear(D, d_model, bias=False)
        # A = -1, -2, ..., -N in every channel (S4D-Real, Section 3.6). State n keeps a token for
        # about 1 / (n Delta) steps, so one channel has N timescales: 100 to 6 steps at Delta = .01.
        # As a logarithm, A stays negative whatever the optimizer does; a positive A would explode.
        # Whoever trains with weight decay leaves A_log and D out, as the official code does: it
        # would pull A_log to 0, and so all timescales to one.
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(D, 1))
        self.D = nn.Parameter(torch.ones(D))
        # Delta starts between .001 and .1, log-uniform. The bias that gives it is softplus
        # inverted: softplus(b) = dt for b = log(e^dt - 1). Code that zeroes all biases afterwards
        # sets Delta = softplus(0) = .69 everywhere: state n = 10 then forgets within a step.
        dt = 10 ** (2 * torch.rand(D) - 3)
        bias = nn.Parameter(dt.expm1().log())
        if selective:
            # Delta of a channel depends on all D channels of u, but through dt_rank numbers only
            # (Section 3.6). For mamba-130m a full D x D matrix would have 2.4 million weights, as
            # many as in_proj; in two factors, of rank 48, it has .15 million.
            self.x_proj = nn.Linear(D, self.dt_rank + 2 * d_state, bias=False)
            self.dt_proj = nn.Linear(self.dt_rank, D)
            self.dt_proj.bias = bias
        else:  # constants of each channel, as in S4
            self.dt_bias = bias
            self.B = nn.Parameter(torch.ones(D, d_state))
            self.C = nn.Parameter(torch.randn(D, d_state))

    def select(self, u):
        """The selection (Algorithm 2, lines 2-4): u (B, L, D) -> dt (B, L, D), B, C (B, L, N)."""
        if not self.selective:  # dt (D,), B, C (D, N): the same for all tokens
            return F.softplus(wide(self.dt_bias)), self.B, self.C
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = wide(dt @ self.dt_proj.weight.T) + wide(self.dt_proj.bias)  # (B, L, D)
        return F.softplus(dt), B, C

    def forward(self, x, state=None):
        """x (B, L, d_model), state of the tokens before or None -> y (B, L, d_model), state."""
        if state and not self.selective:
            raise ValueError("the LTI baseline runs as a convolution and takes no state")
        x, z = self.in_proj(x).chunk(2, -1)  # (B, L, D) each
        past, h = state or (None, None)
        if past is None:
            past = x.new_zeros(len(x), self.conv1d.kernel_size[0] - 1, x.shape[2])
        x = cat([past, x], 1)  # the past in front and nothing behind: causal
        past = x[:, z.shape[1] :]  # the last d_conv - 1, for the next call
        u = F.silu(self.conv1d(x.mT)).mT  # (B, L, D)
        A = -exp(wide(self.A_log))  # (D, N)
        dt, B, C = self.select(u)
        if self.selective:
            y, h = selective_scan(u, dt, A, B, C, self.D, h, True, compile=self.compile)
        else:
            y = lti_convolution(wide(u), dt, A, B, C, self.D)
        y = y.to(z.dtype) * F.silu(z)
        return self.out_proj(y), (past, h)


# ---- 7. The language model (Section 3.4) ----
#
# Token embeddings, n_layer blocks, each with a norm before it and a residual path around it, and
# the embeddings once more to turn the last x into scores of the next token. There are no attention,
# no MLP and no positions: the recurrence knows the order by itself.
#
# Training reads all L tokens in one scan. Generation has one token at a time, and here the fixed
# state pays: a step costs the same after 10 tokens and after a million, where a transformer would
# have to look at all the keys and values it has kept.


class Mamba(nn.Module):
    """ids (B, L) -> logits (B, L, vocab). Loads state-spaces/mamba-* checkpoints unchanged."""

    def __init__(self, vocab_size, d_model, n_layer, **block):
        """`block`: d_state=16, d_conv=4, expand=2 and the other arguments of MambaBlock."""
        super().__init__()
        embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(embedding.weight, std=0.02)  # small: the first loss is then near ln(vocab)
        layers = nn.ModuleList()
        for _ in range(n_layer):
            mixer = MambaBlock(d_model, **block)
            # Every layer adds its output to x. Smaller by sqrt(n_layer), the sum stays as large as
            # one layer's output, however many there are (as in GPT-2).
            mixer.out_proj.weight.data /= math.sqrt(n_layer)
            layers.append(nn.ModuleDict({"norm": nn.RMSNorm(d_model, 1e-5), "mixer": mixer}))
        norm_f = nn.RMSNorm(d_model, 1e-5)
        self.backbone = nn.ModuleDict({"embedding": embedding, "layers": layers, "norm_f": norm_f})
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.lm_head.weight = embedding.weight  # tied: one matrix reads tokens and scores them

    @classmethod
    def from_checkpoint(cls, path, **block):
        """Builds the model with the sizes that the state dict in the file shows, and loads it."""
        file = torch.load(path, map_location="cpu", weights_only=True)
        weights = {}
        for name in file:  # without the prefixes that DataParallel and torch.compile leave
            weights[name.replace("module.", "").replace("_orig_mod.", "")] = file[name]
        embedding = weights["backbone.embedding.weight"]
        weights.setdefault("lm_head.weight", embedding)  # some files leave the tied head out
        vocab_size, d_model = embedding.shape
        D, block["d_state"] = weights["backbone.layers.0.mixer.A_log"].shape
        block["expand"] = D // d_model
        block["d_conv"] = weights["backbone.layers.0.mixer.conv1d.weight"].shape[2]
        block["dt_rank"] = weights["backbone.layers.0.mixer.dt_proj.weight"].shape[1]
        n_layer = sum(name.endswith("mixer.D") for name in weights)
        model = cls(vocab_size, d_model, n_layer, **block)
        model.load_state_dict(weights)
        return model

    def forward(self, ids, state=None, return_state=False):
        """ids (B, L) -> logits (B, L, vocab). `state` from a call before continues its sequence."""
        # x is a sum over all layers, so it stays float32 while the layers may work in bfloat16.
        x = wide(self.backbone.embedding(ids))  # (B, L, d_model)
        dtype = self.lm_head.weight.dtype
        states = []
        for layer, past in zip(self.backbone.layers, state or self.init_state(len(ids))):
            y, past = layer.mixer(layer.norm(x).to(dtype), past)
            x = x + y
            states.append(past)
        logits = self.lm_head(self.backbone.norm_f(x).to(dtype))  # (B, L, vocab)
        return (logits, states) if return_state else logits

    def init_state(self, batch):
        """The state before the first token: a None for each layer, zeros for any batch size."""
        return [None] * len(self.backbone.layers)

    def step(self, ids, state):
        """One token by the recurrence, O(1) in time and memory: ids (B,) -> logits (B, vocab)."""
        logits, state = self(ids[:, None], state, return_state=True)
        return logits[:, 0], state

    @torch.no_grad()
    def generate(self, ids, n, temperature=1.0, top_k=None, generator=None, end_token=-1):
        """Appends n sampled tokens to ids (B, L): one parallel pass, then steps of recurrence.

        temperature 0 takes the most likely token; top_k keeps only the k most likely. A row that
        has reached end_token is filled up with it; when all rows have, fewer than n are appended.
        """
        ended = ids[:, :1] < 0  # (B, 1)  no row has ended: ids are not negative
        state = None
        token = ids
        for _ in range(n):
            # First all of ids, then only the new token: the state has what came before. (A common
            # fault is to run the whole prefix again for every token.)
            logits, state = self(token, state, return_state=True)
            values, index = logits[:, -1].topk(top_k or logits.shape[2])  # (B, k)
            # Divided by (nearly) 0, the largest logit is infinitely far from the second.
            p = F.softmax(values / max(temperature, 1e-6), -1)
            token = index.gather(1, torch.multinomial(p, 1, generator=generator))  # (B, 1)
            token = token.masked_fill(ended, end_token)
            ended = ended | (token == end_token)
            ids = cat([ids, token], 1)
            if ended.all():
                break
        return ids


# ================================= PART TWO: THE DEMO =================================

# ---- 8. Data (Section 4.1.1) ----
#
# Selective copying: eight tokens lie at random places among blanks. After the blanks come eight
# markers, and at each of them the model has to name the next of the tokens, in their order. With
# three of each:
#
#     . . c . a . . . b . . # # #        answers: c a b
#
# Where the tokens lie says nothing, so counting steps does not help. One has to see what a token
# is, keep it if it is one of the eight, and let the blanks pass.


def copying_batch(n, length, g, data=8, vocab=16):
    """Selective copying -> ids (n, length + data), answers (n, data). Chance is 1 / (vocab - 2).

    0 is the blank, vocab - 1 the marker, the others are data. g: a torch.Generator.
    """
    ids = torch.zeros(n, length + data, dtype=torch.long)
    ids[:, length:] = vocab - 1
    places = torch.rand(n, length, generator=g).topk(data).indices  # no place twice
    answers = torch.randint(1, vocab - 1, (n, data), generator=g)
    ids.scatter_(1, places.sort().values, answers)
    return ids, answers


def load_text(path):
    """The bytes of a file -> the text to train on (N,), and its last tenth to test on."""
    text = torch.tensor(list(pathlib.Path(path).read_bytes()))
    if len(text) < 1000:
        raise ValueError(f"{path} is too short: 1000 bytes at least")
    return text.split(len(text) * 9 // 10)[:2]


def batch(args, n, text, step):
    """ids (n, L), answers to its last positions, by seed and step: a resumed run is exact."""
    g = torch.Generator().manual_seed(args.seed * 10_000_000_000 + step)
    if args.task == "lm":
        start = torch.randint(len(text) - 64, (n, 1), generator=g)
        window = text[start + torch.arange(65)]  # (n, 65)
        ids = window[:, :-1]
        answers = window[:, 1:]  # at each position, the byte that follows
    else:
        # Short sequences first: there are few blanks to ignore, so the first right answers come
        # soon, and steps are cheap. With the 8 markers, L grows from 32 to 112, 16 (a chunk) at a
        # time.
        length = 24 + 16 * min(5, 6 * step**2 // args.steps**2)
        ids, answers = copying_batch(n, length, g)
    return ids.to(args.device), answers.to(args.device)


# ---- 9. Training ----
#
# Both models get the same batches in the same order. All chance in a step comes from its number and
# the seed, so a run that was stopped and goes on from its checkpoint ends with the same weights.


def build(args, selective=True):
    """A new model and its optimizer, always with the same first weights."""
    torch.manual_seed(args.seed)
    size = (16, 64, 2) if args.task == "copying" else (256, 128, 6)  # vocab, d_model, n_layer
    model = Mamba(*size, selective=selective, compile=not args.quick).to(args.device)
    # beta2 = .98: Adam's mean of squared gradients is over 50 steps, where .999 has 1,000, a third
    # of this short training. On the one seed tried, .999 was slower (tests/RESULTS.md).
    return model, torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))


def loss_and_accuracy(model, ids, answers):
    """Cross entropy in nats and the share of right answers, at the last positions of ids."""
    logits = model(ids)[:, -answers.shape[1] :]  # (n, answers, vocab)
    loss = F.cross_entropy(logits.mT, answers)  # .mT: it wants (n, vocab, answers)
    return loss, (logits.argmax(-1) == answers).float().mean()


def train(model, optimizer, text, args, done=0, save=None):
    """Trains from step done + 1 to args.steps, or until Ctrl-C -> whether Ctrl-C it was."""
    from tqdm import tqdm

    stop = []
    with contextlib.suppress(ValueError):  # a thread can't handle signals
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    for step in tqdm(range(done + 1, args.steps + 1), disable=args.rank > 0):
        ids, answers = batch(args, args.batch_size, text, step)
        mine = slice(args.rank, None, args.world)  # each process takes its share of the batch
        part = step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * min(20 * part, 1 - part)  # up, then down to 0

        loss, accuracy = loss_and_accuracy(model, ids[mine], answers[mine])
        optimizer.zero_grad()
        loss.backward()
        if args.world > 1:  # the mean over the equal shares is the gradient of the whole batch
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= args.world
        # Clipped to length 1, as is usual for recurrent networks; if a number in it is not finite,
        # its length isn't either.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise SystemExit(f"mamba.py: loss {loss} or its gradient not finite at step {step}")
        optimizer.step()

        if stop or step % 100 == 0 or step == args.steps:
            tqdm.write(f"step {step}/{args.steps} | loss {loss:.4f} | accuracy {accuracy:.3f}")
            if save:
                save_checkpoint(save, step, model, optimizer, args)
        if stop:
            break
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return stop


def save_checkpoint(path, step, model, optimizer, args):
    """All that the next step depends on; the text comes from args.data again."""
    state = dict(
        script="mamba",
        step=step,
        args=vars(args),
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
    )
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)  # all or nothing: a crash while saving leaves the old file


def load_checkpoint(args, model, optimizer):
    """Fills model and optimizer from args.load -> the number of steps that were done."""
    state = torch.load(args.load, map_location="cpu", weights_only=True)
    if state["script"] != "mamba":
        raise ValueError(f"{args.load} is not a checkpoint of mamba.py")
    for name in ("task", "data", "seed", "batch_size", "lr"):  # else it would be another run
        if state["args"][name] != getattr(args, name):
            raise ValueError(f"{args.load} was trained with {name} = {state['args'][name]}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---- 10. Evaluation and picture ----
#
# The test is a batch that training never sees: of a step it never reaches, and for a text, from the
# last tenth of the file. The loss is the mean of -log p(answer): ln 14 = 2.64 nats for a guess
# among the 14 data tokens, and for a text the nats a byte that a compressor with this model needs.


@torch.no_grad()
def evaluate(models, ids, answers):
    """Prints the accuracy of each model, and what a text model writes -> the metric."""
    line = "test (copying: chance .071, paper .998, LTI .564)"
    for name in reversed(models):  # the selective model last: the metric is its accuracy
        loss, accuracy = loss_and_accuracy(models[name], ids, answers)
        line += f" | {name} {accuracy:.4f} (loss {loss:.4f} nats)"
    if answers.shape == ids.shape:  # a text
        sample = models[name].generate(ids[:1, :1], 300)[0]
        print(bytes(sample.tolist()).decode(errors="replace"))
    print(line)
    return accuracy.item()


@torch.no_grad()
def step_sizes(model, ids):
    """ids (1, L) -> Delta of the first layer (D, L), the channels in the order of their means."""
    mixer = model.backbone.layers[0].mixer
    seen = []
    hook = mixer.conv1d.register_forward_hook(lambda module, x, y: seen.append(y))
    model(ids)
    hook.remove()
    u = F.silu(seen[0]).mT  # (1, L, D)
    dt = mixer.select(u)[0].expand_as(u)[0].T  # (D, L)
    return dt[dt.mean(1).argsort()].cpu()


def draw_picture(path, models, ids):
    """Delta of every channel at every position: selection itself."""
    # How to read it: bright is a large Delta (the colours are logarithms, the same in all panels).
    # The ticks are the tokens to copy (in a text: ends of lines). In the selective model they stand
    # out as stripes, at one or more of the four positions at which the convolution shows a token:
    # there Delta jumps, and the state takes something in. At the blanks most channels are dark: the
    # state is kept. In the LTI model a channel has one Delta for all tokens, and nothing stands
    # out.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    data = (ids[0] > 0) & (ids[0] < 15)
    for i, name in enumerate(models):
        axes = figure.add_subplot(len(models), 1, i + 1)
        axes.imshow(step_sizes(models[name], ids).log(), "magma", aspect="auto", vmin=-8, vmax=1)
        axes.set(title=f"{name}: Delta, layer 1", xlabel="position", ylabel="channel")
        axes.set_xticks(data.nonzero()[:, 0].tolist())
    figure.savefig(path)


# ---- 11. Command line ----
#
# What has no flag is a number in `build`, `batch` or `train`: whoever wants another edits it.


def parse(argv):
    """-> arguments, texts, model, optimizer, steps done. Bad input ends here, before training."""
    parser = argparse.ArgumentParser(description="Mamba: selective copying, or a text model")
    flag = parser.add_argument
    flag("--task", choices=["copying", "lm"], default="copying")
    flag("--data", help="for --task lm: any file; its last tenth is the test")
    flag("--steps", type=int, default=3000, help="of training (paper: 400,000)")
    flag("--batch-size", type=int, default=24, help="sequences, of all processes (paper: 64)")
    flag("--lr", type=float, default=6e-3, help="learning rate, at its peak (paper: 1e-4)")
    flag("--seed", type=int, default=0)
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flag("--out", default="out", help="folder for the picture")
    flag("--save", help="checkpoint to write, every 100 steps and at the end")
    flag("--load", help="checkpoint to go on from, up to --steps, and to evaluate")
    flag("--quick", action="store_true")  # 4 small steps of everything, for a test
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = args.batch_size = 4
    args.world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets both
    args.rank = int(os.environ.get("RANK", 0))
    if args.rank:  # one process speaks for all
        sys.stdout = open(os.devnull, "w")
        args.save = None
    try:  # an error becomes one line on stderr and exit status 2
        import matplotlib.figure, tqdm  # noqa: E401, F401, I001  missing ones are noticed now

        if args.steps < 1 or not 0 < args.lr < 10:
            raise ValueError("--steps must be at least 1, --lr in (0, 10)")
        if args.batch_size < 1 or args.batch_size % args.world:
            raise ValueError("--batch-size must be at least 1, and the same for each process")
        if (args.task == "lm") != bool(args.data):
            raise ValueError("--task lm and --data FILE go together")
        texts = load_text(args.data) if args.data else (None, None)
        if args.world > 1:
            dist.init_process_group()  # gloo for CPUs, nccl for GPUs
            if args.device == "cuda":
                args.device = f"cuda:{args.rank}"
        model, optimizer = build(args)
        done = 0
        if args.load:
            done = load_checkpoint(args, model, optimizer)
        os.makedirs(args.out, exist_ok=True)
        if args.save:  # a path that can't be written is found now
            save_checkpoint(args.save, done, model, optimizer, args)
    except Exception as error:
        parser.error(" ".join(str(error).split()))
    return args, texts, model, optimizer, done


def main(argv=None):
    args, (text, test), model, optimizer, done = parse(argv)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"mamba | {size:.2f}M parameters | {args.device} | seed {args.seed} | {args.task}")
    models = {"selective": model}
    stopped = train(model, optimizer, text, args, done, args.save)
    if not stopped:
        models["LTI"], its_optimizer = build(args, selective=False)
        train(models["LTI"], its_optimizer, text, args)
    ids, answers = batch(args, 16 * args.batch_size, test, 1_000_000_000)  # no step of training
    metric = evaluate(models, ids, answers)
    if not args.rank:
        draw_picture(f"{args.out}/mamba.png", models, ids[:1])
    return metric


if __name__ == "__main__":
    main()
