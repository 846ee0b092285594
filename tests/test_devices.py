"""Every model under bfloat16 autocast, under torch.compile and, where there is one, on a GPU."""

import importlib
import os
import pathlib

import pytest
import torch
import torch.nn as nn

ROOT = pathlib.Path(__file__).parent.parent
# hosted runners show an MPS that has no memory
MPS = torch.backends.mps.is_available() and not os.environ.get("CI")
GPU = "cuda" if torch.cuda.is_available() else "mps" if MPS else None


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def ids(*shape):
    return torch.randint(1, 9, shape, generator=torch.Generator().manual_seed(0))


# name: module -> model, inputs, and the loss where it isn't just the sum of what comes out
MODELS = {
    "mamba": lambda m: (m.Mamba(16, 16, 1, d_state=4, compile=False), (ids(2, 20),)),
    "s4": lambda m: (m.S4Model(1, 3, 8, 1, l_max=20, d_state=4), (images(2, 20, 1),)),
    "transformer": lambda m: (
        m.Transformer(16, d_model=16, num_layers=1, num_heads=2, d_ff=32),
        (ids(2, 5), ids(2, 6)),
        lambda model, x, y: m.label_smoothing_loss(model(x, y[:, :-1]), y[:, 1:], 0.1, 0),
    ),
    "gpt": lambda m: (m.GPT(16, 8, 16, 1, 2), (ids(2, 6),)),
    "bert": lambda m: (m.Bert(m.Encoder(16, 16, 1, 2, 12)), (ids(2, 6), 0 * ids(2, 6))),
    "vit": lambda m: (
        m.ViT(16, 8, num_classes=3, dim=16, depth=1, heads=2),
        (images(2, 3, 16, 16),),
    ),
    "vae": lambda m: (
        m.VAE((8, 8), 4, (16,)),
        (images(2, 8, 8).round(),),
        lambda model, x: -model.elbo(x).mean(),
    ),
    "cvae": lambda m: (
        m.CVAE(16, 48, 4, 16),
        (images(2, 16).round(), images(2, 48).round()),
        lambda model, x, y: -m.hybrid_objective(model, x, y, 0.5).mean(),
    ),
    "gan": lambda m: (  # its D; G is below
        m.Discriminator((1, 8, 8), 8),
        (images(2, 1, 8, 8),),
        lambda model, x: -m.value(model(x), model(x.flip(0))),
    ),
    "gan G": lambda m: (m.Generator((1, 8, 8), 8, dim=8), (images(2, 8),)),
    "diffusion": lambda m: (
        m.UNet(1, 8, (1, 2), 1, num_classes=3),
        (images(2, 1, 8, 8), torch.tensor([1, 7]), torch.tensor([0, -1])),
    ),
    "video_diffusion": lambda m: (
        m.UNet3D(1, 8, (1, 2), heads=2, num_classes=3),
        (images(2, 4, 1, 8, 8), torch.tensor([0.5, -1.0]), torch.tensor([0, -1]), 1),
    ),
    "dqn": lambda m: (
        m.QNetwork(6),
        ((images(2, 4, 84, 84) * 255).byte(),),
    ),
    "simclr": lambda m: (
        m.SimCLR(m.ENCODERS["small"](), 16),
        (images(4, 3, 32, 32), images(4, 3, 32, 32).flip(3)),
        lambda model, a, b: m.nt_xent(model(a)[1], model(b)[1]),
    ),
    "simclr_v2": lambda m: (
        m.SimCLR(m.resnet((1,), 8), 8),
        (images(4, 3, 16, 16),),
        lambda model, x: m.nt_xent(*model(torch.cat([x, x.flip(3)])).chunk(2)),
    ),
    "moco": lambda m: (
        m.MoCo(m.ENCODERS["small"](dim=8), 8, 16),
        (images(4, 3, 32, 32), images(4, 3, 32, 32).flip(3), torch.tensor([2, 0, 3, 1])),
        lambda model, q, k, shuffle: model(q, k, shuffle)[0],
    ),
    "dino": lambda m: (
        m.Network(m.ViT(16, 8, dim=16, depth=1, heads=2), m.DINOHead(16, 8, 16, 8)),
        (images(4, 3, 16, 16), images(4, 3, 8, 8), images(4, 8)),
        lambda model, x, local, t: m.DINOLoss(8).to(x)(
            model([x, x.flip(3), local]), t.repeat(2, 1), 1.0
        ),
    ),
    "mae": lambda m: (
        m.MAE(16, 4, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2),
        (images(2, 3, 16, 16), 0.5, images(2, 16)),
        lambda model, x, ratio, noise: model(x, ratio, noise)[0],
    ),
    "infini_attention": lambda m: (m.InfiniTransformer(16, 16, 1, 2, 8), (ids(2, 20),)),
}


def total(out):
    if isinstance(out, torch.Tensor):
        return out.float().square().mean()
    return sum(total(o) for o in out if isinstance(o, torch.Tensor | tuple | list))


def build(name, device="cpu"):
    """-> model, loss(): a function without arguments, the same random numbers at every call."""
    torch.manual_seed(0)
    model, inputs, *loss = MODELS[name](importlib.import_module(name.split()[0]))
    for p in model.parameters():  # layers that start at zero would hide all before them
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.1)
    model.eval().to(device)
    inputs = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]

    def run():
        torch.manual_seed(0)
        return loss[0](model, *inputs) if loss else total(model(*inputs))

    return model, run


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert max(g.abs().max() for g in grads) > 1e-4  # else there is nothing to compare
    return grads


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_autocast_stays_near_float32(name):
    model, run = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        loss = run()
    torch.testing.assert_close(loss.float(), run(), rtol=0.1, atol=1e-3)
    grads = gradients(model, loss)
    assert grads and all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", MODELS)
def test_torch_compile_gives_the_same_loss_and_gradients(name):
    """aot_eager: the tracing and the joint graph of torch.compile, without a C++ compiler."""
    model, run = build(name)
    loss = run()
    want = gradients(model, loss)
    torch._dynamo.reset()
    got = torch.compile(run, backend="aot_eager")()
    torch.testing.assert_close(got, loss, rtol=1e-4, atol=1e-6)
    for p, q in zip(gradients(model, got), want):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_gpu_gives_the_loss_and_gradients_of_the_cpu(name, monkeypatch):
    draw = torch.randn  # the same noise for both
    on_cpu = lambda *shape, device="cpu", **how: draw(*shape, **how).to(device)  # noqa: E731
    monkeypatch.setattr(torch, "randn", on_cpu)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    (cpu, loss), (gpu, same) = build(name), build(name, GPU)
    (a, b), close = (loss(), same()), {"rtol": 1e-3, "atol": 1e-5}
    assert b.device.type == GPU
    torch.testing.assert_close(b.cpu(), a, **close)
    for p, q in zip(gradients(gpu, b), gradients(cpu, a), strict=True):
        torch.testing.assert_close(p.cpu(), q, **close)


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=lambda f: f.stem)
def test_every_script_runs_and_resumes_on_a_gpu(file, tmp_path):
    main = importlib.import_module(file.stem).main
    flags = ["--quick", "--device", GPU, "--out", str(tmp_path)]
    first = main([*flags, "--save", str(tmp_path / "a.pt")])
    if isinstance(
        first, float
    ):  # a file of the second edition: the metric, and --quick's own steps
        assert main([*flags, "--load", str(tmp_path / "a.pt")]) == pytest.approx(first, abs=0.05)
        return
    assert first == 0
    more = torch.load(tmp_path / "a.pt", weights_only=True)["args"]["steps"] + 8
    assert main([*flags, "--load", str(tmp_path / "a.pt"), "--steps", str(more)]) == 0
