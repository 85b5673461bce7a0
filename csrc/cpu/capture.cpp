#include "kernels.hpp"

#include <atomic>
#include <cstring>

#include "parallel.hpp"

namespace layercache::cpu {

namespace {

// Where the statistics of a capture stand among the eight of a pair.
constexpr int OF_PREVIOUS[] = {1, 4, 0, 3, 2, 5, 6};
constexpr int OF_INPUT[] = {1, 4, 2, 5};

struct Stream {
    View output, before, residual, previous;

    bool past_caches() const { return goes_past_caches(residual, {output, before, previous}); }
};

// One chunk of other dtypes than the loops take: by way of fp32. Whether it holds NaN or infinity.
bool convert(const Loops& loops, const Stream& stream, int statistics, const Chunk& chunk, double* sums) {
    Buffer output, input, older, residual;
    const float* p = nullptr;
    if (statistics == 7) {  // kept apart, for this residual may go where the previous one is
        loops.load(chunk.at(stream.previous), stream.previous.dtype, older.values, chunk.size);
        p = older.values;
    }
    const float* i = read(loops, stream.before, chunk, input);
    loops.subtract(read(loops, stream.output, chunk, output), i, residual.values, chunk.size);
    char* to = chunk.at(stream.residual);
    loops.store(residual.values, to, stream.residual.dtype, chunk.size);
    loops.load(to, stream.residual.dtype, residual.values, chunk.size);
    if (statistics) loops.pair_sums(residual.values, p == nullptr ? i : p, Dtype::float32, chunk.size, sums);
    return loops.has_bad(residual.values, chunk.size);
}

bool run(const Stream& stream, bool same, int statistics, bool look, int threads, double* sums) {
    const Loops& loops = active();
    const Dtype dtype = stream.output.dtype;
    Partials partials(PAIR_STATISTICS);
    std::atomic<bool> bad{false};
    const bool streamed = same && stream.past_caches();
    for_chunks(Space(stream.output), threads, [&](const Chunk& chunk, int part) {
        if (!same) {
            if (convert(loops, stream, statistics, chunk, partials.part(part))) bad = true;
            return;
        }
        const void* older = statistics == 7 ? chunk.at(stream.previous) : nullptr;
        Target target(loops, stream.residual, chunk, streamed);
        const bool found = loops.capture(chunk.at(stream.output), chunk.at(stream.before), older, target.memory(),
                                         dtype, look, chunk.size, partials.part(part));
        target.done();
        if (found) bad = true;
    });
    const Sums found = partials.sum();
    for (int s = 0; s < statistics; ++s) sums[s] = found[statistics == 7 ? OF_PREVIOUS[s] : OF_INPUT[s]];
    return bad;
}

// Without statistics and with one dtype the difference is a linear map of two terms.
void subtract_all(const Stream& stream, int threads) {
    const Loops& loops = active();
    const float c[] = {1.0f, -1.0f};
    const bool streamed = goes_past_caches(stream.residual, {stream.output, stream.before});
    for_chunks(Space(stream.output), threads, [&](const Chunk& chunk, int) {
        const void* x[] = {chunk.at(stream.output), chunk.at(stream.before)};
        Target target(loops, stream.residual, chunk, streamed);
        loops.map(x, c, 2, true, 1.0f, nullptr, target.memory(), stream.output.dtype, chunk.size);
        target.done();
    });
}

}  // namespace

bool capture(Views outputs, Views inputs, Views residuals, Views previous, int statistics, std::int64_t samples,
             bool look, int threads, Sums& sums) {
    bool bad = false;
    sums.assign(outputs.size() * samples * statistics, 0.0);
    for (std::size_t s = 0; s < outputs.size(); ++s) {
        for (std::int64_t b = 0; b < samples; ++b) {
            Views views{outputs[s], inputs[s], residuals[s]};
            if (!previous.empty()) views.push_back(previous[s]);
            if (samples > 1)
                for (View& view : views) view = view.sample(b);
            flatten(views);
            const Stream stream{views[0], views[1], views[2], views.back()};
            const bool same = uniform(views);
            if (!statistics && !look && same)
                subtract_all(stream, threads);
            else
                bad |= run(stream, same, statistics, look, threads, sums.data() + (s * samples + b) * statistics);
        }
    }
    return bad;
}

bool capture_compact(const View& output, const View& before, const View& codes, float* scales, bool look,
                     int threads) {
    const Loops& loops = active();
    const std::int64_t rows = output.batch * output.rows, cols = output.cols;
    const Dtype dtype = common_dtype({output, before});
    std::atomic<bool> bad{false};
    for_parts(rows, threads_for(rows * cols, threads), [&](std::int64_t first, std::int64_t last, int) {
        std::vector<float> r(cols);
        Buffer* buffers = scratch(2);
        for (std::int64_t row = first; row < last; ++row) {
            float peak = 0;
            for (std::int64_t column = 0; column < cols; column += CHUNK) {
                const Chunk chunk{row, column, std::min(CHUNK, cols - column)};
                const void* o = read_as(loops, output, dtype, chunk, buffers[0]);
                float highest;
                if (loops.differences(o, read_as(loops, before, dtype, chunk, buffers[1]), dtype, r.data() + column,
                                      chunk.size, highest) && look)
                    bad = true;
                peak = std::max(peak, highest);
            }
            std::uint32_t bits;
            std::memcpy(&bits, &peak, 4);
            // exponent of the peak, one more where its mantissa exceeds 1.75, less the 8 of 448
            const std::int32_t field = std::max<std::int32_t>(((bits + 0x1FFFFF) >> 23) - 8, 1);
            const std::uint32_t scale = std::uint32_t(field) << 23, inverse = std::uint32_t(254 - field) << 23;
            float factor;
            std::memcpy(scales + row, &scale, 4);
            std::memcpy(&factor, &inverse, 4);
            loops.encode(r.data(), factor, reinterpret_cast<std::uint8_t*>(codes.row(row)), cols);
        }
    });
    return bad;
}

}  // namespace layercache::cpu
