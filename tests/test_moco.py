"""moco.py: `pytest tests/test_moco.py`."""

import math
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import moco
from moco import MoCo, ResNet

ROOT = pathlib.Path(__file__).parent.parent
OFF = {k: 0.0 for k in ("rotate", "flip", "jitter", "hue", "grey", "blur")} | {"crop": 1.0}


def small(**kwargs):
    torch.manual_seed(0)
    return ResNet((1, 1), 8, stem="small", **{"dim": 16, **kwargs})


def save_npz(path, n=60, size=8, dtype=np.uint8, chans=(3,), classes=3, **change):
    r = np.random.default_rng(0)
    x, y = r.integers(0, 255, (n, size, size, *chans)).astype(dtype), np.arange(n) % classes
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20], **change})
    return path


# ---- views ----


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 3, 7, 12), (2, 3, 32, 20)])
def test_views_keep_shape_and_range(shape):
    x = torch.rand(shape)
    y = moco.augment(x, torch.rand(shape[0], 16), rotate=30)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 + 1e-5 and not y.equal(x)


def test_without_operations_a_view_is_the_image():
    x = torch.rand(4, 3, 9, 12)
    torch.testing.assert_close(moco.augment(x, torch.rand(4, 16), **OFF), x, atol=1e-5, rtol=0)


def test_a_view_depends_on_its_own_numbers_alone():
    x, u = torch.rand(5, 3, 16, 16), torch.rand(5, 16)
    y = moco.augment(x, u, rotate=20)
    assert y.equal(moco.augment(x, u, rotate=20))
    for i in range(5):
        one = moco.augment(x[i : i + 1], u[i : i + 1], rotate=20)
        torch.testing.assert_close(y[i : i + 1], one)
    assert not y[:1].equal(moco.augment(x[:1], u[1:2], rotate=20))


def test_crop_is_a_box_of_the_image():
    """An image that names its places: the view shows which box was cut out."""
    H, W, n = 32, 48, 400
    rows, cols = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W,
                                indexing="ij")  # fmt: skip
    x = torch.stack([rows, cols, rows]).expand(n, 3, H, W)
    y = moco.augment(x, torch.rand(n, 16), **{**OFF, "crop": 0.25})
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
    y = moco.augment(x, u, **{**OFF, "rotate": 90.0})[0, 0]
    r, c = divmod(y.argmax().item(), 33)
    assert abs(abs(r - 16) - 7) <= 1 and abs(c - 23) <= 1  # 45 degrees, distance 10
    x = torch.rand(400, 3, 6, 8)
    y = moco.augment(x, torch.rand(400, 16), **{**OFF, "flip": 0.5})
    same, mirrored = (y - x).abs().amax((1, 2, 3)) < 1e-4, (y - x.flip(3)).abs().amax((1, 2, 3))
    assert (same ^ (mirrored < 1e-4)).all() and 150 < same.sum() < 250
    y, u = {**OFF, "rotate": 60.0}, torch.rand(400, 16)  # a mirrored view is the view, mirrored
    y, z = (moco.augment(x, u, **{**y, "flip": p}) for p in (0.0, 1.0))
    torch.testing.assert_close(y.flip(3), z, atol=1e-4, rtol=0)


def test_colour_by_hand():
    x = 0.3 + 0.2 * torch.rand(300, 3, 8, 8)
    luma = torch.tensor([0.299, 0.587, 0.114])
    u = torch.rand(300, 16)
    y = moco.augment(x, u, **{**OFF, "grey": 0.3})
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
        y = moco.augment(x, v, **{**OFF, "jitter": 0.5})
        torch.testing.assert_close(y[on], f(x)[on].clamp(0, 1), atol=3e-3, rtol=0)
        torch.testing.assert_close(y[~on], x[~on], atol=1e-5, rtol=0)
    v = u.clone()
    v[:, 10] = 0.75  # hue: half of a quarter turn
    y = moco.augment(x, v, **{**OFF, "hue": 0.25})
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
    y = moco.augment(x, u, **{**OFF, "blur": 0.9})
    torch.testing.assert_close(y[1], x[1], atol=1e-5, rtol=0)
    line = torch.tensor([math.exp(-(k**2) / (2 * 1.05**2)) for k in (-1, 0, 1)])
    line /= line.sum()
    torch.testing.assert_close(y[0, 1, 9:12, 9:12], line[:, None] * line, atol=1e-4, rtol=0)
    torch.testing.assert_close(y[0].sum((1, 2)), torch.ones(3), atol=1e-3, rtol=0)
    x = torch.full((1, 3, 40, 21), 0.4)  # one tone stays one tone, up to the border
    torch.testing.assert_close(moco.augment(x, u[:1], **{**OFF, "blur": 0.9}), x)


# ---- InfoNCE ----


def test_info_nce_by_hand():
    q, k = F.normalize(torch.randn(5, 4), dim=1), F.normalize(torch.randn(5, 4), dim=1)
    queue, T, total = F.normalize(torch.randn(4, 9), dim=0), 0.3, 0.0
    for i in range(5):
        wrong = sum(math.exp(q[i] @ queue[:, j] / T) for j in range(9))
        right = math.exp(q[i] @ k[i] / T)
        total -= math.log(right / (right + wrong)) / 5
    assert moco.info_nce(q, k, queue, T).item() == pytest.approx(total, abs=1e-5)


def test_info_nce_at_known_points():
    q = F.normalize(torch.ones(3, 4), dim=1)
    assert moco.info_nce(q, q, q[:1].T.repeat(1, 15)).item() == pytest.approx(
        math.log(16), abs=1e-4
    )
    q, queue = torch.eye(8)[:1], torch.eye(8)[:, 1:8]  # the queue is orthogonal to the keys
    expected = math.log(1 + 7 * math.exp(-1 / 0.2))
    assert moco.info_nce(q, q, queue, 0.2).item() == pytest.approx(expected, abs=1e-5)


def test_first_loss_is_that_of_chance():
    model = MoCo(small(dim=64), 64, 500, temperature=2.0).train()
    loss, k = model(torch.rand(16, 3, 16, 16), torch.rand(16, 3, 16, 16), torch.randperm(16))
    assert loss.item() == pytest.approx(math.log(501), abs=0.5)
    torch.testing.assert_close(k.norm(dim=1), torch.ones(16))
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(500))


# ---- Algorithm 1 ----


def test_only_the_query_encoder_gets_gradients():
    model = MoCo(small(head="mlp"), 16, 40).train()
    loss, k = model(torch.rand(8, 3, 16, 16), torch.rand(8, 3, 16, 16), torch.arange(8))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.encoder_q.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert not k.requires_grad and not model.queue.requires_grad


def test_key_encoder_is_the_average_of_equation_2():
    model = MoCo(small(), 16, 40, m=0.9)
    start = [p.clone() for p in model.encoder_k.parameters()]
    for a, b in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert a.equal(b) and a is not b  # the same at the start, yet not shared
        a.data.add_(1.0)
    model.update_key_encoder()
    for p, b in zip(model.encoder_k.parameters(), start, strict=True):
        torch.testing.assert_close(p.data, b + 0.1)
    for _ in range(2):
        model.update_key_encoder()
    for p, b in zip(model.encoder_k.parameters(), start, strict=True):
        torch.testing.assert_close(p.data, b + 1 - 0.9**3)
    model.m = 0.0  # the ablation: the key encoder is the query encoder
    model.update_key_encoder()
    for a, b in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        torch.testing.assert_close(a.data, b.data)


@pytest.mark.parametrize("K, N", [(7, 3), (8, 4), (5, 5), (4, 11), (1, 2)])
def test_queue_is_first_in_first_out(K, N):
    """Against a plain list: batches that divide K, don't, and are larger than it."""
    model = MoCo(small(dim=2), 2, K)
    model.queue.fill_(-1.0)
    line, number = [-1.0] * K, 0
    for _ in range(6):
        k = torch.arange(number, number + N).float()
        model.enqueue(k[:, None].repeat(1, 2))
        number += N
        line = (line + k.tolist())[-K:]
        ptr = int(model.queue_ptr)
        assert ptr == number % K and model.queue[0].equal(model.queue[1])
        assert model.queue[0].roll(-ptr).tolist() == line  # the oldest stands at the pointer


def test_keys_enter_after_the_loss():
    model, x = MoCo(small(), 16, 40).train(), torch.rand(8, 3, 16, 16)
    before = model.queue.clone()
    loss, k = model(x, x, torch.arange(8))
    assert model.queue.equal(before)
    model.enqueue(k)
    torch.testing.assert_close(model.queue[:, :8], k.T)
    loss.backward()  # the queue has changed in place; the loss kept what it saw
    assert model.queue[:, 8:].equal(before[:, 8:])


def test_queue_takes_the_keys_of_autocast():
    model, k = MoCo(small(), 16, 8), F.normalize(torch.randn(3, 16), dim=1).bfloat16()
    model.enqueue(k)
    assert model.queue.dtype == torch.float32 and model.queue[:, :3].equal(k.T.float())


# ---- shuffled batch norm ----


def test_keys_come_back_in_order():
    model, x = MoCo(small(), 16, 40, groups=2).eval(), torch.rand(12, 3, 16, 16)
    expected = F.normalize(model.encoder_k(x), dim=1)  # without batch statistics order is all
    torch.testing.assert_close(model.keys(x, torch.randperm(12)), expected)


def test_groups_are_normalised_apart_and_shuffled():
    model, x = MoCo(small(), 16, 40, groups=2).train(), torch.rand(12, 3, 16, 16)
    shuffle = torch.tensor([0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])
    k = model.keys(x, shuffle)
    for rows in (shuffle[:6], shuffle[6:]):
        expected = F.normalize(model.encoder_k(x[rows]), dim=1)
        torch.testing.assert_close(k[rows], expected)
    assert not torch.allclose(k, model.keys(x, torch.arange(12)), atol=1e-3)
    q = model.grouped(model.encoder_q, x)  # queries stay in the order they came
    torch.testing.assert_close(q[:6], model.encoder_q(x[:6]))
    one = MoCo(small(), 16, 40, groups=1).train()
    torch.testing.assert_close(one.keys(x, shuffle), one.keys(x, torch.arange(12)))


# ---- official names ----


def test_official_files_load(tmp_path):
    for head, bottleneck, extra in (("linear", True, True), ("mlp", False, False)):
        encoder = ResNet((3, 4, 2), 8, bottleneck, "imagenet", 16, head)
        w = {
            "encoder_q." + k: torch.rand(v.shape).to(v.dtype)
            for k, v in encoder.state_dict().items()
        }
        names = {"encoder_q.fc.weight"} if head == "linear" else {"encoder_q.fc.2.bias"}
        assert names | {"encoder_q.layer1.0.conv1.weight", "encoder_q.bn1.running_mean"} <= set(w)
        if extra:
            w |= {"encoder_k." + k[10:]: v + 1 for k, v in w.items()}
            w |= {"queue": torch.rand(16, 33), "queue_ptr": torch.tensor([7])}
        state = {
            "arch": "resnet50",
            "epoch": 200,
            "state_dict": {"module." + k: v for k, v in w.items()},
        }
        torch.save(state, tmp_path / "official.pth.tar")
        model = MoCo.from_checkpoint(tmp_path / "official.pth.tar", m=0.5).eval()
        assert model(*torch.rand(2, 2, 3, 64, 64), torch.arange(2))[1].shape == (2, 16)
        for k, v in w.items():
            torch.testing.assert_close(model.state_dict()[k].float(), v.float())
        k = model.encoder_k.conv1.weight - model.encoder_q.conv1.weight
        torch.testing.assert_close(k, torch.full_like(k, float(extra)))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no weights of MoCo"):
        MoCo.from_checkpoint(tmp_path / "other.pt")


def test_encoders_have_the_fields_names_and_counts():
    with torch.device("meta"):
        r18 = ResNet(stem="imagenet", dim=1000)
        r50 = moco.ENCODERS["resnet50"](stem="imagenet", dim=1000)
    for model, dim, count in ((r18, 512, 11689512), (r50, 2048, 25557032)):  # torchvision's
        assert model.dim == dim and sum(p.numel() for p in model.parameters()) == count
        assert {"fc.weight", "layer2.0.downsample.1.bias"} <= set(model.state_dict())
    assert r50.layer4[0].conv2.stride == (2, 2) and r50.layer4[0].conv1.stride == (1, 1)
    with torch.device("meta"):  # the official file of v2: 128 outputs, a queue of 65536
        model = MoCo(ResNet((3, 4, 6, 3), 64, True, "imagenet", 128, "mlp"))
    w = model.state_dict()
    assert w["encoder_k.fc.0.weight"].shape == (2048, 2048) and w["queue"].shape == (128, 65536)
    assert w["encoder_q.fc.2.weight"].shape == (128, 2048) and w["queue_ptr"].shape == (1,)


@pytest.mark.parametrize("stem, side", [("imagenet", 8), ("cifar", 2), ("small", 8)])
def test_shapes(stem, side):
    for bottleneck in (False, True):
        model = ResNet((1, 1), 4, bottleneck, stem, 6, "none").eval()
        x = torch.rand(1, 3, 3 * side, 5 * side)
        assert model(x).shape == model.features(x).shape == (1, 32 if bottleneck else 8)


# ---- data and evaluation ----


def test_digits_of_training_validation_and_test_differ():
    x, y, x_test, y_test = moco.load_data("digits")
    assert x.shape == (6450, 3, 32, 32) and x_test.shape == (1500, 3, 32, 32)
    n = len(x) * 9 // 10
    assert n % 5 == 0  # five canvases of a digit stay on one side
    assert y.view(-1, 5).float().std(1).max() == 0 and y_test.view(-1, 3).float().std(1).max() == 0
    assert y_test[::3].bincount().min() > 40 and x.dtype == torch.uint8
    again = moco.load_data("digits")
    assert all(a.equal(b) for a, b in zip((x, y, x_test, y_test), again))


def test_load_npz(tmp_path):
    for chans in ((), (1,), (3,)):
        x, y, x_test, _ = moco.load_data(str(save_npz(tmp_path / "a.npz", chans=chans)))
        assert x.shape == (60, 3, 8, 8) and y.dtype == torch.int64
        assert x_test.shape == (20, 3, 8, 8)
    y = np.arange(60)[:, None] % 3  # Keras's CIFAR-10 has (N, 1)
    assert moco.load_data(str(save_npz(tmp_path / "b.npz", y_train=y)))[1].shape == (60,)


# ---- the script ----


def main(capsys, *argv):
    """Runs the script in this process -> exit status, lines of stdout and of stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["moco.py"])
        try:
            code = moco.main([*map(str, argv), "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


SMALL = "--encoder small --dim 8 --steps 4 --short 2 --label-steps 2 --batch-size 8 --few 30"
SMALL += " --queue 24 --small-queue 4"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Options of a small run on an npz, which has left its checkpoint a.pt."""
    path = tmp_path_factory.mktemp("moco")
    options = ["--data", save_npz(path / "a.npz", 80, 16), *SMALL.split(), "--log-every", 2]
    options = [*map(str, [*options, "--out", path]), "--device", "cpu"]
    assert moco.main([*options, "--save", str(path / "a.pt")]) == 0
    return path, options


def test_quick_runs(tmp_path):
    command = [sys.executable, str(ROOT / "moco.py"), "--quick", "--device", "cpu"]
    command += ["--out", str(tmp_path / "new" / "dir")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0].startswith("moco | 0.") and "cpu | seed 0 | digits 300/300" in lines[0]
    for word in ("raw pixels", "grey centred", "random network", "labels alone", "m = 0"):
        assert any(line.startswith(word) for line in lines)
    assert lines[-1].startswith("test acc linear 300 labels MoCo 0.")
    assert (tmp_path / "new" / "dir" / "moco.png").stat().st_size > 10000


def test_two_processes_are_one_with_two_groups(torchrun, trained, tmp_path):
    """torchrun, two processes of 4 images each: losses, weights and queue of one with 2 groups."""
    path, options = trained
    options = [*options, "--optimizer", "sgd", "--lr", "0.1", "--steps", "3", "--log-every", "1"]
    options += ["--short", "0", "--label-steps", "2", "--warmup", "0"]
    out = torchrun(ROOT / "moco.py", *options, "--groups", "1", "--save", tmp_path / "two.pt")
    assert out.count("moco | ") == 1  # rank 0 speaks alone
    assert moco.main([*options, "--groups", "2", "--save", str(tmp_path / "one.pt")]) == 0
    one, two = (torch.load(tmp_path / p, weights_only=True) for p in ("one.pt", "two.pt"))
    for a, b in list(zip(one["history"], two["history"], strict=True))[:3]:
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], abs=1e-4)
    for k, v in one["models"]["MoCo"].items():
        if "running" not in k and "tracked" not in k:  # each process keeps those of its own group
            torch.testing.assert_close(v, two["models"]["MoCo"][k], atol=2e-4, rtol=1e-3, msg=k)


def test_training_learns_to_find_the_key(trained):
    path, options = trained
    words = "--steps 150 --short 0 --label-steps 40 --optimizer adamw --lr 3e-3 --crop 0.5 --grey 0"
    words += " --jitter 0 --m 0.9 --queue 40 --temperature 0.2 --groups 1 --log-every 1"
    args, _, data, runs = moco.parse([*options, *words.split()])
    x = F.interpolate(torch.rand(72, 3, 3, 3), 16, mode="bilinear")
    history = moco.train(runs, ((255 * x).byte(), data[1]), args)["history"]
    loss = {n: [l for name, _, l in history if name == n] for n in runs}
    assert np.mean(loss["MoCo"][-9:]) < math.log(41) / 1.5
    assert np.mean(loss["few labels"][-5:]) < np.mean(loss["few labels"][:5])


def test_the_loop_updates_the_key_encoder_and_the_queue(trained):
    """4 steps of 8 keys, a queue of 24: all are new, and its pointer stands at 32 - 24."""
    w, runs = (
        torch.load(trained[0] / "a.pt", weights_only=True)["models"],
        moco.parse(trained[1])[3],
    )
    q, k, start = (
        w["MoCo"]["encoder_q.fc.0.weight"],
        w["MoCo"]["encoder_k.fc.0.weight"],
        runs["MoCo"],
    )
    start, queue = start.model.encoder_q.fc[0].weight.detach(), start.model.queue
    assert 0 < (k - start).norm() < 0.1 * (q - start).norm()  # m = .99
    assert w["m = 0"]["encoder_q.fc.0.weight"].equal(w["m = 0"]["encoder_k.fc.0.weight"])
    assert w["MoCo"]["queue_ptr"] == 8 and not (w["MoCo"]["queue"] == queue).any()


def test_amp_trains_in_bfloat16(trained):
    options = [*trained[1], "--lr", "1e-6", "--temperature", "1"]
    whole, half = (moco.parse([*options, *flag]) for flag in ([], ["--amp"]))
    a, b = (moco.train(runs, data[:2], args)["history"] for args, _, data, runs in (whole, half))
    for (*what, loss), (*same, other) in zip(a, b, strict=True):
        assert what == same and loss != other and other == pytest.approx(loss, rel=0.05)


def test_labels_never_reach_the_pretraining(trained, tmp_path, capsys):
    path, options = trained
    save_npz(tmp_path / "b.npz", 80, 16, y_train=np.arange(80)[::-1] % 3)
    argv = [*options, "--data", tmp_path / "b.npz", "--save", tmp_path / "b.pt"]
    assert main(capsys, *argv)[0] == 0
    a, b = (torch.load(p, weights_only=True) for p in (path / "a.pt", tmp_path / "b.pt"))
    for name in ("MoCo", "m = 0", "few labels"):
        same = [v.equal(b["models"][name][k]) for k, v in a["models"][name].items()]
        assert all(same) == (name != "few labels")


def test_labels_are_drawn_once(trained):
    """The network taught with few labels and the probes with few labels see the same ones."""
    runs = moco.parse(trained[1])[3]
    few, every, rows = (runs[n].rows for n in ("few labels", "all labels", "MoCo"))
    assert few.equal(every[:30]) and every.sort().values.equal(rows)
    assert rows.equal(torch.arange(72))
    assert not few.equal(moco.parse([*trained[1], "--seed", "4"])[3]["few labels"].rows)


def test_networks_taught_with_labels_are_judged_by_as_many(trained, capsys, monkeypatch):
    seen, parsed, parse = [], [], moco.parse
    monkeypatch.setattr(moco, "parse", lambda argv: parsed.append(parse(argv)) or parsed[0])
    monkeypatch.setattr(moco, "draw_picture", lambda *a: None)
    x = torch.rand(2, 3, 16, 16)

    def note(encoder, x_train, *_):
        with torch.no_grad():
            seen.append((encoder(x).flatten().tolist(), len(x_train)))
        return 0.1, 0.2

    monkeypatch.setattr(moco, "evaluate", note)
    assert main(capsys, "--load", trained[0] / "a.pt", "--out", trained[0] / "o4")[0] == 0
    runs = parsed[0][3]
    few, every = (
        runs[n].model.features(x).flatten().tolist() for n in ("few labels", "all labels")
    )
    assert (few, 30) in seen and (every, 72) in seen
    assert (few, 72) not in seen and (every, 30) not in seen


def test_interrupted_run_goes_on_as_the_unbroken_one(trained, capsys, monkeypatch):
    path, options = trained
    calls, before, augment = [], signal.getsignal(signal.SIGINT), moco.augment

    def interrupt(x, u, **views):
        calls.append((x.split(8), u.split(8)))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return augment(x, u, **views)

    monkeypatch.setattr(moco, "augment", interrupt)
    assert main(capsys, *options, "--save", path / "b.pt")[0] == 130  # Ctrl-C in step 2 of 4
    assert signal.getsignal(signal.SIGINT) is before
    (x1, x2), (u1, u2) = calls[0]  # the same images, twice, and each time other random numbers
    assert x1.equal(x2) and not u1.equal(u2) and not x1.equal(calls[1][0][0])
    assert torch.load(path / "b.pt", weights_only=True)["done"] == {"MoCo": 2}
    argv = ["--load", path / "b.pt", "--save", path / "b.pt", "--out", path, "--log-every", 2]
    code, out, _ = main(capsys, *argv)
    assert code == 0 and any(line.startswith("step     4/4 | MoCo") for line in out)
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
    assert code == 0 and (path / "o3" / "moco.png").exists()
    assert not any(line.startswith("step") for line in again)
    assert first[-1].split(" | ")[:-1] == again[-1].split(" | ")[:-1]
    assert main(capsys, "--load", path / "a.pt", "--out", path, "--target", 1.1)[0] == 1
    argv = ["--load", str(path / "a.pt"), "--weight-decay", "0.3", "--out", str(path)]
    for run in moco.parse(argv)[3].values():  # the flag goes first
        assert 0.3 in run.optimizer.param_groups[0].values()
    code, more, _ = main(capsys, "--load", path / "a.pt", "--out", path, "--steps", 6)
    assert code == 0 and sum(line.startswith("step") for line in more) == 1


def test_validation_is_the_last_tenth(trained):
    data = moco.parse([*trained[1], "--validate"])[2]
    whole = moco.load_data(str(trained[0] / "a.npz"))
    assert data[0].equal(whole[0][:72]) and data[2].equal(whole[0][72:])
    assert moco.parse(trained[1])[2][2].equal(whole[2])


def test_bad_input_is_one_line_and_exit_2(tmp_path, trained, capsys):
    good = save_npz(tmp_path / "good.npz")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:300])
    np.savez(tmp_path / "pickled.npz", x_train=np.array([{}], dtype=object))
    save_npz(tmp_path / "float.npz", dtype=np.float32)
    save_npz(tmp_path / "labels.npz", y_test=np.arange(20))
    save_npz(tmp_path / "shape.npz", x_test=np.zeros((20, 9, 9, 3), np.uint8))
    save_npz(tmp_path / "one.npz", y_train=np.zeros(60, int), y_test=np.zeros(20, int))
    torch.save({"script": "simclr"}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "cut.pt").write_bytes((trained[0] / "a.pt").read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for bad in (
        "--steps 0", "--batch-size 1", "--batch-size 99999", "--lr 0", "--lr nan", "--lr inf",
        "--temperature 0", "--crop 0", "--crop 1.5", "--hue 0.6", "--seed -1", "--few 0",
        "--encoder vgg", "--optimizer lars", "--m 1.5", "--queue 0", "--groups 40",
        "--head conv", "--device tpu", "--short -1", "--log-every 0",
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
    weights = torch.load(tmp_path / "n.pt", weights_only=True)["models"]["MoCo"]
    assert all(w.isfinite().all() for w in weights.values())  # the last good checkpoint is kept


@pytest.mark.results
def test_demo_reaches_its_figure(tmp_path):
    command = [sys.executable, str(ROOT / "moco.py"), "--target", "0.80", "--out", str(tmp_path)]
    assert subprocess.run(command, timeout=3600).returncode == 0
