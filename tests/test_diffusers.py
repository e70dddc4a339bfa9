"""What is saved here opens with plain diffusers, in a process that never imports this project."""

import json
import subprocess
import sys

import torch

from histodiffusion.models.autoencoder import build_autoencoder
from histodiffusion.models.diffusion import build_unet
from histodiffusion.models.latent_classifier import LatentClassifier
from histodiffusion.models.sampling import save_pipeline

PLAIN = """
import json, sys, torch
from diffusers import AutoencoderDC, DiffusionPipeline, UNet2DModel
folder = sys.argv[1]
pipe = DiffusionPipeline.from_pretrained(folder)
image = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
vae = AutoencoderDC.from_pretrained(folder, subfolder="vqvae")
print(json.dumps(dict(pipe=type(pipe).__name__, size=image.size, mode=image.mode, scale=vae.config.scaling_factor,
                      unet=float(sum(p.double().abs().sum() for p in unet.parameters())),
                      ours=any(m.startswith("histodiffusion.") for m in sys.modules))))
"""


def test_plain_diffusers_loads_and_samples(tmp_path):
    torch.manual_seed(0)
    unet = build_unet(8, widths=(16, 32), attention=(False, True))
    guide = LatentClassifier(unet, 3)
    save_pipeline(tmp_path, build_autoencoder(1, (16, 16), 4, 1), unet, guide)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    found = json.loads(done.stdout.splitlines()[-1])
    weights = float(sum(p.detach().double().abs().sum() for p in unet.parameters()))
    assert found["pipe"] == "LDMPipeline" and found["size"] == [32, 32] and found["scale"] == 1
    assert abs(found["unet"] - weights) < 1e-6 * weights
    assert not found["ours"]


def test_nothing_saved_is_a_pickle(tmp_path):
    unet = build_unet(8, widths=(16, 32), attention=(False, True))
    save_pipeline(tmp_path, build_autoencoder(1, (16, 16), 4, 1), unet)
    suffixes = {p.suffix for p in tmp_path.rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors"}
