"""SimCLRv2: learn from all images, name them with a few labels, teach what was named.

Paper    Big Self-Supervised Models are Strong Semi-Supervised Learners -- Ting Chen, Simon
         Kornblith, Kevin Swersky, Mohammad Norouzi, Geoffrey Hinton, June 2020, arXiv:2006.10029v2
Idea     Most images have no label, and they serve twice. First, two views of an image are to agree:
         general features. A few labels then turn the network, with the first layer of its
         projection head, into a classifier, whose guesses on all images train a student.
Figure   (Figure 3; - - -> copies weights)
         1 all x, no labels         2 a few (x, y)          3 all x, no labels
         two views (2 N, 3, H, W)   x (n, 3, H, W)          x (n, 3, H, W) -----+
           |                          |                       |                 |
           f, a ResNet  - - - - - ->  f                       f, g_1, fc        student f, fc
           | h (2 N, D)               | h (n, D)              | of 2, fixed     | of any size
           g_1  - - - - - - - - - ->  g_1                     |                 |
           g_2, g_3                   fc, new                 | logits (n, K)   | logits (n, K)
           | z (2 N, d)               | logits (n, K)         softmax(./tau)    softmax(./tau)
         NT-Xent, Eq. 1             cross-entropy with y      P^T -- Eq. 2 ---- P^S
Symbols  encoder | f(.) | x -> h (B, D)            head | g(.) | three layers, h -> z (B, d)
         z1, z2 | z_i, z_j | views' outputs (N, d)  temperature | tau | > 0, of Eq. 1 and of Eq. 2
         classifier | f^task | x -> logits (B, K)   alpha | alpha | share of Eq. 2 in Eq. 3
Differs  Basic blocks, no selective kernels; AdamW for LARS; no blur. The memory: the slow network's
         outputs for both views are negatives in the steps to come. One rate, decay and warm-up
         (paper, stage 2: a small rate, neither), one augmentation (2 and 3: crop and flip). As in
         the official notebook tau is 1, both see one view, and the student starts anew.
Run      python simclr_v2.py                  # canvas digits, some 6 minutes on one core
         python simclr_v2.py --data cifar10.npz --save cifar.pt       # ResNet-18, long; a GPU
Expect   Unseen digits, 58 | 580 of 5,805 labels, seeds 0-2: labels alone .523 +- .021 | .859 +-
         .015; fine-tuned from h .650 +- .013 | .901 +- .012, from g_1 .641 +- .020 | .890 +- .012
         (in the paper better); distilled .672 +- .031 | .900 +- .006, with a quarter of the weights
         .659 +- .029 | .866 +- .021 (labels alone .448 | .801). CIFAR-10 (README), 450 labels, in
         this order .376, .453, .449, .474, .469. ImageNet 57.9 | 68.4 %, distilled 73.9 | 77.5.
"""

import argparse
import copy
import math
import os
import signal
import sys
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Networks: f, its head g with a memory, and what classifies (Section 2) ----


class Block(nn.Module):
    """Two 3 x 3 convolutions and a way around them: (B, c_in, H, W) -> (B, c, H', W')."""

    def __init__(self, c_in: int, c: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        conv = nn.Conv2d(c_in, c, 1, stride, bias=False), nn.BatchNorm2d(c)
        self.downsample = nn.Identity() if c_in == c else nn.Sequential(*conv)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


def resnet(layers=(2, 2, 2, 2), width=64, small=False) -> nn.Sequential:
    """f, a ResNet (arXiv:1512.03385): x (B, 3, H, W) -> h (B, dim). Names are torchvision's, less
    `fc`; the stem is CIFAR's, 3 x 3 without pooling; small: with stride 2 and pooling."""
    net = nn.Sequential()
    net.conv1 = nn.Conv2d(3, width, 3, 1 + small, 1, bias=False)
    net.bn1, net.relu = nn.BatchNorm2d(width), nn.ReLU()
    net.maxpool = nn.MaxPool2d(3, 2, 1) if small else nn.Identity()
    for i, n in enumerate(layers):
        c = width * 2**i
        blocks = [Block(c // 2, c, 2) if i and not j else Block(c, c, 1) for j in range(n)]
        net.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
    net.avgpool, net.flatten, net.dim = nn.AdaptiveAvgPool2d(1), nn.Flatten(), c
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return net.to(memory_format=torch.channels_last)  # a quarter faster on a CPU


class SimCLR(nn.Module):
    """x (B, 3, H, W) -> z (B, dim). A layer of the head: linear, batch norm and, but for the last,
    ReLU, as in the official code. With memory = M > 0, z of past steps are further negatives."""

    def __init__(self, encoder: nn.Module, dim=128, layers=3, memory=0, m=0.999):
        super().__init__()
        self.encoder, self.head, self.m, D = encoder, nn.Sequential(), m, encoder.dim
        for d in [D] * (layers - 1) + [dim]:
            g = nn.Linear(D, d, bias=False), nn.BatchNorm1d(d), nn.ReLU()
            self.head.append(nn.Sequential(*g))
        del self.head[-1][2]
        self.head[-1][1].bias.requires_grad_(False)  # it stays zero
        self.slow = copy.deepcopy(self).requires_grad_(False) if memory else None
        self.register_buffer("memory", F.normalize(torch.randn(memory, dim)) if memory else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    @torch.no_grad()
    def remember(self, x: Tensor):
        """After a step: the slow network follows, its z of x (B, 3, H, W) displace the oldest."""
        for slow, p in zip(self.slow.parameters(), self.parameters()):  # the slow ones come last
            slow.lerp_(p, 1 - self.m)  # slow = m slow + (1 - m) p
        z = F.normalize(self.slow(x), dim=1)
        self.memory.copy_(torch.cat([self.memory, z])[-len(self.memory) :])


def classifier(model: SimCLR, classes: int, layer=0) -> nn.Sequential:
    """f^task, x (B, 3, H, W) -> logits (B, classes): a copy of f and of the first `layer` layers of
    its head (0: none, as SimCLR had it; 1: the paper's choice; 2), and a new linear layer."""
    encoder, head = copy.deepcopy((model.encoder, model.head[:layer]))
    return nn.Sequential(encoder, head, nn.Linear(encoder.dim, classes))


# ---- 2. Losses, and the three stages (Section 2, Figure 3) ----


def nt_xent(z1: Tensor, z2: Tensor, temperature=0.1, memory: Tensor | None = None) -> Tensor:
    """Eq. 1, the mean over all views; z1, z2 (N, d), row i of both from one image -> (). memory
    (M, d), of length one: further negatives. At chance it is ln(2 N - 1 + M)."""
    N, z = len(z1), F.normalize(torch.cat([z1, z2]), dim=1)  # (2 N, d)
    sim = (z @ z.T / temperature).fill_diagonal_(-math.inf)  # (2 N, 2 N); 1[k != i]: not itself
    if memory is not None:  # no gradient to what is remembered: its network only follows
        sim = torch.cat([sim, z @ memory.detach().T / temperature], 1)  # (2 N, 2 N + M)
    return F.cross_entropy(sim, torch.arange(2 * N, device=z.device).roll(N))  # answer: partner


def distill_loss(student: Tensor, teacher: Tensor, temperature=1.0) -> Tensor:
    """Eq. 2, the mean over images; logits of both (B, classes) -> ()."""
    p_t = F.softmax(teacher.detach() / temperature, dim=1)  # P^T(y | x; tau): the teacher is fixed
    return F.cross_entropy(student / temperature, p_t)  # P^S has the same tau


def pretrain(model: SimCLR, x: Tensor, sample, loop, temperature=0.1):
    """Stage 1: all images x, no labels. loop(model) yields a step's random numbers and what takes
    its loss (zero_grad, backward, step); sample(x, numbers, k) -> n rows, views (k n, 3, H, W)."""
    for numbers, update in loop(model):
        _, views = sample(x, numbers, 2)  # one pass for both, so that they share batch statistics
        update(nt_xent(*model(views).chunk(2), temperature, model.memory))  # Eq. 1
        if model.memory is not None:
            model.remember(views)


def finetune(model: nn.Module, x: Tensor, y: Tensor, sample, loop):
    """Stage 2: the few labelled images x, their labels y (n,). All weights learn."""
    for numbers, update in loop(model):
        rows, views = sample(x, numbers)
        update(F.cross_entropy(model(views), y[rows]))


def distill(student, teacher, x: Tensor, few, sample, loop, temperature=1.0, alpha=1.0):
    """Stage 3: all images x without labels, and where alpha < 1 the few labelled, (x, y)."""
    teacher.eval()  # fixed: neither its weights nor its batch statistics follow the student's data
    for numbers, update in loop(student):
        _, views = sample(x, numbers)
        with torch.no_grad():
            guess = teacher(views)
        loss = alpha * distill_loss(student(views), guess, temperature)  # Eq. 2
        if alpha < 1:
            rows, views = sample(few[0], numbers)
            loss = loss + (1 - alpha) * F.cross_entropy(student(views), few[1][rows])  # Eq. 3
        update(loss)


# ---- 3. Views and data ----


def sample_views(x, g, k=1, n=128, crop=0.08, rotate=0, flip=0.5, jitter=0.8, hue=0.2, grey=0.2):
    """x uint8 (N, 3, H, W) -> n random rows (n,), k views of each (k n, 3, H, W), drawn by g. crop:
    least share of the area; rotate: degrees; flip, grey: probabilities; jitter: brightness,
    contrast, saturation by up to 1 +- jitter, hue by up to this share of the circle."""
    rows = torch.randint(len(x), (n,), generator=g).to(x.device)
    u = torch.rand(k * n, 12, generator=g).to(x.device)  # uniform in [0, 1)
    x, s = x[rows].repeat(k, 1, 1, 1) / 255, 2 * u - 1  # s: uniform in [-1, 1)
    area = (crop + (1 - crop) * u[:, 0]).log()
    ratio = torch.clamp(s[:, 1] * math.log(4 / 3), area, -area)  # no side longer than the image's
    half = torch.stack([(area + ratio) / 2, (area - ratio) / 2], 1).exp()  # (B, 2), x and y
    place, angle = s[:, 2:4] * (1 - half), s[:, 4] * math.radians(rotate)
    mirror, sin, cos = 1 - 2.0 * (u[:, 5] < flip), angle.sin(), angle.cos()
    R = torch.stack([mirror * cos, -sin, mirror * sin, cos], 1).view(-1, 2, 2)
    M = torch.cat([half[..., None] * R, place[..., None]], 2)  # place in the view -> in the image
    grid = F.affine_grid(M, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    yiq = [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
    yiq, on = x.new_tensor(yiq), (u[:, 6] < 0.8).to(x)
    bright, contrast, vivid = (1 + jitter * s[:, 7:10] * on[:, None]).unbind(1)
    vivid, turn = vivid * (u[:, 11] >= grey), 2 * math.pi * hue * s[:, 10] * on
    a, b, zero = vivid * turn.cos(), vivid * turn.sin(), torch.zeros_like(on)
    T = torch.stack([zero + 1, zero, zero, zero, a, -b, zero, b, a], 1).view(-1, 3, 3)  # on Y, I, Q
    A = torch.linalg.inv(yiq) @ T @ yiq * (bright * contrast).view(-1, 1, 1)  # on R, G, B
    level = (x.mean((2, 3)) @ yiq[0]) * bright * (1 - contrast)  # contrast leaves the mean grey
    return rows, (A @ x.flatten(2) + level.view(-1, 1, 1)).view(x.shape).clamp(0, 1)


def canvas_digits(x: Tensor, seed: int) -> Tensor:
    """Digits (N, 1, 8, 8) in [0, 1] -> uint8 (N, 3, 32, 32): each enlarged to 14-22 pixels, turned
    by up to 15 degrees, brightly coloured and put somewhere on a dark canvas with some noise."""
    g, N = torch.Generator().manual_seed(seed), len(x)
    share = (14 + 8 * torch.rand(N, 1, 1, generator=g)) / 32  # of the canvas's side
    place = (2 * torch.rand(N, 2, 1, generator=g) - 1) * (1 - share)
    angle = (2 * torch.rand(N, generator=g) - 1) * math.pi / 12
    A = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(N, 2, 2) / share
    grid = F.affine_grid(torch.cat([A, -A @ place], 2), [N, 1, 32, 32], align_corners=False)
    ink = F.grid_sample(x, grid, align_corners=False)  # (N, 1, 32, 32)
    colour = (c := torch.rand(N, 3, 1, 1, generator=g)) / c.amax(1, keepdim=True)
    x = 0.1 * (1 - ink) + colour * ink + 0.02 * torch.randn(N, 3, 32, 32, generator=g)
    return (x.clamp(0, 1) * 255).byte()


def load_data(path: str) -> list[Tensor]:
    """digits or a Keras-style npz -> x_train uint8 (N, 3, H, W), y_train (N,), x_test, y_test. Of
    1,290 digits five canvases each, in order: the last tenth is of others; of 500, three each."""
    if path == "digits":
        from sklearn.datasets import load_digits

        x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
        x, y = x.view(-1, 1, 8, 8).float() / 16, y.long()
        rows, test = torch.arange(1290), torch.arange(1297, 1797)
        rows, test = rows.repeat_interleave(5), test.repeat_interleave(3)
        return [canvas_digits(x[rows], 0), y[rows], canvas_digits(x[test], 1), y[test]]
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        images = [torch.from_numpy(file[k]) for k in ("x_train", "x_test")]
        labels = [torch.from_numpy(file[k]) for k in ("y_train", "y_test")]
    x, x_test = (t.view(*t.shape[:3], -1).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) for t in images)
    y, y_test = (t.reshape(len(t), -1)[:, 0].long() for t in labels)
    good = {t.dtype for t in images} == {torch.uint8} and x.shape[1:] == x_test.shape[1:]
    good = good and (len(x), len(x_test)) == (len(y), len(y_test)) and y_test.max() <= y.max()
    if not good or min(y.min(), y_test.min()) < 0 or any(map(torch.is_floating_point, labels)):
        raise ValueError(f"{path}: images must be uint8 (N, H, W[, 3]), labels 0 .. K - 1")
    return [x, y, x_test, y_test]


def labelled(y: Tensor, percent: float, seed: int) -> Tensor:
    """The rows whose labels may be seen: drawn by seed, as many of each class, but for one."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    y, K = y[order], int(y.max()) + 1
    rank = F.one_hot(y).cumsum(0).gather(1, y[:, None])[:, 0]  # within its class
    return order[(rank * K + y).argsort()][: max(1, round(percent / 100 * len(y)))]


# ---- 4. The demo: a batch and its views depend on (seed, step) alone: a resumed run is exact ----


def train(name: str, steps: int, args, state: dict, model: nn.Module):
    """The loop of a stage, from where `state` left it: yields (generator, update) for each step."""
    from tqdm import tqdm

    optimizer, t0 = torch.optim.AdamW(model.parameters(), weight_decay=1e-4), time.time()
    if first := state["done"].get(name, 0):
        model.load_state_dict(state["models"][name])
        optimizer.load_state_dict(state["optimizers"][name])
        while first < steps and next(reversed(state["done"])) != name:
            state["done"].popitem()  # it goes on: the stages after it are out of date

    def update(loss):
        optimizer.zero_grad(); loss.backward()  # fmt: skip
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        state["loss"] = loss.item()
        if not math.isfinite(state["loss"] + norm.item()):
            raise FloatingPointError(f"{name}: loss {loss:.4g}, gradient {norm:.4g} at step {step}")
        optimizer.step()

    model.train()
    for step in tqdm(range(first + 1, steps + 1), name, disable=None):
        rate = args.lr * min(1, step / (0.05 * steps))  # the paper: warm-up for 5 % of the steps
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        yield torch.Generator().manual_seed(args.seed * 10**10 + step), update
        if state["stop"] or step % args.log_every == 0 or step == steps:
            state["done"][name], ms = step, (time.time() - t0) / (step - first) * 1e3
            state["models"][name], state["step"] = model.state_dict(), state["done"]["pretrain"]
            state["optimizers"][name] = optimizer.state_dict()
            state["history"].append((name, step, now := state["loss"]))
            tqdm.write(f"step {step:5d}/{steps} | {name} loss {now:.4f} | {ms:.0f} ms/step")
            if args.save:  # beside its place, then moved there: a crash leaves the old one
                torch.save(state, args.save + ".tmp")
                os.replace(args.save + ".tmp", args.save)
            if state["stop"]:
                raise KeyboardInterrupt
    model.eval()


def run_stages(args, x: Tensor, y: Tensor, state: dict, models: dict, shown: dict):
    """All stages for each share of labels -> models by (name, labels), shown: rows by labels."""
    first, later = (partial(sample_views, n=args.batch_size, **v) for v in VIEWS[args.npz])
    torch.manual_seed(args.seed)
    model = SimCLR(resnet(*ENCODERS[args.encoder]), memory=args.memory, m=args.m).to(args.device)
    pretrain(model, x, first, partial(train, "pretrain", args.steps, args, state), args.temperature)

    def run(stage, name, start, *inputs, layer=0, steps=args.tune_steps, **how):
        torch.manual_seed(args.seed)
        start = start if start is model else SimCLR(resnet(*ENCODERS[start]))
        models[name, n] = classifier(start, args.classes, layer).to(args.device)
        loop = partial(train, f"{name} {n}", steps, args, state)
        stage(models[name, n], *inputs, later, loop, **how)

    how = {"steps": args.distill_steps, "temperature": args.tau, "alpha": args.alpha}
    sizes = {"": args.encoder, ", small": args.student}
    for percent in args.labels:
        rows = labelled(y, percent, args.seed)
        few, n, shown[len(rows)] = (x[rows], y[rows]), len(rows), rows  # no other label is seen
        for end, size in sizes.items():
            run(finetune, f"labels alone{end}", size, *few)
        for layer in sorted({0, args.finetune_from}):
            name = f"fine-tuned from {f'g_{layer}' if layer else 'h'}"
            run(finetune, name, model, *few, layer=layer)
        for end, size in sizes.items():
            run(distill, f"distilled{end}", size, models[name, n], x, few, **how)


def draw_picture(args, x: Tensor, y: Tensor, table: dict, shown: dict):
    """The labels that were seen, and what each way made of them, as bars."""
    from matplotlib.figure import Figure  # without pyplot no window is opened

    fig, n, W = Figure(figsize=(14, 5), layout="constrained"), min(shown), x.shape[3]
    left, axis = fig.subplots(1, 2, width_ratios=[1, 1.9])
    c = min(10, n)
    image = x[shown[n][: min(5, n // c) * c]].unflatten(0, (-1, c))  # balanced: columns are classes
    left.imshow(image.permute(0, 3, 1, 4, 2).reshape(-1, c * W, 3).cpu())
    left.axis("off")
    left.set_title(f"{image[:, :, 0, 0, 0].numel()} of {n} labelled images; {len(x) - n} have none")
    width = 0.9 / len(table)
    for j, (name, row) in enumerate(table.items()):
        place = [i + j * width for i in range(len(row))]
        axis.bar_label(axis.bar(place, row.values(), 0.9 * width, label=name), fmt="%.2f")
    axis.set_xticks([i + 0.4 for i in range(len(shown))], [f"{k} labels" for k in shown])
    axis.axhline(1 / args.classes, color="k", ls=":", lw=1)
    axis.set(title="accuracy on unseen images; dotted: chance", ylim=(0, 1.15))
    axis.legend(ncols=3, loc="upper center")
    fig.savefig(os.path.join(args.out, "simclr_v2.png"), dpi=80)


ENCODERS = {"tiny": ((1, 1, 1), 16, True), "small": ((1, 1, 1), 32, True)}  # of `resnet`
ENCODERS |= {"narrow18": ((2, 2, 2, 2), 32), "resnet18": ((2, 2, 2, 2), 64)}
DIGITS = {"crop": 0.5, "rotate": 20, "flip": 0, "jitter": 0.5, "hue": 0.5, "grey": 0.4}
# of stage 1, of 2 and 3; on an npz the paper's, with SimCLR's colours for CIFAR-10 (Appendix B.9)
VIEWS = (DIGITS, DIGITS), ({"jitter": 0.4, "hue": 0.1}, {"jitter": 0, "hue": 0, "grey": 0})
DEFAULTS = {  # on digits, on an npz, --quick, least, most, meaning
    "steps": (1500, 70000, 3, 1, math.inf, "of pretraining (paper: 800 epochs)"),
    "tune_steps": (300, 4000, 2, 1, math.inf, "of fine-tuning (60, 30 epochs), labels alone"),
    "distill_steps": (400, 35000, 2, 1, math.inf, "of distillation (paper: 400 epochs)"),
    "batch_size": (128, 512, 16, 2, 10**6, "images (paper: 4096)"),
    "lr": (3e-3, 1e-3, 3e-3, 1e-12, 1e32, "peak rate (paper: LARS)"),
    "temperature": (0.2, 0.5, 0.2, 1e-3, 99, "tau of Eq. 1 (paper: 0.1)"),
    "tau": (1.0, 1.0, 1.0, 1e-3, 99, "of Eq. 2 (paper: 0.1, a small student 1)"),
    "alpha": (1.0, 1.0, 1.0, 0, 1, "share of Eq. 2 in Eq. 3 (paper: 1)"),
    "finetune_from": (1, 1, 1, 0, 2, "layer of the head, 0: its input (paper: 1)"),
    "memory": (0, 0, 0, 0, 10**7, "length, 0: none (paper: mostly none, else 64K)"),
    "m": (0.99, 0.999, 0.99, 0, 1, "momentum of the memory's network (paper: 0.999)"),
    "seed": (0, 0, 0, 0, 10**8, "of weights, batches, views, labels"),
    "log_every": (100, 500, 1, 1, math.inf, "steps between log lines"),
}


def parse(argv):
    """-> args, data, state. Bad input: one line on stderr, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or FILE.npz in the format of Keras's cifar10")
    flag("--labels", type=float, nargs="+", help="per cent of them, default 1 10, as the paper")
    flag("--encoder", choices=ENCODERS, help="default small, npz resnet18 (paper: ResNet-50, -152)")
    flag("--student", choices=ENCODERS, help="the small one: default tiny, npz narrow18")
    for name, (value, npz, *_, text) in DEFAULTS.items():
        text = f"default {value}{f', npz {npz}' * (npz != value)}: {text}"
        flag(f"--{name.replace('_', '-')}", type=type(value), help=text)
    flag("--validate", action="store_true", help="judge on the last tenth of the training images")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint: the rest of its --steps is done, then it is judged")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, default=0, help="exit 1 if `distilled` (fewest labels) is lower")
    args, ckpt = parser.parse_args(argv), {}
    try:
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        torch.zeros(1, device=args.device)
        if args.load:
            ckpt = torch.load(args.load, map_location=args.device, weights_only=True)
            if not isinstance(ckpt, dict) or ckpt.get("script") != "simclr_v2":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
        own = ckpt.get("args", {})
        args.data = args.data or own.get("data", "digits")
        npz = args.npz = args.data != "digits"
        args.labels = args.labels or own.get("labels", [1.0, 10.0])
        args.encoder = args.encoder or own.get("encoder", ("small", "resnet18")[npz])
        args.student = args.student or own.get("student", ("tiny", "narrow18")[npz])
        for name, (*values, low, high, _) in DEFAULTS.items():
            if getattr(args, name) is None:
                setattr(args, name, own.get(name, values[2 if args.quick else npz]))
            if not low <= getattr(args, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must lie between {low} and {high}")
        x, y, x_test, y_test = load_data(args.data)
        n, args.classes = len(x) * 9 // 10, int(y.max()) + 1
        data = [x[:n], y[:n], *((x[n:], y[n:]) if args.validate else (x_test, y_test))]
        data = [t[: 300 if args.quick else None].to(args.device) for t in data]
        if args.batch_size > len(data[0]) or not all(0 < p <= 100 for p in args.labels):
            raise ValueError(f"--batch-size must be at most {len(data[0])}, --labels 0 to 100")
        for name in ("encoder", "student", "finetune_from", "memory", "seed", "classes"):
            if getattr(args, name) != own.get(name, getattr(args, name)):
                raise ValueError(f"{args.load} was trained with {name} {own[name]}")
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "simclr_v2.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    state = {"done": {}, "history": [], "models": {}, "optimizers": {}} | ckpt
    state |= {"script": "simclr_v2", "args": vars(args), "stop": []}
    return args, data, state


def main(argv=None) -> int:
    args, (x, y, x_test, y_test), state = parse(argv)
    net, t0 = resnet(*ENCODERS[args.encoder]), time.time()
    print(f"simclr_v2 | {sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters", end="")
    kind = f"{os.path.basename(args.data)} {len(x)}/{len(x_test)}"
    print(f" | {args.device} | seed {args.seed} | {kind}", flush=True)
    before = signal.signal(signal.SIGINT, lambda *_: state["stop"].append(1))  # ends after a step
    models, shown = {}, {}
    try:
        run_stages(args, x, y, state, models, shown)
    except FloatingPointError as error:
        print(f"simclr_v2.py: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the table has what was trained so far")
    finally:
        signal.signal(signal.SIGINT, before)
    table, few = {}, min(shown, default=0)
    with torch.no_grad():
        for (name, n), model in models.items():
            guess = torch.cat([model.eval()(part / 255).argmax(1) for part in x_test.split(500)])
            table.setdefault(name, {})[n] = (guess == y_test).float().mean().item()
    print(f"{'test accuracy':24}" + "".join(f"{n:>8} labels" for n in shown))
    for name, row in table.items():
        print(f"{name:24}" + "".join(f"{acc:15.4f}" for acc in row.values()))
    if few:
        draw_picture(args, x, y, table, shown)
    row = " | ".join(f"{name} {accs.get(few, 0):.4f}" for name, accs in reversed(table.items()))
    row += f" | chance {1 / args.classes:.3f} | {time.time() - t0:.0f} s"
    print(f"test acc, {few} labels: {row}")
    return 130 if state["stop"] else int(table.get("distilled", {}).get(few, 0.0) < args.target)


if __name__ == "__main__":
    sys.exit(main())
