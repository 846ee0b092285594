"""The promises of the repo itself, checked on every top-level script."""

import ast
import importlib
import os
import pathlib
import subprocess
import sys

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
    found = [line.split()[0] for line in lines if line and line.split()[0] in LABELS]
    assert [label for label in found if line_starts(lines, label)] == LABELS


def line_starts(lines, label):
    return any(line.startswith(label + " ") or line == label for line in lines)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_no_line_is_wider_than_100(file):
    assert max(map(len, file.read_text().splitlines())) <= 100


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_help_answers_in_5_seconds(file):
    before = os.times()
    run = subprocess.run([sys.executable, file, "--help"], capture_output=True, text=True)
    after = os.times()
    assert run.returncode == 0 and "--target" in run.stdout and "--quick" in run.stdout
    # processor time: a busy machine stretches the clock, not this
    assert after.children_user + after.children_system < 5 + (
        before.children_user + before.children_system
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_copied_alone_it_imports(file, tmp_path):
    """A user's folder: this one file, torch, and none of the demo's packages."""
    (tmp_path / file.name).write_text(file.read_text())
    block = "matplotlib tqdm sklearn gymnasium pytest".split()
    code = f"import sys\nfor m in {block}: sys.modules[m] = None\nimport {file.stem}"
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


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_readme_and_tests_know_it(file):
    assert f"[{file.name}]({file.name})" in (ROOT / "README.md").read_text()
    assert (ROOT / "tests" / f"test_{file.name}").exists()


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
@pytest.mark.parametrize(
    "bad",
    [["--device", "abacus"], ["--load", "no-such-file.pt"], ["--steps", "0"], ["--nonsense"]],
    ids=lambda b: b[0][2:],
)
def test_bad_input_is_one_line_and_exit_2(file, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(file.stem).main(bad)
    assert stop.value.code == 2
    assert ": error: " in capsys.readouterr().err.strip().splitlines()[-1]


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
def test_two_processes_train_as_one(name, flags, tmp_path):
    """torchrun on two CPU processes: the same losses as one process on the whole batch."""
    flags = [*flags, "--quick", "--batch-size", "8", "--steps", "3", "--log-every", "1"]
    flags += ["--device", "cpu", "--out", str(tmp_path), "--save"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*two, ROOT / f"{name}.py", *flags, tmp_path / "2.pt"], check=True, capture_output=True
    )
    assert importlib.import_module(name).main([*flags, str(tmp_path / "1.pt")]) == 0
    a, b = (numbers(torch.load(tmp_path / f"{n}.pt")["history"]) for n in (1, 2))
    assert len(a) > 2 and a == pytest.approx(b, rel=1e-3)
