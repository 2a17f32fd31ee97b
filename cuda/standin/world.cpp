#include "world.h"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

#include "stream.h"

namespace standin {

World& world() {
    // Never destroyed: threads that wait here when the process ends must find it.
    static World* const only = [] {
        pthread_atfork(nullptr, nullptr, [] { world().is_child = true; });
        return new World;
    }();
    return *only;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

int thread_id() { return static_cast<int>(syscall(SYS_gettid)); }

std::shared_ptr<Context> World::context_of(int device) {
    auto& context = contexts[device];
    if (!context || (!context->alive && context->broken)) {
        context = std::make_shared<Context>();
        context->handle = new_handle();
        context->device = device;
        context->alive = settings.primary_retained != 0;
    }
    return context;
}

std::vector<std::shared_ptr<Stream>> World::all_streams() const {
    std::vector<std::shared_ptr<Stream>> all;
    for (const auto& entry : defaults) all.push_back(entry.second);
    for (const auto& entry : streams) all.push_back(entry.second);
    all.insert(all.end(), ending.begin(), ending.end());
    return all;
}

void World::break_context(const std::shared_ptr<Context>& context, Result code) {
    if (!context->broken) context->broken = code;
    for (const auto& stream : all_streams()) {
        if (stream->context == context) stream->fail_queue(context->broken);
    }
    changed.notify_all();
}

void World::reset() {
    std::vector<std::shared_ptr<Stream>> old;
    {
        Lock lock(mutex);
        ++generation;
        old = all_streams();
        for (const auto& stream : old) stream->end_now(DEINITIALIZED);
        streams.clear();
        defaults.clear();
        ending.clear();
    }
    for (const auto& stream : old) stream->join();
    Lock lock(mutex);
    events.clear();
    modules.clear();
    functions.clear();
    captures.clear();
    graphs.clear();
    contexts.clear();
    call_delays.clear();
    operation_delay = 0;
    hold_new = false;
    abandoned.clear();
    is_initialized = false;
    memory.clear();
    faults.clear();
    report.clear();
    settings = Settings();
    changed.notify_all();
}

}  // namespace standin
