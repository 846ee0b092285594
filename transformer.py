"""Transformer: sequence to sequence by attention alone, without recurrence or convolution.

Paper    Attention Is All You Need -- Ashish Vaswani, Noam Shazeer, Niki Parmar, Jakob Uszkoreit,
         Llion Jones, Aidan N. Gomez, Lukasz Kaiser, Illia Polosukhin, June 2017, arXiv:1706.03762v7
Idea     A recurrent network hands what it read along a chain, a step per token. Here each token
         looks at all others at once, by a softmax over dot products: any two are one step apart,
         and all positions train in parallel. Sinusoids tell the positions apart.
Figure   (Figure 1; each box is post-norm: LayerNorm(x + Sublayer(x)), once per line)

         src (B, S)                                tgt (B, T), begins with <bos>
         embedding * sqrt(d) + PE                  the same matrix * sqrt(d) + PE
             | (B, S, d)                               | (B, T, d)
         +---+-----------------+               +-------+-------------------------+
         | self-attention      |               | causal self-attention           |
         | feed-forward        | x N           | cross-attention, S keys, values | x N
         +---+-----------------+               | feed-forward                    |
             | memory (B, S, d) -------------> +-------+-------------------------+
                                                       | (B, T, d)
                                               the same matrix, transposed -> logits (B, T, V)
Symbols  q, k, v | Q, K, V | queries (B, h, T, d_k), keys and values (B, h, S, d_k)
         num_heads | h | heads, d_k = d_v = d_model / h    sinusoids | PE | positions
         num_layers | N | layers per side                  eps | eps_ls | label smoothing
         S, T, V | - | source and target length, pieces    alpha | alpha | length penalty
Differs  W_q to W_o have biases, as everywhere by now, and Glorot's initialisation; the paper has no
         biases and gives no initialisation. (Dropout: as in Section 5.4; torch.nn has two more.)
         Tokens are characters (dates) or lower-case words, not byte pairs; 64 pairs are a batch.
         Beam search ends when nothing can overtake the best output; the paper gives no rule.
         The demo is small (d_model 64, N = 2, warm-up 400, 2,500 steps) and averages
         weights 50 steps apart, not 10 minutes, as it has to end in minutes.
         LanguageModel and Classifier are later uses of the layers; the paper has neither.
Run      python transformer.py                         # dates to ISO, about 3 minutes on one core
         python transformer.py --data pairs.tsv        # source TAB target; 50 minutes of one core
         python transformer.py --task lm --data FILE   # characters of a text
         python transformer.py --task classify         # digits as 64 tokens
Expect   dates: 1.0000 +- .0000 of 2,000 unseen days exact (seeds 0-2) | copying: 0.07
         29,000 German-English captions (Multi30k), seed 0: test BLEU 37.7 (lower case, sacrebleu;
         copying 0.8) after 6.6 passes.
         lm, tinyshakespeare, seed 0: 1.745 nats a character | nanoGPT at this size and budget 1.88
"""

import argparse
import collections
import datetime
import math
import os
import random
import re
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Attention (Section 3.2) ----


def scaled_dot_product_attention(q, k, v, mask=None) -> tuple[Tensor, Tensor]:
    """Eq. 1 in full: q (.., T, d_k), k (.., S, d_k), v (.., S, d_v) -> (.., T, d_v), weights.

    mask, broadcast to (.., T, S): True where a query may look. One that may look nowhere gets 0.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (.., T, S); unscaled, they saturate
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    least = torch.finfo(scores.dtype).min  # -inf would make NaN of a row that sees nothing
    weights = scores.masked_fill(~mask, least).softmax(-1).masked_fill(~mask, 0.0)
    return weights @ v, weights  # Eq. 1


class MultiHeadAttention(nn.Module):
    """h attentions side by side, each in its own d_model / h dimensions (Section 3.2.2)."""

    def __init__(self, d_model: int = 512, num_heads: int = 8):
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"d_model {d_model} is no multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x, memory=None, key_mask=None, causal=False, cache=None, weights=None):
        """x (B, T, d) looks at memory (B, S, d), or at itself if that is None -> (B, T, d).

        key_mask (B, S): False on padding, which nobody sees. causal: position t sees none after t.
        cache: a dict, empty at first, for all layers. Self-attention appends its keys and values,
        so that x holds only positions not seen yet; cross-attention computes those of memory once.
        weights: a list that gets the attention weights (B, h, T, S), from the unfused Eq. 1.
        """
        split = self.num_heads, -1  # (B, ., d) -> (B, ., h, d_k) -> (B, h, ., d_k)
        q = self.W_q(x).unflatten(2, split).transpose(1, 2)
        name, source = (self, memory is None), x if memory is None else memory
        kv = cache.get(name) if cache else None
        if kv is None or memory is None:
            new = [W(source).unflatten(2, split).transpose(1, 2) for W in (self.W_k, self.W_v)]
            kv = new if kv is None else [torch.cat(pair, 2) for pair in zip(kv, new)]
        if cache is not None:
            cache[name] = kv
        (k, v), T, S = kv, x.shape[1], kv[0].shape[2]
        mask, causal = None if key_mask is None else key_mask[:, None, None], causal and T > 1
        if causal and (S > T or mask is not None or weights is not None):
            past = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
            mask, causal = past if mask is None else past & mask, False
        if weights is None:  # the same in one kernel, which never stores the (T, S) weights
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        else:
            y, w = scaled_dot_product_attention(q, k, v, mask)
            weights.append(w)
        return self.W_o(y.transpose(1, 2).flatten(2))  # (B, T, d): the heads side by side


# ---- 2. Layers (Sections 3.1, 3.3 to 3.5, Figure 1) ----


class PositionwiseFeedForward(nn.Module):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, the same at every position (Eq. 2)."""

    def __init__(self, d_model: int = 512, d_ff: int = 2048):
        super().__init__()
        self.W_1, self.W_2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.W_2(F.relu(self.W_1(x)))  # Eq. 2


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, (B, T, d) -> (B, T, d). With causal=True a GPT's layer."""

    def __init__(self, d_model=512, num_heads=8, d_ff=2048, dropout=0.1, norm_first=False):
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, num_heads)
        self.ffn = PositionwiseFeedForward(d_model, d_ff)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout, self.norm_first = nn.Dropout(dropout), norm_first

    def residual(self, x, norm, sublayer, *args):
        if self.norm_first:  # pre-norm: the sum itself is never normalised, but for once at the top
            return x + self.dropout(sublayer(norm(x), *args))
        return norm(x + self.dropout(sublayer(x, *args)))  # LayerNorm(x + Sublayer(x)), Section 3.1

    def forward(self, x, key_mask=None, causal=False, cache=None, weights=None):
        x = self.residual(x, self.norm1, self.self_attn, None, key_mask, causal, cache, weights)
        return self.residual(x, self.norm2, self.ffn)


class DecoderLayer(EncoderLayer):
    """The same with cross-attention between the two: x (B, T, d), memory (B, S, d) -> (B, T, d)."""

    def __init__(self, d_model=512, num_heads=8, d_ff=2048, dropout=0.1, norm_first=False):
        super().__init__(d_model, num_heads, d_ff, dropout, norm_first)
        self.cross_attn, self.norm3 = MultiHeadAttention(d_model, num_heads), nn.LayerNorm(d_model)

    def forward(self, x, memory, memory_mask=None, cache=None, weights=None):
        """memory_mask (B, S): False on padding. weights: a list for the cross-attention's."""
        x = self.residual(x, self.norm1, self.self_attn, None, None, True, cache)
        cross = memory, memory_mask, False, cache, weights
        x = self.residual(x, self.norm2, self.cross_attn, *cross)
        return self.residual(x, self.norm3, self.ffn)


class Stack(nn.Module):
    """N equal layers on x (B, T, d); every layer gets all other arguments."""

    def __init__(
        self, layer, d_model, dropout, num_layers=6, num_heads=8, d_ff=2048, norm_first=False
    ):
        super().__init__()
        sizes = d_model, num_heads, d_ff, dropout, norm_first
        self.layers = nn.ModuleList(layer(*sizes) for _ in range(num_layers))
        # post-norm layers end with a norm and need none on top; nn.Transformer has one all the same
        self.norm = nn.LayerNorm(d_model) if norm_first else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, x, *args):
        for layer in self.layers:
            x = layer(x, *args)
        return self.norm(x)


def sinusoids(pos: Tensor, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i / d_model)), PE(pos, 2i + 1) its cosine: (T, d_model)."""
    angle = pos[:, None] / 10000 ** (torch.arange(0, d_model, 2) / d_model)  # (T, d_model / 2)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)[:, :d_model]


class Embedding(nn.Embedding):
    """Tokens times sqrt(d_model), plus positions (Sections 3.4, 3.5): (B, T) -> (B, T, d)."""

    def __init__(self, vocab_size: int, d_model: int = 512, dropout: float = 0.1):
        super().__init__(vocab_size, d_model)
        nn.init.normal_(self.weight, std=d_model**-0.5)  # times sqrt(d_model): as large as PE
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, cache: dict | None = None, start: int = 0) -> Tensor:
        """start: the position of the first of the ids, unless a cache knows."""
        if cache:  # its first entry is the self-attention of the first layer
            start = next(iter(cache.values()))[0].shape[2]
        x, pos = super().forward(ids), torch.arange(start, start + ids.shape[1])
        return self.dropout(x * math.sqrt(x.shape[2]) + sinusoids(pos, x.shape[2]).to(x))


# ---- 3. The Transformer (Figure 1) and its decoding (Section 6.1) ----


class Transformer(nn.Module):
    """Source ids (B, S), target ids (B, T) -> logits (B, T, V). The defaults are the base model's.

    Padding (pad_id) stands on the right; targets begin with bos_id and end with eos_id. Decoding
    takes the model as it is: call eval() first, or dropout goes on.
    """

    def __init__(
        self, vocab_size=37000, d_model=512, num_layers=6, num_heads=8, d_ff=2048, dropout=0.1,
        norm_first=False, pad_id=0, bos_id=1, eos_id=2,
    ):  # fmt: skip
        super().__init__()
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        self.embedding = Embedding(vocab_size, d_model, dropout)  # for source, target and output
        sizes = d_model, dropout, num_layers, num_heads, d_ff, norm_first
        self.encoder, self.decoder = Stack(EncoderLayer, *sizes), Stack(DecoderLayer, *sizes)

    def encode(self, src: Tensor) -> tuple[Tensor, Tensor]:
        """src (B, S) -> memory (B, S, d), its mask (B, S): False on padding."""
        mask = src != self.pad_id
        return self.encoder(self.embedding(src), mask), mask

    def decode(self, tgt, memory, memory_mask, cache=None, weights=None) -> Tensor:
        """tgt (B, T) -> logits (B, T, V); row t, which sees tgt up to t, scores token t + 1.

        With a cache (a dict, empty at first), tgt holds only the tokens since the last call.
        Padding of tgt needs no mask: it stands on the right, where the causal mask hides it.
        """
        x = self.decoder(self.embedding(tgt, cache), memory, memory_mask, cache, weights)
        return F.linear(x, self.embedding.weight)

    def forward(self, src: Tensor, tgt: Tensor, weights: list | None = None) -> Tensor:
        """weights: a list that gets each decoder layer's cross-attention (B, h, T, S)."""
        return self.decode(tgt, *self.encode(src), weights=weights)

    def greedy(self, src: Tensor, extra: int = 50, use_cache: bool = True) -> Tensor:
        """The likeliest token, again and again: src (B, S) -> ids (B, T), as one beam does it."""
        return self.beam_search(src, 1, 0.0, extra, use_cache)[0]

    @torch.no_grad()
    def beam_search(self, src, beam=4, alpha=0.6, extra=50, use_cache=True):
        """Looks for the highest log P / ((5 + length) / 6)^alpha -> ids (B, T), scores (B,).

        `beam` unended outputs live per source. A source is done when none of them can overtake its
        best ended one: log P only falls, so ending now with the longest length is their bound.
        """
        (memory, mask), cache = self.encode(src), {} if use_cache else None
        if not mask.any(1).all() or mask.numel() == 0:
            raise ValueError("a source is empty: there is nothing to translate")
        limit = mask.sum(1) + extra  # the longest output of each source (B,)
        B, K, rows = len(src), beam, torch.arange(len(src), device=src.device)[:, None]
        memory, mask = memory.repeat_interleave(K, 0), mask.repeat_interleave(K, 0)
        ids = src.new_full((B, K, 1), self.bos_id)
        score = torch.full((B, K), -math.inf, device=src.device)
        best, best_score = src.new_empty(B, 0), score[:, 0].clone()
        score[:, 0] = 0.0  # the K beams begin as equals: only one of them may count
        for t in range(1, int(limit.max()) + 1):
            new = ids.flatten(0, 1)[:, -1 if use_cache else 0 :]
            logits = self.decode(new, memory, mask, cache)[:, -1].float()
            logits[:, [self.pad_id, self.bos_id]] = -math.inf  # an output holds neither
            log_p = score[..., None] + logits.log_softmax(-1).unflatten(0, (B, K))  # (B, K, V)
            top, index = log_p.flatten(1).topk(2 * K)  # if K of these end, K can go on
            parent, token = index // log_p.shape[2], index % log_p.shape[2]  # (B, 2K)
            longer = torch.cat([ids[rows, parent], token[..., None]], 2)  # (B, 2K, t + 1)
            ends = (token == self.eos_id) | (t >= limit)[:, None]
            ended = top.masked_fill(~ends, -math.inf)[:, :K] / ((5 + t) / 6) ** alpha
            value, which = ended.max(1)
            better, best = (value > best_score)[:, None], F.pad(best, (0, 1), value=self.pad_id)
            best = torch.where(better, longer[rows[:, 0], which, 1:], best)
            best_score = torch.maximum(value, best_score)
            score, keep = top.masked_fill(ends, -math.inf).topk(K)  # (B, K)
            if (best_score >= score[:, 0] / ((5 + limit) / 6) ** alpha).all():
                break
            ids, chosen = longer[rows, keep], (rows * K + parent.gather(1, keep)).flatten()
            for (attn, own), kv in cache.items() if use_cache else ():
                if own:  # a beam's past is its parent's; the memory is the same for all beams
                    cache[attn, own] = [a[chosen] for a in kv]
        return best, best_score


# ---- 4. Two more uses of the layers: language model and classifier ----


class LanguageModel(nn.Module):
    """A decoder on its own: ids (B, T) -> logits (B, T, V) of the next token; one tied matrix.
    sizes: num_layers=6, num_heads=8, d_ff=2048, norm_first=False, here as in the Classifier."""

    def __init__(self, vocab_size: int, d_model: int = 512, dropout: float = 0.1, **sizes):
        super().__init__()
        self.embedding = Embedding(vocab_size, d_model, dropout)
        self.decoder = Stack(EncoderLayer, d_model, dropout, **sizes)

    def forward(self, ids: Tensor, weights: list | None = None, cache: dict | None = None):
        """With a cache, ids are the tokens since the last call; weights as in EncoderLayer."""
        x = self.decoder(self.embedding(ids, cache), None, True, cache, weights)
        return F.linear(x, self.embedding.weight)

    @torch.no_grad()
    def generate(self, ids, n: int, temperature=1.0, generator=None) -> Tensor:
        """Appends n sampled tokens to ids (B, T), T > 0; temperature 0 takes the likeliest."""
        cache, new = {}, ids
        for _ in range(n):
            p = F.softmax(self(new, None, cache)[:, -1].float() / max(temperature, 1e-6), -1)
            new = p.multinomial(1, generator=generator) if temperature else p.argmax(-1, True)
            ids = torch.cat([ids, new], 1)
        return ids


class Classifier(nn.Module):
    """Encoder with a learned <cls> token in front, read by an MLP: (B, T) -> (B, num_classes)."""

    def __init__(self, vocab_size, num_classes, d_model=512, dropout=0.1, pad_id=0, **sizes):
        super().__init__()
        self.pad_id, self.embedding = pad_id, Embedding(vocab_size, d_model, dropout)
        self.cls = nn.Parameter(torch.randn(1, 1, d_model))
        self.encoder = Stack(EncoderLayer, d_model, dropout, **sizes)
        mlp = nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, num_classes)
        self.head = nn.Sequential(*mlp)

    def forward(self, ids: Tensor, weights: list | None = None) -> Tensor:
        """weights: a list that gets each layer's (B, h, 1 + T, 1 + T); row 0 is that of <cls>."""
        x = torch.cat([self.cls.expand(len(ids), -1, -1), self.embedding(ids, start=1)], 1)
        mask = F.pad(ids != self.pad_id, (1, 0), value=True)
        return self.head(self.encoder(x, mask, False, None, weights)[:, 0])


# ---- 5. Loss and learning rate (Sections 5.3 and 5.4) ----


def label_smoothing_loss(logits, target, eps: float = 0.1, pad_id: int = 0) -> Tensor:
    """Cross-entropy of logits (.., V) with (1 - eps) one-hot + eps / V of target (..).

    The mean is over targets that are not padding. Its least value is the mixture's entropy, not 0.
    """
    logits, target = logits.flatten(0, -2), target.flatten()
    return F.cross_entropy(logits, target, ignore_index=pad_id, label_smoothing=eps)


def learning_rate(step: int, d_model: int = 512, warmup: int = 4000) -> float:
    """Eq. 3, step = 1, 2, ..: linear up to (d_model warmup)^-0.5, then falling as step^-0.5."""
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


# ---- 6. The demo: data as ids, training, evaluation, picture ----


def spell(date: datetime.date, rng: random.Random) -> str:
    """One of fourteen ways to write a date, in one of three cases. The weekday is of no use."""
    d, nth = date.day, {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
    forms = f"{d} %B %Y|%B {d}, %Y|{d} %b %Y|%b {d} %Y|%A, {d} %B %Y|%a {d} %b %Y|%Y, {d} %B|"
    forms += f"the {d}N of %B, %Y|%B {d}N, %Y|%A the {d}N of %b %Y|%d.%m.%Y|%m/%d/%Y|%Y-%m-%d|"
    form = rng.choice(f"{forms}in %Y on %b {d}N".split("|")).replace("N", nth.get(d, "th"))
    return rng.choice([str, str.lower, str.upper])(date.strftime(form))


def load_data(args, pieces=None):
    """-> {part: (inputs, outputs)}, the piece of each id, the lines of the test part."""

    def read(path):
        with open(path, encoding="utf-8") as file:
            pairs = [[s.strip() for s in line.split("\t")] for line in file if line.strip()]
        good = [pair for pair in pairs if len(pair) == 2 and all(pair)]
        if not len(good) > 0.99 * len(pairs):  # a stray tab among thousands must not end the run
            raise ValueError(f"{path} is not lines of source TAB target")
        if len(good) < len(pairs):
            what = f"{len(pairs) - len(good)} of {len(pairs)} lines are not source TAB target"
            print(f"transformer.py: {path}: {what}: left out", file=sys.stderr)
        return good[: 400 if args.quick else None]

    def cut(line):  # characters; or words and signs, each with the space before it
        return re.findall(r" ?\w+| ?[^\w\s]", " " + line.lower()) if words else list(line)

    words, L, n = args.kind == "pairs", args.length, 64 if args.quick else 2000
    if args.kind == "classify":  # tokens 1 to 17 are the grey levels of 8 x 8 images, row by row
        from sklearn.datasets import load_digits

        x, y = (torch.from_numpy(a).long() for a in load_digits(return_X_y=True))
        parts = {"train": slice(1197), "val": slice(1197, 1297), "test": slice(1297, None)}
        return {k: (x[part] + 1, y[part, None]) for k, part in parts.items()}, [""] * 18, None
    if args.kind == "lm":
        with open(args.data, encoding="utf-8", newline="") as file:
            text = file.read()
        if len(text) < 20 * L:
            raise ValueError(f"{args.data} has {len(text)} characters, too few for --length {L}")
        lines = {"train": [text[: len(text) * 9 // 10]], "val": [text[len(text) * 9 // 10 :]]}
    elif words:
        lines = {"train": read(args.data)}
        for part, path in (("test", args.test), ("val", args.val)):
            n = min(1000, len(lines["train"]) // 10)  # without a file of its own, the last tenth
            lines[part] = read(path) if path else lines["train"][-n:]
            lines["train"] = lines["train"][: None if path else -n]
    else:  # no day of the test part is in another part, in whatever spelling
        rng, start = random.Random(args.seed), datetime.date(1900, 1, 1).toordinal()
        days = rng.sample(range(start, start + 73049), 20 * n)  # of the years 1900 to 2099
        lines = [(spell(day, rng), str(day)) for day in map(datetime.date.fromordinal, days)]
        lines = {"test": lines[:n], "val": lines[n : 2 * n], "train": lines[2 * n :]}
    if pieces is None:  # from the training part alone; words seen once are too rare to be learnt
        count = collections.Counter(p for line in lines["train"] for s in line for p in cut(s))
        pieces = ["", "", "", " <unk>", *(p for p, n in count.most_common() if n > words)]
    index, parts = {p: i for i, p in enumerate(pieces)}, {}
    for part, pairs in lines.items():
        if args.kind == "lm":  # windows of a text, and the same one character on
            ids = torch.tensor([index.get(p, 3) for p in pairs[0]])
            ids = ids.unfold(0, L + 1, 1 if part == "train" else L)
            parts[part] = parts["test"] = ids[:, :-1], ids[:, 1:]
        else:
            x, y = ([[index.get(p, 3) for p in cut(s)] for s in side] for side in zip(*pairs))
            parts[part] = [torch.tensor([*s, 2]) for s in x], [torch.tensor([1, *s, 2]) for s in y]
    return parts, pieces, lines.get("test")


def pick(part, rows, args):
    """Rows of a part, padded -> the model's inputs, what it should say."""
    x, y = (nn.utils.rnn.pad_sequence([a[i] for i in rows], True).to(args.device) for a in part)
    return ((x, y[:, :-1]), y[:, 1:]) if args.task == "translate" else ((x,), y)


def train(model, optimizer, data, args, state) -> bool:
    """Goes on from state["step"] to args.steps. Returns whether Ctrl-C ended it before."""
    from tqdm import tqdm

    rank, world, stop, stopped = args.rank, args.world, [], False
    first, n, t0 = state["step"], len(data["train"][0]), time.time()
    if world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    lengths = torch.tensor([len(x) for x in data["train"][0]] if args.task == "translate" else [0])
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    for step in tqdm(range(first + 1, args.steps + 1), disable=rank > 0 or None):
        torch.manual_seed(args.seed * 10**9 + step)  # for the batch, and for dropout
        rows = torch.randint(n, (args.batch_size,))
        if args.task == "translate":  # sentences of about one length: less of a batch is padding
            rows = (lengths + 5 * torch.rand(n)).argsort()[(rows[0] + torch.arange(len(rows))) % n]
        inputs, target = pick(data["train"], rows, args)
        if world > 1:  # a process's share, weighted by its part of the target tokens
            torch.manual_seed(args.seed * 10**9 + step + rank * 10**8)  # for a dropout of its own
            tokens = (target != args.pad).sum()
            *inputs, target = (t[rank::world] for t in (*inputs, target))
        loss = label_smoothing_loss(model(*inputs), target, args.smoothing, args.pad)
        loss = loss * world * (target != args.pad).sum() / tokens if world > 1 else loss
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.size[0], args.warmup)  # Eq. 3
        optimizer.zero_grad(); loss.backward()  # fmt: skip
        now = torch.stack([loss.detach(), loss.new_tensor(float(len(stop)))])
        if world > 1:  # means over the processes: the whole batch's
            for t in (now, *(p.grad for p in model.parameters())):
                dist.all_reduce(t.div_(world))
        loss, stopped = now.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}")
        optimizer.step()
        state["step"] = step
        if step % args.keep_every == 0:  # Section 6.1: the last 5 checkpoints will be averaged
            kept = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            state["kept"] = [*state["kept"], kept][-5:]
        if rank == 0 and (stopped or step % args.log_every == 0 or step == args.steps):
            scores = evaluate(model, data["val"], args, 512)
            state["history"].append((step, loss, *scores))
            now = "loss {:.4f} | val nats {:.4f} acc {:.3f} all right {:.3f}".format(loss, *scores)
            ms = (time.time() - t0) / (step - first) * 1e3
            tqdm.write(f"step {step:5d}/{args.steps} | {now} | {ms:.0f} ms/step")
            if args.save:  # beside its place, then moved there: a crash leaves the old one
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                out = {**state, "script": "transformer", "args": vars(args)}
                torch.save(out, args.save + ".tmp")
                os.replace(args.save + ".tmp", args.save)
        if stopped:
            break
    if world > 1:
        dist.destroy_process_group()
    return bool(stopped)


@torch.no_grad()
def evaluate(model, part, args, most=None) -> list[float]:
    """-> nats per target token, share of tokens right, share of rows with all tokens right.

    The right tokens are fed in; yet a row is all right exactly where greedy decoding gets it right.
    """
    found, training = [], model.training
    model.eval()
    for rows in torch.arange(len(part[0]))[:most].split(64):
        inputs, target = pick(part, rows, args)
        logits, real = model(*inputs).view(*target.shape, -1), target != args.pad
        hit = logits.argmax(-1) == target
        nats = F.cross_entropy(logits[real], target[real], reduction="none")
        found.append((nats, hit[real].float(), (hit | ~real).all(1).float()))
    model.train(training)
    return [torch.cat(scores).mean().item() for scores in zip(*found)]


def report(model, data, pieces, lines, args) -> tuple[float, str]:
    """The test: prints examples -> the metric that --target is compared with, the last line."""
    nats, acc, _ = evaluate(model.eval(), data["test"], args)
    if hasattr(sys.stdout, "reconfigure"):  # not every terminal has every character
        sys.stdout.reconfigure(errors="replace")
    (x, y), (xt, yt) = data["train"], data["test"]
    if args.kind == "classify":
        knn = (y[torch.cdist(xt.float(), x.float()).argmin(1)] == yt).float().mean().item()
        return acc, f"test acc {acc:.3f} | chance 0.100 | raw-pixel nearest neighbour {knn:.3f}"
    if args.kind == "lm":
        ids = model.generate(xt[:1, :1].to(args.device), 20 if args.quick else 300)[0]
        print("".join(pieces[i] for i in ids.tolist()))
        p, bits = y[:: args.length].flatten().bincount().double(), nats / math.log(2)
        line = f"{torch.special.entr(p / p.sum()).sum() / math.log(2):.3f}"
        return bits, f"val bits per character {bits:.3f} ({nats:.3f} nats) | by frequencies {line}"
    outputs = [""] * len(lines)
    for rows in torch.tensor([len(s) for s in xt]).argsort().split(64):
        src = nn.utils.rnn.pad_sequence([xt[i] for i in rows], True).to(args.device)
        for i, ids in zip(rows.tolist(), model.beam_search(src)[0].tolist()):
            outputs[i] = "".join(pieces[t] for t in ids).strip()
    for (source, target), output in list(zip(lines, outputs))[:5]:
        print(f"{source} -> {output}" + f" (should be: {target})" * (output != target))
    sources, targets = zip(*lines)
    found, copy = (sum(a == b for a, b in zip(s, targets)) / len(s) for s in (outputs, sources))
    if args.kind == "dates":
        return found, f"test exact match {found:.4f} | copy the source {copy:.4f}"
    try:
        from sacrebleu import corpus_bleu
    except ImportError:
        return acc, f"test token acc {acc:.3f} (for BLEU: pip install sacrebleu)"
    found, copy = (corpus_bleu(s, [targets], lowercase=True).score for s in (outputs, sources))
    return found, f"test BLEU {found:.2f} | copy the source {copy:.2f} | token acc {acc:.3f}"


@torch.no_grad()
def draw_picture(args, model, history, data, pieces):
    """Left: learning curves. Right: the attention of the last layer in one test example."""
    from matplotlib.figure import Figure  # without pyplot: needs no display

    (inputs, target), w = pick(data["test"], [0], args), []
    model.eval()(*inputs, weights=w)
    fig = Figure((14, 4.5), layout="tight")
    a, b = fig.subplots(1, 2, width_ratios=[1, 1.9])
    names = "training loss (nats)", "validation loss (nats)", "tokens right", "outputs all right"
    for curve, name in zip(list(zip(*history))[1:], names):
        a.plot([h[0] for h in history], curve, label=name)
    a.set(title=f"{args.kind}: learning curves", xlabel="step", ylim=(0, None))
    a.legend()
    w, x = w[-1][0].mean(0).cpu(), inputs[0][0]  # (T, S), mean over the heads
    if args.task == "classify":
        b.imshow(torch.cat([x.view(8, 8).cpu() / 17, w[0, 1:].view(8, 8) / w[0, 1:].max()], 1))
        b.set(title="a test digit and, on its right, where <cls> looks in the last layer")
    else:
        names, y = ["", "<bos>", "<eos>", *pieces[3:]], target[0] if len(inputs) > 1 else x
        b.imshow(w, cmap="magma", aspect="auto")
        b.set_xticks(range(len(x)), [names[t] for t in x], rotation=90 if len(pieces) > 200 else 0)
        b.set_yticks(range(len(y)), [names[t] for t in y])
        title = "attention in the last layer, mean over the heads"
        b.set(xlabel="looks at", ylabel="what comes out", title=title)
    fig.savefig(os.path.join(args.out, "transformer.png"), dpi=110)


# ---- 7. Command line ----

NAMES = "steps", "batch_size", "lr", "warmup", "dropout", "smoothing", "keep_every", "size"
DEFAULTS = {  # size: d_model, N, h, d_ff
    "dates": (2500, 64, 1.0, 400, 0.1, 0.1, 50, (64, 2, 4, 256)),
    "pairs": (3000, 64, 0.5, 600, 0.1, 0.1, 100, (256, 3, 8, 512)),
    "lm": (2000, 12, 1.0, 200, 0.0, 0.0, 50, (128, 4, 4, 512)),
    "classify": (1000, 64, 1.0, 200, 0.1, 0.1, 50, (64, 2, 4, 128)),
    "quick": (8, 8, 1.0, 4, 0.1, 0.1, 2, (16, 1, 2, 32)),
}


def parse(argv):
    """-> args, data, pieces, lines, model, optimizer, state. Bad input: one line, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--task", choices=["translate", "lm", "classify"], help="default translate (the paper's)")
    flag("--data", help="translate: lines of source TAB target (default: dates); lm: a text file")
    flag("--val", help="pairs for validation; default: the last tenth of --data, at most 1,000")
    flag("--test", help="pairs for the test; default: cut from --data as for --val")
    flag("--steps", type=int, help="default 2500, pairs 3000, lm 2000, classify 1000 (paper 10^5)")
    flag("--batch-size", type=int, help="default 64, lm 12 (paper: 25,000 tokens a side)")
    flag("--length", type=int, help="characters that lm sees at a time, default 64")
    flag("--lr", type=float, help="factor on Eq. 3, default 1, pairs 0.5 (paper: 1)")
    flag("--dropout", type=float, help="default 0.1, lm 0 (paper: 0.1)")
    flag("--size", type=int, nargs=4, help="d_model N h d_ff, default by task (base: 512 6 8 2048)")
    flag("--seed", type=int, help="default 0")
    flag("--log-every", type=int, help="steps between log lines, default 200")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the last line's metric misses this")
    args, ckpt, own = parser.parse_args(argv), {}, {}
    try:  # whatever is wrong with flags, data or checkpoint ends here, in one line
        args.rank, args.world = (int(os.environ.get(*v)) for v in (("RANK", 0), ("WORLD_SIZE", 1)))
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "transformer":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
            own = ckpt["args"] | {"steps": ckpt["step"]}
        for name in ("task", "data", "val", "test"):
            setattr(args, name, getattr(args, name) or own.get(name))
        args.task = args.task or "translate"
        args.kind = args.task if args.task != "translate" else "pairs" if args.data else "dates"
        if own and own["kind"] != args.kind:
            raise ValueError(f"{args.load} was trained on {own['kind']}, not on {args.kind}")
        if own and args.kind == "dates" and args.seed not in (None, own["seed"]):
            raise ValueError("--seed draws the days: beside --load it can't change")
        if (args.val or args.test) and args.kind != "pairs":
            raise ValueError("--val and --test go with --data, a file of pairs")
        args.pad = -100 if args.kind == "classify" else 0
        known = dict(zip(NAMES, DEFAULTS["quick" if args.quick else args.kind]))
        known |= {"seed": 0, "length": 64, "log_every": 200}
        for name, value in known.items():
            if getattr(args, name, None) is None:
                setattr(args, name, own.get(name, value))
        least = min(args.steps, args.batch_size, args.log_every, args.length, *args.size)
        fits = 0 < args.lr < 1e6 and 0 <= args.dropout < 1 and 0 <= args.seed < 10**8
        if least < 1 or not fits:
            raise ValueError("sizes, steps and --lr must be > 0, --dropout in [0, 1), --seed >= 0")
        if (args.kind == "lm") > bool(args.data) or args.kind == "classify" and args.data:
            raise ValueError("--task lm needs --data FILE, --task classify takes none")
        data, pieces, lines = load_data(args, ckpt.get("pieces"))
        if args.batch_size > len(data["train"][0]) or args.batch_size % args.world:
            raise ValueError("--batch-size: at most the rows, a multiple of the processes")
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.manual_seed(args.seed)
        build = {"lm": LanguageModel, "classify": Classifier}.get(args.task, Transformer)
        sizes = dict(zip(("d_model", "num_layers", "num_heads", "d_ff"), args.size))
        sizes |= {"lm": {"norm_first": True}, "classify": {"num_classes": 10}}.get(args.task, {})
        model = build(len(pieces), dropout=args.dropout, **sizes).to(args.device)
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9, fused=True)
        state = {"step": 0, "history": [], "kept": [], "pieces": pieces}
        if ckpt:
            state = {name: ckpt[name] for name in state}
            model.load_state_dict(ckpt["model"])
            optimizer.load_state_dict(ckpt["optimizer"])
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "transformer.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, data, pieces, lines, model, optimizer, state


def main(argv=None) -> int:
    args, data, pieces, lines, model, optimizer, state = parse(argv)
    t0, count = time.time(), sum(p.numel() for p in model.parameters()) / 1e6
    kind = f"{args.kind} " + "/".join(str(len(data[part][0])) for part in ("train", "val", "test"))
    if args.rank == 0:
        print(f"transformer | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}")
    before = signal.getsignal(signal.SIGINT)
    try:
        stopped = train(model, optimizer, data, args, state)
    except FloatingPointError as error:
        print(f"transformer.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
    if args.rank:  # the other processes of torchrun are done
        return 0
    seconds, kept = time.time() - t0, state["kept"] or [model.state_dict()]
    model.load_state_dict({k: sum(w[k] for w in kept) / len(kept) for k in kept[0]})
    metric, line = report(model, data, pieces, lines, args)
    draw_picture(args, model, state["history"], data, pieces)
    print(f"{line} | {seconds:.0f} s")
    sign = -1 if args.kind == "lm" else 1  # bits are better small
    return 130 if stopped else int(args.target is not None and sign * metric < sign * args.target)


if __name__ == "__main__":
    sys.exit(main())
