// Devices, and contexts.
#include <string.h>

#include "call.h"

using namespace standin;

namespace {

constexpr char UUID[] = "stand-in device";  // 16 bytes with the zero

struct BusId {
    unsigned domain = 0, bus = 0, device = 0, function = 0;
};

BusId bus_id(int device) {
    BusId id;
    sscanf(world().settings.pci_bus_id.c_str(), "%x:%x:%x.%x", &id.domain, &id.bus, &id.device, &id.function);
    id.bus += static_cast<unsigned>(device);
    return id;
}

std::string bus_text(int device) {
    if (device == 0) return world().settings.pci_bus_id;  // as it was written: drivers differ in upper and lower case
    const BusId id = bus_id(device);
    char text[32];
    snprintf(text, sizeof text, "%04x:%02x:%02x.%x", id.domain, id.bus, id.device, id.function);
    return text;
}

void need_device(Call& call, int device) {
    if (device < 0 || device >= world().settings.devices) {
        call.refuse(Rule::ARGUMENT, INVALID_DEVICE, "there is no device " + std::to_string(device));
    }
}

bool attribute_of(int device, int attribute, int& value) {
    const Settings& s = world().settings;
    const auto as_int = [](int64_t number) { return static_cast<int>(number); };
    switch (attribute) {
        case 1: value = 1024; break;          // MAX_THREADS_PER_BLOCK
        case 2: value = 1024; break;          // MAX_BLOCK_DIM_X
        case 5: value = 0x7FFFFFFF; break;    // MAX_GRID_DIM_X
        case 10: value = 32; break;           // WARP_SIZE
        case 13: value = 1980000; break;      // CLOCK_RATE, kHz
        case 16: value = as_int(s.multiprocessors); break;
        case 18: value = 0; break;            // INTEGRATED
        case 19: value = 1; break;            // CAN_MAP_HOST_MEMORY
        case 20: value = 0; break;            // COMPUTE_MODE
        case 31: value = 1; break;            // CONCURRENT_KERNELS
        case 33: value = as_int(bus_id(device).bus); break;
        case 34: value = as_int(bus_id(device).device); break;
        case 36: value = 2619000; break;      // MEMORY_CLOCK_RATE, kHz
        case 37: value = 5120; break;         // GLOBAL_MEMORY_BUS_WIDTH, bits
        case 38: value = 50 << 20; break;     // L2_CACHE_SIZE
        case 40: value = as_int(s.copy_engines); break;
        case 41: value = 1; break;            // UNIFIED_ADDRESSING
        case 50: value = as_int(bus_id(device).domain); break;
        case 75: value = as_int(s.capability_major); break;
        case 76: value = as_int(s.capability_minor); break;
        case 78: value = 1; break;            // STREAM_PRIORITIES_SUPPORTED
        case 83: value = 1; break;            // MANAGED_MEMORY
        case 88: value = as_int(s.pageable_access); break;
        case 89: value = 1; break;            // CONCURRENT_MANAGED_ACCESS
        case 91: value = as_int(s.host_pointer_usable); break;
        case 99: value = as_int(s.host_register_supported); break;
        case 100: value = as_int(s.pageable_access); break;  // PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES
        case 113: value = 0; break;           // READ_ONLY_HOST_REGISTER_SUPPORTED
        case 134: value = as_int(s.host_numa_id); break;
        default: return false;
    }
    return true;
}

}  // namespace

STANDIN_EXPORT int cuInit(unsigned flags) {
    Call call("cuInit", FREE);
    call.with("flags", flags);
    return call.run([&](Lock&) -> Result {
        call.need_flags(flags, 0);
        if (world().settings.init_error) return static_cast<Result>(world().settings.init_error);
        if (world().settings.devices == 0) return NO_DEVICE;
        world().is_initialized = true;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDriverGetVersion(int* version) {
    Call call("cuDriverGetVersion", FREE);
    return call.run([&](Lock&) -> Result {
        call.need(version, "no place for the version");
        *version = static_cast<int>(world().settings.driver_version);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDeviceGetCount(int* count) {
    Call call("cuDeviceGetCount", INIT);
    return call.run([&](Lock&) -> Result {
        call.need(count, "no place for the count");
        *count = static_cast<int>(world().settings.devices);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDeviceGet(int* device, int ordinal) {
    Call call("cuDeviceGet", INIT);
    call.with("ordinal", ordinal);
    return call.run([&](Lock&) -> Result {
        call.need(device, "no place for the device");
        need_device(call, ordinal);
        *device = ordinal;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDeviceGetName(char* name, int length, int device) {
    Call call("cuDeviceGetName", INIT);
    call.with("device", device);
    return call.run([&](Lock&) -> Result {
        call.need(name && length > 0, "no place for the name");
        need_device(call, device);
        snprintf(name, static_cast<size_t>(length), "%s", world().settings.name.c_str());
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDeviceGetUuid_v2(char* uuid, int device) {
    Call call("cuDeviceGetUuid", INIT);
    call.with("device", device);
    return call.run([&](Lock&) -> Result {
        call.need(uuid, "no place for the uuid");
        need_device(call, device);
        memcpy(uuid, UUID, 16);
        uuid[15] = static_cast<char>(device);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    Call call("cuDeviceTotalMem", INIT);
    call.with("device", device);
    return call.run([&](Lock&) -> Result {
        call.need(bytes, "no place for the size");
        need_device(call, device);
        *bytes = static_cast<size_t>(world().settings.total_memory_bytes);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
    Call call("cuDeviceGetAttribute", INIT);
    call.with("attribute", attribute).with("device", device);
    return call.run([&](Lock&) -> Result {
        call.need(value, "no place for the value");
        need_device(call, device);
        if (!attribute_of(device, attribute, *value)) {
            call.refuse(Rule::ARGUMENT, INVALID_VALUE, "the stand-in has no device attribute " + std::to_string(attribute));
        }
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDeviceGetPCIBusId(char* id, int length, int device) {
    Call call("cuDeviceGetPCIBusId", INIT);
    call.with("device", device);
    return call.run([&](Lock&) -> Result {
        call.need(id && length >= 13, "an id of a PCI bus takes 13 bytes with its zero");
        need_device(call, device);
        snprintf(id, static_cast<size_t>(length), "%s", bus_text(device).c_str());
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDeviceGetByPCIBusId(int* device, const char* id) {
    Call call("cuDeviceGetByPCIBusId", INIT);
    call.with("id", id);
    return call.run([&](Lock&) -> Result {
        call.need(device && id, "no place for the device, or no id");
        for (int other = 0; other < world().settings.devices; ++other) {
            if (bus_text(other) == id) {
                *device = other;
                return SUCCESS;
            }
        }
        return INVALID_DEVICE;
    });
}

STANDIN_EXPORT int cuDevicePrimaryCtxRetain(Handle* context, int device) {
    Call call("cuDevicePrimaryCtxRetain", INIT);
    call.with("device", device);
    return call.run([&](Lock&) -> Result {
        call.need(context, "no place for the context");
        need_device(call, device);
        const auto primary = world().context_of(device);
        if (!primary->alive) call.check_capture();  // it is made now
        primary->alive = true;
        ++primary->retains;
        primary->call = call.number();
        *context = primary->handle;
        call.with("context", primary->handle);
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDevicePrimaryCtxRelease_v2(int device) {
    Call call("cuDevicePrimaryCtxRelease", INIT);
    call.with("device", device);
    return call.run([&](Lock&) -> Result {
        need_device(call, device);
        const auto primary = world().context_of(device);
        if (primary->retains == 0) call.refuse(Rule::RELEASE, INVALID_CONTEXT, "this process's code has not retained it, or released it before");
        if (--primary->retains == 0 && !world().settings.primary_retained) {
            primary->alive = false;
            world().break_context(primary, CONTEXT_IS_DESTROYED);
        }
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    Call call("cuDevicePrimaryCtxGetState", INIT);
    call.with("device", device);
    return call.run([&](Lock&) -> Result {
        call.need(flags && active, "no place for the state");
        need_device(call, device);
        *flags = 0;
        *active = world().context_of(device)->alive;
        return SUCCESS;
    });
}

namespace {

std::shared_ptr<Context> find_context(Call& call, Handle handle) {
    for (const auto& entry : world().contexts) {
        if (entry.second->handle == handle && entry.second->alive) return entry.second;
    }
    const bool was_known = world().was_handle(handle);
    call.refuse(was_known ? Rule::DESTROYED_HANDLE : Rule::UNKNOWN_HANDLE, was_known ? CONTEXT_IS_DESTROYED : INVALID_CONTEXT,
                hex(handle) + " is not a context");
}

}  // namespace

STANDIN_EXPORT int cuCtxSetCurrent(Handle context) {
    Call call("cuCtxSetCurrent", INIT);
    call.with("context", context);
    return call.run([&](Lock&) -> Result {
        auto& stack = this_thread().stack;
        if (!stack.empty()) stack.pop_back();
        if (context) stack.push_back(find_context(call, context));
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuCtxGetCurrent(Handle* context) {
    Call call("cuCtxGetCurrent", INIT);
    return call.run([&](Lock&) -> Result {
        call.need(context, "no place for the context");
        *context = call.context() ? call.context()->handle : 0;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuCtxPushCurrent_v2(Handle context) {
    Call call("cuCtxPushCurrent", INIT);
    call.with("context", context);
    return call.run([&](Lock&) -> Result {
        this_thread().stack.push_back(find_context(call, context));
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuCtxPopCurrent_v2(Handle* context) {
    Call call("cuCtxPopCurrent", USE);
    return call.run([&](Lock&) -> Result {
        if (context) *context = call.context()->handle;
        this_thread().stack.pop_back();
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuCtxGetDevice(int* device) {
    Call call("cuCtxGetDevice", USE);
    return call.run([&](Lock&) -> Result {
        call.need(device, "no place for the device");
        *device = call.context()->device;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    Call call("cuCtxGetStreamPriorityRange", USE);
    return call.run([&](Lock&) -> Result {
        if (least) *least = 0;
        if (greatest) *greatest = -5;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuCtxSynchronize() {
    Call call("cuCtxSynchronize", USE | UNSAFE);
    return call.run([&](Lock& lock) -> Result {
        for (const auto& stream : world().all_streams()) {
            if (stream->context != call.context()) continue;
            if (const Result code = call.wait(lock, stream->tail())) return code;
        }
        return SUCCESS;
    });
}
