// The choice of instruction set: a forced one is the one that runs, one that cannot run is refused
// and changes nothing.
#include <cstring>

#include "check.h"
#include "cpu/isa.h"

namespace {

using mambaquant::Status;
using namespace mambaquant::test;
namespace cpu = mambaquant::cpu;

void test_names() {
  const char* const names[] = {"scalar", "avx2", "avx512_vnni"};
  for (int32_t i = 0; i < cpu::kNumIsas; ++i) {
    CHECK(std::strcmp(cpu::isa_name(static_cast<cpu::Isa>(i)), names[i]) == 0);
  }
}

void test_force() {
  for (int32_t i = 0; i < cpu::kNumIsas; ++i) {
    const cpu::Isa isa = static_cast<cpu::Isa>(i);
    const cpu::Isa before = cpu::current_isa();
    const Status status = cpu::force_isa(isa);
    if (cpu::isa_is_supported(isa)) {
      CHECK(cpu::isa_is_built(isa));
      CHECK(status.is_ok());
      CHECK(cpu::current_isa() == isa);
    } else {
      CHECK(status.code == Status::Code::kUnsupported);
      CHECK(std::strlen(status.message) > 0);
      CHECK(cpu::current_isa() == before);
    }
  }
}

void test_unknown_is_refused() {
  const cpu::Isa before = cpu::current_isa();
  for (const int32_t unknown : {-1, cpu::kNumIsas, 1000}) {
    CHECK(cpu::force_isa(static_cast<cpu::Isa>(unknown)).code == Status::Code::kUnsupported);
    CHECK(cpu::current_isa() == before);
  }
}

// A file of packed weights names the version, so that 0, "none", must stay free.
void test_packings_have_versions() {
  for (int32_t i = 0; i < cpu::kNumIsas; ++i) {
    const cpu::Isa isa = static_cast<cpu::Isa>(i);
    CHECK((cpu::gemm_packing_version(isa) >= 1) == cpu::isa_is_built(isa));
  }
  CHECK(cpu::gemm_packing_version(static_cast<cpu::Isa>(cpu::kNumIsas)) == 0);
}

void test_default_is_best() {
  CHECK(cpu::current_isa() == cpu::best_isa());
  CHECK(cpu::isa_is_supported(cpu::Isa::kScalar));
  CHECK(cpu::isa_is_supported(cpu::best_isa()));
}

}  // namespace

int main() {
  test_default_is_best();
  test_names();
  test_unknown_is_refused();
  test_force();
  test_packings_have_versions();
  return result();
}
