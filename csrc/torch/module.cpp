// The extension module mambaquant_ext._C: what is not a tensor operator (build facts, ISA choice). Loading it
// also registers the operators of schema.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "mambaquant/gemm.h"
#include "torch/hadamard_sizes.h"
#ifdef MBQ_WITH_SIMULATOR
#include "torch/simulator.h"
#endif
#if defined(MBQ_WITH_CUDA) || defined(MBQ_WITH_SIMULATOR)
#include "torch/gemm_control.h"
#endif

namespace {

using mambaquant::Status;
using mambaquant::cpu::Isa;

std::vector<std::string> isa_names(bool (*keep)(Isa)) {
  std::vector<std::string> names;
  for (int32_t i = 0; i < mambaquant::cpu::kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (keep(isa)) names.emplace_back(mambaquant::cpu::isa_name(isa));
  }
  return names;
}

std::string join(const std::vector<std::string>& names) {
  std::string joined;
  for (const std::string& name : names) joined += (joined.empty() ? "" : ", ") + name;
  return joined;
}

void force_isa(const std::string& name) {
  for (int32_t i = 0; i < mambaquant::cpu::kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name != mambaquant::cpu::isa_name(isa)) continue;
    const Status status = mambaquant::cpu::force_isa(isa);
    if (status.is_ok()) return;
    throw std::invalid_argument("force_isa: " + name + ": " + status.message + "; available: " +
                                join(isa_names(&mambaquant::cpu::isa_is_supported)));
  }
  throw std::invalid_argument("force_isa: expected one of " +
                              join(isa_names([](Isa) { return true; })) + ", got '" + name + "'");
}

// Layout id and version of the packed GEMM weights of every instruction set in this build.
std::map<std::string, std::pair<int64_t, int64_t>> gemm_packings() {
  std::map<std::string, std::pair<int64_t, int64_t>> packings;
  for (int32_t i = 0; i < mambaquant::cpu::kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!mambaquant::cpu::isa_is_built(isa)) continue;
    packings[mambaquant::cpu::isa_name(isa)] = {i, mambaquant::cpu::gemm_packing_version(isa)};
  }
  return packings;
}

// The base matrix H_m of the transform of size n, as rows of +-1.
std::vector<std::vector<int>> hadamard_base(int64_t n) {
  const mambaquant::HadamardBase* base = mambaquant::binding::find_hadamard_base(n);
  if (base == nullptr) {
    throw std::invalid_argument("hadamard: expected n of " +
                                mambaquant::binding::unsupported_hadamard_size(n));
  }
  std::vector<std::vector<int>> matrix;
  for (int64_t r = 0; r < base->order; ++r) {
    std::vector<int>& row = matrix.emplace_back();
    for (int64_t c = 0; c < base->order; ++c) row.push_back((base->inverse[r] >> c) & 1u ? -1 : 1);
  }
  return matrix;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = MBQ_VERSION;
  m.attr("torch_version") = MBQ_TORCH_VERSION;
  m.attr("compiler") = MBQ_COMPILER;
#ifdef MBQ_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
#ifdef MBQ_WITH_SIMULATOR
  m.def("set_simulating", &mambaquant::binding::set_simulating, pybind11::arg("on"));
  m.def("is_simulating", &mambaquant::binding::is_simulating);
  m.def("set_simulated_device", &mambaquant::binding::set_simulated_device, pybind11::arg("name"));
  m.def("set_simulator_checks", &mambaquant::binding::set_simulator_checks, pybind11::arg("spec"));
  m.def("simulator_stats", &mambaquant::binding::simulator_stats);
  m.def("reset_simulator_stats", &mambaquant::binding::reset_simulator_stats);
#endif
#if defined(MBQ_WITH_CUDA) || defined(MBQ_WITH_SIMULATOR)
  m.def("force_gemm_path", &mambaquant::binding::force_gemm_path, pybind11::arg("name"),
        pybind11::arg("splits") = 0);
  m.def("gemm_tiles", &mambaquant::binding::gemm_tiles);
  m.def(
      "plan_gemm",
      [](int64_t m, int64_t n, int64_t k) {
        const auto plan = mambaquant::binding::plan_gemm(m, n, k);
        return std::make_tuple(plan.kernel, plan.splits, plan.workspace_bytes);
      },
      pybind11::arg("m"), pybind11::arg("n"), pybind11::arg("k"));
#endif
  m.def("built_isas", [] { return isa_names(&mambaquant::cpu::isa_is_built); });
  m.def("supported_isas", [] { return isa_names(&mambaquant::cpu::isa_is_supported); });
  m.def("current_isa",
        [] { return std::string(mambaquant::cpu::isa_name(mambaquant::cpu::current_isa())); });
  m.def("gemm_packings", &gemm_packings);
  m.def("packed_gemm_weight_bytes", &mambaquant::packed_gemm_weight_bytes, pybind11::arg("n"),
        pybind11::arg("k"));
  m.def("hadamard_base", &hadamard_base, pybind11::arg("n"));
  m.def("supported_hadamard_sizes", &mambaquant::binding::supported_hadamard_sizes);
  m.def("force_isa", &force_isa, pybind11::arg("name"));
}
