"""Guidance against closed forms: a Gaussian mixture whose noise, posterior and classes are known exactly.

At scale 1 guided sampling must give each class's own distribution. Tolerances come from two errors:

- sampling: with n samples of a class a mean has standard error sqrt(S_ii/n), a covariance sqrt((S_ii S_jj + S_ij^2)/n);
  4.5 of them are allowed, which 20 correct numbers exceed together about once in 7,000 runs (and the seed is fixed);
- discretisation: `shrinkage` computes, for each scheduler and number of steps, how much of a Gaussian's variance the
  unguided sampler keeps. It uses the scheduler's own coefficients, or for ancestral ones their recursion, and no guidance.
  Its largest departure over the classes' variances, times S, is added to a covariance's tolerance.
"""

import numpy as np
import pytest
import torch

from histodiffusion.models.diffusion import noise_schedule
from histodiffusion.models.sampling import SCHEDULERS, Rejection, alpha_bar_at, calibrate_rejection, draw_latents, guided_sample, make_scheduler, set_steps
from histodiffusion.models.guidance import Autoguidance, ClassifierFreeGuidance, ClassifierGuidance, Guidance, class_gradient, cosine_scale, guided_noise
from histodiffusion.models.mixture import GaussianMixture, MixtureClassifier

CASES = [("ddim", 0.0), ("ddim", 1.0), *((name, 0.0) for name in SCHEDULERS if name != "ddim")]
KINDS = ("epsilon", "v_prediction")
STEPS = 60
MEANS = np.array([[1.0, 0.0], [-1.0, 0.5], [0.2, -1.2]])
COVARIANCES = np.array([[[0.4, 0.1], [0.1, 0.3]], [[0.25, -0.1], [-0.1, 0.6]], [[0.3, 0.0], [0.0, 0.2]]])


def world(kind="epsilon"):
    "Three overlapping classes of latents of shape (2, 1, 1), with unequal weights."
    return GaussianMixture(MEANS[..., None, None], COVARIANCES, (0.5, 0.3, 0.2), noise_schedule(kind))


def shrinkage(name, eta, steps, variance):
    "Share of the variance of N(0, variance) that a sampler with the exact network keeps."
    scheduler = set_steps(make_scheduler(name), steps)
    if name == "ddpm" or eta == 1:  # z -> c z + noise of variance b: the variance obeys v -> c^2 v + b
        times, v = [*scheduler.timesteps.tolist(), -1], 1.0
        abar = [*np.cumprod(1 - np.linspace(0.0015, 0.0155, 1000)), 1.0]
        for t, n in zip(times, times[1:]):
            a, later = abar[t], abar[n]
            clean = a**0.5 * variance / (a * variance + 1 - a)  # E[z0 | z_t] = clean z_t
            c = later**0.5 * (1 - a / later) / (1 - a) * clean + (a / later) ** 0.5 * (1 - later) / (1 - a)
            v = c**2 * v + (1 - later) / (1 - a) * (1 - a / later)
        return v / variance
    one = GaussianMixture([[[[0.0]]]], [[[variance]]])
    start = torch.randn(1, generator=torch.Generator().manual_seed(1))
    return float((guided_sample(one, make_scheduler(name), [0], steps=steps, seed=[1]).flatten() / start) ** 2 / variance)


def deviations(guidance, name, eta, kind="epsilon", steps=STEPS, per_class=1300, sharp=False):
    """Largest error of the guided means and covariances, in units of their tolerance: above 1 is a failure.

    Against the truth, discretisation widens the tolerance; `sharp` puts it into the expectation instead: along an axis of
    variance v the sampler keeps shrinkage(v) v, exactly. A mean is off by at most sqrt(abar_T) = 0.015 times itself,
    because sampling starts at mean 0; 0.02 is allowed for it.
    """
    net, labels, worst = world(kind), np.repeat(np.arange(3), per_class), 0.0
    z = guided_sample(net, make_scheduler(name, net.schedule), labels, guidance, steps, eta, seed=3).flatten(1).double().numpy()
    for k, (mean, cov) in enumerate(zip(MEANS, COVARIANCES)):
        own, (variances, axes) = z[labels == k], np.linalg.eigh(cov)
        left = np.array([shrinkage(name, eta, steps, v) for v in variances])
        if sharp:
            cov = axes @ np.diag(left * variances) @ axes.T
        scale = np.outer(np.diag(cov), np.diag(cov)) ** 0.5
        mean_error = np.abs(own.mean(0) - mean) / (4.5 * (np.diag(cov) / per_class) ** 0.5 + 0.02)
        bias = 0 if sharp else np.abs(left - 1).max() * scale
        cov_error = np.abs(np.cov(own.T) - cov) / (4.5 * ((scale**2 + cov**2) / per_class) ** 0.5 + bias)
        worst = max(worst, mean_error.max(), cov_error.max())
    return worst


class Faulty(Guidance):
    "Guidance at scale 1 with one fault."

    def __init__(self, teacher, fault, times):
        super().__init__()
        self.teacher, self.fault, self.times = judge, fault, list(dict.fromkeys(float(t) for t in times))

    def __call__(self, unet, x, t, labels, alpha_bar, kind):
        out, _ = super().__call__(unet, x, t, labels, alpha_bar, kind)
        asked = t
        if self.fault == "next step":
            asked = self.times[min(self.times.index(float(t)) + 1, len(self.times) - 1)]
        if self.fault == "next time":
            asked = max(float(t) - 1, 0)
        gradient, p = class_gradient(self.teacher, x, asked, labels)
        if self.fault == "wrong sign":
            gradient = -gradient
        if self.fault == "no root":
            gradient = gradient / (1 - alpha_bar) ** 0.5
        return guided_noise(out, gradient, 1.0, alpha_bar, kind), p


def faulty(fault, name, steps, kind="epsilon"):
    net = world(kind)
    return Faulty(MixtureClassifier(net), fault, set_steps(make_scheduler(name), steps).timesteps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name,eta", CASES)
def test_guided_samples_have_the_moments_of_their_class(name, eta, kind):
    guidance = ClassifierGuidance(MixtureClassifier(world()), 1.0)
    assert deviations(guidance, name, eta, kind) < 1


@pytest.mark.parametrize("name,eta", CASES)
def test_guided_moments_at_ten_steps_are_those_of_the_discretised_class(name, eta):
    assert deviations(ClassifierGuidance(MixtureClassifier(world()), 1.0), name, eta, steps=10, sharp=True) < 1


@pytest.mark.parametrize("fault", ["wrong sign", "no root"])
@pytest.mark.parametrize("name,eta", CASES)
def test_a_wrong_sign_or_a_missing_root_fails_the_test_of_moments(name, eta, fault):
    assert deviations(faulty(fault, name, 20), name, eta, steps=20, per_class=650) > 2


@pytest.mark.parametrize("name,eta", CASES)
def test_a_classifier_asked_one_step_late_fails_the_test_of_moments(name, eta):
    assert deviations(faulty("next step", name, 10), name, eta, steps=10, sharp=True) > 1.5


def trajectories_apart(guidance, name, eta, kind):
    "Largest distance of guided samples from those of the class's own network, same seeds."
    net, labels = world(kind), np.arange(60) % 3
    draw = lambda unet, g: guided_sample(unet, make_scheduler(name, net.schedule), labels, g, 15, eta, seed=5)  # noqa: E731
    return float((draw(net, guidance) - draw(net.conditional(), None)).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name,eta", CASES)
def test_guided_samples_are_those_of_the_class_itself_and_one_time_of_a_thousand_shows(name, eta, kind):
    # One time of 1000 moves moments by less than 4,000 samples can show. Sample by sample it is plain: float32 leaves 1e-5.
    assert trajectories_apart(ClassifierGuidance(MixtureClassifier(world()), 1.0), name, eta, kind) < 2e-4
    for fault in ("wrong sign", "no root", "next step", "next time"):
        assert trajectories_apart(faulty(fault, name, 15, kind), name, eta, kind) > 2e-3, fault


@pytest.mark.parametrize("kind", KINDS)
def test_the_guided_prediction_is_the_class_conditional_one_at_every_noise_level(kind):
    net, y = world(kind), torch.arange(30) % 3
    x, scheduler = torch.randn(30, 2, 1, 1, generator=torch.Generator().manual_seed(0)), make_scheduler("euler", noise_schedule(kind))
    for t in (1, 20, 150, 400, 700.5, 950, 999):
        a = alpha_bar_at(scheduler, t)
        exact = net.conditional()(x, t, y).sample
        tolerance = 1e-5 * max(1, float(exact.abs().max())) / (1 if kind == "epsilon" else a**0.5)  # as v holds eps/sqrt(abar)
        assert (ClassifierGuidance(MixtureClassifier(net), 1.0)(net, x, t, y, a, kind)[0] - exact).abs().max() < tolerance
        gradient, _ = class_gradient(MixtureClassifier(net), x, t - 1, y)
        late = guided_noise(net(x, t).sample, gradient, 1.0, a, kind)
        if t <= 700.5:  # above, the posterior hardly knows the class at either time
            assert (late - exact).abs().max() > 5 * tolerance, t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 2.5, 8.0])
def test_classifier_free_guidance_is_guidance_by_the_network_s_own_classifier(scale, kind):
    net, y = world(kind), torch.arange(30) % 3
    x = torch.randn(30, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    for t in (10, 300, 900):
        a = float(net.alphas_bar[t])
        free = ClassifierFreeGuidance(scale)(net.conditional(), x, t, y, a, kind)[0]
        assert torch.allclose(free, ClassifierGuidance(MixtureClassifier(net), scale)(net, x, t, y, a, kind)[0], atol=1e-4, rtol=1e-4)


def test_no_classifier_is_asked_outside_the_interval():
    asked = []
    teacher = MixtureClassifier(world())
    judge.register_forward_hook(lambda m, args, out: asked.append(float(args[1])))
    guided_sample(world(), make_scheduler("ddim"), [0, 1], ClassifierGuidance(teacher, cosine_scale(3.0), interval=(200, 600)), 50)
    assert asked and min(asked) >= 200 and max(asked) < 600 and len(asked) == 20


def test_autoguidance_at_scale_one_and_by_itself_changes_nothing():
    net, x, y = world(), torch.randn(4, 2, 1, 1), torch.tensor([0, 1, 2, 0])
    plain = net(x, 300).sample
    assert torch.equal(Autoguidance(world(), 1.0)(net, x, 300, y, 0.5, "epsilon")[0], plain)
    assert torch.allclose(Autoguidance(net, 3.0)(net, x, 300, y, 0.5, "epsilon")[0], plain, atol=1e-6)


@pytest.mark.parametrize("name,eta", CASES)
def test_a_survivor_of_rejection_is_the_same_picture(name, eta):
    # ancestral samplers too: each sample has its own generator
    guidance, labels = ClassifierGuidance(MixtureClassifier(world()), 0.6), np.arange(60) % 3
    setting = dict(scheduler=name, steps=12, eta=eta, seed=2)
    free = draw_latents(world(), labels, guidance, batch_size=60, **setting)
    rejection = Rejection((0.4, 0.7), (0.2, 0.4), max_attempts=200)
    strict = draw_latents(world(), labels, guidance, batch_size=17, rejection=rejection, **setting)
    once = strict["attempts"] == 1
    assert 5 < once.sum() < 55 and torch.allclose(strict["latents"][once], free["latents"][once], atol=1e-5)
    assert strict["drawn"] == 60 + strict["rejected"] and torch.isfinite(strict["latents"]).all()
    assert strict["confidence"].mean() > free["confidence"].mean()


def test_later_segments_run_on_full_batches():
    sizes = []

    class Seen(GaussianMixture):
        def forward(self, x, t, class_labels=None):
            sizes.append((len(x), float(t)))
            return super().forward(x, t, class_labels)

    net = Seen(MEANS[..., None, None], COVARIANCES, (0.5, 0.3, 0.2))
    guidance = ClassifierGuidance(MixtureClassifier(world()), 1.0)
    made = draw_latents(net, np.arange(300) % 3, guidance, steps=10, batch_size=30, rejection=Rejection((0.5,), (0.3,)))
    assert made["rejected"] > 30
    late = [n for n, t in sizes if t < 400]
    assert max(n for n, _ in sizes) == 30 and sum(n == 30 for n in late) > 0.6 * len(late)


@pytest.mark.parametrize("per_class", [False, True])
def test_calibrated_thresholds_keep_what_would_be_accepted(per_class):
    guidance, good = ClassifierGuidance(MixtureClassifier(world()), 0.3), lambda r: r["confidence"] > 0.8
    setting = dict(guidance=guidance, scheduler="dpmpp", steps=15, batch_size=700)
    rule, _ = calibrate_rejection(world(), np.arange(1400) % 3, good, keep=0.95, per_class=per_class, seed=0, **setting)
    labels = np.arange(2100) % 3
    fresh = draw_latents(world(), labels, seed=1, rejection=Rejection(rule.checkpoints, (0.0, 0.0)), **setting)
    dropped = np.any([rule.hopeless(k, p, labels) for k, p in enumerate(fresh["posteriors"].T)], axis=0)
    lost, wanted = dropped[good(fresh)].mean(), good(fresh).sum()
    assert lost < 0.05 + 4 * (0.05 * 0.95 / wanted) ** 0.5 * (1 if not per_class else 1.5)  # three binomial errors and some
    assert dropped[~good(fresh)].mean() > 0.25
