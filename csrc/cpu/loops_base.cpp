// The loops for any processor, and the choice among what was compiled.
#include "loops.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

namespace layercache::cpu {

namespace base {
constexpr const char* NAME = "base";
#include "loops.inl"
}  // namespace base

#if defined(__x86_64__) && defined(__GNUC__)
namespace avx2 {
extern const Loops* const table_of;
}
namespace avx512 {
extern const Loops* const table_of;
}
#endif

const Loops* loops(const char* name) {
    const std::string wanted = name == nullptr ? "" : name;
#if defined(__x86_64__) && defined(__GNUC__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (has_avx512 && (wanted.empty() || wanted == "avx512")) return avx512::table_of;
    if (has_avx2 && (wanted.empty() || wanted == "avx2")) return avx2::table_of;
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
