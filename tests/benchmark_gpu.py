"""Every file's training step at a size that fills a GPU, in bfloat16 autocast: speed and memory.

    python tests/benchmark_gpu.py                    # all sixteen, a few minutes on a fast GPU
    python tests/benchmark_gpu.py --only vit mamba   # some of them
    python tests/benchmark_gpu.py --small            # tiny sizes, also on a CPU: does it run?

The sizes are the papers' own where they fit one GPU. A step is loss, backward and AdamW (gan: a
step of D and one of G, with Adam) on random data that is on the device already; the views of
simclr, simclr_v2, moco and dino are made on the device, within the step. Arithmetic is what
torch.utils.flop_counter counts (products and convolutions) in one step over the median time of one.
"""

import argparse
import importlib
import math
import pathlib
import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))


def images(*shape):
    return torch.rand(*shape, device=DEVICE)


def ids(high, *shape):
    return torch.randint(1, high, shape, device=DEVICE)


def vae(m, small):
    model, x = m.VAE((28, 28), 50, (500, 500)), images(64 if small else 65536, 28, 28).round()
    return model, lambda model: -model.elbo(x), len(x), "images", "784-500-500-50"


def cvae(m, small):
    n = 64 if small else 65536
    x, y = images(n, 196).round(), images(n, 588).round()
    loss = lambda model: -m.hybrid_objective(model, x, y, 0.5).mean()  # noqa: E731
    return m.CVAE(), loss, n, "images", "500 units, both terms of Eq. 8"


def gan(m, small):
    n, dim, side = (8, 8, 8) if small else (512, 128, 64)
    G, D = (
        m.Generator((3, side, side), 100, dim, conv=True),
        m.Discriminator((3, side, side), dim, conv=True),
    )
    x, z = images(n, 3, side, side), torch.randn(n, 100, device=DEVICE)
    opts = [torch.optim.Adam(net.to(DEVICE).parameters(), 2e-4, (0.5, 0.9)) for net in (G, D)]

    def step(_):
        m.discriminator_step(G, D, opts[1], x, z, r1=0.1)
        return m.generator_step(G, D, opts[0], z)  # a number: the steps are done

    both = torch.nn.ModuleList([G, D])
    return both, step, n, "images", f"convolutions, {side}x{side} colour, R1"


def diffusion(m, small):
    n, side = (4, 8) if small else (256, 32)
    model = m.UNet(dim=8, mults=(1, 2)) if small else m.UNet()
    process, x = m.Diffusion(m.linear_schedule()), images(n, 3, side, side) * 2 - 1

    def loss(model):
        t = torch.randint(1, process.T + 1, (n,))
        return process.loss(model, x, t, torch.randn_like(x))

    return model, loss, n, "images", "CIFAR-10's U-Net, 32x32"


def video_diffusion(m, small):
    n, side, dim = (2, 8, 8) if small else (8, 64, 64)
    model = m.UNet3D(3, dim, (1, 2) if small else (1, 2, 4, 8))
    x = images(n, 16, 3, side, side) * 2 - 1

    def loss(model):
        lam = m.log_snr(torch.rand(n, device=DEVICE))
        return m.loss_v(model, x, lam, torch.randn_like(x))

    return model, loss, n, "videos", f"16 frames of {side}x{side}"


def transformer(m, small):
    n, L, words = (4, 8, 100) if small else (256, 64, 37000)
    model = m.Transformer(words, num_layers=1) if small else m.Transformer(words)
    src, tgt = ids(words, n, L), ids(words, n, L + 1)
    loss = lambda net: m.label_smoothing_loss(net(src, tgt[:, :-1]), tgt[:, 1:])  # noqa: E731
    return model, loss, 2 * n * L, "tokens", f"base, {n} pairs of {L} + {L} tokens"


def vit(m, small):
    n, side = (4, 32) if small else (256, 224)
    model = m.ViT(side, 16, dim=32, depth=1, heads=2) if small else m.ViT()
    x, y = images(n, 3, side, side), ids(1000, n)
    cost = torch.nn.functional.cross_entropy
    return model, lambda model: cost(model(x), y), n, "images", f"ViT-B/16, {side}x{side}"


def infini_attention(m, small):
    n, L = (2, 64) if small else (1, 32768)
    sizes = (32, 1, 2, 16) if small else (1024, 12, 8, 2048)
    model, x = m.InfiniTransformer(1000 if small else 32000, *sizes), ids(1000, n, L + 1)
    cost = torch.nn.functional.cross_entropy
    loss = lambda net: cost(net(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())  # noqa: E731
    return model, loss, n * L, "tokens", f"12 layers, d 1024, {L:,} tokens in segments of 2,048"


def s4(m, small):
    n, L, H, layers = (4, 64, 8, 1) if small else (50, 1024, 512, 6)
    model = m.S4Model(3, 10, H, layers, l_max=L)
    x, y = images(n, L, 3), ids(10, n)
    cost = torch.nn.functional.cross_entropy
    return model, lambda model: cost(model(x), y), n * L, "steps", f"6 layers, d 512, L {L:,}"


def mamba(m, small):
    n, L = (2, 64) if small else (8, 2048)
    model = m.Mamba(100, 32, 1) if small else m.Mamba(50280, 768, 24)
    x, cost = ids(100, n, L + 1), torch.nn.functional.cross_entropy
    loss = lambda net: cost(net(x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())  # noqa: E731
    return model, loss, n * L, "tokens", f"130m, {n} x {L:,} tokens"


def views(m, x, k=2, **how):
    """k views of each image, made as the scripts make them."""
    return [m.augment(x, torch.rand(len(x), 16), **how) for _ in range(k)]


def moco(m, small):
    n, side = (4, 32) if small else (256, 224)
    size = {"stem": "imagenet", "head": "mlp"}
    encoder = m.ENCODERS["small"](head="mlp") if small else m.ENCODERS["resnet50"](**size)
    model, x = m.MoCo(encoder, K=64 if small else 65536), images(n, 3, side, side)

    def loss(model):
        out, k = model(*views(m, x), torch.randperm(n))
        model.enqueue(k)
        model.update_key_encoder()
        return out

    return model, loss, n, "images", f"v2, ResNet-50, {side}x{side}"


def simclr(m, small):
    n, side = (4, 32) if small else (256, 224)
    encoder = m.ENCODERS["small"]() if small else m.ENCODERS["resnet50"](stem="imagenet")
    x = images(n, 3, side, side)
    loss = lambda net: m.nt_xent(*net(torch.cat(views(m, x)))[1].chunk(2))  # noqa: E731
    return m.SimCLR(encoder), loss, n, "images", f"ResNet-50, {side}x{side}"


def simclr_v2(m, small):
    n, x = (4 if small else 2048), images(4 if small else 50000, 3, 32, 32)
    model = m.SimCLR(m.resnet((1,), 8) if small else m.resnet())

    def loss(model):
        sample = m.sample_views(x, torch.Generator().manual_seed(0), 2, n)[1]
        return m.nt_xent(*model(sample).chunk(2))

    return model, loss, n, "images", "ResNet-18, 32x32"


def dino(m, small):
    n, K = (2, 64) if small else (64, 65536)
    sizes = {"image_size": 32, "dim": 32, "depth": 1, "heads": 2} if small else {}
    student = m.Network(m.ViT(**sizes), m.DINOHead(32 if small else 384, K)).to(DEVICE)
    teacher = m.copy.deepcopy(student).requires_grad_(False)
    cost, x = m.DINOLoss(K).to(DEVICE), images(n, 3, *[32 if small else 224] * 2)
    side = 16 if small else 96

    def loss(student):
        large, local = views(m, x), views(m, x, 8, crop=(0.05, 0.4), size=side)
        with torch.no_grad():
            t = teacher(large)
        out = cost(student(large + local), t, 0.04)
        cost.update_center(t)
        m.update_teacher(teacher, student, 0.996)
        return out

    return student, loss, n, "images", f"ViT-S/16, 2 views of 224 and 8 of {side}"


def mae(m, small):
    n, side = (4, 32) if small else (256, 224)
    model = m.MAE(side, 16, dim=32, depth=1, heads=2, decoder_depth=1) if small else m.MAE()
    x = images(n, 3, side, side)
    return model, lambda model: model(x)[0], n, "images", f"ViT-L/16, 75 % hidden, {side}x{side}"


def dqn(m, small):
    n, model = (8 if small else 4096), m.QNetwork(6, "nature")
    target = m.copy.deepcopy(model).to(DEVICE)
    s = (images(n, 5, 84, 84) * 255).byte()
    batch = s[:, :4], ids(6, n), images(n), s[:, 1:], images(n).round()
    loss = lambda model: m.dqn_loss(model, target, batch)  # noqa: E731
    return model, loss, n, "transitions", "the Nature network"


FILES = [vae, cvae, gan, diffusion, video_diffusion, transformer, vit, infini_attention, s4, mamba]
FILES += [moco, simclr, simclr_v2, dino, mae, dqn]


def measure(build, args):
    """-> one line of the table."""
    torch.manual_seed(0)
    model, loss, n, unit, what = build(importlib.import_module(build.__name__), args.small)
    model.to(DEVICE)
    if build in (moco, simclr):
        model.to(memory_format=torch.channels_last)  # as the scripts do
    weights = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(weights, 1e-4, fused=DEVICE == "cuda")

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            out = loss(model)
        if isinstance(out, float):
            return out
        opt.zero_grad()
        out.backward()
        opt.step()
        return out.item()

    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    first = step()
    times, began = [], time.perf_counter()
    while len(times) < 4 or time.perf_counter() - began < args.seconds and len(times) < 200:
        wait()
        t0 = time.perf_counter()
        last = step()
        wait()
        times.append(time.perf_counter() - t0)
    t, count = statistics.median(times[2:]), FlopCounterMode(display=False)
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else math.nan
    if build is not gan:  # whose penalty is a gradient of a gradient: the counter can't follow
        with count:  # last: under it compiled kernels would be compiled again
            step()
    if not (math.isfinite(first) and math.isfinite(last)):
        raise FloatingPointError(f"loss {first}, then {last}")
    size = sum(p.numel() for p in weights) / 1e6
    flops = f"{count.get_total_flops() / t / 1e12:.0f}" if build is not gan else "-"
    speed = f"{n / t:,.0f} {unit}/s | {t * 1e3:.1f} | {flops}"
    return f"{build.__name__} | {what} | {size:.1f}M | {n:,} | {speed} | {memory:.1f}"


def main():
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [f.__name__ for f in FILES]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=4.0, help="per file, at least 4 steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    DEVICE = args.device
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(f"torch {torch.__version__}, {name}")
    for build in FILES:
        if build.__name__ in args.only:
            try:
                print("|", measure(build, args), "|", flush=True)
            except Exception as error:  # one that doesn't fit leaves the others their turn
                print(f"{build.__name__}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
