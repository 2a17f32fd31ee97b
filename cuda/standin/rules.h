// Every rule that the stand-in checks, by the name that a test sees, with what it says.
#pragma once

namespace standin {

#define STANDIN_RULES(rule)                                                                                                  \
    rule(ARGUMENT, "argument", "an argument is outside of what the documentation allows")                                    \
    rule(FLAGS, "flags", "only flags that the function knows")                                                               \
    rule(INITIALIZED, "initialized", "cuInit comes first")                                                                   \
    rule(CONTEXT, "context", "a context has to be current in the calling thread")                                            \
    rule(FOREIGN_CONTEXT, "foreign-context", "streams, events and functions belong to the context that is current")          \
    rule(UNKNOWN_HANDLE, "unknown-handle", "a handle that this driver never gave out")                                       \
    rule(DESTROYED_HANDLE, "destroyed-handle", "a handle that was destroyed, unloaded or released")                          \
    rule(RELEASE, "release", "a primary context is released as often as it was retained, not more")                          \
    rule(CALLBACK, "callback", "no host functions in streams: they deadlock with the interpreter's lock")                    \
    rule(STREAM_BUSY, "stream-busy", "a stream is not destroyed before its work has ended")                                  \
    rule(EVENT_BUSY, "event-busy", "an event is not destroyed while it is recorded and pending")                             \
    rule(EVENT_UNRECORDED, "event-unrecorded", "waiting for an event that was never recorded waits for nothing")             \
    rule(EVENT_SPINS, "event-spins", "a thread that waits for an event without CU_EVENT_BLOCKING_SYNC burns a core")         \
    rule(PATIENCE, "patience", "no call waits for longer than a test may take")                                             \
    rule(EVENT_TIMING, "event-timing", "elapsed time needs two recorded events that were made with timing")                  \
    rule(DEFAULT_STREAM, "default-stream", "a batch does not go into the legacy default stream")                             \
    rule(BATCH_EMPTY, "batch-empty", "a batch of no copies is not submitted")                                                \
    rule(BATCH_LIMIT, "batch-limit", "no more copies in a batch than drivers were seen to survive")                          \
    rule(BATCH_ATTRIBUTES, "batch-attributes", "attribute indices start at 0, rise, and stay below the number of copies")    \
    rule(BATCH_ORDER, "batch-order", "the source access order is STREAM, DURING_API_CALL or ANY")                            \
    rule(BATCH_DEPENDS, "batch-depends", "copies of one batch run in any order: none may touch what another writes")         \
    rule(BATCH_PAGEABLE, "batch-pageable", "memory in a batch is the device's or pinned")                                    \
    rule(STRADDLES, "straddles", "one copy lies in one allocation or registration")                                          \
    rule(OUTSIDE, "outside", "a copy does not leave its allocation")                                                         \
    rule(DIRECTION, "direction", "device and host memory are where the function's name says")                                \
    rule(SOURCE_CHANGED, "source-changed", "the source of a copy of order ANY stays unchanged until it has ended")           \
    rule(RACE, "race", "what another stream has yet to touch is waited for first")                                           \
    rule(REGISTER_ALIGNMENT, "register-alignment", "registrations begin and end on pages")                                   \
    rule(REGISTER_OVERLAP, "register-overlap", "memory is registered once")                                                  \
    rule(REGISTER_UNMAPPED, "register-unmapped", "memory is mapped when it is registered")                                   \
    rule(REGISTER_UNPOPULATED, "register-unpopulated", "memory is populated before it is registered")                        \
    rule(UNREGISTER_UNKNOWN, "unregister-unknown", "memory is unregistered by the address that it was registered by, once")  \
    rule(UNREGISTER_UNMAPPED, "unregister-unmapped", "memory is still mapped when it is unregistered")                       \
    rule(MEMORY_BUSY, "memory-busy", "memory is freed or unregistered when nothing pending touches it")                      \
    rule(MEMORY_GONE, "memory-gone", "memory is still there when the operation on it runs")                                  \
    rule(MEMORY_UNKNOWN, "memory-unknown", "what is freed or asked for was allocated here")                                  \
    rule(WRITE_COMBINED, "write-combined", "no write-combined memory: reading it on the host is prohibitively slow")         \
    rule(CAPTURE_UNSAFE, "capture-unsafe", "nothing that could break a capture, from any thread")                            \
    rule(CAPTURE_STREAM, "capture-stream", "nothing of ours goes into a stream that is captured")                            \
    rule(CAPTURE_ISOLATION, "capture-isolation", "captured and ordinary work do not wait for each other")                    \
    rule(CAPTURE_ENDING, "capture-ending", "a capture is ended once, by the thread that began it, on the same stream")       \
    rule(IMAGE, "image", "what is loaded is a fatbin, a cubin or PTX")                                                       \
    rule(LAUNCH_GEOMETRY, "launch-geometry", "kernels run on a one-dimensional grid without shared memory")                  \
    rule(LAUNCH_PARAMETERS, "launch-parameters", "number and sizes of parameters are those of the kernel")                   \
    rule(LAUNCH_MEMORY, "launch-memory", "a kernel touches memory that the device can access")                               \
    rule(LAUNCH_ALIGNMENT, "launch-alignment", "addresses, strides and sizes are multiples of 16")                           \
    rule(LAUNCH_DUPLICATE, "launch-duplicate", "no two items of a launch write the same bytes")                              \
    rule(LAUNCH_CHANGED, "launch-changed", "what a kernel reads its work from stays unchanged until it has run")

enum class Rule {
#define STANDIN_RULE(name, text, says) name,
    STANDIN_RULES(STANDIN_RULE)
#undef STANDIN_RULE
};

const char* rule_name(Rule rule);

}  // namespace standin
