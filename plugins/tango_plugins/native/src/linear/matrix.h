// Checks of a matrix that a caller gives.
#pragma once

#include "tango/linear.h"

namespace tango {

// Rejects pointers, a format and blocks that no kernel reads; the message names the argument.
int check_matrix(const char* name, const TangoMatrix& matrix);

}  // namespace tango
