"""bert.py: layers against torch.nn and the reference implementation, masking, names, the demo."""

import copy
import math
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bert
from bert import IGNORE, Bert, Classifier, Encoder, Layer, SelfAttention, mask_tokens

V = 40


def small(layers=2, dim=32, heads=4, positions=30):
    return Encoder(V, dim, layers, heads, positions).eval()


def ids(*shape):
    return torch.randint(4, V, shape)


def zeros(x):
    return torch.zeros_like(x)


# ---- the encoder ----


@pytest.mark.parametrize("T", [1, 2, 7, 30])
def test_attention_equals_torchs(T):
    ours, theirs = SelfAttention(32, 4).eval(), nn.MultiheadAttention(32, 4, batch_first=True)
    linears = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([linear.weight for linear in linears])
    theirs.in_proj_bias.data = torch.cat([linear.bias for linear in linears])
    theirs.out_proj.weight.data = torch.eye(32)
    theirs.out_proj.bias.data.zero_()
    x = torch.randn(3, T, 32)
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[1, T // 2 + 1 :] = False
    want = theirs(x, x, x, key_padding_mask=~mask)[0]
    torch.testing.assert_close(ours(x, mask), want, rtol=1e-5, atol=1e-5)


def test_a_layer_equals_torchs_post_norm_layer_with_the_exact_gelu():
    ours = Layer(32, 4).eval()
    theirs = nn.TransformerEncoderLayer(
        32, 4, 128, activation=F.gelu, layer_norm_eps=1e-12, batch_first=True
    ).eval()
    attention = ours.attention.self
    linears = (attention.query, attention.key, attention.value)
    pairs = {
        "self_attn.in_proj_weight": torch.cat([linear.weight for linear in linears]),
        "self_attn.in_proj_bias": torch.cat([linear.bias for linear in linears]),
    }
    for name, module in {
        "self_attn.out_proj": ours.attention.output.dense,
        "norm1": ours.attention.output.LayerNorm,
        "linear1": ours.intermediate.dense,
        "linear2": ours.output.dense,
        "norm2": ours.output.LayerNorm,
    }.items():
        for kind in ("weight", "bias"):
            value = getattr(module, kind)
            value.data += 0.1 * torch.randn_like(value)  # gamma and beta, too
            pairs[f"{name}.{kind}"] = value.detach()
    theirs.load_state_dict(pairs)
    x = 3 * torch.randn(2, 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, None), theirs(x), rtol=1e-5, atol=1e-5)


def test_every_token_sees_both_sides():
    model, x = small(), ids(1, 9)
    base = model(x, zeros(x))[0]
    for t in (0, 4, 8):
        other = x.clone()
        other[0, t] = (x[0, t] + 1) % V
        assert ((model(other, zeros(x))[0] - base).abs().amax(2) > 1e-6).all()


def test_padding_is_seen_by_nobody():
    """What stands at the padding, and how much of it, changes nothing; all padding is no NaN."""
    model, x = small(), ids(2, 6)
    mask = torch.arange(11).expand(2, -1) < 6
    want, c = model(x, zeros(x))
    for _ in range(2):
        longer = torch.cat([x, ids(2, 5)], 1)
        got, pooled = model(longer, zeros(longer), mask)
        torch.testing.assert_close(got[:, :6], want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled, c, rtol=1e-5, atol=1e-5)
    assert (model(longer, zeros(longer))[0][:, :6] - want).abs().max() > 1e-4
    assert model(x, zeros(x), zeros(x).bool())[0].isfinite().all()


def test_order_and_segment_count():
    model, x = small(), ids(1, 8)
    base = model(x, zeros(x))[0]
    assert (model(x.flip(1), zeros(x))[0].flip(1) - base).abs().max() > 1e-4
    assert (model(x, 1 - zeros(x))[0] - base).abs().max() > 1e-4


def test_the_input_is_the_normalised_sum_of_three_embeddings():
    e, x, segments = small().embeddings, ids(2, 5), torch.randint(2, (2, 5))
    for b in range(2):
        for t in range(5):
            v = e.word_embeddings.weight[x[b, t]] + e.position_embeddings.weight[t]
            v = v + e.token_type_embeddings.weight[segments[b, t]]
            v = (v - v.mean()) / (v.var(correction=0) + 1e-12).sqrt()
            torch.testing.assert_close(e(x, segments)[b, t], v, rtol=1e-4, atol=1e-4)


def test_the_pooler_reads_cls():
    model = small()
    x, c = model(ids(3, 7), torch.zeros(3, 7).long())
    weight, bias = model.pooler.dense.weight, model.pooler.dense.bias
    torch.testing.assert_close(c, torch.tanh(x[:, 0] @ weight.T + bias))


# ---- names and files ----


def test_official_names_and_sizes():
    """bert-base-uncased: 109,482,240 parameters, 110,106,428 with both heads (without memory)."""
    with torch.device("meta"):
        model = Bert(Encoder())
    assert sum(p.numel() for p in model.bert.parameters()) == 109_482_240
    assert sum(p.numel() for p in model.parameters()) == 110_106_428
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layer = "bert.encoder.layer.11."
    own = {name[len(layer) :]: s for name, s in shapes.items() if name.startswith(layer)}
    d, wide = (768,), (3072, 768)
    want = {f"attention.self.{n}.{k}": s for n in ("query", "key", "value")
            for k, s in (("weight", (768, 768)), ("bias", d))}  # fmt: skip
    want |= {"attention.output.dense.weight": (768, 768), "attention.output.dense.bias": d}
    want |= {"attention.output.LayerNorm.weight": d, "attention.output.LayerNorm.bias": d}
    want |= {"intermediate.dense.weight": wide, "intermediate.dense.bias": (3072,)}
    want |= {"output.dense.weight": wide[::-1], "output.dense.bias": d}
    want |= {"output.LayerNorm.weight": d, "output.LayerNorm.bias": d}
    assert own == want
    rest = {name: s for name, s in shapes.items() if ".layer." not in name}
    assert rest == {
        "bert.embeddings.word_embeddings.weight": (30522, 768),
        "bert.embeddings.position_embeddings.weight": (512, 768),
        "bert.embeddings.token_type_embeddings.weight": (2, 768),
        "bert.embeddings.LayerNorm.weight": d,
        "bert.embeddings.LayerNorm.bias": d,
        "bert.pooler.dense.weight": (768, 768),
        "bert.pooler.dense.bias": d,
        "cls.predictions.bias": (30522,),
        "cls.predictions.transform.dense.weight": (768, 768),
        "cls.predictions.transform.dense.bias": d,
        "cls.predictions.transform.LayerNorm.weight": d,
        "cls.predictions.transform.LayerNorm.bias": d,
        "cls.predictions.decoder.weight": (30522, 768),
        "cls.predictions.decoder.bias": (30522,),
        "cls.seq_relationship.weight": (2, 768),
        "cls.seq_relationship.bias": (2,),
    }


def varied(dim=64):
    model = Bert(Encoder(V, dim, 2, dim // 64, 30)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["new", "first release", "no twins"])
def test_from_checkpoint_finds_the_sizes_and_the_names(prefix, kind, tmp_path):
    model, x = varied(128), ids(2, 9)
    weights = model.state_dict()
    if kind != "new":
        del weights["cls.predictions.decoder.bias"]
    if kind == "no twins":
        del weights["cls.predictions.decoder.weight"]
    if kind == "first release":
        weights["bert.embeddings.position_ids"] = torch.arange(30)[None]
        for old, new in (("LayerNorm.weight", "gamma"), ("LayerNorm.bias", "beta")):
            new = f"LayerNorm.{new}"
            weights = {name.replace(old, new): value for name, value in weights.items()}
    torch.save({prefix + name: value for name, value in weights.items()}, tmp_path / "b.bin")
    again = Bert.from_checkpoint(tmp_path / "b.bin").eval()
    for got, want in zip(again(x, zeros(x)), model(x, zeros(x))):
        torch.testing.assert_close(got, want)
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight


def test_from_checkpoint_refuses_a_file_that_lacks_a_weight_or_has_one_too_many(tmp_path):
    weights = varied().state_dict()
    for bad in ({"bert.more": torch.ones(1)}, None):
        broken = weights | (bad or {})
        if bad is None:
            del broken["bert.encoder.layer.1.output.dense.bias"]
        torch.save(broken, tmp_path / "b.bin")
        with pytest.raises(RuntimeError):
            Bert.from_checkpoint(tmp_path / "b.bin")


def test_the_reference_implementation_gives_the_same_numbers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, max_position_embeddings=30,
    )  # fmt: skip
    theirs = transformers.BertForPreTraining(config).eval()
    for p in theirs.parameters():
        p.data += 0.05 * torch.randn_like(p)
    torch.save(theirs.state_dict(), tmp_path / "b.bin")
    ours = Bert.from_checkpoint(tmp_path / "b.bin").eval()
    x, segments = ids(3, 12), torch.randint(2, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 8:] = False
    labels = x.masked_fill(torch.rand(3, 12) < 0.7, IGNORE)
    with torch.no_grad():
        want = theirs(x, mask.long(), segments, labels=labels,
                      next_sentence_label=torch.tensor([0, 1, 1]))  # fmt: skip
        words, pair = ours(x, segments, mask)
        torch.testing.assert_close(words[mask], want.prediction_logits[mask], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pair, want.seq_relationship_logits, rtol=1e-4, atol=1e-5)
    assert set(theirs.state_dict()) - set(ours.state_dict()) <= {"bert.embeddings.position_ids"}


# ---- the two tasks ----


def test_15_in_100_are_chosen_and_of_these_80_10_10():
    x = ids(400, 500)
    x[:, 0], x[:, -1], x[:, -2] = 1, 2, 0
    hidden, labels = mask_tokens(x, x > 3, V, mask_id=3)
    chosen = labels != IGNORE
    assert not chosen[:, [0, -2, -1]].any()
    assert (labels[chosen] == x[chosen]).all() and (hidden[~chosen] == x[~chosen]).all()
    assert chosen[:, 1:-2].float().mean() == pytest.approx(0.15, abs=0.003)
    masked = hidden[chosen] == 3
    kept = hidden[chosen] == x[chosen]
    assert masked.float().mean() == pytest.approx(0.8 + 0.1 / V, abs=0.006)
    assert kept.float().mean() == pytest.approx(0.1 + 0.1 / V, abs=0.006)
    other = hidden[chosen][~masked & ~kept]
    assert other.unique().tolist() == [i for i in range(V) if i != 3]  # any word of the vocabulary


def test_another_reading_hides_other_words():
    x = ids(4, 200)
    assert (mask_tokens(x, x > 3, V, 3)[1] != mask_tokens(x, x > 3, V, 3)[1]).any()


def test_the_loss_is_two_cross_entropies_at_the_chosen_positions_only():
    model, x = varied(), ids(5, 12)
    segments, is_random = torch.randint(2, (5, 12)), torch.randint(2, (5,))
    labels = x.masked_fill(torch.rand(5, 12) < 0.8, IGNORE)
    loss = model.loss(x, segments, labels, is_random)
    words, pair = model(x, segments)
    chosen = model(x, segments, chosen=labels != IGNORE)[0]
    torch.testing.assert_close(chosen, words[labels != IGNORE])
    by_hand = []
    for b in range(5):
        for t in range(12):
            if labels[b, t] != IGNORE:
                by_hand.append(-words[b, t].log_softmax(0)[labels[b, t]])
    by_hand = torch.stack(by_hand).mean() + F.cross_entropy(pair, is_random)
    torch.testing.assert_close(loss, by_hand)


def test_the_loss_starts_at_ln_V_plus_ln_2_and_falls_on_one_batch():
    model = Bert(Encoder(500, 32, 2, 4, 30))
    x = torch.randint(4, 500, (16, 12))
    hidden, labels = mask_tokens(x, x > 3, 500, 3)
    inputs = (hidden, torch.zeros_like(x), labels, torch.arange(16) % 2)
    first = model.loss(*inputs).item()
    assert first == pytest.approx(math.log(500) + math.log(2), abs=0.15)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model.loss(*inputs).backward()
        optimizer.step()
    assert model.eval().loss(*inputs) < first / 5


def test_which_loss_reaches_which_weights():
    model, x = varied(), ids(4, 9)
    words, pair = model(x, zeros(x))
    absent = {words: ("cls.seq", "bert.pooler."), pair: "cls.predictions."}
    for out, names in absent.items():
        model.zero_grad(set_to_none=True)
        out.square().sum().backward(retain_graph=True)
        for name, p in model.named_parameters():
            assert (p.grad is None) == name.startswith(names), name
    model.zero_grad()
    model.loss(x, torch.arange(9).expand(4, -1) % 2, x, torch.arange(4) % 2).backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_fine_tuning_trains_everything_and_starts_at_ln_classes():
    model = Classifier(small(), 7)
    x = ids(50, 9)
    logits = model(x, torch.arange(9).expand(50, -1) % 2)
    loss = F.cross_entropy(logits, torch.arange(50) % 7)
    assert loss.item() == pytest.approx(math.log(7), abs=0.05)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


# ---- the demo ----


def test_a_row_is_cls_a_sep_b_sep():
    row, segments = bert.pack(torch.arange(4, 12).view(1, 2, 4))
    assert row.tolist() == [[1, 4, 5, 6, 7, 2, 8, 9, 10, 11, 2]]
    assert segments.tolist() == [[0] * 6 + [1] * 5]


def test_torn_pairs_have_the_second_half_of_another_window():
    """With nothing hidden: half of the rows are as they were, the others have two parents."""
    n, half = 200, 3
    x = 4 + torch.arange(n)[:, None, None] + torch.zeros(1, 2, half).long()
    rows, _, labels, is_random = bert.pairs(x, range(4 + n))
    rows = torch.where(labels == IGNORE, rows, labels)
    a, b = rows[:, 1] - 4, rows[:, half + 2] - 4
    assert (a == torch.arange(n)).all() and (rows[:, half + 2 : -1] == b[:, None] + 4).all()
    assert (b[is_random == 0] == a[is_random == 0]).all() and 70 < is_random.sum() < 130
    assert (b[is_random == 1] != a[is_random == 1]).float().mean() > 0.95
    assert (rows[:, [0, half + 1, -1]] == torch.tensor([1, 2, 2])).all()


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of ten packages of four files; each file has a word of its own."""
    split = {}
    for package in bert.PACKAGES:
        (tmp_path / package).mkdir()
        for i, letter in enumerate("abcd"):  # the smallest first
            word = f"{package}{letter}"
            split[word] = ("train", "validation", "test", "train")[i]
            (tmp_path / package / f"{letter}.py").write_text(f"{word}(1)\n" * (3000 + i))
    fake = types.SimpleNamespace(**vars(bert.os) | {"__file__": str(tmp_path / "os.py")})
    monkeypatch.setattr(bert, "os", fake)
    return split


def test_no_split_has_a_word_of_another_ones_files(library):
    vocabulary, windows, data = bert.load_data("cpu")
    shapes = {split: tuple(x.shape[:2]) for split, x in data.items()}
    assert shapes == {"train": (10, 200), "test": (10, 100)}
    for split, x in [*data.items(), ("train", windows[None])]:
        text = "".join(vocabulary[i] for i in x.flatten())
        for word, own in library.items():
            assert (f"{word}(" in text) == (own == split), (word, split)
    for label, package in enumerate(bert.PACKAGES):
        text = "".join(vocabulary[i] for i in data["test"][label].flatten())
        assert [word for word in library if f"{word}(" in text] == [f"{package}c"]
    assert not any(word in vocabulary for word, own in library.items() if own != "train")


def test_bag_of_bytes_tells_letters_apart_and_order_by_strings():
    vocabulary = ["", "", "", "", "a", "b"]
    x = torch.tensor([[4, 5] * 4, [4, 4, 5, 5] * 2]).view(2, 1, 2, 4).repeat(1, 6, 1, 1)
    assert bert.bag_of_bytes(x, x, vocabulary) == 1.0


def test_accuracy_counts_every_window_once():
    class Fixed(nn.Module):
        def forward(self, ids, segments):
            return F.one_hot(ids[:, 1] - 4, 3).float()

    x = torch.tensor([[4, 4, 5], [5, 5, 5], [4, 6, 6]])[:, :, None, None].expand(-1, -1, 2, 2)
    assert bert.accuracy(Fixed(), x) == pytest.approx(7 / 9)


def test_spy(tmp_path, monkeypatch, capsys):
    """Which windows are trained on and judged, by which networks, in which mode, at which rates."""
    vocabulary, windows, data = bert.load_data("cpu")

    def rows(x):
        return {tuple(row) for row in x.reshape(-1, bert.WINDOW).tolist()}

    unlabelled, labelled, test = rows(windows), rows(data["train"]), rows(data["test"])
    test -= unlabelled  # licences and the like stand in several files
    trained, judged, seen, tuned, rates = [], [], [], [], []
    pairs, accuracy, fine_tune = bert.pairs, bert.accuracy, bert.fine_tune
    step = torch.optim.AdamW.step

    def spy_pairs(x, vocabulary):
        (trained if torch.is_grad_enabled() else seen).append(rows(x))
        return pairs(x, vocabulary)

    def spy_fine_tune(encoder, x, lr, args):
        before = copy.deepcopy(encoder.state_dict())
        model = fine_tune(encoder, x, lr, args)
        after = encoder.state_dict()
        assert all(torch.equal(before[n], after[n]) for n in before)  # a copy was trained
        assert any(not torch.equal(before[n], w) for n, w in model.bert.state_dict().items())
        tuned.append((before, rows(x), x.shape[1], lr))
        return model

    def spy_accuracy(model, x):
        assert not any(m.training for m in model.modules())
        judged.append(rows(x))
        return accuracy(model, x)

    def spy_step(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    for name, spy in (("pairs", spy_pairs), ("fine_tune", spy_fine_tune)):
        monkeypatch.setattr(bert, name, spy)
    monkeypatch.setattr(bert, "accuracy", spy_accuracy)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy_step)
    metric = bert.main(["--quick", "--save", str(tmp_path / "b.pt"), "--out", str(tmp_path)])

    assert len(trained) == 4 and all(x <= unlabelled and len(x) == 4 for x in trained)
    assert len(seen) == 1 and seen[0] <= rows(data["test"])
    counts = [n for n in bert.COUNTS for _ in range(2)]
    assert [n for _, _, n, _ in tuned] == [min(n, 4) for n in counts]  # quick has four
    for _, x, n, _ in tuned:
        assert x <= labelled and len(x) > 9 * n
    for pretrained, scratch in zip(tuned[::2], tuned[1::2]):
        assert pretrained[1] == scratch[1]  # the same labels
    state = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    new = bert.build(types.SimpleNamespace(seed=0, device="cpu"), vocabulary)[0].bert.state_dict()
    for i, (before, *_) in enumerate(tuned):
        for name, value in before.items():
            assert torch.equal(value, new[name] if i % 2 else state[f"bert.{name}"]), name
    assert len(judged) == 6 and all(x == judged[0] for x in judged)
    assert judged[0] <= rows(data["test"]) and len(judged[0] & test) > 30
    peak = [0.75, 0.5, 0.25, 0.0]  # of four steps
    lr = bert.parse(["--quick", "--out", str(tmp_path)])[0].lr
    want = [lr * p for p in peak] + [rate * p for *_, rate in tuned for p in peak]
    assert rates == pytest.approx(want)
    lines = capsys.readouterr().out.splitlines()
    assert f"{metric:.4f}" in lines[-1] and lines[-1].startswith("test accuracy at 20 labels")


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert bert.main(["--out", str(tmp_path)]) >= 0.25
