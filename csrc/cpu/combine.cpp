#include <cstring>

#include "kernels.hpp"
#include "parallel.hpp"

namespace layercache::cpu {

namespace {

constexpr int MAX_INPUTS = 9;

// One output: the inputs it has terms in, and their coefficients.
struct Output {
    std::vector<int> inputs;
    std::vector<float> coefficients;
    float factor;
};

std::vector<Output> outputs_of(const Map& map, int inputs, int outputs) {
    std::vector<Output> found(outputs);
    for (int m = 0; m < outputs; ++m) {
        found[m].factor = map.factors.empty() ? 1.0f : map.factors[m];
        for (int k = 0; k < inputs; ++k)
            if (map.used[m * inputs + k]) {
                found[m].inputs.push_back(k);
                found[m].coefficients.push_back(map.coefficients[m * inputs + k]);
            }
    }
    return found;
}

// Whether writing one output at a time could change an input of a later one.
bool written_while_read(const Views& inputs, const Views& outputs) {
    if (outputs.size() == 1) return false;
    for (const View& out : outputs)
        for (const View& in : inputs)
            if (out.data == in.data) return true;
    return false;
}

bool all_go_past_caches(const Views& outputs, const Views& inputs) {
    return std::all_of(outputs.begin(), outputs.end(),
                       [&](const View& output) { return goes_past_caches(output, inputs); });
}

struct Work {
    const Loops& loops;
    const Views& inputs;
    const Views& outputs;
    const std::vector<Output>& terms;
    bool base;
    const std::optional<View>& gate;
    const std::vector<const float*>& scales;
    Dtype dtype;   // that of the arithmetic's inputs and outputs: all views', or fp32
    bool in_place;  // whether chunks can be read and written where they are
    bool buffered;  // whether results wait until all are there
    bool streamed;  // whether they go past the caches

    const void* input(int k, const Chunk& chunk, Buffer& buffer) const {
        if (scales.empty() || scales[k] == nullptr) return read_as(loops, inputs[k], dtype, chunk, buffer);
        const auto* codes = reinterpret_cast<const std::uint8_t*>(chunk.at(inputs[k]));
        loops.decode(codes, scales[k][chunk.row], buffer.values, chunk.size);
        return buffer.values;
    }

    void operator()(const Chunk& chunk) const {
        Buffer converted[MAX_INPUTS], spare;
        Buffer* results = scratch(outputs.size());
        const void* x[MAX_INPUTS];
        for (std::size_t k = 0; k < inputs.size(); ++k) x[k] = input(static_cast<int>(k), chunk, converted[k]);
        const Chunk entry{chunk.row / std::max<std::int64_t>(inputs[0].rows, 1), chunk.column, chunk.size};
        const void* g = gate ? read_as(loops, *gate, dtype, entry, spare) : nullptr;
        for (std::size_t m = 0; m < outputs.size(); ++m) {
            const void* own[MAX_INPUTS];
            const int count = static_cast<int>(terms[m].inputs.size());
            for (int t = 0; t < count; ++t) own[t] = x[terms[m].inputs[t]];
            const bool direct = in_place && !buffered && !streamed;
            void* to = direct ? chunk.at(outputs[m]) : static_cast<void*>(results[buffered ? m : 0].values);
            if (count == 0) std::memset(to, 0, chunk.size * size_of(dtype));
            loops.map(own, terms[m].coefficients.data(), count, base, terms[m].factor, g, to, dtype, chunk.size);
            if (!direct && !buffered) put(m, chunk, to);
        }
        if (buffered)
            for (std::size_t m = 0; m < outputs.size(); ++m) put(m, chunk, results[m].values);
    }

    void put(std::size_t m, const Chunk& chunk, const void* from) const {
        char* to = chunk.at(outputs[m]);
        if (outputs[m].dtype == dtype && streamed)
            loops.stream(from, to, chunk.size * size_of(dtype));
        else if (outputs[m].dtype == dtype)
            std::memcpy(to, from, chunk.size * size_of(dtype));
        else
            loops.store(static_cast<const float*>(from), to, outputs[m].dtype, chunk.size);
    }
};

}  // namespace

void linear_map(const Views& inputs, const Views& outputs, const Map& map, const std::optional<View>& gate,
                const std::vector<const float*>& scales, int threads) {
    const int count = static_cast<int>(inputs.size());
    Views all = inputs;
    all.insert(all.end(), outputs.begin(), outputs.end());
    if (!gate && scales.empty()) flatten(all);
    const auto middle = all.begin() + count;
    const Views in(all.begin(), middle), out(middle, all.end());
    if (gate) all.push_back(*gate);
    const bool same = scales.empty() && uniform(all);
    const std::vector<Output> terms = outputs_of(map, count, static_cast<int>(out.size()));
    const Work work{active(), in,   out, terms, map.base, gate, scales, same ? all[0].dtype : Dtype::float32, same,
                    written_while_read(in, out), all_go_past_caches(out, in)};
    for_chunks(Space(in[0]), threads, [&](const Chunk& chunk, int) { work(chunk); });
}

}  // namespace layercache::cpu
