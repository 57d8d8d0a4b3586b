"""A content-addressed cache outside the repository: a result is stored under a hash of everything that made it."""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


@contextmanager
def new_folder(path):
    """A temporary folder that becomes `path` when the block ends well and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path):
    """A temporary file name that becomes `path` when the block ends well and is removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(descriptor)
    try:
        yield Path(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def remember(kind, parts, compute):
    """The JSON result of `compute()`, made once for these `parts`."""
    path = cache_folder() / kind / f"{digest(parts)}.json"
    with locked(path):
        if not path.exists():
            result = compute()
            with new_file(path) as temporary:
                temporary.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))
