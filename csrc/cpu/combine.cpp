#include "kernels.hpp"

#include <cstring>

#include "parallel.hpp"

namespace layercache::cpu {

namespace {

constexpr int MAX_INPUTS = 9, MAX_OUTPUTS = 6;

// One output whose inputs, with it, are of one dtype and all used: registers are enough.
bool simple(const Views& inputs, const Views& outputs, const Map& map, bool gated, bool scaled) {
    if (outputs.size() != 1 || gated || scaled || inputs.size() > MAX_INPUTS) return false;
    for (const View& view : inputs)
        if (view.dtype != outputs[0].dtype) return false;
    for (char used : map.used)
        if (!used) return false;
    return true;
}

struct Work {
    const Loops& loops;
    const Views& inputs;
    const Views& outputs;
    const Map& map;
    const std::optional<View>& gate;
    const std::vector<const float*>& scales;

    void read_inputs(const Chunk& chunk, Buffer* buffers, const float** x) const {
        for (std::size_t k = 0; k < inputs.size(); ++k) {
            if (k > 0 && !scales.empty()) {
                const auto* codes = reinterpret_cast<const std::uint8_t*>(chunk.at(inputs[k]));
                loops.decode(codes, scales[k - 1][chunk.row], buffers[k].values, chunk.size);
                x[k] = buffers[k].values;
            } else {
                x[k] = read(loops, inputs[k], chunk, buffers[k]);
            }
        }
    }

    // Output m in `y`.
    void combine(int m, const Chunk& chunk, const float* const* x, Buffer& y, Buffer& spare) const {
        const int count = static_cast<int>(inputs.size());
        const bool starts_at_base = map.base && !gate;
        if (starts_at_base)
            std::memcpy(y.values, x[0], chunk.size * 4);
        else
            std::memset(y.values, 0, chunk.size * 4);
        for (int k = map.base ? 1 : 0; k < count; ++k)
            if (map.used[m * count + k])
                loops.add_scaled(x[k], map.coefficients[m * count + k], y.values, chunk.size);
        if (!map.factors.empty()) loops.multiply(y.values, map.factors[m], chunk.size);
        if (gate) {
            const Chunk at{chunk.row / inputs[0].rows, chunk.column, chunk.size};
            loops.gate(x[0], read(loops, *gate, at, spare), y.values, chunk.size);
        }
    }

    void operator()(const Chunk& chunk) const {
        Buffer buffers[MAX_INPUTS], results[MAX_OUTPUTS], spare;
        const float* x[MAX_INPUTS];
        read_inputs(chunk, buffers, x);
        // all results before the first is stored, because outputs may be inputs
        for (std::size_t m = 0; m < outputs.size(); ++m) combine(static_cast<int>(m), chunk, x, results[m], spare);
        for (std::size_t m = 0; m < outputs.size(); ++m)
            loops.store(results[m].values, chunk.at(outputs[m]), outputs[m].dtype, chunk.size);
    }
};

}  // namespace

void linear_map(const Views& inputs, const Views& outputs, const Map& map, const std::optional<View>& gate,
                const std::vector<const float*>& scales, int threads) {
    const Loops& loops = active();
    Views all = inputs;
    all.insert(all.end(), outputs.begin(), outputs.end());
    if (!gate && scales.empty()) flatten(all);
    const auto middle = all.begin() + static_cast<std::ptrdiff_t>(inputs.size());
    const Views in(all.begin(), middle), out(middle, all.end());
    if (simple(in, out, map, gate.has_value(), !scales.empty())) {
        const float factor = map.factors.empty() ? 1.0f : map.factors[0];
        for_chunks(Space(in[0]), threads, [&](const Chunk& chunk, int) {
            const void* x[MAX_INPUTS];
            for (std::size_t k = 0; k < in.size(); ++k) x[k] = chunk.at(in[k]);
            loops.map_same(x, map.coefficients.data(), static_cast<int>(in.size()), map.base, factor, chunk.at(out[0]),
                           out[0].dtype, chunk.size);
        });
        return;
    }
    const Work work{loops, in, out, map, gate, scales};
    for_chunks(Space(in[0]), threads, [&](const Chunk& chunk, int) { work(chunk); });
}

}  // namespace layercache::cpu
