// Which sizes have a Hadamard transform, and by which base matrix. This rule defines H:
//   n a power of two: m = 1.  Otherwise m = 4 p, where p is the odd part of n (3, 5, ... 15) and 4
//   divides n: the smallest order with a table for which n / m is a power of two.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "mambaquant/hadamard.h"
#include "mambaquant/hadamard_tables.h"

namespace mambaquant::binding {

// Masks of H_m, by row and by column: bit c of rows[r], bit r of columns[c], set where H[r][c] =
// -1.
struct HadamardBase {
  int64_t order = 1;
  std::array<uint64_t, kMaxHadamardBaseOrder> rows{};
  std::array<uint64_t, kMaxHadamardBaseOrder> columns{};
};

constexpr std::size_t kNumHadamardBases = std::size(kHadamardBaseRows) + 1;

constexpr std::array<HadamardBase, kNumHadamardBases> make_hadamard_bases() {
  std::array<HadamardBase, kNumHadamardBases> bases{};
  for (std::size_t b = 1; b < kNumHadamardBases; ++b) {
    const HadamardBaseRows& table = kHadamardBaseRows[b - 1];
    const std::size_t order = static_cast<std::size_t>(table.order);
    bases[b].order = table.order;
    for (std::size_t r = 0; r < order; ++r) {
      bases[b].rows[r] = table.rows[r];
      for (std::size_t c = 0; c < order; ++c)
        bases[b].columns[c] |= ((table.rows[r] >> c) & 1u) << r;
    }
  }
  return bases;
}

// By rising order; the first is m = 1.
inline constexpr auto kHadamardBases = make_hadamard_bases();

// Null for an unsupported size.
inline const HadamardBase* find_hadamard_base(int64_t n) {
  if (n < 1 || n > kMaxHadamardDim) return nullptr;
  for (const HadamardBase& base : kHadamardBases) {
    const int64_t block = n / base.order;
    if (n % base.order == 0 && (block & (block - 1)) == 0) return &base;
  }
  return nullptr;
}

inline std::vector<int64_t> supported_hadamard_sizes() {
  std::vector<int64_t> sizes;
  for (int64_t n = 1; n <= kMaxHadamardDim; ++n) {
    if (find_hadamard_base(n) != nullptr) sizes.push_back(n);
  }
  return sizes;
}

// The end of an error message: what was expected instead of n.
inline std::string unsupported_hadamard_size(int64_t n) {
  int64_t below = 0, above = 0;
  for (const int64_t size : supported_hadamard_sizes()) {
    if (size < n) below = size;
    if (size > n && above == 0) above = size;
  }
  std::ostringstream message;
  message << "p * 2^k with p = 1, or p = 3, 5, ... 15 and k >= 2, at most " << kMaxHadamardDim
          << " (nearest: ";
  if (below != 0) message << below;
  if (below != 0 && above != 0) message << " and ";
  if (above != 0) message << above;
  message << "), got " << n;
  return message.str();
}

}  // namespace mambaquant::binding
