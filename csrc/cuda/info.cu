// What bmtard.build_info() tells of the CUDA side.
#include "../kernels.h"
#include "simt.cuh"

namespace bmtard {
namespace cuda {

const char* error_string(int error) { return simt::error_string(error); }

const char* architectures() {
  static const std::string names = simt::architectures();
  return names.c_str();
}

int runtime_version() { return simt::runtime_version(); }

}  // namespace cuda
}  // namespace bmtard
