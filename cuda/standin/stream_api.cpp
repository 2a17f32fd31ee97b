// Streams and events.
#include <algorithm>
#include <chrono>

#include "call.h"

using namespace standin;

namespace {

constexpr int GREATEST_PRIORITY = -5, LEAST_PRIORITY = 0;

Result create(Call& call, Handle* out, unsigned flags, int priority) {
    World& w = world();
    call.need(out, "no place for the stream");
    call.need_flags(flags, STREAM_NON_BLOCKING);
    priority = std::min(LEAST_PRIORITY, std::max(GREATEST_PRIORITY, priority));
    const auto stream = std::make_shared<Stream>(call.context(), w.new_handle(), flags, priority, false);
    stream->call = call.number();
    w.streams[stream->handle] = stream;
    stream->start();
    *out = stream->handle;
    call.with("created", stream->handle);
    return SUCCESS;
}

}  // namespace

STANDIN_EXPORT int cuStreamCreate(Handle* stream, unsigned flags) {
    Call call("cuStreamCreate", USE | UNSAFE);
    call.with("flags", flags);
    return call.run([&](Lock&) { return create(call, stream, flags, LEAST_PRIORITY); });
}

STANDIN_EXPORT int cuStreamCreateWithPriority(Handle* stream, unsigned flags, int priority) {
    Call call("cuStreamCreateWithPriority", USE | UNSAFE);
    call.with("flags", flags).with("priority", priority);
    return call.run([&](Lock&) { return create(call, stream, flags, priority); });
}

STANDIN_EXPORT int cuStreamDestroy_v2(Handle handle) {
    Call call("cuStreamDestroy", USE | UNSAFE | GIVES_UP);
    call.with("stream", handle).giving_up(handle);
    std::shared_ptr<Stream> ended;
    const Result code = call.run([&](Lock&) -> Result {
        World& w = world();
        if (handle <= PER_THREAD_STREAM) call.refuse(Rule::ARGUMENT, INVALID_HANDLE, "default streams are not destroyed");
        const auto stream = call.stream(handle);
        call.outside_capture(handle);
        w.streams.erase(handle);
        stream->end_when_empty();
        if (stream->has_pending()) {
            w.ending.push_back(stream);
            call.note(Rule::STREAM_BUSY, "operations of stream " + hex(handle) + " have not ended");
        } else {
            ended = stream;
        }
        return SUCCESS;
    });
    if (ended) ended->join();
    return code;
}

STANDIN_EXPORT int cuStreamSynchronize(Handle handle) {
    Call call("cuStreamSynchronize", USE | UNSAFE);
    call.with("stream", handle);
    return call.run([&](Lock& lock) -> Result {
        const auto stream = call.stream(handle);
        call.outside_capture(stream->handle);
        const Result code = call.wait(lock, stream->tail());
        const Result earlier = stream->take_error();
        return code ? code : earlier;
    });
}

STANDIN_EXPORT int cuStreamQuery(Handle handle) {
    Call call("cuStreamQuery", USE | UNSAFE);
    call.with("stream", handle);
    return call.run([&](Lock&) -> Result {
        const auto stream = call.stream(handle);
        call.outside_capture(stream->handle);
        return stream->has_pending() ? NOT_READY : stream->take_error();
    });
}

STANDIN_EXPORT int cuStreamWaitEvent(Handle handle, Handle event_handle, unsigned flags) {
    Call call("cuStreamWaitEvent", USE);
    call.with("stream", handle).with("event", event_handle).with("flags", flags);
    return call.run([&](Lock&) -> Result {
        const auto stream = call.stream(handle);
        const auto event = call.event(event_handle);
        call.need_flags(flags, 0);
        call.outside_capture(stream->handle);
        if (event->is_captured) {
            call.refuse(Rule::CAPTURE_ISOLATION, CAPTURE_ISOLATION, "stream " + hex(handle) + " would be drawn into a capture");
        }
        if (!event->last) {
            call.note(Rule::EVENT_UNRECORDED, "event " + hex(event_handle) + " was never recorded");
            return SUCCESS;
        }
        const auto wait = std::make_shared<Operation>();
        wait->kind = "wait";
        wait->after.push_back(event->last);
        stream->enqueue(wait);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuStreamGetPriority(Handle handle, int* priority) {
    Call call("cuStreamGetPriority", USE);
    call.with("stream", handle);
    return call.run([&](Lock&) -> Result {
        call.need(priority, "no place for the priority");
        *priority = call.stream(handle)->priority;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuStreamGetFlags(Handle handle, unsigned* flags) {
    Call call("cuStreamGetFlags", USE);
    call.with("stream", handle);
    return call.run([&](Lock&) -> Result {
        call.need(flags, "no place for the flags");
        *flags = call.stream(handle)->flags;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuStreamGetCtx(Handle handle, Handle* context) {
    Call call("cuStreamGetCtx", USE);
    call.with("stream", handle);
    return call.run([&](Lock&) -> Result {
        call.need(context, "no place for the context");
        *context = call.stream(handle)->context->handle;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuEventCreate(Handle* out, unsigned flags) {
    Call call("cuEventCreate", USE);
    call.with("flags", flags);
    return call.run([&](Lock&) -> Result {
        World& w = world();
        call.need(out, "no place for the event");
        call.need_flags(flags, EVENT_BLOCKING_SYNC | EVENT_DISABLE_TIMING);
        const auto event = std::make_shared<Event>();
        event->handle = *out = w.new_handle();
        event->context = call.context();
        event->flags = flags;
        event->call = call.number();
        w.events[event->handle] = event;
        call.with("created", event->handle);
        return SUCCESS;
    });
}

namespace {

Result record(Call& call, Handle event_handle, Handle stream_handle, unsigned flags) {
    const auto event = call.event(event_handle);
    const auto stream = call.stream(stream_handle);
    call.need_flags(flags, 0);
    const auto capture = world().captures.find(stream->handle);
    if (capture != world().captures.end()) {
        // CUDA lets it, and the event is part of the graph from then on: nothing outside can wait for it.
        event->is_captured = true;
        call.note(Rule::CAPTURE_STREAM, "event " + hex(event_handle) + " is recorded in a stream that is being captured");
        return SUCCESS;
    }
    call.outside_capture(stream->handle);
    const auto operation = std::make_shared<Operation>();
    operation->kind = "record";
    event->is_captured = false;
    event->last = stream->enqueue(operation);
    return SUCCESS;
}

}  // namespace

STANDIN_EXPORT int cuEventRecord(Handle event, Handle stream) {
    Call call("cuEventRecord", USE);
    call.with("event", event).with("stream", stream);
    return call.run([&](Lock&) { return record(call, event, stream, 0); });
}

STANDIN_EXPORT int cuEventRecordWithFlags(Handle event, Handle stream, unsigned flags) {
    Call call("cuEventRecordWithFlags", USE);
    call.with("event", event).with("stream", stream).with("flags", flags);
    return call.run([&](Lock&) { return record(call, event, stream, flags); });
}

namespace {

// False: it was never recorded, which CUDA takes for done.
bool was_recorded(Call& call, const Event& event) {
    if (event.is_captured) {
        for (const auto& entry : world().captures) entry.second->is_invalid = true;
        call.refuse(Rule::CAPTURE_ISOLATION, CAPTURED_EVENT, "event " + hex(event.handle) + " was last recorded in a capture");
    }
    if (!event.last) call.note(Rule::EVENT_UNRECORDED, "event " + hex(event.handle) + " was never recorded");
    return event.last != nullptr;
}

}  // namespace

STANDIN_EXPORT int cuEventQuery(Handle handle) {
    Call call("cuEventQuery", USE | UNSAFE);
    call.with("event", handle);
    return call.run([&](Lock&) -> Result {
        const auto event = call.event(handle);
        if (!was_recorded(call, *event)) return SUCCESS;
        if (event->last->state == Moment::State::PENDING) return NOT_READY;
        return event->last->code;
    });
}

STANDIN_EXPORT int cuEventSynchronize(Handle handle) {
    Call call("cuEventSynchronize", USE | UNSAFE);
    call.with("event", handle);
    return call.run([&](Lock& lock) -> Result {
        const auto event = call.event(handle);
        if (world().settings.report_spinning && !(event->flags & EVENT_BLOCKING_SYNC)) {
            call.note(Rule::EVENT_SPINS, "event " + hex(handle) + " was made without CU_EVENT_BLOCKING_SYNC");
        }
        if (!was_recorded(call, *event)) return SUCCESS;
        return call.wait(lock, event->last);
    });
}

STANDIN_EXPORT int cuEventElapsedTime_v2(float* milliseconds, Handle start, Handle end) {
    Call call("cuEventElapsedTime", USE);
    call.with("start", start).with("end", end);
    return call.run([&](Lock&) -> Result {
        call.need(milliseconds, "no place for the time");
        const auto first = call.event(start), last = call.event(end);
        for (const auto& event : {first, last}) {
            if (event->flags & EVENT_DISABLE_TIMING) {
                call.refuse(Rule::EVENT_TIMING, INVALID_HANDLE, "event " + hex(event->handle) + " was made with CU_EVENT_DISABLE_TIMING");
            }
            if (!event->last) call.refuse(Rule::EVENT_TIMING, INVALID_HANDLE, "event " + hex(event->handle) + " was never recorded");
        }
        for (const auto& event : {first, last}) {
            if (event->last->state == Moment::State::PENDING) return NOT_READY;
            if (event->last->state == Moment::State::FAILED) return event->last->code;
        }
        const double elapsed = 1e3 * (last->last->at - first->last->at);
        *milliseconds = static_cast<float>(elapsed >= 0 ? std::max(elapsed, 1e-3) : elapsed);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuEventElapsedTime(float* milliseconds, Handle start, Handle end) { return cuEventElapsedTime_v2(milliseconds, start, end); }

STANDIN_EXPORT int cuEventDestroy_v2(Handle handle) {
    Call call("cuEventDestroy", USE | GIVES_UP);
    call.with("event", handle).giving_up(handle);
    return call.run([&](Lock&) -> Result {
        const auto event = call.event(handle);
        if (event->last && event->last->state == Moment::State::PENDING) {
            call.note(Rule::EVENT_BUSY, "event " + hex(handle) + " is recorded, and has not happened");
        }
        world().events.erase(handle);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuLaunchHostFunc(Handle stream, void*, void*) {
    Call call("cuLaunchHostFunc", USE);
    call.with("stream", stream);
    return call.run([&](Lock&) -> Result { call.refuse(Rule::CALLBACK, NOT_SUPPORTED, "a host function in a stream"); });
}

STANDIN_EXPORT int cuStreamAddCallback(Handle stream, void*, void*, unsigned) {
    Call call("cuStreamAddCallback", USE);
    call.with("stream", stream);
    return call.run([&](Lock&) -> Result { call.refuse(Rule::CALLBACK, NOT_SUPPORTED, "a callback of a stream"); });
}
