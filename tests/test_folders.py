"What people's folders hold: read right, or refused in one sentence."

import io
import json
import os
import shutil

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from histodiffusion.app.cli import main
from histodiffusion.core import HistoDiffusionError
from histodiffusion.data.images import read_image
from histodiffusion.data.leakage import target_splits
from histodiffusion.data.packed import content_key
from histodiffusion.data.patches import (
    dataset_channels,
    dataset_classes,
    list_images,
    load_patches,
    packed_dataset,
    split_patches,
)
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.study.run import Run

CLASSES = ("AC", "H", "S")


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("data_home", "results_path", "figures_path"):
        monkeypatch.setenv(f"HISTODIFFUSION_{name.upper()}", str(tmp_path / "own" / name))
    monkeypatch.delenv("HISTODIFFUSION_DATA_MIRROR", raising=False)
    monkeypatch.setenv("HISTODIFFUSION_PROGRESS", "off")
    return tmp_path


@pytest.fixture(scope="module")
def tissue():
    return {c: phantom_patches([k] * 10, seed=k, size=32) for c, k in zip(CLASSES, (2, 5, 8))}


@pytest.fixture
def write(home, tissue):
    "A function that writes three classes of ten patches, and gives the folder."

    def write(place="{c}/{i}.png", change=lambda image: image, **options):
        for c, images in tissue.items():
            for i, image in enumerate(images):
                path = home / "set" / place.format(c=c, i=i, split="train" if i < 7 else "test")
                path.parent.mkdir(parents=True, exist_ok=True)
                change(Image.fromarray(image)).save(path, **options)
        return home / "set"

    return write


def patches(folder, **options):
    return load_patches(f"folder:{folder}", 32, **options)


def refusal(folder, **options):
    with pytest.raises(HistoDiffusionError) as e:
        patches(folder, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def show(folder):
    "The command that shows a labelled folder."
    return ["data", "--dataset", f"folder:{folder}", "--pretrain-sets", "phantom:kyoto:45", "--label-fraction", ".5"]


def wide(image):
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_grey_values(write, tissue, suffix):
    got = patches(write("{c}/{i}." + suffix, wide))
    eight = np.stack([np.asarray(Image.fromarray(x).convert("L")) for images in tissue.values() for x in images])
    assert got.images.shape[-1] == 1 and len({*got.keys}) == 30
    assert np.abs(got.images[..., 0].astype(int) - eight).max() <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((8, 8), dict(photometric="minisblack")),
        ((8, 8), dict(photometric="miniswhite")),
        ((8, 8, 3), dict(photometric="rgb")),
        ((3, 8, 8), dict(photometric="rgb", planarconfig="separate")),
        ((2, 8, 8), dict(photometric="minisblack")),
    ],
    ids=["grey", "white-is-zero", "rgb", "planar", "two-pages"],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_of_either_byte_order_planar_and_of_several_pages(tmp_path, shape, options, order, bits):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    stored = x if bits == 8 else x.astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "a.tif", stored, byteorder=order, **options)
    right = x.transpose(1, 2, 0) if shape[0] == 3 else x
    right = 255 - right if options["photometric"] == "miniswhite" else right
    try:
        got = np.asarray(read_image(tmp_path / "a.tif")).astype(int)
    except HistoDiffusionError as e:
        refused = {"rgb": "stores more than 8 bits per colour, plane by plane", "miniswhite": "is corrupt or no PNG"}
        if shape[0] == 2:
            assert "has 2 pages of one size" in str(e)
            return
        assert refused[options["photometric"]] in str(e)
        assert bits == 16 and (shape[0] == 3 or order == ">")  # what Pillow cannot read, or reads wrongly
    else:
        assert np.abs(got - right).max() <= 1 and shape[0] != 2


def test_floating_point_without_a_range_is_refused_by_name(write):
    folder = write("{c}/{i}.tif", lambda im: Image.fromarray(np.asarray(im.convert("L"), np.float32) / 255))
    assert "0.tif has floating-point values (mode F) and states no range" in refusal(folder)


def test_one_grey_image_does_not_turn_a_colour_set_grey(write, capsys):
    folder = write()
    Image.open(folder / "AC" / "0.png").convert("L").save(folder / "AC" / "0.png")
    assert dataset_channels(f"folder:{folder}") == 3 and patches(folder).images.shape == (30, 32, 32, 3)
    assert main(show(folder)) == 0
    assert "1 of 30 images: grey, and made colour like the others" in capsys.readouterr().out


def test_transparent_pixels_are_white(write):
    def see_through(image):
        x = np.dstack([np.asarray(image), np.full(image.size[::-1], 255, np.uint8)])
        x[:, :16] = 0
        return Image.fromarray(x)

    images = patches(write(change=see_through)).images
    assert (images[:, :, :16] == 255).all() and images[:, :, 16:].std() > 5


def test_hidden_folders_and_own_results_are_no_patches(write, home, monkeypatch):
    folder = write()
    for place in (".ipynb_checkpoints", "AC/.ipynb_checkpoints", "results/figures", "data/x", "figures"):
        (folder / place).mkdir(parents=True)
        shutil.copy(folder / "AC" / "0.png", folder / place / "a-checkpoint.png")
    monkeypatch.chdir(folder)
    for name in ("data_home", "results_path", "figures_path"):
        monkeypatch.delenv(f"HISTODIFFUSION_{name.upper()}")
    assert dataset_classes("folder:.") == CLASSES and len(list_images("folder:.")) == 30


def test_linked_folders_are_followed_once(write, home):
    folder = write()
    (home / "links").mkdir()
    for c in CLASSES:
        (home / "links" / c).symlink_to(folder / c)
    (home / "links" / "S2").symlink_to(folder / "S")
    (folder / "S" / "up").symlink_to(folder)
    assert patches(home / "links").counts() == dict.fromkeys(CLASSES, 10)
    assert len(list_images(f"folder:{folder}")) == 30


@pytest.mark.parametrize("place", ["{split}/{c}/{i}.png", "{c}/{split}/{i}.png"])
def test_split_folders_are_splits(write, place):
    found = patches(write(place))
    groups, splits = target_splits(found.name, found.keys, found.labels, found.groups, given=found.splits)
    assert found.classes == CLASSES and len(splits["test"]) == 9
    assert (found.labels[splits["test"]] == np.repeat([0, 1, 2], 3)).all()
    assert len(splits["train"]) + len(splits["validation"]) == 21


def test_folder_of_a_split_among_classes_is_refused(write):
    folder = write()
    (folder / "S").rename(folder / "test")
    assert "The folder 'test' is named as a split and 'AC' as a class" in refusal(folder)


def strange(folder, kind):
    "Put something that is no image among the images."
    path = folder / "AC" / f"{kind}.png"
    if kind == "link":
        path.symlink_to(folder / "nowhere")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "drawing":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 48\nshowpage\n")
    elif kind == "large":
        Image.new("1", (9000, 6000)).save(path)
    else:
        path.write_bytes((folder / "AC" / "0.png").read_bytes()[:200])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("link", "is a link to a file that is not there: remove it"),
        ("folder", "is an empty folder"),
        ("pipe", "is not a regular file"),
        ("device", "is not a regular file"),
        ("drawing", "is corrupt or no PNG"),
        ("large", "is too large (9000 × 6000 px; the limit is 50 million pixels)"),
        ("corrupt", "is corrupt"),
    ],
)
def test_what_is_no_image_is_named_or_skipped(write, kind, why, monkeypatch):
    folder = write()
    strange(folder, kind)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail(f"{a} was started"))
    text = refusal(folder)
    assert f"AC/{kind}.png {why}" in text and "--skip-corrupt" in text
    assert len(patches(folder, skip_corrupt=True)) == 30
    assert [name for name, _ in packed_dataset(f"folder:{folder}", True).corrupt] == [f"AC/{kind}.png"]


def test_a_corrupt_first_image_decides_nothing(write):
    folder = write(change=lambda im: im.convert("L"))
    (folder / "AC" / "0.png").write_bytes(b"\x89PNG")
    assert patches(folder, skip_corrupt=True).images.shape == (29, 32, 32, 1)


def test_a_class_of_files_that_cannot_be_read_is_named(write, capsys):
    folder = write()
    for path in list((folder / "S").iterdir()):
        path.rename(path.with_suffix(".heic"))
    command = show(folder)
    assert main(command) == 0
    assert "folder 'S' has no image that can be read (10 .heic) and is left out" in capsys.readouterr().out


HEADS = dict(
    usual=(",", "file", "patient"), other=(",", "filename", "patient_id"), capitals=(",", "File", "Patient"),
    semicolon=(";", "file", "patient"), tab=("\t", "Image Name", "Case ID"), spaces=(", ", "path", "subject"),
)  # fmt: skip
SPELLINGS = dict(
    usual="{c}/{i}.png", absolute="/elsewhere/{c}/{i}.png", windows="D:\\set\\{c}\\{i}.PNG", dot="./{c}/{i}.png",
    stem="{c}/{i}", another="{c}/{i}.tif",
)  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_patients_of_any_table_stay_together(write, head, spelling):
    folder, (separator, file, patient) = write(), HEADS[head]
    name = SPELLINGS[spelling].format
    lines = [[file, patient]] + [[name(c=c, i=i), f"P{i % 5}"] for c in CLASSES for i in range(10)]
    (folder / "manifest.csv").write_text("\n".join(separator.join(line) for line in lines), encoding="utf-8-sig")
    found = patches(folder)
    groups, splits = target_splits(found.name, found.keys, found.labels, found.groups)
    sides = [{found.groups[i] for i in s} for s in splits.values()]
    assert sum(map(len, sides)) == 5 == len(set.union(*sides))


def test_a_table_that_does_not_fit_stops(write):
    folder = write()
    lines = ["file,patient"] + [f"{c if c != 'S' else 'gone'}/x{i}.png,P{i}" for c in CLASSES for i in range(10)]
    (folder / "manifest.csv").write_text("\n".join(lines))
    assert "30 row(s) name no image (such as AC/x0.png), and 30 image(s) have no row" in refusal(folder)


def test_labels_and_splits_of_a_table(home, write, capsys):
    folder = write("images/{c}{i}.png")
    lines = ["filename,label,patient_id,split"]
    lines += [f"images/{c}{i}.png,{c},P{i % 5},{'test' if i % 5 == 4 else 'train'}" for c in CLASSES for i in range(10)]
    (folder / "labels.csv").write_text("\n".join(lines))
    command = show(folder)
    assert main(command) == 2
    assert "has 1 class(es), and a classifier needs two or more" in capsys.readouterr().err
    assert main([*command, "--labels", "labels.csv"]) == 0
    out = capsys.readouterr().out
    assert "splits as the set gives them; 5 patients group 30 patches" in out
    assert [int(n) for n in out.split("\nall")[1].split()[:3]] == [18, 6, 6]
    assert main(["data", "--labels", "labels.csv"]) == 2 and "give --dataset folder:PATH" in capsys.readouterr().err


def test_patients_on_both_sides_of_a_given_split_are_named(write, capsys):
    folder = write("{split}/{c}/{i}.png")
    names = [f"{'train' if i < 7 else 'test'}/{c}/{i}.png" for c in CLASSES for i in range(10)]
    (folder / "manifest.csv").write_text("\n".join(["file,patient", *(f"{n},P{k % 3}" for k, n in enumerate(names))]))
    main(show(folder))
    assert "3 patients, slides or sets of copies are in more than one of the given splits" in capsys.readouterr().out


def test_numbers_and_missing_values_are_class_names(write, home):
    folder = write()
    for c, name in zip(CLASSES, ("NA", "None", "0")):
        (folder / c).rename(folder / name)
    assert patches(folder).counts() == {"0": 10, "NA": 10, "None": 10}


def test_class_folders_that_are_no_utf8_are_told_apart(write):
    folder = write()
    for c, name in zip(CLASSES, (b"caf\xe9", b"caf\xe8", b"ok")):
        os.rename(folder / c, os.path.join(os.fsencode(folder), name))
    assert dataset_classes(f"folder:{folder}") == ("caf\\xe8", "caf\\xe9", "ok")
    assert patches(folder).counts()["caf\\xe9"] == 10


def test_copies_in_more_than_one_given_split_are_named(write, capsys):
    folder = write("{split}/{c}/{i}.png")
    for c in CLASSES:
        shutil.copy(folder / "train" / c / "0.png", folder / "test" / c / "copy.png")
    main(show(folder))
    assert "3 patients, slides or sets of copies are in more than one of the given splits" in capsys.readouterr().out


def test_a_larger_limit_holds_after_a_refusal(write, monkeypatch):
    folder = write()
    strange(folder, "large")
    assert "is too large" in refusal(folder)
    monkeypatch.setenv("HISTODIFFUSION_MAX_MEGAPIXELS", "54")
    assert len(patches(folder)) == 31


def test_a_row_is_not_given_to_an_image_of_another_class(write):
    folder = write()
    lines = [f"{c}/{i}.png,{c}" for c in CLASSES for i in range(10)]
    (folder / "AC" / "0.png").rename(folder / "AC" / "new.png")
    (folder / "H" / "new.png").write_bytes(b"")
    (folder / "H" / "new.png").unlink()
    (folder / "labels.csv").write_text("\n".join(["file,label", *lines, "H/new.png,H"]))
    with pytest.raises(HistoDiffusionError, match=r"2 row\(s\) name no image \(such as AC/0.png\)"):
        load_patches(f"folder:{folder},labels=labels.csv", 32)


def test_what_is_not_used_is_said(write, capsys):
    folder = write()
    (folder / "empty").mkdir()
    Image.open(folder / "AC" / "0.png").save(folder / "H" / "animation.gif")
    shutil.copy(folder / "AC" / "0.png", folder / "stray.png")
    lines = [f"{c}/{i}.png,P" for c in CLASSES for i in range(10)]
    (folder / "manifest.csv").write_text("\n".join(["file,who", *lines]))
    assert main(show(folder)) == 0
    said = capsys.readouterr().out
    assert "folder 'empty' has no image that can be read (empty" in said
    assert "files of folder 'H' cannot be read and are left out (1 .gif)" in said
    assert "1 images are in no class folder" in said
    assert "has no column of patients that is recognised; not used: who" in said


def test_an_empty_training_split_is_one_sentence(home, capsys):
    flat = {v: np.full((16, 16, 1), v, np.uint8) for v in range(60)}
    split = split_patches([content_key(x) for x in flat.values()])
    for c, name in zip(CLASSES, ("validation", "test", "test")):  # by what the patches hold, none to train on
        (home / "same" / c).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(flat[split[name][0]].squeeze()).save(home / "same" / c / f"{i}.png")
    assert main(show(home / "same")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "The training split has no patch" in said


def test_npz_files_are_sets_with_their_splits(home, tissue, capsys):
    images, labels = np.concatenate([*tissue.values()]), np.repeat([0, 1, 2], 10)
    of = np.arange(30) % 4
    parts = dict(train=of < 2, val=of == 2, test=of == 3)
    both = dict(images=images, labels=labels[:, None])
    arrays = {f"{n}_{w}": v[m] for n, m in parts.items() for w, v in both.items()}
    np.savez(home / "a.npz", **arrays)
    command = [f"npz:{home / 'a.npz'}" if word.startswith("folder:") else word for word in show(home)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "splits as the set gives them" in said
    assert [int(n) for n in said.split("\nall")[1].split()[:3]] == [int(m.sum()) for m in parts.values()]
    np.savez(home / "a.npz", **arrays | dict(train_images=arrays["train_images"][1:]))
    assert main(command) == 2 and "train has images (15, 32, 32, 3) and labels (16,)" in capsys.readouterr().err

@pytest.fixture
def clinic(write, home):
    "A function that writes a second folder of the same classes, by default with other patches; gives the folder."

    def clinic(name="clinic", seed=50, classes=CLASSES, n=12):
        for k, c in enumerate(classes):
            (home / name / c).mkdir(parents=True)
            for i, image in enumerate(phantom_patches([k] * n, seed=seed + k, size=32)):
                Image.fromarray(image).save(home / name / c / f"{i}.png")
        return home / name

    return clinic


def test_a_test_folder_is_all_that_is_tested(write, clinic, capsys):
    folder, other = write(), clinic()
    lines = [f"{c}/{i}.png,P{i % 5}" for c in CLASSES for i in range(10)]
    (folder / "manifest.csv").write_text("\n".join(["file,patient", *lines]))
    assert main([*show(folder), "--test", f"folder:{other}"]) == 0
    said = capsys.readouterr().out
    assert f"tested on {other} alone; 5 patients group 30 patches" in said
    assert [int(n) for n in said.split("\nall")[1].split()[:3]][2] == 36
    found = patches(f"{folder},test={other}")
    _, splits = target_splits(found.name, found.keys, found.labels, found.groups, given=found.splits)
    assert {i for i, f in enumerate(found.files) if f.startswith("test:")} == {*splits["test"]}
    owners = [{found.groups[i] for i in splits[s]} for s in ("train", "validation")]
    assert not owners[0] & owners[1] and owners[0] | owners[1] == {f"P{i}" for i in range(5)}
    assert len(splits["train"]) == 24 and len(splits["validation"]) == 6


def test_a_test_folder_changes_fingerprint_and_place(write, clinic):
    folder, other = write(), clinic()
    first = Run("smoke", f"folder:{folder}", ("phantom:kyoto:45",))
    run = Run("smoke", f"folder:{folder},test={other}", ("phantom:kyoto:45",))
    before = run.key("target_data")
    assert len({first.key("target_data"), before}) == 2 and first.place != run.place
    Image.new("RGB", (32, 32), "red").save(other / "AC" / "0.png")
    assert Run("smoke", run.dataset, run.pretrain_sets).key("target_data") != before
    assert Run("smoke", first.dataset, first.pretrain_sets).key("target_data") == first.key("target_data")
    with pytest.raises(HistoDiffusionError, match="shares its images with the target"):
        Run("smoke", run.dataset, (f"folder:{other}",))


def test_images_of_the_test_folder_that_repeat_are_named(write, clinic, capsys):
    folder, other = write(), clinic()
    for c in CLASSES:
        shutil.copy(folder / c / "0.png", other / c / "copy.png")
    assert main([*show(folder), "--test", str(other)]) == 0
    said = capsys.readouterr().out
    assert "3 patients, slides or sets of copies are in more than one of the given splits" in said


def test_a_corrupt_image_of_the_test_folder_is_named(write, clinic):
    folder, other = write(), clinic()
    (other / "AC" / "0.png").write_bytes(b"\x89PNG")
    assert f"{other}/AC/0.png is corrupt" in refusal(f"{folder},test={other}")
    assert len(patches(f"{folder},test={other}", skip_corrupt=True)) == 65


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f, o: ["--folds", "3"], "The set names splits of its own"),
        (lambda f, o: shutil.rmtree(o / "S"), "The class(es) S of"),
        (lambda f, o: shutil.rmtree(f / "S"), "The class(es) S of"),
        (lambda f, o: [shutil.rmtree(o / c) for c in CLASSES] and None, "There is no image"),
        (lambda f, o: shutil.rmtree(o), "check the path after 'test='"),
        (lambda f, o: ["--test", str(f)], "are the same, or one contains the other"),
        (lambda f, o: ["--test", f"npz:{o}"], "only folders can be test sets"),
        (lambda f, o: ["--dataset", "phantom:target"], "--test names a folder to test on for a folder"),
    ],
    ids=["folds", "not in test", "not in first", "empty", "gone", "same", "npz", "phantom"],
)
def test_a_test_folder_that_does_not_fit_is_one_sentence(write, clinic, capsys, change, why):
    folder, other = write(), clinic()
    command = [*show(folder), "--test", f"folder:{other}"]
    more = change(folder, other)
    assert main(command + (more if isinstance(more, list) else [])) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and why in said


def test_pairs_of_hdf5_files_are_sets_with_their_splits(home, tissue, capsys):
    images, labels = np.concatenate([*tissue.values()]), np.repeat([0, 1, 2], 10)
    of = np.arange(30) % 4
    (home / "pairs").mkdir()

    def write(split, part, array):
        with h5py.File(home / "pairs" / f"mine_{split}_{part}.h5", "w") as f:
            f.create_dataset(part, data=array, compression="gzip")

    for split, mask in dict(train=of < 2, valid=of == 2, test=of == 3).items():
        write(split, "x", images[mask])
        write(split, "y", labels[mask].reshape(-1, 1, 1, 1))
    command = [f"h5:{home / 'pairs'}" if word.startswith("folder:") else word for word in show(home)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "splits as the set gives them" in said
    assert [int(n) for n in said.split("\nall")[1].split()[:3]] == [16, 7, 7]
    found = load_patches(f"h5:{home / 'pairs'}", 32)
    assert (found.images[[f.startswith("mine_test") for f in found.files]] == images[of == 3]).all()
    before = Run("smoke", found.name, ("phantom:kyoto:45",)).key("target_data")
    write("test", "y", np.roll(labels[of == 3], 1))
    assert Run("smoke", found.name, ("phantom:kyoto:45",)).key("target_data") != before
    write("test", "y", labels[of == 3][1:])
    assert main(command) == 2 and "for 6 labels, not 8 bits" in capsys.readouterr().err
    assert main(["data", "audit", f"h5:{home / 'none'}"]) == 2 and "after 'h5:'" in capsys.readouterr().err


def test_metadata_of_an_image_folder_is_a_table(write):
    folder = write("images/{c}{i}.png")
    lines = [f"images/{c}{i}.png,{c}" for c in CLASSES for i in range(10)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert patches(f"{folder},labels=metadata.csv").counts() == dict.fromkeys(CLASSES, 10)


def test_squares_of_an_image_stay_in_one_split(write, capsys):
    folder = write(change=lambda im: Image.fromarray(np.concatenate([np.asarray(im), 255 - np.asarray(im)], 1)))
    found = patches(f"{folder},fit=tile")
    assert len(found) == 60 and len({*found.keys}) == 60 and found.counts() == dict.fromkeys(CLASSES, 20)
    assert (found.images[::2] == 255 - found.images[1::2]).all()
    groups, splits = target_splits(found.name, found.keys, found.labels, found.groups)
    side = {i: name for name, indices in splits.items() for i in indices}
    assert all(side[i] == side[i + 1] for i in range(0, 60, 2)) and {*side.values()} == {"train", "validation", "test"}
    assert main([*show(folder), "--fit", "tile"]) == 0
    assert "30 images group 60 patches" in capsys.readouterr().out
    assert main([*show(folder), "--dry-run"]) == 0 and "30 patches, 3 classes" in capsys.readouterr().out
    assert main([*show(folder), "--fit", "tile", "--dry-run"]) == 0
    assert "60 patches, 3 classes" in capsys.readouterr().out


def test_squares_keep_their_patient_and_change_keys(write):
    folder = write(change=lambda im: im.resize((64, 32)))
    before = [Run("smoke", f"folder:{folder}{fit}", ("phantom:kyoto:45",)) for fit in ("", ",fit=crop", ",fit=tile")]
    keys = [run.key("target_data") for run in before]
    assert keys[0] == keys[1] != keys[2] and before[0].target == before[1].target
    lines = [f"{c}/{i}.png,P{i % 5}" for c in CLASSES for i in range(10)]
    (folder / "manifest.csv").write_text("\n".join(["file,patient", *lines]))
    assert {*patches(f"{folder},fit=tile").groups} == {f"P{i}" for i in range(5)}


def test_a_way_to_fit_that_is_not_there_or_not_for_folders_is_one_sentence(write, capsys):
    folder = write()
    assert "has fit=stretch: use crop" in refusal(f"{folder},fit=stretch")
    assert main([*show(folder), "--dataset", "phantom:target", "--fit", "tile"]) == 2
    assert "--fit names how images are cut for a folder" in capsys.readouterr().err


def test_parquet_files_are_sets_with_names_splits_and_patients(home, tissue, capsys):
    pytest.importorskip("pyarrow", reason="needs pyarrow, which is in the extra 'parquet'")
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, rows = ("TUM", "NORM", "STR"), {"train": [], "validation": [], "test": []}
    for k, images in enumerate(tissue.values()):
        for i, image in enumerate(images):
            out = io.BytesIO()
            Image.fromarray(image).save(out, "PNG")
            split = "test" if i > 6 else "validation" if i > 4 else "train"
            rows[split].append(dict(image=dict(bytes=out.getvalue(), path=f"{i}.png"), label=k, patient=f"P{i}"))
    about = {"huggingface": json.dumps(dict(info=dict(features=dict(label=dict(names=names)))))}
    (home / "shards").mkdir()
    for split, part in rows.items():
        table = pa.Table.from_pylist(part).replace_schema_metadata(about)
        pq.write_table(table, home / "shards" / f"{split}-00000-of-00001.parquet")
    command = [f"parquet:{home / 'shards'}" if word.startswith("folder:") else word for word in show(home)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "splits as the set gives them; 10 patients group 30 patches" in said
    assert [int(n) for n in said.split("\nall")[1].split()[:3]] == [15, 6, 9]
    found = load_patches(f"parquet:{home / 'shards'}", 32)
    assert found.classes == names and found.counts() == dict.fromkeys(names, 10)
    of = {f: x for f, x in zip(found.files, found.images)}
    assert (of["test-00000-of-00001.parquet/0"] == tissue["AC"][7]).all()
    broken = rows["test"][:1] + [dict(image=dict(bytes=b"GIF89a", path=""), label=1, patient="P9")]
    pq.write_table(pa.Table.from_pylist(broken).replace_schema_metadata(about), home / "shards" / "test-1.parquet")
    with pytest.raises(HistoDiffusionError, match="test-1.parquet/1 is corrupt or no PNG"):
        load_patches(found.name, 32)
    assert len(load_patches(found.name, 32, skip_corrupt=True)) == 31
