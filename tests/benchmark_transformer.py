"""Times transformer.py against torch.nn.Transformer, and against the GRU by sentence length.

    python tests/benchmark_transformer.py [--rounds 15] [--threads 1]

One process; the contestants take turns, so that a busy machine is unfair to none. The median of the
rounds is printed. A training step is forward, loss, backward and Adam at the same sizes, with the
same tied matrix and positions; torch's post-norm model has two norms more, which the paper has not.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import transformer as tr


class Theirs(nn.Module):
    """torch.nn.Transformer between our embedding and our output layer."""

    def __init__(self, V, d, N, h, d_ff, dropout):
        super().__init__()
        self.embedding = tr.Embedding(V, d, dropout)
        self.body = nn.Transformer(d, h, N, N, d_ff, dropout, batch_first=True)

    def forward(self, src, tgt):
        pad = src == 0
        future = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], dtype=torch.float)
        x = self.body(
            self.embedding(src), self.embedding(tgt), tgt_mask=future, tgt_is_causal=True,
            src_key_padding_mask=torch.zeros_like(pad, dtype=torch.float).masked_fill(pad, -1e9),
            memory_key_padding_mask=torch.zeros_like(pad, dtype=torch.float).masked_fill(pad, -1e9),
        )  # fmt: skip
        return F.linear(x, self.embedding.weight)


def step_of(model, src, tgt):
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, betas=(0.9, 0.98), eps=1e-9, fused=True)

    def step():
        loss = tr.label_smoothing_loss(model(src, tgt[:, :-1]), tgt[:, 1:])
        optimizer.zero_grad(); loss.backward(); optimizer.step()  # fmt: skip

    return step


def alternate(contestants, rounds):
    """Milliseconds per call, the median over rounds in which each is called once."""
    times = {name: [] for name in contestants}
    for i in range(rounds + 2):
        for name, call in contestants.items():
            t0 = time.process_time()
            call()
            if i >= 2:  # two rounds of warm-up
                times[name].append((time.process_time() - t0) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="default 15")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("CPU time in ms, median; training step (forward, loss, backward, Adam)")
    for V, d, N, h, d_ff, B, T in ((40, 64, 2, 4, 256, 64, 24), (8000, 256, 3, 8, 512, 32, 20)):
        src, tgt = torch.randint(3, V, (B, T)), torch.randint(3, V, (B, T))
        src[: B // 2, -T // 4 :] = 0
        for dropout in (0.0, 0.1):
            ours = tr.Transformer(V, d, N, h, d_ff, dropout)
            calls = {"ours": step_of(ours, src, tgt)}
            calls["torch.nn"] = step_of(Theirs(V, d, N, h, d_ff, dropout), src, tgt)
            ms = alternate(calls, args.rounds)
            size = f"d {d} N {N} V {V} batch {B} x {T} dropout {dropout}"
            print(f"  {size}: " + " | ".join(f"{n} {t:.1f}" for n, t in ms.items()))
    print("2,048 + 2,048 tokens a step, as many short sentences or fewer long ones")
    for L in (16, 64, 256, 1024):
        src, tgt = torch.randint(3, 64, (2048 // L, L)), torch.randint(3, 64, (2048 // L, L + 1))
        calls = {"Transformer": step_of(tr.Transformer(64, 64, 2, 4, 256), src, tgt)}
        calls["GRU"] = step_of(tr.Recurrent(64, 90), src, tgt)
        ms = alternate(calls, args.rounds)
        print(f"  length {L}: " + " | ".join(f"{n} {t:.1f}" for n, t in ms.items()))


if __name__ == "__main__":
    main()
