"""The samples of real tissue that come with the library, and the run that uses them by default."""

import importlib.util
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from histodiffusion.app.cli import main, parse
from histodiffusion.core import HistoDiffusionError, hash_file, load_settings
from histodiffusion.data.catalogue import REGISTRY, may_show, sample_archive
from histodiffusion.data.fetch import check_counts, dataset_state, fetch_dataset, verify_dataset
from histodiffusion.data.patches import dataset_folder, packed_dataset
from histodiffusion.data.pool import default_pretraining
from histodiffusion.study.prior import published_prior
from histodiffusion.study.profiles import PROFILES
from histodiffusion.study.run import Run

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = [d for d in REGISTRY.values() if d.archive]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HISTODIFFUSION_DATA_MIRROR", "")
    monkeypatch.delenv("HISTODIFFUSION_PROFILE", raising=False)
    return tmp_path / "data"


@pytest.fixture(params=SAMPLES, ids=lambda d: d.name)
def sample(request):
    return request.param


def test_archive_is_the_one_of_the_catalogue(sample):
    assert f"sha256:{hash_file(sample_archive(sample))}" == sample.archive
    with zipfile.ZipFile(sample_archive(sample)) as z:
        names, text = z.namelist(), z.read("ATTRIBUTION.txt").decode()
    counts = Counter(n.split("/")[0] for n in names if "/" in n)
    assert counts == dict(zip(sample.classes, sample.counts))
    assert sample.licence_url in text and sample.licence in text.replace("Creative Commons Attribution", "CC BY")
    assert may_show(sample.name) and "Changes:" in text


def test_archives_are_small():
    assert len(SAMPLES) == 3 and sum(sample_archive(d).stat().st_size for d in SAMPLES) <= 8_000_000


def test_first_use_unpacks(sample, home):
    assert dataset_state(sample.name) == "packaged"
    folder = dataset_folder(sample.name)
    assert folder == home.resolve() / sample.name and dataset_state(sample.name) == "here"
    assert check_counts(folder, sample) == dict(zip(sample.classes, sample.counts))
    assert fetch_dataset(sample.name) == folder and verify_dataset(sample.name, images=False).ok.all()


def test_a_damaged_archive_is_refused(monkeypatch, tmp_path, home):
    sample, broken = REGISTRY["pcam-sample"], tmp_path / "pcam-sample.zip"
    broken.write_bytes(sample_archive(sample).read_bytes()[:-1])
    monkeypatch.setattr("histodiffusion.data.patches.sample_archive", lambda info: broken)
    with pytest.raises(HistoDiffusionError, match="pcam-sample.zip is missing or damaged: install the library again"):
        dataset_folder("pcam-sample")
    assert not (home / "pcam-sample").exists()


def test_a_lost_image_is_found():
    next(dataset_folder("breakhis-sample").glob("benign/*")).unlink()
    report = verify_dataset("breakhis-sample", images=False)
    assert report.ok.tolist() == [True, False]


def test_default_run_is_on_real_tissue():
    run = Run()
    assert (run.profile, run.target) == ("quick", "kather2016-sample")
    assert load_settings("/").profile == "quick" and Run("quick").target == run.target
    assert run.sets == ("pcam-sample", "breakhis-sample") and run.channels == 1
    assert Run("smoke").target == "phantom:target" and Run("quick", "phantom:target").target == "phantom:target"


@pytest.mark.parametrize("words, target", [
    ([], "kather2016-sample"), (["--profile", "smoke"], "phantom:target"), (["--profile=smoke"], "phantom:target"),
    (["--profile", "smoke", "--dataset", "kather2016-sample"], "kather2016-sample"),
])  # fmt: skip
def test_command_line_takes_the_profiles_data_set(words, target):
    assert parse(["reproduce", *words]).make().target == target


def test_help_names_the_default(capsys):
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    said = capsys.readouterr().out
    assert "kather2016-sample" in said and "quick" in said


def test_samples_share_their_images_with_the_whole_sets():
    for sets in (["kather2016-grey64"], ["pcam-sample", "kather2016"]):
        with pytest.raises(HistoDiffusionError, match="shares its images with the target 'kather2016-sample'"):
            Run("smoke", "kather2016-sample", sets)
    with pytest.raises(HistoDiffusionError, match="shares its images with the target 'kather2016-grey64'"):
        Run("smoke", "kather2016-grey64", ["kather2016-sample"])
    assert "kather2016-sample" not in default_pretraining("kather2016-grey64")
    assert not {REGISTRY[s].source for s in published_prior("open-grey-64")[1]["data"]} & {"kather2016"}


def test_no_patch_of_the_target_is_a_copy_of_another_class():
    packed = packed_dataset("kather2016-sample")
    assert len(packed) == 2000 and not packed.corrupt and len(set(packed.keys)) == 2000


@pytest.mark.mirror
def test_archives_are_made_again(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_samples", ROOT / "tools" / "make_samples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mirror = ROOT.parent / "shared" / "data"
    if not mirror.is_dir():
        pytest.skip("needs the whole sets")
    monkeypatch.setattr(module, "OUT", tmp_path)
    module.main(mirror)
    for d in SAMPLES:
        assert f"sha256:{hash_file(tmp_path / sample_archive(d).name)}" == d.archive


def test_tracked_files_are_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    size = sum(p.stat().st_size for n in listed.stdout.decode().split("\0") if n and (p := ROOT / n).is_file())
    assert size < 45 * 2**20


def test_every_profile_has_a_data_set():
    assert {name: p.dataset for name, p in PROFILES.items() if name in ("smoke", "quick")} == {
        "smoke": "phantom:target", "quick": "kather2016-sample"}  # fmt: skip
