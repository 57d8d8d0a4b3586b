"""The cache when things go wrong: damaged entries, a full disk, folders that cannot be written, two processes at once."""

import errno
import json
import os
import subprocess
import sys

import pytest

from safetyneuron import SafetyNeuronError
from safetyneuron.cache import cache_folder, new_file, new_folder, remember


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entry(cache):
    (path,) = cache.rglob("*.json")
    return path


def test_a_result_is_made_once_and_read_as_json(cache):
    made = []
    compute = lambda: made.append(1) or {"a": (1, 2)}
    assert remember("kind", ["x"], compute) == remember("kind", ["x"], compute) == {"a": [1, 2]} and made == [1]


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("12345", "12346"), lambda text: "", lambda text: "[]", lambda text: "\udcff"])
def test_a_damaged_entry_is_noticed_reported_and_made_again(cache, caplog, damage):
    assert remember("kind", ["x"], lambda: 12345) == 12345
    path = entry(cache)
    path.write_bytes(damage(path.read_text()).encode("utf-8", "surrogateescape"))
    assert remember("kind", ["x"], lambda: 12345) == 12345 and "damaged" in caplog.text
    caplog.clear()
    assert remember("kind", ["x"], lambda: pytest.fail("made again")) == 12345 and caplog.text == ""


@pytest.mark.parametrize("maker", [new_file, new_folder])
def test_nothing_half_written_is_left_or_read(cache, maker):
    cache.mkdir()
    with pytest.raises(ZeroDivisionError), maker(cache / "entry") as temporary:
        (temporary / "part" if maker is new_folder else temporary).write_text("half")
        1 / 0
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_is_said_in_one_line(cache, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(SafetyNeuronError, match="set SAFETYNEURON_CACHE") as caught:
        remember("kind", ["x"], lambda: 1)
    assert "\n" not in str(caught.value) and list(cache.rglob("*.json")) == []
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_kept_result_is_read_from_a_cache_that_cannot_be_locked(cache, monkeypatch):
    remember("kind", ["x"], lambda: 5)
    monkeypatch.setattr("safetyneuron.cache.FileLock.acquire", lambda self: pytest.fail("locked"))
    assert remember("kind", ["x"], lambda: pytest.fail("made again")) == 5


def test_processes_at_once_make_an_entry_once(cache, tmp_path):
    script = f"""
import time
from safetyneuron.cache import remember
def compute():
    open({str(tmp_path / "made")!r}, "a").write("x")
    time.sleep(0.3)
    return list(range(1000))
assert remember("kind", ["x"], compute) == list(range(1000))
"""
    runs = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0, 0, 0]
    assert (tmp_path / "made").read_text() == "x" and json.loads(entry(cache).read_text())["result"][-1] == 999


def test_a_process_killed_while_writing_leaves_no_entry(cache):
    script = """
import os, signal
from safetyneuron import cache
cache._to_disk = lambda path: os.kill(os.getpid(), signal.SIGKILL)
cache.remember("kind", ["x"], lambda: 7)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert remember("kind", ["x"], lambda: 8) == 8 and str(cache_folder()) == str(cache)
