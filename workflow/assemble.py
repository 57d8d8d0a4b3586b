"""Put the executed notebooks and the written pages together and build the static book.

    python workflow/assemble.py STAGE PAGE [PAGE ...]

STAGE holds the executed notebooks at the path of their sources; the pages are copied beside them at theirs. The
site is left in _build/html; an empty one is an error.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pages as pages_from_runs

SITE = Path("_build/html")


def main(stage, *pages):
    """Copy the pages, write those that come from the runs, run Jupyter Book, and check that the site holds the chapters."""
    for page in pages:
        target = Path(stage) / page
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
    pages_from_runs.write(stage)
    shutil.rmtree(SITE, ignore_errors=True)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [jupyter_book, "build", stage, "--path-output", ".", "--warningiserror", "--keep-going", "--quiet"]
    subprocess.run(command, check=True)
    check_site(stage)


def check_site(stage):
    """Fail if a chapter is missing from the site or shows neither a table nor a figure."""
    for notebook in sorted(Path(stage).glob("notebooks/*.ipynb")):
        page = SITE / "notebooks" / f"{notebook.stem}.html"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if "<table" not in text and "_images/" not in text:
            sys.exit(f"{page} is missing or shows no result: the book is not complete")


if __name__ == "__main__":
    main(*sys.argv[1:])
