// y = x W^T for the selector: W [outputs, width] is transposed once, then every thread takes a block of tokens.
#pragma once

#include <vector>

#include "dots.h"
#include "parallel.h"
#include "product.h"
#include "transpose.h"

namespace sparseffn {
// Rows that a thread takes at a time.
constexpr int64_t kLinearRows = 192;
// Up to this many tokens the selector is read where it lies; sums of lanes also err less than one after the other.
constexpr int64_t kLinearDots = 16;

template <class C>
inline void linear(const C* x, const C* w, int64_t tokens, int64_t width, int64_t outputs, int threads, C* y) {
    if (tokens <= kLinearDots) {
        std::vector<const C*> rows(tokens);
        for (int64_t i = 0; i < tokens; ++i) rows[i] = x + i * width;
        product_dots<C, C>(rows.data(), tokens, w, width, width, outputs, nullptr,
                           [&](int64_t i, int64_t o, int n, const C* sums) { std::copy_n(sums, n, y + i * outputs + o); });
        return;
    }
    Buffer<C> transposed(width * outputs);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t first = 0; first < outputs; first += kStrip)
            transpose_rows(w, outputs, width, width, first, transposed.data(), outputs);
        Buffer<C> padded(padded_size<C>(width));
        std::vector<const C*> rows(kLinearRows);
        const Range own = part_of(tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t first = own.begin; first < own.end; first += kLinearRows) {
            const int64_t n = std::min(kLinearRows, own.end - first);
            for (int64_t i = 0; i < n; ++i) rows[i] = x + (first + i) * width;
            product<C, C>(rows.data(), n, transposed.data(), outputs, width, outputs, padded.data(), Fetch{},
                          [&](int64_t i, int64_t column, int columns, const auto& acc) {
                              put(y + (first + i) * outputs + column, acc, columns);
                          });
        }
    }
}

}  // namespace sparseffn
