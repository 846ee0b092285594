"""S4: a state space model for long sequences, trained as one long convolution.

Paper    Efficiently Modeling Long Sequences with Structured State Spaces -- Albert Gu,
         Karan Goel, Christopher Re, October 2021, arXiv:2111.00396v3
Idea     x' = A x + B u, with A the HiPPO matrix, keeps a whole past of u in N numbers. Over L
         steps it is a convolution with a kernel K of length L, but each entry of K has a power
         of A in it. S4 computes the Fourier transform of K instead: there the powers become one
         inverse, and a good basis makes A diagonal plus rank one, so that the inverse is a sum
         of fractions.
Figure   (one layer: H independent systems, each with a state of N numbers)

         Lambda, P, B, C~ (H, N/2), dt (H,)            x (B, L, H) ----------------+
                | Cauchy sums at L roots of unity           | LayerNorm            |
         k00, k01, k10, k11 (H, L/2+1)                 u (B, L, H)                 |
                | Woodbury                                  |                      | residual
         K_hat (H, L/2+1)                              rfft, padded to 2L          |
                | irfft                                     |                      |
         K (H, L) ------- rfft, padded to 2L -------------- * -- irfft, + D u      |
                                                            | y (B, L, H)          |
                                     GELU, Linear H -> 2H, GLU -- (B, L, H) -------+-> next layer
Symbols  here | in the paper | what. In shapes: B sequences, L steps, H channels, N states each
         Lambda, P | the same | each (H, N/2): A = Lambda - P P*  u, y | u, y | in, out (B, L, H)
         B, D | B, D | input (H, N/2) and skip (H,)            x | x | state (B, H, N)
         C, C~ | C, C~ | output, and C (I - A_bar^L), which is trained (H, N/2)
         dt | Delta | length of a step (H,)    A_bar, B_bar | the same | A and B for one step
         K, K_hat | K-bar, K-hat | kernel and its Fourier transform
Differs  Q = P, as in the later official code: A can't become unstable. Algorithm 1 stands here
         as printed, but for Q = P, for line 1 (it is in `truncate`) and for the sign in line 4.
         Beside it stands what runs: arranged anew for better gradients (`dplr_kernel`).
         The recurrence multiplies by a dense A_bar, in O(N^2) a step; Theorem 2 does it in O(N).
         C learns at the rate of the other weights, and a GLU mixes channels: the official code.
         LayerNorm stands before each layer; in the paper before or after, by task.
         Demo: small digits, enlarged, in place of MNIST, 2 layers of 32 channels and N = 16.
Run      python s4.py    # digits as sequences of 784 pixels, beside a GRU; 4 minutes of one core
Expect   test accuracy, 5 seeds: .981 +- .011, worst .961 | GRU, as long, half the updates: .633
         +- .062, still learning | chance .100 | paper, sequential MNIST: .9963. It falls short of
         that, on fewer and smaller digits. More: tests/RESULTS.md
"""

import argparse
import contextlib
import copy
import math
import os
import signal
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# ================================ PART ONE: THE PAPER =================================

# ---- 1. A state that remembers: HiPPO (Sections 2.1 and 2.2) ----
#
# A state space model (SSM) reads a signal u(t) into a state x of N numbers, and reads its output
# y off that state:
#
#     x'(t) = A x(t) + B u(t)       y(t) = C x(t) + D u(t)                             (Eq. 1)
#
# What should x hold? The best answer would be all of the past. HiPPO writes the past as a sum of
# polynomials, and keeps the N coefficients. Let age be how long ago something was, and let s be
# exp(-age): s = 1 is now, s near 0 is long ago. Drawn over s, the past is a function f on [0, 1],
# with f(s) = u(t - age). Let p_n(s) = sqrt(2n+1) P_n(2s - 1), with P_n the Legendre polynomials:
# each p_n has degree n, and they are orthonormal on [0, 1]. Then
#
#     x_n = integral of f(s) p_n(s) ds       and       f(s) is near  sum_n x_n p_n(s)
#
# How does x change? All that is past grows older, so f changes by s f'(s). Integrate by parts:
#
#     x_n' = int s f' p_n ds = [s f p_n] from 0 to 1 - int f (s p_n)' ds
#                            = p_n(1) u(t)           - int f (s p_n)' ds
#
# (s p_n)' has degree n, so it is a sum of p_0 ... p_n. Its leading coefficient is n + 1 times
# that of p_n, so p_n comes with the factor n + 1. Its part along p_k with k < n is, by parts
# again,
#
#     int (s p_n)' p_k ds = p_n(1) p_k(1) - int p_n s p_k' ds = p_n(1) p_k(1)
#
# as p_n is orthogonal to s p_k', whose degree is below n. With p_n(1) = sqrt(2n+1) this is a
# system of the form of Eq. 1. So a linear system can hold the past, and its A and B are known:
#
#     A_nk = - sqrt(2n+1) sqrt(2k+1)  if n > k,    - (n + 1)  if n = k,    0  if n < k    (Eq. 2)
#     B_n  = sqrt(2n+1)
#
#     N = 4:      A = -  1      0      0      0         B = 1
#                        1.73   2      0      0             1.73
#                        2.24   3.87   3      0             2.24
#                        2.65   4.58   5.92   4             2.65
#
# The first HiPPO paper has A / t and B / t in place of A and B: then [0, t] is remembered evenly,
# however long it grows, but the system changes with t. S4 leaves out the 1 / t. Its memory fades
# with the age as s does, and the system is the same at all times: part 3 below needs this.
#
# In S4 the matrix is where training starts; A, B and C are learned. The paper (Section 4.4)
# starts from a random A, too. Such models fit the training data as well, but generalise worse.


def hippo(N):
    """HiPPO-LegS (scaled Legendre): A (N, N), B (N,) in float64."""
    n = torch.arange(N).double()
    B = torch.sqrt(2 * n + 1)
    A = -torch.tril(B[:, None] * B, -1) - torch.diag(n + 1)  # Eq. 2
    return A, B


# ---- 2. Steps in place of time (Section 2.3) ----
#
# Data come in steps: u_0, u_1, ... Say that a step lasts dt, and let the slope over a step be the
# mean of the slopes at its two ends (the trapezoid rule, or bilinear method). u is held at u_k
# for the whole step, so B u_k is the same at both ends. D u is left out until part 8.
#
#     (x_k - x_(k-1)) / dt  =  A (x_k + x_(k-1)) / 2 + B u_k
#     (I - dt/2 A) x_k      =  (I + dt/2 A) x_(k-1) + dt B u_k
#
#     x_k = A_bar x_(k-1) + B_bar u_k       y_k = C x_k                                (Eq. 3)
#     A_bar = (I - dt/2 A)^-1 (I + dt/2 A)       B_bar = (I - dt/2 A)^-1 dt B
#
# An eigenvalue a of A becomes (1 + dt a/2) / (1 - dt a/2). This lies inside the unit circle if
# and only if the real part of a is negative. So a stable A stays stable for any dt. Euler's
# 1 + dt a doesn't do that: a = -0.5 + 30i, dt = 0.1 gives a factor of 3.1 a step.
#
# What dt means: how much older the past becomes in a step. With exp(-age) as above, the memory
# spans some 1/dt steps: 1,000 for dt = .001, and 10 for dt = .1. Twice as many samples a second
# want half the dt and twice the l_max.


def bilinear(A, B, dt):
    """A (..., N, N), B (..., N), dt (...) -> A_bar, B_bar in the same shapes."""
    half = dt[..., None, None] / 2 * A
    I = torch.eye(A.shape[-1]).to(A)
    A_bar = torch.linalg.solve(I - half, I + half)
    B_bar = torch.linalg.solve(I - half, dt[..., None] * B)
    return A_bar, B_bar


# ---- 3. One model, two forms: recurrence and convolution (Sections 2.3 and 2.4) ----
#
# Eq. 3 is a recurrent network without a nonlinearity. It is the form for reading a stream: a step
# costs the same after ten inputs and after a million. For training it is slow, as a step can't
# begin before the last one is done. But nothing in it depends on k. Start with x_(-1) = 0, and
# put x_(k-1) into x_k, again and again:
#
#     y_k = C B_bar u_k + C A_bar B_bar u_(k-1) + ... + C A_bar^k B_bar u_0
#     y = K * u                                                                        (Eq. 4)
#     K = (C B_bar, C A_bar B_bar, ..., C A_bar^(L-1) B_bar)                           (Eq. 5)
#
# This is the form for training: one convolution with a kernel as long as the sequence, all y_k at
# once. Two questions are left: how to convolve (here), and how to get K (the rest of part one).


def convolve(u, K):
    """Eq. 4 in O(L log L): u (..., L), K (..., L) -> y (..., L)."""
    # A product of Fourier transforms is a convolution on a circle. For L = 3 that is
    #
    #     y_0 = K_0 u_0 + K_2 u_1 + K_1 u_2
    #
    # where y_0 sees u_1 and u_2, its own future. So both get L zeros behind them. A product that
    # comes round the circle then has a zero in it.
    L = u.shape[-1]
    y_hat = torch.fft.rfft(K, 2 * L) * torch.fft.rfft(u, 2 * L)  # (..., L + 1)
    return torch.fft.irfft(y_hat, 2 * L)[..., :L]


def naive_kernel(A_bar, B_bar, C, L):
    """Eq. 5 as it stands: A_bar (..., N, N), B_bar, C (..., N) -> K (..., L)."""
    # L products of a matrix and a vector, one after the other: O(N^2 L) operations, and for the
    # gradient all L vectors are kept. This is the cost that S4 is about.
    K = []
    x = B_bar
    for _ in range(L):
        K.append((C * x).sum(-1))
        x = (A_bar @ x[..., None])[..., 0]
    return torch.stack(K, -1)


# ---- 4. First step: from a sum of powers to one inverse (Section 3.3, Appendix C.3) ----
#
# Powers of a matrix are hard, inverses have structure that can be used. So make the numbers K_k
# the coefficients of a polynomial (the generating function). The bracket in it is a geometric sum
# of matrices:
#
#     K_hat(z) = sum_(k<L) K_k z^k = C [ sum_(k<L) (A_bar z)^k ] B_bar
#              = C (I - A_bar^L z^L) (I - A_bar z)^-1 B_bar
#
# In numbers: 1 + q + q^2 = (1 - q^3) / (1 - q). With matrices: call the bracket S. Then
# S (I - A_bar z) = I - (A_bar z)^L, as all other terms cancel. And I - A_bar z has an inverse for
# every z of length 1, as A_bar is stable. Take as z the L-th roots of unity, so that z^L = 1:
#
#     K_hat(z) = C~ (I - A_bar z)^-1 B_bar       with  C~ = C (I - A_bar^L)
#
# And these L values are the discrete Fourier transform of K: an inverse FFT gives K back.
#
# The power A_bar^L is now in C~ alone. S4 does not compute it during training at all: it makes C~
# the parameter, and never looks at C. Nothing is lost. C -> C~ is linear, and if A is stable it
# has an inverse: all eigenvalues of A_bar^L lie inside the unit circle, so I - A_bar^L has no
# eigenvalue 0. For any C there is just one C~, and gradient descent may as well search for C~.
# When A or dt changes, the same C~ stands for another C. The recurrence does need C, once, after
# training.
#
# The price: L is part of C~. Always make the kernel of length L. For fewer steps, cut it off;
# don't put a smaller L in.


def roots_of_unity(L):
    """z_j = exp(-2 pi i j / L) for j = 0 ... L/2, complex128 (L/2 + 1,)."""
    # K is real, so K_hat at the other half of the roots is the conjugate of this half, and
    # `irfft` needs this half only.
    #
    # The sign: line 4 of Algorithm 1 has exp(+2 pi i j / L). An FFT is defined with the minus,
    # and with the plus its inverse would give the kernel in reverse: K_0, K_(L-1), ..., K_1.
    return torch.exp(-2j * math.pi / L * torch.arange(L // 2 + 1).double())


def resolvent_kernel(A_bar, B_bar, C_tilde, L):
    """K (L,) by L/2 + 1 inverses: A_bar (N, N), B_bar, C~ (N,), all complex128."""
    # It is here to be read: O(N^3 L).
    z = roots_of_unity(L)
    inverse = torch.linalg.inv(torch.eye(len(A_bar)) - A_bar * z[:, None, None])  # (L/2+1, N, N)
    K_hat = inverse @ B_bar @ C_tilde  # (L/2 + 1,)
    return torch.fft.irfft(K_hat, L)


# ---- 5. Second step: A is diagonal plus rank one (Sections 3.1 and 3.2, Theorem 1) ----
#
# Were A diagonal, then each of the L inverses would be N divisions. Other bases may be tried:
# with x = V v, the system (V^-1 A V, V^-1 B, C V) has the same kernel as (A, B, C), for any V
# (Lemma 3.1). In the basis of its eigenvectors A is diagonal. These are known in closed form. If
# each of them starts with 1, they have entries of about 2^(4N/3) (Lemma 3.2): 5e25 for N = 64.
# Even with columns of length one, and in exact arithmetic, their condition number is 3e47, and a
# rounding error may grow by that factor. With V from `torch.linalg.eig`, in float64,
# V Lambda V^-1 misses A by 5e29 times A's largest entry. So plain diagonalisation does not work.
#
# The way out: A is nearly a matrix with a perfect basis. Add P P^T, with P_n = sqrt(n + 1/2). For
# N = 2,
#
#     A + P P^T  =  [ -1     0 ]  +  [ .5   .87 ]  =  -.5 I  +  [  0    .87 ]
#                   [ -1.73 -2 ]     [ .87  1.5 ]               [ -.87  0   ]
#
# and likewise for any N: sqrt(2n+1) sqrt(2k+1) / 2 = P_n P_k, so adding P P^T halves the numbers
# below the diagonal, and puts the same with the other sign above it. What is left is -1/2 on the
# diagonal and a skew-symmetric rest. Such a matrix is normal: its eigenvectors are orthogonal, V
# is unitary, its condition number is 1, and every eigenvalue has the real part -1/2. So
#
#     A = V (Lambda - P P*) V*       (Eq. 6; from here on P, B, C stand for V* P, V* B, C V)
#
# Theorem 1 says this with two vectors, P Q*. For an eigenvector x of length 1, x* A x is the
# eigenvalue. With Q = P its real part is that of x* Lambda x less |P* x|^2. So A is stable for
# any P, as long as Re Lambda < 0.
#
# Eigenvalues of a real matrix come in conjugate pairs, and so do their eigenvectors and with them
# the entries of P, B and C. Half of each is enough; `pairs` puts the other half back. Complex
# numbers plus their conjugates sum to a real number, so K is real. If the two halves were learned
# apart, it would not be.


def nplr(N):
    """HiPPO as in Eq. 6 -> Lambda, P, B (N/2,), V (N, N/2), complex128."""
    if N % 2:
        raise ValueError(f"the state size must be even, not {N}")
    A, B = hippo(N)
    P = B / math.sqrt(2)  # sqrt(n + 1/2)
    skew = A + P[:, None] * P + torch.eye(N) / 2
    # -i times a real skew-symmetric matrix is Hermitian. `eigh` gives it real eigenvalues in
    # ascending order, and a V that is unitary to the last digit; `eig` does not promise that.
    imag, V = torch.linalg.eigh(-1j * skew)
    Lambda = -0.5 + 1j * imag[N // 2 :]  # one of each pair: the one above the real axis
    V = V[:, N // 2 :]
    return Lambda, V.mH @ P.to(V), V.mH @ B.to(V), V


def pairs(x):
    """(..., N/2) -> (..., N): with the conjugates that `nplr` left out."""
    return torch.cat([x, x.conj()], -1)


def dense(Lambda, P, B, dt):
    """Lambda, P, B (H, N/2), dt (H,) -> A_bar (H, N, N), B_bar (H, N)."""
    # Give it float64: `truncate` takes A_bar^L, and rounding errors of A_bar grow with L there.
    Lambda, P, B = map(pairs, (Lambda, P, B))
    A = torch.diag_embed(Lambda) - P[:, :, None] * P[:, None].conj()  # (H, N, N)
    return bilinear(A, B, dt)


def truncate(A_bar, C, L, inverse=False):
    """A_bar (H, N, N), C (H, N) -> C~ = C (I - A_bar^L) (H, N), line 1 of Algorithm 1."""
    # C is a row here; the paper's Algorithm 1 has a conjugated column: (I - A_bar^L)* C. With
    # `inverse`, the argument C is C~, and the result is the C that belongs to it.
    M = torch.eye(C.shape[1]) - torch.linalg.matrix_power(A_bar, L)  # (H, N, N)
    if inverse:
        return torch.linalg.solve(M, C[:, None], left=False)[:, 0]
    return (C[:, None] @ M)[:, 0]


# ---- 6. Third step: Woodbury and Cauchy (Algorithm 1) ----
#
# First, back from A_bar to A. With Eq. 3, and (I - dt/2 A) taken into the bracket,
#
#     (I - A_bar z)^-1 B_bar = [ (I - dt/2 A) - (I + dt/2 A) z ]^-1 dt B
#                            = [ (1 - z) I - dt/2 (1 + z) A ]^-1 dt B
#                            = 2 / (1 + z)  (g - A)^-1 B        with  g = 2/dt (1 - z) / (1 + z)
#
# where g - A means g I - A. Now A = Lambda - P P*, so g - A = M + P P* with a diagonal
# M = g - Lambda. Four numbers need M^-1 alone:
#
#     k00 = C~ M^-1 B      k01 = C~ M^-1 P      k10 = P* M^-1 B      k11 = P* M^-1 P
#
# To solve (M + P P*) v = B, call P* v = a for the moment, a single number. Then M v = B - P a, so
#
#     v    = M^-1 B - M^-1 P a
#     a    = k10 - k11 a                    (this v, times P* from the left)
#     a    = k10 / (1 + k11)
#     C~ v = k00 - k01 a                    (the same v, times C~ from the left)
#          = k00 - k01 k10 / (1 + k11)      (Woodbury's identity, for rank one)
#
# M is diagonal, so each of the four is a sum of fractions, a Cauchy sum. An inverse of a matrix
# has become N divisions, for each of the L roots: O(N L) in all. (Cauchy sums at L points can be
# had in O(N + L), up to logarithms, but plain sums run well on real machines.)


def cauchy(C, B, P, fractions):
    """C, B, P (H, N), fractions 1 / M (H, N, J) -> k00 ... k11 (H, J), J = L/2 + 1."""
    v = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], 1)  # (H, 4, N)
    return (v @ fractions).unbind(1)


def algorithm_1(Lambda, P, B, C, dt, L):
    """Algorithm 1 as printed: Lambda, P, B, C~ (H, N/2), dt (H,) -> K (H, L), real."""
    # But for three things: Q = P, line 1 is in `truncate`, and in line 4 z has the other sign.
    z = roots_of_unity(L).to(C)  # (L/2 + 1,)
    # For even L the last z is -1. By luck, rounding leaves 1 + z at some 1e-16 i, not 0.
    g = 2 / dt[:, None] * (1 - z) / (1 + z)  # (H, L/2 + 1)
    Lambda, P, B, C = map(pairs, (Lambda, P, B, C))  # (H, N)
    M = g[:, None] - Lambda[..., None]  # (H, N, L/2 + 1)
    k00, k01, k10, k11 = cauchy(C, B, P, 1 / M)  # line 2
    K_hat = 2 / (1 + z) * (k00 - k01 * k10 / (1 + k11))  # line 3
    return torch.fft.irfft(K_hat, L)  # lines 4 and 5; (H, L)


# ---- 7. The same, arranged for float32 ----
#
# In float32, what is printed gives K well enough, and its gradients less so. The largest errors
# for N = 64, dt from .001 to .1 and five L from 8 to 4,096, relative to the largest value in
# float64, are about these (tests/test_s4.py holds the last row below 1e-5 for K, and below 2e-5
# for the gradients):
#
#                                          K       gradient of Lambda    C~       dt
#     Algorithm 1 as printed               2e-5    5e-5                  6e-5     2e-4
#     + B split in two (1)                 4e-6    7e-6                  2e-6     2e-5
#     + z, 1 - z and 1 + z in float64 (2)  9e-7    2e-6                  1e-6     5e-6
#     + no pole (3): `dplr_kernel`         1e-6    2e-6                  2e-6     3e-6
#
# (3) adds no digits; it removes the luck.
#
# 1. Where g comes near some Lambda_n, all four sums are nearly their n-th fraction, 1 / e times
#    a number, with e = g - Lambda_n. Then k00 is near C_n B_n / e, and what is subtracted from
#    it is near the same:
#
#        k01 k10 / (1 + k11)
#          is near  (C_n P_n / e) (P_n* B_n / e) / (P_n* P_n / e)  =  C_n B_n / e
#
#    The difference of two large numbers that are nearly equal has few right digits. A gradient
#    has 1 / e^2 where K has 1 / e, so still larger numbers cancel. But for B = P, k00 = k01 and
#    k10 = k11, and there is nothing to subtract: k01 - k01 k11 / (1 + k11) = k01 / (1 + k11).
#    And B of HiPPO is sqrt(2) P exactly (sqrt(2n+1) against sqrt(n + 1/2)). So write
#    B = sqrt(2) P + rest. Then the formula of part 6 is needed for the rest alone. When training
#    starts, the rest is 0, up to rounding. Later it is not, and the cancellation comes back, in
#    proportion to it.
# 2. Near z = 1, that is at the lowest frequencies, 1 - z in float32 has few right digits.
# 3. At z = -1, g has a pole. Divide the bracket in the second line of part 6 by dt, and stop
#    there:
#
#        K_hat(z) = C~ [ (1 - z)/dt - (1 + z)/2 A ]^-1 B,      M = (1 - z)/dt - (1 + z)/2 Lambda
#
#    and P P* has the factor (1 + z)/2. At z = -1 all is finite now, without luck.


def dplr_kernel(Lambda, P, B, C, dt, L):
    """Algorithm 1 as it runs: the arguments and the result of `algorithm_1`."""
    z = roots_of_unity(L)
    r = math.sqrt(2)
    Lambda, P, rest, C = map(pairs, (Lambda, P, B - r * P, C))  # (H, N)
    minus = (1 - z).to(C)  # (L/2 + 1,)
    plus = (1 + z).to(C) / 2
    M = minus / dt[:, None, None] - plus * Lambda[..., None]  # (H, N, L/2 + 1)
    k00, k01, k10, k11 = cauchy(C, rest, P, 1 / M)
    # k00 - plus k01 k10 / (1 + plus k11) for rest, r k01 / (1 + plus k11) for r P; together:
    K_hat = k00 + k01 * (r - plus * k10) / (1 + plus * k11)
    return torch.fft.irfft(K_hat, L)  # (H, L)


# ---- 8. The layer and the model (Section 3.4) ----
#
# An S4 layer has H such systems, one for each channel. All start as HiPPO, but each has a dt and
# a C of its own, so each looks at the past over another length, and reads something else off it.
# The systems are linear and don't mix the channels; so a nonlinearity and a linear layer follow,
# at every position for itself. D u adds the present input, times D.
#
# A model is a stack of such layers with residual paths, as a transformer is: S4 takes the place
# of attention, and mixes positions in O(L log L) where attention takes O(L^2). It needs no
# positional encoding: K_k depends on k.


class S4Layer(nn.Module):
    """u (B, L, H) -> (B, L, H), for L up to l_max; C~ is that of l_max."""

    # Complex parameters are stored as pairs of real numbers, (..., 2): `.double()` and some
    # optimizers skip complex ones. bfloat16 is for autocast only, as torch has no such FFT.

    def __init__(self, d_model, d_state=64, l_max=1024, dropout=0.0):
        super().__init__()
        self.l_max = l_max
        Lambda, P, B = [x.repeat(d_model, 1) for x in nplr(d_state)[:3]]  # (H, N/2)
        # Log-uniform between .001 and .1: channels that remember 10 steps, 1,000, or any between.
        log_dt = torch.empty(d_model).double().uniform_(-6.908, -2.303)
        # Times V, a random C would be a random C again; so C starts in the basis of Eq. 6. A_bar
        # of pairs keeps pairs, so C~ has them too, and half of C~ is enough.
        C = torch.randn_like(B)
        A_bar, _ = dense(Lambda, P, B, log_dt.exp())
        C = truncate(A_bar, pairs(C), l_max)[:, : d_state // 2]
        self.log_dt = nn.Parameter(log_dt)  # a logarithm, so dt stays positive
        self.A_real_log = nn.Parameter((-Lambda.real).log())  # so Re Lambda stays negative
        self.A_imag = nn.Parameter(Lambda.imag)
        self.P = nn.Parameter(torch.view_as_real(P))
        self.B = nn.Parameter(torch.view_as_real(B))
        self.C = nn.Parameter(torch.view_as_real(C))
        self.D = nn.Parameter(torch.randn(d_model))
        # This mixes channels. GLU: half of the 2H numbers, times the sigmoid of the other half.
        linear = nn.Linear(d_model, 2 * d_model)
        self.output = nn.Sequential(nn.GELU(), nn.Dropout(dropout), linear, nn.GLU())
        self.float()

    def system(self):
        """-> Lambda, P, B, C~ (H, N/2), complex, and dt (H,)."""
        Lambda = torch.complex(-self.A_real_log.exp(), self.A_imag)
        P, B, C = map(torch.view_as_complex, (self.P, self.B, self.C))
        return Lambda, P, B, C, self.log_dt.exp()

    def kernel(self, L):
        """K (H, L)."""
        if L > self.l_max:
            raise ValueError(f"{L} steps, but C~ is for l_max = {self.l_max}")
        return dplr_kernel(*self.system(), self.l_max)[:, :L]

    def forward(self, u):
        u = u.mT.to(self.D)  # (B, H, L)  under autocast, u may be bfloat16
        y = convolve(u, self.kernel(u.shape[2])) + self.D[:, None] * u  # Eq. 4, and D u of Eq. 1
        return self.output(y.mT)

    @torch.no_grad()
    def init_state(self, batch):
        """The recurrence before the first step: state x = 0 (B, H, N), and A_bar, B_bar, C."""
        # In float64, on the CPU: A_bar^L is a long product.
        Lambda, P, B, C, dt = copy.deepcopy(self).cpu().double().system()
        A_bar, B_bar = dense(Lambda, P, B, dt)  # (H, N, N), (H, N)
        C = truncate(A_bar, pairs(C), self.l_max, inverse=True)  # (H, N)
        x = torch.zeros(batch, *C.shape)
        return [part.to(torch.view_as_complex(self.C)) for part in (x, A_bar, B_bar, C)]

    def step(self, u, state):
        """One step of Eq. 3: u (B, H) -> (B, H), state. All steps together equal `forward`."""
        # A_bar is a product of two matrices that are diagonal plus rank one: (I + dt/2 A), and by
        # Woodbury (I - dt/2 A)^-1. With these a step would take O(N) (Theorem 2).
        x, A_bar, B_bar, C = state
        x = (A_bar @ x[..., None])[..., 0] + B_bar * u[..., None]  # (B, H, N)
        y = (C * x).sum(-1).real + self.D * u  # (B, H)  the imaginary parts of a pair cancel
        return self.output(y), [x, A_bar, B_bar, C]


class S4Model(nn.Module):
    """x (B, L, d_input) -> (B, d_output) from the mean over L; pool=False: (B, L, d_output)."""

    def __init__(self, d_input, d_output, d_model=256, n_layers=4, dropout=0.1, pool=True, **ssm):
        """`ssm`: d_state=64 and l_max=1024 of S4Layer."""
        super().__init__()
        self.pool = pool
        self.encoder = nn.Linear(d_input, d_model)
        self.decoder = nn.Linear(d_model, d_output)
        layers = [S4Layer(d_model, dropout=dropout, **ssm) for _ in range(n_layers)]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in layers)

    def forward(self, x):
        x = self.encoder(x)  # (B, L, d_model)
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        if self.pool:
            x = x.mean(1)  # (B, d_model)
        return self.decoder(x)


def parameter_groups(model, lr, weight_decay):
    """For AdamW: A, B, dt learn at .001 at most, and don't decay. `train` sets lr from `peak`."""
    # They say what is remembered, and for how long. Weight decay would pull log_dt to 0, so dt to
    # 1: a memory of one step. C, D and the rest are ordinary weights.
    system = []
    rest = []
    for name, parameter in model.named_parameters():
        if name.split(".")[-1] in ("log_dt", "A_real_log", "A_imag", "P", "B"):
            system.append(parameter)
        else:
            rest.append(parameter)
    slow = min(lr, 1e-3)
    return [
        {"params": rest, "lr": lr, "peak": lr, "weight_decay": weight_decay},
        {"params": system, "lr": slow, "peak": slow, "weight_decay": 0.0},
    ]


# ================================= PART TWO: THE DEMO =================================

# ---- 9. Data (Section 4: images as sequences of pixels) ----
#
# A digit is read pixel by pixel, line by line, and named at the end. This is the paper's
# sequential MNIST, with smaller data: scikit-learn's digits of 8 x 8 pixels, enlarged to MNIST's
# 28 x 28. So there are 784 steps, as there, and two pixels one above the other are 28 steps
# apart. Nothing tells the model that there are lines: it has to find that distance by itself.


def load_data(device):
    """scikit-learn's digits in [0, 1] -> x (1437, 1, 28, 28), y, x_test (360, 784, 1), y_test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, size=(28, 28), mode="bilinear")
    y = torch.tensor(y, device=device)
    # One random order for all seeds. Settings were chosen by training on four fifths of the
    # training part and judging on the last fifth of it; the test part was not looked at.
    torch.manual_seed(0)
    train, test = torch.randperm(1797).split(1437)
    return x[train], y[train], x[test].flatten(2).mT, y[test]


def batch(x, y, args, step):
    """Random images, each distorted a little, as sequences (B, L, 1), and their labels (B,)."""
    # With 1,437 images, a model soon knows each by heart. So no image is shown in the same way
    # twice: a random matrix near [1 0 0; 0 1 0] turns, shears, zooms and moves it. All chance in
    # a step, dropout too, comes from the seed and the step's number. A run resumed with the same
    # --steps, which set the rate, ends with the same weights.
    torch.manual_seed(args.seed * 10_000_000_000 + step)
    rows = torch.randint(len(x), (args.batch_size,))
    noise = 0.3 * torch.rand(args.batch_size, 2, 3) - 0.15
    matrix = (torch.eye(2, 3) + noise).to(x)
    grid = F.affine_grid(matrix, x[rows].shape, align_corners=False)
    images = F.grid_sample(x[rows], grid, align_corners=False)
    return images.flatten(2).mT, y[rows]


# ---- 10. Training ----
#
# S4 has a rival in the same model: a GRU in place of its layers, with about as many parameters.
# It, too, reads a pixel at each step into a state of fixed size. But its steps are not linear, so
# there is no kernel and no convolution: 784 steps have to be taken one after the other, forward
# and back again. On a CPU, an update of the GRU takes as long as two of S4. It gets half as many.


class GRU(nn.GRU):
    """In the place of S4Layer: u (B, L, H) -> (B, L, H)."""

    def forward(self, u):
        return super().forward(u)[0]


def build(args, gru=False):
    """A new model and its optimizer, always with the same first weights."""
    torch.manual_seed(args.seed)
    # Small, for minutes on a CPU. The paper has N = 64 and 4 to 6 layers.
    model = S4Model(1, 10, d_model=32, n_layers=2, dropout=0.1, d_state=16, l_max=784)
    if gru:  # one layer, about as many parameters; the small S4Layer is made only to be replaced
        model = S4Model(1, 10, d_model=36, n_layers=1, d_state=2)
        model.layers[0] = GRU(36, 36, batch_first=True)
    optimizer = torch.optim.AdamW(parameter_groups(model.to(args.device), args.lr, 0.01))
    return model, optimizer


def train(model, optimizer, data, steps, args, done=0, save=None):
    """Steps done + 1 ... steps, or until Ctrl-C -> (seconds so far, loss) of each step."""
    from tqdm import tqdm

    curve = []
    stop = []
    with contextlib.suppress(ValueError):  # a thread can't handle signals
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    begin = time.perf_counter()
    model.train()
    for step in tqdm(range(done + 1, steps + 1)):
        x, y = batch(*data[:2], args, step)
        part = step / steps
        rate = min(10 * part, 1 - part)  # up to .91, then down to 0
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate

        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        # Clipped to length 1; if a number in the gradient is not finite, its length isn't either.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise SystemExit(f"s4.py: loss {loss} or its gradient not finite at step {step}")
        optimizer.step()

        curve.append((time.perf_counter() - begin, loss.item()))
        if stop or step % 100 == 0 or step == steps:
            tqdm.write(f"step {step}/{steps} | loss {loss:.4f} | {curve[-1][0]:.0f} s")
            if save:
                save_checkpoint(save, step, model, optimizer, args)
        if stop:
            break
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return curve


def save_checkpoint(path, step, model, optimizer, args):
    """All that the next step depends on."""
    state = dict(
        script="s4",
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
    if state["script"] != "s4":
        raise ValueError(f"{args.load} is not a checkpoint of s4.py")
    for name in ("seed", "batch_size", "lr"):  # else it would be another run
        if state["args"][name] != getattr(args, name):
            raise ValueError(f"{args.load} was trained with {name} = {state['args'][name]}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---- 11. Evaluation and picture ----
#
# First, part one is put to the test on what was trained: the kernel of `dplr_kernel` against
# powers of A_bar, and the convolution against the recurrence. Both rest on C, which is found from
# C~. Then both models name the test digits, as they are, without distortions.


@torch.no_grad()
def compare(layer):
    """Prints how much the forms of a trained layer differ: two kernels, two ways to run it."""
    state = layer.init_state(1)
    naive = naive_kernel(*state[1:], layer.l_max).real  # (H, L)
    K = layer.kernel(layer.l_max)
    u = torch.randn_like(K.T)[None]  # (1, L, H)
    ys = []
    for u_k in u.unbind(1):
        y, state = layer.step(u_k, state)
        ys.append(y)
    kernels = (K - naive).abs().max()
    outputs = (torch.stack(ys, 1) - layer(u)).abs().max()
    print(
        f"layer 1 | kernel: loop and dplr_kernel are {kernels:.0e} apart"
        f" | output: recurrence and convolution are {outputs:.0e} apart"
    )


@torch.no_grad()
def evaluate(models, curves, x, y, done=0):
    """Prints the share of right answers of each model, on x (360, L, 1) -> that of S4."""
    # done: steps that S4 had made before --load, which its curve doesn't have.
    line = "test (chance .1000, paper, on MNIST, .9963)"
    for name in reversed(models):  # S4 last: its accuracy is the metric
        model = models[name].eval()
        guesses = [model(part).argmax(1) for part in x.split(60)]
        accuracy = (torch.cat(guesses) == y).float().mean().item()
        line += f" | {name} {accuracy:.4f} at step {len(curves[name]) + done * (name == 'S4')}"
    print(line)
    return accuracy


@torch.no_grad()
def draw_picture(path, curves):
    """Left: a past of 1,500 steps, and what 8 or 32 numbers of HiPPO keep. Right: losses."""
    # How to read the left one: what is recent is known in detail, what is long ago in outline,
    # and four times as many numbers know details four times as fine.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    dt = torch.tensor(0.002).double()
    age = dt * torch.arange(1500)
    past = torch.sin(3 * age) + torch.sin(20 * age) / 3
    left.plot(age, past, "lightgray", linewidth=6, label="the past")
    for N in (8, 32):
        # C = I: all N states are outputs, so there is a kernel for each x_n.
        K = naive_kernel(*bilinear(*hippo(N), dt), torch.eye(N), 1500)  # (N, 1500)
        x = K @ past  # (N,)
        # By part 1, K is dt s p_n(s). So it decodes, too: the past is near sum_n x_n p_n(s).
        left.plot(age, x @ K / dt * age.exp(), label=f"read off {N} numbers")
    left.set(title="what a HiPPO state remembers of a signal", xlabel="age")
    for name, curve in curves.items():
        right.plot(*zip(*curve), label=name)
    right.set(title="training loss", xlabel="seconds")
    left.legend()
    right.legend()
    figure.savefig(path)


# ---- 12. Command line ----
#
# What has no flag is a number in `build`, `batch` or `train`: whoever wants another edits it.


def parse(argv):
    """-> arguments, data, model, optimizer, steps done. Bad input ends here, before training."""
    parser = argparse.ArgumentParser(description="S4: digits, read as sequences of 784 pixels")
    flag = parser.add_argument
    flag("--steps", type=int, default=2400, help="of training")
    flag("--batch-size", type=int, default=16, help="images in a step")
    flag("--lr", type=float, default=0.01, help="learning rate; the schedule peaks at .91 of it")
    flag("--seed", type=int, default=0)
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flag("--out", default="out", help="folder for the picture")
    flag("--save", help="checkpoint to write, every 100 steps and at the end")
    flag("--load", help="checkpoint to go on from, up to --steps, and to evaluate")
    flag("--quick", action="store_true")  # 4 small steps of everything, for a test
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = args.batch_size = 4
    try:  # an error becomes one line on stderr and exit status 2
        import matplotlib.figure, tqdm  # noqa: E401, F401, I001  missing ones are noticed now

        if min(args.steps, args.batch_size) < 1 or not 0 < args.lr < 10:
            raise ValueError("--steps and --batch-size must be at least 1, --lr in (0, 10)")
        data = load_data(args.device)
        model, optimizer = build(args)
        done = load_checkpoint(args, model, optimizer) if args.load else 0
        os.makedirs(args.out, exist_ok=True)
        if args.save:  # a path that can't be written is found now
            save_checkpoint(args.save, done, model, optimizer, args)
    except Exception as error:
        parser.error(" ".join(str(error).split()))
    return args, data, model, optimizer, done


def main(argv=None):
    args, data, model, optimizer, done = parse(argv)
    size = sum(map(torch.numel, model.parameters())) / 1e6
    print(
        f"s4 | {size:.3f}M parameters | {args.device} | seed {args.seed}"
        f" | digits {len(data[0])}/{len(data[2])}, 784 steps"
    )
    models = {"S4": model}
    curves = {"S4": train(model, optimizer, data, args.steps, args, done, args.save)}
    if done + len(curves["S4"]) == args.steps:  # no Ctrl-C
        models["GRU"], its_optimizer = build(args, gru=True)
        curves["GRU"] = train(models["GRU"], its_optimizer, data, 1 + args.steps // 2, args)
    compare(model.layers[0].eval())  # without dropout
    metric = evaluate(models, curves, *data[2:], done)
    draw_picture(f"{args.out}/s4.png", curves)
    return metric


if __name__ == "__main__":
    main()
