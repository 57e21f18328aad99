# Everything runs in .venv; FILE=my.wav and ARGS=--fast are passed to the demo.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check bench-live bench-encoder bench-search bench-train bench-kernels bench-model bench-simul bench-terms bench-av aot-kernels clean

demo: .venv/demo
	$(BIN)/speechattn demo $(FILE) $(ARGS)

# Kernels run in Triton's interpreter, which wants a process of its own.
test: .venv/dev
	$(BIN)/pytest
	TRITON_INTERPRET=1 $(BIN)/pytest kernels/tests

test-all: .venv/dev
	$(BIN)/pytest -m ""
	TRITON_INTERPRET=1 $(BIN)/pytest -m "" kernels/tests

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-live: .venv/demo
	$(BIN)/python benchmarks/live.py $(ARGS)

bench-encoder: .venv/dev
	$(BIN)/python benchmarks/encoder.py $(ARGS)

bench-search: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off 'flashlight-text>=0.0.7'
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off --no-deps pyctcdecode==0.5.0 pygtrie
	$(BIN)/python benchmarks/search.py $(ARGS)

bench-train: .venv/dev
	$(BIN)/python benchmarks/train.py $(ARGS)

bench-kernels: .venv/dev
	$(BIN)/python benchmarks/kernels.py $(ARGS)

# The sets are made first, once (data/embedded/README.md); KOKORO=FOLDER has the synthetic voices that were kept out.
bench-model: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off av piper-tts
	$(BIN)/python recipes/embedded/testsets.py data/embedded $(if $(KOKORO),--kokoro $(KOKORO))
	$(BIN)/python benchmarks/model.py $(ARGS)

# Latency-quality curves; ARGS="--translator models/MODEL --manifest STREAMS.jsonl.gz" adds those of a translator.
bench-simul: .venv/dev
	$(BIN)/python benchmarks/simul.py $(ARGS)

# Terms retrieved, and then what they do to live transcripts (half an hour); with ARGS the first alone.
bench-terms: .venv/dev
	$(BIN)/python benchmarks/terms.py $(ARGS)
	$(if $(ARGS),,$(BIN)/python benchmarks/terms_use.py)

# The clips are made first (recipes/av/README.md); trains what is not in runs/av. (A script av.py would hide the package av.)
bench-av: .venv/dev
	$(BIN)/python benchmarks/audio_visual.py $(ARGS)

# What the compiler makes of every kernel, for sm_80 and sm_90; ARGS="--default --op window".
aot-kernels: .venv/dev
	$(BIN)/python kernels/aot.py $(ARGS)

# --without-pip and pip's --python: works where Debian's python3-venv is not installed.
.venv/bin/pip:
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python .venv/bin/python install --quiet --disable-pip-version-check pip

.venv/demo: pyproject.toml | .venv/bin/pip
	@echo "Installing into .venv, once; torch alone is 3 GB on Linux ..."
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off -e '.[live]'
	touch $@

.venv/dev: pyproject.toml | .venv/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off --no-deps espnet==202511
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
