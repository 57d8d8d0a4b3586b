# make book   build the book (EDITION=smoke, organism or organism-full)
# make test   run the tests; make test-families those that train the other two model families first
EDITION ?= organism
PYTHON ?= $(shell command -v python3.11 || echo python3)
CORES ?= 1

SNAKEMAKE = .venv/bin/snakemake -s workflow/Snakefile --configfile workflow/editions/$(EDITION).yaml --cores $(CORES) --quiet all

.PHONY: book announce test test-families clean

book: announce .venv/installed
	@$(SNAKEMAKE)
	@echo "The book is in _build/html/index.html"

announce:
	@test -f workflow/editions/$(EDITION).yaml || { echo "there is no edition $(EDITION): use one of $(basename $(notdir $(wildcard workflow/editions/*.yaml)))"; exit 2; }
	@sed -n 's/^minutes: /Building the $(EDITION) edition: about /p' workflow/editions/$(EDITION).yaml

test: .venv/installed
	.venv/bin/python -m pytest -m "not families"

test-families: .venv/installed
	.venv/bin/python -m pytest -m families

.venv/installed: requirements.txt pyproject.toml
	@echo "Installing into .venv: about 2 minutes, once"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt -e .
	touch $@

clean:
	rm -rf _build
