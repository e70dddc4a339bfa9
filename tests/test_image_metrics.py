"""Image metrics equal the reference implementations on the same features; column names contain the encoder."""
import contextlib
import io
import sys
import warnings

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from histodiffusion.core import HistoDiffusionError
from histodiffusion.measure.image_metrics import (
    common_count,
    frechet_distance,
    image_quality,
    kernel_distance,
    precision_recall_density_coverage,
    random_rows,
)
from histodiffusion.models.encoders import encode_images, encoder_names, load_encoder


class Identity(torch.nn.Module):
    "A feature extractor for torchmetrics that returns its input."
    num_features = 24

    def forward(self, x):
        return x


@pytest.fixture(scope="module")
def features():
    "300 real and 240 synthetic features of 24 correlated dimensions; five synthetic ones are repeated."
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(24, 24))
    real, synthetic = rng.normal(size=(300, 24)) @ mix, rng.normal(size=(240, 24)) @ (.8*mix) + .3
    synthetic[5:10] = synthetic[10:15]
    return real, synthetic


def by_torchmetrics(metric, real, synthetic):
    "Value of a torchmetrics metric for real and synthetic features."
    for f, is_real in ((real, True), (synthetic, False)):
        metric.update(torch.from_numpy(f), real=is_real)
    return metric.compute()


def test_frechet_distance_equals_torchmetrics_and_torch_fidelity(features):
    ours = frechet_distance(*features)
    metric = FrechetInceptionDistance(feature=Identity()).set_dtype(torch.float64)
    assert ours == pytest.approx(float(by_torchmetrics(metric, *features)), rel=1e-3)
    statistics = [fid_features_to_statistics(torch.from_numpy(f)) for f in features]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_kernel_distance_equals_torchmetrics_and_torch_fidelity(features):
    real, synthetic = features[0][:240], features[1]  # a subset of all: no random choice
    ours = kernel_distance(real, synthetic, subsets=2, subset_size=240)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics: the metric keeps all features
        metric = KernelInceptionDistance(feature=Identity(), subsets=2, subset_size=240).set_dtype(torch.float64)
    assert ours[0] == pytest.approx(float(by_torchmetrics(metric, real, synthetic)[0]), rel=1e-3)
    tensors = map(torch.from_numpy, (real, synthetic))
    theirs = kid_features_to_metric(*tensors, kid_subsets=2, kid_subset_size=240, verbose=False)
    assert ours[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours[1] == pytest.approx(0, abs=1e-9*ours[0])


def test_subsets_of_the_kernel_distance_agree_in_mean_and_spread_with_torch_fidelity(features):
    ours, other = (np.array(kernel_distance(*features, subsets=400, subset_size=60, seed=s)) for s in (0, 1))
    tensors = map(torch.from_numpy, features)
    theirs = kid_features_to_metric(*tensors, kid_subsets=400, kid_subset_size=60, verbose=False)
    assert ours[0] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=5*2**.5*ours[1]/20)
    assert ours[1] == pytest.approx(theirs["kernel_inception_distance_std"], rel=.25)
    assert (ours != other).all() and (ours == kernel_distance(*features, subsets=400, subset_size=60)).all()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_density_and_coverage_equal_prdc_exactly(features, k):
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = compute_prdc(*features, nearest_k=k)
    assert precision_recall_density_coverage(*features, k=k) == {n: float(v) for n, v in theirs.items()}


def test_limited_memory_does_not_change_the_neighbours(features):
    from sklearn import config_context
    whole = precision_recall_density_coverage(*features)
    with config_context(working_memory=.05):
        assert precision_recall_density_coverage(*features) == whole


def test_only_inception_features_are_called_fid(features):
    real, synthetic = features
    row = image_quality({"squeezenet": synthetic, "inception": synthetic}, {"squeezenet": real, "inception": real})
    assert (row["n_real"], row["n_synthetic"]) == (300, 240)
    assert row["fd_squeezenet"] == row["fid"] == frechet_distance(real, synthetic)
    assert row["kid_squeezenet"] == row["kid"] and "fid_squeezenet" not in row and "fd_inception" not in row
    precision = precision_recall_density_coverage(real, synthetic)["precision"]
    assert row["precision_squeezenet"] == row["precision_inception"] == precision


def test_too_few_patches_give_missing_values_and_mixed_features_an_error(features):
    real, synthetic = features
    row = image_quality({"squeezenet": synthetic[:5]}, {"squeezenet": real})
    assert row["n_synthetic"] == 5 and np.isnan([v for k, v in row.items() if k.endswith("squeezenet")]).all()
    for wrong in ({"inception": synthetic}, {"squeezenet": synthetic, "inception": synthetic[:9]}, {}):
        with pytest.raises(HistoDiffusionError, match="same encoders"):
            image_quality(wrong, {"squeezenet": real} if len(wrong) < 2 else {"squeezenet": real, "inception": real})
    with pytest.raises(HistoDiffusionError, match="one encoder"):
        kernel_distance(real, synthetic[:, :9])


def test_an_encoder_without_weights_names_the_remedy(monkeypatch, tmp_path):
    from torch_fidelity import feature_extractor_inceptionv3 as inception
    monkeypatch.setenv("HISTODIFFUSION_DATA_MIRROR", str(tmp_path/"data"))
    monkeypatch.delenv("HISTODIFFUSION_WEIGHTS", raising=False)
    assert encoder_names() == ("efficientnet_lite0",)
    with pytest.raises(HistoDiffusionError, match="set HISTODIFFUSION_WEIGHTS"):
        load_encoder("squeezenet")

    def offline(*a, **kw):
        raise OSError("no network")
    monkeypatch.setattr(inception, "load_state_dict_from_url", offline)
    with pytest.raises(HistoDiffusionError, match="go online once"):
        load_encoder("inception")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(HistoDiffusionError, match="pip install torch-fidelity"):
        load_encoder("inception")


def test_inception_features_are_torch_fidelitys(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as inception
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **kw: {})
    random_weights = lambda *a, **kw: None  # noqa: E731
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", random_weights)
    encoder = load_encoder("inception")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    theirs = encoder.net.net(torch.from_numpy(images).permute(0, 3, 1, 2).to(encoder.mean.device))[0]
    ours = encode_images(encoder, images)
    assert ours.shape == (2, 2048) and (ours == theirs.cpu().numpy()).all() and ours.std() > 0


@pytest.mark.mirror
def test_squeezenet_takes_patches_of_any_size_grey_or_colour():
    if "squeezenet" not in encoder_names():
        pytest.skip("the mirror has no SqueezeNet weights")
    encoder, rng = load_encoder("squeezenet"), np.random.default_rng(0)
    for shape in ((8, 8, 1), (64, 64, 3), (70, 40, 1), (150, 150, 3)):
        features = encode_images(encoder, rng.integers(0, 256, (3, *shape), dtype=np.uint8))
        assert features.shape == (3, 512) and np.isfinite(features).all() and features.std() > 0


def test_sets_of_two_sizes_from_one_distribution_are_equally_far_at_equal_numbers():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(64, 64))
    real, small, large = (rng.normal(size=(n, 64)) @ mix for n in (500, 120, 600))
    n = common_count([len(small), len(large)])
    assert n == 120 and len(random_rows(large, n)) == 120
    equal = [np.mean([frechet_distance(random_rows(f, n, s), real) for s in range(8)]) for f in (small, large)]
    unequal = [frechet_distance(f, real) for f in (small, large)]
    assert unequal[0] > 2 * unequal[1] and equal[0] == pytest.approx(equal[1], rel=0.1)


def test_a_set_that_is_far_too_small_does_not_lower_the_common_number():
    assert common_count([480, 120, 3]) == 120 and common_count([0, 0]) == 0 and common_count([]) == 0
    assert len(random_rows(np.zeros((3, 4)), 120)) == 0 and len(random_rows(np.zeros((3, 4)), None)) == 3
    chosen = random_rows(np.arange(1000), 100)
    assert len(np.unique(chosen)) == 100 and (chosen == random_rows(np.arange(1000), 100)).all()
