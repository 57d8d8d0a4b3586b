"""A content-addressed cache outside the repository: a result is stored under a hash of everything that made it."""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from safetyneuron.errors import SafetyNeuronError

logger = logging.getLogger(__name__)


def cache_folder():
    """`$SAFETYNEURON_CACHE`, or `~/.cache/safetyneuron`."""
    return Path(os.environ.get("SAFETYNEURON_CACHE") or Path.home() / ".cache" / "safetyneuron")


def digest(*parts):
    """A short hash of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:20]


def source_digest(package):
    """Hash of every source and data file of a package folder, so that a change of code is a change of key."""
    folder = Path(package)
    sources = sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".yaml"))
    return digest([[p.relative_to(folder).as_posix(), p.read_text(encoding="utf-8")] for p in sources])


def library_versions():
    """Versions of the libraries that can change a number, for cache keys."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "lm_eval", "accelerate", "peft", "trl")}


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
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise SafetyNeuronError(f"{path.parent} cannot be written to ({error.strerror}): free some space, or set SAFETYNEURON_CACHE to another folder") from None


def _to_disk(path):
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path):
    """A temporary folder that becomes `path` when the block ends well and is removed otherwise."""
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        with _writing(path, FULL):
            yield temporary
        with _writing(path):
            for file in temporary.rglob("*"):
                _to_disk(file)
            os.replace(temporary, path)
            _to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path):
    """A temporary file name that becomes `path` when the block ends well and is removed otherwise."""
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(descriptor)
    try:
        with _writing(path, FULL):
            yield Path(temporary)
        with _writing(path):
            _to_disk(temporary)
            os.replace(temporary, path)
            _to_disk(path.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def remember(kind, parts, compute):
    """The JSON result of `compute()`, made once for these `parts`; an entry that is damaged is reported and made again."""
    path = cache_folder() / kind / f"{digest(parts)}.json"
    found = _entry(path)
    if found is None:
        with locked(path):
            found = _entry(path)
            if found is None:
                found = {"result": json.loads(json.dumps(compute()))}  # as it will be read
                with new_file(path) as temporary:
                    temporary.write_text(json.dumps(found | {"checksum": digest(found["result"])}, ensure_ascii=False), encoding="utf-8")
    return found["result"]


def _entry(path):
    """What a cache file holds, or None if there is none or its checksum is another."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        entry = None
    if isinstance(entry, dict) and entry.get("checksum") == digest(entry.get("result")):
        return entry
    logger.warning("cache entry %s is damaged: computing it again", path)
    return None
