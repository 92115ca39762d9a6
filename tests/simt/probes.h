// Kernels with one fault each, by name.
#pragma once

#include <string>
#include <vector>

namespace bmtard {

std::vector<int> run_probe(const std::string& name);

}  // namespace bmtard
