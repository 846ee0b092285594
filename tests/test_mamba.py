"""mamba.py: three forms of the scan against each other and brute force, states, names, the demo."""

import math

import pytest
import torch
import torch.nn.functional as F

import mamba
from mamba import (
    Mamba,
    MambaBlock,
    lti_convolution,
    parallel_scan,
    selective_scan,
    selective_scan_ref,
)


def inputs(B=2, L=37, D=5, N=3, dtype=torch.float64, top=0.5):
    u, B_, C = torch.randn(B, L, D), torch.randn(B, L, N), torch.randn(B, L, N)
    dt = torch.rand(B, L, D) * top + 1e-4
    A, skip, h0 = -torch.rand(D, N) * 3 - 0.1, torch.randn(D), torch.randn(B, D, N)
    return [x.to(dtype) for x in (u, dt, A, B_, C, skip, h0)]


def rel(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def gradients(y, h, a):
    g = torch.Generator().manual_seed(5)
    wy, wh = (torch.randn(x.shape, generator=g).to(x.dtype) for x in (y, h))
    return torch.autograd.grad((y * wy).sum() + (h * wh).sum(), a)


# ---- the scan ----


def test_the_loop_equals_a_loop_over_scalars():
    """Eq. 2 with nothing but Python numbers."""
    u, dt, A, B, C, D, h0 = inputs(1, 4, 2, 3)
    y, h_last = selective_scan_ref(u, dt, A, B, C, D, h0)
    for d in range(2):
        h = h0[0, d].tolist()
        for t in range(4):
            step = dt[0, t, d].item()
            total = D[d].item() * u[0, t, d].item()
            for n in range(3):
                h[n] = math.exp(step * A[d, n].item()) * h[n]
                h[n] += step * B[0, t, n].item() * u[0, t, d].item()
                total += h[n] * C[0, t, n].item()
            assert total == pytest.approx(y[0, t, d].item(), rel=1e-12)
        assert h == pytest.approx(h_last[0, d].tolist(), rel=1e-12)


@pytest.mark.parametrize("L", [1, 2, 3, 8, 13, 64])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_parallel_scan_equals_the_loop(L, compiled):
    """Also as torch.compile traces it."""
    u, dt, A, B, C, D, h0 = inputs(2, L)
    scan = torch.compile(parallel_scan, backend="aot_eager") if compiled else parallel_scan
    A_bar, B_bar_u = torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]
    a, b = scan(A_bar, B_bar_u)
    h = a * h0[:, None] + b
    y, last = selective_scan_ref(u, dt, A, B, C, D, h0)
    assert rel((h * C[:, :, None]).sum(-1) + D * u, y) < 1e-12 and rel(h[:, -1], last) < 1e-12


@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 31, 37, 64, 101])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_fast_scan_equals_the_loop_values_and_gradients(L, batch):
    a = [x.requires_grad_() for x in inputs(batch, L)]
    got = selective_scan(*a, return_state=True, compile=False)
    want = selective_scan_ref(*a)
    for p, q in zip(got, want):
        assert rel(p, q) < 1e-12
    for p, q in zip(gradients(*got, a), gradients(*want, a)):
        assert rel(p, q) < 1e-11


@pytest.mark.parametrize("B,L,D,N", [(1, 700, 2, 3), (2, 1301, 7, 5), (3, 650, 40, 20)])
def test_stretches_of_time_do_not_change_the_result(B, L, D, N):
    a = [x.requires_grad_() for x in inputs(B, L, D, N)]
    assert L // 128 >= 5 and 32768 // (B * D * N) >= 5  # so the time is cut
    got, want = selective_scan(*a, return_state=True, compile=False), selective_scan_ref(*a)
    for p, q in zip((*got, *gradients(*got, a)), (*want, *gradients(*want, a))):
        assert rel(p, q) < 1e-10


def test_gradcheck_once_and_twice():
    a = [x.requires_grad_() for x in inputs(1, 19, 2, 2)]

    def scan(*a):
        return selective_scan(*a, return_state=True, compile=False)

    assert torch.autograd.gradcheck(scan, a)
    small = [x.requires_grad_() for x in inputs(1, 3, 2, 2)]
    assert torch.autograd.gradgradcheck(scan, small)


@pytest.mark.parametrize("top", [1e-4, 0.1, 5.0, 50.0])
def test_float32_is_within_1e5_of_float64_for_any_dt(top):
    wide = [x.requires_grad_() for x in inputs(2, 130, 6, 4, top=top)]
    slim = [x.detach().float().requires_grad_() for x in wide]
    y, y64 = selective_scan(*slim, compile=False), selective_scan_ref(*wide)[0]
    w = torch.randn_like(y64)
    (y * w.float()).sum().backward()
    (y64 * w).sum().backward()
    assert rel(y, y64) < 1e-5
    for p, q in zip(slim, wide):
        assert torch.isfinite(p.grad).all() and rel(p.grad, q.grad) < 1e-5


def test_bf16_in_bf16_out_state_in_fp32():
    a = inputs(2, 40, dtype=torch.float32)
    y, h = selective_scan(*(x.bfloat16() for x in a), return_state=True, compile=False)
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    y_ref, h_ref = selective_scan_ref(*(x.bfloat16().float() for x in a))
    assert rel(y, y_ref) < 1e-2 and rel(h, h_ref) < 1e-5


def test_compiled_at_the_benchmarks_shapes_it_is_right_and_never_eager(capsys):
    """Forward alone and with gradients, other sizes in between, as a session would have them."""
    from benchmark_scan import SHAPES

    # Chunks of 4 compile four times as fast as those of 16, and there are as many kinds of them.
    for (B, L, D, N), T in [(SHAPES[0], 16), *((s, 4) for s in [*SHAPES, (3, 40, 24, 8)])]:
        L //= 16 // T
        a = [x.requires_grad_() for x in inputs(B, L, D, N, torch.float32, 0.1)[:6]]
        with torch.no_grad():
            selective_scan(*a, chunk=T)
        got = selective_scan(*a, return_state=True, chunk=T)
        want = selective_scan(*a, return_state=True, chunk=T, compile=False)
        for p, q in zip((*got, *gradients(*got, a)), (*want, *gradients(*want, a))):
            assert rel(p, q) < 1e-5
    assert "uncompiled" not in capsys.readouterr().err  # fullgraph: there is no other way to eager


def test_without_a_compiler_it_says_so_once_and_runs(capsys, monkeypatch):
    def broken(function, **how):
        def run(*args):
            raise RuntimeError("g++ not found")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    mamba.kernel.cache_clear()
    a = inputs(2, 50)
    for _ in range(2):
        assert rel(selective_scan(*a), selective_scan_ref(*a)[0]) < 1e-12
    assert capsys.readouterr().err.count("g++ not found") == 1
    mamba.kernel.cache_clear()


@pytest.mark.parametrize("B,L,D,N", [(2, 256, 32, 16), (1, 4096, 64, 16)])
def test_the_backward_keeps_less_than_twice_the_inputs(B, L, D, N):
    """Counted by storages: a small view of a large tensor keeps all of it."""
    a = [x.requires_grad_() for x in inputs(B, L, D, N, torch.float32)[:6]]
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(*a, compile=False)
    assert sum(kept.values()) <= 2 * sum(x.numel() * x.element_size() for x in a)


@pytest.mark.parametrize("name", ["dt", "B", "C"])
def test_sequences_of_unequal_length_are_refused(name):
    a = dict(zip(["u", "dt", "A", "B", "C", "D"], inputs(2, 37)))
    for length in (36, 16):
        with pytest.raises(ValueError, match="shape"):
            selective_scan(**a | {name: a[name][:, :length]}, compile=False)


def test_the_lti_convolution_equals_its_recurrence():
    D, N = 5, 3
    u, dt, A = torch.randn(2, 23, D).double(), torch.rand(D).double(), -torch.rand(D, N).double()
    B, C, skip = torch.randn(D, N).double(), torch.randn(D, N).double(), torch.randn(D).double()
    h, ys = torch.zeros(2, D, N).double(), []
    for t in range(23):
        h = torch.exp(dt[:, None] * A) * h + (dt * u[:, t])[..., None] * B
        ys.append((h * C).sum(-1) + skip * u[:, t])
    assert rel(lti_convolution(u, dt, A, B, C, skip), torch.stack(ys, 1)) < 1e-10


def test_theorem_1_a_state_of_one_number_is_a_gate():
    """By Eq. 4 itself: with A = -1, B = 1, Delta = softplus(s), the state is (1 - g) h + g x."""
    s, x, h = torch.randn(3, 100).double()
    delta = F.softplus(s)
    A_bar = torch.exp(-delta)
    B_bar = (A_bar - 1) / -delta * delta
    g = torch.sigmoid(s)
    torch.testing.assert_close(A_bar * h + B_bar * x, (1 - g) * h + g * x)


# ---- block and model ----


def small(selective=True, **kw):
    return Mamba(11, 8, 2, d_state=4, selective=selective, compile=False, **kw)


@pytest.mark.parametrize("selective", [True, False])
def test_causal(selective):
    model, ids = small(selective), torch.randint(11, (2, 40))
    other = ids.clone()
    other[:, 25] = (other[:, 25] + 1) % 11
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :25], b[:, :25])
    assert (a[:, 25:] - b[:, 25:]).abs().max() > 1e-6


def test_the_block_equals_the_official_forward_written_out():
    """Order of the splits, direction of the convolution, place of the gate."""
    m, x = MambaBlock(8, d_state=4, compile=False), torch.randn(2, 21, 8)
    a, z = m.in_proj(x).split(16, -1)
    conv = F.conv1d(a.transpose(1, 2), m.conv1d.weight, m.conv1d.bias, padding=3, groups=16)
    u = F.silu(conv[..., :21].transpose(1, 2))
    low, B, C = m.x_proj(u).split([1, 4, 4], -1)
    y, _ = selective_scan_ref(u, F.softplus(m.dt_proj(low)), -m.A_log.exp(), B, C, m.D)
    torch.testing.assert_close(m(x)[0], m.out_proj(y * F.silu(z)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("L", [1, 2, 17, 40])
def test_step_and_pieces_equal_forward(L):
    model, ids = small(), torch.randint(11, (2, 40))
    whole, state = model(ids), model.init_state(2)
    logits, state = model(ids[:, :L], state, return_state=True)  # a prefill, handed on to step
    out = [logits]
    for t in range(L, 40):
        logits, state = model.step(ids[:, t], state)
        out.append(logits[:, None])
    torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-4, atol=1e-6)


def test_the_lti_baseline_refuses_a_state():
    model, ids = small(selective=False), torch.randint(11, (2, 9))
    _, state = model(ids, return_state=True)
    with pytest.raises(ValueError, match="LTI"):
        model(ids, state)


def test_generate_is_greedy_at_0_and_keeps_to_top_k_and_end_token():
    model, ids = small(), torch.randint(11, (2, 20))
    out = model.generate(ids, 5, temperature=0)
    for t in range(20, 25):  # each token is the most likely one after the whole prefix
        assert (out[:, t] == model(out[:, :t])[:, -1].argmax(-1)).all()
    assert (model.generate(ids, 5, top_k=1) == out).all()
    end = out[0, 21].item()
    ended = model.generate(ids[:1], 5, temperature=0, end_token=end)
    first = out[0, 20:].tolist().index(end)
    assert ended.shape[1] == 20 + first + 1 and ended[0, -1] == end
    both = model.generate(ids, 5, temperature=0, end_token=end)
    assert (both[0, 20 + first :] == end).all()


def test_the_temperature_divides_the_logits():
    torch.manual_seed(3)
    model = small()
    model.lm_head.weight.data *= 30  # far from uniform
    ids = torch.randint(11, (1, 6))
    logits = model(ids)[0, -1]
    g = torch.Generator().manual_seed(0)
    drawn = model.generate(ids.expand(20000, -1), 1, temperature=2.0, generator=g)[:, -1]
    share = drawn.bincount(minlength=11) / 20000
    assert (share - F.softmax(logits / 2, -1)).abs().max() < 0.015
    assert (share - F.softmax(logits * 2, -1)).abs().max() > 0.05  # the test can tell


def test_official_names_shapes_and_sizes():
    """mamba-130m: 243 keys, 129,135,360 parameters with the tied head (built without memory)."""
    with torch.device("meta"):
        model = Mamba(50280, 768, 24)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(shapes) == 243 and sum(p.numel() for p in model.parameters()) == 129_135_360
    layer = "backbone.layers.23."
    want = {
        "norm.weight": (768,), "mixer.A_log": (1536, 16), "mixer.D": (1536,),
        "mixer.in_proj.weight": (3072, 768), "mixer.conv1d.weight": (1536, 1, 4),
        "mixer.conv1d.bias": (1536,), "mixer.x_proj.weight": (80, 1536),
        "mixer.dt_proj.weight": (1536, 48), "mixer.dt_proj.bias": (1536,),
        "mixer.out_proj.weight": (768, 1536),
    }  # fmt: skip
    assert {k[len(layer) :]: v for k, v in shapes.items() if k.startswith(layer)} == want
    assert shapes["backbone.embedding.weight"] == shapes["lm_head.weight"] == (50280, 768)
    assert shapes["backbone.norm_f.weight"] == (768,)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_from_checkpoint_finds_the_sizes_and_takes_prefixes_off(prefix, tmp_path):
    model, ids = small(d_conv=3, expand=3, dt_rank=5), torch.randint(11, (2, 20))
    weights = {prefix + name: w for name, w in model.state_dict().items()}
    if not prefix:
        del weights["lm_head.weight"]  # some published files leave the tied head out
    torch.save(weights, tmp_path / "m.bin")
    again = Mamba.from_checkpoint(tmp_path / "m.bin", compile=False)
    torch.testing.assert_close(again(ids), model(ids))


def test_initialisation_is_the_official_one():
    block = MambaBlock(512)
    torch.testing.assert_close(block.A_log[3].exp(), torch.arange(1.0, 17))
    assert (block.D == 1).all()
    dt = F.softplus(block.dt_proj.bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and 0.008 < dt.median() < 0.0125
    bound = block.dt_rank**-0.5
    assert 0.95 * bound < block.dt_proj.weight.abs().max() <= bound
    torch.manual_seed(0)
    one = Mamba(11, 64, 1).backbone.layers[0].mixer.out_proj.weight
    torch.manual_seed(0)
    four = Mamba(11, 64, 4).backbone.layers[0].mixer.out_proj.weight
    torch.testing.assert_close(four * 2, one)  # by the square root of the number of layers


@pytest.mark.parametrize("selective", [True, False])
def test_every_parameter_gets_a_gradient(selective):
    model = small(selective)
    model(torch.randint(11, (2, 20))).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selective", [True, False])
def test_the_model_runs_in_every_dtype_near_float32(dtype, selective):
    model, ids = small(selective), torch.randint(11, (2, 20))
    want = model(ids)
    got = model.to(dtype)(ids)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.02)
    if selective:
        model.generate(ids, 3)


# ---- the demo ----


def test_copying_batch_holds_its_answers():
    ids, y = mamba.copying_batch(5, 40, torch.Generator().manual_seed(1))
    assert ids.shape == (5, 48) and (ids[:, 40:] == 15).all() and (y > 0).all() and (y < 15).all()
    for row, answer in zip(ids[:, :40], y):
        assert row[row > 0].tolist() == answer.tolist()


def test_loss_starts_at_ln_V_and_falls_on_one_batch():
    model = Mamba(16, 32, 2, compile=False)
    ids, y = mamba.copying_batch(4, 12, torch.Generator().manual_seed(0))
    first = mamba.loss_and_accuracy(model, ids, y)[0].item()
    assert abs(first - math.log(16)) < 0.15
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        opt.zero_grad()
        mamba.loss_and_accuracy(model, ids, y)[0].backward()
        opt.step()
    assert mamba.loss_and_accuracy(model, ids, y)[0].item() < first / 10


def test_the_answers_of_a_text_are_the_next_bytes_and_the_test_is_its_last_tenth(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(250)) * 8)
    text, test = mamba.load_text(tmp_path / "text")
    assert text.tolist() == [*range(250)] * 7 + [*range(50)] and test.tolist() == [*range(50, 250)]
    args = mamba.parse(["--quick", "--out", str(tmp_path)])[0]
    args.task = "lm"
    ids, answers = mamba.batch(args, 6, text, 1)
    assert ids.shape == answers.shape == (6, 64) and (answers[:, :-1] == ids[:, 1:]).all()
    assert ((answers - ids) % 250 == 1).all()


@pytest.mark.parametrize("task", ["copying", "lm"])
def test_spy(task, tmp_path, monkeypatch):
    """Which data, which network and which rates a whole run really uses."""
    (tmp_path / "text").write_bytes(bytes(range(100)) * 18 + b"~" * 200)  # the test is all ~
    batches, rates, judged, drawn = [], [], [], []
    batch, evaluate, draw = mamba.batch, mamba.evaluate, mamba.draw_picture
    step = torch.optim.Adam.step

    def spy_batch(args, n, text, step):
        batches.append((step, n, None if text is None else text.max().item()))
        return batch(args, n, text, step)

    def spy_step(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    def spy_evaluate(models, ids, answers):
        judged.append(({n: m.backbone.layers[0].mixer.selective for n, m in models.items()}, ids))
        return evaluate(models, ids, answers)

    def spy_draw(path, models, ids):
        drawn.append((list(models), ids.shape[0]))
        return draw(path, models, ids)

    monkeypatch.setattr(mamba, "batch", spy_batch)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    monkeypatch.setattr(mamba, "evaluate", spy_evaluate)
    monkeypatch.setattr(mamba, "draw_picture", spy_draw)
    flags = ["--data", str(tmp_path / "text")] if task == "lm" else []
    mamba.main(["--quick", "--lr", ".01", "--task", task, "--out", str(tmp_path), *flags])

    train, test = (99, 126) if task == "lm" else (None, None)
    steps = [(s, 4, train) for s in (1, 2, 3, 4)]
    assert batches == [*steps, *steps, (1_000_000_000, 64, test)]
    assert rates == pytest.approx([0.0075, 0.005, 0.0025, 0.0] * 2)
    assert judged[0][0] == {"selective": True, "LTI": False} and len(judged[0][1]) == 64
    assert drawn == [(["selective", "LTI"], 1)]


def test_training_sequences_grow_and_the_test_has_full_length(tmp_path):
    args = mamba.parse(["--quick", "--out", str(tmp_path)])[0]
    args.steps = 60
    grown = [mamba.batch(args, 1, None, step)[0].shape[1] - 8 for step in range(1, 61)]
    assert grown == sorted(grown) and set(grown) == {24, 40, 56, 72, 88, 104}
    assert mamba.batch(args, 1, None, 1_000_000_000)[0].shape[1] - 8 == 104


def test_the_pictures_step_sizes_are_those_the_scan_gets(monkeypatch):
    model, ids, got = small(), torch.randint(11, (1, 12)), []
    scan = mamba.selective_scan

    def spy(u, dt, *rest, **how):
        got.append(dt)
        return scan(u, dt, *rest, **how)

    monkeypatch.setattr(mamba, "selective_scan", spy)
    dt = mamba.step_sizes(model, ids)  # (D, L)
    means = dt.mean(1)
    assert dt.shape == (16, 12) and (means[1:] >= means[:-1]).all()
    torch.testing.assert_close(dt.sort(0).values, got[0][0].T.sort(0).values)
    lti = mamba.step_sizes(small(selective=False), ids)
    assert (lti == lti[:, :1]).all() and len(lti[:, 0].unique()) > 8  # the same at each position


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert mamba.main(["--out", str(tmp_path)]) >= 0.995
