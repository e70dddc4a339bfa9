"""Methods are tested once, results are remade by seed, and the report says what the tables say."""

import shutil

import numpy as np
import pandas as pd
import pytest

from histodiffusion.app.reproduce import plan
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.measure.figures import figure_2
from histodiffusion.measure.image_metrics import nearest_neighbours
from histodiffusion.measure.statistics import classification_metrics
from histodiffusion.study import steps
from histodiffusion.study.ablate import variant
from histodiffusion.study.artefacts import stage_folder
from histodiffusion.study.run import Run
from histodiffusion.study.stages import RESULTS, STAGES


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path / "results"))
    monkeypatch.setenv("HISTODIFFUSION_FIGURES_PATH", str(tmp_path / "figures"))
    return tmp_path


def pretend(run):
    "Folders and provenance of every job, as if all had been made."
    for job in plan(run):
        with stage_folder(Run(**job.parameters), job.stage) as attempt:
            for output in STAGES[job.stage].outputs:
                (attempt.folder / output).write_text("x")


def test_a_deleted_result_of_one_seed_is_all_that_is_made_anew(home):
    run = Run("smoke")
    pretend(run)
    assert all(j.done for j in plan(run))
    shutil.rmtree(run.with_seed(1).folder("augment"))
    assert [j.name for j in plan(run) if not j.done] == ["augment_1"]


def test_another_seed_leaves_the_others_as_they_are(home):
    pretend(Run("smoke"))
    more = Run("smoke", overrides=dict(seeds=[0, 1, 2]))
    todo = [j for j in plan(more) if not j.done]
    assert {j.name for j in todo if STAGES[j.stage].per_seed} == {f"{s.name}_2" for s in STAGES.values() if s.per_seed}
    shared = [s for s in STAGES if s in {"recommend", *RESULTS}]  # the results in a folder of their own
    assert [j.stage for j in todo if not STAGES[j.stage].per_seed] == shared


def test_a_method_is_tested_once_and_a_stopped_stage_goes_on(home):
    run = Run("smoke", "phantom:target:180", ["phantom:kyoto:9"])
    steps.target_data(run)
    test, validation, asked = steps.read_split(run, "test"), steps.read_split(run, "validation"), []

    def answer(images):
        asked.append(len(images))
        return np.eye(9)[np.concatenate([test.labels, validation.labels])] * 0.6 + 0.4 / 9

    def stop(images):
        raise KeyboardInterrupt

    methods = {("real", 0.0): steps.Method(posteriors=answer), ("gan", 1.0): steps.Method(posteriors=stop, added=7)}
    with pytest.raises(KeyboardInterrupt):
        steps.measure_methods(run, home, methods)
    steps.measure_methods(run, home, methods | {("gan", 1.0): steps.Method(posteriors=answer, added=7)})
    assert asked == [len(test) + len(validation)] * 2  # `real` was not asked again
    rows = pd.read_csv(home / "rows.csv")
    assert rows.method.tolist() == ["real", "gan"] and (rows.accuracy == 1).all() and rows.added.tolist() == [0, 7]
    assert (rows.validation_accuracy == 1).all()
    assert rows.ece[0] == pytest.approx(classification_metrics(test.labels, answer(test.images)[: len(test)])["ece"])


def test_variants_share_what_they_do_not_change():
    run = Run("smoke")
    wider = variant(run, ratios=[1.0, 2.0])
    assert wider.key("synthesize") == run.key("synthesize") and wider.key("augment") != run.key("augment")
    few = variant(run, label_fraction=0.5)
    assert few.key("diffusion") == run.key("diffusion") and few.key("adapt") != run.key("adapt")
    one = variant(run, pretrain_sets=run.sets[:1])
    assert one.key("real_only") == run.key("real_only") and one.key("autoencoder") != run.key("autoencoder")


def test_neighbours_are_the_nearest_by_angle():
    known = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    distance, i = nearest_neighbours(np.array([[9.0, 1.0], [-0.1, 5.0]]), known)
    assert i.tolist() == [0, 1] and distance**2 / 2 == pytest.approx([1 - 9 / 82**0.5, 1 - 5 / 25.01**0.5])


def test_figure_2_needs_no_real_patch_where_they_may_not_be_shown():
    drawn = {c: phantom_patches([k], size=32) for k, c in enumerate("ab")}
    assert figure_2({}, {"selected": drawn}, ("a", "b")).axes
