// The base matrices of hadamard_tables.h by row and by column, worked out by the compiler. The
// function is consteval and the tables have internal linkage: an object file gets data from here,
// never code.
#pragma once

#include "mambaquant/hadamard_tables.h"

namespace mambaquant {

// Bit i of forward[r] is set where block i enters block r of x H negated (H[i][r] = -1), of
// inverse[r] the same for x H^T.
struct HadamardBase {
  int64_t order;
  uint64_t forward[kMaxHadamardBaseOrder];
  uint64_t inverse[kMaxHadamardBaseOrder];
};

consteval HadamardBase make_hadamard_base(int64_t order) {
  HadamardBase base{order, {}, {}};
  for (const HadamardBaseRows& table : kHadamardBaseRows) {
    if (table.order != order) continue;
    for (int64_t r = 0; r < order; ++r) {
      base.inverse[r] = table.rows[r];
      for (int64_t c = 0; c < order; ++c) base.forward[c] |= ((table.rows[r] >> c) & 1u) << r;
    }
  }
  return base;
}

// By rising order.
constexpr HadamardBase kHadamardBases[] = {
    make_hadamard_base(1),  make_hadamard_base(12), make_hadamard_base(20), make_hadamard_base(28),
    make_hadamard_base(36), make_hadamard_base(44), make_hadamard_base(52), make_hadamard_base(60),
};

}  // namespace mambaquant
