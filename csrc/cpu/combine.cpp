#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels.hpp"
#include "parallel.hpp"

namespace layercache::cpu {

namespace {

constexpr int MAX_INPUTS = 9;
// From so many inputs on, reading them without a break is worth more than writing past the caches.
constexpr std::size_t MANY_INPUTS = 5;
constexpr std::int64_t LONGEST = 65536;  // elements of a chunk that is written where it belongs

// A coefficient as the loops want it: of all NaN the one without bits that rounding to bf16 drops.
float canonical(float c) { return std::isnan(c) ? std::numeric_limits<float>::quiet_NaN() : c; }

// One output: the inputs it has terms in, and their coefficients.
struct Output {
    std::vector<int> inputs;
    std::vector<float> coefficients;
    float factor;
};

std::vector<Output> outputs_of(const Map& map, int inputs, int outputs) {
    std::vector<Output> found(outputs);
    for (int m = 0; m < outputs; ++m) {
        found[m].factor = map.factors.empty() ? 1.0f : canonical(map.factors[m]);
        for (int k = 0; k < inputs; ++k)
            if (map.used[m * inputs + k]) {
                found[m].inputs.push_back(k);
                found[m].coefficients.push_back(canonical(map.coefficients[m * inputs + k]));
            }
    }
    return found;
}

// Whether no output, written in this order, changes what a later one reads.
bool is_safe(const std::vector<int>& order, const Views& inputs, const Views& outputs,
             const std::vector<Output>& terms) {
    for (std::size_t first = 0; first < order.size(); ++first)
        for (std::size_t later = first + 1; later < order.size(); ++later)
            for (int k : terms[order[later]].inputs)
                if (inputs[k].data == outputs[order[first]].data) return false;
    return true;
}

// Outputs in an order in which each can be written at once; empty if all must wait until the last is there. A Taylor
// expansion that is brought forward in place is safe from its highest order down.
std::vector<int> order_of(const Views& inputs, const Views& outputs, const std::vector<Output>& terms) {
    std::vector<int> order(outputs.size());
    std::iota(order.begin(), order.end(), 0);
    if (is_safe(order, inputs, outputs, terms)) return order;
    std::reverse(order.begin(), order.end());
    return is_safe(order, inputs, outputs, terms) ? order : std::vector<int>{};
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
    std::vector<int> order;      // of the outputs; empty if they wait until all are there
    std::vector<char> streamed;  // which of them go past the caches

    const void* input(int k, const Chunk& chunk, Buffer& buffer) const {
        if (scales.empty() || scales[k] == nullptr) return read_as(loops, inputs[k], dtype, chunk, buffer);
        const auto* codes = reinterpret_cast<const std::uint8_t*>(chunk.at(inputs[k]));
        loops.decode(codes, scales[k][chunk.row], buffer.values, chunk.size);
        return buffer.values;
    }

    void operator()(const Chunk& chunk) const {
        // not on the stack, whose pages compilers may touch one by one at every call
        Buffer* converted = scratch(MAX_INPUTS + 1 + std::max<std::size_t>(outputs.size(), 2));
        Buffer &spare = converted[MAX_INPUTS], *results = converted + MAX_INPUTS + 1;
        const void* x[MAX_INPUTS];
        for (std::size_t k = 0; k < inputs.size(); ++k) x[k] = input(static_cast<int>(k), chunk, converted[k]);
        const Chunk entry{chunk.row / std::max<std::int64_t>(inputs[0].rows, 1), chunk.column, chunk.size};
        const void* g = gate ? read_as(loops, *gate, dtype, entry, spare) : nullptr;
        const auto compute = [&](int m, void* to) {
            const void* own[MAX_INPUTS];
            const int count = static_cast<int>(terms[m].inputs.size());
            for (int t = 0; t < count; ++t) own[t] = x[terms[m].inputs[t]];
            if (count == 0) std::memset(to, 0, chunk.size * size_of(dtype));
            loops.map(own, terms[m].coefficients.data(), count, base, terms[m].factor, g, to, dtype, chunk.size);
        };
        const auto target = [&](int m, int buffer) {
            return is_direct(m) ? chunk.at(outputs[m]) : reinterpret_cast<char*>(results[buffer].values);
        };
        for (std::size_t next = 0; next < order.size(); ++next) {
            const int m = order[next], other = next + 1 < order.size() ? order[next + 1] : -1;
            if (in_place && copies(m)) {
                const void* from = x[terms[m].inputs[0]];
                if (from != chunk.at(outputs[m])) put(m, chunk, from);
                continue;
            }
            void* to = target(m, 0);
            void* beside = nullptr;
            if (other >= 0 && share(m, other)) {
                beside = target(other, 1);
                compute_two(m, to, other, beside, x, chunk.size);
                ++next;
            } else {
                compute(m, to);
            }
            if (!is_direct(m)) put(m, chunk, to);
            if (beside != nullptr && !is_direct(other)) put(other, chunk, beside);
        }
        if (!order.empty()) return;
        for (std::size_t m = 0; m < outputs.size(); ++m) compute(static_cast<int>(m), results[m].values);
        for (std::size_t m = 0; m < outputs.size(); ++m) put(static_cast<int>(m), chunk, results[m].values);
    }

    // Whether an output is computed where it belongs.
    bool is_direct(int m) const { return in_place && !streamed[m]; }

    // Whether an output is one of the inputs as it is.
    bool copies(int m) const {
        const Output& own = terms[m];
        return !base && own.inputs.size() == 1 && own.coefficients[0] == 1.0f && own.factor == 1.0f;
    }

    // Whether two outputs have the same inputs, but for the last of the one that has more: they are computed at once.
    bool share(int m, int other) const {
        const std::vector<int>&few = terms[m].inputs, &all = terms[other].inputs;
        if (few.size() > all.size()) return share(other, m);
        return !base && !gate && all.size() >= 2 && all.size() <= MOST_SHARED && few.size() + 1 >= all.size() &&
               std::equal(few.begin(), few.end(), all.begin());
    }

    void compute_two(int m, void* to, int other, void* beside, const void* const* x, Size n) const {
        if (terms[m].inputs.size() > terms[other].inputs.size()) return compute_two(other, beside, m, to, x, n);
        const Output &few = terms[m], &all = terms[other];
        const int count = static_cast<int>(all.inputs.size()), fewer = static_cast<int>(few.inputs.size());
        const void* own[MOST_SHARED];
        for (int t = 0; t < count; ++t) own[t] = x[all.inputs[t]];
        loops.map_two(own, count, fewer, {few.coefficients.data(), few.factor, to},
                      {all.coefficients.data(), all.factor, beside}, dtype, n);
    }

    void put(int m, const Chunk& chunk, const void* from) const {
        char* to = chunk.at(outputs[m]);
        if (outputs[m].dtype == dtype && streamed[m])
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
    const bool direct = same && !gate && out.size() == 1 && in.size() >= MANY_INPUTS;
    std::vector<char> streamed;
    for (const View& output : out) streamed.push_back(!direct && goes_past_caches(output, in));
    const Work work{active(),
                    in,
                    out,
                    terms,
                    map.base,
                    gate,
                    scales,
                    same ? all[0].dtype : Dtype::float32,
                    same,
                    order_of(in, out, terms),
                    streamed};
    const std::int64_t length = direct ? std::clamp(in[0].numel() / PARTS, CHUNK, LONGEST) : CHUNK;
    for_chunks(Space(in[0], length), threads, [&](const Chunk& chunk, int) { work(chunk); });
}

}  // namespace layercache::cpu
