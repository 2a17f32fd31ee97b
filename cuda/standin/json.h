// Just enough JSON to answer the control.
#pragma once
#include <stdint.h>
#include <stdio.h>

#include <string>

namespace standin {

inline std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            char escaped[8];
            snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
            out += escaped;
        } else {
            out += c;
        }
    }
    return out + '"';
}

// The members of one object, or of one list.
class Members {
  public:
    Members& raw(const std::string& value) {
        if (!text_.empty()) text_ += ',';
        text_ += value;
        return *this;
    }
    Members& raw(const char* name, const std::string& value) { return raw(quoted(name) + ":" + value); }
    Members& add(const char* name, const std::string& value) { return raw(name, quoted(value)); }
    Members& add(const char* name, const char* value) { return raw(name, value ? quoted(value) : "null"); }
    Members& add(const char* name, bool value) { return raw(name, value ? "true" : "false"); }
    Members& add(const char* name, int value) { return raw(name, std::to_string(value)); }
    Members& add(const char* name, unsigned value) { return raw(name, std::to_string(value)); }
    Members& add(const char* name, uint64_t value) { return raw(name, std::to_string(value)); }
    std::string object() const { return "{" + text_ + "}"; }
    std::string list() const { return "[" + text_ + "]"; }

  private:
    std::string text_;
};

template <typename T>
std::string numbers(const T* values, size_t count) {
    std::string out = "[";
    for (size_t i = 0; i < count; ++i) {
        if (i) out += ',';
        out += std::to_string(values[i]);
    }
    return out + "]";
}

}  // namespace standin
