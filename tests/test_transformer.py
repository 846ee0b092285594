"""Tests of transformer.py: oracles, the paper's properties, decoding, the demo's path."""

import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import transformer as tr

SCRIPT = Path(tr.__file__)
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
@pytest.mark.parametrize("weights", [False, True])
def test_multi_head_attention_equals_torch(cross, padded, causal, weights):
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
    got = [] if weights else None
    torch.testing.assert_close(
        ours(x, memory, real, causal, weights=got), want, atol=1e-5, rtol=1e-4
    )
    if weights:
        torch.testing.assert_close(got[0], w, atol=1e-5, rtol=1e-4)


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
    e = tr.Embedding(7, 10, 0.0)
    x = torch.tensor([[3, 5]])
    want = e.weight[x] * math.sqrt(10) + pe[4:6]
    torch.testing.assert_close(e(x, start=4), want)


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
    assert torch.equal(batch, model.greedy(SRC, extra=6, use_cache=False))


@pytest.mark.parametrize("beam, alpha", [(1, 0.0), (4, 0.6), (7, 1.5)])
def test_beam_search_cached_equals_uncached_and_alone(beam, alpha):
    for seed in range(3):
        model = ending(seed)
        out, score = model.beam_search(SRC, beam, alpha, 6)
        slow, slow_score = model.beam_search(SRC, beam, alpha, 6, use_cache=False)
        assert torch.equal(out, slow)
        torch.testing.assert_close(score, slow_score, atol=1e-4, rtol=1e-4)
        for i, row in enumerate(SRC):
            alone, s = model.beam_search(row[row != 0][None], beam, alpha, 6)
            assert strip(alone[0]) == strip(out[i])
            assert s.item() == pytest.approx(score[i].item(), abs=1e-4)
            log_p, done = 0.0, strip(out[i])
            assert 2 not in done[:-1] and len(done) <= (row != 0).sum() + 6
            for t, token in enumerate(done):
                log_p += next_log_p(model, row[row != 0][None], done[:t])[token].item()
            assert s.item() == pytest.approx(log_p / ((5 + len(done)) / 6) ** alpha, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_a_wide_beam_finds_the_best_of_all_outputs(alpha):
    for seed in range(2):
        model, src = small(vocab=6, seed=seed, scale=2.0), torch.tensor([[3, 4]])
        best, limit = (-math.inf, None), 4
        for n in range(1, limit + 1):
            for out in itertools.product(range(2, 6), repeat=n):
                if 2 in out[:-1] or (n < limit and out[-1] != 2):
                    continue
                p = sum(next_log_p(model, src, out[:t])[out[t]].item() for t in range(n))
                best = max(best, (p / ((5 + n) / 6) ** alpha, out))
        out, score = model.beam_search(src, beam=64, alpha=alpha, extra=2)
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


def test_language_model():
    torch.manual_seed(0)
    model = tr.LanguageModel(9, 16, 0.0, num_layers=2, num_heads=4, d_ff=24).eval()
    x = torch.randint(0, 9, (2, 7))
    y = x.clone()
    y[:, 4] = (y[:, 4] + 1) % 9
    a, b = model(x), model(y)
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert (a[:, 4:] - b[:, 4:]).abs().max() > 1e-3
    cache, parts = {}, []
    for piece in (x[:, :3], x[:, 3:4], x[:, 4:]):  # several tokens at a time see no future either
        parts.append(model(piece, None, cache))
    torch.testing.assert_close(torch.cat(parts, 1), a, atol=1e-5, rtol=1e-4)
    out = model.generate(x, 5, temperature=0.0)
    want = x
    for _ in range(5):
        want = torch.cat([want, model(want)[:, -1].argmax(-1, True)], 1)
    assert torch.equal(out, want)
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(model.generate(x, 5, generator=g[0]), model.generate(x, 5, generator=g[1]))


def test_classifier_reads_cls_in_front():
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 4, "d_ff": 24}
    model = tr.Classifier(9, 5, 16, 0.0, **sizes).eval()
    x, weights = torch.randint(1, 9, (3, 6)), []
    logits = model(x, weights)
    assert logits.shape == (3, 5) and weights[0].shape == (3, 4, 7, 7)
    h = torch.cat([model.cls.expand(3, 1, 16), model.embedding(x, start=1)], 1)
    torch.testing.assert_close(logits, model.head(model.encoder(h)[:, 0]), atol=1e-5, rtol=1e-4)
    padded = F.pad(x, (0, 3))
    torch.testing.assert_close(model(padded), logits, atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert model.cls.grad.abs().sum() > 0


# ---- data ----


def settings(**more):
    base = {"kind": "dates", "task": "translate", "data": None, "val": None, "test": None}
    base |= {"seed": 0, "quick": True, "length": 8, "device": "cpu"}
    return SimpleNamespace(**{**base, **more})


def test_no_day_is_in_two_parts_and_the_vocabulary_is_the_training_parts():
    parts, pieces, lines = tr.load_data(settings())
    days = {}
    for part, (_, y) in parts.items():
        days[part] = {"".join(pieces[t] for t in row[1:-1]) for row in y}
        assert len(days[part]) == len(y)
    assert not days["train"] & days["test"] and not days["train"] & days["val"]
    assert not days["val"] & days["test"] and {day for _, day in lines} == days["test"]
    seen = {t.item() for side in parts["train"] for row in side for t in row}
    assert seen == set(range(1, len(pieces))) - {3}


def test_spellings_hold_the_date():
    import datetime

    rng, kinds = random.Random(0), set()
    for _ in range(500):
        day = datetime.date(1900, 1, 1) + datetime.timedelta(rng.randrange(73049))
        text = tr.spell(day, rng)
        assert str(day.year) in text and str(day.day) in text
        names = f"{day:%b}".lower(), f"{day.month:02d}"
        assert any(name in text.lower() for name in names)
        kinds.add("".join("9" if c.isdigit() else c for c in text if not c.isalpha()))
    assert len(kinds) > 12
    for d, end in ((1, "st"), (2, "nd"), (3, "rd"), (11, "th"), (22, "nd"), (30, "th"), (31, "st")):
        texts = {tr.spell(datetime.date(1987, 1, d), rng).lower() for _ in range(300)}
        assert any(f"{d}{end}" in text for text in texts)


def test_word_pieces_join_to_the_line_and_rare_ones_are_unknown(tmp_path):
    rows = [f"der Hund läuft, {w}!\tthe dog runs, {w}." for w in ("ja", "ja", "nein", "ja", "gut")]
    (tmp_path / "a.tsv").write_text("\n".join(rows * 4 + ["x selten\ty rare"]), encoding="utf-8")
    (tmp_path / "b.tsv").write_text("der Vogel läuft\tthe bird runs\n", encoding="utf-8")
    files = {"data": str(tmp_path / "a.tsv"), "val": str(tmp_path / "b.tsv")}
    parts, pieces, lines = tr.load_data(settings(kind="pairs", test=files["val"], **files))
    assert "".join(pieces[t] for t in parts["train"][1][0][1:-1]) == " the dog runs, ja."
    assert " rare" not in pieces and " bird" not in pieces and len(parts["train"][0]) == 21
    assert pieces[parts["test"][1][0][2]] == " <unk>" and lines == [
        ["der Vogel läuft", "the bird runs"]
    ]
    cut, _, _ = tr.load_data(settings(kind="pairs", data=files["data"]))
    assert [len(cut[p][0]) for p in ("train", "val", "test")] == [18, 1, 2]


# ---- the demo ----


def run(*flags, expect=0):
    code = tr.main([*map(str, flags)])
    assert code == expect, flags
    return code


def losses(path):
    state = torch.load(path, weights_only=True)
    return state, [h[:2] for h in state["history"]]


def test_quick_as_a_subprocess(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--device", "cpu", "--out", tmp_path / "o"],
        capture_output=True, text=True, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0].startswith("transformer | ") and "copy the source" in lines[-1]
    assert (tmp_path / "o/transformer.png").stat().st_size > 5000


def test_the_other_tasks(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("to be or not to be, that is the question\n" * 50)
    (tmp_path / "p.tsv").write_text(
        "".join(f"ein Hund {i % 9}\ta dog {i % 9}\n" for i in range(60))
    )
    out = "--quick", "--out", tmp_path
    run(*out, "--task", "lm", "--data", tmp_path / "t.txt")
    assert "bits per character" in capsys.readouterr().out
    run(*out, "--task", "classify")
    assert "chance" in capsys.readouterr().out
    run(*out, "--data", tmp_path / "p.tsv", "--test", tmp_path / "p.tsv")
    assert "token acc" in capsys.readouterr().out
    run(*out, "--task", "classify", "--target", "1.01", expect=1)


def test_same_seed_same_run_and_resuming_is_exact(tmp_path):
    common = "--quick", "--log-every", 2, "--out", tmp_path, "--dropout", 0.2
    a, b, c = (tmp_path / f"{n}.pt" for n in "abc")
    run(*common, "--steps", 8, "--save", a)
    run(*common, "--steps", 8, "--save", b)
    run(*common, "--steps", 4, "--save", c)
    run("--load", c, "--steps", 8, "--log-every", 2, "--quick", "--out", tmp_path, "--save", c)
    (x, first), (y, second), (z, third) = losses(a), losses(b), losses(c)
    assert first == second == third and len(first) == 4
    for name, w in x["model"].items():
        assert torch.equal(w, y["model"][name]) and torch.equal(w, z["model"][name])
    assert len(z["kept"]) == 4
    run(*common, "--steps", 8, "--seed", 1, "--save", b)
    assert losses(b)[1] != first


def test_every_step_has_its_own_batch_of_alike_lengths(tmp_path, monkeypatch):
    seen, pick = [], tr.pick

    def spy(part, rows, args):
        if len(rows) == 8:  # training; evaluation takes 64 at a time
            seen.append((tuple(map(int, rows)), [len(part[0][i]) for i in rows]))
        return pick(part, rows, args)

    monkeypatch.setattr(tr, "pick", spy)
    run("--quick", "--steps", 20, "--out", tmp_path)
    assert len({rows for rows, _ in seen}) == len(seen) == 20
    assert sum(max(n) - min(n) <= 6 for _, n in seen) >= 18  # one may wrap around the end


def test_load_alone_evaluates_the_averaged_weights(tmp_path, capsys):
    a = tmp_path / "a.pt"
    run("--quick", "--out", tmp_path, "--save", a)
    want = capsys.readouterr().out.splitlines()
    run("--quick", "--load", a, "--out", tmp_path)
    got = capsys.readouterr().out.splitlines()
    assert got[-1].split(" | ")[:2] == want[-1].split(" | ")[:2] and not any(
        "step" in g for g in got
    )


def test_the_checkpoint_decides_where_no_flag_does(tmp_path):
    """A run that goes on keeps its sizes and schedule; --quick and the defaults don't matter."""
    run("--quick", "--steps", 2, "--out", tmp_path, "--seed", 3, "--save", tmp_path / "a.pt")
    args = tr.parse(["--load", str(tmp_path / "a.pt"), "--out", str(tmp_path), "--lr", "0.5"])[0]
    want = dict(zip(tr.NAMES, tr.DEFAULTS["quick"])) | {"steps": 2, "lr": 0.5}
    assert {n: getattr(args, n) for n in tr.NAMES} == want
    assert (args.seed, args.kind) == (3, "dates")


def test_default_steps_see_29000_pairs_six_times_and_peak_at_1e_3():
    how = dict(zip(tr.NAMES, tr.DEFAULTS["pairs"]))
    assert how["steps"] * how["batch_size"] >= 6 * 29_000
    peak = how["lr"] * tr.learning_rate(how["warmup"], how["size"][0], how["warmup"])
    assert 1e-3 < peak < 1.5e-3  # 1.6e-3, and that late, learned more slowly


def test_ctrl_c_saves_and_draws(tmp_path, monkeypatch):
    calls, true_loss = [], tr.label_smoothing_loss

    def loss(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return true_loss(*args)

    monkeypatch.setattr(tr, "label_smoothing_loss", loss)
    run("--quick", "--out", tmp_path, "--save", tmp_path / "a.pt", expect=130)
    assert (
        losses(tmp_path / "a.pt")[0]["step"] == 3 and (tmp_path / "transformer.png").stat().st_size
    )


def test_a_loss_that_is_no_number_stops(tmp_path, monkeypatch, capsys):
    calls, true_loss = [], tr.label_smoothing_loss

    def loss(*args):
        calls.append(1)
        return true_loss(*args) * (math.nan if len(calls) == 5 else 1)

    monkeypatch.setattr(tr, "label_smoothing_loss", loss)
    run("--quick", "--log-every", 2, "--out", tmp_path, "--save", tmp_path / "a.pt", expect=1)
    assert "step 5" in capsys.readouterr().err
    assert losses(tmp_path / "a.pt")[0]["step"] == 4


BAD = [
    ("--steps", "0"),
    ("--steps", "many"),
    ("--task", "chess"),
    ("--batch-size", "100000"),
    ("--dropout", "1"),
    ("--size", "30", "2", "4", "8"),  # 30 is no multiple of 4
    ("--lr", "-1"),
    ("--task", "lm"),
    ("--task", "lm", "--data", "{}/missing.txt"),
    ("--task", "lm", "--data", "{}/short.txt"),
    ("--task", "lm", "--data", "{}/bytes.txt"),
    ("--task", "classify", "--data", "{}/short.txt"),
    ("--data", "{}/missing.tsv"),
    ("--data", "{}/short.txt"),
    ("--data", "{}/empty.tsv"),
    ("--data", "{}/half.tsv"),
    ("--data", "{}/bytes.txt"),
    ("--data", "{}/good.tsv", "--val", "{}/half.tsv"),
    ("--load", "{}/missing.pt"),
    ("--load", "{}/cut.pt"),
    ("--load", "{}/other.pt"),
    ("--load", "{}/short.txt"),
    ("--load", "{}/good.pt", "--size", "32", "1", "2", "32"),
    ("--load", "{}/good.pt", "--task", "classify"),
    ("--load", "{}/good.pt", "--data", "{}/good.tsv"),  # it was trained on dates
    ("--load", "{}/good.pt", "--seed", "1"),  # its test days are among the trained ones
    ("--test", "{}/good.tsv"),
    ("--out", "{}/short.txt"),
    ("--save", "{}/no/folder/a.pt"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    (path / "short.txt").write_text("to be or not")
    (path / "empty.tsv").write_text("\n\n")
    (path / "half.tsv").write_text("ein Hund\ta dog\nein Hund\t\n" * 9)
    (path / "good.tsv").write_text("ein Hund\ta dog\n" * 50)
    (path / "bytes.txt").write_bytes(b"\xff\xfe\t\x00" * 900)
    run("--quick", "--out", path / "o", "--save", path / "good.pt")
    (path / "cut.pt").write_bytes((path / "good.pt").read_bytes()[:3000])
    torch.save({"script": "mamba", "args": {}, "step": 1}, path / "other.pt")
    return path


@pytest.mark.parametrize("flags", BAD, ids=" ".join)
def test_bad_input_exits_2_with_one_line(flags, folder, capsys):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run("--quick", "--out", folder / "o", *(f.format(folder) for f in flags))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "error: " in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if "error: " in line]) == 1
    assert not error.splitlines()[-1].startswith(" ") and sorted(folder.rglob("*")) == before


def test_a_stray_tab_among_many_lines_is_left_out(tmp_path, capsys):
    (tmp_path / "p.tsv").write_text("a b\tc d\n" * 150 + "a\tb\tc\n")
    args = tr.parse(["--data", str(tmp_path / "p.tsv"), "--quick", "--out", str(tmp_path)])
    assert "1 of 151 lines" in capsys.readouterr().err
    assert len(args[1]["train"][0]) + len(args[1]["val"][0]) <= 150
    (tmp_path / "q.tsv").write_text("a b\tc d\n" * 50 + "a\tb\tc\n")
    with pytest.raises(SystemExit):
        tr.parse(["--data", str(tmp_path / "q.tsv"), "--out", str(tmp_path)])


def test_copied_alone_it_needs_torch_only(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    code = """
import sys
for name in ("matplotlib", "tqdm", "sklearn", "sacrebleu", "gymnasium"):
    sys.modules[name] = None
import torch
from transformer import Transformer
print(Transformer(20, 16, 1, 2, 32)(torch.ones(1, 3).long(), torch.ones(1, 2).long()).shape)
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert "torch.Size([1, 2, 20])" in done.stdout, done.stderr


@pytest.mark.results
def test_the_header_is_true(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--target", "0.99", "--out", tmp_path])
    assert done.returncode == 0
