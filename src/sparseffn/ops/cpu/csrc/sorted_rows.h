// Rows of a routing, sorted by expert, as products of bfloat16 read them: where they lie, for pairs; in blocks that are tiles, for
// these. What is made by panels is written once for both.
#pragma once

#include "product_tiles.h"
#include "routing.h"

namespace sparseffn {

#if defined(SPARSEFFN_PAIR_PRODUCTS)

// Rows that are taken at a time; their products wait in float for their activation.
constexpr int64_t kWaiting = 96;

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

    PairRows(const Routing& routing, int64_t columns, const bf16* tokens)
        : by_token_(&routing), columns_(columns), own_(0), data_(tokens) {}
    // To be put.
    PairRows(const Routing& routing, int64_t columns) : columns_(columns), own_(routing.rows() * columns), data_(own_.data()) {}

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
    static void pack(const Matrix<bf16>& b, int64_t depth, int64_t columns, uint32_t* panel) { pack_panel(b, depth, columns, panel); }
    // In each of which a product fetches something.
    static int64_t turns(int64_t rows, int64_t, int64_t depth) { return tiles_in<kPairRows>(rows) * turns_in(depth); }
    // Calls out(row, registers) for up to kWaiting rows of an expert times a panel.
    template <class Out>
    void product(int64_t expert, Range rows, Range depth, const uint32_t* panel, int64_t columns, Coming& next, int64_t lines,
                 Scratch& scratch, Out&& out) const {
        for (int64_t r = rows.begin; r < rows.end; ++r) scratch.rows[r - rows.begin] = row(expert, r, depth.begin);
        product_pairs(scratch.rows.data(), rows.end - rows.begin, panel, depth.end - depth.begin, columns, next, lines,
                      [&](int64_t i, const auto& acc) { out(rows.begin + i, acc); });
    }

    // A gradient of weights: lines and columns in whole pieces.
    static constexpr int64_t kOuterLines = kOuterRows, kOuterColumns = kPairLanes;
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
class TileRows {
  public:
    using Thread = Tiles;
    struct Scratch {};

    // Of tokens, once filled.
    TileRows(const Routing& routing, int64_t columns, const bf16* tokens) : TileRows(routing, columns) { tokens_ = tokens; }
    TileRows(const Routing& routing, int64_t columns)
        : routing_(&routing),
          columns_(columns),
          across_(tiles_of(columns, kTileDepth)),
          first_(firsts(routing)),
          blocks_(first_.back() * across_ * kTileNumbers) {}

    int64_t columns() const { return columns_; }
    // By all threads of a team.
    void fill() {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < first_.back(); ++block) {
            const int64_t expert = std::upper_bound(first_.begin(), first_.end(), block) - first_.begin() - 1;
            const int64_t begin = routing_->offsets[expert] + (block - first_[expert]) * kTileRows;
            for (int64_t r = begin; r < std::min(begin + kTileRows, routing_->offsets[expert + 1]); ++r) {
                const bf16* from = tokens_ + routing_->token(r) * columns_;
                bf16* to = own(place(expert, r, 0));
                for (int64_t c = 0; c < columns_; c += kTileDepth, to += kTileNumbers)
                    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(first_halves(columns_ - c), from + c));
            }
        }
    }
    void put(int64_t expert, int64_t row, int64_t column, int64_t n, const float* numbers) {
        for (const int64_t end = column + n; column < end;) {
            const int64_t some = std::min(kTileDepth - column % kTileDepth, end - column);
            bf16* to = own(place(expert, row, column));
            for (int64_t c = 0; c < some; ++c) to[c] = narrow<bf16>(numbers[c]);
            column += some;
            numbers += some;
            if (column == columns_) std::fill(to + some, to + some + (across_ * kTileDepth - columns_), bf16{0});
        }
    }

    // Row r from a block's first column on.
    struct Row {
        const bf16* first;
        bf16 operator[](int64_t c) const { return first[c / kTileDepth * kTileNumbers + c % kTileDepth]; }
        // 32 numbers from there on, the first of a block.
        const bf16* operator+(int64_t c) const { return first + c / kTileDepth * kTileNumbers; }
    };
    Row row(int64_t expert, int64_t r, int64_t column) const { return {place(expert, r, column)}; }

    static int64_t pairs(int64_t depth) { return tiles_of(depth, kTileDepth) * kTileRows; }
    static void pack(const Matrix<bf16>& b, int64_t depth, int64_t columns, uint32_t* panel) {
        pack_panel(b, depth, columns, panel);
        end_panel(depth, columns, panel);
    }
    static int64_t turns(int64_t rows, int64_t columns, int64_t depth) {
        return tiles_of(rows, 2 * kTileRows) * tiles_of(vectors_in(columns), 2) * tiles_of(depth, kTileDepth);
    }
    // Depth begins with a tile.
    template <class Out>
    void product(int64_t expert, Range rows, Range depth, const uint32_t* panel, int64_t columns, Coming& next, int64_t lines, Scratch&,
                 Out&& out) const {
        const int64_t before = (rows.begin - routing_->offsets[expert]) % kTileRows, first = rows.begin - before;
        product_tiles(place(expert, first, depth.begin), across_ * kTileNumbers, rows.end - first, panel,
                      tiles_of(depth.end - depth.begin, kTileDepth), columns, next, lines, [&](int64_t i, const auto& acc) {
                          if (i >= before) out(first + i, acc);
                      });
    }

    // A gradient of weights: lines and columns in whole pieces.
    static constexpr int64_t kOuterLines = 2 * kTileRows, kOuterColumns = kTileDepth;
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
    const bf16* place(int64_t expert, int64_t row, int64_t column) const {
        const int64_t i = row - routing_->offsets[expert];
        const int64_t block = (first_[expert] + i / kTileRows) * across_ + column / kTileDepth;
        return blocks_.data() + block * kTileNumbers + i % kTileRows * kTileDepth + column % kTileDepth;
    }

    bf16* own(const bf16* at) { return blocks_.data() + (at - blocks_.data()); }

    const Routing* routing_;
    const bf16* tokens_ = nullptr;
    int64_t columns_, across_;
    std::vector<int64_t> first_;
    Buffer<bf16> blocks_;
};

#endif

#endif

}  // namespace sparseffn
