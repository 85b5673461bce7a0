// Ops that need a whole row at a time; a thread keeps its row in fp32 in its own cache.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "parallel.hpp"

namespace layercache::cpu {

namespace {

using Row = std::vector<float>;

void load_row(const Loops& loops, const View& view, std::int64_t row, Row& to) {
    loops.load(view.row(row), view.dtype, to.data(), view.cols);
}

void store_row(const Loops& loops, const Row& from, const View& view, std::int64_t row) {
    loops.store(from.data(), view.row(row), view.dtype, view.cols);
}

// Row of a tensor with one row for each entry of the batch, or for all.
std::int64_t vector_row(const View& vectors, const View& model, std::int64_t row) {
    return vectors.batch * vectors.rows > 1 ? row / model.rows : 0;
}

// What a thread keeps: its row, and the vectors, which change only with the batch.
struct Scratch {
    Row y, z, other, scale, shift, weight, bias;
    std::int64_t batch = -1;
    Scratch(const Loops& loops, const Modulation& m) : y(m.x.cols), z(y), other(y), scale(y), shift(y) {
        if (m.weight) load_row(loops, *m.weight, 0, weight = y);
        if (m.bias) load_row(loops, *m.bias, 0, bias = y);
    }
};

void modulate_row(const Loops& loops, const Modulation& m, std::int64_t row, Scratch& s, double* sums) {
    const std::int64_t n = m.x.cols, batch = row / m.x.rows;
    if (batch != s.batch) {
        load_row(loops, m.scale, vector_row(m.scale, m.x, row), s.scale);
        load_row(loops, m.shift, vector_row(m.shift, m.x, row), s.shift);
        s.batch = batch;
    }
    load_row(loops, m.x, row, s.y);
    for (std::size_t k = 0; k < m.residuals.size(); ++k) {
        if (m.code_scales.empty())
            load_row(loops, m.residuals[k], row, s.other);
        else
            loops.decode(reinterpret_cast<const std::uint8_t*>(m.residuals[k].row(row)), m.code_scales[k][row],
                         s.other.data(), n);
        loops.add_scaled(s.other.data(), m.coefficients[k], s.y.data(), n);
    }
    if (m.stream) store_row(loops, s.y, *m.stream, row);
    const float mean = static_cast<float>(loops.sum(s.y.data(), n) / double(n));
    const double variance = loops.centred_square(s.y.data(), mean, n) / double(n);
    loops.finish(s.y.data(), mean, static_cast<float>(1.0 / std::sqrt(variance + m.eps)),
                 m.weight ? s.weight.data() : nullptr, m.bias ? s.bias.data() : nullptr, s.scale.data(),
                 s.shift.data(), s.z.data(), n);
    // the previous one may be where the new one goes
    if (m.previous) load_row(loops, *m.previous, row, s.other);
    store_row(loops, s.z, m.z, row);
    if (!m.previous) return;
    load_row(loops, m.z, row, s.z);
    for (std::size_t part = 0; part + 1 < m.bounds.size(); ++part) {
        const std::int64_t first = m.bounds[part], count = m.bounds[part + 1] - first;
        loops.pair_sums(s.z.data() + first, s.other.data() + first, Dtype::float32, count,
                        sums + part * PAIR_STATISTICS);
    }
}

}  // namespace

Sums modulate(const Modulation& m, int threads) {
    const Loops& loops = active();
    const std::int64_t rows = m.x.batch * m.x.rows;
    const int ranges = static_cast<int>(m.bounds.size()) - 1;
    Partials partials(ranges * PAIR_STATISTICS);
    for_parts(rows, threads_for(m.x.numel(), threads), [&](std::int64_t first, std::int64_t last, int part) {
        Scratch scratch(loops, m);
        for (std::int64_t row = first; row < last; ++row) modulate_row(loops, m, row, scratch, partials.part(part));
    });
    Sums sums = partials.sum();
    for (int range = 0; range < ranges; ++range) {
        const int at = range * PAIR_STATISTICS + PAIR_STATISTICS - 1;
        sums[at] = partials.maximum(at);
    }
    return sums;
}

void guidance(const View& cond, const View& uncond, float scale, bool rescale, const View& out, int threads) {
    const Loops& loops = active();
    const std::int64_t n = cond.cols;
    for_parts(cond.batch * cond.rows, threads_for(cond.numel(), threads),
              [&](std::int64_t first, std::int64_t last, int) {
                  Row c(n), u(n), v(n);
                  for (std::int64_t row = first; row < last; ++row) {
                      load_row(loops, cond, row, c);
                      load_row(loops, uncond, row, u);
                      loops.guide(c.data(), u.data(), scale, v.data(), n);
                      if (rescale) {
                          const float wanted = static_cast<float>(std::sqrt(loops.dot(c.data(), c.data(), n)));
                          const float found = static_cast<float>(std::sqrt(loops.dot(v.data(), v.data(), n)));
                          loops.rescale(v.data(), wanted / (found == 0.0f ? 1.0f : found), n);
                      }
                      store_row(loops, v, out, row);
                  }
              });
}

Sums row_statistics(const View& a, const View& b, std::int64_t samples, int threads) {
    const Loops& loops = active();
    const std::int64_t n = a.cols, rows = a.batch * a.rows / samples;
    Sums sums;
    for (std::int64_t sample = 0; sample < samples; ++sample) {
        Partials partials(3);
        for_parts(rows, threads_for(rows * n, threads), [&](std::int64_t first, std::int64_t last, int part) {
            Row x(n), y(n);
            double* total = partials.part(part);
            for (std::int64_t row = first; row < last; ++row) {
                load_row(loops, a, sample * rows + row, x);
                load_row(loops, b, sample * rows + row, y);
                const double x_norm = std::sqrt(loops.dot(x.data(), x.data(), n));
                const double y_norm = std::sqrt(loops.dot(y.data(), y.data(), n));
                const double change = x_norm / y_norm - 1;
                total[0] += change;
                total[1] += change * change;
                total[2] += 1 - loops.dot(x.data(), y.data(), n) / (x_norm * y_norm);
            }
        });
        const Sums found = partials.sum();
        sums.insert(sums.end(), found.begin(), found.end());
    }
    return sums;
}

}  // namespace layercache::cpu
