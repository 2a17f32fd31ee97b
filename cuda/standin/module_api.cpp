// Modules and libraries, and the kernels in them.
#include "call.h"
#include "image.h"
#include "kernels.h"

using namespace standin;

namespace {

Result load(Call& call, Handle* out, const void* image, const char* kind) {
    World& w = world();
    call.need(out && image, "no image, or no place for the module");
    const int capability = static_cast<int>(10 * w.settings.capability_major + w.settings.capability_minor);
    const Result code = check_image(image, capability);
    if (code == INVALID_IMAGE) call.refuse(Rule::IMAGE, INVALID_IMAGE, "this is no fatbin, cubin or PTX");
    if (code) return code;  // nothing in it for this device: a machine that exists
    Module module;
    module.handle = *out = w.new_handle();
    module.kind = kind;
    module.context = call.context();
    module.call = call.number();
    w.modules[module.handle] = module;
    call.with("created", module.handle);
    return SUCCESS;
}

Result unload(Call& call, Handle handle, const char* kind) {
    World& w = world();
    const auto found = w.modules.find(handle);
    if (found == w.modules.end() || found->second.kind != std::string(kind)) call.refuse_handle(handle, kind);
    for (const auto& stream : w.all_streams()) {
        for (const OperationPtr& operation : stream->pending()) {
            if (operation->kind == std::string("kernel")) call.note(Rule::MEMORY_BUSY, std::string("a kernel of the ") + kind + " may still run");
        }
    }
    w.modules.erase(found);
    for (auto function = w.functions.begin(); function != w.functions.end();) {
        function = function->second.module == handle ? w.functions.erase(function) : std::next(function);
    }
    return SUCCESS;
}

Result find(Call& call, Handle* out, Handle module_handle, const char* name, const char* kind) {
    World& w = world();
    call.need(out && name, "no name, or no place for the function");
    const auto module = w.modules.find(module_handle);
    if (module == w.modules.end() || module->second.kind != std::string(kind)) call.refuse_handle(module_handle, kind);
    if (!is_kernel(name)) return NOT_FOUND;
    for (const auto& known : w.functions) {
        if (known.second.module == module_handle && known.second.name == name) {
            *out = known.first;
            return SUCCESS;
        }
    }
    *out = w.new_handle();
    w.functions[*out] = {module_handle, name, call.context()};
    return SUCCESS;
}

const Function& function_of(Call& call, Handle handle) {
    const auto found = world().functions.find(handle);
    if (found == world().functions.end()) call.refuse_handle(handle, "kernel");
    if (found->second.context != call.context()) call.refuse(Rule::FOREIGN_CONTEXT, INVALID_HANDLE, "the kernel belongs to another context");
    return found->second;
}

Result parameter(Call& call, Handle handle, size_t index, size_t* offset, size_t* size) {
    const auto sizes = parameter_sizes(function_of(call, handle).name);
    if (index >= sizes.size()) return INVALID_VALUE;  // the documented way to count them
    if (offset) *offset = parameter_offset(sizes, index);
    if (size) *size = sizes[index];
    return SUCCESS;
}

}  // namespace

STANDIN_EXPORT int cuModuleLoadData(Handle* module, const void* image) {
    Call call("cuModuleLoadData", USE | UNSAFE);
    return call.run([&](Lock&) { return load(call, module, image, "module"); });
}

STANDIN_EXPORT int cuModuleLoadDataEx(Handle* module, const void* image, unsigned options, void*, void*) {
    Call call("cuModuleLoadDataEx", USE | UNSAFE);
    call.with("options", options);
    return call.run([&](Lock&) { return load(call, module, image, "module"); });
}

STANDIN_EXPORT int cuModuleLoadFatBinary(Handle* module, const void* image) {
    Call call("cuModuleLoadFatBinary", USE | UNSAFE);
    return call.run([&](Lock&) { return load(call, module, image, "module"); });
}

STANDIN_EXPORT int cuModuleUnload(Handle module) {
    Call call("cuModuleUnload", USE | UNSAFE | GIVES_UP);
    call.with("module", module).giving_up(module);
    return call.run([&](Lock&) { return unload(call, module, "module"); });
}

STANDIN_EXPORT int cuModuleGetFunction(Handle* function, Handle module, const char* name) {
    Call call("cuModuleGetFunction", USE | UNSAFE);
    call.with("module", module).with("name", name);
    return call.run([&](Lock&) { return find(call, function, module, name, "module"); });
}

STANDIN_EXPORT int cuLibraryLoadData(Handle* library, const void* image, void*, void*, unsigned options, void*, void*, unsigned library_options) {
    Call call("cuLibraryLoadData", USE | UNSAFE);
    call.with("options", options).with("library_options", library_options);
    return call.run([&](Lock&) { return load(call, library, image, "library"); });
}

STANDIN_EXPORT int cuLibraryUnload(Handle library) {
    Call call("cuLibraryUnload", USE | UNSAFE | GIVES_UP);
    call.with("library", library).giving_up(library);
    return call.run([&](Lock&) { return unload(call, library, "library"); });
}

STANDIN_EXPORT int cuLibraryGetKernel(Handle* kernel, Handle library, const char* name) {
    Call call("cuLibraryGetKernel", USE | UNSAFE);
    call.with("library", library).with("name", name);
    return call.run([&](Lock&) { return find(call, kernel, library, name, "library"); });
}

STANDIN_EXPORT int cuKernelGetFunction(Handle* function, Handle kernel) {
    Call call("cuKernelGetFunction", USE | UNSAFE);
    call.with("kernel", kernel);
    return call.run([&](Lock&) -> Result {
        call.need(function, "no place for the function");
        function_of(call, kernel);
        *function = kernel;
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuFuncGetAttribute(int* value, int attribute, Handle function) {
    Call call("cuFuncGetAttribute", USE);
    call.with("attribute", attribute).with("function", function);
    return call.run([&](Lock&) -> Result {
        call.need(value, "no place for the value");
        function_of(call, function);
        switch (attribute) {
            case 0: *value = 1024; break;  // MAX_THREADS_PER_BLOCK
            case 1:
            case 2:
            case 3: *value = 0; break;  // bytes of shared, constant and local memory
            case 4: *value = 32; break;  // NUM_REGS
            case 5:
            case 6: *value = static_cast<int>(10 * world().settings.capability_major + world().settings.capability_minor); break;
            default: call.refuse(Rule::ARGUMENT, INVALID_VALUE, "the stand-in has no function attribute " + std::to_string(attribute));
        }
        return SUCCESS;
    });
}

STANDIN_EXPORT int cuFuncGetParamInfo(Handle function, size_t index, size_t* offset, size_t* size) {
    Call call("cuFuncGetParamInfo", USE);
    call.with("function", function).with("index", uint64_t{index});
    return call.run([&](Lock&) { return parameter(call, function, index, offset, size); });
}

STANDIN_EXPORT int cuKernelGetParamInfo(Handle kernel, size_t index, size_t* offset, size_t* size) {
    Call call("cuKernelGetParamInfo", USE);
    call.with("kernel", kernel).with("index", uint64_t{index});
    return call.run([&](Lock&) { return parameter(call, kernel, index, offset, size); });
}

STANDIN_EXPORT int cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                                  unsigned block_z, unsigned shared_bytes, Handle handle, void** parameters, void** extra) {
    Call call("cuLaunchKernel", USE);
    call.with("function", function).with("grid", grid_x).with("block", block_x).with("shared_bytes", shared_bytes).with("stream", handle);
    return call.run([&](Lock&) -> Result {
        const auto stream = call.stream(handle);
        const Function& kernel = function_of(call, function);
        call.with("kernel", kernel.name);
        if (grid_x == 0 || grid_x > 0x7FFFFFFF || grid_y != 1 || grid_z != 1 || block_x == 0 || block_x > 1024 || block_y != 1 || block_z != 1 || shared_bytes) {
            call.refuse(Rule::LAUNCH_GEOMETRY, INVALID_VALUE, "a grid of " + std::to_string(grid_x) + " blocks of " + std::to_string(block_x) + " threads, or more dimensions, or shared memory");
        }
        const OperationPtr launch = kernel_operation(call, kernel.name, grid_x, block_x, parameters, extra);
        if (world().captures.count(stream->handle)) {
            call.note(Rule::CAPTURE_STREAM, "a kernel of ours becomes part of a graph");
            return SUCCESS;
        }
        call.outside_capture(stream->handle);
        stream->enqueue(launch);
        return SUCCESS;
    });
}
