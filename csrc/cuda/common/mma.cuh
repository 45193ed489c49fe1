// Integer products on the tensor cores, sm_80 and later.
#pragma once

#include <cstdint>

namespace mambaquant::cuda {

// acc (16 x 8, int32) += a (16 x 32, int8) * b (32 x 8, int8). With lane = 4 * g + q:
//   acc[0..1]: row g, columns 2q and 2q + 1;  acc[2..3]: row g + 8
//   a[0], a[1]: rows g, g + 8, depths 4q .. 4q + 3;  a[2], a[3]: the same at depth 16
//   b[0]: column g, depths 4q .. 4q + 3;  b[1]: the same at depth 16
__device__ inline void mma_m16n8k32(int32_t (&acc)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace mambaquant::cuda
