#include "kernels.hpp"
#include "parallel.hpp"

namespace layercache::cpu {

namespace {

// What may be missing, after what is always there, in one list.
Views listed(Views views, const std::optional<View>& gate, const std::optional<View>& residual) {
    if (gate) views.push_back(*gate);
    if (residual) views.push_back(*residual);
    return views;
}

// The chunk of a tensor that has one row per entry of the batch.
Chunk of_batch(const Chunk& chunk, std::int64_t rows) { return {chunk.row / rows, chunk.column, chunk.size}; }

// Writes the chunk that `compute(to, dtype)` gives: as it is, or by way of fp32.
template <class Compute>
void write(const Loops& loops, const View& view, Dtype dtype, const Chunk& chunk, bool streamed, Compute&& compute) {
    if (view.dtype == dtype) {
        Target target(loops, view, chunk, streamed);
        compute(target.memory());
        return target.done();
    }
    Buffer result;
    compute(static_cast<void*>(result.values));
    loops.store(result.values, chunk.at(view), view.dtype, chunk.size);
}

}  // namespace

void router_lerp(const View& fresh, const View& cached, const std::vector<float>& beta, const std::optional<View>& gate,
                 const std::optional<View>& residual, const View& out, int threads) {
    const Loops& loops = active();
    const Dtype dtype = common_dtype(listed({fresh, cached, out}, gate, residual));
    Views views{fresh, cached, out};
    if (residual) views.push_back(*residual);
    if (!gate && beta.size() == 1) flatten(views);
    const std::int64_t rows = std::max<std::int64_t>(views[0].rows, 1);
    const bool streamed = goes_past_caches(views[2], {});
    for_chunks(Space(views[0]), threads, [&](const Chunk& chunk, int) {
        Buffer f, c, g, r;
        const Chunk entry = of_batch(chunk, rows);
        const void* gates = gate ? read_as(loops, *gate, dtype, entry, g) : nullptr;
        const void* added = residual ? read_as(loops, views[3], dtype, chunk, r) : nullptr;
        const float weight = beta[beta.size() > 1 ? entry.row : 0];
        write(loops, views[2], dtype, chunk, streamed, [&](void* to) {
            loops.lerp(read_as(loops, views[0], dtype, chunk, f), read_as(loops, views[1], dtype, chunk, c), weight,
                       gates, added, to, dtype, chunk.size);
        });
    });
}

Sums router_lerp_backward(const View& grad, const View& fresh, const View& cached, const std::vector<float>& beta,
                          const std::optional<View>& gate, const View& grad_fresh, int threads) {
    const Loops& loops = active();
    const Dtype dtype = common_dtype(listed({grad, fresh, cached, grad_fresh}, gate, std::nullopt));
    const std::int64_t samples = static_cast<std::int64_t>(beta.size());
    Sums sums;
    for (std::int64_t b = 0; b < samples; ++b) {
        Views views{grad, fresh, cached, grad_fresh};
        std::optional<View> own = gate;
        if (samples > 1) {
            for (View& view : views) view = view.sample(b);
            if (gate) own = gate->sample(b);
        }
        if (!gate) flatten(views);
        const std::int64_t rows = std::max<std::int64_t>(views[0].rows, 1);
        Partials partials(1);
        const bool streamed = goes_past_caches(views[3], {});
        for_chunks(Space(views[0]), threads, [&](const Chunk& chunk, int part) {
            Buffer d, f, c, g;
            const void* gates = own ? read_as(loops, *own, dtype, of_batch(chunk, rows), g) : nullptr;
            write(loops, views[3], dtype, chunk, streamed, [&](void* to) {
                *partials.part(part) += loops.lerp_backward(
                    read_as(loops, views[0], dtype, chunk, d), read_as(loops, views[1], dtype, chunk, f),
                    read_as(loops, views[2], dtype, chunk, c), beta[b], gates, to, dtype, chunk.size);
            });
        });
        sums.push_back(partials.sum()[0]);
    }
    return sums;
}

}  // namespace layercache::cpu
