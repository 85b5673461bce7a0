#include "parallel.hpp"

#include <atomic>
#include <cmath>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace layercache::cpu {

int threads_for(std::int64_t elements, int threads) {
    return elements < SMALL ? 1 : static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), PARTS));
}

void for_parts(std::int64_t chunks, int threads, const std::function<void(std::int64_t, std::int64_t, int)>& work) {
    const int parts = static_cast<int>(std::min(chunks, PARTS));
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
    for (int part = 0; part < parts; ++part) {
        work(chunks * part / parts, chunks * (part + 1) / parts, part);
        std::atomic_thread_fence(std::memory_order_seq_cst);  // behind what was streamed
    }
    (void)threads;
}

std::int64_t& streamed_from() {
    static std::int64_t bytes = 8 << 20;
    return bytes;
}

double Partials::maximum(int at) const {
    double most = 0;
    for (std::int64_t p = 0; p < PARTS; ++p) {
        const double value = values_[p * count_ + at];
        if (std::isnan(value)) return value;
        most = std::max(most, value);
    }
    return most;
}

}  // namespace layercache::cpu
