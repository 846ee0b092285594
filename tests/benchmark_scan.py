"""Speed, memory and accuracy of `mamba.selective_scan`, as ratios to other ways to run the scan.

    python tests/benchmark_scan.py            # some 10 minutes on two cores
    python tests/benchmark_scan.py --gpu      # on CUDA, beside the official kernel if installed

Three starts of a process, without and with glibc told to keep its pages; in each the competitors
take turns, and a figure is the median of its turns, then of the three starts. Why both ways: fresh
memory is handed out page by page, at 1 to 2 us each on the machine where this was written, and half
of the time of whoever makes large tensors is that. It says more of the machine than of the scan.

`loop` is `mamba.selective_scan_ref` (eager), `parallel` is `mamba.parallel_scan`, compiled,
`first edition` the kernel with a hand-written backward that this repo had before (below);
mambapy's pscan runs where `pip install mambapy` was done; `associative_scan` is torch's
higher-order operator in its generic, eager form, which works on a CPU. RESULTS.md has the figures.
"""

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import mamba
from mamba import selective_scan, selective_scan_ref

SHAPES = [(4, 1024, 128, 16), (8, 256, 128, 16), (1, 4096, 64, 16), (64, 136, 128, 16)]
GPU_SHAPES = [(8, 2048, 1536, 16), (1, 16384, 1536, 16)]  # a layer of mamba-130m


def inputs(B, L, D, N, top=0.1):
    g = torch.Generator().manual_seed(0)
    u, B_, C = (torch.randn(B, L, d, generator=g) for d in (D, N, N))
    dt = torch.rand(B, L, D, generator=g) * top + 1e-4
    A, skip = -torch.arange(1.0, N + 1).repeat(D, 1), torch.ones(D)
    return [x.requires_grad_() for x in (u, dt, A, B_, C, skip)]


# ---- the competitors ----


def loop(*a):
    return selective_scan_ref(*a)[0]


def discretised(u, dt, A, B):
    return torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]


@torch.compile(dynamic=False)
def parallel(u, dt, A, B, C, D):
    _, h = mamba.parallel_scan(*discretised(u, dt, A, B))
    return (h @ C[..., None])[..., 0] + D * u


def mambapy_scan(u, dt, A, B, C, D):
    from mambapy.pscan import pscan

    return (pscan(*discretised(u, dt, A, B)) @ C[..., None])[..., 0] + D * u


def associative(u, dt, A, B, C, D):
    from torch._higher_order_ops.associative_scan import associative_scan

    a, b = discretised(u, dt, A, B)
    join = lambda p, q: (q[0] * p[0], q[0] * p[1] + q[1])  # noqa: E731
    _, h = associative_scan(join, (a, b), 1, combine_mode="generic")
    return (h @ C[..., None])[..., 0] + D * u


# ---- the first edition's scan, as it was: forward and backward of a chunk written out by hand ----


def _chunk_forward(A_bar, u, dt, B, C, h):
    """A_bar (M, T, N, D), u, dt (M, T, D), B, C (M, T, N), h (M, N, D) -> y (M, T, D), last h."""
    A_bar, bu, hs = _decay(dt, A_bar), dt * u, []
    for t in range(u.shape[1]):
        h = A_bar[:, t] * h + bu[:, t, None] * B[:, t, :, None]  # (M, N, D)  Eq. 2a
        hs.append(h)
    return (torch.stack(hs, 1) * C[..., None]).sum(2), h  # Eq. 2b


def _chunk_backward(A_bar, u, dt, B, C, h, dy, A, g, dA):
    """Gradients of one chunk. g (M, N, D) is dloss/dh at its end and, returned, at its start."""
    A_bar, bu, hs = _decay(dt, A_bar), dt * u, [h]
    for t in range(u.shape[1]):  # recompute what the forward did not keep
        hs.append(A_bar[:, t] * hs[t] + bu[:, t, None] * B[:, t, :, None])
    gs, es = [], []
    for t in reversed(range(u.shape[1])):
        g = g + C[:, t, :, None] * dy[:, t, None]  # dloss/dh_t
        gs.append(g)
        g = A_bar[:, t] * g  # what reaches h_(t-1)
        es.append(g * hs[t])  # dloss/d(dt_t A), because d exp(x) = exp(x) dx
        dA = dA + es[-1] * dt[:, t, None]
    G, E, H = torch.stack(gs[::-1], 1), torch.stack(es[::-1], 1), torch.stack(hs[1:], 1)
    dbu = (G * B[..., None]).sum(2)  # (M, T, D)
    ddt = (E * A).sum(2) + dbu * u
    dB, dC = (G * bu[:, :, None]).sum(3), (H * dy[:, :, None]).sum(3)  # (M, T, N)
    return dbu * dt, ddt, dB, dC, g, dA


@functools.cache
def _compiled(kernel):
    return torch.compile(kernel)


def _decay(dt, A):
    """A_bar of one chunk (Eq. 4): dt (M, T, D), A (N, D) -> (M, T, N, D); A_bar itself stays."""
    return (dt[:, :, None] * A).exp_() if A.dim() == 2 else A


def _cut(x, S, T):
    """(B, L, d) -> L / (S T) chunks of (B S, T, d). Padding is neutral: dt = 0 leaves h alone."""
    pad = -x.shape[1] % (S * T)
    x = F.pad(x, (0, 0, 0, pad)) if pad else x
    return x.reshape(x.shape[0] * S, -1, x.shape[2]).split(T, 1)


def _ready(chunk, A):
    """What a kernel takes first: A_bar (on a GPU A: there the kernel makes it) and the chunk, as
    copies: their memory is used again for every chunk, so it stays in the cache, and their strides
    don't depend on L, for which the kernels would be compiled again."""
    chunk = [x.clone(memory_format=torch.contiguous_format) for x in chunk]
    return [_decay(chunk[1], A) if A.device.type == "cpu" else A, *chunk]


def _carry(end, dt_sum, A, h, backwards=False):
    """The splits' ends, run from zero (B S, N, D), and the first h -> h at the start of each."""
    end = end.unflatten(0, (h.shape[0], -1))  # (B, S, N, D)
    decay, out = torch.exp(dt_sum[:, None] * A).view_as(end), torch.empty_like(end)
    for s in reversed(range(end.shape[1])) if backwards else range(end.shape[1]):
        out[:, s] = h
        h = decay[:, s] * h + end[:, s]
    return out.flatten(0, 1)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, h0, T, compile):
        batch, L, _ = u.shape
        lanes, enough = max(1, batch * A.numel()), 2**13 if u.device.type == "cpu" else 2**18
        # S > 1 costs the work twice: only for a machine that is far from busy, then generously
        S = 1 if lanes >= enough else max(1, min(8 * enough // lanes, L // (2 * T)))
        A_t, h = A.t().contiguous(), h0.transpose(1, 2).contiguous()  # (N, D), (B, N, D)
        chunks = list(zip(*(_cut(x, S, T) for x in (u, dt, B, C))))
        kernel = _compiled(_chunk_forward) if compile else _chunk_forward
        if S > 1:
            end = h.new_zeros(batch * S, *A_t.shape)
            for chunk in chunks:
                _, end = kernel(*_ready(chunk, A_t), end)
            h = _carry(end, sum(c[1].sum(1) for c in chunks), A_t, h)
        hs = h.new_empty(len(chunks), *h.shape)  # kept: the state before each chunk
        ys = u.new_empty(batch * S, len(chunks) * T, u.shape[2])
        for chunk, before, y in zip(chunks, hs, ys.split(T, 1)):
            before.copy_(h)
            out, h = kernel(*_ready(chunk, A_t), h)
            y.copy_(out)
        ctx.save_for_backward(u, dt, A, B, C, hs)
        ctx.S, ctx.T, ctx.compile = S, T, compile
        h = h.unflatten(0, (batch, S))[:, -1].transpose(1, 2).contiguous()
        return ys.reshape(batch, -1, u.shape[2])[:, :L], h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        u, dt, A, B, C, hs = ctx.saved_tensors
        A_t, g, T = A.t().contiguous(), dh.transpose(1, 2).contiguous(), ctx.T
        cut = [_cut(x, ctx.S, T) for x in (u, dt, B, C, dy)]
        chunks = list(zip(*cut[:4], hs, cut[4]))[::-1]
        kernel = _compiled(_chunk_backward) if ctx.compile else _chunk_backward
        zero, start = torch.zeros_like(hs[0]), torch.zeros_like(hs[0])
        if ctx.S > 1:  # the same two passes, from the end of time to its start
            for chunk in chunks:
                start = kernel(*_ready(chunk, A_t), A_t, start, zero)[4]
            g = _carry(start, sum(c[1].sum(1) for c in chunks), A_t, g, backwards=True)
        grads, dA = [x.new_empty(len(zero), len(hs) * T, x.shape[2]) for x in (u, dt, B, C)], zero
        for chunk, *parts in zip(chunks, *(x.split(T, 1)[::-1] for x in grads)):
            *grad, g, dA = kernel(*_ready(chunk, A_t), A_t, g, dA)
            for part, x in zip(parts, grad):
                part.copy_(x)
        du, ddt, dB, dC = (x.reshape(len(u), -1, x.shape[2])[:, : u.shape[1]] for x in grads)
        dh0 = g.unflatten(0, (u.shape[0], ctx.S))[:, 0].transpose(1, 2)
        return du, ddt, dA.sum(0).t(), dB, dC, dh0, None, None


@torch.compiler.disable(recursive=False)
def first_edition(u, dt, A, B, C, D, h0=None, return_state=False, chunk=16, compile=True):
    (batch, L, d), N = u.shape, A.shape[-1]
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    h0 = u.new_zeros(batch, d, N) if h0 is None else h0
    x, dt, A, B, C, D, h0 = (x.to(wide) for x in (u, dt, A, B, C, D, h0))
    if L < chunk:
        y, h = selective_scan_ref(x, dt, A, B, C, D, h0)
    else:
        # rows of the batch whose chunk fits a core's cache; a GPU takes all at once
        rows = max(1, 2**15 // A.numel()) if u.device.type == "cpu" else batch
        parts = zip(*(t.split(rows) for t in (x, dt, B, C, h0)))
        parts = [_SelectiveScan.apply(*t[:2], A, *t[2:], chunk, compile) for t in parts]
        y, h = map(torch.cat, zip(*parts)) if len(parts) > 1 else parts[0]
        y = torch.addcmul(y, D, x)
    return (y.to(u.dtype), h) if return_state else y.to(u.dtype)


# ---- measuring ----


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
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
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


def on_gpu(turns):
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for shape in GPU_SHAPES:
        a = [x.detach().cuda().requires_grad_() for x in inputs(*shape)]
        pairs = {"ours": (selective_scan, a), "first edition": (first_edition, a)}
        try:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        except ImportError:
            print("mamba-ssm is not installed: the official kernel is left out")
        else:  # its own layout, (B, D, L)
            turned = [x.detach().mT.contiguous() if x.dim() == 3 else x.detach() for x in a]
            pairs["official kernel"] = selective_scan_fn, [x.requires_grad_() for x in turned]
        for what, how in (("forward", forward), ("both", both)):

            def job(pair, how=how):
                how(*pair)
                torch.cuda.synchronize()

            t = medians({k: functools.partial(job, p) for k, p in pairs.items()}, turns)
            ratios = " | ".join(f"{k} {t[k] * 1e3:.2f} ms, {t[k] / t['ours']:.2f}x" for k in t)
            print(f"{shape} {what:8s} {ratios}", flush=True)


def start(turns, threads):
    """One process's figures: (shape, what) -> seconds by name."""
    torch.set_num_threads(threads)
    rivals = {"ours": selective_scan, "first edition": first_edition, "loop": loop}
    rivals |= {"parallel": parallel, "associative_scan": associative}
    try:
        import mambapy.pscan  # noqa: F401

        rivals["mambapy"] = mambapy_scan
    except ImportError:
        pass
    t0 = time.perf_counter()
    both(selective_scan, inputs(*SHAPES[0]))
    out = {"first call": time.perf_counter() - t0}
    for shape in SHAPES:
        a = inputs(*shape)
        for what, how in (("forward", forward), ("both", both)):
            jobs = {k: functools.partial(how, f, a) for k, f in rivals.items()}
            if shape[0] == 64:  # large: only the two that matter
                jobs = {k: jobs[k] for k in ("ours", "first edition", "loop")}
            out[f"{shape} {what}"] = medians(jobs, turns)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--one", choices=["plain", "keep"], help="one start, printed as JSON")
    args = parser.parse_args()
    if args.gpu:
        on_gpu(args.turns)
        return
    if args.one:
        if args.one == "keep":  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
            libc = ctypes.CDLL(None)
            assert libc.mallopt(-1, 2**31 - 1) and libc.mallopt(-3, 2**30)
        print(json.dumps(start(args.turns, args.threads)))
        return
    print(f"torch {torch.__version__}, {args.threads} threads; ratios: theirs / ours")
    for how in ("plain", "keep"):
        command = [sys.executable, __file__, "--one", how, "--turns", str(args.turns)]
        command += ["--threads", str(args.threads)]
        runs = [json.loads(subprocess.check_output(command).splitlines()[-1]) for _ in range(3)]
        print("pages kept:" if how == "keep" else "as it comes:")
        print("  first call", " ".join(f"{run['first call']:.1f} s" for run in runs))
        for case in [c for c in runs[0] if c != "first call"]:
            ours = statistics.median(run[case]["ours"] for run in runs)
            ratios = {}
            for name in runs[0][case]:
                ratios[name] = statistics.median(r[case][name] / r[case]["ours"] for r in runs)
            del ratios["ours"]
            text = " | ".join(f"{k} {v:.2f}x" for k, v in ratios.items())
            print(f"  {case:28s} {ours * 1e3:6.1f} ms | {text}", flush=True)
    for shape in SHAPES:
        print(f"{shape} kept for the backward: {kept(inputs(*shape)):.2f} x the inputs")
    scale = {L: inputs(1, L, 64, 16) for L in [2**k for k in range(9, 15)]}
    t = medians({L: functools.partial(both, selective_scan, a) for L, a in scale.items()}, 5)
    growth = [t[2 * L] / t[L] for L in scale if 2 * L in t]
    print("time(2L) / time(L), L = 512 .. 8192:", " ".join(f"{g:.2f}" for g in growth))
    for top in (1e-4, 1e-2, 1.0, 50.0):
        print(f"dt up to {top}: error against float64 {error(top):.1e}")


if __name__ == "__main__":
    main()
