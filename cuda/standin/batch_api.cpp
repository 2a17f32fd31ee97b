// cuMemcpyBatchAsync, in both forms that drivers have.
#include <string.h>

#include <algorithm>

#include "copies.h"

using namespace standin;

namespace {

// Which attributes each copy has; refuses what the documentation excludes.
std::vector<int> orders_of(Call& call, size_t count, const CopyAttributes* attributes, const size_t* indices, size_t num_attributes) {
    if (!attributes || !indices || num_attributes == 0) call.refuse(Rule::BATCH_ATTRIBUTES, INVALID_VALUE, "each copy needs attributes");
    if (num_attributes > count) call.refuse(Rule::BATCH_ATTRIBUTES, INVALID_VALUE, "more attributes than copies");
    if (indices[0] != 0) call.refuse(Rule::BATCH_ATTRIBUTES, INVALID_VALUE, "the first index is " + std::to_string(indices[0]) + ", not 0");
    std::vector<int> orders(count);
    for (size_t k = 0; k < num_attributes; ++k) {
        const size_t end = k + 1 < num_attributes ? indices[k + 1] : count;
        if (indices[k] >= count || end <= indices[k]) call.refuse(Rule::BATCH_ATTRIBUTES, INVALID_VALUE, "indices do not rise below the number of copies");
        const CopyAttributes& attribute = attributes[k];
        if (attribute.order < ORDER_STREAM || attribute.order > ORDER_ANY) {
            call.refuse(Rule::BATCH_ORDER, INVALID_VALUE, "source access order " + std::to_string(attribute.order));
        }
        call.need_flags(attribute.flags, COPY_PREFER_OVERLAP);
        for (const Location& hint : {attribute.source_hint, attribute.target_hint}) {
            call.need(hint.type >= 0 && hint.type <= LOCATION_LAST, "the type of a location hint does not exist");
        }
        std::fill(orders.begin() + static_cast<std::ptrdiff_t>(indices[k]), orders.begin() + static_cast<std::ptrdiff_t>(end), attribute.order);
    }
    return orders;
}

void check_independent(Call& call, const std::vector<Copy>& copies) {
    Spans reads, writes;
    for (const Copy& copy : copies) {
        reads.add(copy.source, copy.size);
        writes.add(copy.target, copy.size);
    }
    reads.settle();
    if (writes.settle()) call.note(Rule::BATCH_DEPENDS, "two copies write the same bytes");
    if (reads.overlaps(writes)) call.note(Rule::BATCH_DEPENDS, "a copy writes what another reads");
}

Result batch(const char* form, int64_t Settings::*present, const Address* targets, const Address* sources, const size_t* sizes, size_t count,
             const CopyAttributes* attributes, const size_t* indices, size_t num_attributes, size_t* failed, Handle handle) {
    Call call("cuMemcpyBatchAsync", USE);
    call.with("form", form).with("count", uint64_t{count}).with("attributes", uint64_t{num_attributes}).with("stream", handle);
    if (failed) *failed = SIZE_MAX;
    return call.run([&](Lock&) -> Result {
        World& w = world();
        if (w.settings.*present == SYMBOL_UNSUPPORTED) return NOT_SUPPORTED;
        if (handle == 0 || handle == LEGACY_STREAM) call.refuse(Rule::DEFAULT_STREAM, INVALID_VALUE, "the stream is " + hex(handle));
        const auto stream = call.stream(handle);
        call.outside_capture(stream->handle);
        if (count == 0) call.refuse(Rule::BATCH_EMPTY, INVALID_VALUE, "count is 0");
        call.need(targets && sources && sizes, "an array is missing");
        if (w.settings.batch_limit > 0 && count > static_cast<uint64_t>(w.settings.batch_limit)) {
            call.refuse(Rule::BATCH_LIMIT, INVALID_VALUE, std::to_string(count) + " copies in one call");
        }
        const std::vector<int> orders = orders_of(call, count, attributes, indices, num_attributes);
        call.arguments().raw("targets", numbers(targets, count)).raw("sources", numbers(sources, count)).raw("sizes", numbers(sizes, count));
        call.arguments().raw("orders", numbers(orders.data(), orders.size()));
        std::vector<Copy> copies;
        for (size_t i = 0; i < count; ++i) {
            copies.push_back({targets[i], sources[i], sizes[i], orders[i]});
            if (failed) *failed = i;
            call.need(sizes[i] > 0, "a copy of no bytes");
            const Ends ends = check_copy(call, copies.back());
            if ((ends.target == Place::PAGEABLE || ends.source == Place::PAGEABLE) && !w.settings.pageable_access) {
                call.refuse(Rule::BATCH_PAGEABLE, INVALID_VALUE, "copy " + std::to_string(i) + " to or from pageable memory");
            }
        }
        if (failed) *failed = SIZE_MAX;
        check_independent(call, copies);
        if (call.is_partial()) copies.resize((count + 1) / 2);
        stream->enqueue(copy_operation("batch", std::move(copies)));
        return SUCCESS;
    });
}

}  // namespace

// Of CUDA 12.8 and 12.9: says which copy was wrong.
STANDIN_EXPORT int cuMemcpyBatchAsync(Address* targets, Address* sources, size_t* sizes, size_t count, CopyAttributes* attributes, size_t* indices,
                                      size_t num_attributes, size_t* failed, Handle stream) {
    return batch("12080", &Settings::batch_12080, targets, sources, sizes, count, attributes, indices, num_attributes, failed, stream);
}

// Of CUDA 13.
STANDIN_EXPORT int cuMemcpyBatchAsync_v2(Address* targets, Address* sources, size_t* sizes, size_t count, CopyAttributes* attributes,
                                         size_t* indices, size_t num_attributes, Handle stream) {
    return batch("13000", &Settings::batch_13000, targets, sources, sizes, count, attributes, indices, num_attributes, nullptr, stream);
}
