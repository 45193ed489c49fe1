# For a machine with a GPU and a CUDA build of torch; bench/README.md says what it takes. Included by the Makefile.
#
#   make test-gpu PYTHON=/opt/torch/bin/python     the Python that holds torch
#   make test-gpu WHEELS=dir                       without a network: what is missing comes from dir,
#   make gpu-wheels WHEELS=dir PYTHON_VERSION=3.12 which this fills elsewhere (NVCC=1: the compiler too)
#   make test-gpu SANITIZERS=memcheck
#   make bench-gpu BENCH="--quick --op gemm"       what `python -m bench.gpu --help` lists

GPU_RUN := "$(PYTHON)" -m scripts.gpu_run
GPU_WHEELS := $(if $(WHEELS),--wheels "$(WHEELS)")
PYTHON_VERSION ?=
SANITIZERS ?=
BENCH ?=

.PHONY: test-gpu bench-gpu gpu-wheels gpu-status

test-gpu: ## build for the GPU that is here, test, run compute-sanitizer: build/gpu/test-gpu.json
	@$(GPU_RUN) test $(GPU_WHEELS) $(if $(SANITIZERS),--sanitizers "$(SANITIZERS)")

bench-gpu: ## build for the GPU that is here, time every operator: build/gpu/bench-gpu.json
	@$(GPU_RUN) bench $(GPU_WHEELS) -- $(BENCH)

gpu-wheels: ## download what test-gpu needs on a machine without a network, into WHEELS
	@test -n "$(WHEELS)" || { echo "gpu-wheels: name a folder: make gpu-wheels WHEELS=dir PYTHON_VERSION=3.12" >&2; exit 2; }
	@$(GPU_RUN) wheels "$(WHEELS)" $(if $(PYTHON_VERSION),--python-version "$(PYTHON_VERSION)") $(if $(NVCC),--nvcc)

gpu-status: ## rewrite docs/gpu-status.md from bench/results
	@"$(PYTHON)" -m scripts.gen_gpu_status
