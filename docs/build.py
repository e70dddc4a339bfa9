"""Build the site from the notebooks: write Sphinx sources to `_proc`, then let Sphinx write `_site`.

No notebook is run and nothing is downloaded: the pages show the outputs that the notebooks were committed with.
"""

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
from readme import ROOT, hidden, split_directives
from sphinx.cmd.build import build_main

from histodiffusion.core import read_json
from histodiffusion.data.catalogue import REGISTRY
from histodiffusion.study.artefacts import command_of
from histodiffusion.study.run import Run
from histodiffusion.study.stages import STAGES

NBS, OUT, SITE = ROOT / "nbs", ROOT / "_proc", ROOT / "_site"
WEB = "https://github.com/histodiffusion/histodiffusion/blob/main"
# tables and figures that are not named after the stage that makes them
FROM_STAGE = dict(
    figure_1="figure_2", quality_seconds="ablation_sampling", ablation_classifier="ablation_sampling",
    adaptation="table_1", gain="table_1", selection="table_1", memorisation="safety", label_noise="safety",
    calibration="safety", gain_by_class="safety", closest_pairs="safety", feature_map="safety",
)  # fmt: skip
# the wings of the library, in the order of the data: title and description
WINGS = dict(
    data=("Data", "Data sets from their publisher to training patches: catalogue, download, splits, the pool of "
          "unlabelled patches, stain, copies and leakage, whole slides, and the phantom."),
    models=("Models", "Networks and samplers: the training loop, image encoders, autoencoder, diffusion prior, latent "
            "classifier, guidance, sampling, the backbone classifier, and baselines."),
    measure=("Measure", "Selection of synthetic patches, image quality, statistics of gains, and figures."),
    study=("Study", "One run from data to report: profiles, stages, provenance, comparisons, tables, ablations."),
    app=("App", "What a user starts: `histodiffusion reproduce`, sharing of patches and weights, the explorer."),
)


# ---- cross-links ----

def module_name(path: Path) -> str:
    "Name of the module that a library notebook exports: `data.packed` for `nbs/library/data/04_packed.ipynb`."
    return ".".join([*path.relative_to(NBS / "library").parts[:-1], path.stem[3:]])


def module_of(path: Path):
    "The module that a library notebook exports."
    return importlib.import_module(f"histodiffusion.{module_name(path)}")


def exported(source: str, module) -> list:
    "Names of public functions, classes and @patch methods that an exported cell defines."
    names = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"): continue
        patched = any(ast.unparse(d).split("(")[0] == "patch" for d in node.decorator_list)
        name = f"{ast.unparse(node.args.args[0].annotation)}.{node.name}" if patched else node.name
        if name.split(".")[0] in module.__all__: names.append(name)
    return names


def exports(cell) -> bool:
    "Whether a cell is exported to a module."
    return cell.cell_type == "code" and any(d.split()[0] == "export" for d in split_directives(cell.source)[0] if d)


def symbols() -> dict:
    "Public names of the library -> name of their module."
    known = {}
    for path in sorted((NBS / "library").rglob("*.ipynb")):
        cells, module = [c for c in nbformat.read(path, as_version=4).cells if exports(c)], module_of(path)
        known |= {n: module_name(path) for c in cells for n in exported(split_directives(c.source)[1], module)}
    return known


SYMBOLS = symbols()
CODE = re.compile(r"(```.*?```|~~~.*?~~~)|(?<![`\[])`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])", re.DOTALL)


def target(name: str, module: str = "") -> str:
    "Anchor of a public name. It starts with the kind: anchors ignore case, which may be all that sets two names apart."
    kind = "class" if name[0].isupper() else "def"
    return f"{kind}-{module or SYMBOLS[name]}-{name}".lower().replace(".", "-").replace("_", "-")


def cross_link(text: str) -> str:
    "Link names of the library in backticks to their definitions."
    def link(match):
        if match[1] or match[2] not in SYMBOLS: return match[0]
        return f"[`{match[2]}{match[3] or ''}`](#{target(match[2])})"
    return CODE.sub(link, text)


LINK = re.compile(r"(\]\()(?![a-z][a-z+.-]*:|[/#])([^)\s]+)(\))")


def relink(text: str, home: Path) -> str:
    "Link files without a page of their own to the repository."
    def link(match):
        path, _, anchor = match[2].partition("#")
        place = (home / path).resolve()
        if not place.exists():
            raise SystemExit(f"{home.relative_to(ROOT)}: a link points to '{match[2]}', which is missing.")
        inside = place.relative_to(ROOT)
        if place.suffix == ".ipynb" and inside.parts[0] == "nbs": return match[0]
        pages = {"results/README.md": "results", "results/LOG.md": "log", "CONTRIBUTING.md": "contributing",
                 "CHANGELOG.md": "changelog"}
        up = "../" * (len(home.relative_to(ROOT).parts) - 1)
        if str(inside) in pages: return f"{match[1]}{up}{pages[str(inside)]}.md{match[3]}"
        return f"{match[1]}{WEB}/{inside}{match[3]}"
    return LINK.sub(link, text)


# ---- one notebook, one page ----

HEADING = re.compile(r"^(#+) ", re.MULTILINE)


def api(name: str, module, level: int) -> nbformat.NotebookNode:
    "Signature and docstring of a public name, as a Markdown cell with a heading."
    thing = module
    for part in name.split("."): thing = getattr(thing, part)
    text = show_doc(inspect.unwrap(thing), name=name, title_level=level)._repr_markdown_()
    head, body = text[text.index("#" * level + " "):].split("\n", 1)
    anchor = target(name, module.__name__.removeprefix("histodiffusion."))
    return new_markdown_cell(f"({anchor})=\n{head}\n{cross_link(body.replace('numpy.', 'np.'))}")


def page(path: Path, module=None) -> nbformat.NotebookNode:
    "A notebook as a page: without hidden cells, with exported code folded below its signatures."
    nb, cells, level = nbformat.read(path, as_version=4), [], 1
    for cell in nb.cells:
        public = module and exports(cell)
        directives, cell.source = split_directives(cell.source)
        if cell.cell_type == "raw" or hidden(directives): continue
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
    kernel = dict(name="python3", display_name="Python 3", language="python")
    nb.metadata = dict(kernelspec=kernel, language_info=dict(name="python"))
    return nb


def write(nb: nbformat.NotebookNode, name: str):
    "Write a page to the sources of Sphinx."
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
    "The command that makes a result of a run: `histodiffusion reproduce` for a stage, else papermill."
    if stage not in STAGES:
        return f"papermill nbs/experiments/{stage}.ipynb out.ipynb -y 'run: {{profile: {profile}, dataset: {dataset}}}'"
    records = [ROOT / kind / profile / dataset / f"{stage}.provenance.json" for kind in ("results", "figures")]
    kept = next((read_json(p)["parameters"] for p in records if p.exists()), dict(profile=profile, dataset=dataset))
    return command_of(Run(**kept), "reproduce")


def runs() -> list:
    "(profile, data set) of the results in the repository."
    return [(p.parent.name, p.name) for p in sorted((ROOT / "results").glob("*/*")) if p.is_dir()
            and p.parent.name not in ("artefacts", "audit", "logs", "bench", "smoke")]


def stage_of(name: str) -> str:
    "The stage or notebook that makes a table or figure."
    return FROM_STAGE.get(name, name)


def origin(folder: Path, stage: str) -> str:
    "Commit, date and seeds of a result, in one line."
    path = folder / f"{stage}.provenance.json"
    if not path.exists(): return ""
    p = read_json(path)
    seeds = f", seeds {', '.join(map(str, p['seeds']))}" if p.get("seeds") else ""
    commit = p.get("commit") or "unknown"
    link = f"https://github.com/histodiffusion/histodiffusion/commit/{commit}"
    return f"Commit [`{commit[:10]}`]({link}), {p['date'][:10]}{seeds}."


def results_of(stage: str) -> list:
    "Tables and figures of an experiment for every run in the repository, as Markdown cells."
    cells = []
    for profile, dataset in runs():
        tables, figures = (ROOT / kind / profile / dataset for kind in ("results", "figures"))
        found = [p for p in sorted(tables.glob("*.md")) if stage_of(p.stem) == stage and not p.stem.endswith("_seeds")]
        drawn = [p for p in sorted(figures.glob("*.svg")) if stage_of(p.stem) == stage]
        if not found and not drawn: continue
        made = f"{origin(tables, stage)} Made by `{command(stage, profile, dataset)}`."
        text = [f"## {dataset}, profile `{profile}`", made.strip()]
        text += [picture(p, f"{p.stem} of {dataset}") for p in drawn]
        text += [":::{container} wide\n" + p.read_text(encoding="utf-8").strip() + "\n:::" for p in found]
        cells.append(new_markdown_cell("\n\n".join(text)))
    return cells


def picture(path: Path, words: str) -> str:
    "Markdown of a figure, which is copied to the sources."
    place = OUT / "pictures" / "-".join(path.relative_to(ROOT / "figures").parts)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place)
    return f"![{words}](/pictures/{place.name})"


# ---- pages made from data ----

def toctree(names: list, caption: str = "") -> str:
    "Pages in the navigation, under a caption."
    return "\n".join(["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else []), "", *names, "```"])


def rows_of(paths: list, home: str) -> str:
    "Table of notebooks with their descriptions; links are relative to the folder `home`."
    rows = []
    for p in paths:
        name, what = title(p)
        what = cross_link(what).replace("|", "\\|")  # a vertical bar would end the table's cell
        rows.append(f"| [{name}]({p.relative_to(NBS / home)}) | {what} |")
    return "| | |\n|---|---|\n" + "\n".join(rows)


def overview(folder: str) -> list:
    "Notebooks of a folder; writes the page that lists them."
    heading, words = SECTIONS[folder]
    paths = sorted((NBS / folder).glob("*.ipynb"))
    text = [f"# {heading}", words, rows_of(paths, "."), toctree([f"{folder}/{p.stem}" for p in paths])]
    (OUT / f"{folder}.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return paths


def library_pages() -> list:
    "Names of the library's pages for the navigation; writes the overview and a page for each wing."
    home, names = NBS / "library", ["library", "library/00_core"]
    text = ["# Library", LIBRARY, "## Core", rows_of([home / "00_core.ipynb"], ".")]
    (OUT / "library").mkdir()
    for wing, (heading, words) in WINGS.items():
        paths, words = sorted((home / wing).glob("*.ipynb")), cross_link(words)
        text += [f"## {heading}", words, rows_of(paths, ".")]
        page_of_wing = [f"# {heading}", words, rows_of(paths, "library"), toctree([f"{wing}/{p.stem}" for p in paths])]
        (OUT / "library" / f"{wing}.md").write_text("\n\n".join(page_of_wing) + "\n", encoding="utf-8")
        names.append(f"library/{wing}")
    (OUT / "library.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    for path in sorted(home.rglob("*.ipynb")): write(page(path, module_of(path)), str(path.relative_to(NBS)))
    return names


def data_page() -> str:
    "The catalogue of data sets as a page."
    text = ["# Data sets", "The data sets that the library knows by name; `histodiffusion data list` shows which are "
            "on this machine. A data set is downloaded from its publisher after its licence is shown, and verified. "
            "Any folder of images is a data set too: `folder:/path`."]
    for name, d in REGISTRY.items():
        facts = {"Licence": f"[{d.licence}]({d.licence_url})" if d.licence_url else d.licence,
                 "Published at": f"<{d.homepage}>" if d.homepage else "",
                 "Images": f"{sum(d.counts):,}" if d.counts else "not checked",
                 "Classes": ", ".join(d.classes) if d.labelled else "used without labels",
                 "Colour": "grey" if d.channels == 1 else "RGB",
                 "Pixel": f"{d.pixel} μm" if d.pixel else "", "To cite": d.citation, "Note": d.note}
        rows = "\n".join(f"| {k} | {v} |" for k, v in facts.items() if v)
        text.append(f"## {d.title}\n\n`{name}`\n\n| | |\n|---|---|\n{rows}")
    return "\n\n".join(text) + "\n"


def gallery_page() -> str:
    "All figures in the repository, each with its notebook and command."
    text = ["# Gallery", "Every figure in the repository, with the notebook and the command that made it."]
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
    "Write a page for each model card, and a page that lists them."
    cards = sorted((ROOT / "results" / "weights").glob("*/README.md"))
    rows = []
    for p in cards:
        text = p.read_text(encoding="utf-8")
        (OUT / f"weights-{p.parent.name}.md").write_text(text, encoding="utf-8")
        rows.append(f"| [{p.parent.name}](weights-{p.parent.name}.md) | {text.split(chr(10) * 2)[1]} |")
    names = [f"weights-{p.parent.name}" for p in cards]
    words = "The published priors, and what is known about each. [Sampling from published weights]" \
            "(tutorials/04_published_weights.ipynb) shows how to use them."
    text = ["# Model cards", words, "| weights | description |\n|---|---|\n" + "\n".join(rows), toctree(names)]
    (OUT / "weights.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def file_page(name: str) -> str:
    "A text file of the repository as a page."
    path = ROOT / name
    return cross_link(relink(path.read_text(encoding="utf-8"), path.parent))


def cite_page() -> str:
    "How to cite, from CITATION.cff."
    return "# How to cite\n\n```yaml\n" + (ROOT / "CITATION.cff").read_text(encoding="utf-8").strip() + "\n```\n"


# ---- the whole site ----

SECTIONS = dict(
    tutorials=("Tutorials", "Each runs on a CPU in minutes."),
    experiments=("Experiments", "One notebook for each stage, table and figure, run by papermill. Each page also shows "
                 "the results in the repository."),
)
LIBRARY = "One notebook for each component explains, defines and tests one module. The wings follow the order of the " \
          "data, and each imports only from those before it."


def stage():
    "Write all sources of the site."
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    shutil.copytree(ROOT / "docs" / "_static", OUT / "_static")
    for folder in SECTIONS:
        for path in overview(folder):
            nb = page(path)
            if folder == "experiments": nb.cells += results_of(path.stem)
            write(nb, f"{folder}/{path.name}")
    library = library_pages()
    texts = dict(data=data_page(), gallery=gallery_page(), results=file_page("results/README.md"),
                 log=file_page("results/LOG.md"), cite=cite_page(),
                 contributing=file_page("CONTRIBUTING.md"), changelog=file_page("CHANGELOG.md"))
    for name, text in texts.items(): (OUT / f"{name}.md").write_text(text, encoding="utf-8")
    cards_page()
    home = page(NBS / "index.ipynb")
    more = [p.stem for p in sorted(NBS.glob("*.ipynb"), reverse=True) if p.stem != "index"]
    for name in more: write(page(NBS / f"{name}.ipynb"), f"{name}.ipynb")
    home.cells.append(new_markdown_cell("\n\n".join([
        toctree([*more, *SECTIONS], "Read"), toctree(library, "Library"),
        toctree(["results", "log", "gallery", "weights", "data"], "Results"),
        toctree(["cite", "contributing", "changelog"], "Project")])))
    write(home, "index.ipynb")


def main() -> int:
    "Build the site and print its path."
    stage()
    html = OUT / "_build" / "html"
    options = ["-q", "-W", "--keep-going", "-j", "2", "-b", "html"]
    folders = ["-c", str(ROOT / "docs"), "-d", str(OUT / "_build" / "trees"), str(OUT), str(html)]
    if code := build_main([*options, *folders]): return code
    shutil.rmtree(SITE, ignore_errors=True)
    html.rename(SITE)
    print(f"The site is in {SITE.relative_to(ROOT)}: open {SITE.relative_to(ROOT)}/index.html.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
