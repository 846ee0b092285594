"""Transformer: sequence to sequence by attention alone, without recurrence or convolution.

Paper    Attention Is All You Need -- Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit,
         Llion Jones, Aidan N. Gomez, Lukasz Kaiser, Illia Polosukhin, June 2017, arXiv:1706.03762v7
Idea     A recurrent network hands what it read along a chain, a step per token. Here each token
         looks at all others at once, by a softmax over dot products: any two are one step apart,
         and all positions train in parallel. Sinusoids tell the positions apart.
Figure   (Figure 1; each box is post-norm: LayerNorm(x + Sublayer(x)))

         src (B, S)                                tgt (B, T), begins with <bos>
         embedding * sqrt(d) + PE                  the same matrix * sqrt(d) + PE
             | (B, S, d)                               | (B, T, d)
         +---+-----------------+               +-------+-------------------------+
         | self-attention      |               | causal self-attention           |
         | feed-forward        | x N    +------> cross-attention: S keys, values | x N
         +---+-----------------+        |      | feed-forward                    |
             | memory (B, S, d)         |      +-------+-------------------------+
             +--------------------------+              | (B, T, d)
                                               the same matrix, transposed -> logits (B, T, V)
Symbols  (in the code | in the paper | meaning)
         q, k, v | Q, K, V | queries, keys, values       d_model | d_model | numbers a token
         num_heads | h | heads, of d_k = d_v = d / h     num_layers | N | layers a side
         sinusoids | PE | positions                      eps | eps_ls | label smoothing
Differs  W_q, W_k, W_v, W_o have biases, and Glorot's initialisation; the paper has no biases there
         and names no initialisation. Gradients are clipped to length 1.
         The demo is small: d 64, N 2, h 4, 400 steps of warm-up to half of Eq. 3 (--data: d 256,
         N 3, h 8, d_ff 512); tokens are characters (dates) or words (--data), not byte pairs; a
         batch is 64 pairs. Five checkpoints of its last tenth are averaged. Decoding has no cache
         of keys and values: some T / 2 times the work.
Run      python transformer.py                                # dates to ISO
         python transformer.py --data pairs.tsv --steps 3000  # lines of source TAB target
         torchrun --nproc-per-node 2 transformer.py           # the batch shared out
Expect   exact match, 500 lines of unseen days, 5 seeds: .997 +- .003, worst .992; in 5.5 minutes
         on two cores | GRU with attention, as many steps and parameters: 1.0000. A GRU's step takes
         1.35 times as long, but it needs less than a third of the steps: on so small a task the
         paper's gain doesn't show (tests/RESULTS.md).
"""

import argparse
import contextlib
import datetime
import math
import os
import pathlib
import random
import re
import signal
import sys
import time
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel

# ================================= PART ONE: THE PAPER =================================
#
# Dimensions: B sentences, S tokens of the source, T tokens of the target (inside a layer: T
# queries, S keys), d = d_model numbers per token, h heads of d_k = d / h numbers each, V entries of
# the vocabulary.

# ---- 1. Attention (Section 3.2) ----
#
# A sentence is a set of vectors, one per token, and a layer has to let them exchange what they
# know. A recurrent network passes a message along a chain: from the first word to the last it takes
# S steps, one after the other, and each may spoil it. A convolution reaches only its neighbours.
# Attention lets every token look at every other one directly. It works like a lookup in a table,
# made soft so that it can be learned. Each token has
#
#     a query q   what it looks for           ("I am a verb: where is my subject?")
#     a key k     what it can be found by     ("I am a noun in the plural")
#     a value v   what it hands over          ("dogs")
#
# and all three are linear functions of its vector. A query is compared with all keys by a dot
# product, a softmax makes weights of the results (positive, with sum 1), and the answer is the mean
# of the values under these weights:
#
#     Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V                                 (Eq. 1)
#
# Why sqrt(d_k)? If the numbers in q and k are independent with mean 0 and variance 1, then each
# product q_i k_i has variance 1, and their sum q . k has variance d_k: for d_k = 64, scores of
# about +-8. A softmax over such numbers puts nearly all of its weight on one key. There its slope
# is almost 0, and little gradient comes back to q and k. Divided by sqrt(64), the scores have
# variance 1 at any size.


def scaled_dot_product_attention(q, k, v, mask=None):
    """Eq. 1: q (.., T, d_k), k (.., S, d_k), v (.., S, d_v) -> (.., T, d_v), weights (.., T, S).

    mask, broadcast to (.., T, S): True where a query may look. One that may look nowhere gets 0.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (.., T, S)
    if mask is None:
        mask = scores.new_ones((), dtype=torch.bool)
    # exp(-inf) = 0: no weight, and no gradient. But a row of nothing but -inf would be 0 / 0 = NaN.
    # So the number is the least finite one, and the weights of such a row are put to 0 afterwards.
    least = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~mask, least).softmax(-1).masked_fill(~mask, 0)
    return weights @ v, weights


# One softmax can look at one thing well. A verb may need its subject and its object at once, and
# the mean of the two is neither. So the model has h attentions side by side, each with d / h
# numbers for its queries, keys and values (Section 3.2.2). Together they cost as much as a single
# one with d numbers.
#
#     MultiHead(Q, K, V) = Concat(head_1, .., head_h) W^O
#     head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V)
#
# The h matrices W_i^Q are stored as one, (d, d), and its output is cut into h pieces.
#
# The same class serves in three places (Section 3.2.3):
#
#     encoder self-attention   q, k, v from the source: each word collects what its sentence says
#                              about it
#     decoder self-attention   q, k, v from the target, each position from itself and those before
#     cross-attention          q from the target, k and v from the source: which word to
#                              translate now
#
# Two masks say who may see whom. `key_mask` hides padding, which is there only because the rows of
# a batch must have one length; seen, it would take part of the weight, and a translation would
# depend on what else is in its batch. `causal` hides the future. In training the whole target
# stands in the decoder at once, and position t has to predict token t + 1: without the mask it
# would copy it from there, and be lost in decoding. Rows are queries, columns are keys, x may be
# seen (a source a b c with one <pad>; a target of four tokens):
#
#              a b c <pad>                  <bos> d  e  f
#         a    x x x .             <bos>      x   .  .  .    predicts d
#         b    x x x .             d          x   x  .  .    predicts e
#         c    x x x .             e          x   x  x  .    predicts f
#       <pad>  x x x .             f          x   x  x  x    predicts <eos>


class MultiHeadAttention(nn.Module):
    """h attentions side by side, each in its own d_model / h dimensions (Section 3.2.2)."""

    def __init__(self, d_model=512, num_heads=8):
        super().__init__()
        if d_model % num_heads:
            raise ValueError("d_model must be a multiple of num_heads")
        self.num_heads = num_heads
        self.W_q = nn.Linear(d_model, d_model)
        self.W_k = nn.Linear(d_model, d_model)
        self.W_v = nn.Linear(d_model, d_model)
        self.W_o = nn.Linear(d_model, d_model)

    def heads(self, x):
        """(B, T, d) -> (B, h, T, d_k): the heads become a dimension of the batch."""
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, memory=None, key_mask=None, causal=False, weights=None):
        """x (B, T, d) looks at memory (B, S, d), or at itself if that is None -> (B, T, d).

        key_mask (B, S) bool: False on padding, which nobody sees. causal: position t sees none
        after t. weights: a list that gets the attention weights (B, h, T, S).
        """
        if memory is None:
            memory = x
        q = self.heads(self.W_q(x))  # (B, h, T, d_k)
        k = self.heads(self.W_k(memory))  # (B, h, S, d_k)
        v = self.heads(self.W_v(memory))  # (B, h, S, d_k)
        mask = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool, device=x.device)
        if causal:
            mask = mask.tril()  # (T, S)  the lower triangle
        if key_mask is not None:
            mask = mask & key_mask.bool()[:, None, None]  # (B, 1, T, S)
        # F.scaled_dot_product_attention(q, k, v, mask) is the same in one kernel. It never stores
        # the T * S weights, which is what counts for long sequences on a GPU.
        y, w = scaled_dot_product_attention(q, k, v, mask)  # (B, h, T, d_k)
        if weights is not None:
            weights.append(w)
        # Back to (B, T, h, d_k), then the heads are joined. (A plain reshape to (B, T, d) runs as
        # well, and mixes the positions.)
        return self.W_o(y.transpose(1, 2).flatten(2))  # (B, T, d)


# ---- 2. Layers (Sections 3.1, 3.3 and 5.4, Figure 1) ----
#
# Attention only takes means of (linear functions of) its inputs. What makes something new out of
# the mean is a small network with a ReLU, applied to each position alone:
#
#     FFN(x) = max(0, x W_1 + b_1) W_2 + b_2                                            (Eq. 2)
#
# It is four times as wide inside as outside, and holds two thirds of an encoder layer's weights.


class PositionwiseFeedForward(nn.Module):
    """Eq. 2: (B, T, d) -> (B, T, d), the same at every position."""

    def __init__(self, d_model=512, d_ff=2048):
        super().__init__()
        self.W_1 = nn.Linear(d_model, d_ff)
        self.W_2 = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.W_2(F.relu(self.W_1(x)))  # Eq. 2


# Around each sublayer stands the same frame: dropout, a residual connection, layer normalisation.
#
#     paper (post-norm)    x = LayerNorm(x + Dropout(Sublayer(x)))           (Sections 3.1, 5.4)
#     norm_first=True      x = x + Dropout(Sublayer(LayerNorm(x)))
#
# The residual connection lets a layer add to what it got, so that a token does not have to be
# rebuilt by every layer. Where the norm stands decides how training begins. Post-norm sits on the
# path from the loss to the first layer, and every layer rescales the gradient once more. At the
# start the gradients of the last layers are large (Xiong et al. 2020, arXiv:2002.04745; the paper
# gives no reason), and large steps ruin what they rest on. This is why Eq. 3 below begins with a
# warm-up. Pre-norm leaves the path free, trains without warm-up, and became usual later (GPT-2).
# The sum it builds is never normalised, so one more norm stands at the top of the stack.


class EncoderLayer(nn.Module):
    """Self-attention, then feed-forward (Figure 1, left): (B, T, d) -> (B, T, d)."""

    def __init__(self, d_model=512, num_heads=8, d_ff=2048, dropout=0.1, norm_first=False):
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, num_heads)
        self.ffn = PositionwiseFeedForward(d_model, d_ff)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.norm_first = norm_first

    def residual(self, x, norm, sublayer, **inputs):
        """One sublayer in its frame."""
        if self.norm_first:
            return x + self.dropout(sublayer(norm(x), **inputs))
        return norm(x + self.dropout(sublayer(x, **inputs)))

    def forward(self, x, key_mask=None):
        """key_mask (B, T): False on padding."""
        x = self.residual(x, self.norm1, self.self_attn, key_mask=key_mask)
        return self.residual(x, self.norm2, self.ffn)


class DecoderLayer(EncoderLayer):
    """The same with cross-attention between the two (Figure 1, right): (B, T, d) -> (B, T, d)."""

    def __init__(self, d_model=512, num_heads=8, *sizes):
        super().__init__(d_model, num_heads, *sizes)
        self.cross_attn = MultiHeadAttention(d_model, num_heads)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(self, x, memory, memory_mask=None, weights=None):
        """memory (B, S, d), memory_mask (B, S). weights: a list for the cross-attention's."""
        x = self.residual(x, self.norm1, self.self_attn, causal=True)
        source = dict(memory=memory, key_mask=memory_mask, weights=weights)
        x = self.residual(x, self.norm2, self.cross_attn, **source)
        return self.residual(x, self.norm3, self.ffn)


class Stack(nn.Module):
    """N layers of one kind, one on the other: x (B, T, d) -> (B, T, d)."""

    def __init__(self, layer, d_model, num_layers, num_heads, d_ff, dropout, norm_first):
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            self.layers.append(layer(d_model, num_heads, d_ff, dropout, norm_first))
        # Post-norm layers end with a norm and need none on top (nn.Transformer has one all the
        # same).
        self.norm = nn.LayerNorm(d_model) if norm_first else nn.Identity()
        for p in self.parameters():
            if p.dim() > 1:  # Glorot: outputs of about the variance of the inputs, both ways
                nn.init.xavier_uniform_(p)

    def forward(self, x, *inputs):
        """inputs: what every layer gets beside x: a mask (encoder), or the memory and its mask."""
        for layer in self.layers:
            x = layer(x, *inputs)
        return self.norm(x)


# ---- 3. Positions and embeddings (Sections 3.4 and 3.5) ----
#
# Attention does not know in which order its inputs stand: "dog bites man" and "man bites dog" are
# the same set of vectors. So each position gets a vector of its own, which is added to the token's.
# The paper takes d / 2 clocks of different speeds, and writes down the two coordinates of each
# hand:
#
#     PE(pos, 2i) = sin(pos w_i)     PE(pos, 2i + 1) = cos(pos w_i)     w_i = 10000^(-2i / d)
#
# The fastest clock tells neighbours apart (a turn in 2 pi = 6.3 positions), the slowest tells the
# beginning from the end (almost 10000 * 2 pi positions). And a fixed distance is a fixed turn of
# each hand:
#
#     sin((pos + k) w) =  cos(k w) sin(pos w) + sin(k w) cos(pos w)
#     cos((pos + k) w) = -sin(k w) sin(pos w) + cos(k w) cos(pos w)
#
# The 2 x 2 matrix depends on k, not on pos. So "look k positions back" is one linear map, the same
# everywhere, and W_q can learn it: with the query's hands turned back by k, q . k is the sum of
# cos(w_i (pos - k - pos')), which is largest at pos' = pos - k.


def sinusoids(pos, d_model):
    """Positions (T,) -> PE (T, d_model), sines and cosines taking turns (Section 3.5)."""
    w = 10000 ** (-torch.arange(0, d_model, 2, device=pos.device) / d_model)  # (d / 2,)
    angle = pos[:, None] * w  # (T, d / 2)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :d_model]


class Embedding(nn.Embedding):
    """Tokens times sqrt(d_model), plus positions: ids (B, T) -> (B, T, d)."""

    def __init__(self, vocab_size, d_model=512, dropout=0.1):
        super().__init__(vocab_size, d_model)
        # The same matrix is the output layer, where entries with a standard deviation of 1 would
        # make logits of sqrt(d). So it is small here, and sqrt(d) below makes it 1 for tokens,
        # beside sinusoids of .7. (nn.Embedding begins with 1: times sqrt(d), the positions would
        # drown.)
        nn.init.normal_(self.weight, std=d_model**-0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids):
        x = super().forward(ids) * math.sqrt(self.embedding_dim)  # (B, T, d)
        pos = torch.arange(ids.shape[1], device=ids.device)
        return self.dropout(x + sinusoids(pos, self.embedding_dim).to(x))


# ---- 4. The Transformer (Figure 1) ----
#
# The encoder reads the source. The decoder gets the target, shifted to the right by a first token
# <bos>, and says at each position what comes next. In training, for a target of three tokens:
#
#     target           d      e      f
#     decoder reads    <bos>  d      e      f
#     it should say    d      e      f      <eos>
#
# With the causal mask all four predictions are made in one pass, each from the true tokens before
# it. A recurrent decoder would take four steps, one after the other. Without the shift, position t
# would read the very token that it has to say.
#
# One matrix (V, d) embeds the source and the target, and is the output layer (Section 3.4): the
# logit of a token is the dot product of the decoder's output with its embedding. With 37,000 pieces
# this saves 38 of the 101 million parameters of three separate ones.
#
# Decoding has to go step by step, as each token depends on those before. `greedy` takes the
# likeliest token each time. That can lead into a corner:
#
#     <bos> --.6--> a --.3--> x         greedy goes to a; its best sentence is a x: .6 * .3 = .18
#       `-----.4--> b --.9--> y         the best sentence is b y: .4 * .9 = .36
#
# `beam_search` keeps the K best beginnings in place of one (Section 6.1: K = 4). With K = 2:
#
#     step 1    kept: a (.6), b (.4)
#     step 2    of all continuations, b y (.36) and a x (.18) are the best; b y wins
#
# P, the probability of an output given the source, is a product of numbers below 1. It falls with
# every token, and the search would prefer short sentences. So those that have ended are compared by
#
#     log P / ((5 + length) / 6)^alpha          alpha = 0.6, <eos> counts in the length
#
# (Section 6.1 gives alpha; the formula is that of its reference [38].)
#
# The search looks at the 2K best continuations. Of these at most K end with <eos>, because each
# beginning can end in one way only. So at least K are left to go on.
#
# Each step here computes the whole target again. A cache of the keys and values would save about T
# / 2 of the work, for more code.


class Transformer(nn.Module):
    """Source ids (B, S), target ids (B, T) -> logits (B, T, V). The defaults are the base model's.

    Padding (pad_id) stands on the right. What the decoder reads begins with bos_id; what it should
    say, and what the search returns, ends with eos_id. Decoding takes the model as it is: call
    eval() first, or dropout goes on.
    """

    def __init__(
        self, vocab_size=37000, d_model=512, num_layers=6, num_heads=8, d_ff=2048, dropout=0.1,
        norm_first=False, pad_id=0, bos_id=1, eos_id=2,
    ):  # fmt: skip
        super().__init__()
        self.pad_id = pad_id
        self.bos_id = bos_id
        self.eos_id = eos_id
        sizes = (d_model, num_layers, num_heads, d_ff, dropout, norm_first)
        self.embedding = Embedding(vocab_size, d_model, dropout)
        self.encoder = Stack(EncoderLayer, *sizes)
        self.decoder = Stack(DecoderLayer, *sizes)

    def encode(self, src):
        """src (B, S) -> memory (B, S, d), its mask (B, S): False on padding."""
        mask = src != self.pad_id
        return self.encoder(self.embedding(src), mask), mask

    def decode(self, tgt, memory, memory_mask, weights=None):
        """tgt (B, T) -> logits (B, T, V); position t, which sees tgt up to t, scores token t + 1.

        Padding of tgt needs no mask: it stands on the right, where the causal mask hides it, and
        the loss ignores what is said there.
        """
        x = self.decoder(self.embedding(tgt), memory, memory_mask, weights)  # (B, T, d)
        return x @ self.embedding.weight.T  # (B, T, V)

    def forward(self, src, tgt, weights=None):
        """weights: a list that gets each decoder layer's cross-attention (B, h, T, S)."""
        return self.decode(tgt, *self.encode(src), weights)

    def greedy(self, src, extra=50):
        """The likeliest token, again and again: src (B, S) -> ids (B, T). A beam of one."""
        return self.beam_search(src, 1, 0, extra)[0]

    @torch.no_grad()
    def beam_search(self, src, beam=4, alpha=0.6, extra=50):
        """Looks for the highest log P / ((5 + length) / 6)^alpha -> ids (B, T), scores (B,).

        src (B, S) ids, none of them empty (ValueError). An output has at most S + extra tokens.
        """
        found = [self.search(row[row != self.pad_id], beam, alpha, extra) for row in src]
        ids, scores = zip(*found)
        return pad_sequence(ids, True, self.pad_id), torch.stack(scores)

    def search(self, src, beam, alpha, extra):
        """One source (S,) -> ids (T,), score ()."""
        if len(src) == 0:
            raise ValueError("a source is empty: there is nothing to translate")
        memory, mask = self.encode(src.expand(beam, -1))  # (K, S, d)  K equal copies
        limit = len(src) + extra
        ids = src.new_full((1, 1), self.bos_id)  # (k, t)  k beginnings: one at first, then K
        score = memory.new_zeros(1)  # (k,)  log P of each
        best_score = score[0] - math.inf
        while True:
            k, t = ids.shape
            logits = self.decode(ids, memory[:k], mask[:k])[:, -1].float()  # (k, V)
            logits[:, [self.pad_id, self.bos_id]] = -math.inf  # an output holds neither
            total = score[:, None] + logits.log_softmax(-1)  # log P of all that are one longer
            top, index = total.flatten().topk(min(2 * beam, total.numel()))  # (2K,)
            parent = index // total.shape[1]  # an index of the flat (k V) is row * V + token
            token = index % total.shape[1]
            longer = torch.cat([ids[parent], token[:, None]], 1)  # (2K, t + 1)
            ends = (token == self.eos_id) | (t == limit)  # (2K,)
            # What ends now counts if it is among the K best (so a beam of one is greedy), and is
            # kept if it beats all that ended before.
            ended = top.masked_fill(~ends, -math.inf)[:beam] / ((5 + t) / 6) ** alpha
            value, which = ended.max(0)
            if value > best_score:
                best_score = value
                best = longer[which, 1:]
            ids = longer[~ends][:beam]
            score = top[~ends][:beam]
            # log P only falls, and the more a negative number is divided by, the nearer it is to 0.
            # So no sentence that begins with row i gets above score[i] / (the longest one's
            # divisor), and score[0] is the largest. If that can't overtake, none can.
            if t == limit or best_score >= score[0] / ((5 + limit) / 6) ** alpha:
                return best, best_score


# ---- 5. Loss, learning rate, average (Sections 5.3, 5.4 and 6.1) ----
#
# Label smoothing: the target is not "this token with certainty", but q = 1 - eps on the right token
# and eps spread over all V (the right one included):
#
#     L = -sum_v q_v log p_v          q_v = (1 - eps) [v = target] + eps / V
#
# Cross-entropy alone falls on as the logits of what is right already grow. With q the best p is q
# itself, so the model stays unsure, which costs perplexity and gains BLEU. The loss cannot reach 0
# any more. Its least value is the entropy of q: .70 nats for the V = 49 of the demo and eps = .1.
# (A share eps / V falls on each of <pad> and <bos>, too, though neither is ever a target.)


def label_smoothing_loss(logits, target, eps=0.1, pad_id=0):
    """logits (.., V), target (..) ids -> mean over the targets that are not padding, in nats."""
    logits = logits.flatten(0, -2)
    return F.cross_entropy(logits, target.flatten(), ignore_index=pad_id, label_smoothing=eps)


# The learning rate rises linearly for `warmup` steps, for the sake of post-norm, then falls as
# 1 / sqrt(step):
#
#     lrate = d^-0.5 min(step^-0.5, step warmup^-1.5)                                   (Eq. 3)
#
# The two terms are equal at step = warmup. d^-0.5 makes the rate smaller for wider models: with d =
# 512 and warmup = 4,000 the peak is .0007. Adam has beta2 = .98: its mean of the squared gradients
# reaches back about 1 / (1 - .98) = 50 steps (the usual .999: 1,000), so it keeps up while the
# gradients change fast, in the warm-up.
#
# As the rate is still large at the end, the weights jump around a good place. The mean of several
# checkpoints' weights lies nearer to it than each of them. The paper's base model is the mean of
# its last 5, written 10 minutes apart (Section 6.1). `torch.optim.swa_utils.AveragedModel` keeps
# such a mean.


def learning_rate(step, d_model=512, warmup=4000):
    """Eq. 3, step = 1, 2, .."""
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


# ================================= PART TWO: THE DEMO =================================

# ---- 6. Data ----
#
# One or two dates, in the ways in which people write them, are translated to ISO dates:
#
#     Wednesday, 13 November 1985; 3 Jul 2004     ->     1985-11-13 2004-07-03
#
# A token is a character. Months have to be looked up, days and years found and copied, weekdays
# ignored, and the dates kept apart and in order. No day of the test is in the training part, in
# whatever spelling. With --data, a token is a word or a sign with the space before it, in lower
# case, and in scripts that put no spaces between words (Thai, Lao, Burmese, Khmer, Japanese,
# Chinese) a character.

SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"


def spell(date, rng):
    """One of eleven ways to write a date."""
    ways = "D %B %Y|%B D, %Y|D %b %Y|%b D %Y|%A, D %B %Y|%a D %b %Y|%Y, D %B|in %Y on %b D"
    ways += "|%d.%m.%Y|%m/%d/%Y|%Y-%m-%d"
    way = rng.choice(ways.split("|")).replace("D", str(date.day))  # %d says 03
    return date.strftime(way)


def date_pairs(n, days, rng):
    """-> n pairs (source, target) of one or two dates from `days`, numbers as of `toordinal`."""
    pairs = []
    for _ in range(n):
        some = rng.sample(days, rng.randint(1, 2))
        dates = [datetime.date.fromordinal(day) for day in some]
        source = "; ".join(spell(date, rng) for date in dates)
        pairs.append((source, " ".join(map(str, dates))))
    return pairs


def file_pairs(path):
    """The lines source TAB target of a file, in a seeded order: the file may be sorted."""
    lines = pathlib.Path(path).read_text("utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if line.count("\t") == 1]
    if len(pairs) < max(20, 0.99 * len(lines)):  # a few stray tabs must not end the run
        raise ValueError(f"{path}: {len(pairs)} of {len(lines)} lines are source TAB target")
    random.Random(0).shuffle(pairs)
    return pairs


def pieces(line, words):
    """The tokens of a line, as text: words and signs with the space before them, or characters."""
    if not words:
        return list(line)
    return re.findall(rf"[{SPACELESS}]| ?[^\W{SPACELESS}]+| ?[^\w\s]", " " + line.lower())


def to_ids(line, index, args):
    """-> ids (S,), <eos> at the end; 3 is <unk>."""
    ids = [index.get(p, 3) for p in pieces(line, args.data)]
    return torch.tensor(ids + [2], device=args.device)


def load_data(args):
    """-> training pairs as ids, by length; test pairs as text; {piece: id}."""
    if args.data:
        pairs = file_pairs(args.data)
        n = min(args.lines, len(pairs) // 10)
        test, pairs = pairs[:n], pairs[n:]
    else:
        rng = random.Random(args.seed)
        days = rng.sample(range(693_596, 766_645), 73_049)  # 1900-01-01 to 2099-12-31, shuffled
        test = date_pairs(args.lines, days[:4000], rng)
        pairs = date_pairs(72 * args.lines, days[4000:], rng)
    # The vocabulary comes from the training part alone. Pieces seen once are too rare to be
    # learned.
    count = Counter(p for pair in pairs for line in pair for p in pieces(line, args.data))
    names = ["<pad>", "<bos>", "<eos>", " <unk>"] + [p for p in count if count[p] > 1]
    index = dict(zip(names, range(len(names))))
    pairs.sort(key=lambda pair: len(pair[0]))
    ids = []
    for source, target in pairs:
        ids.append([to_ids(source, index, args), to_ids(target, index, args)])
    return ids, test, index


def batch(train, args, step):
    """src (n, S), tgt (n, T), a function of seed and step, so that a resumed run is exact."""
    g = torch.Generator().manual_seed(args.seed * 1_000_000_000 + step)
    # `train` is sorted by length, and a batch is a stretch of it: sentences of about one length
    # need little padding. (The paper does the same, Section 5.1.)
    start = torch.randint(len(train) - args.batch_size + 1, (1,), generator=g)
    src, tgt = zip(*train[start : start + args.batch_size])
    return pad_sequence(src, True), pad_sequence(tgt, True)


# ---- 7. What the paper replaced ----
#
# The encoder-decoder of the years before: one network reads the source, in both directions; another
# writes the target, and looks back at the source by attention. So attention was there already
# (reference [2] of the paper). What is new is to do without the recurrence.
#
# A GRU carries a state from token to token. From the first to the last of S tokens it takes S - 1
# steps, where self-attention takes one (Table 1), and they can't be done at once. In exchange its
# state knows the order of what it has read.
#
# Both models have the same search, embeddings, data, steps and optimizer, and about as many
# parameters. (Reference [2] adds the query to the keys where Eq. 1 multiplies, and feeds what was
# found back into the state that asks; here it goes on to a second GRU.)


class Recurrent(Transformer):
    """A GRU encoder-decoder with attention (Eq. 1, one head), in the place of the two stacks."""

    def __init__(self, vocab_size, d):
        super().__init__(vocab_size, d, num_layers=0)
        self.reads = nn.GRU(d, d // 2, 2, batch_first=True, bidirectional=True)  # the encoder
        self.asks = nn.GRU(d, d, batch_first=True)  # the decoder: its states are the queries
        self.attention = MultiHeadAttention(d, 1)
        self.says = nn.GRU(2 * d, d, batch_first=True)  # and what was found goes on into this one

    def encode(self, src):
        memory, _ = self.reads(self.embedding(src))  # (B, S, d)
        return memory, src != self.pad_id

    def decode(self, tgt, memory, memory_mask, weights=None):
        state, _ = self.asks(self.embedding(tgt))  # (B, T, d)
        found = self.attention(state, memory, memory_mask)
        state, _ = self.says(torch.cat([state, found], 2))  # (B, T, d)
        return state @ self.embedding.weight.T  # (B, T, V)


# ---- 8. Training ----
#
# Both models get the same batches in the same order. All chance in a step comes from its number and
# the seed, so a run that was stopped and goes on from its checkpoint ends with the same weights.


def build(args, vocab_size, recurrent=False):
    """A model and its average over five checkpoints, in one module; its optimizer."""
    torch.manual_seed(args.seed)
    size = (256, 3, 8, 512) if args.data else (64, 2, 4, 256)  # d, N, h, d_ff
    dropout = 0.1 * (not args.quick)  # without it, two processes compute exactly what one does
    model = Transformer(vocab_size, *size, dropout)
    if recurrent:
        model = Recurrent(vocab_size, 90)  # as many parameters as the demo's
    models = nn.ModuleList([model, AveragedModel(model)]).to(args.device)
    return models, torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)


def train(models, optimizer, data, args, done=0, save=None):
    """From step done + 1 to args.steps, or until Ctrl-C -> (seconds a step, ended by Ctrl-C)."""
    from tqdm import tqdm

    model, average = models
    model.train()
    stop = []
    with contextlib.suppress(ValueError):  # a thread can't handle signals
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    start = time.time()
    for step in tqdm(range(done + 1, args.steps + 1), disable=args.rank > 0):
        src, tgt = batch(data, args, step)
        mine = slice(args.rank, None, args.world)  # each process takes its share of the batch
        target = tgt[mine]
        shifted = F.pad(target, (1, -1), value=1)  # <bos> in front, the last one goes
        torch.manual_seed(args.seed * 1_000_000_000 + step)  # for dropout
        rate = args.lr * learning_rate(step, model.embedding.embedding_dim, 400)  # Eq. 3
        optimizer.param_groups[0]["lr"] = rate

        loss = label_smoothing_loss(model(src[mine], shifted), target)
        # This process's part of the mean over all tokens of the batch; the parts are added below.
        loss = loss * (target > 0).sum() / (tgt > 0).sum()
        optimizer.zero_grad()
        loss.backward()
        if args.world > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():  # as it is if any number of the gradient is not
            raise SystemExit(f"transformer.py: loss {loss} or gradient not finite at step {step}")
        optimizer.step()
        # Section 6.1: the mean of five checkpoints, here from the last tenth of training.
        if step / args.steps > 0.9 + 0.02 * average.n_averaged:
            average.update_parameters(model)

        if stop or step % 250 == 0 or step == args.steps:
            tqdm.write(f"step {step}/{args.steps} | loss {loss:.4f}")
            if save:
                save_checkpoint(save, step, models, optimizer, args)
        if stop:
            break
    if average.n_averaged == 0:  # Ctrl-C came early: the weights as they are
        average.update_parameters(model)
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return (time.time() - start) / args.steps, stop


def save_checkpoint(path, step, model, optimizer, args):
    """All that the next step depends on; the data come from args.data or the seed again."""
    state = dict(
        script="transformer",
        step=step,
        args=vars(args),
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
    )
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)  # all or nothing: a crash while saving leaves the old file


def load_checkpoint(args, models, optimizer):
    """Fills models and optimizer from args.load -> the number of steps that were done."""
    state = torch.load(args.load, map_location="cpu", weights_only=True)
    if state["script"] != "transformer":
        raise ValueError(f"{args.load} is not a checkpoint of transformer.py")
    for name in ("data", "seed", "batch_size", "lr"):  # else it would be another run
        if state["args"][name] != getattr(args, name):
            raise ValueError(f"{args.load} was trained with {name} = {state['args'][name]}")
    models.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---- 9. Evaluation and picture ----


def evaluate(model, test, index, args):
    """-> the share of test lines translated exactly; ids of the last one and its translation."""
    model.eval()  # no dropout
    names = list(index)
    outputs = []
    wanted = []
    for source, target in test:
        src = to_ids(source, index, args)
        tgt = model.beam_search(src[None])[0][0]  # (T,)
        outputs.append("".join(names[t] for t in tgt[:-1]))  # without <eos>
        # What is compared is text, so <unk> is never right.
        wanted.append("".join(pieces(target, args.data)))
    if args.data:
        with contextlib.suppress(ImportError):
            from sacrebleu import corpus_bleu

            print(f"BLEU {corpus_bleu(outputs, [wanted]).score:.2f} (lower case)")
    print(f"{source} -> {outputs[-1]}")
    return sum(map(str.__eq__, outputs, wanted)) / len(test), src, tgt


@torch.no_grad()
def draw_picture(path, model, src, tgt, index):
    """The cross-attention of the last layer, a mean over its heads, for one translation."""
    # How to read it: a row is an output token, a column a token of the source. Bright is where the
    # model looked just before it said the token: at the month that it has to name, at the digits
    # that it has to copy.
    from matplotlib.figure import Figure

    weights = []
    model(src[None], F.pad(tgt[None], (1, -1), value=1), weights)
    names = list(index)
    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="looks at (keys: the source)", ylabel="says (queries)")
    axes.imshow(weights[-1][0].mean(0).cpu(), "magma", aspect="auto")  # (T, S)
    axes.set_xticks(range(len(src)), [names[t] for t in src])
    axes.set_yticks(range(len(tgt)), [names[t] for t in tgt])
    figure.savefig(path)


# ---- 10. Command line ----
#
# What has no flag is a number in `build`, `date_pairs` or `train`: whoever wants another edits it.


def parse(argv):
    """-> arguments, data, models, optimizer, steps done. Bad input ends here, before training."""
    parser = argparse.ArgumentParser(description="Transformer: dates to ISO, or your own pairs")
    flag = parser.add_argument
    flag("--data", help="lines of source TAB target, to learn to translate")
    flag("--steps", type=int, default=2750, help="of training (paper: 100,000)")
    flag("--batch-size", type=int, default=64, help="pairs (paper: 25,000 tokens a side)")
    flag("--lr", type=float, default=0.5, help="factor on Eq. 3 (paper: 1)")
    flag("--seed", type=int, default=0)
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"))
    flag("--out", default="out", help="folder for the picture")
    flag("--save", help="checkpoint to write, every 250 steps and at the end")
    flag("--load", help="checkpoint to go on from, up to --steps, and to evaluate")
    flag("--quick", action="store_true")  # 4 small steps of everything, for a test
    args = parser.parse_args(argv)
    args.lines = 500  # of the test
    if args.quick:
        args.steps = args.batch_size = args.lines = 4
    args.world = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets both
    args.rank = int(os.environ.get("RANK", 0))
    if args.rank:  # one process speaks for all
        sys.stdout = open(os.devnull, "w")
        args.save = None
    try:  # an error becomes one line on stderr and exit status 2
        import matplotlib.figure, tqdm  # noqa: E401, F401, I001  missing ones are noticed now

        if args.steps < 1 or not 0 < args.lr < 100:
            raise ValueError("--steps must be at least 1, --lr in (0, 100)")
        data = load_data(args)
        if not 0 < args.batch_size <= len(data[0]) or args.batch_size % args.world:
            raise ValueError("--batch-size: at most the pairs, and the same for each process")
        if args.world > 1:
            dist.init_process_group()  # gloo for CPUs, nccl for GPUs
            if args.device == "cuda":
                args.device = f"cuda:{args.rank}"
        models, optimizer = build(args, len(data[2]))
        done = 0
        if args.load:
            done = load_checkpoint(args, models, optimizer)
        os.makedirs(args.out, exist_ok=True)
        if args.save:  # a path that can't be written is found now
            save_checkpoint(args.save, done, models, optimizer, args)
    except Exception as error:
        parser.error(" ".join(str(error).split()))
    return args, data, models, optimizer, done


def main(argv=None):
    args, (pairs, test, index), models, optimizer, done = parse(argv)
    size = sum(p.numel() for p in models[0].parameters()) / 1e6
    print(f"transformer | {size:.2f}M parameters | {args.device} | seed {args.seed}")
    pace, stop = train(models, optimizer, pairs, args, done, args.save)
    line = ""
    if not (stop or args.load or args.data):
        rival, its_optimizer = build(args, len(index), recurrent=True)
        its_pace, _ = train(rival, its_optimizer, pairs, args)
        accuracy, _, _ = evaluate(rival[1].module, test, index, args)
        line = f" | GRU {accuracy:.4f}, {its_pace / pace:.2f} times the time"
    model = models[1].module
    metric, src, tgt = evaluate(model, test, index, args)
    print(f"test exact match {metric:.4f}{line}")
    if not args.rank:
        draw_picture(f"{args.out}/transformer.png", model, src, tgt, index)
    return metric


if __name__ == "__main__":
    main()
