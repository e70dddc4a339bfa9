"""The command line: exit codes, one sentence for each mistake, plans and listings."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from histodiffusion import __version__
from histodiffusion.app.cli import STAGE_COMMANDS, main, parse
from histodiffusion.study.artefacts import command_of
from histodiffusion.study.profiles import Profile
from histodiffusion.study.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
MAKING = ["reproduce", "data", *STAGE_COMMANDS]


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
    (["reproduce", "--profile", "tiny"], "Unknown profile 'tiny': use one of smoke, small, quick, gpu, paper."),
    (["adapt", "--dataset", "kather2016-grey64"], "set HISTODIFFUSION_DATA_MIRROR"),
    (["adapt", "--dataset", "camelyon"], "Unknown data set 'camelyon'"),
    (["adapt", "--dataset", "folder:/no/such/place"], "There is no folder /no/such/place"),
    (["adapt", "--dataset", "phantom:mars"], "Unknown phantom laboratory 'mars'"),
    (["adapt", "--pretrain-sets", "phantom:target"], "leave it out of --pretrain-sets"),
    (["adapt", "--label-fraction", "2"], "--label-fraction is 2.0: input should be less than or equal to 1"),
    (["adapt", "--classifier-steps", "0"], "--classifier-steps is 0: input should be greater than 0"),
    (["adapt", "--selection-rule", "best"], "--selection-rule must be one of"),
    (["adapt", "--eta", "2"], "eta is 2.0: input should be less than or equal to 1"),
    (["adapt", "--guidance-scale", "inf"], "--guidance-scale is inf: input should be a finite number"),
    (["adapt", "--cfg-scale", "inf"], "--cfg-scale is inf: input should be a finite number"),
    (["adapt", "--dataset", "nowhere", "--allow-leakage"], "Unknown data set 'nowhere'"),
    (["adapt", "--unet-channels", "7", "13"], "--unet-channels must be multiples of 7"),
    (["adapt", "--dataset", "folder:"], "no path after 'folder:'"),
    (["data", "fetch"], "needs the NAME of one set"),
    (["data", "list", "pcam"], "takes no NAME"),
    (["reproduce", "--cores", "-1"], "--cores is -1"),
    (["reproduce", "--cores", "9" * 400], "--cores is 999999999999999999999999999999: give"),
    (["adapt", "--seeds", "9" * 400], "input should be less than or equal to 1000000000"),
    (["adapt", "--label-fraction", "nan"], "--label-fraction is nan"),
    (["adapt", "--image-size", "8"], "--image-size is 8: input should be greater than or equal to 16"),
    (["adapt", "--dataset", "folder:~no-such-user/set"], "'~no-such-user/set' is not a path"),
    (["adapt", "--dataset", "folder:" + "a" * 300], "choose a shorter path"),
    (["adapt", "--dataset", "phantom:target:" + "9" * 400], "more patches than fit in memory"),
    (["tile", "~no-such-user/slides", "--out", "tiles"], "is not a path"),
    (["tile", "slides", "--out", "~no-such-user/tiles"], "is not a path"),
    (["data", "audit", "folder:~no-such-user/set"], "is not a path"),
    (["data", "describe", "folder:/data/set"], "'histodiffusion data audit folder:/data/set' says what it contains"),
    (["data", "verify", "phantom:target"], "is for sets of the catalogue, and 'phantom:target' needs no entry"),
])  # fmt: skip
def test_mistake_is_one_sentence_and_exit_code_2(capsys, words, said):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("histodiffusion: ") and err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("words, said", [
    (["adapt", "--guidanc-scale", "2"], "--guidance-scale FLOAT"),
    (["adapt", "--guidance-scale", "much"], "Error parsing --guidance-scale"),
    (["adapt", "--prediction", "x0"], "'epsilon', 'v_prediction'"),
    (["adapt", "--seeds", "a"], "Error parsing --seeds"),
    (["train"], "Unrecognized options: train"),
    ([], "Missing subcommand"),
])  # fmt: skip
def test_a_mistyped_option_is_answered_with_the_nearest(capsys, words, said):
    with pytest.raises(SystemExit) as e:
        main(words)
    assert e.value.code == 2
    err = capsys.readouterr().err
    assert said in re.sub(r"[│\s]+", " ", err) and "Traceback" not in err


def class_folders(home, *names):
    "A folder with 30 images in each of its class folders."
    from PIL import Image

    for k, name in enumerate(names):
        (home / "set").mkdir(exist_ok=True)
        folder = os.path.join(os.fsencode(home / "set"), name)
        os.mkdir(folder)
        for i in range(30):
            Image.new("RGB", (70, 70), (2 * i, 99 * k, 0)).save(os.fsdecode(os.path.join(folder, b"%d.png" % i)))
    return f"folder:{home / 'set'}"


@pytest.mark.parametrize("command", ["data", "adapt", "reproduce"])
def test_a_class_whose_name_cannot_be_printed_is_one_sentence(capsys, results, command):
    target = class_folders(results, b"stroma", b"two\nlines")
    assert main([command, "--dataset", target, "--label-fraction", "1", "--pretrain-sets", "phantom:kyoto:45"]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence == "histodiffusion: The class folder 'two\\nlines' has a name that cannot be printed: rename it."


def test_a_name_that_is_not_utf8_is_no_traceback(results):
    target = class_folders(results, b"stroma", b"fibr\xf6s")
    words = [sys.executable, "-m", "histodiffusion", "adapt", "--dataset", target, "--dry-run"]
    said = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0 and "few labelled patches (fibr\\xf6s " in said.stdout, said.stderr


@pytest.mark.parametrize("error, said", [
    (FileNotFoundError(2, "No such file or directory", "/data/a.toml"), "/data/a.toml: check the path."),
    (PermissionError(13, "Permission denied", "/data"), "/data: check that it may be read and written."),
    (OSError("broken weights"), "broken weights: check it, and try again."),
])  # fmt: skip
def test_what_the_system_refuses_is_answered_with_its_remedy(capsys, monkeypatch, error, said):
    def refuse(argv):
        raise error

    monkeypatch.setattr("histodiffusion.app.cli.parse", refuse)
    assert main(["reproduce"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("histodiffusion: ") and err.endswith(f"{said}\n") and err.count("\n") == 1


def test_classes_are_the_top_folders_in_a_plan_too(capsys, results):
    target = class_folders(results, b"stroma", b"tumour")
    for label in ("stroma", "tumour"):
        folder = results / "set" / label
        for i in range(3):
            (folder / f"patient {i}").mkdir()
            (folder / f"{i}.png").rename(folder / f"patient {i}" / f"{i}.png")
    assert main(["adapt", "--dataset", target, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "60 patches, 2 classes" in said
    assert "unlabelled patches, cut from the images of kather2016-sample, pcam-sample" in said


def test_mistake_leaves_nothing_behind(results):
    main(["reproduce", "--profile", "tiny"])
    assert list(results.iterdir()) == []


@pytest.mark.parametrize("command", MAKING)
def test_dry_run_lists_stages_and_writes_nothing(capsys, results, command):
    assert main([command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1800 patches, 9 classes" in said and "stages to make" in said
    own = [s.name for s in STAGES.values() if s.command == command]
    assert all(name in said for name in own)
    assert list(results.iterdir()) == []


def test_dry_run_of_a_folder_counts_its_images(capsys, results):
    from PIL import Image

    for k, (label, n) in enumerate((("tumour", 50), ("stroma", 40))):
        (results / "set" / label).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (70, 70), (2 * i, 99 * k, 0)).save(results / "set" / label / f"{i}.png")
    assert main(["adapt", "--dataset", f"folder:{results / 'set'}", "--seeds", "7", "8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "90 patches, 2 classes" in said and "warning: few labelled patches" in said
    assert "adapt_7" in said and "adapt_8" in said and "adapt_0" not in said


@pytest.mark.parametrize("command", MAKING)
def test_help_says_what_is_read_and_written_and_lists_every_setting(capsys, command):
    with pytest.raises(SystemExit) as e:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0
    assert all(word in said for word in ("--dry-run", "--skip-corrupt", "--force"))
    assert "side of every patch, px" in said and "preset of scale" in said
    assert command == "reproduce" or all(word in said for word in ("reads ", "writes "))
    assert all(f"--{name.replace('_', '-')}" in said for name in Profile().settings())


def test_help_shows_the_values_of_the_profile(capsys):
    for profile, steps in (("smoke", 50), ("small", 800)):
        with pytest.raises(SystemExit):
            main(["augment", "--profile", profile, "--help"])
        said = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
        assert f"--backbone-steps INT optimiser steps, > 0 (default: {steps})" in said


def test_settings_lists_every_setting_with_its_comment(capsys):
    assert main(["settings"]) == 0
    said = capsys.readouterr().out
    for name in Profile().settings():
        assert f"--{name.replace('_', '-')}  " in said, name
    assert "px; the networks halve it at each level" in said and "None" not in said


def test_a_typed_setting_is_kept_from_the_prior_even_at_the_value_of_the_preset(capsys):
    assert main(["adapt", "--prior", "open-grey-64", "--image-size", "32", "--dry-run"]) == 2
    assert "was trained with --image-size = 64" in capsys.readouterr().err
    assert parse(["adapt", "--image-size=32"]).make().overrides == dict(image_size=32)


def test_options_become_the_run():
    run = parse(["adapt", "--profile", "small", "--ratios", "1", "2", "--finetune-mode", "lora", "--skip-leaks"]).make()
    assert run.overrides == dict(ratios=(1.0, 2.0), finetune_mode="lora") and run.skip_leaks
    assert parse(shlex.split(command_of(run, "adapt"))[1:]).make().parameters == run.parameters


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"histodiffusion {__version__}"


def test_data_list_names_every_set(capsys):
    from histodiffusion.data.catalogue import REGISTRY
    from histodiffusion.data.phantom import LABORATORIES

    assert main(["data", "list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*REGISTRY, *LABORATORIES)) and "missing" in said


def test_interrupt_says_that_the_run_resumes(capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("histodiffusion.app.cli.parse", interrupted)
    assert main(["reproduce"]) == 130
    assert "continues from the last checkpoint" in capsys.readouterr().err


def test_module_runs_as_a_command():
    words = [sys.executable, "-m", "histodiffusion", "adapt", "--profile", "tiny"]
    said = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 2
    assert said.stderr.startswith("histodiffusion: Unknown profile 'tiny'") and said.stdout == ""


def test_the_command_line_starts_quickly():
    code = ("import sys, histodiffusion.app.cli; slow = ('torch', 'pandas', 'matplotlib', 'sklearn', 'diffusers');"
            "print([m for m in slow if m in sys.modules])")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr
