"""Progress as lines rather than a redrawn bar, on stderr: readable in logs and notebooks, left out of the pages."""

import io
import sys
import time
from contextlib import contextmanager

import torch
from transformers import TrainerCallback
from transformers.utils import logging

SECONDS = 10


def steps(items, label, show=True):
    """Yield the items; every ten seconds print how many are done and about how long the rest takes."""
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if show and now - printed >= SECONDS:
            left = (now - started) / done * (len(items) - done)
            print(
                f"{label}: {done} of {len(items)}, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            printed = now
        yield item


def clock():
    """Seconds of the processor that this process has used, or of the wall where a GPU does the work: what else runs on the machine does not count."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


@contextmanager
def without_bars():
    """No bars of transformers and of the hub inside: a redrawn bar is unreadable in an executed notebook."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class EveryTenSeconds(io.TextIOBase):
    """A stream for bars that other libraries redraw: passes on their latest state, at most once in ten seconds."""

    def __init__(self):
        self.target, self.printed = sys.stderr, time.monotonic()

    def write(self, text):
        """Take what a bar writes; print its last line if ten seconds have passed."""
        now = time.monotonic()
        if text.strip() and now - self.printed >= SECONDS:
            print(text.strip().splitlines()[-1], file=self.target, flush=True)
            self.printed = now
        return len(text)


class TrainingLine(TrainerCallback):
    """One line every ten seconds of training: updates done, loss, seconds left."""

    def __init__(self, label="training"):
        self.label = label

    def on_train_begin(self, args, state, control, **_):
        self.started = self.printed = time.monotonic()

    def on_log(self, args, state, control, logs=None, **_):
        """Print one of the trainer's own log points."""
        now = time.monotonic()
        if "loss" in logs and now - self.printed >= SECONDS:
            left = (now - self.started) * (state.max_steps / state.global_step - 1)
            print(
                f"{self.label}: update {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.3f}, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            self.printed = now
