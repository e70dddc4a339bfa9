"""Few patches of few patients with all their labels: cross-validation, and more labels later."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histodiffusion.app.cli import main
from histodiffusion.core import read_table
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.study.run import Run

CLASSES = {"DEB": 2, "STR": 7, "TUM": 8}
TINY = dict(
    image_size=32, pretrain_patches=90, autoencoder_channels=[8, 16], autoencoder_steps=8, unet_channels=[16, 32],
    diffusion_steps=6, diffusion_batch=16, finetune_steps=3, classifier_steps=4, classifier_batch=16, sampler_steps=2,
    samples_per_class=6, backbone_steps=6, backbone_batch=16, teacher_steps=6, encoder_steps=2, oracle_steps=6,
    perceptual_weight=0.0, ratios=[1.0], selection_rule="random")  # fmt: skip


@pytest.fixture
def clinic(tmp_path, monkeypatch):
    "165 patches of 16 patients, as a folder with a table; its home."
    for name in ("data_home", "results_path", "figures_path"):
        monkeypatch.setenv(f"HISTODIFFUSION_{name.upper()}", str(tmp_path / "own" / name))
    monkeypatch.setenv("HISTODIFFUSION_PROGRESS", "off")
    names, rows = [*CLASSES], []
    labels = np.arange(165) % 3
    for i, image in enumerate(phantom_patches([CLASSES[names[k]] for k in labels], seed=3, size=32)):
        path = tmp_path / "clinic" / names[labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        rows.append(dict(file=f"{names[labels[i]]}/{i}.png", patient=f"P{i % 16}"))
    pd.DataFrame(rows).to_csv(tmp_path / "clinic/manifest.csv", index=False)
    return tmp_path


def run_of(home, **more):
    return Run("smoke", f"folder:{home}/clinic", ["phantom:kyoto:90"], 1.0, overrides=TINY | more)


def data_of(home):
    return ["--dataset", f"folder:{home}/clinic", "--pretrain-sets", "phantom:kyoto:90"]


@pytest.mark.slow
def test_all_labels_of_few_patients_are_cross_validated(clinic, capsys):
    words = []
    for name, value in TINY.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    options = [*data_of(clinic), "--profile", "smoke", "--label-fraction", "1", "--folds", "3", *words]
    assert main(["data", *options, "--dry-run"]) == 0
    assert main(["evaluate", *options]) == 0, capsys.readouterr().err
    run = run_of(clinic, folds=3)
    report, table = (run.results / "report.md").read_text(), read_table(run.results / "table_1.csv")
    assert "over 3 folds (patients or slides stay together), widened" in report
    assert "Not measured: `upper_bound_pseudo_labels`, `upper_bound_true_labels`, because all training labels" in report
    row = table[table.method == "histodiffusion_selected"].iloc[0]
    assert row.n_seeds == 3 and row.gain_ci_low <= row.gain_mean <= row.gain_ci_high and not np.isnan(row.gain_p)
    splits = read_table(run.results / "splits.csv")
    assert len(splits) == 165 and (splits.groupby("group").split.nunique() == 1).all() and splits.group.nunique() == 16
    assert {len(s.split()) for s in splits.labelled_by} == {1}  # of three folds a patch trains in one
    assert read_table(run.results / "gain_by_class.csv").patches.sum() == 165  # each was tested once
    assert "Use `" in report and (run.folder("recommend") / "model/config.json").is_file()


def test_few_patches_are_told_of_cross_validation(clinic, capsys):
    assert main(["data", *data_of(clinic), "--folds", "4"]) == 0
    said = capsys.readouterr().out
    assert "4 folds, each patch tested once; shown is fold 0; 16 patients group 165 patches" in said
    from histodiffusion.study.checks import check_run

    assert any("--folds 5 would test each of them once" in w for w in check_run(run_of(clinic)))
    assert not any("--folds" in w for w in check_run(run_of(clinic, folds=5)))


@pytest.mark.parametrize("words, found", [
    (["--folds", "2"], "folds must be 0, or 3 or more"), (["--folds", "17"], "give --folds 16 or fewer"),
    (["--folds", "3", "--seeds", "0", "1"], "seeds must fall on all folds equally often, such as 0 1 2")])  # fmt: skip
def test_folds_that_cannot_be_are_one_sentence(clinic, capsys, words, found):
    assert main(["data", *data_of(clinic), *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and found in said


def test_further_labels_start_from_the_same_prior(clinic):
    before = [run_of(clinic).key(stage) for stage in ("diffusion", "target_data", "adapt")]
    for i, image in enumerate(phantom_patches([2] * 5, seed=9, size=32)):
        Image.fromarray(image).save(clinic / "clinic/DEB" / f"new-{i}.png")
    after = [run_of(clinic).key(stage) for stage in ("diffusion", "target_data", "adapt")]
    assert [a == b for a, b in zip(before, after)] == [True, False, False]
