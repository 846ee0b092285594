"""The promises of the repo itself, checked on every top-level script."""

import ast
import importlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(ROOT.glob("*.py"))
NAMES = {f.stem for f in FILES}
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
        assert text.startswith(f"usage: {file.name} ") and "--target" in text and "--quick" in text
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
TAKES_IMAGES = "vae cvae gan diffusion vit s4 simclr moco dino mae simclr_v2".split()
TAKES_IMAGES += ["video_diffusion"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
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
        flags = "--quick --device cpu --log-every 1 --save a.pt".split()
        importlib.import_module(file.stem).main(flags)
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
    [("mamba", []), ("s4", []), ("vit", []), ("transformer", ["--dropout", "0"])],
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
