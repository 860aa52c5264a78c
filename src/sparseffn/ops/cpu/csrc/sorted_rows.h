// Rows of a routing, sorted by expert, as products of bfloat16 read them: where they lie, for pairs; in blocks that are tiles, for
// these. What is made by panels is written once for both.
#pragma once

#include "product_tiles.h"
#include "routing.h"

namespace sparseffn {

#if defined(SPARSEFFN_PAIR_PRODUCTS)

// Rows that are taken at a time; their products wait in float for their activation.
constexpr int64_t kWaiting = 96;

// Some columns of a matrix, as products of rows take them: packed, or where they lie.
struct MatrixPanel {
    Matrix<bf16> b;
    int64_t depth, columns;
    const uint32_t* packed;
};

// Some columns of an expert's rows, woven into pairs of rows, as panels of so many registers, each of `Rows::pairs` lines.
template <int Vectors, class Rows> void pack_panels(const Rows& from, int64_t expert, Range rows, Range columns, uint32_t* to) {
    constexpr int64_t kWidth = Vectors * kPairLanes;
    const int64_t depth = rows.end - rows.begin, n = columns.end - columns.begin;
    weave(depth, n, [&](int64_t k) { return from.row(expert, rows.begin + k, columns.begin); },
          [&](int64_t pair, int64_t c, __m512i v) {
              const int64_t first = c / kWidth * kWidth;
              const int64_t ld = std::min<int64_t>(Vectors, vectors_in(n - first)) * kPairLanes;
              _mm512_storeu_si512(to + first * Rows::pairs(depth) + pair * ld + c - first, v);
          });
}

// Rows of numbers that lie side by side: tokens', or rows of their own.
class PairRows {
  public:
    // Nothing to do for a thread.
    struct Thread {
        Thread() {}
    };
    // What a product needs, by one thread.
    struct Scratch {
        std::vector<const bf16*> rows = std::vector<const bf16*>(kWaiting);
    };

    PairRows(const Routing& routing, int64_t columns, const bf16* tokens, bool = false)
        : by_token_(&routing), columns_(columns), own_(0), data_(tokens) {}
    // To be put.
    PairRows(const Routing& routing, int64_t columns, bool = false)
        : columns_(columns), own_(routing.rows() * columns), data_(own_.data()) {}

    int64_t columns() const { return columns_; }
    void fill() {}
    // Row r from a column on.
    const bf16* row(int64_t, int64_t r, int64_t column) const {
        return data_ + (by_token_ ? by_token_->token(r) : r) * columns_ + column;
    }
    void put(int64_t, int64_t row, int64_t column, int64_t n, const float* numbers) {
        bf16* to = own_.data() + row * columns_ + column;
        for (int64_t c = 0; c < n; ++c) to[c] = narrow<bf16>(numbers[c]);
    }

    static int64_t pairs(int64_t depth) { return pairs_in(depth); }
    MatrixPanel panel(const Matrix<bf16>& b, int64_t depth, int64_t columns, uint32_t* space) const {
        pack_panel(b, depth, columns, space);
        return {b, depth, columns, space};
    }
    // In each of which a product fetches something.
    static int64_t turns(int64_t rows, int64_t, int64_t depth) { return tiles_in<kPairRows>(rows) * turns_in(depth); }
    // Calls out(row, registers) for up to kWaiting rows of an expert, from column k on, times a panel.
    template <class Out>
    void product(int64_t expert, Range rows, int64_t k, const MatrixPanel& panel, Coming& next, int64_t lines, Scratch& scratch,
                 Out&& out) const {
        for (int64_t r = rows.begin; r < rows.end; ++r) scratch.rows[r - rows.begin] = row(expert, r, k);
        product_pairs(scratch.rows.data(), rows.end - rows.begin, panel.packed, panel.depth, panel.columns, next, lines,
                      [&](int64_t i, const auto& acc) { out(rows.begin + i, acc); });
    }

    // A gradient of weights: lines and columns in whole pieces.
    static constexpr int64_t kOuterLines = kOuterRows, kOuterColumns = kPairLanes;
    // Whether registers for a line of it are whole lines of a cache.
    static constexpr bool kStreams = kOuterVectors % 2 == 0;
    // Columns of some rows, in pairs of rows, as strips of kOuterRows columns: a tile's numbers lie side by side.
    void pack_left(int64_t expert, Range rows, Range columns, uint32_t* to) const {
        const int64_t depth = rows.end - rows.begin, strip = pairs_in(depth) * kOuterRows;
        weave(depth, columns.end - columns.begin, [&](int64_t k) { return row(expert, rows.begin + k, columns.begin); },
              [&](int64_t pair, int64_t c, __m512i v) {
                  uint32_t* strip_at = to + c / kOuterRows * strip + pair * kOuterRows;
                  std::memcpy(strip_at, &v, kOuterRows * sizeof *to);
                  std::memcpy(strip_at + strip, reinterpret_cast<const uint32_t*>(&v) + kOuterRows, kOuterRows * sizeof *to);
              });
    }
    // The same as panels.
    void pack_right(int64_t expert, Range rows, Range columns, uint32_t* to) const {
        pack_panels<kOuterVectors>(*this, expert, rows, columns, to);
    }
    // Calls out(row, first column, registers) for the tiles of the sum over some rows.
    template <class Out>
    static SPARSEFFN_OWN_FRAME void outer(int64_t depth, int64_t height, int64_t width, const uint32_t* left, const uint32_t* right,
                                          Out&& out) {
        constexpr int64_t kWidth = kOuterVectors * kPairLanes;
        const int64_t n_pairs = pairs_in(depth);
        for (int64_t column = 0; column < width; column += kWidth)
            with_constant<kOuterVectors>(std::min(kOuterVectors, vectors_in(width - column)), [&](auto n) {
                constexpr int N = decltype(n)::value;
                for (int64_t row = 0; row < height; row += kOuterRows) {
                    const uint32_t* strip = left + row * n_pairs;
                    __m512 acc[kOuterRows][N] = {};
                    tile_pairs<kOuterRows, N>(n_pairs, right + column * n_pairs, acc,
                                              [&](int i, int64_t k) { return strip[k * kOuterRows + i]; });
                    for (int i = 0; i < kOuterRows && row + i < height; ++i) out(row + i, column, acc[i]);
                }
            });
    }

  private:
    const Routing* by_token_ = nullptr;
    int64_t columns_;
    Buffer<bf16> own_;
    const bf16* data_;
};

#if defined(SPARSEFFN_TILES)

// Rows in blocks of 16 with 32 numbers of each, which lie as a tile takes them; those of 16 rows one behind the other. An expert begins
// with a block. Numbers behind a row's last one are zero, rows behind an expert's last one anything: they meet nobody else.
//
// A block is a tile of the first factor, [rows, numbers], times panels. Or it is turned, one of the second, [pairs of numbers, rows]: a
// matrix whose columns are lines is then the first one, where it lies.
class TileRows {
  public:
    using Thread = Tiles;
    struct Scratch {
        Buffer<float> sums = Buffer<float>((kWaiting + kTileRows) * kPanelColumns);
    };

    // Of tokens, once filled.
    TileRows(const Routing& routing, int64_t columns, const bf16* tokens, bool turned = false) : TileRows(routing, columns, turned) {
        tokens_ = tokens;
    }
    TileRows(const Routing& routing, int64_t columns, bool turned = false)
        : routing_(&routing),
          columns_(columns),
          across_(tiles_of(columns, kTileDepth)),
          turned_(turned),
          first_(firsts(routing)),
          blocks_(first_.back() * across_ * kTileNumbers) {}

    int64_t columns() const { return columns_; }
    // By all threads of a team.
    void fill() {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < first_.back(); ++block) {
            const int64_t expert = std::upper_bound(first_.begin(), first_.end(), block) - first_.begin() - 1;
            const int64_t begin = routing_->offsets[expert] + (block - first_[expert]) * kTileRows;
            const int64_t n = std::min(kTileRows, routing_->offsets[expert + 1] - begin);
            const bf16* rows[kTileRows];
            for (int64_t i = 0; i < kTileRows; ++i) rows[i] = tokens_ + routing_->token(begin + std::min(i, n - 1)) * columns_;
            bf16* to = blocks_.data() + block * across_ * kTileNumbers;
            for (int64_t c = 0; c < columns_; c += kTileDepth, to += kTileNumbers) {
                PairLine lines[kTileRows];
                const __mmask32 there = first_halves(columns_ - c);
                for (int64_t i = 0; i < kTileRows; ++i) lines[i] = (PairLine)_mm512_maskz_loadu_epi16(there, rows[i] + c);
                if (turned_) transpose_square<kTileRows / 2>(lines);
                std::memcpy(static_cast<void*>(to), lines, sizeof lines);
            }
        }
    }
    // Numbers of whole registers' columns, or of a row's last.
    void put(int64_t expert, int64_t row, int64_t column, int64_t n, const float* numbers) {
        alignas(64) bf16 narrowed[kPanelColumns + kTileDepth] = {};
        for (int64_t c = 0; c < n; ++c) narrowed[c] = narrow<bf16>(numbers[c]);
        if (column + n == columns_) n = across_ * kTileDepth - column;
        for (int64_t c = 0; c < n; c += kPairLanes) {
            bf16* block = own(place(expert, row, (column + c) / kTileDepth * kTileDepth));
            const int64_t at = (column + c) % kTileDepth;
            if (!turned_) {
                std::memcpy(static_cast<void*>(block + at), narrowed + c, kPairLanes * sizeof(bf16));
                continue;
            }
            for (int64_t q = 0; q < kPairLanes; q += 2)
                std::memcpy(static_cast<void*>(block + (at + q) * kTileRows), narrowed + c + q, 2 * sizeof(bf16));
        }
    }

    // Row r from a block's first column on; not of blocks that are turned.
    struct Row {
        const bf16* first;
        bf16 operator[](int64_t c) const { return first[c / kTileDepth * kTileNumbers + c % kTileDepth]; }
        // 32 numbers from there on, the first of a block.
        const bf16* operator+(int64_t c) const { return first + c / kTileDepth * kTileNumbers; }
    };
    Row row(int64_t expert, int64_t r, int64_t column) const { return {place(expert, r, column)}; }

    static int64_t pairs(int64_t depth) { return tiles_of(depth, kTileDepth) * kTileRows; }
    MatrixPanel panel(const Matrix<bf16>& b, int64_t depth, int64_t columns, uint32_t* space) const {
        if (turned_) return {b, depth, columns, nullptr};
        pack_panel(b, depth, columns, space);
        end_panel(depth, columns, space);
        return {b, depth, columns, space};
    }
    static int64_t turns(int64_t rows, int64_t columns, int64_t depth) {
        return tiles_of(rows, 2 * kTileRows) * tiles_of(vectors_in(columns), 2) * tiles_of(depth, kTileDepth);
    }
    // k begins a block.
    template <class Out>
    void product(int64_t expert, Range rows, int64_t k, const MatrixPanel& panel, Coming& next, int64_t lines, Scratch& scratch,
                 Out&& out) const {
        const int64_t before = (rows.begin - routing_->offsets[expert]) % kTileRows, first = rows.begin - before, n = rows.end - first;
        const bf16* blocks = place(expert, first, k);
        const int64_t apart = across_ * kTileNumbers;
        const auto own_rows = [&](int64_t i, const auto& acc) {
            if (i >= before) out(first + i, acc);
        };
        if (!turned_)
            return product_tiles(blocks, apart, n, panel.packed, tiles_of(panel.depth, kTileDepth), panel.columns, next, lines, own_rows);
        product_lines_by_tiles(blocks, apart, n, panel.b.data, panel.b.column, panel.depth, panel.columns, next,
                               scratch.sums.data());
        with_constant<kPanelVectors>(vectors_in(panel.columns), [&](auto n_vectors) {
            for (int64_t i = 0; i < n; ++i) {
                __m512 acc[decltype(n_vectors)::value];
                std::memcpy(acc, scratch.sums.data() + i * kPanelColumns, sizeof acc);
                own_rows(i, acc);
            }
        });
    }

    // A gradient of weights: lines and columns in whole pieces.
    static constexpr int64_t kOuterLines = 2 * kTileRows, kOuterColumns = kTileDepth;
    static constexpr bool kStreams = kPanelVectors % 2 == 0;
    // Columns of some rows as tiles of 16 columns and 32 rows; those of the same columns lie one behind the other.
    void pack_left(int64_t expert, Range rows, Range columns, uint32_t* to) const {
        const int64_t depth = rows.end - rows.begin, height = columns.end - columns.begin, across = tiles_of(depth, kTileDepth);
        for (int64_t k = 0; k < across; ++k)
            for (int64_t c = 0; c < height; c += 2 * kTileRows) {
                PairLine lines[2][kTileRows];
                const Range some{k * kTileDepth, std::min((k + 1) * kTileDepth, depth)};
                weave(some.end - some.begin, 2 * kTileRows,
                      [&](int64_t r) { return row(expert, rows.begin + some.begin + r, columns.begin + c); },
                      [&](int64_t pair, int64_t column, __m512i v) { lines[column / kTileRows][pair] = (PairLine)v; });
                for (int half = 0; half < 2 && c + half * kTileRows < height; ++half) {
                    std::fill(lines[half] + pairs_in(some.end - some.begin), lines[half] + kTileRows, PairLine{});
                    transpose_square<kTileRows / 2>(lines[half]);
                    std::memcpy(to + ((c / kTileRows + half) * across + k) * kTileNumbers / 2, lines[half], sizeof lines[half]);
                }
            }
    }
    void pack_right(int64_t expert, Range rows, Range columns, uint32_t* to) const {
        pack_panels<kPanelVectors>(*this, expert, rows, columns, to);
        const int64_t depth = rows.end - rows.begin, n = columns.end - columns.begin;
        for (int64_t c = 0; c < n; c += kPanelColumns) end_panel(depth, std::min(kPanelColumns, n - c), to + c * pairs(depth));
    }
    template <class Out>
    static void outer(int64_t depth, int64_t height, int64_t width, const uint32_t* left, const uint32_t* right, Out&& out) {
        const int64_t across = tiles_of(depth, kTileDepth);
        Coming nothing;
        for (int64_t c = 0; c < width; c += kPanelColumns)
            product_tiles(reinterpret_cast<const bf16*>(left), across * kTileNumbers, height, right + c * pairs(depth), across,
                          std::min(kPanelColumns, width - c), nothing, 0, [&](int64_t i, const auto& acc) { out(i, c, acc); });
    }

  private:
    // Each expert's first block, and their number.
    static std::vector<int64_t> firsts(const Routing& routing) {
        std::vector<int64_t> first{0};
        for (int64_t e = 0; e < routing.experts; ++e)
            first.push_back(first.back() + tiles_of(routing.offsets[e + 1] - routing.offsets[e], kTileRows));
        return first;
    }
    // A row's numbers from a block's first on; where blocks are turned, its pairs, at 64 bytes.
    const bf16* place(int64_t expert, int64_t row, int64_t column) const {
        const int64_t i = row - routing_->offsets[expert];
        const int64_t block = (first_[expert] + i / kTileRows) * across_ + column / kTileDepth;
        return blocks_.data() + block * kTileNumbers + i % kTileRows * (turned_ ? 2 : kTileDepth);
    }

    bf16* own(const bf16* at) { return blocks_.data() + (at - blocks_.data()); }

    const Routing* routing_;
    const bf16* tokens_ = nullptr;
    int64_t columns_, across_;
    bool turned_;
    std::vector<int64_t> first_;
    Buffer<bf16> blocks_;
};

#endif

#endif

}  // namespace sparseffn
