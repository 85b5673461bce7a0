// Chunks of tensors of one shape, shared out to threads; sums in an order that does not depend on their number.
#pragma once

#include <functional>
#include <vector>

#include "loops.hpp"

namespace layercache::cpu {

// Parts of the work whose sums are kept apart; also the most threads that find work.
constexpr std::int64_t PARTS = 64;
// A tensor smaller than this is not worth waking other threads.
constexpr std::int64_t SMALL = 65536;

// Chunks of rows of views of one shape; longer than `CHUNK` only for work that has no use for buffers.
struct Space {
    std::int64_t rows, cols, length, chunks_per_row, chunks;

    explicit Space(const View& view, std::int64_t chunk = CHUNK)
        : rows(view.batch * view.rows),
          cols(view.cols),
          length(chunk),
          chunks_per_row((view.cols + chunk - 1) / chunk),
          chunks(view.numel() ? rows * chunks_per_row : 0) {}
};

struct Chunk {
    std::int64_t row, column, size;

    char* at(const View& view) const { return view.row(row) + column * size_of(view.dtype); }
};

int most_threads();  // that the runtime of OpenMP gives; 1 without one
int threads_for(std::int64_t elements, int threads);
// Calls work(first chunk, last chunk, part) for every part, in parallel.
void for_parts(std::int64_t chunks, int threads, const std::function<void(std::int64_t, std::int64_t, int)>& work);

template <class Work>
void for_chunks(const Space& space, int threads, Work&& work) {
    for_parts(space.chunks, threads_for(space.rows * space.cols, threads),
              [&](std::int64_t first, std::int64_t last, int part) {
                  for (std::int64_t index = first; index < last; ++index) {
                      const std::int64_t row = index / space.chunks_per_row;
                      const std::int64_t column = (index - row * space.chunks_per_row) * space.length;
                      work(Chunk{row, column, std::min(space.length, space.cols - column)}, part);
                  }
              });
}

// Room for the sums of every part, folded in their order.
class Partials {
public:
    explicit Partials(int count) : count_(count), values_(PARTS * std::size_t(count), 0.0) {}
    double* part(int index) { return values_.data() + std::size_t(index) * count_; }

    std::vector<double> sum() const {
        std::vector<double> total(count_, 0.0);
        for (std::int64_t p = 0; p < PARTS; ++p)
            for (int s = 0; s < count_; ++s) total[s] += values_[p * count_ + s];
        return total;
    }
    double maximum(int at) const;

private:
    int count_;
    std::vector<double> values_;
};

// One fp32 buffer of a chunk.
struct alignas(64) Buffer {
    float values[CHUNK];
};

// Bytes of a result from which it is written past the caches; may be changed (for tests).
std::int64_t& streamed_from();

// Whether a result is too large to be found in a cache when it is read again. It is then written past the caches, unless
// its memory is there already because it is an input too.
inline bool goes_past_caches(const View& result, const Views& inputs) {
    return result.numel() * size_of(result.dtype) >= streamed_from() &&
           std::none_of(inputs.begin(), inputs.end(), [&](const View& input) { return input.data == result.data; });
}

// Where a chunk of a result is computed: at its place, or in a buffer from which `done` streams it there.
class Target {
public:
    Target(const Loops& loops, const View& view, const Chunk& chunk, bool streamed)
        : loops_(loops), place_(chunk.at(view)), bytes_(chunk.size * size_of(view.dtype)), streamed_(streamed) {}

    void* memory() { return streamed_ ? static_cast<void*>(buffer_.values) : place_; }
    void done() const {
        if (streamed_) loops_.stream(buffer_.values, place_, bytes_);
    }

private:
    const Loops& loops_;
    char* place_;
    std::int64_t bytes_;
    bool streamed_;
    Buffer buffer_;
};

// Buffers that a thread keeps, because clearing new ones would cost as much as the work.
inline Buffer* scratch(std::size_t count) {
    thread_local std::vector<Buffer> kept;
    if (kept.size() < count) kept.resize(count);
    return kept.data();
}

// The dtype in which chunks of all these views can be read in place: that of all, if loops take it, else fp32.
inline Dtype common_dtype(const Views& views) {
    for (const View& view : views)
        if (view.dtype != views[0].dtype || view.dtype == Dtype::float16) return Dtype::float32;
    return views[0].dtype;
}

// Whether chunks of all these views can be read in place.
inline bool uniform(const Views& views) {
    const Dtype dtype = common_dtype(views);
    return std::all_of(views.begin(), views.end(), [&](const View& v) { return v.dtype == dtype; });
}

// A chunk as fp32: in place if it is, else converted.
inline const float* read(const Loops& loops, const View& view, const Chunk& chunk, Buffer& buffer) {
    const char* from = chunk.at(view);
    if (view.dtype == Dtype::float32) return reinterpret_cast<const float*>(from);
    loops.load(from, view.dtype, buffer.values, chunk.size);
    return buffer.values;
}

// A chunk in a dtype of `common_dtype`.
inline const void* read_as(const Loops& loops, const View& view, Dtype dtype, const Chunk& chunk, Buffer& buffer) {
    return view.dtype == dtype ? chunk.at(view) : static_cast<const void*>(read(loops, view, chunk, buffer));
}

}  // namespace layercache::cpu
