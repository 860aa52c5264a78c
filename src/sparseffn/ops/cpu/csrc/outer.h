// Outer products of few rows.
#pragma once

#include <vector>

#include "parallel.h"
#include "product.h"

namespace sparseffn {

// to [height, width] = sum over few rows of a[row] b[row]^T, written nearly from the first element to the last.
template <class C, class S>
void outer_of_few(const C* const* a, const C* const* b, int64_t rows, int64_t height, int64_t width, S* to,
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
            for (int q = 0; q < R; ++q) {
                S* at = to + (i + q) * width + first;
                if constexpr (std::is_same_v<S, C>) put(at, acc[q], columns);
                else
                    for (int c = 0; c < columns; ++c) at[c] = narrow<S>(acc[q][c / kLanes<C>][c % kLanes<C>]);
            }
        }
    };
    int64_t i = 0;
    for (; i + kRows <= height; i += kRows) block(i, std::integral_constant<int, kRows>{});
    with_constant<kRows - 1>(static_cast<int>(height - i), [&](auto r) { block(i, r); });
}

}  // namespace sparseffn
