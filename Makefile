# One command each; all of them make .venv first. Nothing but Python 3.11 or 3.12 is needed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
UV := $(BIN)/python -m uv
INSTALLED := .venv/installed

.PHONY: install demo test soak cluster lint format bench requirements clean

install: $(INSTALLED)

$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "Python must be 3.11 or 3.12; got none. Install one, or name it: make PYTHON=/path/to/python install" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv

# Compiled once (half a minute): else each of the many processes of a run or a test compiles the 10 000 files it imports.
unexport PYTHONDONTWRITEBYTECODE
$(INSTALLED): requirements/all.txt pyproject.toml | $(BIN)/uv
	$(UV) pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r requirements/all.txt
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: $(INSTALLED)  ## draw scenes, train supervised and derprop with 2 Ray workers, compare, report
	$(BIN)/raysemi demo

# In the order of the folders: files with few and long tests come first, not last on one core.
test: $(INSTALLED)  ## on two cores; `.venv/bin/pytest PATH` for one file
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=40 --durations-min=4

soak: $(INSTALLED)  ## a run that is killed 20 times, and one whose nodes leave and join, end as if nothing had been
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --points 20
	RAYSEMI_SOAK=1 $(BIN)/python -m pytest tests/ray/test_nodes.py

SIZE ?= --images 60 --steps 200 --twin
cluster: $(INSTALLED)  ## all jobs on a cluster that this machine plays; a disturbed run ends with the bits of another
	OMP_NUM_THREADS=1 $(BIN)/python tests/cluster.py $(SIZE)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## measurements, one JSON line each; docs/results.md keeps what was measured
	for script in tests/bench/*.py; do $(BIN)/python $$script || exit 1; done
	for method in supervised fixmatch derprop; do $(BIN)/raysemi bench step --method $$method \
		--backbone tf_efficientnet_lite0 --crop 97 --batch 2 --threads 1 --json || exit 1; done

.PHONY: docs audit sbom
docs: build/tools/docs/installed  ## the site, build/site; any warning fails
	NO_MKDOCS_2_WARNING=1 build/tools/docs/bin/mkdocs build --strict --quiet

audit: build/tools/supply/installed  ## known weaknesses of the pins; asks PyPI, and fails where PyPI does not know a package
	build/tools/supply/bin/pip-audit --strict --require-hashes --disable-pip --progress-spinner off -r requirements/all.txt

sbom: build/tools/supply/installed  ## build/sbom.json: CycloneDX, the pins with their hashes
	build/tools/supply/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type library --output-reproducible \
		--of JSON -o build/sbom.json requirements/all.txt

build/tools/%/installed: requirements/%.txt | $(BIN)/uv
	$(UV) venv --quiet --clear --python $(BIN)/python build/tools/$*
	$(UV) pip install --quiet --python build/tools/$*/bin/python --require-hashes -r $<
	@touch $@

PIN := $(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-emit-find-links --no-header --no-annotate
requirements: | $(BIN)/uv  ## pin again, without any index address
	$(PIN) --extra deepspeed --extra export --extra postgres --extra dev pyproject.toml -o requirements/all.txt
	for group in docs supply; do $(PIN) --group $$group -o requirements/$$group.txt || exit 1; done

clean:
	rm -rf .venv build *.egg-info
