# make book   build the book (EDITION=smoke, organism or organism-full)
# make test   run the tests
EDITION ?= organism
PYTHON ?= $(shell command -v python3.11 || echo python3)
CORES ?= 1

SNAKEMAKE = .venv/bin/snakemake -s workflow/Snakefile --configfile workflow/editions/$(EDITION).yaml --cores $(CORES) --quiet all

.PHONY: book test clean

book: .venv/installed
	@sed -n 's/^minutes: /Building the $(EDITION) edition: about /p' workflow/editions/$(EDITION).yaml
	@$(SNAKEMAKE)
	@echo "The book is in _build/html/index.html"

test: .venv/installed
	.venv/bin/python -m pytest

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt -e .
	touch $@

clean:
	rm -rf _build
