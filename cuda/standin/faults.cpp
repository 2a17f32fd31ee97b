#include "faults.h"

namespace standin {

void Faults::fail_call(const std::string& function, Result code, uint64_t at, uint64_t times, Effect effect) {
    calls_.push_back({function, at ? at - 1 : 0, times, {code, effect}});
}

Fault Faults::take_call(const std::string& function) {
    Fault taken;
    for (OfCall& fault : calls_) {
        if (fault.times == 0 || (fault.function != "*" && fault.function != function)) continue;
        if (fault.skip) {
            --fault.skip;
        } else {
            --fault.times;
            if (taken.code == SUCCESS) taken = fault.fault;
        }
    }
    return taken;
}

void Faults::fail_operation(Handle stream, const std::string& kind, Result code, uint64_t at, bool sticky) {
    operations_.push_back({stream, kind, code, at ? at - 1 : 0, sticky});
}

Result Faults::take_operation(Handle stream, const std::string& kind, bool& sticky) {
    for (size_t i = 0; i < operations_.size(); ++i) {
        OfOperation& fault = operations_[i];
        if ((fault.stream && fault.stream != stream) || (!fault.kind.empty() && fault.kind != kind)) continue;
        if (fault.skip) {
            --fault.skip;
            continue;
        }
        const Result code = fault.code;
        sticky = fault.sticky;
        operations_.erase(operations_.begin() + static_cast<std::ptrdiff_t>(i));
        return code;
    }
    return SUCCESS;
}

void Faults::clear() {
    calls_.clear();
    operations_.clear();
}

}  // namespace standin
