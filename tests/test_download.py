"""Downloading, unpacking and fetching data sets, against a server on this machine that misbehaves on request."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import stat
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from fuzz_readers import mutate
from PIL import Image

from histodiffusion.app.cli import main
from histodiffusion.core import HistoDiffusionError, load_settings
from histodiffusion.data import archives, download, fetch
from histodiffusion.data.archives import UnfinishedError, unpack_archive
from histodiffusion.data.catalogue import REGISTRY, RemoteFile, group_of
from histodiffusion.data.download import download_file, read_ledger
from histodiffusion.data.fetch import describe_dataset, fetch_dataset, list_datasets, verify_dataset
from histodiffusion.data.images import read_image
from histodiffusion.data.packed import read_h5
from histodiffusion.data.patches import (
    dataset_fingerprint,
    dataset_folder,
    load_patches,
    read_patchcamelyon,
    split_patches,
)
from histodiffusion.data.phantom import PHANTOM_CLASSES, phantom_patches
from histodiffusion.study.run import Run

MIRROR = load_settings().data_mirror
BODY = random.Random(0).randbytes(600_000)


def sha(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def names(folder) -> list[str]:
    "What is in a folder, hidden files included."
    return sorted(p.name for p in Path(folder).iterdir()) if Path(folder).is_dir() else []


class Site(http.server.ThreadingHTTPServer):
    "Files by path. `faults` lists how the next answers go wrong; `log` lists each request's path and headers."

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.etag = {}, [], [], True

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def put(self, name, data, **kw):
        self.files[f"/{name}"] = data
        return RemoteFile(self.url(name), **({"checksum": sha(data), "size": len(data)} | kw))


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        site = self.server
        fault = site.faults.pop(0) if site.faults else {}
        asked = self.headers.get("Range")
        site.log.append((self.path, asked, self.headers.get("If-Range")))
        time.sleep(fault.get("sleep", 0))
        data = fault.get("body", site.files.get(self.path))
        if data is None or "status" in fault:
            return self.send_error(fault.get("status", 404))
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        start = int(asked[6:-1]) if asked and not fault.get("no_range") else 0
        if self.headers.get("If-Range", etag) != etag:
            start = 0
        if start and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if site.etag:
            self.send_header("ETag", etag)
        if not fault.get("no_length"):
            self.send_header("Content-Length", str(len(data) - start + fault.get("lie", 0)))
        self.end_headers()
        if "drip" in fault:  # a byte at a time
            with contextlib.suppress(OSError):
                for byte in data[start:]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(fault["drip"])
        else:
            self.wfile.write(data[start:][: fault.get("drop")])


@pytest.fixture
def site():
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "A data_home of its own, no mirror, and no waiting between attempts."
    monkeypatch.setenv("HISTODIFFUSION_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HISTODIFFUSION_DATA_MIRROR", "")
    monkeypatch.setenv("HISTODIFFUSION_PROGRESS", "off")
    pause, main_thread = time.sleep, threading.main_thread()
    hurry = lambda s: pause(min(s, 0.001) if threading.current_thread() is main_thread else s)  # noqa: E731
    monkeypatch.setattr(download.time, "sleep", hurry)
    return tmp_path / "home"


@pytest.fixture
def in_time():
    "A hang is a failure."

    def late(*_):
        raise TimeoutError("this took too long")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def said(call) -> str:
    "The error message that a call ends with."
    with pytest.raises(HistoDiffusionError) as e:
        call()
    assert "\n" not in str(e.value) and str(e.value).endswith(".")
    return str(e.value)


# ---- downloads ----


def test_dropped_connection_resumes(site, tmp_path):
    file = site.put("a.zip", BODY)
    site.faults = [{"drop": 200_000}, {"drop": 150_000}]
    got = download_file(file.url, tmp_path / "d" / "a.zip", file.checksum)
    assert got.read_bytes() == BODY and names(tmp_path / "d") == ["a.zip"]
    etag = f'"{hashlib.md5(BODY).hexdigest()}"'
    starts = [int(asked[6:-1]) for _, asked, _ in site.log[1:]]
    assert len(starts) == 2 and 100_000 < starts[0] <= 200_000 < starts[1] <= 350_000
    assert [version for _, _, version in site.log] == [None, etag, etag]


def test_a_later_call_resumes_an_earlier_one(site, tmp_path):
    file = site.put("a.zip", BODY)
    site.faults = [{"drop": 300_000}, *[{"drop": 0}] * 4]
    message = said(lambda: download_file(file.url, tmp_path / "a.zip", file.checksum))
    assert "continue from there" in message and names(tmp_path) == [".a.zip.part", ".a.zip.part.json"]
    site.log.clear()
    assert download_file(file.url, tmp_path / "a.zip", file.checksum).read_bytes() == BODY
    assert len(site.log) == 1 and int(site.log[0][1][6:-1]) > 200_000 and names(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_download_can_be_resumed(site, tmp_path, monkeypatch, stop):
    file = site.put("a.zip", BODY)

    class Bar:
        n, unit_scale = 0, False

        def update(self, n):
            self.n += n
            if self.n > 300_000:
                raise stop

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

    with monkeypatch.context() as m:
        m.setattr(download, "progress", lambda **kw: Bar())
        with pytest.raises((KeyboardInterrupt, HistoDiffusionError), match="No space left|^$"):
            download_file(file.url, tmp_path / "a.zip", file.checksum)
    assert names(tmp_path) == [".a.zip.part", ".a.zip.part.json"]
    assert download_file(file.url, tmp_path / "a.zip", file.checksum).read_bytes() == BODY
    assert site.log[-1][1] is not None and names(tmp_path) == ["a.zip"]


def test_parts_of_two_versions_are_never_joined(site, tmp_path):
    site.put("a.zip", BODY)
    site.faults = [{"drop": 200_000}, *[{"drop": 0}] * 4]
    said(lambda: download_file(site.url("a.zip"), tmp_path / "a.zip"))
    new = BODY[::-1]
    site.put("a.zip", new)
    assert download_file(site.url("a.zip"), tmp_path / "a.zip").read_bytes() == new
    assert site.log[-1][1] is not None  # the rest was requested, the new file was sent


def test_without_a_version_or_checksum_nothing_is_continued(site, tmp_path):
    site.put("a.zip", BODY)
    site.etag, site.faults = False, [{"drop": 200_000}]
    assert download_file(site.url("a.zip"), tmp_path / "a.zip").read_bytes() == BODY
    assert [asked for _, asked, _ in site.log] == [None, None]
    site.faults = [{"drop": 200_000}] * 5
    said(lambda: download_file(site.url("a.zip"), tmp_path / "b.zip"))
    assert names(tmp_path) == ["a.zip", "checksums.json"]


def test_a_server_that_ignores_ranges_sends_the_whole_file(site, tmp_path):
    file = site.put("a.zip", BODY)
    site.faults = [{"drop": 200_000}, {"no_range": True}]
    assert download_file(file.url, tmp_path / "a.zip", file.checksum).read_bytes() == BODY
    assert names(tmp_path) == ["a.zip"]
    site.faults = [{"drop": 200_000, "no_range": True}] * 9
    said(lambda: download_file(file.url, tmp_path / "b.zip", file.checksum))
    assert names(tmp_path) == ["a.zip"]  # a part that cannot be resumed is not kept


def test_416_ends_a_download_that_is_whole(site, tmp_path):
    file = site.put("a.zip", BODY)
    site.faults = [{"lie": 50}]
    assert download_file(file.url, tmp_path / "a.zip", file.checksum).read_bytes() == BODY
    assert site.log[-1][1] == f"bytes={len(BODY)}-" and names(tmp_path) == ["a.zip"]


def test_416_with_a_part_that_is_too_long_starts_again(site, tmp_path):
    file = site.put("a.zip", BODY[:100_000])
    (tmp_path / ".a.zip.part").write_bytes(BODY[:200_000])
    (tmp_path / ".a.zip.part.json").write_text(json.dumps({"url": file.url, "version": None}))
    assert download_file(file.url, tmp_path / "a.zip", file.checksum).read_bytes() == BODY[:100_000]
    assert names(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("fault, checksum, size, message", [
    ({"body": BODY[::-1]}, sha(BODY), None, "does not match the expected"),
    ({"body": BODY[::-1]}, "md5:" + hashlib.md5(BODY).hexdigest(), None, "does not match the expected"),
    ({"body": BODY[:999]}, sha(BODY), len(BODY), "offers 999 bytes instead of the published 600000"),
    ({"body": BODY[:999], "no_length": True}, None, len(BODY), "does not match the expected"),
    ({"body": BODY + b"more", "no_length": True}, None, len(BODY), "does not match the expected"),
    ({"body": BODY[:999], "no_length": True}, sha(BODY), None, "does not match the expected"),
    ({"status": 404}, sha(BODY), None, "HTTP 404"),
    ({"status": 403}, None, None, "HTTP 403"),
    ({"sleep": 0.6}, None, None, "(ReadTimeout)"),
])  # fmt: skip
def test_a_wrong_answer_is_one_error_and_leaves_nothing(site, tmp_path, monkeypatch, fault, checksum, size, message):
    site.put("a.zip", BODY)
    site.faults = [fault]
    monkeypatch.setattr(download._Download, "timeout", 0.2)
    text = said(lambda: download_file(site.url("a.zip"), tmp_path / "d" / "a.zip", checksum, size))
    assert message in text and site.url("a.zip") in text
    assert names(tmp_path / "d") == []


def test_a_server_that_drips_is_given_up_and_the_part_is_kept(site, tmp_path, monkeypatch, in_time):
    file = site.put("a.zip", BODY)
    site.faults = [{"drip": 0.02}] * 5
    monkeypatch.setattr(download._Download, "timeout", 0.3)
    text = said(lambda: download_file(file.url, tmp_path / "a.zip", file.checksum))
    assert "less than 1000 bytes a second" in text and "to continue from there" in text
    assert 0 < (tmp_path / ".a.zip.part").stat().st_size < 1000
    assert download_file(file.url, tmp_path / "a.zip", file.checksum).read_bytes() == BODY


def test_a_busy_server_is_asked_again(site, tmp_path):
    file = site.put("a.zip", BODY)
    site.faults = [{"status": 503}, {"status": 429}]
    assert download_file(file.url, tmp_path / "a.zip", file.checksum).read_bytes() == BODY
    site.faults = [{"status": 503}] * 5
    assert "HTTP 503" in said(lambda: download_file(file.url, tmp_path / "b.zip", file.checksum))
    assert names(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("url, message", [
    *((url, "http:// or https://") for url in ("file:///etc/passwd", "ftp://example.org/a", "a.zip", "http://[", "")),
    ("http://127.0.0.1:9/a", "(ConnectionError)"), ("http://no-such-host.invalid/a", "(ConnectionError)"),
])  # fmt: skip
def test_an_address_without_a_server_is_one_error(tmp_path, url, message):
    text = said(lambda: download_file(url, tmp_path / "d" / "a.zip"))
    assert message in text and url in text and names(tmp_path / "d") == []


def test_a_full_disk_is_noticed_before_the_first_byte(site, tmp_path, monkeypatch):
    file = site.put("a.zip", BODY)
    usage = type(shutil.disk_usage(tmp_path))(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda p: usage)
    assert "1 kB free" in said(lambda: download_file(file.url, tmp_path / "a.zip"))
    assert (tmp_path / ".a.zip.part").stat().st_size == 0


def test_without_a_published_checksum_the_first_download_is_recorded(site, tmp_path):
    site.put("a.zip", BODY)
    download_file(site.url("a.zip"), tmp_path / "a.zip")
    entry = read_ledger(tmp_path)["a.zip"]
    assert entry["sha256"] == sha(BODY)[7:] and entry["size"] == len(BODY) and entry["url"] == site.url("a.zip")
    site.put("a.zip", BODY[::-1])
    (tmp_path / "a.zip").unlink()
    assert "does not match the expected" in said(lambda: download_file(site.url("a.zip"), tmp_path / "a.zip"))
    assert names(tmp_path) == ["checksums.json"]
    (tmp_path / "a.zip").write_bytes(b"changed here")
    assert "delete it and fetch it again" in said(lambda: download_file(site.url("a.zip"), tmp_path / "a.zip"))


def test_a_published_file_that_was_damaged_is_fetched_again(site, tmp_path):
    file = site.put("a.zip", BODY)
    (tmp_path / "a.zip").write_bytes(BODY[:5])
    assert download_file(file.url, tmp_path / "a.zip", file.checksum, file.size).read_bytes() == BODY


# ---- archives ----


def zip_of(members, how=zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as z:
        for name, data in members:
            z.writestr(name, data)
    return out.getvalue()


def tar_of(members, mode="w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for m, data in members:
            m = tarfile.TarInfo(m) if isinstance(m, str) else m
            m.size = len(data)
            t.addfile(m, io.BytesIO(data))
    return out.getvalue()


def special(name, kind, link=""):
    m = tarfile.TarInfo(name)
    m.type, m.linkname = kind, link
    return m, b""


def zip_link():
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zip_of([(info, "/etc")])


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


def le(n: int) -> bytes:
    return n.to_bytes(4, "little")


FILES = [(f"SET/{c}/{c}-{i}.bin", BODY[1000 * i : 1000 * i + 900]) for c in ("ADI", "TUM") for i in range(4)]
GOOD = {
    "a.zip": zip_of(FILES), "stored.zip": zip_of(FILES, zipfile.ZIP_STORED), "a.tar": tar_of(FILES),
    "a.tar.gz": tar_of(FILES, "w:gz"), "a.tar.bz2": tar_of(FILES, "w:bz2"), "a.tgz": tar_of(FILES, "w:gz"),
    "a.tar.xz": tar_of(FILES, "w:xz"),
}  # fmt: skip
TAR = GOOD["a.tar"]
BAD = {  # what: file name, content, part of the message
    "zip-slip": ("a.zip", zip_of([("ok", b"1"), ("../../out.txt", b"1")]), "unsafe path"),
    "hidden slip": ("a.zip", zip_of([("a/../../out.txt", b"1")]), "unsafe path"),
    "absolute": ("a.zip", zip_of([("/tmp/out.txt", b"1")]), "unsafe path"),
    "drive": ("a.zip", zip_of([("C:/out.txt", b"1")]), "unsafe path"),
    "backslash": ("a.zip", zip_of([("..\\out.txt", b"1")]), "unsafe path"),
    "NUL": ("a.zip", patched(zip_of([("abcd.txt", b"1")]), b"abcd.txt", b"ab\0d.txt"), "unsafe path"),
    "zip link": ("a.zip", zip_link(), "link or device"),
    "encrypted": ("a.zip", patched(zip_of([("a", b"1")]), b"\2\x14\3\x14\0\0", b"\2\x14\3\x14\0\1"), "is encrypted"),
    "twice": ("a.zip", patched(zip_of([("a.txt", b"1"), ("b.txt", b"2")]), b"b.txt", b"a.txt"), "twice"),
    "twice by case": ("a.zip", zip_of([("a.txt", b"1"), ("A.TXT", b"2")]), "twice"),
    "file as folder": ("a.zip", zip_of([("a", b"1"), ("a/b", b"2")]), "twice"),
    "folder as file": ("a.zip", zip_of([("a/b", b"1"), ("a", b"2")]), "twice"),
    "ratio": ("a.zip", zip_of([("zeros", bytes(9 << 20))]), "may be an archive bomb"),
    "many zeros": ("a.zip", zip_of([(f"{i}", bytes(1 << 19)) for i in range(20)]), "may be an archive bomb"),
    "gz ratio": ("a.h5.gz", gzip.compress(bytes(9 << 20)), "may be an archive bomb"),
    "tar ratio": ("a.tar.gz", tar_of([("zeros", bytes(9 << 20))], "w:gz"), "may be an archive bomb"),
    "too many": ("a.zip", zip_of([(f"{i}", b"") for i in range(101)]), "more than 100 files"),
    "too many in tar": ("a.tar", tar_of([(f"{i}", b"") for i in range(101)]), "more than 100 files"),
    "lies, too small": ("a.zip", patched(zip_of([("a", b"1" * 1234)]), le(1234), le(99)), "corrupt"),
    "lies, too large": ("a.zip", patched(zip_of([("a", b"1" * 1234)]), le(1234), le(9999)), "corrupt"),
    "cut zip": ("a.zip", GOOD["a.zip"][:-300], "truncated or corrupt"),
    "damaged zip": ("a.zip", GOOD["stored.zip"].replace(BODY[1100:1200], BODY[1200:1300]), "truncated or corrupt"),
    "tar symlink": ("a.tar", tar_of([("ok", b"1"), special("l", tarfile.SYMTYPE, "/etc")]), "link or device"),
    "tar hard link": ("a.tar.gz", tar_of([special("l", tarfile.LNKTYPE, "/etc/passwd")], "w:gz"), "link or device"),
    "tar pipe": ("a.tar", tar_of([special("p", tarfile.FIFOTYPE)]), "link or device"),
    "tar device": ("a.tar", tar_of([special("p", tarfile.CHRTYPE)]), "link or device"),
    "tar slip": ("a.tar", tar_of([("../out.txt", b"1")]), "unsafe path"),
    "tar twice": ("a.tar", tar_of([("a", b"1"), ("./a", b"2")]), "twice"),
    "tar cut between members": ("a.tar", TAR[: 3 * 1536], "truncated or corrupt"),
    "tar cut in a member": ("a.tar", TAR[: 3 * 1536 + 700], "truncated or corrupt"),
    "tar with a broken header": ("a.tar", TAR[:1536] + bytes(range(200)) + TAR[1736:], "truncated or corrupt"),
    "cut tar.gz": ("a.tar.gz", GOOD["a.tar.gz"][:-5], "truncated or corrupt"),
    "cut tar.xz": ("a.tar.xz", GOOD["a.tar.xz"][:-20], "truncated or corrupt"),
    "cut gz": ("a.h5.gz", gzip.compress(BODY)[:-100], "truncated or corrupt"),
    "page": ("a.tar.gz", b"<!DOCTYPE html><html>log in</html>", "no zip, tar or gz"),
    "page as zip": ("a.zip", b"<!DOCTYPE html><html>log in</html>", "no zip, tar or gz"),
    "empty file": ("a.zip", b"", "no zip, tar or gz"),
    "empty zip": ("a.zip", zip_of([]), "contains no file"),
}  # fmt: skip


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", GOOD)
def test_every_kind_of_archive_is_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name])
    got = unpack_archive(tmp_path / name, tmp_path / "set")
    assert content(got) == dict(FILES) and names(tmp_path) == sorted([name, "set"])
    assert "exists already" in said(lambda: unpack_archive(tmp_path / name, tmp_path / "set"))


def test_gz_of_one_file(tmp_path):
    (tmp_path / "x.h5.gz").write_bytes(gzip.compress(BODY))
    assert content(unpack_archive(tmp_path / "x.h5.gz", tmp_path / "set")) == {"x.h5": BODY}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_archive_is_one_error_and_leaves_nothing(tmp_path, what):
    name, data, message = BAD[what]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    text = said(lambda: unpack_archive(tmp_path / "in" / name, tmp_path / "in" / "set", max_files=100))
    assert message in text and name in text
    assert names(tmp_path / "in") == [name] and names(tmp_path) == ["in"]


def test_bytes_are_bounded_while_they_are_written(tmp_path):
    (tmp_path / "a.tar").write_bytes(TAR)
    assert "max_bytes" in said(lambda: unpack_archive(tmp_path / "a.tar", tmp_path / "set", max_bytes=2000))
    assert names(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_unpacking_resumes(tmp_path, monkeypatch, name, stop):
    (tmp_path / name).write_bytes(GOOD[name])
    write, written = archives._write_file, []

    def stopping(member, *args):
        if len(written) == 3:
            raise stop
        written.append(member[0])
        return write(member, *args)

    with monkeypatch.context() as m:
        m.setattr(archives, "_write_file", stopping)
        with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else UnfinishedError):
            unpack_archive(tmp_path / name, tmp_path / "set")
        assert not (tmp_path / "set").exists() and len(names(tmp_path)) == 2
        first, written[:] = list(written), []
        m.setattr(archives, "_write_file", lambda *a: written.append(a[0][0]) or write(*a))
        assert content(unpack_archive(tmp_path / name, tmp_path / "set")) == dict(FILES)
    assert len(first) == 3 and sorted(first + written) == sorted(n for n, _ in FILES)
    assert names(tmp_path) == sorted([name, "set"])


def test_a_half_file_of_an_earlier_attempt_is_written_again(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(GOOD["a.zip"])
    with monkeypatch.context() as m:
        m.setattr(archives.os, "replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            unpack_archive(tmp_path / "a.zip", tmp_path / "set")
    (stage,) = (p for p in tmp_path.iterdir() if p.is_dir())
    damaged = stage / "files" / FILES[0][0]
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.write_bytes(bytes(900))  # right size, wrong CRC
    assert content(unpack_archive(tmp_path / "a.zip", tmp_path / "set")) == dict(FILES)


def test_what_another_archive_left_is_not_used(tmp_path):
    stale = tmp_path / ".set.unpack-000000000000" / "files"
    stale.mkdir(parents=True)
    (stale / "old.bin").write_bytes(b"old")
    (tmp_path / "a.zip").write_bytes(GOOD["a.zip"])
    assert content(unpack_archive(tmp_path / "a.zip", tmp_path / "set")) == dict(FILES)
    assert names(tmp_path) == ["a.zip", "set"]


# ---- HDF5 ----


def h5_of(**arrays) -> bytes:
    out = io.BytesIO()
    with h5py.File(out, "w") as f:
        for name, a in arrays.items():
            f.create_dataset(name, data=a, **(dict(chunks=True, compression="gzip") if a.ndim > 1 else {}))
    return out.getvalue()


def test_links_out_of_a_file_are_refused(tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"secret!!")
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["x"] = np.zeros((2, 3), np.uint8)
        f["soft"] = h5py.SoftLink("/x")
        f["external"] = h5py.ExternalLink("other.h5", "/x")
        f["text"] = ["a", "b"]
        f.create_group("group")["x"] = 1
        f.create_dataset("storage", (8,), "uint8", external=[(str(tmp_path / "secret.bin"), 0, 8)])
        layout = h5py.VirtualLayout((2, 3), "uint8")
        layout[:] = h5py.VirtualSource("other.h5", "x", (2, 3))
        f.create_virtual_dataset("virtual", layout)
    refused = {"soft": "is a link", "external": "is a link", "storage": "other files", "virtual": "other files"}
    refused |= {"group": "no array", "text": "numbers", "none": "has no array", "x/y": "has no array", "": "no array"}
    for name, why in refused.items():
        assert why in said(lambda name=name: read_h5(tmp_path / "a.h5", name))
    with read_h5(tmp_path / "a.h5", "group/x") as x:
        assert x.shape == ()


def test_truncated_and_foreign_files_are_one_error(tmp_path):
    data = h5_of(x=np.zeros((8, 96, 96, 3), np.uint8))
    for bad in (data[: len(data) // 2], data[:100], b"", BODY[:5000]):
        (tmp_path / "a.h5").write_bytes(bad)
        assert "truncated or foreign" in said(lambda: read_h5(tmp_path / "a.h5", "x"))


# ---- sets of the catalogue ----


def tiff(image) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "tiff")
    return out.getvalue()


def nct_members(folder):
    "TIFFs in the layout of NCT-CRC-HE: the mirror's originals, else phantom patches."
    if MIRROR and (MIRROR / "nct-crc-he").is_dir():
        files = sorted((MIRROR / "nct-crc-he").rglob("*.tif"))
        return [(f"{folder}/{p.parent.name}/{p.name}", p.read_bytes()) for p in files]
    images = phantom_patches(np.arange(9).repeat(2), seed=0, size=64)
    return [(f"{folder}/{PHANTOM_CLASSES[i // 2]}/{i:08d}.tif", tiff(im)) for i, im in enumerate(images)]


def offer(site, monkeypatch, name, members, **kw):
    "Serve a set of the catalogue from the test server, with the counts of a small archive."
    info = REGISTRY[name]
    (file,) = info.files
    packed = zip_of(members)
    counts = tuple(sum(f"/{c}/" in m for m, _ in members) for c in info.classes)
    served = site.put(file.name, packed, root=file.root, **kw)
    monkeypatch.setitem(REGISTRY, name, replace(info, files=(served,), counts=counts))
    return packed


def test_nct_is_fetched_over_a_broken_connection(site, monkeypatch, home, capsys):
    members = nct_members("NCT-CRC-HE-100K")
    packed = offer(site, monkeypatch, "nct-crc-he-100k", members)
    site.faults = [{"drop": len(packed) // 2}]
    folder = fetch_dataset("nct-crc-he-100k")
    assert folder == home / "nct-crc-he-100k" and site.log[1][1] is not None
    assert names(home) == ["downloads", "nct-crc-he-100k"]
    assert names(home / "downloads" / "nct-crc-he-100k") == ["NCT-CRC-HE-100K.zip"]
    got = content(folder)
    record = json.loads(got.pop("dataset.json"))
    assert got == {n.split("/", 1)[1]: data for n, data in members}
    assert record["licence"] == "CC BY 4.0" and record["checksums"] == {"NCT-CRC-HE-100K.zip": sha(packed)}
    assert sum(record["counts"].values()) == len(members) and record["name"] == "nct-crc-he-100k"
    patches = load_patches("nct-crc-he-100k", size=48)
    assert len(patches) == len(members) and patches.classes == REGISTRY["nct-crc-he-100k"].classes
    assert dataset_folder("nct-crc-he-100k") == folder and len(dataset_fingerprint("nct-crc-he-100k")) == 16
    out = capsys.readouterr().out
    assert "CC BY 4.0" in out and "doi:10.5281/zenodo.1214456" in out

    asked = len(site.log)
    fetch_dataset("nct-crc-he-100k")
    assert len(site.log) == asked and "here already" in capsys.readouterr().out


def test_licence_and_size_are_shown_before_the_first_byte(site, monkeypatch, capsys, home):
    offer(site, monkeypatch, "crc-val-he-7k", nct_members("CRC-VAL-HE-7K"))
    seen = []
    monkeypatch.setattr(fetch, "download_file", lambda *a: seen.append(capsys.readouterr().out) or download_file(*a))
    assert "was not accepted" in said(lambda: fetch_dataset("crc-val-he-7k", accept_licence=False))
    assert not site.log and not home.exists()
    fetch_dataset("crc-val-he-7k")
    size = download.format_bytes(REGISTRY["crc-val-he-7k"].files[0].size)
    assert all(word in seen[0] for word in ("CC BY 4.0", "please cite", f"download: {size}"))


def test_kather_from_a_folder_to_its_slides(site, monkeypatch):
    info = REGISTRY["kather2016"]
    images = phantom_patches(np.arange(8), seed=1, size=48)
    members = [(f"{info.files[0].root}/{c}/1A0{i}_CRC-Prim-HE-0{i + 1}_009.tif_Row_301_Col_151.tif", tiff(im))
               for i, (c, im) in enumerate(zip(info.classes, images))]  # fmt: skip
    offer(site, monkeypatch, "kather2016", members)
    folder = fetch_dataset("kather2016")
    assert names(folder) == [*info.classes, "dataset.json"]
    slides = [group_of("kather2016", p) for p in sorted(folder.rglob("*.tif"))]
    assert slides == [f"0{i + 1}" for i in range(8)]
    assert verify_dataset("kather2016").ok.all()


def offer_pathmnist(site, monkeypatch, name, classes=9):
    "PathMNIST, small; the file stays as it is."
    x = phantom_patches(np.arange(27) % classes, seed=1, size=64)
    both = dict(images=x, labels=(np.arange(27) % classes)[:, None].astype(np.uint8))
    out, parts = io.BytesIO(), dict(train=slice(0, 9), val=slice(9, 18), test=slice(18, 27))
    np.savez(out, **{f"{s}_{w}": v[i] for s, i in parts.items() for w, v in both.items()})
    file = site.put(REGISTRY[name].files[0].name, out.getvalue())
    monkeypatch.setitem(REGISTRY, name, replace(REGISTRY[name], files=(file,)))
    return x


def test_pathmnist_stays_one_file_with_its_splits_and_names(site, monkeypatch, home):
    x = offer_pathmnist(site, monkeypatch, "pathmnist-64")
    folder = fetch_dataset("pathmnist-64")
    assert names(folder) == ["dataset.json", "pathmnist_64.npz"] and names(home) == ["downloads", "pathmnist-64"]
    assert json.loads((folder / "dataset.json").read_text())["counts"]["smooth muscle"] == 3
    patches = load_patches("pathmnist-64", size=64)
    assert (patches.images == x).all() and patches.classes == REGISTRY["pathmnist-64"].classes
    assert [len(i) for i in split_patches(patches.keys, given=patches.splits).values()] == [9, 9, 9]
    assert verify_dataset("pathmnist-64").ok.all()
    (folder / "pathmnist_64.npz").unlink()
    assert not verify_dataset("pathmnist-64").ok[1:].any()


def test_another_file_is_not_put_in_place_of_pathmnist(site, monkeypatch, home):
    offer_pathmnist(site, monkeypatch, "pathmnist-64", classes=8)
    assert "has the classes 0, 1, 2, 3, 4, 5, 6, 7 instead of adipose" in said(lambda: fetch_dataset("pathmnist-64"))
    assert names(home) == ["downloads"]


@pytest.mark.parametrize("name", ["nct-crc-he", "crc-val-he-7k", "pathmnist-224"])
def test_pathmnist_is_not_pre_trained_on_its_own_images(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HISTODIFFUSION_DATA_MIRROR", str(tmp_path))
    with pytest.raises(HistoDiffusionError, match="shares its images with the target 'pathmnist-64'"):
        Run("smoke", "pathmnist-64", (name,))
    assert "nct-crc-he" not in Run("smoke", "pathmnist-64").sets


def pcam_arrays(n, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 255, (n, 96, 96, 3), np.uint8), rng.integers(0, 2, (n, 1, 1, 1)).astype(np.uint8)


def offer_pcam(site, monkeypatch, **damage):
    "PatchCamelyon's six files, small."
    files, arrays = [], {}
    for f in REGISTRY["patchcamelyon"].files:
        split, part = f.name.removesuffix(".h5.gz").rsplit("_", 2)[1:]
        x, y = arrays.setdefault(split, pcam_arrays({"train": 6, "valid": 4, "test": 3}[split], len(arrays)))
        data = damage.get(f"{split}_{part}") or h5_of(**{part: x if part == "x" else y})
        md5 = f"md5:{hashlib.md5(data).hexdigest()}"
        files.append(site.put(f.name, gzip.compress(data), unpacked=damage.get("unpacked", md5)))
    small = replace(REGISTRY["patchcamelyon"], files=tuple(files), counts=(6, 4, 3))
    monkeypatch.setitem(REGISTRY, "patchcamelyon", small)
    return arrays


def test_patchcamelyon_stays_in_its_files(site, monkeypatch, home):
    arrays = offer_pcam(site, monkeypatch)
    folder = fetch_dataset("patchcamelyon")
    assert names(home) == ["downloads", "patchcamelyon"] and len(names(folder)) == 7
    images, labels = read_patchcamelyon(folder, "valid")
    with images:
        assert np.array_equal(images[:], arrays["valid"][0]) and np.array_equal(labels, arrays["valid"][1].ravel())
    report = verify_dataset("patchcamelyon")
    assert report.ok.all() and len(report) == 14
    fetch_dataset("patchcamelyon")
    assert len(site.log) == 6
    assert "use train, valid or test" in said(lambda: read_patchcamelyon(folder, "val"))


@pytest.mark.parametrize("damage, message", [
    ({"unpacked": "md5:" + "0" * 32}, "does not match the checksum"),
    ({"valid_x": h5_of(x=pcam_arrays(3, 0)[0])}, "(3, 96, 96, 3) instead of"),
    ({"valid_x": h5_of(x=pcam_arrays(4, 0)[0][:, :64])}, "instead of uint8"),
    ({"valid_y": h5_of(y=np.full((4, 1, 1, 1), 7, np.uint8))}, "other than 0 and 1"),
    ({"train_y": b"no h5"}, "truncated or foreign"),
])  # fmt: skip
def test_a_wrong_patchcamelyon_is_not_put_in_place(site, monkeypatch, home, damage, message):
    offer_pcam(site, monkeypatch, **damage)
    assert message in said(lambda: fetch_dataset("patchcamelyon"))
    assert names(home) == ["downloads"]


def test_classes_and_counts_must_match_the_catalogue(site, monkeypatch, home):
    members = nct_members("CRC-VAL-HE-7K")
    offer(site, monkeypatch, "crc-val-he-7k", members)
    right = REGISTRY["crc-val-he-7k"]
    monkeypatch.setitem(REGISTRY, "crc-val-he-7k", replace(right, counts=(99, *right.counts[1:])))
    assert "instead of 99" in said(lambda: fetch_dataset("crc-val-he-7k"))
    assert names(home) == ["downloads"]
    offer(site, monkeypatch, "crc-val-he-7k", [m for m in members if "/TUM/" not in m[0]])
    assert "has the classes ADI" in said(lambda: fetch_dataset("crc-val-he-7k"))
    offer(site, monkeypatch, "crc-val-he-7k", [(n.replace("7K", "8K"), data) for n, data in members])
    assert "has no folder 'CRC-VAL-HE-7K'" in said(lambda: fetch_dataset("crc-val-he-7k"))
    assert names(home) == ["downloads"]
    offer(site, monkeypatch, "crc-val-he-7k", members)
    assert names(fetch_dataset("crc-val-he-7k"))[-1] == "dataset.json"  # the correct file is fetched after that


def test_interrupted_fetch_resumes_without_a_second_download(site, monkeypatch, home):
    offer(site, monkeypatch, "crc-val-he-7k", nct_members("CRC-VAL-HE-7K"))
    write, written = archives._write_file, []

    def stopping(*args):
        written.append(1)
        if len(written) == 5:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as m:
        m.setattr(archives, "_write_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            fetch_dataset("crc-val-he-7k")
    assert names(home) == [".crc-val-he-7k.fetch", "downloads"]
    assert not (home / "crc-val-he-7k").exists()
    fetch_dataset("crc-val-he-7k")
    assert names(home) == ["crc-val-he-7k", "downloads"] and len(site.log) == 1


def test_a_page_instead_of_an_archive_is_not_recorded(site, monkeypatch, home):
    root = REGISTRY["breakhis-v1"].files[0].root
    file = site.put("BreaKHis_v1.tar.gz", b"<html>moved</html>", checksum=None, size=None, root=root)
    monkeypatch.setitem(REGISTRY, "breakhis-v1", replace(REGISTRY["breakhis-v1"], files=(file,), counts=(1, 1)))
    assert "no zip, tar or gz" in said(lambda: fetch_dataset("breakhis-v1"))
    assert content(home / "downloads") == {"breakhis-v1/checksums.json": b"{}\n"}
    names_ = ["benign/SOB/adenosis/40X/SOB_B_A-14-22549AB-40-001.png", "malignant/SOB_M_DC-14-2523-40-001.png"]
    image = io.BytesIO()
    Image.new("RGB", (70, 46)).save(image, "png")
    site.put(file.name, tar_of([(f"{file.root}/{n}", image.getvalue()) for n in names_], "w:gz"))
    folder = fetch_dataset("breakhis-v1")
    assert names(folder) == ["benign", "dataset.json", "malignant"]
    assert verify_dataset("breakhis-v1").ok.all()
    assert "BreaKHis_v1.tar.gz" in read_ledger(home / "downloads" / "breakhis-v1")
    assert [group_of("breakhis-v1", n) for n in names_] == ["22549AB", "2523"]


def test_the_mirror_is_used_where_it_has_the_set(site, monkeypatch, tmp_path, capsys, home):
    (tmp_path / "mirror" / "crc-val-he-7k").mkdir(parents=True)
    monkeypatch.setenv("HISTODIFFUSION_DATA_MIRROR", str(tmp_path / "mirror"))
    assert fetch_dataset("crc-val-he-7k") == tmp_path / "mirror" / "crc-val-he-7k"
    assert "in the mirror" in capsys.readouterr().out and not home.exists()
    assert list_datasets().set_index("name").state["crc-val-he-7k"] == "mirror"


def test_two_processes_do_not_fetch_into_one_folder(site, monkeypatch, home):
    offer(site, monkeypatch, "crc-val-he-7k", nct_members("CRC-VAL-HE-7K"))
    with fetch._alone(home / "downloads" / "crc-val-he-7k"):
        assert "Another process" in said(lambda: fetch_dataset("crc-val-he-7k"))
        assert names(home / "downloads") == ["crc-val-he-7k"]
    assert not site.log and names(home) == []


@pytest.mark.parametrize("name", REGISTRY)
def test_every_entry_explains_how_to_get_it(name):
    info = REGISTRY[name]
    assert info.licence in describe_dataset(name)
    if not info.files and not info.archive:
        text = said(lambda: fetch_dataset(name))
        where = (info.homepage, f"home/{name}") if info.by_hand else ("HISTODIFFUSION_DATA_MIRROR",)
        assert all(word in text for word in where)
        assert not info.by_hand or "not checked" in info.note
    assert all(f.checksum or "not checked" in info.note for f in info.files)
    for f in info.files:
        assert f.url.startswith("http") and f.name.endswith((".zip", ".gz", ".npz"))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_cli_lists_describes_fetches_and_verifies(site, monkeypatch, capsys, home):
    offer(site, monkeypatch, "crc-val-he-7k", nct_members("CRC-VAL-HE-7K"))
    assert main(["data", "fetch", "crc-val-he-7k", "--dry-run"]) == 0 and not site.log
    assert main(["data", "describe", "crc-val-he-7k"]) == 0 and "not here" in capsys.readouterr().out
    assert main(["data", "verify", "crc-val-he-7k"]) == 2 and "data fetch crc-val-he-7k" in capsys.readouterr().err
    assert main(["data", "fetch", "crc-val-he-7k", "--accept-licence"]) == 0
    assert main(["data", "list"]) == 0
    assert any(line.startswith("crc-val-he-7k ") and " here " in line for line in capsys.readouterr().out.splitlines())
    assert main(["data", "verify", "crc-val-he-7k"]) == 0
    image = next((home / "crc-val-he-7k" / "TUM").iterdir())
    image.write_bytes(image.read_bytes()[:100])
    capsys.readouterr()
    assert main(["data", "verify", "crc-val-he-7k"]) == 2
    out, err = capsys.readouterr()
    assert image.name in out and "1 of 3 checks" in err and err.count("\n") == 1
    mistakes = [
        (["fetch"], "needs the NAME"),
        (["fetch", "camelyon"], "Unknown data set 'camelyon'"),
        (["show", "pcam"], "takes no NAME"),
        (["fetch", "pannuke", "--accept-licence"], "get it from https://warwick"),
    ]
    for words, message in mistakes:
        assert main(["data", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


# ---- broken input of every kind ----


def survive(call):
    "A broken input may be refused with an error message, and nothing else."
    try:
        call()
        return True
    except HistoDiffusionError as e:
        assert str(e)
        return False


def unpacks(folder, name, data) -> bool:
    "Whether a broken archive is unpacked after all; either way nothing else is left, and no link."
    box = folder / "box"
    box.mkdir()
    (box / name).write_bytes(data)
    fine = survive(lambda: unpack_archive(box / name, box / "set", max_files=50, max_bytes=10**6))
    assert set(names(box)) == ({name, "set"} if fine else {name}) and names(folder) == ["box"]
    paths = list(box.rglob("*"))
    assert sum(p.stat().st_size for p in paths) < 2 * 10**6 and not any(p.is_symlink() for p in paths)
    shutil.rmtree(box)
    return fine


@pytest.mark.parametrize("name", ["a.zip", "stored.zip", "a.tar", "a.tar.gz", "a.tar.xz", "x.bin.gz"])
def test_mutated_archives(tmp_path, name, in_time):
    rng, good = random.Random(name), GOOD.get(name) or gzip.compress(BODY[:3000])
    assert sum(unpacks(tmp_path, name, mutate(good, rng)) for _ in range(40)) < 40


def test_mutated_tar_headers(tmp_path, in_time):
    "Only names, sizes and kinds change, most of them with a right checksum, so that the header counts."
    rng = random.Random(7)
    for _ in range(30):
        data = bytearray(TAR)
        for _ in range(rng.choice([1, 3])):
            head = rng.randrange(8) * 1536
            data[head + rng.randrange(512)] = rng.randrange(256)
            if rng.random() < 0.7:
                data[head + 148 : head + 156] = b" " * 8
                data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
        unpacks(tmp_path, "a.tar", bytes(data))


def test_mutated_zip_directory(tmp_path, in_time):
    rng, first = random.Random(8), GOOD["a.zip"].index(b"PK\1\2")
    for _ in range(30):
        data = bytearray(GOOD["a.zip"])
        for _ in range(rng.choice([1, 3])):
            data[rng.randrange(first, len(data))] = rng.randrange(256)
        unpacks(tmp_path, "a.zip", bytes(data))


def test_mutated_hdf5(tmp_path, in_time):
    rng = random.Random(1)
    x, y = pcam_arrays(3, 0)
    good = {part: h5_of(**{part: a}) for part, a in (("x", x // 64), ("y", y))}

    def read(folder):
        images, _ = read_patchcamelyon(folder, "test")
        with images:
            images[:]

    for _ in range(40):
        hit = rng.choice("xy")
        for part in "xy":
            data = mutate(good[part], rng) if part == hit else good[part]
            (tmp_path / f"camelyonpatch_level_2_split_test_{part}.h5").write_bytes(data)
        survive(lambda: read(tmp_path))
        assert len(names(tmp_path)) == 2


def test_mutated_ledger(site, tmp_path, in_time):
    rng = random.Random(2)
    site.put("a.zip", b"abc")
    download_file(site.url("a.zip"), tmp_path / "a.zip")
    good = (tmp_path / "checksums.json").read_bytes()
    odd = [b"[" * 100_000, b"null", b"[]", b'{"a.zip": 1}', b'{"a.zip": {}}', b"\xff\xfe", b'{"a.zip": {"sha256": 1}}']
    for i in range(40):
        (tmp_path / "checksums.json").write_bytes(odd[i] if i < len(odd) else mutate(good, rng))
        survive(lambda: read_ledger(tmp_path))
        survive(lambda: download_file(site.url("a.zip"), tmp_path / "a.zip"))
        assert names(tmp_path) == ["a.zip", "checksums.json"]


def test_mutated_note_of_a_part(site, tmp_path, in_time):
    rng = random.Random(3)
    file = site.put("a.zip", BODY[:5000])
    good = json.dumps({"url": file.url, "version": f'"{hashlib.md5(BODY[:5000]).hexdigest()}"'}).encode()
    for i in range(20):
        (tmp_path / ".a.zip.part").write_bytes(BODY[:2000])
        (tmp_path / ".a.zip.part.json").write_bytes(b"[" * 50_000 if i == 0 else mutate(good, rng))
        assert download_file(file.url, tmp_path / "a.zip", file.checksum).read_bytes() == BODY[:5000]
        assert names(tmp_path) == ["a.zip"]
        os.unlink(tmp_path / "a.zip")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_mutated_images(tmp_path, suffix, in_time):
    rng, out = random.Random(suffix), io.BytesIO()
    image = Image.fromarray(phantom_patches([8], seed=0, size=32)[0])
    image.save(out, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    for _ in range(20):
        (tmp_path / f"a.{suffix}").write_bytes(mutate(out.getvalue(), rng))
        survive(lambda: read_image(tmp_path / f"a.{suffix}"))
        assert names(tmp_path) == [f"a.{suffix}"]
