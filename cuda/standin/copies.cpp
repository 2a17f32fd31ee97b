#include "copies.h"

#include <string.h>

#include <algorithm>
#include <numeric>

namespace standin {

namespace {

void check_end(Call& call, Place place, Address address, uint64_t size, const char* what) {
    const std::string where = std::string(what) + " " + hex(address) + " + " + std::to_string(size);
    if (place == Place::STRADDLES) call.refuse(Rule::STRADDLES, INVALID_VALUE, where + " lies in more than one registration, or only partly in one");
    if (place == Place::OUTSIDE) call.refuse(Rule::OUTSIDE, INVALID_VALUE, where + " goes on behind its allocation");
}

void* at(Address address) { return reinterpret_cast<void*>(address); }

// The memory that an operation was allowed to touch is still what it was.
bool is_still_there(const char* kind, const std::vector<Copy>& copies, const std::vector<Ends>& before) {
    World& w = world();
    Lock lock(w.mutex);
    for (size_t i = 0; i < copies.size(); ++i) {
        const Copy& copy = copies[i];
        if (w.memory.place(copy.target, copy.size) == before[i].target && w.memory.place(copy.source, copy.size) == before[i].source) continue;
        w.report.violate(Rule::MEMORY_GONE, kind, "memory of copy " + std::to_string(i) + " was freed or unregistered before it ran", thread_id(), 0);
        return false;
    }
    return true;
}

std::vector<size_t> order_of(size_t count, std::mt19937_64& random) {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t{0});
    int64_t wanted;
    {
        Lock lock(world().mutex);
        wanted = world().settings.batch_order;
    }
    if (wanted == BATCH_REVERSED) std::reverse(order.begin(), order.end());
    if (wanted == BATCH_SHUFFLED) std::shuffle(order.begin(), order.end(), random);
    return order;
}

}  // namespace

Ends check_copy(Call& call, const Copy& copy) {
    call.need(copy.target && copy.source, "a copy to or from 0");
    const Memory& memory = world().memory;
    const Ends ends{memory.place(copy.target, copy.size), memory.place(copy.source, copy.size)};
    check_end(call, ends.target, copy.target, copy.size, "the target");
    check_end(call, ends.source, copy.source, copy.size, "the source");
    return ends;
}

OperationPtr copy_operation(const char* kind, std::vector<Copy> copies) {
    const Memory& memory = world().memory;
    const auto operation = std::make_shared<Operation>();
    operation->kind = kind;
    std::vector<Ends> ends;
    std::vector<std::string> read_early(copies.size());
    for (size_t i = 0; i < copies.size(); ++i) {
        const Copy& copy = copies[i];
        operation->reads.add(copy.source, copy.size);
        operation->writes.add(copy.target, copy.size);
        ends.push_back({memory.place(copy.target, copy.size), memory.place(copy.source, copy.size)});
        if (copy.order != ORDER_STREAM) read_early[i].assign(static_cast<const char*>(at(copy.source)), copy.size);
    }
    operation->reads.settle();
    operation->writes.settle();
    operation->run = [kind, copies = std::move(copies), ends = std::move(ends), early = std::move(read_early)](Stream& stream) -> Result {
        if (!is_still_there(kind, copies, ends)) return ILLEGAL_ADDRESS;
        uint64_t made = 0;
        for (const size_t i : order_of(copies.size(), stream.random())) {
            if (!stream.may_go_on(made, copies.size())) return SUCCESS;  // the stream knows why
            const Copy& copy = copies[i];
            if (copy.order == ORDER_STREAM) {
                memmove(at(copy.target), at(copy.source), copy.size);
            } else {
                if (copy.order == ORDER_ANY && memcmp(early[i].data(), at(copy.source), copy.size) != 0) {
                    World& w = world();
                    Lock lock(w.mutex);
                    w.report.violate(Rule::SOURCE_CHANGED, kind, "the source of copy " + std::to_string(i) + " changed between the call and its turn",
                                     thread_id(), 0);
                }
                memcpy(at(copy.target), early[i].data(), copy.size);
            }
            ++made;
        }
        return SUCCESS;
    };
    return operation;
}

OperationPtr set_operation(const char* kind, Address target, std::string content) {
    const Place place = world().memory.place(target, content.size());
    const auto operation = std::make_shared<Operation>();
    operation->kind = kind;
    operation->writes.add(target, content.size());
    operation->writes.settle();
    operation->run = [kind, target, place, content = std::move(content)](Stream& stream) -> Result {
        {
            World& w = world();
            Lock lock(w.mutex);
            if (w.memory.place(target, content.size()) != place) {
                w.report.violate(Rule::MEMORY_GONE, kind, hex(target) + " was freed before it was written", thread_id(), 0);
                return ILLEGAL_ADDRESS;
            }
        }
        if (!stream.may_go_on(0, 1)) return SUCCESS;
        memcpy(at(target), content.data(), content.size());
        return SUCCESS;
    };
    return operation;
}

}  // namespace standin
