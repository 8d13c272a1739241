// Owns which instruction set is in use, and asks the CPU and the operating system which ones may be.
#include "common/instruction_set.h"

#include <atomic>
#include <cstring>

#include "common/status.h"
#include "streamo_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace streamo {
namespace {

struct Name {
  InstructionSet set;
  const char* text;
};

// Best first.
constexpr Name kNames[] = {{InstructionSet::avx512vnni, "avx512vnni"},
                           {InstructionSet::avx2, "avx2"},
                           {InstructionSet::i8mm, "i8mm"},
                           {InstructionSet::dotprod, "dotprod"},
                           {InstructionSet::portable, "portable"}};

struct Features {
  bool avx2 = false, avx512vnni = false, dotprod = false, i8mm = false;
};

#if defined(__x86_64__)

constexpr bool has(unsigned value, unsigned bit) { return ((value >> bit) & 1U) != 0; }

// Which registers the operating system saves; a CPU's flag is worth nothing without it.
unsigned saved_state() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

Features detect() {
  constexpr unsigned kAvxState = 0x6, kAvx512State = 0xe6;
  Features found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return found;
  const bool fma = has(c, 12), osxsave = has(c, 27), f16c = has(c, 29);
  if (!osxsave || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return found;
  const unsigned saved = saved_state();
  found.avx2 = (saved & kAvxState) == kAvxState && has(b, 5) && fma && f16c;
  const bool foundation = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);  // F, DQ, BW, VL
  found.avx512vnni = found.avx2 && (saved & kAvx512State) == kAvx512State && foundation && has(c, 11);
  return found;
}

#elif defined(__aarch64__) && defined(__linux__)

Features detect() {
  constexpr unsigned long kDotProduct = 1UL << 20, kInt8MatrixMultiply = 1UL << 13;
  Features found;
  found.dotprod = (getauxval(AT_HWCAP) & kDotProduct) != 0;
  found.i8mm = found.dotprod && (getauxval(AT_HWCAP2) & kInt8MatrixMultiply) != 0;
  return found;
}

#else

Features detect() { return {}; }

#endif

bool available(InstructionSet set) {
  static const Features features = detect();
  switch (set) {
    case InstructionSet::avx512vnni: return features.avx512vnni;
    case InstructionSet::avx2: return features.avx2;
    case InstructionSet::i8mm: return features.i8mm;
    case InstructionSet::dotprod: return features.dotprod;
    case InstructionSet::portable: return true;
  }
  return false;
}

InstructionSet best() {
  for (const Name& name : kNames) {
    if (available(name.set)) return name.set;
  }
  return InstructionSet::portable;
}

std::atomic<InstructionSet>& current() {
  static std::atomic<InstructionSet> chosen{best()};
  return chosen;
}

const char* text_of(InstructionSet set) {
  for (const Name& name : kNames) {
    if (name.set == set) return name.text;
  }
  return "portable";
}

const Name* find(const char* text) {
  for (const Name& name : kNames) {
    if (text != nullptr && std::strcmp(name.text, text) == 0) return &name;
  }
  return nullptr;
}

}  // namespace

InstructionSet instruction_set() { return current().load(std::memory_order_relaxed); }

}  // namespace streamo

extern "C" const char* streamo_instruction_set(void) {
  streamo::clear_error();
  return streamo::text_of(streamo::instruction_set());
}

extern "C" int32_t streamo_instruction_set_available(const char* name) {
  streamo::clear_error();
  const streamo::Name* found = streamo::find(name);
  return found != nullptr && streamo::available(found->set) ? 1 : 0;
}

extern "C" streamo_status streamo_select_instruction_set(const char* name) {
  streamo::clear_error();
  if (name == nullptr) {
    streamo::current().store(streamo::best());
    return STREAMO_OK;
  }
  const streamo::Name* found = streamo::find(name);
  if (found == nullptr) {
    return streamo::refuse(STREAMO_UNSUPPORTED,
                           "instruction set: expected avx512vnni, avx2, i8mm, dotprod or portable, found '%.40s'",
                           name);
  }
  if (!streamo::available(found->set)) {
    return streamo::refuse(STREAMO_UNSUPPORTED, "instruction set: this CPU does not have %s, at best %s", found->text,
                           streamo::text_of(streamo::best()));
  }
  streamo::current().store(found->set);
  return STREAMO_OK;
}
