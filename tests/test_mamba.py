"""mamba.py: scan == loop == brute force, gradients, states, padding, checkpoints, the demo."""

import argparse
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import mamba
from mamba import Mamba, MambaBlock, lti_convolution, selective_scan, selective_scan_ref


def inputs(B=2, L=37, D=5, N=3, dtype=torch.float64, top=0.5):
    u, B_, C = torch.randn(B, L, D), torch.randn(B, L, N), torch.randn(B, L, N)
    dt = torch.rand(B, L, D) * top + 1e-4
    A, skip, h0 = -torch.rand(D, N) * 3 - 0.1, torch.randn(D), torch.randn(B, D, N)
    return [x.to(dtype) for x in (u, dt, A, B_, C, skip, h0)]


def rel(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def test_ref_equals_a_loop_over_scalars():
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


@pytest.mark.parametrize("L", [1, 2, 15, 16, 17, 31, 37, 64, 101])
@pytest.mark.parametrize("batch", [1, 3])
def test_scan_equals_loop_values_and_gradients(L, batch):
    a = [x.requires_grad_() for x in inputs(batch, L)]
    b = [x.detach().clone().requires_grad_() for x in a]
    y, h = selective_scan(*a, return_state=True, compile=False)
    y_ref, h_ref = selective_scan_ref(*b)
    wy, wh = torch.randn_like(y), torch.randn_like(h)
    ((y * wy).sum() + (h * wh).sum()).backward()
    ((y_ref * wy).sum() + (h_ref * wh).sum()).backward()
    assert rel(y, y_ref) < 1e-12 and rel(h, h_ref) < 1e-12
    for p, q in zip(a, b):
        assert rel(p.grad, q.grad) < 1e-11


@pytest.mark.parametrize("B,L,D,N", [(1, 70, 2, 3), (3, 300, 40, 20), (1, 33, 700, 16)])
def test_time_splits_do_not_change_the_result(B, L, D, N):
    """From many splits over time (few lanes) to one (many lanes): the same numbers."""
    a = inputs(B, L, D, N)
    assert rel(selective_scan(*a, compile=False), selective_scan_ref(*a)[0]) < 1e-12


def test_a_batch_too_large_for_the_cache_runs_in_pieces_and_none_is_lost():
    B, L, D, N = 5, 20, 128, 128  # 2^15 / (D N) = 2 rows at a time: pieces of 2, 2 and 1
    a = [torch.randn(B, L, D), torch.rand(B, L, D) * 0.1, -torch.rand(D, N), torch.randn(B, L, N)]
    a += [torch.randn(B, L, N), torch.ones(D), torch.randn(B, D, N)]
    a = [x.requires_grad_() for x in a]
    y, h = selective_scan(*a, return_state=True, compile=False)
    want_y, want_h = selective_scan_ref(*a)
    torch.testing.assert_close((y, h), (want_y, want_h), rtol=1e-4, atol=1e-4)
    got, want = (
        torch.autograd.grad((y * y).sum() + h.sum(), a) for y, h in ((y, h), (want_y, want_h))
    )
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


def test_gradcheck_of_the_hand_written_backward():
    a = [x.requires_grad_() for x in inputs(1, 19, 2, 2)]
    scan = lambda *a: selective_scan(*a, return_state=True, compile=False)  # noqa: E731
    assert torch.autograd.gradcheck(scan, a)


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


def test_compiled_equals_eager_with_gradients():
    a = [x.requires_grad_() for x in inputs(2, 50, dtype=torch.float32)]
    out = []
    for compile in (False, True):
        y = selective_scan(*a, compile=compile)
        out.append([y, *torch.autograd.grad(y.square().sum(), a)])
    for p, q in zip(*out):
        assert rel(p, q) < 1e-5


def test_without_a_compiler_it_says_so_once_and_runs(capsys, monkeypatch):
    def broken(kernel):
        def run(*args):
            raise RuntimeError("g++ not found")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    mamba._compiled.cache_clear()
    a = inputs(2, 50)
    for _ in range(2):
        assert rel(selective_scan(*a), selective_scan_ref(*a)[0]) < 1e-12
    assert capsys.readouterr().err.count("g++ not found") == 1
    mamba._compiled.cache_clear()


def test_backward_keeps_less_than_twice_the_inputs():
    a = [x.requires_grad_() for x in inputs(2, 256, 32, 16, dtype=torch.float32)[:6]]
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(*a, compile=False)
    assert sum(kept.values()) <= 2 * sum(x.numel() * x.element_size() for x in a)


def test_wrong_shapes_are_named():
    a = inputs()
    with pytest.raises(ValueError, match="B has shape"):
        selective_scan(a[0], a[1], a[2], a[3][:, 1:], *a[4:])
    with pytest.raises(ValueError, match="h0 has shape"):
        selective_scan(*a[:6], a[6][:1])


def test_lti_convolution_equals_the_recurrence():
    """With constant dt, B, C the scan and the convolution are one thing (Eq. 2 and Eq. 3)."""
    u, dt, A, B, C, D, _ = inputs(2, 23, 4, 3)
    dt, B, C = dt[0, 0], torch.randn(4, 3).double(), torch.randn(4, 3).double()
    h, ys = torch.zeros(2, 4, 3).double(), []
    for t in range(23):
        h = torch.exp(dt[:, None] * A) * h + (dt * u[:, t])[..., None] * B
        ys.append((h * C).sum(-1) + D * u[:, t])
    assert rel(lti_convolution(u, dt, A, B, C, D), torch.stack(ys, 1)) < 1e-10


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


def test_block_equals_the_official_forward_written_out():
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


@pytest.mark.parametrize("selective", [True, False])
def test_left_padding_does_not_change_the_result(selective):
    model, ids = small(selective=selective), torch.randint(11, (2, 21))
    padded = torch.cat([torch.randint(11, (2, 9)), ids], 1)
    mask = torch.ones_like(padded).index_fill(1, torch.arange(9), 0)
    torch.testing.assert_close(model(padded, mask=mask)[:, 9:], model(ids), rtol=1e-4, atol=1e-6)
    assert (model(padded)[:, 9:] - model(ids)).abs().max() > 1e-5  # the mask is what does it


def test_generate_is_greedy_prefix_consistent_and_top_k():
    model, ids = small(), torch.randint(11, (2, 20))
    out = model.generate(ids, 5, temperature=0)
    for t in range(20, 25):  # each token is the most likely one after the whole prefix
        assert (out[:, t] == model(out[:, :t])[:, -1].argmax(-1)).all()
    assert (model.generate(ids, 5, top_k=1) == out).all()


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


@pytest.mark.parametrize("tied", [True, False])
def test_from_checkpoint_finds_the_sizes(tied, tmp_path):
    model, ids = small(d_conv=3, expand=3, dt_rank=5), torch.randint(11, (2, 20))
    weights = model.state_dict()
    if not tied:
        del weights["lm_head.weight"]  # some published files leave the tied head out
    torch.save(weights, tmp_path / "m.bin")
    again = Mamba.from_checkpoint(tmp_path / "m.bin", compile=False)
    torch.testing.assert_close(again(ids), model(ids))


def test_initialisation_is_the_official_one():
    block = MambaBlock(64)
    torch.testing.assert_close(block.A_log[3].exp(), torch.arange(1.0, 17))
    assert (block.D == 1).all()
    dt = F.softplus(block.dt_proj.bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101 and 0.005 < dt.median() < 0.02
    assert block.dt_proj.weight.abs().max() <= block.dt_rank**-0.5


@pytest.mark.parametrize("selective", [True, False])
def test_every_parameter_gets_a_gradient(selective):
    model = small(selective)
    model(torch.randint(11, (2, 20))).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_bf16_autocast_forward_and_backward():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(
            model(torch.randint(11, (2, 20))).flatten(0, 1).float(), torch.randint(11, (40,))
        )
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_kernels_make_the_same_a_bar_as_the_cpu_gets_beforehand():
    """A GPU's kernels take A (N, D) in the place of A_bar."""
    u, dt, A, B, C, _, h = inputs(2, 6, 5, 3)
    A, h, dy = A.t(), h.transpose(1, 2), torch.randn_like(u)
    A_bar = mamba._decay(dt, A)
    torch.testing.assert_close(A_bar, torch.exp(dt[:, :, None] * A))
    rest = (u, dt, B, C, h)
    for p, q in zip(mamba._chunk_forward(A_bar, *rest), mamba._chunk_forward(A, *rest)):
        torch.testing.assert_close(p, q)
    rest += (dy, A, h, torch.zeros_like(h))
    for p, q in zip(mamba._chunk_backward(A_bar, *rest), mamba._chunk_backward(A, *rest)):
        torch.testing.assert_close(p, q)


def test_copying_batch_holds_its_answers():
    ids, y = mamba.copying_batch(5, 40, torch.Generator().manual_seed(1))
    assert ids.shape == (5, 48) and (ids[:, 40:] == 15).all() and (y > 0).all() and (y < 15).all()
    for row, answer in zip(ids[:, :40], y):
        assert row[row > 0].tolist() == answer.tolist()


def test_induction_batch_holds_its_answers():
    ids, y = mamba.induction_batch(50, 30, torch.Generator().manual_seed(1))
    for row, answer in zip(ids.tolist(), y[:, 0].tolist()):
        assert row.count(15) == 2 and row[-1] == 15 and row[row.index(15) + 1] == answer


@pytest.mark.parametrize("length", [20, 31, 32, 104])
def test_training_sequences_grow_by_chunks_and_end_at_full_length(length):
    args = argparse.Namespace(
        task="copying", seed=0, steps=200, length=length, batch_size=1, device="cpu"
    )
    grown = [mamba.batch(args, step)[0].shape[1] - 8 for step in range(1, 201)]
    assert grown == sorted(grown) and grown[0] < 32 and set(grown[179:]) == {length}
    assert {n % 16 for n in grown} == {length % 16} and len(set(grown)) == length // 16


def test_loss_starts_at_ln_V_and_falls_on_one_batch():
    model = Mamba(16, 32, 2, compile=False)
    ids, y = mamba.copying_batch(4, 12, torch.Generator().manual_seed(0))
    loss = lambda: F.cross_entropy(model(ids)[:, -8:].flatten(0, 1), y.flatten())  # noqa: E731
    first = loss().item()
    assert abs(first - math.log(16)) < 0.15
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        opt.zero_grad()
        loss().backward()
        opt.step()
    assert loss().item() < first / 10


# ---- the script ----

QUICK = ["--quick", "--batch-size", "2"]


@pytest.mark.parametrize("task", ["copying", "induction", "lm"])
def test_quick_runs_and_draws(task, tmp_path, capsys):
    (tmp_path / "text").write_bytes(bytes(range(32, 120)) * 40)
    args = ["--task", task, "--data", str(tmp_path / "text"), "--out", str(tmp_path / "o")]
    assert mamba.main([*QUICK, *args]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mamba | ") and "test " in out.splitlines()[-1]
    assert (tmp_path / "o" / "mamba.png").stat().st_size > 5000


def test_save_interrupt_and_continue_equal_an_unbroken_run(tmp_path, monkeypatch, capsys):
    base = [*QUICK, "--log-every", "1", "--out", str(tmp_path)]
    assert mamba.main([*base, "--steps", "6", "--save", str(tmp_path / "a.pt")]) == 0
    batch, calls = mamba.copying_batch, []

    def interrupted(*args):  # Ctrl-C during step 3: the step is finished, saved, evaluated
        calls.append(1)
        if len(calls) == 3:
            import signal

            signal.raise_signal(signal.SIGINT)
        return batch(*args)

    monkeypatch.setattr(mamba, "copying_batch", interrupted)
    assert mamba.main([*base, "--steps", "6", "--save", str(tmp_path / "b.pt")]) == 130
    assert "test acc" in capsys.readouterr().out
    monkeypatch.setattr(mamba, "copying_batch", batch)
    half = torch.load(tmp_path / "b.pt", weights_only=True)
    assert half["step"] == 3
    more = ["--load", str(tmp_path / "b.pt"), "--steps", "6", "--save", str(tmp_path / "c.pt")]
    assert mamba.main([*base, *more]) == 0
    a, c = (torch.load(tmp_path / f, weights_only=True) for f in ("a.pt", "c.pt"))
    assert a["history"] == c["history"] and a["step"] == c["step"] == 6
    for name, weights in a["models"].items():
        for key, value in weights.items():
            assert torch.equal(value, c["models"][name][key]), key
    assert not list(tmp_path.glob("*.tmp"))


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    save = ["--save", str(tmp_path / "a.pt"), "--out", str(tmp_path)]
    cross, calls = F.cross_entropy, []

    def poisoned(*args):
        calls.append(1)
        return cross(*args) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(F, "cross_entropy", poisoned)
    assert mamba.main([*QUICK, "--log-every", "1", *save]) == 1
    assert "at step 3" in capsys.readouterr().err
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 2


def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"script": "vit"}, "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "file").write_bytes(b"abc")
    assert mamba.main([*QUICK, "--save", "a.pt"]) == 0
    capsys.readouterr()
    torch.save(torch.load("a.pt") | {"models": {}}, "broken.pt")
    for bad in (
        ["--load", "other.pt"], ["--load", "junk.pt"], ["--load", "broken.pt"], ["--task", "lm"],
        ["--steps", "-1"], ["--task", "lm", "--data", "file"],
        ["--task", "lm", "--data", "no-such"],
        ["--out", "file/x"], ["--save", "no/such/folder.pt"], ["--length", "3"],
        ["--load", "a.pt", "--task", "induction"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            mamba.main(["--quick", *bad])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "error: " in err.splitlines()[-1], bad
    assert not list(tmp_path.glob("**/*.tmp"))


def test_target_decides_the_exit_status(tmp_path):
    out = ["--out", str(tmp_path)]
    assert mamba.main([*QUICK, *out, "--target", "2"]) == 1
    assert mamba.main([*QUICK, *out, "--target", "0"]) == 0


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}  # as a reader runs it
    command = [sys.executable, mamba.__file__, "--out", str(tmp_path), "--target", ".9990"]
    assert subprocess.run(command, env=env, timeout=3600).returncode == 0
