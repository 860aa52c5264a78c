// Outer products of few rows, and of many.
#pragma once

#include <vector>

#include "parallel.h"
#include "product.h"

namespace sparseffn {

// Rows of a weight gradient that are added up before the tile is written.
constexpr int64_t kDepth = 512;

// Lines of a gradient that are made together of few rows, panel by panel. Of twice as many, where these are written to the caches and a
// power of two apart, they push each other out.
constexpr int64_t kLinesOfFew = 4 * kRows;

// Copies of both factors of a gradient of few rows, by one thread.
template <class C> struct FewRows {
    static constexpr int64_t kPanel = kVectors * kLanes<C>;
    Buffer<C> lines, panels;

    FewRows(int64_t rows, int64_t width) : lines(rows * kLinesOfFew), panels(rows * ((width + kPanel - 1) / kPanel * kPanel)) {}
};

// to [height, width] at ld = sum over few rows of a[row] b[row]^T, past the caches where `streams`. Both factors are copied: rows are
// gathered, and lie a power of two apart. Measured (Xeon, family 6, model 207, one core, float32), over reading them where they lie and
// writing to the caches: 128, 16 and 2 rows of 512 x 1024 take 0.80, 0.73 and 0.62 of the time, 64 of 1024 x 2048 0.72, of 128 x 1024
// 0.96.
template <class C, class S>
void outer_of_few(const C* const* a, const C* const* b, int64_t rows, int64_t height, int64_t width, S* to, int64_t ld, bool streams,
                  FewRows<C>& copies) {
    constexpr int64_t kPanel = FewRows<C>::kPanel;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t first = 0; first < width; first += kPanel) {
            C* row = copies.panels.data() + first * rows + r * kPanel;
            const int64_t n = std::min(kPanel, width - first);
            std::copy_n(b[r] + first, n, row);
            std::fill(row + n, row + kPanel, C(0));
        }
    streams &= kStreams && std::is_same_v<S, C> && reinterpret_cast<uintptr_t>(to) % kLine == 0 && ld * sizeof(S) % kLine == 0;
    for (int64_t top = 0; top < height; top += kLinesOfFew) {
        const int64_t n = std::min(kLinesOfFew, height - top);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(a[r] + top, n, copies.lines.data() + r * kLinesOfFew);
        for (int64_t first = 0; first < width; first += kPanel) {
            const C* panel = copies.panels.data() + first * rows;
            const int columns = static_cast<int>(std::min(kPanel, width - first));
            in_tiles<kRows>(n, [&](int64_t i, auto r) {
                constexpr int R = decltype(r)::value;
                Vec<C> acc[R][kVectors];
                tile_outer<C, R, kVectors>([&](int64_t row) { return copies.lines.data() + row * kLinesOfFew + i; },
                                           [&](int64_t row) { return panel + row * kPanel; }, rows, acc);
                for (int q = 0; q < R; ++q) {
                    S* line = to + (top + i + q) * ld + first;
                    if constexpr (std::is_same_v<S, C>)
                        if (streams && columns == kPanel) {
                            for (int j = 0; j < kVectors; ++j) stream(line + j * kLanes<C>, acc[q][j]);
                            continue;
                        }
                    put_narrowed(line, acc[q], columns);
                }
            });
        }
    }
    if (streams) end_streams();
}

// to [height, columns] = sum over rows of a[row] b[row]^T; zero without rows.
template <class S>
void outer(const std::vector<const compute_t<S>*>& a, const std::vector<const compute_t<S>*>& b, int64_t height,
           Range columns, int64_t ld, S* to, Buffer<compute_t<S>>& padded, Buffer<compute_t<S>>& sums,
           std::vector<const compute_t<S>*>& padded_rows) {
    using C = compute_t<S>;
    const int64_t rows = static_cast<int64_t>(a.size());
    const int width = static_cast<int>(columns.end - columns.begin);
    const int vectors = (width + kLanes<C> - 1) / kLanes<C>;
    const bool ragged = width % kLanes<C> != 0, several = rows > kDepth || !std::is_same_v<S, C>;
    const int64_t lds = vectors * kLanes<C>;
    if (several) std::fill(sums.data(), sums.data() + height * lds, C(0));
    for (int64_t begin = 0; begin < std::max<int64_t>(rows, 1); begin += kDepth) {
        const int64_t depth = std::min(kDepth, rows - begin);
        const C* const* right = b.data() + begin;
        int64_t at = columns.begin;
        if (ragged) {
            for (int64_t r = 0; r < depth; ++r) {
                std::memcpy(padded.data() + r * lds, b[begin + r] + columns.begin, width * sizeof(C));
                std::fill(padded.data() + r * lds + width, padded.data() + (r + 1) * lds, C(0));
                padded_rows[r] = padded.data() + r * lds;
            }
            right = padded_rows.data();
            at = 0;
        }
        with_constant<kVectors>(vectors, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const auto block = [&](int64_t i, auto r) {
                constexpr int R = decltype(r)::value;
                Vec<C> acc[R][N];
                tile_outer<C, R, N>([&](int64_t r) { return a[begin + r] + i; }, [&](int64_t r) { return right[r] + at; }, depth, acc);
                for (int q = 0; q < R; ++q) {
                    if (several) add(sums.data() + (i + q) * lds, acc[q], width);
                    else if constexpr (std::is_same_v<S, C>) put(to + (i + q) * ld + columns.begin, acc[q], width);
                }
            };
            in_tiles<kRows>(height, block);
        });
    }
    if (several)
        for (int64_t i = 0; i < height; ++i)
            for (int c = 0; c < width; ++c) to[i * ld + columns.begin + c] = narrow<S>(sums[i * lds + c]);
}

}  // namespace sparseffn
