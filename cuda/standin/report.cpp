#include "report.h"

#include <algorithm>

namespace standin {

uint64_t Report::enter(const char* function, int thread, bool is_capturing) {
    LoggedCall call;
    call.number = ++numbered_;
    call.function = function;
    call.thread = thread;
    call.is_capturing = is_capturing;
    calls_.push_back(std::move(call));
    ++counts_[function];
    return numbered_;
}

void Report::leave(uint64_t number, Result code, Members arguments) {
    const auto found = std::lower_bound(calls_.begin(), calls_.end(), number,
                                        [](const LoggedCall& call, uint64_t wanted) { return call.number < wanted; });
    if (found == calls_.end() || found->number != number) return;  // forgotten meanwhile
    found->has_returned = true;
    found->code = code;
    found->arguments = std::move(arguments);
}

void Report::violate(Rule rule, const std::string& function, const std::string& text, int thread, uint64_t call) {
    violations_.push_back({rule, function, text, thread, call});
}

void Report::forgive(const std::string& rule) {
    const auto is_it = [&](const Violation& violation) { return rule == rule_name(violation.rule); };
    violations_.erase(std::remove_if(violations_.begin(), violations_.end(), is_it), violations_.end());
}

uint64_t Report::count(const std::string& function) const {
    const auto found = counts_.find(function);
    return found == counts_.end() ? 0 : found->second;
}

uint64_t Report::blocked(const std::string& function) const {
    const auto found = blocked_.find(function);
    return found == blocked_.end() || found->second < 0 ? 0 : static_cast<uint64_t>(found->second);
}

void Report::clear_calls() {
    calls_.clear();
    counts_.clear();
}

void Report::clear() {
    clear_calls();
    violations_.clear();
    blocked_.clear();
    // numbered_ goes on: a call of before the reset that returns after it is not taken for one of these
}

std::string Report::calls() const {
    Members list;
    for (const LoggedCall& call : calls_) {
        Members one;
        one.add("number", call.number).add("function", call.function).add("thread", call.thread).add("capturing", call.is_capturing);
        one.raw("code", call.has_returned ? std::to_string(call.code) : "null").raw("arguments", call.arguments.object());
        list.raw(one.object());
    }
    return list.list();
}

std::string Report::functions() const {
    Members list;
    for (const LoggedCall& call : calls_) list.raw(quoted(call.function));
    return list.list();
}

std::string Report::violations() const {
    Members list;
    for (const Violation& violation : violations_) {
        Members one;
        one.add("rule", rule_name(violation.rule)).add("function", violation.function).add("text", violation.text);
        one.add("thread", violation.thread).add("call", violation.call);
        list.raw(one.object());
    }
    return list.list();
}

}  // namespace standin
