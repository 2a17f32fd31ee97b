// Beginning and ending captures, for the API and for the control.
#pragma once
#include "call.h"

namespace standin {

Result begin_capture(const std::shared_ptr<Stream>& stream, int mode);
Result end_capture(Handle stream);

}  // namespace standin
