"""s4.py: HiPPO, the kernel from the sum to Algorithm 1, two ways to run it, the demo."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import s4
from s4 import S4Layer, S4Model, algorithm_1, dplr_kernel, naive_kernel, pairs


def systems(N, dts, noise=0.0, dtype=torch.complex64):
    """Lambda, P, B, C, dt of one system per dt, moved off the HiPPO values by `noise`."""
    H = len(dts)
    Lambda, P, B = (x.repeat(H, 1) for x in s4.nplr(N)[:3])
    e, f, g, C = torch.randn(4, H, N // 2, dtype=Lambda.dtype)
    Lambda = torch.complex(Lambda.real * (noise * e.real).exp(), Lambda.imag + noise * e.imag)
    system = [x.to(dtype) for x in (Lambda, P + noise * f, B + noise * g, C)]
    return [*system, torch.tensor(dts).to(system[0].real)]


def exact(values):
    return [x.detach().to(torch.promote_types(x.dtype, torch.float64)) for x in values]


def recurrence(Lambda, P, B, C, dt, L):
    """The kernel by L steps of the dense recurrence in float64: the oracle of this file."""
    Lambda, P, B, C, dt = exact((Lambda, P, B, C, dt))
    return naive_kernel(*s4.dense(Lambda, P, B, dt), pairs(C), L).real


def tilde(Lambda, P, B, C, dt, L):
    """C~ of these systems, in the dtype of C."""
    A_bar, _ = s4.dense(*exact((Lambda, P, B, dt)))
    return s4.truncate(A_bar, pairs(*exact([C])), L)[:, : C.shape[1]].to(C)


def worst(a, b):
    """Largest error of each row, relative to the row's largest value."""
    return ((a - b).abs().amax(-1) / b.abs().amax(-1)).max().item()


# ---- HiPPO ----


def test_the_hippo_matrix_is_equation_2():
    A, B = s4.hippo(6)
    for n in range(6):
        for k in range(6):
            off = -math.sqrt(2 * n + 1) * math.sqrt(2 * k + 1) if n > k else 0.0
            assert A[n, k] == pytest.approx(-(n + 1) if n == k else off)
        assert B[n] == pytest.approx(math.sqrt(2 * n + 1))
    assert A[3, 2].item() == pytest.approx(-5.92, abs=0.005)  # as in the comment


def test_a_hippo_state_holds_the_legendre_coefficients_of_the_past():
    """Its kernel at an age is dt s p_n(s), s = exp(-age); so a cubic in s is held by 4 numbers."""
    N, dt = 8, torch.tensor(1e-3).double()
    K = naive_kernel(*s4.bilinear(*s4.hippo(N), dt), torch.eye(N), 10000)  # (N, 10000)
    s = torch.exp(-(torch.arange(10000).double() + 0.5) * dt)
    legendre = np.polynomial.legendre.legvander(2 * s.numpy() - 1, N - 1)
    p = torch.from_numpy(legendre * np.sqrt(2 * np.arange(N) + 1)).T  # (N, 10000)
    assert (K / dt - s * p).abs().max() < 0.01
    u = 8 * s**3 - 9 * s**2 + 3 * s
    x = K @ u
    assert (x @ p - u).abs().max() < 1e-3
    assert x[4:].abs().max() < 1e-3 < x[:4].abs().min()


@pytest.mark.parametrize("N", [2, 4, 16, 64, 128])
def test_nplr_puts_hippo_together_again_in_a_unitary_basis(N):
    Lambda, P, B, V = s4.nplr(N)
    assert Lambda.shape == P.shape == B.shape == (N // 2,) and (Lambda.real == -0.5).all()
    assert (Lambda.imag > 0).all()
    Lambda, P, B, V = map(pairs, (Lambda, P, B, V))
    torch.testing.assert_close(V.mH @ V, torch.eye(N).to(V), atol=1e-9, rtol=0)
    A = V @ (torch.diag(Lambda) - P[:, None] * P.conj()) @ V.mH
    want_A, want_B = s4.hippo(N)
    torch.testing.assert_close(A, want_A.to(A), atol=1e-8 * N, rtol=1e-9)
    torch.testing.assert_close(V @ B, want_B.to(A), atol=1e-9 * N, rtol=1e-9)


def test_plain_diagonalisation_loses_the_matrix():
    A, _ = s4.hippo(64)
    Lambda, V = torch.linalg.eig(A)
    back = V @ torch.diag(Lambda) @ torch.linalg.inv(V)
    assert (back - A).abs().max() > 1e20 * A.abs().max()


def test_the_state_size_must_be_even():
    with pytest.raises(ValueError, match="even"):
        s4.nplr(7)


def test_bilinear_is_equation_3_second_order_and_stable_where_euler_is_not():
    A, B = s4.hippo(4)
    for dt, bound in ((0.02, 2e-3), (0.01, 2.5e-4)):  # one step errs by O(dt^3): a factor of 8
        A_bar, _ = s4.bilinear(A, B, torch.tensor(dt).double())
        assert (A_bar - torch.matrix_exp(A * dt)).abs().max() < bound
    I, dt = torch.eye(4), torch.tensor(0.3).double()
    A_bar, B_bar = s4.bilinear(A, B, dt)
    inverse = torch.linalg.inv(I - dt / 2 * A)
    torch.testing.assert_close(A_bar, inverse @ (I + dt / 2 * A))
    torch.testing.assert_close(B_bar, inverse @ (dt * B))
    oscillator = torch.tensor([[-0.5, 30.0], [-30.0, -0.5]]).double()
    A_bar, _ = s4.bilinear(oscillator, torch.ones(2).double(), torch.tensor(0.1).double())
    assert torch.linalg.eigvals(A_bar).abs().max() < 1
    euler = torch.linalg.eigvals(torch.eye(2) + 0.1 * oscillator).abs().max()
    assert euler == pytest.approx(3.1, abs=0.1)


# ---- the kernel, from the sum to Algorithm 1 ----


def test_the_naive_kernel_is_a_list_of_powers():
    Lambda, P, B, C, dt = systems(4, [0.1], 0.3, torch.complex128)
    A_bar, B_bar = (x[0] for x in s4.dense(Lambda, P, B, dt))
    K = naive_kernel(A_bar, B_bar, pairs(C)[0], 9)
    for k in range(9):
        want = pairs(C)[0] @ torch.linalg.matrix_power(A_bar, k) @ B_bar
        assert (K[k] - want).abs() < 1e-12 and want.imag.abs() < 1e-12  # conjugate pairs: real


@pytest.mark.parametrize("L", [1, 2, 33, 64])
def test_sum_resolvent_algorithm_1_and_its_rearrangement_are_equal(L):
    Lambda, P, B, C, dt = systems(16, [3e-3, 5e-2], 0.3, torch.complex128)
    want = recurrence(Lambda, P, B, C, dt, L)
    C = tilde(Lambda, P, B, C, dt, L)
    A_bar, B_bar = s4.dense(Lambda, P, B, dt)
    resolvent = [s4.resolvent_kernel(*x, L) for x in zip(A_bar, B_bar, pairs(C))]
    assert worst(torch.stack(resolvent), want) < 1e-10
    assert worst(algorithm_1(Lambda, P, B, C, dt, L), want) < 1e-10
    assert worst(dplr_kernel(Lambda, P, B, C, dt, L), want) < 1e-10


def test_the_other_sign_of_the_roots_reverses_the_kernel(monkeypatch):
    Lambda, P, B, C, dt = systems(8, [5e-2], 0.3, torch.complex128)
    K, roots = algorithm_1(Lambda, P, B, C, dt, 16), s4.roots_of_unity
    monkeypatch.setattr(s4, "roots_of_unity", lambda L: roots(L).conj())
    reverse = algorithm_1(Lambda, P, B, C, dt, 16)
    torch.testing.assert_close(reverse, K.roll(-1, 1).flip(1))  # K_0, K_15, ..., K_1


LENGTHS = [100, 255, 256, 1000, 1023, 1024, 4097, 16383, 16384]


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize(
    "lengths, dts", [(range(1, 41), torch.logspace(-3, -1, 24).tolist()), (LENGTHS, [1e-3, 1e-1])]
)
def test_the_float32_kernel_is_within_1e5_of_a_float64_recurrence(noise, lengths, dts):
    """Short kernels are the hard ones: there g comes close to large eigenvalues."""
    Lambda, P, B, C, dt = systems(64, dts, noise)
    want = recurrence(Lambda, P, B, C, dt, max(lengths))
    for L in lengths:
        K = dplr_kernel(Lambda, P, B, tilde(Lambda, P, B, C, dt, L), dt, L)
        assert K.dtype == torch.float32 and K.shape == (len(dts), L)
        error = (K - want[:, :L]).abs().amax(1) / want.abs().amax(1)
        assert error.max() < 1e-5, L


def gradient_errors(kernel, system, L):
    """Of Lambda, P, B, C~, dt in float32, relative to the largest of float64's; by the formula."""
    weight = torch.randn(len(system[0]), L).double()

    def gradients(values):
        values = [x.detach().requires_grad_() for x in values]
        (kernel(*values, L) * weight.to(values[4])).sum().backward()
        return [x.grad for x in values]

    pairs_of_grads = zip(gradients(system), gradients(exact(system)))
    return [((p - q).abs().max() / q.abs().max()).item() for p, q in pairs_of_grads]


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("L", [2, 3, 8, 16, 33, 100, 1024, 4096, 16384])
def test_float32_gradients_are_within_2e5_of_float64(noise, L):
    system = systems(64, torch.logspace(-3, -1, 8).tolist(), noise)
    system[3] = tilde(*system, L)
    assert max(gradient_errors(dplr_kernel, system, L)) < 2e-5


def test_the_rearrangement_pays_in_the_gradients():
    printed, stable = [], []
    for L in (256, 1024, 4096):
        system = systems(64, torch.logspace(-3, -1, 8).tolist())
        system[3] = tilde(*system, L)
        printed += gradient_errors(algorithm_1, system, L)
        stable += gradient_errors(dplr_kernel, system, L)
    assert max(printed) > 5 * max(stable)


def test_truncation_has_an_inverse():
    Lambda, P, B, C, dt = systems(16, [1e-3, 1e-1], 0.1, torch.complex128)
    A_bar, _ = s4.dense(Lambda, P, B, dt)
    there = s4.truncate(A_bar, pairs(C), 200)
    torch.testing.assert_close(s4.truncate(A_bar, there, 200, inverse=True), pairs(C))


@pytest.mark.parametrize("L", [1, 2, 7, 64])
def test_the_convolution_equals_numpys_and_nothing_comes_round_the_circle(L):
    u, K = torch.randn(2, 3, L), torch.randn(3, L)
    y = s4.convolve(u, K)
    for b in range(2):
        for h in range(3):
            want = np.convolve(u[b, h].numpy(), K[h].numpy())[:L]
            np.testing.assert_allclose(y[b, h].numpy(), want, atol=1e-5)


# ---- layer and model ----


@pytest.mark.parametrize("L, l_max", [(1, 1), (7, 16), (200, 200), (33, 40)])
def test_all_steps_of_the_recurrence_equal_the_convolution(L, l_max):
    layer, u = S4Layer(6, 16, l_max), torch.randn(3, L, 6)
    state, ys = layer.init_state(3), []
    for t in range(L):
        y, state = layer.step(u[:, t], state)
        ys.append(y)
    torch.testing.assert_close(torch.stack(ys, 1), layer(u), atol=1e-5, rtol=1e-4)


def test_the_systems_alone_run_equal_to_1e5_over_1024_steps():
    layer = S4Layer(4, 64, 1024)
    u, state, ys = torch.randn(2, 1024, 4), layer.init_state(2), []
    layer.output = torch.nn.Identity()  # the systems alone, before channels are mixed
    for t in range(1024):
        y, state = layer.step(u[:, t], state)
        ys.append(y)
    want = layer(u)
    assert (torch.stack(ys, 1) - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("B, L", [(1, 1), (2, 3), (3, 33)])
def test_shapes_and_a_gradient_for_every_parameter(B, L):
    model = S4Model(2, 5, 8, 2, d_state=4, l_max=33)
    y = model(torch.randn(B, L, 2))
    assert y.shape == (B, 5)
    y.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert L < 33 or p.grad.abs().sum() > 0, name


def test_every_gradient_of_the_layer_is_right():
    """Through Cauchy sums, Woodbury and FFT, against finite differences."""
    layer = S4Layer(2, 4, 6).double()
    names = ["log_dt", "A_real_log", "A_imag", "P", "B", "C", "D"]
    u = torch.randn(1, 6, 2, dtype=torch.float64)

    def f(*values):
        return torch.func.functional_call(layer, dict(zip(names, values)), (u,))

    values = tuple(getattr(layer, n).detach().clone().requires_grad_() for n in names)
    assert torch.autograd.gradcheck(f, values, atol=1e-6)


def test_causal():
    layer, u = S4Layer(4, 8, 20), torch.randn(1, 20, 4)
    v = u.clone()
    v[:, 12] += 1.0
    change = (layer(u) - layer(v)).abs().amax((0, 2))
    assert change[12:].min() > 1e-5 and change[:12].max() < 1e-5


def test_a_shorter_sequence_gets_the_start_of_the_kernel_and_a_longer_one_is_refused():
    layer = S4Layer(4, 16, 64)
    torch.testing.assert_close(layer.kernel(10), layer.kernel(64)[:, :10])
    with pytest.raises(ValueError, match="l_max"):
        layer(torch.randn(1, 65, 4))


def test_the_model_is_its_block_written_out():
    model, x = S4Model(2, 3, 8, 1, d_state=8, l_max=30).eval(), torch.randn(4, 30, 2)
    layer, norm = model.layers[0], model.norms[0]
    _, dropout, mix, _ = layer.output
    assert dropout.p == 0.1

    def block(u):
        y = s4.convolve(u.mT, layer.kernel(30)).mT + layer.D * u
        a, b = (F.gelu(y) @ mix.weight.T + mix.bias).chunk(2, -1)
        return a * b.sigmoid()

    h = model.encoder(x)
    h = h + block(norm(h))
    torch.testing.assert_close(model(x), model.decoder(h.mean(1)), rtol=1e-4, atol=1e-5)
    model.pool = False
    torch.testing.assert_close(model(x), model.decoder(h), rtol=1e-4, atol=1e-5)


def test_names_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in S4Model(1, 10, 8, 2, d_state=4).state_dict().items()}
    layer = {k[9:]: v for k, v in shapes.items() if k.startswith("layers.1.")}
    assert layer == {
        "log_dt": (8,), "A_real_log": (8, 2), "A_imag": (8, 2), "P": (8, 2, 2), "B": (8, 2, 2),
        "C": (8, 2, 2), "D": (8,), "output.2.weight": (16, 8), "output.2.bias": (16,),
    }  # fmt: skip
    assert {"encoder.weight", "decoder.bias", "norms.1.weight"} < set(shapes)


def test_the_initialisation_is_the_published_one():
    layer = S4Layer(4000, 4, 1)
    dt = layer.log_dt.exp()
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1001
    assert layer.log_dt.mean().item() == pytest.approx(math.log(1e-2), abs=0.1)  # log-uniform
    assert layer.D.std().item() == pytest.approx(1, abs=0.05)
    _, _, _, C = layer.init_state(1)
    assert C.abs().square().mean().item() == pytest.approx(1, abs=0.05)  # complex normal
    Lambda, P, B, _, _ = layer.system()
    for got, want in zip((Lambda, P, B), s4.nplr(4)):
        torch.testing.assert_close(got[7], want.to(got))


def test_the_system_learns_slowly_and_does_not_decay():
    model = S4Model(1, 2, 4, 1, d_state=4, l_max=8)
    rest, ssm = s4.parameter_groups(model, 1e-2, 0.05)
    assert (rest["lr"], rest["peak"], rest["weight_decay"]) == (1e-2, 1e-2, 0.05)
    assert (ssm["lr"], ssm["peak"], ssm["weight_decay"]) == (1e-3, 1e-3, 0.0)
    layer = model.layers[0]
    want = {layer.log_dt, layer.A_real_log, layer.A_imag, layer.P, layer.B}
    assert set(ssm["params"]) == want
    assert set(rest["params"]) == set(model.parameters()) - want
    assert s4.parameter_groups(model, 1e-4, 0.0)[1]["peak"] == 1e-4


def test_float64_agrees_and_half_precision_is_refused():
    model, x = S4Model(1, 3, 8, 1, d_state=4, l_max=20).eval(), torch.randn(2, 20, 1)
    want = model(x)
    torch.testing.assert_close(model.double()(x.double()).float(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="(?i)bfloat16"):
        model.bfloat16()(x.bfloat16())


def test_the_loss_starts_at_ln_10_and_falls_on_one_batch():
    model = S4Model(1, 10, 16, 2, dropout=0.0, d_state=8, l_max=32)
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


def quick(tmp_path, *more):
    return ["--quick", "--out", str(tmp_path), *more]


def test_no_test_digit_is_trained_on_and_all_digits_are_used(tmp_path):
    from sklearn.datasets import load_digits

    x, y, x_test, y_test = s4.load_data("cpu")
    assert x.shape == (1437, 1, 28, 28) and x_test.shape == (360, 784, 1)
    assert x.min() >= 0 and x.max() <= 1 and y.unique().tolist() == [*range(10)]
    seen = torch.cat([x.flatten(1), x_test.flatten(1)]).unique(dim=0)
    pixels, labels = load_digits(return_X_y=True)
    assert len(seen) == len(np.unique(pixels, axis=0))  # so none is on both sides
    assert sorted([*y.tolist(), *y_test.tolist()]) == sorted(labels)


def test_a_batch_shows_digits_with_their_labels_never_twice_the_same(tmp_path):
    args, data, *_ = s4.parse(quick(tmp_path))
    x, y = data[:2]
    args.batch_size = 32
    (a, labels), (again, _), (other, _) = (s4.batch(x, y, args, step) for step in (1, 1, 2))
    assert a.shape == (32, 784, 1) and torch.equal(a, again) and not torch.equal(a, other)
    torch.manual_seed(1)
    rows = torch.randint(len(x), (32,))
    assert torch.equal(labels, y[rows])
    plain = x[rows].flatten(2).mT
    apart = (a - plain).abs().mean((1, 2))
    shuffled = (a - plain.roll(1, 0)).abs().mean((1, 2))
    assert apart.min() > 0.001 and apart.mean() < 0.6 * shuffled.mean()  # distorted, still itself


def test_the_gru_has_as_many_parameters_and_reads_every_pixel_in_order(tmp_path):
    args, *_ = s4.parse(quick(tmp_path))
    models = [s4.build(args)[0], s4.build(args, gru=True)[0]]
    a, b = (sum(p.numel() for p in m.parameters()) for m in models)
    assert abs(a / b - 1) < 0.1
    gru, u = models[1].layers[0], torch.randn(1, 9, 36)
    want = torch.nn.functional.linear(u, gru.weight_ih_l0, gru.bias_ih_l0)
    h = torch.zeros(36)
    for t in range(9):
        again = gru.weight_hh_l0 @ h + gru.bias_hh_l0
        r, z = (want[0, t, :72] + again[:72]).sigmoid().chunk(2)
        n = (want[0, t, 72:] + r * again[72:]).tanh()
        h = (1 - z) * n + z * h
        torch.testing.assert_close(gru(u)[0, t], h)


def test_spy(tmp_path, monkeypatch, capsys):
    """Which data, which networks, modes and rates a whole run really uses."""
    batches, rates, judged, drawn = [], [], [], []
    batch, evaluate, draw = s4.batch, s4.evaluate, s4.draw_picture
    step, forward = torch.optim.AdamW.step, S4Model.forward
    x, y, x_test, y_test = s4.load_data("cpu")

    def spy_batch(images, labels, args, step):
        batches.append((step, torch.equal(images, x) and torch.equal(labels, y)))
        return batch(images, labels, args, step)

    def spy_step(self):
        rates.append([g["lr"] for g in self.param_groups])
        return step(self)

    def spy_evaluate(models, *rest):
        modes = []
        with monkeypatch.context() as patch:

            def spy_forward(self, x):
                modes.append((self, self.training, x))
                return forward(self, x)

            patch.setattr(S4Model, "forward", spy_forward)
            result = evaluate(models, *rest)
        for name in models:
            rows = torch.cat([x for model, _, x in modes if model is models[name]])
            kind = type(models[name].layers[0]).__name__
            training = {t for model, t, _ in modes if model is models[name]}
            judged.append((name, kind, training, torch.equal(rows, x_test)))
        right = models["S4"](x_test).argmax(1) == y_test
        assert result == pytest.approx(right.float().mean().item(), abs=1e-6)
        return result

    def spy_draw(path, curves):
        drawn.append({name: len(curve) for name, curve in curves.items()})
        return draw(path, curves)

    monkeypatch.setattr(s4, "batch", spy_batch)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    monkeypatch.setattr(s4, "evaluate", spy_evaluate)
    monkeypatch.setattr(s4, "draw_picture", spy_draw)
    metric = s4.main(quick(tmp_path, "--lr", ".02"))

    assert batches == [(1, True), (2, True), (3, True), (4, True), (1, True), (2, True), (3, True)]
    assert rates[1] == pytest.approx([0.02 * 0.5, 0.001 * 0.5])  # half-way down
    assert rates[3] == rates[6] == pytest.approx([0, 0], abs=1e-9)
    assert judged == [("S4", "S4Layer", {False}, True), ("GRU", "GRU", {False}, True)]
    assert drawn == [{"S4": 4, "GRU": 3}]
    out = capsys.readouterr().out.splitlines()
    apart = [float(number) for number in re.findall(r"\de-\d\d", out[-2])]
    assert len(apart) == 2 and max(apart) < 1e-4  # loop = Algorithm 1, recurrence = convolution
    assert f"S4 {metric:.4f}" in out[-1] and "GRU" in out[-1]


def test_training_rises_to_the_peak_rate_and_falls_to_0(tmp_path):
    args, data, model, optimizer, _ = s4.parse(quick(tmp_path))
    rates, step = [], optimizer.step

    def spy():
        rates.append(optimizer.param_groups[0]["lr"])
        step()

    optimizer.step = spy
    args.batch_size = 1
    s4.train(model, optimizer, data, 20, args)
    assert rates[0] == pytest.approx(args.lr / 2, rel=0.02)  # a tenth of the steps to warm up
    assert max(rates) == rates[1] and rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[9] == pytest.approx(args.lr / 2)
    # The last rate was 0, so the weights are those that the last gradient belongs to.
    got = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    images, labels = s4.batch(*data[:2], args, 20)
    F.cross_entropy(model(images), labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for p, before in zip(model.parameters(), got):
        torch.testing.assert_close(p.grad, before, rtol=1e-3, atol=1e-5)


def test_the_metric_is_the_accuracy_of_s4(capsys):
    class Fixed(torch.nn.Module):
        def __init__(self, answers):
            super().__init__()
            self.answers = answers

        def forward(self, x):
            return F.one_hot(self.answers[x[:, 0, 0]], 10)

    y = torch.arange(100) % 10
    models = {"S4": Fixed(y * (torch.arange(100) < 75)), "GRU": Fixed(y * (torch.arange(100) < 30))}
    x = torch.arange(100)[:, None, None]  # an image says only which one it is
    metric = s4.evaluate(models, {"S4": [], "GRU": []}, x, y)
    assert metric == pytest.approx(0.77)  # a 0 in ten is right anyway
    line = capsys.readouterr().out
    assert "S4 0.7700" in line and "GRU 0.3700" in line and line.startswith("test")


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert s4.main(["--out", str(tmp_path)]) >= 0.95  # .961 at worst, on this seed
