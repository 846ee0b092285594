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

import gan

ROOT = Path(__file__).resolve().parent.parent


def pair(conv=False, classes=0, shape=(1, 8, 8), z_dim=5, dim=8, norm=False):
    torch.manual_seed(0)
    G = gan.Generator(shape, z_dim, dim, classes, conv)
    return G, gan.Discriminator(shape, dim, classes, conv, norm)


def sgd(net, lr=0.01):
    return torch.optim.SGD(net.parameters(), lr)


def copy_of(net):
    return [p.detach().clone() for p in (*net.parameters(), *net.buffers())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


# 1 shapes


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (3, 28, 28)])
@pytest.mark.parametrize("classes", [0, 3])
def test_mlp_shapes(shape, classes):
    G, D = pair(False, classes, shape)
    for B in (1, 4):
        y = torch.arange(B) % 3 if classes else None
        x = G(torch.randn(B, 5), y)
        assert x.shape == (B, *shape) and x.abs().max() <= 1
        assert D(x, y).shape == (B,)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (1, 4, 12)])
@pytest.mark.parametrize("classes", [0, 3])
def test_conv_shapes(shape, classes):
    G, D = pair(True, classes, shape, norm=True)
    y = torch.tensor([0, 2]) if classes else None
    x = G(torch.randn(2, 5), y)
    assert x.shape == (2, *shape) and x.abs().max() <= 1 and D(x, y).shape == (2,)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in D.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in pair(True)[1].modules())


def test_conv_needs_sides_that_divide_by_four():
    with pytest.raises(ValueError, match="divide by 4"):
        pair(True, shape=(1, 30, 28))


def test_label_is_appended_one_hot_as_vector_and_as_maps():
    y = torch.tensor([2, 0])
    out = gan.append_label(torch.zeros(2, 4), y, 3)
    assert torch.equal(out[:, 4:], torch.eye(3)[y]) and out.shape == (2, 7)
    out = gan.append_label(torch.zeros(2, 1, 5, 6), y, 3)
    assert out.shape == (2, 4, 5, 6)
    assert torch.equal(out[:, 1:], torch.eye(3)[y][..., None, None].expand(2, 3, 5, 6))


@pytest.mark.parametrize("conv", [False, True])
def test_conditional_pair_sees_the_label_and_plain_pair_refuses_it(conv):
    G, D = pair(conv, 3)
    z, x, zero, two = torch.randn(4, 5), torch.randn(4, 1, 8, 8), torch.zeros(4).long(), 2
    assert not torch.allclose(G(z, zero), G(z, zero + two), atol=1e-4)
    assert not torch.allclose(D(x, zero), D(x, zero + two), atol=1e-4)
    with pytest.raises(ValueError, match="needs labels"):
        G(z)
    with pytest.raises(ValueError, match="takes no labels"):
        pair(conv)[1](x, zero)


# 2 oracles: the game's value and losses


def test_value_is_equation_1_and_minus_the_binary_cross_entropy():
    real, fake = torch.randn(50) * 3, torch.randn(50) * 3
    D_real, D_fake = real.sigmoid().double(), fake.sigmoid().double()
    eq1 = D_real.log().mean() + (1 - D_fake).log().mean()
    assert gan.value(real, fake).item() == pytest.approx(eq1.item(), abs=1e-5)
    bce = F.binary_cross_entropy_with_logits
    both = bce(real, torch.ones(50)) + bce(fake, torch.zeros(50))
    assert gan.value(real, fake).item() == pytest.approx(-both.item(), abs=1e-5)


def test_generator_losses_are_the_two_of_the_paper():
    a = torch.randn(50, dtype=torch.float64) * 3
    D = a.sigmoid()
    torch.testing.assert_close(gan.generator_loss(a), -D.log().mean())
    torch.testing.assert_close(gan.generator_loss(a, saturating=True), (1 - D).log().mean())


def test_losses_at_known_points():
    zero = torch.zeros(7)
    assert gan.value(zero, zero).item() == pytest.approx(-math.log(4))
    assert gan.generator_loss(zero).item() == pytest.approx(math.log(2))
    assert gan.generator_loss(zero, True).item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize("at", [-1e4, 1e4])
def test_logits_never_overflow(at):
    a = torch.full((3,), at, requires_grad=True)
    losses = gan.value(a, a), gan.generator_loss(a), gan.generator_loss(a, True)
    for loss in losses:
        (grad,) = torch.autograd.grad(loss, a)
        assert math.isfinite(loss.item()) and grad.isfinite().all()


def test_only_the_saturating_loss_loses_its_slope_where_D_is_sure():
    for saturating, slope in ((True, 0.0), (False, -1.0)):
        a = torch.tensor([-20.0], requires_grad=True)
        gan.generator_loss(a, saturating).backward()
        assert a.grad.item() == pytest.approx(slope, abs=1e-6)


# 3 the theory: Eq. 2 - 6


def distributions():
    g = torch.Generator().manual_seed(1)
    p, q = torch.rand(2, 6, generator=g, dtype=torch.float64)
    p[0], q[1] = 0, 0  # supports that differ
    return p / p.sum(), q / q.sum()


def test_C_is_minus_log_4_plus_twice_the_jensen_shannon_divergence():
    p, q = distributions()
    m = (p + q) / 2
    kl = [(r[r > 0] * (r[r > 0] / m[r > 0]).log()).sum() for r in (p, q)]
    torch.testing.assert_close(gan.jensen_shannon(p, q), (kl[0] + kl[1]) / 2)
    C = gan.virtual_criterion(p, q)
    torch.testing.assert_close(C, -math.log(4) + 2 * gan.jensen_shannon(p, q))
    assert gan.virtual_criterion(p, p).item() == pytest.approx(-math.log(4))  # the minimum
    assert C > gan.virtual_criterion(p, p)
    one, other = torch.eye(2, dtype=torch.float64)
    assert gan.virtual_criterion(one, other).item() == pytest.approx(0)  # the maximum
    assert gan.jensen_shannon(one, other).item() == pytest.approx(math.log(2))


def test_a_discriminator_trained_by_the_real_step_reaches_D_star_and_C():
    # eight places: x sits on place i count_data[i] times, G(z) count_g[i] times
    count_data = torch.tensor([1, 5, 2, 8, 3, 1, 6, 6])
    count_g = torch.tensor([4, 4, 4, 1, 1, 2, 8, 8])
    table = torch.nn.Embedding(8, 1)

    class D(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, x, y=None):
            return self.table(x).squeeze(1)

    x, fake = (torch.arange(8).repeat_interleave(n) for n in (count_data, count_g))
    net, opt = D(), torch.optim.Adam(table.parameters(), 0.1)
    for _ in range(400):
        v, *_ = gan.discriminator_step(lambda z, y: fake, net, opt, x, None)
    p_data, p_g = count_data / count_data.sum(), count_g / count_g.sum()
    D_star = gan.optimal_discriminator(p_data, p_g)
    torch.testing.assert_close(table.weight.sigmoid()[:, 0], D_star, atol=1e-3, rtol=0)
    assert v == pytest.approx(gan.virtual_criterion(p_data, p_g).item(), abs=1e-5)


# 4 who learns in which half of Algorithm 1


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_discriminator_step_moves_D_and_leaves_G_without_a_gradient(conv, r1):
    G, D = pair(conv)
    x, z, before, D_before = torch.randn(6, 1, 8, 8), torch.randn(6, 5), copy_of(G), copy_of(D)
    gan.discriminator_step(G, D, sgd(D), x, z, r1=r1)
    assert all(p.grad is None for p in G.parameters())
    assert same(list(G.parameters()), before[: len(list(G.parameters()))])
    assert not x.requires_grad
    for p, q in zip(D.parameters(), D_before):
        assert p.grad is not None and not torch.equal(p, q)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("saturating", [False, True])
def test_generator_step_moves_G_and_leaves_D_without_a_gradient(conv, saturating):
    G, D = pair(conv)
    before, G_before = copy_of(D), copy_of(G)
    gan.generator_step(G, D, sgd(G, 1.0), torch.randn(6, 5), saturating=saturating)
    assert all(p.grad is None for p in D.parameters()) and same(copy_of(D), before)
    assert all(p.requires_grad for p in D.parameters())
    moved = [not torch.equal(p, q) for p, q in zip(G.parameters(), G_before)]
    assert all(p.grad is not None for p in G.parameters()) and sum(moved) >= len(moved) - 2
    # (a bias before batch norm has gradient 0: the norm subtracts it)


def test_D_step_climbs_V_and_G_step_raises_D_of_G():
    G, D = pair()
    x, z, opt = torch.randn(64, 1, 8, 8), torch.randn(64, 5), sgd(D, 0.1)
    v = [gan.discriminator_step(G, D, opt, x, z) for _ in range(20)]
    assert v[-1][0] > v[0][0] + 0.02
    with torch.no_grad():
        assert v[0][1] != v[0][2]  # D(x) and D(G(z)), in this order
        real, fake = D(x).sigmoid().mean().item(), D(G(z)).sigmoid().mean().item()
    now = gan.discriminator_step(G, D, sgd(D, 0.0), x, z)
    assert now[1:] == pytest.approx((real, fake), abs=1e-6) and real > fake
    for saturating in (False, True):
        before = D(G(z)).sigmoid().mean().item()
        for _ in range(5):
            gan.generator_step(G, D, sgd(G, 0.1), z, saturating=saturating)
        assert D(G(z)).sigmoid().mean().item() > before


# 5 learning


def test_loss_at_initialisation_and_D_alone_wins():
    G, D = pair(dim=64)
    x, z, opt = (
        torch.rand(32, 1, 8, 8) * 2 - 1,
        torch.randn(32, 5),
        torch.optim.Adam(D.parameters()),
    )
    first, *_ = gan.discriminator_step(G, D, opt, x, z)
    assert first == pytest.approx(-math.log(4), abs=0.15)
    for _ in range(150):
        last, *_ = gan.discriminator_step(G, D, opt, x, z)
    assert last > 0.05 * first


@pytest.mark.parametrize("saturating", [False, True])
def test_the_game_finds_the_data(saturating):
    torch.manual_seed(0)
    G, D = pair(shape=(1, 1, 2), z_dim=2, dim=32)
    opt_G, opt_D = (torch.optim.Adam(m.parameters(), 2e-3, (0.5, 0.999)) for m in (G, D))
    centre = torch.tensor([0.5, -0.5])
    for _ in range(400):
        x = (centre + 0.1 * torch.randn(64, 2)).view(64, 1, 1, 2)
        gan.discriminator_step(G, D, opt_D, x, torch.randn(64, 2), r1=0.1)
        gan.generator_step(G, D, opt_G, torch.randn(64, 2), saturating=saturating)
    fake = G(torch.randn(500, 2)).flatten(1)
    assert (fake.mean(0) - centre).abs().max() < 0.15


def test_r1_is_the_squared_slope_on_data_at_half_weight():
    linear = torch.nn.Linear(4, 1)

    class D(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear

        def forward(self, x, y=None):
            return self.net(x.flatten(1)).squeeze(1)

    net, x, fake = D(), torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
    w = linear.weight.detach().clone()
    grads = []
    for r1 in (0.0, 3.0):
        gan.discriminator_step(lambda z, y: fake, net, sgd(net, 0.0), x, None, r1=r1)
        grads.append(linear.weight.grad.clone())
    torch.testing.assert_close(grads[1] - grads[0], 3.0 * w)  # d (r1/2 |w|^2) / dw
    x.requires_grad_(True)
    torch.testing.assert_close(gan.r1_penalty(net(x), x), w.square().sum())


def test_average_is_exact_and_takes_batch_norms_statistics():
    G, _ = pair(True)
    other, _ = pair(True)
    other.load_state_dict({k: v + 1 for k, v in G.state_dict().items()})
    before = copy_of(other)
    gan.update_average(other, G, 0.9)
    for p, q, old in zip(other.parameters(), G.parameters(), before):
        torch.testing.assert_close(p, 0.9 * old + 0.1 * q)
    assert same(list(other.buffers()), list(G.buffers()))
    gan.update_average(other, G, 0.0)
    assert same(copy_of(other), copy_of(G))


def test_samples_are_in_0_1_and_do_not_depend_on_each_other():
    G, _ = pair(True)
    z = torch.randn(6, 5)
    x = gan.sample(G, z)
    assert G.training and 0 <= x.min() and x.max() <= 1 and not x.requires_grad
    torch.testing.assert_close(gan.sample(G, z[:1]), x[:1])
    G.eval()
    torch.testing.assert_close(2 * x - 1, G(z))


# the scores


def test_digits_are_split_without_overlap():
    x, y, x_test, y_test = gan.load_data("digits")
    assert x.shape == (1200, 1, 8, 8) and x_test.shape == (597, 1, 8, 8) and x.dtype == torch.uint8
    assert y.bincount().min() > 90 and y_test.bincount().min() > 40 and x.max() == 255
    seen = {bytes(i.flatten().tolist()) for i in x}
    assert not any(bytes(i.flatten().tolist()) in seen for i in x_test)


def test_judge_knows_memorised_images_noise_and_a_missing_class():
    x, y, x_test, y_test = gan.load_data("digits")
    score, classify = gan.make_judge(x / 255, y, x_test / 255)
    assert (classify(x_test / 255) == y_test).float().mean() > 0.93
    train, test = score(x / 255), score(x_test / 255)
    nine = score(x[y > 0] / 255)
    noise = score(torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert abs(test["FD"]) < 1e-6 and test["novelty"] == 1 and train["novelty"] == 0
    assert train["FD"] < 0.35 < nine["FD"] < noise["FD"] and train["FD"] < nine["FD"] / 2
    assert train["precision"] > 0.9 and train["recall"] > 0.9 > noise["recall"]


def test_parzen_is_the_log_likelihood_of_the_mixture():
    g = torch.Generator().manual_seed(0)
    samples, valid, test = (torch.rand(n, 1, 2, 2, generator=g) for n in (9, 30, 40))
    best = None
    for s in range(2, 26):
        normal = torch.distributions.Normal(samples.view(9, 4), s / 50)
        normal = torch.distributions.Independent(normal, 1)
        p = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.ones(9)), normal
        )
        fit = p.log_prob(valid.view(30, 4)).mean()
        if best is None or fit > best[0]:
            best = fit, p.log_prob(test.view(40, 4))
    mean, error = gan.parzen(samples, valid, test).split(" +- ")
    assert float(mean) == pytest.approx(best[1].mean().item(), abs=0.051)
    assert float(error) == pytest.approx(best[1].std().item() / 40**0.5, abs=0.051)


# 6 - 8 the script


def run(*flags, cwd):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, str(ROOT / "gan.py"), "--device", "cpu", *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)


def npz(path, n=60, shape=(12, 12), **change):
    g = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = g.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(n) % 10
    np.savez(path, **(arrays | change))
    return path


@pytest.fixture
def fast(monkeypatch, tmp_path):
    """main() without the scores and the picture, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan, "evaluate", lambda *a: ({"GAN": 0.5}, None))
    monkeypatch.setattr(gan, "draw_picture", lambda *a: None)
    return tmp_path


def test_quick_runs_all_and_samples_come_without_data(tmp_path):
    npz(tmp_path / "d.npz", shape=(12, 8, 3))
    done = run("--data", "d.npz", "--quick", "--conditional", "--save", "g.pt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gan | ") and lines[-1].startswith("test FD GAN ")
    assert "label accuracy" in done.stdout and "precision" in done.stdout
    assert (tmp_path / "out/gan.png").stat().st_size > 5000
    (tmp_path / "d.npz").unlink()
    done = run("--load", "g.pt", "--samples", 7, "--out", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "s/gan_samples.npz") as file:
        assert file["x"].shape == (7, 12, 8, 3) and file["x"].dtype == np.uint8
        assert file["y"].tolist() == list(range(7))


def test_default_data_and_load_alone(tmp_path):
    done = run("--quick", "--save", "g.pt", "--target", 1e-9, cwd=tmp_path)
    assert done.returncode == 1 and "Algorithm 1" in done.stdout, done.stderr
    again = run("--load", "g.pt", "--quick", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    score = [r.stdout.splitlines()[-1].rsplit("|", 1)[0] for r in (done, again)]
    assert score[0] == score[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--net", "nothing"],
        ["--steps", "0"],
        ["--k", "0"],
        ["--lr", "nan"],
        ["--r1", "-1"],
        ["--ema", "1"],
        ["--batch-size", "5000"],
        ["--samples", "4"],
        ["--data", "missing.npz"],
        ["--data", "cut.npz"],
        ["--data", "pickled.npz"],
        ["--data", "float.npz"],
        ["--data", "shape.npz"],
        ["--data", "labels.npz"],
        ["--data", "odd.npz", "--net", "dcgan"],
        ["--data", "keys.npz"],
        ["--load", "missing.pt"],
        ["--load", "other.pt"],
        ["--load", "cut.npz"],
        ["--load", "mlp.pt", "--net", "dcgan"],
        ["--load", "mlp.pt", "--data", "odd.npz"],
        ["--out", "file"],
        ["--save", "nowhere/g.pt"],
    ],
    ids=" ".join,
)
def test_bad_input_exits_2_with_one_line(flags, fast, capsys):
    (fast / "file").write_text("x")
    npz(fast / "good.npz")
    (fast / "cut.npz").write_bytes((fast / "good.npz").read_bytes()[:500])
    npz(fast / "pickled.npz", x_train=np.array([{}] * 60, dtype=object))
    npz(fast / "float.npz", x_train=np.zeros((60, 12, 12)))
    npz(fast / "shape.npz", x_test=np.zeros((60, 12, 16), np.uint8))
    npz(fast / "labels.npz", y_train=np.zeros(59, int))
    npz(fast / "odd.npz", shape=(10, 10))
    np.savez(fast / "keys.npz", a=np.zeros(3))
    torch.save({"script": "vae"}, fast / "other.pt")
    if "mlp.pt" in flags:
        assert gan.main(["--steps", "1", "--save", "mlp.pt"]) == 0
    before = sorted(p.name for p in fast.iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        gan.main(flags)
    text = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and text.splitlines()[-1].count("error: ") == 1
    assert len([s for s in text.splitlines() if not s.startswith((" ", "usage"))]) == 1
    assert sorted(p.name for p in fast.iterdir() if p.name != "out") == [
        name for name in before if name != "out"
    ]


def test_file_alone_needs_only_torch(tmp_path):
    shutil.copy(ROOT / "gan.py", tmp_path)
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("sklearn", "scipy", "matplotlib", "tqdm", "gymnasium"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
from gan import Discriminator, Generator
print(Discriminator(conv=True)(Generator(conv=True)(torch.randn(2, 100))).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and "torch.Size([2])" in done.stdout, done.stderr


def weights(path):
    state = torch.load(path, weights_only=True)
    return [t for name in ("GAN", "Algorithm 1") for part in state[name][:3] for t in part.values()]


def test_same_seed_same_run_and_an_interrupted_run_goes_on_exactly(fast, monkeypatch):
    for name, seed in (("a.pt", 3), ("b.pt", 3), ("c.pt", 4)):
        assert gan.main(["--steps", "6", "--seed", str(seed), "--save", name]) == 0
    assert same(weights("a.pt"), weights("b.pt")) and not same(weights("a.pt"), weights("c.pt"))
    step, calls = gan.discriminator_step, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 5:  # two pairs: in the third step
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(gan, "discriminator_step", interrupt)
    assert gan.main(["--steps", "6", "--seed", "3", "--save", "d.pt"]) == 130
    assert torch.load("d.pt", weights_only=True)["step"] == 3
    assert gan.main(["--load", "d.pt", "--steps", "6", "--save", "d.pt"]) == 0
    assert same(weights("a.pt"), weights("d.pt")) and len(calls) == 12


def test_nan_stops_and_keeps_the_last_good_checkpoint(fast, monkeypatch, capsys):
    step, calls = gan.generator_step, []

    def spoil(*args):
        calls.append(1)
        return step(*args) if len(calls) < 6 else math.nan

    monkeypatch.setattr(gan, "generator_step", spoil)
    assert gan.main(["--steps", "9", "--log-every", "1", "--save", "g.pt"]) == 1
    assert "at step 3" in capsys.readouterr().err
    assert torch.load("g.pt", weights_only=True)["step"] == 2


def test_k_steps_of_D_per_step_of_G_and_what_each_pair_gets(fast, monkeypatch):
    d_step, g_step, order = gan.discriminator_step, gan.generator_step, []

    def d(G, D, opt, x, z, y, r1):
        order.append(("D", r1, z.sum().item()))
        return d_step(G, D, opt, x, z, y, r1)

    def g(G, D, opt, z, y, saturating):
        order.append(("G", saturating, z.sum().item()))
        return g_step(G, D, opt, z, y, saturating)

    monkeypatch.setattr(gan, "discriminator_step", d)
    monkeypatch.setattr(gan, "generator_step", g)
    assert gan.main(["--steps", "1", "--k", "2", "--r1", "3", "--save", "g.pt"]) == 0
    assert [o[:2] for o in order[:3]] == [("D", 3.0), ("D", 3.0), ("G", False)]
    assert [o[:2] for o in order[3:]] == [("D", 0.0), ("D", 0.0), ("G", True)]
    assert len({o[2] for o in order[:3]}) == 3  # fresh noise each time (Algorithm 1)
    state = torch.load("g.pt", weights_only=True)
    G, _, average = state["GAN"][:3]
    assert not any(torch.equal(G[n], average[n]) for n in G)
    G, _, average = state["Algorithm 1"][:3]
    assert all(torch.equal(G[n], average[n]) for n in G)


@pytest.mark.results
def test_header(tmp_path):
    done = run("--target", 0.28, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
