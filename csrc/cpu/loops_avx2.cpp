// The loops for processors with AVX2.
#include "loops.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef HAS_X86_LOOPS
#include <immintrin.h>

TARGET_BEGIN("avx2,fma,f16c,bmi,bmi2")

namespace layercache::cpu::avx2 {
// neither compiler acts on the pragma while it reads the file, so that __FMA__ and __F16C__ are not defined
#define HAS_FMA_AND_F16C
constexpr const char* NAME = "avx2";
#define VECTOR_BYTES 32
inline void stream_vector(const char* from, char* to) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#include "loops.inl"
extern const Loops* const table_of;
const Loops* const table_of = &table;
}  // namespace layercache::cpu::avx2
TARGET_END
#endif
