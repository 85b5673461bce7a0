#include "kernels.hpp"
#include "parallel.hpp"

namespace layercache::cpu {

// Elements that a set of combination_error works on at a time.
constexpr std::int64_t PIECE = 512;

Sums pair_statistics(const Views& a, const Views& b, std::int64_t samples, int threads) {
    const Loops& loops = active();
    Sums sums;
    for (std::size_t s = 0; s < a.size(); ++s) {
        for (std::int64_t index = 0; index < samples; ++index) {
            Views views{a[s], b[s]};
            if (samples > 1)
                for (View& view : views) view = view.sample(index);
            flatten(views);
            Partials partials(PAIR_STATISTICS);
            const Dtype dtype = common_dtype(views);
            for_chunks(Space(views[0]), threads, [&](const Chunk& chunk, int part) {
                Buffer x, y;
                loops.pair_sums(read_as(loops, views[0], dtype, chunk, x), read_as(loops, views[1], dtype, chunk, y),
                                dtype, chunk.size, partials.part(part));
            });
            Sums found = partials.sum();
            found[7] = partials.maximum(7);
            sums.insert(sums.end(), found.begin(), found.end());
        }
    }
    return sums;
}

Sums combination_error(const View& target, const Views& terms, const std::vector<float>& coefficients, int threads) {
    const Loops& loops = active();
    const int count = static_cast<int>(terms.size()), sets = static_cast<int>(coefficients.size()) / count;
    Views views = terms;
    views.push_back(target);
    flatten(views);
    // of each set only the terms that count
    std::vector<std::vector<int>> index(sets);
    std::vector<std::vector<float>> used(sets);
    for (int s = 0; s < sets; ++s)
        for (int k = 0; k < count; ++k)
            if (const float c = coefficients[s * count + k]; c != 0) {
                index[s].push_back(k);
                used[s].push_back(c);
            }
    Partials partials(2 * sets + 2);
    for_chunks(Space(views.back()), threads, [&](const Chunk& chunk, int part) {
        Buffer* buffers = scratch(views.size());
        std::vector<const float*> x(views.size()), p;
        for (std::size_t k = 0; k < views.size(); ++k) x[k] = read(loops, views[k], chunk, buffers[k]);
        double* sums = partials.part(part);
        // a piece of all tensors stays in the first cache while the sets go over it
        for (std::int64_t first = 0; first < chunk.size; first += PIECE)
            for (int s = 0; s < sets; ++s) {
                p.clear();
                for (int k : index[s]) p.push_back(x[k] + first);
                loops.error_norms(p.data(), used[s].data(), static_cast<int>(p.size()), x[count] + first,
                                  std::min(PIECE, chunk.size - first), sums + 2 * s);
            }
        const float one = 1.0f;
        const void* goal = x[count];
        loops.norms(&goal, &one, 1, Dtype::float32, chunk.size, sums + 2 * sets);
    });
    const Sums found = partials.sum();
    Sums sums;
    for (int s = 0; s < sets; ++s)
        sums.insert(sums.end(), {found[2 * s], found[2 * s + 1], found[2 * sets], found[2 * sets + 1]});
    return sums;
}

Sums gram(const Views& tensors, int threads) {
    const Loops& loops = active();
    const int n = static_cast<int>(tensors.size());
    Views views = tensors;
    flatten(views);
    Partials partials(n * n);
    for_chunks(Space(views[0]), threads, [&](const Chunk& chunk, int part) {
        Buffer* buffers = scratch(n);
        std::vector<const float*> x(n);
        for (int k = 0; k < n; ++k) x[k] = read(loops, views[k], chunk, buffers[k]);
        double* sums = partials.part(part);
        for (int i = 0; i < n; ++i)
            for (int j = i; j < n; ++j) sums[i * n + j] += loops.dot(x[i], x[j], chunk.size);
    });
    Sums sums = partials.sum();
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < i; ++j) sums[i * n + j] = sums[j * n + i];
    return sums;
}

Sums linear_sums(const Views& tensors, const Map& map, int outputs, int threads) {
    const Loops& loops = active();
    const int count = static_cast<int>(tensors.size());
    Views views = tensors;
    flatten(views);
    const Dtype dtype = common_dtype(views);
    Partials partials(2 * outputs);
    for_chunks(Space(views[0]), threads, [&](const Chunk& chunk, int part) {
        Buffer* buffers = scratch(count);
        std::vector<const void*> x(count), terms;
        std::vector<float> coefficients;
        for (int k = 0; k < count; ++k)
            x[k] = read_as(loops, views[k], dtype, chunk, buffers[k]);
        for (int m = 0; m < outputs; ++m) {
            terms.clear();
            coefficients.clear();
            for (int k = 0; k < count; ++k)
                if (map.used[m * count + k]) {
                    terms.push_back(x[k]);
                    coefficients.push_back(map.coefficients[m * count + k]);
                }
            loops.norms(terms.data(), coefficients.data(), static_cast<int>(terms.size()), dtype, chunk.size,
                        partials.part(part) + 2 * m);
        }
    });
    return partials.sum();
}

}  // namespace layercache::cpu
