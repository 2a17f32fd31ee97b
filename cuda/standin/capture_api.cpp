// Captures of graphs: what state a stream is in, not what would be in the graph.
#include "capture.h"

using namespace standin;

namespace standin {

Result begin_capture(const std::shared_ptr<Stream>& stream, int mode) {
    World& w = world();
    if (mode < CAPTURE_GLOBAL || mode > CAPTURE_RELAXED || w.captures.count(stream->handle)) return INVALID_VALUE;
    if (stream->handle == LEGACY_STREAM) return CAPTURE_UNSUPPORTED;
    const auto capture = std::make_shared<Capture>();
    capture->origin = stream->handle;
    capture->mode = mode;
    capture->thread = thread_id();
    w.captures[stream->handle] = capture;
    return SUCCESS;
}

Result end_capture(Handle stream) {
    World& w = world();
    const auto found = w.captures.find(stream);
    if (found == w.captures.end()) return CAPTURE_UNMATCHED;
    if (found->second->mode != CAPTURE_RELAXED && found->second->thread != thread_id()) return CAPTURE_WRONG_THREAD;
    const bool is_invalid = found->second->is_invalid;
    w.captures.erase(found);
    return is_invalid ? CAPTURE_INVALIDATED : SUCCESS;
}

}  // namespace standin

STANDIN_EXPORT int cuStreamBeginCapture_v2(Handle handle, int mode) {
    Call call("cuStreamBeginCapture", USE);
    call.with("stream", handle).with("mode", mode);
    return call.run([&](Lock&) -> Result {
        const Result code = begin_capture(call.stream(handle), mode);
        if (code) call.refuse(Rule::ARGUMENT, code, "stream " + hex(handle) + " is captured already, or the default stream, or the mode does not exist");
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuStreamEndCapture(Handle handle, Handle* graph) {
    Call call("cuStreamEndCapture", USE);
    call.with("stream", handle);
    return call.run([&](Lock&) -> Result {
        call.need(graph, "no place for the graph");
        *graph = 0;
        const Result code = end_capture(call.stream(handle)->handle);
        if (code == CAPTURE_INVALIDATED) return code;  // whoever did it broke a rule then
        if (code) call.refuse(Rule::CAPTURE_ENDING, code, "stream " + hex(handle) + " is not captured, or by another thread");
        *graph = world().new_handle();
        world().graphs[*graph] = call.number();
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuGraphDestroy(Handle graph) {
    Call call("cuGraphDestroy", USE | GIVES_UP);
    call.with("graph", graph).giving_up(graph);
    return call.run([&](Lock&) -> Result {
        if (!world().graphs.erase(graph)) call.refuse_handle(graph, "graph");
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuStreamIsCapturing(Handle handle, int* status) {
    Call call("cuStreamIsCapturing", USE);
    call.with("stream", handle);
    return call.run([&](Lock&) -> Result {
        call.need(status, "no place for the status");
        const auto stream = call.stream(handle);
        const auto& captures = world().captures;
        const auto found = captures.find(stream->handle);
        *status = found == captures.end() ? CAPTURE_STATUS_NONE : found->second->is_invalid ? CAPTURE_STATUS_INVALIDATED : CAPTURE_STATUS_ACTIVE;
        if (stream->handle != LEGACY_STREAM) return SUCCESS;
        for (const auto& entry : captures) {
            const auto captured = world().streams.find(entry.first);
            if (captured != world().streams.end() && captured->second->is_blocking()) return CAPTURE_IMPLICIT;  // documented, and no rule broken
        }
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
    Call call("cuThreadExchangeStreamCaptureMode", INIT);
    return call.run([&](Lock&) -> Result {
        call.need(mode && *mode >= CAPTURE_GLOBAL && *mode <= CAPTURE_RELAXED, "the mode does not exist");
        call.with("mode", *mode);
        std::swap(*mode, this_thread().capture_mode);
        return SUCCESS;
    });
}
