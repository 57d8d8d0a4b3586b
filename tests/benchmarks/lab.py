"""Seconds of the playground in headless Chromium: from a cold load to the first answer, and of scoring one condition (100 requests of every kind).

    python tests/benchmarks/lab.py [_build/html]

Every repeat starts a browser with an empty profile, so nothing of the site is cached; files come from a server on this machine.
Run it with nothing else on the machine.
"""

import functools
import sys
import tempfile
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import Quiet, loaded, open_chromium

REPEATS = 5


def main(site="_build/html"):
    """Print the median and the range of both."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/book/playground.html"
    first, scored = zip(*(measure(address) for _ in range(REPEATS)))
    for name, seconds in (("first answer", first), ("one condition scored", scored)):
        print(f"{name}: {median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")


def measure(address):
    """Seconds to the first answer, and of one score, in a new browser."""
    with tempfile.TemporaryDirectory() as profile:
        browser = open_chromium(profile)
        try:
            browser.get("about:blank")
            start = time.perf_counter()
            browser.get(address)
            loaded(browser)
            answered = time.perf_counter()
            browser.find_element("id", "play-score").click()
            done = "return document.getElementById('play-progress-text').textContent"
            while not browser.execute_script(done).startswith("Done in"):
                time.sleep(0.05)
            return answered - start, time.perf_counter() - answered
        finally:
            browser.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
