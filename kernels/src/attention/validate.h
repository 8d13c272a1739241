// Refusal of arguments that do not fit, before anything is written.
#pragma once

#include "streamo_kernels.h"

namespace streamo {

// STREAMO_OK, or a status whose sentence streamo_last_error gives. May throw std::bad_alloc.
streamo_status validate(const streamo_attention* arguments);
streamo_status validate(const streamo_window_attention* arguments);

// Parts of the first: sizes, sizes and pointers, and the rows that spans and new_slots name (which are read; their
// count, the capacity and both pointers must have been looked at).
streamo_status validate_sizes(const streamo_attention& arguments);
streamo_status validate_layout(const streamo_attention& arguments);
streamo_status validate_rows(const streamo_attention& arguments);
streamo_status validate(const streamo_threads* threads);

}  // namespace streamo
