# Everything runs in .venv, which `make install` makes from pyproject.toml and constraints.txt.
PYTHON ?= python3.11
UWM = .venv/bin/uwm

.PHONY: install demo test soak soak-long bench-vae bench-store bench-ingest bench-model bench-query bench-step bench-loader bench-train bench-start check lock
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --progress-bar off -c constraints.txt -e '.[all,dev]'
	touch $@

demo: install
	$(UWM) demo --output demo-output

test: install
	.venv/bin/python -m pytest

soak soak-long: install # kills drivers, workers and a node, flips bits, fills a disk, breaks a network
	@seed=$${UWM_SOAK_SEED:-$$(date +%s)}; echo "UWM_SOAK_SEED=$$seed make $@ repeats this one's chances"; \
	UWM_SOAK_SEED=$$seed UWM_SOAK_KILLS=$(if $(filter soak-long,$@),20,4) .venv/bin/python -m pytest -m soak

bench-vae: install # PLACES="folder ..." adds other frames
	PYTHONPATH=tests .venv/bin/python tests/benchmarks/bench_vae.py $(PLACES)

bench-store bench-ingest bench-query bench-model bench-step bench-loader bench-train bench-start: bench-%: install
	PYTHONPATH=tests .venv/bin/python tests/benchmarks/bench_$*.py

check: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

lock: # after a change of the dependencies in pyproject.toml
	.venv/bin/pip freeze --exclude-editable | grep -v '^pip=' | sed 's/+cpu$$//' > constraints.txt
