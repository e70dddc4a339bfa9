"""The test for copies finds known copies, and flags new patches at the expected rate."""

from pathlib import Path

import numpy as np
import pytest

from histodiffusion.core import load_settings
from histodiffusion.data.leakage import split_groups
from histodiffusion.data.patches import labelled_fraction, load_patches, split_patches
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.data.symmetries import symmetry
from histodiffusion.measure.memorisation import (
    CopyTest,
    auth_pct,
    copy_threshold,
    crossfit_share,
    data_copying,
    known_copies,
    nearest_turned,
    reconstructed,
    thumbnails,
)
from histodiffusion.models.sampling import load_pipeline

WEIGHTS = Path(__file__).resolve().parent.parent / "results" / "weights" / "open-grey-64" / "diffusion" / "model"
mirror = load_settings().data_mirror


def turned(images, seed=0):
    "Each patch in a symmetry other than the identity."
    m = np.random.default_rng(seed).integers(1, 8, len(images))
    return np.stack([symmetry(x, k, (0, 1)) for x, k in zip(images, m)])


@pytest.fixture(scope="module")
def tissue():
    "Phantom patches of all classes: 160 that a model has seen, 500 held out, 1,500 new."
    images = phantom_patches(np.random.default_rng(0).integers(9, size=2160), seed=5, size=32)
    return images[:160], images[160:660], images[660:]


def test_turned_and_blurred_copies_are_found_and_new_patches_pass(tissue):
    seen, held_out, new = tissue
    test = CopyTest(thumbnails(seen), thumbnails(held_out))
    blurred = turned(seen).reshape(-1, 16, 2, 16, 2, 3).mean((2, 4)).astype(np.uint8)
    assert test(thumbnails(turned(seen))) == 1 and test(thumbnails(blurred)) > 0.97
    assert 0 < test(thumbnails(new)) < 0.025 and test.expected == pytest.approx(5 / 501)
    assert np.isnan(test(thumbnails(new[:0])))


def test_new_patches_are_flagged_at_the_expected_rate(tissue):
    "Mean over thresholds from many random halves of the held-out patches, each tried on those that did not set it."
    seen, held_out, new = tissue
    ratio = CopyTest(thumbnails(seen), thumbnails(held_out[:2])).compare(thumbnails(np.concatenate([held_out, new])))
    rng, shares = np.random.default_rng(0), []
    for _ in range(100):
        mixed = rng.permutation(ratio["ratio"])
        threshold, expected = copy_threshold(mixed[:499])
        shares.append((mixed[499:] < threshold).mean())
    assert expected == 0.01 and np.mean(shares) == pytest.approx(0.01, abs=0.0015)
    assert np.mean([crossfit_share(rng.normal(size=499)) for _ in range(400)]) == pytest.approx(2 / 251, abs=0.001)


def test_a_copy_is_found_though_the_reference_contains_its_patch_twice(tissue):
    seen, held_out, _ = tissue
    test = CopyTest(thumbnails(np.concatenate([seen, turned(seen[:20], 1)])), thumbnails(held_out))
    assert test(thumbnails(turned(seen[:20], 2))) > 0.9


def test_neighbours_in_chunks_equal_those_of_one_product(tissue):
    a, b = thumbnails(tissue[0][:40]), thumbnails(tissue[1])
    (d, i), (e, j) = nearest_turned(a, b, 3), nearest_turned(a, b, 3, chunk=7)
    assert (i == j).all() and np.allclose(d, e, atol=1e-3) and (np.diff(d, axis=1) >= 0).all()


def test_authpct_and_c_t_tell_copies_from_new_patches(tissue):
    seen, held_out, new = tissue
    test = CopyTest(thumbnails(seen), thumbnails(held_out))
    copies, fresh = (test.compare(thumbnails(x)) for x in (turned(seen), new))
    assert auth_pct(copies) < 1 and abs(auth_pct(fresh) - auth_pct(test.held_out)) < 8
    assert data_copying(copies["distance"], test.held_out["distance"]) < -10
    assert abs(data_copying(fresh["distance"], test.held_out["distance"])) < 3


def test_c_t_is_standard_normal_without_copying():
    rng = np.random.default_rng(0)
    z = [data_copying(rng.normal(size=60), rng.normal(size=90)) for _ in range(1000)]
    assert np.mean(z) == pytest.approx(0, abs=0.1) and np.std(z) == pytest.approx(1, abs=0.07)


@pytest.mark.slow
@pytest.mark.mirror
@pytest.mark.skipif(
    mirror is None or not (mirror / "kather2016-grey64").is_dir(),
    reason="needs the data mirror: set HISTODIFFUSION_DATA_MIRROR",
)
def test_the_power_on_real_tissue():
    "151 labelled patches of kather2016-grey64 through the published first stage, as a run that memorises them."
    patches = load_patches("kather2016-grey64")
    splits = split_patches(patches.keys, split_groups("kather2016-grey64", patches.keys, patches.groups, 64))
    train, validation, new = (patches.subset(splits[s]) for s in ("train", "validation", "test"))
    labelled = train.subset(labelled_fraction(train.labels, train.keys, 0.05, 0, train.classes)).images
    autoencoder, unet, _ = load_pipeline(WEIGHTS)
    real, held_out, fresh = (reconstructed(autoencoder, x) for x in (labelled, validation.images, new.images))
    copies = known_copies(autoencoder, unet, labelled)
    row = CopyTest(real, held_out).report(fresh, copies)
    assert len(labelled) == 151 and row["power_turned"] >= 0.95
    assert 0.003 < row["share"] < 0.02 and row["false_positives"] < 0.02
    assert row["power_t100"] > 0.9 and row["power_t300"] > 0.7 and 0.1 < row["power_t500"] < 0.5
    memorised = CopyTest(real, held_out).report(copies["turned"], {})
    assert memorised["auth_pct"] == 0 and memorised["c_t"] < -10 and abs(row["c_t"]) < 3
