"""Infini-attention: local attention, and a memory of fixed size for all that came before.

Paper    Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention --
         Tsendsuren Munkhdalai, Manaal Faruqui, Siddharth Gopal, April 2024, arXiv:2404.07143
         Numbers are those of v1, with those of v2 in brackets: there Eq. 1-7 are Eq. 5-11.
Idea     Attention keeps a key and a value of every token, so what it keeps grows with the text.
         Read the text in segments instead: exact attention inside each, and of all that came
         before only a sum of key-value products, a matrix of fixed size. The same queries read
         it, by linear attention. One learned gate per head mixes the two.
Figure   (Figure 1; one head of one layer, segment s of N tokens)

         M_(s-1) (d, d), z_(s-1) (d,) ---------+------------------> update ---> M_s, z_s
                                               |                      ^         to segment s + 1
                     +--> q (N, d) -- sigma --> read: A_mem (N, d)    |
         x_s (N, D) -+--> k (N, d) -- sigma ---|----------------------+
                     +--> v (N, d) ------------|----------------------+
                          q, k, v -- causal softmax: A_dot (N, d)
                                               |
                  sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot -- heads, W_O --> (N, D)
Symbols  here | in the paper | what. Shapes: B texts, L tokens in segments of N, h heads of d
         q, k, v | Q, K, V | (B, h, L, d)         sigma | sigma | ELU + 1, positive
         M, z | M_s, z_s | memory (B, h, d, d), sum of all sigma(k) (B, h, d)
         A_mem, A_dot | the same | read from memory, from the segment (B, h, L, d)
         beta | beta | gate (h,), before its sigmoid      D | d_model | width h d, in code `dim`
Differs  The demo trains 28,000 weights from nothing; the paper tunes a trained LLM of 1 billion,
         for 30,000 + 400 steps. Adam (paper: Adafactor). Start weights of q, k, v are doubled.
         A key has three parts with ten tokens each; the paper's is a number. Filler is random.
         We count whole keys that are right, the paper single tokens.
         Rotary positions in the local part; scores by sqrt(d), where Eq. 2 prints sqrt(d_model).
         The rate is 5e-3 (paper: 1e-4), texts grow from 64 to 2,048 tokens (paper: 5,000).
Run      python infini_attention.py                    # passkeys, some 2 minutes on 2 cores
         python infini_attention.py --data FILE        # a language model of the file's bytes
         python infini_attention.py --update delta     # Eq. 5 [9] in place of Eq. 4 [8]
Expect   Whole key right in 128, 1,024, 8,192, 32,768 tokens, seeds 0-4: memory 1.00, .998, .99 +-
         .01, .59 +- .36 (.10 to .98); full attention .998, 1.00, .18 +- .15; local .00. Two fresh
         seeds, 22 and 23: .97, .98, .96, .47 and 1.00, 1.00, 1.00, .61. Paper: solved at 1M tokens,
         200 times its training; here 4 times on each seed. Kept: 4.4 kB (cache: 512 B a token).
"""

import argparse
import contextlib
import math
import os
import pathlib
import signal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ================================ PART ONE: THE PAPER =================================

# ---- 1. A past that fits into a matrix (Section 2.1.2 [3.1.2]) ----
#
# Attention answers a query with a weighted mean of all values so far. The weights depend on the
# query, so nothing can be added up in advance: every key and value has to be kept. For 8,192
# tokens in a model of 12 layers of width 1,024, in float32, this cache is 805 MB for each text.
#
# It is the exponential that forbids adding up, because it ties q and k together. Linear attention
# (arXiv:2006.16236) takes another positive similarity, a scalar product of sigma(q) and sigma(k).
# Vectors are rows, so sigma(k_i)^T v_i is a d x d matrix. Sums run over i <= t. The 1 / sqrt(d)
# of softmax is left out:
#
#     softmax        A_t = sum_i exp(q_t . k_i) v_i           / sum_i exp(q_t . k_i)
#     kernel         A_t = sum_i (sigma(q_t) . sigma(k_i)) v_i / sum_i sigma(q_t) . sigma(k_i)
#     q_t in front   A_t = sigma(q_t) [sum_i sigma(k_i)^T v_i] / sigma(q_t) . [sum_i sigma(k_i)]
#
# In line 3, sigma(q_t) is the same in every term, so it can stand before the sum. The brackets do
# not contain the query any more. The first is the matrix M (d x d), the second the vector z (d),
# and these two are all that a head keeps. A new token adds its product to M and its key to z;
# neither of them ever takes more space. Without z the answer would be a sum that grows with the
# text. Dividing by sigma(q) . z makes the weights sum to one.
#
# Nothing is lost in these three lines but the exponential: what is read is still a weighted mean
# of all past values, with positive weights. (With Eq. 4 only: after the delta rule of Eq. 5,
# values have been subtracted, and weights can be negative.)
#
# By hand, with d = 1, keys 1 and 0, values 3 and 6: sigma(1) = 2 and sigma(0) = 1, so
# M = 2 * 3 + 1 * 6 = 12 and z = 2 + 1 = 3. Every query reads 12 / 3 = 4, because q stands above
# and below the line. With d = 1 a memory knows one mean; only with several numbers can a query
# choose.


def sigma(x: Tensor) -> Tensor:
    """ELU + 1: x + 1 above zero, exp(x) below. Any shape."""
    # Positive, so that a sum of weights can neither vanish nor change its sign. In exact
    # arithmetic it is never zero (in float32 it is, below about -17). With a ReLU, a token whose
    # key is negative everywhere would get no gradient.
    return F.elu(x) + 1


def retrieve(q: Tensor, M: Tensor, z: Tensor) -> Tensor:
    """Reads the memory: q (B, h, N, d), M (B, h, d, d), z (B, h, d) -> A_mem (B, h, N, d).

    A_mem = sigma(q) M / (sigma(q) z)                                                   Eq. 3 [7]
    """
    sq = sigma(q)
    # An empty memory has M = 0 and z = 0. The floor makes its answer 0; without it, 0 / 0 is NaN
    # in the first segment of every text.
    total = (sq @ z[..., None]).clamp(min=1e-6)  # (B, h, N, 1)
    return sq @ M / total


# There are two ways to write. The plain one adds every pair of a key and a value:
#
#     M_s = M_(s-1) + sigma(K)^T V        z_s = z_(s-1) + sum over tokens of sigma(K)    Eq. 4 [8]
#
# The other is the delta rule. It asks the memory first what it would answer to the key, and adds
# only what is missing. A pair that is stored already is not added again, so repeats don't
# outweigh the rest:
#
#     M_s = M_(s-1) + sigma(K)^T (V - sigma(K) M_(s-1) / (sigma(K) z_(s-1)))             Eq. 5 [9]
#
# As it is published, it has a defect: z still grows by sigma(K), for a pair that M did not take.
# The paper lets z grow on purpose, for numerical stability, and doesn't mention what follows.
# Store a pair (k, v) in an empty memory: M = sigma(k)^T v, z = sigma(k), and the answer to k is
# v. Store it again in the next segment: M stays as it is, z becomes 2 sigma(k), and the answer is
# v / 2. It stays v / 2 however often the pair comes back. (The plain rule doubles both, and
# answers v.) Tokens of one segment don't see each other's writes: all of them ask M_(s-1). So a
# pair that comes twice in one segment is stored twice.


def update(k: Tensor, v: Tensor, M: Tensor, z: Tensor, delta: bool) -> tuple[Tensor, Tensor]:
    """Writes a segment's k, v (B, h, N, d) -> the new M, z. Eq. 4 [8], with delta Eq. 5 [9]."""
    if delta:
        v = v - retrieve(k, M, z)
    sk = sigma(k)
    M = M + sk.mT @ v  # (B, h, d, d)  a sum over the N tokens
    z = z + sk.sum(2)  # (B, h, d)
    return M, z


# ---- 2. How much can a memory hold? ----
#
# sigma(k) has d numbers, so at most d keys are linearly independent. Some d x d matrix answers d
# such keys exactly, but the sum of Eq. 4 does not: positive keys are never orthogonal. Tokens
# with sigma(k) near 0 take no room, so the text can be longer than d.
#
# Long before d keys are stored, something else sets the limit: these weights are flat. exp grows
# so fast that softmax can give nearly all of the weight to one key. sigma(q) . sigma(k) is a sum
# of positive terms, and hardly any key scores near zero. Let n keys be random (normal, of
# variance 1), and let the query be equal to one of them. This one gets the following weight (mean
# over draws), for d = 128 as in the paper:
#
#     n                              128       1,024     8,192
#     softmax of q . k / sqrt(d)     .994      .96       .79
#     memory                         .011      .0014     .00018        about 1.5 / n
#
# (1.5 is E[sigma(k)^2] / E[sigma(k)]^2, whatever d is. For normal keys of mean 0 and any
# variance, it is below pi.)
#
# All n terms below the line are of about the same size, and the right one is only 1.5 times as
# large. So the signal falls as 1 / n. To find one token among n, the model has to learn keys that
# are not random: those of tokens that don't matter must lie far below zero. There sigma is exp,
# nearly 0, and such a token enters M and z with hardly any weight.
#
# But n small weights add up. Suppose that filler weighs r = 1/2,000 of what the token weighs that
# is asked for. The share of this token in the answer is 1 / (1 + n r): half at 2,000 tokens, a
# fifth at 8,000. So a trained memory is good up to some length, and fades beyond it. Two attempts
# with larger models found the same: more compressions, worse recall
# (huggingface.co/blog/infini-attention; arXiv:2512.23862). Whether small weights are the reason
# there, too, is not known.


def memory_weights(q: Tensor, k: Tensor) -> Tensor:
    """The slow, obvious form: the weight that A_mem gives to each past token.

    q (B, h, N, d), k (B, h, n, d) of n past tokens -> (B, h, N, n). This times v (B, h, n, d) is
    what `retrieve` gets from a memory of k and v that Eq. 4 wrote; the delta rule writes another.
    It needs all keys: it is here to be read, drawn and tested against.
    """
    similarity = sigma(q) @ sigma(k).mT
    return similarity / similarity.sum(3, keepdim=True)


# ---- 3. Infini-attention (Section 2.1 [3.1]) ----
#
# Inside its segment, a token looks at itself and the tokens before it by ordinary attention:
#
#     q, k, v = x W_Q, x W_K, x W_V                                                      Eq. 1 [5]
#     A_dot = softmax(q k^T / sqrt(d)) v, causal                                         Eq. 2 [6]
#
# The same q, k and v serve the memory, so it costs no weights but one number per head. Two things
# matter here:
#
#   read, then write   If a segment were written first, then M would hold its last tokens while
#                      its first tokens read: they would see their future. The training loss would
#                      be excellent, and the model worth nothing where the future isn't known.
#                      The segment's own tokens are already read exactly, by A_dot.
#   no positions       Rotary positions turn q and k by their place in the segment. Sigma of
#                      turned vectors has no product that depends on the distance alone. So the
#                      memory gets q and k as they are; the paper, too, keeps positions out of
#                      it [4.1]. Its sum has no order: of the order of the past it knows what the
#                      keys and values themselves tell.
#
# One number per head, the gate, mixes the two:
#
#     A = sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot                               Eq. 6 [10]
#     O = A W_O, the heads side by side                                                 Eq. 7 [11]
#
# Near 1 a head reads the past, near 0 its segment. The gate does not know whether there is a
# past, and Eq. 6 has no exception for segment 1: there A_mem is 0, and A_dot is multiplied by
# 1 - sigmoid(beta) all the same, one half at the start of training. Where a head has learned to
# read the past, its first segment has hardly any attention.


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0..N-1 (arXiv:2104.09864) for x (B, h, N, d), d even."""
    # Pairs of channels turn by an angle that grows with the position. The scalar product of two
    # turned vectors depends on the difference of the angles, so on how far apart the two are.
    N, half = x.shape[2], x.shape[3] // 2
    speed = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(N, device=x.device)[:, None] * speed  # (N, d / 2)
    a, b = x.float().chunk(2, 3)
    turned = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.cat(turned, 3).to(x.dtype)


def local_attention(qkv: Tensor, N: int) -> Tensor:
    """Causal attention inside segments of N: qkv (3, B, h, L, d) -> A_dot (B, h, L, d)."""
    _, B, h, L, d = qkv.shape
    # Zeros fill up the last segment. They stand behind its tokens, so no token sees them.
    qkv = F.pad(qkv, (0, 0, 0, -L % N))
    # Side by side, as if they were more heads, the S segments can't see one another.
    q, k, v = qkv.reshape(3, B, -1, N, d)  # (B, h S, N, d) each
    A_dot = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)  # Eq. 2 [6]
    return A_dot.reshape(B, h, -1, d)[:, :, :L]


class InfiniAttention(nn.Module):
    """x (B, L, dim), memory (M, z) or None -> y (B, L, dim), the memory after the last segment.

    segment: its tokens; None: all of x is one. local_only: without memory. With one segment as
    long as the text, that is the full attention of a usual transformer.
    """

    def __init__(self, dim: int, heads: int, delta=False, local_only=False):
        super().__init__()
        if heads < 1 or dim % (2 * heads):
            raise ValueError(f"dim {dim} is not a multiple of twice the heads {heads}")
        self.heads = heads
        self.delta = delta
        self.local_only = local_only
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        # One gate for each head, 1/2 at the start, where the sigmoid is steepest. Adam moves a
        # number by about the rate in each step: at 1e-4, 400 steps move beta by about .04, and
        # the gate by .01. (The paper trains 30,000 steps before its 400.) Whoever trains for so
        # few steps at such a rate must give the gates a rate of their own.
        self.beta = nn.Parameter(torch.zeros(heads))

    def project(self, x: Tensor) -> Tensor:
        """Eq. 1 [5]: x (B, L, dim) -> q, k and v in one, (3, B, h, L, d)."""
        # Heads are split off the channels, then moved in front of the tokens. A view straight to
        # (B, h, L, d) has the same shape, and mixes tokens with heads: a leak of the future that
        # no error message shows.
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, memory=None, segment: int | None = None):
        L = x.shape[1]
        N = min(segment or L, L)
        qkv = self.project(x)
        A_dot = local_attention(qkv, N)  # (B, h, L, d)
        A = A_dot  # all there is, if there is no memory
        if not self.local_only:
            # In bfloat16, 256 + 1 is 256: a sum over many tokens would soon stop growing.
            q, k, v = qkv.to(torch.promote_types(x.dtype, torch.float32))
            if memory is None:
                M = k.new_zeros(*k.shape[:2], k.shape[3], k.shape[3])  # (B, h, d, d)
                memory = M, M[..., 0]
            read = []
            for q_s, k_s, v_s in zip(q.split(N, 2), k.split(N, 2), v.split(N, 2)):
                read.append(retrieve(q_s, *memory))  # (B, h, N, d)
                memory = update(k_s, v_s, *memory, self.delta)
            A_mem = torch.cat(read, 2)  # (B, h, L, d)
            gate = self.beta.sigmoid()[:, None, None]  # (h, 1, 1)
            A = (gate * A_mem + (1 - gate) * A_dot).to(x.dtype)  # Eq. 6 [10]
        return self.out(A.transpose(1, 2).flatten(2)), memory  # Eq. 7 [11]


# ---- 4. A decoder that reads segment after segment (Section 2.2 [3.2, 4.1]) ----
#
# Infini-attention takes the place of attention in a usual decoder. Each layer and head has a
# memory of its own. It goes in and comes out as a value, it is no buffer of the module: so one
# text can't leak into the next, and gradients flow through it.
#
#                 segment 1      segment 2      segment 3
#     layer 2        o --- M, z --> o --- M, z --> o
#                    |              |              |          o needs what stands below it, and
#     layer 1        o --- M, z --> o --- M, z --> o          the memory that comes from its left
#
# So one may go segment by segment, or layer by layer, as the paper does it [4.1]; the numbers are
# the same. Segment by segment needs little space: of the past, nothing but M and z is left
# (without training: the gradient needs all segments). Layer by layer, a layer's products for many
# segments are one large product, which is faster: only the memory itself goes through the
# segments one by one. `read` does this for any number of segments, and `forward` calls it for 64
# at a time.
#
# In training, the gradient of an answer in segment 3 goes back along the arrows to the keys and
# values of segment 1. This is the only way to learn what is worth writing: a segment's keys are
# read from memory only in later segments. With M detached between segments, W_K and W_V get no
# gradient from the memory: local attention alone decides what is written.
#
# What is kept (Table 1), per layer of width D: M and z have D (d + 1) numbers, for a text of any
# length. The cache of full attention has 2 D for each token. The two are equal at (d + 1) / 2
# tokens. For d = 128 that is 64.5: from the 65th token the cache is larger. Keys and values of
# the present segment, 2 D N, come on top.


class Block(nn.Module):
    """Pre-norm layer: x (B, L, dim), memory -> x (B, L, dim), memory."""

    def __init__(self, dim: int, heads: int, **kwargs):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = InfiniAttention(dim, heads, **kwargs)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, memory=None, segment: int | None = None):
        y, memory = self.attention(self.norm1(x), memory, segment)
        x = x + y
        return x + self.mlp(self.norm2(x)), memory


class InfiniTransformer(nn.Module):
    """ids (B, L) -> logits (B, L, vocab), read in segments of `segment` tokens.

    Any L: the last segment may be short. kwargs: delta=False, local_only=False, as in
    InfiniAttention. The default width gives heads of d = 64; for the paper's 8 heads of 128, dim
    is 1024.
    """

    def __init__(self, vocab_size=32000, dim=512, depth=12, heads=8, segment=2048, **kwargs):
        super().__init__()
        self.segment = segment
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = Block(dim, heads, **kwargs)
            # sigma of small numbers is near 1 for all keys, and no token stands out. Twice
            # torch's usual size spreads them.
            block.attention.qkv.weight.data *= 2
            self.blocks.append(block)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def read(self, ids: Tensor, memory=None):
        """Some segments ids (B, L) -> logits (B, L, vocab), the memory of every layer."""
        x = self.embedding(ids)  # (B, L, dim)
        after = []
        for block, M_z in zip(self.blocks, memory or [None] * len(self.blocks)):
            x, M_z = block(x, M_z, self.segment)
            after.append(M_z)
        return self.head(self.norm(x)), after

    def forward(self, ids: Tensor, memory=None, last: int | None = None):
        """last: logits (B, last, vocab) of the last tokens alone, so that long texts fit.

        The memory is not returned: to go on with a text, call `read`.
        """
        logits = []
        for part in ids.split(64 * self.segment, 1):
            y, memory = self.read(part, memory)
            logits.append(y)
            if last:
                logits = [torch.cat(logits, 1)[:, -last:]]
        return torch.cat(logits, 1)

    def memory_bytes(self, length: int) -> tuple[int, int]:
        """-> bytes of all M and z of a text, bytes of a key-value cache for `length` tokens."""
        dim, heads = self.embedding.embedding_dim, self.blocks[0].attention.heads
        each = len(self.blocks) * dim * self.embedding.weight.element_size()
        return each * (dim // heads + 1), each * 2 * length


# ================================= PART TWO: THE DEMO =================================

# ---- 5. Data (Section 3.2 [4.3]) ----
#
# A passkey is hidden in a text of filler, and asked for at the very end. It has three parts, with
# ten tokens for each of them: say a letter, a digit and a colour.
#
#     filler filler <key> K 7 red filler ... filler <ask> K 7         answers: K, 7, red
#
# At the end the model is shown the parts before the one that it has to name; they tell nothing
# about it. The key never lies in the last segment. So attention inside a segment can't know it:
# it must guess, and is right for one key in 1,000.
#
# (With three digits from the same ten tokens, the model also has to learn which one comes first.
# That is a matter of the local attention, and takes most of the training: tests/RESULTS.md.)
#
# How long are the texts of training? Before anything is learned, the memory gives each of n
# tokens about the weight 1 / n, and the gradient that reaches the key is as small. In texts of 64
# tokens what to write is learned soon; with 64 to 128 tokens in turn it took twice as many steps
# and more. But short texts don't punish filler that keeps a little weight, and in long ones it
# adds up (Section 2 of this file). So the texts grow, from 2 segments to 64. The longest decides
# how far the memory reaches: trained on at most 128, 512, 1,024 and 2,048 tokens, it found 0, 13,
# 39 and 98 % of the keys in 8,192 (one seed, texts that only grow; tests/RESULTS.md).
#
# Growing alone is not safe. Of ten seeds, one found 94 % of the keys in 128 tokens, 99 % in
# 1,024 and 84 % in 8,192. So every second step takes a text of 2, 3, 4, .. segments in turn, up
# to the present length, and the longest texts get the last quarter of all steps. (With the first
# rule alone that seed found them all, but another one only 90 % in 8,192.)


def passkey_batch(n: int, segments: int, segment: int, g: torch.Generator, depth=None):
    """-> ids (n, segments * segment), answers (n, 3), for the last three positions.

    Tokens 0-9, 10-19, 20-29 are the parts of a key, 30 is <key>, 31 <ask>, 32-47 are filler.
    depth, from 0 to 1: the key's segment, from the first to the last but one; None: any of them.
    """
    ids = torch.randint(32, 48, (n, segments * segment), generator=g)
    key = torch.randint(10, (n, 3), generator=g) + torch.tensor([0, 10, 20])
    where = torch.randint(segments - 1, (n, 1), generator=g)
    if depth is not None:
        where[:] = round(depth * (segments - 2))
    # Anywhere in its segment, but never across its end.
    where = where * segment + torch.randint(segment - 3, (n, 1), generator=g)
    ids.scatter_(1, where + torch.arange(4), F.pad(key, (1, 0), value=30))
    ids[:, -3:] = F.pad(key[:, :2], (1, 0), value=31)
    return ids, key


def load_text(path):
    """The bytes of a file -> the text to train on (bytes,), and its last tenth to test on."""
    text = torch.tensor(list(pathlib.Path(path).read_bytes()))
    if len(text) < 10000:
        raise ValueError(f"{path} is too short: 10,000 bytes at least")
    return text.split(len(text) * 9 // 10)[:2]


def batch(args, text, step):
    """ids (n, L), answers to its last positions, by seed and step: a resumed run is exact."""
    g = torch.Generator().manual_seed(args.seed * 10_000_000_000 + step)
    if args.data:
        start = torch.randint(len(text) - 512, (args.batch_size, 1), generator=g)
        window = text[start + torch.arange(513)]  # (n, 513)  8 segments of 64
        ids = window[:, :-1]
        answers = window[:, 1:]  # at each position, the byte that follows
    else:
        stage = (step - 1) * 8 // args.steps  # 0, 1, .. 7
        segments = 2 ** min(max(stage, 1), 6)  # 2, 2, 4, 8, 16, 32, 64, 64
        if step % 2:  # a length up to this one, in turn
            segments = 2 + step // 2 % (segments - 1)
        rows = math.ceil(args.batch_size * 2 / segments)  # the longer, the fewer
        ids, answers = passkey_batch(rows, segments, 32, g)
    return ids.to(args.device), answers.to(args.device)


# ---- 6. Training ----
#
# Three models get the same batches in the same order:
#
# memory            the paper's
# local attention   the same network without a memory: what a segment alone can tell. Of a passkey
#                   it tells nothing, so this one stays at chance by construction; with a text, it
#                   is a baseline that can win.
# full attention    the same again, with all of the text as one segment: the reference. It keeps
#                   every key and value.


def build(args, **variant):
    """A new model and its optimizer, always with the same first weights."""
    torch.manual_seed(args.seed)
    size = (48, 32, 2, 2, 32)  # vocabulary, width, layers, heads, segment
    if args.data:
        size = (256, 64, 2, 4, 64)
    model = InfiniTransformer(*size, delta=args.update == "delta", **variant).to(args.device)
    return model, torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))


def losses_and_right(model, ids, answers):
    """Cross entropy in nats, and whether the likeliest token is right, both (n, answers)."""
    last = answers.shape[1]
    if model.blocks[0].attention.local_only:
        # Without a memory, no segment before that of the answers can matter: it isn't read.
        ids = ids[:, -max(model.segment, last) :]
    logits = model(ids, last=last)  # (n, answers, vocab)
    losses = F.cross_entropy(logits.mT, answers, reduction="none")  # it wants (n, vocab, answers)
    return losses, logits.argmax(2) == answers


def train(model, optimizer, text, args, done=0, save=None):
    """Trains from step done + 1 to args.steps, or until Ctrl-C -> whether Ctrl-C it was."""
    from tqdm import tqdm

    stop = []
    with contextlib.suppress(ValueError):  # a thread can't handle signals
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    for step in tqdm(range(done + 1, args.steps + 1)):
        ids, answers = batch(args, text, step)
        part = step / args.steps
        # Up, constant, and down to 0 in the last quarter, where the texts are longest.
        optimizer.param_groups[0]["lr"] = args.lr * min(10 * part, 1, 4 - 4 * part)

        losses, right = losses_and_right(model, ids, answers)
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()  # through all segments
        # Clipped to length 1; if a number in it is not finite, its length isn't either.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise SystemExit(f"infini_attention.py: loss {loss} not finite at step {step}")
        optimizer.step()

        if stop or step % 80 == 0 or step == args.steps:
            size = f"{len(ids)} texts of {ids.shape[1]} tokens"
            share = right.float().mean()
            tqdm.write(f"step {step}/{args.steps} | {size} | loss {loss:.4f} | right {share:.3f}")
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
        script="infini_attention",
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
    if state["script"] != "infini_attention":
        raise ValueError(f"{args.load} is not a checkpoint of infini_attention.py")
    for name in ("data", "update", "seed", "batch_size", "lr"):  # else it would be another run
        if state["args"][name] != getattr(args, name):
            raise ValueError(f"{args.load} was trained with {name} = {state['args'][name]}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---- 7. Evaluation and picture ----
#
# The test texts come from seeds that training never uses, or from the last tenth of the file. A
# key counts if all three parts are right. The longest texts are 16 times as long as any of the
# training. A text model is judged by its cross entropy in nats a byte, for each segment of
# windows of 512 bytes: in the first segment there is no past, and nothing to be gained.
#
# Full attention fails at 8,192 tokens. Its rotary positions beyond 2,048 were never trained: this
# is a likely reason, but it was not tested apart from others.


@torch.no_grad()
def evaluate(model, text, args):
    """-> {tokens: share of whole keys right}; of a text {tokens: nats a byte in the last 64}."""
    figures = {}
    if args.data:
        losses, _ = losses_and_right(model, *batch(args, text, 1_000_000_000))
        for part in losses.split(64, 1):
            figures[64 * len(figures) + 64] = part.mean().item()
        return figures
    for segments in (4, 32, 256, 1024):
        if model.segment > 32 and segments > 256:
            break  # full attention costs the square of the length
        right = []
        for i in range(5):  # 100 texts, 20 at a time
            g = torch.Generator().manual_seed(args.seed * 10_000_000_000 + 9_000_000_000 + i)
            ids, answers = passkey_batch(min(args.batch_size, 20), segments, 32, g)
            _, parts = losses_and_right(model, ids.to(args.device), answers.to(args.device))
            right.append(parts.all(1))
        figures[32 * segments] = torch.cat(right).float().mean().item()
    return figures


@torch.no_grad()
def looked_at(model, ids):
    """ids (1, L) -> the weights (rows, L - N) in A_mem of the tokens before the last segment.

    A row is a layer, a head, and one of the last three tokens as the query.
    """
    rows = []
    for block in model.blocks:
        seen = []  # the hook catches what enters the attention of this block
        attention = block.attention
        hook = attention.register_forward_hook(lambda m, x, y: seen.append(x[0]))  # noqa: B023
        model(ids)
        hook.remove()
        q, k, _ = block.attention.project(seen[0])  # (1, h, L, d)
        weights = memory_weights(q[:, :, -3:], k[:, :, : -model.segment])  # (1, h, 3, L - N)
        rows.append(weights.flatten(0, 2))
    return torch.cat(rows).cpu()


def draw_picture(path, model, table, ids):
    """The figures; what is kept for them; and where the memory looks when it is asked."""
    # How to read the right panel: a column is a token of the text. The rows are the last three
    # tokens for head 1 of layer 1, then for its other heads (2 in all, with --data 4), then for
    # layer 2. Bright tokens are what A_mem is made of (the colours are logarithms). With --update
    # delta they don't show what is read: values have been subtracted. The ticks below are <key>
    # and its parts; with --data they are newlines.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[3, 3, 5])
    for name in table:
        left.plot(list(table[name]), list(table[name].values()), "o-", label=name)
    what = "nats a byte" if model.segment == 64 else "whole key right; trained up to 2,048 tokens"
    left.set(title=what)
    lengths = list(table["memory"])
    kept = torch.tensor([model.memory_bytes(n) for n in lengths]) / 1000
    middle.plot(lengths, kept, "o-", label=["memory: M and z", "full attention: keys and values"])
    middle.set(title="what is kept, kB", yscale="log")
    for axes in (left, middle):
        axes.set_xlabel("tokens read")
        axes.set_xscale("log", base=2)
        axes.legend()
    weights = looked_at(model, ids)
    right.imshow(weights.log(), "magma", aspect="auto", interpolation="nearest")
    right.set(title="weight of each token in A_mem", xlabel="token (ticks: the key)")
    right.set(ylabel="layer 1 above, layer 2 below")
    ticks = (ids[0, : weights.shape[1]] < 31).nonzero()[:, 0].tolist()
    right.set_xticks(ticks, [""] * len(ticks))
    figure.savefig(path)


# ---- 8. Command line ----
#
# What has no flag is a number in `build`, `batch` or `evaluate`: whoever wants another edits it.


def parse(argv):
    """-> arguments, texts, model, optimizer, steps done. Bad input ends here, before training."""
    parser = argparse.ArgumentParser(description="Infini-attention: passkeys, or a text model")
    flag = parser.add_argument
    flag("--data", help="any file: a language model of its bytes; its last tenth is the test")
    flag("--update", choices=["linear", "delta"], default="linear", help="Eq. 4 or Eq. 5")
    flag("--steps", type=int, default=640, help="of training (paper: 400, with a trained LLM)")
    flag("--batch-size", type=int, default=32, help="texts, while they are short (paper: 64)")
    flag("--lr", type=float, default=5e-3, help="learning rate, at its peak (paper: 1e-4)")
    flag("--seed", type=int, default=0)
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flag("--out", default="out", help="folder for the picture")
    flag("--save", help="checkpoint to write, every 80 steps and at the end")
    flag("--load", help="checkpoint to go on from, up to --steps, and to evaluate")
    flag("--quick", action="store_true")  # 4 small steps of everything, for a test
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = 4
        args.batch_size = 2
    try:  # an error becomes one line on stderr and exit status 2
        import matplotlib.figure, tqdm  # noqa: E401, F401, I001  missing ones are noticed now

        if args.steps < 1 or args.batch_size < 1 or not 0 < args.lr < 10:
            raise ValueError("--steps and --batch-size must be at least 1, --lr in (0, 10)")
        texts = load_text(args.data) if args.data else (None, None)
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
    job = args.data or "passkeys"
    print(f"infini_attention | {size:.2f}M parameters | {args.device} | seed {args.seed} | {job}")
    models = {"memory": model}
    stopped = train(model, optimizer, text, args, done, args.save)
    if not stopped:
        for name in ("local attention", "full attention"):
            models[name], its_optimizer = build(args, local_only=True)
            if name == "full attention":
                models[name].segment = 10**9  # longer than any text
            train(models[name], its_optimizer, text, args)
    table = {}
    line = "test (nats a byte)" if args.data else "test (whole key right, chance .001)"
    for name in models:
        table[name] = evaluate(models[name], test, args)
        line += f" | {name} " + " ".join(f"{figure:.4f}" for figure in table[name].values())
    print(f"at {', '.join(map(str, table['memory']))} tokens:")
    print(line)
    ids, _ = passkey_batch(1, 4, 32, torch.Generator().manual_seed(args.seed))
    if args.data:
        ids, _ = batch(args, test, 1_000_000_000)
    draw_picture(f"{args.out}/infini_attention.png", model, table, ids[:1].to(args.device))
    return table["memory"][512 if args.data else 8192]


if __name__ == "__main__":
    main()
