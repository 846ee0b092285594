"""Speed, memory and accuracy of `mamba.selective_scan`, as ratios to other ways to run the scan.

    python tests/benchmark_scan.py            # one to two minutes on two cores
    python tests/benchmark_scan.py --gpu      # on CUDA, beside the official kernel if installed

One process; the competitors take turns, every figure is the median of its turns. `loop` is
`mamba.selective_scan_ref` (Algorithm 2 in eager PyTorch), `lean loop` the same without the
(B, L, D, N) tensors; mambapy's pscan runs where `pip install mambapy` was done; `associative_scan`
is torch's higher-order operator in its generic, eager form (the one that works on a CPU).

Where the time goes, at (4, 1024, 128, 16), torch 2.14.1: a call of a compiled kernel has 40 to 65
us of fixed cost, 64 calls each way; a chunk's A_bar is made by torch's own exp (.16 ns a number on
one core with MKL, where the exp of compiled code takes 1.6); fresh memory, which this kind of
machine hands out at 1 to 2 us a page, is a tenth to a third of the whole, for the loop and pscan no
less, so the scan writes y and the states into one tensor each and copies a chunk's inputs just
before their use (the forward took 11, 21, 35 % less time than with joined lists, at the three
shapes, in one process, and 10, -4, 5 % in another). A small batch pays for the scan twice (two
passes), which is what holds (1, 4096, 64, 16) back against pscan. A large batch is run in pieces of
2^15 numbers of state: the backward's three stacks then stay in the cache (a kernel call over 64
rows at once took 1.4 to 2.4 times as long on one core).

Measured and not taken: A_bar within the kernels (up to 1.3 times slower on one core, as fast on
two) or in one buffer for all chunks (as fast); kernels compiled for any shape from the start
(slower by a tenth, 25 s to compile); no guards between calls (as fast); chunks of 8 (slower);
chunks of 32, forward (8 to 11 ms in kernels where 16 takes 10, compile time doubled) and backward
(13 s to compile); chunks of 64 (slower, 17 to 30 s to compile); one sum over N per step in place of
one for the chunk (as fast, compile time doubled); N unrolled (2 to 3 times slower, 40 s to
compile); the layout (M, D, N) (1.5 times slower); autograd through the compiled chunk in place of
the backward written out (60 lines shorter, 1.6 times slower).

On an H100, (8, 2048, 1536, 16), forward | both passes: 10.3 | 28.6 ms with A_bar made before each
chunk, 4.8 to 5.2 | 19.5 to 21.5 ms with A_bar in the kernels, as it is now; then chunks of 8: 8.9 |
41, of 32: 5.9 | 23; no splits: 19 | 63; four times as many splits: 6.5 | 23; Inductor's
loop_ordering_after_fusion with a sum per step: 4.4 | 19.9. What is left is the states of a chunk,
which Inductor writes to memory between the kernel that makes them and the one that sums over N. A
Triton kernel with h in registers, and a chunk's states in the L2 cache for the backward, took 1.6 |
5.3 ms (10 | 33 ms at B = 1, L = 16384, without splits): some 60 lines more for one kind of machine,
so it was left out.
"""

import argparse
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
from mamba import _compiled, selective_scan, selective_scan_ref

SHAPES = [(4, 1024, 128, 16), (8, 256, 128, 16), (1, 4096, 64, 16)]
GPU_SHAPES = [(8, 2048, 1536, 16), (1, 16384, 1536, 16)]  # a layer of mamba-130m


def inputs(B, L, D, N, top=0.1):
    g = torch.Generator().manual_seed(0)
    u, B_, C = (torch.randn(B, L, d, generator=g) for d in (D, N, N))
    dt = torch.rand(B, L, D, generator=g) * top + 1e-4
    A, skip = -torch.arange(1.0, N + 1).repeat(D, 1), torch.ones(D)
    return [x.requires_grad_() for x in (u, dt, A, B_, C, skip)]


def loop(*a):
    return selective_scan_ref(*a)[0]


def lean_loop(u, dt, A, B, C, D):
    h, ys = u.new_zeros(u.shape[0], *A.shape), []
    for x, s, b, c in zip(u.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1)):
        h = torch.exp(s[..., None] * A) * h + (s * x)[..., None] * b[:, None]
        ys.append((h * c[:, None]).sum(-1))
    return torch.stack(ys, 1) + D * u


def discretised(u, dt, A, B):
    return torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]


def mambapy_scan(u, dt, A, B, C, D):
    from mambapy.pscan import pscan

    return (pscan(*discretised(u, dt, A, B)) @ C[..., None])[..., 0] + D * u


def associative(u, dt, A, B, C, D):
    from torch._higher_order_ops.associative_scan import associative_scan

    a, b = discretised(u, dt, A, B)
    join = lambda p, q: (q[0] * p[0], q[0] * p[1] + q[1])  # noqa: E731
    _, h = associative_scan(join, (a, b), 1, combine_mode="generic")
    return (h @ C[..., None])[..., 0] + D * u


def official(a):
    """The kernel of mamba-ssm as a job's (function, inputs): its own layout, (B, D, L)."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    turned = [x.detach().transpose(1, 2).contiguous() if x.dim() == 3 else x.detach() for x in a]
    return selective_scan_fn, [x.requires_grad_() for x in turned]


def on_gpu(turns):
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for shape in GPU_SHAPES:
        a = [x.detach().cuda().requires_grad_() for x in inputs(*shape)]
        pairs = {"ours": (selective_scan, a)} | ({"loop": (loop, a)} if shape[1] < 4096 else {})
        try:
            pairs["official kernel"] = official(a)
        except ImportError:
            print("mamba-ssm is not installed: the official kernel is left out")
        for name, how in (("forward", forward), ("forward + backward", both)):

            def job(pair, how=how):
                how(*pair)
                torch.cuda.synchronize()

            t = medians({k: lambda p=p: job(p) for k, p in pairs.items()}, turns)
            ratios = " | ".join(f"{k} {t[k] * 1e3:.2f} ms, {t[k] / t['ours']:.2f}x" for k in t)
            print(f"{shape} {name:18s} {ratios}", flush=True)


def forward(scan, a):
    with torch.no_grad():
        scan(*a)


def both(scan, a):
    torch.autograd.grad(scan(*a).sum(), a)


def medians(jobs, turns):
    """{name: job} -> {name: median seconds}, the jobs taking turns."""
    times = {name: [] for name in jobs}
    for turn in range(turns + 1):
        for name, job in jobs.items():
            t0 = time.perf_counter()
            job()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - t0)
    return {name: statistics.median(t) for name, t in times.items()}


def kept(a):
    """Bytes held for the backward, over the bytes of the inputs."""
    sizes = {}

    def pack(x):
        sizes[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(*a)
    return sum(sizes.values()) / sum(x.numel() * x.element_size() for x in a)


def error(top):
    """Largest error of the output and of all gradients against float64, relative to the largest."""
    a = inputs(2, 300, 32, 16, top)
    wide = [x.detach().double().requires_grad_() for x in a]
    y, y64 = selective_scan(*a), loop(*wide)
    pairs = [(y, y64)]
    pairs += zip(torch.autograd.grad(y.sum(), a), torch.autograd.grad(y64.sum(), wide))
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.gpu:
        on_gpu(args.turns)
        return
    torch.set_num_threads(args.threads)
    rivals = {"loop": loop, "lean loop": lean_loop, "associative_scan": associative}
    try:
        import mambapy.pscan  # noqa: F401

        rivals["mambapy"] = mambapy_scan
    except ImportError:
        print("mambapy is not installed: its column is left out")
    print(f"torch {torch.__version__}, {args.threads} threads; ratios: rival / selective_scan")
    t0 = time.perf_counter()
    a = inputs(*SHAPES[0])
    both(selective_scan, a)
    print(f"first forward and backward with compilation: {time.perf_counter() - t0:.1f} s")
    for shape in SHAPES:
        a = inputs(*shape)
        for name, how in (("forward", forward), ("forward + backward", both)):
            jobs = {k: lambda f=f, how=how, a=a: how(f, a) for k, f in rivals.items()}
            jobs["ours"] = lambda how=how, a=a: how(selective_scan, a)
            t = medians(jobs, args.turns)
            ratios = " | ".join(f"{k} {t[k] / t['ours']:.1f}x" for k in rivals)
            print(f"{shape} {name:18s} {t['ours'] * 1e3:7.1f} ms | {ratios}")
        print(f"{shape} kept for the backward: {kept(a):.2f} x the inputs")
    scale = {L: inputs(1, L, 64, 16) for L in [2**k for k in range(9, 15)]}
    t = medians({L: lambda a=a: both(selective_scan, a) for L, a in scale.items()}, args.turns)
    growth = [t[2 * L] / t[L] for L in scale if 2 * L in t]
    print("time(2L) / time(L), L = 512 .. 8192:", " ".join(f"{g:.2f}" for g in growth))
    for top in (1e-4, 1e-2, 1.0, 50.0):
        print(f"dt up to {top}: error against float64 {error(top):.1e}")
    _compiled.cache_clear()


if __name__ == "__main__":
    main()
