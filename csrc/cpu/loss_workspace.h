// The memory that bmtard_loss() needs: dispatch.cpp allocates it, the kernel uses it.
#pragma once

#include "../core/common.h"
#include "../kernels.h"

BMTARD_NAMESPACE_BEGIN

enum class GradientPass {
  kInPlace,    // q - p lies where the gradient will be; a half type could not hold it
  kFromFloat,  // q - p lies beside it, in float
  kFromLogits  // q - p is computed again: cheaper than memory beyond the caches
};

inline GradientPass gradient_pass(const BMTARDLossArgs& args) {
  if (args.dtype == DataType::kFloat64 || args.dtype == DataType::kFloat32) {
    return GradientPass::kInPlace;
  }
  constexpr int64_t cached = 1 << 18;  // 1 MiB of float
  const bool small = args.teachers * args.rows * args.classes <= cached;
  return small ? GradientPass::kFromFloat : GradientPass::kFromLogits;
}

BMTARD_NAMESPACE_END
