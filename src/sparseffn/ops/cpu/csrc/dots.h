// Products with a matrix whose columns are lines of memory, as dot products: nothing is copied, and the matrix is read once.
#pragma once

#include <algorithm>
#include <utility>

#include "product.h"
#include "shuffle.h"

namespace sparseffn {

// The first n of a register's numbers, then zeros.
template <class C, class S> inline Vec<C> load_part(const S* p, int64_t n) {
    S lanes[kLanes<C>] = {};
    std::memcpy(lanes, p, n * sizeof(S));
    return load(lanes);
}

// How lines of S meet rows of A: the numbers in one register, and what is added to a sum of lanes.
template <class A, class S> struct Meeting {
    using C = compute_t<S>;
    using Register = Vec<C>;
    static constexpr int kStep = kLanes<C>, kStepBytes = kStep * sizeof(S);

    template <class T> static Register get(const T* p) { return load(p); }
    template <class T> static Register get_part(const T* p, int64_t n) { return load_part<C>(p, n); }
    static constexpr MultiplyAdd<Vec<C>> sum{};
};

#if defined(SPARSEFFN_PAIRS)
template <> struct Meeting<bf16, bf16> {
    using Register = __m512i;
    static constexpr int kStep = 32, kStepBytes = 64;

    static Register get(const bf16* p) { return _mm512_loadu_si512(p); }
    static Register get_part(const bf16* p, int64_t n) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t(1) << n) - 1), p);
    }
    SPARSEFFN_INLINE static Vec<float> sum(Vec<float> acc, Register a, Register b) {
        return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
    }
};
#endif

// Two registers as one: of each, `2 Half` lanes lie together for each of its sums, whose first half and second are added.
template <int Half, class V, int... Q> SPARSEFFN_INLINE V fold(const V& a, const V& b, std::integer_sequence<int, Q...>) {
    constexpr int n = sizeof...(Q);
    const V first = SPARSEFFN_SHUFFLE(V, a, b, ((Q * 2 / n) * n + (Q % (n / 2)) / Half * 2 * Half + Q % Half)...);
    const V second = SPARSEFFN_SHUFFLE(V, a, b, ((Q * 2 / n) * n + (Q % (n / 2)) / Half * 2 * Half + Half + Q % Half)...);
    return first + second;
}

// Sums over the lanes of R x N registers, by halves as sum_of_lanes: hence the same bits where that is what does it.
template <class C, int R, int N> SPARSEFFN_INLINE void sums_of_lanes(const Vec<C> (&v)[R][N], C (&sums)[R][N]) {
    constexpr int n = kLanes<C>;
    if constexpr (N != 4 || n < 4) {
        for (int i = 0; i < R; ++i)
            for (int j = 0; j < N; ++j) sums[i][j] = sum_of_lanes<C>(v[i][j]);
    } else {
        using Lanes = std::make_integer_sequence<int, n>;
        Vec<C> folded[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
            folded[i] = fold<n / 4>(fold<n / 2>(v[i][0], v[i][1], Lanes{}), fold<n / 2>(v[i][2], v[i][3], Lanes{}), Lanes{});
        // Those of two rows, then of four, in one register.
        if constexpr (n >= 8) {
#pragma GCC unroll 4
            for (int i = 0; i < R; i += 2) folded[i] = fold<n / 8>(folded[i], folded[i + 1 < R ? i + 1 : i], Lanes{});
        }
        if constexpr (n >= 16) {
#pragma GCC unroll 2
            for (int i = 0; i < R; i += 4) folded[i] = fold<n / 16>(folded[i], folded[i + 2 < R ? i + 2 : i], Lanes{});
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; i += n / N) std::memcpy(&sums[i], &folded[i], std::min(R - i, n / N) * sizeof sums[0]);
    }
}

// Lines that are read side by side, and rows that meet them in registers. As many lines after them are fetched meanwhile, in the
// order of memory where these lie in one piece: the hardware does not follow a line from page to page. Measured cold on two cores
// (Zen 5), gated experts of bfloat16 at width 2,048: 8% less time with 8 tokens and 5% with 64 than with each line fetched from where
// the one before it is read; and that was 1.3 to 1.9 times as fast as with memory fetched 64 KiB ahead of the reading.
constexpr int kDotLines = 4, kDotTile = kBytes == 64 ? 6 : kBytes == 16 && kVectors == 4 ? 5 : 2;

// Each of several tiles of rows fetches its part: if the first one fetched all, memory would rest during the others (Zen 4, bfloat16,
// eight rows: 0.88 of the time). One tile waits for memory, and its lines come into the second-level cache, which has more requests
// under way (one to four rows: 0.85 to 0.9), from so many bytes ahead at least: from nearer they come late (lines of 128 and 256 numbers,
// one or two rows: 0.8 to 0.95 of the time that 1 to 4 KiB ahead takes). Several tiles that read fewer bytes wait for that cache more
// than for memory, and theirs come into the first (lines of 128 and 256 numbers, eight rows: 0.8), as those do that are converted.
// Lines that are apart come into the second always.
constexpr int64_t kFarBytes = 8192;

// What a tile fetches of the lines that come next: from where, and so many bytes further in each step, in each of N places: side by
// side where lines lie in one piece, else so many bytes apart. Near, of those in one piece, is the first-level cache.
struct Ahead {
    const char* at;
    int64_t along, apart;
    bool in_one_piece, near;
};

// sums[i][j] = a[i] . B[j], B's lines at ldb.
template <class A, class S, int R, int N>
SPARSEFFN_INLINE void tile_dots(const A* const* a, const S* b, int64_t ldb, int64_t depth, Ahead ahead,
                                compute_t<S> (&sums)[R][N]) {
    using C = compute_t<S>;
    using M = Meeting<A, S>;
    Vec<C> acc[R][N] = {};
    const auto run = [&](auto in_one_piece, auto near) {
        constexpr bool kInOnePiece = decltype(in_one_piece)::value;
        constexpr int kLevel = decltype(near)::value ? 3 : 2;
        const auto step = [&](int64_t k, auto get_a, auto get_b) {
            for (int j = 0; j < N; ++j) __builtin_prefetch(ahead.at + j * (kInOnePiece ? M::kStepBytes : ahead.apart), 0, kLevel);
            ahead.at += ahead.along;
            tile_step<R, N>(acc, [&](int i) { return get_a(a[i] + k); }, [&](int j) { return get_b(b + j * ldb + k); }, M::sum);
        };
        int64_t k = 0;
        for (; k + M::kStep <= depth; k += M::kStep)
            step(k, [](const A* p) { return M::get(p); }, [](const S* p) { return M::get(p); });
        // In lanes of their own: added one by one to the sum of lanes, up to 15 terms would each be rounded at its size.
        if (const int64_t n = depth - k)
            step(k, [n](const A* p) { return M::get_part(p, n); }, [n](const S* p) { return M::get_part(p, n); });
    };
    // A fixed distance is worth a loop of its own: that of one or two rows took up to 10% longer without.
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (!ahead.in_one_piece) run(no, no);
    else if (ahead.near) run(yes, yes);
    else run(yes, no);
    sums_of_lanes<C>(acc, sums);
}

// Calls out(i, first column, columns, sums) for every row i of A and some lines of B at a time.
template <class A, class S, class Out>
inline void product_dots(const A* const* a, int64_t rows, const S* b, int64_t ldb, int64_t depth, int64_t columns, Out&& out) {
    using C = compute_t<S>;
    constexpr int64_t kStep = Meeting<A, S>::kStep, kSize = sizeof(S), kStepBytes = Meeting<A, S>::kStepBytes;
    const int64_t tiles = std::max<int64_t>(tiles_in<kDotTile>(rows), 1), steps = (depth + kStep - 1) / kStep;
    const auto block = [&](int64_t j, auto n) {
        constexpr int N = decltype(n)::value;
        // Lines in one piece are fetched as one. Each tile fetches its part, rounded up.
        const bool in_one_piece = N > 1 && ldb == depth;
        const int64_t bytes = N * depth * kSize, along = ((in_one_piece ? N : 1) * kStepBytes + tiles - 1) / tiles;
        const bool near = !std::is_same_v<A, S> || (tiles > 1 && bytes < kFarBytes);
        const int64_t further = in_one_piece && !near ? std::max<int64_t>(kFarBytes - bytes, 0) : 0;
        Ahead ahead{reinterpret_cast<const char*>(b + (j + N) * ldb) + further, along, ldb * kSize, in_one_piece, near};
        const auto tile = [&](int64_t i, auto r) {
            constexpr int R = decltype(r)::value;
            C sums[R][N];
            tile_dots<A, S, R, N>(a + i, b + j * ldb, ldb, depth, ahead, sums);
            ahead.at += steps * along;
            for (int q = 0; q < R; ++q) out(i + q, j, N, sums[q]);
        };
        in_tiles<kDotTile>(rows, tile);
    };
    int64_t j = 0;
    for (; j + kDotLines <= columns; j += kDotLines) block(j, std::integral_constant<int, kDotLines>{});
    for (; j < columns; ++j) block(j, std::integral_constant<int, 1>{});
}

}  // namespace sparseffn
