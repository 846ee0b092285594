"""VAE: an encoder and a decoder trained by one lower bound of the log-likelihood.

Paper    Auto-Encoding Variational Bayes -- Diederik P. Kingma, Max Welling,
         December 2013, arXiv:1312.6114v11
Idea     The likelihood of a model with latent z is an integral nobody can do. Bound it from below
         with an encoder q(z|x), and write its sample as z = mu + sigma eps, so that gradients pass
         through: encoder and decoder then climb the bound together, by minibatch.
Figure   (Figure 1 with the MLPs of Appendix C: D pixels, J latents, L draws)

         x (B, D) -> MLP, tanh -> mu, log sigma^2 (B, J) ----> D_KL to N(0, I) (B,)  Appendix B
                                       |                              |
                eps ~ N(0, I) -> z = mu + sigma eps (L, B, J)  Eq. 4  | minus
                                       |                              v
                            MLP, tanh -> logits (L, B, D) -> mean of log p(x|z) over L -> bound (B,)

         new images: z ~ p(z) = N(0, I) (n, J) -> the same MLP -> means of p(x|z) (n, H, W)
Symbols  x | x | image (B, D), D = H W; in {0, 1} for the Bernoulli likelihood
         z | z | latent (L, B, J)             eps | epsilon | noise (L, B, J)
         mu, log_var | mu, log sigma^2 | of q(z|x), (B, J); of a Gaussian p(x|z), (..., D)
         encoder, decoder | phi, theta | networks of q(z|x) and p(x|z)   L | L | draws per image
         elbo | L(theta, phi; x) | the lower bound, in nats per image
Differs  Adam with a cosine, no prior on theta (paper: Adagrad, small weight decay), batches of 128
         (100), torch's initialisation (N(0, .01)). As in Burda et al. (1509.00519) pixels are
         binarised anew at each step, and there are two layers of 200 units, 400 for a file, not one
         of 500. log p(x) by importance sampling, not Appendix D.
Run      python vae.py                        # 8x8 digits, under a minute of one free CPU core
         python vae.py --load FILE            # no training: table, picture, out/vae_samples.npy
         python vae.py --data mnist.npz       # 28x28, 175,000 steps, some 55 minutes of one core
Expect   digits, test, nats per image, 3 seeds: bound -22.35 +- .02 (k = 500), ELBO -22.73 +- .02 |
         independent pixels -27.24, class mixture -24.17. FD .77 +- .17, worse than a Gaussian per
         class .43 (one Gaussian 1.45, floor .21). MNIST, seed 0: bound -86.26, ELBO -90.04, FD .89
         (floor .39, Gaussian per class 1.59). 200 units, 80,000 steps: -90.50; Burda et al. -86.76.
"""

import argparse
import math
import os
import signal
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- 1. Densities, in nats and summed over the last axis (Appendices B and C) ----

# The most asked question here: sum or mean? A log-likelihood is a SUM over pixels, the KL a SUM
# over latents; only then may one average, over images and noise. A mean over D pixels weighs the
# KL D times too much, and z carries nothing; the small KL weights in public code put that D back.


def log_normal(x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """log N(x; mu, diag(exp(log_var))), Eq. 9 and 12: (..., J) -> (...)."""
    return -0.5 * (math.log(2 * math.pi) + log_var + (x - mu) ** 2 * torch.exp(-log_var)).sum(-1)


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """Eq. 11 with y = sigmoid(logits): (..., D) -> (...). No likelihood unless x is in {0, 1}."""
    return (x * logits - F.softplus(logits)).sum(-1)  # x log y + (1 - x) log(1 - y), never inf


def gaussian_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    """D_KL(N(mu, diag(exp(log_var))) || N(0, I)) >= 0, Appendix B: (..., J) -> (...)."""
    return -0.5 * (1 + log_var - mu**2 - torch.exp(log_var)).sum(-1)


# ---- 2. The variational auto-encoder (Section 3, Appendix C) ----


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them (Appendix C): (..., sizes[0]) -> (..., sizes[-1])."""
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class VAE(nn.Module):
    """q(z|x) and p(x|z) for images x (B, *image_shape), flattened or not, with z (B, latent_dim).

    likelihood="bernoulli" is for pixels in {0, 1}; "gaussian" is a density, which grows without
    bound where a pixel never changes: add noise (`pixels`). The decoder has `hidden` in reverse.
    """

    def __init__(self, image_shape=(28, 28), latent_dim=20, hidden=(500,), likelihood="bernoulli"):
        super().__init__()
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f"likelihood is {likelihood!r}, must be 'bernoulli' or 'gaussian'")
        self.image_shape, self.latent_dim = tuple(image_shape), latent_dim
        self.likelihood, D = likelihood, math.prod(image_shape)
        self.encoder = mlp(D, *hidden, 2 * latent_dim)
        self.decoder = mlp(latent_dim, *reversed(hidden), D if likelihood == "bernoulli" else 2 * D)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, *image_shape) or (B, D) -> mu, log sigma^2 of q(z|x), (B, J) each (Eq. 9, 12)."""
        return self.encoder(x.flatten(1)).chunk(2, -1)

    def decode(self, z: Tensor) -> tuple[Tensor, ...]:
        """z (..., J) -> (logits,) or (mu, log sigma^2) of p(x|z), (..., D) each (Eq. 11, 12)."""
        h = self.decoder(z)
        if self.likelihood == "bernoulli":
            return (h,)
        mu, log_var = h.chunk(2, -1)
        return torch.sigmoid(mu), log_var  # Section 5: means in (0, 1) by a sigmoid

    def posterior_sample(self, x: Tensor, L: int = 1, generator=None):
        """Eq. 4: z = mu + sigma * eps (L, B, J), and mu, log_var. `generator` is always a CPU's."""
        mu, log_var = self.encode(x)
        eps = torch.randn(L, *mu.shape, generator=generator).to(mu)
        return mu + torch.exp(0.5 * log_var) * eps, mu, log_var

    def log_p_x_given_z(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of x (B, D or image_shape) and z (..., B, J) -> (..., B)."""
        log_p = log_bernoulli if self.likelihood == "bernoulli" else log_normal
        return log_p(x.flatten(1), *self.decode(z))

    def log_weights(self, x: Tensor, L: int, generator=None) -> Tensor:
        """log p(x, z) - log q(z|x) at L draws z ~ q(z|x): (L, B). Every bound is made of these."""
        z, mu, log_var = self.posterior_sample(x, L, generator)
        log_p_z = log_normal(z, *z.new_zeros(2, 1))
        return self.log_p_x_given_z(x, z) + log_p_z - log_normal(z, mu, log_var)

    def sgvb_a(self, x: Tensor, L: int = 1, generator=None) -> Tensor:
        """The bound with everything sampled, for any q and p: (B,). Eq. 6"""
        return self.log_weights(x, L, generator).mean(0)

    def sgvb_b(self, x: Tensor, L: int = 1, generator=None, kl_weight: float = 1.0) -> Tensor:
        """Eq. 7 and 10, with the KL in closed form: (B,). No bound if kl_weight < 1."""
        z, mu, log_var = self.posterior_sample(x, L, generator)
        return self.log_p_x_given_z(x, z).mean(0) - kl_weight * gaussian_kl(mu, log_var)

    def elbo(self, x: Tensor, L: int = 1, generator=None) -> Tensor:
        """Lower bound of log p(x) in nats, a mean over images (Eq. 3): what training ascends."""
        return self.sgvb_b(x, L, generator).mean()

    def iwae_bound(self, x: Tensor, k: int, generator=None, piece: int = 50) -> Tensor:
        """log 1/k sum_i p(x, z_i) / q(z_i|x), z_i ~ q(z|x): (B,). Burda et al. 2015, Eq. 8

        At k = 1 its mean is the ELBO; tighter with k, log p(x) in the limit. Decodes by `piece`.
        """
        pieces = [self.log_weights(x, min(piece, k - i), generator) for i in range(0, k, piece)]
        return torch.logsumexp(torch.cat(pieces), 0) - math.log(k)

    @torch.no_grad()
    def log_marginal(self, x: Tensor, k: int = 5000, generator=None) -> Tensor:
        """Estimate of log p(x) (B,) by importance sampling, not Appendix D's MCMC: from below."""
        return self.iwae_bound(x, k, generator)

    def image(self, z: Tensor) -> Tensor:
        """The mean of p(x|z) for z (B, J): images (B, *image_shape) in [0, 1]."""
        mean = self.decode(z)[0].unflatten(-1, self.image_shape)
        return torch.sigmoid(mean) if self.likelihood == "bernoulli" else mean

    @torch.no_grad()
    def sample(self, n: int, generator=None) -> Tensor:
        """Means of p(x|z) at n draws z ~ p(z) = N(0, I): (n, *image_shape) in [0, 1]."""
        z = torch.randn(n, self.latent_dim, generator=generator)
        return self.image(z.to(next(self.parameters())))


# ---- 3. Data, and what a model of independent pixels makes of them ----


def load_images(path: str):
    """-> train images (N, H, W[, 3]) uint8, labels (N,), test images, number of grey levels.

    "digits" is scikit-learn's, shuffled once; a file is .npz with x_train, y_train, x_test, y_test.
    """
    if path == "digits":
        from sklearn.datasets import load_digits

        order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
        x, y = (torch.tensor(a)[order] for a in load_digits(return_X_y=True))
        x = x.byte().view(-1, 8, 8)
        return x[:1200], y[:1200], x[1200:], 17
    with np.load(path, allow_pickle=False) as file:
        arrays = [file[k] for k in ("x_train", "y_train", "x_test", "y_test")]
    for x, y in (arrays[:2], arrays[2:]):
        shape = arrays[0].shape[1:]
        fits = x.dtype == np.uint8 and x.shape[1:] == shape and len(shape) > 1 and len(x) > 9
        if not fits or shape[2:] not in ((), (3,)) or not x.size:
            raise ValueError(f"{path}: images must be uint8, N > 9 of (H, W) or (H, W, 3), alike")
        if y.dtype.kind not in "iu" or y.shape != (len(x),) or y.min() < 0 or y.max() > 999:
            raise ValueError(f"{path}: labels must be whole numbers 0..999, one per image")
    x, y, x_test, _ = arrays
    return torch.tensor(x), torch.tensor(y).long(), torch.tensor(x_test), 256


def pixels(x: Tensor, levels: int, likelihood: str, generator) -> Tensor:
    """uint8 (B, ...) -> what the likelihood is a likelihood of, (B, D) float, random each time.

    Bernoulli: a pixel is on with its grey value as probability (dynamic binarisation). Gaussian:
    it is spread evenly over its level, a density on [0, 1] that cannot diverge.
    """
    x = x.flatten(1).float()
    u = torch.rand(x.shape, generator=generator).to(x.device)
    return (u * (levels - 1) < x).float() if likelihood == "bernoulli" else (x + u) / levels


def class_mixture(train, labels, test, likelihood: str) -> float:
    """Mean log p(test), nats, under independent pixels per label; labels all 0: one for all."""
    terms = []
    for c in labels.unique():
        a = train[labels == c]
        if likelihood == "bernoulli":
            log_p = log_bernoulli(test, torch.logit((a.sum(0) + 1) / (len(a) + 2)))
        else:
            log_p = log_normal(test, a.mean(0), (a.var(0, correction=0) + 1e-6).log())
        terms.append(log_p + math.log(len(a) / len(train)))
    return torch.logsumexp(torch.stack(terms), 0).mean().item()


# ---- 4. Judge (the same in every generator here; it sees labels, the model does not) ----


def make_judge(train: Tensor, labels: Tensor, test: Tensor):
    """Images in [0, 1], train (N, ...) with labels (N,), test (M, ...) -> (score, classify).

    score(images) is a dict, on 32 features of a small classifier, standardised by the train split:
    FD: Frechet distance |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^1/2) to the test split.
    precision: share of images within the 5th-neighbour radius of a test image; recall: of test
    images within that of an image. novelty: median pixel distance to the nearest train image over
    the test split's own: 0 is memorised, about 1 is like new data. classify(images) -> labels (n,).
    """
    test = test[:: -(-len(test) // 2000)]  # at most 2,000, spread over the split
    train, test, labels = *(x.flatten(1).float().cpu() for x in (train, test)), labels.cpu().long()
    with torch.random.fork_rng(devices=[]):  # the same judge for every --seed
        torch.default_generator.manual_seed(0)
        net = [nn.Linear(train.shape[1], 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU()]
        net = nn.Sequential(*net, nn.Linear(32, int(labels.max()) + 1))
        opt = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(max(500, 3 * len(train) // 128)):
            i = torch.randint(len(train), (128,))
            loss = F.cross_entropy(net(train[i]), labels[i])
            opt.zero_grad(); loss.backward(); opt.step()  # fmt: skip
    body = net.requires_grad_(False)[:3].double()  # to before the second ReLU
    std, mean = torch.std_mean(body(train.double()), 0)
    r = (body(test.double()) - mean) / std.clamp(min=1e-6)

    def to_train(x):
        return torch.cat([torch.cdist(p, train).amin(1) for p in x.split(200)]).median()

    def score(images: Tensor) -> dict[str, float]:
        x = images.flatten(1).float().cpu()
        g = (body(x.double()) - mean) / std.clamp(min=1e-6)
        S_r, S_g = torch.cov(r.T), torch.cov(g.T)  # S_r S_g has real eigenvalues >= 0
        root = torch.linalg.eigvals(S_r @ S_g).real.clamp(min=0).sqrt().sum()
        near = torch.cdist(r, g)  # radii: the 6th nearest, as the first is the point itself
        radius_r, radius_g = (torch.cdist(a, a).kthvalue(6).values for a in (r, g))
        out = {"FD": (r.mean(0) - g.mean(0)).square().sum() + (S_r + S_g).trace() - 2 * root}
        out["precision"] = (near < radius_r[:, None]).any(0).double().mean()
        out["recall"] = (near < radius_g).any(1).double().mean()
        out["novelty"] = to_train(x) / to_train(test)
        return {name: float(value) for name, value in out.items()}

    return score, lambda images: net.double()(images.flatten(1).cpu().double()).argmax(1)


def gaussian_images(train: Tensor, labels: Tensor, n: int) -> Tensor:
    """n draws (n, D) in [0, 1] from a full Gaussian per class; labels all 0: from one for all."""
    g, out = torch.Generator().manual_seed(0), []
    chosen = labels[torch.randint(len(labels), (n,), generator=g)]
    for c in labels.unique():
        a = train[labels == c].flatten(1).float()
        noise = torch.randn(int((chosen == c).sum()), len(a), generator=g) / len(a) ** 0.5
        out.append(a.mean(0) + noise @ (a - a.mean(0)))  # covariance of a, without forming it
    return torch.cat(out).clamp(0, 1)


# ---- 5. Training (Algorithm 1) ----


def train(models, optimizer, images, levels, args, state) -> bool:
    """Trains on batches that are functions of (seed, step). Returns whether Ctrl-C ended it."""
    from tqdm import tqdm

    stop, t0, first = [], time.time(), state["step"]
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: ends after a step
    for step in tqdm(range(first + 1, args.steps + 1), disable=None):
        g = torch.Generator().manual_seed(args.seed * 10**10 + step)
        i = torch.randint(len(images), (args.batch_size,), generator=g).to(images.device)
        x = pixels(images[i], levels, args.likelihood, g)
        turn = models[: 1 if step % 4 else 2]  # the 2-D twin learns on every fourth
        losses = [-model.elbo(x, 1, g) for model in turn]  # Eq. 10 per image; Eq. 8 is N times it
        loss = sum(losses)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 + math.cos(math.pi * (step - 1) / args.steps)) / 2
        optimizer.zero_grad(); loss.backward(); optimizer.step()  # fmt: skip
        state["step"] = step
        state["history"].append(-losses[0].item())
        if stop or step % args.log_every == 0 or step == args.steps:
            recent, ms = state["history"][-args.log_every :], (time.time() - t0) / (step - first)
            now = f"train bound {sum(recent) / len(recent):.2f} | {ms * 1e3:.1f} ms/step"
            tqdm.write(f"step {step:6d}/{args.steps} | {now}")
            if args.save:  # beside its place, then moved there: a crash leaves the old one
                file = {"script": "vae", "args": vars(args), **state}
                file |= {"models": models.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(file, args.save + ".tmp")
                os.replace(args.save + ".tmp", args.save)
        if stop:
            break
    return bool(stop)


# ---- 6. Evaluation and picture ----


@torch.no_grad()
def bounds(model, x: Tensor, k: int, piece: int = 200) -> tuple[float, float]:
    """ELBO (10 draws) and importance-weighted bound (k draws) of x (N, D), nats per image."""
    g, n = torch.Generator().manual_seed(0), len(x)
    elbo = sum(model.sgvb_b(p, 10, g).sum().item() for p in x.split(piece)) / n
    return elbo, sum(model.log_marginal(p, k, g).sum().item() for p in x.split(piece)) / n


def mosaic(images: Tensor, columns: int) -> np.ndarray:
    """Images (n, H, W[, 3]) in [0, 1], n a multiple of columns -> one image with white lines."""
    x = F.pad(images.cpu().reshape(*images.shape[:3], -1), (0, 0, 0, 1, 0, 1), value=1.0)
    x = x.unflatten(0, (-1, columns)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    return x.squeeze(-1).numpy()


@torch.no_grad()
def draw_picture(path, models, test, x):
    """Test images over inputs and reconstructions; draws from the prior; the 2-D manifold."""
    from matplotlib.figure import Figure  # without pyplot: needs no display

    (model, plane), n = models, min(30, len(x) // 10 * 10)
    mean = model.image(model.encode(x[:n])[0]).cpu()
    rows = torch.stack([test[:n], x[:n].cpu().view_as(mean), mean]).unflatten(1, (-1, 10))
    rows, draws = rows.transpose(0, 1).flatten(0, 2), model.sample(100, torch.manual_seed(0))
    u = torch.special.ndtri((torch.arange(12) + 0.5) / 12)  # the inverse Gaussian CDF
    z = torch.stack([u.repeat(12), -u.repeat_interleave(12)], -1).to(x.device)  # (144, 2)
    fig = Figure(figsize=(13, 4.6), layout="constrained")
    a, b, c = fig.subplots(1, 3)
    a.set_title("test images, the model's x, mean of p(x|z)")
    b.set_title(f"samples: z ~ p(z) in {model.latent_dim}-D, mean of p(x|z)")
    c.set_title("2-D z: inverse CDF of the unit square (Figure 4)")
    for axis, images, columns in (a, rows, 10), (b, draws, 10), (c, plane.image(z), 12):
        axis.imshow(mosaic(images, columns), cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
    fig.savefig(path, dpi=110)


# ---- 7. Command line ----


def parse(argv):
    """-> args, data, models, optimizer, state, fresh or loaded. Bad input: one line, exit 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--data", help="digits (default) or a .npz file as Keras's mnist.npz (paper: MNIST)")
    flag("--likelihood", choices=["bernoulli", "gaussian"], help="p(x|z), default bernoulli")
    flag("--latent-dim", type=int, help="size of z: default 10, 50 for a file (paper: 2 to 200)")
    flag("--hidden", type=int, nargs="+", help="units: default 200 200, files 400 400 (paper: 500)")
    flag("--steps", type=int, help="default 6,000, 175,000 for a file")
    flag("--batch-size", type=int, help="default 128 (paper: 100)")
    flag("--lr", type=float, help="Adam's rate at first, falls to 0 as a cosine: default 2e-3")
    flag("--k", type=int, help="importance samples of the last bound (500; Burda et al.: 5000)")
    flag("--seed", type=int, help="default 0")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto")
    flag("--out", default="out", help="folder for the picture, default out")
    flag("--save", help="checkpoint to write, at every log line and at the end")
    flag("--load", help="checkpoint to evaluate; with a larger --steps, to go on training")
    flag("--log-every", type=int, default=500, help="steps between log lines, default 500")
    flag("--quick", action="store_true", help="seconds: every part runs, nothing is shown")
    flag("--target", type=float, help="exit 1 if the final test bound (nats) is below this")
    args, loaded = parser.parse_args(argv), None
    names = "seed data likelihood lr hidden batch_size k latent_dim steps".split()
    try:
        defaults = (0, "digits", "bernoulli", 2e-3, [32], 32, 10, 4, 20)  # --quick
        if args.load:
            loaded = torch.load(args.load, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict) or loaded.get("script") != "vae":
                raise ValueError(f"{args.load} is not a checkpoint of this script")
            defaults = [(loaded["args"] | {"steps": loaded["step"]})[name] for name in names]
        elif not args.quick:
            digits, file = ([200, 200], 128, 500, 10, 6000), ([400, 400], 128, 500, 50, 175_000)
            defaults = (*defaults[:4], *(digits if args.data in (None, "digits") else file))
        for name, value in zip(names, defaults):
            if getattr(args, name) is None:
                setattr(args, name, value)
        counts = *args.hidden, args.latent_dim, args.steps, args.batch_size, args.k, args.log_every
        if min(counts) < 1 or not 0 < args.lr < 9 or abs(args.seed) > 10**8:
            raise ValueError("counts and --lr must be > 0, --seed at most 10^8")
        data = load_images(args.data)
        if args.batch_size > len(data[0]):
            raise ValueError(f"--batch-size must be at most {len(data[0])}, the training images")
        if args.device == "auto":  # cuda, mps or what else there is
            args.device = str(torch.accelerator.current_accelerator(True) or "cpu")
        os.makedirs(args.out, exist_ok=True)
        for path in filter(None, (args.save, os.path.join(args.out, "vae.png"))):
            if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"cannot write {path}")  # now, not after the training
        torch.manual_seed(args.seed)
        shape, latents = data[0].shape[1:], (args.latent_dim, 2)  # the 2-D twin is for the picture
        models = [VAE(shape, J, args.hidden, args.likelihood) for J in latents]
        models, state = nn.ModuleList(models).to(args.device), {"step": 0, "history": []}
        optimizer = torch.optim.Adam(models.parameters(), args.lr, fused=True)
        if loaded:
            models.load_state_dict(loaded["models"])
            optimizer.load_state_dict(loaded["optimizer"])
            state = {key: loaded[key] for key in state}
    except Exception as error:
        parser.error(" ".join(str(error).split())[:300] or type(error).__name__)
    return args, data, models, optimizer, state


def main(argv=None) -> int:
    args, data, models, optimizer, state = parse(argv)
    t0, stopped, model = time.time(), False, models[0]
    images, labels, test, levels = data
    count = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
    kind = f"seed {args.seed} | {os.path.basename(args.data)} {len(images)}/{len(test)}"
    print(f"vae | {count} | {args.device} | {kind}", flush=True)
    before = signal.getsignal(signal.SIGINT)
    try:
        if state["step"] < args.steps:
            stopped = train(models, optimizer, images.to(args.device), levels, args, state)
    except FloatingPointError as error:
        print(f"vae.py: stopped: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, before)
    g = torch.Generator().manual_seed(0)  # one draw of the test split's pixels, for all seeds
    x, x_train = (pixels(i, levels, args.likelihood, g) for i in (test, images))
    elbo, bound = bounds(model, x.to(args.device), args.k)
    one, mixture = (class_mixture(x_train, y, x, args.likelihood) for y in (labels * 0, labels))
    images, test = images / (levels - 1), test / (levels - 1)
    score, _ = make_judge(images, labels, test)
    samples = model.sample(1000, torch.Generator().manual_seed(args.seed)).cpu()
    np.save(os.path.join(args.out, "vae_samples.npy"), (samples * 255).round().byte().numpy())
    rows = {"VAE": samples, "train images (floor)": images[:1000]}
    for name, y in {"a Gaussian per class": labels, "one Gaussian": labels * 0}.items():
        rows[name] = gaussian_images(images, y, 1000)
    for name, row in rows.items():
        rows[name] = score(row)
        print(f"{name:20s} | " + " | ".join(f"{k} {v:.2f}" for k, v in rows[name].items()))
    draw_picture(os.path.join(args.out, "vae.png"), models, test, x.to(args.device))
    line = f"test bound (k = {args.k}) {bound:.2f} | ELBO {elbo:.2f} | independent pixels {one:.2f}"
    line += f" | class mixture {mixture:.2f} nats | FD {rows['VAE']['FD']:.2f}"
    print(f"{line} | {time.time() - t0:.0f} s")
    return 130 if stopped else int(args.target is not None and bound < args.target)


if __name__ == "__main__":
    sys.exit(main())
