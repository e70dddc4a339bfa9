"""What the keys of stages cover besides settings and data: code, flags and precision; and where a run writes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import histodiffusion
from histodiffusion.app.cli import parse
from histodiffusion.app.reproduce import measured_seconds, show_results
from histodiffusion.core import HistoDiffusionError, best_precision, read_json, write_json
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.study.artefacts import data_warnings, stage, stage_folder
from histodiffusion.study.profiles import PROFILES
from histodiffusion.study.run import Run
from histodiffusion.study.stages import RESULTS, STAGES, code_hashes, downstream_of, stage_code

ROOT, PACKAGE = Path(__file__).resolve().parent.parent, Path(histodiffusion.__file__).parent


@pytest.fixture
def results(tmp_path, monkeypatch):
    "A folder of results in which nothing has been made."
    for kind in ("RESULTS", "FIGURES"):
        monkeypatch.setenv(f"HISTODIFFUSION_{kind}_PATH", str(tmp_path / kind.lower()))
    return tmp_path / "results"


@pytest.fixture
def edited(tmp_path):
    "edited(module, old, new): the folder of a copy of the package in which a text is replaced."

    def edit(module, old, new):
        root = shutil.copytree(PACKAGE, tmp_path / f"{len(list(tmp_path.iterdir()))}" / "histodiffusion",
                               ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
        text = (root / f"{module}.py").read_text()
        assert text.count(old) == 1, old
        (root / f"{module}.py").write_text(text.replace(old, new))
        return root

    return edit


def differ(root):
    "Stages whose code in another copy of the package is not that of this one."
    return [s for s, h in code_hashes(root).items() if h != code_hashes()[s]]


SELECTING = ["select", "compare", "quality", "sampling_grid"]


@pytest.mark.parametrize("module, old, new, stages", [
    # a comment, a docstring, an error message, and how a thing looks in a notebook: none
    ("measure/selection", "# (N, D) features\n", "# (N, D) any features\n", []),
    ("measure/selection", '"Features scaled to length 1."', '"Unit features."', []),
    ("measure/selection", "are not a finite (N, D) array", "are no finite (N, D) array", []),
    ("models/training", 'facts = dict(weights=f"{weights:,}"', 'facts = dict(numbers=f"{weights:,}"', []),
    ("study/run", '"Folder of the tables."\n    return', '"Folder of the tables."\n    self.settings\n    return', []),
    # a function that others call, a registered rule, a method added to a class, and a constant
    ("measure/selection", "return squared.argmin(1)", "return squared.argmax(1)", SELECTING),
    ("measure/selection", "return keep, -confidence", "return keep, confidence", SELECTING),
    ("study/steps", "np.isin(np.arange(len(targets)), passed)", "np.isin(np.arange(len(targets)), [])", SELECTING),
    ("models/baselines", "GAN_BATCH =", "GAN_BATCH = 1 +", ["baselines"]),
    ("models/backbone", "LABEL_SMOOTHING =", "LABEL_SMOOTHING = 0.01 +",
     ["teacher", "real_only", "augment", "compare", "oracle", "quality"]),
    # deep below: the loss of the networks of the prior, the pool, the splits
    ("models/diffusion", "def loss_weights(", "def loss_weights(*,", ["diffusion", "adapt", "baselines",
     "adaptation_grid"]),
    ("data/pool", "a = np.rot90(a, rng.integers(4))", "a = np.rot90(a, rng.integers(3))", ["pretraining_data"]),
    ("data/patches", "train=(0., .6)", "train=(0., .5)", ["pretraining_data", "target_data"]),
])  # fmt: skip
def test_code_counts_for_the_stages_that_use_it_and_for_no_other(edited, module, old, new, stages):
    assert differ(edited(module, old, new)) == stages


def test_a_mended_function_changes_the_keys_of_its_stages_and_of_those_after_them(edited, results):
    def keys(package):
        code = ("import json; from histodiffusion.study.run import Run; from histodiffusion.study.stages import STAGES;"
                "r = Run('smoke'); print(json.dumps({s: r.key(s) for s in STAGES}))")  # fmt: skip
        here = dict(cwd=package.parent, env=os.environ | dict(PYTHONPATH=str(package.parent)))
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, **here)
        return json.loads(said.stdout)

    own, new = keys(PACKAGE), keys(edited("measure/selection", "return squared.argmin(1)", "return squared.argmax(1)"))
    used = {s for name in SELECTING for s in downstream_of(name)}
    assert own == {s: Run("smoke").key(s) for s in STAGES}
    assert [s for s in STAGES if own[s] != new[s]] == [s for s in STAGES if s in used]


def test_the_code_of_every_stage_is_found():
    "Each name that a stage's code imports from the project leads to a definition, or is one that does not count."
    apart = {"Run", "STAGES", "stage", "is_published", "published_prior", "prior_model", "prior_sets", "make_stage",
             "check_names", "command_of", "data_warnings", "progress", "card_html", "picture_html", "machine",
             "load_settings", "best_precision", "choose_precision", "licences_of",
             "network_licences", "networks_of", "known_class_counts"}  # fmt: skip
    every = {}
    for name in STAGES:
        code = stage_code(name)
        assert f"study.{STAGES[name].module}:{name}" in code and len(code) > 3, name
        every |= code
    for module in {k.partition(":")[0] for k in every}:
        source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text()
        used = " ".join(text for k, text in every.items() if k.startswith(f"{module}:"))
        for block in re.findall(r"^from \.[\w.]* import (\([^)]*\)|[^\n]*)", source, re.MULTILINE):
            for name in re.findall(r"\w+", block):
                found = any(k.partition(":")[2] == name for k in every) or name in apart or name == "figures"
                assert found or not re.search(rf"\b{name}\b", used), (module, name)


def test_a_published_prior_keeps_its_key():
    run = Run("small", overrides={"prior": "open-grey-64"})
    assert run.key("diffusion") == read_json(ROOT / "results/weights/open-grey-64/diffusion/provenance.json")["key"]


def test_the_decided_precision_is_in_the_key_and_in_the_record(results):
    auto, best = Run("smoke", overrides={"precision": "auto"}), best_precision()
    typed = {p: Run("smoke", overrides={"precision": p}) for p in ("no", "bf16", "fp16")}
    same = [p for p, run in typed.items() if run.key("autoencoder") == auto.key("autoencoder")]
    assert same == [best]
    assert len({run.key("adapt") for run in typed.values()}) == 3
    with stage_folder(auto, "autoencoder"):
        pass
    assert read_json(auto.record("autoencoder"))["settings"]["precision"] == best


def test_planning_decides_the_precision_without_torch(results):
    code = ("import sys; from histodiffusion.study.run import Run;"
            "Run('small').key('autoencoder'); print('torch' in sys.modules)")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False"]
    (kept,) = (results / "artefacts" / ".state").glob("precision-*.json")
    other = {"no": "bf16", "bf16": "no"}[read_json(kept)["precision"]]
    write_json(kept, read_json(kept) | {"precision": other})
    code = "from histodiffusion.study.run import Run; print(Run('small').setting('precision'))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [other]  # the decision that was kept, not a second one


@pytest.fixture
def leaky(tmp_path):
    "Options of a run whose pre-training set repeats all patches of the labelled set."
    for i, pixels in enumerate(phantom_patches([3, 5] * 12, seed=1)):
        for folder, angle in ((tmp_path / "set" / "ab"[i % 2], 0), (tmp_path / "archive", 90)):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).rotate(angle).save(folder / f"{i}.png")
    return dict(profile="smoke", dataset=f"folder:{tmp_path / 'set'}", pretrain_sets=[f"folder:{tmp_path / 'archive'}"],
                overrides=dict(image_size=32, pretrain_patches=20))  # fmt: skip


def test_what_a_leaky_run_has_made_is_not_used_without_the_flag(results, leaky):
    made = []

    @stage("pretraining_data")
    def pool(run, folder):
        made.append(run.allow_leakage)
        return {}

    allowed, plain = Run(**leaky, allow_leakage=True), Run(**leaky)
    pool(allowed)
    assert allowed.done("pretraining_data") and not plain.done("pretraining_data")
    with pytest.raises(HistoDiffusionError, match="go on with --allow-leakage"):
        pool(plain)
    assert made == [True]
    assert all(allowed.key(s) != plain.key(s) for s in STAGES)
    (said,) = data_warnings(allowed)
    pairs = int(re.search(r"leaks:\*\* (\d+) pair", said)[1])
    assert 0 < pairs < 24 and data_warnings(plain) == []  # those of the training split do not count


def test_corrupt_images_that_were_left_out_are_counted(results, leaky, tmp_path):
    from histodiffusion.study.steps import target_data

    (tmp_path / "set" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    options = leaky | dict(pretrain_sets=["phantom:kyoto:9"])
    with pytest.raises(HistoDiffusionError, match="--skip-corrupt"):
        target_data(Run(**options))
    run = Run(**options, skip_corrupt=True)
    target_data(run)
    assert not Run(**options).done("target_data")
    assert data_warnings(run) == ["**Corrupt images were left out:** 1 of the labelled set."]


def test_the_committed_tables_are_where_their_command_writes(monkeypatch):
    for kind in ("RESULTS", "FIGURES"):
        monkeypatch.delenv(f"HISTODIFFUSION_{kind}_PATH", raising=False)
    text = (ROOT / "results" / "LOG.md").read_text()
    commands = re.findall(r'^make reproduce PROFILE=(\w+) DATASET=(\S+) \\\n\s+ARGS="([^"]+)"', text, re.MULTILINE)
    assert {c[1] for c in commands} == set(PROFILES["small"].expected)
    for profile, dataset, words in commands:
        options = shlex.split(words.replace("\\\n", " "))
        run = parse(["reproduce", "--profile", profile, "--dataset", dataset, *options]).make()
        assert run.results == ROOT / "results" / profile / dataset and (run.results / "table_1.csv").is_file()
        wanted = PROFILES[profile].expected[dataset]
        assert Run(profile, dataset, wanted.sets, overrides=wanted.overrides).results == run.results
        for changes in (["--label-fraction", "0.2"], ["--seeds", "0", "1"], ["--skip-leaks"], ["--eta", "0.5"]):
            other = parse(["reproduce", "--profile", profile, "--dataset", dataset, *options, *changes]).make()
            assert other.results.parent == run.results.parent and other.results.name != dataset
    assert Run("small", "kather2016-grey64").place != "kather2016-grey64"  # the preset made none of the tables


def test_a_plan_reads_the_committed_records(monkeypatch):
    for kind in ("RESULTS", "FIGURES"):
        monkeypatch.delenv(f"HISTODIFFUSION_{kind}_PATH", raising=False)
    assert "reconstruction" in " ".join(p.name for p in (ROOT / "results").rglob("*.provenance.json"))  # of no stage
    assert measured_seconds("small")["table_1"] > 0


def test_every_run_has_a_folder_of_its_own(results):
    changes = [{}, dict(label_fraction=0.2), dict(label_fraction=0.3), dict(overrides={"seeds": [0]}),
               dict(overrides={"seeds": [0, 1, 2]}), dict(pretrain_sets=["phantom:kyoto"]), dict(skip_corrupt=True),
               dict(overrides={"ablation_labels": [0.2]}), dict(overrides={"eta": 0.5}), dict(dataset="phantom:kyoto"),
               dict(overrides={"eta": 0.5, "sampler_steps": 9, "guidance_scale": 3.5})]  # fmt: skip
    runs = [Run(**{"profile": "smoke"} | c) for c in changes]
    assert len({r.results for r in runs}) == len({r.figures for r in runs}) == len(runs)
    again = [Run(**json.loads(json.dumps(r.parameters))) for r in runs]
    assert [r.results for r in again] == [r.results for r in runs]
    assert [r.place for r in runs][:2] == ["phantom-target", again[1].place]
    assert re.fullmatch(r"phantom-target-labels-0\.2-[0-9a-f]{6}", runs[1].place)
    assert Run("smoke", overrides={"label_fraction": 0.2}).place == runs[1].place


def test_a_run_is_not_printed_as_another(results, capsys):
    run, other = Run("smoke"), Run("smoke", label_fraction=0.2)
    for made in (run, run.with_seed(1)):
        for name in STAGES:
            with stage_folder(made, name) as attempt:
                for output in STAGES[name].outputs:
                    text = "method,ratio,accuracy_mean,gain_mean,gain_ci_low,gain_ci_high\nreal,0,0.5,0,0,\n"
                    (attempt.folder / output).write_text(text)
    assert show_results(run) == 0 and "50.0%" in capsys.readouterr().out
    with pytest.raises(HistoDiffusionError, match="was not made"):
        show_results(other)
    shutil.copytree(run.results, other.results)  # the records say whose tables they are
    assert [s for s in RESULTS if other.done(s)] == ["ablation_adaptation"]  # it has label fractions of its own
