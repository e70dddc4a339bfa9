"""Write README.md from nbs/index.ipynb, without Quarto or a network connection."""

import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
IMAGES = "figures/readme"  # folder for images in the notebook's outputs
NOTE = "<!-- Written from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->\n\n"

DIRECTIVE = re.compile(r"^\s*#\|\s*(.*?)\s*$")
HIDDEN = {"hide", "include: false", "default_exp"}
LINK = re.compile(r"""(\]\(|\b(?:src|href)=["'])(?![a-z][a-z+.-]*:|[/#])([^)"'\s]+)""")


def split_directives(source: str) -> tuple[list[str], str]:
    "The nbdev directives at the top of a cell, and the rest of its source."
    lines, directives = source.splitlines(), []
    while lines and (match := DIRECTIVE.match(lines[0])):
        directives.append(match[1])
        del lines[0]
    return directives, "\n".join(lines).strip("\n")


def hidden(directives: list[str]) -> bool:
    "Whether a cell with these directives is left out of README and site."
    return any(d in HIDDEN or d.split()[0] in HIDDEN for d in directives if d)


def rebase(match: re.Match) -> str:
    "Turn a link relative to nbs/ into one relative to the repository's root."
    path = Path("nbs", match[2])
    parts = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return match[1] + "/".join(parts)


def prepare(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    "Drop hidden cells, directives and progress output; rebase links."
    kept = []
    for cell in nb.cells:
        directives, cell.source = split_directives(cell.source)
        if hidden(directives) or cell.cell_type == "raw":
            continue
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(rebase, cell.source)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            if "output: false" in directives:
                cell.outputs = []
            if "echo: false" in directives:
                cell.source = ""
        kept.append(cell)
    nb.cells = kept
    nb.metadata["language_info"] = {"name": "python"}  # language of the code blocks; nbdev-clean drops it
    return nb


def main() -> int:
    "Write the README and print its path."
    if not NOTEBOOK.exists():
        print(f"{NOTEBOOK.relative_to(ROOT)} is missing: README.md is written from it", file=sys.stderr)
        return 1
    config = Config()
    config.NbConvertBase.display_data_priority = [
        "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain",
    ]  # fmt: skip
    exporter = MarkdownExporter(config=config)
    nb = prepare(nbformat.read(NOTEBOOK, as_version=4))
    body, resources = exporter.from_notebook_node(nb, resources={"output_files_dir": IMAGES})
    body = re.sub(r"<style.*?</style>\n?", "", body, flags=re.DOTALL)  # GitHub would show it as text
    body = re.sub(r"```python\n\s*```\n", "", body)  # empty blocks left by `echo: false`
    body = re.sub(r"[ \t]+$", "", body, flags=re.MULTILINE)
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    for name, data in resources.get("outputs", {}).items():
        target = ROOT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    README.write_text(NOTE + body, encoding="utf-8")
    print(f"{README.relative_to(ROOT)} written from {NOTEBOOK.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
