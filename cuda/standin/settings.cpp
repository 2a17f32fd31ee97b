#include "settings.h"

#include <map>

namespace standin {

bool Settings::set(const std::string& setting, int64_t value) {
    static const std::map<std::string, int64_t Settings::*> known = {
        {"driver_version", &Settings::driver_version},
        {"devices", &Settings::devices},
        {"init_error", &Settings::init_error},
        {"initialized", &Settings::initialized},
        {"primary_retained", &Settings::primary_retained},
        {"capability_major", &Settings::capability_major},
        {"capability_minor", &Settings::capability_minor},
        {"total_memory_bytes", &Settings::total_memory_bytes},
        {"host_numa_id", &Settings::host_numa_id},
        {"multiprocessors", &Settings::multiprocessors},
        {"copy_engines", &Settings::copy_engines},
        {"host_pointer_usable", &Settings::host_pointer_usable},
        {"host_register_supported", &Settings::host_register_supported},
        {"pageable_access", &Settings::pageable_access},
        {"register_limit_bytes", &Settings::register_limit_bytes},
        {"register_total_bytes", &Settings::register_total_bytes},
        {"register_error", &Settings::register_error},
        {"register_needs_populated", &Settings::register_needs_populated},
        {"register_ms_per_gib", &Settings::register_ms_per_gib},
        {"batch_12080", &Settings::batch_12080},
        {"batch_13000", &Settings::batch_13000},
        {"batch_limit", &Settings::batch_limit},
        {"batch_order", &Settings::batch_order},
        {"seed", &Settings::seed},
        {"jitter_us", &Settings::jitter_us},
        {"kernel_reverse", &Settings::kernel_reverse},
        {"patience_ms", &Settings::patience_ms},
        {"report_races", &Settings::report_races},
        {"report_spinning", &Settings::report_spinning},
    };
    const auto found = known.find(setting);
    if (found == known.end()) return false;
    this->*found->second = value;
    return true;
}

bool Settings::set(const std::string& setting, const std::string& value) {
    if (setting == "name") {
        name = value;
    } else if (setting == "pci_bus_id") {
        pci_bus_id = value;
    } else {
        return false;
    }
    return true;
}

}  // namespace standin
