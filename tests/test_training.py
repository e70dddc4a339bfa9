"""The training loop: mixed precision, and experiment trackers."""

import json

import pytest
import torch
from accelerate.tracking import GeneralTracker, register_tracker_class

from histodiffusion.models.training import FitConfig, fit

POINTS = torch.linspace(-1, 1, 64)[:, None]


def train(precision="no", steps=40, **kw):
    "A small network that learns a parabola; `stop` interrupts at a step."
    torch.manual_seed(0)
    model, seen = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)), []
    stop = kw.pop("stop", None)

    def loss(model, generator):
        seen.append(1)
        if len(seen) == stop:
            raise KeyboardInterrupt
        x = POINTS[torch.randint(64, (16,), generator=generator)]
        return (model(x).float() - x.square()).square().mean(), {}

    return fit(model, loss, FitConfig(steps, 0.05, precision=precision, checkpoint_seconds=0), **kw)


def weights(trained):
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_trainings_of_one_process_may_differ_in_precision(precision):
    half, whole = train(precision), train("no")
    assert half.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=0.5)
    assert torch.equal(weights(half), weights(whole)) == (precision == "no")


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_resume_continues_bit_for_bit_in_every_precision(tmp_path, precision):
    with pytest.raises(KeyboardInterrupt):
        train(precision, folder=tmp_path, stop=23)
    assert torch.equal(weights(train(precision, folder=tmp_path)), weights(train(precision)))


def test_history_goes_to_the_experiment_tracker(tmp_path, monkeypatch):
    class Lines(GeneralTracker):
        name, requires_logging_directory = "lines", True

        def __init__(self, project, folder):
            super().__init__()
            self.file = open(f"{folder}/{project}.jsonl", "w")

        @property
        def tracker(self):
            return self.file

        def log(self, values, step=None, **kwargs):
            self.file.write(json.dumps(dict(values, step=step)) + "\n")

        def finish(self):
            self.file.close()

    register_tracker_class(Lines)
    monkeypatch.setenv("HISTODIFFUSION_TRACKER", "lines")
    trained = train(folder=tmp_path, desc="parabola")
    assert [json.loads(line) for line in (tmp_path / "parabola.jsonl").read_text().splitlines()] == trained.history
