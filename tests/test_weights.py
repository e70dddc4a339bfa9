"""The weights that the repository publishes."""

import re
from pathlib import Path

import numpy as np
import pytest

from histodiffusion.app.reproduce import plan
from histodiffusion.app.share import load_prior
from histodiffusion.core import HistoDiffusionError, hash_file, read_json
from histodiffusion.data.catalogue import may_show
from histodiffusion.models.sampling import load_pipeline
from histodiffusion.study.artefacts import remove_stage
from histodiffusion.study.run import Run
from histodiffusion.study.stages import PRIOR_STAGES, STAGES, upstream_of
from histodiffusion.study.steps import diffusion, pretraining_data

WEIGHTS = Path(__file__).resolve().parent.parent / "results" / "weights"
NAMES = sorted(p.parent.name for p in WEIGHTS.glob("*/README.md"))


def test_all_weights_together_stay_small():
    assert NAMES and sum(f.stat().st_size for f in WEIGHTS.rglob("*.safetensors")) <= 16 * 2**20
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_names_every_file_by_its_checksum(name):
    listed = dict(re.findall(r"- `(.+\.safetensors)`, sha256 `(\w+)`", (WEIGHTS / name / "README.md").read_text()))
    assert listed == {str(f.relative_to(WEIGHTS / name)): hash_file(f) for f in (WEIGHTS / name).rglob("*.safetensors")}


def test_published_cards_name_an_import_that_works():
    from histodiffusion.app.share import load_prior as published

    assert published is load_prior
    assert all("load_prior" in (WEIGHTS / name / "README.md").read_text() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_are_trained_on_open_sets_only(name):
    pool = read_json(WEIGHTS / name / "diffusion" / "provenance.json")["data"]
    sets = [*pool, read_json(WEIGHTS / name / "classifier.json")["learnt_from"]]
    assert all(may_show(s) for s in sets), sets


@pytest.mark.parametrize("name", NAMES)
def test_guidance_makes_the_target_class_more_likely(name):
    prior = load_prior(name)
    free, guided = (prior.sample(per_class=2, guidance_scale=s, steps=6) for s in (0.0, 8.0))
    assert guided["images"].shape[1:3] == (64, 64) and guided["images"].dtype == np.uint8
    assert guided["confidence"].mean() > free["confidence"].mean() + 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_run_cannot_remove_published_weights(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path))
    run = Run("small", "phantom:target", overrides={"prior": name})
    assert all(run.done(s) for s in PRIOR_STAGES)
    before = sorted(WEIGHTS.rglob("*"))
    remove_stage(run, "pretraining_data")
    assert sorted(WEIGHTS.rglob("*")) == before
    with pytest.raises(HistoDiffusionError, match="leave --pretrain-sets out"):
        Run("small", "phantom:target", ["phantom:kyoto"], overrides={"prior": name})


def start_from(name, pretrain_sets=("phantom:kyoto:60",), **settings):
    settings = dict(prior=name, pretrain_patches=40, diffusion_batch=4, diffusion_lr=1e-6) | settings
    return Run("small", "phantom:target", pretrain_sets, overrides=settings)


def distance(a, b):
    return sum(float((p - q).detach().square().sum()) for p, q in zip(a.parameters(), b.parameters())) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_training_continues_from_a_published_prior(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path))
    published, nets = load_prior(name).unet, {}
    for key, settings in dict(further={"prior_steps": 2}, fresh={"prior_part": "autoencoder", "prior_steps": 2},
                           none={"prior_part": "autoencoder"}).items():  # fmt: skip
        run = start_from(name, **settings)
        pretraining_data(run)
        diffusion(run)
        assert WEIGHTS not in run.folder("diffusion").parents and run.done("autoencoder")
        nets[key] = load_pipeline(run.folder("diffusion") / "model")[1]
    norm = distance(published, nets["none"])
    assert 0 < distance(published, nets["further"]) < 1e-3 * norm
    assert 0 < distance(nets["none"], nets["fresh"]) < 1e-3 * norm


@pytest.mark.parametrize("name", NAMES)
def test_continued_training_may_change_the_prediction_type(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path))
    own = read_json(WEIGHTS / name / "diffusion" / "provenance.json")["settings"]["prediction"]
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[own]
    assert start_from(name, prior_steps=2).settings.prediction == own
    run = start_from(name, prior_steps=1, prediction=other, min_snr_gamma=0)
    pretraining_data(run)
    diffusion(run)
    assert load_pipeline(run.folder("diffusion") / "model")[1] and run.settings.prediction == other
    saved = read_json(run.folder("diffusion") / "model" / "scheduler" / "scheduler_config.json")["prediction_type"]
    assert saved == other
    with pytest.raises(HistoDiffusionError, match="was trained with prediction"):
        Run("small", "phantom:target", overrides={"prior": name, "prediction": other})


@pytest.mark.parametrize("name", NAMES)
def test_only_stages_after_the_prior_depend_on_its_continued_training(name):
    previous = Run("small", "phantom:target", overrides={"prior": name})
    follows = [s for s in STAGES if "diffusion" in upstream_of(s)]
    for settings in ({"prior_steps": 2}, {"prior_steps": 3}, {"prior_part": "autoencoder"}):
        run = start_from(name, **settings)
        changed = [s for s in STAGES if s != "pretraining_data" and run.key(s) != previous.key(s)]
        assert changed == follows, settings
        previous = run


@pytest.mark.parametrize("settings", [{}, {"prior_steps": 2}], ids=["unchanged", "continued"])
def test_no_job_of_a_plan_writes_or_waits_for_published_files(settings):
    run = (
        start_from(NAMES[0], **settings) if settings else Run("small", "phantom:target", overrides={"prior": NAMES[0]})
    )
    assert not [f for j in plan(run) for f in (*j.inputs, *j.outputs) if "weights" in Path(f).parts]


def test_continued_training_needs_a_prior_and_excludes_the_target():
    with pytest.raises(HistoDiffusionError, match="need a prior"):
        Run("small", overrides={"prior_steps": 2})
    with pytest.raises(HistoDiffusionError, match="shares its images"):
        start_from(NAMES[0], ["phantom:target:60"], prior_steps=2)
    with pytest.raises(HistoDiffusionError, match="was trained with unet_layers"):
        start_from(NAMES[0], prior_steps=2, unet_layers=3)


def test_the_import_path_of_published_model_cards_works():
    from histodiffusion import sharing

    assert sharing.load_prior is load_prior
    assert "from histodiffusion.sharing import load_prior" in (WEIGHTS / NAMES[0] / "README.md").read_text()
