// Copies as operations of a stream.
#pragma once
#include <string>
#include <vector>

#include "call.h"

namespace standin {

struct Copy {
    Address target = 0, source = 0;
    uint64_t size = 0;
    int order = ORDER_STREAM;
};

// Of one copy: both ends in one allocation or registration each, or wholly pageable; refuses what is not.
struct Ends {
    Place target, source;
};
Ends check_copy(Call& call, const Copy& copy);

// An operation that makes them at its place in the stream. Sources of another order than STREAM are read now, which is as early as the
// driver may; those of ANY must still be the same when the operation runs. Nothing is written before it runs.
OperationPtr copy_operation(const char* kind, std::vector<Copy> copies);

// Sets memory to a value, or to some bytes.
OperationPtr set_operation(const char* kind, Address target, std::string content);

}  // namespace standin
