"""Tests of transformer.py: oracles, the paper's properties, decoding, the demo's path."""

import datetime
import itertools
import math
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import transformer as tr

BASE = {"d_model": 16, "num_heads": 4, "d_ff": 24, "dropout": 0.0}


def small(vocab=11, layers=2, seed=0, scale=1.0, **more):
    torch.manual_seed(seed)
    model = tr.Transformer(vocab, num_layers=layers, **{**BASE, **more}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def ids(*shape, vocab=11, seed=1):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- attention ----


def test_attention_equals_its_definition_and_the_fused_call():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[..., 0] = True
    y, w = tr.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, mask))
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 3, 5))
    for b, h, t in itertools.product(range(2), range(3), range(5)):
        seen = [s for s in range(7) if mask[b, 0, t, s]]
        e = [math.exp(float(q[b, h, t] @ k[b, h, s]) / math.sqrt(4)) for s in seen]
        want = sum(a / sum(e) * v[b, h, s] for a, s in zip(e, seen))
        torch.testing.assert_close(y[b, h, t], want, atol=1e-5, rtol=1e-4)
    free = tr.scaled_dot_product_attention(q, k, v)[0]
    torch.testing.assert_close(free, F.scaled_dot_product_attention(q, k, v))


def test_a_query_that_sees_nothing_gets_zero_and_finite_gradients():
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    y, w = tr.scaled_dot_product_attention(
        q, torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), mask
    )
    y.sum().backward()
    assert y[0, 0, 1].abs().sum() == 0 and w[0, 0, 1].sum() == 0 and q.grad.isfinite().all()


def torch_attention(ours: tr.MultiHeadAttention, d: int) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(d, ours.num_heads, batch_first=True)
    w = [ours.W_q, ours.W_k, ours.W_v]
    theirs.in_proj_weight.data = torch.cat([m.weight.data for m in w])
    theirs.in_proj_bias.data = torch.cat([m.bias.data for m in w])
    theirs.out_proj.load_state_dict(ours.W_o.state_dict())
    return theirs


@pytest.mark.parametrize("cross, causal", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("padded", [False, True])
def test_multi_head_attention_equals_torch(cross, padded, causal):
    torch.manual_seed(1)
    ours = tr.MultiHeadAttention(12, 3)
    for m in (ours.W_q, ours.W_k, ours.W_v, ours.W_o):
        nn.init.normal_(m.bias)
    theirs, x = torch_attention(ours, 12), torch.randn(2, 5, 12)
    memory = torch.randn(2, 6, 12) if cross else None
    S = 6 if cross else 5
    real = torch.tensor([[1] * S, [1] * 3 + [0] * (S - 3)]).bool() if padded else None
    future = torch.ones(5, S).triu(1).bool() if causal else None
    source = x if memory is None else memory
    hidden = None if real is None else ~real
    want, w = theirs(x, source, source, hidden, attn_mask=future, average_attn_weights=False)
    got = []
    y = ours(x, memory, real, causal, weights=got)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[0], w, atol=1e-5, rtol=1e-4)
    if padded:  # a mask of numbers means the same
        torch.testing.assert_close(ours(x, memory, real.float(), causal), y)


def test_scores_are_scaled_so_that_the_softmax_does_not_saturate():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 64, 256), torch.randn(1, 1, 64, 256)
    w = tr.scaled_dot_product_attention(q, k, k)[1]
    assert w.max() < 0.5  # without 1 / sqrt(d_k), many a row is one-hot


# ---- layers against torch.nn ----


def torch_layer(ours, theirs):
    d = ours.norm1.weight.shape[0]
    theirs.self_attn.load_state_dict(torch_attention(ours.self_attn, d).state_dict())
    if hasattr(ours, "cross_attn"):
        theirs.multihead_attn.load_state_dict(torch_attention(ours.cross_attn, d).state_dict())
        theirs.norm3.load_state_dict(ours.norm3.state_dict())
    theirs.linear1.load_state_dict(ours.ffn.W_1.state_dict())
    theirs.linear2.load_state_dict(ours.ffn.W_2.state_dict())
    theirs.norm1.load_state_dict(ours.norm1.state_dict())
    theirs.norm2.load_state_dict(ours.norm2.state_dict())


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_model_equals_torch_nn_transformer(norm_first):
    model = small(norm_first=norm_first)
    more = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    theirs = nn.Transformer(16, 4, 2, 2, 24, **more).eval()
    for side in ("encoder", "decoder"):
        stack, other = getattr(model, side), getattr(theirs, side)
        for a, b in zip(stack.layers, other.layers):
            torch_layer(a, b)
        if norm_first:
            other.norm.load_state_dict(stack.norm.state_dict())
        else:  # the paper has no norm after the last layer
            other.norm = None
    src, tgt = ids(3, 7), ids(3, 5, seed=2)
    src[1, 4:] = 0
    seen = src == 0
    want = theirs(
        model.embedding(src),
        model.embedding(tgt),
        tgt_mask=torch.ones(5, 5).triu(1).bool(),
        src_key_padding_mask=seen,
        memory_key_padding_mask=seen,
    )
    want = want @ model.embedding.weight.t()
    torch.testing.assert_close(model(src, tgt), want, atol=1e-5, rtol=1e-4)


def test_post_norm_is_the_default_and_ends_normalised():
    layer = tr.EncoderLayer(16, 4, 24, 0.0)
    y = layer(3 * torch.randn(2, 5, 16))
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(2, 5), atol=1e-2, rtol=0)
    names = dict(tr.Transformer(9, **{**BASE, "num_layers": 1}).named_parameters())
    assert not [n for n in names if n.startswith(("encoder.norm", "decoder.norm"))]


@pytest.mark.parametrize(
    "more, want",
    [({}, 63_082_496), ({"d_model": 1024, "num_heads": 16, "d_ff": 4096}, 214_245_376)],
)
def test_parameter_counts_of_base_and_big(more, want):
    with torch.device("meta"):
        model = tr.Transformer(**more)
    assert sum(p.numel() for p in model.parameters()) == want


def test_positions():
    pe = tr.sinusoids(torch.arange(40), 10)
    for pos, i in itertools.product(range(40), range(5)):
        angle = pos / 10000 ** (2 * i / 10)
        assert pe[pos, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
        assert pe[pos, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)
    c, s = math.cos(7), math.sin(7)  # a shift by 7 is a rotation of each pair
    turn = torch.tensor([[c, s], [-s, c]])
    torch.testing.assert_close(pe[7:, :2], pe[:-7, :2] @ turn.T, atol=1e-5, rtol=1e-4)
    e = tr.Embedding(7, 10, 0.0)
    x = torch.tensor([[3, 5]])
    torch.testing.assert_close(e(x), e.weight[x] * math.sqrt(10) + pe[:2])


@pytest.mark.parametrize("B, S, T", [(1, 1, 1), (2, 3, 8), (3, 9, 2)])
def test_shapes_and_gradients(B, S, T):
    model = small(dropout=0.1).train()
    weights = []
    logits = model(ids(B, S), ids(B, T), weights)
    assert logits.shape == (B, T, 11) and [w.shape for w in weights] == [(B, 4, T, S)] * 2
    tr.label_smoothing_loss(logits, ids(B, T, seed=3)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        # one key alone: its weight is 1 whatever q and k are; k's bias never matters
        if S > 1 and T > 1 and "W_k.bias" not in name:
            assert p.grad.abs().sum() > 0, name


def test_wrong_sizes_raise():
    with pytest.raises(ValueError, match="multiple"):
        tr.MultiHeadAttention(10, 3)


# ---- properties ----


def test_causality_and_that_the_past_matters():
    model, src, tgt = small(), ids(2, 6), ids(2, 8, seed=2)
    other = tgt.clone()
    other[:, 5] = (other[:, 5] - 3 + 1) % 8 + 3
    a, b = model(src, tgt), model(src, other)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert all((a[:, t] - b[:, t]).abs().max() > 1e-4 for t in (5, 6, 7))


def test_padding_changes_nothing():
    model, src, tgt = small(), ids(2, 6), ids(2, 5, seed=2)
    want = model(src[:, :4], tgt)
    padded = torch.cat([src[:, :4], torch.zeros(2, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded, tgt), want, atol=1e-5, rtol=1e-4)
    longer = torch.cat([tgt, torch.zeros(2, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(model(padded, longer)[:, :5], want, atol=1e-5, rtol=1e-4)


def test_source_order_matters_only_through_positions(monkeypatch):
    model, src, tgt = small(), ids(1, 6), ids(1, 4, seed=2)
    turned = src.flip(1)
    assert (model(src, tgt) - model(turned, tgt)).abs().max() > 1e-3
    monkeypatch.setattr(tr, "sinusoids", lambda pos, d: torch.zeros(len(pos), d))
    torch.testing.assert_close(model(src, tgt), model(turned, tgt), atol=1e-5, rtol=1e-4)


# ---- loss and rate ----


def test_label_smoothing_equals_its_definition_and_skips_padding():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 9), torch.randint(1, 9, (3, 4))
    target[1, 2:] = 0
    q = torch.full((3, 4, 9), 0.1 / 9).scatter_add(2, target[..., None], torch.full((3, 4, 1), 0.9))
    loss = -(q * logits.log_softmax(-1)).sum(-1)
    want = loss[target != 0].mean()
    torch.testing.assert_close(tr.label_smoothing_loss(logits, target), want)
    logits[1, 2:] = 1e4 * torch.randn(2, 9)  # what stands on padding is of no matter
    torch.testing.assert_close(tr.label_smoothing_loss(logits, target), want)
    sure = F.one_hot(target, 9) * 1e4
    assert tr.label_smoothing_loss(sure.float(), target).isfinite()


def test_learning_rate_is_equation_3():
    rates = [tr.learning_rate(s) for s in range(1, 20001)]
    assert max(rates) == rates[3999] == pytest.approx((512 * 4000) ** -0.5)
    assert rates[3999] == pytest.approx(6.9877e-4, rel=1e-4)
    assert rates[0] == pytest.approx(rates[3999] / 4000)
    assert rates[15999] == pytest.approx(rates[3999] / 2)


def test_loss_at_initialisation_and_on_one_batch():
    torch.manual_seed(0)
    V = 500
    model = tr.Transformer(V, 64, 2, 4, 128, 0.0)
    src, tgt = ids(8, 9, vocab=V), ids(8, 10, vocab=V, seed=2)
    loss = F.cross_entropy(model(src, tgt[:, :-1]).flatten(0, 1), tgt[:, 1:].flatten()).item()
    # LayerNorm makes |x|^2 = d, rows of the tied matrix are N(0, 1/d): logits are N(0, 1),
    # whose mean cross-entropy is ln V + 1/2
    assert abs(loss - math.log(V) - 0.5) < 0.25
    opt = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.98), eps=1e-9)
    for _ in range(60):
        now = tr.label_smoothing_loss(model(src, tgt[:, :-1]), tgt[:, 1:], 0.0)
        opt.zero_grad(); now.backward(); opt.step()  # fmt: skip
    assert now.item() < loss / 4


# ---- decoding ----


def next_log_p(model, src, out):
    """Log-probabilities after the tokens `out`, without <pad> and <bos>, recomputed whole."""
    with torch.no_grad():
        logits = model(src, torch.tensor([[1, *out]]))[0, -1]
    logits[:2] = -math.inf
    return logits.log_softmax(-1)


def after(model, src, out, known={}):  # noqa: B006
    """The same, each prefix once."""
    key = (id(model), tuple(out))
    if key not in known:
        known[key] = next_log_p(model, src, out)
    return known[key]


def loop_greedy(model, src, limit):
    out = []
    while len(out) < limit and (not out or out[-1] != 2):
        out.append(next_log_p(model, src, out).argmax().item())
    return out


def strip(row):
    return [t for t in row.tolist() if t]


SRC = torch.tensor([[4, 5, 6, 7, 8], [9, 3, 0, 0, 0], [5, 5, 5, 0, 0], [10, 4, 8, 3, 0]])


def ending(seed):
    """A random model that likes to end now and then, as a trained one does."""
    model = small(seed=seed, scale=2.0)
    model.decoder.layers[-1].norm3.bias.data += 0.25 * model.embedding.weight[2].detach()
    return model


@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_a_loop_alone_and_in_a_batch(seed):
    model, lengths = ending(seed), set()
    batch = model.greedy(SRC, extra=6)
    for i, row in enumerate(SRC):
        row = row[row != 0][None]
        want = loop_greedy(model, row, row.shape[1] + 6)
        lengths.add(len(want))
        assert strip(batch[i]) == strip(model.greedy(row, extra=6)[0]) == want


@pytest.mark.parametrize("beam, alpha", [(1, 0.0), (4, 0.6), (7, 1.5)])
def test_beam_search_scores_what_it_returns_alone_and_in_a_batch(beam, alpha):
    for seed in range(3):
        model = ending(seed)
        out, score = model.beam_search(SRC, beam, alpha, 6)
        for i, row in enumerate(SRC):
            alone, s = model.beam_search(row[row != 0][None], beam, alpha, 6)
            assert strip(alone[0]) == strip(out[i])
            assert s.item() == pytest.approx(score[i].item(), abs=1e-4)
            log_p, done = 0.0, strip(out[i])
            assert 2 not in done[:-1] and len(done) <= (row != 0).sum() + 6
            for t, token in enumerate(done):
                log_p += next_log_p(model, row[row != 0][None], done[:t])[token].item()
            assert s.item() == pytest.approx(log_p / ((5 + len(done)) / 6) ** alpha, abs=1e-4)


@pytest.mark.parametrize(
    "seed, scale, source, extra, alpha",
    [(0, 2.0, [3, 4], 2, 0.0), (1, 2.0, [3, 4], 2, 0.6), (1, 2.0, [3, 4], 2, 2.0)]
    + [(11, 1.0, [5, 3, 3], 3, 2.0)],  # here a late output overtakes one that has ended
)
def test_a_wide_beam_finds_the_best_of_all_outputs(seed, scale, source, extra, alpha):
    model, src = small(vocab=6, seed=seed, scale=scale), torch.tensor([source])
    best, limit = (-math.inf, None), len(source) + extra
    for n in range(1, limit + 1):
        for start in itertools.product(range(3, 6), repeat=n - 1):
            log_p = 0.0
            for t in range(n - 1):
                log_p += after(model, src, start[:t])[start[t]].item()
            for last in range(2, 6) if n == limit else [2]:
                p = log_p + after(model, src, start)[last].item()
                best = max(best, (p / ((5 + n) / 6) ** alpha, (*start, last)))
    out, score = model.beam_search(src, beam=400, alpha=alpha, extra=extra)
    assert tuple(strip(out[0])) == best[1] and score.item() == pytest.approx(best[0], abs=1e-4)


def test_beams_beat_greedy_and_the_penalty_lengthens():
    gain, short, long = 0.0, 0, 0
    for seed in range(6):
        model = ending(seed)
        gain += (model.beam_search(SRC, 4, 0.0, 6)[1] - model.beam_search(SRC, 1, 0.0, 6)[1]).sum()
        short += (model.beam_search(SRC, 4, 0.0, 6)[0] > 0).sum()
        long += (model.beam_search(SRC, 4, 2.0, 6)[0] > 0).sum()
    assert gain > 0.1 and long > short


@pytest.mark.parametrize("src", [torch.zeros(1, 0), torch.tensor([[4, 5], [0, 0]])])
def test_an_empty_source_is_an_error(src):
    for decode in (small().greedy, small().beam_search):
        with pytest.raises(ValueError, match="empty"):
            decode(src.long())


# ---- the two other uses ----


# ---- the demo ----


def parsed(*flags, out):
    return tr.parse(["--quick", "--device", "cpu", "--out", str(out), *map(str, flags)])


def test_no_day_is_in_two_parts_and_every_target_is_its_source_in_iso(tmp_path):
    args, (pairs, test, index), *_ = parsed(out=tmp_path)
    args.lines = 500
    pairs, test, index = tr.load_data(args)
    names = list(index)
    days = {day for _, y in pairs for day in "".join(names[t] for t in y[:-1]).split()}
    assert len(pairs) == 36000 and len(test) == 500 and len(days) > 30000
    assert not days & {day for _, y in test for day in y.split()}
    assert {len(y.split()) for _, y in test} == {1, 2}
    lengths = [len(x) for x, _ in pairs]
    assert lengths == sorted(lengths) and all(x[-1] == y[-1] == 2 for x, y in pairs)
    rng = random.Random(0)
    day = datetime.date(1987, 3, 5)
    ways = {tr.spell(day, rng) for _ in range(300)}
    assert len(ways) == 11 and {"Thursday, 5 March 1987", "05.03.1987", "in 1987 on Mar 5"} <= ways


def test_pieces_join_to_the_line_and_scripts_without_spaces_are_characters():
    assert tr.pieces("Der Hund läuft, ja!", True) == [" der", " hund", " läuft", ",", " ja", "!"]
    assert tr.pieces("我爱你。ok", True)[-5:] == ["我", "爱", "你", "。", "ok"]
    assert tr.pieces("aB ", False) == ["a", "B", " "]


def write_pairs(path, more=()):
    rows = [f"der Hund läuft, {w}!\tthe dog runs, {w}." for w in ("ja", "nein", "gut", "so") * 10]
    path.write_text("\n".join([*rows, *more]), encoding="utf-8")
    return str(path)


def test_of_a_file_a_seeded_tenth_is_the_test_and_rare_words_are_unknown(tmp_path):
    file = write_pairs(tmp_path / "a.tsv", ["x selten\ty rare"])
    args, *_ = parsed(out=tmp_path)
    args.data, args.lines = file, 500
    pairs, test, index = tr.load_data(args)
    assert len(test) == 4 and len(pairs) == 37 and " rare" not in index and " dog" in index
    assert tr.to_ids("the bird", index, args).tolist() == [index[" the"], 3, 2]
    lines = [line.split("\t") for line in (tmp_path / "a.tsv").read_text("utf-8").splitlines()]
    assert test != lines[:4] and test != lines[-4:]  # the file may be sorted
    many = [f"quelle {i}\ttarget {i}" for i in range(200)]
    stray = write_pairs(tmp_path / "b.tsv", [*many, "a\tb\tc"])
    assert len(tr.file_pairs(stray)) == 240
    with pytest.raises(ValueError, match="240 of 244"):
        tr.file_pairs(write_pairs(tmp_path / "b.tsv", [*many, *["no tab"] * 4]))


def test_a_batch_depends_on_the_step_and_has_alike_lengths(tmp_path):
    args, *_ = parsed(out=tmp_path)
    args.batch_size, args.lines = 64, 500
    pairs, *_ = tr.load_data(args)
    shapes = set()
    for step in range(1, 9):
        src, tgt = tr.batch(pairs, args, step)
        again, _ = tr.batch(pairs, args, step)
        assert torch.equal(src, again) and len(src) == len(tgt) == 64
        assert (src > 0).sum(1).min() >= src.shape[1] - 2
        shapes.add(src.shape)
    assert len(shapes) > 4


def test_the_rival_ignores_padding_of_its_targets_and_sees_no_future():
    torch.manual_seed(0)
    model = tr.Recurrent(11, 12).eval()
    src, tgt = ids(2, 6), ids(2, 5, seed=2)
    weights = model(src, tgt)
    other = tgt.clone()
    other[:, 3] = (other[:, 3] - 2) % 8 + 3
    assert torch.equal(model(src, other)[:, :3], weights[:, :3])
    assert (model(src, other)[:, 3:] - weights[:, 3:]).abs().max() > 1e-4
    size = sum(p.numel() for p in tr.Recurrent(64, 90).parameters())
    demo = sum(p.numel() for p in tr.Transformer(64, 64, 2, 4, 256).parameters())
    assert abs(size / demo - 1) < 0.1


@pytest.mark.parametrize("steps, averaged", [(95, [86, 88, 90, 92, 94]), (4, [4])])
def test_spy(steps, averaged, tmp_path, monkeypatch):
    """Which rates, which weights are averaged, which network and mode is judged and drawn."""
    rates, kinds, kept, judged, drawn = [], [], [], [], []
    step, evaluate, draw, spread = torch.optim.Adam.step, tr.evaluate, tr.draw_picture, tr.batch
    update = tr.AveragedModel.update_parameters

    def spy_step(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    def spy_update(self, model):
        if type(model) is tr.Transformer:
            kept.append((len(rates), model.embedding.weight.detach().clone()))
        return update(self, model)

    def spy_evaluate(model, test, index, args):
        out = evaluate(model, test[:4], index, args)
        judged.append((type(model), model.training, model.embedding.weight.clone(), len(test)))
        return out

    def spy_draw(path, model, src, tgt, index):
        drawn.append((model.training, model.embedding.weight.clone()))
        return draw(path, model, src, tgt, index)

    def spy_batch(train, args, step):
        kinds.append(step)
        return spread(train[:40], args, step)

    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    monkeypatch.setattr(tr.AveragedModel, "update_parameters", spy_update)
    for name, spy in (("evaluate", spy_evaluate), ("draw_picture", spy_draw), ("batch", spy_batch)):
        monkeypatch.setattr(tr, name, spy)
    parse = tr.parse

    def longer(argv):
        args, *rest = parse(argv)
        args.steps = steps
        return args, *rest

    monkeypatch.setattr(tr, "parse", longer)
    tr.main(["--quick", "--lr", "3", "--out", str(tmp_path), "--device", "cpu"])
    assert kinds == [*range(1, steps + 1)] * 2  # the rival: the same batches
    assert rates[:steps] == pytest.approx([3 * tr.learning_rate(s, 64, 400) for s in kinds[:steps]])
    assert rates[steps:] == pytest.approx([3 * tr.learning_rate(s, 90, 400) for s in kinds[:steps]])
    assert [n for n, _ in kept] == averaged
    mean = torch.stack([w for _, w in kept]).mean(0)
    assert [j[0] for j in judged] == [tr.Recurrent, tr.Transformer]
    assert not any(j[1] for j in judged) and [j[3] for j in judged] == [4, 4]
    torch.testing.assert_close(judged[1][2], mean)
    assert drawn[0][0] is False and torch.equal(drawn[0][1], judged[1][2])


def test_dropout_differs_from_step_to_step_and_by_seed_alone(tmp_path, monkeypatch):
    seeds = []
    whole = torch.manual_seed
    args, (pairs, _, index), models, optimizer, _ = parsed(out=tmp_path)
    monkeypatch.setattr(torch, "manual_seed", lambda s: (seeds.append(s), whole(s))[1])
    args.steps = 3
    tr.train(models, optimizer, pairs, args)
    assert len(set(seeds)) == 3 and models[0].training
    args.quick = False
    assert tr.build(args, len(index))[0][0].embedding.dropout.p == 0.1


def test_the_decoder_reads_the_target_one_place_to_the_right(tmp_path, monkeypatch):
    args, (pairs, _, index), models, optimizer, _ = parsed(out=tmp_path)
    seen, loss, decode = [], tr.label_smoothing_loss, tr.Transformer.decode
    monkeypatch.setattr(tr, "label_smoothing_loss", lambda x, y: (seen.append(y), loss(x, y))[1])
    monkeypatch.setattr(
        tr.Transformer, "decode", lambda self, t, *more: (seen.append(t), decode(self, t, *more))[1]
    )
    tr.train(models, optimizer, pairs, args)
    for read, target in zip(seen[::2], seen[1::2]):
        assert (read[:, 0] == 1).all() and torch.equal(read[:, 1:], target[:, :-1])
        assert ((target == 2).sum(1) == 1).all()  # each ends once
    assert len(seen) == 8


def test_unknown_words_are_never_right(tmp_path):
    args, *_ = parsed(out=tmp_path)
    args.data = "file"
    index = {"<pad>": 0, "<bos>": 1, "<eos>": 2, " <unk>": 3, " a": 4}
    model = small(vocab=5)
    model.beam_search = lambda src: (torch.tensor([[4, 3, 2]]), None)
    assert tr.evaluate(model, [["x", "a b"], ["x", "a bird"]], index, args)[0] == 0
    model.beam_search = lambda src: (torch.tensor([[4, 2]]), None)
    assert tr.evaluate(model, [["x", "A"], ["x", "b"]], index, args)[0] == 0.5


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert tr.main(["--out", str(tmp_path)]) >= 0.99
