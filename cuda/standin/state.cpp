// What there is, as JSON: streams, what was not given back, the rules.
#include <stdlib.h>
#include <string.h>

#include "stream.h"

namespace standin {

namespace {

std::string streams() {
    Members list;
    for (const auto& stream : world().all_streams()) {
        Members kinds, one;
        for (const OperationPtr& operation : stream->pending()) kinds.raw(quoted(operation->kind));
        one.add("handle", stream->handle).add("flags", stream->flags).add("priority", stream->priority);
        one.add("is_control", stream->is_control).add("is_held", stream->is_held()).add("is_paused", stream->is_paused());
        one.add("pending", uint64_t{stream->pending().size()}).add("executed", stream->executed()).raw("kinds", kinds.list());
        list.raw(one.object());
    }
    return list.list();
}

void add_live(Members& list, const char* kind, Handle handle, uint64_t call) {
    if (world().abandoned.count(handle)) return;
    Members one;
    one.add("kind", kind).add("handle", handle).add("call", call);
    list.raw(one.object());
}

std::string live() {
    const World& w = world();
    Members list;
    for (const auto& entry : w.streams) {
        if (!entry.second->is_control) add_live(list, "stream", entry.first, entry.second->call);
    }
    for (const auto& entry : w.events) add_live(list, "event", entry.first, entry.second->call);
    for (const auto& entry : w.memory.all()) {
        const Range& range = entry.second;
        if (range.is_control) continue;
        const char* const kind = range.kind == Kind::DEVICE ? "device memory" : range.kind == Kind::PINNED ? "host memory" : "registration";
        add_live(list, kind, range.base, range.call);
    }
    for (const auto& entry : w.modules) add_live(list, entry.second.kind, entry.first, entry.second.call);
    for (const auto& entry : w.graphs) add_live(list, "graph", entry.first, entry.second);
    for (const auto& entry : w.contexts) {
        for (uint64_t i = 0; i < entry.second->retains; ++i) add_live(list, "primary context", entry.second->handle, entry.second->call);
    }
    return list.list();
}

std::string rules() {
    Members all;
#define STANDIN_RULE(name, text, says) all.add(text, says);
    STANDIN_RULES(STANDIN_RULE)
#undef STANDIN_RULE
    return all.object();
}

}  // namespace

}  // namespace standin

// To be given back by standin_free. Null: it knows no such thing.
STANDIN_EXPORT char* standin_report(const char* what) {
    using namespace standin;
    Lock lock(world().mutex);
    const std::string wanted = what;
    const Report& report = world().report;
    if (wanted == "streams") return strdup(streams().c_str());
    if (wanted == "live") return strdup(live().c_str());
    if (wanted == "rules") return strdup(rules().c_str());
    if (wanted == "calls") return strdup(report.calls().c_str());
    if (wanted == "functions") return strdup(report.functions().c_str());
    if (wanted == "violations") return strdup(report.violations().c_str());
    return nullptr;
}

STANDIN_EXPORT void standin_free(char* text) { free(text); }
