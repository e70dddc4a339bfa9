"""The command line: exit codes, one sentence for each mistake, plans and listings."""

import subprocess
import sys
from pathlib import Path

import pytest

from histodiffusion import __version__
from histodiffusion.app.cli import COMMANDS, main
from histodiffusion.study.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    "Keep results, and a mirror that may be set, out of the way."
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path / "results"))
    monkeypatch.setenv("HISTODIFFUSION_FIGURES_PATH", str(tmp_path / "figures"))
    monkeypatch.setenv("HISTODIFFUSION_DATA_MIRROR", "")
    monkeypatch.setenv("HISTODIFFUSION_PROFILE", "smoke")
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.mark.parametrize("words, said", [
    (["reproduce", "--profile", "tiny"], "Unknown profile 'tiny': use one of smoke, small, gpu, paper."),
    (["adapt", "--dataset", "kather2016-grey64"], "set HISTODIFFUSION_DATA_MIRROR"),
    (["adapt", "--set", "guidanc_scale=2"], "no field 'guidanc_scale'"),
    (["adapt", "--set", "guidance_scale=much"], "cannot be read as float"),
    (["adapt", "--set", "guidance_scale"], "is not KEY=VALUE"),
    (["adapt", "--dataset", "camelyon"], "Unknown data set 'camelyon'"),
    (["adapt", "--dataset", "folder:/no/such/place"], "There is no folder /no/such/place"),
    (["adapt", "--dataset", "phantom:mars"], "Unknown phantom laboratory 'mars'"),
    (["adapt", "--pretrain-sets", "phantom:target"], "leave it out of --pretrain-sets"),
    (["adapt", "--label-fraction", "2"], "label_fraction must be at most 1"),
    (["adapt", "--label-fraction", "some"], "invalid float value"),
    (["adapt", "--seeds", "a,b"], "not a list of whole numbers"),
    (["reproduce", "--cores", "0"], "--cores is 0"),
    (["train"], "invalid choice: 'train'"),
    ([], "required: COMMAND"),
])  # fmt: skip
def test_mistake_is_one_sentence_and_exit_code_2(capsys, words, said):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("histodiffusion: ") and err.count("\n") == 1
    assert said in err


def test_mistake_leaves_nothing_behind(results):
    main(["reproduce", "--profile", "tiny"])
    assert list(results.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_lists_stages_and_writes_nothing(capsys, results, command):
    assert main([command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1800 patches, 9 classes" in said and "a rough estimate" in said
    own = [s.name for s in STAGES.values() if s.command == command]
    assert all(name in said for name in own)
    assert list(results.iterdir()) == []


def test_dry_run_of_a_folder_counts_its_images(capsys, results):
    from PIL import Image

    for label, n in (("tumour", 3), ("stroma", 2)):
        (results / "set" / label).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (70, 70), (i, 0, 0)).save(results / "set" / label / f"{i}.png")
    assert main(["adapt", "--dataset", f"folder:{results / 'set'}", "--seeds", "7,8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "5 patches, 2 classes" in said and "adapt_7" in said and "adapt_8" in said and "adapt_0" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_is_read_and_written(capsys, command):
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0
    assert all(word in said for word in ("reads ", "writes ", "--dry-run", "--skip-corrupt", "--force", "--set"))


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"histodiffusion {__version__}"


def test_data_list_names_every_set(capsys):
    from histodiffusion.data.catalogue import REGISTRY
    from histodiffusion.data.phantom import LABORATORIES

    assert main(["data", "list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*REGISTRY, *LABORATORIES)) and "missing" in said


def test_interrupt_says_that_the_run_resumes(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("histodiffusion.app.cli.run_command", interrupted)
    assert main(["reproduce"]) == 130
    assert "goes on where this one stopped" in capsys.readouterr().err


def test_module_runs_as_a_command():
    words = [sys.executable, "-m", "histodiffusion.app.cli", "adapt", "--profile", "tiny"]
    said = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 2
    assert said.stderr.startswith("histodiffusion: Unknown profile 'tiny'") and said.stdout == ""
