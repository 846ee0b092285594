"""The promises of the repo itself, checked on every top-level script."""

import ast
import importlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(ROOT.glob("*.py"))
NAMES = {f.stem for f in FILES}
# Files of the second edition have two parts; the others go by their old tests.
SECOND = [f for f in FILES if "\n# ================================= PART TWO" in f.read_text()]
FIRST = [f for f in FILES if f not in SECOND]
LABELS = ["Paper", "Idea", "Figure", "Symbols", "Differs", "Run", "Expect"]


def modules(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_there_are_files():
    assert "mamba" in NAMES


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_imports_no_sibling_and_only_torch_at_import_time(file):
    tree = ast.parse(file.read_text())
    assert not set(modules(ast.walk(tree))) & NAMES
    assert set(modules(tree.body)) <= set(sys.stdlib_module_names) | {"torch", "numpy"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_docstring_has_the_labels_in_order(file):
    lines = ast.get_docstring(ast.parse(file.read_text())).splitlines()
    found = [line.split()[0] for line in lines if line and line[0] != " "]
    assert [word for word in found if word in LABELS] == LABELS


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_no_line_is_wider_than_100(file):
    assert max(map(len, file.read_text().splitlines())) <= 100


def test_help_answers_in_5_seconds():
    """All of them one after the other in one new process, so that each alone does, too."""
    code = "import runpy, sys\nfor sys.argv in [[f, '--help'] for f in sys.argv[1:]]:\n"
    code += "    try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "    except SystemExit as end: print('status', end.code)\n"
    before = os.times()
    run = subprocess.run([sys.executable, "-c", code, *FILES], capture_output=True, text=True)
    after = os.times()
    assert run.returncode == 0, run.stderr
    *helps, _ = run.stdout.split("status 0\n")
    assert len(helps) == len(FILES)
    for file, text in zip(FILES, helps):
        assert text.startswith(f"usage: {file.name} ") and "--quick" in text
    # processor time: a busy machine stretches the clock, not this
    assert after.children_user + after.children_system < 5 + (
        before.children_user + before.children_system
    )


def test_copied_alone_each_imports(tmp_path):
    """A user's folder: one file, torch, and neither a sibling nor any of the demo's packages."""
    code = f"import runpy, sys\nfor m in {sorted(NAMES)}: sys.modules[m] = None\n"
    code += "for m in 'matplotlib tqdm sklearn gymnasium pytest'.split(): sys.modules[m] = None\n"
    for file in FILES:
        (tmp_path / file.stem).mkdir()
        copy = tmp_path / file.stem / file.name
        copy.write_text(file.read_text())
        code += f"runpy.run_path({str(copy)!r}, run_name='alone')\n"
    env = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)


def test_the_judge_of_generated_images_is_one_text():
    """Its scores are compared between files, so it must not drift apart in them."""
    texts = set()
    for name in ("vae", "gan", "diffusion"):
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        judge = [
            n for n in tree.body if getattr(n, "name", "") in ("make_judge", "gaussian_images")
        ]
        assert len(judge) == 2
        texts.add("".join(map(ast.unparse, judge)))
    assert len(texts) == 1


@pytest.mark.parametrize(
    "name, files",
    [
        ("canvas_digits", "moco simclr simclr_v2 dino mae"),
        ("load_data", "moco simclr simclr_v2 dino mae"),
        ("evaluate", "moco simclr dino"),
        ("grey_centred", "moco simclr dino mae"),
    ],
)
def test_what_self_supervised_files_share_is_one_text(name, files):
    """They compare their figures, so digits, split, baseline and probe must be the same."""
    trees = [ast.parse((ROOT / f"{file}.py").read_text()) for file in files.split()]
    found = [node for tree in trees for node in tree.body if getattr(node, "name", "") == name]
    for node in found:
        node.body = node.body[1:]  # all but the docstring
    assert len(found) == len(trees) and len(set(map(ast.unparse, found))) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_readme_and_tests_know_it(file):
    assert f"[{file.name}]({file.name})" in (ROOT / "README.md").read_text()
    assert (ROOT / "tests" / f"test_{file.name}").exists()


def write_bad_files():
    """What --data, --load, --save and --out must refuse, into the current folder."""
    x, y = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 10
    names = ("x_train", "y_train", "x_test", "y_test")
    good = dict(zip(names, (x, y, x[:20], y[:20])))
    np.savez("good.npz", **good)
    np.savez("pickled.npz", **good | {"x_train": np.array([x, None], dtype=object)})
    np.savez("float.npz", **good | {"x_train": x.astype("f4")})
    np.savez("shape.npz", **good | {"x_train": x[:, 0]})
    np.savez("labels.npz", **good | {"y_train": y[:7]})
    np.savez("part.npz", x_train=x, y_train=y)
    whole = pathlib.Path("good.npz").read_bytes()
    pathlib.Path("truncated.npz").write_bytes(whole[: len(whole) // 2])
    pathlib.Path("file").write_text("no folder")
    for name in NAMES:
        pathlib.Path("taken", f"{name}.png").mkdir(parents=True)  # where the picture should go
    torch.save({"script": "another", "args": {}, "step": 1}, "another.pt")
    torch.save([1, 2], "list.pt")
    pathlib.Path("broken.pt").write_bytes(b"PK no checkpoint")


ALL = ["--device abacus", "--load no-such-file.pt", "--load another.pt", "--load list.pt"]
ALL += ["--load broken.pt", "--load .", "--steps 0", "--steps 1.5", "--batch-size 0", "--lr nan"]
ALL += ["--lr -1", "--log-every 0", "--out file", "--out taken", "--save .", "--save none/x.pt"]
ALL += ["--nonsense"]
IMAGES = ["missing", "truncated", "pickled", "float", "shape", "labels", "part"]
IMAGES = [f"--data {name}.npz" for name in IMAGES] + ["--data good.npz --batch-size 999"]
TAKES_IMAGES = "vae cvae gan diffusion vit simclr moco dino mae simclr_v2".split()
TAKES_IMAGES += ["video_diffusion"]


@pytest.mark.parametrize("file", FIRST, ids=lambda f: f.stem)
def test_bad_input_is_one_line_and_exit_2(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_bad_files()
    before, wrong = sorted(os.listdir()), []
    for bad in ALL + IMAGES * (file.stem in TAKES_IMAGES):
        if file.stem == "cvae" and "labels" in bad:
            continue  # its images need no labels
        try:
            flags = ["--quick", "--device", "cpu", *bad.split()]
            status = importlib.import_module(file.stem).main(flags)
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            status = repr(error)[:200]
        last = (capsys.readouterr().err.strip().splitlines() or [""])[-1]
        if status != 2 or ": error: " not in last or len(last) > 400:
            wrong.append((bad, status, last))
    assert not wrong
    assert sorted(set(os.listdir()) - {"out"}) == before  # nothing half-written


def flags_of(file):
    old = [] if file in SECOND else ["--log-every", "1"]
    return ["--quick", "--device", "cpu", *old]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_kill_in_the_middle_of_saving_leaves_the_checkpoint_before(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, calls = torch.save, []

    def save(state, path):
        calls.append(path)
        if len(calls) < 2:
            return whole(state, path)
        with open(path, "wb") as half:  # as kill -9 would: a part of the file, and no more code
            half.write(b"PK")
        raise MemoryError("killed")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(MemoryError):
        importlib.import_module(file.stem).main([*flags_of(file), "--save", "a.pt"])
    assert torch.load("a.pt", weights_only=True)["script"] == file.stem


def numbers(x):
    """All floats in nested lists, tuples and dicts, in order."""
    if isinstance(x, dict):
        x = x.values()
    if isinstance(x, list | tuple | type({}.values())):
        return [n for part in x for n in numbers(part)]
    return [x] if isinstance(x, float) else []


@pytest.mark.parametrize(
    "name, flags",
    [("vit", [])],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_two_processes_train_as_one(name, flags, torchrun, tmp_path):
    """torchrun on two CPU processes: the same losses as one process on the whole batch."""
    flags = [*flags, "--quick", "--batch-size", "8", "--steps", "3", "--log-every", "1"]
    flags += ["--device", "cpu", "--out", str(tmp_path), "--save"]
    torchrun(ROOT / f"{name}.py", *flags, tmp_path / "2.pt", command=name == "vit")
    assert importlib.import_module(name).main([*flags, str(tmp_path / "1.pt")]) == 0
    a, b = (numbers(torch.load(tmp_path / f"{n}.pt")["history"]) for n in (1, 2))
    assert len(a) > 2 and a == pytest.approx(b, rel=1e-3)


# ---- the second edition ----

second = pytest.mark.parametrize("file", SECOND, ids=lambda f: f.stem)
SHARES = ["mamba", "transformer", "gpt"]  # the batch, under torchrun


def script(file):
    return importlib.import_module(file.stem)


@second
def test_it_keeps_the_budgets(file):
    """What a file may cost its reader: see the README, "Add a paper"."""
    from weight import measure

    m = measure(file)
    most = 4500 if file.stem in ("transformer", "vit", "mamba", "diffusion", "dino") else 3800
    assert m["code"] <= most and m["part two"] <= 2500 and m["command line"] <= 620
    assert m["mean"] <= 12.5 and m["wide"] <= 0.07 and m["widest"] <= 40 and m["tricks"] <= 0.06
    assert m["longest"] <= 45 and m["flags"] <= 13 and m["docstring"] <= 40
    assert m["prose 1"] >= 0.5 and m["prose 2"] >= 0.15


BAD = ["--device abacus", "--load none.pt", "--load another.pt", "--load list.pt"]
BAD += ["--load broken.pt", "--load .", "--steps 0", "--steps 1.5", "--batch-size 0", "--lr nan"]
BAD += ["--lr -1", "--out file", "--save none/x.pt", "--save .", "--nonsense"]
BAD_FOR = {"mamba": ["--task lm", "--data file", "--task lm --data none", "--task lm --data file"]}
BAD_FOR["transformer"] = ["--data file", "--data none"]
BAD_FOR["infini_attention"] = ["--data file", "--data none", "--update none"]
BAD_FOR["gpt"] = ["--data file", "--data none", "--context 0", "--context 400001"]


@second
def test_bad_input_is_one_line_on_stderr_and_exit_2(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_text("short")
    pathlib.Path("broken.pt").write_bytes(b"PK no checkpoint")
    torch.save({"script": "another", "args": {}, "step": 1}, "another.pt")
    torch.save([1, 2], "list.pt")
    wrong = []
    for bad in BAD + BAD_FOR.get(file.stem, []):
        quick = [] if "--steps" in bad or "--batch" in bad else ["--quick"]
        try:
            status = script(file).main([*quick, "--device", "cpu", *bad.split()])
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            status = repr(error)
        last = (capsys.readouterr().err.strip().splitlines() or [""])[-1]
        if status != 2 or ": error: " not in last:
            wrong.append((bad, status, last))
    assert not wrong


@second
@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_a_missing_package_is_said_at_the_start(file, package, tmp_path, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        script(file).main(["--quick", "--out", str(tmp_path)])
    assert stop.value.code == 2 and package in capsys.readouterr().err.splitlines()[-1]


@second
def test_the_result_is_printed_before_the_picture_and_returned(file, tmp_path, monkeypatch, capsys):
    seen, draw = [], script(file).draw_picture

    def spy(*args):
        seen.append(capsys.readouterr().out.splitlines())
        draw(*args)

    monkeypatch.setattr(script(file), "draw_picture", spy)
    metric = script(file).main([*flags_of(file), "--out", str(tmp_path)])
    assert seen[0][0].startswith(f"{file.stem} | ") and "parameters" in seen[0][0]
    assert isinstance(metric, float) and f"{metric:.4f}" in seen[0][-1]
    assert (tmp_path / f"{file.stem}.png").stat().st_size > 5000
    again = script(file).main([*flags_of(file), "--out", str(tmp_path)])
    assert again == metric  # the same seed


@second
def test_ctrl_c_keeps_what_was_trained_and_the_rest_resumes_exactly(
    file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    step, calls = torch.optim.Optimizer.zero_grad, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    whole = script(file).main([*flags_of(file), "--save", "whole.pt"])
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", interrupted)
    capsys.readouterr()
    script(file).main([*flags_of(file), "--save", "half.pt"])
    assert len(calls) == 2 and capsys.readouterr().out.splitlines()[-1].startswith("test")
    assert torch.load("half.pt", weights_only=True)["step"] == 2  # the step was finished
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", step)
    for more in ("--seed 1", "--lr .3"):  # it would be another run
        with pytest.raises(SystemExit) as stop:
            script(file).main([*flags_of(file), "--load", "half.pt", *more.split()])
        assert stop.value.code == 2
    more = ["--load", "half.pt", "--save", "rest.pt"]
    assert script(file).main([*flags_of(file), *more]) == whole
    a, b = (torch.load(f"{name}.pt", weights_only=True) for name in ("whole", "rest"))
    assert a["step"] == b["step"] and not list(tmp_path.glob("*.tmp"))
    for name, weights in a["model"].items():
        assert torch.equal(weights, b["model"][name]), name


@second
def test_a_loss_that_is_not_finite_stops_with_its_step_and_saves_nothing(
    file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def poisoned(parameters, most):
        calls.append(1)
        return clip(parameters, most) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(SystemExit, match="at step 3"):
        script(file).main([*flags_of(file), "--save", "a.pt"])
    assert torch.load("a.pt", weights_only=True)["step"] == 0


@second
def test_main_runs_in_a_thread(file, tmp_path):
    results = []
    args = ([*flags_of(file), "--out", str(tmp_path)],)
    thread = threading.Thread(target=lambda: results.append(script(file).main(*args)))
    thread.start()
    thread.join()
    assert len(results) == 1


@second
def test_python_without_docstrings_runs_it(file, tmp_path):
    command = [sys.executable, "-OO", file, *flags_of(file), "--out", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0


@pytest.mark.parametrize("name", SHARES)
def test_two_processes_train_to_the_weights_of_one(name, torchrun, tmp_path):
    flags = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--save"]
    torchrun(ROOT / f"{name}.py", *flags, tmp_path / "2.pt")
    importlib.import_module(name).main([*flags, str(tmp_path / "1.pt")])
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True)["model"] for n in (1, 2))
    for key, weights in one.items():
        if "W_k.bias" in key:  # changes no softmax: its gradient is rounding, which Adam enlarges
            continue
        torch.testing.assert_close(two[key], weights, rtol=1e-3, atol=1e-5)


# ---- what files of the second edition share ----


def functions(path):
    """Function name -> its text without docstring and the script's own name."""
    nodes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    for node in nodes:
        node.body = node.body[1:]
    return {n.name: ast.unparse(n).replace(f"'{path.stem}'", "'NAME'") for n in nodes}


@second
def test_shared_text_is_the_same_in_all_files(file):
    frame, own = functions(ROOT / "tests" / "frame.py"), functions(file)
    assert own.keys() & frame.keys() and all(own[n] == frame[n] for n in own.keys() & frame.keys())


def write_npz(path, **changes):
    """60 images of 8 x 8, sorted by class: labels 3, 5, 9."""
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8)).astype("u1")
    y = np.repeat([3, 5, 9], 20)
    parts = {"x_train": x, "y_train": y, "x_test": x[::6], "y_test": y[::6]} | changes
    np.savez(path, **{name: part for name, part in parts.items() if part is not None})
    return x, y


@pytest.mark.parametrize("tail", [(), (1,), (3,)])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "u8"])
def test_load_npz_takes_images_and_labels_as_people_have_them(tail, dtype, tmp_path):
    from frame import load_npz

    x, y = write_npz(tmp_path / "a.npz")
    x = np.broadcast_to(x.reshape(60, 8, 8, *[1] * len(tail)), (60, 8, 8, *tail)).copy()
    column = y.astype(dtype)[:, None]
    write_npz(tmp_path / "a.npz", x_train=x, y_train=column, x_test=x[::6], y_test=y[::6])
    images, labels, test, test_labels = load_npz(tmp_path / "a.npz")
    assert images.shape == (60, tail[0] if tail else 1, 8, 8) and images.dtype == torch.uint8
    assert set(labels[:20].tolist()) == {0, 1, 2}  # shuffled: a part has all classes
    for image, label in zip(images, labels):  # and each image has kept its label
        i = next(i for i in range(60) if (x[i].reshape(8, 8, -1)[..., 0] == image[0].numpy()).all())
        assert [3, 5, 9][label] == y[i]
    assert test_labels.tolist() == np.repeat([0, 1, 2], [4, 3, 3]).tolist() and len(test) == 10


BAD_NPZ = {
    "floats": {"x_train": np.zeros((60, 8, 8))},
    "channels first": {"x_train": np.zeros((60, 3, 8, 8), "u1")},
    "vectors": {"x_train": np.zeros((60, 64), "u1")},
    "one image": {"x_train": np.zeros((8, 8), "u1")},
    "one-hot": {"y_train": np.eye(60, 10, dtype=int)},
    "float labels": {"y_train": np.zeros(60)},
    "too few labels": {"y_train": np.zeros(59, int)},
    "one class": {"y_train": np.zeros(60, int), "y_test": np.zeros(10, int)},
    "a class of the test alone": {"y_test": np.arange(10)},
    "no test": {"x_test": None},
    "pickled": {"y_train": np.array([1, None] * 30, dtype=object)},
}


@pytest.mark.parametrize("bad", BAD_NPZ)
def test_load_npz_refuses_the_rest_in_a_line(bad, tmp_path):
    from frame import load_npz

    write_npz(tmp_path / "a.npz", **BAD_NPZ[bad])
    with pytest.raises(ValueError) as error:
        load_npz(tmp_path / "a.npz")
    assert bad == "pickled" or "a.npz" in str(error.value)


def test_load_npz_needs_no_labels_where_none_are_used(tmp_path):
    from frame import load_npz

    write_npz(tmp_path / "a.npz", y_train=None, y_test=None)
    x, y, x_test, y_test = load_npz(tmp_path / "a.npz", labels=False)
    assert len(x) == len(y) == 60 and not y.any() and len(x_test) == len(y_test) == 10
