#include "stream.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace standin {

namespace {

std::atomic<int64_t> threads{0};

void merge(Clock& into, const Clock& from) {
    for (const auto& [stream, number] : from) into[stream] = std::max(into[stream], number);
}

}  // namespace

int64_t living_threads() { return threads.load(); }

Stream::Stream(std::shared_ptr<Context> of, Handle known_as, unsigned with, int at_priority, bool by_control)
    : context(std::move(of)), handle(known_as), flags(with), priority(at_priority), is_control(by_control) {
    random_.seed(static_cast<uint64_t>(world().settings.seed) * 1000003 + known_as);
}

void Stream::start() {
    is_held_ = world().hold_new;
    ++threads;
    thread_ = std::thread([self = shared_from_this()] {
        self->loop();
        --threads;
    });
}

MomentPtr Stream::enqueue(const OperationPtr& operation) {
    World& w = world();
    const auto legacy = w.defaults.find(context->handle);
    if (legacy != w.defaults.end()) {
        if (legacy->second.get() == this) {
            for (const auto& other : w.all_streams()) {
                if (other.get() != this && other->context == context && other->is_blocking() && other->has_pending()) {
                    operation->after.push_back(other->tail());
                }
            }
        } else if (is_blocking() && legacy->second->has_pending()) {
            operation->after.push_back(legacy->second->tail());
        }
    }
    operation->number = ++enqueued_;
    for (const MomentPtr& moment : operation->after) merge(clock_, moment->clock);
    clock_[handle] = operation->number;
    operation->done->clock = clock_;
    if (!operation->is_control && w.settings.report_races) check_race(*operation);
    queue_.push_back(operation);
    w.changed.notify_all();
    return operation->done;
}

// Seen from the later of the two, when it is enqueued: the other is pending, and nothing orders them.
void Stream::check_race(const Operation& operation) const {
    World& w = world();
    for (const auto& other : w.all_streams()) {
        if (other.get() == this) continue;
        const auto known = operation.done->clock.find(other->handle);
        const uint64_t ordered = known == operation.done->clock.end() ? 0 : known->second;
        for (const OperationPtr& earlier : other->pending()) {
            if (earlier->number <= ordered) continue;
            if (operation.writes.overlaps(earlier->writes) || operation.writes.overlaps(earlier->reads) ||
                operation.reads.overlaps(earlier->writes)) {
                w.report.violate(Rule::RACE, operation.kind,
                                 std::string("a ") + operation.kind + " is not ordered behind a pending " + earlier->kind +
                                     " of another stream, and they touch the same bytes",
                                 thread_id(), 0);
                return;
            }
        }
    }
}

void Stream::hold() {
    is_held_ = true;
    budget_ = 0;
}

void Stream::release() {
    is_held_ = is_paused_ = wants_pause_ = false;
    world().changed.notify_all();
}

void Stream::step(uint64_t operations) {
    is_held_ = true;
    budget_ += operations;
    world().changed.notify_all();
}

void Stream::pause_inside(uint64_t copies) {
    wants_pause_ = true;
    pause_after_ = copies;
}

void Stream::end_when_empty() {
    is_ending_ = true;
    world().changed.notify_all();
}

void Stream::end_now(Result code) {
    is_over_ = true;
    over_code_ = code;
    fail_queue(code);
    world().changed.notify_all();
}

void Stream::fail_queue(Result code) {
    for (const OperationPtr& operation : queue_) {
        if (operation == running_) continue;
        operation->done->state = Moment::State::FAILED;
        operation->done->code = code;
    }
    queue_.clear();
    if (running_) queue_.push_back(running_);
}

Result Stream::take_error() {
    const Result error = error_;
    error_ = SUCCESS;
    return error;
}

void Stream::join() {
    if (thread_.joinable()) thread_.join();
}

bool Stream::can_start() const {
    if (queue_.empty() || (is_held_ && budget_ == 0)) return false;
    const auto& after = queue_.front()->after;
    return std::all_of(after.begin(), after.end(), [](const MomentPtr& moment) { return moment->state != Moment::State::PENDING; });
}

bool Stream::may_go_on(uint64_t made, uint64_t total) {
    World& w = world();
    Lock lock(w.mutex);
    if (is_failing_ && 2 * made + 1 >= total) return false;
    if (wants_pause_ && made >= pause_after_) {
        wants_pause_ = false;
        is_paused_ = true;
        w.changed.notify_all();
    }
    w.changed.wait(lock, [&] { return !is_paused_ || is_over_ || context->broken; });
    return !is_over_ && !context->broken;
}

Result Stream::code_before(const Operation& operation) {
    if (is_over_) return over_code_;
    if (context->broken) return context->broken;
    for (const MomentPtr& moment : operation.after) {
        if (moment->state == Moment::State::FAILED) return moment->code;
    }
    return operation.kind == std::string("record") ? take_error() : SUCCESS;
}

void Stream::loop() {
    World& w = world();
    Lock lock(w.mutex);
    for (;;) {
        w.changed.wait(lock, [&] { return is_over_ || can_start() || (is_ending_ && queue_.empty()); });
        if (is_over_ || queue_.empty()) break;
        running_ = queue_.front();
        if (is_held_ && budget_) --budget_;
        double wait = delay + w.operation_delay;
        if (w.settings.jitter_us > 0) wait += 1e-6 * static_cast<double>(random_() % static_cast<uint64_t>(w.settings.jitter_us));
        if (wait > 0) w.changed.wait_for(lock, std::chrono::duration<double>(wait), [&] { return is_over_ || context->broken; });
        Result code = code_before(*running_);
        bool breaks = false;
        if (!code) {
            const Result injected = w.faults.take_operation(handle, running_->kind, breaks);
            if (running_->run) {
                is_failing_ = injected != SUCCESS;
                lock.unlock();
                code = running_->run(*this);
                lock.lock();
                is_failing_ = false;
            }
            if (injected) {
                code = injected;
            } else if (code) {
                breaks = true;  // a fault of the operation itself: such are never survived
            }
        }
        finish(code, breaks);
    }
    has_ended_ = true;
    w.changed.notify_all();
}

void Stream::finish(Result code, bool breaks) {
    World& w = world();
    if (code && breaks) w.break_context(context, code);
    if (context->broken && !code) code = context->broken;
    const OperationPtr operation = std::move(running_);
    running_ = nullptr;
    if (!queue_.empty()) queue_.pop_front();
    if (code && operation->kind != std::string("record")) error_ = code;
    operation->done->state = code ? Moment::State::FAILED : Moment::State::HAPPENED;
    operation->done->code = code;
    operation->done->at = now();
    ++executed_;
    is_paused_ = false;
    w.changed.notify_all();
}

}  // namespace standin
