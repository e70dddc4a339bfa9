"""Slides as scanners write them: how many tiles, where, with which pixels; resuming; damaged files."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histodiffusion.core import HistoDiffusionError, load_settings
from histodiffusion.data.layout import read_layout
from histodiffusion.data.patches import load_patches, split_patches
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.study.checks import check_run
from histodiffusion.study.run import Run
from histodiffusion.study.steps import patient_groups, target_data

pytest.importorskip("openslide", reason="needs openslide-python and openslide-bin: install the extra 'slides'")
tifffile = pytest.importorskip("tifffile", reason="needs tifffile, which is in the extra 'dev'")
from histodiffusion.data import slides  # noqa: E402 - needs openslide
from histodiffusion.data.slides import open_slide, read_patch, tile_grid, tile_slides  # noqa: E402

mirror = load_settings().data_mirror
needs_mirror = pytest.mark.skipif(
    mirror is None or not (mirror / "monuseg").is_dir(),
    reason="needs the data mirror: set HISTODIFFUSION_DATA_MIRROR",
)
SIZE = 64


def write_slide(path, image, mpp=0.25, levels=(1, 2), unit="CENTIMETER"):
    "A tiled, pyramidal TIFF that states its resolution."
    per = {"CENTIMETER": 10_000, "INCH": 25_400, "NONE": 1}[unit] / mpp
    with tifffile.TiffWriter(path) as f:
        for k in levels:
            level = np.asarray(Image.fromarray(image).reduce(k))
            f.write(level, tile=(256, 256), photometric="rgb", compression="zlib", metadata=None,
                    subfiletype=int(k > 1), resolution=(per / k, per / k), resolutionunit=unit)  # fmt: skip
    return path


def check_tiles(image, manifest, out, mpp, slide_mpp=0.25):
    "Every patch equals the part of the source that its row names."
    side = round(SIZE * mpp / slide_mpp)
    for row in manifest.itertuples():
        box = (row.x, row.y, row.x + side, row.y + side)
        want = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BOX, box=box))
        got = np.asarray(Image.open(out / row.file))
        assert got.shape == (SIZE, SIZE, 3)
        assert np.abs(got.astype(int) - want).mean() < 8, row  # Lanczos is sharper than a box
        moved = np.roll(want, 3, axis=1)
        assert np.abs(got.astype(int) - want).mean() < 0.7 * np.abs(got.astype(int) - moved).mean(), row


@pytest.fixture(scope="module")
def mosaic():
    "Sixteen squares of tissue, 128 px each, with a strip of glass on the right."
    tissue = phantom_patches(np.tile([3, 5, 7, 8], 4), seed=2, size=128).reshape(4, 4, 128, 128, 3)
    picture = np.concatenate([np.concatenate(list(row), 1) for row in tissue])
    return np.concatenate([picture, np.full((512, 188, 3), 245, np.uint8)], 1)


@pytest.fixture
def slide(mosaic, tmp_path):
    (tmp_path / "in").mkdir()
    return write_slide(tmp_path / "in" / "TCGA-AB-1234-01Z.tif", mosaic)


@pytest.mark.parametrize("mpp, number, step", [(0.25, 64, 64), (0.5, 16, 128), (1.0, 4, 256)])
def test_number_position_and_pixels_of_tiles(mosaic, slide, tmp_path, mpp, number, step):
    manifest = tile_slides(slide, tmp_path / "out", mpp=mpp, size=SIZE, tissue=0.6)
    assert len(manifest) == number and set(manifest.patient) == {"TCGA-AB-1234"}
    assert set(manifest.x) == set(manifest.y) == set(range(0, 512, step))
    assert set(manifest.level) == {int(mpp >= 0.5)}
    check_tiles(mosaic, manifest, tmp_path / "out", mpp)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "manifest.csv"), manifest, check_dtype=False)


def test_a_resolution_between_levels_keeps_its_scale_and_its_grid(mosaic, slide, tmp_path):
    manifest = tile_slides(slide, tmp_path / "out", mpp=0.37, size=SIZE, tissue=0.6, overlap=10)
    step = 54 * 0.37 / 0.25
    assert set(manifest.x) <= {round(i * step) for i in range(20)} and set(manifest.level) == {0}
    assert manifest.x.max() + 64 * 0.37 / 0.25 < 700.5
    check_tiles(mosaic, manifest, tmp_path / "out", 0.37)


@pytest.mark.mirror
@needs_mirror
@pytest.mark.parametrize("mpp, number", [(0.5, 49), (1.0, 9)])
def test_real_tissue_is_tiled_completely(tmp_path, mpp, number):
    path = sorted((mirror / "monuseg").rglob("*.jpg"))[0]
    image = np.asarray(Image.open(path).convert("RGB"))
    slide = write_slide(tmp_path / f"{path.stem}.tif", image)
    manifest = tile_slides(slide, tmp_path / "out", mpp=mpp, size=SIZE, tissue=0.0)
    assert len(manifest) == number and set(manifest.patient) == {path.stem[:12]}
    check_tiles(image, manifest, tmp_path / "out", mpp)
    assert manifest.tissue.mean() > 0.6


@pytest.mark.parametrize("unit, found", [("CENTIMETER", 0.25), ("INCH", 0.25), ("NONE", None)])
def test_resolution_from_tiff_tags(mosaic, tmp_path, unit, found):
    path = write_slide(tmp_path / "a.tif", mosaic, unit=unit)
    if found is None:
        with pytest.raises(HistoDiffusionError, match="mpp_of_file"):
            open_slide(path)
    assert open_slide(path, 0.25).mpp == pytest.approx(0.25)


def test_ordinary_images_and_plain_tiffs(mosaic, tmp_path):
    Image.fromarray(mosaic).save(tmp_path / "a.png", dpi=(72, 72))
    Image.fromarray(mosaic).save(tmp_path / "b.tif", dpi=(25_400 / 0.25,) * 2)
    with pytest.raises(HistoDiffusionError, match="mpp_of_file"):
        tile_slides(tmp_path / "a.png", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    pictures = [open_slide(tmp_path / "a.png", 0.25), open_slide(tmp_path / "b.tif")]
    for slide in pictures:
        assert slide.mpp == pytest.approx(0.25) and len(tile_grid(slide, 0.5, SIZE)) == 5 * 4
        assert (read_patch(slide, 100, 50, 0.25, SIZE) == mosaic[50:114, 100:164]).all()


def test_a_stopped_tiling_resumes_and_leaves_no_partial_slide(mosaic, slide, tmp_path, monkeypatch):
    shutil.copy(slide, slide.with_name("second.tif"))
    whole = tile_slides(slide.parent, tmp_path / "whole", size=SIZE)
    real, calls = slides.read_patch, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(slides, "read_patch", stop)
    with pytest.raises(KeyboardInterrupt):
        tile_slides(slide.parent, tmp_path / "out", size=SIZE)
    listed = pd.read_csv(tmp_path / "out" / "manifest.csv")
    assert set(listed.slide) == {"TCGA-AB-1234-01Z"}
    assert sorted(f"{p.parent.name}/{p.name}" for p in (tmp_path / "out").rglob("*.png")) == sorted(listed.file)
    (tmp_path / "out" / ".second.x1y2").mkdir()  # left by a killed attempt
    calls[:] = [None] * 20
    pd.testing.assert_frame_equal(tile_slides(slide.parent, tmp_path / "out", size=SIZE), whole)
    assert len(calls) == 20 + 16 and not list((tmp_path / "out").glob(".second*"))


def test_the_random_choice_of_patches_follows_the_seed(slide, tmp_path):
    a, b, c = (
        tile_slides(slide, tmp_path / n, size=SIZE, max_patches=5, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert len(a) == 5 and a.equals(b) and not a.equals(c)


@pytest.mark.parametrize("change, message", [
    (dict(mpp=1.0), "was tiled with mpp 0.5, not 1.0"), (dict(seed=3), "was tiled with seed 0, not 3"),
    (dict(mpp=-1), "mpp is -1"), (dict(size=7.5), "size is 7.5"), (dict(patient="(x"), "no regular expression"),
    (dict(tissue=float("nan")), "tissue is nan"), (dict(max_patches=0), "max_patches is 0"),
])  # fmt: skip
def test_wrong_settings_give_one_sentence(slide, tmp_path, change, message):
    tile_slides(slide, tmp_path / "out", size=SIZE)
    with pytest.raises(HistoDiffusionError) as e:
        tile_slides(slide, tmp_path / "out", **(dict(size=SIZE) | change))
    assert message in str(e.value) and "\n" not in str(e.value)


def test_wrong_paths_give_one_sentence(slide, tmp_path):
    out = tmp_path / "out"
    for source, message in ((tmp_path / "no", "There is no slide"), (tmp_path / "empty", "contains no slide")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(HistoDiffusionError, match=message):
            tile_slides(source, out)
    (tmp_path / "empty" / "thesis.txt").write_text("mine")
    with pytest.raises(HistoDiffusionError, match="thesis.txt"):
        tile_slides(slide, tmp_path / "empty")
    with pytest.raises(HistoDiffusionError, match="smaller than one tile"):
        tile_slides(slide, out, mpp=4.0)
    with pytest.raises(HistoDiffusionError, match="cannot give 0.1"):
        tile_slides(slide, out, mpp=0.1)
    assert not out.exists() and [p.name for p in (tmp_path / "empty").iterdir()] == ["thesis.txt"]


def test_without_openslide_the_error_says_what_to_install(slide, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openslide", None)
    with pytest.raises(HistoDiffusionError, match=r"pip install histodiffusion\[slides\]"):
        tile_slides(slide, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(36))
def test_a_damaged_slide_is_read_or_reported(slide, mosaic, tmp_path, seed):
    "Truncated files, and bytes flipped in the header, in the directories and in the tiles."
    rng, good = np.random.default_rng(seed), slide.read_bytes()
    if seed % 3 == 0:
        bad = good[: int(len(good) * rng.uniform(0, 0.999))]
    else:
        page = tifffile.TiffFile(slide).pages[1].offset
        start = (0, page, 0)[seed % 3] if seed % 2 else rng.integers(len(good) - 400)
        bad = bytearray(good)
        for i in rng.integers(start, min(len(good), start + 400), 12):
            bad[i] = rng.integers(256)
    slide.write_bytes(bytes(bad))
    try:
        manifest = tile_slides(slide, tmp_path / "out", size=SIZE, max_patches=40, mpp_of_file=0.25)
    except HistoDiffusionError as e:
        assert "\n" not in str(e) and not list((tmp_path / "out").glob("*"))
    else:
        assert 0 < len(manifest) <= 40 and all((tmp_path / "out" / f).is_file() for f in manifest.file)


def test_a_split_keeps_the_patches_of_a_patient_together(mosaic, tmp_path, monkeypatch):
    for i in range(12):
        Image.fromarray(np.roll(mosaic[:256, :512], 17 * i, 1)).save(tmp_path / f"p{i // 2}-{i % 2}.png")
    manifest = tile_slides(
        tmp_path, tmp_path / "out", mpp=0.5, size=32, mpp_of_file=0.5, max_patches=20, patient=r"^p\d+"
    )
    assert set(manifest.patient) == {f"p{i}" for i in range(6)}
    for i, file in enumerate(manifest.file):
        place = tmp_path / "out" / "ab"[i % 2] / file.rsplit("/", 1)[1]
        place.parent.mkdir(exist_ok=True)
        (tmp_path / "out" / file).rename(place)
    patches = load_patches(f"folder:{tmp_path / 'out'}", size=32)
    of = {row.file.rsplit("/", 1)[1]: row.patient for row in manifest.itertuples()}
    assert sorted(patches.groups) == sorted(of.values()) and len(patches) == 240
    split = split_patches(patches.keys, patches.groups)
    sides = [{patches.groups[i] for i in indices} for indices in split.values()]
    assert all(sides) and sum(map(len, sides)) == 6
    assert sum(map(len, split.values())) == 240
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path / "results"))
    run = Run("smoke", f"folder:{tmp_path / 'out'}", ["phantom:kyoto:9"])
    target_data(run)
    groups, known = patient_groups(run)  # an interval takes them as what was drawn, not their patches
    assert known and len(set(groups)) < 6 < len(groups) and set(groups) <= set(of.values())
    assert any(f"few patients or slides in the test split ({len(set(groups))})" in w for w in check_run(run))


def test_images_beside_slides_are_left_alone(slide, mosaic, tmp_path, capsys):
    for name in (f"{slide.stem}.jpg", f"{slide.stem}_mask.png", "thumbnail.png"):
        Image.fromarray(mosaic).reduce(2).save(slide.parent / name)
    manifest = tile_slides(slide.parent, tmp_path / "out", size=SIZE, mpp_of_file=0.25)
    assert set(manifest.slide) == {slide.stem}
    assert "3 image(s) beside slides left alone" in capsys.readouterr().out
    every = tile_slides(slide.parent, tmp_path / "all", size=SIZE, mpp_of_file=0.25, images=True)
    assert len(set(every.slide)) == 4


def test_slides_of_one_name_in_linked_folders(slide, tmp_path):
    for patient in ("p1", "p2"):
        (tmp_path / "real" / patient).mkdir(parents=True)
        shutil.copy(slide, tmp_path / "real" / patient / "HE.tif")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "batch").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "p1" / "circle").symlink_to(tmp_path / "real")
    for _ in range(2):  # the second call changes nothing
        manifest = tile_slides(tmp_path / "source", tmp_path / "out", size=SIZE)
        assert set(manifest.slide) == {"p1_HE", "p2_HE"} and manifest.slide.value_counts().nunique() == 1
    tile_slides(tmp_path / "real" / "p1" / "HE.tif", tmp_path / "one", size=SIZE)
    with pytest.raises(HistoDiffusionError, match="which is now named p._HE: delete that folder"):
        tile_slides(tmp_path / "real", tmp_path / "one", size=SIZE)
    assert load_layout(tmp_path / "out") == ((), {"p1_HE", "p2_HE"})


def test_patients_of_the_command_line(slide, tmp_path, capsys):
    from histodiffusion.app.cli import main

    shutil.copy(slide, slide.with_name("case7_b.tif"))
    command = ["tile", str(slide.parent), "--out", str(tmp_path / "out"), "--size", str(SIZE)]
    assert main([*command, "--patient", r"case(\d+)"]) == 0
    assert "7" in set(pd.read_csv(tmp_path / "out" / "manifest.csv", dtype=str).patient)
    assert main([*command, "--patient", "("]) == 2 and "no regular expression" in capsys.readouterr().err


def test_folders_of_slides_are_classes_when_asked(mosaic, tmp_path, monkeypatch, capsys):
    from histodiffusion.app.cli import main

    for name in ("data_home", "results_path"):
        monkeypatch.setenv(f"HISTODIFFUSION_{name.upper()}", str(tmp_path / "own" / name))
    for i in range(6):
        path = tmp_path / "slides" / ("TUMOUR", "STROMA")[i % 2] / f"P{i}" / "HE.tif"
        path.parent.mkdir(parents=True)
        write_slide(path, np.roll(mosaic, 40 * i, 0))
    command = ["tile", str(tmp_path / "slides"), "--size", str(SIZE), "--patient", r"/(P\d)/", "--out"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert "slides are in 2 folders, such as STROMA: --label-from folder" in capsys.readouterr().out
    assert load_layout(tmp_path / "plain") == ((), {f"P{i}" for i in range(6)})
    assert main([*command, str(tmp_path / "out"), "--label-from", "folder"]) == 0
    assert "classes: STROMA 48, TUMOUR 48; as labelled set" in capsys.readouterr().out
    patches = load_patches(f"folder:{tmp_path / 'out'}", size=32)
    assert patches.counts() == dict(STROMA=48, TUMOUR=48)
    assert {(g, patches.classes[k]) for g, k in zip(patches.groups, patches.labels)} == {
        (f"P{i}", ("TUMOUR", "STROMA")[i % 2]) for i in range(6)
    }
    assert main([*command, str(tmp_path / "plain"), "--label-from", "folder"]) == 2
    assert "was tiled with label_from none, not folder" in capsys.readouterr().err
    (tmp_path / "slides" / "TUMOUR" / "P0").rename(tmp_path / "slides" / "STROMA" / "P0")
    assert main([*command, str(tmp_path / "out"), "--label-from", "folder"]) == 2
    assert "had another patient or class: delete that folder" in capsys.readouterr().err


def test_slides_without_folders_have_no_class(slide, tmp_path):
    with pytest.raises(HistoDiffusionError, match="is in a folder that names its class: arrange them as class/slide"):
        tile_slides(slide.parent, tmp_path / "out", size=SIZE, label_from="folder")
    assert not (tmp_path / "out").exists()


def square(name, x, y, side=128, hole=None, **properties):
    "A square of the mosaic as QuPath exports it."
    box = lambda x, y, w: [[x, y], [x + w, y], [x + w, y + w], [x, y + w], [x, y]]  # noqa: E731
    rings = [box(x * 128, y * 128, side), *([box(*hole)] if hole else [])]
    kind = dict(objectType="annotation", classification=dict(name=name, color=[1, 2, 3]), isLocked=True)
    geometry = dict(type="Polygon", coordinates=rings)
    return dict(type="Feature", id="x", geometry=geometry, properties=kind | properties)


def draw(path, *features):
    path.write_text(json.dumps(dict(type="FeatureCollection", features=features)))
    return path


def test_annotations_are_the_labels_of_patches(slide, tmp_path, monkeypatch):
    for name in ("data_home", "results_path"):
        monkeypatch.setenv(f"HISTODIFFUSION_{name.upper()}", str(tmp_path / "own" / name))
    known = np.random.default_rng(0).choice(["", "Stroma", "Tumour", "Mucus"], (4, 4), p=[0.4, 0.2, 0.2, 0.2])
    drawn = [square(c, x, y) for (y, x), c in np.ndenumerate(known) if c]
    file = draw(tmp_path / f"{slide.stem}.geojson", *drawn)
    for size, mpp in ((SIZE, 0.5), (SIZE, 0.25), (32, 0.5)):
        out = tmp_path / f"{size} {mpp}"
        manifest = tile_slides(slide.parent, out, size=size, mpp=mpp, tissue=0.3, annotations=tmp_path)
        per = (128 * 0.25 / mpp / size) ** 2
        assert len(manifest) == per * (known != "").sum() and len({*known.ravel()}) == 4
        assert all(row.label == known[row.y // 128, row.x // 128] for row in manifest.itertuples())
        found = load_patches(f"folder:{out}", size=32)
        assert found.classes == ("Mucus", "Stroma", "Tumour") and {*found.groups} == {"TCGA-AB-1234"}
    file.write_text(file.read_text().replace("Mucus", "Fat"))
    with pytest.raises(HistoDiffusionError, match="was made with other annotations than"):
        tile_slides(slide.parent, out, size=32, mpp=0.5, tissue=0.3, annotations=tmp_path)


@pytest.mark.parametrize(
    ("features", "coverage", "labels"),
    [
        ([square("T", 0, 0, 100)], 0.5, ["T"]),  # (100/128)² = .61
        ([square("T", 0, 0, 100)], 0.7, []),
        ([square("T", 0, 0, hole=(10, 10, 100))], 0.5, []),
        ([square("T", 0, 0, hole=(10, 10, 60))], 0.5, ["T"]),
        ([square("T", 0, 0), square("S", 0, 0, 100)], 0.5, ["T"]),
        ([square("T", 0, 0), square("S", 0, 0)], 0.5, []),
        ([square("T", 0, 0, 64), square("T", 0.5, 0, 64), square("S", 0, 0.5, 63)], 0.5, ["T"]),
        ([square(None, 0, 0), square("T", 1, 1), square("Ignore*", 0, 0)], 0.5, ["T"]),
        ([square("T", 0, 0, objectType="detection"), square("T", 1, 1)], 0.5, ["T"]),
        ([square("T", -1, -1, 256 + 32), square("T", 400, 0)], 0.5, ["T"]),
    ],
)
def test_coverage_holes_and_overlaps_of_annotations(slide, tmp_path, features, coverage, labels):
    file = draw(tmp_path / "any.geojson", *features)
    options = dict(size=SIZE, mpp=0.5, tissue=0.3, annotations=file, coverage=coverage)
    if labels:
        assert tile_slides(slide, tmp_path / "out", **options).label.tolist() == labels
    else:
        with pytest.raises(HistoDiffusionError, match="annotations over .* of it: lower --tissue or --coverage"):
            tile_slides(slide, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def test_what_annotations_leave_out_is_said(slide, tmp_path, capsys):
    from histodiffusion.app.cli import main

    shutil.copy(slide, slide.with_name("case7.tif"))
    (tmp_path / "all").mkdir()
    drawn = square("T", 0, 0), square(None, 1, 1), square("S", 2, 2), square("T", 2, 2)
    draw(tmp_path / "all" / f"{slide.name}.geojson", *drawn)
    draw(tmp_path / "all" / "other.geojson")
    command = ["tile", str(slide.parent), "--size", str(SIZE), "--annotations", str(tmp_path / "all"), "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for sentence in ("1 slide(s) without annotations are left out, such as case7.tif", "left out 1 without a class",
                     "1 tiles are covered by two classes alike", "1 file(s) of annotations have no slide",
                     "classes: T 1; as labelled set"):  # fmt: skip
        assert sentence in said
    assert main([*command, str(tmp_path / "no"), "--label-from", "folder"]) == 2
    (tmp_path / "all" / f"{slide.name}.geojson").write_text("{")
    assert main([*command, str(tmp_path / "broken")]) == 2
    said = capsys.readouterr().err
    assert "is no readable GeoJSON" in said and not (tmp_path / "broken").exists()


def load_layout(folder):
    found = read_layout(folder)
    return found.classes, {*found.groups}


@pytest.mark.parametrize("unit", ["µm", "nm", "mm", "ImageJ µm", "ImageJ mm"])
def test_pixel_sizes_of_ome_tiff_and_imagej(mosaic, tmp_path, unit):
    size, path = {"µm": 0.25, "nm": 250.0, "mm": 0.00025}[unit.split()[-1]], tmp_path / "a.ome.tif"
    if unit.startswith("ImageJ"):
        meta = dict(unit={"µm": "um"}.get(unit.split()[-1], unit.split()[-1]))
        tifffile.imwrite(path, mosaic, imagej=True, resolution=(1 / size, 1 / size), metadata=meta)
    else:
        about = {f"PhysicalSize{a}": size for a in "XY"} | {f"PhysicalSize{a}Unit": unit for a in "XY"}
        tifffile.imwrite(path, mosaic, photometric="rgb", tile=(256, 256), metadata=dict(axes="YXS") | about)
    assert open_slide(path).mpp == pytest.approx(0.25)


@pytest.mark.parametrize("absorbed", [(0.85, 0.51, 0.14), (0.87, 0.45, 0.16)], ids=["trichrome", "alcian-blue"])
def test_blue_tissue_needs_a_switch_that_the_message_names(mosaic, tmp_path, absorbed):
    density = -np.log10(np.maximum(mosaic / 255, 1 / 255)).sum(-1, keepdims=True) / 3
    stain = np.array(absorbed) / np.linalg.norm(absorbed)
    Image.fromarray(np.uint8(255 * 10 ** (-density * stain * 3**0.5))).save(tmp_path / "blue.png")
    with pytest.raises(HistoDiffusionError, match="--any-colour if the tissue is blue or green"):
        tile_slides(tmp_path / "blue.png", tmp_path / "out", size=SIZE, mpp_of_file=0.25)
    found = tile_slides(tmp_path / "blue.png", tmp_path / "out", size=SIZE, mpp_of_file=0.25, any_colour=True)
    assert len(found) == 16


def test_strange_files_among_slides_are_named_or_skipped(slide, tmp_path, capsys):
    os.mkfifo(slide.with_name("a.svs"))
    slide.with_name("b.svs").symlink_to(tmp_path / "nowhere")
    slide.with_name("c.tif").symlink_to("/dev/zero")
    slide.with_name("d.svs").mkdir()
    slide.with_name("e.svs").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(HistoDiffusionError, match="a.svs is not a regular file"):
        tile_slides(slide.parent, tmp_path / "out", size=SIZE)
    manifest = tile_slides(slide.parent, tmp_path / "out", size=SIZE, skip_corrupt=True)
    said = capsys.readouterr().out
    assert set(manifest.slide) == {slide.stem} and said.count("skipped: ") == 4
    assert "b.svs is a link to a file that is not there" in said and "c.tif is not a regular file" in said


def test_help_on_a_terminal_without_greek_letters():
    import subprocess
    import sys

    for encoding in ("cp1252", "ascii"):
        done = subprocess.run([sys.executable, "-m", "histodiffusion", "tile", "--help"], capture_output=True,
                              env=os.environ | dict(PYTHONIOENCODING=encoding), timeout=120)  # fmt: skip
        assert done.returncode == 0 and b"Traceback" not in done.stderr and b"--any-colour" in done.stdout
