"""Each fault of the reference code has a test here that a return of the fault would fail, named for what must hold.

Below them: schedule, loss, average and latent scale against closed forms and plain diffusers.
"""

import ast
import inspect
import re
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score

from histodiffusion.data.phantom import phantom_patches
from histodiffusion.measure.selection import class_centroids
from histodiffusion.measure.statistics import SEED_COLUMNS, TABLE_COLUMNS, classification_metrics, summarise_methods
from histodiffusion.models.autoencoder import build_autoencoder, decode_latents, encode_patches, fold_deviation
from histodiffusion.models.backbone import train_backbone
from histodiffusion.models.diffusion import DiffusionLoss, LatentSampler, build_unet, noise_schedule
from histodiffusion.models.guidance import ClassifierGuidance
from histodiffusion.models.latent_classifier import LabelledLatents, LatentClassifier, classifier_loss
from histodiffusion.models.sampling import SamplingConfig, guided_sample, make_scheduler, save_pipeline
from histodiffusion.models.training import FitConfig, ema_decay, fit
from histodiffusion.study import ablate, compare, steps
from histodiffusion.study.stages import STAGES, upstream_of

ROOT = Path(__file__).resolve().parent.parent
ABAR = np.cumprod(1 - np.linspace(0.0015, 0.0155, 1000))
FUNCTIONS = {
    f.name: f
    for module in (steps, compare, ablate)
    for f in ast.parse(inspect.getsource(module)).body
    if isinstance(f, ast.FunctionDef | ast.ClassDef)
}


def called(tree):
    "Calls in a piece of code: (name, node)."
    return [(getattr(n.func, "id", getattr(n.func, "attr", "")), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def reach(name):
    "A function of the stages and all functions there that it calls, directly or not; stages that it calls apart."
    found, todo = set(), [name]
    while todo:
        if (f := todo.pop()) not in found:
            found.add(f)
            todo += [c for c, _ in called(FUNCTIONS[f]) if c in FUNCTIONS and c not in STAGES]
    return found


def names_from(function, source):
    "Names in a function that hold what `source` gave, or something made of it."
    tainted, before = set(), None
    while tainted != before:
        before = set(tainted)
        for node in ast.walk(FUNCTIONS[function]):
            if isinstance(node, ast.Assign | ast.For | ast.comprehension):
                value = node.value if isinstance(node, ast.Assign) else node.iter
                used = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
                if used & (tainted | {source}):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    tainted |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return tainted | {source}


@pytest.mark.parametrize("steps", [7, 20, 50, 61, 150])
def test_ddim_works_at_any_number_of_steps(steps):
    scheduler, z0, noise = make_scheduler("ddim", steps), torch.tensor([[[[0.7]]]]), torch.tensor([[[[-1.3]]]])
    times = [*scheduler.timesteps.tolist(), -1]
    assert len(times) == steps + 1 and times == sorted(times, reverse=True)

    def at(t):
        a = ABAR[t] if t >= 0 else 1.0
        return a**0.5 * z0 + (1 - a) ** 0.5 * noise

    for t, later in zip(scheduler.timesteps, times[1:]):
        assert torch.allclose(scheduler.step(noise, t, at(int(t)).float()).prev_sample, at(later).float(), atol=2e-4)


def test_classifier_gets_the_noise_level():
    torch.manual_seed(0)
    unet = build_unet(8, widths=(16, 32), attention=(False, False))
    classifier, evaluated = LatentClassifier(unet, 2).eval(), []
    z = torch.randn(4, 4, 8, 8)
    assert not torch.allclose(classifier(z, 0), classifier(z, 800), atol=1e-4)
    classifier.register_forward_hook(lambda m, args, out: evaluated.append(float(args[1])))
    guided_sample(unet, [0, 1], ClassifierGuidance(classifier, 1.0), SamplingConfig(steps=5))
    assert evaluated == [999, 799, 599, 399, 199]
    trained = []
    classifier.body.register_forward_hook(lambda m, args, out: trained.append((args[0].detach(), args[1].float())))
    latents = LabelledLatents.__new__(LabelledLatents).fill(torch.zeros(8, 4, 8, 8), np.arange(8) % 2)
    classifier_loss(classifier, torch.Generator().manual_seed(0), latents, noise_schedule(), 400)
    noisy, t = trained[0]
    assert t.min() < 30 and t.max() > 970 and t.unique().numel() > 200
    assert np.allclose(noisy.std((1, 2, 3)).numpy(), (1 - ABAR[t.long().numpy()]) ** 0.5, rtol=0.3)  # 256 values


def test_centroids_never_contain_synthetic_patches():
    found = 0
    for name in FUNCTIONS:
        tainted = names_from(name, "read_synthetic")
        for function, call in called(FUNCTIONS[name]):
            if function in ("class_centroids", "class_spacing"):
                found += 1
                used = {n.id for a in [*call.args, *call.keywords] for n in ast.walk(a) if isinstance(n, ast.Name)}
                assert not used & tainted, f"{name} gives synthetic patches to {function}"
    assert found >= 2
    for name in ("teacher", "load_teacher"):  # the network whose features the centroids are of
        assert "read_labelled" in reach(name) and not reach(name) & {"read_synthetic", "chosen_patches"}
    real, labels = np.random.default_rng(0).normal(size=(40, 8)), np.arange(40) % 4
    assert (class_centroids(real, labels, 4) == class_centroids(real.copy(), labels, 4)).all()
    assert list(inspect.signature(class_centroids).parameters) == ["features", "labels", "n_classes"]


def test_guiding_classifier_is_never_trained_on_synthetic_patches():
    assert not {"synthesize", "select", "augment"} & set(upstream_of("adapt"))

    def callers(name):
        return {f for f, tree in FUNCTIONS.items() if name in {n for n, _ in called(tree)}}

    assert callers("train_classifier") == {"fit_classifier"} and callers("fit_classifier") >= {"adapt", "_train_clean"}
    for trains in callers("fit_classifier"):
        assert "read_labelled" in reach(trains) and not reach(trains) & {"read_synthetic", "chosen_patches"}, trains


def test_model_choice_never_reads_the_test_split():
    def reads_test(function):
        return any(
            name == "read_split" and any(getattr(a, "value", None) == "test" for a in call.args)
            for name, call in called(FUNCTIONS[function])
        )

    assert [f for f in FUNCTIONS if reads_test(f)] == ["measure_methods"]
    stages = [s for s in STAGES if s in FUNCTIONS and "measure_methods" in reach(s)]
    assert stages == ["augment", "compare"]  # neither chooses anything, and nothing that chooses comes after them
    parameters = set(inspect.signature(train_backbone).parameters)
    assert not [p for p in parameters if "test" in p or "valid" in p]  # a fixed number of steps, no epoch is selected


def test_f1_is_over_the_whole_test_set_not_a_mean_over_batches():
    rng = np.random.default_rng(0)
    y = rng.choice(3, 600, p=[0.8, 0.15, 0.05])
    p = 0.6 * np.eye(3)[y] + rng.dirichlet(np.ones(3), 600)
    found = classification_metrics(y, p)
    by_batch = {
        k: np.mean([classification_metrics(y[i : i + 32], p[i : i + 32])[k] for i in range(0, 600, 32)]) for k in found
    }
    assert found["macro_f1"] == pytest.approx(f1_score(y, p.argmax(1), average="macro"))
    for k in ("macro_f1", "sensitivity", "specificity"):
        assert abs(by_batch[k] - found[k]) > 1e-3, k


def points():
    x = torch.linspace(-1, 1, 64)[:, None]
    return x, 3 * x - 0.5


def noisy_fit(steps=40, half_life=0.25, spy=None, **kw):
    "A small network with dropout, trained on points of a line."
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    x, y = points()

    def loss(model, generator):
        i = torch.randint(64, (16,), generator=generator)
        if spy:
            spy(model)
        return (model(x[i]) - y[i]).square().mean(), {}

    config = FitConfig(
        steps=steps, learning_rate=0.05, ema_half_life=half_life, schedule="constant", checkpoint_seconds=0
    )
    return fit(model, loss, config, **kw), config


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double().clone()


def test_the_averaged_weights_are_the_ones_evaluated():
    # a_n = d_n a_(n-1) + (1 - d_n) w_n, and diffusers warms the decay up:
    # d_n = min(d, n/(9 + n)) from the second step on
    raw = []
    averaged, config = noisy_fit(spy=lambda m: raw.append(flat(m)))
    raw = [*raw[1:], flat(noisy_fit(half_life=0.0)[0].model)]
    a = raw[0]
    for n, w in enumerate(raw[1:], 1):
        d = min(ema_decay(config), (1 + n) / (10 + n))
        a = d * a + (1 - d) * w
    assert torch.allclose(flat(averaged.model), a, atol=1e-5)
    assert (flat(averaged.model) - raw[-1]).abs().max() > 1e-3 and not averaged.model.training


def test_resume_continues_bit_for_bit(tmp_path):
    whole, _ = noisy_fit()
    calls = []

    def stop(model):
        calls.append(1)
        if len(calls) == 23:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        noisy_fit(spy=stop, folder=tmp_path)
    left = []
    resumed, _ = noisy_fit(spy=lambda m: left.append(1), folder=tmp_path)
    assert len(left) == 18 and torch.equal(flat(resumed.model), flat(whole.model))
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]


HARD_CODED = re.compile(
    r"""["'](/(home|root|mnt|data|scratch|media|Users)\b|[A-Z]:\\\\)"""
    r"""|cuda:\d|CUDA_VISIBLE_DEVICES|device_ids"""
)


def test_no_hard_coded_paths_or_gpu_ids():
    for bad in ('"/home/me/x"', "'/mnt/data'", '"cuda:0"', "device_ids=[0, 1]", 'environ["CUDA_VISIBLE_DEVICES"]'):
        assert HARD_CODED.search(bad), bad
    files = [f for f in (ROOT / "histodiffusion").rglob("*.py") if f.name != "_modidx.py"]
    correct = [
        f"{f.name}: {line.strip()}"
        for f in files
        for line in f.read_text(encoding="utf-8").splitlines()
        if HARD_CODED.search(line)
    ]
    assert len(files) > 15 and not correct


def test_every_result_has_seed_and_interval():
    assert "seed" in SEED_COLUMNS and {"n_seeds", "gain_ci_low", "gain_ci_high"} <= set(TABLE_COLUMNS)
    row = dict(label_fraction=0.05, labelled=9, added=9, validation_accuracy=0.5)
    row |= dict(macro_f1=0.5, sensitivity=0.5, specificity=0.9, auroc=0.9, ece=0.1)
    rows = [
        dict(row, method=m, ratio=r, seed=s, accuracy=0.5 + 0.1 * r + 0.01 * s * (1 + r))
        for m, r in (("real", 0), ("more", 1))
        for s in range(3)
    ]
    table = summarise_methods(pd.DataFrame(rows))
    assert (table.n_seeds == 3).all() and table.gain_ci_low[1] < table.gain_mean[1] < table.gain_ci_high[1]
    for path in (ROOT / "results").rglob("table_1.csv"):
        written = pd.read_csv(path)
        assert {"n_seeds", "gain_ci_low", "gain_ci_high"} <= set(written)
        assert "seed" in pd.read_csv(path.with_name("table_1_seeds.csv")).columns
        assert written.loc[written.n_seeds > 1, ["gain_ci_low", "gain_ci_high"]].notna().to_numpy().all()


def test_noise_schedule_is_the_closed_form_and_diffusers_own():
    ours = noise_schedule()
    plain = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0155, beta_schedule="linear"
    )
    assert np.allclose(ours.alphas_cumprod, ABAR, atol=1e-6) and torch.equal(ours.alphas_cumprod, plain.alphas_cumprod)
    z, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    a = torch.tensor(ABAR[t.numpy()], dtype=torch.float32)[:, None, None, None]
    assert torch.allclose(ours.add_noise(z, noise, t), a.sqrt() * z + (1 - a).sqrt() * noise, atol=1e-5)
    assert torch.allclose(ours.get_velocity(z, noise, t), a.sqrt() * noise - (1 - a).sqrt() * z, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_diffusion_loss_by_hand(kind, gamma):
    class Half(torch.nn.Module):
        def forward(self, x, t):
            self.x, self.t = x, t
            return type("out", (), dict(sample=0.5 * x))

    clean = torch.randn(1, 4, 2, 2).half()
    model = Half()
    latents = LatentSampler(clean)
    value, _ = DiffusionLoss(latents, noise_schedule(kind), 64, gamma)(model, torch.Generator().manual_seed(0))
    x, z, a = model.x.double().numpy(), clean.double().numpy(), ABAR[model.t.numpy()][:, None, None, None]
    noise = (x - a**0.5 * z) / (1 - a) ** 0.5
    assert abs(noise.std() - 1) < 0.1  # 1,024 normal numbers
    target = noise if kind == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * z
    snr = a / (1 - a)
    weight = np.minimum(snr, gamma) / (snr if kind == "epsilon" else snr + 1) if gamma else 1.0
    assert float(value) == pytest.approx((weight * (0.5 * x - target) ** 2).mean(), rel=1e-4)


def test_latents_have_unit_variance_and_plain_diffusers_decodes_the_same_picture(tmp_path):
    torch.manual_seed(0)
    images = phantom_patches(np.arange(36) % 9, size=32)
    vae = build_autoencoder(3, (16, 16), 4, 1)
    z = encode_patches(vae, images).float()
    assert (z.std((0, 2, 3)) - 1).abs().max() > 0.1  # or this shows nothing
    fold_deviation(vae.cpu(), z.std((0, 2, 3)))
    z = encode_patches(vae, images).float()
    assert torch.allclose(z.std((0, 2, 3)), torch.ones(4), atol=0.01)
    save_pipeline(tmp_path, vae, build_unet(8, widths=(16, 32), attention=(False, False)))
    pipe = diffusers.LDMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    decoded = []
    decode = pipe.vqvae.decode
    pipe.vqvae.decode = lambda latents, *a, **kw: decoded.append(latents) or decode(latents, *a, **kw)
    picture = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")[0]
    sampled = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pipe.scheduler.set_timesteps(2)
        for t in pipe.scheduler.timesteps:
            sampled = pipe.scheduler.step(pipe.unet(sampled, t).sample, t, sampled).prev_sample
    assert torch.allclose(decoded[0], sampled, rtol=1e-3, atol=1e-3)  # the pipeline hands over unit latents, unscaled
    ours = decode_latents(vae, sampled).astype(int)
    assert np.abs(ours - (255 * picture).round()).max() <= 1
