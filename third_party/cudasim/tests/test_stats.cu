// Statistics of launches.
#include <algorithm>
#include <set>
#include <string>

#include "test.h"

__global__ void straight(int* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x; }
__global__ void some_lanes(int* out, int lanes, int steps) {
  int x = threadIdx.x;
  if (threadIdx.x < lanes) {
#pragma unroll 1
    for (int i = 0; i < steps; ++i) asm volatile("mad.lo.s32 %0, %0, %0, 1;" : "+r"(x));
  }
  out[threadIdx.x] = x;
}
__global__ void guarded(int* out, int steps) {
#pragma unroll 1
  for (int i = 0; i < steps; ++i)
    asm volatile("{.reg .pred p; setp.eq.u32 p, %0, 3; @p st.global.u32 [%1], %0;}" ::"r"(threadIdx.x), "l"(out) : "memory");
}
__device__ __noinline__ int twice(int x) { asm volatile("add.s32 %0, %0, %0;" : "+r"(x)); return x; }
__global__ void calls(int* out, int lanes, int steps) {
  int x = threadIdx.x;
  if (threadIdx.x < lanes) {
#pragma unroll 1
    for (int i = 0; i < steps; ++i) x = twice(x);
  }
  out[threadIdx.x] = x;
}
__global__ void both_kinds_of_shared(int* out) {
  __shared__ int fixed[32];
  extern __shared__ int dynamic[];
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  fixed[thread] = dynamic[thread] = thread;
  __syncwarp();
  out[thread] = fixed[31 - thread] + dynamic[31 - thread];
}

template <class T>
__global__ void strided(int stride, int lanes) {
  extern __shared__ __align__(16) char memory[];
  volatile char* place = memory + threadIdx.x * stride;
  if (threadIdx.x >= lanes) return;
  if constexpr (sizeof(T) == 1) asm volatile("st.shared.b8 [%0], %1;" ::"r"((unsigned)__cvta_generic_to_shared((char*)place)), "r"(1));
  if constexpr (sizeof(T) == 4) asm volatile("st.shared.b32 [%0], %1;" ::"r"((unsigned)__cvta_generic_to_shared((char*)place)), "r"(1));
  if constexpr (sizeof(T) == 8) asm volatile("st.shared.v2.b32 [%0], {%1, %1};" ::"r"((unsigned)__cvta_generic_to_shared((char*)place)), "r"(1));
  if constexpr (sizeof(T) == 16) asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"((unsigned)__cvta_generic_to_shared((char*)place)), "r"(1));
}

template <class K, class... Args>
cudasim_stats count(K kernel, dim3 grid, dim3 block, Args... args) {
  cudasim_stats stats;
  cudasim_reset_stats();
  kernel<<<grid, block>>>(args...);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  cudasim_get_stats(&stats);
  return stats;
}

// The definition: lanes go in groups that ask for up to 128 bytes; in each, the bank with most different words decides.
unsigned wavefronts(int bytes, int stride, int lanes) {
  int group = bytes <= 4 ? 32 : 128 / bytes;
  unsigned total = 0;
  for (int first = 0; first < lanes; first += group) {
    std::set<int> words[32];
    for (int lane = first; lane < first + group && lane < lanes; ++lane)
      for (int byte = lane * stride; byte < lane * stride + bytes; ++byte) words[byte / 4 % 32].insert(byte / 4);
    size_t worst = 0;
    for (const auto& bank : words) worst = std::max(worst, bank.size());
    total += worst;
  }
  return total;
}

template <class T>
void check_wavefronts() {
  int bytes = sizeof(T);
  for (int stride : {0, 1, 2, 3, 4, 5, 8, 12, 16, 32, 33}) {
    for (int lanes : {32, 20, 1}) {
      cudasim_reset_stats();
      strided<T><<<1, 32, 32 * 33 * 16 + 16>>>(stride * bytes, lanes);
      CHECK(cudaDeviceSynchronize() == cudaSuccess);
      cudasim_stats s;
      cudasim_get_stats(&s);
      CHECK(s.shared_store_wavefronts == wavefronts(bytes, stride * bytes, lanes));
    }
  }
}

int main() {
  check_wavefronts<char>();
  check_wavefronts<int>();
  check_wavefronts<int2>();
  check_wavefronts<int4>();
  Buffer<int> out(256);
  cudasim_stats s = count(straight, 2, 64, (int*)out);
  CHECK(s.launches == 1 && s.blocks == 2 && s.warp_instructions > 0 && s.warp_instructions % 4 == 0);
  CHECK(s.thread_instructions == 32 * s.warp_instructions);
  s = count(straight, 1, 40, (int*)out);  // the second warp has 8 lanes
  CHECK(s.thread_instructions == (32 + 8) * (s.warp_instructions / 2));

  // What a step of the loop adds is executed by the lanes that take part, in the kernel and in functions. (A loop of
  // more than a warp's turn would let the other lanes run ahead, and what follows would be counted twice.)
  for (auto kernel : {some_lanes, calls}) {
    for (int lanes : {0, 1, 8, 31, 32}) {
      cudasim_stats few = count(kernel, 1, 32, (int*)out, lanes, 10), many = count(kernel, 1, 32, (int*)out, lanes, 210);
      uint64_t warp = many.warp_instructions - few.warp_instructions, thread = many.thread_instructions - few.thread_instructions;
      CHECK(lanes == 0 || warp >= 600);
      CHECK(thread == static_cast<uint64_t>(lanes) * warp);
    }
  }
  s = count(guarded, 1, 32, (int*)out, 100);  // a false guard does not make a lane inactive
  CHECK(s.thread_instructions == 32 * s.warp_instructions && s.divergent_branches == 0);

  cudasim_reset_stats();
  both_kinds_of_shared<<<dim3(2, 3, 4), dim3(8, 2, 2), 256>>>(out);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  std::string json = cudasim_stats_json();
  cudasim_get_stats(&s);
  for (std::string field :
       {"\"kernel\":\"_Z20both_kinds_of_sharedPi\"", "\"grid\":[2,3,4]", "\"block\":[8,2,2]", "\"shared_bytes\":384,",
        "\"dynamic_shared_bytes\":256,"})
    CHECK(json.find(field) != std::string::npos);
  CHECK(json.find("\"warp_instructions\":" + std::to_string(s.warp_instructions)) != std::string::npos);
  CHECK(json.find("\"thread_instructions\":" + std::to_string(s.thread_instructions)) != std::string::npos);
  return finish("test_stats");
}
