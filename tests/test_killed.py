"""Builds that are killed again and again, and two at once: site and cache are those of a build that nobody disturbed."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SMALL_DISKS
from safetensors import safe_open

from safetyneuron.cache import _whole

pytestmark = pytest.mark.faults
KILLS = 20
SECONDS = 35  # a build is killed at most so long after its start
VENV = Path(sys.executable).parent.parent
MAKE = ["make", "book", "EDITION=smoke", "CORES=2", f"VENV={VENV}", "-o", VENV / "installed"]
FULL = """
set -e
mount -t tmpfs -o size=$(($(du -sm "$0" | cut -f1) + 6))m tmpfs "$1"
cp -a "$0/." "$1"
cd "$1"
shift
echo >> book/teachers.md
sum() { find _build/html -type f | sort | xargs sha256sum | sha256sum; }
before=$(sum)
"$@" 2> said && exit 3
test "$before" = "$(sum)"
tail -n 2 said
mount -o remount,size=1g "$PWD"
"$@"
"""


class Clone:
    """A copy of the repository with a cache of its own."""

    def __init__(self, folder, cache=None):
        self.folder, self.cache, self.log = (
            folder / "book",
            cache or folder / "cache",
            folder / "log",
        )
        shutil.copytree(
            ROOT,
            self.folder,
            ignore=shutil.ignore_patterns("_build", ".*", "*.egg-info", "__pycache__"),
        )

    def environment(self, folder):
        return os.environ | {
            "SAFETYNEURON_CACHE": str(self.cache),
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "1",
        }

    def start(self):
        with self.log.open("a") as log:
            return subprocess.Popen(
                MAKE, cwd=self.folder, env=self.environment(self.folder), stdout=log, stderr=log
            )

    def build(self):
        assert self.start().wait() == 0, self.log.read_text()[-3000:]
        return self

    def kill(self):
        """SIGKILL for every process of the build, also for those that have left its group."""
        while owned := [process for process in psutil.process_iter() if self._owns(process)]:
            for process in owned:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(owned)

    def _owns(self, process):
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(
                "PYTHONPATH"
            ) == str(self.folder)
        except psutil.Error:  # it has ended, or is not ours to look at
            return False

    def site(self):
        """Every file of the site, without what a clock has written."""
        files = [path for path in (self.folder / "_build" / "html").rglob("*") if path.is_file()]
        return {
            path.relative_to(self.folder).as_posix(): content(path)
            for path in files
            if path.name != "searchindex.js"
        }  # the words of the pages, once more

    def kept(self):
        """Every entry of the cache, without what a clock has written."""
        files = [
            path for path in self.cache.rglob("*") if path.is_file() and path.suffix != ".lock"
        ]
        assert all(_whole(path.parent) for path in files if path.name == "checksums.json")
        return {
            path.relative_to(self.cache).as_posix(): content(path)
            for path in files
            if path.name != "checksums.json"
        }


def content(path):
    """What a file holds; seconds that were measured, and ratios of them, are left out."""
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as stored:
            return without_clock(json.dumps(stored.metadata(), sort_keys=True)), {
                name: stored.get_tensor(name).tobytes() for name in stored.keys()
            }
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: without_clock(archive.read(name).decode()) for name in archive.namelist()}
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        outputs = [
            output
            for cell in cells
            for output in cell.get("outputs", [])
            if output["output_type"] != "stream"
        ]
        return [without_clock(json.dumps(output.get("data"), sort_keys=True)) for output in outputs]
    return (
        without_clock(path.read_text())
        if path.suffix in (".html", ".md", ".json", ".csv")
        else path.read_bytes()
    )


CLOCK = (
    r"(?<=This page ran for )\d+ (seconds|minutes)",  # at the top of a chapter
    r"\b\d+(\.\d)?(?= s\b| seconds\b)",  # prose: 1.3 s
    r"\b\d+(?= (×|\\u00d7))",  # cost as a multiple of a forward pass
    r"(?<=>)\d+(\.\d)?(?=</p></td>|</td>)",  # cells of a table that hold nothing but a number: seconds and forward passes
    r"(?<=: )\d+\.\d(?=\n|</td>|\\n)",  # the page of all cells
    r'(?<=text\\": \\")\d+\.\d(?=\\")',  # and what it is made of
    r"(?m)(?<=^  - )\d+$",  # the page of how everything was run
    r"(?<=,)\d+\.\d(?=[,\n\\])",  # costs as CSV
    r'(?<=seconds\\": )[\d.e-]+',  # facts of a training, and of a ranking
    r'(?<=passes\\": )[\d.e-]+',
    r'(?<="seconds": )[\d.e-]+',  # what a step of the answer key took
    r'(?<="passes": )[\d.e-]+',  # and the same in forward passes
    r'(?<="checksum": )"[0-9a-f]+"',  # of an entry that holds them
    r"(?<= at )0x[0-9a-f]+",  # where an object lay
    r'<div class="cell_output docutils container">\n</div>\n',  # where a progress line was left out
)


def without_clock(text):
    for pattern in CLOCK:
        text = re.sub(pattern, "", text)
    return text


def differing(first, second):
    return sorted(
        name for name in first.keys() | second.keys() if first.get(name) != second.get(name)
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Clone(tmp_path_factory.mktemp("undisturbed")).build()


def test_a_book_that_was_killed_twenty_times_is_that_of_an_undisturbed_build(undisturbed, tmp_path):
    seed = int(os.environ.get("KILL_SEED", 0))
    clone, draw, kills = Clone(tmp_path), random.Random(seed), 0
    while kills < KILLS:
        running, until = clone.start(), time.monotonic() + draw.uniform(0, SECONDS)
        while running.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if running.poll() is None:
            clone.kill()
            kills += 1
        else:  # it was done before: the next ones go through every chapter again, now with a full cache
            assert running.returncode == 0, clone.log.read_text()[-3000:]
            shutil.rmtree(clone.folder / "_build")
        running.wait()
    clone.build()
    assert differing(clone.site(), undisturbed.site()) == [] and len(clone.site()) > 100
    assert differing(clone.kept(), undisturbed.kept()) == [] and len(clone.kept()) > 300


def test_two_builds_at_once_share_a_cache(undisturbed, tmp_path):
    cache = tmp_path / "cache"
    clones = [Clone(tmp_path / name, cache) for name in ("first", "second")]
    running = [clone.start() for clone in clones]
    assert [build.wait() for build in running] == [0, 0], clones[0].log.read_text()[-3000:]
    for clone in clones:
        assert differing(clone.site(), undisturbed.site()) == []
    assert differing(clones[0].kept(), undisturbed.kept()) == []


@pytest.mark.skipif(
    not SMALL_DISKS, reason="mounting a small disk needs user namespaces (unshare -rm)"
)
def test_a_build_on_a_full_disk_says_so_and_leaves_the_last_site_as_it_was(undisturbed, tmp_path):
    command = ["unshare", "-rm", "bash", "-c", FULL, undisturbed.folder, tmp_path, *MAKE]
    result = subprocess.run(
        command, env=undisturbed.environment(tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert re.search(r"the book was not assembled.*\d MiB of disk are free", result.stdout)
