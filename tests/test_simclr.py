"""simclr.py: `pytest tests/test_simclr.py`."""

import math
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import simclr
from simclr import ResNet, SimCLR

ROOT = pathlib.Path(__file__).parent.parent
OFF = {k: 0.0 for k in ("rotate", "flip", "jitter", "hue", "grey", "blur")} | {"crop": 1.0}


def tiny(seed=0):
    torch.manual_seed(seed)
    return SimCLR(ResNet((1, 1), 8, stem="small"), 16)


def save_npz(path, n=60, size=8, dtype=np.uint8, chans=(3,), classes=3, **change):
    r = np.random.default_rng(0)
    x, y = r.integers(0, 255, (n, size, size, *chans)).astype(dtype), np.arange(n) % classes
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20], **change})
    return path


# ---- views ----


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 3, 7, 12), (2, 3, 32, 20)])
def test_views_keep_shape_and_range(shape):
    x = torch.rand(shape)
    y = simclr.augment(x, torch.rand(shape[0], 16), rotate=30)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 + 1e-5 and not y.equal(x)


def test_without_operations_a_view_is_the_image():
    x = torch.rand(4, 3, 9, 12)
    torch.testing.assert_close(simclr.augment(x, torch.rand(4, 16), **OFF), x, atol=1e-5, rtol=0)


def test_a_view_depends_on_its_own_numbers_alone():
    x, u = torch.rand(5, 3, 16, 16), torch.rand(5, 16)
    y = simclr.augment(x, u, rotate=20)
    assert y.equal(simclr.augment(x, u, rotate=20))
    for i in range(5):
        one = simclr.augment(x[i : i + 1], u[i : i + 1], rotate=20)
        torch.testing.assert_close(y[i : i + 1], one)
    assert not y[:1].equal(simclr.augment(x[:1], u[1:2], rotate=20))


def test_crop_is_a_box_of_the_image():
    """An image that names its places: the view shows which box was cut out."""
    H, W, n = 32, 48, 400
    rows, cols = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W,
                                indexing="ij")  # fmt: skip
    x = torch.stack([rows, cols, rows]).expand(n, 3, H, W)
    y = simclr.augment(x, torch.rand(n, 16), **{**OFF, "crop": 0.25})
    high, wide = (y[:, 0, -1, 5] - y[:, 0, 0, 5]), (y[:, 1, 5, -1] - y[:, 1, 5, 0])
    high, wide = high * H / (H - 1), wide * W / (W - 1)  # from outer pixel centres to edges
    area, ratio = high * wide, wide / high
    assert 0.24 < area.min() < 0.3 and 0.85 < area.max() < 1.01
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert y[:, 0].min() < 0.02 and y[:, 0].max() > 0.98  # it reaches all corners
    flat = y[:, 0] - y[:, 0, :, :1]
    assert flat.abs().max() < 1e-3  # and stays upright


def test_rotation_and_flip():
    u = torch.full((1, 16), 0.5)
    x = torch.zeros(1, 3, 33, 33)
    x[..., 16, 26] = 1  # right of the centre
    u[:, 4] = 0.75  # half the way to 90 degrees
    y = simclr.augment(x, u, **{**OFF, "rotate": 90.0})[0, 0]
    r, c = divmod(y.argmax().item(), 33)
    assert abs(abs(r - 16) - 7) <= 1 and abs(c - 23) <= 1  # 45 degrees, distance 10
    x = torch.rand(400, 3, 6, 8)
    y = simclr.augment(x, torch.rand(400, 16), **{**OFF, "flip": 0.5})
    same, mirrored = (y - x).abs().amax((1, 2, 3)) < 1e-4, (y - x.flip(3)).abs().amax((1, 2, 3))
    assert (same ^ (mirrored < 1e-4)).all() and 150 < same.sum() < 250
    y, u = {**OFF, "rotate": 60.0}, torch.rand(400, 16)  # a mirrored view is the view, mirrored
    y, z = (simclr.augment(x, u, **{**y, "flip": p}) for p in (0.0, 1.0))
    torch.testing.assert_close(y.flip(3), z, atol=1e-4, rtol=0)


def test_colour_by_hand():
    x = 0.3 + 0.2 * torch.rand(300, 3, 8, 8)
    luma = torch.tensor([0.299, 0.587, 0.114])
    u = torch.rand(300, 16)
    y = simclr.augment(x, u, **{**OFF, "grey": 0.3})
    grey = u[:, 11] < 0.3
    expected = torch.einsum("c,bchw->bhw", luma, x[grey])[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(y[grey], expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(y[~grey], x[~grey], atol=1e-5, rtol=0)
    assert 60 < grey.sum() < 120
    u[:, 7:11] = 0.5  # the factors at 1
    on = u[:, 6] < 0.8
    assert 215 < on.sum() < 265
    for k, f in ((7, lambda x: 1.4 * x), (8, lambda x: 1.4 * x - 0.4 * mean(x))):
        v = u.clone()
        v[:, k] = 0.9  # 1 + 0.5 * 0.8
        y = simclr.augment(x, v, **{**OFF, "jitter": 0.5})
        torch.testing.assert_close(y[on], f(x)[on].clamp(0, 1), atol=3e-3, rtol=0)
        torch.testing.assert_close(y[~on], x[~on], atol=1e-5, rtol=0)
    v = u.clone()
    v[:, 10] = 0.75  # hue: half of a quarter turn
    y = simclr.augment(x, v, **{**OFF, "hue": 0.25})
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    a, b = (torch.einsum("kc,bchw->kbhw", yiq, t[on]) for t in (x, y))
    torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=0)  # luma stays, chroma turns by 45
    turned = torch.complex(a[1], a[2]) * complex(math.sqrt(0.5), math.sqrt(0.5))
    torch.testing.assert_close(torch.complex(b[1], b[2]), turned, atol=1e-4, rtol=0)


def mean(x, dims=(1, 2, 3)):
    """Weighted by luma over channels, plainly over places."""
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    x = (x * luma).sum(1, keepdim=True)
    return x.mean((2, 3), keepdim=True) if len(dims) > 1 else x


def test_blur():
    x, u = torch.zeros(2, 3, 21, 21), torch.full((2, 16), 0.5)
    x[..., 10, 10] = 1
    u[1, 13] = 0.99
    y = simclr.augment(x, u, **{**OFF, "blur": 0.9})
    torch.testing.assert_close(y[1], x[1], atol=1e-5, rtol=0)
    line = torch.tensor([math.exp(-(k**2) / (2 * 1.05**2)) for k in (-1, 0, 1)])
    line /= line.sum()
    torch.testing.assert_close(y[0, 1, 9:12, 9:12], line[:, None] * line, atol=1e-4, rtol=0)
    torch.testing.assert_close(y[0].sum((1, 2)), torch.ones(3), atol=1e-3, rtol=0)
    x = torch.full((1, 3, 40, 21), 0.4)  # one tone stays one tone, up to the border
    torch.testing.assert_close(simclr.augment(x, u[:1], **{**OFF, "blur": 0.9}), x)


# ---- NT-Xent ----


@pytest.mark.parametrize("N, d", [(1, 3), (2, 5), (7, 4)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nt_xent_equals_algorithm_1(N, d, temperature):
    z1, z2 = torch.randn(N, d).double(), torch.randn(N, d).double()
    fast, slow = (f(z1, z2, temperature) for f in (simclr.nt_xent, simclr.nt_xent_ref))
    torch.testing.assert_close(fast, slow)


def test_nt_xent_at_known_points():
    z = torch.ones(8, 4)
    assert simclr.nt_xent(z, 3 * z).item() == pytest.approx(math.log(15), abs=1e-5)
    z = torch.eye(6)  # partners equal, all others orthogonal
    expected = math.log(1 + 10 * math.exp(-1 / 0.2))
    assert simclr.nt_xent(z, z, 0.2).item() == pytest.approx(expected, abs=1e-5)
    assert simclr.nt_xent(z[:1], -z[:1], 0.2).item() == pytest.approx(0, abs=1e-6)  # no negative
    apart = simclr.nt_xent(torch.eye(2), torch.eye(2).flip(0), 0.5)  # each has the other's partner
    assert apart.item() == pytest.approx(math.log(2 + math.exp(2)), abs=1e-5)


def test_nt_xent_pulls_partners_and_pushes_the_rest():
    z1 = torch.randn(4, 6, requires_grad=True)
    z2 = torch.randn(4, 6, requires_grad=True)
    simclr.nt_xent(z1, z2).backward()
    with torch.no_grad():
        moved = simclr.nt_xent(z1 - 0.1 * z1.grad, z2 - 0.1 * z2.grad)
        assert moved < simclr.nt_xent(z1, z2)
    assert (z1.grad * z1).sum(1).abs().max() < 1e-5  # cosine: no gradient along z


def test_first_loss_and_gradients():
    model, x = tiny(), torch.rand(32, 3, 16, 16)
    z1, z2 = model(x)[1], model(x.roll(1, 0))[1]
    assert simclr.nt_xent(z1, z2, 5.0).item() == pytest.approx(math.log(63), abs=0.2)
    simclr.nt_xent(z1, z2).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# ---- encoder ----


def test_encoders_have_the_fields_names_and_counts():
    with torch.device("meta"):
        r18, r50 = ResNet(stem="imagenet"), simclr.ENCODERS["resnet50"](stem="imagenet")
    for model, dim, count in ((r18, 512, 11176512), (r50, 2048, 23508032)):  # less fc, of 1000
        assert model.dim == dim and sum(p.numel() for p in model.parameters()) == count
        names = set(model.state_dict())
        assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.1.bias"} <= names
        assert "layer4.1.bn2.num_batches_tracked" in names and "layer1.0.conv2.weight" in names
    assert r18.state_dict()["layer4.0.conv1.weight"].shape == (512, 256, 3, 3)
    assert r50.state_dict()["layer4.0.conv2.weight"].shape == (512, 512, 3, 3)
    assert r50.layer4[0].conv2.stride == (2, 2) and r50.layer4[0].conv1.stride == (1, 1)
    assert "layer1.0.downsample.0.weight" in r50.state_dict() and len(r50.layer3) == 6


@pytest.mark.parametrize("stem, side", [("imagenet", 8), ("cifar", 2), ("small", 8)])
def test_shapes(stem, side):
    for bottleneck in (False, True):
        model = ResNet((1, 1), 4, bottleneck, stem).eval()
        x = torch.rand(1, 3, 3 * side, 5 * side)
        assert model(x).shape == (1, model.dim) == (1, 32 if bottleneck else 8)
    h, z = tiny().eval()(torch.rand(1, 3, 32, 32))
    assert h.shape == (1, 16) and z.shape == (1, 16)


def test_block_by_hand():
    block = simclr.Block(4, 4, 1, False).eval()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(
        block(x), F.relu(x + block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
    )


def test_batch_norm_is_torchs():
    for x, ours, theirs in (
        (torch.randn(6, 4, 3, 5), simclr.BatchNorm(4), nn.BatchNorm2d(4)),
        (torch.randn(6, 4), simclr.BatchNorm(4), nn.BatchNorm1d(4)),
    ):
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_lars_by_hand():
    w, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    opt = simclr.LARS([w, b], 2.0, momentum=0.5, weight_decay=0.1, eta=0.01)
    for expected_w, expected_b in (((2.9, 4.0), 0.6), ((None, None), 0.0)):
        w.grad, b.grad = torch.tensor([[0.7, -0.4]]), torch.tensor([0.2])  # g = (1, 0), length 1
        v = 2 * 0.01 * 5 * torch.tensor([1.0, 0.0])
        opt.step()
        if expected_w[0]:
            torch.testing.assert_close(w.data[0], torch.tensor([3.0, 4.0]) - v)
        assert b.item() == pytest.approx(expected_b)  # 1 - .4, then - (.5 * .4 + .4)
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    simclr.LARS([zero], 0.1).step()
    assert zero.abs().max() > 0  # a weight that is zero still starts


# ---- data and evaluation ----


def test_digits_of_training_validation_and_test_differ():
    x, y, x_test, y_test = simclr.load_data("digits")
    assert x.shape == (6450, 3, 32, 32) and x_test.shape == (1500, 3, 32, 32)
    n = len(x) * 9 // 10
    assert n % 5 == 0  # five canvases of a digit stay on one side
    assert y.view(-1, 5).float().std(1).max() == 0 and y_test.view(-1, 3).float().std(1).max() == 0
    assert y_test[::3].bincount().min() > 40 and x.dtype == torch.uint8
    again = simclr.load_data("digits")
    assert all(a.equal(b) for a, b in zip((x, y, x_test, y_test), again))


def test_load_npz(tmp_path):
    for chans in ((), (1,), (3,)):
        x, y, x_test, _ = simclr.load_data(str(save_npz(tmp_path / "a.npz", chans=chans)))
        assert x.shape == (60, 3, 8, 8) and y.dtype == torch.int64
        assert x_test.shape == (20, 3, 8, 8)
    y = np.arange(60)[:, None] % 3  # Keras's CIFAR-10 has (N, 1)
    assert simclr.load_data(str(save_npz(tmp_path / "b.npz", y_train=y)))[1].shape == (60,)


def test_evaluate():
    torch.manual_seed(0)
    y, y_test = torch.arange(200) % 4, torch.arange(80) % 4
    paint = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8
    )
    x, x_test = (paint[t].view(-1, 3, 1, 1).expand(-1, -1, 4, 4) for t in (y, y_test))
    data = (x[:60], y[:60], x_test, y_test), (x, y, x_test, y_test)
    for part in data:
        assert simclr.evaluate(lambda x: x.mean((2, 3)), *part) == (1, 1)
        assert max(simclr.evaluate(lambda x: torch.rand(len(x), 5), *part)) < 0.5
    x = torch.rand(2, 3, 4, 5)
    grey = simclr.grey_centred(x)
    torch.testing.assert_close(grey, simclr.grey_centred(0.5 * x + 0.2))
    torch.testing.assert_close(grey.mean(1), torch.zeros(2), atol=1e-6, rtol=0)


# ---- the script ----


def main(capsys, *argv):
    """Runs the script in this process -> exit status, lines of stdout and of stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["simclr.py"])
        try:
            code = simclr.main([*map(str, argv), "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


SMALL = "--encoder small --dim 8 --steps 4 --short 2 --label-steps 2 --batch-size 8 --few 30"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Options of a small run on an npz, which has left its checkpoint a.pt."""
    path = tmp_path_factory.mktemp("simclr")
    options = ["--data", save_npz(path / "a.npz", 80, 16), *SMALL.split(), "--log-every", 2]
    options = [*map(str, [*options, "--out", path]), "--device", "cpu"]
    assert simclr.main([*options, "--save", str(path / "a.pt")]) == 0
    return path, options


def test_quick_runs(tmp_path):
    command = [sys.executable, str(ROOT / "simclr.py"), "--quick", "--device", "cpu"]
    command += ["--out", str(tmp_path / "new" / "dir")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0].startswith("simclr | 0.") and "cpu | seed 0 | digits 300/300" in lines[0]
    for word in ("raw pixels", "grey centred", "random network", "labels alone", "crop only"):
        assert any(line.startswith(word) for line in lines)
    assert lines[-1].startswith("test acc linear 300 labels SimCLR h 0.")
    assert (tmp_path / "new" / "dir" / "simclr.png").stat().st_size > 10000


def test_two_processes_are_one_with_the_whole_batch(torchrun, trained, tmp_path):
    """torchrun with two processes of 4 images each: the same losses and weights as one with 8."""
    path, options = trained
    options = [*options, "--optimizer", "lars", "--lr", "1", "--steps", "3", "--log-every", "1"]
    options += ["--short", "0", "--label-steps", "2", "--warmup", "0"]
    out = torchrun(ROOT / "simclr.py", *options, "--save", tmp_path / "two.pt")
    assert out.count("simclr | ") == 1  # rank 0 speaks alone
    assert simclr.main([*options, "--save", str(tmp_path / "one.pt")]) == 0
    one, two = (torch.load(tmp_path / p, weights_only=True) for p in ("one.pt", "two.pt"))
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], abs=1e-4)
    for k, v in one["models"]["SimCLR"].items():  # Adam's first steps would magnify rounding
        torch.testing.assert_close(v, two["models"]["SimCLR"][k], atol=2e-4, rtol=1e-3, msg=k)


def test_training_learns_to_find_the_partner(trained, tmp_path):
    path, options = trained
    words = "--steps 120 --short 0 --label-steps 40 --optimizer adamw --lr 3e-3 --crop 0.5 --grey 0"
    argv = [*options, *words.split(), "--log-every", "1", "--temperature", "0.2", "--jitter", "0"]
    args, _, data, runs = simclr.parse(argv)
    x = F.interpolate(torch.rand(72, 3, 3, 3), 16, mode="bilinear")
    history = simclr.train(runs, ((255 * x).byte(), data[1]), args)["history"]
    loss = {n: [l for name, _, l in history if name == n] for n in runs}
    assert np.mean(loss["SimCLR"][-5:]) < np.mean(loss["SimCLR"][:5]) / 1.5
    assert np.mean(loss["few labels"][-5:]) < np.mean(loss["few labels"][:5])


def test_amp_trains_in_bfloat16(trained):
    options = [*trained[1], "--lr", "1e-6"]
    whole, half = (simclr.parse([*options, *flag]) for flag in ([], ["--amp"]))
    a, b = (simclr.train(runs, data[:2], args)["history"] for args, _, data, runs in (whole, half))
    for (*what, loss), (*same, other) in zip(a, b, strict=True):
        assert what == same and loss != other and other == pytest.approx(loss, rel=0.05)


def test_labels_never_reach_the_pretraining(trained, tmp_path, capsys):
    path, options = trained
    save_npz(tmp_path / "b.npz", 80, 16, y_train=np.arange(80)[::-1] % 3)
    argv = [*options, "--data", tmp_path / "b.npz", "--save", tmp_path / "b.pt"]
    assert main(capsys, *argv)[0] == 0
    a, b = (torch.load(p, weights_only=True) for p in (path / "a.pt", tmp_path / "b.pt"))
    for name in ("SimCLR", "crop only", "few labels"):
        same = [v.equal(b["models"][name][k]) for k, v in a["models"][name].items()]
        assert all(same) == (name != "few labels")


def test_short_runs_drop_what_their_name_says(trained):
    args, _, _, runs = simclr.parse(trained[1])
    crop, colour, both = (runs[n].views for n in ("crop only", "colour only", "both"))
    assert both == runs["SimCLR"].views and crop["crop"] == both["crop"] < 1
    assert max(crop["jitter"], crop["hue"], crop["grey"], crop["blur"]) == 0 < colour["jitter"]
    assert colour["crop"] == 1 and colour["rotate"] == colour["flip"] == 0 < crop["flip"]
    weights = [runs[n].model.encoder.conv1.weight for n in runs]
    assert all(w.equal(weights[0]) for w in weights)  # one initialisation for all


def test_labels_are_drawn_once(trained):
    """The network taught with few labels and the probes with few labels see the same ones."""
    runs = simclr.parse(trained[1])[3]
    few, every, rows = (runs[n].rows for n in ("few labels", "all labels", "SimCLR"))
    assert few.equal(every[:30]) and every.sort().values.equal(rows)
    assert rows.equal(torch.arange(72))
    assert not few.equal(simclr.parse([*trained[1], "--seed", "4"])[3]["few labels"].rows)


def test_networks_taught_with_labels_are_judged_by_as_many(trained, capsys, monkeypatch):
    seen, parsed, parse = [], [], simclr.parse
    monkeypatch.setattr(simclr, "parse", lambda argv: parsed.append(parse(argv)) or parsed[0])
    monkeypatch.setattr(simclr, "draw_picture", lambda *a: None)
    x = torch.rand(2, 3, 16, 16)

    def note(encoder, x_train, *_):
        with torch.no_grad():
            seen.append((encoder(x).flatten().tolist(), len(x_train)))
        return 0.1, 0.2

    monkeypatch.setattr(simclr, "evaluate", note)
    assert main(capsys, "--load", trained[0] / "a.pt", "--out", trained[0] / "o4")[0] == 0
    runs = parsed[0][3]
    few, every = (runs[n].model.encoder(x).flatten().tolist() for n in ("few labels", "all labels"))
    assert (few, 30) in seen and (every, 72) in seen
    assert (few, 72) not in seen and (every, 30) not in seen


def test_interrupted_run_goes_on_as_the_unbroken_one(trained, capsys, monkeypatch):
    path, options = trained
    calls, before, augment = [], signal.getsignal(signal.SIGINT), simclr.augment

    def interrupt(x, u, **views):
        calls.append((x.split(8), u.split(8)))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return augment(x, u, **views)

    monkeypatch.setattr(simclr, "augment", interrupt)
    assert main(capsys, *options, "--save", path / "b.pt")[0] == 130  # Ctrl-C in step 2 of 4
    assert signal.getsignal(signal.SIGINT) is before
    (x1, x2), (u1, u2) = calls[0]  # the same images, twice, and each time other random numbers
    assert x1.equal(x2) and not u1.equal(u2) and not x1.equal(calls[1][0][0])
    assert torch.load(path / "b.pt", weights_only=True)["done"] == {"SimCLR": 2}
    argv = ["--load", path / "b.pt", "--save", path / "b.pt", "--out", path, "--log-every", 2]
    code, out, _ = main(capsys, *argv)
    assert code == 0 and any(line.startswith("step     4/4 | SimCLR") for line in out)
    whole, parts = (torch.load(path / p, weights_only=True) for p in ("a.pt", "b.pt"))
    assert parts["step"] == 4 and parts["done"] == whole["done"]
    assert parts["models"].keys() == whole["models"].keys() == whole["done"].keys()
    for name in whole["models"]:
        for k, v in whole["models"][name].items():
            assert parts["models"][name][k].equal(v), (name, k)


def test_load_evaluates_and_goes_on(trained, capsys):
    path, options = trained
    _, first, _ = main(capsys, *options)
    code, again, _ = main(capsys, "--load", path / "a.pt", "--out", path / "o3")
    assert code == 0 and (path / "o3" / "simclr.png").exists()
    assert not any(line.startswith("step") for line in again)
    assert first[-1].split(" | ")[:-1] == again[-1].split(" | ")[:-1]
    assert main(capsys, "--load", path / "a.pt", "--out", path, "--target", 1.1)[0] == 1
    argv = ["--load", str(path / "a.pt"), "--weight-decay", "0.3", "--out", str(path)]
    for run in simclr.parse(argv)[3].values():  # the flag goes first
        assert 0.3 in run.optimizer.param_groups[0].values()
    code, more, _ = main(capsys, "--load", path / "a.pt", "--out", path, "--steps", 6)
    assert code == 0 and sum(line.startswith("step") for line in more) == 1


def test_validation_is_the_last_tenth(trained):
    data = simclr.parse([*trained[1], "--validate"])[2]
    whole = simclr.load_data(str(trained[0] / "a.npz"))
    assert data[0].equal(whole[0][:72]) and data[2].equal(whole[0][72:])
    assert simclr.parse(trained[1])[2][2].equal(whole[2])


def test_bad_input_is_one_line_and_exit_2(tmp_path, trained, capsys):
    good = save_npz(tmp_path / "good.npz")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:300])
    np.savez(tmp_path / "pickled.npz", x_train=np.array([{}], dtype=object))
    save_npz(tmp_path / "float.npz", dtype=np.float32)
    save_npz(tmp_path / "labels.npz", y_test=np.arange(20))
    save_npz(tmp_path / "shape.npz", x_test=np.zeros((20, 9, 9, 3), np.uint8))
    save_npz(tmp_path / "one.npz", y_train=np.zeros(60, int), y_test=np.zeros(20, int))
    torch.save({"script": "moco"}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "cut.pt").write_bytes((trained[0] / "a.pt").read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for bad in (
        "--steps 0", "--batch-size 1", "--batch-size 99999", "--lr 0", "--lr nan", "--lr inf",
        "--temperature 0", "--crop 0", "--crop 1.5", "--hue 0.6", "--seed -1", "--few 0",
        "--encoder vgg", "--optimizer sgd", "--device tpu", "--short -1", "--log-every 0",
        "--data nofile.npz", "--data cut.npz", "--data pickled.npz", "--data float.npz",
        "--data labels.npz", "--data shape.npz", "--data good.npz --batch-size 55",
        "--load nofile.pt", "--load other.pt", "--load tensor.pt", "--load cut.pt",
        "--out file/x", "--save empty", f"--save {tmp_path}/nodir/x.pt",
        f"--load {trained[0] / 'a.pt'} --dim 32",
        f"--load {trained[0] / 'a.pt'} --encoder resnet18",
        f"--load {trained[0] / 'a.pt'} --optimizer adamw", f"--load {trained[0] / 'a.pt'} --seed 7",
        f"--load {trained[0] / 'a.pt'} --few 12",
        "--data one.npz --batch-size 16 --steps 1 --label-steps 1",
    ):  # fmt: skip
        argv = [
            str(tmp_path / a) if (tmp_path / a.split("/")[0]).exists() else a for a in bad.split()
        ]
        if "--data" not in argv and "--load" not in argv:
            argv += ["--data", str(good)]
        small = ["--encoder", "small"] if "--load" not in argv else []
        code, out, err = main(capsys, *small, "--out", tmp_path / "o", *argv)
        assert code == 2 and not out and "error: " in err[-1], (bad, err)
        assert err[0].startswith("usage") and "Traceback" not in "".join(err), bad
    assert not (tmp_path / "nodir").exists()


def test_nan_stops_the_run(trained, tmp_path, capsys):
    argv = [*trained[1], "--out", tmp_path, "--save", tmp_path / "n.pt", "--optimizer", "adamw"]
    code, _, err = main(capsys, *argv, "--steps", 30, "--log-every", 1, "--lr", 1e30)
    assert code == 1 and "at step" in err[-1] and len(err) == 1
    weights = torch.load(tmp_path / "n.pt", weights_only=True)["models"]["SimCLR"]
    assert all(w.isfinite().all() for w in weights.values())  # the last good checkpoint is kept


@pytest.mark.results
def test_demo_reaches_its_figure(tmp_path):
    command = [sys.executable, str(ROOT / "simclr.py"), "--target", "0.8", "--out", str(tmp_path)]
    assert subprocess.run(command, timeout=3600).returncode == 0
