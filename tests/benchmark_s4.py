"""Time and memory of S4's kernel beside the naive one, as N and L grow (O(N L) against O(N^2 L)).

    python tests/benchmark_s4.py            # about two minutes on one core

Forward and backward of one layer's kernel with H = 32 channels, float32. `fast` is
`s4.dplr_kernel` from C~, `printed` is `s4.algorithm_1`, `naive` the recurrence of `s4.naive_kernel`
on the same system as dense complex matrices (discretisation included). Each cell runs in a process
of its own: time is the median of its runs, memory the growth of its peak resident set. The error is
the largest deviation from a float64 recurrence, relative to the kernel's largest value.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import s4

H = 32
CELLS = [(16, 256), (64, 256), (128, 256), (16, 1024), (64, 1024), (64, 4096), (64, 16384)]


def system_of(N):
    torch.manual_seed(0)
    Lambda, P, B = (x.to(torch.complex64).repeat(H, 1) for x in s4.nplr(N)[:3])
    return Lambda, P, B, torch.randn(H, N // 2, dtype=torch.complex64), torch.logspace(-3, -1, H)


def naive(Lambda, P, B, C, dt, L):
    A_bar, B_bar = s4.dense(Lambda, P, B, dt)
    return s4.naive_kernel(A_bar, B_bar, s4.pairs(C), L).real


FORMS = {"fast": s4.dplr_kernel, "naive": naive, "printed": s4.algorithm_1}


def cell(form, N, L, pipe):
    torch.set_num_threads(1)
    inputs = [x.requires_grad_() for x in system_of(N)]

    def once(L):
        t = time.perf_counter()
        FORMS[form](*inputs, L).square().sum().backward()
        return time.perf_counter() - t

    once(8)  # loads what torch loads at first use
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [once(L)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    while len(times) < 5 and sum(times) < 3:
        times.append(once(L))
    pipe.send((statistics.median(times) * 1e3, peak / (1024 if sys.platform == "linux" else 2**20)))


def measure(form, N, L):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=cell, args=(form, N, L, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return float("nan"), float("nan")  # out of memory
    finally:
        process.join()


def error(N, L):
    system = [x[::8] for x in system_of(N)]
    Lambda, P, B, C, dt = (x.to(torch.promote_types(x.dtype, torch.float64)) for x in system)
    A_bar, B_bar = s4.dense(Lambda, P, B, dt)
    want = s4.naive_kernel(A_bar, B_bar, s4.pairs(C), L).real
    system[3] = s4.truncate(A_bar, s4.pairs(C), L)[:, : N // 2].to(torch.complex64)
    K = s4.dplr_kernel(*system, L)
    return ((K - want).abs().amax(1) / want.abs().amax(1)).max().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", type=int, default=len(CELLS), help="only the first so many")
    args = parser.parse_args()
    print("| N | L | fast ms | naive / fast | printed / fast | fast MiB | naive / fast | error |")
    print("|---|---|---|---|---|---|---|---|")
    for N, L in CELLS[: args.cells]:
        (t, m), (t_naive, m_naive), (t_printed, _) = (measure(form, N, L) for form in FORMS)
        ratios = f"{t_naive / t:.0f}x | {t_printed / t:.1f}x | {m:.0f} | {m_naive / m:.0f}x"
        print(f"| {N} | {L} | {t:.1f} | {ratios} | {error(N, L):.0e} |", flush=True)


if __name__ == "__main__":
    main()
