"""Make the archives of real tissue that come with the library, `histodiffusion/data/samples/*.zip`.

    python tools/make_samples.py MIRROR         # the folder that contains the whole sets by name

The rule: of each class, the files whose names have the smallest SHA-256 of `<sample>/<class>/<file>`. The files are
copied byte by byte, with the text of attribution and licence beside them. The same files give the same archive, so its
checksum in `histodiffusion/data/catalogue.toml` tells whether an archive is the one that this script made; the script
prints the checksum and the counts that the catalogue must have. Only the standard library is needed.
"""

import hashlib
import sys
import zipfile
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "histodiffusion" / "data" / "samples"

KATHER = """\
A sample of Kather 2016 textures in greyscale at 64 x 64 px: 250 patches of each of eight classes.

Data: Kather JN, Zoellner FG, Bianconi F, Melchers SM, Schad LR, Gaiser T, Marx A, Weis CA. Collection of textures in
colorectal cancer histology. Zenodo 2016, doi:10.5281/zenodo.53169.
Please cite: Kather JN et al. Multi-class texture analysis in colorectal cancer histology. Scientific Reports 2016,
6:27988, doi:10.1038/srep27988.
Licence: Creative Commons Attribution 4.0 International, https://creativecommons.org/licenses/by/4.0/

Changes: a choice of 2,000 of the 5,000 tiles (see the rule in tools/make_samples.py), in greyscale, reduced to 64 px
and stored as PNG. The tiles of the publisher are in colour, 150 px.
"""

PCAM = """\
A sample of PatchCamelyon: 260 colour patches of 96 x 96 px, from sentinel lymph nodes.

Data: Veeling BS, Linmans J, Winkens J, Cohen T, Welling M. Rotation equivariant CNNs for digital pathology. MICCAI
2018, arXiv:1806.03962, https://github.com/basveeling/pcam; derived from the Camelyon16 challenge (Ehteshami Bejnordi
B et al., JAMA 2017, doi:10.1001/jama.2017.14585).
Licence: CC0 1.0, https://creativecommons.org/publicdomain/zero/1.0/

Changes: a choice of patches (see the rule in tools/make_samples.py), stored as JPEG.
"""

BREAKHIS = """\
A sample of BreakHis: 24 colour images of 224 x 224 px, from breast tumours.

Data: Spanhol FA, Oliveira LS, Petitjean C, Heutte L. A dataset for breast cancer histopathological image
classification. IEEE Transactions on Biomedical Engineering 2016, 63(7):1455-1462,
https://web.inf.ufpr.br/vri/databases/breast-cancer-histopathological-database-breakhis/
Licence: Creative Commons Attribution 4.0 International, https://creativecommons.org/licenses/by/4.0/

Changes: a choice of images (see the rule in tools/make_samples.py), scaled to 224 px and stored as JPEG.
"""

SAMPLES = {  # name -> whole set, files of each class, classes (None: all), text
    "kather2016-sample": ("kather2016-grey64", 250, None, KATHER),
    "pcam-sample": ("pcam", 130, ("metastasis", "no_metastasis"), PCAM),
    "breakhis-sample": ("breakhis", 12, None, BREAKHIS),
}


def chosen(name: str, folder: Path, n: int, classes=None) -> dict:
    "Class -> the files of a sample, by the hash of their names."
    rank = lambda p: hashlib.sha256(f"{name}/{p.parent.name}/{p.name}".encode()).hexdigest()  # noqa: E731
    classes = classes or sorted(p.name for p in folder.iterdir() if p.is_dir())
    files = {c: sorted((p for p in (folder / c).iterdir() if p.is_file()), key=rank) for c in classes}
    return {c: sorted(found[:n]) for c, found in files.items()}


def write(path: Path, files: dict, text: str) -> None:
    "Write an archive whose bytes depend on its files alone."
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:  # images are compressed already
        z.writestr(zipfile.ZipInfo("ATTRIBUTION.txt"), text)
        for c, found in files.items():
            for p in found:
                z.writestr(zipfile.ZipInfo(f"{c}/{p.name}"), p.read_bytes())


def main(mirror: Path) -> None:
    "Write all archives, and print what the catalogue must say of each."
    for name, (whole, n, classes, text) in SAMPLES.items():
        files, path = chosen(name, mirror / whole, n, classes), OUT / f"{name}.zip"
        write(path, files, text)
        counts = {c: len(found) for c, found in files.items()}
        print(f"{name}: sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}, {path.stat().st_size} bytes, {counts}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
