// What the current device offers, asked once per device.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda_support/cuda.h"

#if defined(FASTCONV_EMULATOR)
#include "emulator/run.h"
#endif

namespace fastconv::cuda {

struct DeviceProperties {
  int capability = 0;              // 10 * major + minor: 80, 90
  int sm_count = 0;                // streaming multiprocessors
  int shared_bytes_per_block = 0;  // the most that a kernel may ask for
  int shared_bytes_per_sm = 0;     // of which each resident block costs 1 KB more than it asks for
  int registers_per_sm = 0;
  int threads_per_sm = 0;
  int l2_bytes = 0;
};

#if defined(FASTCONV_EMULATOR)

/// An sm_90 of few multiprocessors, so that persistent kernels loop even over small problems.
inline DeviceProperties device_properties() {
  const emulator::Options& options = emulator::options();
  const int shared = static_cast<int>(emulator::shared_limit());
  return {options.capability, options.sm_count, shared, shared + 1024, 64 << 10, 2048, 50 << 20};
}

#else

inline void check(cudaError_t status, const char* asked) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("CUDA could not answer ") + asked + ": " + cudaGetErrorString(status));
}

inline DeviceProperties read_device_properties(int device) {
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  DeviceProperties properties;
  properties.capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor);
  properties.sm_count = ask(cudaDevAttrMultiProcessorCount);
  properties.shared_bytes_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties.shared_bytes_per_sm = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties.registers_per_sm = ask(cudaDevAttrMaxRegistersPerMultiprocessor);
  properties.threads_per_sm = ask(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties.l2_bytes = ask(cudaDevAttrL2CacheSize);
  return properties;
}

/// Of the current device. The attributes cost microseconds to ask for, which a launch of few microseconds would notice.
inline DeviceProperties device_properties() {
  constexpr int kDevices = 64;
  static std::atomic<const DeviceProperties*> known[kDevices];
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= kDevices) return read_device_properties(device);
  const DeviceProperties* properties = known[device].load(std::memory_order_acquire);
  if (!properties) {
    const auto* fresh = new DeviceProperties(read_device_properties(device));
    if (known[device].compare_exchange_strong(properties, fresh)) return *fresh;
    delete fresh;  // another thread was first
  }
  return *properties;
}

#endif

}  // namespace fastconv::cuda
