"""Networks with weights of their own in a run: from a folder, as teacher, backbone, encoder and oracle."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from torch import nn

from histodiffusion.app.cli import main
from histodiffusion.app.share import _dataset_card
from histodiffusion.core import read_json, read_table, save_tensors
from histodiffusion.data.packed import images_to_tensor
from histodiffusion.models.backbone import predict
from histodiffusion.models.classifier import Classifier, Probe
from histodiffusion.models.encoders import ImageEncoder
from histodiffusion.models.ensemble import Ensemble
from histodiffusion.models.pretrained import PretrainedNetwork
from histodiffusion.study.ablate import AXES
from histodiffusion.study.artefacts import make_stage
from histodiffusion.study.compare import load_oracle
from histodiffusion.study.run import Run, networks_of
from histodiffusion.study.steps import backbone_config, load_backbone, load_teacher, read_split, teacher_configs

TINY = dict(pretrain_patches=90, autoencoder_steps=2, diffusion_steps=2, finetune_steps=2, classifier_steps=2,
            sampler_steps=2, samples_per_class=4, backbone_steps=2, teacher_steps=2, encoder_steps=3, oracle_steps=2,
            seeds=[0], selection_rule="confidence", selection_threshold=.01)  # fmt: skip


def write_network(folder, architecture="test_resnet", **config):
    "A folder as timm's hub tools write it, with random weights."
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_tensors(folder / "model.safetensors", timm.create_model(architecture).state_dict())
    (folder / "config.json").write_text(json.dumps(dict(architecture=architecture, pretrained_cfg=config)))
    return f"local-dir:{folder}"


@pytest.fixture
def project(tmp_path, monkeypatch):
    for kind in ("RESULTS", "FIGURES"):
        monkeypatch.setenv(f"HISTODIFFUSION_{kind}_PATH", str(tmp_path / kind.lower()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(project):
    return write_network(project / "models" / "mine", input_size=[3, 48, 48], mean=[0.7, 0.5, 0.6], std=[0.2, 0.2, 0.2])


def test_a_changed_weight_file_changes_the_keys_of_the_stages_that_use_it_and_no_others(own, project):
    key = lambda stage, **settings: Run("smoke", "phantom:target:180", overrides=settings).key(stage)  # noqa: E731
    stages = dict(teacher="teacher", real_only="backbone", oracle="oracle", compare="encoder")
    before = {s: key(s, **{k: [own] if k == "teacher" else own}) for s, k in stages.items()}
    diffusion = key("diffusion", backbone=own)
    moved = project / "elsewhere" / "mine"
    shutil.copytree(project / "models" / "mine", moved)
    for s, k in stages.items():  # the same weights in another place
        assert key(s, **{k: [f"local-dir:{moved}"] if k == "teacher" else f"local-dir:{moved}"}) == before[s], s
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit, and the same size
    weights.write_bytes(content)
    os.utime(weights, ns=(0, 1))
    for s, k in stages.items():
        assert key(s, **{k: [f"local-dir:{moved}"] if k == "teacher" else f"local-dir:{moved}"}) != before[s], s
    assert key("diffusion", backbone=f"local-dir:{moved}") == diffusion


def test_a_relative_path_is_stored_as_an_absolute_one_and_shown_as_a_name(own, project):
    run = Run("smoke", overrides=dict(teacher=["local-dir:models/mine"]))
    assert run.settings.teacher == (own,) and run.parameters["overrides"]["teacher"] == [own]
    assert run.setting("teacher")[0].startswith("local-dir:mine@") and str(project) not in run._repr_html_()
    assert str(project) not in run.place and "local-dir" not in Run("smoke").place


def test_pretrained_networks_are_fine_tuned_at_their_own_rate(own):
    run = Run("smoke", overrides=dict(backbone=own, teacher=["test_resnet", own], encoder_steps=7, encoder_lr=1e-4))
    assert backbone_config(run).learning_rate == 1e-4 and backbone_config(run).steps == run.settings.backbone_steps
    assert [(c.steps, c.learning_rate) for c in teacher_configs(run)] == [(50, 4e-3), (7, 1e-4)]
    assert backbone_config(Run("smoke")).learning_rate == 4e-3


def test_a_network_of_a_folder_is_teacher_backbone_and_oracle(own):
    networks = dict(teacher=["test_resnet", own], backbone=own, oracle=own)
    run = Run("smoke", "phantom:target:180", overrides=TINY | networks)
    for stage in ("teacher", "real_only", "oracle"):
        make_stage(run, stage)
    assert read_json(run.read("teacher") / "provenance.json")["settings"]["teacher"][1].startswith("local-dir:mine@")
    patches = read_split(run, "validation").images[:3]
    for net in (load_teacher(run), load_backbone(run), load_oracle(run)):
        assert predict(net, patches).shape == (3, 9)
    assert load_backbone(run).prepare(images_to_tensor(patches)).shape[-2:] == (48, 48)


def test_a_classifier_needs_the_folder_of_its_network_no_more(own, project):
    torch.manual_seed(0)
    frozen = ImageEncoder(own)
    tuned, probe = PretrainedNetwork(own, 2), Probe(frozen, nn.Linear(frozen.dim, 2))
    nets = [tuned, Ensemble([tuned], 2), probe]
    patches = [np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)]
    before = [Classifier(net, ["a", "b"], 32, 3) for net in nets]
    folders = [c.save(project / f"classifier-{i}") for i, c in enumerate(before)]
    shutil.rmtree(project / "models")
    for c, folder in zip(before, folders):
        assert np.allclose(Classifier.load(folder)(patches), c(patches), atol=1e-6)
        assert str(project) not in (folder / "config.json").read_text()


def test_cards_of_exports_name_networks_and_their_terms(own, project):
    rows = pd.DataFrame(dict(label=["a"], selected=[True], file_name=["a.png"], class_index=[0]))
    card = _dataset_card(Run("smoke", overrides=dict(teacher=[own, "efficientnet_lite0"])), rows, ("a",))
    assert "- local-dir:mine: not known here" in card and "- efficientnet_lite0: Apache-2.0" in card
    assert str(project) not in card and "networks took part" not in _dataset_card(Run("smoke"), rows, ("a",))


def test_names_in_tables_have_no_folders(own, project):
    run = Run("smoke", "phantom:target:180", overrides=dict(backbone=own, ablation_backbones=["test_vit"]))
    assert [value for _, value, _ in AXES["backbone"](run)][0] == "local-dir:mine"


@pytest.mark.parametrize("settings, said", [
    (["--backbone", "local-dir:nothing"], "'local-dir:{here}/nothing' is no folder"),
    (["--teacher", "local-dir:pickled"], "has only pytorch_model.bin, and a pickled file can run code"),
    (["--oracle", "file:models/mine/model.safetensors"], "give file:PATH.safetensors,model=NAME"),
    (["--oracle", "file:models/mine/model.safetensors,model=resnet18"], "do not fit timm's resnet18"),
    (["--oracle", "file:pickled/pytorch_model.bin,model=resnet18"], "is not a .safetensors file"),
    (["--encoder", "resnet18"], "has no weights of its own"),
    (["--encoder", "local-dir:odd"], "has mean [123, 117, 104]: give three numbers, from 0 to 1"),
    (["--backbone", "timm:resnet1"], "timm has no network 'resnet1'"),
    (["--backbone", "hf-hub:MahmoodLab/UNI"], "go online once"),
    (["--encoder", "hf-hub:1aurent/resnet18.tiatoolbox-kather100k", "--dataset", "nct-crc-he",
      "--profile", "smoke"],
     "was trained with labels of nct-crc"),
])  # fmt: skip
def test_networks_that_cannot_be_used_are_refused_in_a_sentence(own, project, monkeypatch, capsys, settings, said):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(project / "cache"))
    write_network(project / "odd", mean=[123, 117, 104])
    (project / "pickled").mkdir()
    (project / "pickled" / "pytorch_model.bin").write_bytes(b"")
    assert main(["select", *settings]) == 2
    error = capsys.readouterr().err
    assert said.format(here=project) in error and len(error.splitlines()) == 1


def test_a_run_says_the_terms_of_its_networks(own, project, capsys):
    assert main(["select", "--dry-run", "--backbone", own]) == 0
    assert "note: local-dir:mine: licence not known here" in capsys.readouterr().out
    assert networks_of(Run("smoke").settings) == ("test_resnet", "efficientnet_lite0", "test_vit")
    assert main(["select", "--dry-run"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_the_command_lists_known_encoders(capsys):
    assert main(["encoders"]) == 0
    out = capsys.readouterr().out
    assert "hf-hub:MahmoodLab/UNI2-h" in out and "refused for targets of nct-crc" in out and "CC BY-NC-ND 4.0" in out


@pytest.mark.slow
def test_the_encoder_of_table_1_is_the_one_that_was_asked_for(own):
    run = Run("smoke", "phantom:target:180", overrides=TINY | dict(encoder=own))
    make_stage(run, "compare")
    rows = read_table(run.read("compare") / "rows.csv").set_index("method")
    names = [f"{kind}_encoder{more}" for kind in ("frozen", "finetuned") for more in ("", "_histodiffusion")]
    assert set(names) <= set(rows.index)
    assert (rows.added[names] > 0).tolist() == [False, True, False, True]
    read = read_json(run.read("compare") / "provenance.json")["settings"]
    assert read["encoder"].startswith("local-dir:mine@")
