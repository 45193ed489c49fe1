// One process as several GPUs. Built with PTX for compute_80 and compute_90.
#include <string>

#include "test.h"

__device__ int counter = 5;
__constant__ float scale = 2;
__managed__ int managed_value = 7;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ int table[8] = {90};  // of another size than the older one
#else
__device__ int table[2] = {80};
#endif

struct Result {
  int arch, counter, managed, table;
  float scale;
  char name[8];
};

__global__ void look(Result* out) {
#if __CUDA_ARCH__ >= 900
  const char* name = "hopper";  // literals are variables of the module, of the same name in each
  out->arch = 900;
#else
  const char* name = "ampere";
  out->arch = 800;
#endif
  for (int i = 0; i < 7; ++i) out->name[i] = *(const volatile char*)(name + i);
  out->counter = counter++;
  out->managed = managed_value;
  out->scale = scale;
  out->table = table[0];
}
__global__ void big_shared(int* out) {
  extern __shared__ int s[];
  s[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = s[threadIdx.x];
}

Result run() {
  Buffer<Result> out(1);
  look<<<1, 1>>>(out);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  return out.get()[0];
}

struct Expected {
  const char* device;
  int major, minor, sm_count, arch;
};

void check_device(const Expected& expected) {
  CHECK(cudasim_set_device(expected.device) == 0);
  cudaDeviceProp prop;
  int sms = 0;
  CHECK(cudaGetDeviceProperties(&prop, 0) == cudaSuccess && prop.major == expected.major && prop.minor == expected.minor);
  CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && sms == expected.sm_count);
  Result r = run();
  CHECK(r.arch == expected.arch);
  CHECK(std::string(r.name) == (expected.arch == 900 ? "hopper" : "ampere"));
  CHECK(r.table == expected.arch / 10);
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, look) == cudaSuccess && attributes.binaryVersion == 10 * expected.major + expected.minor);
}

void check_limits() {
  Buffer<int> out(32);
  int blocks = 0;
  CHECK(cudasim_set_device("h100") == 0);
  CHECK(cudaFuncSetAttribute(big_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10) == cudaSuccess);
  big_shared<<<1, 32, 200 << 10>>>(out);
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, big_shared, 32, 50 << 10) == cudaSuccess && blocks == 4);
  CHECK(cudasim_set_device("rtx3090") == 0);
  big_shared<<<1, 32, 200 << 10>>>(out);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue);
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, big_shared, 32, 50 << 10) == cudaSuccess && blocks == 1);
  CHECK(cudaFuncSetAttribute(big_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10) == cudaErrorInvalidValue);
  cudaGetLastError();
}

int main() {
  // By default the GPU of the newest PTX.
  CHECK(run().arch == 900);
  for (const Expected& expected : {Expected{"a100", 8, 0, 108, 800}, Expected{"h100", 9, 0, 132, 900}, Expected{"RTX3090", 8, 6, 82, 800},
                                   Expected{"l40s", 8, 9, 142, 800}, Expected{"h100", 9, 0, 132, 900}})
    check_device(expected);
  check_limits();

  CHECK(cudasim_set_device("a100") == 0);
  CHECK(cudasim_set_device("voodoo2") == -1 && cudasim_set_device("") == -1);
  CHECK(run().arch == 800);
  CHECK(cudasim_set_device(nullptr) == 0);
  CHECK(run().arch == 900);

  // What the host knows of a variable holds on every GPU.
  float three = 3;
  CHECK(cudaMemcpyToSymbol(scale, &three, sizeof three) == cudaSuccess);
  managed_value = 8;
  int before = run().counter;
  CHECK(before == 13);  // 5, and 8 runs before this one
  CHECK(cudasim_set_device("a100") == 0);
  Result r = run();
  CHECK(r.arch == 800 && r.counter == before + 1 && r.managed == 8 && r.scale == 3);
  int now = 0;
  CHECK(cudaMemcpyFromSymbol(&now, counter, sizeof now) == cudaSuccess && now == before + 2);
  return finish("test_device");
}
