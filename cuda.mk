# The CUDA backend where there is no GPU: compiled for every architecture, run by the simulator, linked to a CUDA
# build of torch. nvcc and CUTLASS are those of the machine, or come as the wheels of requirements/cuda.txt.

KERNELS_DIR := build/kernels
SIM_DIR := build/sim
LINK_DIR := build/link
STANDINS_DIR := build/stand-ins
TORCH_CUDA_DIR := build/torch-cuda
TORCH_CUDA := torch==2.14.1

STAMP_TOOLKIT := $(VENV)/.stamp-toolkit
STAMP_KERNELS := $(KERNELS_DIR)/.stamp
STAMP_SIM := $(SIM_DIR)/.stamp
STAMP_TORCH_CUDA := $(TORCH_CUDA_DIR)/.stamp
STAMP_LINK := $(LINK_DIR)/.stamp
STAMP_LINK_SIM := $(LINK_DIR)/.stamp-sim

CUDA_SOURCES := CMakeLists.txt $(shell find cmake csrc/cuda csrc/include) scripts/nvcc_with_report.py
LINK_OPTIONS := -DMBQ_CUDA=ON -DMBQ_TORCH_DIR="$(CURDIR)/$(TORCH_CUDA_DIR)"
# The package as PYTHONPATH wants it, in the folder python of a build folder.
install_package = rm -rf $(1)/python && mkdir -p $(1)/python && cp -r python/mambaquant_ext $(1)/python/ && \
  $(CMAKE) --install $(1) --prefix $(1)/python > /dev/null
CONFIGURE := PATH="$(CURDIR)/$(BIN):$$PATH" $(CMAKE) -S . -G Ninja --log-level=WARNING -DCMAKE_COMPILE_WARNING_AS_ERROR=ON

.PHONY: test-cuda cuda-kernels test-sim cuda-link test-link bench-sim

test-cuda: cuda-kernels test-sim cuda-link test-link ## the four that follow

cuda-kernels: $(STAMP_KERNELS) ## compile the kernels for every architecture; refuse spilled registers
	@$(RUN) scripts/ptxas_report.py $(KERNELS_DIR) --quiet

test-sim: $(STAMP_SIM) ## the tests of operators and blocks on the CUDA kernels, in the simulator
	@$(BIN)/ctest --test-dir $(SIM_DIR)/third_party/cudasim --output-on-failure --no-tests=error --quiet \
	  && echo "the simulator's own tests passed"
	PYTHONPATH=$(SIM_DIR)/python CUDASIM_THREADS=1 $(ONE_THREAD) $(RUN) -m pytest -q -n $(WORKERS) -m "not slow" -k cudasim \
	  tests/ops tests/stages/test_cuda.py tests/bench/test_sim.py
	@echo "the same products as an A100, which has no wgmma"
	PYTHONPATH=$(SIM_DIR)/python CUDASIM_THREADS=1 CUDASIM_DEVICE=a100 $(ONE_THREAD) $(RUN) -m pytest -q -n $(WORKERS) \
	  -m "not slow" -k cudasim tests/ops/test_gemm.py

cuda-link: $(STAMP_LINK) ## compile the extension and link it with a CUDA build of torch

# torch's CUDA build loads with stand-ins for cublas and the like, and takes the simulator for its GPU: its dispatcher,
# guards, streams and allocator are the real ones. Its own kernels have no PTX, hence no views of weights, which torch
# would have to copy before they are checked.
LINK_SIM_ENV = PYTHONPATH=$(LINK_DIR)/python:$(TORCH_CUDA_DIR) PYTORCH_NO_CUDA_MEMORY_CACHING=1 CUDASIM_THREADS=1 \
  LD_LIBRARY_PATH=$(SIM_DIR)/third_party/cudasim:$(STANDINS_DIR) $(ONE_THREAD)
test-link: $(STAMP_LINK_SIM) ## the tests of operators on torch's device cuda, with the simulator as GPU
	$(LINK_SIM_ENV) $(RUN) -m pytest -q -n $(WORKERS) -m "not slow" tests/ops \
	  -k "cuda and not cudasim and not views and not every_cuda_kernel and not (test_layout and gemm)"
	$(LINK_SIM_ENV) $(RUN) -m pytest -q tests/gpu/test_cuda.py -k mixed_devices

bench-sim: $(STAMP_SIM) $(STAMP_KERNELS) ## count bytes, conflicts, instructions and registers of the CUDA kernels
	PYTHONPATH=$(SIM_DIR)/python CUDASIM_THREADS=1 $(ONE_THREAD) $(RUN) -m bench.sim --build-dir $(KERNELS_DIR)

$(STAMP_TOOLKIT): $(STAMP_TOOLS) requirements/cuda.txt
	@if ! $(RUN) scripts/cuda_toolchain.py > /dev/null 2>&1; then \
	  wanted="-r requirements/cuda.txt"; \
	  if command -v nvcc > /dev/null; then wanted=$$(grep nvidia-cutlass requirements/cuda.txt); fi; \
	  echo "installing $$wanted"; \
	  $(RUN) -m pip install -qq --disable-pip-version-check --no-deps $$wanted; \
	fi
	@$(RUN) scripts/cuda_toolchain.py > /dev/null
	@touch $@

$(STAMP_KERNELS): $(STAMP_TOOLKIT) $(CUDA_SOURCES)
	@echo "compiling the CUDA kernels for every architecture (some minutes)"
	@$(CONFIGURE) -B $(KERNELS_DIR) -DMBQ_BUILD_PYTHON=OFF -DMBQ_CUDA=KERNELS
	@$(CMAKE) --build $(KERNELS_DIR) --target mambaquant_cuda -- --quiet
	@touch $@

$(STAMP_SIM): $(STAMP_TOOLKIT) $(PACKAGE_SOURCES) $(shell find third_party/cudasim)
	@echo "building the extension for the simulator (some minutes)"
	@$(CONFIGURE) -B $(SIM_DIR) -DMBQ_CUDA=SIM
	@$(CMAKE) --build $(SIM_DIR) -- --quiet
	@$(call install_package,$(SIM_DIR))
	@touch $@

# Its 1.2 GB stay out of .venv: nothing imports it, and of its own requirements nothing is installed.
$(STAMP_TORCH_CUDA): $(STAMP_TOOLS)
	@echo "installing $(TORCH_CUDA) into $(TORCH_CUDA_DIR), for its CUDA headers and libraries (1.2 GB)"
	@rm -rf $(TORCH_CUDA_DIR)
	@env -u PIP_EXTRA_INDEX_URL $(RUN) -m pip install -qq --disable-pip-version-check --no-deps --target $(TORCH_CUDA_DIR) $(TORCH_CUDA)
	@touch $@

$(STAMP_LINK): $(STAMP_TORCH_CUDA) $(STAMP_KERNELS) $(PACKAGE_SOURCES) scripts/check_link.py
	@$(CONFIGURE) -B $(LINK_DIR) $(LINK_OPTIONS) -DMBQ_CUDA_LIBRARY="$(CURDIR)/$(KERNELS_DIR)/libmambaquant_cuda.a"
	@$(CMAKE) --build $(LINK_DIR) -- --quiet
	@$(RUN) scripts/check_link.py $(LINK_DIR)/_C.*.so $(addprefix $(TORCH_CUDA_DIR)/torch/lib/lib, \
	  c10.so c10_cuda.so torch_cpu.so torch_cuda.so gomp.so.1)
	@touch $@

# The same objects once more, with PTX in place of machine code.
$(STAMP_LINK_SIM): $(STAMP_LINK) $(STAMP_SIM) scripts/torch_cuda_standins.py
	@$(RUN) scripts/torch_cuda_standins.py $(TORCH_CUDA_DIR)/torch/lib $(STANDINS_DIR)
	@$(CONFIGURE) -B $(LINK_DIR) $(LINK_OPTIONS) -DMBQ_CUDA_LIBRARY="$(CURDIR)/$(SIM_DIR)/libmambaquant_cuda.a"
	@$(CMAKE) --build $(LINK_DIR) -- --quiet
	@$(call install_package,$(LINK_DIR))
	@touch $@
