"Packed sets: every layout is read through one memory map. Splits keep copies and patients together."

import h5py
import numpy as np
import pytest
from PIL import Image

from histodiffusion.app.cli import main
from histodiffusion.core import HistoDiffusionError
from histodiffusion.data.leakage import leakage, split_groups
from histodiffusion.data.packed import pack_images
from histodiffusion.data.patches import dataset_fingerprint, load_patches, packed_dataset, split_patches
from histodiffusion.data.phantom import phantom_patches
from histodiffusion.data.pool import unlabelled_pool


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path / "results"))
    monkeypatch.delenv("HISTODIFFUSION_DATA_MIRROR", raising=False)
    return tmp_path


def write_set(folder, n=12):
    "Two classes of phantom patches."
    for c, k in (("ADI", 0), ("TUM", 8)):
        (folder / c).mkdir(parents=True)
        for i, image in enumerate(phantom_patches([k] * n, seed=k)):
            Image.fromarray(image).save(folder / c / f"{i}.png")
    return f"folder:{folder}"


def test_patchcamelyon_is_packed_from_its_hdf5_files(home):
    folder = home / "data" / "patchcamelyon"
    folder.mkdir(parents=True)
    rng, images, labels = np.random.default_rng(0), [], []
    for split, n in (("train", 6), ("valid", 3), ("test", 2)):
        x = rng.integers(0, 256, (n, 96, 96, 3), dtype=np.uint8)
        y = rng.integers(0, 2, (n, 1, 1, 1), dtype=np.uint8)
        for part, data in (("x", x), ("y", y)):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_{part}.h5", "w") as f:
                f.create_dataset(part, data=data, compression="gzip")
        images.append(x)
        labels.append(y.ravel())
    packed = packed_dataset("patchcamelyon")
    assert np.array_equal(packed.stacked, np.concatenate(images))
    assert packed.labels.tolist() == np.concatenate(labels).tolist()
    assert packed.names[:1] + packed.names[-1:] == ["train/0", "test/1"]
    assert load_patches("patchcamelyon", 64, 1).images.shape == (11, 64, 64, 1)
    pool, origin = unlabelled_pool(["patchcamelyon", "phantom:kyoto:18"], 20)
    assert pool.shape == (len(origin), 64, 64, 3) and set(origin) == {0, 1}
    target = home / "target"
    for c in ("a", "b"):
        (target / c).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(target / c / f"{i}.png")
    Image.fromarray(images[0][2][:, ::-1]).save(target / "a" / "leak.png")
    found = leakage(f"folder:{target}", ["patchcamelyon"])
    assert found[["pretrain_file", "target_file"]].values.tolist() == [["train/2", "a/leak.png"]]


def test_a_set_is_packed_once_and_again_when_a_file_changes(home):
    spec = write_set(home / "set")
    before = dataset_fingerprint(spec)
    first = packed_dataset(spec)
    assert len(list((home / "data" / "packed").glob("folder-*"))) == 1
    packed_dataset(spec)
    image = np.asarray(Image.open(home / "set" / "ADI" / "0.png")).copy()
    image[0, 0] ^= 1
    Image.fromarray(image).save(home / "set" / "ADI" / "0.png")
    assert dataset_fingerprint(spec) != before
    second = packed_dataset(spec)
    assert np.array_equal(second[0], image) and not np.array_equal(first[0], image)


def test_corrupt_images_are_packed_around_once_and_named_each_time(home):
    spec = write_set(home / "set")
    (home / "set" / "ADI" / "5.png").write_bytes(b"\x89PNG broken")
    for _ in range(2):
        with pytest.raises(HistoDiffusionError, match="5.png is corrupt"):
            packed_dataset(spec)
    packed = packed_dataset(spec, skip_corrupt=True)
    assert (len(packed), [name for name, _ in packed.corrupt]) == (23, ["ADI/5.png"])
    assert len(list((home / "data" / "packed").glob("*folder*"))) == 1


def test_an_interrupted_packing_leaves_nothing(home):
    def read(item):
        if item == 5:
            raise KeyboardInterrupt
        return np.zeros((8, 8), np.uint8)

    with pytest.raises(KeyboardInterrupt):
        pack_images(range(9), home / "packed", read)
    assert not list(home.glob("*packed*"))


def test_copies_never_cross_a_split(home):
    spec = write_set(home / "set", 30)
    for i in range(30):
        image = np.asarray(Image.open(home / "set" / "TUM" / f"{i}.png"))
        Image.fromarray(image[:, ::-1]).save(home / "set" / "TUM" / f"mirrored-{i}.png")
    patches = load_patches(spec)
    names = packed_dataset(spec).names
    at = {name: i for i, name in enumerate(names)}
    pairs = [(at[f"TUM/{i}.png"], at[f"TUM/mirrored-{i}.png"]) for i in range(30)]

    def crossing(groups):
        split = np.empty(len(patches), object)
        for name, i in split_patches(patches.keys, groups).items():
            split[i] = name
        return sum(split[i] != split[j] for i, j in pairs)

    assert crossing(None) > 0
    assert crossing(split_groups(spec, patches.keys)) == 0


def test_command_line_tiles_a_large_image(home, capsys):
    (home / "images").mkdir()
    tissue = np.concatenate([np.concatenate(list(phantom_patches([8] * 4, seed=s)), 1) for s in range(4)])
    Image.fromarray(tissue).save(home / "images" / "a.png")
    arguments = ["tile", str(home / "images"), "--out", str(home / "tiles"), "--mpp", "1", "--size", "32"]
    assert main(arguments) == 2
    assert "mpp" in capsys.readouterr().err
    assert main([*arguments, "--mpp-of-file", "0.5"]) == 0
    assert "16 patches of 1 slide(s)" in capsys.readouterr().out


def test_command_line_refuses_to_export_before_patches_exist(home, capsys):
    assert main(["export", "--out", str(home / "shared")]) == 2
    assert "histodiffusion select" in capsys.readouterr().err
    assert not (home / "shared").exists()


def test_stain_setting_changes_colour_patches_and_refuses_grey_ones(home):
    from histodiffusion.study import steps as stages
    from histodiffusion.study.run import Run

    def patches(**overrides):
        run = Run("smoke", "phantom:target:90", ["phantom:kyoto:45"], overrides=overrides)
        return np.load(stages.target_data(run) / "patches.npy")

    plain, stained = patches(), patches(stain="macenko")
    assert plain.shape == stained.shape and (plain != stained).any((1, 2, 3)).mean() > 0.5
    for c in ("ADI", "TUM"):
        (home / "grey" / c).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(plain[i, ..., 0] ^ (c == "ADI")).save(home / "grey" / c / f"{i}.png")
    with pytest.raises(HistoDiffusionError, match="grey"):
        stages.target_data(
            Run("smoke", f"folder:{home / 'grey'}", ["phantom:kyoto:45"], overrides=dict(stain="macenko"))
        )


def test_broken_manifests_give_a_one_line_error(home):
    spec = write_set(home / "set", 4)
    rows = "".join(f"{c}/{i}.png,slide-{i},ann{c}\n" for c in ("ADI", "TUM") for i in range(4))
    good, rng = ("file,slide,patient\n" + rows).encode(), np.random.default_rng(0)
    read = refused = 0
    for _ in range(60):
        data = bytearray(good)
        for _ in range(rng.integers(1, 12)):
            at, kind = int(rng.integers(len(data))), rng.integers(4)
            if kind == 0:
                data[at] = rng.integers(256)
            elif kind == 1:
                del data[at : at + int(rng.integers(1, 40))]
            elif kind == 2:
                data[at:at] = rng.choice([b'"', b"\0", b"\xff\xfe", b",,,,", b"\n\n", b"\r"])
            else:
                data[at:at] = data[: int(rng.integers(1, 60))]
            data = data or bytearray(b"x")
        (home / "set" / "manifest.csv").write_bytes(data)
        try:
            patches = load_patches(spec)
            assert len(patches) == 8
            split_patches(patches.keys, patches.groups)
            read += 1
        except HistoDiffusionError as e:
            assert "\n" not in str(e)
            refused += 1
    assert read and refused and read + refused == 60
