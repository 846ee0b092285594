"""dino.py: `pytest tests/test_dino.py`."""

import copy
import math
import pathlib
import signal

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dino
import vit
from dino import DINOHead, DINOLoss, Network, ViT

FILE = pathlib.Path(__file__).parent.parent / "dino.py"
SIZES = {"image_size": (8, 12), "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(**kwargs):
    torch.manual_seed(0)
    model = ViT(**{**SIZES, **kwargs})
    for p in model.parameters():  # zeros at the start would hide mistakes
        p.data += 0.1 * torch.randn_like(p)
    return model


def tiny_network(**kwargs):
    return Network(tiny(), DINOHead(16, 6, 8, 4, **kwargs))


def save_npz(path, n=60, size=16, dtype=np.uint8, chans=(3,), **change):
    r = np.random.default_rng(0)
    x, y = r.integers(0, 255, (n, size, size, *chans)).astype(dtype), np.arange(n) % 3
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20], **change})
    return path


# ---- backbone ----


@pytest.mark.parametrize("size, patch, batch", [((8, 12), 4, 1), ((6, 10), (3, 2), 3)])
def test_shapes(size, patch, batch):
    model, x = tiny(image_size=size, patch_size=patch), torch.randn(batch, 3, *size)
    assert model(x).shape == (batch, 16)
    A = model.attention(x)
    assert A.shape == (batch, 2, *model.grid)
    weights = []
    torch.testing.assert_close(model.forward_features(x, weights), model.forward_features(x))
    torch.testing.assert_close(weights[-1].sum(-1), torch.ones(batch, 2, 1 + math.prod(model.grid)))
    assert A.flatten(2).equal(weights[-1][:, :, 0, 1:])


def test_bad_sizes_are_value_errors():
    for kwargs in ({"patch_size": 5}, {"heads": 3}, {"patch_size": 0}):
        with pytest.raises(ValueError):
            tiny(**kwargs)


@torch.no_grad()
def test_the_trunk_is_that_of_vit_py():
    model, x = tiny(image_size=12, in_chans=3), torch.randn(2, 3, 12, 12)
    trunk = vit.ViT.from_state_dict(model.state_dict(), heads=2).eval()
    torch.testing.assert_close(trunk.forward_features(x), model.forward_features(x))
    torch.testing.assert_close(trunk.attention(x)[-1][:, :, 0, 1:], model.attention(x).flatten(2))


@torch.no_grad()
def test_small_views_get_interpolated_positions():
    model = tiny(image_size=16)  # 4 x 4 places
    rows, cols = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    model.pos_embed.zero_()
    model.pos_embed[0, 0] = 9
    model.pos_embed[0, 1:, 0], model.pos_embed[0, 1:, 1] = rows.flatten(), cols.flatten()
    assert model.positions((4, 4)) is model.pos_embed
    pos = model.positions((2, 8))
    assert pos.shape == (1, 17, 16) and (pos[0, 0] == 9).all()  # the class token has no place
    grid = pos[0, 1:].view(2, 8, 16)
    assert (grid[0, :, 0] < grid[1, :, 0]).all() and (grid[:, 1:, 1] > grid[:, :-1, 1]).all()
    assert grid[:, :, 0].mean() == pytest.approx(1.5, abs=1e-5)
    assert model(torch.randn(2, 3, 8, 32)).shape == (2, 16)


def test_stem():
    model = tiny(patch_size=1, stem=dino.conv_net(3, [(8, 2), (16, 2)]))
    assert model.grid == (2, 3) and model(torch.randn(2, 3, 16, 8)).shape == (2, 16)


# ---- head ----


@torch.no_grad()
def test_outputs_are_cosines():
    torch.manual_seed(0)
    head, x = DINOHead(16, 5, 12, 8), torch.randn(7, 16)
    z, v = head.mlp(x), head.last_layer.parametrizations.weight.original1
    by_hand = [[F.cosine_similarity(a, b, dim=0).item() for b in v] for a in z]
    torch.testing.assert_close(head(x), torch.tensor(by_hand))


def test_official_heads_load():
    torch.manual_seed(0)
    head, other = DINOHead(16, 5, 12, 8), DINOHead(16, 5, 12, 8)
    w = {k: v for k, v in head.state_dict().items() if k.startswith("mlp")}
    assert set(w) == {f"mlp.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")}
    w["last_layer.weight_g"] = torch.ones(5, 1)
    w["last_layer.weight_v"] = head.last_layer.parametrizations.weight.original1.detach()
    other.load_state_dict(w)
    x = torch.randn(3, 16)
    torch.testing.assert_close(other(x), head(x))
    copied = copy.deepcopy(other)
    assert copied(x).equal(other(x))
    g = head.last_layer.parametrizations.weight.original0
    assert not g.requires_grad and (g == 1).all()


def official(D=128, depth=2, P=4, grid=3):
    """A state dict with the names and shapes of DINO's backbones, written out."""
    w = {"cls_token": (1, 1, D), "pos_embed": (1, grid * grid + 1, D)}
    w |= {"patch_embed.proj.weight": (D, 3, P, P), "patch_embed.proj.bias": (D,)}
    for i in range(depth):
        b = f"blocks.{i}."
        for n, out, inp in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1)):
            w |= {b + n + ".weight": (out * D, inp * D), b + n + ".bias": (out * D,)}
        w |= {b + "mlp.fc2.weight": (D, 4 * D), b + "mlp.fc2.bias": (D,)}
        w |= {b + f"norm{k}.{p}": (D,) for k in (1, 2) for p in ("weight", "bias")}
    w |= {"norm.weight": (D,), "norm.bias": (D,)}
    g = torch.Generator().manual_seed(0)
    return {k: 0.1 * torch.randn(s, generator=g) for k, s in w.items()}


def test_official_backbones_load():
    w, x = official(), torch.randn(2, 3, 12, 12)
    model = ViT.from_state_dict(w)
    assert set(model.state_dict()) == set(w) and model.blocks[0].heads == 2
    full = {"student": {}, "teacher": {"module.backbone." + k: v for k, v in w.items()}}
    full["teacher"]["module.head.mlp.0.weight"] = torch.zeros(2)
    torch.testing.assert_close(ViT.from_state_dict(full)(x), model(x))
    with pytest.raises(ValueError, match="no weights"):
        ViT.from_state_dict({"a": torch.zeros(1)})
    with torch.device("meta"):  # ViT-S/16: 22,050,664 less its head of 385,000
        assert sum(p.numel() for p in ViT().parameters()) == 22050664 - 385000


# ---- objective ----


def test_loss_by_hand():
    """Eq. 1-3 with loops: every global view against every other view, the centre, temperatures."""
    torch.manual_seed(0)
    B, V, K = 3, 4, 5
    loss_fn = DINOLoss(K, tau_s=0.2)
    loss_fn.center += torch.randn(1, K)
    s, t = torch.randn(V * B, K), torch.randn(2 * B, K)
    total, pairs = 0.0, 0
    for g in range(2):
        for v in range(V):
            if g == v:
                continue
            pairs += 1
            for b in range(B):
                teacher = [(t[g * B + b, k] - loss_fn.center[0, k]).item() / 0.05 for k in range(K)]
                student = [s[v * B + b, k].item() / 0.2 for k in range(K)]
                top = max(teacher)
                P = [math.exp(a - top) / sum(math.exp(c - top) for c in teacher) for a in teacher]
                log_sum = math.log(sum(math.exp(a) for a in student))
                total -= sum(p * (a - log_sum) for p, a in zip(P, student)) / B
    assert pairs == 6 and loss_fn(s, t, 0.05).item() == pytest.approx(total / pairs, rel=1e-5)


def test_gradients():
    """All of the student's weights get one, the teacher's none; nor does the first view's twin."""
    student = tiny_network()
    teacher, loss_fn = copy.deepcopy(student), DINOLoss(6)
    views = [torch.randn(4, 3, 8, 12), torch.randn(4, 3, 8, 12), torch.randn(4, 3, 4, 8)]
    t = teacher(views[:2])
    loss_fn(student(views), t, 0.04).backward()
    assert all(p.grad is None for p in teacher.parameters())
    for name, p in student.named_parameters():
        if "original0" in name:
            assert p.grad is None
        elif not name.endswith("attn.qkv.bias"):  # a key's bias changes nothing
            assert p.grad is not None and p.grad.abs().max() > 0, name
    s = torch.randn(6, 6, requires_grad=True)  # of global views alone, each learns from the other
    one_hot = torch.zeros(4, 6)
    one_hot[:2, 1] = one_hot[2:, 3] = 99.0
    loss_fn(s, one_hot, 0.04).backward()
    assert s.grad[:2].argmin(1).tolist() == [3, 3] and s.grad[2:4].argmin(1).tolist() == [1, 1]
    assert (s.grad[4:, [1, 3]] < 0).all() and (s.grad[4:, [0, 2, 4, 5]] > 0).all()


def test_loss_of_equal_outputs_is_ln_K():
    loss_fn = DINOLoss(7)
    assert loss_fn(torch.ones(8, 7), torch.ones(4, 7), 0.04).item() == pytest.approx(math.log(7))


def test_centre():
    loss_fn, t = DINOLoss(3, center_momentum=0.9), torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    loss_fn.update_center(t)
    torch.testing.assert_close(loss_fn.center, torch.full((1, 3), 0.2))
    loss_fn.update_center(t)
    torch.testing.assert_close(loss_fn.center, torch.full((1, 3), 0.38))
    assert set(loss_fn.state_dict()) == {"center"}
    for _ in range(200):
        loss_fn.update_center(t)
    P = loss_fn.teacher_probabilities(t, 0.5)
    torch.testing.assert_close(P, torch.softmax((t - 2) / 0.5, -1))


def test_sinkhorn_by_hand_uses_all_outputs_alike():
    t = torch.randn(12, 4) + torch.tensor([9.0, 0, 0, 0])  # as it is, one output would take all
    P = [[math.exp((t[i, k] - t[i].max()).item() / 0.5) for k in range(4)] for i in range(12)]
    P = [[p / sum(row) for p in row] for row in P]
    for _ in range(3):
        columns = [sum(row[k] for row in P) for k in range(4)]
        P = [[p / c for p, c in zip(row, columns)] for row in P]
        P = [[p / sum(row) for p in row] for row in P]
    loss_fn = DINOLoss(4, sinkhorn=True)
    got = loss_fn.teacher_probabilities(t.requires_grad_(), 0.5)
    torch.testing.assert_close(got, torch.tensor(P), rtol=1e-4, atol=1e-6)
    assert not got.requires_grad and (got.mean(0) - 0.25).abs().max() < 0.05
    P = loss_fn.teacher_probabilities(torch.tensor([[99.0, 0.0], [99.0, 0.0]]), 0.01)
    assert P.isfinite().all()  # an output that nobody uses


def test_teacher_is_the_exact_average():
    student = tiny_network()
    teacher = copy.deepcopy(student)
    start = [p.clone() for p in teacher.parameters()]
    for p in student.parameters():
        p.data += 1
    dino.update_teacher(teacher, student, 0.9)
    for p, q in zip(teacher.parameters(), start):
        torch.testing.assert_close(p, q + 0.1)


def test_measures_of_collapse():
    loss_fn, B, K = DINOLoss(4, tau_s=0.5), 3, 4
    s, t = torch.randn(5 * B, K), torch.randn(2 * B, K)
    h, kl = dino.collapse_measures(s, t, loss_fn, 0.3)
    P, Q = torch.softmax(t / 0.3, -1), torch.softmax(torch.cat([s[B : 2 * B], s[:B]]) / 0.5, -1)
    assert h == pytest.approx(-(P * P.log()).sum(-1).mean().item(), rel=1e-4)
    assert kl == pytest.approx((P * (P / Q).log()).sum(-1).mean().item(), rel=1e-4) and kl > 0
    two = loss_fn(s[: 2 * B], t, 0.3).item()
    assert h + kl == pytest.approx(two, rel=1e-5)  # Eq. 5
    h, kl = dino.collapse_measures(torch.ones(6, K), torch.ones(6, K), loss_fn, 0.3)
    assert h == pytest.approx(math.log(K), rel=1e-5) and kl == pytest.approx(0, abs=1e-6)


def test_clipping_is_per_parameter():
    net = nn.Linear(2, 2)
    net.weight.grad, net.bias.grad = torch.full((2, 2), 5.0), torch.tensor([0.3, 0.4])
    dino.clip_gradients(net, 1.0)
    assert net.weight.grad.norm() == pytest.approx(1.0, rel=1e-4)
    torch.testing.assert_close(net.bias.grad, torch.tensor([0.3, 0.4]))


def test_schedule():
    assert [round(dino.cosine(1, 0, k, 4), 4) for k in (0, 2, 4, 9)] == [1, 0.5, 0, 0]


def test_views_run_by_size_and_come_back_in_order():
    torch.manual_seed(0)
    net = tiny_network()
    views = [torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12), torch.randn(2, 3, 4, 8)]
    one_by_one = torch.cat([net.head(net.backbone(x)) for x in views])
    torch.testing.assert_close(net(views), one_by_one)


def test_the_loss_falls_on_one_batch():
    torch.manual_seed(0)
    student = Network(ViT(16, 4, 3, 32, 2, 2), DINOHead(32, 16, 32, 16, batch_norm=True))
    teacher, loss_fn = copy.deepcopy(student), DINOLoss(16)
    x = torch.rand(16, 3, 16, 16)
    views = [x + 0.05 * torch.randn_like(x) for _ in range(3)]
    optimizer, losses = torch.optim.AdamW(student.parameters(), 3e-3), []
    with torch.no_grad():
        t = teacher(views[:2])
    for _ in range(60):
        loss = loss_fn(student(views), t, 0.04)
        optimizer.zero_grad(); loss.backward(); optimizer.step()  # fmt: skip
        losses.append(loss.item())
    h = dino.collapse_measures(t, t, loss_fn, 0.04)[0]  # what no student can go below
    assert losses[-1] - h < (losses[0] - h) / 3


# ---- views, data, attention ----


def test_augment():
    x, off = (
        torch.rand(3, 3, 8, 8),
        {"flip": 0.0, "jitter": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.0},
    )
    u = torch.full((3, 16), 0.5)  # the middle of every range
    torch.testing.assert_close(dino.augment(x, u, (1.0, 1.0), **off), x, atol=1e-5, rtol=1e-5)
    mirrored = dino.augment(x, u, (1.0, 1.0), **{**off, "flip": 1.0})
    torch.testing.assert_close(mirrored, x.flip(3), atol=1e-5, rtol=1e-5)
    small = dino.augment(x, u, (0.25, 0.25), 4, **off)  # the middle quarter, pixel by pixel
    torch.testing.assert_close(small, x[:, :, 2:6, 2:6], atol=1e-5, rtol=1e-5)
    u = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    assert dino.augment(x, u, (0.1, 0.4), (4, 6)).shape == (3, 3, 4, 6)
    assert dino.augment(x, u).equal(dino.augment(x, u))


def test_blur_by_hand():
    """A Gaussian along rows and columns, of another width for each image; some are left alone."""
    off = {"flip": 0.0, "jitter": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.5}
    x, u = torch.rand(2, 3, 5, 7), torch.full((2, 16), 0.5)
    u[:, 13] = torch.tensor([0.4, 0.6])
    got = dino.augment(x, u, (1.0, 1.0), **off)
    torch.testing.assert_close(got[1], x[1], atol=1e-5, rtol=1e-5)
    w = [torch.tensor([[math.exp(-((i - j) ** 2) / (2 * 1.05**2)) for i in range(n)]
                       for j in range(n)]) for n in (5, 7)]  # fmt: skip
    rows, columns = (m / m.sum(1, keepdim=True) for m in w)
    torch.testing.assert_close(got[0], rows @ x[0] @ columns.T, atol=1e-5, rtol=1e-5)


def test_canvas_digits():
    x, y, x_test, y_test = dino.load_data("digits")
    assert x.shape == (6450, 3, 32, 32) and x_test.shape == (1500, 3, 32, 32)
    assert y.view(-1, 5).eq(y[::5, None]).all() and len(y_test) == 1500


def test_share_of_attention_on_the_digit():
    x = torch.full((2, 3, 8, 8), 25, dtype=torch.uint8)
    x[:, 1, :4, :4] = 255  # the digit fills the first quarter
    A = torch.tensor([[[0.7, 0.1], [0.1, 0.1]], [[0.2, 0.2], [0.2, 0.2]]]).expand(2, 2, 2, 2)
    share, area = dino.digit_share(A, x)
    assert share == pytest.approx([0.7, 0.25]) and area == 0.25
    x[:, 1, :2, :4] = 25  # half of it
    assert dino.digit_share(A, x)[0] == pytest.approx([0.35, 0.125])


def test_batch_norm_is_torchs():
    x = torch.randn(16, 5)
    mine, theirs = dino.BatchNorm(5), nn.BatchNorm1d(5)
    torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


# ---- the script ----


def main(path, *argv):
    argv = ["--quick", "--device", "cpu", "--out", path, *argv]
    return dino.main([*map(str, argv)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_npz(tmp_path_factory.mktemp("dino") / "a.npz")


@pytest.fixture
def flags(data):
    return ["--data", data, "--log-every", 2, "--local-size", 8]


def test_quick_runs(tmp_path, capsys):
    assert main(tmp_path / "new" / "dir") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dino | 0.") and "cpu | seed 0 | digits 300/300" in lines[0]
    for word in ("test acc linear 300 labels DINO teacher", "random network", "grey centred"):
        assert word in lines[-1]
    text = "\n".join(lines)
    for word in ("centring only", "sharpening only", "raw pixels", "attention on the digit"):
        assert word in text
    assert (tmp_path / "new" / "dir" / "dino.png").stat().st_size > 10000


def weights(path):
    state = torch.load(path, weights_only=True)
    return {(part, name, k): v for part in ("student", "teacher", "loss_fn")
            for name, w in state[part].items() for k, v in w.items()}  # fmt: skip


def test_resumed_run_is_the_unbroken_one(tmp_path, flags, monkeypatch, capsys):
    assert main(tmp_path, *flags, "--save", tmp_path / "a.pt") == 0
    loss, calls = DINOLoss.forward, []

    def interrupted(self, *a):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(self, *a)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(DINOLoss, "forward", interrupted)
        assert main(tmp_path, *flags, "--save", tmp_path / "b.pt") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    half = torch.load(tmp_path / "b.pt", weights_only=True)
    assert half["step"] == 3 and half["done"] == {"DINO": 3}
    assert main(tmp_path, "--load", tmp_path / "b.pt", "--save", tmp_path / "b.pt") == 0
    a, b = weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt")
    assert set(a) == set(b) and all(b[k].equal(v) for k, v in a.items())
    capsys.readouterr()
    assert main(tmp_path, "--load", tmp_path / "b.pt", "--target", 1.1) == 1  # evaluates only
    assert "step" not in capsys.readouterr().out


def test_what_each_run_does(tmp_path, flags):
    """The collapse study's switches, the frozen last layer, the teacher's average, no labels."""
    long = [*flags, "--steps", 20, "--freeze", 1, "--momentum", 0.5, "--warmup", 0]
    assert main(tmp_path, *long, "--save", tmp_path / "a.pt") == 0
    args, _, data, fresh = dino.parse([*map(str, long), "--quick", "--device", "cpu"])
    w = weights(tmp_path / "a.pt")
    assert (w["loss_fn", "DINO", "center"] != 0).all()
    assert (w["loss_fn", "centring only", "center"] != 0).all()
    assert (w["loss_fn", "sharpening only", "center"] == 0).all()
    history = torch.load(tmp_path / "a.pt", weights_only=True)["history"]
    h = {name: entropy for name, step, _, entropy, _ in history if step == 1}
    assert h["centring only"] > h["both"] + 0.5 and h["both"] == h["sharpening only"]  # tau_t
    v = "head.last_layer.parametrizations.weight.original1"
    first = fresh["DINO"].student.state_dict()
    assert w["student", "DINO", v].equal(first[v])  # frozen
    k = "backbone.blocks.0.attn.qkv.weight"
    assert not w["student", "DINO", k].equal(first[k])
    assert not w["teacher", "DINO", k].equal(first[k])
    assert not w["teacher", "DINO", k].equal(w["student", "DINO", k])
    runs = dino.build(args, data[0], 3)
    assert runs["DINO"].student is not runs["DINO"].teacher
    other = save_npz(tmp_path / "b.npz", y_train=np.arange(60) // 20)
    assert main(tmp_path, *long, "--data", other, "--save", tmp_path / "b.pt") == 0
    again = weights(tmp_path / "b.pt")
    assert all(again[k].equal(x) for k, x in w.items() if k[1] == "DINO")


def test_the_teacher_sees_the_global_views_only(tmp_path, flags, monkeypatch):
    seen, forward = [], Network.forward

    def spy(self, views):
        seen.append((any(p.requires_grad for p in self.parameters()), [x.shape[2] for x in views]))
        return forward(self, views)

    monkeypatch.setattr(Network, "forward", spy)
    runs = [*flags, "--short", 0, "--label-steps", 0, "--steps", 1, "--local-views", 3]
    assert main(tmp_path, *runs) == 0
    assert seen == [(True, [16, 16, 8, 8, 8]), (False, [16, 16])]


def test_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, flags, monkeypatch, capsys):
    loss, calls = DINOLoss.forward, []

    def poisoned(self, *a):
        calls.append(1)
        return loss(self, *a) * (math.nan if len(calls) > 2 else 1)

    monkeypatch.setattr(DINOLoss, "forward", poisoned)
    assert main(tmp_path, *flags, "--save", tmp_path / "n.pt") == 1
    assert "at step 3" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(tmp_path / "n.pt", weights_only=True)["step"] == 2
    assert all(v.isfinite().all() for v in weights(tmp_path / "n.pt").values())


def test_two_processes_train_as_one(torchrun, tmp_path, data):
    """torchrun on two CPU processes: losses, centre and weights of one process on the batch."""
    flags = ["--quick", "--steps", "3", "--device", "cpu", "--out", tmp_path, "--data", data]
    flags += ["--log-every", "1", "--local-size", "8", "--lr", "1e-4", "--save"]
    out = torchrun(FILE, *flags, tmp_path / "2.pt")
    assert out.count("dino |") == 1  # only the first process prints
    assert dino.main([*map(str, [*flags, tmp_path / "1.pt"])]) == 0
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True)["history"] for n in (1, 2))
    for one, other in zip(a, b):
        assert one[:2] == other[:2] and one[2:] == pytest.approx(other[2:], rel=1e-3, abs=1e-4)
    state = [torch.load(tmp_path / f"{n}.pt", weights_only=True)["optimizer"] for n in (1, 2)]
    a, b = (torch.cat([p["exp_avg"].flatten() for p in s["DINO"]["state"].values()]) for s in state)
    assert (a - b).norm() < 0.01 * a.norm()  # gradients, also those through batch statistics
    a, b = weights(tmp_path / "1.pt"), weights(tmp_path / "2.pt")
    for k, v in a.items():
        if "center" in k[2]:
            torch.testing.assert_close(b[k], v, atol=1e-4, rtol=1e-3)


def test_official_weights_draw_a_folder(tmp_path, capsys):
    import matplotlib.image

    torch.save(official(), tmp_path / "w.pth")
    (tmp_path / "folder").mkdir()
    for i, shape in enumerate([(20, 30, 3), (15, 9), (12, 12, 4)]):
        image = np.random.default_rng(i).random(shape).astype("f4")
        matplotlib.image.imsave(tmp_path / "folder" / f"{i}.png", image)
    np.save(tmp_path / "a.npy", np.zeros((2, 9, 9), np.uint8))
    for data in ("folder", "a.npy"):
        (tmp_path / "dino.png").unlink(missing_ok=True)
        argv = ["--load", tmp_path / "w.pth", "--data", tmp_path / data, "--out", tmp_path]
        assert dino.main([*map(str, argv), "--device", "cpu"]) == 0
        assert (tmp_path / "dino.png").stat().st_size > 3000
    assert "drew" in capsys.readouterr().out


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
        "--patch-size 5 --stem patch", "--patch-size 0", "--depth 0", "--heads 3", "--K 1",
        "--tau-t 0", "--momentum 1.5", "--crop 0", "--log-every 0", "--stem fc", "--head fc",
        "--data nofile.npz", "--data pickled.npz", "--data float.npz", "--data labels.npz",
        "--data shape.npz", "--load other.pt", "--load junk.pt", "--load tensor.pt",
        "--load weights.pt", "--load weights.pt --data empty", "--load a.pt --dim 32",
        "--load a.pt --seed 7", "--load a.pt --few 12",
        "--out file/x", "--save empty", "--save no/such/x.pt", "--seed -1", "--device tpu",
        "--local-size 4", "--local-crop 0.9",
    ):  # fmt: skip
        argv = bad.split() if "--data" in bad else [*bad.split(), "--data", str(data)]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            dino.main(["--quick", "--device", "cpu", "--out", "o", *argv])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and not out and "error: " in err.splitlines()[-1], bad
        assert "Traceback" not in err, bad


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert dino.main(["--out", str(tmp_path), "--target", ".78"]) == 0
