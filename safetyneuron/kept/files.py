"""Objects with `save` and `load`, made once and then read from the cache."""

from safetyneuron.cache import cache_folder, digest, kept_folder


def keep_file(kind, key, make, result):
    """What `make()` returns, an object of the class `result` with `save` and `load`, made once for this key."""
    folder = kept_folder(
        cache_folder() / kind / digest(*key), lambda new: make().save(new / "result.safetensors")
    )
    return result.load(folder / "result.safetensors")
