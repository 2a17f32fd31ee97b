#include "kernels.h"

#include <string.h>

#include <algorithm>

// host_shim.cpp, which is linked in.
extern "C" {
void kv_set_reverse(int reverse);
int kv_parameters(const char* name, size_t* bytes);
int kv_launch(const char* name, uint32_t grid, uint32_t block, void** parameters);
}

namespace standin {

namespace {

struct Run {
    uint64_t address, stride, size, offset;
};

// In the order of the kernels' signature.
enum Parameter { RUNS, NUM_RUNS, BLOCKS, SLOTS, COUNT, NUM_BLOCKS, NUM_SLOTS, SLOT_BASE, SLOT_BYTES, NUM_PARAMETERS };

struct Launch {
    std::string name;
    unsigned grid = 0, block = 0;
    uint64_t values[NUM_PARAMETERS] = {};
    // What the pointers led to when it was launched.
    std::vector<Run> runs;
    std::vector<uint64_t> blocks, slots;
    bool is_gather() const { return name == "kv_gather"; }
};

// A rule that the launch would break, or none.
struct Finding {
    bool is_broken = false;
    Rule rule = Rule::LAUNCH_MEMORY;
    Result code = ILLEGAL_ADDRESS;
    std::string text;
};

Finding found(Rule rule, Result code, const std::string& text) { return {true, rule, code, text}; }

// Where a pointer that the device may use is in this process; 0 where the device cannot use it.
Address on_host(Address address, uint64_t size) {
    const World& w = world();
    const bool is_alias = address & ALIAS;
    const Address real = address & ~ALIAS;
    if (!w.memory.accessible(real, size)) return w.settings.pageable_access && !is_alias ? real : 0;
    const bool is_pinned = w.memory.around(real)->kind != Kind::DEVICE;
    if (is_alias != (is_pinned && !w.settings.host_pointer_usable)) return 0;
    return real;
}

template <typename T>
bool copy_in(std::vector<T>& into, Address address, uint64_t count) {
    if (count == 0) return true;
    const Address real = on_host(address, count * sizeof(T));
    if (!real) return false;
    const T* const first = reinterpret_cast<const T*>(real);
    into.assign(first, first + count);
    return true;
}

Finding read_tables(Launch& launch) {
    const uint64_t* const v = launch.values;
    if (!copy_in(launch.runs, v[RUNS], v[NUM_RUNS])) return found(Rule::LAUNCH_MEMORY, ILLEGAL_ADDRESS, "runs are where the device cannot read");
    if (!copy_in(launch.blocks, v[BLOCKS], v[COUNT])) return found(Rule::LAUNCH_MEMORY, ILLEGAL_ADDRESS, "block ids are where the device cannot read");
    if (!copy_in(launch.slots, v[SLOTS], v[COUNT])) return found(Rule::LAUNCH_MEMORY, ILLEGAL_ADDRESS, "slot ids are where the device cannot read");
    return {};
}

bool is_aligned(std::initializer_list<uint64_t> values) {
    return std::all_of(values.begin(), values.end(), [](uint64_t value) { return value % 16 == 0; });
}

// Which bytes it will touch, by the tables as they are now.
Finding spans_of(const Launch& launch, Spans& reads, Spans& writes) {
    const uint64_t* const v = launch.values;
    if (!is_aligned({v[SLOT_BASE], v[SLOT_BYTES]})) return found(Rule::LAUNCH_ALIGNMENT, MISALIGNED_ADDRESS, "slots are not at multiples of 16");
    for (const Run& run : launch.runs) {
        if (!is_aligned({run.address, run.stride, run.size, run.offset})) return found(Rule::LAUNCH_ALIGNMENT, MISALIGNED_ADDRESS, "a run is not of multiples of 16");
        if (run.offset + run.size > v[SLOT_BYTES]) return found(Rule::LAUNCH_MEMORY, ILLEGAL_ADDRESS, "a run leaves its slot");
    }
    for (size_t i = 0; i < launch.blocks.size(); ++i) {
        if (launch.blocks[i] >= v[NUM_BLOCKS] || launch.slots[i] >= v[NUM_SLOTS]) continue;  // the kernel skips it
        for (const Run& run : launch.runs) {
            const Address block = on_host(run.address + launch.blocks[i] * run.stride, run.size);
            const Address slot = on_host(v[SLOT_BASE] + launch.slots[i] * v[SLOT_BYTES] + run.offset, run.size);
            if (!block || !slot) {
                return found(Rule::LAUNCH_MEMORY, ILLEGAL_ADDRESS,
                             (block ? "slot " + std::to_string(launch.slots[i]) : "block " + std::to_string(launch.blocks[i])) + " is where the device cannot reach");
            }
            reads.add(launch.is_gather() ? block : slot, run.size);
            writes.add(launch.is_gather() ? slot : block, run.size);
        }
    }
    const bool overlapped = writes.settle();
    reads.settle();
    if (overlapped) return found(Rule::LAUNCH_DUPLICATE, SUCCESS, "two items write the same bytes");
    return {};
}

void report(const Launch& launch, const Finding& finding) {
    world().report.violate(finding.rule, launch.name, finding.text, thread_id(), 0);
}

bool same(const Launch& a, const Launch& b) {
    const bool same_runs = a.runs.size() == b.runs.size() && (a.runs.empty() || memcmp(a.runs.data(), b.runs.data(), a.runs.size() * sizeof(Run)) == 0);
    return same_runs && a.blocks == b.blocks && a.slots == b.slots;
}

// With the pointers that are good here.
void run_here(Launch& launch, bool reverse) {
    uint64_t* const v = launch.values;
    for (const int pointer : {RUNS, BLOCKS, SLOTS, SLOT_BASE}) v[pointer] &= ~ALIAS;
    void* parameters[NUM_PARAMETERS];
    for (int i = 0; i < NUM_PARAMETERS; ++i) parameters[i] = &v[i];  // little endian: a value of 4 bytes is at the same place
    kv_set_reverse(reverse);
    kv_launch(launch.name.c_str(), launch.grid, launch.block, parameters);
}

// Values from `kernelParams` or, if there is none, from `extra`. The former say nothing of sizes, to CUDA as little as here: too small a
// parameter is seen by what is read behind it.
void read_parameters(Call& call, Launch& launch, void** parameters, void** extra) {
    const auto sizes = parameter_sizes(launch.name);
    if (sizes.size() != NUM_PARAMETERS) call.refuse(Rule::LAUNCH_PARAMETERS, INVALID_VALUE, "the stand-in knows another signature of " + launch.name);
    if (static_cast<bool>(parameters) == static_cast<bool>(extra)) {
        call.refuse(Rule::LAUNCH_PARAMETERS, INVALID_VALUE, "parameters come by kernelParams or by extra");
    }
    if (parameters) {
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (!parameters[i]) call.refuse(Rule::LAUNCH_PARAMETERS, INVALID_VALUE, "parameter " + std::to_string(i) + " is missing");
            memcpy(&launch.values[i], parameters[i], sizes[i]);
        }
        return;
    }
    const char* buffer = nullptr;
    size_t size = 0;
    for (size_t i = 0; reinterpret_cast<uintptr_t>(extra[i]) != LAUNCH_PARAM_END; i += 2) {
        if (reinterpret_cast<uintptr_t>(extra[i]) == LAUNCH_PARAM_BUFFER) buffer = static_cast<const char*>(extra[i + 1]);
        if (reinterpret_cast<uintptr_t>(extra[i]) == LAUNCH_PARAM_BUFFER_SIZE) size = *static_cast<const size_t*>(extra[i + 1]);
    }
    const size_t wanted = parameter_offset(sizes, sizes.size() - 1) + sizes.back();
    if (!buffer || size != wanted) {
        call.refuse(Rule::LAUNCH_PARAMETERS, INVALID_VALUE, "parameters of " + launch.name + " take " + std::to_string(wanted) + " bytes, not " + std::to_string(size));
    }
    for (size_t i = 0; i < sizes.size(); ++i) memcpy(&launch.values[i], buffer + parameter_offset(sizes, i), sizes[i]);
}

}  // namespace

bool is_kernel(const std::string& name) { return kv_parameters(name.c_str(), nullptr) >= 0; }

std::vector<size_t> parameter_sizes(const std::string& kernel) {
    size_t sizes[16];
    const int count = kv_parameters(kernel.c_str(), sizes);
    return std::vector<size_t>(sizes, sizes + std::max(count, 0));
}

size_t parameter_offset(const std::vector<size_t>& sizes, size_t index) {
    size_t offset = 0;
    for (size_t i = 0; i <= index; ++i) {
        offset = (offset + sizes[i] - 1) / sizes[i] * sizes[i];
        if (i < index) offset += sizes[i];
    }
    return offset;
}

OperationPtr kernel_operation(Call& call, const std::string& name, unsigned grid, unsigned block, void** parameters, void** extra) {
    Launch launch;
    launch.name = name;
    launch.grid = grid;
    launch.block = block;
    read_parameters(call, launch, parameters, extra);
    call.arguments().raw("parameters", numbers(launch.values, NUM_PARAMETERS));
    const auto operation = std::make_shared<Operation>();
    operation->kind = "kernel";
    Finding finding = read_tables(launch);
    if (!finding.is_broken) finding = spans_of(launch, operation->reads, operation->writes);
    call.arguments().raw("blocks", numbers(launch.blocks.data(), launch.blocks.size())).raw("slots", numbers(launch.slots.data(), launch.slots.size()));
    // A launch succeeds whatever it will do; the fault comes when it runs.
    if (finding.is_broken) call.note(finding.rule, finding.text);
    operation->run = [launch, finding](Stream& stream) -> Result {
        if (finding.is_broken && finding.code) return finding.code;
        Launch at_run = launch;
        bool reverse;
        {
            Lock lock(world().mutex);
            Spans reads, writes;
            Finding late = read_tables(at_run);
            if (!late.is_broken) late = spans_of(at_run, reads, writes);
            if (late.is_broken && late.code) {
                report(launch, found(Rule::MEMORY_GONE, late.code, "when the kernel ran: " + late.text));
                return late.code;
            }
            if (!same(launch, at_run)) report(launch, found(Rule::LAUNCH_CHANGED, SUCCESS, "runs, blocks or slots changed between the launch and its turn"));
            reverse = world().settings.kernel_reverse != 0;
        }
        if (stream.may_go_on(0, 1)) run_here(at_run, reverse);
        return SUCCESS;
    };
    return operation;
}

}  // namespace standin
