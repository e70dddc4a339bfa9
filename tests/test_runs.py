"""Runs, keys and the workflow that is built from them."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from histodiffusion.app.reproduce import _launch, measured_seconds, plan
from histodiffusion.core import HistoDiffusionError, read_json
from histodiffusion.models.sampling import SCHEDULERS
from histodiffusion.study import artefacts
from histodiffusion.study.artefacts import as_made, make_stage, remove_stage, stage, stage_folder
from histodiffusion.study.profiles import PROFILES, Profile, SamplingSettings, get_profile
from histodiffusion.study.run import Run
from histodiffusion.study.stages import RESULTS, STAGES, stage_settings, upstream_of

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("pretraining_data", "autoencoder", "diffusion")


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project's folder with settings and Snakefile, in which nothing has been made."
    for name in ("settings.ini", "Snakefile"):
        shutil.copy(ROOT / name, tmp_path)
    for name in list(os.environ):
        if name.startswith("HISTODIFFUSION_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words, timeout=120):
    "Run a Python module as a command."
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=timeout)


def complete(run):
    "Leave every stage of a run as if it had been made."
    for job in plan(run):
        with stage_folder(Run(**job.parameters), job.stage) as attempt:
            for name in STAGES[job.stage].outputs:
                (attempt.folder / name).write_text("| method | accuracy |\n")


def keys(**options):
    run = Run(**{"profile": "smoke", **options})
    return {s: run.key(s) for s in STAGES}


def changed(**options):
    "Stages whose key is not that of the plain smoke run."
    plain, new = keys(), keys(**options)
    return [s for s in STAGES if plain[s] != new[s]]


def test_guidance_scale_changes_synthesis_but_not_adaptation(project):
    later = ("select", "augment", "compare", "quality", "sampling_grid", "adaptation_grid", "recommend")
    expected = {"synthesize", *later, *RESULTS}
    assert changed(overrides={"guidance_scale": 9.5}) == [s for s in STAGES if s in expected]


def test_every_setting_changes_the_stages_that_list_it_and_no_earlier_one(project):
    texts = {"prediction": "v_prediction", "classifier_mode": "clean", "selection_rule": "random", "precision": "bf16",
             "scheduler": "ddpm", "backbone": "resnet18", "stain": "macenko", "perceptual": "lpips",
             "finetune_mode": "lora", "finetune_data": "training", "oracle": "resnet18",
             "synthetic_targets": "teacher", "encoder": "timm:resnet18"}  # fmt: skip
    special = {
        "autoencoder_crop": 16,
        "teacher": ("resnet18",),
        "generators": ("gan",),
        "per_class": ("TUM=3",),
        "teacher_symmetries": 8,
        "teacher_folds": 3,
        "v_limit": 30.0,
        "condition_scale": 2.0,
        "image_size": 128,
        "min_snr_gamma": 2.5,
        "unet_attention": (True, False),
        "seeds": (30,),
        "eta": 0.35,
        "critic_weight": 0.1,
        "selection_diversity": 0.5,
        "guidance_interval": (0, 900),
        "start_time": 400,
        "critic_start": 0.3,
        "cfg_scale": 3.0,
        "augmentation_strengths": (0.5,),
        "augmentation_mixups": (0.5,),
        "ablation_labels": (0.2,),
        "ablation_schedulers": ("heun",),
        "ablation_thresholds": (0.4,),
    }
    for name, old in Profile().settings().items():
        if name in ("label_fraction", "prior", "prior_part", "prior_steps"):  # see test_weights.py for priors
            continue
        if name == "folds":  # changes the seeds too: see the next test
            continue
        like = {float: lambda v: v / 2, int: lambda v: v + 1, tuple: lambda v: tuple(2 * n for n in v)}
        value = texts.get(name) or special.get(name) or like[type(old)](old)
        expected = [s for s in STAGES if name in stage_settings(s)]
        if name == "seeds":
            first = {s for s in STAGES if STAGES[s].seeds == "first"}
            expected = [s for s in STAGES if name in stage_settings(s) or first & set(upstream_of(s))]
        assert changed(overrides={name: value}) == expected, name


def test_folds_divide_the_target_anew_and_leave_the_prior_alone(project):
    seeds = {"seeds": (0, 1, 2)}
    before, after = (keys(overrides=seeds | more) for more in ({}, {"folds": 3}))
    expected = [s for s in STAGES if "folds" in stage_settings(s)]
    assert "target_data" in expected and not {"autoencoder", "diffusion"} & {*expected}
    assert [s for s in STAGES if before[s] != after[s]] == expected


def test_two_targets_share_the_prior(project):
    labs = ("phantom:boston", "phantom:porto")
    one, two = (keys(dataset=f"phantom:{lab}", pretrain_sets=labs) for lab in ("target", "kyoto"))
    assert [s for s in STAGES if one[s] == two[s]] == list(SHARED)


def test_grey_target_has_its_own_prior(project):
    from PIL import Image

    for mode, colour in (("L", 90), ("RGB", (90, 40, 120))):
        for label in "ab":
            folder = project / mode / label
            folder.mkdir(parents=True)
            Image.new(mode, (64, 64), colour).save(folder / "patch.png")
    labs = ("phantom:boston",)
    grey, colour = (Run("smoke", f"folder:{project / m}", labs) for m in ("L", "RGB"))
    assert (grey.channels, colour.channels) == (1, 3)
    assert grey.key("autoencoder") != colour.key("autoencoder")


def test_seed_and_label_fraction_leave_the_prior_alone(project):
    by_seed = [s for s in STAGES if STAGES[s].per_seed]
    assert changed(seed=4) == by_seed
    assert changed(label_fraction=0.5) == [s for s in STAGES if set(by_seed) & set(upstream_of(s))]


def test_data_that_changes_makes_new_keys(project):
    from PIL import Image

    for label in "ab":
        (project / "set" / label).mkdir(parents=True)
        Image.new("L", (64, 64), 9).save(project / "set" / label / "1.png")
    run = lambda: Run("smoke", f"folder:{project / 'set'}", ("phantom:boston",))  # noqa: E731
    before = run().key("target_data")
    Image.new("L", (64, 64), 9).save(project / "set" / "a" / "2.png")
    assert run().key("target_data") != before


def test_parameters_survive_json(project):
    run = Run("small", "phantom:kyoto", label_fraction=0.2, seed=3, overrides={"unet_channels": (32, 64, 64)})
    again = Run(**json.loads(json.dumps(run.parameters)))
    assert again.parameters == run.parameters and again.settings == run.settings


def test_presets_are_valid():
    assert [get_profile(name).name for name in PROFILES] == ["smoke", "small", "quick", "gpu", "paper"]
    for name, p in PROFILES.items():
        for dataset, wanted in p.expected.items():
            run = Run(name, dataset, wanted.sets or None, overrides=wanted.overrides)
            methods = {m.split("@")[0] for m in wanted.accuracy}
            ratios = {float(m.split("@")[1]) for m in wanted.accuracy} - {0}
            assert methods <= {"real", "histodiffusion_selected"} and ratios <= {
                *run.settings.ratios,
                run.settings.ratio,
            }
            assert all(0 < value < 1 and 0 < tolerance < 0.1 for value, tolerance in wanted.accuracy.values())


def test_samplers_of_the_settings_are_those_of_the_library():
    with pytest.raises(HistoDiffusionError, match=", ".join(f"'{name}'" for name in list(SCHEDULERS)[:-1])):
        get_profile(scheduler="no-such")
    assert SamplingSettings().scheduler in SCHEDULERS


def test_shared_stages_do_not_see_the_seed(project):
    assert as_made(Run("smoke", seed=3), "diffusion").seed == 0
    assert as_made(Run("smoke", seed=3), "adapt").seed == 3


class Recorder:
    "Settings that note which of them are read."

    def __init__(self, settings, names):
        self.__dict__.update(own=settings, names=names)

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.own, name)


@pytest.fixture
def read(monkeypatch):
    "Stage -> names of the settings that it reads while it is made."
    found, plain = {}, artefacts.as_made

    def recorded(run, name):
        made = plain(Run(**run.parameters), name)
        vars(made)["settings"] = Recorder(made.settings, found.setdefault(name, set()))
        return made

    monkeypatch.setenv("HISTODIFFUSION_PROGRESS", "off")
    monkeypatch.setattr(artefacts, "as_made", recorded)
    return found


def uncovered(read):
    "Settings that stages have read and that their keys do not cover."
    everywhere = {"prior", "prior_part", "prior_steps", "seeds", "settings"}  # they say where other stages are
    everywhere |= {"folds"}  # the check for leakage asks which patches are tested
    extra = {name: names - stage_settings(name) - everywhere for name, names in read.items()}
    return {name: names for name, names in extra.items() if names}


def test_stages_read_only_the_settings_that_their_keys_cover(project, read):
    tiny = dict(pretrain_patches=90, autoencoder_steps=2, diffusion_steps=2, finetune_steps=2, classifier_steps=2,
                sampler_steps=2, samples_per_class=2, backbone_steps=2, teacher_steps=2, oracle_steps=2, seeds=[0],
                selection_rule="confidence", selection_threshold=.01)  # fmt: skip
    run = Run("smoke", "phantom:target:180", overrides=tiny)
    for name in ("table_3", "quality", "compare", "sampling_grid", "adaptation_grid", "safety", "figure_2"):
        make_stage(run, name)
    assert uncovered(read) == {}
    assert "autoencoder_steps" in read["autoencoder"] and len(read) > 10


def test_a_setting_that_a_key_does_not_cover_would_be_found(project, read):
    @stage("target_data")
    def target_data(run, folder):
        return dict(images=run.settings.image_size, steps=run.settings.guidance_scale)

    target_data(Run("smoke"))
    assert uncovered(read) == {"target_data": {"guidance_scale"}}


def test_a_changed_run_forgets_what_the_first_computed_and_another_seed_shares_it(project):
    run = Run("smoke")
    before = run.key("synthesize")
    assert replace(run, overrides=dict(guidance_scale=9.0)).key("synthesize") != before == run.key("synthesize")
    assert run.with_seed(1).facts is run.facts


def test_a_stage_is_made_where_locks_do_not_work(project, monkeypatch, capsys):
    def no_locks(lock, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    @stage("target_data")
    def target_data(run, folder):
        return {}

    monkeypatch.setattr(artefacts.FileLock, "acquire", no_locks)
    target_data(Run("smoke"))
    assert Run("smoke").done("target_data")
    assert "locks do not work here (No locks available): let one process at a time" in capsys.readouterr().out


def test_every_stage_has_a_function_and_a_notebook():
    import importlib

    for s in STAGES.values():
        assert callable(getattr(importlib.import_module(f"histodiffusion.study.{s.module}"), s.name)), s.name
        nb = nbformat.read(ROOT / s.notebook, as_version=4)
        given = [c.source for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
        assert len(given) == 1 and given[0].startswith("run = {}"), s.notebook
        assert any("Run(**run)" in c.source for c in nb.cells), s.notebook


def test_stage_is_made_once_and_names_what_is_missing(project):
    made = []

    @stage("pretraining_data")
    def pool(run, folder):
        made.append(run.settings.pretrain_patches)

    @stage("autoencoder")
    def autoencoder(run, folder):
        made.append("autoencoder")

    run = Run("smoke")
    with pytest.raises(HistoDiffusionError, match="'histodiffusion pretrain --profile smoke"):
        autoencoder(run)
    assert pool(run) == pool(run)
    assert made == [run.settings.pretrain_patches]


def test_failed_stage_keeps_its_files_and_its_time(project):
    run = Run("smoke")
    with pytest.raises(ValueError, match="bug"), stage_folder(run, "pretraining_data") as a:
        (a.folder / "checkpoint").write_text("half")
        time.sleep(0.1)
        raise ValueError("bug")
    assert not run.done("pretraining_data")
    with stage_folder(run, "pretraining_data") as a:
        assert (a.folder / "checkpoint").exists()
    assert read_json(a.folder / "provenance.json")["seconds"] >= 0.1


def test_full_disk_is_one_sentence(project):
    with pytest.raises(HistoDiffusionError, match="free some space"), stage_folder(Run("smoke"), "target_data"):
        raise OSError(28, "No space left on device")


def test_provenance_is_complete_outside_git(project):
    run = Run("smoke", seed=1)
    with stage_folder(run, "adapt"):
        pass
    record = read_json(run.record("adapt"))
    assert (record["seed"], record["commit"], record["key"]) == (1, "unknown", run.key("adapt"))
    assert {"torch", "diffusers", "timm", "accelerate", "numpy", "scikit-learn", "python"} <= set(record["versions"])
    assert set(record["data"]) == {"phantom:target", *run.sets}


def test_removing_a_stage_removes_what_follows(project):
    run = Run("smoke")
    complete(run)
    remove_stage(run, "synthesize")
    undone = [j.name for j in plan(run) if not j.done]
    expected = [s for s in STAGES if "synthesize" in upstream_of(s)]
    assert sorted(undone) == sorted(f"{s}_{run.seed}" if STAGES[s].per_seed else s for s in expected)


def test_expected_time_is_what_was_measured(project):
    run = Run("smoke")
    assert "diffusion" not in measured_seconds("smoke")
    with stage_folder(run, "diffusion"):
        time.sleep(0.2)
    assert 0.2 <= measured_seconds("smoke")["diffusion"] < 10


def test_planning_does_not_import_torch(project):
    code = ("import sys; import histodiffusion.app.cli as c; c.main(['reproduce', '--profile', 'smoke', '--dry-run']);"
            "print([m for m in ('torch', 'diffusers', 'timm') if m in sys.modules])")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.splitlines()[-1] == "[]", said.stderr


def test_workflow_has_every_job_of_the_plan(project):
    for s in STAGES.values():
        assert s.notebook == f"nbs/experiments/{s.name}.ipynb"
    said = call("snakemake", "-n", "--cores", "2", "--config", "profile=smoke")
    assert said.returncode == 0, said.stderr
    table = said.stdout + said.stderr
    for job in plan(Run("smoke")):
        assert re.search(rf"^{job.name}\s+1$", table, re.MULTILINE), job.name


def test_workflow_reruns_only_what_a_parameter_touches(project):
    complete(Run("smoke"))
    config = project / "config.json"
    config.write_text(json.dumps(Run("smoke", overrides={"selection_threshold": 0.6}).parameters))
    said = call("snakemake", "-n", "--cores", "2", "--rerun-triggers", "mtime", "params", "--configfile", str(config),
                "--forcerun", "table_1", "figure_2")  # fmt: skip
    rules = set(re.findall(r"^rule (\w+):", said.stdout + said.stderr, re.MULTILINE)) - {"all"}
    seeds = get_profile("smoke").seeds
    touched = [s for s in STAGES if "selection_threshold" in stage_settings(s)]
    assert "baselines" not in touched and "synthesize" not in touched
    touched = {*touched, *RESULTS}  # tables and figures have a folder of their own
    assert rules == {name for s in touched for name in ([f"{s}_{n}" for n in seeds] if STAGES[s].per_seed else [s])}


def test_second_reproduce_does_nothing_and_is_quick(project):
    complete(Run("smoke"))
    before = {p: p.stat().st_mtime_ns for p in project.rglob("*")}
    start = time.time()
    said = call("histodiffusion.app.cli", "reproduce", "--profile", "smoke")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("Nothing to do: all ")
    assert time.time() - start < 10
    assert {p: p.stat().st_mtime_ns for p in project.rglob("*")} == before


def test_what_snakemake_says_is_shown_where_no_notebook_failed(project, capsys):
    run = Run("smoke")
    assert _launch(run, plan(run), "no-number") == 1
    err = capsys.readouterr().err
    log = project / "results" / "logs" / "snakemake-smoke-phantom-target.log"
    assert err.startswith(f"histodiffusion: no notebook was run, because Snakemake stopped; the end of {log}:\n")
    assert "Error parsing number of cores" in err


def test_braces_in_a_path_are_one_sentence_and_in_the_project_they_do_no_harm(project, monkeypatch):
    inner = project / "a{b}c"
    inner.mkdir()
    monkeypatch.chdir(inner)
    shutil.copy(ROOT / "settings.ini", inner)
    words = ["-n", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1", "--config", "profile=smoke"]
    said = call("snakemake", *words)
    assert said.returncode == 0, said.stderr
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(project / "x{y}"))
    said = call("histodiffusion.app.cli", "reproduce", "--profile", "smoke")
    assert said.returncode == 2 and "choose folders without { and } for results" in said.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("body, code, sentence", [
    ("1/0", 1, "failed in cell [3] `1/0`: ZeroDivisionError: division by zero"),
    ("from histodiffusion.core import HistoDiffusionError\nraise HistoDiffusionError('Add patches.')", 2,
     "histodiffusion: Add patches."),
])  # fmt: skip
def test_failed_notebook_is_one_line_and_an_exit_code(project, monkeypatch, body, code, sentence):
    folder = project / "nbs" / "experiments"
    folder.mkdir(parents=True)
    cells = [nbformat.v4.new_code_cell("run = {}", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(body)]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    for name in ("pretraining_data", "target_data"):
        nb = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(nb, folder / f"{name}.ipynb")
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "no-such-profile")  # a user's, which is not for this
    monkeypatch.setenv("HOME", "/proc/nobody")  # cannot be written
    said = call("histodiffusion.app.cli", "reproduce", "--cores", "1")
    assert said.returncode == code, said.stderr
    assert sentence in said.stdout
    assert "Traceback" not in said.stdout + said.stderr
