// Products of bfloat16 on tiles: registers of 16 rows of 64 bytes, of which one instruction multiplies two, 16 rows of 32 numbers by 16
// columns of 32, and adds to 16 x 16 floats (Intel's AMX). Measured on one core of family 6, model 167 (Xeon): 2,500 GFLOP/s in
// registers and 1,600 from the second-level cache, where the instruction for pairs of a vector reaches 60 and a float product 100.
#pragma once

#include "product_pairs.h"

#if defined(SPARSEFFN_PAIR_PRODUCTS) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && !defined(SPARSEFFN_NO_TILES)
#define SPARSEFFN_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparseffn {

#if defined(SPARSEFFN_TILES)

// Whether the system lets this process use tiles; it is asked once.
inline bool has_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, and the state's number
    static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return allowed;
}

// Rows, and bytes of a row, of a tile; rows and numbers of bfloat16 of a block of memory that is one.
constexpr int64_t kTileRows = 16, kTileBytes = 64, kTileDepth = 32, kTileNumbers = kTileRows * kTileDepth;

// Tiles of this thread, all of 16 rows of 64 bytes; afterwards as they were: PyTorch's libraries use them, too.
class Tiles {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };

  public:
    Tiles() {
        Shapes ours;
        for (int tile = 0; tile < 8; ++tile) {
            ours.bytes[tile] = kTileBytes;
            ours.rows[tile] = kTileRows;
        }
        asm volatile("sttilecfg %0" : "=m"(before_));
        asm volatile("ldtilecfg %0" : : "m"(ours));
    }
    ~Tiles() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // GCC 12's own functions do not tell the compiler that they read or write memory.
    template <int T> SPARSEFFN_INLINE static void load(const void* from, int64_t bytes_apart) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(bytes_apart), "i"(T) : "memory");
    }
    template <int T> SPARSEFFN_INLINE static void store(void* to, int64_t bytes_apart) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(bytes_apart), "i"(T) : "memory");
    }
    template <int T> SPARSEFFN_INLINE static void set_to_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
    template <int Sum, int A, int B> SPARSEFFN_INLINE static void add_product() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
    }

  private:
    Shapes before_;
};

inline int64_t tiles_of(int64_t numbers, int64_t of_one) { return (numbers + of_one - 1) / of_one; }

// Sums of R x N tiles, at kPanelColumns from row to row, of R blocks of rows, so many numbers apart, times N registers of a panel's
// columns. Blocks of the same rows lie one behind the other. In each step so many lines of what comes next are fetched.
template <int R, int N>
SPARSEFFN_OWN_FRAME void sums_of_tiles(const bf16* a, int64_t apart, const uint32_t* panel, int64_t ld, int64_t depth_tiles,
                                       Coming& next, int64_t lines, float* to) {
    constexpr int64_t kNumber = sizeof(float);
    const auto in_each = [&](auto&& f) {
        f(std::integral_constant<int, 0>{}, std::integral_constant<int, 0>{});
        if constexpr (N > 1) f(std::integral_constant<int, 0>{}, std::integral_constant<int, 1>{});
        if constexpr (R > 1) f(std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{});
        if constexpr (R > 1 && N > 1) f(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
    };
    in_each([](auto i, auto j) { Tiles::set_to_zero<2 * i + j>(); });
    for (int64_t k = 0; k < depth_tiles; ++k) {
        next.fetch(lines);
        Tiles::load<4>(a + k * kTileNumbers, kTileBytes);
        if constexpr (R > 1) Tiles::load<5>(a + apart + k * kTileNumbers, kTileBytes);
        const uint32_t* b = panel + k * kTileRows * ld;
        Tiles::load<6>(b, ld * kNumber);
        if constexpr (N > 1) Tiles::load<7>(b + kPairLanes, ld * kNumber);
        in_each([](auto i, auto j) { Tiles::add_product<2 * i + j, 4 + i, 6 + j>(); });
    }
    in_each([&](auto i, auto j) {
        Tiles::store<2 * i + j>(to + i * kTileRows * kPanelColumns + j * kPairLanes, kPanelColumns * kNumber);
    });
}

// Calls out(i, registers) for each of so many rows, in blocks, times a panel that ends with whole tiles.
template <class Out>
SPARSEFFN_OWN_FRAME void product_tiles(const bf16* blocks, int64_t apart, int64_t rows, const uint32_t* panel, int64_t depth_tiles,
                                       int64_t columns, Coming& next, int64_t lines, Out&& out) {
    alignas(64) float sums[2 * kTileRows * kPanelColumns];
    with_constant<kPanelVectors>(vectors_in(columns), [&](auto n) {
        constexpr int N = decltype(n)::value;
        for (int64_t first = 0; first < rows; first += 2 * kTileRows) {
            const int64_t some = std::min(rows - first, 2 * kTileRows);
            const bf16* a = blocks + first / kTileRows * apart;
            for (int j = 0; j < N; j += 2)
                with_constant<2>(std::min(N - j, 2), [&](auto n_tiles) {
                    constexpr int C = decltype(n_tiles)::value;
                    const uint32_t* b = panel + j * kPairLanes;
                    float* to = sums + j * kPairLanes;
                    if (some > kTileRows) sums_of_tiles<2, C>(a, apart, b, N * kPairLanes, depth_tiles, next, lines, to);
                    else sums_of_tiles<1, C>(a, apart, b, N * kPairLanes, depth_tiles, next, lines, to);
                });
            for (int64_t i = 0; i < some; ++i) {
                __m512 row[N];
                std::memcpy(row, sums + i * kPanelColumns, sizeof row);
                out(first + i, row);
            }
        }
    });
}

// A panel as tiles read it: zero to the end of its last one.
inline void end_panel(int64_t depth, int64_t columns, uint32_t* panel) {
    const int64_t ld = vectors_in(columns) * kPairLanes, pairs = tiles_of(depth, kTileDepth) * kTileRows;
    std::fill(panel + pairs_in(depth) * ld, panel + pairs * ld, 0u);
}

#endif

}  // namespace sparseffn
