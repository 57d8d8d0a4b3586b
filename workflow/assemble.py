"""Put the executed notebooks and the written pages together and build the static book.

    python workflow/assemble.py STAGE PAGE [PAGE ...]
    python workflow/assemble.py --first DONE NOTEBOOK ... PAGE ...   # a site of some chapters in _build/first, while others run

STAGE holds the executed notebooks at the path of their sources; the pages are copied beside them at theirs. The
site takes the place of _build/html when it is whole; an empty one is an error. Launch buttons need to know where the repository is: $BOOK_REPOSITORY,
or else the remote `origin` if it is on GitHub; $BOOK_JUPYTERHUB adds one for a hub of your own. $BOOK_URL, the address
at which the site will be, gives it a sitemap, canonical addresses, and preview cards with a picture.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import nbformat
import pages as pages_from_runs
import yaml

from safetyneuron.cache import put, remove_leftovers

SITE, WORK = Path("_build/html"), Path("_build/site")
FIRST = Path("_build/first")


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
    config = Path(stage) / "_config.yml"
    add_launch_buttons(
        config,
        os.environ.get("BOOK_REPOSITORY") or origin(),
        os.environ.get("BOOK_JUPYTERHUB"),
    )
    url = os.environ.get("BOOK_URL", "").rstrip("/")
    if url:
        card = {"ogp_site_url": f"{url}/", "ogp_image": f"{url}/_static/poster.png"}
        write_settings(config, {"html_baseurl": f"{url}/", **card})
    shutil.rmtree(WORK, ignore_errors=True)  # a build that was killed may have left half of one
    try:
        if not json.loads((Path(stage) / "code" / "solutions.json").read_text(encoding="utf-8")):
            stage = copy_without_solutions(stage)
        build(stage, url)
        shutil.rmtree(FIRST, ignore_errors=True)  # all of it is in the site now
    finally:
        shutil.rmtree(WORK, ignore_errors=True)


def show_first(done, *files):
    """A site of the chapters that have run, without the pages that need all of them; links to those lead nowhere yet. Where a whole site is there to read, none is made."""
    if (SITE / "index.html").exists():
        Path(done).touch()
        return
    work = Path("_build/early")
    shutil.rmtree(work, ignore_errors=True)
    for file in files:
        inside = Path(file)
        if file.endswith(".ipynb"):
            inside = Path("notebooks") / inside.name
        (work / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, work / inside)
    names = [f"notebooks/{Path(file).stem}" for file in files if file.endswith(".ipynb")]
    toc = {"format": "jb-book", "root": names[0], "chapters": [{"file": n} for n in names[1:]]}
    (work / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
    result = run_jupyter_book(work, work, stderr=subprocess.DEVNULL)  # it names those links
    if result.returncode == 0:
        put(work / "_build" / "html", FIRST)
        start = FIRST / f"{names[0]}.html"
        print(f"The first chapters can be read in {start} while the others run", file=sys.stderr)
    else:  # the site itself will say what is wrong
        print("the first chapters could not be shown early", file=sys.stderr)
    shutil.rmtree(work)
    Path(done).touch()


def run_jupyter_book(source, output, *options, **how):
    """Run Jupyter Book; it would say that the site is where it is not for long."""
    command = [Path(sys.executable).with_name("jupyter-book"), "build", source]
    command += ["--path-output", output, "--quiet", *options]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, **how)


def build(stage, url):
    """Run Jupyter Book and put the site into its place."""
    result = run_jupyter_book(stage, WORK, "--warningiserror", "--keep-going")
    if result.returncode:
        print(result.stdout)
        sys.exit(
            f"the book was not assembled; Jupyter Book says why above ({shutil.disk_usage(stage).free >> 20} MiB of disk are free)"
        )
    check_site(stage, WORK / "_build" / "html")
    if url:
        write_sitemap(WORK / "_build" / "html", url)
    put(WORK / "_build" / "html", SITE)


def write_sitemap(site, url):
    """List the pages of a site for search engines."""
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    entries = "".join(f"<url><loc>{escape(f'{url}/{page}')}</loc></url>\n" for page in pages)
    (site / "sitemap.xml").write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{entries}</urlset>\n',
        encoding="utf-8",
    )


def copy_without_solutions(stage):
    """A copy of the stage whose chapters ask the exercises and answer none of them."""
    copy = WORK / "stage"
    shutil.copytree(stage, copy)
    for path in copy.glob("notebooks/*.ipynb"):
        notebook = nbformat.read(path, 4)
        notebook.cells = list(drop_solutions(notebook.cells))
        nbformat.write(notebook, path)
    write_settings(copy / "_config.yml", {"show_solutions": False})
    return str(copy)


def drop_solutions(cells):
    """The cells that lie outside every solution."""
    inside = False
    for cell in cells:
        inside |= "{solution-start}" in cell.source
        if not inside:
            yield cell
        inside &= "{solution-end}" not in cell.source


def write_settings(config, sphinx, book=None):
    """Add settings of Sphinx, and of Jupyter Book, to the configuration of a book."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) | (book or {})
    settings["sphinx"]["config"] |= sphinx
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    config.write_text(text, encoding="utf-8")


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
    sphinx = {}
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
        sphinx["source_repository"] = f"{repository}/blob/{commit}"
    book = {
        "repository": {"url": repository, "branch": "main", "path_to_book": ""},
        "launch_buttons": buttons,
    }
    write_settings(config, sphinx, book)


def check_site(stage, site):
    """Fail if a chapter is missing from the site or shows neither a table nor a figure."""
    for notebook in sorted(Path(stage).glob("notebooks/*.ipynb")):
        page = site / "notebooks" / f"{notebook.stem}.html"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        if "<table" not in text and "_images/" not in text:
            sys.exit(f"{page} is missing or shows no result: the book is not complete")


if __name__ == "__main__":
    try:
        if sys.argv[1] == "--first":
            show_first(*sys.argv[2:])
        else:
            main(*sys.argv[1:])
    except OSError as error:
        sys.exit(f"the book was not assembled ({error}): free some space, or mend what it names")
