"""What the files at the top of the repository must agree on."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import histodiffusion
from histodiffusion.core import load_settings

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def ini():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser


@pytest.fixture
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_settings_ini_equals_pyproject(ini, pyproject):
    default, nbdev, project = dict(ini["DEFAULT"]), pyproject["tool"]["nbdev"], pyproject["project"]
    same = {k: str(nbdev[k]) for k in default if k in nbdev}
    same |= {
        "version": histodiffusion.__version__,
        "min_python": project["requires-python"].removeprefix(">="),
        "description": project["description"],
        "keywords": ", ".join(project["keywords"]),
        "license": project["license"],
        "author": ", ".join(a["name"] for a in project["authors"]),
        "repo": project["urls"]["Repository"].rsplit("/", 1)[-1],
    }
    assert default == same


def test_settings_are_what_the_library_reads(ini, monkeypatch):
    read = set(load_settings(ROOT).__dataclass_fields__) - {"root"}
    assert set(ini["histodiffusion"]) - set(ini["DEFAULT"]) == read
    for key in read:
        value = "77.5" if key == "max_megapixels" else "elsewhere"
        monkeypatch.setenv(f"HISTODIFFUSION_{key.upper()}", value)
        assert value in str(getattr(load_settings(ROOT), key))


def test_every_package_is_installed_and_every_notebook_of_a_stage_with_it(pyproject):
    setuptools = pyproject["tool"]["setuptools"]
    found = [".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "histodiffusion").rglob("__init__.py")]
    assert sorted(setuptools["packages"]) == sorted([*found, "histodiffusion.experiments", "histodiffusion.weights"])
    folders = {"histodiffusion.experiments": "nbs/experiments", "histodiffusion.weights": "results/weights"}
    assert setuptools["package-dir"] == folders


@pytest.mark.slow
def test_a_wheel_runs_in_an_empty_folder(tmp_path):
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    for name in ("histodiffusion", "nbs/experiments", "results/weights"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    pytest.importorskip("setuptools", reason="a wheel needs setuptools in the environment")
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *tmp_path.glob("*.whl")], check=True)
    empty.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("HISTODIFFUSION_")} | {"PYTHONPATH": str(site)}
    options = dict(capture_output=True, text=True, cwd=empty, env=env, timeout=300)
    where = subprocess.run([sys.executable, "-c", "import histodiffusion as h; print(h.__file__)"], **options).stdout
    assert where.startswith(str(site))
    config = json.dumps(dict(profile="smoke", dataset="phantom:target:270", pretrain_sets=["phantom:kyoto:45"]))
    for job in ("target_data", "pretraining_data"):
        said = subprocess.run([sys.executable, "-m", "histodiffusion.app.reproduce", config, job], **options)
        assert said.returncode == 0, said.stdout + said.stderr
    assert list((empty / "results").rglob("pool.npy")) and list((empty / "results").rglob("target_data.ipynb"))
    code = ("from histodiffusion.study.run import Run; from histodiffusion.study.prior import prior_model; r = Run();"
            "print(r.target, *r.sets, (prior_model(r.settings.prior)/'unet').is_dir())")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], **options)
    assert said.stdout.split() == ["kather2016-sample", "pcam-sample", "breakhis-sample", "True"], said.stderr
    said = subprocess.run([sys.executable, "-m", "histodiffusion", "data"], **options)  # unpacks the samples
    assert said.returncode == 0 and "2000 patches" in said.stdout, said.stdout + said.stderr
    assert {p.name for p in (empty / "data").iterdir()} >= {"kather2016-sample", "pcam-sample", "breakhis-sample"}
    code = ("from histodiffusion.app.reproduce import snakemake_command as c; import subprocess, sys;"
            "sys.exit(subprocess.run([*c('config.json', 1), '-n']).returncode)")  # fmt: skip
    (empty / "config.json").write_text(config)
    said = subprocess.run([sys.executable, "-c", code], **options)
    assert said.returncode == 0 and "rule report:" in said.stdout + said.stderr


def test_command_is_installed_by_name(pyproject):
    module, _, function = pyproject["project"]["scripts"]["histodiffusion"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_constraints_pin_every_dependency(pyproject):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {s.split("==")[0].lower().replace("_", "-") for s in lines if "==" in s and not s.startswith("#")}
    project = pyproject["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    assert {re.split(r"[>=<;\[ ]", d)[0].lower() for d in wanted} - {"histodiffusion"} <= pinned


WINGS = ("core", "data", "models", "measure", "study", "app")
PLAIN = {"sharing", "__main__", "app.cli", "app.data_command"}


def modules():
    "Name -> source of every module of the library."
    home = ROOT / "histodiffusion"
    paths = [p for p in home.rglob("*.py") if p.stem not in ("__init__", "_modidx")]
    return {".".join(p.relative_to(home).with_suffix("").parts): p.read_text() for p in paths}


def test_every_module_comes_from_a_notebook_in_the_same_tree():
    home = ROOT / "nbs" / "library"
    parts = [p.relative_to(home).with_suffix("").parts for p in home.rglob("[0-9][0-9]_*.ipynb")]
    assert set(modules()) - PLAIN == {".".join([*wing, name.split("_", 1)[1]]) for *wing, name in parts}


def imported(name, source):
    "Modules of the library that a module imports, wherever in its source."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            home = ("histodiffusion." + name).split(".")[: -node.level] if node.level else []
            path = ".".join([*home, *filter(None, [node.module])])
            found += [path, *(f"{path}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return {path.removeprefix("histodiffusion.") for path in found if path.startswith("histodiffusion.")}


def backwards(sources):
    "Imports against the order of the wings, as (module, imported module)."
    wing = lambda name: WINGS.index(name.split(".")[0]) if name.split(".")[0] in WINGS else len(WINGS)  # noqa: E731
    every = [(name, m) for name, source in sources.items() for m in imported(name, source) & set(sources)]
    return [(a, b) for a, b in every if wing(b) > wing(a)]


def test_no_import_runs_backwards():
    sources = {name: source for name, source in modules().items() if name not in ("sharing", "__main__")}
    assert len(imported("study.steps", sources["study.steps"]) & set(sources)) > 10
    assert backwards(sources) == []


@pytest.mark.parametrize("name, line", [
    ("core", "from .data.patches import list_images"), ("data.patches", "from ..models import sampling"),
    ("models.backbone", "def f():\n    import histodiffusion.study.run"), ("data.pool", "from ..app.cli import main"),
])  # fmt: skip
def test_a_backward_import_would_be_found(name, line):
    assert [a for a, _ in backwards({**modules(), name: line, "sharing": "", "__main__": ""})] == [name]


def test_licence_is_apache(pyproject):
    assert pyproject["project"]["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


@pytest.mark.skipif(not (ROOT / "nbs" / "index.ipynb").exists(), reason="needs nbs/index.ipynb")
def test_readme_is_written_from_its_notebook(tmp_path):
    for name in ("docs/readme.py", "nbs/index.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "docs/readme.py"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_contributing_shows_the_notebook_statistics():
    printed = subprocess.run([sys.executable, "tools/notebook_stats.py"], cwd=ROOT, check=True, capture_output=True)
    assert printed.stdout.decode().strip() in (ROOT / "CONTRIBUTING.md").read_text()
