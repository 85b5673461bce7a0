#include "kernels.hpp"
#include "parallel.hpp"

namespace layercache::cpu {

namespace {

// A chunk of a tensor that has one row per entry of the batch.
const float* read_gate(const Loops& loops, const View& gate, std::int64_t rows, const Chunk& chunk, Buffer& buffer) {
    return read(loops, gate, Chunk{chunk.row / rows, chunk.column, chunk.size}, buffer);
}

}  // namespace

void router_lerp(const View& fresh, const View& cached, const std::vector<float>& beta, const std::optional<View>& gate,
                 const std::optional<View>& residual, const View& out, int threads) {
    const Loops& loops = active();
    Views views{fresh, cached, out};
    const bool plain = !gate && !residual && uniform(views);
    if (plain && beta.size() == 1) flatten(views);
    const std::int64_t rows = views[0].rows;
    for_chunks(Space(views[0]), threads, [&](const Chunk& chunk, int) {
        const float weight = beta[beta.size() > 1 ? chunk.row / rows : 0];
        if (plain) {
            loops.lerp(chunk.at(views[0]), chunk.at(views[1]), weight, chunk.at(views[2]), views[0].dtype, chunk.size);
            return;
        }
        Buffer f, c, o, spare;
        loops.lerp(read(loops, fresh, chunk, f), read(loops, cached, chunk, c), weight, o.values, Dtype::float32,
                   chunk.size);
        if (gate) loops.product(read_gate(loops, *gate, rows, chunk, spare), o.values, chunk.size);
        if (residual) loops.add_scaled(read(loops, *residual, chunk, spare), 1.0f, o.values, chunk.size);
        loops.store(o.values, chunk.at(out), out.dtype, chunk.size);
    });
}

Sums router_lerp_backward(const View& grad, const View& fresh, const View& cached, const std::vector<float>& beta,
                          const std::optional<View>& gate, const View& grad_fresh, int threads) {
    const Loops& loops = active();
    const std::int64_t samples = static_cast<std::int64_t>(beta.size());
    Sums sums;
    for (std::int64_t b = 0; b < samples; ++b) {
        Views views{grad, fresh, cached, grad_fresh};
        if (samples > 1)
            for (View& view : views) view = view.sample(b);
        if (!gate) flatten(views);
        const std::int64_t rows = views[0].rows;
        Partials partials(1);
        for_chunks(Space(views[0]), threads, [&](const Chunk& chunk, int part) {
            Buffer g, f, c, out, spare;
            const float* inner = read(loops, views[0], chunk, g);
            if (gate) {
                const View own = samples > 1 ? gate->sample(b) : *gate;
                std::copy(inner, inner + chunk.size, out.values);
                loops.product(read_gate(loops, own, rows, chunk, spare), out.values, chunk.size);
                std::copy(out.values, out.values + chunk.size, g.values);
                inner = g.values;
            }
            *partials.part(part) += loops.lerp_backward(inner, read(loops, views[1], chunk, f),
                                                        read(loops, views[2], chunk, c), beta[b], out.values,
                                                        chunk.size);
            loops.store(out.values, chunk.at(views[3]), views[3].dtype, chunk.size);
        });
        sums.push_back(partials.sum()[0]);
    }
    return sums;
}

}  // namespace layercache::cpu
