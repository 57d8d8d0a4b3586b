"""The playground in Firefox, spoken to by WebDriver BiDi: for that it needs no driver, and Debian has none."""

import json
import shutil
import subprocess
import time
from itertools import count

import pytest
import websocket

TEXTS = """JSON.stringify(["status", "whole-verdict", "changed-verdict", "progress-text", "scores"]
    .map((name) => document.getElementById(`play-${name}`)?.innerText ?? ""))"""


def wait_for(find, seconds=60):
    """What `find` gives once that is true."""
    until = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
    return found


class Firefox:
    """A page in Firefox, and the errors of its console."""

    def __init__(self, profile):
        place = profile / "WebDriverBiDiServer.json"
        opened = wait_for(lambda: place.exists() and place.read_text(encoding="utf-8"))
        server, self.ids, self.errors = json.loads(opened), count(1), []
        url = f"ws://{server['ws_host']}:{server['ws_port']}/session"
        self.socket = websocket.create_connection(url, timeout=60, suppress_origin=True)
        self.ask("session.new", capabilities={})
        self.ask("session.subscribe", events=["log.entryAdded"])
        self.page = self.ask("browsingContext.getTree")["contexts"][0]["context"]

    def ask(self, method, **parameters):
        """The answer to a command; errors of the console that come before it are kept."""
        mine = next(self.ids)
        self.socket.send(json.dumps({"id": mine, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != mine:
            entry = message.get("params", {})
            if entry.get("level") == "error":
                self.errors.append(entry["text"])
        assert message["type"] == "success", message
        return message["result"]

    def open(self, url):
        """Load a page."""
        self.ask("browsingContext.navigate", context=self.page, url=url, wait="complete")

    def run(self, script):
        """What a line of JavaScript gives: a string, or nothing."""
        target = {"context": self.page}
        found = self.ask("script.evaluate", expression=script, target=target, awaitPromise=True)
        assert found["type"] == "success", found
        return found["result"].get("value")


@pytest.fixture
def firefox(tmp_path):
    program = shutil.which("firefox-esr")
    if not program:
        pytest.skip("no Firefox: install Debian's firefox-esr")
    command = [program, "--headless", "--no-remote", "--profile", tmp_path]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "--remote-debugging-port", "0"], **quiet)
    try:
        yield Firefox(tmp_path)
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.book
@pytest.mark.browser
def test_the_playground_answers_and_scores_in_firefox(address, firefox):
    def texts(place, starts):
        return lambda: (found := json.loads(firefox.run(TEXTS)))[place].startswith(starts) and found

    firefox.open(f"{address}book/playground.html")
    status, whole, changed, *_ = wait_for(texts(2, "helps"))
    assert (status, whole, changed) == ("", "refuses", "helps, with the right tools")
    firefox.run("document.getElementById('play-score').click()")
    *_, table = wait_for(texts(3, "Done in"))
    assert "without 8 neurons that a learned mask closes" in table
    assert firefox.errors == []
