"""Real patches from the data mirror go through loading, splitting and the pool; skipped, saying so, without it."""

import numpy as np
import pytest

from histodiffusion.core import HistoDiffusionError, load_settings
from histodiffusion.data.patches import (
    dataset_classes,
    labelled_fraction,
    load_patches,
    packed_dataset,
    split_patches,
)
from histodiffusion.data.pool import default_pretraining, unlabelled_pool

mirror = load_settings().data_mirror
needs_mirror = pytest.mark.skipif(
    mirror is None or not (mirror / "kather2016-grey64").is_dir(),
    reason="needs the data mirror: set HISTODIFFUSION_DATA_MIRROR",
)


@pytest.mark.mirror
@needs_mirror
def test_kather_is_whole_and_grey():
    patches = load_patches("kather2016-grey64")
    assert patches.images.shape == (5000, 64, 64, 1)
    assert set(patches.counts().values()) == {625}


@pytest.mark.mirror
@needs_mirror
def test_splits_share_no_patch_and_five_percent_reaches_every_class():
    patches = load_patches("kather2016-grey64")
    split = split_patches(patches.keys)
    keys = {name: {patches.keys[i] for i in indices} for name, indices in split.items()}
    assert not keys["train"] & keys["test"] and not keys["train"] & keys["validation"]
    train = patches.subset(split["train"])
    few = labelled_fraction(train.labels, train.keys, 0.05, 0, train.classes)
    counts = np.bincount(train.labels[few], minlength=8)
    assert counts.min() >= 15 and counts.max() <= 23


@pytest.mark.mirror
@needs_mirror
def test_pool_takes_from_every_set_and_leaves_the_target_out():
    sets = default_pretraining("kather2016-grey64")
    assert not any(s.startswith("kather2016") for s in sets)
    pool, origin = unlabelled_pool(sets, 120, channels=1)
    assert set(origin) == set(range(len(sets))) and pool.std() > 20


@pytest.mark.mirror
@needs_mirror
def test_tiff_of_nct_crc_loads_in_nine_classes():
    patches = load_patches("nct-crc-he", size=96)
    assert len(patches) == 11 and len(patches.classes) == 9 and patches.images.shape[1:] == (96, 96, 3)


@pytest.mark.mirror
@needs_mirror
def test_the_unlabelled_folder_of_pcam_is_no_class():
    assert dataset_classes("pcam") == ("metastasis", "no_metastasis")
    packed = packed_dataset("pcam")
    assert len(packed) == 9767 and np.bincount(packed.labels + 1)[0] == 6


def test_a_missing_mirror_is_one_sentence(monkeypatch):
    monkeypatch.delenv("HISTODIFFUSION_DATA_MIRROR", raising=False)
    with pytest.raises(HistoDiffusionError, match="set HISTODIFFUSION_DATA_MIRROR"):
        load_patches("pcam")
