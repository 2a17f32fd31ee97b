// Everything the stand-in knows, under one lock: contexts, streams with their threads, events, memory, and what happened.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"
#include "faults.h"
#include "memory.h"
#include "report.h"
#include "rules.h"
#include "settings.h"

namespace standin {

using Lock = std::unique_lock<std::mutex>;
using Clock = std::map<Handle, uint64_t>;  // by stream: the last of its operations that is known to come before

// Something that happens once: an operation has ended.
struct Moment {
    enum class State { PENDING, HAPPENED, FAILED };
    State state = State::PENDING;
    Result code = SUCCESS;
    double at = 0;  // seconds
    Clock clock;    // what came before it
};
using MomentPtr = std::shared_ptr<Moment>;

struct Context {
    Handle handle = 0;
    int device = 0;
    uint64_t retains = 0;  // by cuDevicePrimaryCtxRetain
    uint64_t call = 0;
    Result broken = SUCCESS;
    bool alive = false;
};

struct Capture {
    Handle origin = 0;
    int mode = CAPTURE_GLOBAL;
    int thread = 0;
    bool is_invalid = false;
};

class Stream;

struct Operation {
    const char* kind = "";
    bool is_control = false;
    uint64_t number = 0;            // in its stream, from 1
    std::vector<MomentPtr> after;   // what has to have ended before
    Spans reads, writes;            // of host and device memory
    std::function<Result(Stream&)> run;  // without the lock
    MomentPtr done = std::make_shared<Moment>();
};
using OperationPtr = std::shared_ptr<Operation>;

struct Event {
    Handle handle = 0;
    std::shared_ptr<Context> context;
    unsigned flags = 0;
    uint64_t call = 0;
    bool is_captured = false;
    MomentPtr last;  // the latest record; null: never recorded
};

struct Function {
    Handle module = 0;
    std::string name;
    std::shared_ptr<Context> context;
};

struct Module {
    Handle handle = 0;
    const char* kind = "module";
    std::shared_ptr<Context> context;
    uint64_t call = 0;
};

class World {
  public:
    std::mutex mutex;
    std::condition_variable changed;  // anything did
    uint64_t generation = 1;          // of resets
    Settings settings;
    Faults faults;
    Report report;
    Memory memory;
    bool is_initialized = false;
    std::atomic<bool> is_child{false};  // of a fork
    std::map<int, std::shared_ptr<Context>> contexts;  // by device
    std::map<Handle, std::shared_ptr<Stream>> streams;
    std::map<Handle, std::shared_ptr<Stream>> defaults;  // legacy default streams by context
    std::vector<std::shared_ptr<Stream>> ending;         // destroyed, their threads not joined
    std::map<Handle, std::shared_ptr<Event>> events;
    std::map<Handle, Module> modules;
    std::map<Handle, Function> functions;
    std::map<Handle, std::shared_ptr<Capture>> captures;  // by stream
    std::map<Handle, uint64_t> graphs;                    // with the call that made them
    std::map<std::string, double> call_delays;
    double operation_delay = 0;
    bool hold_new = false;
    std::set<Handle> abandoned;  // what an injected error kept from being destroyed

    Handle new_handle() { return next_handle_ += 64; }
    // Whether it was given out once, whatever it was.
    bool was_handle(Handle handle) const { return handle > FIRST_HANDLE && handle <= next_handle_ && (handle - FIRST_HANDLE) % 64 == 0; }

    std::shared_ptr<Context> context_of(int device);
    // All streams that may have something to do.
    std::vector<std::shared_ptr<Stream>> all_streams() const;
    void break_context(const std::shared_ptr<Context>& context, Result code);
    void reset();

  private:
    static constexpr Handle FIRST_HANDLE = 0x570000000000;
    Handle next_handle_ = FIRST_HANDLE;
};

World& world();
double now();
int thread_id();

}  // namespace standin
