"""The cache when things go wrong: damaged entries, a full disk, folders that cannot be written, two processes at once."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, SMALL_DISKS

from safetyneuron import SafetyNeuronError
from safetyneuron.cache import cache_folder, kept_folder, new_file, new_folder, remember


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFETYNEURON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entry(cache):
    (path,) = cache.rglob("*.json")
    return path


def test_a_result_is_made_once_and_read_as_json(cache):
    made = []

    def compute():
        return made.append(1) or {"a": (1, 2)}

    assert remember("kind", ["x"], compute) == remember("kind", ["x"], compute) == {
        "a": [1, 2]
    } and made == [1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("12345", "12346"),
        lambda text: "",
        lambda text: "[]",
        lambda text: "\udcff",
    ],
)
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
    assert (tmp_path / "made").read_text() == "x" and json.loads(entry(cache).read_text())[
        "result"
    ][-1] == 999


def test_a_process_killed_while_writing_leaves_no_entry(cache):
    script = """
import os, signal
from safetyneuron import cache
cache._to_disk = lambda path: os.kill(os.getpid(), signal.SIGKILL)
cache.remember("kind", ["x"], lambda: 7)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert remember("kind", ["x"], lambda: 8) == 8 and str(cache_folder()) == str(cache)


def test_what_was_said_in_one_line_is_not_said_again_in_other_words(cache):
    with (
        pytest.raises(SafetyNeuronError, match="^the notebook stopped"),
        new_file(cache / "out.ipynb"),
    ):
        raise SafetyNeuronError(
            "the notebook stopped with SafetensorError: No space left on device (os error 28)"
        )


def test_a_damaged_folder_is_noticed_reported_and_made_again(cache, caplog):
    path, fill = (
        cache / "models" / "m",
        lambda folder: (folder / "weights").write_bytes(bytes(1000)),
    )
    assert (
        kept_folder(path, fill)
        == path
        == kept_folder(path, lambda folder: pytest.fail("made again"))
    )
    for damage in (
        lambda: (path / "weights").write_bytes(bytes(999) + b"1"),
        lambda: (path / "weights").unlink(),
        lambda: (path / "more").touch(),
        lambda: (path / "checksums.json").unlink(),
    ):
        caplog.clear()
        damage()
        kept_folder(path, fill)
        assert caplog.text.count("is damaged") == 1 and sorted(
            file.name for file in path.iterdir()
        ) == ["checksums.json", "weights"]
        assert (path / "weights").read_bytes() == bytes(1000)


def test_what_a_killed_process_left_is_removed_with_the_next_one(cache):
    script = """
import os, signal
from pathlib import Path
from safetyneuron import cache
def fill(folder):
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
cache.kept_folder(cache.cache_folder() / "m", fill)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert [path for path in cache.iterdir() if path.name.startswith(".m-")]
    kept_folder(cache / "m", lambda folder: (folder / "whole").write_text("x"))
    assert sorted(path.name for path in cache.iterdir()) == ["m", "m.lock"]


@pytest.mark.parametrize(
    "kind, words",
    [([], "is being built in this folder"), (["--job"], "still running in this folder")],
)
def test_a_build_is_refused_until_one_in_its_folder_and_all_its_jobs_have_ended_or_were_killed(
    tmp_path, kind, words
):
    alone = [sys.executable, ROOT / "workflow" / "alone.py"]
    first = subprocess.Popen([*alone, *kind, shutil.which("sleep"), "60"], cwd=tmp_path)
    while psutil.Process(first.pid).name() != "sleep":  # the lock is taken before
        time.sleep(0.01)

    def again():
        return subprocess.run(
            [*alone, shutil.which("true")], cwd=tmp_path, capture_output=True, text=True
        )

    refused = again()
    assert refused.returncode == 1 and words in refused.stderr and refused.stderr.count("\n") == 1
    first.kill()
    first.wait()
    assert again().returncode == 0


@pytest.fixture
def mounted(tmp_path):
    """Run a script beside a file system of its own, 256 KiB large and mounted for it alone: `again(options)` mounts it with others."""
    disk = tmp_path / "disk"
    disk.mkdir()
    head = f"""
import os, subprocess, sys
from pathlib import Path
disk = Path({str(disk)!r})
os.environ["SAFETYNEURON_CACHE"] = str(disk / "cache")
def again(options): subprocess.run(["mount", "-o", "remount," + options, str(disk)], check=True)
import numpy as np
from safetensors.numpy import save_file
from safetyneuron.cache import SafetyNeuronError, kept_folder, remember
def refused(work):
    try:
        work()
    except SafetyNeuronError as error:
        return str(error)
    raise SystemExit("not refused")
def fill(folder): save_file(dict(weights=np.zeros(2**18, "f4")), folder / "model.safetensors")  # whose writer has errors of its own
def files(): return sorted(path.name for path in disk.rglob("*") if path.is_file() and path.suffix != ".lock")
"""

    def run(script):
        command = [
            "unshare",
            "-rm",
            "sh",
            "-c",
            f'mount -t tmpfs -o size=256k tmpfs {disk} && exec "$0" -c "$1"',
            sys.executable,
            head + script,
        ]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return run


@pytest.mark.skipif(
    not SMALL_DISKS, reason="mounting a small disk needs user namespaces (unshare -rm)"
)
def test_a_full_disk_is_said_in_one_line_and_what_was_kept_stays(mounted):
    said = mounted("""
remember("kind", ["small"], lambda: 1)
before = files()
print(refused(lambda: remember("kind", ["large"], lambda: "x" * 2**20)))
print(refused(lambda: kept_folder(disk / "cache" / "m", fill)))
assert files() == before and remember("kind", ["small"], lambda: 2) == 1
again("size=8m")
assert len(remember("kind", ["large"], lambda: "x" * 2**20)) == 2**20 and kept_folder(disk / "cache" / "m", fill)
""").splitlines()
    assert len(said) == 2 and all(
        "No space left on device" in line and "SAFETYNEURON_CACHE" in line for line in said
    )


@pytest.mark.skipif(
    not SMALL_DISKS, reason="mounting a small disk needs user namespaces (unshare -rm)"
)
def test_a_cache_that_is_read_only_is_read_and_anything_new_refused_in_one_line(mounted):
    said = mounted("""
again("size=8m")
remember("kind", ["a"], lambda: 1)
kept_folder(disk / "cache" / "m", fill)
before = files()
again("ro")
assert remember("kind", ["a"], lambda: 2) == 1 and kept_folder(disk / "cache" / "m", None)
print(refused(lambda: remember("kind", ["b"], lambda: 2)))
print(refused(lambda: kept_folder(disk / "cache" / "n", fill)))
assert files() == before
""").splitlines()
    assert len(said) == 2 and all(
        "Read-only file system" in line and "SAFETYNEURON_CACHE" in line for line in said
    )


@pytest.mark.skipif(
    not SMALL_DISKS, reason="mounting a small disk needs user namespaces (unshare -rm)"
)
def test_a_notebook_that_fills_the_disk_leaves_nothing(mounted):
    said = mounted("""
import nbformat
from safetyneuron.cli import main
cells = [nbformat.v4.new_code_cell("n = 1  # number", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("'x' * 2**20")]
kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "python"}}
nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), disk / "n.ipynb")
sys.stderr = sys.stdout
assert main(["run", str(disk / "n.ipynb"), "-o", str(disk / "out.ipynb")]) == 2
assert files() == ["n.ipynb"]
""").splitlines()
    assert "No space left on device" in said[-1] and "another folder" in said[-1]
