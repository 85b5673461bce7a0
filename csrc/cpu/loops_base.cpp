// The loops for any processor, and the choice among what was compiled.
#include "loops.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>

#ifdef HAS_X86_LOOPS
#include <cpuid.h>
#endif

namespace layercache::cpu {

namespace base {
constexpr const char* NAME = "base";
#include "loops.inl"
}  // namespace base

#ifdef HAS_X86_LOOPS
namespace avx2 {
extern const Loops* const table_of;
}
namespace avx512 {
extern const Loops* const table_of;
}

namespace {

struct Has {
    bool avx2 = false, avx512 = false;
};

// Asked of the processor itself: __builtin_cpu_supports needs a start-up routine, and names, that some compilers lack.
Has look() {
    const auto bits = [](unsigned word, std::initializer_list<int> places) {
        return std::all_of(places.begin(), places.end(), [&](int place) { return word >> place & 1; });
    };
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
    if (!bits(c, {12, 27, 28, 29})) return {};  // FMA, OSXSAVE, AVX, F16C
    unsigned saved = 0, upper = 0;  // the registers that the operating system keeps for each thread
    __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
    Has has;
    has.avx2 = bits(saved, {1, 2}) && bits(b, {3, 5, 8});  // SSE and AVX state; BMI, AVX2, BMI2
    // mask registers and both halves of the wide ones; F, DQ, BW, VL
    has.avx512 = has.avx2 && bits(saved, {5, 6, 7}) && bits(b, {16, 17, 30, 31});
    return has;
}

}  // namespace
#endif

const Loops* loops(const char* name) {
    const std::string wanted = name == nullptr ? "" : name;
#ifdef HAS_X86_LOOPS
    static const Has has = look();
    if (has.avx512 && (wanted.empty() || wanted == "avx512")) return avx512::table_of;
    if (has.avx2 && (wanted.empty() || wanted == "avx2")) return avx2::table_of;
#endif
    return wanted.empty() || wanted == "base" ? &base::table : nullptr;
}

static const Loops* chosen = loops();

const Loops& active() { return *chosen; }

bool activate(const char* name) {
    const Loops* found = loops(name);
    if (found != nullptr) chosen = found;
    return found != nullptr;
}

}  // namespace layercache::cpu
