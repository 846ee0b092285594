"""gpt.py: attention against torch.nn and numbers, cache, window, names, the rivals, the demo."""

import collections
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt
from gpt import GPT, Attention, Block, attention_weights, causal_mask, next_token_loss


def small(**kw):
    return GPT(**dict(vocab_size=11, context=64, dim=8, depth=2, heads=2) | kw)


def shaken(**kw):
    """A model whose predictions are far from uniform."""
    model = small(**kw)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


# ---- loss and attention ----


def test_the_loss_is_minus_log_p_of_the_token_that_follows():
    logits, ids = torch.randn(3, 5, 7), torch.randint(7, (3, 6))
    total = 0
    for b in range(3):
        for t in range(5):
            e = [math.exp(x) for x in logits[b, t].tolist()]
            total -= math.log(e[ids[b, t + 1]] / sum(e))
    assert next_token_loss(logits, ids).item() == pytest.approx(total / 15, rel=1e-5)


def test_the_mask_lets_a_position_see_itself_and_what_came_before():
    assert causal_mask(4, 4, "cpu").tolist() == [[s <= t for s in range(4)] for t in range(4)]
    want = [[s <= t + 3 for s in range(5)] for t in range(2)]
    assert causal_mask(2, 5, "cpu").tolist() == want


@pytest.mark.parametrize("T", [1, 2, 5, 13])
def test_fast_attention_equals_the_slow_form_and_a_loop_over_numbers(T):
    attention, x = Attention(6, 3).double(), torch.randn(2, T, 6).double()
    attention.c_attn.weight.data *= 50  # so that the weights are far from equal
    q, k, v = attention.qkv(x)
    assert q.shape == (2, 3, T, 2)
    w = attention_weights(q, k)
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 3, T).double())
    y = torch.zeros(2, T, 6).double()
    for b, h, t in [(b, h, t) for b in range(2) for h in range(3) for t in range(T)]:
        e = [math.exp((q[b, h, t] @ k[b, h, s]).item() / 2**0.5) for s in range(t + 1)]
        for s in range(t + 1):
            assert w[b, h, t, s].item() == pytest.approx(e[s] / sum(e))
            y[b, t, 2 * h : 2 * h + 2] += e[s] / sum(e) * v[b, h, s]
    torch.testing.assert_close(attention(x)[0], attention.c_proj(y))
    torch.testing.assert_close((w @ v).transpose(1, 2).flatten(2), y)


def test_scores_have_variance_1_for_every_d():
    for d in (4, 64, 400):
        q, k = torch.randn(2, 1, 1, 200, d)
        w = attention_weights(q, k)[0, 0, -1]
        assert w.log().var().item() == pytest.approx(1, abs=0.35)


def test_the_block_equals_torch_nns():
    """Order of q, k, v and of the heads, pre-norm, tanh-GELU, W against its transpose."""
    gelu = nn.GELU("tanh")
    block, x = Block(12, 3), torch.randn(2, 9, 12)
    for p in block.parameters():
        p.data += 0.3 * torch.randn_like(p)
    want = nn.TransformerEncoderLayer(12, 3, 48, 0.0, gelu, batch_first=True, norm_first=True)
    pairs = {
        "self_attn.in_proj_weight": block.attn.c_attn.weight.T,
        "self_attn.in_proj_bias": block.attn.c_attn.bias,
        "self_attn.out_proj.weight": block.attn.c_proj.weight.T,
        "self_attn.out_proj.bias": block.attn.c_proj.bias,
        "linear1.weight": block.mlp.c_fc.weight.T, "linear1.bias": block.mlp.c_fc.bias,
        "linear2.weight": block.mlp.c_proj.weight.T, "linear2.bias": block.mlp.c_proj.bias,
        "norm1.weight": block.ln_1.weight, "norm1.bias": block.ln_1.bias,
        "norm2.weight": block.ln_2.weight, "norm2.bias": block.ln_2.bias,
    }  # fmt: skip
    want.load_state_dict(pairs)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    torch.testing.assert_close(block(x)[0], want(x, mask), rtol=1e-4, atol=1e-5)


def test_the_two_forms_of_gelu_differ_by_what_the_comment_says():
    x = torch.linspace(-6, 6, 20001).double()
    assert 4e-4 < (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() < 5e-4


# ---- the model ----


def test_the_model_is_embeddings_blocks_a_norm_and_the_embeddings_again():
    model, ids = shaken(depth=3), torch.randint(11, (2, 20))
    x = model.wte.weight[ids] + model.wpe.weight[:20]
    for block in model.h:
        x, _ = block(x)
    mean, var = x.mean(2, keepdim=True), x.var(2, unbiased=False, keepdim=True)
    x = (x - mean) / (var + 1e-5).sqrt() * model.ln_f.weight + model.ln_f.bias
    torch.testing.assert_close(model(ids), x @ model.wte.weight.T, rtol=1e-4, atol=1e-5)


def test_causal():
    model, ids = shaken(), torch.randint(11, (2, 40))
    other = ids.clone()
    other[:, 25] = (other[:, 25] + 1) % 11
    a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :25], b[:, :25])
    assert ((a[:, 25:] - b[:, 25:]).abs().amax(2) > 1e-6).all()  # and all that follows sees it


def test_without_positions_the_order_of_the_past_would_not_count():
    model, ids = shaken(depth=1), torch.tensor([[1, 2, 3, 4], [3, 2, 1, 4]])
    a, b = model(ids)[:, -1]
    assert (a - b).abs().max() > 1e-3
    model.wpe.weight.data.zero_()
    a, b = model(ids)[:, -1]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("L", [1, 2, 17, 39])
@pytest.mark.parametrize("piece", [1, 4])
def test_the_cache_in_pieces_equals_one_pass(L, piece):
    model, ids = shaken(), torch.randint(11, (2, 40))
    logits, cache = model(ids[:, :L], return_cache=True)
    out = [logits]
    for part in ids[:, L:].split(piece, 1):
        logits, cache = model(part, cache, return_cache=True)
        out.append(logits)
    assert len(cache) == 2 and cache[0][0].shape == (2, 2, 40, 4)
    torch.testing.assert_close(torch.cat(out, 1), model(ids), rtol=1e-4, atol=1e-5)


def test_more_than_the_context_is_refused():
    model, ids = small(), torch.randint(11, (2, 65))
    with pytest.raises(ValueError, match="65"):
        model(ids)
    _, cache = model(ids[:, :64], return_cache=True)
    with pytest.raises(ValueError, match="65"):
        model(ids[:, 64:], cache)


@pytest.mark.parametrize("context", [1, 2, 5, 8])
@pytest.mark.parametrize("L", [1, 4, 8, 19])
def test_generate_beyond_the_window_equals_a_fresh_pass_over_what_it_may_see(context, L):
    model, ids = shaken(context=context), torch.randint(11, (2, L))
    out = model.generate(ids, 30, temperature=0)
    seen = min(L, context)
    for t in range(L, L + 30):
        want = model(out[:, t - seen : t])[:, -1].argmax(-1)
        assert (out[:, t] == want).all()
        seen = seen + 1 if seen < context else (context + 1) // 2


def test_300_tokens_from_a_window_of_64_stay_as_good_as_the_first_60():
    """The text counts 0, 1, .., 9, 10, 0, ..: wrong steps are rubbish, wherever they stand."""
    model = small(dim=32, heads=4)
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    text = torch.arange(2000) % 11
    for _ in range(60):
        ids = text[torch.randint(1900, (8, 1)) + torch.arange(65)]
        opt.zero_grad()
        next_token_loss(model(ids[:, :-1]), ids).backward()
        opt.step()
    out = model.generate(text[None, :3], 300)
    right = (out[0, 1:] - out[0, :-1]) % 11 == 1
    assert right[:60].float().mean() > 0.95
    assert right[60:].float().mean() >= right[:60].float().mean() - 0.02


def test_generate_is_greedy_at_0_and_keeps_to_top_k_and_end_token():
    model, ids = shaken(), torch.randint(11, (2, 20))
    out = model.generate(ids, 5, temperature=0)
    assert (out[:, :20] == ids).all() and (model.generate(ids, 5, top_k=1) == out).all()
    allowed = model(ids)[:, -1].topk(3).indices
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        new = model.generate(ids, 1, 5.0, top_k=3, generator=g)[:, -1:]
        assert (new == allowed).any(1).all()
    end = out[0, 21].item()
    ended = model.generate(ids[:1], 5, temperature=0, end_token=end)
    first = out[0, 20:].tolist().index(end)
    assert ended.shape[1] == 20 + first + 1 and ended[0, -1] == end
    rows = model.generate(ids[:1].expand(50, -1), 20, 5.0, end_token=3)[:, 20:].tolist()
    ends = [row.index(3) for row in rows if 3 in row]
    assert len(set(ends)) > 5  # some rows go on while others have ended
    assert all(set(row[row.index(3) :]) == {3} for row in rows if 3 in row)


def test_the_temperature_divides_the_logits():
    model, ids = shaken(), torch.randint(11, (1, 6))
    logits = model(ids)[0, -1]
    g = torch.Generator().manual_seed(0)
    drawn = model.generate(ids.expand(20000, -1), 1, temperature=2.0, generator=g)[:, -1]
    share = drawn.bincount(minlength=11) / 20000
    assert (share - F.softmax(logits / 2, -1)).abs().max() < 0.015
    assert (share - F.softmax(logits * 2, -1)).abs().max() > 0.05  # the test can tell


SIZES = {
    (768, 12, 12): 124_439_808,
    (1024, 24, 16): 354_823_168,
    (1280, 36, 20): 774_030_080,
    (1600, 48, 25): 1_557_611_200,
}


@pytest.mark.parametrize("size", SIZES)
def test_official_names_shapes_and_sizes(size):
    with torch.device("meta"):  # built without memory
        model = GPT(50257, 1024, *size)
    assert sum(p.numel() for p in model.parameters()) == SIZES[size]
    D, depth, heads = size
    assert model.h[0].attn.heads == heads
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    layer = f"h.{depth - 1}."
    want = {
        "ln_1.weight": (D,), "ln_1.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,),
        "attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,),
        "attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,),
        "mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,),
        "mlp.c_proj.weight": (4 * D, D), "mlp.c_proj.bias": (D,),
    }  # fmt: skip
    assert {k[len(layer) :]: v for k, v in shapes.items() if k.startswith(layer)} == want
    assert shapes["wte.weight"] == shapes["lm_head.weight"] == (50257, D)
    assert shapes["wpe.weight"] == (1024, D) and shapes["ln_f.bias"] == (D,)
    assert len(shapes) == 12 * depth + 5


@pytest.mark.parametrize("prefix", ["", "transformer.", "module.", "module._orig_mod.transformer."])
def test_from_checkpoint_finds_the_sizes_and_takes_prefixes_and_masks_off(prefix, tmp_path):
    model, ids = shaken(depth=3), torch.randint(11, (2, 20))
    weights = {prefix + name: w for name, w in model.state_dict().items()}
    for i in range(3):
        weights[f"{prefix}h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        weights[f"{prefix}h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    if not prefix:
        del weights["lm_head.weight"]  # some published files leave the tied head out
    torch.save(weights, tmp_path / "m.bin")
    again = GPT.from_checkpoint(tmp_path / "m.bin", heads=2)
    assert torch.equal(again(ids), model(ids))
    assert again.lm_head.weight is again.wte.weight
    with pytest.raises(ValueError, match="heads"):  # never guessed
        GPT.from_checkpoint(tmp_path / "m.bin")
    del weights[prefix + "h.1.mlp.c_fc.bias"]
    torch.save(weights, tmp_path / "m.bin")
    with pytest.raises(RuntimeError, match="c_fc.bias"):
        GPT.from_checkpoint(tmp_path / "m.bin", heads=2)


def test_the_heads_of_a_published_width_are_known(tmp_path):
    torch.save(GPT(5, 4, 768, 1, 12).state_dict(), tmp_path / "m.bin")
    assert GPT.from_checkpoint(tmp_path / "m.bin").h[0].attn.heads == 12


def test_the_same_logits_as_the_reference_implementation(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=24, n_layer=3, n_head=4, initializer_range=0.2
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    torch.save(theirs.state_dict(), tmp_path / "m.bin")
    ours = GPT.from_checkpoint(tmp_path / "m.bin", heads=4)
    ids = torch.randint(97, (2, 32))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    loss = theirs(ids, labels=ids).loss
    torch.testing.assert_close(next_token_loss(ours(ids)[:, :-1], ids), loss)
    ours.wte.weight.data += 1  # and back
    theirs.transformer.load_state_dict(ours.state_dict(), strict=False)
    theirs.lm_head.load_state_dict(ours.lm_head.state_dict())
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_initialisation_and_the_first_loss_near_ln_V():
    model = GPT(256, 32, 128, 8, 4)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif p.dim() == 2:
            std = 0.02 / 4 if "c_proj" in name else 0.02  # 4 = sqrt(2 * 8)
            assert p.std().item() == pytest.approx(std, rel=0.05), name
    ids = torch.randint(256, (4, 33))
    assert abs(next_token_loss(model(ids[:, :-1]), ids).item() - math.log(256)) < 0.1


def test_the_loss_falls_on_one_batch_and_every_parameter_gets_a_gradient():
    model, ids = small(dim=32, heads=4), torch.randint(11, (4, 33))
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        loss = next_token_loss(model(ids[:, :-1]), ids)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < math.log(11) / 4
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert (model.wpe.weight.grad[32:] == 0).all()  # places that no text reached


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_model_runs_in_every_dtype_near_float32(dtype):
    model, ids = small(dim=32), torch.randint(11, (2, 20))
    want = model(ids)
    got = model.to(dtype)(ids)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.02)
    assert model.generate(ids, 3, top_k=4).shape == (2, 23)


def test_export_keeps_the_batch_free():
    model, ids = shaken(), torch.randint(11, (2, 20))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: batch},)).module()
    more = torch.randint(11, (5, 20))
    torch.testing.assert_close(program(more), model(more))


# ---- the demo ----


def test_counted_frequencies_equal_counting_by_hand():
    text, test = b"abracadabra, abracadabra", b"cabra, xabr"
    got = gpt.frequencies(torch.tensor(list(text)), torch.tensor(list(test)))
    both = text + test
    nats = [0.0] * 5
    for i in range(len(text), len(both)):
        p = 1 / 256
        for k in range(5):
            front = both[i - k : i]
            # the first k bytes of the text have the end of the test in front of them
            round_it = both[-k:] + text if k else text
            windows = [round_it[j : j + k] for j in range(len(text))]
            follow = collections.Counter(x for x, w in zip(text, windows) if w == front)
            n, u = follow.total(), len(follow)
            p = (follow[both[i]] + u * p) / (n + u) if n else p
            nats[k] -= math.log(p) / len(test)
    assert list(got.values()) == pytest.approx(nats, rel=1e-5)
    assert list(got)[3] == "order-3 frequencies"


def test_a_text_that_xz_has_seen_costs_it_nearly_nothing_and_a_new_one_all_its_bits():
    a, b = torch.randint(256, (2, 20000))
    assert gpt.xz(a, a[5000:15000]) < 0.3
    assert gpt.xz(a, b) == pytest.approx(math.log(256), rel=0.02)


def test_the_held_out_files_are_not_in_the_training_text():
    text, test = gpt.load_data("stdlib")
    text, test = bytes(text.tolist()), bytes(test.tolist())
    assert len(text) > 7 * len(test) > 7 * 100_000 and b"import" in test
    starts = range(0, len(test) - 100, 3000)
    assert sum(test[i : i + 100] in text for i in starts) < 0.05 * len(starts)
    assert all(text[i : i + 100] in text for i in starts)  # the test can tell


def test_the_test_of_a_file_is_its_last_tenth(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(250)) * 8)
    text, test = gpt.load_data(str(tmp_path / "text"))
    assert text.tolist() == [*range(250)] * 7 + [*range(50)] and test.tolist() == [*range(50, 250)]


def test_a_batch_is_windows_of_the_text_by_seed_and_step(tmp_path):
    text = torch.arange(5000)
    args = gpt.parse(["--quick", "--out", str(tmp_path), "--context", "50"])[0]
    one = gpt.batch(args, text, 1)
    assert one.shape == (4, 51) and (one[:, 1:] == one[:, :-1] + 1).all()
    assert torch.equal(one, gpt.batch(args, text, 1))
    assert not torch.isin(gpt.batch(args, text, 2)[:, 0], one[:, 0]).any()
    args.seed = 1
    assert not torch.isin(gpt.batch(args, text, 1)[:, 0], one[:, 0]).any()


def test_losses_by_position_are_those_of_training():
    model, windows = shaken(), torch.randint(11, (70, 21))
    table = gpt.losses(model, windows)
    assert table.shape == (70, 20)
    torch.testing.assert_close(table.mean(), next_token_loss(model(windows[:, :-1]), windows))
    one = next_token_loss(model(windows[69:, :6])[:, 5:], windows[69:, 5:7])
    torch.testing.assert_close(table[69, 5], one)


def test_repeats_are_letters_shown_twice():
    ids = gpt.repeats()
    assert ids.shape == (64, 48) and (ids[:, :24] == ids[:, 24:]).all()
    assert ids.min() == ord("a") and ids.max() == ord("z")


def test_heads_are_found_by_where_they_look(monkeypatch):
    """Layer 2, head 3 looks at what followed last time with weight .7, head 1 with .3."""
    model, layers = shaken(dim=12, heads=4, vocab_size=256), []

    def planted(q, k):
        layers.append(q.shape)
        w = torch.zeros(q.shape[0], 4, 48, 48)
        for t in range(24, 48) if len(layers) == 2 else []:
            w[:, 2, t, t - 23], w[:, 0, t, t - 23], w[:, 1, t, t - 24] = 0.7, 0.3, 1.0
            w[:, 3, t, t - 1] = 0.6
        return w

    ids = gpt.repeats()
    assert (ids[:, 25:] == ids[:, 1:24]).all()  # so the token behind t - 24 is the next one
    monkeypatch.setattr(gpt, "attention_weights", planted)
    name, weight, w = gpt.find_head(model, ids, 23)
    assert name == "layer 2, head 3, 23 back" and weight == pytest.approx(0.7) and w[47, 24] > 0.69
    layers.clear()
    assert gpt.find_head(model, ids, 1)[:2] == ("layer 2, head 4, 1 back", pytest.approx(0.6))
    assert len(layers) == 2


def test_heads_are_judged_by_the_weights_that_the_model_uses():
    """The measure runs the blocks by itself: its maps are those of the model's own pass."""
    model, ids, seen = shaken(vocab_size=256, dim=12, heads=2), gpt.repeats(), []
    for block in model.h:
        block.attn.register_forward_hook(lambda m, x, y: seen.append(m.qkv(x[0])[:2]))
    model(ids)
    maps = torch.stack([attention_weights(*qk)[0] for qk in seen[:2]]).flatten(0, 1)
    found = gpt.find_head(model, ids, 1)[2]
    assert (maps - found).abs().amax((1, 2)).min() < 1e-6


def test_spy(tmp_path, monkeypatch, capsys):
    """Which data, which network and which rates a whole run really uses."""
    text = bytes(range(100)) * 18 + bytes([200]) * 100 + bytes([201]) * 100  # the test is the end
    (tmp_path / "text").write_bytes(text)
    read, rates, modes, judged, rivals = [], [], [], [], []
    batch, losses, step, forward = gpt.batch, gpt.losses, torch.optim.Adam.step, GPT.forward
    frequencies, xz = gpt.frequencies, gpt.xz

    def spy_batch(args, text, step):
        ids = batch(args, text, step)
        read.append((step, ids.shape, text.max().item()))
        return ids

    def spy_step(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    def spy_losses(model, windows):
        judged.append((windows, losses(model, windows)))
        return judged[-1][1]

    def spy_forward(self, *args, **kw):
        modes.append((torch.is_grad_enabled(), self.training))
        return forward(self, *args, **kw)

    def spy_rivals(name):
        return lambda *a: rivals.append([x.unique().tolist()[-1] for x in a]) or name(*a)

    monkeypatch.setattr(gpt, "batch", spy_batch)
    monkeypatch.setattr(gpt, "losses", spy_losses)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    monkeypatch.setattr(GPT, "forward", spy_forward)
    monkeypatch.setattr(gpt, "frequencies", spy_rivals(frequencies))
    monkeypatch.setattr(gpt, "xz", spy_rivals(xz))
    flags = ["--quick", "--lr", ".01", "--out", str(tmp_path), "--data", str(tmp_path / "text")]
    metric = gpt.main([*flags, "--context", "50"])

    assert read == [(s, (4, 51), 99) for s in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.0075, 0.005, 0.0025, 0.0])
    assert [grad for grad, _ in modes[:4]] == [True] * 4 and not any(g for g, _ in modes[4:])
    assert torch.equal(judged[0][0], gpt.repeats())
    windows, table = judged[1]
    assert windows.tolist() == [
        [200 + (i > 99) for i in range(s, s + 51)] for s in range(0, 150, 25)
    ]
    assert metric == pytest.approx(table[:, 25:].mean().item())  # each byte once, half a context
    assert rivals == [[99, 201]] * 2
    lines = capsys.readouterr().out.splitlines()
    table = judged[0][1].mean(0)
    assert f"letters {table[1:24].mean():.3f}" in lines[-5]
    assert f"again {table[24:].mean():.3f}" in lines[-5]
    table = judged[1][1]
    assert f"{table[:, 0].mean():.3f}, at the last {table[:, 49].mean():.3f}" in lines[-2]


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert gpt.main(["--out", str(tmp_path)]) <= 1.47  # order-4 counts: 1.473
