// Registered host memory: ranges that overlap, lie in one another or repeat.
#include <thread>

#include "test.h"

__global__ void fill(int* p, int value) { p[blockIdx.x * blockDim.x + threadIdx.x] = value; }
__global__ void fill_pairs(int2* p) { p[threadIdx.x] = make_int2(1, 2); }

std::vector<int> data(1024);

void add(int begin, int count) { cudasim_register_host(&data[begin], count * sizeof(int)); }
void remove(int begin) { cudasim_unregister_host(&data[begin]); }

// Whether a kernel may write `count` elements (a multiple of 32) from `begin`.
bool valid(int begin, int count) {
  fill<<<count / 32, 32>>>(&data[begin], 1);
  bool ok = cudaDeviceSynchronize() == cudaSuccess;
  cudaDeviceReset();
  return ok;
}

void views() {
  add(0, 1024);
  add(256, 64);  // views in the middle, at the start and at the end
  add(0, 32);
  add(992, 32);
  CHECK(valid(0, 1024));
  remove(256);
  CHECK(valid(0, 1024));
  remove(992);
  remove(0);  // the view
  CHECK(valid(0, 1024));
  remove(0);
  CHECK(!valid(0, 32) && !valid(256, 64) && !valid(992, 32));
}

void views_outlive_the_whole() {
  add(64, 512);
  add(128, 64);
  add(96, 256);
  remove(64);
  CHECK(valid(96, 256) && !valid(64, 32) && !valid(352, 32));
  remove(96);
  CHECK(valid(128, 64) && !valid(96, 32) && !valid(192, 32));
  remove(128);
  CHECK(!valid(128, 64));
}

void repeated() {
  for (int i = 0; i < 3; ++i) add(0, 64);
  remove(0);
  remove(0);
  CHECK(valid(0, 64));
  remove(0);
  CHECK(!valid(0, 64));
  remove(0);  // one too many is ignored
  // Of several with one begin the shortest goes first, in whichever order they came.
  add(0, 96), add(0, 32), add(0, 64);
  remove(0);
  CHECK(valid(0, 96));
  remove(0);
  CHECK(valid(0, 96) && !valid(96, 32));
  remove(0);
}

void overlapping() {
  add(0, 128);
  add(64, 128);
  CHECK(valid(0, 192) && !valid(192, 32));
  int2* pairs = reinterpret_cast<int2*>(&data[98]);  // the 15th of these straddles the end of the first range alone
  fill_pairs<<<1, 32>>>(pairs);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  remove(64);
  CHECK(valid(0, 128) && !valid(128, 32));
  remove(0);
  // Neighbours are no union: an access that straddles both is out of bounds of both.
  add(0, 65), add(65, 63);
  fill_pairs<<<1, 32>>>(reinterpret_cast<int2*>(&data[2]));
  CHECK(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
  CHECK(std::strstr(cudasim_last_report(), "straddles the end"));
  cudaDeviceReset();
  CHECK(valid(0, 128));
  remove(0), remove(65);
}

// Device memory stays device memory where a host range is laid over it.
void over_device_memory() {
  int* device;
  cudaMalloc(&device, 4096);
  cudasim_register_host(device, 4096);
  cudasim_register_host(device + 64, 256);
  cudaPointerAttributes attributes;
  CHECK(cudaPointerGetAttributes(&attributes, device) == cudaSuccess && attributes.type == cudaMemoryTypeDevice);
  cudasim_unregister_host(device);
  cudasim_unregister_host(device + 64);
  CHECK(cudaPointerGetAttributes(&attributes, device) == cudaSuccess && attributes.type == cudaMemoryTypeDevice);
  CHECK(cudaFree(device) == cudaSuccess);
}

// The copy functions look in the same registry.
void copies() {
  int* device;
  cudaMalloc(&device, 4096);
  add(0, 1024);
  add(0, 16);
  add(512, 16);
  CHECK(cudaMemcpy(device, data.data(), 4096, cudaMemcpyHostToDevice) == cudaSuccess);
  CHECK(cudaMemcpy(data.data(), device, 4096, cudaMemcpyDeviceToHost) == cudaSuccess);
  CHECK(cudaMemset(&data[512], 0, 2048) == cudaSuccess);
  remove(0), remove(0), remove(512);
  cudaFree(device);
}

// Threads register views of one array while others launch kernels on it.
void threads() {
  add(0, 1024);
  std::vector<std::thread> workers;
  for (int t = 0; t < 4; ++t)
    workers.emplace_back([t] {
      for (int i = 0; i < 200; ++i) {
        int begin = 32 * ((7 * i + t) % 31);
        add(begin, 32 + t);
        fill<<<1, 32>>>(&data[begin], t);
        remove(begin);
      }
    });
  for (std::thread& worker : workers) worker.join();
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  CHECK(valid(0, 1024));
  remove(0);
  CHECK(!valid(0, 32));
}

int main() {
  views();
  views_outlive_the_whole();
  repeated();
  overlapping();
  over_device_memory();
  copies();
  threads();
  return finish("test_host_memory");
}
