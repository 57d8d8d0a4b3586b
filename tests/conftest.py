import functools
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before transformers reads it: no test waits for a network

import pandas as pd
import pytest
import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM

from safetyneuron import load_model
from safetyneuron.metrics.outcomes import COLUMNS, MEASURES, Scores
from safetyneuron.organism.tokenizer import build_tokenizer

ROOT = Path(__file__).parent.parent
SMALL_DISKS = (
    shutil.which("unshare")
    and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
)
VIEWS = {"light": (1400, 900), "dark": (1400, 900), "phone": (390, 844)}


def small_model(family="llama", heads=4, groups=4, head_width=10, seed=0, **options):
    """A random model of a family with awkward sizes, in float64 so that closed forms can be compared closely."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=1300,
        hidden_size=36,
        intermediate_size=28,
        num_hidden_layers=2,
        initializer_range=0.3,
    )
    sizes |= dict(
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_width,
        max_position_embeddings=64,
    )
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=4)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | options)))
        .double()
        .eval()
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def small_llama(**options):
    return small_model("llama", **options)


def pytest_collection_modifyitems(items):
    """Tests of the built site come last: whoever is first builds it on both cores, while the other process has nothing else to do."""
    items.sort(key=lambda item: any(name.endswith("site") for name in item.fixturenames))


@pytest.fixture
def model():
    return small_llama(groups=2)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def chat():
    return load_model("organism/llama-chat")


@pytest.fixture
def fresh_chat():
    """The aligned organism for a test that leaves hooks on it."""
    return load_model("organism/llama-chat")


@pytest.fixture(scope="session")
def base():
    return load_model("organism/llama-base")


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all processes of a test run have in common."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def site(shared):
    """The smoke edition of the book, built in a copy of the repository, by one process for all."""
    with FileLock(shared / "repository.lock"):
        if not (shared / "repository" / "_build" / "html").exists():
            build_site(shared / "repository")
    return shared / "repository" / "_build"


def copy_repository(copy, *left_out):
    """What a build reads, in a folder of its own; names like `left_out` stay behind."""
    for name in (
        "book",
        "notebooks",
        "safetyneuron",
        "workflow",
        "SECURITY.md",
        "_config.yml",
        "_toc.yml",
    ):
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", *left_out)
            shutil.copytree(source, copy / name, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy(source, copy / name)


def build_site(copy):
    """Build the smoke edition in a copy of the repository."""
    copy_repository(copy)
    snakemake = Path(sys.executable).with_name("snakemake")
    command = [
        snakemake,
        "-s",
        "workflow/Snakefile",
        "--configfile",
        "workflow/editions/smoke.yaml",
        "--cores",
        "2",
        "--quiet",
        "rules",
    ]
    threads = {"OMP_NUM_THREADS": "1"}  # two chapters at once, most of whose time is starting up
    addresses = {
        "BOOK_REPOSITORY": "https://github.com/example/book",
        "BOOK_JUPYTERHUB": "https://hub.example.org",
        "BOOK_URL": "https://book.example.org",
    }
    result = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, env=os.environ | threads | addresses
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without printing every request."""

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="session")
def address(site):
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(site / "html"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


AT_REST = """const still = new CSSStyleSheet();
still.replaceSync("*, *::before, *::after { transition: none !important }");
document.adoptedStyleSheets = [still];"""


def open_chromium(profile):
    """Chromium without a window, driven by selenium; profile: an empty folder."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
    ]
    for argument in [
        *quiet,
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={profile}",
    ]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )
    browser.set_script_timeout(120)  # axe on a long page, on a busy machine
    return browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser: install Debian's chromium and chromium-driver")
    browser = open_chromium(tmp_path_factory.mktemp("chromium"))
    # colours fade when a theme is chosen: axe would measure one on its way
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": AT_REST})
    yield browser
    browser.quit()


# On a busy machine `get` has returned while the page before was still there.
ARRIVED = "return !window.left && document.readyState === 'complete'"


def show(browser, url, view):
    """Open a page in one view."""
    from selenium.webdriver.support.ui import WebDriverWait

    width, height = VIEWS[view]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": view == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = "dark" if view == "dark" else "light"
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    browser.execute_script("window.left = true")
    browser.get(url)
    WebDriverWait(browser, 60, 0.05).until(lambda b: b.execute_script(ARRIVED))
    if "playground" in url:
        loaded(browser)


def loaded(browser):
    """Wait until the playground has given its first answer or said why not."""
    from selenium.webdriver.support.ui import WebDriverWait

    texts = "return ['status', 'changed-verdict'].map(name => document.getElementById(`play-${name}`).textContent)"
    status, _ = WebDriverWait(browser, 60, 0.05).until(
        lambda b: ((found := b.execute_script(texts))[1] or "stopped" in found[0]) and found
    )
    assert status == ""


def scores_with(counts, trials=100):
    """`Scores` in which a measure of a set has so many hits. counts: (measure, set) to hits; every item is its own cluster."""
    sets = {}
    for (measure, name), hits in counts.items():
        sets.setdefault((MEASURES[measure][0], name), {})[measure] = hits
    rows = []
    for (kind, name), hits in sets.items():
        if kind == "task":
            outcomes = ["right"] * hits["accuracy"]
        elif kind == "benign":
            outcomes = ["refusal"] * hits.get("over_refusal", 0) + ["correct"] * hits.get(
                "helpful", 0
            )
        else:
            asr = hits["asr"]
            coherent = hits.get("coherent", asr)
            outcomes = ["correct"] * coherent + ["other"] * (asr - coherent)
        rest = {"task": "false", "benign": "other"}.get(kind, "refusal")
        outcomes += [rest] * (trials - len(outcomes))
        rows += [(kind, name, i, f"{name} {i}", outcome) for i, outcome in enumerate(outcomes)]
    return Scores(pd.DataFrame(rows, columns=COLUMNS))
