// What happened: calls, and rules that were broken.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "abi.h"
#include "json.h"
#include "rules.h"

namespace standin {

struct LoggedCall {
    uint64_t number = 0;
    const char* function = "";
    int thread = 0;
    bool is_capturing = false;
    bool has_returned = false;
    Result code = SUCCESS;
    Members arguments;
};

struct Violation {
    Rule rule;
    std::string function, text;
    int thread;
    uint64_t call;
};

class Report {
  public:
    // Calls are numbered from 1.
    uint64_t enter(const char* function, int thread, bool is_capturing);
    void leave(uint64_t number, Result code, Members arguments);
    void violate(Rule rule, const std::string& function, const std::string& text, int thread, uint64_t call);
    void forgive(const std::string& rule);
    uint64_t count(const std::string& function) const;
    uint64_t blocked(const std::string& function) const;
    void block(const std::string& function, int by) { blocked_[function] += by; }
    void clear_calls();
    void clear();

    std::string calls() const;
    std::string functions() const;
    std::string violations() const;

  private:
    uint64_t numbered_ = 0;
    std::vector<LoggedCall> calls_;
    std::vector<Violation> violations_;
    std::map<std::string, uint64_t> counts_;
    std::map<std::string, int64_t> blocked_;
};

}  // namespace standin
