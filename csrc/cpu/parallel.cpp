#include "parallel.hpp"

#include <atomic>
#include <cmath>

#ifdef __linux__
// Of libgomp, whose threads torch uses as well (Intel's and LLVM's runtimes have them too). Called by name and not by
// pragmas, of which clang makes calls that only LLVM's runtime has.
extern "C" {
void GOMP_parallel(void (*work)(void*), void* argument, unsigned threads, unsigned flags);
int omp_get_thread_num();
int omp_get_num_threads();
int omp_get_max_threads();
}
#endif

namespace layercache::cpu {

int most_threads() {
#ifdef __linux__
    return omp_get_max_threads();
#else
    return 1;
#endif
}

int threads_for(std::int64_t elements, int threads) {
    return elements < SMALL ? 1 : static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), PARTS));
}

void for_parts(std::int64_t chunks, int threads, const std::function<void(std::int64_t, std::int64_t, int)>& work) {
    const int parts = static_cast<int>(std::min(chunks, PARTS));
    const auto some = [&](int first, int last) {
        for (int part = first; part < last; ++part) {
            work(chunks * part / parts, chunks * (part + 1) / parts, part);
            std::atomic_thread_fence(std::memory_order_seq_cst);  // behind what was streamed
        }
    };
#ifdef __linux__
    if (threads > 1) {
        auto share = [&] {
            const int thread = omp_get_thread_num(), number = omp_get_num_threads();
            some(parts * thread / number, parts * (thread + 1) / number);
        };
        GOMP_parallel([](void* argument) { (*static_cast<decltype(share)*>(argument))(); }, &share, threads, 0);
        return;
    }
#endif
    (void)threads;
    some(0, parts);
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
