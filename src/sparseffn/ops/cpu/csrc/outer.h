// Outer products of few rows, and of many.
#pragma once

#include <vector>

#include "parallel.h"
#include "product.h"

namespace sparseffn {

// Rows of a weight gradient that are added up before the tile is written.
constexpr int64_t kDepth = 512;

// to [height, width] at ld = sum over few rows of a[row] b[row]^T, written nearly from the first element to the last.
template <class C, class S>
void outer_of_few(const C* const* a, const C* const* b, int64_t rows, int64_t height, int64_t width, S* to, int64_t ld,
                  Buffer<C>& padded, std::vector<const C*>& padded_rows) {
    constexpr int64_t kPanel = kVectors * kLanes<C>;
    const int64_t tail = width / kPanel * kPanel, rest = width - tail;
    for (int64_t r = 0; r < rows && rest; ++r) {
        C* row = padded.data() + r * kPanel;
        std::copy_n(b[r] + tail, rest, row);
        std::fill(row + rest, row + kPanel, C(0));
        padded_rows[r] = row;
    }
    const auto block = [&](int64_t i, auto r) {
        constexpr int R = decltype(r)::value;
        for (int64_t first = 0; first < width; first += kPanel) {
            const bool last = first == tail;
            Vec<C> acc[R][kVectors];
            tile_outer<C, R, kVectors>(a, i, last ? padded_rows.data() : b, last ? 0 : first, rows, acc);
            const int columns = static_cast<int>(last ? rest : kPanel);
            for (int q = 0; q < R; ++q) put_narrowed(to + (i + q) * ld + first, acc[q], columns);
        }
    };
    in_tiles<kRows>(height, block);
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
                tile_outer<C, R, N>(a.data() + begin, i, right, at, depth, acc);
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
