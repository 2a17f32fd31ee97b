// What may be loaded as a module: fatbins, cubins and PTX.
#pragma once
#include "abi.h"

namespace standin {

// SUCCESS; INVALID_IMAGE if it is none of these; NO_BINARY_FOR_GPU if nothing in it runs on this capability (10 * major + minor).
Result check_image(const void* image, int capability);

}  // namespace standin
