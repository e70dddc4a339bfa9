"""A whole run in miniature, of a folder whose class names look like something else; and its files, damaged."""

import shutil

import numpy as np
import pytest
from PIL import Image

from histodiffusion.app.cli import main
from histodiffusion.app.share import export_synthetic
from histodiffusion.core import HistoDiffusionError, read_json, read_table, write_json, write_table
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.measure.figures import plot_class_gain, save_figure
from histodiffusion.study import steps
from histodiffusion.study.artefacts import make_stage, stage_folder
from histodiffusion.study.report import report
from histodiffusion.study.run import Run
from histodiffusion.study.stages import STAGES
from histodiffusion.study.tables import gain_by_class

NAMES = ["0", "01", "=cmd|x", "<script>alert(1)<", "NA", "None", "x$_$"]


def options(home):
    "A folder with 40 patches of each class, and the options of a run on it."
    for i, pixels in enumerate(phantom_patches([i % len(NAMES) for i in range(40 * len(NAMES))], seed=4, size=32)):
        (home / "set" / NAMES[i % len(NAMES)]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / "set" / NAMES[i % len(NAMES)] / f"{i}.png")
    tiny = dict(pretrain_patches=90, autoencoder_steps=2, diffusion_steps=2, finetune_steps=2, classifier_steps=2,
                sampler_steps=2, samples_per_class=4, backbone_steps=2, teacher_steps=2, encoder_steps=2,
                oracle_steps=2, seeds=[0], ratios=[1.0], selection_rule="confidence",
                selection_threshold=0.01)  # fmt: skip
    return dict(profile="smoke", dataset=f"folder:{home / 'set'}", pretrain_sets=["phantom:kyoto:45"], overrides=tiny)


@pytest.fixture(scope="module")
def made(own_places):
    "Options of a run that is made up to its report."
    chosen = options(own_places)
    make_stage(Run(**chosen), "report")
    return chosen


@pytest.fixture
def run(made):
    return Run(**made)


@pytest.fixture
def kept():
    "keep(path): the content of a file, written back after the test."
    contents = {}
    yield lambda path: contents.setdefault(path, path.read_bytes())
    for path, content in contents.items():
        path.write_bytes(content)


def test_names_are_text_in_every_table_and_in_the_report(run):
    for name in ("gain_by_class", "label_noise", "selection"):
        table = read_table(run.results / f"{name}.csv")
        assert table["class"].drop_duplicates().tolist() == sorted(NAMES), name
        raw, md = ((run.results / f"{name}.{suffix}").read_text() for suffix in ("csv", "md"))
        assert "\n'=cmd|x," in raw and "\n=cmd" not in raw
        assert "<script" not in md
        assert all(text in md for text in (r" =cmd\|x ", "&lt;script&gt;alert(1)&lt;", r"x\$\_\$"))
    text = (run.results / "report.md").read_text()
    assert all(f" {name} " in text for name in ("NA", "None", "01", r"=cmd\|x", r"x\$\_\$"))
    assert "<script" not in text and "<script" not in run._repr_html_() + steps.read_split(run, "test")._repr_html_()
    assert "x$_$" in (run.figures / "gain_by_class.svg").read_text()


@pytest.mark.parametrize("names", [["0", "1", "2"], ["NA", "None", "nan"]])
def test_the_report_names_the_classes_that_lose_recall(run, kept, names):
    labels = np.arange(90) % 3
    right = np.eye(3)[labels]
    posteriors = dict(real=[right, right], histodiffusion_selected=[np.roll(right, 1, 1)] * 2)
    table = gain_by_class(labels, posteriors, names)
    save_figure(plot_class_gain(table, np.eye(3)), run.figures / "test")
    for name in ("report", "safety"):
        kept(run.record(name))
    for name in ("gain_by_class.csv", "report.md"):
        kept(run.results / name)
    write_table(table, run.results / "gain_by_class")
    run.record("report").unlink()
    write_json(run.record("safety"), read_json(run.record("safety")) | dict(files={}))
    report(run)
    assert f"- Classes: {', '.join(names)} lose recall." in (run.results / "report.md").read_text()


def test_an_export_counts_classes_as_the_labelled_set_does(run, tmp_path, capsys, kept):
    chosen = run.folder("select") / "chosen.json"
    for path in (chosen, run.record("select")):
        kept(path)
    picked = read_json(chosen)
    first = steps.read_synthetic(run)["labels"] == 0
    for r, rows in picked["chosen"]["finetuned"]["selected"].items():
        picked["chosen"]["finetuned"]["selected"][r] = [i for i in rows if not first[i]]
    write_json(chosen, picked)
    write_json(run.record("select"), read_json(run.record("select")) | dict(files={}))
    out = export_synthetic(run, tmp_path / "out")
    classes = steps.read_split(run, "train").classes
    assert sorted(p.name for p in (out / "images").iterdir()) == list(classes) == sorted(NAMES)
    assert (out / "classes.txt").read_text().splitlines() == list(classes)
    rows = read_table(out / "metadata.csv")
    assert [classes[k] for k in rows.class_index] == rows.label.tolist() and 0 not in set(rows.class_index)
    card = (out / "README.md").read_text()
    assert "<script" not in card.split("---\n")[2] and r"| x\$\_\$" in card
    assert f"warning: no patch of {classes[0]} is in {out}" in capsys.readouterr().out


DAMAGED = [("synthesize", "finetuned.safetensors", "select"), ("augment", "rows.csv", "table_1"),
           ("pretraining_data", "pool.npy", "autoencoder"), ("target_data", "patches.npy", "adapt"),
           ("autoencoder", "model/diffusion_pytorch_model.safetensors", "diffusion"),
           ("adapt", "model/unet/diffusion_pytorch_model.safetensors", "synthesize"),
           ("teacher", "teacher.safetensors", "select"), ("select", "chosen.json", "augment"),
           ("real_only", "augmentation.csv", "augment"), ("baselines", "gan.safetensors", "compare")]  # fmt: skip


@pytest.mark.parametrize("stage, name, after", DAMAGED)
@pytest.mark.parametrize(
    "damage, said", [("deleted", "is missing"), ("cut", "were written"), ("one bit", "is damaged")]
)
def test_a_damaged_file_stops_the_next_stage_and_is_named(run, kept, stage, name, after, damage, said):
    path = run.folder(stage) / name
    whole = kept(path)
    kept(run.record(after))
    run.record(after).unlink()
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(whole[:-40] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(HistoDiffusionError) as e:
        make_stage(Run(**run.parameters), after)
    assert str(e.value).startswith(f"{path} ") and said in str(e.value)
    assert str(e.value).endswith(f"delete the folder {path.parents[name.count('/')]}, then run 'histodiffusion "
                                 f"{STAGES[stage].command}' or 'histodiffusion reproduce' with the options of this "
                                 f"run, which makes stage '{stage}' anew.")  # fmt: skip


def test_a_damaged_table_stops_the_report(run, kept):
    path = run.results / "table_1.csv"
    path.write_bytes(kept(path)[:-100])
    kept(run.record("report"))
    run.record("report").unlink()
    with pytest.raises(HistoDiffusionError, match=f"table_1.csv has .* delete {run.record('table_1')}, then run"):
        report(Run(**run.parameters))


def test_guidance_alone_stands_in_only_where_nothing_was_fine_tuned(run, kept):
    for path in (run.record("synthesize"), run.folder("synthesize") / "finetuned.safetensors"):
        kept(path)
    write_json(run.record("synthesize"), read_json(run.record("synthesize")) | dict(files={}))  # as older records
    path.unlink()
    with pytest.raises(HistoDiffusionError, match="finetuned.safetensors cannot be read"):
        steps.read_synthetic(run)
    plain = Run(**run.parameters | dict(overrides=run.parameters["overrides"] | dict(finetune_steps=0)))
    with stage_folder(plain, "synthesize") as attempt:
        guided = run.folder("synthesize") / "guidance_only.safetensors"
        (attempt.folder / guided.name).write_bytes(guided.read_bytes())
    assert len(steps.read_synthetic(plain)["labels"]) == len(steps.read_synthetic(run, "guidance_only")["labels"])
    with pytest.raises(HistoDiffusionError, match="Unknown adaptation 'tuned'"):
        steps.read_synthetic(run, "tuned")


def test_the_command_line_names_the_file_and_the_remedy_works(made, capsys, kept):
    run, words = Run(**made), ["select", "--profile", "smoke", "--dataset", made["dataset"]]
    words += ["--pretrain-sets", *made["pretrain_sets"]]
    for name, value in made["overrides"].items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    for path in (run.folder("synthesize") / "finetuned.safetensors", run.record("synthesize"), run.record("select")):
        kept(path)
    (run.folder("synthesize") / "finetuned.safetensors").unlink()
    run.record("select").unlink()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "finetuned.safetensors is missing: delete the folder" in err
    shutil.rmtree(run.folder("synthesize"))
    assert main(words) == 0 and run.done("select")


def test_records_list_what_later_stages_read(run):
    files = read_json(run.record("adapt"))["files"]
    assert "model/classifier/config.json" in files and not any("checkpoint" in name for name in files)
    assert (run.folder("adapt") / "classifier" / "checkpoint.json").is_file()
    assert set(read_json(run.record("table_1"))["files"]) >= {"table_1.csv", "selection.csv"}
