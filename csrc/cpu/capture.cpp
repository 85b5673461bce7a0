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
};

// One chunk: subtracts, rounds, stores; `kept` is the residual as stored.
const float* subtract(const Loops& loops, const Stream& stream, const Chunk& chunk, Buffer* buffers,
                      const float*& before) {
    const float* o = read(loops, stream.output, chunk, buffers[0]);
    before = read(loops, stream.before, chunk, buffers[1]);
    char* to = chunk.at(stream.residual);
    if (stream.residual.dtype == Dtype::float32) {
        loops.subtract(o, before, buffers[2].values, chunk.size);
        return buffers[2].values;
    }
    loops.subtract(o, before, buffers[2].values, chunk.size);
    loops.store(buffers[2].values, to, stream.residual.dtype, chunk.size);
    loops.load(to, stream.residual.dtype, buffers[2].values, chunk.size);
    return buffers[2].values;
}

bool run(const Stream& stream, int statistics, bool look, int threads, double* sums) {
    const Loops& loops = active();
    const Space space(stream.output);
    Partials partials(PAIR_STATISTICS);
    std::atomic<bool> bad{false};
    for_chunks(space, threads, [&](const Chunk& chunk, int part) {
        Buffer buffers[4];
        const float* before;
        // the previous residual may be where this one goes
        const float* other = statistics == 7 ? read(loops, stream.previous, chunk, buffers[3]) : nullptr;
        const float* r = subtract(loops, stream, chunk, buffers, before);
        if (statistics) loops.pair_sums(r, statistics == 7 ? other : before, chunk.size, partials.part(part));
        if (stream.residual.dtype == Dtype::float32) std::memcpy(chunk.at(stream.residual), r, chunk.size * 4);
        if (look && loops.has_bad(r, chunk.size)) bad = true;
    });
    const Sums found = partials.sum();
    for (int s = 0; s < statistics; ++s) sums[s] = found[statistics == 7 ? OF_PREVIOUS[s] : OF_INPUT[s]];
    return bad;
}

// Without statistics and with one dtype the difference is a linear map of two terms.
void subtract_all(const Stream& stream, int threads) {
    const Loops& loops = active();
    const float c[] = {1.0f, -1.0f};
    for_chunks(Space(stream.output), threads, [&](const Chunk& chunk, int) {
        const void* x[] = {chunk.at(stream.output), chunk.at(stream.before)};
        loops.map_same(x, c, 2, true, 1.0f, chunk.at(stream.residual), stream.output.dtype, chunk.size);
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
            const bool same = stream.output.dtype == stream.residual.dtype && stream.output.dtype == stream.before.dtype;
            if (!statistics && !look && same)
                subtract_all(stream, threads);
            else
                bad |= run(stream, statistics, look, threads, sums.data() + (s * samples + b) * statistics);
        }
    }
    return bad;
}

bool capture_compact(const View& output, const View& before, const View& codes, float* scales, bool look,
                     int threads) {
    const Loops& loops = active();
    const std::int64_t rows = output.batch * output.rows, cols = output.cols;
    std::atomic<bool> bad{false};
    for_parts(rows, threads_for(rows * cols, threads), [&](std::int64_t first, std::int64_t last, int) {
        std::vector<float> r(cols);
        Buffer o, i;
        for (std::int64_t row = first; row < last; ++row) {
            for (std::int64_t column = 0; column < cols; column += CHUNK) {
                const Chunk chunk{row, column, std::min(CHUNK, cols - column)};
                loops.subtract(read(loops, output, chunk, o), read(loops, before, chunk, i), r.data() + column,
                               chunk.size);
            }
            if (look && loops.has_bad(r.data(), cols)) bad = true;
            const float peak = loops.peak(r.data(), cols);
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
