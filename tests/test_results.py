"""The committed results are complete, have provenance, and agree with README.md and the profiles."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from histodiffusion.study.profiles import PROFILES
from histodiffusion.study.stages import STAGES
from histodiffusion.study.verdict import gain_sentences

RESULTS = Path(__file__).resolve().parent.parent / "results"
SETS = sorted(RESULTS / name / dataset for name, p in PROFILES.items() for dataset in p.expected if name != "smoke")


@pytest.fixture(params=SETS, ids=lambda p: f"{p.parent.name}-{p.name}")
def folder(request):
    return request.param


def selected(table, ratio):
    return table[(table.method == "histodiffusion_selected") & (table.ratio == ratio)].iloc[0]


def interval(row):
    "The interval of a gain; nothing for one seed, which gives none."
    low, high = 100 * row.gain_ci_low, 100 * row.gain_ci_high
    return "" if row.n_seeds == 1 else f"{low:.1f} to {high:.1f}"


def test_every_table_is_there_with_provenance(folder):
    for name in [s for s in STAGES if STAGES[s].folder == "results"]:
        record = json.loads((folder / f"{name}.provenance.json").read_text())
        assert len(record["commit"]) == 40 and not record["dirty"] and record["seconds"] > 0, name
        assert {"torch", "diffusers", "timm"} <= set(record["versions"]) and record["data"], name
        assert record["seeds"] or STAGES[name].seeds == "first", name
        assert all((folder / output).stat().st_size for output in STAGES[name].outputs), name


def test_table_1_sums_up_its_seeds(folder):
    seeds, table = pd.read_csv(folder / "table_1_seeds.csv"), pd.read_csv(folder / "table_1.csv")
    by = ["method", "ratio", "label_fraction"]
    mean = seeds.groupby(by).accuracy.mean()
    assert set(map(tuple, table[by].itertuples(index=False))) == set(mean.index)
    for row in table.itertuples():
        assert row.accuracy_mean == pytest.approx(mean[row.method, row.ratio, row.label_fraction], abs=1e-9)
    assert set(seeds.groupby(by).seed.nunique()) == {table.n_seeds.iloc[0]}


def test_report_says_what_the_table_says(folder):
    text, table = (folder / "report.md").read_text(), pd.read_csv(folder / "table_1.csv")
    if "validation_accuracy_mean" not in table:  # of an earlier version, whose report had other sentences
        row = selected(table, 1.0)
        low, high = 100 * row.gain_ci_low, 100 * row.gain_ci_high
        assert f"{100 * row.gain_mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})" in text
        return
    for line in gain_sentences(table, 1.0):
        assert line in text


def test_readme_says_what_the_tables_say(folder):
    table = pd.read_csv(folder / "table_1.csv")
    readme, summary, log = ((RESULTS / p).read_text() for p in ("../README.md", "README.md", "LOG.md"))
    log = re.sub(r"\s+", " ", log)
    real = table[table.method == "real"].iloc[0]
    paragraph = next(p for p in readme.split("\n\n") if p.startswith(f"On `{folder.name}`"))
    paragraph = re.sub(r"\s+", " ", paragraph)
    assert f"{100 * real.accuracy_mean:.1f} %" in paragraph
    for ratio in {1.0, 3.0} & set(table[table.method == "histodiffusion_selected"].ratio):
        row = selected(table, ratio)
        assert f"{100 * row.gain_mean:+.1f}" in paragraph and interval(row) in paragraph
        assert interval(row) in summary and interval(row) in log


def test_profiles_expect_what_was_measured(folder):
    table = pd.read_csv(folder / "table_1.csv")
    expected = PROFILES[folder.parent.name].expected[folder.name]
    for name, (value, _) in expected.accuracy.items():
        method, ratio = name.split("@")
        found = table[(table.method == method) & (table.ratio == float(ratio))].accuracy_mean.iloc[0]
        assert value == pytest.approx(found, abs=6e-4), name
