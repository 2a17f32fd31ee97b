// What a test has set the machine to. Names are those of `Machine` in tests/cuda/standin_types.py.
#pragma once
#include <stdint.h>

#include <string>

namespace standin {

struct Settings {
    int64_t driver_version = 13000;
    int64_t devices = 1;
    int64_t init_error = 0;
    int64_t initialized = 0;
    int64_t primary_retained = 1;
    std::string name = "Stand-in GPU";
    int64_t capability_major = 9;
    int64_t capability_minor = 0;
    std::string pci_bus_id = "0000:65:00.0";
    int64_t total_memory_bytes = int64_t{80} << 30;
    int64_t host_numa_id = -1;
    int64_t multiprocessors = 132;
    int64_t copy_engines = 3;
    int64_t host_pointer_usable = 1;
    int64_t host_register_supported = 1;
    int64_t pageable_access = 0;
    int64_t register_limit_bytes = int64_t{1} << 39;
    int64_t register_total_bytes = int64_t{1} << 62;
    int64_t register_error = 2;
    int64_t register_needs_populated = 0;
    int64_t register_ms_per_gib = 0;
    int64_t batch_12080 = 0;
    int64_t batch_13000 = 0;
    int64_t batch_limit = 8192;
    int64_t batch_order = 0;
    int64_t seed = 0;
    int64_t jitter_us = 0;
    int64_t kernel_reverse = 1;
    int64_t patience_ms = 40000;
    int64_t report_races = 1;
    int64_t report_spinning = 1;

    bool set(const std::string& setting, int64_t value);
    bool set(const std::string& setting, const std::string& value);
};

enum : int64_t { SYMBOL_PRESENT = 0, SYMBOL_MISSING = 1, SYMBOL_UNSUPPORTED = 2 };
enum : int64_t { BATCH_REVERSED = 0, BATCH_GIVEN = 1, BATCH_SHUFFLED = 2 };

}  // namespace standin
