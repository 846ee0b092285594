import argparse
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
import torch.nn as nn
from torch.distributions import Bernoulli, Independent, Normal

import cvae
from cvae import CVAE, BaselineNN

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def ctrl_c_stays_with_pytest():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def gaussian(*shape):
    return torch.randn(*shape), torch.randn(*shape)


def as_normal(g):
    return Independent(Normal(g[0], (0.5 * g[1]).exp()), 1)


def small(x_dim=5, y_dim=7, z_dim=1, seed=0, scale=3.0):
    """A CVAE whose three networks differ clearly from constants, and a batch of 4 for it."""
    torch.manual_seed(seed)
    model = CVAE(x_dim, y_dim, z_dim, hidden=16)
    for p in model.parameters():
        p.data *= scale if p.ndim == 2 else 1
    return model, (torch.rand(4, x_dim) < 0.5).float(), (torch.rand(4, y_dim) < 0.5).float()


# 1 shapes


@pytest.mark.parametrize("x_dim,y_dim,z_dim,batch", [(1, 1, 1, 1), (5, 7, 3, 2), (196, 588, 50, 3)])
def test_shapes(x_dim, y_dim, z_dim, batch):
    model = CVAE(x_dim, y_dim, z_dim, hidden=9)
    x, y = torch.rand(batch, x_dim).round(), torch.rand(batch, y_dim).round()
    for g in (model.prior(x), model.recognition(x, y)):
        assert len(g) == 2 and g[0].shape == g[1].shape == (batch, z_dim)
    z = cvae.reparameterize(model.prior(x), 6)
    assert z.shape == (6, batch, z_dim)
    assert model.generation(x, z).shape == (6, batch, y_dim)
    assert model.generation(x, z[0]).shape == model.predict(x).shape == (batch, y_dim)
    assert BaselineNN(x_dim, y_dim, 9)(x).shape == (batch, y_dim)
    for f in (cvae.cvae_bound, cvae.gsnn_objective, cvae.monte_carlo, cvae.importance_sampling):
        assert f(model, x, y, 3).shape == (batch,)
    assert set(model.sample(x, 20).unique().tolist()) <= {0.0, 1.0}
    p = model.sample(x, 20, pixels=False)
    assert p.shape == (20, batch, y_dim) and 0 <= p.min() and p.max() <= 1


def test_default_sizes_are_those_of_mnist_with_one_quadrant():
    known, unknown = cvae.quadrants(28, 28, 1)
    model = CVAE()
    assert model.prior_net[0].in_features == len(known) == 196
    assert model.generation_net[-1].out_features == len(unknown) == 588


@pytest.mark.parametrize("h,w", [(8, 8), (28, 28), (5, 7), (2, 2), (3, 2)])
def test_quadrants_partition_the_image_and_grow(h, w):
    before = set()
    for n in (1, 2, 3):
        known, unknown = (set(i.tolist()) for i in cvae.quadrants(h, w, n))
        assert known | unknown == set(range(h * w)) and not known & unknown and before < known
        before = known
    image = torch.zeros(h, w)
    image.view(-1)[cvae.quadrants(h, w, 1)[0]] = 1
    assert image[h // 2 :, : w // 2].all() and image.sum() == (h - h // 2) * (w // 2)  # bottom left
    image.view(-1)[cvae.quadrants(h, w, 3)[1]] = 2
    assert (image[h // 2 :, w // 2 :] == 2).all()  # bottom right is never given


@pytest.mark.parametrize("h,w,n", [(8, 8, 0), (8, 8, 4), (1, 8, 1)])
def test_quadrants_raise(h, w, n):
    with pytest.raises(ValueError, match="quadrants"):
        cvae.quadrants(h, w, n)


# 2 oracles


def test_densities_equal_those_of_torch_distributions():
    torch.manual_seed(0)
    q, p, z = gaussian(6, 3), gaussian(6, 3), torch.randn(4, 6, 3)
    y, logits = torch.rand(6, 9).round(), torch.randn(4, 6, 9) * 5
    torch.testing.assert_close(cvae.log_normal(z, q), as_normal(q).log_prob(z))
    kl = torch.distributions.kl_divergence(as_normal(q), as_normal(p))
    torch.testing.assert_close(cvae.kl_divergence(q, p), kl)
    oracle = Independent(Bernoulli(logits=logits), 1).log_prob(y)
    torch.testing.assert_close(cvae.log_bernoulli(y, logits), oracle, rtol=1e-4, atol=1e-4)
    extreme = cvae.log_bernoulli(torch.tensor([[0.0, 1.0]]), torch.tensor([[1e4, -1e4]]))
    torch.testing.assert_close(extreme, torch.tensor([-2e4]))  # log(sigmoid) would say -inf


def test_samples_have_the_mean_and_the_standard_deviation():
    torch.manual_seed(0)
    g = torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, -1.0]])
    z = cvae.reparameterize(g, 200_000)[:, 0]
    torch.testing.assert_close(z.mean(0), g[0][0], atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), g[1][0].exp(), atol=0.1, rtol=0.02)


def exact_log_likelihood(model, x, y):
    """log of the integral of p(z|x) p(y|x,z) over a one-dimensional z, by the trapezoid rule."""
    mu, log_var = model.prior(x)
    grid = torch.linspace(-12, 12, 4_001)[:, None, None]
    z = mu + (0.5 * log_var).exp() * grid  # (4001, B, 1)
    logits = model.generation(x, z)
    log_p = Independent(Bernoulli(logits=logits), 1).log_prob(y) + as_normal(
        (mu, log_var)
    ).log_prob(z)
    width = (0.5 * log_var).exp()[:, 0] * 24 / 4_000
    return log_p.logsumexp(0) + width.log()


@torch.no_grad()
def test_both_estimates_equal_the_integral_and_the_bound_lies_below():
    model, x, y = small()
    exact = exact_log_likelihood(model, x, y)
    torch.manual_seed(1)
    for f in (cvae.monte_carlo, cvae.importance_sampling):
        torch.testing.assert_close(f(model, x, y, 100_000), exact, atol=0.03, rtol=0)
    assert (cvae.cvae_bound(model, x, y, 50_000) < exact - 0.05).all()  # q is untrained: a wide gap
    many = x.repeat(20_000, 1), y.repeat(20_000, 1)  # few samples: low on average, never high
    mc, one = (
        f(model, *many, 1).view(-1, 4).mean(0) for f in (cvae.monte_carlo, cvae.importance_sampling)
    )
    assert (mc < exact).all() and (one < exact).all() and mc.sum() < exact.sum() - 0.1
    bound = cvae.cvae_bound(model, x, y, 50_000)  # and with S = 1 that average is the bound
    torch.testing.assert_close(one, bound, atol=0.3, rtol=0.05)


@torch.no_grad()
def test_bound_is_the_gap_to_the_true_posterior():
    """log p(y|x) - bound = KL(q || p(z|x,y)), the posterior taken from a grid over z."""
    model, x, y = small(scale=2.0)
    q, p = model.recognition(x, y), model.prior(x)
    z = q[0] + (0.5 * q[1]).exp() * torch.linspace(-9, 9, 2001)[:, None, None]
    dz = (0.5 * q[1]).exp()[:, 0] * 18 / 2000
    log_y = Independent(Bernoulli(logits=model.generation(x, z)), 1).log_prob(y)
    log_q, exact = as_normal(q).log_prob(z), exact_log_likelihood(model, x, y)
    gap = (log_q.exp() * (log_q - as_normal(p).log_prob(z) - log_y + exact)).sum(0) * dz
    torch.manual_seed(0)
    bound = cvae.cvae_bound(model, x, y, 50_000)
    torch.testing.assert_close(exact - bound, gap, atol=0.03, rtol=0.02)
    assert (gap > 0).all()


@torch.no_grad()
def test_with_the_true_posterior_one_sample_is_exact():
    """A decoder deaf to z makes the prior the posterior: all weights of Eq. 6 are then equal."""
    model, x, y = small(z_dim=3)
    model.generation_net[0].weight.data[:, x.shape[1] :] = 0
    model.recognition = lambda x, y: model.prior(x)
    exact = cvae.log_bernoulli(y, model.generation(x, torch.zeros(4, 3)))
    for f in (cvae.importance_sampling, cvae.cvae_bound, cvae.monte_carlo):
        torch.testing.assert_close(f(model, x, y, 1), exact)


# 3 properties of the paper


def test_kl_is_zero_for_equals_and_positive_else():
    torch.manual_seed(0)
    q, p = gaussian(1000, 4), gaussian(1000, 4)
    assert cvae.kl_divergence(q, p).min() > 0
    assert cvae.kl_divergence(q, q).abs().max() == 0


def test_who_sees_what():
    model, x, y = small(z_dim=3)
    x.requires_grad_(), y.requires_grad_()
    z = torch.randn(2, 4, 3, requires_grad=True)

    def used(out):
        grads = torch.autograd.grad(out.sum(), (x, y, z), allow_unused=True, retain_graph=True)
        return [g is not None and g.abs().sum() > 0 for g in grads]

    assert all(used(part) == [True, False, False] for part in model.prior(x))  # p(z|x)
    assert all(used(part) == [True, True, False] for part in model.recognition(x, y))  # q(z|x,y)
    assert used(model.generation(x, z)) == [True, False, True]  # p(y|x,z): the decoder uses x


def test_every_sample_meets_its_own_x():
    model, x, _ = small(z_dim=3)
    z = torch.randn(6, 4, 3)
    alone = torch.stack(
        [model.generation(x[b : b + 1], z[s, b : b + 1])[0] for s in range(6) for b in range(4)]
    )
    torch.testing.assert_close(model.generation(x, z).flatten(0, 1), alone)


def test_hybrid_is_the_weighted_sum():
    model, x, y = small(z_dim=3)

    def at(f, *args):
        torch.manual_seed(0)
        return f(model, x, y, *args)

    bound, gsnn = at(cvae.cvae_bound), at(cvae.gsnn_objective)
    torch.testing.assert_close(at(cvae.hybrid_objective, 1.0), bound)
    torch.testing.assert_close(at(cvae.hybrid_objective, 0.0), gsnn)
    torch.manual_seed(0)
    mixed = 0.3 * cvae.cvae_bound(model, x, y) + 0.7 * cvae.gsnn_objective(model, x, y)
    torch.testing.assert_close(at(cvae.hybrid_objective, 0.3), mixed)


@torch.no_grad()
def test_gsnn_objective_is_the_mean_of_log_p_over_the_prior():
    model, x, y = small()
    torch.manual_seed(0)
    z = cvae.reparameterize(model.prior(x), 5)
    oracle = Independent(Bernoulli(logits=model.generation(x, z)), 1).log_prob(y).mean(0)
    torch.manual_seed(0)
    torch.testing.assert_close(cvae.gsnn_objective(model, x, y, 5), oracle)
    assert (
        cvae.gsnn_objective(model, x, y, 5000) < cvae.monte_carlo(model, x, y, 5000)
    ).all()  # Jensen


def test_completions_differ_and_keep_their_distribution():
    model, x, _ = small(z_dim=3)
    p = model.sample(x, 500, pixels=False)
    assert p.std(0).max() > 0.1
    torch.manual_seed(1)
    pixels = model.sample(x, 20_000).mean(0)
    torch.testing.assert_close(
        pixels, model.sample(x, 20_000, pixels=False).mean(0), atol=0.02, rtol=0
    )
    z_star = model.prior(x)[0]
    torch.testing.assert_close(model.predict(x), model.generation(x, z_star).sigmoid())


# 4 gradients


def test_gradients_reach_every_parameter_that_the_objective_trains():
    model, x, y = small(z_dim=3)
    (-cvae.cvae_bound(model, x, y).mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()
    (-cvae.gsnn_objective(model, x, y).mean()).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("recognition_net"), name


def test_the_six_networks_do_not_mix():
    v = torch.rand(3, 16).round()
    models, splits = six(4, 4)
    values = cvae.objectives(models, splits, v, 1.0)
    assert list(values) == list(models)
    for name, value in values.items():
        models.zero_grad()
        value.sum().backward(retain_graph=True)
        touched = {k.split(".")[0] for k, p in models.named_parameters() if p.grad is not None}
        assert touched == {name}


# 5 known loss at the start, and a fall


def test_loss_at_zero_output_is_ln_2_per_pixel():
    model, x, y = small(z_dim=3)
    for net in (model.prior_net, model.recognition_net, model.generation_net):
        nn.init.zeros_(net[-1].weight), nn.init.zeros_(net[-1].bias)
    for f in (cvae.cvae_bound, cvae.gsnn_objective, cvae.monte_carlo, cvae.importance_sampling):
        torch.testing.assert_close(f(model, x, y, 3), torch.full((4,), -7 * math.log(2)))


def test_one_batch_is_learned_by_latents_where_x_says_nothing():
    """The same x with eight different y: the baseline cannot tell them apart, the CVAE can."""
    torch.manual_seed(0)
    x, y = torch.zeros(8, 4), torch.rand(8, 24).round()
    model, baseline = CVAE(4, 24, 4, 64), BaselineNN(4, 24, 64)
    opt = torch.optim.Adam([*model.parameters(), *baseline.parameters()], 5e-3)
    for _ in range(300):
        loss = -(cvae.cvae_bound(model, x, y, 4).mean() + cvae.log_bernoulli(y, baseline(x)).mean())
        opt.zero_grad(), loss.backward(), opt.step()
    with torch.no_grad():
        best = -cvae.log_bernoulli(y, y.mean(0).clamp(1e-6, 1 - 1e-6).logit()).mean()
        base, nll = (
            -cvae.log_bernoulli(y, baseline(x)).mean(),
            -cvae.importance_sampling(model, x, y, 500).mean(),
        )
    assert abs(base - best) < 0.2  # no network without z can do better than the pixel means
    assert nll < 0.4 * base and nll > math.log(8) - 0.3  # eight equal answers cost ln 8, no less


# evaluation and data


def six(h, w, hidden=8, dropout=0.0):
    torch.manual_seed(0)
    splits, models = {n: cvae.quadrants(h, w, n) for n in (1, 2, 3)}, nn.ModuleDict()
    for n, (known, unknown) in splits.items():
        models[f"nn{n}"] = BaselineNN(len(known), len(unknown), hidden, dropout)
        models[f"cvae{n}"] = CVAE(len(known), len(unknown), 2, hidden, dropout)
    return models, splits


def test_validation_is_repeatable_without_dropout_and_without_a_trace():
    models, splits = six(4, 4, dropout=0.5)
    val = torch.rand(30, 16).round()
    first = cvae.validate(models, splits, val, 1.0)
    assert first == cvae.validate(models, splits, val, 1.0) and models.training
    models.eval()
    known, unknown = splits[2]
    value = cvae.log_bernoulli(val[:, unknown], models["nn2"](val[:, known])).mean().item()
    assert abs(first["nn2"] - value) < 1e-5


@torch.no_grad()
def test_table_holds_the_negative_mean_of_each_estimate():
    models, splits = six(4, 5)
    p_mean, test = torch.rand(20), torch.rand(7, 20).round()
    rows = cvae.evaluate(models, splits, p_mean, test, 8000)  # in several parts
    for i, (n, (known, unknown)) in enumerate(splits.items()):
        x, y, model = test[:, known], test[:, unknown], models[f"cvae{n}"]
        want = {"pixel means": -Bernoulli(p_mean[unknown]).log_prob(y).sum(-1).mean()}
        want["NN (baseline)"] = -cvae.log_bernoulli(y, models[f"nn{n}"](x)).mean()
        want["CVAE bound"] = -cvae.cvae_bound(model, x, y, 8000).mean()
        want["CVAE Monte Carlo"] = -cvae.monte_carlo(model, x, y, 8000).mean()
        want["CVAE importance"] = -cvae.importance_sampling(model, x, y, 8000).mean()
        assert list(rows) == list(want)
        for name, value in want.items():
            assert abs(rows[name][i] - value) < 0.05, name


def test_every_step_draws_new_images_and_new_pixels(monkeypatch):
    models, splits = six(4, 4)
    seen, real = [], cvae.objectives
    monkeypatch.setattr(cvae, "objectives", lambda m, s, v, a: seen.append(v) or real(m, s, v, a))
    args = dict(steps=3, batch_size=16, lr=1e-3, alpha=1.0, seed=0, log_every=99, save=None)
    images = torch.full((50, 4, 4), 128, dtype=torch.uint8)
    state = {"step": 0, "history": [], "best": {}}
    optimizer = torch.optim.Adam(models.parameters())
    val = torch.rand(5, 16).round()
    cvae.train_models(models, optimizer, splits, images, val, argparse.Namespace(**args), state)
    a, b, c = (v for v in seen if len(v) == 16)
    assert not torch.equal(a, b) and not torch.equal(b, c)
    assert set(a.unique().tolist()) == {0.0, 1.0} and 0.3 < a.mean() < 0.7


def test_binarize_is_seeded_and_has_the_gray_value_as_its_mean():
    images = torch.tensor([[[0, 51], [204, 255]]], dtype=torch.uint8)
    v = cvae.binarize(images, 0, 20_000)
    assert v.shape == (20_000, 4) and set(v.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(v.mean(0), torch.tensor([0, 0.2, 0.8, 1]), atol=0.01, rtol=0)
    assert torch.equal(v, cvae.binarize(images, 0, 20_000))


def test_digits_are_split_without_overlap():
    parts = cvae.load_images("digits")
    assert [len(p) for p in parts] == [1000, 200, 597]
    assert all(p.dtype == torch.uint8 and p.shape[1:] == (8, 8) for p in parts)
    assert torch.cat(parts).max() == 255
    from sklearn.datasets import load_digits

    whole = torch.tensor(load_digits().images).sum(0).div(16).mul(255)
    torch.testing.assert_close(torch.cat(parts).double().sum(0), whole.double(), atol=900, rtol=0)


# 6, 7, 8 the command


def run(*args, timeout=120):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "cvae.py", "--device", "cpu", *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def write_npz(path, shape=(60, 6, 5), **change):
    g = np.random.default_rng(0)
    arrays = {k: g.integers(0, 256, shape, dtype=np.uint8) for k in ("x_train", "x_test")}
    np.savez(path, **{k: v for k, v in {**arrays, **change}.items() if v is not None})
    return path


def test_quick_run_draws_saves_and_loads(tmp_path, capsys):
    file = tmp_path / "c.pt"
    done = run("--quick", "--out", tmp_path / "o", "--save", file)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("cvae | ") and lines[-1].startswith("test NLL ")
    assert (tmp_path / "o" / "cvae.png").stat().st_size > 5000
    assert sorted(os.listdir(tmp_path)) == ["c.pt", "o"]  # no .tmp is left
    args = ["--quick", "--out", str(tmp_path / "p"), "--load", str(file), "--target", "0.1"]
    assert cvae.main(args) == 1  # the target is missed
    again = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(("CVAE", "NN", "pixel"))]
    assert len(table) == 5 and table == [line for line in again if line in table]
    assert not any(line.startswith("step ") for line in again)  # no training
    assert [cvae.parse(args[:-2] + s)[0].seed for s in ([], ["--seed", "7"])] == [0, 7]


def test_bad_input_exits_2_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_npz("good.npz")
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:700])
    np.savez("pickled.npz", x_train=np.array([{}], dtype=object), x_test=np.zeros(1))
    write_npz("float.npz", x_train=np.zeros((60, 6, 5)))
    write_npz("colour.npz", (60, 6, 5, 3))
    write_npz("thin.npz", (60, 6, 1))
    write_npz("sizes.npz", x_test=np.zeros((9, 5, 5), np.uint8))
    write_npz("few.npz", (4, 6, 5))
    write_npz("half.npz", x_test=None)
    write_npz("empty.npz", x_test=np.zeros((0, 6, 5), np.uint8))
    Path("text.npz").write_text("not a zip")
    Path("file").write_text("")
    torch.save({"script": "gan"}, "other.pt")
    torch.save([1], "list.pt")
    torch.save({"script": "cvae"}, "hollow.pt")
    files = "cut pickled float colour thin sizes few half empty text none".split()
    cases = [["--data", f"{name}.npz"] for name in files]
    cases += [["--load", f"{name}.pt"] for name in ("other", "list", "hollow", "none")]
    cases += [["--load", "good.npz"], ["--out", "file/o"], ["--save", "none/c.pt"], ["--save", "."]]
    cases += [["--steps", "0"], ["--lr", "0"], ["--lr", "nan"], ["--batch-size", "5000"]]
    cases += [["--alpha", "2"], ["--dropout", "1"], ["--device", "tpu"], ["--nonsense"]]
    cases += [["--z-dim", "0"], ["--samples", "0"], ["--seed", "10" * 10]]
    if not torch.cuda.is_available():
        cases.append(["--device", "cuda"])
    before = sorted(os.listdir())
    for case in cases:
        with pytest.raises(SystemExit) as stop:
            cvae.main(["--quick", *case])
        err = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2, case
        assert err[-1].startswith("cvae.py: error: ") or "error: " in err[-1], case
        assert sum("error: " in line for line in err) == 1 and "Traceback" not in "".join(err), case
        assert sorted(set(os.listdir()) - {"out"}) == before, case


def test_checkpoint_of_another_size_exits_2(tmp_path, capsys):
    data, file = write_npz(tmp_path / "d.npz"), tmp_path / "c.pt"
    args = ["--quick", "--out", str(tmp_path), "--data", str(data), "--save", str(file)]
    assert cvae.main(args) == 0
    assert "d.npz 50/10/50" in capsys.readouterr().out
    assert (
        cvae.main(["--quick", "--out", str(tmp_path), "--load", str(file), "--data", "digits"]) == 2
    )
    assert capsys.readouterr().err.count("\n") == 1
    assert cvae.main(["--quick", "--out", str(tmp_path), "--load", str(file)]) == 0  # its own data


def test_nan_stops_with_exit_1_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    file, real, calls = tmp_path / "c.pt", cvae.hybrid_objective, []

    def broken(model, x, y, alpha):
        calls.append(len(x) == 32)  # training batches, not validation's
        return real(model, x, y, alpha) * (math.nan if sum(calls) > 18 else 1)

    monkeypatch.setattr(cvae, "hybrid_objective", broken)
    args = ["--quick", "--out", str(tmp_path), "--save", str(file), "--log-every", "2"]
    assert cvae.main(args) == 1
    assert "step 7" in capsys.readouterr().err
    kept = torch.load(file, weights_only=True)
    assert kept["step"] == 6 and all(p.isfinite().all() for p in kept["models"].values())


def test_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    def go(name, *extra):
        args = [
            "--quick",
            "--dropout",
            "0.2",
            "--out",
            tmp_path,
            "--log-every",
            "3",
            "--save",
            tmp_path / name,
        ]
        return cvae.main([str(a) for a in (*args, *extra)])

    real = os.replace

    def keep_first(a, b):  # a copy of the checkpoint as it was at step 3, before the run went on
        real(a, b)
        if not (tmp_path / "half").exists():
            shutil.copy(b, tmp_path / "half")

    assert go("whole") == 0 and go("twin") == 0
    monkeypatch.setattr(os, "replace", keep_first)
    assert go("third") == 0
    monkeypatch.setattr(os, "replace", real)
    assert torch.load(tmp_path / "half", weights_only=True)["step"] == 3
    assert go("joined", "--load", tmp_path / "half", "--steps", "10") == 0
    whole, twin, joined = (
        torch.load(tmp_path / n, weights_only=True) for n in ("whole", "twin", "joined")
    )
    for other in (twin, joined):
        assert other["history"] == whole["history"] and other["step"] == 10
        assert all(torch.equal(p, other["models"][k]) for k, p in whole["models"].items())
    assert go("seed", "--seed", "1") == 0
    assert torch.load(tmp_path / "seed", weights_only=True)["history"] != whole["history"]


def test_ctrl_c_finishes_the_step_and_the_run(tmp_path, monkeypatch, capsys):
    real, file = cvae.validate, tmp_path / "c.pt"

    def interrupted(*a):  # in the middle of step 6
        file.exists() and signal.raise_signal(signal.SIGINT)
        return real(*a)

    monkeypatch.setattr(cvae, "validate", interrupted)
    args = ["--quick", "--out", str(tmp_path), "--save", str(file), "--log-every", "3"]
    assert cvae.main(args) == 130
    assert torch.load(file, weights_only=True)["step"] == 6  # saved at 3, stopped in 6
    assert "test NLL" in capsys.readouterr().out and (tmp_path / "cvae.png").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_best_validation_weights_are_the_ones_kept():
    models, splits = six(4, 4, hidden=64)
    images = torch.randint(0, 2, (8, 4, 4), dtype=torch.uint8) * 255  # eight: overfits at once
    val = torch.rand(200, 16).round()
    args = argparse.Namespace(
        steps=60, batch_size=8, lr=1e-2, alpha=1.0, seed=0, log_every=5, save=None
    )
    state = {"step": 0, "history": [], "best": {}}
    optimizer = torch.optim.Adam(models.parameters(), args.lr)
    assert cvae.train_models(models, optimizer, splits, images, val, args, state) is False
    for name, (score, step, weights) in state["best"].items():
        scores = {s: row[name] for s, _, row in state["history"]}
        assert score == max(scores.values()) == scores[step] > scores[60]
        models[name].load_state_dict(weights)
    again = cvae.validate(models, splits, val, 1.0)
    assert all(abs(again[n] - best[0]) < 1e-5 for n, best in state["best"].items())


def test_file_alone_needs_torch_only(tmp_path):
    shutil.copy(ROOT / "cvae.py", tmp_path)
    code = (
        "import sys; sys.modules |= dict.fromkeys(['sklearn', 'matplotlib', 'tqdm', 'scipy']);"
        "import cvae, torch; cvae.CVAE(4, 12, 2, 8).sample(torch.zeros(1, 4))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.results
def test_the_demo_beats_the_baseline(tmp_path):
    done = run("--target", "11.1", "--out", tmp_path, timeout=1800)
    rows = {
        line[:18].strip(): line[20:].split()
        for line in done.stdout.splitlines()
        if "|" in line[18:20]
    }
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, base in zip(rows["CVAE Monte Carlo"], rows["NN (baseline)"]):
        assert float(ours) < float(base) - 0.2
