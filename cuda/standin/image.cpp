#include "image.h"

#include <string.h>

#include <algorithm>

namespace standin {

namespace {

constexpr uint32_t FATBIN_MAGIC = 0xBA55ED50, WRAPPER_MAGIC = 0x466243B1;

// As nvcc writes them; read from its output, there is no public description.
struct FatbinHeader {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;  // of all entries, without this header
};
struct EntryHeader {
    uint16_t kind;  // 1: PTX, 2: cubin
    uint16_t version;
    uint32_t header_bytes;
    uint64_t bytes;
    uint32_t compressed_bytes, options_offset;
    uint16_t minor, major;
    uint32_t architecture;  // 10 * major + minor
};
struct Wrapper {
    uint32_t magic, version;
    const void* data;
    void* more;
};

// A cubin runs on its own major capability from its minor on; PTX on everything from its own on.
bool runs(const EntryHeader& entry, int capability) {
    const int made_for = static_cast<int>(entry.architecture);
    if (entry.kind == 1) return made_for <= capability;
    return entry.kind == 2 && made_for / 10 == capability / 10 && made_for % 10 <= capability % 10;
}

Result check_fatbin(const char* image, int capability) {
    FatbinHeader header;
    memcpy(&header, image, sizeof header);
    if (header.version != 1 || header.header_bytes < sizeof header || header.bytes == 0) return INVALID_IMAGE;
    const char *at = image + header.header_bytes, *const end = at + header.bytes;
    bool is_empty = true;
    while (at + sizeof(EntryHeader) <= end) {
        EntryHeader entry;
        memcpy(&entry, at, sizeof entry);
        if ((entry.kind != 1 && entry.kind != 2) || entry.header_bytes < sizeof entry || entry.bytes == 0) return INVALID_IMAGE;
        if (entry.bytes > static_cast<uint64_t>(end - at) - entry.header_bytes) return INVALID_IMAGE;
        if (runs(entry, capability)) return SUCCESS;
        is_empty = false;
        at += entry.header_bytes + entry.bytes;
    }
    return is_empty ? INVALID_IMAGE : NO_BINARY_FOR_GPU;
}

}  // namespace

Result check_image(const void* image, int capability) {
    const char* bytes = static_cast<const char*>(image);
    uint32_t magic = 0;
    // Byte by byte: what is not an image may be as short as its zero.
    for (unsigned i = 0; i < sizeof magic; ++i) {
        magic |= static_cast<uint32_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
        if (bytes[i] == 0) break;
    }
    if (magic == WRAPPER_MAGIC) {
        Wrapper wrapper;
        memcpy(&wrapper, image, sizeof wrapper);
        return check_image(wrapper.data, capability);
    }
    if (magic == FATBIN_MAGIC) return check_fatbin(bytes, capability);
    if (memcmp(&magic, "\x7f" "ELF", sizeof magic) == 0) return SUCCESS;
    if (memcmp(&magic, "//\n/", 4) == 0 || memcmp(&magic, ".ver", 4) == 0) return SUCCESS;
    return INVALID_IMAGE;
}

}  // namespace standin
