import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vae
from vae import VAE, gaussian_kl, log_bernoulli, log_normal

ROOT = Path(vae.__file__).parent


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model_and_data(likelihood="bernoulli", J=3, shape=(4, 5), B=6):
    """A small model whose weights are large enough that every term of the bound matters."""
    torch.manual_seed(0)
    model = VAE(shape, J, (16,), likelihood)
    for p in model.parameters():
        p.data.mul_(2)
    x = torch.rand(B, *shape)
    return model, (x > 0.5).float() if likelihood == "bernoulli" else x


def run(*args, cwd, timeout=300):
    command = [sys.executable, str(ROOT / "vae.py"), "--device", "cpu", *map(str, args)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env
    )


# 1 shapes


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize(
    "shape, J, hidden", [((28, 28), 20, (500,)), ((1, 3), 1, ()), ((5, 4, 3), 2, (7, 9))]
)
def test_shapes(shape, J, hidden, likelihood):
    model, x = VAE(shape, J, hidden, likelihood), torch.rand(1, *shape).round()
    mu, log_var = model.encode(x)
    assert mu.shape == log_var.shape == (1, J)
    assert all(o.shape == (7, 1, math.prod(shape)) for o in model.decode(torch.randn(7, 1, J)))
    assert model.log_weights(x, 7).shape == (7, 1)
    assert model.sgvb_a(x).shape == model.sgvb_b(x).shape == model.iwae_bound(x, 3).shape == (1,)
    assert torch.equal(model.sgvb_b(x, 2, seeded()), model.sgvb_b(x.flatten(1), 2, seeded()))
    q = model.encode(x)  # the KL's weight counts it twice
    twice = model.sgvb_b(x, 2, seeded(), kl_weight=2) + gaussian_kl(*q)
    torch.testing.assert_close(twice, model.sgvb_b(x, 2, seeded()))
    sample = model.sample(3)
    assert sample.shape == (3, *shape) and 0 <= sample.min() and sample.max() <= 1
    assert model.elbo(x).shape == ()


def test_parameter_count_of_the_papers_mnist_model():
    count = sum(p.numel() for p in VAE((28, 28), 20, (500,)).parameters())
    assert count == 784 * 500 + 500 + 500 * 40 + 40 + 20 * 500 + 500 + 500 * 784 + 784


def test_unknown_likelihood_is_refused():
    with pytest.raises(ValueError, match="likelihood"):
        VAE(likelihood="mse")


# 2 oracles


def test_densities_equal_torch_distributions():
    x, mu, log_var = torch.randn(3, 5, 7).unbind()
    q = torch.distributions.Normal(mu, torch.exp(log_var / 2))
    torch.testing.assert_close(log_normal(x, mu, log_var), q.log_prob(x).sum(-1))
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q, prior).sum(-1)
    torch.testing.assert_close(gaussian_kl(mu, log_var), kl)
    bits = (x > 0).float()
    bce = F.binary_cross_entropy_with_logits(mu, bits, reduction="none").sum(-1)
    torch.testing.assert_close(log_bernoulli(bits, mu), -bce)
    assert log_bernoulli(torch.tensor([0.0, 1.0]), torch.tensor([1e4, -1e4])) == -2e4


def test_bernoulli_is_a_probability_over_all_images():
    model = model_and_data(shape=(2, 2), J=2)[0]
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)  # (16, 4)
    z = torch.randn(1, 2).expand(16, 2)
    total = model.log_p_x_given_z(every, z).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_marginal_likelihood_equals_quadrature_and_bounds_are_ordered(likelihood):
    """log p(x) with a 1-D z is an integral that a grid solves: the one number all must obey."""
    model, x = model_and_data(likelihood, J=1)
    z = torch.linspace(-8, 8, 4001)
    with torch.no_grad():
        log_joint = model.log_p_x_given_z(x, z[:, None, None].expand(-1, len(x), 1))
        log_joint = log_joint - 0.5 * z[:, None] ** 2 - 0.5 * math.log(2 * math.pi)
        exact = torch.logsumexp(log_joint, 0) + math.log(16 / 4000)
        estimate = model.log_marginal(x, 20_000, seeded())
        torch.testing.assert_close(estimate, exact, atol=0.05, rtol=0)
        bounds = [model.iwae_bound(x.repeat(500, 1, 1), k).mean() for k in (1, 5, 50)]
        elbo = model.elbo(x, 500)
        assert bounds[0] < bounds[1] < bounds[2] < exact.mean() + 0.02
        assert abs(bounds[0] - elbo) < 0.25  # k = 1 is the ELBO
        # and Eq. 1: the gap of the ELBO is D_KL(q(z|x) || p(z|x)), on the same grid
        mu, log_var = model.encode(x)
        log_q = log_normal(z[:, None, None], mu, log_var)
        gap = (log_q.exp() * (log_q - (log_joint - exact))).sum(0) * 16 / 4000
        assert (exact - gap).mean().item() == pytest.approx(elbo.item(), abs=0.1)


def test_decoder_formulas_of_appendix_c():
    model, x = model_and_data("gaussian")
    z = torch.randn(6, 3)
    W3, b3 = model.decoder[0].weight, model.decoder[0].bias
    out = torch.tanh(z @ W3.T + b3) @ model.decoder[2].weight.T + model.decoder[2].bias
    sigma = torch.exp(0.5 * out[:, 20:])
    log_p = torch.distributions.Normal(torch.sigmoid(out[:, :20]), sigma).log_prob(x.flatten(1))
    torch.testing.assert_close(model.log_p_x_given_z(x, z), log_p.sum(-1))
    torch.testing.assert_close(model.image(z).flatten(1), torch.sigmoid(out[:, :20]))


# 3 the paper's properties


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_sgvb_a_and_b_agree_in_the_mean(likelihood):
    """Eq. 6 and Eq. 7 estimate one bound. 4,000 draws: within 5 standard errors, per image."""
    model, x = model_and_data(likelihood)
    with torch.no_grad():
        a = model.log_weights(x, 4000, seeded(1))
        z, mu, log_var = model.posterior_sample(x, 4000, seeded(2))
        b = model.log_p_x_given_z(x, z) - gaussian_kl(mu, log_var)
    error = (a.var(0) / 4000 + b.var(0) / 4000).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(model.sgvb_a(x, 4000, seeded(1)), a.mean(0))
    torch.testing.assert_close(model.sgvb_b(x, 4000, seeded(2)), b.mean(0))
    torch.testing.assert_close(model.elbo(x, 4000, seeded(2)), b.mean())


def test_reparameterised_noise_has_the_encoders_mean_and_variance():
    model, x = model_and_data()
    z, mu, log_var = model.posterior_sample(x, 20_000, seeded())
    torch.testing.assert_close(z.mean(0), mu, atol=0.1, rtol=0.05)
    torch.testing.assert_close(z.var(0), log_var.exp(), atol=0.02, rtol=0.1)


def test_reparameterised_gradient_equals_the_closed_form():
    """d/dmu, d/dlog_var of E[z^2] = mu^2 + sigma^2, through the sample (Eq. 4)."""
    model, x = model_and_data(J=1, B=1)
    z, mu, log_var = model.posterior_sample(x, 200_000, seeded())
    d_mu, d_log_var = torch.autograd.grad((z**2).mean(), (mu, log_var))
    torch.testing.assert_close(d_mu, 2 * mu, atol=0.02, rtol=0.02)
    torch.testing.assert_close(d_log_var, log_var.exp(), atol=0.02, rtol=0.02)


def test_kl_is_zero_at_the_prior_and_positive_elsewhere():
    assert gaussian_kl(torch.zeros(4), torch.zeros(4)) == 0
    assert (gaussian_kl(*torch.randn(2, 100, 4)) > 0).all()


def test_pieces_of_the_importance_weighted_bound_are_exact():
    model, x = model_and_data()
    z_free = model.log_weights(x, 7, seeded())
    want = torch.logsumexp(z_free, 0) - math.log(7)
    torch.testing.assert_close(model.iwae_bound(x, 7, seeded(), piece=50), want)
    torch.testing.assert_close(model.iwae_bound(x, 7, seeded(), piece=1).shape, want.shape)
    # equal weights: the bound is their common value whatever k and the pieces
    model.log_weights = lambda x, L, generator=None: torch.full((L, len(x)), -3.0)
    torch.testing.assert_close(model.iwae_bound(x, 7, piece=3), torch.full((6,), -3.0))


def test_pixels_are_what_the_likelihood_needs():
    x = torch.tensor([[0, 4, 8, 16]], dtype=torch.uint8).repeat(20_000, 1)
    on = vae.pixels(x, 17, "bernoulli", seeded())
    assert set(on.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(on.mean(0), torch.tensor([0, 0.25, 0.5, 1]), atol=0.02, rtol=0)
    assert on[:, 0].max() == 0 and on[:, 3].min() == 1
    spread = vae.pixels(x, 17, "gaussian", seeded())
    assert 0 <= spread.min() and spread.max() < 1
    assert torch.equal((spread * 17).floor(), x.float())


# 4 gradients


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("bound", ["elbo", "sgvb_a", "iwae_bound"])
def test_every_parameter_gets_a_gradient(likelihood, bound):
    model, x = model_and_data(likelihood)
    getattr(model, bound)(x, 5).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not model.log_marginal(x, 2).requires_grad


# 5 loss at initialisation, and that it falls


def test_bound_at_initialisation_is_d_ln_2_and_rises():
    torch.manual_seed(0)
    model, x = VAE((8, 8), 4, (64,)), (torch.rand(32, 8, 8) > 0.7).float()
    model.decoder[-1].weight.data.zero_(); model.decoder[-1].bias.data.zero_()  # fmt: skip
    mu, log_var = model.encode(x)
    want = -64 * math.log(2) - gaussian_kl(mu, log_var).mean()
    torch.testing.assert_close(model.elbo(x), want)
    assert gaussian_kl(mu, log_var).mean() < 1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        loss = -model.elbo(x)
        optimizer.zero_grad(); loss.backward(); optimizer.step()  # fmt: skip
    assert model.elbo(x, 10) > -0.8 * 64 * math.log(2)


# the baselines and the judge


def test_class_mixture_by_hand():
    train, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0, 1])
    test = torch.tensor([[1.0, 0.0]])
    want = math.log(2 / 3 * (3 / 4) * (3 / 4) + 1 / 3 * (1 / 3) * (2 / 3))
    assert vae.class_mixture(train, labels, test, "bernoulli") == pytest.approx(want, abs=1e-5)
    want = math.log((3 / 5) * (4 / 5))
    assert vae.class_mixture(train, labels * 0, test, "bernoulli") == pytest.approx(want, abs=1e-5)
    x = vae.pixels(torch.zeros(50, 2, dtype=torch.uint8), 256, "gaussian", seeded())  # 2 dead ones
    want = torch.distributions.Normal(x.mean(0), x.std(0, correction=0)).log_prob(x).sum(1).mean()
    got = vae.class_mixture(x, torch.zeros(50), x, "gaussian")
    assert got == pytest.approx(want.item(), abs=0.5)


def test_gaussian_images_have_the_mean_and_covariance_of_the_class():
    x = 0.5 + 0.1 * torch.randn(500, 3, generator=seeded()) @ torch.tensor(
        [[1.0, 1, 0], [0, 1, 1], [0, 0, 1]]
    )
    draws = vae.gaussian_images(x, torch.zeros(500, dtype=torch.long), 20_000)
    torch.testing.assert_close(draws.mean(0), x.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.cov(draws.T), torch.cov(x.T), atol=1.5e-3, rtol=0)


@pytest.fixture(scope="module")
def judged():
    x, y, x_test, levels = vae.load_images("digits")
    assert levels == 17
    x, x_test = x / 16, x_test / 16
    return x, y, x_test, *vae.make_judge(x, y, x_test)


def test_judge_orders_what_it_must(judged):
    x, y, x_test, score, classify = judged
    state = torch.get_rng_state()
    vae.make_judge(x[:100], y[:100], x_test)
    assert torch.equal(state, torch.get_rng_state())  # the judge leaves the model's noise alone
    real, same = score(x[:1000]), score(x_test)
    assert same["FD"] == pytest.approx(0, abs=1e-3) and same["novelty"] == pytest.approx(1)
    assert same["precision"] == same["recall"] == 1 and real["novelty"] == 0
    per_class, one = (score(vae.gaussian_images(x, labels, 1000)) for labels in (y, 0 * y))
    nine, noise = score(x[y != 3]), score(torch.rand(1000, 8, 8, generator=seeded()))
    assert real["FD"] < per_class["FD"] < one["FD"] < noise["FD"] and real["FD"] < nine["FD"]
    mean = score(x.mean(0) + 1e-3 * torch.rand(50, 8, 8, generator=seeded()))
    assert mean["recall"] < 0.05 and mean["precision"] > 0.9  # one typical image is no generator
    assert noise["precision"] < 0.5 < real["precision"]
    order = torch.randperm(1797, generator=seeded())  # as in load_images
    y_test = torch.tensor(pytest.importorskip("sklearn.datasets").load_digits().target)[order][
        1200:
    ]
    assert (classify(x_test) == y_test).double().mean() > 0.95


# 6 the command line


def test_quick_run_saves_samples_and_resumes(tmp_path, capsys, monkeypatch):
    result = run("--quick", "--save", "a.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("vae | ") and lines[0].endswith("| cpu | seed 0 | digits 1200/597")
    assert "test bound (k = 10)" in lines[-1] and "class mixture" in lines[-1]
    assert (tmp_path / "out" / "vae.png").stat().st_size > 5000
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("out/*.tmp"))
    monkeypatch.chdir(tmp_path)
    assert vae.main(["--load", "a.pt", "--out", "b"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert len(again) == len(lines) - 1 and "step" not in again[1]  # nothing is trained
    assert again[-1].rsplit("|", 1)[0] == lines[-1].rsplit("|", 1)[0]
    assert vae.main(["--load", "a.pt", "--target", "-1"]) == 1
    draws = [np.load(f"{folder}/vae_samples.npy") for folder in ("out", "b")]
    assert draws[0].shape == (1000, 8, 8) and draws[0].dtype == np.uint8
    assert np.array_equal(*draws)
    model = VAE((8, 8), 4, (32,))  # and sampling in Python, as the docstring says
    weights = torch.load("a.pt")["models"]
    model.load_state_dict({k[2:]: v for k, v in weights.items() if k.startswith("0.")})
    assert np.abs(model.sample(1000, seeded()).numpy() * 255 - draws[0]).max() <= 0.51


def npz(path, n=40, size=6, **change):
    g = np.random.default_rng(0)
    arrays = {f"x_{s}": g.integers(0, 256, (n, size, size), np.uint8) for s in ("train", "test")}
    arrays |= {f"y_{s}": (np.arange(n) % 10).astype(np.uint8) for s in ("train", "test")}
    np.savez(path, **{k: v for k, v in (arrays | change).items() if v is not None})


def test_bad_input_ends_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npz("ok.npz"); npz("lacks.npz", y_test=None); npz("few.npz", n=4)  # fmt: skip
    npz("float.npz", x_train=np.zeros((40, 6, 6)))
    npz("label.npz", y_train=np.full(40, 1.5))
    npz("size.npz", x_test=np.zeros((40, 5, 6), np.uint8))
    npz("object.npz", x_train=np.array([None, 1], dtype=object))
    Path("cut.npz").write_bytes(Path("ok.npz").read_bytes()[:500])
    Path("text.npz").write_text("hello")
    torch.save({"script": "gan"}, "other.pt")
    Path("file").write_text("")
    bad = [f"--data {n}.npz" for n in "none lacks few float label size object cut text".split()]
    bad += [
        "--steps 0",
        "--batch-size 99999",
        "--lr nan",
        "--lr 0",
        "--k 0",
        "--hidden 0",
        "--wrong",
    ]
    bad += ["--likelihood mse", "--load other.pt", "--load none.pt", "--load text.npz"]
    bad += ["--out file", "--save no/such/a.pt", "--save .", "--latent-dim x"]
    for line in bad:
        before = sorted(os.listdir())
        with pytest.raises(SystemExit) as error:
            vae.main(["--quick", *line.split()])
        text = capsys.readouterr().err
        assert error.value.code == 2 and "Traceback" not in text, line
        assert text.splitlines()[-1].startswith(("pytest", "vae.py", "__main__.py")), text
        assert sum("error:" in t.lower()[:40] for t in text.splitlines()) == 1, text
        assert sorted(set(os.listdir()) - {"out"}) == [n for n in before if n != "out"], line


def test_checkpoint_of_another_size_is_refused_and_colour_files_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    npz(
        "rgb.npz",
        x_train=g.integers(0, 256, (40, 6, 5, 3), np.uint8),
        x_test=g.integers(0, 256, (40, 6, 5, 3), np.uint8),
    )
    flags = "--quick --data rgb.npz --steps 2 --save a.pt --likelihood gaussian".split()
    assert vae.main(flags) == 0
    assert "| rgb.npz 40/40" in capsys.readouterr().out and Path("out/vae.png").exists()
    for flags in (["--latent-dim", "9"], ["--data", "digits"], ["--hidden", "32", "32"]):
        with pytest.raises(SystemExit) as error:
            vae.main(["--load", "a.pt", *flags])
        assert error.value.code == 2 and "loading state_dict" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npz("a.npz")
    monkeypatch.setattr(
        VAE, "elbo", lambda self, *_: torch.tensor(float("nan"), requires_grad=True)
    )
    assert vae.main("--quick --data a.npz --save a.pt".split()) == 1
    assert "at step 1" in capsys.readouterr().err and not Path("a.pt").exists()


# 7 the file alone


def test_the_file_alone_needs_torch_and_numpy_only(tmp_path):
    shutil.copy(ROOT / "vae.py", tmp_path)
    code = """
import sys
for name in ("sklearn", "matplotlib", "tqdm"):
    sys.modules[name] = None
from vae import VAE
import torch
print(VAE().elbo(torch.rand(2, 28, 28).round()).item())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# 8 determinism


def test_same_seed_same_losses_and_an_interrupted_run_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    npz("a.npz")
    common = "--quick --data a.npz --steps 9".split()
    for name in ("a", "b"):
        assert vae.main([*common, "--save", f"{name}.pt"]) == 0
    real, calls = vae.pixels, []

    def interrupt(*args):
        calls.append(0)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C in the fifth step
        return real(*args)

    monkeypatch.setattr(vae, "pixels", interrupt)
    assert vae.main([*common, "--save", "c.pt"]) == 130
    assert torch.load("c.pt")["step"] == 5
    assert vae.main(["--load", "c.pt", "--steps", "9", "--save", "c.pt"]) == 0
    a, b, c = (torch.load(f"{name}.pt") for name in "abc")
    assert a["history"] == b["history"] == c["history"] and len(a["history"]) == 9
    assert vae.main([*common, "--seed", "1", "--save", "d.pt"]) == 0
    assert torch.load("d.pt")["history"] != a["history"]
    for other in (b, c):
        assert all(torch.equal(w, other["models"][k]) for k, w in a["models"].items())


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert vae.main(["--out", str(tmp_path), "--target", "-22.37"]) == 0
