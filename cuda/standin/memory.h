// Which addresses are the device's, pinned, or neither.
#pragma once
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "abi.h"

namespace standin {

enum class Kind { DEVICE, PINNED, REGISTERED };

struct Range {
    Address base = 0;
    uint64_t size = 0;
    Kind kind = Kind::DEVICE;
    Handle context = 0;
    unsigned flags = 0;
    uint64_t call = 0;        // that made it
    bool is_control = false;  // declared by the test
    void* mapping = nullptr;  // what cuMemAlloc and cuMemHostAlloc took, with a guard page on each side
    uint64_t mapping_size = 0;
    Address end() const { return base + size; }
};

enum class Place { DEVICE, PINNED, PAGEABLE, STRADDLES, OUTSIDE };

class Memory {
  public:
    bool overlaps(Address base, uint64_t size) const;
    void add(const Range& range) { ranges_[range.base] = range; }
    bool remove(Address base) { return ranges_.erase(base) == 1; }
    const Range* at(Address base) const;
    const Range* around(Address address) const;
    Place place(Address address, uint64_t size) const;
    // Whether the device can access all of it, in however many ranges.
    bool accessible(Address address, uint64_t size) const;
    const std::map<Address, Range>& all() const { return ranges_; }
    uint64_t bytes_of(Kind kind) const;
    void clear();

  private:
    std::map<Address, Range> ranges_;
};

// Fresh memory with guard pages, full of a pattern: what nobody wrote is not zero.
bool allocate(uint64_t size, Range& range);
void give_back(const Range& range);

bool is_mapped(Address address, uint64_t size);
bool is_populated(Address address, uint64_t size);

// Bytes as sorted, disjoint pieces.
class Spans {
  public:
    void add(Address address, uint64_t size) {
        if (size) pieces_.emplace_back(address, address + size);
    }
    // Sorts and merges; whether two of the pieces overlapped.
    bool settle();
    bool overlaps(const Spans& other) const;
    bool overlaps(Address address, uint64_t size) const;
    bool empty() const { return pieces_.empty(); }

  private:
    std::vector<std::pair<Address, Address>> pieces_;
};

// Where the device sees pinned memory, if it may not use the host's pointers.
constexpr Address ALIAS = Address{1} << 56;

}  // namespace standin
