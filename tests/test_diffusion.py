"""diffusion.py: q and p against brute force, DDIM = ancestral, guidance, bound, U-Net, the demo."""

import math
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm as scipy_normal

import diffusion as script
from diffusion import (
    Diffusion,
    UNet,
    cosine_schedule,
    decoder_log_prob,
    gaussian_kl,
    linear_schedule,
    time_embedding,
    update_ema,
)

FILE = script.__file__
SMALL = {"in_channels": 1, "dim": 8, "mults": (1, 2), "num_blocks": 1, "dropout": 0.0}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(model, seed=0):
    """Noise on every parameter: the zero-initialised layers would hide what lies behind them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


def gaussian_data(d: Diffusion, mean: float, std: float):
    """The exact eps(x_t, t) for x_0 ~ N(mean, std^2), pixel by pixel: a perfect network."""

    def model(x, t):
        a = d.alpha_bar[t.cpu()].to(x).view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return model


# ---- schedules and q ----


def test_linear_schedule_is_the_papers():
    beta = linear_schedule()
    assert len(beta) == 1000
    assert beta[0].item() == pytest.approx(1e-4) and beta[-1].item() == pytest.approx(0.02)
    assert (beta.diff() - beta.diff()[0]).abs().max() < 1e-12


def test_cosine_schedule_is_eq_17():
    d, T, s = Diffusion(cosine_schedule(50)), 50, 0.008
    f = [math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2 for t in range(T + 1)]
    for t in range(T):  # the last step is limited to beta = .999
        assert d.alpha_bar[t].item() == pytest.approx(f[t] / f[0], rel=1e-9)
    assert d.beta[T].item() == pytest.approx(0.999)


@pytest.mark.parametrize("schedule", [linear_schedule, cosine_schedule])
@pytest.mark.parametrize("T", [10, 200, 1000])
def test_every_chain_ends_in_noise(schedule, T):
    d = Diffusion(schedule(T))
    assert d.T == T and len(d.alpha_bar) == T + 1 and d.alpha_bar[0] == 1
    assert d.alpha_bar[T] < 1e-2 and (d.alpha_bar.diff() < 0).all()


def test_q_sample_is_the_chain_of_eq_2():
    """t steps of q(x_t | x_(t-1)) have mean and variance of Eq. 4, followed in plain numbers."""
    d, mean, var = Diffusion(linear_schedule(20)), 1.0, 0.0
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for t in range(1, 21):
        beta = linear_schedule(20)[t - 1].item()  # beta_1 comes first
        mean, var = math.sqrt(1 - beta) * mean, (1 - beta) * var + beta
        assert d.q_sample(one, t, zero).item() == pytest.approx(mean, rel=1e-5)
        assert d.q_sample(zero, t, one).item() ** 2 == pytest.approx(var, rel=1e-5)


def test_q_sample_takes_a_t_per_image():
    d, x, noise, t = (
        Diffusion(cosine_schedule(9)),
        rand(3, 2, 4, 6),
        rand(3, 2, 4, 6, seed=1),
        [9, 0, 4],
    )
    both = d.q_sample(x, torch.tensor(t), noise)
    for i in range(3):
        assert torch.equal(both[i : i + 1], d.q_sample(x[i : i + 1], t[i], noise[i : i + 1]))
    assert torch.equal(both[1], x[1])  # t = 0 is no noise


@pytest.mark.parametrize("t", [1, 2, 7, 12])
def test_posterior_is_bayes_rule(t):
    """q(x_(t-1) | x_t, x_0) on a fine grid, from Eq. 2 and Eq. 4 by Bayes' rule."""
    d, x0, x = Diffusion(linear_schedule(12)), 0.7, -0.4
    mean, var = d.posterior(*(torch.full((1, 1, 1, 1), v) for v in (x0, x)), t)
    if t == 1:
        assert var.item() == 0 and mean.item() == pytest.approx(x0, abs=1e-6)
        return
    z = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    a, beta = d.alpha_bar[t - 1], d.beta[t]
    log_p = -((x - (1 - beta).sqrt() * z) ** 2) / (2 * beta) - (z - a.sqrt() * x0) ** 2 / (
        2 - 2 * a
    )
    p = (log_p - log_p.max()).exp()
    p /= p.sum()
    assert mean.item() == pytest.approx((p * z).sum().item(), abs=1e-5)
    assert var.item() == pytest.approx((p * (z - (p * z).sum()) ** 2).sum().item(), rel=1e-4)


def test_predict_x0_undoes_q_sample_and_both_means_agree():
    d, x0, noise = (
        Diffusion(linear_schedule(1000)),
        rand(4, 1, 4, 4).clamp(-1, 1),
        rand(4, 1, 4, 4, seed=1),
    )
    t = torch.tensor([1, 2, 300, 700])
    x = d.q_sample(x0, t, noise)
    assert (d.predict_x0(x, t, noise) - x0).abs().max() < 1e-3
    mean = d.p_mean(x, t, noise)  # Eq. 11 with the true noise is Eq. 7 with the true x_0
    assert (mean - d.posterior(x0, x, t)[0]).abs().max() < 1e-4
    assert (mean - d.p_mean(x, t, noise, clip=True)).abs().max() < 1e-4
    far = d.p_mean(x, t, 9 * noise, clip=True)  # a wild guess is pulled back
    assert (far - d.posterior(d.predict_x0(x, t, 9 * noise).clamp(-1, 1), x, t)[0]).abs().max() == 0


def test_variances_of_section_3_2():
    beta = linear_schedule(1000)
    large, small = Diffusion(beta).sigma2, Diffusion(beta, "beta_tilde").sigma2
    assert torch.equal(large[1:], beta)
    assert small[1] == 0 and (small[2:] < beta[1:]).all() and small[1000] / beta[-1] > 0.999
    with pytest.raises(ValueError, match="sigma2"):
        Diffusion(beta, "learned")


# ---- objective ----


def test_loss_is_eq_14_line_by_line():
    d, model = Diffusion(cosine_schedule(30)), awake(UNet(**SMALL, num_classes=3))
    x0, noise, y = rand(3, 1, 4, 4), rand(3, 1, 4, 4, seed=1), torch.tensor([0, 2, -1])
    t, total = torch.tensor([1, 17, 30]), 0.0
    for i in range(3):
        a = d.alpha_bar[t[i]].float()
        eps = model(
            a.sqrt() * x0[i : i + 1] + (1 - a).sqrt() * noise[i : i + 1], t[i : i + 1], y[i : i + 1]
        )
        total += (noise[i] - eps[0]).square().mean().item() / 3
    assert d.loss(model, x0, t, noise, y).item() == pytest.approx(total, rel=1e-5)


def test_loss_starts_at_1_and_falls():
    torch.manual_seed(0)
    d, model = Diffusion(cosine_schedule(100)), UNet(**SMALL)
    x0 = rand(32, 1, 1, 1).sign().expand(32, 1, 4, 4)  # two images: all black and all white
    t, noise = torch.arange(1, 65, 2), rand(32, 1, 4, 4, seed=1)
    first = d.loss(model, x0, t, noise).item()
    assert first == pytest.approx(noise.square().mean().item(), rel=1e-6)  # eps = 0: E|noise|^2
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        loss = d.loss(model, x0, t, noise)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 0.5 * first


def test_every_parameter_gets_a_gradient_and_ema_none():
    model = awake(UNet(**SMALL, num_classes=2))
    y = torch.tensor([-1, 0, 1])
    x = rand(3, 1, 4, 4)
    Diffusion(linear_schedule(10)).loss(
        model, x, torch.tensor([1, 5, 10]), rand(3, 1, 4, 4, seed=2), y
    ).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert (model.label.weight.grad.abs().sum(1) > 0).all()  # "no label" is a row of its own


def test_ema_is_exact():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    want = [0.9 * p.detach() + 0.1 * q.detach() for p, q in zip(a.parameters(), b.parameters())]
    before = b.weight.clone()
    update_ema(a, b, 0.9)
    for p, q in zip(a.parameters(), want):
        assert torch.allclose(p, q, atol=1e-7)
    assert torch.equal(b.weight, before)


# ---- samplers ----


def test_algorithm_2_line_by_line():
    d, shape = Diffusion(cosine_schedule(6)), (2, 1, 4, 4)
    model = gaussian_data(d, 0.3, 0.5)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=g)
    for t in range(6, 0, -1):
        z = torch.randn(shape, generator=g) if t > 1 else torch.zeros(shape)
        beta, a, a_bar = (v[t].float() for v in (d.beta, d.alpha, d.alpha_bar))
        eps = model(x, torch.full((2,), t))
        x = (x - beta / (1 - a_bar).sqrt() * eps) / a.sqrt() + beta.sqrt() * z
    out = d.sample(model, shape, generator=torch.Generator().manual_seed(5))
    assert (out - x).abs().max() < 1e-4


def test_no_noise_at_the_last_step():
    d, shape, seen = Diffusion(linear_schedule()[:5]), (1, 1, 2, 2), []

    def model(x, t):
        seen.append((t.item(), x))
        return torch.zeros_like(x)

    out = d.sample(model, shape, generator=torch.Generator().manual_seed(0))
    assert [t for t, _ in seen] == [5, 4, 3, 2, 1]  # T is used, and 1 is not skipped
    assert torch.allclose(out, seen[-1][1] / d.alpha[1].sqrt().float(), atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_and_T_steps_is_algorithm_2(clip):
    d, shape = Diffusion(linear_schedule(25), "beta_tilde"), (3, 1, 4, 4)
    model = gaussian_data(d, 0.6, 0.4)
    g = [torch.Generator().manual_seed(1) for _ in range(2)]
    a = d.sample(model, shape, clip=clip, generator=g[0])
    b = d.ddim(model, shape, 25, eta=1.0, clip=clip, generator=g[1])
    assert (a - b).abs().max() < 2e-4


@pytest.mark.parametrize("how", ["beta", "beta_tilde", "ddim", "ddim 20", "eta 1"])
def test_a_perfect_network_samples_the_data(how):
    """x_0 ~ N(.5, .5^2): all samplers recover mean and sd; 20 steps are coarse."""
    d = Diffusion(cosine_schedule(200), how if how.startswith("beta") else "beta")
    model, g, shape = gaussian_data(d, 0.5, 0.5), torch.Generator().manual_seed(0), (500, 1, 8, 8)
    if how.startswith("beta"):
        x = d.sample(model, shape, generator=g)
    else:
        steps, eta = (20, 0.0) if how == "ddim 20" else (200, 1.0 if how == "eta 1" else 0.0)
        x = d.ddim(model, shape, steps, eta, generator=g)
    assert x.mean().item() == pytest.approx(0.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, rel=0.1 if how == "ddim 20" else 0.03)


@pytest.mark.parametrize("steps", [1, 3, 7, 10])
def test_ddim_visits_T_first_and_ends_at_0(steps):
    d, seen = Diffusion(linear_schedule(10)), []

    def model(x, t):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    d.ddim(model, (1, 1, 2, 2), steps)
    assert len(seen) == len(set(seen)) == steps and seen[0] == 10 and min(seen) >= 1
    assert seen == sorted(seen, reverse=True)


def test_ddim_inverts_a_perfect_point():
    """With the true noise of one image, one deterministic jump from any t gives the image back."""
    d, x0 = Diffusion(linear_schedule(1000)), rand(1, 1, 4, 4)

    def model(x, t):
        a = d.alpha_bar[t].float().view(-1, 1, 1, 1)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    for steps in (1, 4, 50):
        assert (d.ddim(model, (1, 1, 4, 4), steps) - x0).abs().max() < 1e-3


def test_ddim_refuses_impossible_steps_and_eta():
    d = Diffusion(linear_schedule(10))
    for steps, eta in ((0, 0), (11, 0), (5, -0.1), (5, 1.1)):
        with pytest.raises(ValueError, match="steps"):
            d.ddim(lambda x, t: x, (1, 1, 2, 2), steps, eta)


def test_guidance_extrapolates_from_no_label_to_label():
    d, model = Diffusion(linear_schedule(10)), awake(UNet(**SMALL, num_classes=4))
    x, y, t = rand(3, 1, 4, 4), torch.tensor([0, 1, 3]), torch.full((3,), 6)
    with_y, without = model(x, t, y), model(x, t)
    assert (with_y - without).abs().max() > 1e-3
    assert torch.allclose(model(x, t, torch.full((3,), -1)), without)
    for w in (0.0, 0.5, 3.0):
        assert torch.allclose(d.eps(model, x, 6, y, w), (1 + w) * with_y - w * without, atol=1e-5)
    assert torch.allclose(d.eps(model, x, 6), without, atol=1e-6)


# ---- the bound ----


def test_gaussian_kl_equals_torch():
    p, q = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-1.0, 1.9)
    want = torch.distributions.kl_divergence(p, q).item()
    got = gaussian_kl(*(torch.tensor(v) for v in (0.3, 0.49, -1.0, 3.61))).item()
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("mean,sigma", [(0.2, 0.01), (-0.9, 0.3), (3.0, 0.05)])
def test_decoder_sums_to_one_and_equals_scipy(levels, mean, sigma):
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_p = decoder_log_prob(x, torch.tensor(mean), sigma, levels)
    assert torch.isfinite(log_p).all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    edges = scipy_normal.cdf((x[:-1] + 1 / (levels - 1)).numpy(), mean, sigma)
    assert np.allclose(log_p.exp().numpy(), np.diff([0, *edges, 1]), atol=1e-9)


def test_bound_equals_the_likelihood_of_one_step():
    """T = 1: x_1 is noise whatever x_0 is, L_0 is a Gaussian's bin."""
    d, x0 = Diffusion(torch.tensor([0.999])), torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    got = d.bits_per_dim(
        lambda x, t: torch.zeros_like(x), x0, levels=16, generator=torch.manual_seed(0)
    )
    x1 = d.q_sample(x0, 1, torch.randn(1, 1, 4, 4, generator=torch.manual_seed(0)))
    mean = (x1 / d.alpha_bar[1].sqrt().float()).clamp(-1, 1)
    nats = -decoder_log_prob(x0, mean, 0.999**0.5, 16).sum()
    nats += gaussian_kl(0.001**0.5 * x0, torch.tensor(0.999), 0.0, torch.tensor(1.0)).sum()
    assert got.item() == pytest.approx(nats.item() / (16 * math.log(2)), rel=1e-4)


def test_bound_of_a_perfect_network_is_near_the_entropy():
    """x_0 ~ N(0, .3^2) in 256 bins, T = 1000: just above its entropy, and beta_tilde, which is
    right for data of a single point, costs more here than beta, most of it in the first steps."""
    edges = scipy_normal.cdf(np.linspace(-1, 1, 257)[1:-1], 0, 0.3)
    p, bits = np.diff([0, *edges, 1]), {}
    entropy = -(p * np.log2(p)).sum()
    g = torch.Generator().manual_seed(0)
    x0 = (torch.randn(50, 1, 8, 8, generator=g) * 0.3 * 127.5 - 0.5).round().clamp(-127, 127) + 0.5
    for sigma2 in ("beta", "beta_tilde"):
        d = Diffusion(linear_schedule(1000), sigma2)
        model = gaussian_data(d, 0.0, 0.3)
        bits[sigma2] = d.bits_per_dim(model, x0 / 127.5, 256, generator=g).mean().item()
    assert entropy - 0.03 < bits["beta"] < entropy + 0.15
    assert bits["beta"] < bits["beta_tilde"] < entropy + 0.8


# ---- U-Net ----


def test_paper_size():
    with torch.device("meta"):
        model = UNet()
    assert sum(p.numel() for p in model.parameters()) == 35_746_307  # the paper says 35.7M


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (2, 3, 8, 12), (3, 1, 20, 4)])
def test_any_divisible_size(shape):
    model = UNet(shape[1], 8, (1, 2, 3), 1, attention=(1, 2), dropout=0.0)
    assert model(rand(*shape), torch.ones(shape[0]).long()).shape == shape


def test_clear_errors():
    model = UNet(1, 8, (1, 2, 2), 1)
    with pytest.raises(ValueError, match="must be multiples of 4"):
        model(rand(1, 1, 6, 8), torch.ones(1))
    with pytest.raises(ValueError, match="num_classes=0"):
        model(rand(1, 1, 8, 8), torch.ones(1), torch.zeros(1).long())
    with pytest.raises(ValueError, match="multiple of 4"):
        UNet(dim=10)


def test_the_network_hears_t_and_each_image_its_own():
    model, x = awake(UNet(**SMALL)), rand(1, 1, 8, 8).expand(3, 1, 8, 8)
    out = model(x, torch.tensor([1, 2, 150]))
    assert (out[0] - out[1]).abs().max() > 1e-4 and (out[0] - out[2]).abs().max() > 1e-2
    assert torch.allclose(out[2:], model(x[:1], torch.tensor([150])), atol=1e-5)


def test_time_embedding_is_sines_then_cosines():
    e = time_embedding(torch.tensor([7]), 8)[0]
    freqs = [10_000 ** (-i / 3) for i in range(4)]
    want = [math.sin(7 * f) for f in freqs] + [math.cos(7 * f) for f in freqs]
    assert torch.allclose(e, torch.tensor(want), atol=1e-5)


def test_attention_is_softmax_qk_v():
    m, x = awake(script.Attention(8)), rand(2, 8, 3, 5)
    q, k, v = m.qkv(F.group_norm(x, 2, m.norm.weight, m.norm.bias, 1e-6)).flatten(2).chunk(3, 1)
    weights = torch.softmax(q.transpose(1, 2) @ k / 8**0.5, -1)  # (B, HW, HW)
    want = x + m.out((v @ weights.transpose(1, 2)).view(x.shape))
    assert torch.allclose(m(x), want, atol=1e-5)


# ---- the demo ----


def main(tmp_path, *flags):
    return script.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *map(str, flags)])


def npz(path, n=20, size=(8, 8), dtype=np.uint8, y_max=3, **changes):
    r = np.random.default_rng(0)
    data = {}
    for split in ("train", "test"):
        data["x_" + split] = r.integers(0, 255, (n, *size)).astype(dtype)
        data["y_" + split] = r.integers(0, y_max, n)
        data["y_" + split][:y_max] = range(y_max)
    np.savez(path, **(data | changes))
    return path


def test_quick_as_a_subprocess(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, FILE, "--quick", "--out", tmp_path]
    run = subprocess.run(run, capture_output=True, text=True, env=env, check=True)
    lines = run.stdout.splitlines()
    assert lines[0].startswith("diffusion | 0.0") and "digits 1200/597" in lines[0]
    assert lines[-1].startswith("test FD ") and "floor" in lines[-1] and "bits/dim" in lines[-1]
    assert (tmp_path / "diffusion.png").stat().st_size > 10_000
    assert not run.stderr.count("Traceback")


def test_resumed_equals_unbroken_and_samples_without_data(tmp_path, capsys):
    flags = ["--dropout", 0.2, "--data", npz(tmp_path / "d.npz", size=(8, 8, 3))]
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    assert main(tmp_path, *flags, "--steps", 4, "--save", a) == 0
    # the rate's cosine depends on --steps: stop half-way by Ctrl-C, as a user would
    real, calls = script.update_ema, []

    def interrupt(*args):
        real(*args)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    script.update_ema = interrupt
    try:
        assert main(tmp_path, *flags, "--steps", 4, "--save", b) == 130
    finally:
        script.update_ema = real
    assert torch.load(b)["step"] == 3 or torch.load(b)["step"] == 2
    assert main(tmp_path, "--load", b, "--steps", 4, "--save", b) == 0
    a, b = torch.load(a), torch.load(b)
    assert a["history"] == b["history"] and len(a["history"]) == 4
    for k in ("model", "ema"):
        assert all(torch.equal(v, b[k][n]) for n, v in a[k].items())
    (tmp_path / "d.npz").unlink()
    capsys.readouterr()
    for more in ([], ["--label", 1, "--ddim", 3], ["--ddim", 2, "--eta", 1]):
        assert main(tmp_path, "--load", tmp_path / "a.pt", "--samples", 3, *more) == 0
        x = np.load(tmp_path / "diffusion_samples.npz")["samples"]
        assert x.shape == (3, 8, 8, 3) and x.dtype == np.uint8 and x.std() > 0


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--schedule", "cubic"], "choose from"),
        (["--data", "none.npz"], "none.npz"),
        (["--data", "cut.npz"], "zip file"),
        (["--data", "pickle.npz"], "pickle"),
        (["--data", "float.npz"], "uint8"),
        (["--data", "odd.npz"], "multiples of 2"),
        (["--data", "labels.npz"], "labels"),
        (["--data", "few.npz", "--batch-size", "21"], "more than the images"),
        (["--steps", "0"], "between 1 and"),
        (["--lr", "nan"], "--lr must lie between"),
        (["--ddim", "11"], "T = 10"),
        (["--ddim", "0"], "T = 10"),
        (["--eta", "2"], "--eta"),
        (["--ema", "1"], "--ema"),
        (["--dim", "6"], "multiple of 4"),
        (["--mults", "1 0"], "mults > 0"),
        (["--sigma2", "learned"], "choose from"),
        (["--label", "10"], "--label"),
        (["--samples", "4"], "--load"),
        (["--out", "a-file/x"], "a-file"),
        (["--save", "."], "cannot write"),
        (["--load", "other.pt"], "not a checkpoint of this script"),
        (["--load", "few.npz"], "archive"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    torch.save({"script": "vae"}, "other.pt")
    few = npz("few.npz")
    npz("float.npz", dtype=np.float32)
    npz("odd.npz", size=(7, 8))
    npz("labels.npz", y_train=np.arange(19))
    npz("pickle.npz", x_train=np.array([{}], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / few).read_bytes()[:300])
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stop:
        script.main(["--quick", "--device", "cpu", *flags])
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and ": error: " in err[-1] and word in err[-1]
    assert set(os.listdir()) - set(before) <= {"out"}


@pytest.mark.parametrize("share,hidden", [(0, {False}), (0.5, {False, True}), (1, {True})])
def test_every_t_is_trained_and_a_share_of_labels_hidden(share, hidden, tmp_path, monkeypatch):
    real, seen = Diffusion.loss, []

    def loss(self, model, x0, t, noise, y):
        seen.extend(zip(t.tolist(), (y < 0).tolist()))
        return real(self, model, x0, t, noise, y) * (1 if len(seen) < 32 else math.nan)

    monkeypatch.setattr(Diffusion, "loss", loss)
    assert main(tmp_path, "--T", 3, "--drop-label", share) == 1  # nan: ends after four steps of 8
    assert {t for t, _ in seen} == {1, 2, 3} and {h for _, h in seen} == hidden


@pytest.mark.parametrize("steps", [None, 2])
def test_generate_gives_each_label_its_image(steps):
    """More than one batch of labels; the network paints class k in grey k / 4."""
    d, calls = Diffusion(cosine_schedule(4)), []

    def model(x, t, y):
        calls.append(t[0].item())
        a = d.alpha_bar[t.cpu()].to(x).view(-1, 1, 1, 1)
        return (x - a.sqrt() * (y.view(-1, 1, 1, 1) / 2 - 1)) / (1 - a).sqrt()

    args, y = SimpleNamespace(seed=0, device="cpu", amp=False, eta=0.0), torch.arange(501) % 5
    images = script.generate(d, model, args, (1, 2, 2), y, steps)
    assert images.shape == (501, 1, 2, 2) and calls == ([4, 2] if steps else [4, 3, 2, 1]) * 2
    assert (images - y.view(-1, 1, 1, 1) / 4).abs().max() < 1e-3


def test_checkpoint_of_other_data_is_refused(tmp_path, capsys):
    assert main(tmp_path, "--steps", 1, "--save", tmp_path / "a.pt") == 0
    with pytest.raises(SystemExit):
        main(tmp_path, "--load", tmp_path / "a.pt", "--data", npz(tmp_path / "d.npz"))
    assert "other images or classes" in capsys.readouterr().err


def test_nan_stops_and_the_target_counts(tmp_path, capsys, monkeypatch):
    assert main(tmp_path, "--steps", 1, "--target", 0.1) == 1
    monkeypatch.setattr(Diffusion, "loss", lambda *a: torch.tensor(math.nan, requires_grad=True))
    assert main(tmp_path, "--save", tmp_path / "n.pt") == 1
    assert "nan at step 1" in capsys.readouterr().err
    slope = lambda _, model, *a: (0 * next(model.parameters()).sum()).sqrt()  # noqa: E731
    monkeypatch.setattr(Diffusion, "loss", slope)  # 0, but its gradient isn't finite
    assert main(tmp_path, "--save", tmp_path / "n.pt") == 1
    assert re.search("gradient nan, loss -?0.0 at step 1$", capsys.readouterr().err.strip())
    assert not (tmp_path / "n.pt").exists()


def test_two_processes_train_as_one(torchrun, tmp_path):
    """torchrun on two CPU processes: the same losses as one process on the whole batch."""
    flags = ["--quick", "--steps", "3", "--device", "cpu", "--out", tmp_path, "--save"]
    torchrun(FILE, *flags, tmp_path / "2.pt")
    assert main(tmp_path, "--steps", 3, "--save", tmp_path / "1.pt") == 0
    a, b = (torch.load(tmp_path / f"{n}.pt")["history"] for n in (1, 2))
    assert a == pytest.approx(b, rel=1e-4)


def test_amp_runs(tmp_path):
    assert main(tmp_path, "--amp", "--steps", 2) == 0


def test_a_step_without_the_demo():
    """What a reader pastes: ten lines, labels or none."""
    d, model = Diffusion(linear_schedule()), UNet(3, 8, (1, 2), 1, num_classes=2)
    x0, t = rand(2, 3, 8, 8), torch.randint(1, d.T + 1, (2,))
    d.loss(model, x0, t, torch.randn_like(x0), torch.tensor([0, -1])).backward()
    args = SimpleNamespace(shape=(2, 3, 8, 8))
    assert (
        d.ddim(model, args.shape, 3, y=torch.tensor([0, 1]), w=1.5, clip=True).shape == args.shape
    )


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert script.main(["--out", str(tmp_path), "--target", "0.31"]) == 0
