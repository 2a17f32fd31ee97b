#include "memory.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace standin {

bool Memory::overlaps(Address base, uint64_t size) const {
    const auto next = ranges_.lower_bound(base + size);
    return next != ranges_.begin() && std::prev(next)->second.end() > base;
}

const Range* Memory::at(Address base) const {
    const auto found = ranges_.find(base);
    return found == ranges_.end() ? nullptr : &found->second;
}

const Range* Memory::around(Address address) const {
    const auto next = ranges_.upper_bound(address);
    if (next == ranges_.begin()) return nullptr;
    const Range& range = std::prev(next)->second;
    return address < range.end() ? &range : nullptr;
}

Place Memory::place(Address address, uint64_t size) const {
    if (const Range* const range = around(address)) {
        if (address + size <= range->end()) return range->kind == Kind::DEVICE ? Place::DEVICE : Place::PINNED;
        return around(range->end()) ? Place::STRADDLES : Place::OUTSIDE;
    }
    return overlaps(address, size) ? Place::STRADDLES : Place::PAGEABLE;
}

bool Memory::accessible(Address address, uint64_t size) const {
    const Address end = address + size;
    while (address < end) {
        const Range* const range = around(address);
        if (!range) return false;
        address = range->end();
    }
    return true;
}

uint64_t Memory::bytes_of(Kind kind) const {
    uint64_t bytes = 0;
    for (const auto& entry : ranges_) bytes += entry.second.kind == kind ? entry.second.size : 0;
    return bytes;
}

void Memory::clear() {
    for (const auto& entry : ranges_) give_back(entry.second);
    ranges_.clear();
}

bool allocate(uint64_t size, Range& range) {
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    const uint64_t inner = (size + page - 1) / page * page;
    void* const mapping = mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return false;
    char* const base = static_cast<char*>(mapping) + page;
    mprotect(base, inner, PROT_READ | PROT_WRITE);
    memset(base, 0xA5, std::min<uint64_t>(size, 64 << 20));
    range.base = reinterpret_cast<Address>(base);
    range.size = size;
    range.mapping = mapping;
    range.mapping_size = inner + 2 * page;
    return true;
}

void give_back(const Range& range) {
    if (range.mapping) munmap(range.mapping, range.mapping_size);
}

namespace {

// What mincore says of each page; empty where some are not mapped.
std::vector<unsigned char> residency(Address address, uint64_t size) {
    const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    const Address first = address / page * page;
    std::vector<unsigned char> pages((address + size - first + page - 1) / page);
    if (mincore(reinterpret_cast<void*>(first), address + size - first, pages.data()) != 0) pages.clear();
    return pages;
}

}  // namespace

bool is_mapped(Address address, uint64_t size) { return !residency(address, size).empty(); }

bool is_populated(Address address, uint64_t size) {
    const auto pages = residency(address, size);
    return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
}

bool Spans::settle() {
    std::sort(pieces_.begin(), pieces_.end());
    bool overlapped = false;
    std::vector<std::pair<Address, Address>> merged;
    for (const auto& piece : pieces_) {
        if (!merged.empty() && piece.first < merged.back().second) overlapped = true;
        if (!merged.empty() && piece.first <= merged.back().second) {
            merged.back().second = std::max(merged.back().second, piece.second);
        } else {
            merged.push_back(piece);
        }
    }
    pieces_ = std::move(merged);
    return overlapped;
}

bool Spans::overlaps(const Spans& other) const {
    size_t mine = 0, theirs = 0;
    while (mine < pieces_.size() && theirs < other.pieces_.size()) {
        const auto &a = pieces_[mine], &b = other.pieces_[theirs];
        if (a.second <= b.first) {
            ++mine;
        } else if (b.second <= a.first) {
            ++theirs;
        } else {
            return true;
        }
    }
    return false;
}

bool Spans::overlaps(Address address, uint64_t size) const {
    Spans other;
    other.add(address, size);
    return overlaps(other);
}

}  // namespace standin
