"A few damaged files for every reader; `make fuzz` tries them for ten minutes."

import signal
import subprocess
import sys
import time
from pathlib import Path

import fuzz_readers
import pytest
from fuzz_readers import READERS, _late, attempt, fuzz

from histodiffusion.core import HistoDiffusionError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HISTODIFFUSION_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HISTODIFFUSION_RESULTS_PATH", str(tmp_path / "results"))
    monkeypatch.setenv("HISTODIFFUSION_PROGRESS", "off")
    before = signal.signal(signal.SIGALRM, _late)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused_in_one_sentence(reader, tmp_path):
    make, wrong = READERS[reader](), {}
    for seed in range(25):
        folder = tmp_path / str(seed)
        folder.mkdir()
        if text := attempt(make, seed, folder):
            wrong[seed] = text
    assert not wrong


def test_what_the_fuzz_must_find_is_found(tmp_path, monkeypatch):
    def found(read):
        return attempt(({"a.txt": b"x"}, read), 0, tmp_path)

    def wrong(path):
        raise ValueError("not a sentence")

    def talks(path):
        raise HistoDiffusionError("two\nlines")

    monkeypatch.setattr(fuzz_readers, "SECONDS", 1)
    assert found(lambda path: None) == "" and "ValueError" in found(wrong) and "no sentence" in found(talks)
    assert "TimeoutError" in found(lambda path: time.sleep(9))


def test_memory_beyond_the_bound_is_a_failure(tmp_path):
    code = """import sys, fuzz_readers as f
from pathlib import Path
f.limit_memory()
print(f.attempt(({"a.txt": b"x"}, lambda path: bytearray(4 << 30)), 0, Path(sys.argv[1])))"""
    command = [sys.executable, "-c", code, tmp_path]
    said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "MemoryError" in said.stdout, said.stderr


@pytest.mark.slow
def test_half_a_minute_of_all_readers():
    assert not fuzz(0.5, seed=0)
