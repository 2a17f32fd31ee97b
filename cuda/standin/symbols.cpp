// The functions of the driver by the names that cuGetProcAddress knows.
#include "symbols.h"

#include <string.h>

// Declared without their parameters, as nothing here calls them.
#define STANDIN_FUNCTIONS(plain, versioned)                                                                                       \
    plain(cuGetErrorName) plain(cuGetErrorString) plain(cuInit) plain(cuDriverGetVersion) plain(cuDeviceGetCount)                 \
    plain(cuDeviceGet) plain(cuDeviceGetName) versioned(cuDeviceGetUuid, cuDeviceGetUuid_v2)                                      \
    versioned(cuDeviceTotalMem, cuDeviceTotalMem_v2) plain(cuDeviceGetAttribute) plain(cuDeviceGetPCIBusId)                       \
    plain(cuDeviceGetByPCIBusId) plain(cuDevicePrimaryCtxRetain)                                                                  \
    versioned(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2) plain(cuDevicePrimaryCtxGetState) plain(cuCtxSetCurrent)   \
    plain(cuCtxGetCurrent) versioned(cuCtxPushCurrent, cuCtxPushCurrent_v2) versioned(cuCtxPopCurrent, cuCtxPopCurrent_v2)        \
    plain(cuCtxGetDevice) plain(cuCtxGetStreamPriorityRange) plain(cuCtxSynchronize) plain(cuStreamCreate)                        \
    plain(cuStreamCreateWithPriority) versioned(cuStreamDestroy, cuStreamDestroy_v2) plain(cuStreamSynchronize)                   \
    plain(cuStreamQuery) plain(cuStreamWaitEvent) plain(cuStreamGetPriority) plain(cuStreamGetFlags) plain(cuStreamGetCtx)        \
    plain(cuEventCreate) plain(cuEventRecord) plain(cuEventRecordWithFlags) plain(cuEventQuery) plain(cuEventSynchronize)         \
    versioned(cuEventElapsedTime, cuEventElapsedTime_v2) versioned(cuEventDestroy, cuEventDestroy_v2) plain(cuLaunchHostFunc)     \
    plain(cuStreamAddCallback) versioned(cuMemAlloc, cuMemAlloc_v2) versioned(cuMemFree, cuMemFree_v2) plain(cuMemHostAlloc)      \
    versioned(cuMemAllocHost, cuMemAllocHost_v2) plain(cuMemFreeHost) versioned(cuMemHostRegister, cuMemHostRegister_v2)          \
    plain(cuMemHostUnregister) versioned(cuMemHostGetDevicePointer, cuMemHostGetDevicePointer_v2) plain(cuMemHostGetFlags)        \
    versioned(cuMemGetInfo, cuMemGetInfo_v2) versioned(cuMemGetAddressRange, cuMemGetAddressRange_v2)                             \
    plain(cuPointerGetAttribute) plain(cuMemcpyAsync) versioned(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2)                          \
    versioned(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2) versioned(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2) plain(cuMemcpy)         \
    versioned(cuMemcpyHtoD, cuMemcpyHtoD_v2) versioned(cuMemcpyDtoH, cuMemcpyDtoH_v2) plain(cuMemsetD8Async)                      \
    versioned(cuMemsetD8, cuMemsetD8_v2) plain(cuModuleLoadData) plain(cuModuleLoadDataEx) plain(cuModuleLoadFatBinary)           \
    plain(cuModuleUnload) plain(cuModuleGetFunction) plain(cuLibraryLoadData) plain(cuLibraryUnload) plain(cuLibraryGetKernel)    \
    plain(cuKernelGetFunction) plain(cuFuncGetAttribute) plain(cuFuncGetParamInfo) plain(cuKernelGetParamInfo)                    \
    plain(cuLaunchKernel) versioned(cuStreamBeginCapture, cuStreamBeginCapture_v2) plain(cuStreamEndCapture)                      \
    plain(cuGraphDestroy) plain(cuStreamIsCapturing) plain(cuThreadExchangeStreamCaptureMode)                                     \
    versioned(cuGetProcAddress, cuGetProcAddress_v2)

extern "C" {
#define STANDIN_DECLARE(name) int name();
#define STANDIN_DECLARE_AS(name, symbol) int symbol();
STANDIN_FUNCTIONS(STANDIN_DECLARE, STANDIN_DECLARE_AS)
int cuMemcpyBatchAsync();
int cuMemcpyBatchAsync_v2();
}

namespace standin {

AnyFunction function_named(const char* name, bool is_newest_batch) {
#define STANDIN_IS(known) \
    if (strcmp(name, #known) == 0) return known;
#define STANDIN_IS_AS(known, symbol) \
    if (strcmp(name, #known) == 0) return symbol;
    STANDIN_FUNCTIONS(STANDIN_IS, STANDIN_IS_AS)
    if (strcmp(name, "cuMemcpyBatchAsync") == 0) return is_newest_batch ? cuMemcpyBatchAsync_v2 : cuMemcpyBatchAsync;
    return nullptr;
}

}  // namespace standin
