// Tensors as the kernels see them: memory, dtype and three dims, the last of them contiguous.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace layercache::cpu {

enum class Dtype : int { float32, bfloat16, float16, byte };

inline std::int64_t size_of(Dtype dtype) {
    return dtype == Dtype::float32 ? 4 : dtype == Dtype::byte ? 1 : 2;
}

struct View {
    char* data;
    Dtype dtype;
    std::int64_t batch, rows, cols;
    std::int64_t batch_stride, row_stride;  // in elements

    std::int64_t numel() const { return batch * rows * cols; }

    bool contiguous() const {
        return (rows <= 1 || row_stride == cols) && (batch <= 1 || batch_stride == rows * cols);
    }

    char* row(std::int64_t index) const {
        if (index == 0) return data;  // all there is of flat memory
        const std::int64_t b = index / rows;
        return data + (b * batch_stride + (index - b * rows) * row_stride) * size_of(dtype);
    }

    // One entry of the first dim.
    View sample(std::int64_t index) const {
        return {data + index * batch_stride * size_of(dtype), dtype, 1, rows, cols, 0, row_stride};
    }

    // The same memory as one row, if it is contiguous.
    View flat() const { return {data, dtype, 1, 1, numel(), 0, 0}; }
};

using Views = std::vector<View>;

// Views of one shape as a single row each, where all of them are contiguous.
inline void flatten(Views& views) {
    if (std::all_of(views.begin(), views.end(), [](const View& v) { return v.contiguous(); }))
        for (View& view : views) view = view.flat();
}

}  // namespace layercache::cpu
