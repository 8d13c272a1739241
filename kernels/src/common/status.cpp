#include "common/status.h"

#include <cstdarg>
#include <cstdio>

namespace streamo {
namespace {
thread_local char sentence[320];
}

streamo_status refuse(streamo_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  return status;
}

void clear_error() { sentence[0] = '\0'; }

}  // namespace streamo

extern "C" const char* streamo_last_error(void) { return streamo::sentence; }
extern "C" int32_t streamo_abi_version(void) { return STREAMO_KERNELS_ABI; }
