#include "kernels.hpp"
#include "parallel.hpp"

namespace layercache::cpu {

// Elements whose sums are added up in fp32, where they can be read in place.
constexpr std::int64_t LONG = 4 * CHUNK;
// Terms that the loops take in registers.
constexpr int MAX_TERMS = 8;

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
            for_chunks(Space(views[0], uniform(views) ? LONG : CHUNK), threads, [&](const Chunk& chunk, int part) {
                Buffer* buffers = scratch(2);
                loops.pair_sums(read_as(loops, views[0], dtype, chunk, buffers[0]),
                                read_as(loops, views[1], dtype, chunk, buffers[1]), dtype, chunk.size,
                                partials.part(part));
            });
            Sums found = partials.sum();
            found[7] = partials.maximum(7);
            sums.insert(sums.end(), found.begin(), found.end());
        }
    }
    return sums;
}

namespace {

// A coefficient set: the terms that count, and last the target with coefficient -1.
struct Set {
    std::vector<int> terms;
    std::vector<float> coefficients;
};

std::vector<Set> sets_of(const std::vector<float>& coefficients, int count) {
    std::vector<Set> sets(coefficients.size() / count);
    for (std::size_t s = 0; s < sets.size(); ++s) {
        for (int k = 0; k < count; ++k)
            if (const float c = coefficients[s * count + k]; c != 0) {
                sets[s].terms.push_back(k);
                sets[s].coefficients.push_back(c);
            }
        sets[s].terms.push_back(count);
        sets[s].coefficients.push_back(-1.0f);
    }
    return sets;
}

// How many sets from one on are a pair of terms with the same first one; at least 1.
std::size_t pairs_from(const std::vector<Set>& sets, std::size_t first) {
    std::size_t count = 1;
    while (first + count < sets.size() && count < MOST_PAIRINGS && sets[first].terms.size() == 3 &&
           sets[first + count].terms.size() == 3 && sets[first + count].terms[0] == sets[first].terms[0])
        ++count;
    return count;
}

// Norms of a set with more terms than the loops take in registers.
void many_terms(const Loops& loops, const Set& set, const std::vector<View>& views, const Chunk& chunk, double* sums) {
    Buffer total, spare;
    std::fill(total.values, total.values + chunk.size, 0.0f);
    for (std::size_t t = 0; t < set.terms.size(); ++t)
        loops.add_scaled(read(loops, views[set.terms[t]], chunk, spare), set.coefficients[t], total.values, chunk.size);
    const float one = 1.0f;
    const void* all = total.values;
    loops.norms(&all, &one, 1, Dtype::float32, chunk.size, sums);
}

}  // namespace

Sums combination_error(const View& target, const Views& terms, const std::vector<float>& coefficients, int threads) {
    const Loops& loops = active();
    const int count = static_cast<int>(terms.size());
    const std::vector<Set> sets = sets_of(coefficients, count);
    Views views = terms;
    views.push_back(target);
    flatten(views);
    const Dtype dtype = common_dtype(views);
    Partials partials(2 * static_cast<int>(sets.size()) + 2);
    // a chunk of all tensors stays in the first cache while the sets go over it, and the next one comes
    for_chunks(Space(views.back()), threads, [&](const Chunk& chunk, int part) {
        double* sums = partials.part(part);
        Buffer* buffers = scratch(views.size());
        thread_local std::vector<const void*> x;
        x.resize(views.size());
        const void* own[MAX_TERMS];
        for (std::size_t k = 0; k < views.size(); ++k) x[k] = read_as(loops, views[k], dtype, chunk, buffers[k]);
        for (std::size_t s = 0, next = 0; s < sets.size(); s = next) {
            next = s + pairs_from(sets, s);
            if (sets[s].terms.size() == 3) {
                Pairing pairings[MOST_PAIRINGS];
                for (std::size_t k = s; k < next; ++k)
                    pairings[k - s] = {x[sets[k].terms[1]], sets[k].coefficients[0], sets[k].coefficients[1],
                                       sums + 2 * k};
                loops.errors(x[count], x[sets[s].terms[0]], pairings, static_cast<int>(next - s), dtype, chunk.size);
                continue;
            }
            const int terms_of = static_cast<int>(sets[s].terms.size());
            if (terms_of > MAX_TERMS) {
                many_terms(loops, sets[s], views, chunk, sums + 2 * s);
                continue;
            }
            for (int t = 0; t < terms_of; ++t) own[t] = x[sets[s].terms[t]];
            loops.norms(own, sets[s].coefficients.data(), terms_of, dtype, chunk.size, sums + 2 * s);
        }
        const float one = 1.0f;
        loops.norms(&x[count], &one, 1, dtype, chunk.size, sums + 2 * sets.size());
    });
    const Sums found = partials.sum();
    Sums sums;
    for (std::size_t s = 0; s < sets.size(); ++s)
        sums.insert(sums.end(), {found[2 * s], found[2 * s + 1], found[2 * sets.size()], found[2 * sets.size() + 1]});
    return sums;
}

Sums gram(const Views& tensors, int threads) {
    const Loops& loops = active();
    const int n = static_cast<int>(tensors.size());
    Views views = tensors;
    flatten(views);
    const Dtype dtype = common_dtype(views);
    Partials partials(n * n);
    for_chunks(Space(views[0]), threads, [&](const Chunk& chunk, int part) {
        Buffer* buffers = scratch(n);
        thread_local std::vector<const void*> x;
        x.resize(n);
        for (int k = 0; k < n; ++k) x[k] = read_as(loops, views[k], dtype, chunk, buffers[k]);
        for (int i = 0; i < n; ++i)
            loops.products(x[i], &x[i], n - i, dtype, chunk.size, partials.part(part) + i * n + i);
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
        const void* x[MAX_TERMS];
        for (int k = 0; k < count; ++k) x[k] = read_as(loops, views[k], dtype, chunk, buffers[k]);
        for (int m = 0; m < outputs; ++m) {
            const void* terms[MAX_TERMS];
            float coefficients[MAX_TERMS];
            int used = 0;
            for (int k = 0; k < count; ++k)
                if (map.used[m * count + k]) {
                    terms[used] = x[k];
                    coefficients[used++] = map.coefficients[m * count + k];
                }
            loops.norms(terms, coefficients, used, dtype, chunk.size, partials.part(part) + 2 * m);
        }
    });
    return partials.sum();
}

}  // namespace layercache::cpu
