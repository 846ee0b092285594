"""Training and sampling steps of diffusion.UNet beside denoising-diffusion-pytorch's Unet.

    pip install denoising-diffusion-pytorch && python tests/benchmark_diffusion.py

Both are timed in turns on the same batches with about the same number of parameters; the figure is
the median of the rounds. Without that package only this file's own times are printed.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from diffusion import Diffusion, UNet, cosine_schedule


def count(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


def networks(channels, mults, millions):
    """Ours and theirs (None where it is not installed) of about `millions` parameters."""
    args = {"dropout": 0.0, "attention": (len(mults) - 1,)}
    ours = [UNet(channels, d, mults, **args) for d in (16, 24, 32, 48, 64)]
    ours = min(ours, key=lambda m: abs(count(m) - millions))
    try:
        from denoising_diffusion_pytorch import Unet
    except ImportError as error:
        print(f"denoising-diffusion-pytorch cannot be imported ({error}): our times alone")
        return {"diffusion.py": ours}
    full = tuple(i == len(mults) - 1 for i in range(len(mults)))
    theirs = [
        Unet(d, dim_mults=mults, channels=channels, full_attn=full, flash_attn=False)
        for d in range(8, 72, 8)
    ]
    theirs = min(theirs, key=lambda m: abs(count(m) - count(ours)))
    return {"diffusion.py": ours, "denoising-diffusion-pytorch": theirs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, default 7")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 28, 32], help="image sizes")
    args = parser.parse_args()
    diffusion = Diffusion(cosine_schedule(200))

    def clock(step):
        if args.device == "cuda":
            torch.cuda.synchronize()
        t0 = time.perf_counter()
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - t0) * 1e3

    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for channels, size, mults, batch, millions in (
        (1, 8, (1, 2), 64, 0.3),
        (1, 28, (1, 2, 2), 32, 2.0),
        (3, 32, (1, 2, 2, 2), 16, 5.0),
    ):
        if size not in args.sizes:
            continue
        steps, times = {}, {}
        for name, model in networks(channels, mults, millions).items():
            model = model.to(args.device)
            opt = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
            x = torch.randn(batch, channels, size, size, device=args.device)
            t = torch.randint(1, 201, (batch,))

            def train(model=model, opt=opt, x=x, t=t):
                opt.zero_grad()
                loss = F.mse_loss(model(diffusion.q_sample(x, t, x), t.to(x.device)), x)
                loss.backward()
                opt.step()

            @torch.no_grad()
            def sample(model=model, x=x):
                diffusion.p_mean(x, 100, model(x, torch.full((len(x),), 100, device=x.device)))

            steps[name] = (model, train, sample)
        for turn in range(args.rounds + 2):
            for name, (_, *both) in steps.items():
                ms = [clock(step) for step in both]
                if turn > 1:  # two rounds to warm up
                    times.setdefault(name, []).append(ms)
        for name, ms in times.items():
            train, sample = (statistics.median(x) for x in zip(*ms))
            what = f"{channels}x{size}x{size}, batch {batch} | {name:27s}"
            size_of = f"{count(steps[name][0]):5.2f}M"
            print(
                f"{what} | {size_of} | train {train:7.1f} ms | sample {sample:7.1f} ms", flush=True
            )


if __name__ == "__main__":
    main()
