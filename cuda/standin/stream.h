// A stream: a first-in, first-out queue with a thread of its own.
#pragma once
#include "world.h"

namespace standin {

class Stream : public std::enable_shared_from_this<Stream> {
  public:
    Stream(std::shared_ptr<Context> context, Handle handle, unsigned flags, int priority, bool is_control);

    const std::shared_ptr<Context> context;
    const Handle handle;
    const unsigned flags;
    const int priority;
    const bool is_control;
    uint64_t call = 0;  // that made it
    double delay = 0;   // of each operation, seconds

    bool is_blocking() const { return !(flags & STREAM_NON_BLOCKING); }

    // All of these with the world's lock held.
    void start();
    // Queues it behind all that is there and, where legacy default streams demand it, behind others. The moment it will have ended.
    MomentPtr enqueue(const OperationPtr& operation);
    void hold();
    void release();
    void step(uint64_t operations);
    void pause_inside(uint64_t copies);
    // The thread ends when the queue is empty; or at once, and what is queued fails.
    void end_when_empty();
    void end_now(Result code);
    // What is queued and does not run yet fails; what runs fails when it ends.
    void fail_queue(Result code);

    bool has_pending() const { return !queue_.empty(); }
    const std::deque<OperationPtr>& pending() const { return queue_; }
    uint64_t executed() const { return executed_; }
    bool is_held() const { return is_held_; }
    bool is_paused() const { return is_paused_; }
    bool has_ended() const { return has_ended_; }
    // When all that is queued now will have ended; null if nothing is.
    MomentPtr tail() const { return queue_.empty() ? nullptr : queue_.back()->done; }
    // An operation failed without breaking the context, and nobody was told yet. Telling forgets.
    Result take_error();

    // Without the lock, once the thread is to end or has ended.
    void join();

    // By the running operation, without the lock: false means stop here, what is left must not run.
    // Asked before each copy, of how many there are in this operation.
    bool may_go_on(uint64_t copies_made, uint64_t of);
    std::mt19937_64& random() { return random_; }

  private:
    void loop();
    bool can_start() const;
    Result code_before(const Operation& operation);
    void finish(Result code, bool breaks);
    void check_race(const Operation& operation) const;

    std::deque<OperationPtr> queue_;
    std::thread thread_;
    std::mt19937_64 random_;
    Clock clock_;
    uint64_t enqueued_ = 0, executed_ = 0, budget_ = 0, pause_after_ = 0;
    bool is_held_ = false, wants_pause_ = false, is_paused_ = false, is_failing_ = false;
    bool is_ending_ = false, is_over_ = false, has_ended_ = false;
    Result over_code_ = SUCCESS, error_ = SUCCESS;
    OperationPtr running_;
};

int64_t living_threads();

}  // namespace standin
