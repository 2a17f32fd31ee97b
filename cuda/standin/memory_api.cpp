// Allocation, registration, and what a pointer is.
#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "call.h"

using namespace standin;

namespace {

// Whether an operation that has not ended touches it.
bool is_busy(Address base, uint64_t size) {
    for (const auto& stream : world().all_streams()) {
        for (const OperationPtr& operation : stream->pending()) {
            if (operation->reads.overlaps(base, size) || operation->writes.overlaps(base, size)) return true;
        }
    }
    return false;
}

Result allocate_for(Call& call, uint64_t bytes, Kind kind, unsigned flags, Address& base) {
    World& w = world();
    call.need(bytes > 0, "nothing is not allocated");
    const auto total = static_cast<uint64_t>(w.settings.total_memory_bytes);
    if (kind == Kind::DEVICE && (bytes > total || w.memory.bytes_of(Kind::DEVICE) > total - bytes)) return OUT_OF_MEMORY;
    Range range;
    if (!allocate(bytes, range)) return OUT_OF_MEMORY;
    range.kind = kind;
    range.flags = flags;
    range.context = call.context()->handle;
    range.call = call.number();
    w.memory.add(range);
    base = range.base;
    call.with("created", base);
    return SUCCESS;
}

Result free_of(Call& call, Address base, Kind kind) {
    World& w = world();
    if (base == 0) return SUCCESS;
    const Range* const range = w.memory.at(base);
    if (!range || range->kind != kind || range->is_control) {
        call.refuse(Rule::MEMORY_UNKNOWN, INVALID_VALUE, hex(base) + " was not allocated by a call of this kind, or freed before");
    }
    if (is_busy(base, range->size)) call.note(Rule::MEMORY_BUSY, "an operation on " + hex(base) + " has not ended");
    const Range freed = *range;
    w.memory.remove(base);
    // A running operation may still be at it; its pages go with the reset then, as nothing here may crash.
    if (!is_busy(freed.base, freed.size)) give_back(freed);
    return SUCCESS;
}

}  // namespace

STANDIN_EXPORT int cuMemAlloc_v2(Address* out, size_t bytes) {
    Call call("cuMemAlloc", USE | UNSAFE);
    call.with("bytes", uint64_t{bytes});
    return call.run([&](Lock&) -> Result {
        call.need(out, "no place for the address");
        return allocate_for(call, bytes, Kind::DEVICE, 0, *out);
    });
}

STANDIN_EXPORT int cuMemFree_v2(Address base) {
    Call call("cuMemFree", USE | UNSAFE | GIVES_UP);
    call.with("address", base).giving_up(base);
    return call.run([&](Lock&) { return free_of(call, base, Kind::DEVICE); });
}

STANDIN_EXPORT int cuMemHostAlloc(Address* out, size_t bytes, unsigned flags) {
    Call call("cuMemHostAlloc", USE | UNSAFE);
    call.with("bytes", uint64_t{bytes}).with("flags", flags);
    return call.run([&](Lock&) -> Result {
        call.need(out, "no place for the address");
        call.need_flags(flags, HOST_PORTABLE | HOST_DEVICEMAP | HOST_WRITECOMBINED);
        if (flags & HOST_WRITECOMBINED) call.note(Rule::WRITE_COMBINED, "CU_MEMHOSTALLOC_WRITECOMBINED");
        return allocate_for(call, bytes, Kind::PINNED, flags, *out);
    });
}

STANDIN_EXPORT int cuMemAllocHost_v2(Address* out, size_t bytes) {
    Call call("cuMemAllocHost", USE | UNSAFE);
    call.with("bytes", uint64_t{bytes});
    return call.run([&](Lock&) -> Result {
        call.need(out, "no place for the address");
        return allocate_for(call, bytes, Kind::PINNED, 0, *out);
    });
}

STANDIN_EXPORT int cuMemFreeHost(Address base) {
    Call call("cuMemFreeHost", USE | UNSAFE | GIVES_UP);
    call.with("address", base).giving_up(base);
    return call.run([&](Lock&) { return free_of(call, base, Kind::PINNED); });
}

STANDIN_EXPORT int cuMemHostRegister_v2(Address base, size_t bytes, unsigned flags) {
    Call call("cuMemHostRegister", USE | UNSAFE);
    call.with("address", base).with("bytes", uint64_t{bytes}).with("flags", flags);
    return call.run([&](Lock& lock) -> Result {
        World& w = world();
        const Settings s = w.settings;
        const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
        call.need(base && bytes, "nothing is not registered");
        call.need_flags(flags, HOST_PORTABLE | HOST_DEVICEMAP | REGISTER_IOMEMORY | REGISTER_READ_ONLY);
        if (flags & (REGISTER_IOMEMORY | REGISTER_READ_ONLY)) return NOT_SUPPORTED;
        if (base % page || bytes % page) {
            call.refuse(Rule::REGISTER_ALIGNMENT, INVALID_VALUE, hex(base) + " + " + std::to_string(bytes) + " is not whole pages");
        }
        if (w.memory.overlaps(base, bytes)) {
            call.refuse(Rule::REGISTER_OVERLAP, HOST_MEMORY_ALREADY_REGISTERED, hex(base) + " + " + std::to_string(bytes) + " is, or is the device's");
        }
        if (!is_mapped(base, bytes)) call.refuse(Rule::REGISTER_UNMAPPED, INVALID_VALUE, hex(base) + " + " + std::to_string(bytes));
        if (s.register_needs_populated && !is_populated(base, bytes)) {
            call.note(Rule::REGISTER_UNPOPULATED, hex(base) + " + " + std::to_string(bytes) + " has pages that are not in memory");
        }
        if (!s.host_register_supported) return NOT_SUPPORTED;
        if (bytes >= static_cast<uint64_t>(s.register_limit_bytes)) return INVALID_VALUE;
        if (w.memory.bytes_of(Kind::REGISTERED) + bytes > static_cast<uint64_t>(s.register_total_bytes)) return static_cast<Result>(s.register_error);
        if (s.register_ms_per_gib > 0) {
            const double seconds = 1e-3 * static_cast<double>(s.register_ms_per_gib) * static_cast<double>(bytes) / static_cast<double>(1 << 30);
            const uint64_t generation = w.generation;
            w.changed.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return w.generation != generation; });
            if (w.generation != generation) return DEINITIALIZED;
        }
        Range range;
        range.base = base;
        range.size = bytes;
        range.kind = Kind::REGISTERED;
        range.flags = flags;
        range.context = call.context()->handle;
        range.call = call.number();
        w.memory.add(range);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuMemHostUnregister(Address base) {
    Call call("cuMemHostUnregister", USE | UNSAFE | GIVES_UP);
    call.with("address", base).giving_up(base);
    return call.run([&](Lock&) -> Result {
        World& w = world();
        call.need(base, "there is nothing at 0");
        const Range* const range = w.memory.at(base);
        if (!range || range->kind != Kind::REGISTERED) {
            call.refuse(Rule::UNREGISTER_UNKNOWN, HOST_MEMORY_NOT_REGISTERED, "no registration begins at " + hex(base));
        }
        if (!is_mapped(range->base, range->size)) call.note(Rule::UNREGISTER_UNMAPPED, hex(base) + " is no longer mapped, or not all of it");
        if (is_busy(range->base, range->size)) call.note(Rule::MEMORY_BUSY, "an operation on " + hex(base) + " has not ended");
        w.memory.remove(base);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuMemHostGetDevicePointer_v2(Address* out, Address pointer, unsigned flags) {
    Call call("cuMemHostGetDevicePointer", USE);
    call.with("address", pointer).with("flags", flags);
    return call.run([&](Lock&) -> Result {
        call.need(out, "no place for the address");
        call.need_flags(flags, 0);
        const Range* const range = world().memory.around(pointer);
        if (!range || range->kind == Kind::DEVICE) {
            call.refuse(Rule::MEMORY_UNKNOWN, INVALID_VALUE, hex(pointer) + " is not pinned");
        }
        *out = world().settings.host_pointer_usable ? pointer : pointer + ALIAS;
        call.with("answer", *out);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuMemHostGetFlags(unsigned* flags, Address pointer) {
    Call call("cuMemHostGetFlags", USE);
    call.with("address", pointer);
    return call.run([&](Lock&) -> Result {
        call.need(flags, "no place for the flags");
        const Range* const range = world().memory.around(pointer);
        if (!range || range->kind == Kind::DEVICE) call.refuse(Rule::MEMORY_UNKNOWN, INVALID_VALUE, hex(pointer) + " is not pinned");
        *flags = range->flags;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    Call call("cuMemGetInfo", USE);
    return call.run([&](Lock&) -> Result {
        call.need(free_bytes && total, "no place for the sizes");
        *total = static_cast<size_t>(world().settings.total_memory_bytes);
        const uint64_t used = world().memory.bytes_of(Kind::DEVICE);
        *free_bytes = *total > used ? *total - used : 0;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuMemGetAddressRange_v2(Address* base, size_t* size, Address pointer) {
    Call call("cuMemGetAddressRange", USE);
    call.with("address", pointer);
    return call.run([&](Lock&) -> Result {
        const Range* const range = world().memory.around(pointer);
        if (!range) call.refuse(Rule::MEMORY_UNKNOWN, NOT_FOUND, hex(pointer) + " is not known");
        if (base) *base = range->base;
        if (size) *size = range->size;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuPointerGetAttribute(void* out, int attribute, Address pointer) {
    Call call("cuPointerGetAttribute", USE);
    call.with("attribute", attribute).with("address", pointer);
    return call.run([&](Lock&) -> Result {
        call.need(out, "no place for the value");
        const Range* const range = world().memory.around(pointer);
        if (!range) return INVALID_VALUE;  // pageable memory: the way to ask whether it is
        const auto put = [&](auto value) { memcpy(out, &value, sizeof value); };
        const bool is_pinned = range->kind != Kind::DEVICE;
        switch (attribute) {
            case 1: put(range->context); break;
            case 2: put(static_cast<unsigned>(is_pinned ? MEMORYTYPE_HOST : MEMORYTYPE_DEVICE)); break;
            case 3: put(is_pinned && !world().settings.host_pointer_usable ? pointer + ALIAS : pointer); break;
            case 4:
                if (!is_pinned) return INVALID_VALUE;
                put(pointer);
                break;
            case 8: put(false); break;
            case 9: put(call.context()->device); break;
            case 11: put(range->base); break;
            case 12: put(range->size); break;
            case 13: put(true); break;
            default: call.refuse(Rule::ARGUMENT, INVALID_VALUE, "the stand-in has no pointer attribute " + std::to_string(attribute));
        }
        return SUCCESS;
    });
}
