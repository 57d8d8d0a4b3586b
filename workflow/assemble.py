"""Put the executed notebooks and the written pages together and build the static book.

    python workflow/assemble.py STAGE PAGE [PAGE ...]

STAGE holds the executed notebooks at the path of their sources; the pages are copied beside them at theirs. The
site is left in _build/html; an empty one is an error. Launch buttons need to know where the repository is: $BOOK_REPOSITORY,
or else the remote `origin` if it is on GitHub; $BOOK_JUPYTERHUB adds one for a hub of your own.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import pages as pages_from_runs

SITE = Path("_build/html")


def main(stage, *pages):
    """Copy the pages, write those that come from the runs, run Jupyter Book, and check that the site holds the chapters."""
    for page in pages:
        target = Path(stage) / page
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
    pages_from_runs.write(stage)
    add_launch_buttons(Path(stage) / "_config.yml", os.environ.get("BOOK_REPOSITORY") or origin(), os.environ.get("BOOK_JUPYTERHUB"))
    shutil.rmtree(SITE, ignore_errors=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", stage, "--path-output", ".", "--warningiserror", "--keep-going", "--quiet"]
    subprocess.run(command, check=True)
    check_site(stage)


def origin():
    """Address of the remote `origin` if it is on GitHub, else None."""
    result = subprocess.run(["git", "remote", "get-url", "origin"], capture_output=True, text=True)
    found = re.fullmatch(r"(?:https://|git@)github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?", result.stdout.strip())
    return f"https://github.com/{found[1]}" if found else None


def add_launch_buttons(config, repository, hub):
    """Add buttons that open a chapter's source notebook at its path in the repository; none where the repository is unknown."""
    if not repository:
        return
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    buttons = {"notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org", "thebe": True}
    if repository.startswith("https://github.com/"):
        buttons["colab_url"] = "https://colab.research.google.com"
    if hub:
        buttons["jupyterhub_url"] = hub
    settings |= {"repository": {"url": repository, "branch": "main", "path_to_book": ""}, "launch_buttons": buttons}
    config.write_text(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8")


def check_site(stage):
    """Fail if a chapter is missing from the site or shows neither a table nor a figure."""
    for notebook in sorted(Path(stage).glob("notebooks/*.ipynb")):
        page = SITE / "notebooks" / f"{notebook.stem}.html"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if "<table" not in text and "_images/" not in text:
            sys.exit(f"{page} is missing or shows no result: the book is not complete")


if __name__ == "__main__":
    main(*sys.argv[1:])
