"""Infini-attention: local attention plus a memory of fixed size that the rest of the past fits in.

Paper    Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention --
         Tsendsuren Munkhdalai, Manaal Faruqui, Siddharth Gopal, April 2024, arXiv:2404.07143v1
Idea     Attention forgets nothing and so its cache grows with the text. Read the text in segments:
         exact attention within one, and of all before it a sum of key-value products, read with the
         same queries by linear attention. A learned gate per head mixes the two.
Figure   (Figure 1; one head of one layer, segment s of N tokens)

         M_(s-1) (d, d), z_(s-1) (d,) ---------+------------------> update ---> M_s, z_s
                                               |                      ^         to segment s + 1
                     +--> q (N, d) -- sigma --> read: A_mem (N, d)    |
         x_s (N, D) -+--> k (N, d) -- sigma ---|----------------------+
                     +--> v (N, d) ------------|----------------------+
                          q, k, v -- causal softmax: A_dot (N, d)
                                               |
                  sigmoid(beta) A_mem + (1 - sigmoid(beta)) A_dot -- heads, W_O --> (N, D)
Symbols  q, k, v | Q, K, V | (B, h, N, d)         sigma | sigma | ELU + 1, positive
         M | M_s | memory (B, h, d, d)            z | z_s | sum of all sigma(k) (B, h, d)
         A_mem, A_dot | read from memory, from the segment (B, h, N, d)    beta | beta | gate (h,)
Differs  Rotary positions in the local part (the paper leaves the base model's). The demo trains a
         small decoder from nothing on keys of three digits among 16 filler words, and counts whole
         keys; the paper tunes an LLM on longer keys among repeated English, and counts tokens. The
         key never straddles two segments. Scores are divided by sqrt(d), not sqrt(d_model).
         beta has a rate of its own, 10 times the others', and W_Q, W_K, W_V start twice as large as
         torch's, so that sigma tells tokens apart from the start.
Run      python infini_attention.py                    # passkeys, 6 minutes on one core
         python infini_attention.py --update delta     # Eq. 5 in place of Eq. 4
Expect   Whole key of three digits right, seeds 0-2, mean over start, middle and end: .991 +- .010
         in 128 tokens (the longest trained), .674 +- .084 in 1,024, .050 +- .018 in 8,192; the same
         model without memory .002, chance .001. So it learns to write and to read, and holds to
         about 8 times its length; at 64 times the weight of the filler in z drowns the key (the
         paper: solved up to 1M tokens after 400 steps of tuning at 5K). The memory takes 8.7 kB at
         any length, a key-value cache 8.4 MB at 8,192 tokens. Eq. 5 was no better in a short run.
"""

import argparse
import math
import os
import signal
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Compressive memory (Section 2.1.2) ----


def sigma(x: Tensor) -> Tensor:
    """ELU + 1: positive, so that no sum of weights can vanish; linear above 0, exp below."""
    return F.elu(x) + 1


def retrieve(q: Tensor, M: Tensor, z: Tensor) -> Tensor:
    """A_mem = sigma(Q) M / (sigma(Q) z), Eq. 3: q (B, h, N, d), M (B, h, d, d), z (B, h, d).

    Returns (B, h, N, d). An empty memory has M = 0 and z = 0: the floor turns 0 / 0 into 0.
    """
    return sigma(q) @ M / (sigma(q) @ z[..., None]).clamp(min=1e-6)


def update(k: Tensor, v: Tensor, M: Tensor, z: Tensor, delta: bool) -> tuple[Tensor, Tensor]:
    """M, z after the segment's k, v (B, h, N, d): Eq. 4, with delta Eq. 5.

    delta stores only what the memory would not already answer to k: what is known isn't repeated.
    """
    if delta:
        v = v - retrieve(k, M, z)
    return M + sigma(k).transpose(-2, -1) @ v, z + sigma(k).sum(-2)


# ---- 2. Infini-attention (Section 2.1) ----


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0..N-1 (arXiv:2104.09864) for x (B, h, N, d), d even."""
    N, half = x.shape[2], x.shape[3] // 2
    freqs = 10_000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(N, device=x.device)[:, None] * freqs  # (N, d / 2)
    a, b = x.float().chunk(2, -1)
    out = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return out.to(x.dtype)


class InfiniAttention(nn.Module):
    """One segment x (B, N, dim), memory (M, z) or None -> y (B, N, dim), the next memory.

    The memory is a value that comes and goes: gradients flow through it from segment to segment,
    which is how writing is learned, until the caller detaches it. local_only leaves it unread.
    """

    def __init__(self, dim: int, heads: int, delta: bool = False, local_only: bool = False):
        super().__init__()
        if heads < 1 or dim % (2 * heads):
            raise ValueError(f"dim {dim} is not a multiple of twice the heads {heads}")
        self.heads, self.delta, self.local_only = heads, delta, local_only
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.beta = nn.Parameter(torch.zeros(heads))  # sigmoid = 1/2, where its gradient is largest

    def forward(self, x: Tensor, memory=None):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)  # Eq. 1
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, h, N, d)
        # Eq. 2 (there sqrt(d_model)): softmax(q k^T / sqrt(d)) v, causal, positions by segment
        A = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        if not self.local_only:
            wide = torch.promote_types(v.dtype, torch.float32)  # in bfloat16 sums stop to grow
            if memory is None:
                M = v.new_zeros(B, self.heads, v.shape[3], v.shape[3], dtype=wide)
                memory = M, M[..., 0]
            # no positions here: they would tie what is stored to a place in its segment. Read
            # before written: what this segment adds would show its tokens their own future
            A_mem = retrieve(q.to(wide), *memory)
            memory = update(k.to(wide), v.to(wide), *memory, self.delta)
            gate = torch.sigmoid(self.beta)[:, None, None]
            A = (gate * A_mem + (1 - gate) * A).to(v.dtype)  # Eq. 6
        return self.out(A.transpose(1, 2).reshape(B, N, D)), memory  # Eq. 7


# ---- 3. A decoder of such layers ----


class Block(nn.Module):
    """Pre-norm layer: x (B, N, dim), memory -> x (B, N, dim), memory."""

    def __init__(self, dim: int, heads: int, **kwargs):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = InfiniAttention(dim, heads, **kwargs)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, memory=None):
        y, memory = self.attention(self.norm1(x), memory)
        x = x + y
        return x + self.mlp(self.norm2(x)), memory


class InfiniTransformer(nn.Module):
    """ids (B, L) -> logits (B, L, vocab), read in segments of `segment` tokens.

    Any L: the last segment may be short. kwargs: delta=False, local_only=False of InfiniAttention.
    """

    def __init__(self, vocab_size=32000, dim=512, depth=12, heads=8, segment=2048, **kwargs):
        super().__init__()
        self.segment = segment
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, **kwargs) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:  # sigma of small numbers is 1 for all: no token would stand out
            block.attention.qkv.weight.data *= 2

    def read(self, ids: Tensor, memory=None):
        """One segment ids (B, N), N <= segment -> logits (B, N, vocab), memory of every layer."""
        x, after = self.embedding(ids), []
        for i, block in enumerate(self.blocks):
            x, m = block(x, None if memory is None else memory[i])
            after.append(m)
        return self.head(self.norm(x)), after

    def forward(self, ids: Tensor, memory=None, last: int | None = None):
        """last: logits (B, last, vocab) of the last tokens alone, so that long texts fit."""
        logits: list[Tensor] = []
        for part in ids.split(self.segment, 1):
            y, memory = self.read(part, memory)
            logits = [torch.cat([*logits, y], 1)[:, -last:]] if last else [*logits, y]
        return torch.cat(logits, 1)

    @torch.no_grad()
    def generate(self, ids: Tensor, n: int) -> Tensor:
        """Appends the n likeliest tokens to ids (B, L). Memory is written once a segment is full;
        the unfinished one is read anew for each token: time and memory don't depend on L."""
        memory, tail = None, ids
        for _ in range(n):
            while tail.shape[1] > self.segment:
                full, tail = tail[:, : self.segment], tail[:, self.segment :]
                memory = self.read(full, memory)[1]
            token = self.read(tail, memory)[0][:, -1:].argmax(-1)
            tail, ids = torch.cat([tail, token], 1), torch.cat([ids, token], 1)
        return ids

    def memory_bytes(self, length: int) -> tuple[int, int]:
        """-> bytes of this model's memory, and of a key-value cache for `length` tokens."""
        d, layers = self.embedding.weight.shape[1], len(self.blocks)
        per_head = d // self.blocks[0].attention.heads
        each = layers * d * self.embedding.weight.element_size()  # a number per channel and layer
        return each * (per_head + 1), each * 2 * length


# ---- 4. Data: a batch is a function of (seed, step) ----

DIGITS, KEY, ASK, FILLER, VOCAB = 3, 10, 11, 12, 28  # tokens 0-9 are digits, 12-27 are filler words


def passkey_batch(n: int, segments: int, segment: int, g: torch.Generator, depth=None):
    """Passkey retrieval (Section 3.2) -> ids (n, segments * segment), answers (n, DIGITS).

    Filler words with <key> d d d in one segment before the last (depth 0..1: start to end of those;
    None: any), and at the end <ask> d d: the logits of the last DIGITS places are the answer's.
    """
    ids = torch.randint(FILLER, VOCAB, (n, segments * segment), generator=g)
    key = torch.randint(0, 10, (n, DIGITS), generator=g)
    where = torch.randint(0, segments - 1, (n, 1), generator=g)
    if depth is not None:
        where[:] = round(depth * (segments - 2))
    where = where * segment + torch.randint(0, segment - DIGITS, (n, 1), generator=g)
    ids.scatter_(1, where + torch.arange(DIGITS + 1), F.pad(key, (1, 0), value=KEY))
    ids[:, -DIGITS:] = F.pad(key[:, :-1], (1, 0), value=ASK)
    return ids, key


# ---- 5. Training ----


def train(models, optimizers, args, start=0, history=()):
    """Trains all models on the same batches -> step, [(step, name, loss, acc)], stopped."""
    from tqdm import tqdm

    history, stop, step, t0 = list(history), [], start, time.time()
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    for step in tqdm(range(start + 1, args.steps + 1), disable=None):
        g = torch.Generator().manual_seed(args.seed * 10**10 + step)
        segments = 2 + step % (args.segments - 1)  # all lengths in turn
        batch = passkey_batch(args.batch_size, segments, args.segment, g)
        x, y = (t.to(args.device) for t in batch)
        part = step / args.steps  # warm-up, then half a cosine
        rate = min(1.0, part / 0.05) * (1 + math.cos(math.pi * part)) / 2
        for name, model in models.items():
            # without a memory nothing before the last segment can matter: it isn't read at all
            logits = model(x[:, -args.segment :] if name == "local" else x, last=DIGITS)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the {name} model's loss is {loss.item()} at step {step}")
            for group in optimizers[name].param_groups:
                group["lr"] = group["peak"] * rate
            optimizers[name].zero_grad(); loss.backward()  # fmt: skip
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            acc = (logits.argmax(-1) == y).float().mean().item()
            history.append((step, name, loss.item(), acc))
        if stop or step % args.log_every == 0 or step == args.steps:
            now = [f"{n} loss {l:.4f} digits {a:.3f}" for _, n, l, a in history[-len(models) :]]
            ms = (time.time() - t0) / (step - start) * 1e3
            tqdm.write(" | ".join([f"step {step:5d}/{args.steps}", *now, f"{ms:.0f} ms/step"]))
            if args.save:
                save(args, models, optimizers, step, history)
        if stop:
            break
    return step, history, bool(stop)


def save(args, models, optimizers, step, history):
    """Writes the checkpoint beside its place, then moves it there: a crash leaves the old one."""
    state = {"script": "infini_attention", "args": vars(args), "step": step, "history": history}
    state["models"] = {name: m.state_dict() for name, m in models.items()}
    state["optimizers"] = {name: o.state_dict() for name, o in optimizers.items()}
    torch.save(state, args.save + ".tmp")
    os.replace(args.save + ".tmp", args.save)


# ---- 6. Evaluation and picture ----


@torch.no_grad()
def accuracy(model, segments: int, depth: float, args, n: int) -> float:
    """Share of n fresh texts whose whole key is named right, digit after digit."""
    g, right = torch.Generator().manual_seed(args.seed * 10**10 + 10**9), []  # no training step's
    for rows in range(0, n, 50):
        x, y = passkey_batch(min(50, n - rows), segments, args.segment, g, depth)
        x = x[:, -args.segment :] if model.blocks[0].attention.local_only else x  # as in training
        logits = model(x.to(args.device), last=DIGITS)
        right.append((logits.argmax(-1).cpu() == y).all(1))
    return torch.cat(right).float().mean().item()


def draw_picture(args, models, history, table, depths):
    """Accuracy over depth and length, with and without memory; the gates; the curves."""
    from matplotlib.figure import Figure  # without pyplot: needs no display

    fig = Figure(figsize=(15, 4), layout="constrained")
    axes = fig.subplots(1, 4, width_ratios=[1, 1, 0.8, 1])
    for axis, name in zip(axes, models):
        grid = torch.tensor(list(table[name].values())).T  # (depths, lengths)
        picture = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for i, row in enumerate(grid.tolist()):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center")
        axis.set_xticks(range(len(grid[0])), [str(length) for length in table[name]])
        axis.set_yticks(range(3), depths)
        axis.set(title=f"whole key right: {name}", xlabel="tokens", ylabel="the key stands at the")
    fig.colorbar(picture, ax=axes[1])
    gates = torch.stack([block.attention.beta for block in models["memory"].blocks])
    gates = gates.detach().sigmoid().cpu()
    axes[2].imshow(gates, vmin=0, vmax=1, cmap="coolwarm")
    for i, row in enumerate(gates.tolist()):
        for j, value in enumerate(row):
            axes[2].text(j, i, f"{value:.2f}", ha="center", va="center")
    axes[2].set(title="gates: 1 memory, 0 segment", xlabel="head", ylabel="layer")
    axes[2].set(xticks=range(gates.shape[1]), yticks=range(len(gates)))
    for name in models:
        acc = torch.tensor([a for _, n, _, a in history if n == name])
        k = min(20, len(acc))
        axes[3].plot(range(k, len(acc) + 1), acc.unfold(0, k, 1).mean(-1), label=name)
    axes[3].set(title=f"digits right in training (mean of {k})", xlabel="step", ylim=(0, 1.02))
    axes[3].legend()
    fig.savefig(os.path.join(args.out, "infini_attention.png"), dpi=90)


# ---- 7. Command line ----

DEFAULTS = {  # default, --quick, least, most, meaning
    "steps": (1500, 4, 1, math.inf, "training steps (paper: 400, from a trained LLM)"),
    "batch_size": (64, 8, 1, 10**6, "texts per step (paper: 64)"),
    "lr": (3e-3, 3e-3, 1e-12, 10, "peak rate; 10 times that for the gates (paper: 1e-4)"),
    "segment": (32, 16, 8, 10**6, "tokens of a segment (paper: 2048)"),
    "segments": (4, 2, 2, 10**4, "segments of a training text, at most (paper: 5K tokens)"),
    "dim": (64, 16, 4, 10**5, "width"),
    "depth": (2, 2, 1, 10**3, "layers (paper: 12)"),
    "heads": (4, 2, 1, 10**3, "heads (paper: 8)"),
    "seed": (0, 0, 0, 10**8, "of weights and texts"),
    "log_every": (100, 2, 1, math.inf, "steps between log lines"),
}


def parse(argv):
    """-> args, models, optimizers, step, history. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    for name, (value, *_, text) in DEFAULTS.items():
        flag(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}: {text}")
    flag("--update", choices=["linear", "delta"], help="default linear, Eq. 4; delta: Eq. 5")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the accuracy at 8 times the length is below this")
    args, ckpt = parser.parse_args(argv), {}
    try:
        if args.load:
            ckpt = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "infini_attention":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        known = {k: v[args.quick] for k, v in DEFAULTS.items()} | {"update": "linear"}
        known |= {k: ckpt["args"][k] for k in known if ckpt} | {"log_every": known["log_every"]}
        known["steps"] = ckpt.get("step", known["steps"])
        for name, value in known.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        for name, (_, _, low, high, _) in DEFAULTS.items():
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        torch.zeros(1, device=args.device)
        models, optimizers = {}, {}
        for name in ("memory", "local"):
            torch.manual_seed(args.seed)
            size = VOCAB, args.dim, args.depth, args.heads, args.segment
            how = {"delta": args.update == "delta", "local_only": name == "local"}
            models[name] = InfiniTransformer(*size, **how).to(args.device)
            groups = {1: [], 10: []}  # without a rate of their own the gates hardly move
            for key, p in models[name].named_parameters():
                groups[10 if key.endswith("beta") else 1].append(p)
            groups = [{"params": p, "peak": k * args.lr} for k, p in groups.items()]
            optimizers[name] = torch.optim.Adam(groups, args.lr, betas=(0.9, 0.98))
            if ckpt:
                models[name].load_state_dict(ckpt["models"][name])
                optimizers[name].load_state_dict(ckpt["optimizers"][name])
                for g, new in zip(optimizers[name].param_groups, groups):
                    g["peak"] = new["peak"]  # what --lr says, not the checkpoint
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "infini_attention.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, models, optimizers, ckpt.get("step", 0), ckpt.get("history", [])


def main(argv=None) -> int:
    args, models, optimizers, step, history = parse(argv)
    t0, model, stopped = time.time(), models["memory"], False
    count, L = sum(p.numel() for p in model.parameters()) / 1e6, args.segment * args.segments
    kind = f"passkeys in up to {L} tokens, segments of {args.segment}"
    print(f"infini_attention | {count:.2f}M parameters | {args.device} | seed {args.seed} | {kind}")
    before = signal.getsignal(signal.SIGINT)
    try:
        if step < args.steps:
            step, history, stopped = train(models, optimizers, args, step, history)
    except FloatingPointError as error:
        print(f"infini_attention.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
    seconds, depths, table = time.time() - t0, ("start", "middle", "end"), {}
    times, n = ((1, 2), 10) if args.quick else ((1, 8, 64), 200)
    for name, m in models.items():
        table[name] = {}
        for k in times:
            row = [accuracy(m, k * args.segments, depth, args, n) for depth in (0, 0.5, 1)]
            table[name][k * L] = row
            text = " | ".join(f"{depth} {acc:.3f}" for depth, acc in zip(depths, row))
            print(f"{name:6} | {k * L:6} tokens | whole key right, key at the {text}", flush=True)
    draw_picture(args, models, history, table, depths)
    ours, cache = model.memory_bytes(times[-1] * L)
    print(f"memory {ours} bytes at any length, key-value cache {cache} at {times[-1] * L} tokens")
    accs = {name: [sum(row) / 3 for row in rows.values()] for name, rows in table.items()}
    line = " ".join(f"{acc:.3f}" for acc in accs["memory"])
    at = "/".join(str(k * L) for k in times)
    line = f"test acc at {at} tokens {line} | local only {accs['local'][0]:.3f}"
    print(f"{line} | chance {10**-DIGITS} | {seconds:.0f} s")
    missed = args.target is not None and accs["memory"][1] < args.target
    return 130 if stopped else int(missed)


if __name__ == "__main__":
    sys.exit(main())
