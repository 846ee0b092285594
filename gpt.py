"""GPT-2: a decoder-only transformer that learns tasks by predicting the next token of any text.

Paper    Language Models are Unsupervised Multitask Learners -- Alec Radford, Jeffrey Wu, Rewon
         Child, David Luan, Dario Amodei, Ilya Sutskever, OpenAI, February 2019 (GPT-2); and
         Improving Language Understanding by Generative Pre-Training -- Alec Radford, Karthik
         Narasimhan, Tim Salimans, Ilya Sutskever, OpenAI, June 2018 (GPT)
Idea     Predict the next token of a text. To do it well, a model must do whatever the text does:
         spell, count, translate, answer. So one plain loss on plain text teaches many tasks, and
         the text so far, the context, says which of them is asked for.
Figure   (GPT, Figure 1, with the norms moved as in GPT-2; one of `depth` blocks of the same form)

         ids (B, T) -- wte + wpe --> x (B, T, D)                              logits (B, T, V)
                                         |                                       ^
         +-------------------------------+                                       | lm_head = wte^T
         |                                                                      ln_f
         x -+---------------------------------> + -+---------------------> + -> next block, or end
            |                                   ^  |                       ^
           ln_1                                 | ln_2                     |
            |                                   |  |                       |
          c_attn: q, k, v (B, h, T, d)          |  c_fc, GELU (B, T, 4 D)  |
            |                                   |  |                       |
          softmax(mask(q k^T / sqrt(d))) v -- c_proj                    c_proj
Symbols  here | in the papers | what. In shapes: B sequences, T tokens, S keys, D = dim, d = D / h
         wte, wpe | W_e, W_p | embeddings of tokens (V, D) and of positions (context, D)
         h | transformer_block | the `depth` blocks. In shapes: h heads, V = the vocabulary's size
         x | h_l | the residual stream (B, T, D)    `context` | k | the most tokens it can look at
Differs  Tokens of the demo are bytes, not byte-pair codes: V = 256 in place of 50,257.
         The demo is small, to end in minutes: D = 64, 4 blocks, context 64, 6,000 steps of 8
         windows (GPT-2: up to 1600, 48, 1,024 and batches of 512). With as many bytes a step, a
         context of 256 learned more slowly than one of 128 (one seed, tests/RESULTS.md).
         A rate that rises to 5.7e-3 and falls, both linearly (GPT: 2.5e-4, falls as a cosine).
         No dropout (GPT: .1): the demo draws .8 times as many bytes as its text has.
Run      python gpt.py                       # Python's own library, 2.6 minutes of a core
         python gpt.py --data FILE           # the bytes of any file; its last tenth is the test
         torchrun --nproc-per-node 2 gpt.py  # the batch shared out between processes
Expect   nats per held-out byte, Python 3.11, 5 seeds: 1.440 +- .012, worst 1.462 | order-1, 3, 4
         counts: 2.467, 1.541, 1.473 | xz with the training text in front: 1.045 | paper, 1.5B
         parameters, enwik8, not trained on it: .64. It falls short: xz does better, and no
         induction head forms at this size (see 9.: a random string costs as much shown again).
"""

import argparse
import contextlib
import math
import os
import pathlib
import random
import re
import signal
import sys
import sysconfig

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import cat

# ================================ PART ONE: THE PAPER =================================

# ---- 1. One loss for all tasks (GPT-2, Section 2) ----
#
# A language model gives every text a probability. There are far too many texts to list, but any
# joint probability is a product of conditional ones (the chain rule):
#
#     p(s_1, ..., s_n) = p(s_1) p(s_2 | s_1) ... p(s_n | s_1, ..., s_(n-1))             (Eq. 1)
#
# So it is enough to predict the next token from those before it. Nothing is approximated here,
# and no label is needed: the text is its own answer.
#
# Why should this teach tasks? A task is p(output | input), and for many tasks p(output | input,
# task). Text can hold all three, one after the other: "translate to French: cheese =" is followed
# by "fromage", "Q: ... A:" by an answer. Then the task's objective is a part of Eq. 1, namely the
# factors of the output's tokens. A model with the least loss on all text has the least loss on
# these parts. So at the minimum it does the task, although nobody told it that there was one.
# Whether training gets near is the paper's question. After training, the task is asked for in the
# context, in words or by examples. No weight changes: the paper calls it zero-shot, even with
# examples (now: few-shot).
#
# GPT, a year before, still took the other way: it was pre-trained with the same loss, and then
# fine-tuned with the labels of each task, and .5 times this loss was added (GPT, Eq. 5).


def next_token_loss(logits, ids):
    """The mean of -log p(s_t | s_<t) in nats: logits (B, T, V) for ids (B, T + 1) -> loss ()."""
    # The logarithm turns Eq. 1's product into a sum, and the mean over tokens makes texts of
    # different lengths comparable. Logits at position t are judged by token t + 1 (_: a space):
    #
    #     ids          t  h  e  _  c  a
    #     read         t  h  e  _  c           ids[:, :-1] went into the model
    #     answers      h  e  _  c  a           ids[:, 1:]
    #
    # Forgetting to shift is the classic fault. Position t sees token t, so the loss falls to 0
    # within some steps, and what was learned is to copy.
    #
    # An untrained model spreads p over all V tokens: the loss starts at ln V, 10.82 for GPT-2's
    # 50,257 tokens and 5.55 for 256 bytes. Much more at the start says that something is wrong.
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


# ---- 2. Causal self-attention (GPT, Section 3.1, Eq. 2; from arXiv:1706.03762) ----
#
# How can position t use what stands before it? Each position asks a question, the query q_t, and
# every position s offers a key k_s, for being found, and a value v_s, for being read. The answer
# is a mean of values, and the weights say how well the keys fit the question. q, k and v are
# products of the position's row x_t with learned matrices (plus biases):
#
#     q_t = x_t W_q       k_t = x_t W_k       v_t = x_t W_v
#     score_ts = q_t . k_s / sqrt(d)       w_t = softmax(score_t1, ..., score_tt)
#     y_t = w_t1 v_1 + ... + w_tt v_t
#
# The softmax is over s <= t only. This mask is what makes the model a language model. With four
# tokens (x: may be seen):
#
#                       key   the  cat  sat  down
#     query     the            x    .    .    .        predicts "cat"
#               cat            x    x    .    .        predicts "sat"
#               sat            x    x    x    .        predicts "down"
#               down           x    x    x    x        predicts what follows
#
# Each row is a prediction from a prefix, as honest as if the rest of the text did not exist. So
# one pass over T tokens is T training examples, for the price of one. (A model that predicts a
# word in a gap from both sides, like BERT, only learns from the gaps.) If one dot were an x, a
# position could look up its own answer; the loss would be low and the samples rubbish.
#
# Position t may see itself: its token is given, and its answer is token t + 1. The mask holds for
# all blocks together. Each block reads positions up to t only, so after all of them x_t still
# knows tokens 1 to t only.
#
# Why 1 / sqrt(d)? Say that training has brought the numbers in q and k to mean 0 and variance 1,
# and that they are independent. Then each product q_i k_i has variance 1, and the sum of d of
# them has variance d. With d = 64 the scores would be of size 8, and e^8 is 3,000: the softmax
# would put most of the weight on one key. The surer the softmax is, the less it learns: the
# derivative of w_s by its own score, w_s (1 - w_s), goes to 0. Divided by sqrt(d), scores have
# variance 1 for every d.
#
# h heads do this side by side, each with d = D / h of the numbers. One head is one mean, so it
# can look for one thing; different heads look for different things.


def causal_mask(T, S, device):
    """(T, S), True where the query may see the key. The T queries are the last of S positions."""
    # With T = 2 new tokens behind 3 old ones, S = 5:     x x x x .
    #                                                     x x x x x
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_weights(q, k):
    """q (B, h, T, d), k (B, h, S, d) -> w (B, h, T, S): each row is >= 0 and sums to 1."""
    scores = q @ k.mT / math.sqrt(q.shape[3])  # (B, h, T, S)
    mask = causal_mask(*scores.shape[2:], q.device)
    # Minus infinity, and before the softmax: e^-inf is 0, and the others still sum to 1.
    return scores.masked_fill(~mask, -math.inf).softmax(-1)


class Conv1D(nn.Module):
    """x (..., D) -> x W + b (..., E), with W (D, E)."""

    # This is a linear layer. GPT-2's code wrote it as a convolution of width 1, and so its weight
    # is stored as W (D, E), while nn.Linear stores W^T (E, D). Files of GPT-2's weights keep
    # this, in four matrices of each block. Here W stays as stored. Code that uses nn.Linear must
    # transpose; if it forgets, c_attn fails, but c_proj of the attention is square: there it
    # loads without an error and is wrong.

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        # x @ W + b would go over the result once more. F.linear adds b on the way, and wants W^T.
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D), and the keys and values, for the tokens that follow."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = Conv1D(dim, 3 * dim)  # W_q, W_k and W_v side by side: one large product
        self.c_proj = Conv1D(dim, dim)  # mixes what the heads have found

    def qkv(self, x):
        """x (B, T, D) -> q, k, v, each (B, h, T, d)."""
        # The last axis of c_attn's result is q, k, v, and in each of them one head after another.
        x = self.c_attn(x).unflatten(2, (3, self.heads, -1))  # (B, T, 3, h, d)
        return x.permute(2, 0, 3, 1, 4)  # (3, B, h, T, d)

    def forward(self, x, past=None):
        q, k, v = self.qkv(x)
        mask = None
        if past:  # keys and values of the tokens before x, each (B, h, S - T, d)
            k = cat([past[0], k], 2)  # (B, h, S, d)
            v = cat([past[1], v], 2)
            mask = causal_mask(q.shape[2], k.shape[2], x.device)
        # The same as attention_weights(q, k) @ v, but the weights, T x S for each head, need not
        # all be in memory. PyTorch takes a mask or is_causal, not both.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)  # (B, h, T, d)
        y = y.transpose(1, 2).flatten(2)  # (B, T, D)  the heads side by side
        return self.c_proj(y), (k, v)


# ---- 3. The block (GPT, Eq. 2; GPT-2, Section 2.3) ----
#
# Attention moves information between positions; it is a mean of values, so by itself it computes
# little. The MLP computes, at each position alone, and holds two thirds of a block's weights.
# Both add their result to x:
#
#     x = x + attention(ln_1(x))
#     x = x + mlp(ln_2(x))
#
# x is called the residual stream: a row of D numbers for each position, which every part reads
# and adds to, and none replaces. Its gradient is the reason. The derivative of x + f(x) is
# 1 + f'(x): whatever f' is, one part of the gradient, the 1, reaches the first block unchanged.
#
# Layer norm (ln) brings the D numbers of a position to mean 0 and variance 1, and then scales and
# shifts each of them by learned numbers. So what a part reads has the same size at any depth.
#
# GPT had the layer norm behind the addition (post-norm): x = ln(x + f(x)). Then the 1 passes
# through one norm after the other, each of which rescales it, and deep models need small rates
# and long warm-ups. GPT-2 puts the norm in front of f (pre-norm). The stream itself is never
# normalised, so it grows with depth, and one last norm, ln_f, stands before the logits.


class MLP(nn.Module):
    """x (B, T, D) -> (B, T, D), each position by itself."""

    def __init__(self, dim):
        super().__init__()
        self.c_fc = Conv1D(dim, 4 * dim)
        self.c_proj = Conv1D(4 * dim, dim)

    def forward(self, x):
        # GELU is x Phi(x), with Phi the distribution function of a standard normal variable: a
        # ReLU whose corner is rounded. GPT-2 was trained with its approximation
        #
        #     .5 x (1 + tanh(sqrt(2 / pi) (x + .044715 x^3)))
        #
        # The two differ by up to .0005, so official weights want this one.
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4 D)
        return self.c_proj(x)


class Block(nn.Module):
    """x (B, T, D) -> (B, T, D), keys and values."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x, past=None):
        y, kv = self.attn(self.ln_1(x), past)
        x = x + y
        return x + self.mlp(self.ln_2(x)), kv


# ---- 4. The model (GPT, Eq. 2; GPT-2, Section 2.3 and Table 2) ----
#
#     h_0 = W_e[ids] + W_p         h_l = block(h_(l-1))         p = softmax(ln_f(h_n) W_e^T)
#
# Positions: attention is a mean over a set. Without W_p, what follows "dog bites man" and what
# follows "man bites dog" would find the same set of keys and values in the first block. So each
# place 0, 1, 2, ... has a vector of its own, learned like any weight. The price: a place beyond
# `context` has no vector, and never had any training. The model can't read longer texts, only the
# last `context` tokens of them.
#
# Tied head: W_e is used twice. Its row of a token is what the model reads, and also the direction
# in which x must point to predict that token. In the smallest model this saves
# 50,257 x 768 = 38.6 million of 163 million weights, and 124 million are left. As input, a row
# learns only when its token is read; as output, in every step.
#
# Initialisation: all matrices are drawn with a standard deviation of .02, biases are 0. But each
# of the 2 `depth` results is added to the stream. Sums of independent numbers add their
# variances: if each result has variance s^2, the stream has 2 depth s^2 in the end. With c_proj
# smaller by sqrt(2 depth), each result has s^2 / (2 depth), and the sum s^2, whatever the depth.
# GPT-2 writes 1 / sqrt(N), with N residual layers. A block has two of them, so N = 2 depth, and
# c_proj is the last matrix of each.
#
# The four published sizes (Table 2 prints 117M, 345M, 762M and 1542M; OpenAI's README later
# called these counts an error):
#
#     dim     depth    heads    parameters
#      768      12       12       124,439,808
#     1024      24       16       354,823,168
#     1280      36       20       774,030,080
#     1600      48       25     1,557,611,200


class GPT(nn.Module):
    """ids (B, T) -> logits (B, T, V) of the tokens that follow. Names and shapes are GPT-2's."""

    def __init__(self, vocab_size=50257, context=1024, dim=768, depth=12, heads=12):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, dim)
        self.wpe = nn.Embedding(context, dim)
        self.wte.weight.data *= 0.02  # nn.Embedding's own 1 puts the first loss far above ln V
        self.wpe.weight.data *= 0.02
        self.h = nn.ModuleList()
        for _ in range(depth):
            self.h.append(Block(dim, heads))
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.data /= math.sqrt(2 * depth)
        self.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # tied

    @classmethod
    def from_checkpoint(cls, path, heads=None):
        """Builds the model with the sizes that the state dict in the file shows, and loads it.

        path: a file of GPT-2's weights for PyTorch, or of torch.save(model.state_dict(), path),
        but not of --save. heads can't be seen in the weights: known for the four published
        widths, to be given for others.
        """
        file = torch.load(path, map_location="cpu", weights_only=True)
        weights = {}
        for name, value in file.items():
            # Prefixes that DataParallel, torch.compile and a model with a head leave.
            name = re.sub(r"^((module|_orig_mod|transformer)\.)+", "", name)
            # Some files hold the mask as if it were a weight: attn.bias is a triangle of ones.
            if not name.endswith((".attn.bias", ".attn.masked_bias")):
                weights[name] = value
        embedding = weights["wte.weight"]
        vocab_size, dim = embedding.shape
        weights.setdefault("lm_head.weight", embedding)  # tied: often left out
        if not heads:
            if dim not in (768, 1024, 1280, 1600):
                raise ValueError(f"{path} has width {dim}, no published one: give heads=")
            heads = dim // 64
        depth = sum(name.endswith("ln_1.weight") for name in weights)
        model = cls(vocab_size, len(weights["wpe.weight"]), dim, depth, heads)
        model.load_state_dict(weights)
        return model

    def forward(self, ids, cache=None, return_cache=False):
        """ids (B, T) -> logits (B, T, V). `cache` of a call before continues its sequence.

        cache: a list of (k, v), one for each block. With return_cache, the new one comes, too.
        """
        cache = cache or [None] * len(self.h)
        first = cache[0][0].shape[2] if cache[0] else 0
        end = first + ids.shape[1]
        if end > len(self.wpe.weight):
            raise ValueError(f"{end} tokens are more than the context")
        x = self.wte(ids) + self.wpe.weight[first:end]  # (B, T, D)
        new = []
        for block, past in zip(self.h, cache):
            x, kv = block(x, past)
            new.append(kv)
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        return (logits, new) if return_cache else logits

    # ---- 5. Writing a text ----
    #
    # Draw a token from the prediction at the last position, append it, and again. Done naively,
    # each new token costs a pass over the whole text.
    #
    # KV cache: a position sees only itself and what stands before it, in all blocks (see the mask
    # in 2.). So when a token is appended, nothing changes at the positions before: their x, and
    # the keys and values made of it, are what they were. Keys and values are kept, and a step
    # computes one position only: its query against all kept keys. Old queries are not kept: they
    # have had their answer.
    #
    # When the window is full, this ends. Dropping the oldest token would move all others one
    # place to the front, and the place is a part of x from the first block on (W_p): every key
    # and value would be another. There is no way but to compute them anew. So the last
    # context / 2 tokens, the new one among them, are read again, as places 0 to context / 2 - 1,
    # with a new cache. Then there is room for context / 2 tokens more. Reading all again each
    # step would give the full context, at one whole pass per token. Half is a compromise. With
    # context = 4:
    #
    #     in the cache    a b c d   |   d e    d e f    d e f g   |   g h    g h i    ...
    #     predicted          e           f       g         h           i       j
    #
    # A loop that goes on without a new cache has no W_p for place `context`. Code that lets
    # places run on anyway, or keeps old keys while places shift, writes rubbish from there on.

    @torch.no_grad()
    def generate(self, ids, n, temperature=1.0, top_k=None, generator=None, end_token=-1):
        """Appends n sampled tokens to ids (B, L).

        Each sees all before it until the window is full, then context / 2 to context tokens.
        temperature 0 takes the most likely token; top_k keeps only the k most likely. A row that
        has reached end_token is filled up with it; when all rows have, fewer than n are appended.
        end_token -1: none.
        """
        context = len(self.wpe.weight)
        ended = ids[:, :1] < 0  # (B, 1)  False for each row, since ids are never negative
        token = ids[:, -context:]
        cache = None
        for _ in range(n):
            if cache and cache[0][0].shape[2] == context:  # full
                token = ids[:, -context // 2 :]
                cache = None
            logits, cache = self(token, cache, return_cache=True)
            values, index = logits[:, -1].float().topk(top_k or logits.shape[2])  # (B, k)
            # Divided by a temperature below 1, differences of logits grow, and likely tokens
            # become more likely. Divided by (nearly) 0, the largest is infinitely far from the
            # second.
            p = F.softmax(values / max(temperature, 1e-6), -1)  # (B, k)
            token = index.gather(1, torch.multinomial(p, 1, generator=generator))  # (B, 1)
            token = token.masked_fill(ended, end_token)
            ended |= token == end_token
            ids = cat([ids, token], 1)
            if ended.all():
                break
        return ids


# ================================= PART TWO: THE DEMO =================================

# ---- 6. Data ----
#
# A text that is on every machine with Python: the files at the top of its standard library (no
# packages). Tokens are their bytes. A tenth of the files is held out for the test, of which at
# most 400,000 bytes are used. Other versions of Python have a slightly different text, and so
# slightly different figures.


def load_data(path):
    """`stdlib`, or any file -> the bytes to train on (N,), and held-out ones to test on (M,)."""
    if path == "stdlib":
        # [!_]: names with a _ in front are left out; one is a table that the build has written.
        files = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("[!_]*.py"))
        random.Random(0).shuffle(files)  # otherwise the test would be files of the letter a
        texts = [file.read_bytes() for file in files]
        cut = len(texts) // 10
        test = b"".join(texts[:cut])
        train = b"".join(texts[cut:])
    else:
        text = pathlib.Path(path).read_bytes()
        cut = len(text) * 9 // 10
        train, test = text[:cut], text[cut:]
    return torch.tensor(list(train)), torch.tensor(list(test[:400_000]))


def batch(args, text, step):
    """Windows (n, context + 1) of a text, by seed and step: a resumed run is exact."""
    g = torch.Generator().manual_seed(args.seed * 10_000_000_000 + step)
    start = torch.randint(len(text) - args.context, (args.batch_size, 1), generator=g)
    return text[start + torch.arange(args.context + 1)].to(args.device)


# ---- 7. Training ----
#
# Adam with a rate that rises first, and then falls to 0, as in GPT. All chance in a step comes
# from its number and the seed, so a run that was stopped and goes on from its checkpoint ends
# with the same weights.


def build(args):
    """A new model and its optimizer, always with the same first weights."""
    torch.manual_seed(args.seed)
    model = GPT(256, args.context, dim=64, depth=4, heads=4).to(args.device)
    # beta2 = .98: Adam's mean of squared gradients is over 50 steps. The default .999 has 1,000,
    # a sixth of this short training.
    return model, torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))


def train(model, optimizer, text, args, done):
    """Trains from step done + 1 to args.steps, or until Ctrl-C."""
    from tqdm import tqdm

    stop = []
    with contextlib.suppress(ValueError):  # a thread can't handle signals
        signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    for step in tqdm(range(done + 1, args.steps + 1), disable=args.rank > 0):
        ids = batch(args, text, step)[args.rank :: args.world]  # each process takes its share
        part = step / args.steps
        # It rises for the first 1/21 of the steps, to .95 of --lr, and then falls to 0.
        optimizer.param_groups[0]["lr"] = args.lr * min(20 * part, 1 - part)

        loss = next_token_loss(model(ids[:, :-1]), ids)
        optimizer.zero_grad()
        loss.backward()
        if args.world > 1:  # the mean over the equal shares is the gradient of the whole batch
            for p in model.parameters():
                dist.all_reduce(p.grad)
                p.grad /= args.world
        # Clipped to length 1: a rare odd batch would throw the weights far off. If a number in
        # the gradient is not finite, its length isn't either.
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise SystemExit(f"gpt.py: loss {loss} or its gradient not finite at step {step}")
        optimizer.step()

        if stop or step % 100 == 0 or step == args.steps:
            tqdm.write(f"step {step}/{args.steps} | loss {loss:.4f}")
            if args.save:
                save_checkpoint(args.save, step, model, optimizer, args)
        if stop:
            break
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def save_checkpoint(path, step, model, optimizer, args):
    """All that the next step depends on; the text comes from args.data again."""
    state = dict(
        script="gpt",
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
    if state["script"] != "gpt":
        raise ValueError(f"{args.load} is not a checkpoint of gpt.py")
    for name in ("data", "context", "seed", "batch_size", "lr"):  # else it would be another run
        if state["args"][name] != getattr(args, name):
            raise ValueError(f"{args.load} was trained with {name} = {state['args'][name]}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---- 8. Rivals: counting, and xz ----
#
# -log p of a text, in bits, is the size to which an ideal compressor with this model packs it. So
# nats per byte of a language model, of counted frequencies and of a compression program are one
# scale: 5.55 is no model at all, and less is better.


def frequencies(text, test):
    """Nats per byte of test (M,) from counts in text (N,), with 0, 1, ..., 4 bytes in front."""

    # Order k: k bytes in front. How often did byte x follow them? c(k bytes, x) / n(k bytes).
    # Long contexts are sharp but rare, and one that never occurred says nothing. So each order is
    # mixed with the one below, whose weight is the number u of different bytes seen after this
    # context (Witten and Bell): it counts how often something new has come here.
    #
    #     p_k(x) = (c + u p_(k-1)(x)) / (n + u)         p_(-1) = 1 / 256
    #
    def count(among, keys):
        values, n = among.unique(return_counts=True)
        i = torch.searchsorted(values, keys).clamp(max=len(values) - 1)
        return torch.where(values[i] == keys, n[i], 0)

    cut = len(text)
    text = cat([text, test])
    past = torch.zeros_like(text)  # the k bytes in front, read as one number
    p = torch.full(test.shape, 1 / 256)
    rivals = {}
    for k in range(5):
        pairs = 256 * past + text  # k + 1 bytes
        c = count(pairs[:cut], pairs[cut:])
        n = count(past[:cut], past[cut:])
        u = count(pairs[:cut].unique() // 256, past[cut:])
        p = torch.where(n > 0, (c + u * p) / (n + u), p)
        rivals[f"order-{k} frequencies"] = -p.log().mean().item()
        # (The very first bytes get the end of all as their past: a few among millions.)
        past += 256**k * text.roll(k + 1)
    return rivals


def xz(text, test):
    """Nats per byte of test when xz has text in front of it: what the test adds to the size."""
    import lzma

    def size(x):
        # Preset 9 remembers the last 64 MB, so it can refer to any passage of the text.
        return len(lzma.compress(bytes(x.tolist()), preset=9))

    return (size(cat([text, test])) - size(text)) * math.log(256) / len(test)


# ---- 9. In-context learning (GPT-2, Sections 3.6 to 3.8; the name is GPT-3's) ----
#
# No weight changes after training, and yet predictions get better along the context: it says what
# kind of text this is and which names occur. Two measures of it. First, the loss at each
# position. Counts of order 4 gain nothing after 4 bytes. What the model gains further on comes
# from the longer context. Second, a string that can't be known: random letters, which cost
# ln 26 = 3.26 nats each or more. Shown a second time right behind the first, they can be copied.
#
# Copying takes two heads, one after the other. The first writes into every position which token
# stood before it. The second, in a later block, is the induction head (arXiv:2209.11895). At x it
# asks: whose predecessor was x? In ".. x y .. x" this is y. Its value says "y", and y is
# predicted.
#
# The second head can't work before the first does. After the demo's training there is a first one
# (.4 of its weight is on the byte before, seed 4), and not yet a second: the second showing costs
# as much as the first.


def repeats():
    """64 strings of 24 random letters, each shown twice -> ids (64, 48)."""
    g = torch.Generator().manual_seed(0)
    once = torch.randint(97, 123, (64, 24), generator=g)  # a to z
    return cat([once, once], 1)


@torch.no_grad()
def find_head(model, ids, back):
    """The head that looks most at the place `back` places ago, for ids (n, T).

    -> its name, its mean weight there, and its map (T, T) of the first string. Equal weights
    would give .03 here. There is always a best head: only a weight far above .03 says that it
    does this.
    """
    best = ("", -1.0, None)
    x = model.wte(ids) + model.wpe.weight[: ids.shape[1]]  # (n, T, D)
    for i, block in enumerate(model.h):
        q, k, _ = block.attn.qkv(block.ln_1(x))
        w = attention_weights(q, k)  # (n, h, T, T)
        looks = w.diagonal(-back, 2, 3)[..., -24:]  # (n, h, 24)  queries of the second showing
        weight, head = looks.mean((0, 2)).max(0)
        if weight > best[1]:
            best = (f"layer {i + 1}, head {head + 1}, {back} back", weight, w[0, head].cpu())
        x, _ = block(x)
    return best


@torch.no_grad()
def losses(model, windows):
    """-log p of every token but the first: windows (n, T + 1) -> (n, T)."""
    parts = []
    for ids in windows.split(64):
        logits = model(ids[:, :-1]).mT  # (n, V, T)
        parts.append(F.cross_entropy(logits, ids[:, 1:], reduction="none").cpu())
    return cat(parts)


# ---- 10. Evaluation and picture ----
#
# The test text is read in windows. Each starts half a window after the one before, and its second
# half is judged. So each byte counts once, except some at both ends, and sees more than half a
# context.


def evaluate(model, text, test, args):
    """Prints a sample and all figures -> nats per byte, and what the picture shows."""
    newline = torch.full((1, 1), 10, device=args.device)
    sample = bytes(model.generate(newline, 400)[0].tolist()).decode(errors="replace")
    print(sample)

    ids = repeats().to(args.device)
    # Tokens 2 to 24, then 25 to 47 (from 0). Token 24 starts the second showing: nothing says yet
    # that the string comes again, so it can't be copied.
    once, again = losses(model, ids)[:, 1:].mean(0).split(23)  # (23,) each
    print(f"random letters {once.mean():.3f} (at best 3.258), shown again {again.mean():.3f}")
    # Copying's two heads: the byte before is 1 back, what followed last time 24 - 1 = 23 back.
    heads = [find_head(model, ids, 1), find_head(model, ids, 23)]
    for name, weight, _ in heads:
        print(f"{name}: weight {weight:.3f}")

    stride = args.context // 2
    loss = losses(model, test.unfold(0, args.context + 1, stride).to(args.device))  # (n, context)
    nats = loss[:, -stride:].mean().item()
    loss = loss.mean(0)
    print(f"loss at position 1 {loss[0]:.3f}, at the last {loss[-1]:.3f}")
    rivals = frequencies(text, test)
    rivals["xz"] = xz(text, test)
    line = f"test nats per byte {nats:.4f}"
    for name in rivals:
        line += f" | {name} {rivals[name]:.4f}"
    print(line)
    return nats, (loss, rivals, heads, sample)


def draw_picture(path, loss, rivals, heads, sample):
    """The loss by position, two heads that copying needs, and what the model writes."""
    # How to read the maps: row t shows where position t looks, among the places up to t (the
    # mask). The string is 24 random letters, twice. A head that looks at the byte before shows a
    # line right below the diagonal. An induction head shows a line from row 24, column 1, down to
    # the right, 23 places below the diagonal. A bright column or an even surface means that it
    # has not formed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.5), layout="constrained")
    left, *maps, right = figure.subplots(1, 4)
    left.plot(range(1, len(loss) + 1), loss, label="GPT")
    for name in rivals:
        left.plot([1, len(loss)], [rivals[name]] * 2, label=name)
    left.set(title="nats per byte", xlabel="bytes seen", xscale="log")
    left.legend()
    for panel, (name, _, weights) in zip(maps, heads):
        panel.imshow(weights, "magma")
        panel.set(title=name, xlabel="looks at", ylabel="position")
    right.set_title("It writes")
    right.axis("off")
    sample = re.sub(r"[^\n -~]", "?", sample)
    right.text(
        0, 1, sample, family="monospace", size=7, va="top", parse_math=False, in_layout=False
    )
    figure.savefig(path, dpi=120)


# ---- 11. Command line ----
#
# What has no flag is a number in `build` or `train`: whoever wants another one edits it.


def parse(argv):
    """-> arguments, both texts, model, optimizer, steps done. Bad input ends here."""
    parser = argparse.ArgumentParser(description="GPT-2: a byte model of a text")
    flag = parser.add_argument
    flag("--data", default="stdlib", help="stdlib, or any file: its last tenth is the test")
    flag("--context", type=int, default=64, help="bytes the model can look at (paper: 1024)")
    flag("--steps", type=int, default=6000)
    flag("--batch-size", type=int, default=8, help="windows, of all processes (paper: 512)")
    flag("--lr", type=float, default=6e-3, help="learning rate, .95 of it at peak (GPT: 2.5e-4)")
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
        import lzma, matplotlib.figure, tqdm  # noqa: E401, F401, I001  missing ones show now

        if args.steps < 1 or not 0 < args.lr < 10:
            raise ValueError("--steps must be at least 1, --lr in (0, 10)")
        if args.batch_size < 1 or args.batch_size % args.world:
            raise ValueError("--batch-size must be a positive multiple of the process count")
        text, test = load_data(args.data)
        if args.quick:
            text, test = text[:20_000], test[:2_000]
        if not 48 <= args.context < len(test):  # 48: 24 letters, twice
            raise ValueError(f"--context must be from 48 to {len(test) - 1} (the test's length)")
        if args.world > 1:
            dist.init_process_group()  # gloo for CPUs, nccl for GPUs
            if args.device == "cuda":
                args.device = f"cuda:{args.rank}"
        model, optimizer = build(args)
        done = load_checkpoint(args, model, optimizer) if args.load else 0
        os.makedirs(args.out, exist_ok=True)
        if args.save:  # a path that can't be written is found now
            save_checkpoint(args.save, done, model, optimizer, args)
    except Exception as error:
        parser.error(" ".join(str(error).split()))
    return args, text, test, model, optimizer, done


def main(argv=None):
    args, text, test, model, optimizer, done = parse(argv)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"gpt | {size:.2f}M parameters | {args.device} | seed {args.seed}", end=" | ")
    print(f"{args.data} {len(text)}/{len(test)} bytes")
    train(model, optimizer, text, args, done)
    metric, shown = evaluate(model, text, test, args)
    if not args.rank:
        draw_picture(f"{args.out}/gpt.png", *shown)
    return metric


if __name__ == "__main__":
    main()
