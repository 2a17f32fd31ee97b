// Single copies and fills.
#include "copies.h"

using namespace standin;

namespace {

enum class Direction { ANY, TO_DEVICE, TO_HOST, ON_DEVICE };

bool is_device(Place place) { return place == Place::DEVICE; }

// In a stream that is being captured work becomes part of the graph, and does not run. From our code it never should.
bool is_captured(Call& call, const Stream& stream) {
    if (!world().captures.count(stream.handle)) return false;
    call.note(Rule::CAPTURE_STREAM, std::string(call.function()) + " becomes part of a graph");
    return true;
}

Result copy(Call& call, Lock& lock, Handle handle, const Copy& wanted, Direction direction, bool is_synchronous) {
    const auto stream = call.stream(handle);
    if (wanted.size == 0) return SUCCESS;
    const Ends ends = check_copy(call, wanted);
    const bool to_device = direction == Direction::TO_DEVICE || direction == Direction::ON_DEVICE;
    const bool from_device = direction == Direction::TO_HOST || direction == Direction::ON_DEVICE;
    if (direction != Direction::ANY && (to_device != is_device(ends.target) || from_device != is_device(ends.source))) {
        call.refuse(Rule::DIRECTION, INVALID_VALUE, "device and host memory are not where " + std::string(call.function()) + " wants them");
    }
    const bool to_pageable = ends.target == Place::PAGEABLE, from_pageable = ends.source == Place::PAGEABLE;
    if (is_captured(call, *stream)) {
        if (is_synchronous || to_pageable || from_pageable) call.outside_capture(stream->handle);
        return SUCCESS;
    }
    call.outside_capture(stream->handle);
    // Pageable memory is staged by the driver: read before the call returns, and a copy to it is over when the call is. But one from it is
    // not: the last part of its way is the copy engine's, whatever the call is named ("API synchronization behavior" in CUDA's manual).
    if (to_pageable || from_pageable || is_synchronous) call.check_capture();
    Copy made = wanted;
    if (from_pageable) made.order = ORDER_DURING_API_CALL;
    const MomentPtr done = stream->enqueue(copy_operation("copy", {made}));
    return (is_synchronous && !from_pageable) || to_pageable ? call.wait(lock, done) : SUCCESS;
}

Call& logged(Call& call, Address target, Address source, size_t size) {
    return call.with("target", target).with("source", source).with("bytes", uint64_t{size});
}

Result fill(Call& call, Lock& lock, Handle handle, Address target, std::string content, bool is_synchronous) {
    const auto stream = call.stream(handle);
    if (content.empty()) return SUCCESS;
    const Place place = world().memory.place(target, content.size());
    if (place == Place::STRADDLES || place == Place::OUTSIDE) {
        call.refuse(place == Place::OUTSIDE ? Rule::OUTSIDE : Rule::STRADDLES, INVALID_VALUE, hex(target) + " + " + std::to_string(content.size()));
    }
    if (place == Place::PAGEABLE) call.refuse(Rule::DIRECTION, INVALID_VALUE, hex(target) + " is not the device's");
    if (is_captured(call, *stream)) return SUCCESS;
    call.outside_capture(stream->handle);
    if (is_synchronous) call.check_capture();
    const MomentPtr done = stream->enqueue(set_operation("set", target, std::move(content)));
    return is_synchronous ? call.wait(lock, done) : SUCCESS;
}

}  // namespace

STANDIN_EXPORT int cuMemcpyAsync(Address target, Address source, size_t size, Handle stream) {
    Call call("cuMemcpyAsync", USE);
    logged(call, target, source, size).with("stream", stream);
    return call.run([&](Lock& lock) { return copy(call, lock, stream, {target, source, size}, Direction::ANY, false); });
}

STANDIN_EXPORT int cuMemcpyHtoDAsync_v2(Address target, Address source, size_t size, Handle stream) {
    Call call("cuMemcpyHtoDAsync", USE);
    logged(call, target, source, size).with("stream", stream);
    return call.run([&](Lock& lock) { return copy(call, lock, stream, {target, source, size}, Direction::TO_DEVICE, false); });
}

STANDIN_EXPORT int cuMemcpyDtoHAsync_v2(Address target, Address source, size_t size, Handle stream) {
    Call call("cuMemcpyDtoHAsync", USE);
    logged(call, target, source, size).with("stream", stream);
    return call.run([&](Lock& lock) { return copy(call, lock, stream, {target, source, size}, Direction::TO_HOST, false); });
}

STANDIN_EXPORT int cuMemcpyDtoDAsync_v2(Address target, Address source, size_t size, Handle stream) {
    Call call("cuMemcpyDtoDAsync", USE);
    logged(call, target, source, size).with("stream", stream);
    return call.run([&](Lock& lock) { return copy(call, lock, stream, {target, source, size}, Direction::ON_DEVICE, false); });
}

STANDIN_EXPORT int cuMemcpy(Address target, Address source, size_t size) {
    Call call("cuMemcpy", USE | UNSAFE);
    logged(call, target, source, size);
    return call.run([&](Lock& lock) { return copy(call, lock, 0, {target, source, size}, Direction::ANY, true); });
}

STANDIN_EXPORT int cuMemcpyHtoD_v2(Address target, Address source, size_t size) {
    Call call("cuMemcpyHtoD", USE | UNSAFE);
    logged(call, target, source, size);
    return call.run([&](Lock& lock) { return copy(call, lock, 0, {target, source, size}, Direction::TO_DEVICE, true); });
}

STANDIN_EXPORT int cuMemcpyDtoH_v2(Address target, Address source, size_t size) {
    Call call("cuMemcpyDtoH", USE | UNSAFE);
    logged(call, target, source, size);
    return call.run([&](Lock& lock) { return copy(call, lock, 0, {target, source, size}, Direction::TO_HOST, true); });
}

STANDIN_EXPORT int cuMemsetD8Async(Address target, unsigned char value, size_t size, Handle stream) {
    Call call("cuMemsetD8Async", USE);
    call.with("target", target).with("value", unsigned{value}).with("bytes", uint64_t{size}).with("stream", stream);
    return call.run([&](Lock& lock) { return fill(call, lock, stream, target, std::string(size, static_cast<char>(value)), false); });
}

STANDIN_EXPORT int cuMemsetD8_v2(Address target, unsigned char value, size_t size) {
    Call call("cuMemsetD8", USE | UNSAFE);
    call.with("target", target).with("value", unsigned{value}).with("bytes", uint64_t{size});
    return call.run([&](Lock& lock) { return fill(call, lock, 0, target, std::string(size, static_cast<char>(value)), true); });
}
