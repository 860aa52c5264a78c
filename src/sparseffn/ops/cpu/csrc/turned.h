// Products of many rows with a matrix whose columns are lines of memory: lines meet packed rows, so that no line is packed. Packing
// the matrix instead costs, with 64 rows, a tenth to a fifth of the time: measured cold (Xeon, family 6, model 207, one core,
// float32) 64 rows of 1024 x 512, 512 x 1024 and 2048 x 1024 take 0.85, 0.89 and 0.80 of it, 128 rows of 1024 x 512 0.93. Sums have
// the same bits.
#pragma once

#include "transpose.h"

namespace sparseffn {

// Lines whose sums are turned together, in whole squares.
constexpr int64_t kTurnedLines = 8 * kRows;
// Bytes of packed rows, which stay in the second-level cache; a panel of them is always packed.
constexpr int64_t kTurnedBytes = int64_t(1) << 19;

// Of n rows of a depth: those that are packed at a time, and elements of the memory for them and for sums, which are no fewer than
// those of fewer rows or of a smaller depth.
template <class C> struct TurnedSize {
    int64_t rows, elements;

    TurnedSize(int64_t n, int64_t depth) {
        constexpr int64_t kPanel = kVectors * kLanes<C>, kPacked = kTurnedBytes / static_cast<int64_t>(sizeof(C));
        const int64_t all = (n + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
        rows = std::min(all, std::max(kPacked / std::max<int64_t>(depth, 1) / kPanel * kPanel, kPanel));
        elements = std::min(all * depth, std::max(kPacked, kPanel * depth)) + all * kTurnedLines;
    }
};

// Calls f(row, first column, values, columns) for each of `columns` rows of the transpose of `rows` rows, which are at line_at(row),
// by squares of one register's lanes.
template <class C, class LineAt, class F> inline void in_squares(int64_t rows, int64_t columns, LineAt&& line_at, F&& f) {
    constexpr int N = kSquare<C>;
    Vec<C> square[N];
    int64_t i = 0;
    for (; i + N <= rows; i += N) {
        int64_t k = 0;
        for (; k + N <= columns; k += N) {
            for (int q = 0; q < N; ++q) square[q] = load(line_at(i + q) + k);
            transpose_square<N / 2>(square);
            for (int q = 0; q < N; ++q) f(k + q, i, square[q], N);
        }
        for (; k < columns; ++k) {
            for (int q = 0; q < N; ++q) square[0][q] = line_at(i + q)[k];
            f(k, i, square[0], N);
        }
    }
    for (int64_t k = 0; k < columns && i < rows; ++k) {
        square[0] = Vec<C>{};
        for (int64_t q = i; q < rows; ++q) square[0][q - i] = line_at(q)[k];
        f(k, i, square[0], rows - i);
    }
}

// out(i, first column, values, columns) for each of n rows a[i] times B, whose column j is the `depth` numbers at line_at(j), for
// registers of columns; `coming_at(j, lines)` are the lines from j on, `next` what is read after B.
template <class C, class LineAt, class ComingAt, class Out>
void product_turned(const C* const* a, int64_t n, int64_t depth, int64_t columns, LineAt&& line_at, ComingAt&& coming_at,
                    const Coming& next, C* space, Out&& out) {
    constexpr int64_t L = kLanes<C>;
    const int64_t most = TurnedSize<C>(n, depth).rows;
    C* const sums = space + most * depth;
    for (int64_t start = 0; start < n; start += most) {
        const int64_t rows = std::min(most, n - start), vectors = (rows + L - 1) / L, panels = (vectors + kVectors - 1) / kVectors;
        // Panels of nearly as many registers of rows.
        const auto vectors_before = [&](int64_t panel) { return vectors * panel / panels; };
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t first = vectors_before(p) * L, ld = vectors_before(p + 1) * L - first;
            C* const panel = space + first * depth;
            in_squares<C>(std::min(ld, rows - first), depth, [&](int64_t i) { return a[start + first + i]; },
                          [&](int64_t k, int64_t i, Vec<C> values, int64_t) { store(panel + k * ld + i, values); });
        }
        for (int64_t top = 0; top < columns; top += kTurnedLines) {
            const int64_t lines = std::min(kTurnedLines, columns - top);
            in_tiles<kRows>(lines, [&](int64_t j, auto r) {
                constexpr int R = decltype(r)::value;
                const C* line[R];
                for (int q = 0; q < R; ++q) line[q] = line_at(top + j + q);
                const int64_t after = top + j + R;
                Coming coming = after < columns ? coming_at(after, std::min<int64_t>(R, columns - after)) : next;
                const int64_t per_turn = coming.share(panels * turns_in(depth));
                for (int64_t p = 0; p < panels; ++p) {
                    const int64_t first = vectors_before(p) * L;
                    with_constant<kVectors>(static_cast<int>(vectors_before(p + 1) - vectors_before(p)), [&](auto v) {
                        constexpr int N = decltype(v)::value;
                        Vec<C> acc[R][N];
                        tile_product<C, C, R, N, Tile::kLater>(line, space + first * depth, N * L, depth, coming, per_turn, nullptr, acc);
                        for (int q = 0; q < R; ++q) std::memcpy(sums + (j + q) * vectors * L + first, acc[q], sizeof acc[q]);
                    });
                }
            });
            in_squares<C>(lines, rows, [&](int64_t j) { return sums + j * vectors * L; },
                          [&](int64_t i, int64_t j, Vec<C> values, int64_t width) { out(start + i, top + j, values, width); });
        }
    }
}

}  // namespace sparseffn
