# demo: the whole method on a laptop in ten minutes.  test: what CI runs.  reports: the experiments' tables and figures,
# from their rows.  All make .venv first, once.
PYTHON ?= python3
RUN = .venv/bin/python

.PHONY: demo test reports clean

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "Python 3.11 or 3.12 is needed, %d.%d found; try make PYTHON=python3.11" % v)'
	@echo "installing into .venv, once: minutes without a word; 2 GB, and with torch's libraries for GPUs three times that"
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable '.[eval,serve,dev]'
	touch $@
	@echo "installed; for all other commands: . .venv/bin/activate"

demo: .venv/installed
	$(RUN) -m fastdllm.demo.run

test: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -n 2

reports: .venv/installed
	$(RUN) benchmarks/reports.py

clean:
	rm -rf runs/demo data/prepared data/tiny-source
