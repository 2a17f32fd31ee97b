// kv_copy.cu's kernels: their parameters checked against what they will do, and run on this CPU.
#pragma once
#include <string>
#include <vector>

#include "call.h"

namespace standin {

bool is_kernel(const std::string& name);
std::vector<size_t> parameter_sizes(const std::string& kernel);
size_t parameter_offset(const std::vector<size_t>& sizes, size_t index);

// Reads the parameters now, as CUDA does, and what they point at both now, to check it, and when it runs.
OperationPtr kernel_operation(Call& call, const std::string& name, unsigned grid, unsigned block, void** parameters, void** extra);

}  // namespace standin
