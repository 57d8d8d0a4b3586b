"""Work in batches that get smaller where memory runs out."""

import functools
import logging

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger = logging.getLogger(__name__)


class Batches:
    """Deal items out in batches of `size`; a batch that does not fit is halved until it does, for good.

    >>> for batch, result in Batches(64)(items, run):
    """

    def __init__(self, size):
        self.size = size

    def __call__(self, items, run):
        """Yield every batch with the result of `run(batch)`."""
        start = 0
        while start < len(items):
            batch = items[start : start + self.size]
            try:
                result = run(batch)
            except RuntimeError as error:
                if len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
            else:
                yield batch, result
                start += len(batch)
                continue
            self.size = len(batch) // 2  # here, because the error's traceback held the tensors
            clear_device_cache(garbage_collection=True)
            _say(self.size)


@functools.cache
def _say(size):
    """Once a process, however often the same size is reached."""
    logger.warning("out of memory: continuing with %d at a time", size)
