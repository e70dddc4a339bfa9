"""Damaged files of every kind for every reader: each is read, or refused in one sentence.

`make fuzz` runs it for ten minutes: python tests/fuzz_readers.py --minutes 10 [--seed S] [--reader NAME]. The seed of a
failure is printed, and its files are kept below the folder that the last line names.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from histodiffusion.core import HistoDiffusionError

SECONDS, MEBIBYTES = 20, 1500  # that one file may take, beyond what the libraries need


def mutate(data: bytes, rng: random.Random) -> bytes:
    "Flip, replace, cut, insert, blank or truncate some bytes."
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        i, n, kind = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 16, 200]), rng.randrange(6)
        if kind == 0 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind < 3:
            data[i : i + n] = rng.randbytes(n) if kind == 1 else b""
        elif kind == 3:
            data[i:i] = rng.choice([rng.randbytes(n), bytes(n), b"\xff" * n, b"../" * n])
        elif kind == 4:
            data[i : i + n] = rng.choice([b"\0", b"\xff"]) * n
        elif rng.random() < 0.3:
            del data[i:]
        data = data or bytearray(b"x")
    return bytes(data)


def _picture(size=48):
    from histodiffusion.data.phantom import phantom_patches

    return Image.fromarray(phantom_patches([8], seed=0, size=size)[0])


def _encoded(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def images():
    "Image files: name -> bytes, and how they are read."
    from histodiffusion.data.images import image_kind, read_image

    rgb = _picture()
    grey, wide = rgb.convert("L"), Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    alpha = rgb.convert("RGBA")
    good = {"a.png": _encoded(rgb, "PNG"), "b.png": _encoded(wide, "PNG"), "c.png": _encoded(alpha, "PNG"),
            "d.png": _encoded(rgb.quantize(9), "PNG"), "e.jpg": _encoded(rgb, "JPEG"), "f.tif": _encoded(wide, "TIFF"),
            "g.tif": _encoded(rgb, "TIFF", compression="tiff_lzw"), "h.bmp": _encoded(grey, "BMP"),
            "i.webp": _encoded(rgb, "WEBP"), "j.jp2": _encoded(rgb, "JPEG2000"),
            "k.tif": _encoded(rgb, "TIFF", compression="jpeg")}  # fmt: skip

    def read(path):
        image_kind(path)
        read_image(path)

    return good, read


def tables():
    "Tables of patients and labels beside images."
    from histodiffusion.data.layout import read_layout

    lines = [f"{c}/{i}.png,{c},P{i},{s}" for c in "ab" for i, s in enumerate(("train", "test"))]
    text = "\n".join(["file,label,patient,split", *lines])
    good = {"comma.csv": text.encode(), "semicolon.csv": text.replace(",", ";").encode("utf-16")}

    def read(path):
        folder = path.parent / "set"
        for c in "ab":
            (folder / c).mkdir(parents=True, exist_ok=True)
            for i in range(2):
                (folder / c / f"{i}.png").touch()
        read_layout(folder, path)

    return good, read


def arrays():
    "MedMNIST's npz files, PatchCamelyon's HDF5 files, and the arrays that the library wrote."
    import h5py

    from histodiffusion.data.h5 import h5_classes, h5_images, h5_pairs
    from histodiffusion.data.npz import npz_classes, npz_images, npz_kinds

    x, out = np.asarray(_picture(16))[None].repeat(4, 0), io.BytesIO()
    both = dict(images=x, labels=np.arange(4)[:, None])
    parts = {f"{s}_{w}": v for s in ("train", "val", "test") for w, v in both.items()}
    np.savez_compressed(out, **parts)
    stored = io.BytesIO()
    np.savez(stored, **parts)
    with tempfile.TemporaryDirectory() as folder:
        for part, array in dict(x=x, y=np.arange(4)).items():
            with h5py.File(Path(folder) / f"a_{part}.h5", "w") as f:
                f.create_dataset(part, data=array, compression="gzip")
        pair = {f"a_{part}.h5": (Path(folder) / f"a_{part}.h5").read_bytes() for part in "xy"}

    def read(path):
        if path.suffix == ".h5":
            for other in pair.keys() - {path.name}:
                (path.parent / other).write_bytes(pair[other])
            (found,) = h5_pairs(path.parent)
            h5_classes([found])
            for _ in h5_images(found):
                pass
        else:
            npz_classes(path)
            npz_kinds(path)
            for split in ("train", "val", "test"):
                for _ in npz_images(path, split):
                    pass

    return {"a.npz": out.getvalue(), "b.npz": stored.getvalue()} | pair, read


def archives():
    "Archives of images."
    from histodiffusion.data.archives import unpack_archive

    png, out, tar = _encoded(_picture(16), "PNG"), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(4):
            z.writestr(f"set/a/{i}.png", png)
    with tarfile.open(fileobj=tar, mode="w:gz") as t:
        for i in range(4):
            member = tarfile.TarInfo(f"set/a/{i}.png")
            member.size = len(png)
            t.addfile(member, io.BytesIO(png))
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as t:
        member = tarfile.TarInfo("set/a.png")
        member.size = len(png)
        t.addfile(member, io.BytesIO(png))

    def read(path):
        unpack_archive(path, path.parent / "set", max_files=50, max_bytes=10**6)

    return {"a.zip": out.getvalue(), "b.tar.gz": tar.getvalue(), "c.tar": plain.getvalue()}, read


def slides():
    "Slides: tiled TIFF with pixel sizes, OME-TIFF, and plain images."
    import tifffile

    from histodiffusion.data.slides import tile_slides

    tissue = np.asarray(_picture(64)).repeat(4, 0).repeat(4, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tif"
        options = dict(photometric="rgb", tile=(64, 64), resolution=(20000, 20000), resolutionunit="CENTIMETER")
        tifffile.imwrite(path, tissue, **options)
        tiled = path.read_bytes()
        tifffile.imwrite(path, tissue, photometric="rgb", tile=(64, 64), compression="zlib",
                         metadata=dict(axes="YXS", PhysicalSizeX=0.5, PhysicalSizeY=0.5), ome=True)  # fmt: skip
        ome = path.read_bytes()

    def read(path):
        tile_slides(path.parent, path.parent.parent / "tiles", mpp=0.5, size=64, tissue=0.1)

    return {"in/a.tif": tiled, "in/b.ome.tif": ome, "in/c.png": _encoded(Image.fromarray(tissue), "PNG")}, read


def annotations():
    "GeoJSON of QuPath."
    from histodiffusion.data.annotations import draw_areas, read_annotations

    ring = [[0, 0], [400, 0.5], [400, 300], [0, 300], [0, 0]]
    kind = dict(objectType="annotation", classification=dict(name="Tumor", color=[200, 0, 0]))
    shapes = dict(Polygon=[ring, [[9, 9], [50, 9], [50, 50]]], MultiPolygon=[[ring], [ring]], Point=[1, 2])
    features = [dict(type="Feature", geometry=dict(type=k, coordinates=c), properties=kind) for k, c in shapes.items()]
    whole = dict(type="FeatureCollection", features=features)

    def read(path):
        for polygons in read_annotations(path).areas.values():
            draw_areas(polygons, (100, 100), 8.0)

    return {"a.geojson": json.dumps(whole).encode(), "b.geojson": json.dumps(features, indent=1).encode()}, read


def written():
    "Files that the library wrote: JSON, tables, tensors, packed sets, settings."
    from histodiffusion.core import load_settings, load_tensors, read_json, read_table, save_tensors
    from histodiffusion.data.download import read_ledger
    from histodiffusion.data.packed import open_packed, pack_images

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tensors(folder / "a.safetensors", dict(x=np.arange(6.0)))
        pack_images([np.asarray(_picture(16))] * 3, folder / "packed", labels=[0, 1, 0], classes=("a", "b"))
        good = {"a.safetensors": (folder / "a.safetensors").read_bytes()}
        good |= {f"packed/{p.name}": p.read_bytes() for p in (folder / "packed").iterdir()}
    good |= {
        "a.json": json.dumps(dict(key="x", seconds=1.5, parts=[1, 2])).encode(),
        "checksums.json": json.dumps({"a.zip": dict(sha256="0" * 64, size=1, url="http://a")}).encode(),
        "rows.csv": b"method,ratio,accuracy\nreal,0.0,0.5\n\"a,b\",1.0,0.25\n",
        "settings.ini": b"[DEFAULT]\nlib_name = x\n[histodiffusion]\nresults_path = results\nmax_megapixels = 50\n",
    }

    def read(path):
        if path.parent.name == "packed":
            for image in (packed := open_packed(path.parent))[0], packed[len(packed) - 1]:
                image.sum()
        elif path.name == "checksums.json":
            read_ledger(path.parent)
        elif path.name == "settings.ini":
            load_settings(path.parent)
        else:
            dict(json=read_json, csv=read_table, safetensors=load_tensors)[path.suffix[1:]](path)

    return good, read


READERS = dict(
    images=images, tables=tables, arrays=arrays, archives=archives, slides=slides, annotations=annotations,
    written=written,
)  # fmt: skip


def attempt(make, seed, folder):
    "Damage one file of a reader's set and read it; gives what went wrong, '' if nothing."
    (good, read), rng = make, random.Random(seed)
    name = rng.choice(sorted(good))
    for other in [n for n in good if Path(n).parent == Path(name).parent and Path(n).parent != Path()]:
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        if Path(name).parent == Path("packed"):
            (folder / other).write_bytes(good[other])
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(mutate(good[name], rng))
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(action="ignore"):
            read(folder / name)
        return ""
    except HistoDiffusionError as e:
        text = str(e)
        return "" if text and "\n" not in text and len(text) < 1000 else f"{name}: no sentence: {text[:300]!r}"
    except BaseException as e:
        return f"{name}: {type(e).__name__}: {str(e)[:300]}"
    finally:
        signal.alarm(0)


def limit_memory():
    "Let this process use so much memory beyond what it has now."
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEBIBYTES << 20),) * 2)


def _late(*_):
    raise TimeoutError(f"took more than {SECONDS} s")


def work(reader, seed, end, place, report):
    "Attempts of one reader until the time is over, in a process of its own with bounded memory."
    os.environ.update(HISTODIFFUSION_PROGRESS="off", HISTODIFFUSION_DATA_HOME=f"{place}/home",
                      HISTODIFFUSION_RESULTS_PATH=f"{place}/results")  # fmt: skip
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    make = READERS[reader]()
    signal.signal(signal.SIGALRM, _late)
    limit_memory()
    while time.time() < end:
        folder = Path(place) / f"{reader}-{seed}"
        folder.mkdir(parents=True)
        report.put((reader, seed, None))  # begun: a crash of the process is a failure of this seed
        wrong = attempt(make, seed, folder)
        report.put((reader, seed, wrong))
        if not wrong:
            shutil.rmtree(folder)
        seed += 1


def fuzz(minutes=10.0, seed=None, readers=tuple(READERS)):
    "Run every reader for an equal share of the time, two at a time; gives the failures."
    seed = random.randrange(10**6) * 1000 if seed is None else seed
    place, context = tempfile.mkdtemp(prefix="fuzz-"), get_context("spawn")
    found, counts = [], dict.fromkeys(readers, 0)
    print(f"seed {seed}, {minutes:g} minutes, readers: {', '.join(readers)}", flush=True)
    rounds = [readers[i : i + 2] for i in range(0, len(readers), 2)]
    for pair in rounds:
        until = time.time() + 60 * minutes / len(rounds)
        report, running = context.Queue(), {}
        start = {r: seed for r in pair}
        while time.time() < until:
            for r in pair:
                if r not in running or not running[r].is_alive():
                    if r in running and running[r].exitcode:
                        found.append((r, start[r], f"the process ended with {running[r].exitcode}"))
                        print(f"{found[-1]}", flush=True)
                        start[r] += 1
                    running[r] = context.Process(target=work, args=(r, start[r], until, place, report))
                    running[r].start()
            time.sleep(0.5)
            while not report.empty():
                r, at, wrong = report.get()
                start[r], counts[r] = max(start[r], at), counts[r] + (wrong is not None)
                if wrong:
                    found.append((r, at, wrong))
                    print(f"{found[-1]}", flush=True)
        for process in running.values():
            process.join(SECONDS + 10)
            process.kill()
    print("\n".join(f"{r}: {n} damaged files" for r, n in counts.items()))
    print(f"{len(found)} failures" + f"; their files are in {place}" * bool(found))
    if not found:
        shutil.rmtree(place, ignore_errors=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--reader", choices=READERS, action="append")
    options = parser.parse_args()
    sys.exit(bool(fuzz(options.minutes, options.seed, tuple(options.reader or READERS))))
