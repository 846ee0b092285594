"""How heavy is a file to read? The numbers behind the budgets that test_repo.py holds.

python tests/weight.py mamba.py
"""

import ast
import io
import re
import sys
import tokenize

KINDS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
TRICKS = (ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp, ast.Lambda, ast.IfExp)
TRICKS += (ast.Starred, ast.NamedExpr)


def tokens(source):
    """The line of every token of code; an f-string, which comes in pieces since 3.12, is one."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = tokenize.tok_name[token.type]
        depth += (name == "FSTRING_START") - (name == "FSTRING_END")
        if name == "FSTRING_START" and depth == 1 or not depth and token.type in KINDS:
            yield token.start[0]


def measure(path) -> dict:
    source = open(path, encoding="utf-8").read()
    lines, tree = source.splitlines(), ast.parse(source)
    full = {i for i, line in enumerate(lines, 1) if line.strip()}
    docs, header = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            rows = full & set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            docs |= rows
            header = rows if isinstance(node, ast.Module) else header
    comments = {i for i in full if lines[i - 1].strip().startswith("#")}
    code = full - comments - docs
    cost = dict.fromkeys(code, 0)
    for i in tokens(source):
        if i in code:
            cost[i] += 1
    ends = {i for i in code if re.search(r"\S  # ", lines[i - 1])}
    two = next((i for i, line in enumerate(lines, 1) if "=== PART TWO" in line), len(lines))

    def prose(rows):
        return (len((comments | docs) & rows) + len(ends & rows) / 2) / max(1, len(rows))

    sizes, cli = [0], 0
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            rows = range(node.lineno, node.end_lineno + 1)
            sizes.append(sum(i in code for i in rows))
            if node.name in ("parse", "main"):
                cli += sum(cost.get(i, 0) for i in rows)
    return {
        "code": sum(cost.values()),
        "part two": sum(n for i, n in cost.items() if i > two),
        "mean": sum(cost.values()) / len(code),
        "wide": sum(n > 25 for n in cost.values()) / len(code),
        "widest": max(cost.values()),
        "prose 1": prose({i for i in full - header if i < two}),
        "prose 2": prose({i for i in full if i > two}),
        "tricks": sum(isinstance(n, TRICKS) for n in ast.walk(tree)) / len(code),
        "flags": len(re.findall(r'(?:add_argument|flag)\(\s*"--', source)),
        "command line": cli,
        "longest": max(sizes),
        "docstring": len(header),
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, {key: round(value, 3) for key, value in measure(name).items()})
