#include "call.h"

#include <algorithm>
#include <chrono>

namespace standin {

ThreadState& this_thread() {
    static thread_local ThreadState state;
    if (state.generation != world().generation) {
        state = ThreadState();
        state.generation = world().generation;
    }
    return state;
}

std::string hex(uint64_t value) {
    char text[24];
    snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(value));
    return text;
}

void Call::enter(Lock& lock) {
    World& w = world();
    generation_ = w.generation;
    number_ = w.report.enter(function_, thread_id(), !w.captures.empty());
    w.changed.notify_all();
    const auto delay = w.call_delays.find(function_);
    if (delay != w.call_delays.end()) {
        w.changed.wait_for(lock, std::chrono::duration<double>(delay->second), [&] { return w.generation != generation_; });
        if (w.generation != generation_) throw Refused{DEINITIALIZED};
    }
    fault_ = w.faults.take_call(function_);
    if ((traits_ & INIT) && !w.is_initialized && !w.settings.initialized) {
        refuse(Rule::INITIALIZED, NOT_INITIALIZED, "cuInit was not called");
    }
    ThreadState& thread = this_thread();
    if (!thread.stack.empty()) context_ = thread.stack.back();
    if (traits_ & CONTEXT) {
        if (!context_) refuse(Rule::CONTEXT, INVALID_CONTEXT, "no context is current in this thread");
        if (!context_->alive) refuse(Rule::DESTROYED_HANDLE, CONTEXT_IS_DESTROYED, "the context of this thread was released");
    }
    if (traits_ & UNSAFE) check_capture();
    const bool is_batch = function_ == std::string("cuMemcpyBatchAsync");
    if (fault_.code && (fault_.effect == Effect::NONE || (fault_.effect == Effect::PARTIAL && !is_batch))) {
        skips_ = true;
        if (victim_) w.abandoned.insert(victim_);
    }
    if ((traits_ & CONTEXT) && context_->broken) {
        broken_ = context_->broken;
        if (!(traits_ & GIVES_UP)) skips_ = true;
    }
}

Result Call::leave(Result code) {
    if (fault_.code) {
        code = fault_.code;
    } else if (broken_) {
        code = broken_;
    }
    world().report.leave(number_, code, std::move(arguments_));
    world().changed.notify_all();
    return code;
}

void Call::refuse(Rule rule, Result code, const std::string& text) {
    note(rule, text);
    throw Refused{code};
}

void Call::note(Rule rule, const std::string& text) { world().report.violate(rule, function_, text, thread_id(), number_); }

void Call::need_flags(unsigned flags, unsigned known) {
    if (flags & ~known) refuse(Rule::FLAGS, INVALID_VALUE, "flags " + hex(flags) + ", of which " + hex(flags & ~known) + " mean nothing");
}

void Call::refuse_handle(Handle handle, const char* what) {
    const bool was_known = world().was_handle(handle);
    refuse(was_known ? Rule::DESTROYED_HANDLE : Rule::UNKNOWN_HANDLE, INVALID_HANDLE,
           hex(handle) + (was_known ? " is no longer a " : " never was a ") + what);
}

std::shared_ptr<Stream> Call::stream(Handle handle) {
    World& w = world();
    if (handle == 0 || handle == LEGACY_STREAM) {
        auto& legacy = w.defaults[context_->handle];
        if (!legacy) {
            legacy = std::make_shared<Stream>(context_, LEGACY_STREAM, 0, 0, true);
            legacy->start();
        }
        return legacy;
    }
    if (handle == PER_THREAD_STREAM) refuse(Rule::ARGUMENT, INVALID_HANDLE, "per-thread default streams are not for us");
    const auto found = w.streams.find(handle);
    if (found == w.streams.end()) refuse_handle(handle, "stream");
    if (found->second->context != context_) {
        refuse(Rule::FOREIGN_CONTEXT, INVALID_HANDLE, "stream " + hex(handle) + " belongs to another context than the current one");
    }
    return found->second;
}

std::shared_ptr<Event> Call::event(Handle handle) {
    const auto found = world().events.find(handle);
    if (found == world().events.end()) refuse_handle(handle, "event");
    if (found->second->context != context_) {
        refuse(Rule::FOREIGN_CONTEXT, INVALID_HANDLE, "event " + hex(handle) + " belongs to another context than the current one");
    }
    return found->second;
}

Result Call::wait(Lock& lock, const MomentPtr& moment) {
    World& w = world();
    if (!moment) return SUCCESS;
    const auto is_over = [&] { return moment->state != Moment::State::PENDING || w.generation != generation_; };
    if (!is_over()) {
        w.report.block(function_, 1);
        w.changed.notify_all();
        w.changed.wait_for(lock, std::chrono::milliseconds(w.settings.patience_ms), is_over);
        if (w.generation == generation_) w.report.block(function_, -1);
        if (!is_over()) refuse(Rule::PATIENCE, UNKNOWN, "what it waits for has not happened, and does not seem to");
    }
    if (w.generation != generation_) return DEINITIALIZED;
    return moment->state == Moment::State::FAILED ? moment->code : SUCCESS;
}

void Call::check_capture() {
    World& w = world();
    const int mode = this_thread().capture_mode, thread = thread_id();
    if (mode == CAPTURE_RELAXED) return;
    bool prohibited = false;
    for (const auto& entry : w.captures) {
        Capture& capture = *entry.second;
        const bool is_mine = capture.thread == thread && capture.mode != CAPTURE_RELAXED;
        const bool is_global = capture.thread != thread && capture.mode == CAPTURE_GLOBAL && mode == CAPTURE_GLOBAL;
        if (is_mine || is_global) {
            capture.is_invalid = prohibited = true;
        }
    }
    if (prohibited) refuse(Rule::CAPTURE_UNSAFE, CAPTURE_UNSUPPORTED, std::string(function_) + " while a stream is captured");
}

void Call::outside_capture(Handle stream) {
    World& w = world();
    const auto found = w.captures.find(stream);
    if (found != w.captures.end()) {
        found->second->is_invalid = true;
        refuse(Rule::CAPTURE_STREAM, CAPTURE_UNSUPPORTED, "stream " + hex(stream) + " is being captured");
    }
    if (stream != LEGACY_STREAM) return;
    for (const auto& entry : w.captures) {
        const auto captured = w.streams.find(entry.first);
        if (captured != w.streams.end() && captured->second->is_blocking()) {
            entry.second->is_invalid = true;
            refuse(Rule::CAPTURE_STREAM, CAPTURE_IMPLICIT, "the legacy default stream would wait for a stream that is captured");
        }
    }
}

}  // namespace standin
