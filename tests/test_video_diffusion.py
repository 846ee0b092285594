"""video_diffusion.py: q and p in closed form, attention by brute force, no leak, Eq. 6-7, demo."""

import math
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import video_diffusion as script
from video_diffusion import (
    Attention,
    Block,
    UNet3D,
    alpha_sigma,
    bounce,
    denoise,
    draw,
    log_snr,
    loss_v,
    posterior,
    q_sample,
    reconstruction_guided,
    sample,
    temporal_mask,
    time_embedding,
    update_ema,
)

FILE = script.__file__
SMALL = {"channels": 1, "dim": 8, "mults": (1, 2), "heads": 2, "max_distance": 3, "num_classes": 4}


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake(model, seed=0):
    """Noise on every parameter: the zero-initialised layers would hide what lies behind them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g).to(p))
    return model


def network(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return awake(UNet3D(**(SMALL | changes))).to(dtype)


def gaussian_model(mean: float, std: float):
    """The exact v(z_t) for x ~ N(mean, std^2), pixel by pixel: a perfect network."""

    def model(z, lam, y=None, num_images=0):
        alpha, sigma = alpha_sigma(lam, z)
        x = (alpha * std**2 * z + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)
        return (alpha * z - x) / sigma

    return model


# ---- schedule, q ----


def test_schedule_is_the_cosine():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    lam = log_snr(t)
    assert lam[0].item() == pytest.approx(20) and lam[-1].item() == pytest.approx(-20)
    assert (lam.diff() < 0).all()
    alpha, sigma = alpha_sigma(lam, t)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(t))
    assert torch.allclose(2 * (alpha / sigma).log(), lam)  # lambda_t = log(alpha^2 / sigma^2)
    angle = torch.acos(alpha[1:-1])  # linear in t, nearly pi t / 2
    assert (angle - math.pi / 2 * t[1:-1]).abs().max() < 1e-4
    assert log_snr(torch.tensor(1.0)).item() == pytest.approx(-20, abs=0.01)  # in float32, too


def test_q_z_t_given_x_by_monte_carlo():
    """Eq. 1 for two frames with a t of their own."""
    lam = log_snr(torch.tensor([[0.2, 0.8]]))
    x = torch.tensor([0.7, -0.4]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 400, 500)
    z = q_sample(x, lam, rand(*x.shape))
    for i, t in enumerate((0.2, 0.8)):
        want = math.cos(math.pi / 2 * t) * x[0, i, 0, 0, 0].item()
        assert z[0, i].mean().item() == pytest.approx(want, abs=0.01)
        assert z[0, i].std().item() == pytest.approx(math.sin(math.pi / 2 * t), rel=0.01)


@pytest.mark.parametrize("s,t", [(0.1, 0.2), (0.3, 0.9), (0.5, 0.52)])
def test_posterior_is_bayes_rule(s, t):
    """q(z_s | z_t, x) from Eq. 1, on a grid of z_s: its mean and variance are those of Eq. 3."""
    x, z_t = 0.8, -0.3
    lam_t, lam_s = (log_snr(torch.tensor(v, dtype=torch.float64)) for v in (t, s))
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    mean, variance = posterior(z_t * one, x * one, lam_t, lam_s)
    (a_t, s_t), (a_s, s_s) = alpha_sigma(lam_t, lam_t), alpha_sigma(lam_s, lam_s)
    step = (1 - torch.exp(lam_t - lam_s)) * s_t**2  # sigma_(t|s)^2
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    log_p = -((z_t - a_t / a_s * z) ** 2) / (2 * step) - (z - a_s * x) ** 2 / (2 * s_s**2)
    p = (log_p - log_p.max()).exp()
    p /= p.sum()
    assert mean.item() == pytest.approx((p * z).sum().item(), abs=1e-6)
    assert variance.item() == pytest.approx((p * (z - (p * z).sum()) ** 2).sum().item(), rel=1e-5)
    # the other end of Eq. 4, and the geometric mean between
    assert posterior(z_t * one, x * one, lam_t, lam_s, 1.0)[1].item() == pytest.approx(step.item())
    half = posterior(z_t * one, x * one, lam_t, lam_s, 0.5)[1].item()
    assert half == pytest.approx((step * variance).sqrt().item())


def test_z_s_drawn_from_the_posterior_has_the_marginal_of_q():
    """x -> z_t by Eq. 1 -> z_s by Eq. 3 must be as if z_s came from x by Eq. 1."""
    x, lam_t, lam_s = torch.full((1, 1, 1, 400, 500), 0.5), *log_snr(torch.tensor([0.7, 0.4]))
    z = q_sample(x, lam_t, rand(*x.shape))
    mean, variance = posterior(z, x, lam_t, lam_s)
    z = mean + variance.sqrt() * rand(*x.shape, seed=1)
    assert z.mean().item() == pytest.approx(0.5 * math.cos(0.2 * math.pi), abs=0.01)
    assert z.std().item() == pytest.approx(math.sin(0.2 * math.pi), rel=0.01)


def test_v_eps_and_x_are_one_another():
    """A network that says the true v makes x_hat = x, and eps = sigma z + alpha v."""
    x, noise, lam = rand(2, 3, 1, 4, 4), rand(2, 3, 1, 4, 4, seed=1), log_snr(torch.rand(2, 3))
    alpha, sigma = alpha_sigma(lam, x)
    z, v = q_sample(x, lam, noise), alpha * noise - sigma * x
    assert torch.allclose(denoise(lambda *_: v, z, lam), x, atol=1e-5)
    assert torch.allclose(sigma * z + alpha * v, noise, atol=1e-5)
    assert loss_v(lambda *_: v, x, lam, noise).item() < 1e-10


# ---- attention ----


def test_temporal_attention_by_brute_force():
    """Loops over heads, frames and frames; the bias is a number per head and distance."""
    m, N, D, h = awake(Attention(8, 2, max_distance=2)), 5, 2, 2
    x, mask = rand(3, 4, N, 8), temporal_mask(N, 2)
    q, k, v = m.qkv(F.layer_norm(x, (8,), m.norm.weight, m.norm.bias)).chunk(3, -1)
    want = torch.zeros_like(x)
    for head in range(h):
        part = slice(4 * head, 4 * head + 4)
        for i in range(N):
            logits = []
            for j in range(N):
                bias = m.bias[head, max(-D, min(D, j - i)) + D]
                seen = i == j or (i < 3 and j < 3)
                dot = (q[..., i, part] * k[..., j, part]).sum(-1) / 4**0.5 + bias
                logits.append(dot if seen else torch.full_like(dot, -math.inf))
            weights = torch.stack(logits, -1).softmax(-1)
            want[..., i, part] = sum(weights[..., j, None] * v[..., j, part] for j in range(N))
    assert torch.allclose(m(x, mask), x + m.out(want), atol=1e-5)


def test_order_of_frames_matters_and_absolute_time_does_not():
    m = awake(Attention(8, 2, max_distance=9))
    x = rand(1, 6, 8)
    assert (m(x.flip(1)).flip(1) - m(x)).abs().max() > 1e-3
    apart = torch.cat([x, x], 1)  # the same frames at times 0-5 and 6-11, blind to each other
    mask = torch.block_diag(torch.ones(6, 6), torch.ones(6, 6)).bool()
    first, second = m(apart, mask).chunk(2, 1)
    assert torch.allclose(first, second, atol=1e-6)


def test_factorised_attention_is_dense_attention_with_block_masks():
    """All F H W tokens at once: over space where the frames are equal, over time where the pixels
    are, and no image is in the way."""
    B, T, C, H, W, K = 2, 5, 8, 2, 3, 2
    block, x = awake(Block(C, C, (8, 2, 3), True)), rand(B, T, C, H, W)
    tokens = x.permute(0, 1, 3, 4, 2).reshape(B, T * H * W, C)
    frame = torch.arange(T).repeat_interleave(H * W)
    pixel = torch.arange(H * W).repeat(T)

    def dense(m, tokens, mask, bias):
        q, k, v = (
            a.unflatten(-1, (2, 4)).transpose(1, 2) for a in m.qkv(m.norm(tokens)).chunk(3, -1)
        )
        logits = (q @ k.transpose(2, 3) / 2 + bias).masked_fill(~mask, -math.inf)
        return tokens + m.out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    tokens = dense(block.space, tokens, frame[:, None] == frame, 0.0)
    distance = (frame - frame[:, None]).clamp(-3, 3) + 3
    mask = (pixel[:, None] == pixel) & temporal_mask(T, K)[frame][:, frame]
    tokens = dense(block.frames, tokens, mask, block.frames.bias[:, distance])
    want = tokens.view(B, T, H, W, C).permute(0, 1, 4, 2, 3).flatten(0, 1)
    assert torch.allclose(block.attention(x, temporal_mask(T, K)), want, atol=1e-5)


def test_mask_is_the_papers():
    want = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert temporal_mask(4, 2).int().tolist() == want
    assert temporal_mask(3, 0).all() and torch.equal(temporal_mask(3, 3), torch.eye(3).bool())


# ---- joint training: no leak ----


@pytest.mark.parametrize("max_distance", [3, 0])  # 0: no bias, the mask stays
def test_video_and_images_do_not_see_each_other(max_distance):
    """Outputs: of the video without the images, of the images alone and in another order."""
    model, z, K = network(max_distance=max_distance), rand(2, 7, 1, 4, 4, dtype=torch.float64), 3
    lam, y = rand(2, 7, seed=1, dtype=torch.float64), torch.tensor([[0] * 4 + [1, 2, -1]] * 2)
    out = model(z, lam, y, K)
    assert torch.allclose(out[:, :4], model(z[:, :4], lam[:, :4], y[:, :4]), atol=1e-12)
    for i in range(4, 7):  # an image in a video of one frame
        one = slice(i, i + 1)
        assert torch.allclose(out[:, one], model(z[:, one], lam[:, one], y[:, one]), atol=1e-12)
    order = [0, 1, 2, 3, 6, 4, 5]
    assert torch.allclose(
        out[:, order], model(z[:, order], lam[:, order], y[:, order], K), atol=1e-12
    )
    assert (out - model(z, lam, y, 0)).abs().amax((0, 2, 3, 4)).min() > 1e-3  # unmasked, all mix
    assert (out - model(z, lam, y, 7))[:, :4].abs().amax() > 1e-3  # the video itself is seen


def test_no_gradient_between_video_and_images():
    model, z = network(), rand(1, 5, 1, 4, 4, dtype=torch.float64).requires_grad_()
    for i in range(5):
        out = model(z, torch.zeros(1, dtype=torch.float64), None, 2)
        gradient = torch.autograd.grad(out[:, i].square().sum(), z)[0].abs().amax((0, 2, 3, 4))
        seen = [1, 1, 1, 0, 0] if i < 3 else [int(j == i) for j in range(5)]
        assert (gradient > 0).int().tolist() == seen


def test_videos_of_a_batch_do_not_see_each_other():
    model, z = network(), rand(3, 4, 1, 4, 4, dtype=torch.float64)
    lam = rand(3, seed=1, dtype=torch.float64)
    alone = torch.cat([model(z[i : i + 1], lam[i : i + 1]) for i in range(3)])
    assert torch.allclose(model(z, lam), alone, atol=1e-12)


# ---- network ----


@pytest.mark.parametrize(
    "shape,mults,patch",
    [((1, 1, 1, 4, 4), (1, 2), 1), ((2, 3, 3, 8, 12), (1, 2, 3), 1), ((1, 5, 1, 4, 8), (1,), 2)],
)
def test_any_divisible_size(shape, mults, patch):
    model = UNet3D(shape[2], 8, mults, patch=patch)
    assert model(rand(*shape), torch.zeros(())).shape == shape


def test_clear_errors():
    model = UNet3D(1, 8, (1, 2), patch=2)
    with pytest.raises(ValueError, match="multiples of 4"):
        model(rand(1, 2, 1, 6, 8), torch.zeros(()))
    with pytest.raises(ValueError, match="multiple of 4"):
        UNet3D(dim=10)


def test_a_convolution_of_frames_is_a_1x3x3_convolution():
    conv, x = torch.nn.Conv2d(2, 3, 3, padding=1), rand(2, 5, 2, 4, 6)
    want = F.conv3d(x.transpose(1, 2), conv.weight[:, :, None], conv.bias, padding=(0, 1, 1))
    got = conv(x.flatten(0, 1)).unflatten(0, (2, 5))
    assert torch.allclose(got, want.transpose(1, 2), atol=1e-5)


def test_network_hears_lambda_and_label_and_frame_shapes_agree():
    model, z = network(), rand(2, 3, 1, 4, 4, dtype=torch.float64)
    lam, y = rand(2, seed=1, dtype=torch.float64), torch.tensor([0, 3])
    out = model(z, lam, y)
    each = model(z, lam[:, None].expand(2, 3), y[:, None].expand(2, 3))
    assert torch.allclose(out, each, atol=1e-12)
    assert (out - model(z, lam + 1, y)).abs().max() > 1e-3
    assert (out - model(z, lam, y.flip(0))).abs().max() > 1e-3
    assert torch.equal(model(z, lam), model(z, lam, torch.full((2,), -1)))


def test_time_embedding_is_sines_then_cosines_of_t():
    e = time_embedding(log_snr(torch.tensor([[0.25]], dtype=torch.float64)), 8)[0, 0]
    freqs = [10_000 ** (-i / 3) for i in range(4)]
    want = [math.sin(250 * f) for f in freqs] + [math.cos(250 * f) for f in freqs]
    assert torch.allclose(e, torch.tensor(want, dtype=torch.float64), atol=0.1)


# ---- objective ----


def test_loss_at_initialisation_and_after():
    """An untrained network says v = 0, so the loss is the mean of v^2; then it learns."""
    torch.manual_seed(0)
    model = UNet3D(**SMALL)
    x = rand(8, 1, 1, 1, 1).sign().expand(8, 6, 1, 4, 4)  # videos all black or all white
    noise, lam = rand(8, 6, 1, 4, 4, seed=1), log_snr(torch.linspace(0.05, 0.95, 8))
    alpha, sigma = alpha_sigma(lam, x)
    first = loss_v(model, x, lam, noise, None, 2).item()
    assert first == pytest.approx((alpha * noise - sigma * x).square().mean().item(), rel=1e-5)
    assert first == pytest.approx(1, abs=0.1)  # alpha^2 + sigma^2 E[x^2]
    opt = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(40):
        loss = loss_v(model, x, lam, noise, None, 2)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 0.3 * first


def test_loss_is_the_weighted_error_of_x():
    """Eq. 2: |v - v_hat|^2 = (1 + e^lambda) |x - x_hat|^2."""
    model, x, noise = network(), rand(2, 3, 1, 4, 4).double(), rand(2, 3, 1, 4, 4, seed=1).double()
    lam = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    x_hat = denoise(model, q_sample(x, lam, noise), lam)
    w = (1 + lam.exp()).view(2, 1, 1, 1, 1)
    want = (w * (x - x_hat) ** 2).mean().item()
    assert loss_v(model, x, lam, noise).item() == pytest.approx(want, rel=1e-6)


def test_every_parameter_gets_a_gradient():
    model, y = network(torch.float32), torch.tensor([[0, 0, 0, 1, -1], [2, 2, 2, 3, 0]])
    x = rand(2, 5, 1, 8, 8)
    loss_v(model, x, log_snr(torch.rand(2, 5)), rand(2, 5, 1, 8, 8, seed=1), y, 2).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert (model.label.weight.grad.abs().sum(1) > 0).all()


def test_ema_is_exact():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    want = [0.9 * p.detach() + 0.1 * q.detach() for p, q in zip(a.parameters(), b.parameters())]
    update_ema(a, b, 0.9)
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(a.parameters(), want))


# ---- guidance, sampler ----


@pytest.mark.parametrize("w", [0.0, 0.7, 3.0])
def test_guidance_is_eq_6(w):
    model, z, y = network(), rand(2, 3, 1, 4, 4, dtype=torch.float64), torch.tensor([1, 2])
    lam = torch.tensor(0.5, dtype=torch.float64)
    alpha, sigma = alpha_sigma(lam, z)
    eps, eps_c = (sigma * z + alpha * model(z, lam, c) for c in (None, y))
    eps_w = (1 + w) * eps_c - w * eps
    want = (z - sigma * eps_w) / alpha
    assert torch.allclose(denoise(model, z, lam, y, w), want, atol=1e-10)
    assert torch.allclose(denoise(model, z, lam, None, w), (z - sigma * eps) / alpha, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_a_perfect_network_samples_the_data(gamma):
    """x ~ N(.3, .5^2): the ancestral sampler has its mean and, with many steps, its sd."""
    g = torch.Generator().manual_seed(0)
    how = {"gamma": gamma, "clip": False, "generator": g}
    x = sample(gaussian_model(0.3, 0.5), (40, 4, 1, 16, 16), 300, **how)
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, rel=0.04)


def test_sampler_line_by_line():
    """Eq. 4 in plain numbers; t runs from 1 to 0, the last step takes the mean."""
    model, shape, steps, seen = gaussian_model(0.3, 0.5), (1, 2, 1, 2, 2), 5, []

    def watch(z, lam, *_):
        seen.append(lam.item())
        return model(z, lam)

    how = {"gamma": 0.4, "clip": False, "generator": torch.Generator().manual_seed(1)}
    out = sample(watch, shape, steps, **how)
    lam = log_snr(torch.linspace(1, 0, steps + 1))
    assert seen == pytest.approx(lam[:-1].tolist()) and seen[0] == pytest.approx(-20, abs=0.01)
    g = torch.Generator().manual_seed(1)
    z = torch.randn(shape, generator=g)
    for i in range(steps):
        noise = torch.randn(2, *shape, generator=g)[1]
        a_t, s_t = alpha_sigma(lam[i], z)
        a_s, s_s = alpha_sigma(lam[i + 1], z)
        x, e = a_t * z - s_t * model(z, lam[i]), (lam[i] - lam[i + 1]).exp()
        low, high = (1 - e) * s_s**2, (1 - e) * s_t**2
        z = e * a_s / a_t * z + (1 - e) * a_s * x
        if i < steps - 1:
            z = z + (low**0.6 * high**0.4).sqrt() * noise
    assert torch.allclose(out, z, atol=1e-3)


def test_clip_keeps_x_hat_within_the_range():
    how = {"generator": torch.Generator().manual_seed(0)}
    x = sample(gaussian_model(3.0, 0.1), (2, 2, 1, 4, 4), 20, **how)
    assert x.max().item() == pytest.approx(1, abs=1e-4)


def test_reconstruction_guidance_by_finite_differences():
    """Eq. 7: the slope of |x_a - x_hat_a|^2 in single pixels of z_b, frames of a untouched."""
    model, lam, n, w_r = network(), torch.tensor(0.4, dtype=torch.float64), 2, 3.0
    z, x_a = rand(2, 5, 1, 4, 4).double(), rand(2, n, 1, 4, 4, seed=2).double()

    def denoiser(z):
        return denoise(model, z, lam)

    x, guided = denoiser(z).detach(), reconstruction_guided(denoiser, z, lam, x_a, w_r)
    assert torch.equal(guided[:, :n], x[:, :n]) and not guided.requires_grad
    alpha = alpha_sigma(lam, z)[0].item()
    for at in ((0, 2, 0, 1, 3), (1, 4, 0, 0, 0), (1, 3, 0, 2, 2)):
        bump = torch.zeros_like(z)
        bump[at] = 1e-5
        a, b = ((x_a - denoiser(z + s * bump)[:, :n]).square().sum() for s in (1, -1))
        slope = ((a - b) / 2e-5).item()
        assert abs(slope) > 1e-6
        want = x[at].item() - w_r * alpha / 2 * slope
        assert guided[at].item() == pytest.approx(want, abs=1e-8)


def test_reconstruction_guidance_is_exact_for_two_correlated_frames():
    """x_a = x_b + small noise, both Gaussian: the network knows it, so guidance with w_r = 1 must
    move the new frame to the given one, and more than replacement does in few steps."""
    rho, var = 0.95, 0.25
    C = var * torch.tensor([[1.0, rho], [rho, 1.0]])

    def model(z, lam, y=None, num_images=0):  # v of E[x | z] = alpha C (alpha^2 C + sigma^2)^-1 z
        alpha, sigma = alpha_sigma(lam, lam)
        gain = alpha * C @ torch.linalg.inv(alpha**2 * C + sigma**2 * torch.eye(2))
        x = torch.einsum("ij,bj...->bi...", gain, z)
        return (alpha * z - x) / sigma

    x_a, miss = 0.5 * rand(500, 1, 1, 2, 2, seed=3), []
    for w_r in (0.0, 1.0):
        how = {"x_a": x_a, "w_r": w_r, "clip": False, "generator": torch.manual_seed(0)}
        x = sample(model, (500, 2, 1, 2, 2), 50, **how)
        assert torch.equal(x[:, :1], x_a)
        miss.append((x[:, 1:] - rho * x_a).square().mean().item())
    exact = var * (1 - rho**2)  # of the true p(x_b | x_a)
    assert miss[1] < 0.6 * miss[0] and miss[1] < 1.4 * exact


def test_replacement_gives_the_network_the_noised_frames():
    """At each t part a is a fresh draw of q(z_t | x_a); the rest is the sampler's."""
    x_a, seen = torch.full((1, 2, 1, 20, 20), 0.8), []

    def model(z, lam, *_):
        seen.append((lam, z[:, :2].clone()))
        return torch.zeros_like(z)

    out = sample(model, (1, 4, 1, 20, 20), 10, x_a=x_a, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out[:, :2], x_a)
    for lam, z in seen:
        alpha, sigma = alpha_sigma(lam, lam)
        assert z.mean().item() == pytest.approx(0.8 * alpha.item(), abs=4 * sigma.item() / 28)
        assert z.std().item() == pytest.approx(sigma.item(), rel=0.15)


def test_images_are_sampled_independently():
    model, how = network(torch.float32), {"generator": torch.Generator().manual_seed(0)}
    x = sample(model, (2, 3, 1, 4, 4), 4, num_images=3, **how)
    how = {"generator": torch.Generator().manual_seed(0)}

    def one_by_one(z, lam, y, num_images):
        return torch.cat([model(z[:, i : i + 1], lam) for i in range(3)], 1)

    assert torch.allclose(x, sample(one_by_one, (2, 3, 1, 4, 4), 4, **how), atol=1e-4)


# ---- data and measures ----


def test_bounce_by_hand():
    """A 2x2 digit on 5x5: the way is 0..3 and back, rows and columns on their own."""
    digit = torch.tensor([[[1, 2], [3, 4]]])
    x = bounce(digit, 6, torch.tensor([[0, 5]]), side=5)
    assert x.shape == (1, 6, 1, 5, 5)
    for t, (row, column) in enumerate(zip([0, 1, 2, 3, 2, 1], [1, 0, 1, 2, 3, 2])):
        want = torch.zeros(5, 5)
        want[row : row + 2, column : column + 2] = digit[0]
        assert torch.equal(x[0, t, 0], want), t


def test_batches_are_a_function_of_the_seed_and_split_by_digit():
    data, test = script.load_videos("digits")
    assert len(data[0]) == 1200 and len(test[0]) == 597
    a, b = (draw(data, 4, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert a[0].shape == (4, 8, 1, 16, 16) and a[0].min() == -1 and a[0].max() <= 1
    mass = (a[0] + 1).sum((2, 3, 4))
    assert (mass - mass[:, :1]).abs().max() < 1e-3  # the same digit in each frame, never cut off
    assert (script.centre(a[0]).diff(dim=1).abs().sum(2) > 0).all()  # and it moves


def test_measures_by_hand():
    """A dot that goes right by 1, stops for the second half; labels given by hand."""
    videos = torch.full((1, 4, 1, 6, 6), -1.0)
    for t, column in enumerate((1, 2, 3, 3)):
        videos[0, t, 0, 2, column] = 1
    classify = lambda x: torch.tensor([[5, 5, 5, 7]])  # noqa: E731
    real = videos.flip(4)  # columns 4 3 2 2
    out = script.measure(videos, real, torch.tensor([5]), classify)
    assert out["identity"] == 0.5 and out["label"] == 0.75
    want = {"motion": 2 / 3, "turn": 0.5, "seam": 0.0, "miss": 1.0}
    assert {k: out[k] for k in want} == pytest.approx(want, abs=1e-3)


def test_pixel_gaussian_is_the_perfect_network_of_independent_pixels():
    g = torch.Generator().manual_seed(0)
    x = 0.4 + 0.3 * torch.randn(2000, 4, 1, 2, 2, generator=g)
    z, lam = rand(3, 4, 1, 2, 2), torch.tensor([-3.0, 0.0, 3.0])
    want = gaussian_model(0.4, 0.3)(z, lam)
    assert torch.allclose(script.pixel_gaussian(x, z, lam), want, atol=0.05)


# ---- the demo ----


def main(tmp_path, *flags):
    return script.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *map(str, flags)])


def npz(path, n=20, size=(8, 8, 8), dtype=np.uint8, **changes):
    r = np.random.default_rng(0)
    x = r.integers(0, 255, (n, *size)).astype(dtype)
    np.savez(path, **({"x_train": x} | changes))
    return path


def test_quick_as_a_subprocess(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, FILE, "--quick", "--out", tmp_path]
    run = subprocess.run(run, capture_output=True, text=True, env=env, check=True)
    lines = run.stdout.splitlines()
    assert lines[0].startswith("video_diffusion | 0.0") and "digits 1200/597" in lines[0]
    assert lines[-1].startswith("test identity ") and "independent frames" in lines[-1]
    assert (tmp_path / "video_diffusion.png").stat().st_size > 10_000
    assert (tmp_path / "video_diffusion.gif").read_bytes()[:4] == b"GIF8"
    assert not run.stderr.count("Traceback")


@pytest.mark.parametrize("labels,colour", [(False, ()), (True, (3,))])
def test_a_users_videos(labels, colour, tmp_path, capsys):
    y = {"y_train": np.arange(20) // 2} if labels else {}  # the last class is held out whole
    data = npz(tmp_path / "v.npz", size=(9, 8, 12, *colour), **y)
    assert main(tmp_path, "--data", data, "--target", -9) == 0  # minus the loss
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("held-out loss ") and "pixelwise Gaussian" in line
    assert main(tmp_path, "--data", data, "--target", 0) == 1


def test_resumed_after_ctrl_c_equals_unbroken(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)
    flags = ["--data", npz(tmp_path / "d.npz", y_train=np.arange(20) % 2), "--steps", 4]
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    assert main(tmp_path, *flags, "--save", a) == 0
    real, handler, calls = script.update_ema, signal.getsignal(signal.SIGINT), []

    def interrupt(*args):
        real(*args)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script, "update_ema", interrupt)
    assert main(tmp_path, *flags, "--save", b) == 130
    monkeypatch.setattr(script, "update_ema", real)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(b)["step"] in (2, 3)
    assert main(tmp_path, "--load", b, "--steps", 4, "--save", b) == 0
    a, b = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    assert a["history"] == b["history"] and len(a["history"]) == 4
    for k in ("model", "ema"):
        assert all(torch.equal(v, b[k][n]) for n, v in a[k].items())
    assert any(not torch.equal(v, a["model"][n]) for n, v in a["ema"].items())


def test_same_seed_same_losses_and_another_seed_others(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)  # slow, and not the point
    data, losses = npz(tmp_path / "d.npz"), []
    for i, seed in enumerate((1, 1, 2)):
        save = tmp_path / f"{i}.pt"
        main(tmp_path, "--data", data, "--steps", 2, "--seed", seed, "--save", save)
        losses.append(torch.load(save)["history"])
    assert losses[0] == losses[1] != losses[2]


def test_training_batch_joins_videos_and_images(tmp_path, monkeypatch):
    """Frames of a video share t and label, every image has its own, and its own digit's label."""
    seen = []

    def watch(model, x, lam, noise, y, num_images):
        seen.append((x, lam, y, num_images))
        raise FloatingPointError("seen enough")

    monkeypatch.setattr(script, "loss_v", watch)
    assert main(tmp_path, "--batch-size", 64, "--images", 3, "--seed", 2) == 1
    x, lam, y, num_images = seen[0]
    assert x.shape == (64, 11, 1, 16, 16) and num_images == 3
    g = torch.Generator().manual_seed(2 * 10**10 + 1)
    (videos, a), (images, b) = (
        draw(script.load_videos("digits")[0], *n, g) for n in ((64, 8), (192, 1))
    )
    assert torch.equal(x, torch.cat([videos, images.view(64, 3, 1, 16, 16)], 1))
    want = torch.cat([a[:, None].expand(64, 8), b.view(64, 3)], 1)
    assert ((y == want) | (y == -1)).all()
    assert 0.6 < (y == -1).float().mean() < 0.8
    for part in (lam, y):
        assert (part[:, :8] == part[:, :1]).all() and (part[:, 8:] != part[:, :1]).any(0).all()
    assert (lam[:, 8:] != lam[:, :1]).all() and lam.max() > 3 and lam.min() < -3


def test_training_follows_the_average(tmp_path, monkeypatch):
    """Two steps, the second with rate 0: the average has come 1 - .995^2 of the model's way."""
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)
    data, save = npz(tmp_path / "d.npz"), tmp_path / "a.pt"
    main(tmp_path, "--data", data, "--steps", 2, "--save", save)
    ckpt = torch.load(save)
    torch.manual_seed(0)
    start = UNet3D(1, 8, (1, 2), 0, 2, 8, 2, 0)
    for key, p in start.named_parameters():
        model, ema = ckpt["model"][key], ckpt["ema"][key]
        assert torch.allclose(ema, p + (1 - 0.995**2) * (model - p), atol=1e-7)
    assert (ckpt["model"]["conv_out.bias"] - start.conv_out.bias).abs().max() > 5e-4


@pytest.mark.parametrize(
    "flags,word",
    [
        (["--data", "none.npz"], "none.npz"),
        (["--data", "cut.npz"], "zip file"),
        (["--data", "pickle.npz"], "pickle"),
        (["--data", "float.npz"], "uint8"),
        (["--data", "flat.npz"], "uint8"),
        (["--data", "odd.npz"], "divide by 4"),
        (["--data", "labels.npz"], "y_train"),
        (["--data", "few.npz", "--batch-size", "21"], "more than the videos"),
        (["--data", "few.npz", "--frames", "9"], "not over 8"),
        (["--data", "x.npz"], "x_train"),
        (["--steps", "0"], "steps must lie between"),
        (["--lr", "nan"], "lr must lie between"),
        (["--lr", "inf"], "lr must lie between"),
        (["--dim", "6"], "multiple of 4"),
        (["--mults", "one"], "one"),
        (["--mults", ""], ""),
        (["--seed", "-1"], "seed must lie between"),
        (["--out", "a-file/x"], "a-file"),
        (["--save", "."], "cannot write"),
        (["--save", "none/x.pt"], "none"),
        (["--load", "other.pt"], "not a checkpoint of this script"),
        (["--load", "few.npz"], ""),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_line(flags, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").write_text("")
    torch.save({"script": "vae"}, "other.pt")
    npz("few.npz")
    npz("float.npz", dtype=np.float32)
    npz("flat.npz", size=(8, 8))
    npz("odd.npz", size=(8, 7, 8))
    npz("labels.npz", y_train=np.arange(19))
    npz("pickle.npz", x_train=np.array([{}], dtype=object))
    np.savez("x.npz", x=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "few.npz").read_bytes()[:300])
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stop:
        script.main(["--quick", "--device", "cpu", *flags])
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and ": error: " in err[-1] and word in err[-1]
    assert set(os.listdir()) - set(before) <= {"out"}


def test_checkpoint_of_other_data_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)
    a, b = npz(tmp_path / "a.npz"), npz(tmp_path / "b.npz", size=(8, 8, 8, 3))
    assert main(tmp_path, "--data", a, "--steps", 1, "--save", tmp_path / "a.pt") == 0
    with pytest.raises(SystemExit):
        main(tmp_path, "--load", tmp_path / "a.pt", "--data", b)
    assert "other videos or classes" in capsys.readouterr().err


def test_nan_stops_and_the_last_good_checkpoint_stays(tmp_path, capsys, monkeypatch):
    data, save, real, calls = npz(tmp_path / "d.npz"), tmp_path / "n.pt", script.loss_v, []

    def poisoned(*args):
        calls.append(1)
        return real(*args) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(script, "loss_v", poisoned)
    assert main(tmp_path, "--data", data, "--log-every", 2, "--save", save) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("nan at step 3")
    assert torch.load(save)["step"] == 2
    slope = lambda model, *a: (0 * next(model.parameters()).sum()).sqrt()  # noqa: E731
    monkeypatch.setattr(script, "loss_v", slope)  # 0, but its gradient isn't finite
    assert main(tmp_path, "--data", data) == 1
    assert re.search("gradient nan, loss -?0.0 at step 1$", capsys.readouterr().err.strip())


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    """The identity of samples without a label: the README's mean less its spread."""
    assert script.main(["--out", str(tmp_path), "--target", "0.61"]) == 0
