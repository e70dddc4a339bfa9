"""The weights that the repository publishes."""

import re
from pathlib import Path

import numpy as np
import pytest

from histodiffusion.audit import may_show
from histodiffusion.core import HistoDiffusionError, hash_file, read_json
from histodiffusion.runs import PRIOR_STAGES, Run, forget
from histodiffusion.sharing import load_prior

WEIGHTS = Path(__file__).resolve().parent.parent / "results" / "weights"
NAMES = sorted(p.parent.name for p in WEIGHTS.glob("*/README.md"))


def test_all_weights_together_stay_small():
    assert NAMES and sum(f.stat().st_size for f in WEIGHTS.rglob("*.safetensors")) <= 16 * 2**20
    assert not [f for f in WEIGHTS.rglob("*") if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


@pytest.mark.parametrize("name", NAMES)
def test_the_card_names_every_file_by_its_checksum(name):
    told = dict(re.findall(r"- `(.+\.safetensors)`, sha256 `(\w+)`", (WEIGHTS / name / "README.md").read_text()))
    assert told == {str(f.relative_to(WEIGHTS / name)): hash_file(f) for f in (WEIGHTS / name).rglob("*.safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_learnt_from_open_sets_alone(name):
    pool = read_json(WEIGHTS / name / "diffusion" / "provenance.json")["data"]
    learnt = [*pool, read_json(WEIGHTS / name / "classifier.json")["learnt_from"]]
    assert all(may_show(s) for s in learnt), learnt


@pytest.mark.parametrize("name", NAMES)
def test_guidance_makes_the_wanted_class_more_likely(name):
    prior = load_prior(name)
    free, guided = (prior.sample(per_class=2, guidance_scale=s, steps=6) for s in (0.0, 8.0))
    assert guided["images"].shape[1:3] == (64, 64) and guided["images"].dtype == np.uint8
    assert guided["confidence"].mean() > free["confidence"].mean() + 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_starts_from_published_weights_cannot_remove_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path))
    run = Run("small", "phantom:target", overrides={"prior": name})
    assert all(run.done(s) for s in PRIOR_STAGES)
    before = sorted(WEIGHTS.rglob("*"))
    forget(run, "pretraining_data")
    assert sorted(WEIGHTS.rglob("*")) == before
    with pytest.raises(HistoDiffusionError, match="leave --pretrain-sets out"):
        Run("small", "phantom:target", ["phantom:kyoto"], overrides={"prior": name})
