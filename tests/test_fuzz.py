"A few damaged files for every reader; `make fuzz` tries them for ten minutes."

import signal

import pytest
from fuzz_readers import READERS, _late, attempt, fuzz


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


def test_a_reader_that_raises_or_talks_too_much_is_a_failure(tmp_path):
    def broken(path):
        raise ValueError("not a sentence")

    assert "ValueError" in attempt(({"a.txt": b"x"}, broken), 0, tmp_path)


@pytest.mark.slow
def test_ten_seconds_of_all_readers():
    assert not fuzz(0.5, seed=0)
