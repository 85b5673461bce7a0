// The loops for processors with AVX512.
#include "loops.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef HAS_X86_LOOPS
#include <immintrin.h>

#ifdef __clang__  // which takes the widest vectors anyway
TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2")
#else
TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif

namespace layercache::cpu::avx512 {
// neither compiler acts on the pragma while it reads the file, so that __FMA__ and __F16C__ are not defined
#define HAS_FMA_AND_F16C
constexpr const char* NAME = "avx512";
#define VECTOR_BYTES 64
inline void stream_vector(const char* from, char* to) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#include "loops.inl"
extern const Loops* const table_of;
const Loops* const table_of = &table;
}  // namespace layercache::cpu::avx512
TARGET_END
#endif
