"""Put the executed notebooks and the written pages together and build the static book.

    python workflow/assemble.py STAGE PAGE [PAGE ...]

STAGE holds the executed notebooks at the path of their sources; the pages are copied beside them at theirs. The
site takes the place of _build/html when it is whole; an empty one is an error. Launch buttons need to know where the repository is: $BOOK_REPOSITORY,
or else the remote `origin` if it is on GitHub; $BOOK_JUPYTERHUB adds one for a hub of your own.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages as pages_from_runs
import yaml

from safetyneuron.cache import put, remove_leftovers

SITE, WORK = Path("_build/html"), Path("_build/site")


def main(stage, *pages):
    """Copy the pages, write those that come from the runs, run Jupyter Book, and check that the site holds the chapters."""
    for folder in ("notebooks", "book/_static"):  # here every job has ended
        remove_leftovers(Path(stage) / folder)
    remove_leftovers(SITE.parent, f".{SITE.name}-*")
    for page in pages:
        target = Path(stage) / page
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
    pages_from_runs.write(stage)
    add_launch_buttons(
        Path(stage) / "_config.yml",
        os.environ.get("BOOK_REPOSITORY") or origin(),
        os.environ.get("BOOK_JUPYTERHUB"),
    )
    shutil.rmtree(WORK, ignore_errors=True)  # a build that was killed may have left half of one
    try:
        build(stage)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)


def build(stage):
    """Run Jupyter Book and put the site into its place."""
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [
        jupyter_book,
        "build",
        stage,
        "--path-output",
        WORK,
        "--warningiserror",
        "--keep-going",
        "--quiet",
    ]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True
    )  # it would say that the site is where it is not for long
    if result.returncode:
        print(result.stdout)
        sys.exit(
            f"the book was not assembled; Jupyter Book says why above ({shutil.disk_usage(stage).free >> 20} MiB of disk are free)"
        )
    check_site(stage, WORK / "_build" / "html")
    put(WORK / "_build" / "html", SITE)


def git(*command):
    """What git answers; nothing where it does not know."""
    result = subprocess.run(["git", *command], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def origin():
    """Address of the remote `origin` if it is on GitHub, else None."""
    found = re.fullmatch(
        r"(?:https://|git@)github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?",
        git("remote", "get-url", "origin"),
    )
    return f"https://github.com/{found[1]}" if found else None


def add_launch_buttons(config, repository, hub):
    """Add buttons that open a chapter's source notebook at its path in the repository; none where the repository is unknown."""
    if not repository:
        return
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    buttons = {
        "notebook_interface": "jupyterlab",
        "binderhub_url": "https://mybinder.org",
        "thebe": True,
    }
    if repository.startswith("https://github.com/"):
        buttons["colab_url"] = "https://colab.research.google.com"
    if hub:
        buttons["jupyterhub_url"] = hub
    if repository.startswith("https://github.com/"):
        commit = git("rev-parse", "HEAD") or "main"
        settings["sphinx"]["config"]["source_repository"] = f"{repository}/blob/{commit}"
    settings |= {
        "repository": {"url": repository, "branch": "main", "path_to_book": ""},
        "launch_buttons": buttons,
    }
    config.write_text(
        yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8"
    )


def check_site(stage, site):
    """Fail if a chapter is missing from the site or shows neither a table nor a figure."""
    for notebook in sorted(Path(stage).glob("notebooks/*.ipynb")):
        page = site / "notebooks" / f"{notebook.stem}.html"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if "<table" not in text and "_images/" not in text:
            sys.exit(f"{page} is missing or shows no result: the book is not complete")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"the book was not assembled ({error}): free some space, or mend what it names")
