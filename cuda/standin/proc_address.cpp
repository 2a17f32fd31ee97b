// cuGetProcAddress: functions by name and version.
#include <string.h>

#include "call.h"
#include "symbols.h"

using namespace standin;

namespace {

// What of cuMemcpyBatchAsync a driver of the machine's version has for a caller that knows `version`.
int batch_status(int version) {
    const Settings& s = world().settings;
    if (s.driver_version < 12080) return PROC_NOT_FOUND;
    if (version < 12080) return PROC_VERSION_NOT_SUFFICIENT;
    return (version >= 13000 ? s.batch_13000 : s.batch_12080) == SYMBOL_MISSING ? PROC_NOT_FOUND : PROC_SUCCESS;
}

}  // namespace

STANDIN_EXPORT int cuGetProcAddress_v2(const char* name, void** out, int version, uint64_t flags, int* status) {
    Call call("cuGetProcAddress", FREE);
    call.with("name", name).with("version", version).with("flags", flags);
    return call.run([&](Lock&) -> Result {
        call.need(name && out, "no name, or no place for the function");
        *out = nullptr;
        if (status) *status = PROC_NOT_FOUND;
        call.need(flags <= 2, "flags that do not exist");
        if (version > world().settings.driver_version) return INVALID_VALUE;  // as documented
        const AnyFunction function = function_named(name, version >= 13000);
        int found = function ? PROC_SUCCESS : PROC_NOT_FOUND;
        if (strcmp(name, "cuMemcpyBatchAsync") == 0) found = batch_status(version);
        if (found == PROC_SUCCESS) *out = reinterpret_cast<void*>(function);
        if (status) *status = found;
        return SUCCESS;
    });
}
