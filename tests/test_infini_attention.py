"""infini_attention.py: memory against brute force, causality, gates, segments, the demo."""

import math
import signal

import pytest
import torch
import torch.nn.functional as F

import infini_attention as infini
from infini_attention import InfiniAttention, InfiniTransformer, passkey_batch, retrieve, update

QUICK = ["--quick", "--device", "cpu"]


def model(segment=8, seed=0, **kwargs):
    torch.manual_seed(seed)
    net = InfiniTransformer(28, 16, 2, 2, segment, **kwargs)
    for block in net.blocks:  # gates of their own, so that a swap of heads shows
        block.attention.beta.data = torch.randn(2)
    return net


def ids(n, length, seed=0):
    return torch.randint(0, 28, (n, length), generator=torch.Generator().manual_seed(seed))


# the memory


def test_retrieve_and_update_by_hand():
    """d = 1: sigma(1) = 2, sigma(0) = 1, sigma(-log 2) = 1/2."""
    k, v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), torch.tensor([3.0, 6.0]).view(1, 1, 2, 1)
    empty = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)
    M, z = update(k, v, *empty, delta=False)
    assert M.item() == 2 * 3 + 1 * 6 and z.item() == 3  # Eq. 4
    q = torch.tensor([-math.log(2)]).view(1, 1, 1, 1)
    assert retrieve(q, M, z).item() == pytest.approx(0.5 * 12 / (0.5 * 3))  # Eq. 3
    M2, z2 = update(k, v, M, z, delta=True)  # the memory answers 4 to every k: 3 - 4 and 6 - 4
    assert M2.item() == pytest.approx(12 + 2 * (3 - 4) + 1 * (6 - 4)) and z2.item() == 6  # Eq. 5


@pytest.mark.parametrize("delta", [False, True])
def test_memory_equals_loops_over_tokens(delta):
    torch.manual_seed(0)
    B, h, N, d = 2, 3, 5, 4
    q, k, v, k2, v2 = torch.randn(5, B, h, N, d).double()
    zero = torch.zeros(B, h, d, d).double(), torch.zeros(B, h, d).double()
    M, z = update(k2, v2, *update(k, v, *zero, delta), delta)
    got = retrieve(q, M, z)
    for b in range(B):
        for i in range(h):
            m, n = torch.zeros(d, d).double(), torch.zeros(d).double()
            for keys, values in ((k, v), (k2, v2)):
                before, known = m.clone(), n.clone()
                for t in range(N):
                    s = F.elu(keys[b, i, t]) + 1
                    value = values[b, i, t]
                    if delta and known.any():
                        value = value - s @ before / (s @ known)
                    m += torch.outer(s, value)
                    n += s
            for t in range(N):
                s = F.elu(q[b, i, t]) + 1
                torch.testing.assert_close(got[b, i, t], s @ m / (s @ n))


@pytest.mark.parametrize("delta", [False, True])
def test_gradients_of_the_memory(delta):
    """Through writing, M and z alike: against finite differences."""
    torch.manual_seed(0)
    q, k, v, k2, v2 = (x.requires_grad_() for x in torch.randn(5, 1, 1, 3, 2).double())
    zero = torch.zeros(1, 1, 2, 2).double(), torch.zeros(1, 1, 2).double()

    def read(q, k, v, k2, v2):
        return retrieve(q, *update(k2, v2, *update(k, v, *zero, delta), delta))

    assert torch.autograd.gradcheck(read, (q, k, v, k2, v2))


def test_linear_memory_is_a_weighted_mean_of_the_values():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 6, 4)
    v = torch.ones(1, 2, 6, 4) * 7
    memory = update(k, v, torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4), False)
    torch.testing.assert_close(retrieve(q, *memory), v)


def test_delta_does_not_store_twice_what_it_knows():
    k, v = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
    once = update(k, v, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4), True)
    twice = update(k, v, *once, True)
    torch.testing.assert_close(twice[0], once[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(update(k, v, *once, False)[0], once[0])


def test_memory_is_float32_under_autocast():
    """In bfloat16 a sum of 600 segments would have stopped to grow at some 260 of them."""
    layer, x, memory = InfiniAttention(8, 2), torch.randn(1, 16, 8), None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(600):
            _, memory = layer(x, memory)
        _, once = layer(x)
    assert memory[0].dtype == memory[1].dtype == torch.float32
    torch.testing.assert_close(memory[1], 600 * once[1], rtol=1e-3, atol=0)


def test_an_empty_memory_answers_zero_with_finite_gradients():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    out = retrieve(q, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4))
    assert (out == 0).all()
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


# attention


def reference(layer, x):
    """Plain causal attention with the layer's weights and rotary positions, a loop over tokens."""
    B, N, D = x.shape
    h, d = layer.heads, D // layer.heads
    q, k, v = ((x @ w.T).view(B, N, h, d).transpose(1, 2) for w in layer.qkv.weight.split(D))
    q, k, out = infini.rotate(q), infini.rotate(k), torch.zeros(B, h, N, d)
    for t in range(N):
        w = torch.softmax((q[:, :, t : t + 1] * k[:, :, : t + 1]).sum(-1) / math.sqrt(d), -1)
        out[:, :, t] = (w[..., None] * v[:, :, : t + 1]).sum(2)
    return out.transpose(1, 2).reshape(B, N, D) @ layer.out.weight.T


@pytest.mark.parametrize("N", [1, 2, 7])
def test_one_segment_with_the_gate_shut_is_causal_attention(N):
    torch.manual_seed(0)
    layer, x = InfiniAttention(12, 3), torch.randn(2, N, 12)
    layer.beta.data.fill_(-100.0)
    torch.testing.assert_close(layer(x)[0], reference(layer, x), atol=1e-5, rtol=1e-4)


def test_second_segment_mixes_memory_and_segment_by_the_gate_of_each_head():
    torch.manual_seed(0)
    layer, x = InfiniAttention(12, 3, delta=False), torch.randn(2, 10, 12)
    layer.beta.data = torch.tensor([-1.0, 0.5, 2.0])
    _, memory = layer(x[:, :5])
    got, _ = layer(x[:, 5:], memory)
    q, k, v = ((x @ w.T).view(2, 10, 3, 4).transpose(1, 2) for w in layer.qkv.weight.split(12))
    weights = infini.sigma(q[:, :, 5:]) @ infini.sigma(k[:, :, :5]).transpose(2, 3)
    A_mem = weights @ v[:, :, :5] / weights.sum(-1, keepdim=True)
    local = InfiniAttention(12, 3, local_only=True)
    local.load_state_dict(layer.state_dict())
    local.out.weight.data = torch.eye(12)
    A_dot = local(x[:, 5:])[0].view(2, 5, 3, 4).transpose(1, 2)
    gate = torch.sigmoid(layer.beta)[:, None, None]
    A = (gate * A_mem + (1 - gate) * A_dot).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(got, A @ layer.out.weight.T, atol=1e-5, rtol=1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    q, k = (infini.rotate(x.expand(1, 1, 9, 8)) for x in (q, k))
    scores = (q @ k.transpose(2, 3))[0, 0]
    torch.testing.assert_close(scores[5, 3], scores[8, 6])
    assert (scores[5, 3] - scores[5, 1]).abs() > 1e-4


# the decoder


@pytest.mark.parametrize("segment", [1, 3, 5, 8, 17])
@pytest.mark.parametrize("delta", [False, True])
def test_no_token_sees_the_future(segment, delta):
    net, x = model(segment, delta=delta), ids(1, 17)
    before = net(x)
    for t in (0, 4, 8, 16):
        y = x.clone()
        y[:, t] = (y[:, t] + 1) % 28
        after = net(y)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t:], before[:, t:])


def test_the_past_is_seen_through_the_memory_alone():
    x, y = ids(1, 24), ids(1, 24)
    y[:, 2] = (y[:, 2] + 1) % 28  # in the first of three segments
    with_memory, local = model(8), model(8, local_only=True)
    assert not torch.allclose(with_memory(x)[:, -1], with_memory(y)[:, -1])
    assert torch.equal(local(x)[:, 8:], local(y)[:, 8:])


def test_segments_do_not_change_the_local_part():
    net, x = model(8), ids(2, 19)
    for block in net.blocks:
        block.attention.beta.data.fill_(-100.0)
    alone = torch.cat([net.read(part)[0] for part in x.split(8, 1)], 1)
    torch.testing.assert_close(net(x), alone)
    whole = model(19, local_only=True)
    whole.load_state_dict(net.state_dict())
    net.segment = 19
    torch.testing.assert_close(net(x), whole(x))


def test_last_and_a_memory_handed_on_give_the_same_logits():
    net, x = model(8), ids(2, 32)
    y = net(x)
    torch.testing.assert_close(net(x, last=5), y[:, -5:])
    torch.testing.assert_close(net(x, last=11), y[:, -11:])
    memory = None
    for part in x[:, :16].split(8, 1):
        memory = net.read(part, memory)[1]
    torch.testing.assert_close(net(x[:, 16:], memory), y[:, 16:])


def test_gradients_cross_the_segments_and_reach_every_parameter():
    net = model(8)
    seen = []

    def keep(module, inputs, out):
        out.retain_grad()
        seen.append(out)

    net.embedding.register_forward_hook(keep)
    net(ids(2, 24))[:, -1].square().sum().backward()
    assert len(seen) == 3 and seen[0].grad.abs().sum() > 0  # writing is learned from reading
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    local = model(8, local_only=True)
    local(ids(2, 24)).square().sum().backward()
    assert all(block.attention.beta.grad is None for block in local.blocks)


def test_generate_equals_a_forward_per_token():
    net, x = model(4), ids(2, 6)
    got, want = net.generate(x, 9), x
    for _ in range(9):
        want = torch.cat([want, net(want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)


def test_memory_does_not_grow_and_is_counted_right():
    net = model(8)
    _, short = net.read(ids(1, 8))
    _, long = net.read(ids(1, 8), short)
    size = sum(t.numel() * t.element_size() for layer in long for t in layer)
    assert size == sum(t.numel() * t.element_size() for layer in short for t in layer)
    assert net.memory_bytes(1000) == (size, 2 * 2 * 1000 * 16 * 4)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="twice the heads"):
        InfiniAttention(12, 4)


# data and training


def test_passkey_batch_holds_its_answers():
    x, y = passkey_batch(200, 4, 16, torch.Generator().manual_seed(0))
    assert x.shape == (200, 64) and y.shape == (200, 3) and ((y >= 0) & (y < 10)).all()
    place = (x == infini.KEY).nonzero()[:, 1]
    assert len(place) == 200 and (place % 16 <= 12).all() and (place < 48).all()
    assert set((place // 16).tolist()) == {0, 1, 2}
    for i in range(3):
        assert torch.equal(x[torch.arange(200), place + 1 + i], y[:, i])
    assert (x[:, -3] == infini.ASK).all() and torch.equal(x[:, -2:], y[:, :2])
    rest = x[:, :-3][(x[:, :-3] >= infini.FILLER)]
    assert len(rest) == 200 * (61 - 4)  # nothing but the key, the question and filler
    for depth, want in ((0, 0), (0.5, 1), (1, 2)):
        x, _ = passkey_batch(9, 4, 16, torch.Generator().manual_seed(0), depth)
        assert ((x == infini.KEY).nonzero()[:, 1] // 16 == want).all()


def test_loss_starts_at_ln_V_and_falls_on_one_batch():
    torch.manual_seed(0)
    net = InfiniTransformer(infini.VOCAB, 32, 2, 2, 8)
    x, y = passkey_batch(8, 3, 8, torch.Generator().manual_seed(0))
    opt, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(60):
        loss = F.cross_entropy(net(x, last=3).flatten(0, 1), y.flatten())
        losses.append(loss.item())
        opt.zero_grad(), loss.backward(), opt.step()
    assert losses[0] == pytest.approx(math.log(infini.VOCAB), abs=0.5)
    assert losses[-1] < losses[0] / 4


def test_quick_runs_and_draws(tmp_path, capsys):
    assert infini.main([*QUICK, "--out", str(tmp_path), "--update", "delta"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("infini_attention | ") and "parameters" in lines[0]
    assert "test acc" in lines[-1] and "local only" in lines[-1] and "chance" in lines[-1]
    assert (tmp_path / "infini_attention.png").stat().st_size > 10_000


def test_save_interrupt_and_continue_equal_an_unbroken_run(tmp_path, monkeypatch):
    base = [*QUICK, "--out", str(tmp_path), "--log-every", "1"]
    a, b, c = (str(tmp_path / f"{n}.pt") for n in "abc")
    assert infini.main([*base, "--steps", "6", "--save", a]) == 0
    draw, calls = infini.passkey_batch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(infini, "passkey_batch", interrupted)
    assert infini.main([*base, "--steps", "6", "--save", b]) == 130
    monkeypatch.setattr(infini, "passkey_batch", draw)
    assert torch.load(b, weights_only=True)["step"] == 3
    assert infini.main([*base, "--load", b, "--steps", "6", "--save", c]) == 0
    a, c = (torch.load(f, weights_only=True) for f in (a, c))
    assert a["history"] == c["history"] and c["step"] == 6


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    base = [*QUICK, "--out", str(tmp_path), "--log-every", "1", "--save", str(tmp_path / "a.pt")]
    cross, calls = F.cross_entropy, []

    def bad(*args):
        calls.append(1)
        return cross(*args) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(infini.F, "cross_entropy", bad)
    assert infini.main([*base, "--steps", "6"]) == 1
    assert "nan at step 3" in capsys.readouterr().err
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--heads", "3"], "twice the heads"),
        (["--segments", "1"], "--segments must lie"),
        (["--segment", "4"], "--segment must lie"),
        (["--update", "none"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(flags, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        infini.main([*QUICK, "--out", str(tmp_path), *flags])
    assert stop.value.code == 2 and word in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_another_size_is_refused(tmp_path, capsys):
    base, path = [*QUICK, "--out", str(tmp_path)], str(tmp_path / "a.pt")
    assert infini.main([*base, "--save", path]) == 0
    with pytest.raises(SystemExit) as stop:
        infini.main([*base, "--load", path, "--dim", "32"])
    assert stop.value.code == 2 and "size mismatch" in capsys.readouterr().err.splitlines()[-1]
    optimizers = infini.parse([*base, "--load", path, "--lr", "0.02"])[2]  # the flag goes first
    assert [g["peak"] for g in optimizers["memory"].param_groups] == [0.02, 0.2]


def test_target_decides_the_exit_status(tmp_path):
    assert infini.main([*QUICK, "--out", str(tmp_path), "--target", "1.01"]) == 1


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    """At 8 times the trained length: the README's mean less its spread."""
    assert infini.main(["--out", str(tmp_path), "--target", ".59"]) == 0
