# Everything runs in an environment of its own, .venv; nothing has to be installed beforehand but Python.
PYTHON ?= python3
BIN := .venv/bin
# A folder or page of wheels that pip is told of in PIP_FIND_LINKS serves uv too.
UV = $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)") $(BIN)/uv

.PHONY: setup demo test docs format errors clean

setup: .venv/ready ## make .venv with the package and everything its development needs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

demo: setup ## prune the embedded task, end to end
	$(BIN)/woodfisher prune

test: setup docs ## format, lint, types, layers, docs, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2

docs: setup ## build the site into site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: setup ## put the code into the shape that `make test` asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

errors: setup ## measure the curvature's errors against float64: docs/accuracy.md
	$(BIN)/python benchmarks/errors.py > docs/accuracy.md

clean: ## remove the environment and caches
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache .hypothesis
