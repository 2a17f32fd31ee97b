// The functions of the driver by the names that cuGetProcAddress knows.
#pragma once

namespace standin {

using AnyFunction = int (*)();

// Null: there is none. cuMemcpyBatchAsync has two forms.
AnyFunction function_named(const char* name, bool is_newest_batch);

}  // namespace standin
