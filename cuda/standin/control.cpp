// What a test does to the stand-in: tests/cuda/standin.py is its face. These are not calls of the driver, and are not logged.
#include <stdlib.h>
#include <string.h>

#include <chrono>

#include "capture.h"
#include "copies.h"

using namespace standin;

namespace {

std::shared_ptr<Stream> find_stream(Handle handle) {
    for (const auto& stream : world().all_streams()) {
        if (stream->handle == handle || (handle == 0 && stream->handle == LEGACY_STREAM)) return stream;
    }
    return nullptr;
}

template <typename Body>
int with_stream(Handle handle, Body body) {
    Lock lock(world().mutex);
    const auto stream = find_stream(handle);
    if (!stream) return -1;
    body(*stream);
    world().changed.notify_all();
    return 0;
}

template <typename Condition>
int wait_until(double seconds, Condition condition) {
    Lock lock(world().mutex);
    return world().changed.wait_for(lock, std::chrono::duration<double>(seconds), condition) ? 0 : -1;
}

// Reads that the engine's stream makes, by ticket.
struct Reading {
    std::string content;
    MomentPtr done;
};
std::map<uint64_t, std::shared_ptr<Reading>> readings;
uint64_t tickets = 0;

enum class Wait { CALLS, BLOCKED, PENDING, EXECUTED, PAUSED, IDLE };

bool has_come(Wait what, const char* function, Handle stream_handle, uint64_t count) {
    World& w = world();
    if (what == Wait::CALLS) return w.report.count(function) >= count;
    if (what == Wait::BLOCKED) return w.report.blocked(function) >= count;
    if (what == Wait::IDLE && stream_handle == 0) {
        for (const auto& stream : w.all_streams()) {
            if (stream->has_pending()) return false;
        }
        return true;
    }
    const auto stream = find_stream(stream_handle);
    if (!stream) return what == Wait::IDLE;
    if (what == Wait::PENDING) return stream->pending().size() >= count;
    if (what == Wait::EXECUTED) return stream->executed() >= count;
    return what == Wait::PAUSED ? stream->is_paused() : !stream->has_pending();
}

}  // namespace

STANDIN_EXPORT void standin_reset() {
    world().reset();
    Lock lock(world().mutex);
    readings.clear();
}

STANDIN_EXPORT int64_t standin_threads() { return living_threads(); }

STANDIN_EXPORT int standin_set_number(const char* setting, int64_t value) {
    Lock lock(world().mutex);
    return world().settings.set(setting, value);
}

STANDIN_EXPORT int standin_set_text(const char* setting, const char* value) {
    Lock lock(world().mutex);
    return world().settings.set(setting, std::string(value));
}

STANDIN_EXPORT int standin_device_memory(Address base, uint64_t size, int device) {
    World& w = world();
    Lock lock(w.mutex);
    if (size == 0 || w.memory.overlaps(base, size)) return -1;
    Range range;
    range.base = base;
    range.size = size;
    range.context = w.context_of(device)->handle;
    range.is_control = true;
    w.memory.add(range);
    return 0;
}

STANDIN_EXPORT int standin_forget(Address base) {
    World& w = world();
    Lock lock(w.mutex);
    const Range* const range = w.memory.at(base);
    return range && range->is_control && w.memory.remove(base) ? 0 : -1;
}

STANDIN_EXPORT Handle standin_engine_stream(int flags, int device) {
    World& w = world();
    Lock lock(w.mutex);
    const auto stream = std::make_shared<Stream>(w.context_of(device), w.new_handle(), static_cast<unsigned>(flags), 0, true);
    w.streams[stream->handle] = stream;
    stream->start();
    return stream->handle;
}

STANDIN_EXPORT int standin_write(Handle handle, Address target, const void* content, uint64_t size) {
    Lock lock(world().mutex);
    const auto stream = find_stream(handle);
    if (!stream || stream->context->broken) return -1;
    const auto operation = set_operation("write", target, std::string(static_cast<const char*>(content), size));
    operation->is_control = true;
    stream->enqueue(operation);
    return 0;
}

STANDIN_EXPORT uint64_t standin_read(Handle handle, Address source, uint64_t size) {
    Lock lock(world().mutex);
    const auto stream = find_stream(handle);
    if (!stream || stream->context->broken) return 0;
    const auto reading = std::make_shared<Reading>();
    const auto operation = std::make_shared<Operation>();
    operation->kind = "read";
    operation->is_control = true;
    operation->reads.add(source, size);
    operation->reads.settle();
    operation->run = [reading, source, size](Stream&) -> Result {
        reading->content.assign(reinterpret_cast<const char*>(source), size);
        return SUCCESS;
    };
    reading->done = stream->enqueue(operation);
    readings[++tickets] = reading;
    return tickets;
}

STANDIN_EXPORT int standin_read_result(uint64_t ticket, void* content, uint64_t size, double seconds) {
    std::shared_ptr<Reading> reading;
    {
        Lock lock(world().mutex);
        const auto found = readings.find(ticket);
        if (found == readings.end()) return DEINITIALIZED;
        reading = found->second;
    }
    if (wait_until(seconds, [&] { return reading->done->state != Moment::State::PENDING; })) return -1;
    Lock lock(world().mutex);
    if (reading->done->code) return reading->done->code;
    memcpy(content, reading->content.data(), size);
    return SUCCESS;
}

STANDIN_EXPORT int standin_hold(Handle stream, int hold) {
    return with_stream(stream, [&](Stream& found) { hold ? found.hold() : found.release(); });
}

STANDIN_EXPORT void standin_hold_new(int hold) {
    Lock lock(world().mutex);
    world().hold_new = hold != 0;
}

STANDIN_EXPORT int standin_step(Handle stream, uint64_t operations) {
    return with_stream(stream, [&](Stream& found) { found.step(operations); });
}

STANDIN_EXPORT int standin_pause_inside(Handle stream, uint64_t copies) {
    return with_stream(stream, [&](Stream& found) { found.pause_inside(copies); });
}

STANDIN_EXPORT int standin_delay_stream(Handle stream, double seconds) {
    if (stream) return with_stream(stream, [&](Stream& found) { found.delay = seconds; });
    Lock lock(world().mutex);
    world().operation_delay = seconds;
    return 0;
}

STANDIN_EXPORT void standin_delay_function(const char* function, double seconds) {
    Lock lock(world().mutex);
    world().call_delays[function] = seconds;
}

STANDIN_EXPORT int standin_wait(int what, const char* function, Handle stream, uint64_t count, double seconds) {
    return wait_until(seconds, [&] { return has_come(static_cast<Wait>(what), function, stream, count); });
}

STANDIN_EXPORT void standin_fail(const char* function, int code, uint64_t at, uint64_t times, int effect) {
    Lock lock(world().mutex);
    world().faults.fail_call(function, code, at, times, static_cast<Effect>(effect));
}

STANDIN_EXPORT void standin_fail_operation(Handle stream, const char* kind, int code, uint64_t at, int sticky) {
    Lock lock(world().mutex);
    world().faults.fail_operation(stream, kind, code, at, sticky != 0);
}

// Comes back when nothing runs any more.
STANDIN_EXPORT void standin_break_context(int code) {
    World& w = world();
    Lock lock(w.mutex);
    w.break_context(w.context_of(0), code);
    w.changed.wait_for(lock, std::chrono::seconds(20), [] { return has_come(Wait::IDLE, "", 0, 0); });
}

STANDIN_EXPORT int standin_begin_capture(Handle handle, int mode) {
    Lock lock(world().mutex);
    const auto stream = find_stream(handle);
    return stream ? begin_capture(stream, mode) : -1;
}

STANDIN_EXPORT int standin_end_capture(Handle handle) {
    Lock lock(world().mutex);
    return end_capture(handle);
}

STANDIN_EXPORT void standin_forgive(const char* rule) {
    Lock lock(world().mutex);
    world().report.forgive(rule);
}

STANDIN_EXPORT void standin_clear_calls() {
    Lock lock(world().mutex);
    world().report.clear_calls();
}
