"""infini_attention.py: the memory against loops, causality, gates, segments, the demo."""

import math

import pytest
import torch
import torch.nn.functional as F

import infini_attention as infini
from infini_attention import (
    InfiniAttention,
    InfiniTransformer,
    memory_weights,
    passkey_batch,
    retrieve,
    update,
)


def model(segment=8, **kwargs):
    net = InfiniTransformer(28, 16, 2, 2, segment, **kwargs)
    for block in net.blocks:  # gates of their own, so that a swap of heads shows
        block.attention.beta.data = torch.randn(2)
    return net


def ids(n, length, vocab=28):
    return torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(0))


def empty(B, h, d):
    return torch.zeros(B, h, d, d).double(), torch.zeros(B, h, d).double()


# ---- the memory ----


def test_read_and_write_by_hand():
    """d = 1: sigma(1) = 2, sigma(0) = 1, sigma(-log 2) = 1/2."""
    k, v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1), torch.tensor([3.0, 6.0]).view(1, 1, 2, 1)
    M, z = update(k, v, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), delta=False)
    assert M.item() == 2 * 3 + 1 * 6 and z.item() == 3  # Eq. 4
    q = torch.tensor([-math.log(2)]).view(1, 1, 1, 1)
    assert retrieve(q, M, z).item() == pytest.approx(0.5 * 12 / (0.5 * 3))  # Eq. 3
    M2, z2 = update(k, v, M, z, delta=True)  # the memory answers 4 to every k: 3 - 4 and 6 - 4
    assert M2.item() == pytest.approx(12 + 2 * (3 - 4) + 1 * (6 - 4)) and z2.item() == 6  # Eq. 5


@pytest.mark.parametrize("delta", [False, True])
def test_the_memory_equals_loops_over_tokens(delta):
    B, h, N, d = 2, 3, 5, 4
    q, k, v, k2, v2 = torch.randn(5, B, h, N, d).double()
    got = retrieve(q, *update(k2, v2, *update(k, v, *empty(B, h, d), delta), delta))
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


@pytest.mark.parametrize("n", [1, 7, 40])
def test_reading_is_a_weighted_mean_of_all_past_values(n):
    """Kernel attention over all past tokens, and M and z in its place, are equal."""
    q, k, v = torch.randn(2, 3, 5, 4).double(), *torch.randn(2, 2, 3, n, 4).double()
    weights = memory_weights(q, k)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(3), torch.ones(2, 3, 5).double())
    for i in range(n):  # the definition: sigma(q) . sigma(k_i), normalised over i
        own = (infini.sigma(q) * infini.sigma(k[:, :, i : i + 1])).sum(3)
        total = sum((infini.sigma(q) * infini.sigma(k[:, :, j : j + 1])).sum(3) for j in range(n))
        torch.testing.assert_close(weights[..., i], own / total)
    torch.testing.assert_close(weights @ v, retrieve(q, *update(k, v, *empty(2, 3, 4), False)))


@pytest.mark.parametrize("delta", [False, True])
def test_gradients_of_the_memory(delta):
    """Through writing, M and z alike: against finite differences."""
    a = [x.requires_grad_() for x in torch.randn(5, 1, 1, 3, 2).double()]

    def read(q, k, v, k2, v2):
        return retrieve(q, *update(k2, v2, *update(k, v, *empty(1, 1, 2), delta), delta))

    assert torch.autograd.gradcheck(read, a)


def test_the_defect_of_the_delta_rule():
    """A pair that is stored again, however often, is answered by half its value."""
    k, v = torch.randn(2, 1, 1, 1, 4).double()
    once = memory = update(k, v, *empty(1, 1, 4), True)
    torch.testing.assert_close(retrieve(k, *once), v)
    for i in range(5):
        memory = update(k, v, *memory, True)
        if i == 0:
            torch.testing.assert_close(memory[0], once[0])  # M takes nothing in, z grows
            torch.testing.assert_close(memory[1], 2 * once[1])
        torch.testing.assert_close(retrieve(k, *memory), v / 2)
    plain = update(k, v, *once, False)
    torch.testing.assert_close(retrieve(k, *plain), v)
    # in one segment nothing is subtracted: both tokens ask the memory of the segment before
    twice = update(k.expand(1, 1, 2, 4), v.expand(1, 1, 2, 4), *empty(1, 1, 4), True)
    torch.testing.assert_close(twice, plain)


@pytest.mark.parametrize("n", [128, 1024, 8192])
def test_the_table_of_section_2(n):
    """A matching key among n random ones: softmax finds it, the memory gives it 1.5 / n."""
    soft, memory = [], []
    for _ in range(10):
        k = torch.randn(1, 1, n, 128)
        q = k[:, :, :1]
        soft.append((q @ k.mT / math.sqrt(128)).softmax(3)[..., 0].mean())
        memory.append(memory_weights(q, k)[..., 0].mean() * n)
    assert abs(torch.stack(memory).mean() - 1.46) < 0.05
    want = {128: 0.995, 1024: 0.94, 8192: 0.80}[n]
    assert abs(torch.stack(soft).mean() - want) < 0.12


def test_an_empty_memory_answers_zero_with_finite_gradients():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    out = retrieve(q, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4))
    assert (out == 0).all()
    out.sum().backward()
    assert torch.isfinite(q.grad).all()


def test_the_memory_is_float32_under_autocast():
    """In bfloat16 a sum of 600 segments would have stopped to grow at some 260 of them."""
    layer, x, memory = InfiniAttention(8, 2), torch.randn(1, 16, 8), None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(600):
            _, memory = layer(x, memory)
        _, once = layer(x)
    assert memory[0].dtype == memory[1].dtype == torch.float32
    torch.testing.assert_close(memory[1], 600 * once[1], rtol=1e-3, atol=0)


# ---- the layer ----


def local_reference(layer, x):
    """A_dot: causal attention with the layer's weights and rotary positions, token by token."""
    B, N, D = x.shape
    h, d = layer.heads, D // layer.heads
    q, k, v = ((x @ w.T).view(B, N, h, d).transpose(1, 2) for w in layer.qkv.weight.split(D))
    q, k, out = infini.rotate(q), infini.rotate(k), torch.zeros(B, h, N, d)
    for t in range(N):
        w = torch.softmax((q[:, :, t : t + 1] * k[:, :, : t + 1]).sum(-1) / math.sqrt(d), -1)
        out[:, :, t] = (w[..., None] * v[:, :, : t + 1]).sum(2)
    return out.transpose(1, 2).reshape(B, N, D)


@pytest.mark.parametrize("N", [1, 2, 7])
def test_with_an_empty_memory_the_gate_weakens_local_attention(N):
    """One segment is (1 - sigmoid(beta)) of plain causal attention: one half at the start."""
    layer, x = InfiniAttention(12, 3), torch.randn(2, N, 12)
    assert layer.beta.tolist() == [0, 0, 0]  # a gate for each head
    want = local_reference(layer, x) @ layer.out.weight.T
    torch.testing.assert_close(layer(x)[0], want / 2, atol=1e-5, rtol=1e-4)
    layer.beta.data.fill_(-100.0)
    torch.testing.assert_close(layer(x)[0], want, atol=1e-5, rtol=1e-4)
    layer.local_only = True
    torch.testing.assert_close(layer(x)[0], want, atol=1e-5, rtol=1e-4)


def test_the_second_segment_mixes_memory_and_segment_by_the_gate_of_each_head():
    layer, x = InfiniAttention(12, 3), torch.randn(2, 10, 12)
    layer.beta.data = torch.tensor([-1.0, 0.5, 2.0])
    q, k, v = ((x @ w.T).view(2, 10, 3, 4).transpose(1, 2) for w in layer.qkv.weight.split(12))
    A_mem = memory_weights(q[:, :, 5:], k[:, :, :5]) @ v[:, :, :5]
    A_dot = local_reference(layer, x[:, 5:]).view(2, 5, 3, 4).transpose(1, 2)
    gate = torch.sigmoid(layer.beta)[:, None, None]
    A = (gate * A_mem + (1 - gate) * A_dot).transpose(1, 2).reshape(2, 5, 12)
    got = layer(x, segment=5)[0][:, 5:]
    torch.testing.assert_close(got, A @ layer.out.weight.T, atol=1e-5, rtol=1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    q, k = (infini.rotate(x.expand(1, 1, 9, 8)) for x in (q, k))
    scores = (q @ k.transpose(2, 3))[0, 0]
    torch.testing.assert_close(scores[5, 3], scores[8, 6])
    assert (scores[5, 3] - scores[5, 1]).abs() > 1e-4


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="twice the heads"):
        InfiniAttention(12, 4)


# ---- the decoder ----


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


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("L", [5, 16, 27])
def test_all_segments_at_once_equal_one_after_the_other(L, delta):
    """The outer loop may go over segments or over layers."""
    net, x = model(8, delta=delta), ids(2, L)
    memory, parts = None, []
    for part in x.split(8, 1):
        logits, memory = net.read(part, memory)
        parts.append(logits)
    torch.testing.assert_close(net(x), torch.cat(parts, 1))
    whole, after = net.read(x)
    torch.testing.assert_close(whole, torch.cat(parts, 1))
    torch.testing.assert_close(after, memory)
    torch.testing.assert_close(net(x, last=3), net(x)[:, -3:])


def test_a_text_longer_than_one_piece_and_a_memory_handed_on():
    net, x = model(2), ids(2, 300)  # a piece is 64 segments, 128 tokens
    whole, _ = net.read(x)
    torch.testing.assert_close(net(x), whole)
    torch.testing.assert_close(net(x, last=60), whole[:, -60:])
    torch.testing.assert_close(net(x[:, 100:], net.read(x[:, :100])[1]), whole[:, 100:])


def test_the_past_is_seen_through_the_memory_alone():
    x, y = ids(1, 24), ids(1, 24)
    y[:, 2] = (y[:, 2] + 1) % 28  # in the first of three segments
    with_memory, local = model(8), model(8, local_only=True)
    assert not torch.allclose(with_memory(x)[:, -1], with_memory(y)[:, -1])
    assert torch.equal(local(x)[:, 8:], local(y)[:, 8:])


def test_full_attention_is_local_attention_with_one_segment():
    net, x = model(10**9, local_only=True), ids(2, 19)
    other = model(19)
    other.load_state_dict(net.state_dict())
    for block in other.blocks:
        block.attention.beta.data.fill_(-100.0)
    torch.testing.assert_close(net(x), other(x))


def test_gradients_cross_the_segments_and_reach_every_parameter():
    net, seen = model(8), []

    def keep(module, inputs, out):
        out.retain_grad()
        seen.append(out)

    net.embedding.register_forward_hook(keep)
    net(ids(2, 24))[:, -1].square().sum().backward()
    # writing is learned from reading: the answer's gradient reaches the first segment
    assert all((seen[0].grad[:, part : part + 8] != 0).any() for part in (0, 8, 16))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    local = model(8, local_only=True)
    local(ids(2, 24)).square().sum().backward()
    assert all(block.attention.beta.grad is None for block in local.blocks)


def test_what_is_kept_does_not_grow_and_is_counted_right():
    net = model(8)
    _, short = net.read(ids(1, 8))
    _, long = net.read(ids(1, 80), short)
    size = sum(t.numel() * t.element_size() for layer in long for t in layer)
    assert size == sum(t.numel() * t.element_size() for layer in short for t in layer)
    assert net.memory_bytes(1000) == (size, 2 * 2 * 1000 * 16 * 4)  # layers, k and v


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_model_runs_in_every_dtype_near_float32(dtype):
    net, x = model(), ids(2, 20)
    want = net(x)
    got = net.to(dtype)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.1)


# ---- the demo ----


def test_passkey_batch_holds_its_answers():
    x, y = passkey_batch(200, 4, 16, torch.Generator().manual_seed(0))
    assert x.shape == (200, 64) and y.shape == (200, 3)
    for i in range(3):
        assert y[:, i].min() == 10 * i and y[:, i].max() == 10 * i + 9
    place = (x == 30).nonzero()[:, 1]
    assert len(place) == 200 and (place % 16 <= 12).all() and (place < 48).all()
    assert set((place // 16).tolist()) == {0, 1, 2} and set((place % 16).tolist()) == {*range(13)}
    for i in range(3):
        assert torch.equal(x[torch.arange(200), place + 1 + i], y[:, i])
    assert (x[:, -3] == 31).all() and torch.equal(x[:, -2:], y[:, :2])
    assert (x[:, :-3] >= 32).sum() == 200 * (61 - 4)  # nothing but the key, the question and filler
    for depth, want in ((0, 0), (0.5, 1), (1, 2)):
        x, _ = passkey_batch(9, 4, 16, torch.Generator().manual_seed(0), depth)
        assert ((x == 30).nonzero()[:, 1] // 16 == want).all()


def test_loss_starts_at_ln_V_and_falls_on_one_batch():
    net = InfiniTransformer(48, 32, 2, 2, 8)
    x, y = passkey_batch(8, 3, 8, torch.Generator().manual_seed(0))
    opt, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(60):
        loss = infini.losses_and_right(net, x, y)[0].mean()
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert losses[0] == pytest.approx(math.log(48), abs=0.3)
    assert losses[-1] < losses[0] / 4


def test_training_texts_grow_between_shorter_ones_and_each_step_has_its_own(tmp_path):
    args = infini.parse(["--out", str(tmp_path)])[0]
    batches = [infini.batch(args, None, step)[0] for step in range(1, args.steps + 1)]
    lengths = [x.shape[1] // 32 for x in batches]
    short, long = lengths[::2], lengths[1::2]  # steps 1, 3, .. and 2, 4, ..
    assert [long.count(n) for n in (2, 4, 8, 16, 32, 64)] == [80, 40, 40, 40, 40, 80]
    assert long == sorted(long) and all(2 <= a <= b for a, b in zip(short, long))
    assert set(short[-80:]) == set(range(2, 65))  # every length, also at the very end
    assert all(2048 <= x.numel() < 4096 for x in batches)  # longer texts, fewer of them
    different = len({tuple(x.flatten()[:60].tolist()) for x in batches})
    assert different == args.steps
    assert torch.equal(infini.batch(args, None, 7)[0], batches[6])
    args.seed = 1
    assert not torch.equal(infini.batch(args, None, 7)[0], batches[6])


def test_the_answers_of_a_text_are_the_next_bytes_and_the_test_is_its_last_tenth(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(250)) * 40)
    text, test = infini.load_text(tmp_path / "text")
    assert len(text) == 9000 and len(test) == 1000 and test[0] == 0 and text[-1] == 249
    args = infini.parse(["--quick", "--out", str(tmp_path)])[0]
    args.data = "text"
    x, answers = infini.batch(args, text, 1)
    assert x.shape == answers.shape == (2, 512) and (answers[:, :-1] == x[:, 1:]).all()
    assert ((answers - x) % 250 == 1).all()


def test_without_a_memory_only_the_answers_own_segment_is_read():
    net, x = model(8, local_only=True), ids(2, 24)
    y = torch.randint(28, (2, 3))
    seen = []
    net.embedding.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    losses, _ = infini.losses_and_right(net, x, y)
    assert seen[0].shape == (2, 8)
    want = F.cross_entropy(net(x)[:, -3:].flatten(0, 1), y.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), want)
    infini.losses_and_right(net, x, x)  # a text model answers at every position, and reads all
    assert seen[-1].shape == (2, 24)


@pytest.mark.parametrize("flags", [[], ["--update", "delta"]])
def test_the_rule_of_writing_reaches_every_layer(flags, tmp_path):
    net = infini.parse(["--out", str(tmp_path), *flags])[2]
    assert [block.attention.delta for block in net.blocks] == [bool(flags)] * 2


def test_a_key_counts_only_if_all_its_parts_are_right(tmp_path, monkeypatch):
    def half(net, x, y):
        right = torch.ones(len(y), 3).bool()
        right[::2, 1] = False
        return None, right

    monkeypatch.setattr(infini, "losses_and_right", half)
    args = infini.parse(["--out", str(tmp_path)])[0]
    figures = infini.evaluate(model(32), None, args)
    assert figures == {128: 0.5, 1024: 0.5, 8192: 0.5, 32768: 0.5}


def test_the_picture_shows_the_weights_that_make_A_mem(monkeypatch):
    net, x = model(8), ids(1, 24)
    rows = infini.looked_at(net, x)
    assert rows.shape == (2 * 2 * 3, 16)
    torch.testing.assert_close(rows.sum(1), torch.ones(12))
    reads, read = [], infini.retrieve

    def spy(q, M, z):
        reads.append(read(q, M, z))
        return reads[-1]

    values = []
    monkeypatch.setattr(infini, "retrieve", spy)
    for block in net.blocks:
        block.attention.qkv.register_forward_hook(
            lambda module, inputs, y: values.append(y[0, :16, 32:].unflatten(1, (2, 8)))
        )
    net(x)
    for layer in range(2):
        for head in range(2):
            weights = rows[6 * layer + 3 * head : 6 * layer + 3 * head + 3]
            A_mem = reads[3 * layer + 2][0, head, -3:]  # what the last of three segments read
            torch.testing.assert_close(weights @ values[layer][:, head], A_mem)


@pytest.mark.parametrize("task", ["passkeys", "text"])
def test_spy(task, tmp_path, monkeypatch):
    """Which texts, networks and rates a whole run really uses."""
    (tmp_path / "text").write_bytes(bytes(range(100)) * 90 + b"~" * 1000)  # the test is all ~
    trained, judged, rates, drawn, seeds = [], [], [], [], {True: set(), False: set()}
    losses, step, draw = infini.losses_and_right, torch.optim.Adam.step, infini.draw_picture
    passkeys = infini.passkey_batch

    def spy_passkeys(n, segments, segment, g, depth=None):
        seeds[torch.is_grad_enabled()].add(g.initial_seed())
        return passkeys(n, segments, segment, g, depth)

    def spy_losses(net, x, y):
        kind = (net.blocks[0].attention.local_only, net.segment)
        (trained if torch.is_grad_enabled() else judged).append((kind, x))
        return losses(net, x, y)

    def spy_step(self):
        rates.append(self.param_groups[0]["lr"])
        assert len(self.param_groups) == 1
        return step(self)

    def spy_draw(path, net, table, x):
        drawn.append((net.blocks[0].attention.local_only, list(table), x))
        return draw(path, net, table, x)

    monkeypatch.setattr(infini, "passkey_batch", spy_passkeys)
    monkeypatch.setattr(infini, "losses_and_right", spy_losses)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    monkeypatch.setattr(infini, "draw_picture", spy_draw)
    flags = ["--data", str(tmp_path / "text")] if task == "text" else []
    metric = infini.main(["--quick", "--lr", ".01", "--out", str(tmp_path), *flags])

    N = 64 if task == "text" else 32
    kinds = [(False, N), (True, N), (True, 10**9)]  # memory, local, full attention
    assert [kind for kind, _ in trained] == [kind for kind in kinds for _ in range(4)]
    for i in range(4):  # the same batches for all three
        assert torch.equal(trained[i][1], trained[i + 4][1])
        assert torch.equal(trained[i][1], trained[i + 8][1])
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.0] * 3)
    assert list(dict.fromkeys(kind for kind, _ in judged)) == kinds
    rows = {kind: [x for other, x in judged if other == kind] for kind in kinds}
    for a, b in zip(rows[kinds[0]], rows[kinds[1]]):
        assert torch.equal(a, b)
    known = {hash(tuple(row[-64:].tolist())) for _, x in trained for row in x}
    fresh = [hash(tuple(row[-64:].tolist())) for x in rows[kinds[0]] for row in x]
    overlap = len(known & set(fresh))
    assert overlap == 0
    if task == "text":
        assert max(x.max() for _, x in trained) == 99
        assert all((x == 126).all() for x in rows[kinds[0]]) and drawn[0][2].shape == (1, 512)
    else:
        different = len(set(fresh))
        assert different == len(fresh) == 4 * 5 * 2  # lengths, batches, texts
        assert seeds[True] >= {1, 2, 3, 4} and seeds[False] and not seeds[True] & seeds[False]
        assert {x.shape[1] for x in rows[kinds[0]]} == {128, 1024, 8192, 32768}
        assert {x.shape[1] for x in rows[kinds[2]]} == {128, 1024, 8192}
        assert drawn[0][2].shape == (1, 128)
    assert drawn[0][:2] == (False, ["memory", "local attention", "full attention"])
    assert isinstance(metric, float)


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert infini.main(["--out", str(tmp_path)]) >= 0.95
