"""A short run at the sizes that patches have: first stage, prior, GAN, backbone and classifier."""

import numpy as np
import pytest

from histodiffusion.core import load_tensors, read_table
from histodiffusion.study.artefacts import make_stage
from histodiffusion.study.compare import read_baseline
from histodiffusion.study.profiles import get_profile
from histodiffusion.study.recommend import load_classifier
from histodiffusion.study.run import Run
from histodiffusion.study.steps import read_split, read_synthetic

SHORT = dict(pretrain_patches=24, autoencoder_channels=(8, 16), autoencoder_steps=2, autoencoder_batch=2, seeds=[0],
             unet_channels=[16, 32], diffusion_steps=2, diffusion_batch=4, finetune_steps=1, classifier_steps=2,
             classifier_batch=4, sampler_steps=2, samples_per_class=1, backbone_steps=2, backbone_batch=4,
             teacher_steps=2, encoder_steps=1, perceptual_weight=0.0, ratios=[1.0], selection_rule="random",
             augmentation_strengths=[1.0])  # fmt: skip


@pytest.mark.parametrize("size, latents", [(96, 24), (128, 32), pytest.param(224, 56, marks=pytest.mark.slow)])
def test_a_run_at_each_size(tmp_path, monkeypatch, size, latents):
    for name in ("data_home", "results_path", "figures_path"):
        monkeypatch.setenv(f"HISTODIFFUSION_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("HISTODIFFUSION_PROGRESS", "off")
    run = Run("smoke", "phantom:target:63", ["phantom:kyoto:9"], 0.5, overrides=SHORT | dict(image_size=size))
    for stage in ("augment", "baselines"):
        make_stage(run, stage)
    assert load_tensors(run.folder("diffusion") / "latents.safetensors")["latents"].shape[-1] == latents
    assert read_synthetic(run)["images"].shape[1:] == (size, size, 3)
    assert read_baseline(run, "gan")[0].shape[1:] == (size, size, 3)
    rows = read_table(run.folder("augment") / "rows.csv")
    posteriors = load_classifier(run, "histodiffusion_selected@1")(read_split(run, "test").images[:4])
    assert rows.accuracy.between(0, 1).all() and np.allclose(posteriors.sum(1), 1, atol=1e-5)


def test_the_first_stage_follows_the_size():
    for profile, size, side in (("small", 64, 16), ("small", 96, 24), ("small", 128, 16), ("small", 224, 28)):
        settings = get_profile(profile, image_size=size)
        assert size // 2 ** len(settings.autoencoder_channels) == side
    assert Run("small", overrides=dict(prior="open-grey-64")).settings.autoencoder_channels == (64, 128)
