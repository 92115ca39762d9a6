// Constants of the launches. A tuning build (BMTARD_TUNING) takes others from the environment
// variable BMTARD_TUNE, "NAME=VALUE,...", at every launch; see tools/gpu_tune.py.
#pragma once

#include <cstdint>

#if defined(BMTARD_TUNING)
#include <cstdlib>
#include <cstring>
#endif

namespace bmtard {
namespace cuda {

#if defined(BMTARD_TUNING)
inline int64_t tuned(const char* name, int64_t otherwise) {
  const char* place = std::getenv("BMTARD_TUNE");
  const size_t length = std::strlen(name);
  while (place != nullptr && *place != '\0') {
    if (std::strncmp(place, name, length) == 0 && place[length] == '=') {
      return std::strtoll(place + length + 1, nullptr, 10);
    }
    place = std::strchr(place, ',');
    if (place != nullptr) ++place;
  }
  return otherwise;
}
#else
constexpr int64_t tuned(const char*, int64_t otherwise) { return otherwise; }
#endif

}  // namespace cuda
}  // namespace bmtard
