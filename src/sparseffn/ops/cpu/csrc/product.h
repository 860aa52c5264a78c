// Matrix-product tiles with gathered rows. Nothing is copied before a product: rows of A are pointers, so that a gather
// costs nothing, and B is read where it lies. Accumulation is in C, in an order that depends on the number of rows alone.
#pragma once

#include <vector>

#include "vectors.h"

// A tile's accumulators live in registers only where the tile is compiled into its caller.
#define SPARSEFFN_INLINE __attribute__((always_inline)) inline

namespace sparseffn {

// Lines of B that are fetched ahead, in rows: the hardware does not follow strided lines far enough.
constexpr int64_t kAhead = 12;

// Memory that the next product will read, brought into the second-level cache a line at a time during this one.
struct Fetch {
    const char* at = nullptr;
    const char* end = nullptr;

    template <class S> static Fetch of(const S* p, int64_t n) {
        return {reinterpret_cast<const char*>(p), reinterpret_cast<const char*>(p + n)};
    }
};
// Terms that are added up one after the other; sums of such sums err less than one long sum. Measured at 1,024 and 4,096
// tokens: 64 instead are 0 to 2% faster, and their largest error can be more than twice PyTorch's.
constexpr int64_t kTerms = 32;

// acc[i][j] = sum_k a[i][k] B[k, j]: rows of A contiguous in k. The first tile of a panel brings B into the cache, the others
// what comes next.
template <class C, class S, int R, int N, bool First>
SPARSEFFN_INLINE void tile_product(const C* const* a, const S* b, int64_t ldb, int64_t depth, Fetch& next, Vec<C> (&acc)[R][N]) {
    const char* ahead = next.at;
    const int64_t step = next.end - next.at >= depth * kLine ? kLine : 0;
    const C* row[R];
    for (int i = 0; i < R; ++i) {
        row[i] = a[i];
        for (int j = 0; j < N; ++j) acc[i][j] = Vec<C>{};
    }
    for (int64_t begin = 0; begin < depth; begin += kTerms) {
        Vec<C> part[R][N] = {};
        const int64_t end = begin + kTerms < depth ? begin + kTerms : depth;
        for (int64_t k = begin; k < end; ++k) {
            Vec<C> line[N];
            for (int j = 0; j < N; ++j) line[j] = load(b + k * ldb + j * kLanes<C>);
            if constexpr (First)
                for (int j = 0; j < N; ++j) __builtin_prefetch(b + (k + kAhead) * ldb + j * kLanes<C>);
            else {
                __builtin_prefetch(ahead, 0, 2);
                ahead += step;
            }
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                const Vec<C> x = splat<C>(row[i][k]);
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) part[i][j] += x * line[j];
            }
        }
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < N; ++j) acc[i][j] += part[i][j];
    }
    next.at = ahead;
}

// acc[i][j] = sum_r a[r][i] b[r][j] over rows r: the outer products of a gradient of weights.
template <class C, int R, int N>
SPARSEFFN_INLINE void tile_outer(const C* const* a, int64_t at, const C* const* b, int64_t bt, int64_t depth, Vec<C> (&acc)[R][N]) {
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < N; ++j) acc[i][j] = Vec<C>{};
    for (int64_t begin = 0; begin < depth; begin += kTerms) {
        Vec<C> part[R][N] = {};
        const int64_t end = begin + kTerms < depth ? begin + kTerms : depth;
        for (int64_t r = begin; r < end; ++r) {
            const C* x = a[r] + at;
            const C* y = b[r] + bt;
            Vec<C> line[N];
            for (int j = 0; j < N; ++j) line[j] = load(y + j * kLanes<C>);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
                const Vec<C> s = splat<C>(x[i]);
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) part[i][j] += s * line[j];
            }
        }
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < N; ++j) acc[i][j] += part[i][j];
    }
}

// Calls f(std::integral_constant<int, n>) for the n in 1..Most that equals `value`.
template <int Most, class F> inline void with_constant(int value, F&& f) {
    if constexpr (Most > 0) {
        if (value == Most) f(std::integral_constant<int, Most>{});
        else with_constant<Most - 1>(value, f);
    }
}

// Calls f(first, std::integral_constant<int, n>) for rows in tiles of n <= Most, as equal as they can be: one of one or two
// rows, left over, takes nearly as long as one of three, as each of its few sums waits for the product before.
template <int Most, class F> inline void in_tiles(int64_t rows, F&& f) {
    const int64_t tiles = (rows + Most - 1) / Most;
    for (int64_t first = 0, left = tiles; left > 0; --left) {
        const int n = static_cast<int>((rows - first + left - 1) / left);
        with_constant<Most>(n, [&](auto size) { f(first, size); });
        first += n;
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
// The same where the number of columns is known, or that of which whole vectors are split off.
template <class C> inline int64_t padded_size(int64_t depth, int64_t columns) {
    return columns % kLanes<C> == 0 ? 0 : padded_size<C>(depth);
}

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
                       Fetch& next, Out&& out) {
    for (int64_t first = 0; first < columns; first += W * kLanes<C>) {
        const Panel<C, S> panel = panel_at<C, S>(b, ldb, depth, columns, first, W * kLanes<C>, padded);
        with_constant<W>(panel.vectors, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const auto block = [&](int64_t i, auto r, auto is_first) {
                constexpr int R = decltype(r)::value;
                Vec<C> acc[R][N];
                tile_product<C, S, R, N, decltype(is_first)::value>(a + i, panel.data, panel.ld, depth, next, acc);
                for (int q = 0; q < R; ++q) out(i + q, panel.first, panel.columns, acc[q]);
            };
            // The ragged tile comes first: it has registers to spare for fetching ahead.
            const int64_t ragged = rows % Rows;
            with_constant<Rows - 1>(static_cast<int>(ragged), [&](auto r) { block(0, r, std::true_type{}); });
            if (ragged == 0 && rows > 0) block(0, std::integral_constant<int, Rows>{}, std::true_type{});
            for (int64_t i = ragged ? ragged : Rows; i < rows; i += Rows)
                block(i, std::integral_constant<int, Rows>{}, std::false_type{});
        });
    }
}

// Few rows take panels of twice the width: B is then read in longer stretches.
template <class C, class S, class Out>
inline void product(const C* const* a, int64_t rows, const S* b, int64_t ldb, int64_t depth, int64_t columns, S* padded,
                    Fetch next, Out&& out) {
    if (rows <= kRows / 2)
        product_of<C, S, kRows / 2, 2 * kVectors>(a, rows, b, ldb, depth, columns, padded, next, out);
    else
        product_of<C, S, kRows, kVectors>(a, rows, b, ldb, depth, columns, padded, next, out);
}

// Lines of B that are read side by side where they come from a list.
constexpr int kListed = 8;

// y[i] += sum over k in list of a[i][k] B[k, :], for R rows of A and B of at least one register's columns: each listed line is
// read once, from its first element to its last. With 4,096 of them one after the other, the largest error was 0.2 to 0.7 of
// PyTorch's.
template <class C, class S, int R>
inline void add_listed(const C* const* a, const S* b, int64_t ldb, int64_t columns, const std::vector<int64_t>& list,
                       C* const* y) {
    const int64_t count = static_cast<int64_t>(list.size());
    for (int64_t first = 0; first < count; first += kListed)
        with_constant<kListed>(static_cast<int>(count - first < kListed ? count - first : kListed), [&](auto n) {
            constexpr int N = decltype(n)::value;
            const int64_t* ks = list.data() + first;
            const auto sum = [&](int64_t j, Vec<C> (&acc)[R]) {
                for (int i = 0; i < R; ++i) acc[i] = Vec<C>{};
                for (int q = 0; q < N; ++q) {
                    const Vec<C> line = load(b + ks[q] * ldb + j);
                    for (int i = 0; i < R; ++i) acc[i] += splat<C>(a[i][ks[q]]) * line;
                }
            };
            Vec<C> acc[R];
            int64_t j = 0;
            for (; j + kLanes<C> <= columns; j += kLanes<C>) {
                sum(j, acc);
                for (int i = 0; i < R; ++i) store(y[i] + j, load(y[i] + j) + acc[i]);
            }
            if (j == columns) return;
            // The last columns as the end of a whole register.
            const int64_t from = columns - kLanes<C>;
            sum(from, acc);
            for (int i = 0; i < R; ++i)
                for (int64_t c = j; c < columns; ++c) y[i][c] += acc[i][c - from];
        });
}

// Sum over the lanes of a register, by halves.
template <class C> inline C sum_of_lanes(Vec<C> v) {
    C lanes[kLanes<C>];
    store(lanes, v);
    for (int half = kLanes<C> / 2; half > 0; half /= 2)
        for (int q = 0; q < half; ++q) lanes[q] += lanes[q + half];
    return lanes[0];
}

template <class C, int N> inline void put(C* to, const Vec<C> (&values)[N], int columns) {
    std::memcpy(to, values, columns * sizeof(C));
}

// The same, rounded to what is stored.
template <class S, int N> inline void put_narrowed(S* to, const Vec<compute_t<S>> (&values)[N], int columns) {
    using C = compute_t<S>;
    if constexpr (std::is_same_v<S, C>) return put(to, values, columns);
    C row[N * kLanes<C>];
    std::memcpy(row, values, sizeof row);
    for (int c = 0; c < columns; ++c) to[c] = narrow<S>(row[c]);
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
