"""vit.py: `pytest tests/test_vit.py`."""

import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import vit
from vit import ViT

ROOT = pathlib.Path(__file__).parent.parent


def tiny(**kwargs):
    torch.manual_seed(0)
    sizes = {"image_size": (8, 12), "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 3}
    model = ViT(**{**sizes, "heads": 2, **kwargs})
    for p in model.parameters():  # zeros at the start (head, biases) would hide mistakes
        p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def run(*argv):
    command = [sys.executable, str(ROOT / "vit.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def save_npz(path, n=40, size=8, dtype=np.uint8, chans=(), classes=3, **change):
    r = np.random.default_rng(0)
    x, y = r.integers(0, 255, (n, size, size, *chans)).astype(dtype), np.arange(n) % classes
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20], **change})
    return path


# ---- shapes ----


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size, patch", [((8, 12), 4), ((4, 4), 4), ((6, 10), (3, 2)), (8, 2)])
def test_shapes(batch, size, patch):
    H, W = vit.pair(size)
    for kwargs in ({}, {"pool": "mean"}, {"pool": "mean", "class_token": False}):
        model = tiny(image_size=size, patch_size=patch, in_chans=1, **kwargs)
        x = torch.randn(batch, 1, H, W)
        n = math.prod(model.grid) + kwargs.get("class_token", True)
        assert model(x).shape == (batch, 5)
        assert [A.shape for A in model.attention(x)] == [(batch, 2, n, n)] * 3


def test_bad_sizes_are_value_errors():
    for kwargs in ({"patch_size": 5}, {"heads": 3}, {"pool": "max"}, {"class_token": False}):
        with pytest.raises(ValueError):
            tiny(**kwargs)
    with pytest.raises(ValueError, match="distillation"):
        tiny(pool="mean", distilled=True)
    for shape in ((2, 3, 12, 8), (2, 1, 8, 12), (2, 3, 8, 16)):
        with pytest.raises(ValueError, match="the model wants"):
            tiny()(torch.zeros(shape))


# ---- oracles ----


def test_patch_embedding_is_the_strided_convolution():
    embed, x = vit.PatchEmbed(3, (4, 2), 16), torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(embed(x), embed.proj(x).flatten(2).transpose(1, 2))


def test_patches_run_row_by_row():
    x = torch.arange(4 * 6).view(1, 1, 4, 6)
    expected = [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19]]
    assert vit.patchify(x, 2)[0, :4].tolist() == expected


@torch.no_grad()
def test_encoder_equals_torch():
    model, x = tiny(), torch.randn(2, 3, 8, 12)
    layer = nn.TransformerEncoderLayer(
        16, 2, 64, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    cls, patches = model.cls_token.expand(2, -1, -1), model.patch_embed(x)
    z = torch.cat([cls, patches], 1) + model.pos_embed
    for block in model.blocks:
        w = block.state_dict()
        names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj."}
        names |= {"linear1.": "mlp.fc1.", "linear2.": "mlp.fc2."}
        names |= {"norm1.": "norm1.", "norm2.": "norm2."}
        pairs = [(a, b) for a in names for b in ("weight", "bias")]
        layer.load_state_dict({a + b: w[names[a] + b] for a, b in pairs})
        z = layer(z)
    expected = model.head(F.layer_norm(z[:, 0], (16,), model.norm.weight, model.norm.bias, 1e-6))
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_written_out_attention_equals_fused():
    model, x, weights = tiny(), torch.randn(2, 3, 8, 12), []
    torch.testing.assert_close(model.forward_features(x, weights), model.forward_features(x))
    assert len(weights) == 3
    for A in weights:
        torch.testing.assert_close(A.sum(-1), torch.ones(2, 2, 7))
        assert A.std() > 1e-3


@torch.no_grad()
def test_pooling():
    x = torch.randn(2, 3, 8, 12)
    model = tiny(pool="mean")
    z = model.forward_features(x)  # no norm yet
    torch.testing.assert_close(model(x), model.head(model.fc_norm(z[:, 1:].mean(1))))
    assert isinstance(model.norm, nn.Identity)
    model = tiny(num_classes=0)
    torch.testing.assert_close(model(x), model.forward_features(x)[:, 0])


@torch.no_grad()
def test_rollout_by_hand():
    weights = [torch.softmax(torch.randn(2, 3, 5, 5), -1) for _ in range(3)]
    R = vit.attention_rollout(weights)
    for b in range(2):
        r = torch.eye(5)
        for A in weights:  # the first layer acts first: it stands on the right
            r = (0.5 * A[b].mean(0) + 0.5 * torch.eye(5)) @ r
        torch.testing.assert_close(R[b], r)
    torch.testing.assert_close(R.sum(-1), torch.ones(2, 5))


# ---- official names and sizes ----

SIZES = {"Ti16": 5717416, "S16": 22050664, "B16": 86567656, "L16": 304326632, "H14": 632045800}
DISTILLED = {"Ti16": 5910800, "S16": 22436432, "B16": 87338192, "L16": 305353680}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in getattr(vit, "ViT_" + name)().parameters())
        assert count == SIZES[name]
        if name in DISTILLED:
            model = getattr(vit, "ViT_" + name)(distilled=True)
            assert sum(p.numel() for p in model.parameters()) == DISTILLED[name]


def official(D=128, depth=2, P=4, grid=3, classes=7, prefix=1, norm="norm", C=3):
    """A state dict with the names and shapes that timm, DeiT, DINO and MAE write."""
    w = {"cls_token": (1, 1, D), "pos_embed": (1, grid * grid + prefix, D)}
    w |= {"patch_embed.proj.weight": (D, C, P, P), "patch_embed.proj.bias": (D,)}
    for i in range(depth):
        b = f"blocks.{i}."
        for n, out, inp in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1)):
            w |= {b + n + ".weight": (out * D, inp * D), b + n + ".bias": (out * D,)}
        w |= {b + "mlp.fc2.weight": (D, 4 * D), b + "mlp.fc2.bias": (D,)}
        w |= {b + f"norm{k}.{p}": (D,) for k in (1, 2) for p in ("weight", "bias")}
    w |= {norm + ".weight": (D,), norm + ".bias": (D,)}
    if classes:
        w |= {"head.weight": (classes, D), "head.bias": (classes,)}
    if prefix == 2:
        w |= {"dist_token": (1, 1, D), "head_dist.weight": (classes, D)}
        w |= {"head_dist.bias": (classes,)}
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=g) for k, s in w.items()}


def test_official_files_load_strictly():
    x = torch.randn(1, 3, 12, 12)
    timm, deit, mae = official(), official(prefix=2), official(norm="fc_norm")
    dino = official(classes=0)
    model = ViT.from_state_dict(timm)
    assert set(model.state_dict()) == set(timm)
    assert (model.blocks[0].attn.heads, model.grid, model(x).shape) == (2, (3, 3), (1, 7))
    model = ViT.from_state_dict({"model": deit})
    assert set(model.state_dict()) == set(deit) and model.distilled
    assert set(ViT.from_state_dict({"model": mae}).state_dict()) == set(mae)
    pre = {"decoder_embed.weight": torch.zeros(2), "mask_token": torch.zeros(1)} | dino
    assert set(ViT.from_state_dict({"model": pre}).state_dict()) == set(dino)
    full = {"teacher": {"module.backbone." + k: v for k, v in dino.items()}}
    full["teacher"]["module.head.mlp.0.weight"] = torch.zeros(2)
    assert ViT.from_state_dict(full).eval()(x).shape == (1, 128)
    del timm["blocks.1.norm2.bias"]
    with pytest.raises(RuntimeError, match=r"norm2\.bias"):
        ViT.from_state_dict(timm)
    with pytest.raises(ValueError, match="no weights"):
        ViT.from_state_dict({"a": torch.zeros(1)})


def test_distillation_token():
    model, x = tiny(distilled=True), torch.randn(2, 3, 8, 12)
    z = model.forward_features(x)  # [cls, dist, patches]
    y, y_dist = model.train()(x)
    torch.testing.assert_close(y, model.head(z[:, 0]))
    torch.testing.assert_close(y_dist, model.head_dist(z[:, 1]))
    torch.testing.assert_close(model.eval()(x), (y + y_dist) / 2)
    embedded = []
    model.blocks[0].register_forward_pre_hook(lambda _, z: embedded.append(z[0]))
    model(x)
    torch.testing.assert_close(embedded[0][0, 0], (model.cls_token + model.pos_embed)[0, 0])
    torch.testing.assert_close(embedded[0][0, 1], model.dist_token[0, 0] + model.pos_embed[0, 1])


def test_hard_distillation():
    y, y_dist = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    teacher = torch.randn(4, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    loss = vit.hard_distillation_loss((y, y_dist), target, teacher)
    by_hand = -y.log_softmax(-1)[range(4), target].mean() / 2
    by_hand -= y_dist.log_softmax(-1)[range(4), teacher.argmax(-1)].mean() / 2
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert teacher.grad is None and y.grad is not None and y_dist.grad is not None


def test_resize_pos_embed():
    rows, cols = torch.meshgrid(torch.arange(8.0), torch.arange(10.0), indexing="ij")
    ramp = torch.stack([rows, cols], -1).view(1, 80, 2)
    pos = torch.cat([torch.full((1, 2, 2), 9.0), ramp], 1)
    same = vit.resize_pos_embed(pos, (8, 10), (8, 10), prefix=2)
    torch.testing.assert_close(same, pos, atol=1e-5, rtol=0)
    big = vit.resize_pos_embed(pos, (8, 10), (16, 30), prefix=2)
    assert big.shape == (1, 2 + 16 * 30, 2) and (big[:, :2] == 9).all()
    grid = big[0, 2:].view(16, 30, 2)  # away from the border, a ramp stays a ramp
    torch.testing.assert_close(grid[5:-5, 9, 0], (torch.arange(5, 11) + 0.5) / 2 - 0.5)
    torch.testing.assert_close(grid[4, 8:-8, 1], (torch.arange(8, 22) + 0.5) / 3 - 0.5)
    with pytest.raises(ValueError, match="positions"):
        vit.resize_pos_embed(pos, (4, 6), (8, 8), prefix=1)
    model = ViT.from_state_dict(official(), image_size=(24, 8))
    assert model.grid == (6, 2) and model.pos_embed.shape[1] == 13
    resized = vit.resize_pos_embed(official()["pos_embed"], (3, 3), (6, 2))
    torch.testing.assert_close(model.pos_embed.data, resized)


def test_hybrid():
    model = tiny(image_size=(16, 32), patch_size=1, stem=vit.conv_net(3, ((8, 2), (16, 2), (8, 2))))
    assert model.grid == (2, 4) and model(torch.randn(2, 3, 16, 32)).shape == (2, 5)
    assert any(k.startswith("patch_embed.backbone") for k in model.state_dict())


# ---- properties ----


def test_positions_tell_patches_apart():
    """Without positions a ViT is blind to the order of its patches; with them it isn't."""
    model, x = tiny(), torch.randn(2, 3, 8, 12)
    swapped = x.roll(4, 3)  # whole patches
    assert not torch.allclose(model(x), model(swapped), atol=1e-3)
    model.pos_embed.data.zero_()
    torch.testing.assert_close(model(x), model(swapped))


def test_drop_path():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = vit.drop_path(x, 0.3, True)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert ((y == 0).all((1, 2)) | (y > 0).all((1, 2))).all()  # whole samples
    assert abs((y[:, 0, 0] == 0).float().mean() - 0.3) < 0.03
    assert vit.drop_path(x, 0.3, False) is x
    rates = [b.rate for b in tiny(drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_dropout_acts_in_training_only():
    model, x = tiny(dropout=0.5, drop_path=0.5), torch.randn(2, 3, 8, 12)
    assert model(x).equal(model(x))
    assert not model.train()(x).equal(model(x))
    model = tiny().train()
    assert model(x).equal(model(x))


def test_gradients_and_first_loss():
    torch.manual_seed(0)
    model = ViT((8, 12), 4, 3, 10, dim=32, depth=2, heads=2)
    x, y = torch.randn(16, 3, 8, 12), torch.randint(0, 10, (16,))
    loss = F.cross_entropy(model(x), y)
    assert abs(loss.item() - math.log(10)) < 1e-5  # the head starts at zero
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    assert F.cross_entropy(model(x), y) < loss / 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# ---- augmentation ----


def test_rand_augment():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 16, 16)
    y = vit.rand_augment(x, 2, 0.9, True)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 + 1e-5
    assert (y != x).flatten(1).any(1).all()
    assert not y.equal(vit.rand_augment(x, 2, 0.9, True))
    torch.manual_seed(1)
    a = vit.rand_augment(x)
    torch.manual_seed(1)
    assert a.equal(vit.rand_augment(x))
    dot = torch.zeros(200, 1, 33, 33)
    dot[:, :, 16, 16] = 1
    moved = vit.rand_augment(dot, 0)  # no operation: the shift alone, up to an eighth of the side
    mass = moved.flatten(1).sum(1)
    torch.testing.assert_close(mass, torch.ones(200), atol=1e-3, rtol=0)
    ys = (moved.sum((1, 3)) * torch.arange(33)).sum(1) - 16
    assert 3 < ys.abs().max() < 33 / 8 and ys.std() > 1
    left = torch.zeros(400, 1, 8, 8)
    left[..., :4] = 1
    flipped = vit.rand_augment(left, 0, flip=True)[:, 0].sum(1)
    assert 120 < (flipped[:, 7] > flipped[:, 0]).sum() < 280


def test_each_operation_of_rand_augment(monkeypatch):
    """One operation at a fixed strength on a dot or on colours, and what it has to do there."""
    dot = torch.zeros(1, 1, 33, 33)
    dot[..., 16, 24] = 1  # half the side to the right of the middle

    def apply(kind, x, s):
        monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor([kind]))
        draws = [torch.full((1, 2), 0.5), torch.tensor([(s + 1) / 2])]
        monkeypatch.setattr(torch, "rand", lambda *_: draws.pop(0))
        return vit.rand_augment(x, 1, 1.0)

    def place(y):  # of the dot, in pixels from the middle: x, y
        mass, at = y[0, 0] / y.sum(), torch.arange(33) - 16.0
        return (mass.sum(0) @ at).item(), (mass.sum(1) @ at).item()

    assert place(apply(10, dot, 1.0)) == pytest.approx((8, 0), abs=0.1)
    assert place(apply(2, dot, 0.5)) == pytest.approx((8 - 0.3 * 16.5, 0), abs=0.3)
    assert place(apply(3, dot, 0.5)) == pytest.approx((8, -0.3 * 16.5), abs=0.3)
    assert place(apply(0, dot.mT, 0.5)) == pytest.approx((-0.3 * 8, 8), abs=0.3)
    assert place(apply(1, dot, 0.5)) == pytest.approx((8, -0.3 * 8), abs=0.3)
    turned = place(apply(4, dot, 0.5))
    assert math.hypot(*turned) == pytest.approx(8, abs=0.2) and abs(turned[1]) > 3
    x = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1) * torch.tensor([0.5, 1.0]).view(1, 1, 1, 2)
    x, middle = x.expand(1, 3, 2, 2), x.mean()
    torch.testing.assert_close(apply(5, x, 0.5), 1.5 * x)
    torch.testing.assert_close(apply(6, x, 0.5), middle + 1.5 * (x - middle))
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(apply(7, x, 0.5), grey + 1.5 * (x - grey))
    torch.testing.assert_close(apply(8, x, 0.5), torch.where(x > 0.5, 1 - x, x))
    torch.testing.assert_close(apply(9, x, 0.5), (4 * x).round() / 4)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mix(mixup, cutmix):
    """Image i is the constant i: the pixels of the mix say what the targets have to be."""
    torch.manual_seed(0)
    B = 32
    x = torch.eye(B).view(B, B, 1, 1).expand(B, B, 8, 10)
    mixed, target = vit.mix(x, torch.eye(B), mixup, cutmix)
    torch.testing.assert_close(target.sum(1), torch.ones(B))
    torch.testing.assert_close(mixed.mean((2, 3)), target)  # share of pixels = share of the label
    hard = ((mixed == 0) | (mixed == 1)).all()
    assert not target.equal(torch.eye(B)) and (hard or mixup > 0)
    if mixup and not cutmix:
        torch.testing.assert_close(mixed.std((2, 3)), torch.zeros(B, B))
    if cutmix and not mixup:
        assert hard
    assert vit.mix(x, target, 0, 0)[0] is x


# ---- data ----


def test_canvases():
    data = vit.load_data("digits")
    assert [len(t) for t in data] == [1297, 1297, 1500, 1500]
    x, again = data[0], vit.load_data("digits")[0]
    assert x.shape[1:] == (32, 32, 3) and x.dtype == torch.uint8 and x.equal(again)
    ink = (x.float().amax(-1) > 80).float()  # bright places
    rows = ink.amax(2).sum(1)
    assert 6 < rows.min() and rows.max() <= 25 and x.float().amax((1, 2, 3)).min() > 120
    place = (ink.sum(1) * torch.arange(32)).sum(1) / ink.sum((1, 2))
    assert place.min() < 9 and place.max() > 22
    ones = torch.ones(50, 8, 8)
    sides = (vit.canvas_digits(ones, 0).float().amax(-1) > 120).float().sum((1, 2)).sqrt()
    assert 12.5 < sides.min() and sides.max() < 22.5 and sides.std() > 1


def test_load_npz(tmp_path):
    for chans in ((), (3,)):
        x, y, x_test, _ = vit.load_data(str(save_npz(tmp_path / "a.npz", chans=chans)))
        assert x.shape == (40, 8, 8, *(chans or (1,))) and y.dtype == torch.int64
        assert vit.to_float(x_test).shape == (20, *(chans or (1,)), 8, 8)
    y = np.arange(40)[:, None] % 3  # Keras's CIFAR-10 has (N, 1)
    assert vit.load_data(str(save_npz(tmp_path / "b.npz", y_train=y)))[1].shape == (40,)


def test_images_get_the_units_and_the_size_that_a_model_wants():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 6, 4, 3)
    assert vit.normalise(vit.to_float(x)).flatten(1).T.unique(dim=0).tolist() == [[-1.0, 1.0]]
    black, white = vit.normalise(vit.to_float(x), "imagenet").mean((2, 3))
    torch.testing.assert_close(white - black, 1 / torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close(black, -torch.tensor([0.485, 0.456, 0.406]) * (white - black))
    for channels in (1, 3):
        model = tiny(in_chans=channels)
        assert model(vit.to_float(x, model)).shape == (2, 5)


def test_decay_leaves_out_biases_norms_tokens_and_positions(trained):
    _, _, runs, _ = vit.parse(trained[1])
    model, optimizer, _ = runs["regularised"]
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = ([names[id(p)] for p in g["params"]] for g in optimizer.param_groups)
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert all(n.endswith("bias") or "norm" in n or n in ("cls_token", "pos_embed") for n in rest)
    assert len(decayed) + len(rest) == len(names)


def test_classes_that_only_the_held_out_images_have(tmp_path):
    path, y = tmp_path / "sorted.npz", np.arange(40) // 19  # class 2 in the last tenth alone
    data = ["--data", str(save_npz(path, y_train=y)), "--out", str(tmp_path), "--device", "cpu"]
    options = "--steps 1 --batch-size 8 --dim 8 --depth 1 --heads 1".split()
    assert vit.parse([*data, *options])[2]["regularised"][0].head.out_features == 3
    assert vit.main([*data, *options]) == 0


# ---- the script ----


def main(capsys, *argv):
    """Runs the script in this process -> exit status, lines of stdout and of stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vit.py"])
        try:
            code = vit.main([*map(str, argv), "--device", "cpu"])
        except SystemExit as stop:
            code = stop.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Options of a small run on an npz, which has left its checkpoint a.pt."""
    path = tmp_path_factory.mktemp("vit")
    options = ["--data", save_npz(path / "a.npz"), "--steps", 4, "--batch-size", 8, "--dim", 16]
    options += ["--depth", 2, "--heads", 2, "--log-every", 2, "--drop-path", 0.3, "--out", path]
    options = [*map(str, options), "--device", "cpu"]
    assert vit.main([*options, "--save", str(path / "a.pt")]) == 0
    return path, options


def test_quick_runs(tmp_path):
    out = run("--quick", "--device", "cpu", "--out", tmp_path / "new" / "dir")
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0].startswith("vit | 0.") and "cpu | seed 0 | digits 180/200" in lines[0]
    for word in ("test acc regularised", "plain", "cnn", "chance 0.100", "raw-pixel k-NN"):
        assert word in lines[-1]
    assert (tmp_path / "new" / "dir" / "vit.png").stat().st_size > 10000


def test_resumed_run_is_the_unbroken_one(trained, capsys):
    path, options = trained
    args, data, runs, state = vit.parse([*options, "--save", str(path / "b.pt")])
    assert [len(t) for t in data] == [36, 36, 4, 4, 20, 20]
    runs["regularised"][0].register_forward_pre_hook(_interrupt_at(2))
    assert vit.train(args, data, runs, state) == 130  # Ctrl-C in step 2 of 4
    half = torch.load(path / "b.pt", weights_only=True)
    assert half["step"] == 2
    for group, decay in zip(
        half["optimizers"]["regularised"]["param_groups"], (0.05, 0), strict=True
    ):
        assert group["lr"] == pytest.approx(1e-3)  # half of 2e-3: the middle of the cosine
        assert group["weight_decay"] == decay
    code, out, _ = main(capsys, "--load", path / "b.pt", "--steps", 4, "--save", path / "b.pt",
                        "--log-every", 2, "--out", path)  # fmt: skip
    assert code == 0 and any(line.startswith("step     4/4") for line in out)
    whole, parts = (torch.load(path / p, weights_only=True) for p in ("a.pt", "b.pt"))
    assert whole["history"] == parts["history"] and parts["step"] == 4
    for k, v in whole["models"]["regularised"].items():
        assert parts["models"]["regularised"][k].equal(v), k


def _interrupt_at(step):
    import signal

    calls = []

    def hook(module, _):
        if module.training:
            calls.append(1)
            if len(calls) == step:
                signal.raise_signal(signal.SIGINT)

    return hook


def test_training_validation_and_test_have_the_same_units(trained, monkeypatch, tmp_path):
    units, normalise = [], vit.normalise
    monkeypatch.setattr(vit, "normalise", lambda x, p="half": units.append(p) or normalise(x, p))
    colour = str(save_npz(tmp_path / "c.npz", chans=(3,)))
    assert vit.main([*trained[1], "--data", colour, "--pixels", "imagenet"]) == 0
    assert len(units) >= 4 + 2 + 1 + 1 and set(units) == {"imagenet"}  # and the picture's


def test_switched_off_the_regularised_vit_is_the_plain_one(trained):
    path, options = trained
    models = "--models regularised,plain --warmup 0".split()
    weights = []
    for value in ("0", "0.3"):
        argv = [*options, *models, "--steps", "3", "--save", str(path / "s.pt")]
        for name in vit.RECIPE:
            if name not in ("augment", "flip"):
                argv += ["--" + name.replace("_", "-"), value]
        assert vit.main([*argv, "--augment", "0"]) == 0
        saved = torch.load(path / "s.pt", weights_only=True)["models"]
        weights += [saved[k]["head.weight"] for k in ("regularised", "plain")]
    assert weights[0].equal(weights[1]) and weights[1].equal(weights[3])
    assert not weights[2].equal(weights[3])


def test_load_evaluates(trained, capsys):
    path, options = trained
    _, first, _ = main(capsys, *options)
    code, again, _ = main(capsys, "--load", path / "a.pt", "--out", path / "o3")
    assert code == 0 and len(again) == 2 and (path / "o3" / "vit.png").exists()
    assert first[-1].split(" | ")[0] == again[-1].split(" | ")[0]
    assert main(capsys, "--load", path / "a.pt", "--out", path, "--target", 1.1)[0] == 1
    argv = ["--load", str(path / "a.pt"), "--weight-decay", "0.3", "--out", str(path)]
    for name, (_, optimizer, _) in vit.parse(argv)[2].items():  # the flag goes first
        want = [0.3 * (name == "regularised"), 0.0]
        assert [g["weight_decay"] for g in optimizer.param_groups] == want


def test_official_weights_on_images(tmp_path):
    import matplotlib.image

    torch.save({"model": official(C=3)}, tmp_path / "w.pth")
    (tmp_path / "folder").mkdir()
    for i, shape in enumerate([(20, 30, 3), (15, 9), (12, 12, 4)]):
        image = np.random.default_rng(i).random(shape).astype("f4")
        matplotlib.image.imsave(tmp_path / "folder" / f"{i}.png", image)
    np.save(tmp_path / "a.npy", np.zeros((2, 9, 9), np.uint8))
    args = ["--load", tmp_path / "w.pth", "--out", tmp_path / "o", "--device", "cpu"]
    for data in ("folder", "a.npy"):
        (tmp_path / "o" / "vit.png").unlink(missing_ok=True)
        assert vit.main([*map(str, args), "--data", str(tmp_path / data)]) == 0
        assert (tmp_path / "o" / "vit.png").stat().st_size > 10000
    torch.save(official(C=1), tmp_path / "grey.pth")
    argv = ["--load", tmp_path / "grey.pth", "--data", tmp_path / "folder", "--pixels", "half"]
    assert vit.main([*map(str, argv), "--out", str(tmp_path / "o"), "--device", "cpu"]) == 0
    torch.save(official(classes=0), tmp_path / "dino.pth")
    argv = ["--load", tmp_path / "dino.pth", "--data", tmp_path / "folder", "--out", tmp_path]
    assert vit.main([*map(str, argv), "--device", "cpu"]) == 0
    data = str(save_npz(tmp_path / "d.npz", chans=(3,), classes=7))
    with pytest.raises(SystemExit):
        vit.main([*map(str, argv), "--device", "cpu", "--data", data])
    assert vit.main([*map(str, args), "--data", data, "--image-size", "16"]) == 0
    assert vit.main([*map(str, args), "--data", data, "--target", "1"]) == 1


def test_bad_input_is_one_line_and_exit_2(tmp_path, trained, capsys):
    good = save_npz(tmp_path / "good.npz")
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:300])
    np.savez(tmp_path / "pickled.npz", x_train=np.array([{}], dtype=object))
    save_npz(tmp_path / "float.npz", dtype=np.float32)
    save_npz(tmp_path / "labels.npz", y_test=np.arange(20))
    save_npz(tmp_path / "shape.npz", x_test=np.zeros((20, 9, 9), np.uint8))
    torch.save({"script": "mamba"}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "cut.pt").write_bytes((trained[0] / "a.pt").read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for bad in (
        "--steps 0", "--batch-size 0", "--batch-size 99999", "--lr 0", "--lr nan", "--dim 63",
        "--patch-size 5", "--patch-size 0", "--depth 0", "--heads 0", "--pool max",
        "--models resnet", "--image-size 16 --batch-size 8 --steps 1",
        "--pixels imagenet --batch-size 8 --steps 1",
        "--device tpu", "--smoothing 1.5", "--mixup -1", "--seed -1", "--augment -1",
        "--data nofile.npz", "--data cut.npz", "--data pickled.npz", "--data float.npz",
        "--data labels.npz", "--data shape.npz", "--data good.npz --batch-size 37",
        "--data good.npz --patch-size 16", "--data empty", "--load nofile.pt", "--load other.pt",
        "--load tensor.pt", "--load cut.pt", "--out file/x", "--save empty",
        "--log-every 0", f"--save {tmp_path}/nodir/x.pt",
        f"--load {trained[0] / 'a.pt'} --dim 32", f"--load {trained[0] / 'a.pt'} --data digits",
    ):  # fmt: skip
        argv = [
            str(tmp_path / a) if (tmp_path / a.split("/")[0]).exists() else a for a in bad.split()
        ]
        if "--data" not in argv and "--load" not in argv:
            argv += ["--data", str(good)]
        code, out, err = main(capsys, "--batch-size", 8, "--out", tmp_path / "o", *argv)
        assert code == 2 and not out and "error: " in err[-1], (bad, err)
        assert err[0].startswith("usage") and "Traceback" not in "".join(err), bad
    assert not (tmp_path / "nodir").exists()


def test_nan_stops_the_run(trained, tmp_path, capsys):
    argv = [*trained[1], "--out", tmp_path, "--save", tmp_path / "n.pt", "--lr", 1e30]
    code, _, err = main(capsys, *argv, "--steps", 30, "--log-every", 1)
    assert code == 1 and "at step" in err[-1]
    weights = torch.load(tmp_path / "n.pt", weights_only=True)["models"]["regularised"]
    assert all(w.isfinite().all() for w in weights.values())  # the last good checkpoint is kept


@pytest.mark.results
def test_readme_figure_still_holds(tmp_path):
    assert vit.main(["--out", str(tmp_path), "--target", ".696"]) == 0
