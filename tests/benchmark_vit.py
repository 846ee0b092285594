"""Forward and training step of vit.ViT beside vit-pytorch and timm, alternating in one process.

python tests/benchmark_vit.py [--size Ti] [--batch 8] [--rounds 7]; packages that are missing are
left out (`pip install vit-pytorch timm`). The figure is the median over rounds, in milliseconds.
"""

import argparse
import pathlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from vit import ViT

# name: image, patch, D, depth, heads, classes
SIZES = {
    "demo": (32, 8, 64, 4, 4, 10),
    "small": (32, 4, 96, 6, 3, 10),
    "Ti": (224, 16, 192, 12, 3, 1000),
}


def candidates(image, patch, dim, depth, heads, classes):
    models = {"vit.py": ViT(image, patch, 3, classes, dim, depth, heads)}
    try:
        from timm.models.vision_transformer import VisionTransformer

        models["timm"] = VisionTransformer(
            image, patch, num_classes=classes, embed_dim=dim, depth=depth, num_heads=heads
        )
        models["timm"].load_state_dict(models["vit.py"].state_dict())
    except (ImportError, RuntimeError) as error:
        print(f"timm left out: {error}", file=sys.stderr)
    try:
        from vit_pytorch import ViT as Lucid

        models["vit-pytorch"] = Lucid(
            image_size=image, patch_size=patch, num_classes=classes, dim=dim, depth=depth,
            heads=heads, mlp_dim=4 * dim, dim_head=dim // heads,
        )  # fmt: skip
    except (ImportError, RuntimeError) as error:
        print(f"vit-pytorch left out: {error}", file=sys.stderr)
    return models


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    models = candidates(*SIZES[args.size])
    x = torch.randn(args.batch, 3, SIZES[args.size][0], SIZES[args.size][0])
    y = torch.randint(SIZES[args.size][-1], (args.batch,))
    if "timm" in models:  # the same weights: the same output
        with torch.no_grad():
            gap = (models["vit.py"].eval()(x) - models["timm"].eval()(x)).abs().max().item()
            A = models["vit.py"].forward_features(x) - models["timm"].forward_features(x)
        print(f"largest difference to timm: logits {gap:.1e}, features {A.abs().max().item():.1e}")
    optimizers = {name: torch.optim.AdamW(m.parameters()) for name, m in models.items()}
    times = {(name, part): [] for name in models for part in ("forward", "step")}

    def clock(name, part, work):
        t0 = time.perf_counter()
        work()
        times[name, part].append((time.perf_counter() - t0) * 1e3)

    for _ in range(args.rounds + 1):
        for name, model in models.items():

            def forward(model=model):
                with torch.no_grad():
                    model.eval()(x)

            def step(model=model, optimizer=optimizers[name]):
                loss = F.cross_entropy(model.train()(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            clock(name, "forward", forward)
            clock(name, "step", step)
    for part in ("forward", "step"):
        best = {name: statistics.median(times[name, part][1:]) for name in models}
        print(f"{args.size} {part:8s}", " | ".join(f"{n} {t:.1f} ms" for n, t in best.items()))


if __name__ == "__main__":
    main()
