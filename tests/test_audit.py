"""The data audit: copies in folders are found, other patches are not, and a leaking target is refused."""

import random

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histodiffusion.app.cli import main
from histodiffusion.core import HistoDiffusionError, load_settings
from histodiffusion.data import copies as audit
from histodiffusion.data.catalogue import REGISTRY, may_show
from histodiffusion.data.copies import audit_pair, audit_set, find_overlap, scan_set
from histodiffusion.data.leakage import leakage
from histodiffusion.data.patches import load_patches, split_patches
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.study.artefacts import check_leakage
from histodiffusion.study.run import Run

mirror = load_settings().data_mirror
needs_mirror = pytest.mark.skipif(
    mirror is None or not (mirror / "kather2016-grey64").is_dir(),
    reason="needs the data mirror: set HISTODIFFUSION_DATA_MIRROR",
)


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    "What is stored, out of the way."
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path / "results"))
    monkeypatch.setenv("HISTODIFFUSION_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HISTODIFFUSION_PROGRESS", "off")
    return tmp_path / "results"


@pytest.fixture(scope="module")
def tissue():
    "24 patches of two classes, 150 px."
    return [Image.fromarray(im) for im in phantom_patches([3, 5] * 12, seed=4, size=150)]


@pytest.fixture
def target(tmp_path, tissue):
    "A labelled folder of these patches."
    for i, im in enumerate(tissue):
        folder = tmp_path / "target" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        im.save(folder / f"{i}.png")
    return tmp_path / "target"


def archive(tmp_path, images, suffix="png", **options):
    "A folder of unlabelled images."
    folder = tmp_path / "archive"
    folder.mkdir(exist_ok=True)
    for name, im in images.items():
        im.save(folder / f"{name}.{suffix}", **options)
    return f"folder:{folder}"


def found(a, b=None):
    "file_b -> (file_a, kind)."
    return {row.file_b: (row.file_a, row.kind) for row in find_overlap(a, b).itertuples()}


def test_exact_copy_under_another_name(tmp_path, target, tissue):
    other = archive(tmp_path, {"renamed": tissue[2]}, "tif")
    assert found(f"folder:{target}", other) == {"renamed.tif": ("a/2.png", "exact")}


@pytest.mark.parametrize("position", range(8))
def test_copy_in_any_position(tmp_path, target, tissue, position):
    turned = Image.fromarray(
        np.ascontiguousarray(np.moveaxis(audit.turn(np.moveaxis(np.asarray(tissue[5]), -1, 0), position), 0, -1))
    )
    other = archive(tmp_path, {"turned": turned}, "jpg", quality=70)
    assert found(f"folder:{target}", other) == {"turned.jpg": ("b/5.png", "near")}


def test_turned_by_its_position_the_second_image_of_a_pair_equals_the_first(tmp_path, target, tissue):
    for name, method in (
        ("a", Image.Transpose.ROTATE_90),
        ("b", Image.Transpose.TRANSPOSE),
        ("c", Image.Transpose.ROTATE_270),
    ):
        other = archive(tmp_path, {name: tissue[7].transpose(method)})
    pairs = find_overlap(f"folder:{target}", other)
    left, right = scan_set(f"folder:{target}").thumbs[pairs.i].astype(int), scan_set(other).thumbs[pairs.j].astype(int)
    assert len(pairs) == 3 and all(
        np.abs(a - audit.turn(b, k)).max() <= 8 for a, b, k in zip(left, right, pairs.position)
    )


def test_grey_small_recompressed_copy(tmp_path, target, tissue):
    small = tissue[4].convert("L").resize((64, 64), Image.Resampling.BICUBIC).transpose(Image.Transpose.ROTATE_180)
    other = archive(tmp_path, {"twin": small}, "jpg", quality=75)
    assert found(f"folder:{target}", other) == {"twin.jpg": ("a/4.png", "near")}


def test_copy_in_another_tone(tmp_path, target, tissue):
    pale = tissue[9].point(lambda v: int(60 + 0.6 * v))
    assert found(f"folder:{target}", archive(tmp_path, {"pale": pale})) == {"pale.png": ("b/9.png", "near")}


def test_other_tissue_is_no_copy(tmp_path, target):
    new = {str(i): Image.fromarray(im) for i, im in enumerate(phantom_patches([3, 5] * 12, seed=5, size=150))}
    assert found(f"folder:{target}", archive(tmp_path, new)) == {}


def test_white_patches_are_flat_and_not_copies(tmp_path, target):
    for i in range(3):
        Image.new("RGB", (64, 64), "white").save(target / "ab"[i % 2] / f"white{i}.png")
    found = audit_set(f"folder:{target}")
    s = found.summary()
    assert (s["flat"], s["flat_pairs"], s["exact"], s["near"], s["conflicts"]) == (3, 2, 0, 0, 0)
    other = archive(tmp_path, {"white": Image.new("RGB", (64, 64), "white")})
    assert leakage(f"folder:{target}", [other]).empty


def test_two_labels_of_one_patch_are_a_conflict(target, tissue):
    tissue[0].save(target / "b" / "again.png")
    tissue[2].transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(target / "a" / "flipped.png")
    found = audit_set(f"folder:{target}")
    assert (found.summary()["exact"], found.summary()["near"], found.summary()["conflicts"]) == (1, 1, 1)
    assert found.pairs[found.pairs.conflict].file_b.tolist() == ["b/again.png"]


def test_copies_that_cross_the_splits_are_counted(target, tissue):
    for i, im in enumerate(tissue):
        im.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target / "ab"[i % 2] / f"mirrored {i}.png")
    found = audit_set(f"folder:{target}")
    patches = load_patches(f"folder:{target}")
    side = {patches.keys[i]: name for name, indices in split_patches(patches.keys).items() for i in indices}
    key = dict(zip(found.scan.table.file, found.scan.table.key))
    wrong = [side[key[p.file_a]] != side[key[p.file_b]] for p in found.pairs.itertuples()]
    assert len(wrong) == 24 and found.summary()["crossings"] == sum(wrong) > 0


def test_what_a_set_holds(target):
    (target / "a" / "broken.png").write_bytes(b"no image")
    s, text = audit_set(f"folder:{target}").summary(), repr(audit_set(f"folder:{target}"))
    assert (s["images"], s["side"], s["modes"], s["classes"], s["per_class"], s["corrupt"]) == (
        24,
        "150 px",
        "RGB",
        2,
        "12",
        1,
    )
    assert 0 < s["eosin"] < 1 and 0 < s["haematoxylin"] < 1 and 100 < s["red"] < 250 and "corrupt" in text
    assert scan_set(f"folder:{target}").corrupt.file.tolist() == ["a/broken.png"]
    assert "<table" in audit_set(f"folder:{target}")._repr_html_()


def test_index_of_large_sets_finds_what_the_full_comparison_finds(monkeypatch):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(im) for im in phantom_patches(np.arange(900) % 9, seed=6, size=48)]
    copies = [im.transpose(Image.Transpose(k % 7)).convert("RGB", (1.1, 0, 0, 4, 0, 1, 0, 0, 0, 0, 0.9, 8))
              for k, im in enumerate(images[::6])]  # fmt: skip
    thumbs = np.stack([audit.thumbnail(im) for im in images + copies])[rng.permutation(1050)]
    pairs = lambda: {tuple(r) for r in audit._alike(thumbs, thumbs, 0.7, 0.7, "")[["i", "j"]].astype(int).values}  # noqa: E731
    full = pairs()
    monkeypatch.setattr(audit, "INDEX_FROM", 100)
    indexed = pairs()
    assert indexed <= full and len(full) > 1050 + 200 and len(indexed) >= 0.99 * len(full)


def test_changed_folder_is_read_anew_and_another_of_equal_names_too(tmp_path, target, tissue):
    spec = f"folder:{target}"
    assert found(spec) == {}
    tissue[1].save(target / "a" / "new.png")
    assert found(spec) == {"b/1.png": ("a/new.png", "exact")}
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(tmp_path / name / "1.bmp")
    assert found(f"folder:{tmp_path / 'one'}", f"folder:{tmp_path / 'two'}") == {}


def test_second_look_reads_no_image_and_a_broken_store_is_made_anew(results, target, monkeypatch):
    spec = f"folder:{target}"
    first = find_overlap(spec)
    monkeypatch.setattr(audit, "packed_dataset", lambda *a, **k: pytest.fail(f"{a} was read again"))
    pd.testing.assert_frame_equal(find_overlap(spec), first)
    monkeypatch.undo()
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(results))
    (stored,) = (results / "artefacts" / "audit").glob("scan-*.npz")
    stored.write_bytes(stored.read_bytes()[:300])
    assert len(scan_set(spec)) == 24


def run_of(target, *pretraining, **options):
    return Run("smoke", f"folder:{target}", pretraining, **options)


def test_leaking_target_is_refused_unless_allowed(tmp_path, target, tissue, capsys):
    other = archive(tmp_path, {f"scan {i}": im.transpose(Image.Transpose.ROTATE_90) for i, im in enumerate(tissue)})
    run = run_of(target, other, "phantom:kyoto:90")
    patches = load_patches(run.dataset)
    n = {name: len(i) for name, i in split_patches(patches.keys).items()}
    with pytest.raises(HistoDiffusionError) as e:
        check_leakage(run)
    said = str(e.value)
    assert f"repeats {n['test']} test" in said and other in said and run.dataset in said and "--allow-leakage" in said
    leaks = pd.read_csv(run.folder("pretraining_data") / "leakage.csv")
    assert len(leaks) == 24 and leaks.split.value_counts().to_dict() == {k: v for k, v in n.items() if v}
    assert [patches.keys[i] for i in leaks["index"]] == [
        dict(zip(scan_set(run.dataset).table.file, scan_set(run.dataset).table.key))[f] for f in leaks.target_file
    ]
    check_leakage(run_of(target, other, allow_leakage=True))
    assert "continuing although 24 pairs" in capsys.readouterr().out


def test_repeated_images_can_be_left_out_of_the_pool(tmp_path, target, tissue, capsys):
    from histodiffusion.study.steps import pretraining_data

    patches = load_patches(f"folder:{target}")
    train = {patches.keys[i] for i in split_patches(patches.keys)["train"]}
    table = scan_set(f"folder:{target}").table
    held = {
        f"held {i}": Image.open(target / f) for i, (k, f) in enumerate(zip(table.key, table.file)) if k not in train
    }
    # the only image that is not held back is green all over, and so every patch of the pool must be
    other = archive(tmp_path, held | {"green": Image.new("RGB", (150, 150), (0, 200, 0))})
    options = dict(overrides=dict(image_size=32, pretrain_patches=40))
    with pytest.raises(HistoDiffusionError, match="--skip-leaks"):
        pretraining_data(run_of(target, other, **options))
    run = run_of(target, other, skip_leaks=True, **options)
    pool = np.load(pretraining_data(run) / "pool.npy")
    assert len(pool) == 40 and pool[..., 1].min() > 50 and pool[..., [0, 2]].max() == 0
    assert f"{other}: {len(held)} images repeat test or validation patches" in capsys.readouterr().out
    assert Run(**run.parameters).parameters == run.parameters and run.key("autoencoder") != run_of(
        target, other, **options
    ).key("autoencoder")


def test_training_patches_in_the_pool_are_listed_but_not_refused(tmp_path, target, tissue):
    keys = load_patches(f"folder:{target}").keys
    train = {keys[i] for i in split_patches(keys)["train"]}
    table = scan_set(f"folder:{target}").table
    known = {f"copy of {k}": Image.open(target / f) for k, f in zip(table.key, table.file) if k in train}
    run = run_of(target, archive(tmp_path, known))
    check_leakage(run)
    leaks = pd.read_csv(run.folder("pretraining_data") / "leakage.csv")
    assert len(leaks) == len(train) and set(leaks.split) == {"train"} and set(leaks.kind) == {"exact"}


def test_stage_asks_before_the_pool_is_cut_and_the_command_line_says_it(tmp_path, target, tissue, results, capsys):
    other = archive(tmp_path, {str(i): im for i, im in enumerate(tissue)})
    words = ["pretrain", "--profile", "smoke", "--dataset", f"folder:{target}", "--pretrain-sets", other]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--allow-leakage" in err and err.startswith("histodiffusion: Pre-training set")
    assert not list(results.rglob("pool.npy")) and len(list(results.rglob("leakage.csv"))) == 1


def test_pool_made_for_one_target_is_still_checked_for_the_next(tmp_path, target, tissue, capsys):
    from histodiffusion.study.steps import autoencoder, pretraining_data

    other = archive(tmp_path, {str(i): im for i, im in enumerate(tissue)})
    small = dict(image_size=32, pretrain_patches=20)
    pretraining_data(Run("smoke", "phantom:target:90", (other,), overrides=small))
    run = run_of(target, other, overrides=small)
    assert run.done("pretraining_data")
    with pytest.raises(HistoDiffusionError, match="--allow-leakage"):
        autoencoder(run)
    words = ["--dataset", f"folder:{target}", "--pretrain-sets", other]
    words += ["--image-size", "32", "--pretrain-patches", "20"]
    for command in ("data", "pretrain", "reproduce"):
        assert main([command, "--profile", "smoke", "--label-fraction", "1", *words]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "leave these images out with --skip-leaks" in err, command


def test_same_source_passes_when_allowed():
    with pytest.raises(HistoDiffusionError, match="--allow-leakage"):
        Run("smoke", "phantom:target", ("phantom:target:90",))
    run = Run("smoke", "phantom:target", ("phantom:target:90",), allow_leakage=True)
    assert run.parameters["allow_leakage"] and Run(**run.parameters).parameters == run.parameters


def test_command_names_what_is_shared(tmp_path, target, tissue, capsys):
    other = archive(tmp_path, {"scan": tissue[3].transpose(Image.Transpose.ROTATE_90)})
    (tmp_path / "archive" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["data", "audit", f"folder:{target}", other]) == 0
    said = capsys.readouterr().out
    assert "corrupt: bad.png" in said and "0 exact, 1 near pairs, such as b/3.png = scan.png" in said
    assert main(["data", "list", "pcam"]) == 2
    assert "use 'data audit SET ...'" in capsys.readouterr().err
    assert main(["data", "audit", "katter"]) == 2
    assert "Unknown data set 'katter'" in capsys.readouterr().err


def test_only_free_licences_are_shown():
    shown = {s for s in REGISTRY if may_show(s)}
    assert {"pcam", "nct-crc-he", "breakhis"} <= shown
    assert not shown & {"monuseg", "tcga-ut", "crc-polyps", "lc25000"}


def mutated(data, rng):
    "The bytes of an image file with some of them changed, cut out or doubled."
    data = bytearray(data)
    for _ in range(rng.choice([1, 4, 30])):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 64))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 40)]
        elif kind == 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(8))
        else:
            data = data[: max(1, at)]
        data = data or bytearray(b"x")
    return bytes(data)


def test_sixty_mutated_files_are_read_or_named(tmp_path, tissue):
    rng, folder = random.Random(0), tmp_path / "mutated"
    folder.mkdir()
    for k, suffix in enumerate(("png", "jpg", "tif", "bmp", "webp")):
        tissue[k].resize((48, 48)).save(folder / f"good.{suffix}")
        data = (folder / f"good.{suffix}").read_bytes()
        for i in range(12):
            (folder / f"{i}.{suffix}").write_bytes(mutated(data, rng))
    (folder / "empty.png").touch()
    found = audit_set(f"folder:{folder}")
    s = found.summary()
    assert s["images"] + s["corrupt"] == 66 and s["corrupt"] > 10 and repr(found)
    assert "empty.png" in set(found.scan.corrupt.file) and (found.scan.corrupt.reason.str.len() > 0).all()


def test_set_of_corrupt_files_alone(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"x")
    with pytest.raises(HistoDiffusionError, match="None of 1 images can be read"):
        audit_set(f"folder:{tmp_path / 'bad'}")


@pytest.mark.mirror
@needs_mirror
def test_every_colour_tile_of_kather_is_found_among_the_grey_ones():
    pairs = find_overlap("kather2016-grey64", "kather2016-colour")
    assert pairs.file_b.nunique() >= 150 and (pairs.kind == "near").sum() >= 135
    assert (pairs.label_a == pairs.label_b).all()


@pytest.mark.mirror
@pytest.mark.slow
@needs_mirror
def test_sets_of_other_origin_share_nothing_and_mirrored_polyps_are_found():
    for other in ("pcam", "crc-polyps"):
        row = audit_pair("kather2016-grey64", other)
        assert (row["exact"], row["near"]) == (0, 0)
    assert leakage("kather2016-grey64", ["pcam", "crc-polyps"]).empty
    assert audit_set("crc-polyps").summary()["crossings"] > 200
