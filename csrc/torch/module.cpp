// torch.ops.mambaquant_build: what is not a tensor operator (build facts, ISA choice). Written as torch
// operators too, so that the library needs nothing of Python's C API: no headers to build, and one binary
// for every Python version.
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "torch/hadamard_sizes.h"

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

std::string built_isas() { return join(isa_names(&mambaquant::cpu::isa_is_built)); }
std::string supported_isas() { return join(isa_names(&mambaquant::cpu::isa_is_supported)); }
std::string current_isa() { return mambaquant::cpu::isa_name(mambaquant::cpu::current_isa()); }

void force_isa(std::string name) {
  for (int32_t i = 0; i < mambaquant::cpu::kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (name != mambaquant::cpu::isa_name(isa)) continue;
    const Status status = mambaquant::cpu::force_isa(isa);
    TORCH_CHECK_VALUE(status.is_ok(), "force_isa: ", name, ": ", status.message,
                      "; available: ", supported_isas());
    return;
  }
  TORCH_CHECK_VALUE(false, "force_isa: expected one of ", join(isa_names([](Isa) { return true; })),
                    ", got '", name, "'");
}

// The base matrix H_m of the transform of size n, row by row: m * m entries of +-1.
std::vector<int64_t> hadamard_base(int64_t n) {
  const mambaquant::binding::HadamardBase* base = mambaquant::binding::find_hadamard_base(n);
  TORCH_CHECK_VALUE(base != nullptr, "hadamard: expected n of ",
                    mambaquant::binding::unsupported_hadamard_size(n));
  std::vector<int64_t> entries;
  const auto order = static_cast<size_t>(base->order);
  for (size_t r = 0; r < order; ++r) {
    for (size_t c = 0; c < order; ++c) entries.push_back((base->rows[r] >> c) & 1u ? -1 : 1);
  }
  return entries;
}

}  // namespace

// Names are joined by ", ".
TORCH_LIBRARY(mambaquant_build, m) {
  m.def("version() -> str", [] { return std::string(MBQ_VERSION); });
  m.def("torch_version() -> str", [] { return std::string(MBQ_TORCH_VERSION); });
  m.def("compiler() -> str", [] { return std::string(MBQ_COMPILER); });
  m.def("has_cuda() -> bool", [] { return false; });
  m.def("built_isas() -> str", &built_isas);
  m.def("supported_isas() -> str", &supported_isas);
  m.def("current_isa() -> str", &current_isa);
  m.def("hadamard_base(int n) -> int[]", &hadamard_base);
  m.def("supported_hadamard_sizes() -> int[]", &mambaquant::binding::supported_hadamard_sizes);
  m.def("force_isa(str name) -> ()", &force_isa);
}
