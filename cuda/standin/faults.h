// Errors that a test has asked for.
#pragma once
#include <string>
#include <vector>

#include "abi.h"

namespace standin {

enum class Effect { NONE = 0, PARTIAL = 1, ALL = 2 };

struct Fault {
    Result code = SUCCESS;
    Effect effect = Effect::NONE;
};

class Faults {
  public:
    // The `at`-th call from now of `function` ("*": of any), and `times` - 1 more.
    void fail_call(const std::string& function, Result code, uint64_t at, uint64_t times, Effect effect);
    // Whether this call fails; counts it.
    Fault take_call(const std::string& function);

    void fail_operation(Handle stream, const std::string& kind, Result code, uint64_t at, bool sticky);
    // SUCCESS, or what the operation that starts now fails with.
    Result take_operation(Handle stream, const std::string& kind, bool& sticky);
    void clear();

  private:
    struct OfCall {
        std::string function;
        uint64_t skip, times;
        Fault fault;
    };
    struct OfOperation {
        Handle stream;
        std::string kind;
        Result code;
        uint64_t skip;
        bool sticky;
    };
    std::vector<OfCall> calls_;
    std::vector<OfOperation> operations_;
};

}  // namespace standin
