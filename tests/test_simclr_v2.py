"""simclr_v2.py: `pytest tests/test_simclr_v2.py`."""

import math
import pathlib
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import simclr
import simclr_v2
from simclr_v2 import SimCLR, classifier, distill_loss, nt_xent, resnet

ROOT = pathlib.Path(__file__).parent.parent
OFF = dict.fromkeys(("rotate", "flip", "jitter", "hue", "grey"), 0) | {"crop": 1}


def tiny(seed=0, **how):
    torch.manual_seed(seed)
    return SimCLR(resnet((1, 1), 8, True), 16, **how)


def save_npz(path, n=80, size=16, dtype=np.uint8, chans=(3,), classes=4, **change):
    r = np.random.default_rng(0)
    x, y = r.integers(0, 255, (n, size, size, *chans)).astype(dtype), np.arange(n) % classes
    np.savez(path, **{"x_train": x, "y_train": y, "x_test": x[:20], "y_test": y[:20], **change})
    return path


def loop(steps, lr, model):
    """The plainest loop that a stage can be given: SGD, a seed per step."""
    optimizer = torch.optim.SGD(model.parameters(), lr)

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for step in range(steps):
        yield torch.Generator().manual_seed(step), update


# ---- networks ----


def test_encoder_has_the_fields_names_and_count():
    with torch.device("meta"):
        model = resnet()
    names = set(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == 11168832 and model.dim == 512
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.1.bias"} <= names
    assert (
        "layer4.1.bn2.num_batches_tracked" in names and "layer1.0.downsample.0.weight" not in names
    )
    assert model.state_dict()["layer4.0.conv1.weight"].shape == (512, 256, 3, 3)


@pytest.mark.parametrize("small, side", [(False, 2), (True, 8)])
@pytest.mark.parametrize("layers", [(1,), (2, 1), (1, 1, 1)])
def test_shapes(small, side, layers):
    model = resnet(layers, 4, small).eval()
    assert model(torch.rand(1, 3, 3 * side, 5 * side)).shape == (1, model.dim)
    assert model.dim == 4 * 2 ** (len(layers) - 1)


def test_block_by_hand():
    x = torch.randn(2, 4, 5, 5)
    for block in (simclr_v2.Block(4, 4, 1).eval(), simclr_v2.Block(4, 8, 2).eval()):
        way = x if block.conv1.stride == (1, 1) else block.downsample(x)
        y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        torch.testing.assert_close(block(x), F.relu(y + way))
    assert block(x).shape == (2, 8, 3, 3)


def test_head_is_three_layers_with_batch_norm():
    model, x = tiny(), torch.rand(9, 3, 16, 16)
    kinds = [[type(m) for m in layer] for layer in model.head]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds == [hidden, hidden, hidden[:2]]
    assert [layer[0].weight.shape for layer in model.head] == [(16, 16)] * 3
    h = model.encoder(x)
    for w, last in zip((layer[0].weight for layer in model.head), (False, False, True)):
        h = h @ w.T
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
        h = h if last else h.relu()
    torch.testing.assert_close(model(x), h, atol=1e-4, rtol=1e-4)
    assert len(tiny(layers=2).head) == 2


# ---- NT-Xent and the memory ----


def brute_force(z1, z2, temperature, memory=()):
    """Eq. 1 pair by pair."""
    z, N, total = [*z1, *z2], len(z1), 0.0

    def s(a, b):
        return torch.exp(a @ b / (a.norm() * b.norm()) / temperature)

    for i in range(2 * N):
        others = sum(s(z[i], z[k]) for k in range(2 * N) if k != i)
        others = others + sum(s(z[i], m) for m in memory)
        total = total - torch.log(s(z[i], z[(i + N) % (2 * N)]) / others)
    return total / (2 * N)


@pytest.mark.parametrize("N, d", [(1, 3), (2, 5), (7, 4)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("M", [0, 1, 6])
def test_nt_xent_equals_the_sum_over_pairs(N, d, temperature, M):
    z1, z2 = torch.randn(N, d).double(), torch.randn(N, d).double()
    memory = F.normalize(torch.randn(M, d).double(), dim=1) if M else None
    fast = nt_xent(z1, z2, temperature, memory)
    torch.testing.assert_close(fast, brute_force(z1, z2, temperature, memory if M else ()))


def test_nt_xent_at_known_points():
    z = torch.ones(8, 4)
    assert nt_xent(z, 3 * z).item() == pytest.approx(math.log(15), abs=1e-5)
    memory = z[:5] / 2  # of length one
    assert nt_xent(z, z, 0.1, memory).item() == pytest.approx(math.log(20), abs=1e-5)
    z = torch.eye(6)  # partners equal, all others and the memory orthogonal
    expected = math.log(1 + (10 + 3) * math.exp(-1 / 0.2))
    memory = torch.eye(7)[6:].expand(3, 7)
    z = F.pad(z, (0, 1))
    assert nt_xent(z, z, 0.2, memory).item() == pytest.approx(expected, abs=1e-5)
    assert nt_xent(z[:1], -z[:1], 0.2).item() == pytest.approx(0, abs=1e-6)  # no negative
    # the partner is the answer, and no negative: opposed views lose against the orthogonal rest
    apart = nt_xent(z[:2], -z[:2], 0.5).item()
    assert apart == pytest.approx(math.log(1 + 2 * math.exp(2)), abs=1e-5)


def test_memory_gets_no_gradient_and_pushes():
    z1, z2 = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    memory = F.normalize(torch.randn(3, 6), dim=1).requires_grad_()
    loss = nt_xent(z1, z2, 0.5, memory)
    loss.backward()
    assert memory.grad is None
    with torch.no_grad():
        assert nt_xent(z1 - 0.1 * z1.grad, z2 - 0.1 * z2.grad, 0.5, memory) < loss
    assert (z1.grad * z1).sum(1).abs().max() < 1e-5  # cosine: no gradient along z
    nt_xent(z1, z2, 0.5, None).backward()


def test_memory_is_first_in_first_out_of_the_slow_network():
    model, x = tiny(memory=10, m=0.75), torch.rand(4, 3, 16, 16)
    assert model.memory.shape == (10, 16)
    torch.testing.assert_close(model.memory.norm(dim=1), torch.ones(10))
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fast, slow, start = (
        [p.clone() for p in part.parameters()] for part in (model, model.slow, model)
    )
    fast = fast[: len(slow)]
    old = model.memory.clone()
    model.remember(x)
    for a, b, c in zip(model.slow.parameters(), slow, fast, strict=True):
        torch.testing.assert_close(a, 0.75 * b + 0.25 * c)
    assert all(a.equal(b) for a, b in zip(model.parameters(), start[: len(slow)]))  # it only leads
    assert model.memory[:6].equal(old[4:])  # the oldest four have left
    torch.testing.assert_close(model.memory[6:], F.normalize(model.slow(x), dim=1))
    model.remember(torch.rand(12, 3, 16, 16))  # more than it holds: the last ten stay
    assert model.memory.shape == (10, 16) and not any(
        p.requires_grad for p in model.slow.parameters()
    )
    assert all(p.grad is None for p in model.parameters()) and model.memory.grad_fn is None


def test_first_loss_and_gradients():
    for memory in (0, 40):
        model, x = tiny(memory=memory), torch.rand(32, 3, 16, 16)
        z1, z2 = model(x), model(x.roll(1, 0))
        loss = nt_xent(z1, z2, 5.0, model.memory)
        assert loss.item() == pytest.approx(math.log(63 + memory), abs=0.2)
        loss.backward()
        for name, p in model.named_parameters():
            learns = not name.startswith("slow") and name != "head.2.1.bias"
            assert learns == (p.grad is not None and p.grad.abs().max() > 0), name
        assert learns is False or not memory


@pytest.mark.parametrize("memory", [0, 24])
def test_pretraining_finds_the_partner(memory):
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(40, 3, 3, 3), 16, mode="bilinear").mul(255).byte()
    model = tiny(memory=memory, m=0.9)
    sample = partial(simclr_v2.sample_views, n=16, **{**OFF, "crop": 0.6, "hue": 0.5})

    def loss(seed):
        _, v = sample(x, torch.Generator().manual_seed(seed), 2)
        with torch.no_grad():
            return nt_xent(*model(v).chunk(2), 0.2).item()

    first, z = loss(999), model.memory
    z = None if z is None else z.clone()
    simclr_v2.pretrain(model, x, sample, partial(loop, 60, 0.1), 0.2)
    assert loss(999) < first / 1.5
    assert not memory or not z.equal(model.memory)


# ---- fine-tuning ----


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_classifier_starts_from_the_layer_of_the_head(layer):
    model, x = tiny(), torch.rand(6, 3, 16, 16)
    model(x)  # running statistics that are not the initial ones
    before = {k: v.clone() for k, v in model.state_dict().items()}
    net = classifier(model, 5, layer)
    for part, mine in ((model.encoder, net[0]), (model.head[:layer], net[1])):
        assert part.state_dict().keys() == mine.state_dict().keys()
        assert all(v.equal(mine.state_dict()[k]) for k, v in part.state_dict().items())
    assert len(net[1]) == layer and net[2].weight.shape == (5, 16)
    model.eval(), net.eval()
    hidden = model.head[:layer](model.encoder(x))
    torch.testing.assert_close(net(x), hidden @ net[2].weight.T + net[2].bias)
    y = torch.arange(40) % 5
    images = torch.randint(0, 255, (40, 3, 16, 16)).byte()
    first = [p.clone() for p in net.parameters()]
    sample = partial(simclr_v2.sample_views, n=8, **OFF)
    simclr_v2.finetune(net.train(), images, y, sample, partial(loop, 2, 0.1))
    assert all(not a.equal(b) for a, b in zip(net.parameters(), first))  # the encoder learns, too
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())  # a copy: used again


def test_finetuning_is_cross_entropy_of_its_own_labels():
    net, losses = nn.Flatten(), []
    x, y = torch.randint(0, 255, (12, 3, 1, 1)).byte(), torch.arange(12) % 3
    rows = torch.tensor([7, 0, 3])

    def one(model):
        yield None, losses.append

    simclr_v2.finetune(net, x, y, lambda x, g: (rows, x[rows] / 255), one)
    p = (x[rows].flatten(1) / 255).softmax(1)
    expected = -(p[0, 1].log() + p[1, 0].log() + p[2, 0].log()) / 3
    torch.testing.assert_close(losses[0], expected)


def test_finetuning_learns():
    x = torch.randint(0, 100, (60, 3, 16, 16))
    y = torch.arange(60) % 3
    x[torch.arange(60), y] += 100
    net = classifier(tiny(), 3, 1)
    sample = partial(simclr_v2.sample_views, n=20, **OFF)
    simclr_v2.finetune(net, x.byte(), y, sample, partial(loop, 40, 0.1))
    with torch.no_grad():
        assert F.cross_entropy(net(x / 255), y) < math.log(3) / 4


# ---- distillation ----


def test_distill_loss_by_hand():
    s, t = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    for tau in (0.5, 1.0, 4.0):
        e, f = ([math.exp(v / tau) for v in row[0].tolist()] for row in (t, s))
        expected = -sum(a / sum(e) * math.log(b / sum(f)) for a, b in zip(e, f))
        assert distill_loss(s, t, tau).item() == pytest.approx(expected, rel=1e-5)


def test_a_student_equal_to_its_teacher_has_the_teachers_entropy():
    t = torch.randn(7, 5).double()
    p = t.softmax(1)
    torch.testing.assert_close(distill_loss(t, t), -(p * p.log()).sum(1).mean())
    assert all(distill_loss(t + torch.randn(7, 5), t) > distill_loss(t, t) for _ in range(20))


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_distill_gradient(tau):
    s, t = (torch.randn(4, 6).double().requires_grad_() for _ in range(2))
    distill_loss(s, t, tau).backward()
    expected = ((s / tau).softmax(1) - (t / tau).softmax(1)) / tau / 4
    torch.testing.assert_close(s.grad, expected)
    assert t.grad is None  # the teacher is fixed


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
def test_distillation_mixes_as_equation_3_and_leaves_the_teacher(alpha):
    student, teacher, losses = classifier(tiny(1), 4), classifier(tiny(2), 4, 1), []
    x, few = torch.rand(9, 3, 16, 16), (torch.rand(5, 3, 16, 16), torch.tensor([3, 1, 0, 2, 2]))
    teacher.train()(2 * x)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student.eval()  # as teacher: the numbers below do not depend on the order of the batches

    def one(model):
        yield None, losses.append

    everything = lambda x, g: (torch.arange(len(x)), x)  # noqa: E731
    labels = few if alpha < 1 else None  # without labels it asks for none
    simclr_v2.distill(student, teacher, x, labels, everything, one, 2.0, alpha)
    losses[0].backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    p_t = (teacher(x) / 2).softmax(1)
    soft = -(p_t * (student(x) / 2).log_softmax(1)).sum(1).mean()
    hard = -student(few[0]).log_softmax(1)[torch.arange(5), few[1]].mean()
    torch.testing.assert_close(losses[0], (1 - alpha) * hard + alpha * soft)
    assert all(p.grad.abs().max() > 0 for p in student.parameters())


def test_student_learns_from_the_teacher():
    torch.manual_seed(0)
    x = torch.randint(0, 255, (60, 3, 16, 16)).byte()
    student, teacher = classifier(tiny(1), 4), classifier(tiny(2), 4)
    teacher(x / 255), teacher[2].weight.data.mul_(20)
    sample = partial(simclr_v2.sample_views, n=20, **OFF)
    simclr_v2.distill(student, teacher, x, None, sample, partial(loop, 150, 0.3))
    with torch.no_grad():
        s, t = student.eval()(x / 255), teacher(x / 255)
        start = distill_loss(torch.zeros_like(t), t) - distill_loss(t, t)
        assert distill_loss(s, t) - distill_loss(t, t) < start / 3  # the divergence falls


# ---- views and data ----


def test_views_are_those_of_simclr():
    x = torch.randint(0, 255, (50, 3, 16, 20)).byte()
    views = {"crop": 0.3, "rotate": 30.0, "flip": 0.5, "jitter": 0.5, "hue": 0.3, "grey": 0.3}
    rows, v = simclr_v2.sample_views(x, torch.Generator().manual_seed(1), 2, 7, **views)
    g = torch.Generator().manual_seed(1)
    assert rows.equal(torch.randint(50, (7,), generator=g))
    u = torch.cat([torch.rand(14, 12, generator=g), torch.zeros(14, 4)], 1)
    expected = simclr.augment((x[rows] / 255).repeat(2, 1, 1, 1), u, blur=0, **views)
    torch.testing.assert_close(v, expected)
    assert v.shape == (14, 3, 16, 20) and 0 <= v.min() and v.max() <= 1
    assert not v[:7].equal(v[7:])  # two views of an image differ


def test_without_operations_a_view_is_the_image():
    x = torch.randint(0, 255, (50, 3, 9, 12)).byte()
    rows, v = simclr_v2.sample_views(x, torch.Generator().manual_seed(1), 2, 7, **OFF)
    torch.testing.assert_close(v, (x[rows] / 255).repeat(2, 1, 1, 1), atol=1e-4, rtol=0)


def test_digits_are_those_of_simclr():
    ours, theirs = simclr_v2.load_data("digits"), simclr.load_data("digits")
    assert ours[0].shape == (6450, 3, 32, 32) and ours[2].shape == (1500, 3, 32, 32)
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))
    assert len(ours[0]) * 9 // 10 % 5 == 0  # five canvases of a digit stay on one side


def test_load_npz(tmp_path):
    for chans in ((), (1,), (3,)):
        x, y, x_test, _ = simclr_v2.load_data(str(save_npz(tmp_path / "a.npz", chans=chans)))
        assert x.shape == (80, 3, 16, 16) and x_test.shape == (20, 3, 16, 16)
        assert y.dtype == torch.int64 and x.dtype == torch.uint8
    with np.load(tmp_path / "a.npz") as file:
        assert (file["x_train"] == x.permute(0, 2, 3, 1).numpy()).all()
    y = np.arange(80, dtype=np.uint8)[:, None] % 4  # Keras's CIFAR-10 has (N, 1)
    assert simclr_v2.load_data(str(save_npz(tmp_path / "b.npz", y_train=y)))[1].shape == (80,)


def test_labels_are_drawn_once_and_evenly():
    y = torch.arange(5000) % 7
    few, more = (simclr_v2.labelled(y, p, 3) for p in (1, 10))
    assert len(few) == 50 and len(more) == 500 and set(few.tolist()) < set(more.tolist())
    assert len(set(more.tolist())) == 500
    counts = y[few].bincount()
    assert counts.min() >= 7 and counts.max() <= 8
    assert few.equal(simclr_v2.labelled(y, 1, 3)) and not few.equal(simclr_v2.labelled(y, 1, 4))
    assert sorted(simclr_v2.labelled(y, 100, 0).tolist()) == list(range(5000))
    assert len(simclr_v2.labelled(y, 1e-9, 0)) == 1


# ---- the script ----


def main(capsys, *argv):
    """Runs the script in this process -> exit status, lines of stdout and of stderr."""
    try:
        code = simclr_v2.main([*map(str, argv), "--device", "cpu"])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


SMALL = "--encoder tiny --student tiny --steps 4 --tune-steps 2 --distill-steps 4"
SMALL += " --batch-size 8 --labels 10 50 --log-every 2 --alpha 0.5 --memory 20"
NAMES = ["labels alone", "labels alone, small", "fine-tuned from h", "fine-tuned from g_1"]
NAMES += ["distilled", "distilled, small"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Options of a small run on an npz, which has left its checkpoint a.pt."""
    path = tmp_path_factory.mktemp("simclr_v2")
    options = ["--data", str(save_npz(path / "a.npz")), *SMALL.split()]
    options += ["--out", str(path), "--device", "cpu"]
    assert simclr_v2.main([*options, "--save", str(path / "a.pt")]) == 0
    return path, options


def equal(a, b):
    return all(v.equal(b[k]) for k, v in a.items())


def test_quick_runs(tmp_path):
    command = [sys.executable, str(ROOT / "simclr_v2.py"), "--quick", "--device", "cpu"]
    command += ["--out", str(tmp_path / "new" / "dir")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert lines[0] == "simclr_v2 | 0.31M parameters | cpu | seed 0 | digits 300/300"
    assert lines[-8].split() == ["test", "accuracy", "3", "labels", "30", "labels"]
    assert [line[:24].strip() for line in lines[-7:-1]] == NAMES
    assert lines[-1].startswith("test acc, 3 labels: distilled, small 0.")
    assert " | chance 0.100 | " in lines[-1]
    assert (tmp_path / "new" / "dir" / "simclr_v2.png").stat().st_size > 10000


def test_copied_alone_it_needs_torch_alone(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "simclr_v2.py").read_text())
    code = "import sys\nfor m in 'numpy matplotlib tqdm sklearn pytest simclr moco'.split(): "
    code += "sys.modules[m] = None\nfrom mine import *\nimport torch\n"
    code += "m = classifier(SimCLR(resnet((1,), 4), memory=5), 3, 1)\n"
    code += "print(m(torch.rand(2, 3, 8, 8)).shape)"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, text=True,
                         capture_output=True)  # fmt: skip
    assert out.stdout.strip() == "torch.Size([2, 3])", out.stderr


def test_checkpoint_has_every_stage(trained):
    state = torch.load(trained[0] / "a.pt", weights_only=True)
    assert (state["script"], state["step"]) == ("simclr_v2", 4)
    names = ["pretrain", *(f"{name} {n}" for n in (7, 36) for name in NAMES)]
    assert list(state["done"]) == list(state["models"]) == names
    assert all(math.isfinite(loss) for _, _, loss in state["history"])


def test_only_labelled_rows_labels_are_seen(trained, tmp_path, monkeypatch, capsys):
    """Other labels for all other images: the same weights everywhere, in stage 3, too."""
    path, options = trained
    y = np.arange(80) % 4
    rows = {p: simclr_v2.labelled(torch.tensor(y[:72]), p, 0) for p in (10.0, 50.0)}
    wrong = (y + 1) % 4
    wrong[rows[50.0]] = y[rows[50.0]]
    save_npz(tmp_path / "b.npz", y_train=wrong)
    monkeypatch.setattr(simclr_v2, "labelled", lambda y, percent, seed: rows[percent])
    argv = [*options, "--data", tmp_path / "b.npz", "--save", tmp_path / "b.pt"]
    assert main(capsys, *argv)[0] == 0
    a, b = (torch.load(p, weights_only=True)["models"] for p in (path / "a.pt", tmp_path / "b.pt"))
    assert all(equal(a[name], b[name]) for name in a)
    wrong[rows[10.0][0]] += 1  # one label of the few
    save_npz(tmp_path / "b.npz", y_train=wrong % 4)
    assert main(capsys, *argv)[0] == 0
    b = torch.load(tmp_path / "b.pt", weights_only=True)["models"]
    assert [equal(a[name], b[name]) for name in a] == [True] + [False] * (len(a) - 1)


@pytest.mark.parametrize("at", ["pretrain", "fine-tuned from g_1 7", "distilled, small 36"])
def test_resumed_run_is_the_unbroken_one(trained, capsys, monkeypatch, at):
    path, options = trained
    train = simclr_v2.train

    def interrupted(name, *rest):
        for step, both in enumerate(train(name, *rest)):
            yield both
            if (name, step) == (at, 0):  # Ctrl-C in its first step
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(simclr_v2, "train", interrupted)
        code, out, _ = main(capsys, *options, "--save", path / "b.pt")
    assert code == 130 and signal.getsignal(signal.SIGINT) is before
    assert out[-1].startswith("test acc, ") and any("Ctrl-C" in line for line in out)
    whole = torch.load(path / "a.pt", weights_only=True)
    broken = torch.load(path / "b.pt", weights_only=True)
    assert list(broken["done"])[-1] == at and broken["done"][at] == 1
    argv = ["--load", path / "b.pt", "--save", path / "b.pt", "--out", path]
    assert main(capsys, *argv)[0] == 0
    parts = torch.load(path / "b.pt", weights_only=True)
    assert parts["done"] == whole["done"]
    assert all(equal(whole["models"][name], parts["models"][name]) for name in whole["models"])


def test_load_evaluates_and_goes_on(trained, capsys):
    path, options = trained
    _, first, _ = main(capsys, *options)
    code, again, _ = main(capsys, "--load", path / "a.pt", "--out", path / "o3")
    assert code == 0 and (path / "o3" / "simclr_v2.png").exists()
    assert not any(line.startswith("step") for line in again)
    assert first[-1].split(" | ")[:-1] == again[-1].split(" | ")[:-1]
    assert main(capsys, "--load", path / "a.pt", "--out", path, "--target", 1.1)[0] == 1
    assert main(capsys, "--load", path / "a.pt", "--out", path, "--target", 0)[0] == 0
    code, more, _ = main(capsys, "--load", path / "a.pt", "--out", path, "--steps", 6)
    steps = [line for line in more if line.startswith("step")]
    assert code == 0 and "pretrain" in steps[0] and steps[0].startswith("step     6/6")
    assert sum("labels alone 7 " in line for line in steps) == 1  # what comes after is done again
    code, more, _ = main(capsys, "--load", path / "a.pt", "--out", path, "--distill-steps", 6)
    assert code == 0 and not any("pretrain" in line or "tuned" in line for line in more[:2])


def test_validation_is_the_last_tenth(trained):
    data = simclr_v2.parse([*trained[1], "--validate"])[1]
    whole = simclr_v2.load_data(str(trained[0] / "a.npz"))
    assert data[0].equal(whole[0][:72]) and data[2].equal(whole[0][72:])
    assert simclr_v2.parse(trained[1])[1][2].equal(whole[2])


def test_bad_input_is_one_line_and_exit_2(tmp_path, trained, capsys):
    good, a = save_npz(tmp_path / "good.npz"), trained[0] / "a.pt"
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:300])
    np.savez(tmp_path / "pickled.npz", x_train=np.array([{}], dtype=object))
    save_npz(tmp_path / "float.npz", dtype=np.float32)
    save_npz(tmp_path / "labels.npz", y_test=np.arange(20))
    save_npz(tmp_path / "classes.npz", classes=3)
    save_npz(tmp_path / "minus.npz", y_train=np.arange(80) % 4 - 1)
    save_npz(tmp_path / "real.npz", y_train=np.arange(80) / 80)
    save_npz(tmp_path / "shape.npz", x_test=np.zeros((20, 9, 9, 3), np.uint8))
    save_npz(tmp_path / "rgba.npz", chans=(4,))
    torch.save({"script": "moco"}, tmp_path / "other.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    (tmp_path / "cut.pt").write_bytes(a.read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for bad in (
        "--steps 0", "--batch-size 1", "--batch-size 73", "--lr 0", "--lr nan", "--lr inf",
        "--temperature 0", "--tau 0", "--tau nan", "--alpha 1.1", "--alpha -0.1",
        "--finetune-from 3", "--finetune-from -1", "--memory -1", "--m 2", "--seed -1",
        "--labels 0", "--labels 1 101", "--labels nan", "--labels", "--encoder vgg",
        "--student vgg", "--device tpu", "--log-every 0", "--distill-steps 0",
        "--data nofile.npz", "--data cut.npz", "--data pickled.npz", "--data float.npz",
        "--data labels.npz", "--data shape.npz", "--data minus.npz", "--data real.npz",
        "--data rgba.npz", "--load nofile.pt", "--load other.pt", "--load tensor.pt",
        "--load cut.pt", "--out file/x", "--save empty", f"--save {tmp_path}/nodir/x.pt",
        f"--load {a} --encoder small", f"--load {a} --student small", f"--load {a} --memory 5",
        f"--load {a} --seed 1", f"--load {a} --finetune-from 0", f"--load {a} --data classes.npz",
    ):  # fmt: skip
        argv = [str(tmp_path / w) if (tmp_path / w.split("/")[0]).exists() else w
                for w in bad.split()]  # fmt: skip
        argv += ["--data", str(good)] * ("--data" not in argv and "--load" not in argv)
        code, out, err = main(capsys, "--batch-size", 8, "--out", tmp_path / "o", *argv)
        assert code == 2 and not out and "error: " in err[-1], (bad, err)
        assert err[0].startswith("usage") and "Traceback" not in "".join(err), bad
    assert not (tmp_path / "nodir").exists()


def test_nan_stops_the_run(trained, tmp_path, capsys):
    argv = [*trained[1], "--out", tmp_path, "--save", tmp_path / "n.pt"]
    argv += ["--memory", 0, "--steps", 30, "--log-every", 1, "--lr", 1e30]
    code, _, err = main(capsys, *argv)
    assert code == 1 and "at step" in err[-1] and len(err) == 1
    weights = torch.load(tmp_path / "n.pt", weights_only=True)["models"]["pretrain"]
    assert all(w.isfinite().all() for w in weights.values())  # the last good checkpoint is kept


@pytest.mark.results
def test_demo_reaches_its_figure(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "simclr_v2.py"),
        "--target",
        "0.64",
        "--out",
        str(tmp_path),
    ]
    assert subprocess.run(command, timeout=3600).returncode == 0
