"""mae.py: `pytest tests/test_mae.py`."""

import math
import pathlib
import signal

import numpy as np
import pytest
import torch
import torch.nn as nn

import mae
import vit
from mae import MAE

FILE = pathlib.Path(__file__).parent.parent / "mae.py"
SMALL = {"image_size": (8, 12), "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}
DECODER = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(**kwargs):
    torch.manual_seed(0)
    model = MAE(**{**SMALL, **DECODER, **kwargs})
    for p in model.parameters():  # zeros at the start would hide mistakes
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model


def save_npz(path, n=60, size=8, dtype=np.uint8, chans=(3,), **change):
    r = np.random.default_rng(0)
    x, y = r.integers(0, 255, (n, size, size, *chans)).astype(dtype), np.arange(n) % 3
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20], **change})
    return path


# ---- patches and places ----


def test_patches_run_row_by_row_with_the_channel_last():
    x = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)
    expected = [[0, 24, 1, 25, 6, 30, 7, 31], [2, 26, 3, 27, 8, 32, 9, 33]]
    assert mae.patchify(x, 2)[0, :2].tolist() == expected


@pytest.mark.parametrize("size, patch", [((8, 12), 4), ((4, 4), 4), ((6, 10), (3, 2))])
def test_unpatchify_is_the_inverse(size, patch):
    x = torch.randn(2, 3, *size)
    grid = [n // p for n, p in zip(size, mae.pair(patch))]
    assert mae.unpatchify(mae.patchify(x, patch), patch, grid).equal(x)


def test_patch_embedding_is_the_strided_convolution():
    embed, x = mae.PatchEmbed(3, (4, 2), 16), torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(embed(x), embed.proj(x).flatten(2).transpose(1, 2))


def test_positions_by_hand_column_first():
    pos = mae.sincos_positions(8, (3, 4))
    assert pos.shape == (1, 13, 8) and (pos[0, 0] == 0).all()
    for row in range(3):
        for col in range(4):
            waves = [[math.sin(p), math.sin(p / 100), math.cos(p), math.cos(p / 100)]
                     for p in (col, row)]  # fmt: skip
            expected = torch.tensor(waves[0] + waves[1])
            torch.testing.assert_close(pos[0, 1 + 4 * row + col], expected)
    with pytest.raises(ValueError, match="multiple of 4"):
        mae.sincos_positions(6, (2, 2))


# ---- masking ----


@pytest.mark.parametrize("N, ratio, n", [(196, 0.75, 49), (64, 0.9, 6), (10, 0.9, 1), (6, 0.5, 3),
                                         (4, 1.0, 1), (4, 0.0, 3)])  # fmt: skip
def test_masking(N, ratio, n):
    noise = torch.rand(3, N)
    keep, mask, restore = mae.random_masking(noise, ratio)
    assert keep.shape == (3, n) and (mask.sum(1) == N - n).all()
    for b in range(3):
        lowest = sorted(range(N), key=lambda i: noise[b, i])
        assert keep[b].tolist() == lowest[:n]
        assert [i for i in range(N) if mask[b, i] == 0] == sorted(lowest[:n])
        assert [lowest[k] for k in restore[b]] == list(range(N))


def test_every_patch_is_hidden_equally_often():
    mask = mae.random_masking(torch.rand(4000, 16), 0.75)[1]
    assert (mask.mean(0) - 0.75).abs().max() < 0.04


@torch.no_grad()
def test_the_encoder_sees_visible_patches_only():
    model, x, noise = tiny(), torch.randn(2, 3, 8, 12), torch.rand(2, 6)
    loss, pred, mask = model(x, 0.5, noise)
    hidden = mae.unpatchify(mask[..., None].expand(-1, -1, 48), 4, (2, 3))
    other = torch.where(hidden > 0, torch.randn_like(x), x)
    torch.testing.assert_close(model(other, 0.5, noise)[1], pred)
    keep = mae.random_masking(noise, 0.5)[0]
    assert model.forward_features(x, keep).shape == (2, 4, 16)
    for b in range(2):  # the tokens kept, one image at a time, by a loop
        z = model.patch_embed(x[b : b + 1])[0] + model.pos_embed[0, 1:]
        z = torch.stack([model.cls_token[0, 0], *(z[i] for i in keep[b].tolist())])[None]
        for block in model.blocks:
            z = block(z)
        torch.testing.assert_close(model.forward_features(x, keep)[b], model.norm(z)[0])


@torch.no_grad()
def test_the_decoder_puts_every_token_at_its_place():
    model, noise = tiny(), torch.rand(2, 6)
    keep, mask, restore = mae.random_masking(noise, 0.5)
    z = torch.randn(2, 4, 16)
    seen = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda _, y: seen.append(y[0]))
    assert model.decode(z, restore).shape == (2, 6, 48)
    z, pos = model.decoder_embed(z), model.decoder_pos_embed[0]
    for b in range(2):
        torch.testing.assert_close(seen[0][b, 0], z[b, 0] + pos[0])
        for i in range(6):
            k = keep[b].tolist().index(i) + 1 if mask[b, i] == 0 else 0
            token = z[b, k] if k else model.mask_token[0, 0]
            torch.testing.assert_close(seen[0][b, 1 + i], token + pos[1 + i])


@torch.no_grad()
def test_visible_patches_commute():
    """Where a token stands in the shuffled list doesn't matter: only the set of them does."""
    model, x = tiny(), torch.randn(2, 3, 8, 12)
    noise = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7]] * 2)
    again = torch.tensor([[0.3, 0.7, 0.1, 0.95, 0.2, 0.8]] * 2)  # the same three stay
    torch.testing.assert_close(model(x, 0.5, noise)[1], model(x, 0.5, again)[1])


# ---- objective ----


def test_loss_by_hand_and_on_hidden_patches_only():
    pred, target = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    mask = torch.tensor([[1.0, 0, 1, 1, 0], [0, 1, 1, 0, 1]])
    loss = mae.mae_loss(pred, target, mask)
    terms = [(pred[b, i, k] - target[b, i, k]).item() ** 2
             for b in range(2) for i in range(5) if mask[b, i] for k in range(6)]  # fmt: skip
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    loss.backward()
    assert ((pred.grad != 0).any(-1) == (mask == 1)).all()


def test_normalised_target_and_back():
    x = torch.rand(2, 3, 8, 12)
    model = tiny(norm_pix=True)
    target, mean, sd = model.target(x)
    assert target.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(target.var(-1), torch.ones(2, 6), atol=1e-2, rtol=0)
    first = x[1, :, :4, 4:8]  # image 1, patch 1
    torch.testing.assert_close(mean[1, 1, 0], first.mean())
    torch.testing.assert_close(sd[1, 1, 0], (first.flatten().var() + 1e-6).sqrt())
    torch.testing.assert_close(model.reconstruct(x, target), x)
    plain = tiny(norm_pix=False)
    assert plain.target(x)[0].equal(mae.patchify(x, 4))
    assert plain.reconstruct(x, plain.target(x)[0]).equal(x)


def test_first_loss_and_gradients():
    model, x = tiny(norm_pix=True), torch.randn(4, 3, 8, 12)
    loss, _, _ = model(x)
    loss.backward()
    for name, p in model.named_parameters():
        if "pos_embed" in name:
            assert not p.requires_grad and p.grad is None
        elif not name.endswith("attn.qkv.bias"):  # a key's bias changes nothing
            assert p.grad is not None and p.grad.abs().max() > 0, name
    nn.init.zeros_(model.decoder_pred.weight), nn.init.zeros_(model.decoder_pred.bias)
    # a prediction of zero costs the variance 1, or (n - 1) / n of it, as n = 48 here
    assert model(x)[0].item() == pytest.approx(47 / 48, abs=1e-3)


def test_the_loss_falls_on_one_batch():
    torch.manual_seed(0)
    x = mae.normalise(mae.load_data("digits")[0][:16] / 255)
    model = MAE(32, 8, 3, 32, 2, 2, 32, 1, 2, norm_pix=False)
    noise, optimizer = torch.rand(16, 16), torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss, _, _ = model(x, 0.5, noise)
        optimizer.zero_grad(); loss.backward(); optimizer.step()  # fmt: skip
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


@torch.no_grad()
def test_masked_error_by_hand():
    model, x = tiny(norm_pix=False), torch.randint(0, 256, (5, 3, 8, 12), dtype=torch.uint8)
    error, fill, (image, masked, painted) = mae.masked_error(model, x, 0.5)
    noise = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
    _, pred, mask = model(mae.normalise(image), 0.5, noise)
    total, by_fill = [], []
    for b in range(5):
        patches = image[b].unfold(1, 4, 4).unfold(2, 4, 4).reshape(3, 6, 16)
        guess = (mae.unpatchify(pred, 4, (2, 3))[b] + 1) / 2
        guess = guess.unfold(1, 4, 4).unfold(2, 4, 4).reshape(3, 6, 16)
        mean = patches[:, mask[b] == 0].mean((1, 2))
        for i in range(6):
            if mask[b, i]:
                total.append((guess[:, i] - patches[:, i]) ** 2)
                by_fill.append((mean[:, None] - patches[:, i]) ** 2)
    assert error == pytest.approx(torch.cat(total).mean().item(), rel=1e-4)
    assert fill == pytest.approx(torch.cat(by_fill).mean().item(), rel=1e-4)
    seen = masked == image
    assert painted[seen].equal(image[seen]) and 0.4 < seen.float().mean() < 0.6


# ---- official names ----

COUNTS = {(768, 12, 12, 16): 111907840, (1024, 24, 16, 16): 329541888}


@pytest.mark.parametrize("sizes", COUNTS)
def test_parameter_counts(sizes):
    dim, depth, heads, patch = sizes
    with torch.device("meta"):
        model = MAE(224, patch, 3, dim, depth, heads)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[sizes]


def official_names(depth=12, decoder_depth=8):
    """What `mae_visualize_vit_base.pth` holds under "model", written out from its layout."""
    names = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    parts = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    for prefix, n in (("blocks", depth), ("decoder_blocks", decoder_depth)):
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            parts += [f"{prefix}.{i}.{layer}" for i in range(n)]
    return names | {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}


def test_official_names_of_the_base_model():
    with torch.device("meta"):
        model = MAE(224, 16, 3, 768, 12, 12)
    w = model.state_dict()
    assert set(w) == official_names() and len(w) == 254
    assert w["pos_embed"].shape == (1, 197, 768) and w["decoder_pos_embed"].shape == (1, 197, 512)
    assert w["decoder_pred.weight"].shape == (768, 512) and w["mask_token"].shape == (1, 1, 512)


@torch.no_grad()
def test_official_files_load_and_the_trunk_is_vit_py():
    model = tiny(image_size=12, dim=64, heads=1, decoder_dim=32, decoder_heads=16)
    again, x = MAE.from_state_dict({"model": model.state_dict()}), torch.randn(2, 3, 12, 12)
    noise = torch.rand(2, 9)
    torch.testing.assert_close(again(x, 0.5, noise)[1], model(x, 0.5, noise)[1])
    trunk = vit.ViT.from_state_dict(model.state_dict(), heads=1).eval()
    torch.testing.assert_close(trunk.forward_features(x), model.forward_features(x))
    with pytest.raises(ValueError, match="no weights"):
        MAE.from_state_dict({"model": {"a": torch.zeros(1)}})
    torch.manual_seed(0)
    net = mae.Classifier(**{**SMALL, "image_size": 12}, num_classes=5)
    nn.init.normal_(net.head.weight)
    other = vit.ViT.from_state_dict(net.state_dict(), heads=2).eval()
    assert other.pool == "mean"
    torch.testing.assert_close(other(x), net(x))


def test_bad_sizes_are_value_errors():
    for kwargs in (
        {"patch_size": 5},
        {"heads": 3},
        {"dim": 18},
        {"decoder_dim": 6},
        {"image_size": 4},
    ):
        with pytest.raises(ValueError):
            tiny(**kwargs)
    with pytest.raises(ValueError, match="the model wants"):
        tiny()(torch.zeros(2, 3, 12, 8))


@pytest.mark.parametrize("size, patch, batch", [((4, 8), 4, 1), ((6, 10), (3, 2), 3)])
def test_shapes(size, patch, batch):
    model, x = tiny(image_size=size, patch_size=patch), torch.rand(batch, 3, *size)
    loss, pred, mask = model(x)
    N = math.prod(model.grid)
    assert loss.shape == () and mask.shape == (batch, N)
    assert pred.shape == (batch, N, 3 * math.prod(mae.pair(patch)))
    assert model.reconstruct(x, pred).shape == x.shape


# ---- data and recipe ----


def test_canvas_digits():
    x, y, x_test, y_test = mae.load_data("digits")
    assert x.shape == (6450, 3, 32, 32) and x_test.shape == (1500, 3, 32, 32)
    assert y.view(-1, 5).eq(y[::5, None]).all() and len(y_test) == 1500
    assert (x[0] != x[1]).any()  # the same digit, pasted anew


def test_augment():
    x = torch.rand(3, 3, 8, 8)
    u = torch.full((3, 6), 0.5)  # the middle of every range
    torch.testing.assert_close(mae.augment(x, u, 1.0), x)
    torch.testing.assert_close(mae.augment(x, u, 1.0, flip=1.0), x.flip(3))
    u = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    assert mae.augment(x, u, 0.2, 0.5).shape == x.shape
    inner = mae.augment(x, torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.5, 0.5]] * 3), 0.25)
    torch.testing.assert_close(inner[..., 3:5, 3:5].mean((2, 3)), x[..., 3:5, 3:5].mean((2, 3)))


def test_fine_tuning_starts_from_the_encoder(monkeypatch):
    args = mae.parse(["--quick", "--device", "cpu"])[0]
    x = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    model, y, starts = mae.build(args, x), torch.arange(20) % 4, []
    monkeypatch.setattr(
        mae,
        "make_optimizer",
        lambda net, *_: (
            starts.append({k: v.clone() for k, v in net.state_dict().items()})
            or torch.optim.SGD(net.parameters(), 0.1)
        ),
    )
    nn.init.normal_(model.cls_token)
    for start in (model, None):
        mae.fine_tune(start, x, y, 4, args)
    same = [all(s[k].equal(v) for k, v in model.state_dict().items() if k in s) for s in starts]
    assert same == [True, False] and starts[0]["head.weight"].equal(starts[1]["head.weight"])


def test_evaluation_uses_the_labels_of_its_rows_and_the_test_part():
    y = torch.arange(40) % 2
    x, other = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)[y], y.clone()
    other[10:] = 1 - y[10:]  # labels that must not be looked at
    for answers, acc in ((y, 1.0), (1 - y, 0.0)):
        assert mae.evaluate(lambda x: x, [x, other, x, answers], torch.arange(10)) == [acc, acc]


def test_the_study_shows_as_many_labels_as_it_says(monkeypatch, capsys):
    args = mae.parse(["--quick", "--device", "cpu"])[0]
    x, y = torch.randint(0, 256, (1100, 3, 16, 16), dtype=torch.uint8), torch.arange(1100) % 3
    tuned, probed, ratios = [], [], []

    def fine_tune(start, x, y, K, args):
        tuned.append((start is None, len(x), len(y)))
        return mae.Classifier(K, image_size=16, patch_size=8, dim=16, depth=1, heads=2)

    monkeypatch.setattr(mae, "fine_tune", fine_tune)
    monkeypatch.setattr(mae, "evaluate", lambda f, _, rows: probed.append(len(rows)) or [0.1, 0.2])
    monkeypatch.setattr(mae, "train", lambda *a: ratios.append(a[4].mask_ratio))
    monkeypatch.setattr(mae, "encoder_speed", lambda *_: 1.0)
    accs, curve = mae.study(mae.build(args, x), [x, y, x[:20], y[:20]], x[:20], args)
    pairs = [(False, 100, 100), (True, 100, 100), (False, 1000, 1000), (True, 1000, 1000)]
    assert tuned == [*pairs, (True, 1100, 1100)] and len(accs) == 5
    assert probed == [1000, 1100] * 5 + [1100] * 3 and ratios == [r for r, _, _ in curve]
    assert curve == [(0.25, 0.2, 1.0), (0.5, 0.2, 1.0), (0.75, 0.2, 1.0)]


# ---- the script ----


def main(path, *argv):
    argv = ["--quick", "--device", "cpu", "--out", path, *argv]
    return mae.main([*map(str, argv)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_npz(tmp_path_factory.mktemp("mae") / "a.npz")


@pytest.fixture
def flags(data, monkeypatch):
    monkeypatch.setattr(mae, "study", lambda *_: ({}, ()))
    return ["--data", data, "--batch-size", 8, "--patch-size", 4, "--log-every", 2]


def test_quick_runs(tmp_path, capsys):
    assert main(tmp_path / "new" / "dir") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mae | 0.") and "cpu | seed 0 | digits 300/300" in lines[0]
    for word in (
        "test acc fine-tuned on 300 labels",
        "from scratch",
        "filled with mean",
        "chance 0.1",
    ):
        assert word in lines[-1]
    text = "\n".join(lines)
    for word in ("random network", "supervised", "raw pixels", "grey centred", "mask ratio 0.75"):
        assert word in text
    assert (tmp_path / "new" / "dir" / "mae.png").stat().st_size > 10000


def test_resumed_run_is_the_unbroken_one(tmp_path, flags, monkeypatch, capsys):
    assert main(tmp_path, *flags, "--steps", 6, "--save", tmp_path / "a.pt") == 0
    forward, calls = MAE.forward, []

    def interrupted(self, x, *rest):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(self, x, *rest)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(MAE, "forward", interrupted)
        log = [*flags[:-1], 9]
        assert main(tmp_path, *log, "--steps", 6, "--save", tmp_path / "b.pt") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "b.pt", weights_only=True)["step"] == 3
    more = ["--load", tmp_path / "b.pt", "--steps", 6, "--save", tmp_path / "b.pt"]
    assert main(tmp_path, *more, "--log-every", 2) == 0
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in "ab")
    assert a["history"][1:] == b["history"][1:] and b["step"] == 6
    for k, v in a["model"].items():
        assert b["model"][k].equal(v), k
    capsys.readouterr()
    assert main(tmp_path, "--load", tmp_path / "b.pt", "--target", 0.5) == 1  # evaluates only
    assert "step" not in capsys.readouterr().out
    argv = ["--load", str(tmp_path / "b.pt"), "--weight-decay", "0.3", "--out", str(tmp_path)]
    groups = mae.parse([*argv, "--device", "cpu", "--quick"])[3].param_groups  # the flag goes first
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]


def test_labels_never_reach_the_pretraining(tmp_path, flags):
    other = save_npz(tmp_path / "b.npz", y_train=np.arange(60) // 20)
    for name, path in (("a", flags[1]), ("b", other)):
        argv = [*flags[2:], "--data", path, "--save", tmp_path / f"{name}.pt"]
        assert main(tmp_path, *argv) == 0
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in "ab")
    assert all(b["model"][k].equal(v) for k, v in a["model"].items())


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, flags, monkeypatch, capsys):
    loss, calls = mae.mae_loss, []

    def poisoned(*a):
        calls.append(1)
        return loss(*a) * (math.nan if len(calls) > 4 else 1)

    monkeypatch.setattr(mae, "mae_loss", poisoned)
    argv = ["--save", tmp_path / "n.pt", "--log-every", 1]
    assert main(tmp_path, *flags, *argv) == 1  # every step has one more call, of the log line
    assert "at step 3" in capsys.readouterr().err.splitlines()[-1]
    saved = torch.load(tmp_path / "n.pt", weights_only=True)
    assert saved["step"] == 2 and all(w.isfinite().all() for w in saved["model"].values())


def test_two_processes_train_as_one(torchrun, tmp_path, data):
    """torchrun on two CPU processes: the same losses as one process on the whole batch."""
    flags = ["--quick", "--steps", "3", "--device", "cpu", "--out", tmp_path, "--data", data]
    flags += ["--batch-size", "8", "--patch-size", "4", "--log-every", "1", "--save"]
    out = torchrun(FILE, *flags, tmp_path / "2.pt")
    assert out.count("mae |") == 1  # only the first process prints
    assert mae.main([*map(str, [*flags, tmp_path / "1.pt"])]) == 0
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for one, other in zip(a["history"], b["history"]):
        assert one == pytest.approx(other, rel=1e-4)
    for k, v in a["model"].items():
        if not k.endswith("attn.qkv.bias"):  # of a key's bias, Adam enlarges the rounding error
            torch.testing.assert_close(b["model"][k], v, atol=2e-5, rtol=1e-4)


def test_official_weights_draw_a_folder(tmp_path, capsys):
    import matplotlib.image

    model = tiny(image_size=16, dim=64, heads=1, decoder_dim=32, decoder_heads=16)
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    (tmp_path / "folder").mkdir()
    for i, shape in enumerate([(20, 30, 3), (15, 9), (12, 12, 4)]):
        image = np.random.default_rng(i).random(shape).astype("f4")
        matplotlib.image.imsave(tmp_path / "folder" / f"{i}.png", image)
    for data in ("folder", "a.npy"):
        np.save(tmp_path / "a.npy", np.zeros((2, 9, 9), np.uint8))
        (tmp_path / "mae.png").unlink(missing_ok=True)
        assert main(tmp_path, "--load", tmp_path / "w.pth", "--data", tmp_path / data) == 0
        assert (tmp_path / "mae.png").stat().st_size > 5000
    assert "masked-pixel error" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_2(tmp_path, data, flags, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(tmp_path, *flags, "--save", tmp_path / "a.pt") == 0
    np.savez("pickled.npz", x_train=np.array([{}], dtype=object))
    save_npz("float.npz", dtype=np.float32)
    save_npz("labels.npz", y_test=np.arange(20))
    save_npz("shape.npz", x_test=np.zeros((20, 9, 9), np.uint8))
    torch.save({"script": "vit"}, "other.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"model": {"a": torch.zeros(1)}}, "weights.pt")
    pathlib.Path("junk.pt").write_bytes(b"junk")
    pathlib.Path("empty").mkdir()
    pathlib.Path("file").write_text("")
    for bad in (
        "--steps 0", "--batch-size 0", "--batch-size 99999", "--lr 0", "--lr nan", "--dim 62",
        "--patch-size 5", "--patch-size 0", "--depth 0", "--heads 3", "--mask-ratio 1.5",
        "--norm-pix 2", "--crop 0", "--decoder-dim 6", "--decoder-heads 5", "--log-every 0",
        "--data nofile.npz", "--data pickled.npz", "--data float.npz", "--data labels.npz",
        "--data shape.npz", "--load other.pt", "--load junk.pt", "--load tensor.pt",
        "--load weights.pt", "--load weights.pt --data empty", "--load a.pt --dim 32",
        "--out file/x", "--save empty", "--save no/such/x.pt", "--seed -1", "--device tpu",
    ):  # fmt: skip
        argv = bad.split() if "--data" in bad else [*bad.split(), "--data", str(data)]
        if "a.pt" not in bad:
            argv = ["--batch-size", "8", "--patch-size", "4", *argv]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            mae.main(["--quick", "--device", "cpu", "--out", "o", *argv])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and not out and "error: " in err.splitlines()[-1], bad
        assert "Traceback" not in err, bad


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert mae.main(["--out", str(tmp_path), "--target", ".7"]) == 0
