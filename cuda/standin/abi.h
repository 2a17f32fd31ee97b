// The part of cuda.h that the stand-in speaks: results, flags and structures by their numbers, since it is built without the toolkit.
// abi_check.cpp compares them with the real header where there is one.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define STANDIN_EXPORT extern "C" __attribute__((visibility("default")))

namespace standin {

using Result = int;
using Handle = uint64_t;   // of a context, stream, event, module, function: the stand-in never dereferences one
using Address = uint64_t;  // CUdeviceptr, or a pointer of the host

enum : Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    DEINITIALIZED = 4,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CONTEXT_IS_DESTROYED = 709,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    MISALIGNED_ADDRESS = 716,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
    UNKNOWN = 999,
};

enum : Handle { LEGACY_STREAM = 1, PER_THREAD_STREAM = 2 };
enum : unsigned { STREAM_NON_BLOCKING = 1 };
enum : unsigned { EVENT_BLOCKING_SYNC = 1, EVENT_DISABLE_TIMING = 2 };
enum : unsigned { HOST_PORTABLE = 1, HOST_DEVICEMAP = 2, HOST_WRITECOMBINED = 4 };
enum : unsigned { REGISTER_IOMEMORY = 4, REGISTER_READ_ONLY = 8 };
enum : int { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };
enum : int { CAPTURE_STATUS_NONE = 0, CAPTURE_STATUS_ACTIVE = 1, CAPTURE_STATUS_INVALIDATED = 2 };
enum : int { ORDER_STREAM = 1, ORDER_DURING_API_CALL = 2, ORDER_ANY = 3 };
enum : int { LOCATION_LAST = 4 };
enum : unsigned { COPY_PREFER_OVERLAP = 1 };
enum : int { PROC_SUCCESS = 0, PROC_NOT_FOUND = 1, PROC_VERSION_NOT_SUFFICIENT = 2 };
enum : uintptr_t { LAUNCH_PARAM_END = 0, LAUNCH_PARAM_BUFFER = 1, LAUNCH_PARAM_BUFFER_SIZE = 2 };
enum : int { MEMORYTYPE_HOST = 1, MEMORYTYPE_DEVICE = 2 };

struct Location {
    int type, id;
};
struct CopyAttributes {
    int order;
    Location source_hint, target_hint;
    unsigned flags;
};

const char* result_name(Result code);

}  // namespace standin
