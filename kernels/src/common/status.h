// How a refusal is said: a code for the caller, a sentence for people.
#pragma once

#include "streamo_kernels.h"

namespace streamo {

// Sets this thread's sentence (printf format) and returns `status`.
streamo_status refuse(streamo_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Forgets this thread's sentence; every public function starts with it.
void clear_error();

}  // namespace streamo
