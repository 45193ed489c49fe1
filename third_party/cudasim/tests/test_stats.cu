// Statistics of launches.
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

template <class K, class... Args>
cudasim_stats count(K kernel, dim3 grid, dim3 block, Args... args) {
  cudasim_stats stats;
  cudasim_reset_stats();
  kernel<<<grid, block>>>(args...);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  cudasim_get_stats(&stats);
  return stats;
}

int main() {
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
