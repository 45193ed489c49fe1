// Which sizes have a Hadamard transform, and by which base matrix. This rule defines H:
//   n a power of two: m = 1.  Otherwise m = 4 p, where p is the odd part of n (3, 5, ... 15) and 4
//   divides n: the smallest order with a table for which n / m is a power of two.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "mambaquant/hadamard_base.h"

namespace mambaquant::binding {

// Null for an unsupported size.
const HadamardBase* find_hadamard_base(int64_t n);

std::vector<int64_t> supported_hadamard_sizes();

// The end of an error message: what was expected instead of n.
std::string unsupported_hadamard_size(int64_t n);

}  // namespace mambaquant::binding
