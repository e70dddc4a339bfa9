"""The first stage: its measures find what was lost, its latents are those in the cache, and its critic joins late."""

import numpy as np
import pytest
import torch

from histodiffusion.core import HistoDiffusionError, load_tensors
from histodiffusion.data.packed import images_to_tensor
from histodiffusion.data.patches import to_grey
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.models.autoencoder import (
    AdversarialLoss,
    AutoencoderLoss,
    build_autoencoder,
    encode_patches,
    fold_deviation,
    marginal_divergence,
    psnr,
    reconstruct,
    reconstruction_quality,
    ssim,
    stain_drift,
    train_autoencoder,
)
from histodiffusion.models.training import FitConfig
from histodiffusion.study import steps as stages
from histodiffusion.study.run import Run

SIZES = dict(widths=(16, 32), latent_channels=4, layers=1)


@pytest.fixture(scope="module")
def tissue():
    "Eighteen colour patches, with room for a tint."
    return phantom_patches(np.arange(18) % 9, size=32).clip(20, 220)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_autoencoder(3, **SIZES).eval()


def short(steps, **settings):
    return FitConfig(steps, 1e-3, log_every=1, **settings)


def train(images, steps=10, folder=None, **settings):
    return train_autoencoder(
        images,
        **SIZES,
        loss=dict(batch=2, crop=16, perceptual="none"),
        folder=folder,
        config=short(steps, checkpoint_seconds=0),
        **settings,
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_a_perfect_reconstruction_loses_nothing(tissue, channels):
    images = tissue if channels == 3 else to_grey(tissue)
    quality = reconstruction_quality(images, images)
    assert {quality[k] for k in ("psnr", "psnr_p05", "psnr_p50", "psnr_p95")} == {np.inf}
    assert quality["ssim"] == pytest.approx(1, abs=1e-9)
    drift = stain_drift(images, images)
    assert set(drift.values()) == {0} and ("grey" in drift) == (channels == 1)


@pytest.mark.parametrize("tint", [(7, 0, -12), (-20, 15, 3), (0, 0, 0)])
def test_a_known_tint_is_the_drift_that_is_found(tissue, tint):
    drift = stain_drift(tissue, (tissue + np.array(tint)).astype(np.uint8))
    assert [drift[c] for c in ("red", "green", "blue")] == pytest.approx(tint, abs=1e-9)
    assert [drift[f"{c}_spread"] for c in ("red", "green", "blue")] == pytest.approx([0] * 3, abs=1e-9)


def test_half_the_light_absorbed_again_adds_stain_and_no_spread(tissue):
    drift = stain_drift(np.full_like(tissue, 200), np.full_like(tissue, 100))
    assert drift["haematoxylin"] + drift["eosin"] > 0 and drift["haematoxylin_spread"] == pytest.approx(0, abs=1e-9)


def test_a_grey_shift_is_found_and_shifts_in_both_directions_show_as_spread(tissue):
    grey = to_grey(tissue).astype(int)
    sides = np.where(np.arange(len(grey)) % 2, 6, -6).reshape(-1, 1, 1, 1)
    assert stain_drift(grey.astype(np.uint8), (grey + 4).astype(np.uint8)) == pytest.approx(dict(grey=4, grey_spread=0))
    assert stain_drift(grey.astype(np.uint8), (grey + sides).astype(np.uint8)) == pytest.approx(
        dict(grey=0, grey_spread=6)
    )


def test_ssim_does_not_mistake_dark_tissue_for_another(tissue):
    "Values below zero would change the sign of SSIM's first term; a dimmer image is still the same image."
    dark = tissue // 3
    assert ssim(dark, (dark * 0.9).astype(np.uint8)) > 0.95
    assert ssim(tissue, 255 - tissue) < 0.3


def test_psnr_of_each_patch_and_of_all_agree(tissue):
    other = (tissue + np.arange(18).reshape(-1, 1, 1, 1)).astype(np.uint8)
    each = psnr(tissue, other, each=True)
    assert each[0] == np.inf and (np.diff(each[1:]) < 0).all()
    assert psnr(tissue, other) == pytest.approx(-10 * np.log10(np.mean(10 ** (-each / 10))))


def test_quantiles_are_those_of_single_patches(tissue, network):
    quality = reconstruction_quality(tissue, back := reconstruct(network, tissue))
    each = psnr(tissue, back, each=True)
    assert [quality[f"psnr_p{q}"] for q in ("05", "50", "95")] == pytest.approx(np.sort(each)[[1, 8, 16]].tolist())


def test_a_folded_deviation_keeps_the_images(tissue, network):
    before = reconstruct(network, tissue)
    z = encode_patches(network, tissue).float()
    fold_deviation(network.cpu(), z.std((0, 2, 3)))
    after = reconstruct(network, tissue)
    assert psnr(tissue, after) == pytest.approx(psnr(tissue, before), abs=0.01)
    assert psnr(before, after) > 55
    assert torch.allclose(encode_patches(network, tissue).float().std((0, 2, 3)), torch.ones(4), atol=0.01)


def test_training_brings_latents_to_mean_zero_and_deviation_one(tissue):
    loss = dict(batch=8, crop=32, perceptual="none")
    free, held = (
        train_autoencoder(tissue, **SIZES, loss=loss | dict(kl_weight=w), config=short(80)).model for w in (0.0, 0.1)
    )
    free, held = (encode_patches(m, tissue).float().mean((0, 2, 3)).abs().max() for m in (free, held))
    assert held < 0.2 and held < free / 2


def test_the_divergence_is_that_of_gaussians():
    z = (
        torch.randn(64, 3, 32, 32) * torch.tensor([0.5, 1.0, 3.0])[:, None, None]
        + torch.tensor([0.0, 2.0, -1.0])[:, None, None]
    )
    normal = torch.distributions.Normal
    each = [
        torch.distributions.kl_divergence(normal(m, s), normal(0.0, 1.0))
        for m, s in ((0.0, 0.5), (2.0, 1.0), (-1.0, 3.0))
    ]
    assert float(marginal_divergence(z)) == pytest.approx(float(sum(each)) / 3, rel=0.02)


@pytest.mark.parametrize("start", [0.3, 0.6])
def test_the_critic_joins_after_its_share_of_the_steps(tissue, start):
    history = train(tissue, critic_weight=0.1, critic_start=start).history
    assert [r["step"] for r in history] == list(range(1, 11))
    assert [r["step"] for r in history if "critic" in r] == list(range(round(10 * start) + 1, 11))
    before, after = (([r["learning_rate"] for r in history if ("critic" in r) == joined]) for joined in (False, True))
    assert max(after) < max(before) and after[-1] < after[0]


def test_without_weight_there_is_no_critic(tissue):
    assert not any("critic" in r for r in train(tissue, critic_weight=0.0).history)


@pytest.mark.parametrize(("which", "calls"), [(AutoencoderLoss, 4), (AdversarialLoss, 1), (AdversarialLoss, 3)])
def test_a_run_stopped_in_either_part_ends_as_if_it_had_not_been(tissue, tmp_path, monkeypatch, which, calls):
    whole = train(tissue, critic_weight=0.1, folder=tmp_path / "whole")
    count, original = [], which.__call__

    def stopping(self, model, generator):
        count.append(1)
        if len(count) == calls:
            raise KeyboardInterrupt
        return original(self, model, generator)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(which, "__call__", stopping)
        train(tissue, critic_weight=0.1, folder=tmp_path / "stopped")
    resumed = train(tissue, critic_weight=0.1, folder=tmp_path / "stopped")
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs) and len(resumed.history) == len(whole.history)


def test_latents_do_not_depend_on_the_batch_and_are_those_of_encode(tissue, network):
    device = next(network.parameters()).device
    with torch.no_grad():
        z = network.encode(images_to_tensor(tissue).to(device)).latent.cpu()
    for size in (5, 64):
        assert torch.allclose(encode_patches(network, tissue, size).float(), z, atol=2e-3)


def test_the_cache_contains_the_latents_of_the_pool(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path / "results"))
    tiny = dict(
        image_size=32,
        pretrain_patches=60,
        autoencoder_channels=[8, 16],
        autoencoder_steps=3,
        perceptual_weight=0.0,
        unet_channels=[16, 32],
        diffusion_steps=2,
        diffusion_batch=4,
    )
    run = Run("smoke", "phantom:target:90", ["phantom:kyoto:90"], overrides=tiny)
    for make in (stages.pretraining_data, stages.autoencoder, stages.diffusion):
        make(run)
    cache = load_tensors(run.folder("diffusion") / "latents.safetensors")
    assert torch.equal(cache["latents"], encode_patches(stages.load_autoencoder(run), stages.read_pool(run)))


def test_an_unknown_perceptual_distance_is_named(tissue):
    with pytest.raises(HistoDiffusionError, match="use one of lite0"):
        AutoencoderLoss(tissue, perceptual="vgg")
