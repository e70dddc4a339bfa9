"""Counts that describe the library and its notebooks, as a Markdown table.

    python tools/notebook_stats.py            # print the table
    python tools/notebook_stats.py --write    # put it into CONTRIBUTING.md, between its two comment lines

Lines are non-empty lines; nbdev's directives (`#| …`) do not count. A cell asserts if it is not exported and contains
`assert` or calls a `test_…` function. A definition is a function or class at the top level of an exported cell; it is
public unless its name starts with an underscore, or `@patch` makes it a method. A public definition has its own test
if the next code cell asserts and contains its name. Only the standard library is needed.
"""

import argparse
import ast
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- notebook statistics: start -->", "<!-- notebook statistics: end -->"
BEFORE = {  # of the last version whose modules were all in one folder
    "modules": "33",
    "lines of the library": "10,320",
    "lines of a code cell: median, 90 %, maximum": "10, 26, 37",
    "lines of an exported cell: median": "19",
    "lines of a function: median": "8",
    "asserting cells per exported cell": "0.81",
    "exported cells with two or more definitions": "42 %",
    "exported cells with two or more public definitions": "19 %",
    "public definitions without a test cell after them": "156 of 399",
    "words of prose per exported cell": "36",
}


def code_of(source: str) -> str:
    "Source of a cell without nbdev directives and notebook magics, so that Python can parse it."
    return "\n".join("" if line.startswith(("#|", "%", "!")) else line for line in source.splitlines())


def lines_of(source: str) -> int:
    "Number of non-empty lines of a cell."
    return sum(bool(line.strip()) for line in source.splitlines() if not line.startswith("#|"))


def asserts(source: str) -> bool:
    "Whether a cell that is not exported tests something."
    only_import = "import test_" in source and lines_of(source) == 1
    return ("assert" in source or "test_" in source) and not only_import


def definitions(source: str) -> tuple[list[str], list[str]]:
    "Names of all, and of the public, functions and classes that an exported cell defines."
    found = [n for n in ast.parse(code_of(source)).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    public = [n for n in found if not n.name.startswith("_")
              and not any("patch" in ast.unparse(d) for d in n.decorator_list)]
    return [n.name for n in found], [n.name for n in public]


def function_lengths(source: str) -> list[int]:
    "Lines of each function and method of an exported cell."
    tree = ast.parse(code_of(source))
    return [n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def read_cells(path: Path) -> list[tuple[str, str]]:
    "(kind, source) of the cells of a notebook; kind is 'markdown', 'export' or 'code'."
    cells = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(("markdown", source))
        elif cell["cell_type"] == "code" and lines_of(source):
            cells.append(("export" if source.startswith("#| export") else "code", source))
    return cells


def untested(code: list[tuple[str, str]]) -> int:
    "Number of public definitions that have no test of their own in the next code cell."
    missing = 0
    for (kind, source), (next_kind, test) in zip(code, [*code[1:], ("export", "")]):
        if kind == "export":
            tests = test if next_kind == "code" and asserts(test) else ""
            missing += sum(not re.search(rf"\b{name}\b", tests) for name in definitions(source)[1])
    return missing


def count_notebook(cells: list[tuple[str, str]]) -> dict:
    "Counts of one notebook."
    code = [c for c in cells if c[0] != "markdown"]
    exported = [s for kind, s in code if kind == "export"]
    return dict(
        code=[lines_of(s) for _, s in code],
        exported=[lines_of(s) for s in exported],
        functions=[n for s in exported for n in function_lengths(s)],
        definitions=[tuple(map(len, definitions(s))) for s in exported],
        asserting=sum(kind == "code" and asserts(s) for kind, s in code),
        untested=untested(code),
        words=sum(len(s.split()) for kind, s in cells if kind == "markdown"),
    )


def statistics_of(root: Path = ROOT) -> dict[str, str]:
    "The rows of the table: name -> value."
    modules = [p for p in (root / "histodiffusion").rglob("*.py") if p.name != "_modidx.py"]
    lines = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in modules if p.name != "__init__.py")
    books = [count_notebook(read_cells(p)) for p in sorted((root / "nbs" / "library").rglob("*.ipynb"))]
    every = {k: [x for b in books for x in b[k]] for k in ("code", "exported", "functions", "definitions")}
    total = {k: sum(b[k] for b in books) for k in ("asserting", "untested", "words")}
    n, code = len(every["exported"]), sorted(every["code"])
    several, several_public = (f"{100 * sum(d[i] > 1 for d in every['definitions']) / n:.0f} %" for i in (0, 1))
    return {
        "modules": f"{len(modules)}",
        "lines of the library": f"{lines:,}",
        "lines of a code cell: median, 90 %, maximum":
            f"{statistics.median(code):g}, {code[int(0.9 * len(code))]}, {code[-1]}",
        "lines of an exported cell: median": f"{statistics.median(every['exported']):g}",
        "lines of a function: median": f"{statistics.median(every['functions']):g}",
        "asserting cells per exported cell": f"{total['asserting'] / n:.2f}",
        "exported cells with two or more definitions": several,
        "exported cells with two or more public definitions": several_public,
        "public definitions without a test cell after them":
            f"{total['untested']} of {sum(d[1] for d in every['definitions'])}",
        "words of prose per exported cell": f"{total['words'] / n:.0f}",
    }


def table(root: Path = ROOT) -> str:
    "The table in Markdown."
    rows = [f"| {name} | {BEFORE[name]} | {value} |" for name, value in statistics_of(root).items()]
    return "\n".join(["| | before | after |", "|---|---|---|", *rows])


def write(root: Path = ROOT):
    "Replace the table in CONTRIBUTING.md."
    path = root / "CONTRIBUTING.md"
    text = path.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise SystemExit(f"{path.name} lacks the lines '{START}' and '{END}': put them where the table belongs.")
    head, tail = text.split(START)[0], text.split(END)[1]
    path.write_text(f"{head}{START}\n{table(root)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into CONTRIBUTING.md")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the repository")
    given = parser.parse_args()
    write(given.root) if given.write else print(table(given.root))
