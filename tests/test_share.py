"""More candidates of one class, exports with real patches, and uploads, which a server in the test receives."""

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import yaml
from PIL import Image
from torchvision.datasets import ImageFolder

from histodiffusion.app.cli import main
from histodiffusion.app.push import push_folder
from histodiffusion.core import HistoDiffusionError, read_table
from histodiffusion.data.phantom import PHANTOM_CLASSES, phantom_patches
from histodiffusion.models.backbone import build_backbone
from histodiffusion.models.classifier import Classifier
from histodiffusion.study.artefacts import make_stage
from histodiffusion.study.run import Run
from histodiffusion.study.steps import read_labelled, read_split, read_synthetic

NAMES = ["=a b", "rare = one", "test"]  # a formula, blanks and an equals sign, and the name of a split
TINY = dict(pretrain_patches=45, autoencoder_steps=1, diffusion_steps=1, finetune_steps=0, classifier_steps=1,
            sampler_steps=2, samples_per_class=3, backbone_steps=1, teacher_steps=1, seeds=[0], ratios=[1.0],
            selection_rule="confidence", selection_threshold=0.01, label_fraction=0.2,
            per_class=["rare = one=9"])  # fmt: skip
TOKEN = "hf_" + "secret" * 4


@pytest.fixture(scope="module")
def made(own_places):
    "A run up to its selection, and the words that describe it."
    home = own_places
    (home / "set").mkdir()
    for i, pixels in enumerate(phantom_patches([i % 3 for i in range(90)], seed=4, size=32)):
        Image.fromarray(pixels).save(home / "set" / f"{i}.png")
    rows = [f"{i}.png,{NAMES[i % 3]}\n" for i in range(90)]
    (home / "set" / "manifest.csv").write_text("".join(["file,label\n", *rows]))
    run = Run("smoke", f"folder:{home / 'set'}", ["phantom:kyoto:45"], overrides=TINY)
    make_stage(run, "select")
    words = ["--profile", "smoke", "--dataset", run.target, "--pretrain-sets", "phantom:kyoto:45"]
    for k, v in TINY.items():
        words += [f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, list) else [v])]
    return run, words


def test_more_candidates_of_one_class(made):
    run, _ = made
    counts = np.bincount(read_synthetic(run)["labels"]).tolist()
    assert dict(zip(read_labelled(run).classes, counts)) == {"=a b": 3, "rare = one": 9, "test": 3}
    plain = Run(**run.parameters | dict(overrides=run.overrides | dict(per_class=[])))
    same = [s for s in ("adapt", "teacher", "baselines", "synthesize", "select") if run.key(s) == plain.key(s)]
    assert same == ["adapt", "teacher", "baselines"] and run.place != plain.place


@pytest.mark.parametrize("text, said", [
    ("rare = one", "give NAME=N"), ("rare = one=-1", "give NAME=N"), ("rare = one=1e9", "give NAME=N"),
    ("bone=4", "names the class 'bone', and the labelled set has =a b, rare = one, test"),
])  # fmt: skip
def test_a_wrong_number_or_class_is_refused_before_anything_is_made(made, capsys, text, said):
    _, words = made
    assert main(["synthesize", *words, "--per-class", text]) == 2
    assert said in capsys.readouterr().err
    assert main(["export", *words, "--keep", text, "--out", str(Path("nowhere") / "x")]) == 2
    assert said in capsys.readouterr().err


def test_an_export_keeps_the_best_of_a_class_and_says_what_is_missing(made, tmp_path, capsys):
    _, words = made

    def kept(n):
        assert main(["export", *words, "--keep", f"rare = one={n}", "--out", str(tmp_path / str(n))]) == 0
        table = read_table(tmp_path / str(n) / "metadata.csv")
        return set(table.file_name[table.label == "rare = one"]), capsys.readouterr().out

    two, seven, many = kept(2), kept(7), kept(99)
    assert len(two[0]) == 2 and len(seven[0]) == 7 and two[0] < seven[0] < many[0]
    assert "passed" not in two[1] and f"only {len(many[0])} of 99 of rare = one passed: draw more" in many[1]
    assert f"--per-class 'rare = one={-(-12 * 99 * 9 // (10 * len(many[0])))}'" in many[1]
    assert main(["export", *words, "--all", "--keep", "test=1", "--out", str(tmp_path / "all")]) == 2


@pytest.fixture(scope="module")
def joint(made, tmp_path_factory):
    "A folder with real and synthetic patches."
    folder = tmp_path_factory.mktemp("joint") / "both"
    assert main(["export", *made[1], "--with-real", "--keep", "rare = one=5", "--out", str(folder)]) == 0
    return folder


def test_real_and_synthetic_patches_are_read_as_one_set(made, joint):
    run, _ = made
    table = read_table(joint / "patches.csv")
    for split in ("train", "validation", "test"):
        images, real = ImageFolder(joint / split), read_labelled(run) if split == "train" else read_split(run, split)
        part = table[table.split == split]
        assert images.classes == NAMES and len(images) == len(part)
        assert (part.synthetic == False).sum() == len(real)  # noqa: E712
        assert part.synthetic.any() == (split == "train")
        on_disk = {Path(p).name: k for p, k in images.samples}
        assert on_disk == {f.rpartition("/")[2]: k for f, k in zip(part.file_name, part.class_index)}
        pixels = [np.asarray(Image.open(joint / f)) for f in part.file_name[~part.synthetic]]
        assert np.array_equal(np.stack(pixels), real.images)
    assert (table[table.synthetic].label == "rare = one").sum() == 5


def test_the_layout_is_the_one_that_datasets_documents(joint):
    "Every split has its table, whose `file_name` is a path from there; none is above them."
    assert not (joint / "metadata.csv").exists()
    for split in ("train", "validation", "test"):
        with open(joint / split / "metadata.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        images = {p.relative_to(joint / split) for p in (joint / split).rglob("*.png")}
        assert {Path(r["file_name"]) for r in rows} == images and {r["split"] for r in rows} == {split}
    card = yaml.safe_load((joint / "README.md").read_text().split("---\n")[1])
    assert card["configs"][0]["data_files"][0] == dict(split="train", path="train/**")


def test_size_is_said_before(made, tmp_path, capsys):
    assert main(["export", *made[1], "--with-real", "--out", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out.split(" bytes")[0].rpartition(" ")[2]
    size = sum(p.stat().st_size for p in (tmp_path / "both").rglob("*.png"))
    assert int(said.replace(",", "")) == pytest.approx(size, rel=0.05)


def test_real_patches_of_a_closed_set_stay(tmp_path, capsys):
    words = ["--profile", "smoke", "--dataset", "crc-polyps", "--pretrain-sets", "phantom:kyoto:45"]
    assert main(["export", *words, "--with-real", "--out", str(tmp_path / "both")]) == 2
    assert "Real patches of 'crc-polyps' are not passed on" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


class Hub(BaseHTTPRequestHandler):
    "The few calls of the hub that an upload makes; what arrives is kept in the server."

    def log_message(self, *args):
        pass

    def answer(self, status=200, **body):
        data = json.dumps(body).encode()
        self.send_response(status)
        for k, v in (("Content-Type", "application/json"), ("Content-Length", str(len(data)))):
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        s = self.server
        s.calls.append(("GET", self.path, self.headers.get("Authorization")))
        if "/revision/" in self.path or self.path.count("/") == 4:
            return self.answer(id="me/mine", private=s.private, sha="0" * 40, siblings=[], tags=[])
        self.answer(404)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[self.path.rpartition("/")[2]] = data
        self.answer()

    def do_POST(self):
        s, data = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        s.calls.append(("POST", self.path, self.headers.get("Authorization")))
        if s.status != 200:
            return self.answer(s.status, error="no")
        if self.path == "/api/repos/create":
            s.created = json.loads(data)
            return self.answer(url=f"{s.url}/me/mine")
        if self.path == "/api/validate-yaml":
            return self.answer(errors=[], warnings=[])
        if "/preupload/" in self.path:
            modes = [dict(path=f["path"], shouldIgnore=False, uploadMode="lfs" if f["path"].endswith("safetensors") else
                          "regular") for f in json.loads(data)["files"]]  # fmt: skip
            return self.answer(files=modes)
        if self.path.endswith("/objects/batch"):
            objects = [o | dict(actions=dict(upload=dict(href=f"{s.url}/blob/{o['oid']}")))
                       for o in json.loads(data)["objects"]]  # fmt: skip
            return self.answer(transfer="basic", objects=objects)
        if "/commit/" in self.path:
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    s.files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    s.files[value["path"]] = s.blobs[value["oid"]]
            return self.answer(commitUrl=f"{s.url}/me/mine/commit/1", commitOid="1")
        self.answer(404)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls, server.files, server.blobs, server.private, server.status = [], {}, {}, True, 200
    server.url, server.created = f"http://127.0.0.1:{server.server_port}", None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(hub, tmp_path, monkeypatch, capsys):
    "Run `histodiffusion push` with the server as the hub."
    for name, value in dict(ENDPOINT=hub.url, HF_HUB_DISABLE_XET=True, HF_TOKEN_PATH=str(tmp_path / "token")).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(folder, *more):
        code, said = main(["push", str(folder), "me/mine", *more]), capsys.readouterr()
        assert TOKEN not in said.out + said.err
        return code, said

    return run


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "model"
    return Classifier(build_backbone("test_resnet", 9, 3, 32), PHANTOM_CLASSES, 32, 3).save(folder)


def test_a_classifier_arrives_byte_by_byte_in_a_private_repository(classifier, hub, push):
    code, said = push(classifier)
    assert code == 0, said.err
    assert hub.files == contents(classifier) and "model.safetensors" in hub.files
    assert list(hub.blobs) == [hashlib.sha256(hub.files["model.safetensors"]).hexdigest()]
    assert (hub.created["name"], hub.created["organization"]) == ("mine", "me")
    assert hub.created.get("visibility") == "private" or hub.created.get("private") is True
    calls = [c for c in hub.calls if c[1].startswith(("/api/repos", "/api/models", "/api/validate"))]
    assert len(calls) > 3 and {token for *_, token in calls} == {f"Bearer {TOKEN}"}
    size = sum(map(len, hub.files.values()))
    assert f"{len(hub.files)} files, {size:,} bytes, to the private model me/mine" in said.out


def test_a_data_set_arrives_and_may_be_public(joint, hub, push):
    (joint / ".hidden").write_text("not for others")
    hub.private = False
    assert push(joint, "--public")[0] == 0
    (joint / ".hidden").unlink()
    assert hub.files == contents(joint) and len(hub.files) > 50
    assert all("/api/datasets/" in p for _, p, _ in hub.calls if "preupload" in p or "commit" in p)


def test_the_command_takes_the_address_from_the_environment(classifier, hub, tmp_path):
    env = os.environ | dict(HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path), HF_HUB_DISABLE_XET="1")
    command = [sys.executable, "-m", "histodiffusion", "push", str(classifier), "me/mine"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr
    assert hub.files == contents(classifier)


@pytest.mark.parametrize("status, private, said", [
    (401, True, "does not accept the token"), (403, True, "no permission to write to me/mine"),
    (418, True, "answered with status 418"), (200, False, "exists and is public: give another name, or --public"),
])  # fmt: skip
def test_one_sentence_where_the_hub_refuses(classifier, hub, push, status, private, said):
    hub.status, hub.private = status, private
    code, found = push(classifier)
    assert code == 2 and not hub.files and said in found.err and len(found.err.splitlines()) == 1


def test_one_sentence_without_network_or_token(classifier, hub, push, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, found = push(classifier)
    assert code == 2 and "The hub could not be reached" in found.err and len(found.err.splitlines()) == 1
    monkeypatch.setenv("HF_TOKEN", "")
    code, found = push(classifier)
    assert code == 2 and "There is no token for the hub" in found.err and not hub.calls


def test_only_what_was_written_here_is_uploaded(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(HistoDiffusionError, match="is neither a classifier"):
        push_folder(tmp_path, "me/mine")
