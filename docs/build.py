"""Build the site from the notebooks: stage pages in `_proc`, then let Sphinx write `_site`. Nothing is run and nothing is fetched."""

import ast
import importlib
import inspect
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import nbformat
from nbdev.showdoc import show_doc
from nbformat.v4 import new_markdown_cell
from readme import HIDDEN, ROOT, split_directives
from sphinx.cmd.build import build_main

from histodiffusion.core import read_json
from histodiffusion.data.catalogue import REGISTRY
from histodiffusion.study.stages import STAGES
from histodiffusion.study.run import Run
from histodiffusion.study.artefacts import command_of

NBS, OUT, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_site"
WEB = "https://github.com/histodiffusion/histodiffusion/blob/main"
# figures that bear another name than the stage that draws them
DRAWN_BY = dict(
    figure_1="figure_2", quality_seconds="ablation_sampling", calibration="audit", gain_by_class="audit", closest_pairs="audit",
    feature_map="audit", ablation_classifier="ablation_sampling", adaptation="table_1", gain="table_1", selection="table_1",
    memorisation="audit", label_noise="audit",
)  # fmt: skip


# ---- cross-links ----

def module_of(path: Path):
    "The module that a library notebook exports."
    return importlib.import_module(f"histodiffusion.{path.stem[3:]}")


def exported(source: str, module) -> list:
    "Public functions, classes, and methods added by @patch that an exported cell defines."
    names = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"): continue
        patched = any(ast.unparse(d).split("(")[0] == "patch" for d in node.decorator_list)
        name = f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name
        if name.split(".")[0] in module.__all__: names.append(name)
    return names


def exports(cell) -> bool:
    "Whether a cell goes into a module."
    return cell.cell_type == "code" and any(d.split()[0] == "export" for d in split_directives(cell.source)[0] if d)


def symbols() -> dict:
    "Public names of the library -> name of their module."
    known = {}
    for path in sorted((NBS / "library").glob("*.ipynb")):
        cells = [c for c in nbformat.read(path, as_version=4).cells if exports(c)]
        known |= {n: path.stem[3:] for c in cells for n in exported(split_directives(c.source)[1], module_of(path))}
    return known


SYMBOLS = symbols()
CODE = re.compile(r"(```.*?```|~~~.*?~~~)|(?<![`\[])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])", re.DOTALL)


def target(name: str, module: str = "") -> str:
    "The anchor of a public name; anchors know no capitals, and a class may differ from a function by them alone."
    kind = "class" if name[0].isupper() else "def"
    return f"{kind}-{module or SYMBOLS[name]}-{name}".lower().replace(".", "-").replace("_", "-")


def cross_link(text: str) -> str:
    "Make links of names of the library that stand between backticks."
    def link(match):
        if match[1] or match[2] not in SYMBOLS: return match[0]
        return f"[`{match[2]}{match[3] or ''}`](#{target(match[2])})"
    return CODE.sub(link, text)


LINK = re.compile(r"(\]\()(?![a-z][a-z+.-]*:|[/#])([^)\s]+)(\))")


def relink(text: str, home: Path) -> str:
    "Point links to files that have no page at the repository."
    def link(match):
        path, _, anchor = match[2].partition("#")
        place = (home / path).resolve()
        if not place.exists(): raise SystemExit(f"{home.relative_to(ROOT)}: a link leads to '{match[2]}', which is not there.")
        inside = place.relative_to(ROOT)
        if place.suffix == ".ipynb" and inside.parts[0] == "nbs": return match[0]
        pages = {"results/README.md": "results", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
        if str(inside) in pages: return f"{match[1]}{'../' * (len(home.relative_to(ROOT).parts) - 1)}{pages[str(inside)]}.md{match[3]}"
        return f"{match[1]}{WEB}/{inside}{match[3]}"
    return LINK.sub(link, text)


# ---- one notebook, one page ----

HEADING = re.compile(r"^(#+) ", re.MULTILINE)


def api(name: str, module, level: int) -> nbformat.NotebookNode:
    "Signature and docstring of a public name, as a cell of text with a heading of a level."
    thing = module
    for part in name.split("."): thing = getattr(thing, part)
    text = show_doc(inspect.unwrap(thing), name=name, title_level=level)._repr_markdown_()
    head, body = text[text.index("#" * level + " "):].split("\n", 1)
    return new_markdown_cell(f"({target(name, module.__name__.split('.')[-1])})=\n{head}\n{cross_link(body.replace('numpy.', 'np.'))}")


def page(path: Path, module=None) -> nbformat.NotebookNode:
    "A notebook as a page: hidden cells left out, exported code folded below its signatures."
    nb, cells, level = nbformat.read(path, as_version=4), [], 1
    for cell in nb.cells:
        public = module and exports(cell)
        directives, cell.source = split_directives(cell.source)
        if cell.cell_type == "raw" or any(d in HIDDEN or d.split()[0] in HIDDEN for d in directives if d): continue
        if cell.cell_type == "markdown":
            level = len(([m[1] for m in HEADING.finditer(cell.source)] or ["#" * level])[-1])
            cell.source = cross_link(relink(cell.source, path.parent))
        elif "echo: false" in directives: cell.metadata["tags"] = ["remove-input"]
        elif public:
            cells += [api(n, module, level + 1) for n in exported(cell.source, module)]
            cell.metadata["tags"] = ["hide-input"]
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for o in cell.outputs: o.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if not cell.source.strip() and not cell.outputs: continue
        cells.append(cell)
    nb.cells = cells
    nb.metadata = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"), language_info=dict(name="python"))
    return nb


def write(nb: nbformat.NotebookNode, name: str):
    "Put a page among the sources of Sphinx."
    path = OUT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for k, cell in enumerate(nb.cells): cell["id"] = f"c{k}"
    nbformat.write(nb, path)


def title(path: Path) -> tuple:
    "Title and description of a notebook."
    lines = nbformat.read(path, as_version=4).cells[0].source.splitlines()
    return lines[0].removeprefix("# "), next((line[2:] for line in lines if line.startswith("> ")), "")


# ---- results ----

def command(stage: str, profile: str, dataset: str) -> str:
    "The command that makes a result of a run; what is no stage is a notebook to be run by hand."
    kept = [p for kind in ("results", "figures") if (p := ROOT / kind / profile / dataset / f"{stage}.provenance.json").exists()]
    if stage in STAGES: return command_of(Run(**read_json(kept[0])["parameters"]) if kept else Run(profile, dataset), "reproduce")
    return f"papermill nbs/experiments/{stage}.ipynb out.ipynb -p profile {profile} -p dataset {dataset}"


def runs() -> list:
    "(profile, data set) of the results that are kept."
    return [(p.parent.name, p.name) for p in sorted((ROOT / "results").glob("*/*")) if p.is_dir()
            and p.parent.name not in ("artefacts", "audit", "logs", "bench", "smoke")]


def stage_of(name: str) -> str:
    "The stage, or notebook, that makes a table or figure."
    return DRAWN_BY.get(name, name)


def said(folder: Path, stage: str) -> str:
    "Commit, date, seeds and time of a result, in a line."
    path = folder / f"{stage}.provenance.json"
    if not path.exists(): return ""
    p = read_json(path)
    seeds = f", seeds {', '.join(map(str, p['seeds']))}" if p.get("seeds") else ""
    commit = p.get("commit") or "unknown"
    return f"Commit [`{commit[:10]}`](https://github.com/histodiffusion/histodiffusion/commit/{commit}), {p['date'][:10]}{seeds}."


def results_of(stage: str) -> list:
    "Tables and figures of an experiment in every run that is kept, as cells of text."
    cells = []
    for profile, dataset in runs():
        tables, figures = (ROOT / kind / profile / dataset for kind in ("results", "figures"))
        found = [p for p in sorted(tables.glob("*.md")) if stage_of(p.stem) == stage and not p.stem.endswith("_seeds")]
        drawn = [p for p in sorted(figures.glob("*.svg")) if stage_of(p.stem) == stage]
        if not found and not drawn: continue
        text = [f"## {dataset}, profile `{profile}`", said(tables, stage) + f" Made by `{command(stage, profile, dataset)}`."]
        text += [picture(p, f"{p.stem} of {dataset}") for p in drawn]
        text += [":::{container} wide\n" + p.read_text(encoding="utf-8").strip() + "\n:::" for p in found]
        cells.append(new_markdown_cell("\n\n".join(text)))
    return cells


def picture(path: Path, words: str) -> str:
    "A figure, copied among the sources."
    place = OUT / "pictures" / "-".join(path.relative_to(ROOT / "figures").parts)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place)
    return f"![{words}](/pictures/{place.name})"


# ---- pages made from data ----

def toctree(names: list, caption: str = "") -> str:
    "An entry of the navigation."
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *names, "```"])


def overview(folder: str, heading: str, words: str) -> list:
    "Names of a folder's pages; writes the page that lists them."
    paths = sorted((NBS / folder).glob("*.ipynb"))
    rows = []
    for p in paths:
        name, what = title(p)
        rows.append(f"| [{name}]({folder}/{p.name}) | {cross_link(what)} |")
    text = f"# {heading}\n\n{words}\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n\n" + toctree([f"{folder}/{p.stem}" for p in paths])
    (OUT / f"{folder}.md").write_text(text + "\n", encoding="utf-8")
    return paths


def data_page() -> str:
    "The registry as a page."
    text = ["# Data sets", "What the registry knows; `histodiffusion data list` says which are here. A set is fetched from its publisher, "
            "licence first, and verified; any folder of your own is a set too: `folder:/path`."]
    for name, d in REGISTRY.items():
        facts = {"Licence": f"[{d.licence}]({d.licence_url})" if d.licence_url else d.licence,
                 "Published at": f"<{d.homepage}>" if d.homepage else "", "Images": f"{sum(d.counts):,}" if d.counts else "not checked",
                 "Classes": ", ".join(d.classes) if d.labelled else "unlabelled use", "Colour": "grey" if d.channels == 1 else "RGB",
                 "Pixel": f"{d.pixel} μm" if d.pixel else "", "To cite": d.citation, "Note": d.note}
        rows = "\n".join(f"| {k} | {v} |" for k, v in facts.items() if v)
        text.append(f"## {d.title}\n\n`{name}`\n\n| | |\n|---|---|\n{rows}")
    return "\n\n".join(text) + "\n"


def gallery_page() -> str:
    "All figures that are kept, each with the notebook and the command that made it."
    text = ["# Gallery", "Every figure that is kept in the repository, with the notebook and the command that drew it."]
    groups = defaultdict(list)
    for p in sorted((ROOT / "figures").glob("**/*.svg")):
        where = p.parent.relative_to(ROOT / "figures")
        if where.parts[0] not in ("smoke", "readme"): groups[where].append(p)
    for where, paths in groups.items():
        text.append(f"## {' · '.join(where.parts)}")
        for p in paths:
            kept = where.parts in runs()
            maker = stage_of(p.stem) if kept else dict(audit="data_audit").get(where.parts[0], where.parts[0])
            notebook = NBS / "experiments" / f"{maker}.ipynb"
            by = f"[{title(notebook)[0]}](experiments/{notebook.name})" if notebook.exists() else "a library notebook"
            how = f", `{command(maker, *where.parts)}`" if kept else ""
            text.append(f"{picture(p, p.stem)}\n\n*{p.stem.replace('_', ' ')}*: {by}{how}.")
    return "\n\n".join(text) + "\n"


def cards_page():
    "Write a page for each model card, and one that lists them."
    cards = sorted((ROOT / "results" / "weights").glob("*/README.md"))
    rows = []
    for p in cards:
        text = p.read_text(encoding="utf-8")
        (OUT / f"weights-{p.parent.name}.md").write_text(text, encoding="utf-8")
        rows.append(f"| [{p.parent.name}](weights-{p.parent.name}.md) | {text.split(chr(10) * 2)[1]} |")
    names = [f"weights-{p.parent.name}" for p in cards]
    words = "Priors that the project publishes, and what is known of each. [Sampling from published weights]" \
            "(tutorials/04_published_weights.ipynb) shows them at work."
    (OUT / "weights.md").write_text(f"# Model cards\n\n{words}\n\n| weights | what they are |\n|---|---|\n" + "\n".join(rows)
                                    + "\n\n" + toctree(names) + "\n", encoding="utf-8")


def file_page(name: str) -> str:
    "A text of the repository as a page."
    path = ROOT / name
    return cross_link(relink(path.read_text(encoding="utf-8"), path.parent))


def cite_page() -> str:
    "How to cite, from CITATION.cff."
    return "# How to cite\n\n```yaml\n" + (ROOT / "CITATION.cff").read_text(encoding="utf-8").strip() + "\n```\n"


# ---- the whole ----

SECTIONS = dict(
    tutorials=("Tutorials", "Each runs on a CPU in minutes."),
    library=("Library", "One notebook for each component, in the order of the data; each explains, defines and tests one module."),
    experiments=("Experiments", "One notebook for each stage, table and figure, for papermill; a page here shows what was kept of a run."),
)


def stage():
    "Write all sources of the site."
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    shutil.copytree(ROOT / "docs" / "_static", OUT / "_static")
    sections = [s for s in SECTIONS if list((NBS / s).glob("*.ipynb"))]
    for folder in sections:
        for path in overview(folder, *SECTIONS[folder]):
            module = module_of(path) if folder == "library" else None
            nb = page(path, module)
            if folder == "experiments": nb.cells += results_of(path.stem)
            write(nb, f"{folder}/{path.name}")
    texts = dict(data=data_page(), gallery=gallery_page(), results=file_page("results/README.md"), cite=cite_page(),
                 contributing=file_page("CONTRIBUTING.md"), changelog=file_page("CHANGELOG.md"))
    for name, text in texts.items(): (OUT / f"{name}.md").write_text(text, encoding="utf-8")
    cards_page()
    home = page(NBS / "index.ipynb")
    more = [p.stem for p in sorted(NBS.glob("*.ipynb")) if p.stem != "index"]
    for name in more: write(page(NBS / f"{name}.ipynb"), f"{name}.ipynb")
    home.cells.append(new_markdown_cell("\n\n".join([
        toctree([*more, *sections], "Read"), toctree(["results", "gallery", "weights", "data"], "Results"),
        toctree(["cite", "contributing", "changelog"], "Project")])))
    write(home, "index.ipynb")


def main() -> int:
    "Build the site and say where it lies."
    stage()
    html = OUT / "_build" / "html"
    options = ["-q", "-W", "--keep-going", "-j", "2", "-b", "html", "-c", str(ROOT / "docs"), "-d", str(OUT / "_build" / "trees")]
    if code := build_main([*options, str(OUT), str(html)]): return code
    shutil.rmtree(SITE, ignore_errors=True)
    html.rename(SITE)
    print(f"The site is in {SITE.relative_to(ROOT)}: open {SITE.relative_to(ROOT)}/index.html.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
