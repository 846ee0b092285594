"""s4.py: the structure of HiPPO, kernel == recurrence, gradients, the demo's whole path."""

import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import s4

SCRIPT = Path(s4.__file__)


def systems(N, dts, noise=0.0, dtype=torch.complex64):
    """Lambda, P, B, C, dt of one system per dt, moved off the HiPPO values by `noise`."""
    H = len(dts)
    Lambda, P, B, _ = (x.to(dtype).repeat(H, 1) for x in s4.nplr(N))
    e, f, g, C = torch.randn(4, H, N // 2, dtype=dtype)
    Lambda = torch.complex(Lambda.real * (noise * e.real).exp(), Lambda.imag + noise * e.imag)
    return Lambda, P + noise * f, B + noise * g, C, torch.tensor(dts, dtype=Lambda.real.dtype)


def recurrence(Lambda, P, B, C, dt, L):
    """The kernel by L steps of the dense recurrence in float64: the oracle of this file."""
    A_bar, B_bar = s4.dense(Lambda, P, B, dt)
    return s4.naive_kernel(A_bar, B_bar, s4.pairs(C.detach().to(A_bar.dtype)), L).real


def worst(a, b):
    """Largest error of each row, relative to the row's largest value."""
    return ((a - b).abs().amax(-1) / b.abs().amax(-1)).max().item()


# ---- HiPPO and its structure ----


def test_hippo_matrix_is_equation_2():
    A, B = s4.hippo(6)
    for n in range(6):
        for k in range(6):
            off = -math.sqrt(2 * n + 1) * math.sqrt(2 * k + 1) if n > k else 0.0
            assert A[n, k] == pytest.approx(-(n + 1) if n == k else off)
        assert B[n] == pytest.approx(math.sqrt(2 * n + 1))


@pytest.mark.parametrize("N", [2, 4, 16, 64, 128])
def test_nplr_puts_hippo_together_again(N):
    Lambda, P, B, V = s4.nplr(N)
    assert Lambda.shape == P.shape == B.shape == (N // 2,) and (Lambda.real == -0.5).all()
    assert (Lambda.imag > 0).all()
    V, Lambda, P, B = s4.pairs(V), *(s4.pairs(x) for x in (Lambda, P, B))
    eye = torch.eye(N, dtype=V.dtype)
    torch.testing.assert_close(V.mH @ V, eye, atol=1e-9, rtol=0)
    A = V @ (torch.diag(Lambda) - P[:, None] * P.conj()) @ V.mH
    want_A, want_B = s4.hippo(N)
    torch.testing.assert_close(A, want_A.to(A.dtype), atol=1e-8 * N, rtol=1e-9)
    torch.testing.assert_close(V @ B, want_B.to(A.dtype), atol=1e-9 * N, rtol=1e-9)


def test_state_size_must_be_even():
    for N in (0, 1, 7):
        with pytest.raises(ValueError, match="even"):
            s4.nplr(N)


def test_hippo_state_is_the_legendre_transform_of_the_past():
    """x(t) reads back u(t - age) = sum_n x_n sqrt(2n+1) P_n(2s - 1), s = exp(-age)."""
    N, dt = 8, torch.tensor(1e-3, dtype=torch.float64)
    A_bar, B_bar = s4.bilinear(*s4.hippo(N), dt)
    s = torch.exp(-(torch.arange(10000) + 0.5) * dt)  # age of each input, the newest first
    u = 8 * s**3 - 9 * s**2 + 3 * s  # a cubic in s: four coefficients hold it exactly
    x = torch.zeros(N, dtype=torch.float64)
    for value in u.flip(0):
        x = A_bar @ x + B_bar * value
    basis = np.polynomial.legendre.legvander(2 * s.numpy() - 1, N - 1) * np.sqrt(
        2 * np.arange(N) + 1
    )
    assert (torch.from_numpy(basis) @ x - u).abs().max() < 1e-3
    assert x[4:].abs().max() < 1e-3 < x[:4].abs().min()


def test_bilinear_is_equation_3_and_second_order():
    A, B = (x.to(torch.complex128) for x in s4.hippo(4))
    for dt, bound in ((0.02, 2e-3), (0.01, 2.5e-4)):  # one step errs by O(dt^3): a factor of 8
        A_bar, _ = s4.bilinear(A, B, torch.tensor(dt, dtype=torch.float64))
        assert (A_bar - torch.matrix_exp(A * dt)).abs().max() < bound
    I, dt = torch.eye(4), torch.tensor(0.3, dtype=torch.float64)
    A_bar, B_bar = s4.bilinear(A, B, dt)
    inverse = torch.linalg.inv(I - dt / 2 * A)
    torch.testing.assert_close(A_bar, inverse @ (I + dt / 2 * A))
    torch.testing.assert_close(B_bar, inverse @ (dt * B))


# ---- the kernel ----

LENGTHS = [100, 255, 256, 1000, 1023, 1024, 4097, 16383, 16384]


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    "lengths, dts", [(range(1, 41), torch.logspace(-3, -1, 24).tolist()), (LENGTHS, [1e-3, 1e-1])]
)
def test_float32_kernel_equals_a_float64_recurrence(noise, lengths, dts):
    """Short kernels are the hard ones: there g comes close to large eigenvalues."""
    Lambda, P, B, C, dt = systems(64, dts, noise)
    want = recurrence(Lambda, P, B, C, dt, max(lengths))
    for L in lengths:
        K = s4.dplr_kernel(Lambda, P, B, s4.truncate(Lambda, P, C, dt, L), dt, L)
        assert K.dtype == torch.float32 and K.shape == (len(dts), L)
        assert worst(K, want[:, :L]) < (4e-6 if L > 1 else 2e-5), L  # at 1, K_0 itself may be ~ 0


def test_fast_kernel_equals_the_naive_one_in_float64():
    Lambda, P, B, C, dt = systems(16, [3e-3, 5e-2], 0.3, torch.complex128)
    for L in (1, 2, 33, 64):
        K = s4.dplr_kernel(Lambda, P, B, s4.truncate(Lambda, P, C, dt, L), dt, L)
        assert worst(K, recurrence(Lambda, P, B, C, dt, L)) < 1e-11


def test_truncation_has_an_inverse():
    Lambda, P, _, C, dt = systems(16, [1e-3, 1e-1], 0.1)
    back = s4.truncate(Lambda, P, s4.truncate(Lambda, P, C, dt, 200), dt, 200, inverse=True)
    torch.testing.assert_close(back, C, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("L", [1, 2, 100, 1024])
def test_s4d_kernel_equals_its_recurrence(L):
    Lambda, _, B, C, dt = systems(64, [1e-3, 1e-2, 1e-1])
    K = s4.s4d_kernel(Lambda, B, C, dt, L)
    Lambda, B, C = (x.to(torch.complex128) for x in (Lambda, B, C))
    A_bar = torch.exp(Lambda * dt.double()[:, None])  # zero-order hold
    x, want = (A_bar - 1) / Lambda * B, []
    for _ in range(L):
        want.append(2 * (C * x).sum(-1).real)
        x = A_bar * x
    assert worst(K, torch.stack(want, -1)) < 1e-4  # phases of up to 1e5 radians, in float32


@pytest.mark.parametrize("L", [1, 2, 7, 64])
def test_convolution_is_causal_and_equals_numpy(L):
    u, K = torch.randn(2, 3, L), torch.randn(3, L)
    y = s4.convolve(u, K)
    for b in range(2):
        for h in range(3):
            want = np.convolve(u[b, h].numpy(), K[h].numpy())[:L]
            np.testing.assert_allclose(y[b, h].numpy(), want, atol=1e-5)


# ---- layer and model ----


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("L, l_max", [(1, 1), (7, 16), (200, 200), (40, 13)])
def test_step_equals_convolution(diagonal, L, l_max):
    layer = s4.S4Layer(6, 16, l_max, diagonal=diagonal).eval()
    u = torch.randn(3, L, 6)
    state, ys = layer.init_state(3), []
    for t in range(L):
        y, state = layer.step(u[:, t], state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), layer(u), atol=1e-5, rtol=1e-4)


def test_ssm_output_equals_the_recurrence_to_1e_5_over_1024_steps():
    layer = s4.S4Layer(4, 64, 1024)
    u, state, ys = torch.randn(2, 1024, 4), layer.init_state(2), []
    layer.output = lambda y: y  # the SSM alone, before the mix
    for t in range(1024):
        y, state = layer.step(u[:, t], state)
        ys.append(y)
    want = layer(u)
    assert (torch.stack(ys, 1) - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("prenorm", [False, True])
def test_model_pools_the_mean_over_time(prenorm):
    model = s4.S4Model(2, 3, 8, 2, prenorm=prenorm, d_state=8, l_max=30).eval()
    x = torch.randn(4, 30, 2)
    pooled, model.pool = model(x), False
    assert model(x).shape == (4, 30, 3)
    torch.testing.assert_close(pooled, model(x).mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"diagonal": True}, {"bidirectional": True}])
@pytest.mark.parametrize("B, L", [(1, 1), (2, 3), (3, 33), (1, 50)])
def test_shapes_and_gradients(options, B, L):
    model = s4.S4Model(2, 5, 8, 2, d_state=4, l_max=33, **options)
    y = model(torch.randn(B, L, 2))
    assert y.shape == (B, 5)
    y.square().sum().backward()
    for name, p in model.named_parameters():
        if L == 33:
            assert p.grad is not None and p.grad.abs().sum() > 0, name
        assert p.grad is None or p.grad.isfinite().all(), name


def test_every_gradient_is_right():
    """Through Cauchy products, Woodbury and FFT, against finite differences."""
    layer = s4.S4Layer(2, 4, 6).double()
    names = ["log_dt", "A_real_log", "A_imag", "P", "B", "C", "D"]
    u = torch.randn(1, 6, 2, dtype=torch.float64)

    def f(*values):
        call = dict(zip(names, values))
        return torch.func.functional_call(layer, call, (u,))

    values = tuple(getattr(layer, n).detach().clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(f, values, atol=1e-6)


def test_causality_and_its_loss_in_both_directions():
    for both in (False, True):
        layer = s4.S4Layer(4, 8, 20, bidirectional=both).eval()
        u = torch.randn(1, 20, 4)
        v = u.clone()
        v[:, 12] += 1.0
        change = (layer(u) - layer(v)).abs().amax((0, 2))
        assert change[12:].min() > 1e-5
        assert (change[:12].min() > 1e-6) if both else (change[:12].max() < 1e-5)


def test_bidirectional_kernel_reads_from_the_end():
    """A symmetric pair of kernels sees a reversed sequence as the reverse of what it saw."""
    layer = s4.S4Layer(3, 8, 10, bidirectional=True).eval()
    K = layer.kernel(10)
    u = torch.randn(1, 3, 10)
    want = torch.zeros(1, 3, 10)
    for t in range(10):
        for s in range(10):
            want[..., t] += K[:, t - s if s <= t else 20 + t - s] * u[..., s]
    torch.testing.assert_close(s4.convolve(u, K), want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="recurrence"):
        layer.init_state(1)


def test_kernel_does_not_depend_on_the_length_it_is_asked_for():
    layer = s4.S4Layer(4, 16, 64)
    K = layer.kernel(64).detach()
    torch.testing.assert_close(layer.kernel(10).detach(), K[:, :10])
    torch.testing.assert_close(layer.kernel(150)[:, :64].detach(), K, atol=1e-4, rtol=1e-4)
    Lambda, P, B, C, dt = layer.system()
    C = s4.truncate(Lambda, P, C[0], dt, 64, inverse=True)
    assert worst(layer.kernel(150).detach(), recurrence(Lambda, P, B, C, dt, 150)) < 1e-4


def test_initialisation_is_the_published_one():
    layer = s4.S4Layer(4000, 4, 1)
    dt = layer.log_dt.exp()
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1001
    assert layer.log_dt.mean().item() == pytest.approx(math.log(1e-2), abs=0.1)  # log-uniform
    assert layer.D.std().item() == pytest.approx(1, abs=0.05)
    Lambda, P, B, C, dt = layer.system()
    C = s4.truncate(Lambda, P, C[0], dt, 1, inverse=True)
    assert C.abs().square().mean().item() == pytest.approx(1, abs=0.05)  # complex normal
    torch.testing.assert_close(Lambda[0], s4.nplr(4)[0].to(Lambda.dtype))


def test_ssm_parameters_learn_slowly_and_do_not_decay():
    model = s4.S4Model(1, 2, 4, 1, d_state=4, l_max=8)
    rest, ssm = s4.parameter_groups(model, 1e-2, 0.05)
    assert (rest["lr"], rest["weight_decay"]) == (1e-2, 0.05)
    assert (ssm["lr"], ssm["weight_decay"]) == (1e-3, 0.0)
    layer = model.layers[0]
    want = {layer.log_dt, layer.A_real_log, layer.A_imag, layer.P, layer.B}
    assert set(ssm["params"]) == want
    assert set(rest["params"]) == set(model.parameters()) - want
    assert s4.parameter_groups(model, 1e-4, 0.0)[1]["lr"] == 1e-4


def test_loss_starts_at_ln_10_and_falls():
    model = s4.S4Model(1, 10, 16, 2, dropout=0.0, d_state=8, l_max=32)
    x, y = torch.randn(16, 32, 1), torch.randint(0, 10, (16,))
    first = F.cross_entropy(model(x), y).item()
    assert abs(first - math.log(10)) < 0.5
    opt = torch.optim.AdamW(s4.parameter_groups(model, 1e-2, 0.0))
    for _ in range(100):
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < first / 2


# ---- the demo ----


def run(*args, **kwargs):
    env = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **env}, **kwargs
    )


def write_npz(path, **change):
    g = np.random.default_rng(0)
    arrays = {
        "x_train": g.integers(0, 256, (30, 6, 5), dtype=np.uint8),
        "y_train": np.arange(30) % 3,
        "x_test": g.integers(0, 256, (20, 6, 5), dtype=np.uint8),
        "y_test": np.arange(20) % 3,
    } | change
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


def test_quick_run_draws_its_picture(tmp_path):
    done = run("--quick", "--out", tmp_path / "new", "--target", "0.0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("s4 | 0.0") and "digits 1294/40 | 1024 steps" in lines[0]
    assert (
        lines[-1].startswith("test acc S4 ") and "GRU" in lines[-1] and "chance 0.100" in lines[-1]
    )
    assert (tmp_path / "new" / "s4.png").stat().st_size > 10_000


def test_ctrl_c_then_going_on_equals_one_run(tmp_path, capsys, monkeypatch):
    """Six steps, and a run that Ctrl-C ends after 3 and that goes on to 6, end in equal weights."""
    data, a, b = write_npz(tmp_path / "d.npz"), str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    common = ["--data", str(data), "--batch-size", "4", "--log-every", "2", "--out", str(tmp_path)]
    seen, distort = [], s4.distort
    monkeypatch.setattr(s4, "distort", lambda x, g: seen.append(x.sum().item()) or distort(x, g))
    assert s4.main([*common, "--steps", "6", "--save", a]) == 0

    def interrupt_after_2(state, path, save=torch.save):
        save(state, path)
        if state["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupt_after_2)
        assert s4.main([*common, "--steps", "6", "--save", b]) == 130
    half = torch.load(b, weights_only=True)
    assert half["step"] == 3
    del half["args"]["rank"], half["args"]["world"]  # as in checkpoints of before
    torch.save(half, b)
    assert s4.main(["--steps", "6", "--load", b, "--save", b, "--out", str(tmp_path)]) == 0
    whole, again = (torch.load(path, weights_only=True) for path in (a, b))
    assert whole["step"] == again["step"] == 6
    assert seen[:6] == seen[6:] and len(set(seen)) == 6  # a batch of its own for every step
    for name, value in whole["models"]["S4"].items():
        assert torch.equal(value, again["models"]["S4"][name]), name
    capsys.readouterr()
    assert s4.main(["--load", b, "--out", str(tmp_path), "--target", "1.01"]) == 1  # evaluates only
    assert "step  " not in capsys.readouterr().out


def test_gru_sees_the_same_images_in_larger_batches(monkeypatch):
    seen = {"S4": [], "GRU": []}

    class Spy(torch.nn.Linear):
        def __init__(self, name):
            super().__init__(1, 3)
            self.name = name

        def forward(self, x):
            seen[self.name].append(x[:, 0].detach())
            return super().forward(x)

    models = {name: Spy(name) for name in seen}
    optimizers = {
        n: torch.optim.AdamW([{"params": m.parameters(), "lr": 0.1, "peak": 0.1}])
        for n, m in models.items()
    }
    draw = lambda step: (torch.full((2, 1), float(step)), torch.zeros(2).long())  # noqa: E731
    args = SimpleNamespace(steps=6, seed=0, log_every=100, save=None, rank=0, world=1)
    monkeypatch.setattr(s4, "accuracy", lambda model, x: 0.5)
    state = {"step": 0, "history": [], "loss": {}, "seconds": dict.fromkeys(models, 0.0)}
    assert s4.train(models, optimizers, draw, "x", args, state) is False
    assert [len(x) for x in seen["S4"]] == [2] * 6 and [len(x) for x in seen["GRU"]] == [6, 6]
    assert torch.equal(torch.cat(seen["S4"]), torch.cat(seen["GRU"]))
    assert state["history"] == [("S4", 6, 0.5), ("GRU", 6, 0.5)]
    assert optimizers["S4"].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_loss_that_is_not_finite_stops_with_one_line(tmp_path, monkeypatch, capsys):
    data = str(write_npz(tmp_path / "d.npz"))
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(s4.F, "cross_entropy", lambda *a: cross_entropy(*a) * math.nan)
    args = ["--data", data, "--batch-size", "4", "--steps", "2", "--out", str(tmp_path)]
    assert s4.main(args) == 1
    assert "nan at step 1" in capsys.readouterr().err


BAD = {
    "device": ["--device", "tpu"],
    "steps": ["--steps", "0"],
    "lr": ["--lr", "-1"],
    "seed": ["--seed", "-1"],
    "batch": ["--batch-size", "1400"],
    "missing": ["--data", "nothing.npz"],
    "load": ["--load", "nothing.pt"],
    "save": ["--save", "."],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_exit_2_with_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        s4.main([*BAD[name], "--quick"])
    out = capsys.readouterr()
    assert error.value.code == 2 and out.out == ""
    assert ": error: " in out.err.splitlines()[-1]
    assert "Traceback" not in out.err and not list(tmp_path.glob("**/*.png"))


@pytest.mark.parametrize(
    "change",
    [
        {"x_train": None},
        {"x_train": np.zeros((30, 6, 5), np.float32)},
        {"x_train": np.zeros((30, 6, 5, 2), np.uint8)},
        {"x_test": np.zeros((20, 6, 6), np.uint8)},
        {"x_train": np.zeros((5, 6, 5), np.uint8), "y_train": np.arange(5)},
        {"y_train": np.arange(29)},
        {"y_train": np.arange(30) / 3},
        {"y_test": np.arange(20) - 1},
        {"y_train": np.array([None] * 30)},
    ],
)
def test_bad_data_exits_2_with_one_line(change, tmp_path, capsys):
    path = write_npz(tmp_path / "d.npz", **change)
    with pytest.raises(SystemExit) as error:
        s4.main(["--data", str(path), "--out", str(tmp_path / "o"), "--batch-size", "2"])
    err = capsys.readouterr().err
    assert error.value.code == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith(
        ("s4.py: error:", "__main__.py: error:", "pytest: error:")
    )


def test_truncated_file_and_foreign_checkpoint(tmp_path, capsys):
    path = write_npz(tmp_path / "d.npz")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:300])
    torch.save({"script": "mamba"}, tmp_path / "m.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for flags in (["--data", "cut.npz"], ["--load", "m.pt"], ["--load", "junk.pt"]):
        with pytest.raises(SystemExit) as error:
            s4.main([flags[0], str(tmp_path / flags[1]), "--out", str(tmp_path)])
        assert error.value.code == 2
    capsys.readouterr()
    small, common = str(tmp_path / "s.pt"), ["--batch-size", "2", "--out", str(tmp_path)]
    assert s4.main(["--data", str(path), "--steps", "1", "--save", small, *common]) == 0
    other = write_npz(tmp_path / "e.npz", y_train=np.arange(30) % 7)
    with pytest.raises(SystemExit) as error:
        s4.main(["--load", small, "--data", str(other), *common])
    assert error.value.code == 2 and "size mismatch" in capsys.readouterr().err
    argv = ["--load", small, "--data", str(path), "--lr", "0.5", *common]  # the flag goes first
    assert 0.5 in [g["peak"] for g in s4.parse(argv)[3]["S4"].param_groups]


def test_the_file_alone_builds_its_model(tmp_path):
    """Copied to an empty folder, with neither sklearn nor matplotlib nor tqdm at hand."""
    shutil.copy(SCRIPT, tmp_path)
    code = (
        "import sys\n"
        "for name in ('sklearn', 'matplotlib', 'tqdm', 'mamba'): sys.modules[name] = None\n"
        "import torch, s4\n"
        "print(s4.S4Model(1, 10, 8, 2)(torch.randn(2, 20, 1)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "[2, 10]" in done.stdout, done.stderr


@pytest.mark.results
def test_readme_figure(tmp_path):
    done = run("--out", tmp_path, "--target", "0.97")
    assert done.returncode == 0, done.stdout + done.stderr
