// The loops for processors with AVX512.
#include "loops.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

// behind all includes, whose inline functions must not be compiled for this processor alone
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")

namespace layercache::cpu::avx512 {
// g++ reads all of a file before it acts on the pragma, so that __FMA__ and __F16C__ are not defined
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
#endif
