# make book   build the book (EDITION=smoke, organism, organism-full, small or paper; PROFILE=slurm or kubernetes runs it on a cluster)
#             SOLUTIONS=no leaves the solutions of the exercises out
# make check  look up what EDITION needs: models, data, licences, disk; rehearse its memory and time
# make lint   hold the style, and the order of the rooms of the package
# make test   run the tests of the package; make test-book builds the small book and reads it in browsers;
#             make test-families the other seeds and families, and two trainings again;
#             make test-plain the organisms' tests with the plainest instructions of the processor;
#             make test-paper the paper's chapters on random checkpoints of its architectures;
#             make test-faults builds that are killed twenty times, and two at once;
#             make test-binder the environment of the Binder button, from nothing
EDITION ?= organism
PYTHON ?= $(shell command -v python3.11 || echo python3)
# Two chapters at once where there are two cores and no GPU to share; each runs on one.
CORES ?= $(if $(filter paper% small,$(EDITION)),1,$(shell test "$$(nproc 2>/dev/null || sysctl -n hw.ncpu)" -ge 2 && echo 2 || echo 1))
SOLUTIONS ?= yes
VENV ?= .venv

# A build that was killed leaves nothing that the next one waits for or takes for finished.
SNAKEMAKE = $(VENV)/bin/snakemake --nolock --rerun-incomplete -s workflow/Snakefile --configfile workflow/editions/$(EDITION).yaml \
    --cores $(CORES) --config solutions=$(SOLUTIONS) $(if $(PROFILE),--profile workflow/profiles/$(PROFILE))

# Two tests at a time, each on one core.
TESTS = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: book announce check lint test test-book test-families test-plain test-paper test-faults test-binder clean

# Compiled modules are kept, whatever the environment says: uv leaves compiling to the first import.
export PYTHONDONTWRITEBYTECODE =

# The C library keeps the memory of tensors for the next ones instead of handing it back, in large pages: on models this small pages cost time.
export MALLOC_TRIM_THRESHOLD_ = 1000000000
export MALLOC_MMAP_THRESHOLD_ = 33554432
export MALLOC_TOP_PAD_ = 67108864
export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

# The jobs say what stopped them; why no job could be planned a dry run says, which is not quiet.
book: announce $(VENV)/installed
	@$(VENV)/bin/python workflow/alone.py $(SNAKEMAKE) --quiet all || { said=$$($(SNAKEMAKE) --dry-run 2>&1) || echo "$$said"; exit 1; }
	@echo "The book is in _build/html/index.html"

announce:
	@test -f workflow/editions/$(EDITION).yaml || { echo "there is no edition $(EDITION): use one of $(basename $(notdir $(wildcard workflow/editions/*.yaml)))"; exit 2; }
	@test -z "$(PROFILE)" -o -d "workflow/profiles/$(PROFILE)" || { echo "there is no profile $(PROFILE): use one of $(notdir $(wildcard workflow/profiles/*))"; exit 2; }
	@sed -n 's/^minutes: /Building the $(EDITION) edition: about /p' workflow/editions/$(EDITION).yaml

check: announce $(VENV)/installed
	@$(VENV)/bin/safetyneuron check workflow/editions/$(EDITION).yaml

test: $(VENV)/installed
	$(TESTS) -m "not book and not families and not paper and not faults and not binder"

test-book: $(VENV)/installed
	$(TESTS) -m book

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check --quiet
	$(VENV)/bin/ruff check --quiet
	$(VENV)/bin/ruff check --quiet --isolated --select F notebooks/*.ipynb
	$(VENV)/bin/lint-imports

test-families: $(VENV)/installed
	$(TESTS) -m families

# What every processor has: numbers may move, verdicts may not.
PLAIN = ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41

test-plain: $(VENV)/installed
	$(PLAIN) $(TESTS) -m "organism and not book and not families and not paper and not faults and not binder"

test-paper: $(VENV)/installed
	$(TESTS) -m paper

test-faults: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m faults

test-binder: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m binder

$(VENV)/installed: requirements.txt requirements.lock pyproject.toml
	@echo "Installing into $(VENV): half a minute, once"
	@$(PYTHON) -m venv $(VENV)
	@sh workflow/install.sh $(VENV)
	@touch $@

clean:
	rm -rf _build
