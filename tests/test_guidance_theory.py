"""Guidance against closed forms: a Gaussian mixture whose noise, posterior and classes are known exactly.

At scale 1 guided sampling must give each class's own distribution. Tolerances come from two errors:

- sampling: with n samples of a class a mean has standard error sqrt(S_ii/n), a covariance sqrt((S_ii S_jj + S_ij^2)/n);
  4.5 of them are allowed, which 20 correct numbers exceed together about once in 7,000 runs (and the seed is fixed);
- discretisation: `shrinkage` computes, for each scheduler and number of steps, how much of a Gaussian's variance the
  unguided sampler keeps. It uses the scheduler's own coefficients, or for ancestral ones their recursion, and no
  guidance.
  Its largest departure over the classes' variances, times S, is added to a covariance's tolerance.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from histodiffusion.models.diffusion import noise_schedule
from histodiffusion.models.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Guidance,
    class_gradient,
    guided_noise,
)
from histodiffusion.models.mixture import GaussianMixture, MixtureClassifier
from histodiffusion.models.sampling import (
    SCHEDULERS,
    Rejection,
    SamplingConfig,
    alpha_bar_at,
    calibrate_rejection,
    draw_latents,
    guided_sample,
    make_scheduler,
)

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
    scheduler = make_scheduler(name, steps)
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
    return float((guided_sample(one, [0], None, SamplingConfig(name, steps), [1]).flatten() / start) ** 2 / variance)


def deviations(guidance, name, eta, kind="epsilon", steps=STEPS, per_class=1300, sharp=False):
    """Largest error of the guided means and covariances, in units of their tolerance: above 1 is a failure.

    Against the truth, discretisation widens the tolerance; `sharp` puts it into the expectation instead: along an axis
    of variance v the sampler keeps shrinkage(v) v, exactly. A mean is off by at most sqrt(abar_T) = 0.015 times itself,
    because sampling starts at mean 0; 0.02 is allowed for it.
    """
    net, labels, worst = world(kind), np.repeat(np.arange(3), per_class), 0.0
    z = (
        guided_sample(net, labels, guidance, SamplingConfig(name, steps, eta, 3, prediction=kind))
        .flatten(1)
        .double()
        .numpy()
    )
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
        self.teacher, self.fault, self.times = teacher, fault, list(dict.fromkeys(float(t) for t in times))

    def __call__(self, unet, x, t, labels, alpha_bar, kind):
        out, _ = super().__call__(unet, x, t, labels, alpha_bar, kind)
        at = t
        if self.fault == "next step":
            at = self.times[min(self.times.index(float(t)) + 1, len(self.times) - 1)]
        if self.fault == "next time":
            at = max(float(t) - 1, 0)
        gradient, p = class_gradient(self.teacher, x, at, labels)
        if self.fault == "wrong sign":
            gradient = -gradient
        if self.fault == "no root":
            gradient = gradient / (1 - alpha_bar) ** 0.5
        return guided_noise(out, gradient, 1.0, alpha_bar, kind), p


def faulty(fault, name, steps, kind="epsilon"):
    net = world(kind)
    return Faulty(MixtureClassifier(net), fault, make_scheduler(name, steps).timesteps)


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
def test_a_classifier_evaluated_one_step_late_fails_the_test_of_moments(name, eta):
    assert deviations(faulty("next step", name, 10), name, eta, steps=10, sharp=True) > 1.5


def trajectories_apart(guidance, name, eta, kind):
    "Largest distance of guided samples from those of the class's own network, same seeds."
    net, labels = world(kind), np.arange(60) % 3
    config = SamplingConfig(name, 15, eta, 5, prediction=kind)
    draw = lambda unet, g: guided_sample(unet, labels, g, config)  # noqa: E731
    return float((draw(net, guidance) - draw(net.conditional(), None)).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name,eta", CASES)
def test_guided_samples_are_those_of_the_class_itself_and_one_time_of_a_thousand_shows(name, eta, kind):
    # One time of 1000 shifts moments by less than 4,000 samples can show; sample by sample float32 leaves only 1e-5.
    assert trajectories_apart(ClassifierGuidance(MixtureClassifier(world()), 1.0), name, eta, kind) < 2e-4
    for fault in ("wrong sign", "no root", "next step", "next time"):
        assert trajectories_apart(faulty(fault, name, 15, kind), name, eta, kind) > 2e-3, fault


@pytest.mark.parametrize("kind", KINDS)
def test_the_guided_prediction_is_the_class_conditional_one_at_every_noise_level(kind):
    net, y = world(kind), torch.arange(30) % 3
    x, scheduler = (
        torch.randn(30, 2, 1, 1, generator=torch.Generator().manual_seed(0)),
        make_scheduler("euler", prediction=kind),
    )
    for t in (1, 20, 150, 400, 700.5, 950, 999):
        a = alpha_bar_at(scheduler, t)
        exact = net.conditional()(x, t, y).sample
        tolerance = 1e-5 * max(1, float(exact.abs().max())) / (1 if kind == "epsilon" else a**0.5)
        assert (
            ClassifierGuidance(MixtureClassifier(net), 1.0)(net, x, t, y, a, kind)[0] - exact
        ).abs().max() < tolerance
        gradient, _ = class_gradient(MixtureClassifier(net), x, t - 1, y)
        late = guided_noise(net(x, t).sample, gradient, 1.0, a, kind)
        if t <= 700.5:  # above, the posterior hardly depends on the class at either time
            assert (late - exact).abs().max() > 5 * tolerance, t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 2.5, 8.0])
def test_classifier_free_guidance_is_guidance_by_the_network_s_own_classifier(scale, kind):
    net, y = world(kind), torch.arange(30) % 3
    x = torch.randn(30, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    for t in (10, 300, 900):
        a = float(net.alphas_bar[t])
        free = ClassifierFreeGuidance(scale)(net.conditional(), x, t, y, a, kind)[0]
        assert torch.allclose(
            free, ClassifierGuidance(MixtureClassifier(net), scale)(net, x, t, y, a, kind)[0], atol=1e-4, rtol=1e-4
        )


def test_no_classifier_is_evaluated_outside_the_interval():
    times, classifier = [], MixtureClassifier(world())
    classifier.register_forward_hook(lambda m, args, out: times.append(float(args[1])))
    guided_sample(world(), [0, 1], ClassifierGuidance(classifier, 3.0, interval=(200, 600)), SamplingConfig(steps=50))
    assert times and min(times) >= 200 and max(times) < 600 and len(times) == 20


@pytest.mark.parametrize("name,eta", CASES)
def test_a_sample_that_passes_rejection_is_the_same_as_without(name, eta):
    # ancestral samplers too: each sample has its own generator
    guidance, labels = ClassifierGuidance(MixtureClassifier(world()), 0.6), np.arange(60) % 3
    config = SamplingConfig(name, 12, eta, seed=2, batch_size=60)
    free = draw_latents(world(), labels, guidance, config)
    rejection = Rejection((0.4, 0.7), (0.2, 0.4), max_attempts=200)
    strict = draw_latents(world(), labels, guidance, replace(config, batch_size=17), rejection)
    once = strict["attempts"] == 1
    assert 5 < once.sum() < 55 and torch.allclose(strict["latents"][once], free["latents"][once], atol=1e-5)
    assert strict["drawn"] == 60 + strict["rejected"] and torch.isfinite(strict["latents"]).all()
    assert strict["confidence"].mean() > free["confidence"].mean()


def test_dropped_samples_take_no_later_steps():
    sizes = []

    class Recorded(GaussianMixture):
        def forward(self, x, t, class_labels=None):
            sizes.append((len(x), float(t)))
            return super().forward(x, t, class_labels)

    net = Recorded(MEANS[..., None, None], COVARIANCES, (0.5, 0.3, 0.2))
    guidance, config = ClassifierGuidance(MixtureClassifier(world()), 1.0), SamplingConfig(steps=10, batch_size=30)
    made = draw_latents(net, np.arange(300) % 3, guidance, config, Rejection((0.5,), (0.3,)))
    early, late = (sum(n for n, t in sizes if (t > 500 - 1) == first) for first in (True, False))
    assert made["rejected"] > 30 and max(n for n, _ in sizes) == 30
    assert (early, late) == (5 * made["drawn"], 5 * 300) and made["evaluations"] == early + late


def test_calibrated_thresholds_keep_what_would_be_accepted():
    guidance, good = ClassifierGuidance(MixtureClassifier(world()), 0.3), lambda r: r["confidence"] > 0.8
    config, labels = SamplingConfig("dpmpp", 15, batch_size=700), np.arange(2100) % 3
    rule, _ = calibrate_rejection(world(), np.arange(1400) % 3, good, guidance, config, keep=0.95)
    fresh = draw_latents(world(), labels, guidance, replace(config, seed=1), Rejection(rule.checkpoints, (0.0, 0.0)))
    dropped = (fresh["posteriors"] < rule.thresholds).any(1)
    lost, wanted = dropped[good(fresh)].mean(), good(fresh).sum()
    assert lost < 0.05 + 4 * (0.05 * 0.95 / wanted) ** 0.5  # three binomial errors and some
    assert dropped[~good(fresh)].mean() > 0.25
