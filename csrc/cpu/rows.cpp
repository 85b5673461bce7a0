// Ops that need a whole row at a time; a thread keeps its row in fp32 in its own cache.
#include <algorithm>
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

// A row in a dtype that the loops take.
const void* row_as(const Loops& loops, const View& view, Dtype dtype, std::int64_t row, Row& buffer) {
    if (view.dtype == dtype) return view.row(row);
    load_row(loops, view, row, buffer);
    return buffer.data();
}

// The order in which the loops keep a row of a dtype.
void sort(Row& row, Dtype dtype) {
    if (dtype != Dtype::bfloat16) return;
    const Row from = row;
    const std::size_t half = row.size() / 2;
    for (std::size_t k = 0; k < half; ++k) row[k] = from[2 * k], row[half + k] = from[2 * k + 1];
}

// What a thread keeps: its row, and the vectors, which change only with the batch, all sorted. The LayerNorm's weight and
// bias are part of them: scale = weight (1 + scale), shift = bias (1 + scale) + shift.
struct Scratch {
    Row y, other, scale, shift, z;
    std::int64_t batch = -1;
    explicit Scratch(std::int64_t cols) : y(cols), other(cols), scale(cols), shift(cols), z(cols) {}
};

void load_vectors(const Loops& loops, const Modulation& m, Dtype dtype, std::int64_t row, Scratch& s) {
    const std::int64_t n = m.x.cols;
    load_row(loops, m.scale, vector_row(m.scale, m.x, row), s.scale);
    load_row(loops, m.shift, vector_row(m.shift, m.x, row), s.shift);
    for (float& scale : s.scale) scale += 1.0f;
    if (m.bias) {
        load_row(loops, *m.bias, 0, s.other);
        loops.product(s.scale.data(), s.other.data(), n);
        loops.add_scaled(s.other.data(), 1.0f, s.shift.data(), n);
    }
    if (m.weight) {
        load_row(loops, *m.weight, 0, s.other);
        loops.product(s.other.data(), s.scale.data(), n);
    }
    sort(s.scale, dtype);
    sort(s.shift, dtype);
}

// y = x + terms, in fp32; returns its sum.
double load_stream(const Loops& loops, const Modulation& m, Dtype dtype, std::int64_t row, Scratch& s) {
    const std::int64_t n = m.x.cols;
    const void* x[MOST_LOADED] = {row_as(loops, m.x, dtype, row, s.other)};
    float c[MOST_LOADED];
    std::size_t loaded = 0;
    for (; loaded < m.residuals.size() && loaded + 1 < MOST_LOADED && m.residuals[loaded].dtype == dtype; ++loaded) {
        x[loaded + 1] = m.residuals[loaded].row(row);
        c[loaded + 1] = m.coefficients[loaded];
    }
    const double sum = loops.load_and_sum(x, c, static_cast<int>(loaded) + 1, dtype, s.y.data(), n);
    if (loaded == m.residuals.size()) return sum;
    for (std::size_t k = loaded; k < m.residuals.size(); ++k) {
        const View& residual = m.residuals[k];
        if (residual.dtype == dtype) {
            loops.add_row(residual.row(row), dtype, m.coefficients[k], s.y.data(), n);
            continue;
        }
        if (m.code_scales.empty())
            load_row(loops, residual, row, s.other);
        else
            loops.decode(reinterpret_cast<const std::uint8_t*>(residual.row(row)), m.code_scales[k][row],
                         s.other.data(), n);
        sort(s.other, dtype);
        loops.add_scaled(s.other.data(), m.coefficients[k], s.y.data(), n);
    }
    return loops.sum({{s.y.data()}, {}, 1}, Dtype::float32, n);
}

// Writes a sorted row: in its dtype, or by way of fp32, which is not sorted.
void store_sorted(const Loops& loops, const Row& from, const View& view, Dtype dtype, std::int64_t row) {
    if (view.dtype == dtype)
        loops.unsort(from.data(), view.row(row), dtype, view.cols);
    else
        store_row(loops, from, view, row);
}

void modulate_row(const Loops& loops, const Modulation& m, Dtype dtype, std::int64_t row, Scratch& s, double* sums) {
    const std::int64_t n = m.x.cols, batch = row / m.x.rows;
    if (batch != s.batch) load_vectors(loops, m, dtype, row, s);
    s.batch = batch;
    const float mean = static_cast<float>(load_stream(loops, m, dtype, row, s) / double(n));
    if (m.stream) store_sorted(loops, s.y, *m.stream, dtype, row);
    const double variance = loops.centred_square({{s.y.data()}, {}, 1}, Dtype::float32, mean, n) / double(n);
    const float factor = static_cast<float>(1.0 / std::sqrt(variance + m.eps));
    const void* older = m.previous ? row_as(loops, *m.previous, dtype, row, s.other) : nullptr;
    if (older != nullptr && m.z.dtype == dtype && m.bounds.size() == 2) {
        loops.finish_pair(s.y.data(), mean, factor, s.scale.data(), s.shift.data(), older, m.z.row(row), dtype, n, sums);
        return;
    }
    if (older != nullptr && older == m.z.row(row)) {  // the previous one is where the new one goes
        std::memcpy(s.other.data(), older, n * size_of(dtype));
        older = s.other.data();
    }
    if (m.z.dtype == dtype) {
        loops.finish(s.y.data(), mean, factor, s.scale.data(), s.shift.data(), m.z.row(row), dtype, n);
    } else {
        loops.finish(s.y.data(), mean, factor, s.scale.data(), s.shift.data(), s.z.data(), Dtype::float32, n);
        store_row(loops, s.z, m.z, row);
    }
    if (!m.previous) return;
    const void* newer = row_as(loops, m.z, dtype, row, s.z);
    for (std::size_t part = 0; part + 1 < m.bounds.size(); ++part) {
        const std::int64_t first = m.bounds[part], count = m.bounds[part + 1] - first, skip = first * size_of(dtype);
        loops.pair_sums(static_cast<const char*>(newer) + skip, static_cast<const char*>(older) + skip, dtype, count,
                        sums + part * PAIR_STATISTICS);
    }
}

// Whether rows are modulated as they are: one dtype, few terms, and nothing else to work out. Vectors of four numbers take
// longer to unpack a row three times than to keep it.
bool is_plain(const Loops& loops, const Modulation& m) {
    if (std::strcmp(loops.name, "base") == 0) return false;
    Views views{m.x, m.scale, m.shift, m.z};
    if (m.previous) views.push_back(*m.previous);
    views.insert(views.end(), m.residuals.begin(), m.residuals.end());
    const bool bare = !m.weight && !m.bias && !m.stream && m.bounds.size() == 2;
    return bare && uniform(views) && m.residuals.size() < MOST_LOADED;
}

void modulate_plain(const Loops& loops, const Modulation& m, std::int64_t row, double* sums) {
    const std::int64_t n = m.x.cols;
    const Dtype dtype = m.x.dtype;
    Terms y{{m.x.row(row)}, {1.0f}, 1};
    for (std::size_t k = 0; k < m.residuals.size(); ++k, ++y.count) {
        y.inputs[y.count] = m.residuals[k].row(row);
        y.coefficients[y.count] = m.coefficients[k];
    }
    const float mean = static_cast<float>(loops.sum(y, dtype, n) / double(n));
    const double variance = loops.centred_square(y, dtype, mean, n) / double(n);
    loops.modulate(y, mean, static_cast<float>(1.0 / std::sqrt(variance + m.eps)),
                   m.scale.row(vector_row(m.scale, m.x, row)), m.shift.row(vector_row(m.shift, m.x, row)),
                   m.previous ? m.previous->row(row) : nullptr, m.z.row(row), dtype, n, sums);
}

}  // namespace

Sums modulate(const Modulation& m, int threads) {
    const Loops& loops = active();
    const std::int64_t rows = m.x.batch * m.x.rows;
    const bool packed = m.x.dtype == Dtype::bfloat16 && m.z.dtype == Dtype::bfloat16 &&
                        (!m.stream || m.stream->dtype == Dtype::bfloat16);
    const Dtype dtype = packed ? Dtype::bfloat16 : Dtype::float32;
    const int ranges = static_cast<int>(m.bounds.size()) - 1;
    Partials partials(ranges * PAIR_STATISTICS);
    const bool plain = is_plain(loops, m);
    for_parts(rows, threads_for(m.x.numel(), threads), [&](std::int64_t first, std::int64_t last, int part) {
        Scratch scratch(plain ? 0 : m.x.cols);
        for (std::int64_t row = first; row < last; ++row)
            plain ? modulate_plain(loops, m, row, partials.part(part))
                  : modulate_row(loops, m, dtype, row, scratch, partials.part(part));
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
    const Dtype dtype = common_dtype({cond, uncond});
    for_parts(cond.batch * cond.rows, threads_for(cond.numel(), threads),
              [&](std::int64_t first, std::int64_t last, int) {
                  Row c(n), u(n), v(n);
                  for (std::int64_t row = first; row < last; ++row) {
                      double squares[2] = {0, 0};
                      loops.guide(row_as(loops, cond, dtype, row, c), row_as(loops, uncond, dtype, row, u), dtype,
                                  scale, v.data(), n, squares);
                      if (rescale) {
                          const float wanted = static_cast<float>(std::sqrt(squares[0]));
                          const float found = static_cast<float>(std::sqrt(squares[1]));
                          loops.rescale(v.data(), wanted / (found == 0.0f ? 1.0f : found), n);
                      }
                      store_row(loops, v, out, row);
                  }
              });
}

Sums row_statistics(const View& a, const View& b, std::int64_t samples, int threads) {
    const Loops& loops = active();
    const std::int64_t n = a.cols, rows = a.batch * a.rows / samples;
    const Dtype dtype = common_dtype({a, b});
    Sums sums;
    for (std::int64_t sample = 0; sample < samples; ++sample) {
        Partials partials(3);
        for_parts(rows, threads_for(rows * n, threads), [&](std::int64_t first, std::int64_t last, int part) {
            Row x_row(n), y_row(n);
            double* total = partials.part(part);
            for (std::int64_t row = first; row < last; ++row) {
                const void* x = row_as(loops, a, dtype, sample * rows + row, x_row);
                const void* y = row_as(loops, b, dtype, sample * rows + row, y_row);
                const void* both[] = {x, y};
                double products[3] = {0, 0, 0};
                loops.products(x, both, 2, dtype, n, products);
                loops.products(y, &y, 1, dtype, n, products + 2);
                const double x_norm = std::sqrt(products[0]), y_norm = std::sqrt(products[2]);
                const double change = x_norm / y_norm - 1;
                total[0] += change;
                total[1] += change * change;
                total[2] += 1 - products[1] / (x_norm * y_norm);
            }
        });
        const Sums found = partials.sum();
        sums.insert(sums.end(), found.begin(), found.end());
    }
    return sums;
}

}  // namespace layercache::cpu
