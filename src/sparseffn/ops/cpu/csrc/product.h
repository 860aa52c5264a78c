// Matrix-product tiles with gathered rows. Nothing is copied before a product: rows of A are pointers, so that a gather
// costs nothing, and B is read where it lies. Accumulation is in C, in a fixed order, so results do not depend on how work
// was divided.
#pragma once

#include "vectors.h"

namespace sparseffn {

// acc[i][j] = sum_k a[i][k] B[k, j]: rows of A contiguous in k.
template <class C, class S, int R, int N>
inline void tile_product(const C* const* a, const S* b, int64_t ldb, int64_t depth, Vec<C> (&acc)[R][N]) {
    const C* row[R];
    for (int i = 0; i < R; ++i) {
        row[i] = a[i];
        for (int j = 0; j < N; ++j) acc[i][j] = Vec<C>{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec<C> line[N];
        for (int j = 0; j < N; ++j) line[j] = load(b + k * ldb + j * kLanes<C>);
        // Few rows are bound by reading B; the hardware does not follow strided lines far enough ahead.
        if constexpr (R <= 2)
            for (int j = 0; j < N; ++j) __builtin_prefetch(b + (k + 12) * ldb + j * kLanes<C>);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const Vec<C> x = splat<C>(row[i][k]);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) acc[i][j] += x * line[j];
        }
    }
}

// acc[i][j] = sum_r a[r][i] b[r][j] over rows r: the outer products of a gradient of weights.
template <class C, int R, int N>
inline void tile_outer(const C* const* a, int64_t at, const C* const* b, int64_t bt, int64_t depth, Vec<C> (&acc)[R][N]) {
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < N; ++j) acc[i][j] = Vec<C>{};
    for (int64_t r = 0; r < depth; ++r) {
        const C* x = a[r] + at;
        const C* y = b[r] + bt;
        Vec<C> line[N];
        for (int j = 0; j < N; ++j) line[j] = load(y + j * kLanes<C>);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const Vec<C> s = splat<C>(x[i]);
#pragma GCC unroll 8
            for (int j = 0; j < N; ++j) acc[i][j] += s * line[j];
        }
    }
}

// Calls f(std::integral_constant<int, n>) for the n in 1..Most that equals `value`.
template <int Most, class F> inline void with_constant(int value, F&& f) {
    if constexpr (Most > 0) {
        if (value == Most) f(std::integral_constant<int, Most>{});
        else with_constant<Most - 1>(value, f);
    }
}

// B [depth, columns at ldb] as panels of whole vectors: the last one, if it is ragged, is copied into `padded`, zero-filled.
template <class C, class S> struct Panel {
    const S* data;
    int64_t ld;
    int64_t first;
    int columns;
    int vectors;
};

// Elements that the `padded` of a product or of `outer` over `depth` rows must hold.
template <class C> inline int64_t padded_size(int64_t depth) { return depth * 2 * kVectors * kLanes<C>; }

template <class C, class S>
inline Panel<C, S> panel_at(const S* b, int64_t ldb, int64_t depth, int64_t columns, int64_t first, int most, S* padded) {
    const int width = static_cast<int>(columns - first < most ? columns - first : most);
    const int vectors = (width + kLanes<C> - 1) / kLanes<C>;
    if (width % kLanes<C> == 0) return {b + first, ldb, first, width, vectors};
    const int64_t ld = vectors * kLanes<C>;
    for (int64_t k = 0; k < depth; ++k) {
        std::memcpy(padded + k * ld, b + k * ldb + first, width * sizeof(S));
        std::memset(padded + k * ld + width, 0, (ld - width) * sizeof(S));
    }
    return {padded, ld, first, width, vectors};
}

// Calls out(i, first column, columns, values) for each row i of `A B`, a panel of W registers of columns at a time.
template <class C, class S, int Rows, int W, class Out>
inline void product_of(const C* const* a, int64_t rows, const S* b, int64_t ldb, int64_t depth, int64_t columns, S* padded,
                       Out&& out) {
    for (int64_t first = 0; first < columns; first += W * kLanes<C>) {
        const Panel<C, S> panel = panel_at<C, S>(b, ldb, depth, columns, first, W * kLanes<C>, padded);
        with_constant<W>(panel.vectors, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const auto block = [&](int64_t i, auto r) {
                constexpr int R = decltype(r)::value;
                Vec<C> acc[R][N];
                tile_product<C, S, R, N>(a + i, panel.data, panel.ld, depth, acc);
                for (int q = 0; q < R; ++q) out(i + q, panel.first, panel.columns, acc[q]);
            };
            int64_t i = 0;
            for (; i + Rows <= rows; i += Rows) block(i, std::integral_constant<int, Rows>{});
            with_constant<Rows - 1>(static_cast<int>(rows - i), [&](auto r) { block(i, r); });
        });
    }
}

// Few rows take panels of twice the width: B is then read in longer stretches.
template <class C, class S, class Out>
inline void product(const C* const* a, int64_t rows, const S* b, int64_t ldb, int64_t depth, int64_t columns, S* padded,
                    Out&& out) {
    if (rows <= kRows / 2)
        product_of<C, S, kRows / 2, 2 * kVectors>(a, rows, b, ldb, depth, columns, padded, out);
    else
        product_of<C, S, kRows, kVectors>(a, rows, b, ldb, depth, columns, padded, out);
}

template <class C, int N> inline void put(C* to, const Vec<C> (&values)[N], int columns) {
    std::memcpy(to, values, columns * sizeof(C));
}

template <class C, int N> inline void add(C* to, const Vec<C> (&values)[N], int columns) {
    for (int j = 0; j < N; ++j) {
        const int left = columns - j * kLanes<C>;
        C* at = to + j * kLanes<C>;
        if (left >= kLanes<C>) store(at, load(at) + values[j]);
        else
            for (int c = 0; c < left; ++c) at[c] += values[j][c];
    }
}

}  // namespace sparseffn
