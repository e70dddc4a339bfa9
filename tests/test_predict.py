"""A classifier leaves the run: saved, loaded, and used on folders and slides from the command line."""

import json
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image

from histodiffusion.app.cli import main
from histodiffusion.core import HistoDiffusionError, load_tensors, read_json, read_table, write_json
from histodiffusion.data.phantom import PHANTOM_CLASSES, phantom_patches
from histodiffusion.models.backbone import BackboneConfig, build_backbone, train_backbone
from histodiffusion.models.classifier import Classifier

LABELS = np.arange(45) % 9


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A trained classifier, and a folder of patches."
    home = tmp_path_factory.mktemp("made")
    images = phantom_patches(LABELS, size=32)
    net = train_backbone(images, LABELS, 9, BackboneConfig("test_resnet", steps=30, batch_size=18))
    Classifier(net, PHANTOM_CLASSES, 32, 3).save(home / "model")
    for i, x in enumerate(images):
        folder = home / "patches" / PHANTOM_CLASSES[LABELS[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(folder / f"{i}.png")
    return home, images


@pytest.fixture
def command(made, tmp_path, monkeypatch):
    "Run `predict` with the classifier; its file is `out.csv`."
    monkeypatch.setenv("HISTODIFFUSION_PROGRESS", "off")

    def run(source, *more, model=made[0] / "model", out=tmp_path / "out.csv"):
        return main(["predict", str(source), "--model", str(model), "--out", str(out), *map(str, more)])

    return run


def test_a_folder_is_named_as_the_network_names_it(made, command, tmp_path, capsys):
    home, images = made
    assert command(home / "patches") == 0
    table = read_table(tmp_path / "out.csv")
    net = Classifier.load(home / "model")
    order = [int(f.split("/")[1][:-4]) for f in table.file]
    p = net(images[order])
    assert table.label.tolist() == [PHANTOM_CLASSES[k] for k in p.argmax(1)]
    assert np.abs(table[[f"p_{c}" for c in PHANTOM_CLASSES]].to_numpy() - p).max() < 1e-4
    assert "45 patches" in capsys.readouterr().out
    record = read_json(tmp_path / "out.json")
    assert record["classifier"] == net.digest() and str(home) not in json.dumps(record)


def test_a_slide_needs_a_resolution_and_gets_positions_and_a_map(made, command, tmp_path, capsys):
    home, images = made
    mosaic = np.concatenate([np.concatenate(list(images[:8]), 1)] * 8).repeat(3, 0).repeat(3, 1)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as f:
        f.write(mosaic, tile=(256, 256), photometric="rgb", metadata=None, resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER")  # fmt: skip
    assert command(tmp_path / "slide.tif") == 2
    assert "give --mpp" in capsys.readouterr().err
    assert command(tmp_path / "slide.tif", "--mpp", 0.5, "--tissue", 0, "--heat-map") == 0
    table = read_table(tmp_path / "out.csv")
    assert len(table) == 24 * 24 and {"x", "y", "side"} < {*table.columns}
    assert (table.x % 32 == 0).all() and (tmp_path / "out-slide.png").is_file()


def test_slides_that_cannot_be_opened_are_skipped_if_asked(made, command, tmp_path, capsys):
    home, images = made
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides/broken.svs").write_bytes(b"no slide")
    options = ("--mpp", 0.5, "--tissue", 0)
    assert command(tmp_path / "slides", *options) == 2
    assert "broken.svs" in capsys.readouterr().err
    assert command(tmp_path / "slides", *options, "--skip-corrupt") == 2  # nothing is left
    assert "No tile of" in capsys.readouterr().err
    mosaic = np.concatenate([np.concatenate(list(images[:8]), 1)] * 8).repeat(3, 0).repeat(3, 1)
    with tifffile.TiffWriter(tmp_path / "slides/good.tif") as f:
        f.write(mosaic, tile=(256, 256), photometric="rgb", metadata=None, resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER")  # fmt: skip
    Image.fromarray(images[0]).save(tmp_path / "slides/mask.png")
    assert command(tmp_path / "slides", *options, "--skip-corrupt") == 0
    said = capsys.readouterr().out
    assert "skipped: " in said and "1 file(s) beside slides left alone, such as mask.png" in said
    assert len(read_table(tmp_path / "out.csv")) == 24 * 24


@pytest.mark.parametrize("wrong, found", [
    (dict(source="nowhere"), "There is no"), (dict(source="empty"), "contains no image"),
    (dict(source="patches", model="nowhere"), "contains no classifier"),
    (dict(source="patches", out="patches"), "exists"),
    (dict(source="patches", out="names.json"), "ends with .csv")])  # fmt: skip
def test_what_cannot_be_named_is_one_sentence(made, command, capsys, wrong, found):
    home, _ = made
    (home / "empty").mkdir(exist_ok=True)
    assert command(**{k: home / v for k, v in wrong.items()}) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and found in said


def test_grey_patches_are_refused_by_a_colour_classifier(command, tmp_path, capsys):
    Image.new("L", (32, 32), 9).save(tmp_path / "grey.png")
    assert command(tmp_path / "grey.png") == 2
    assert "trained on colour" in capsys.readouterr().err


def test_without_a_model_the_run_must_have_one(command, tmp_path, monkeypatch, made, capsys):
    for name in ("results_path", "figures_path"):
        monkeypatch.setenv(f"HISTODIFFUSION_{name.upper()}", str(tmp_path / name))
    assert main(["predict", str(made[0] / "patches"), "--profile", "smoke", "--dataset", "phantom:target"]) == 2
    assert "'recommend' has not been made" in capsys.readouterr().err
    assert main(["predict", "--model", "x"]) == 2
    assert "Give what to name" in capsys.readouterr().err


def test_a_changed_file_of_a_classifier_is_refused(made, tmp_path):
    for name, change in (("weights", lambda p: (p / "model.safetensors").write_bytes(b"x" * 99)),
                         ("kind", lambda p: _edit(p, "network", {"kind": "pickle"})),
                         ("hub", lambda p: _edit(p, "network", {"kind": "timm", "architecture": "hf-hub:a/b"})),
                         ("classes", lambda p: _edit(p, "classes", None))):  # fmt: skip
        folder = tmp_path / name
        shutil.copytree(made[0] / "model", folder)
        change(folder)
        with pytest.raises(HistoDiffusionError):
            Classifier.load(folder)


def _edit(folder, key, value):
    config = read_json(folder / "config.json")
    config["histodiffusion"][key] = value
    write_json(folder / "config.json", config)


@pytest.mark.parametrize("name, channels", [("test_vit", 1), ("test_resnet", 3), ("efficientnet_lite0", 1)])
def test_plain_timm_loads_a_classifier(tmp_path, name, channels):
    import timm
    import torch

    net = build_backbone(name, 4, channels, 64).eval()
    folder = Classifier(net, "ABCD", 64, channels).save(tmp_path / "net")
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, channels, 64, 64)
    with torch.no_grad():
        assert torch.allclose(plain(x), net(x), atol=1e-5)
    assert {*load_tensors(folder / "model.safetensors")} == {*net.state_dict()}


def test_an_onnx_file_gives_the_same_posteriors(made, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
    classifier = Classifier.load(made[0] / "model")
    classifier.temperature = 1.7
    session = runtime.InferenceSession(classifier.to_onnx(tmp_path / "net.onnx"))
    x = made[1][:7].transpose(0, 3, 1, 2).astype(np.float32)
    assert np.abs(session.run(None, {"patches": x})[0] - classifier(made[1][:7])).max() < 1e-5
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == [*PHANTOM_CLASSES]
