"""A content-addressed cache outside the repository: a result is stored under a hash of everything that made it."""

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from safetyneuron.errors import SafetyNeuronError

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"  # of the files in a kept folder


def cache_folder():
    """`$SAFETYNEURON_CACHE`, or `~/.cache/safetyneuron`."""
    return Path(os.environ.get("SAFETYNEURON_CACHE") or Path.home() / ".cache" / "safetyneuron")


def digest(*parts):
    """A short hash of values that JSON can write."""
    return hashlib.sha256(
        json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()[:20]


@functools.cache
def library_versions():
    """Versions of the libraries that can change a number, for cache keys."""
    return {
        name: version(name)
        for name in ("torch", "transformers", "tokenizers", "lm_eval", "accelerate", "peft", "trl")
    }


@contextmanager
def locked(path):
    """Hold the lock of one cache entry, so that two processes do not make it twice."""
    lock = FileLock(f"{path}.lock")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def _writing(path, reasons=FULL + CLOSED):
    """Say in one line why something cannot be written: a full disk, a folder that is read-only or somebody else's."""
    try:
        yield
    except Exception as error:  # libraries written in Rust raise errors of their own
        if isinstance(error, SafetyNeuronError) or _number(error) not in reasons:
            raise
        name = getattr(error, "filename", None)
        elsewhere = isinstance(name, str) and not Path(name).is_relative_to(path.parent)
        place = Path(name).parent if elsewhere else path.parent
        cure = (
            "set SAFETYNEURON_CACHE to another folder"
            if place.is_relative_to(cache_folder())
            else "name another folder"
        )
        raise SafetyNeuronError(
            f"{place} cannot be written to ({os.strerror(_number(error))}): free some space, or {cure}"
        ) from None


def _number(error):
    """The system's number of an error, also of one that has it in its text only; None if there is none."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def _to_disk(path):
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path):
    """A name beside `path` that nothing has. What is made under it gets the user's usual rights, unlike the files of `tempfile`."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}{path.suffix}")


@contextmanager
def new_folder(path):
    """A temporary folder that takes the place of `path` when the block ends well and is removed otherwise."""
    temporary = _beside(path)
    with _writing(path):
        temporary.mkdir(parents=True)
    try:
        with _writing(path, FULL):
            yield temporary
        with _writing(path):
            for file in temporary.rglob("*"):
                _to_disk(file)
            put(temporary, path)
            _to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put(new, path):
    """Give a finished folder its name; a folder that had the name goes out of the way whole, and is then removed."""
    old = _beside(path)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(path):
    """A temporary file name that becomes `path` when the block ends well and is removed otherwise."""
    path = Path(path)
    temporary = _beside(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    try:
        with _writing(path, FULL):
            yield temporary
        with _writing(path):
            _to_disk(temporary)
            os.replace(temporary, path)
            _to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remember(kind, parts, compute):
    """The JSON result of `compute()`, made once for these `parts`; an entry that is damaged is reported and made again."""

    def make(path):
        result = json.loads(json.dumps(compute()))  # as it will be read
        with new_file(path) as temporary:
            temporary.write_text(
                json.dumps({"result": result, "checksum": digest(result)}, ensure_ascii=False),
                encoding="utf-8",
            )

    return _made_once(cache_folder() / kind / f"{digest(parts)}.json", _entry, make)["result"]


def kept_folder(path, fill):
    """The folder `path`, filled once by `fill(folder)`; one whose files differ from its checksums is reported and made again."""

    def make(path):
        with new_folder(path) as temporary:
            fill(temporary)
            (temporary / CHECKSUMS).write_text(json.dumps(_checksums(temporary)), encoding="utf-8")

    return _made_once(path, _whole, make)


def _made_once(path, read, make):
    """What `read(path)` returns; where that is None, after `make(path)`, which one process at a time may do."""
    found = read(path)  # without a lock, so that a cache that is read-only serves too
    if found is None:
        with locked(path):
            found = read(path)
            if found is None:
                if path.exists():
                    logger.warning("cache entry %s is damaged: making it again", path)
                remove_leftovers(path.parent, f".{path.name}-*")
                make(path)
                found = read(path)
    return found


def remove_leftovers(folder, pattern=".*"):
    """Remove temporary files and folders of processes that were killed. Only where nobody else is writing now."""
    for left in folder.glob(pattern):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _entry(path):
    """What a cache file holds, or None if there is none or its checksum is another."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return (
        entry
        if isinstance(entry, dict) and entry.get("checksum") == digest(entry.get("result"))
        else None
    )


def _whole(path):
    """The folder, or None if there is none or its files are not those of its checksums."""
    try:
        return (
            path
            if json.loads((path / CHECKSUMS).read_text(encoding="utf-8")) == _checksums(path)
            else None
        )
    except (FileNotFoundError, ValueError):
        return None


def _checksums(folder):
    """SHA-256 of every file in a folder but the list of these."""
    files = [
        file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != CHECKSUMS
    ]
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def file_digest(path):
    """SHA-256 of a file, which a process reads once, unless its size or time of change differ."""
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _sha256(path, size, changed):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
