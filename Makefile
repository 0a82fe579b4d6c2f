# `make run`: from a fresh clone to scored images.  `make test`: from a fresh clone to passed tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out

.PHONY: run test slow fuzz scale check docs mutants clean

run: $(VENV)/ready
	@echo "== exporting models/mini to $(OUT)/engine (half a minute)"
	@mkdir -p $(OUT)
	@$(BIN)/iqa-export --ckpt models/mini/model.safetensors -o $(OUT)/engine --force 2>$(OUT)/export.log || { cat $(OUT)/export.log; exit 1; }
	@echo "== scoring samples/ (a minute)"
	@$(BIN)/iqa-run --engine $(OUT)/engine samples --format table --report $(OUT)/report.html
	@echo "== mini guesses people's opinion of a photograph (SRCC 0.72 on CLIVE): see models/mini/README.md"
	@echo "== look at $(OUT)/report.html"

test: $(VENV)/ready
	@echo "== running the tests (a few minutes; 'make slow' adds the full-size ones)"
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

# Full-size networks: about ten minutes, 8 GB of memory.
slow: $(VENV)/ready fuzz
	@$(BIN)/python -m pytest -q -m "(slow or minutes) and not gpu"

# Readers of untrusted files get what a fuzzer makes of files: a minute for each reader.
fuzz: $(VENV)/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps atheris==3.0.0
	@$(BIN)/python figures/fuzz.py --seconds 60

# Shards on a real Ray, in buckets of a server that speaks S3, and in Parquet: 200 MB of packages, which get an
# environment of their own on top of $(VENV).
scale: $(VENV)/ready
	@$(BIN)/python -m venv $(OUT)/scale
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
	  > "$$($(OUT)/scale/bin/python -c 'import site; print(site.getsitepackages()[0])')/below.pth"
	@$(OUT)/scale/bin/python -m pip install --quiet --disable-pip-version-check \
	  'ray[data]==2.60.0' s3fs==2026.9.0 'moto[server]==5.2.5'
	@$(OUT)/scale/bin/python -m pytest -q -m "not slow and not gpu" \
	  tests/shards/test_ray.py tests/shards/test_bucket.py tests/shards/test_sources.py tests/shards/test_driver.py

check: $(VENV)/ready
	@echo "== format, lint, types, which room imports which, the documents: their tables, their links"
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet . && scripts/typecheck $(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python figures/tables.py --check
	@$(MAKE) --no-print-directory docs

# The pages of docs/, to read in a browser. A dead link is an error.
docs: $(VENV)/ready
	@$(BIN)/mkdocs build --strict --site-dir $(OUT)/docs

# Faults that are planted on purpose, and which of them no test notices: about an hour.
mutants: $(VENV)/ready
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check mutmut==3.8.1
	@$(BIN)/python scripts/mutants

$(VENV)/ready: requirements.lock requirements-torch.lock pyproject.toml
	@echo "== setting up $(VENV) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
