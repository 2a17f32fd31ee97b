// What every function of the driver does first and last: it is logged, delayed, made to fail, and held to the rules.
#pragma once
#include <string>

#include "stream.h"
#include "world.h"

namespace standin {

// Thrown where a rule is broken, caught by Call::run: what the function answers.
struct Refused {
    Result code;
};

enum Trait : unsigned {
    FREE = 0,      // needs nothing
    INIT = 1,      // needs cuInit
    CONTEXT = 2,   // needs a current context
    UNSAFE = 4,    // may break a capture
    GIVES_UP = 8,  // destroys: is done also in a broken context
    USE = INIT | CONTEXT,
};

class Call {
  public:
    Call(const char* function, unsigned traits) : function_(function), traits_(traits) {}

    // A value of the call's log: an argument before run, a result within.
    template <typename T>
    Call& with(const char* name, T value) {
        arguments_.add(name, value);
        return *this;
    }
    Call& pointer(const char* name, const void* value) { return with(name, static_cast<uint64_t>(reinterpret_cast<uintptr_t>(value))); }
    Members& arguments() { return arguments_; }
    // This is what the call is to destroy: where an injected error keeps it from that, what stays is nobody's leak.
    Call& giving_up(Handle handle) {
        victim_ = handle;
        return *this;
    }

    template <typename Body>
    Result run(Body body) {
        if (world().is_child) return NOT_INITIALIZED;  // as CUDA does in a fork of a process that used it; the lock may be taken for ever
        Lock lock(world().mutex);
        Result code = SUCCESS;
        try {
            enter(lock);
            if (!skips_) code = body(lock);
        } catch (const Refused& refused) {
            code = refused.code;
        }
        return leave(code);
    }

    // A rule is broken. `refuse` ends the call with this code, `note` lets it go on as CUDA would.
    [[noreturn]] void refuse(Rule rule, Result code, const std::string& text);
    void note(Rule rule, const std::string& text);
    void need(bool truth, const char* text) {
        if (!truth) refuse(Rule::ARGUMENT, INVALID_VALUE, text);
    }
    void need_flags(unsigned flags, unsigned known);

    const std::shared_ptr<Context>& context() const { return context_; }
    // What these handles name, in the current context; a call ends where they name nothing.
    std::shared_ptr<Stream> stream(Handle handle);
    std::shared_ptr<Event> event(Handle handle);
    [[noreturn]] void refuse_handle(Handle handle, const char* what);
    // Block until then, or until a reset. The code is the moment's.
    Result wait(Lock& lock, const MomentPtr& moment);
    // What would be unsafe in a global capture is refused. By the trait UNSAFE, or where a function finds itself to be.
    void check_capture();
    // The stream must not be captured.
    void outside_capture(Handle stream);

    uint64_t number() const { return number_; }
    const char* function() const { return function_; }
    // Half of it only, then fail.
    bool is_partial() const { return fault_.code && fault_.effect == Effect::PARTIAL; }

  private:
    void enter(Lock& lock);
    Result leave(Result code);

    const char* const function_;
    const unsigned traits_;
    uint64_t number_ = 0, generation_ = 0;
    Members arguments_;
    std::shared_ptr<Context> context_;
    Fault fault_;
    bool skips_ = false;
    Result broken_ = SUCCESS;
    Handle victim_ = 0;
};

// The calling thread's stack of contexts, and its mode of captures. Forgotten with a reset.
struct ThreadState {
    uint64_t generation = 0;
    std::vector<std::shared_ptr<Context>> stack;
    int capture_mode = CAPTURE_GLOBAL;
};
ThreadState& this_thread();

std::string hex(uint64_t value);

}  // namespace standin
