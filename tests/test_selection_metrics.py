"""Selection is fitted to real patches alone, and metrics are computed over the whole test set."""
import inspect

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score
from statsmodels.stats.multitest import multipletests

from histodiffusion.core import HistoDiffusionError, write_table
from histodiffusion.measure.figures import figure_2, save_figure
from histodiffusion.measure.image_metrics import frechet_distance
from histodiffusion.measure.selection import (
    RULES,
    centroid_rule,
    class_centroids,
    class_spacing,
    select_patches,
    selection_report,
    unit_features,
)
from histodiffusion.measure.statistics import (
    TABLE_COLUMNS,
    classification_metrics,
    gain_interval,
    holm,
    paired_interval,
    summarise_methods,
)


def clouds(n, classes=4, dim=8, seed=0, spread=.4):
    "Labelled features around one direction per class."
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return np.eye(classes, dim)[labels] + rng.normal(0, spread, (n, dim)), labels


def posteriors(features, centroids):
    "A softmax over distances to the centroids."
    logits = -8*np.linalg.norm(features[:, None] - centroids, axis=-1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p/p.sum(1, keepdims=True)


def evidence(n=200, seed=1):
    "Real centroids and the candidates' features, targets and posteriors."
    centroids = class_centroids(*clouds(40), 4)
    features, targets = clouds(n, seed=seed)
    p = posteriors(features, centroids)
    return targets, dict(features=features, centroids=centroids, probabilities=p, threshold=.6)


def test_centroids_never_include_synthetic_patches():
    assert list(inspect.signature(class_centroids).parameters) == ["features", "labels", "n_classes"]
    real, labels = clouds(40)
    before = class_centroids(real, labels, 4)
    targets, facts = evidence()
    select_patches(targets, [10]*4, "both", **facts)
    assert (class_centroids(real, labels, 4) == before).all()


def test_no_synthetic_patch_changes_whether_another_passes():
    targets, facts = evidence()
    alone = centroid_rule(facts["features"], targets, facts["centroids"])
    crowd = np.concatenate([facts["features"], np.tile(facts["features"][:1], (500, 1))])
    together = centroid_rule(crowd, np.concatenate([targets, np.full(500, 2)]), facts["centroids"])
    assert (together[0][:200] == alone[0]).all()
    np.testing.assert_allclose(together[1][:200], alone[1])


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=25, deadline=None)
@given(wanted=st.lists(st.integers(0, 80), min_size=4, max_size=4), seed=st.integers(0, 99))
def test_selection_takes_the_target_class_and_never_more_than_wanted(rule, wanted, seed):
    targets, facts = evidence(120, seed)
    chosen = select_patches(targets, wanted, rule, seed=seed, **facts)
    counts = np.bincount(targets[chosen], minlength=4)
    assert len(set(chosen.tolist())) == len(chosen) and (counts <= wanted).all()


@pytest.mark.parametrize("rule", ["centroid", "confidence", "both"])
def test_rejects_never_fill_up_a_class(rule):
    targets, facts = evidence()
    report = selection_report(targets, select_patches(targets, [1000]*4, rule, **facts), tuple("abcd"), **facts)
    assert (report.kept == report[f"passed_{rule}"]).all() and (report.kept < report.generated).any()


def test_the_best_come_first():
    targets, facts = evidence()
    distance = centroid_rule(facts["features"], targets, facts["centroids"])[1]
    five, ten = (select_patches(targets, {2: n}, "both", **facts) for n in (5, 10))
    assert (ten[:5] == five).all() and (np.diff(distance[ten]) >= 0).all()
    sure = select_patches(targets, {2: 10}, "confidence", **facts)
    assert (np.diff(facts["probabilities"][sure, 2]) <= 0).all()


def one_by_one(order, f, n, floor):
    "The greedy choice, written out."
    taken = []
    for i in order:
        if len(taken) < n and all(np.linalg.norm(f[i] - f[j]) >= floor for j in taken):
            taken.append(i)
    return taken


@pytest.mark.parametrize("rule", ["centroid", "confidence", "both"])
@pytest.mark.parametrize("diversity", [.3, 1., 3.])
def test_diversity_is_the_greedy_choice_and_skipped_patches_are_replaced(rule, diversity):
    targets, facts = evidence(1600)
    spacing = class_spacing(*clouds(40), 4)
    all_in_order = select_patches(targets, [1600]*4, rule, **facts)
    chosen = select_patches(targets, [150]*4, rule, diversity=diversity, spacing=spacing, **facts)
    f = unit_features(facts["features"])
    wanted = [one_by_one(all_in_order[targets[all_in_order] == k], f, 150, diversity*spacing[k]) for k in range(4)]
    assert chosen.tolist() == sum(wanted, [])
    assert diversity > .3 or (np.bincount(targets[chosen]) == 150).all()


@pytest.mark.parametrize("rule", RULES)
def test_no_diversity_is_as_before_and_random_is_never_spread_out(rule):
    targets, facts = evidence()
    before = select_patches(targets, [10]*4, rule, **facts)
    spacing = class_spacing(*clouds(40), 4)
    assert (select_patches(targets, [10]*4, rule, diversity=0., spacing=spacing, **facts) == before).all()
    if rule == "random":
        assert (select_patches(targets, [10]*4, rule, diversity=2., spacing=spacing, **facts) == before).all()


def test_ten_thousand_patches_in_one_class_leave_no_near_copies():
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(2500, 64)) + 1
    f = np.repeat(originals, 4, axis=0) + rng.normal(0, 1e-3, (10_000, 64))
    centroids = class_centroids(np.stack([np.ones(64), -np.ones(64)]), [0, 1], 2)
    passed = centroid_rule(f, np.zeros(10_000, int), centroids)[0]
    facts = dict(features=f, centroids=centroids, spacing=class_spacing(originals, np.zeros(2500, int), 1))
    chosen = select_patches(np.zeros(10_000, int), {0: 10_000}, diversity=.2, **facts)
    assert len(chosen) == len(np.unique(chosen//4)) == len(np.unique(np.flatnonzero(passed)//4))


def test_a_diversity_without_its_inputs_is_an_error():
    targets, facts = evidence()
    with pytest.raises(HistoDiffusionError, match="class_spacing"):
        select_patches(targets, [5]*4, "both", diversity=.5, **facts)
    with pytest.raises(HistoDiffusionError, match="diversity is -1"):
        select_patches(targets, [5]*4, "both", diversity=-1, **facts)
    assert (class_spacing(np.eye(3), [0, 1, 2], 3) == 0).all()


def test_a_class_without_candidates_is_reported_as_zero():
    targets, facts = evidence()
    facts = {k: v[targets != 1] if k in ("features", "probabilities") else v for k, v in facts.items()}
    targets = targets[targets != 1]
    report = selection_report(targets, select_patches(targets, [5]*4, "both", **facts), tuple("abcd"), **facts)
    assert report.loc[1, ["generated", "passed_both", "kept"]].tolist() == [0, 0, 0]


def test_metrics_are_computed_over_the_whole_test_set_not_averaged_over_batches():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 400, p=[.85, .1, .05])
    p = .5*np.eye(3)[labels] + rng.dirichlet(np.ones(3), 400)
    found = classification_metrics(labels, p)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, p.argmax(1), average="macro"))
    order = rng.permutation(400)
    assert classification_metrics(labels[order], p[order]) == pytest.approx(found)
    batches = np.mean([classification_metrics(labels[i:i + 8], p[i:i + 8])["macro_f1"] for i in range(0, 400, 8)])
    assert abs(batches - found["macro_f1"]) > .01


def test_specificity_by_hand():
    confusion = np.array([[5, 1, 0], [2, 3, 1], [0, 0, 4]])
    labels, predicted = (np.repeat([i for i in np.ndindex(3, 3)], confusion.ravel(), axis=0).T)
    by_hand = np.mean([1 - (confusion[:, k].sum() - confusion[k, k])/(16 - confusion[k].sum()) for k in range(3)])
    assert classification_metrics(labels, np.eye(3)[predicted])["specificity"] == pytest.approx(by_hand)


def runs(methods, seeds=3):
    "One row per method and seed; seeds differ by far more than methods."
    rng = np.random.default_rng(0)
    same = dict(label_fraction=.05, labelled=100, added=100, validation_accuracy=.6, macro_f1=.6,
                sensitivity=.6, specificity=.9, auroc=.9, ece=.1)
    return pd.DataFrame([dict(method=m, ratio=r, seed=s, accuracy=.6 + .1*s + g + rng.normal(0, .001), **same)
                         for m, r, g in methods for s in range(seeds)])


def test_gain_is_paired_by_seed_whatever_the_order_of_the_rows():
    rows = runs([("real", 0., 0.), ("selected", 1., .03)])
    table = summarise_methods(rows.iloc[::-1]).set_index("method")
    assert tuple(summarise_methods(rows).columns) == TABLE_COLUMNS
    assert table.gain_ci_low["selected"] > .02 and table.gain_ci_high["selected"] < .04
    assert table.loc["real", ["gain_mean", "gain_ci_low", "gain_ci_high"]].tolist() == [0, 0, 0]


def test_one_seed_has_no_interval_and_an_unpaired_seed_no_gain():
    table = summarise_methods(runs([("real", 0., 0.), ("selected", 1., .03)], seeds=1))
    assert table.gain_ci_low.isna().tolist() == [False, True] and table.gain_mean[1] == pytest.approx(.03, abs=.01)
    rows = runs([("real", 0., 0.), ("selected", 1., .03)])
    with pytest.raises(HistoDiffusionError, match="1 seed.* run 'real' at the same seeds"):
        summarise_methods(rows.drop(index=0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=20))
def test_the_interval_includes_the_mean_and_is_symmetric(differences):
    mean, low, high = paired_interval(differences, np.zeros(len(differences)))
    assert low <= mean <= high and high - mean == pytest.approx(mean - low, abs=1e-9)


def correct(rng, gain, seeds=5, patches=300, of_seeds=.02, of_patches=.3):
    "Correct predictions of two methods whose difference varies with seed, patch and both."
    d = gain + of_seeds*rng.normal(size=(seeds, 1)) + of_patches*rng.normal(size=patches)
    return d + .3*rng.normal(size=(seeds, patches)), np.zeros((seeds, patches))


def test_the_interval_of_a_gain_covers_seeds_and_patches():
    rng = np.random.default_rng(0)
    for truth in (0., .06):
        intervals = [gain_interval(*correct(rng, truth)) for _ in range(500)]
        assert .92 <= np.mean([low <= truth <= high for _, low, high, _ in intervals]) <= .985
        rejected = np.mean([p < .05 for *_, p in intervals])
        assert rejected < .08 if truth == 0 else rejected > .4


def test_the_gain_of_one_patch_per_seed_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    d = rng.normal(.1, .2, 6)
    mean, low, high, p = gain_interval(np.repeat(d[:, None], 40, 1), np.zeros((6, 40)))
    expected = stats.ttest_1samp(d, 0)
    assert p == pytest.approx(expected.pvalue) and (low, high) == pytest.approx(tuple(expected.confidence_interval()))
    assert gain_interval(np.ones((3, 5)), np.ones((3, 5))) == (0, 0, 0, 1)
    with pytest.raises(HistoDiffusionError, match="a row for each seed"):
        gain_interval([1, 0], [0, 0])


def test_the_bootstrap_of_seeds_agrees_where_patches_are_many():
    rng = np.random.default_rng(2)
    a, b = correct(rng, .02, seeds=30, patches=3000, of_seeds=.05, of_patches=0.)
    mean, low, high, _ = gain_interval(a, b)
    gains = (a - b).mean(1)
    expected = stats.bootstrap((gains,), np.mean, method="percentile", rng=rng, n_resamples=4000).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=.1*(high - low))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_equals_statsmodels(p):
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])


def test_gains_of_correct_predictions_are_adjusted_and_have_two_references():
    rng = np.random.default_rng(4)
    methods = [("real", 0., .60), ("standard_augmentation", 0., .62), ("selected", 1., .75)]
    right = {(m, r, .05, s): rng.random(400) < p for m, r, p in methods for s in range(3)}
    rows = runs([(m, r, 0.) for m, r, _ in methods])
    rows["accuracy"] = [right[k].mean() for k in zip(rows.method, rows.ratio, rows.label_fraction, rows.seed)]
    table = summarise_methods(rows, right).set_index("method")
    chosen = table.loc["selected"]
    assert 0 < chosen.gain_ci_low < chosen.gain_mean < chosen.gain_ci_high and chosen.gain_p < .05
    assert chosen.gain_std_mean == pytest.approx(chosen.gain_mean - table.gain_mean["standard_augmentation"])
    assert table.gain_std_mean["standard_augmentation"] == 0 and np.isnan(table.gain_p["real"])


def test_frechet_distance_of_exact_gaussians():
    rng = np.random.default_rng(0)
    white = rng.normal(size=(300, 5))
    white = np.linalg.qr(white - white.mean(0))[0]*np.sqrt(299)
    assert frechet_distance(white, 3*white + 2) == pytest.approx(5*(2**2 + (3 - 1)**2))
    assert frechet_distance(white, white[::-1]) == pytest.approx(0, abs=1e-9)


def test_a_table_reads_back_and_shows_missing_values(tmp_path):
    table = summarise_methods(runs([("real", 0., 0.), ("a|b", 1., .03)], seeds=1))
    csv, md = write_table(table, tmp_path/"sub"/"table_1.v2", "Gain.")
    pd.testing.assert_frame_equal(pd.read_csv(csv), table)
    text = md.read_text(encoding="utf-8")
    assert md.name == "table_1.v2.md" and "a\\|b" in text and "–" in text


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 64])
def test_figure_2_shows_patches_to_the_pixel_and_leaves_gaps_white(tmp_path, channels, size):
    from PIL import Image
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (3, size, size, channels), dtype=np.uint8)
    real, synthetic = {"tumour": patches, "stroma": patches}, {"Guidance": {"stroma": patches[:1]}}
    fig = figure_2(real, synthetic, ("stroma", "tumour"), n=2)
    pixels = np.asarray(Image.open(save_figure(fig, tmp_path/"figure_2")[1]).convert("RGB"))
    wanted = np.broadcast_to(patches[0].repeat(64//size, 0).repeat(64//size, 1), (64, 64, 3))
    windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], (64, 64))
    corner = (windows[..., 0, :] == wanted[0, :, 0]).all(-1)
    places = [(y, x) for y, x in np.argwhere(corner) if (pixels[y:y + 64, x:x + 64] == wanted).all()]
    assert len(places) == 3
