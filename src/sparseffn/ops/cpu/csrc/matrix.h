// Matrices with any strides, one for each expert, and products with them: none is copied whole, what does not lie in lines of rows
// is packed by panels of columns.
#pragma once

#include "dots.h"
#include "lines.h"
#include "parallel.h"
#include "product.h"
#include "transpose.h"

namespace sparseffn {

// Element (r, c) is data[r * row + c * column].
template <class S> struct Matrix {
    const S* data;
    int64_t row, column;

    const S* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
    Matrix from(int64_t r, int64_t c) const { return {at(r, c), row, column}; }
    Matrix transposed() const { return {data, column, row}; }
};

// Element (e, r, c) is data[e * expert + r * row + c * column]; without data there are none.
template <class S> struct Matrices {
    const S* data = nullptr;
    int64_t expert = 0, row = 0, column = 0;

    explicit operator bool() const { return data != nullptr; }
    Matrix<S> of(int64_t e) const { return {data + e * expert, row, column}; }
    Matrices transposed() const { return {data, expert, column, row}; }
};

template <class S> struct OutMatrices {
    S* data = nullptr;
    int64_t expert = 0, row = 0, column = 0;

    S* of(int64_t e) const { return data + e * expert; }
    explicit operator bool() const { return data != nullptr; }
    // Whether a row is a line of memory, not a column; and from line to line.
    bool by_rows() const { return column == 1; }
    int64_t ld() const { return by_rows() ? row : column; }
};

// Matrix e, [rows, columns], set to zero.
template <class S> void set_to_zero(const OutMatrices<S>& m, int64_t e, int64_t rows, int64_t columns) {
    if (!m.by_rows()) std::swap(rows, columns);
    for (int64_t r = 0; r < rows; ++r) std::memset(static_cast<void*>(m.of(e) + r * m.ld()), 0, columns * sizeof(S));
}

// The lines of B [depth, columns].
template <class S> Coming coming_of(const Matrix<S>& b, int64_t depth, int64_t columns) {
    if (b.column == 1) return {b.data, depth, b.row, columns};
    if (b.row == 1) return {b.data, columns, b.column, depth};
    return {};
}

// What a product with B reads first: of a matrix that is packed one panel, else all of it.
template <class S> Coming first_lines(const Matrix<S>& b, int64_t depth, int64_t columns) {
    return coming_of(b, depth, b.column == 1 ? columns : std::min<int64_t>(columns, kVectors * kLanes<compute_t<S>>));
}

// to [depth, ld] = B [depth, columns], zero beyond its columns, by one thread.
template <class S> void pack(const Matrix<S>& b, int64_t depth, int64_t columns, S* to, int64_t ld) {
    if (b.column == 1) {
        for (int64_t k = 0; k < depth; ++k) std::memcpy(static_cast<void*>(to + k * ld), b.at(k, 0), columns * sizeof(S));
    } else if (b.row == 1) {
        transpose(b.data, columns, depth, b.column, to, ld);
    } else {
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t c = 0; c < columns; ++c) to[k * ld + c] = *b.at(k, c);
    }
    for (int64_t k = 0; k < depth && columns < ld; ++k)
        std::memset(static_cast<void*>(to + k * ld + columns), 0, (ld - columns) * sizeof(S));
}

// Whether lines of a panel that is read where it lies push each other out of the second-level cache: those that are a power of two
// bytes apart, or odd multiples of one, fall onto as many places of it as fit between two. Measured cold (Xeon, family 6, model 207,
// one core, 64 float32 rows), a first tile of rows that copies its panel: 1024 x 512, 512 x 1024, 2048 x 1024 and 2048 x 256 take
// 0.62, 0.57, 0.42 and 0.50 of the time; half as many lines, or 768 and 412 columns, 0.99 to 1.17.
inline bool lines_collide(int64_t lines, int64_t bytes_apart) {
    constexpr int64_t kCache = int64_t(1) << 20, kWay = int64_t(1) << 17;
    return lines * std::min(bytes_apart & -bytes_apart, kWay) > kCache;
}

template <class S> bool collides(const Matrix<S>& b, int64_t depth) {
    return b.column == 1 && lines_collide(depth, b.row * static_cast<int64_t>(sizeof(S)));
}

// B [depth, columns] by panels: where it lies if its rows are lines, but for a ragged panel, the last one; else each is packed into
// `space`, in whole registers. A packed panel stays in the second-level cache; of a matrix that is packed whole, lines of a
// power of two fall onto few places of it.
template <class C, class S> struct ByPanels {
    Matrix<S> b;
    int64_t depth;
    S* space;
    bool collide = false;  // whether one that is read where it lies is worth copying

    Panel<C, S> panel(int64_t first, int columns) const {
        const int vectors = (columns + kLanes<C> - 1) / kLanes<C>;
        const int64_t ld = vectors * kLanes<C>;
        const Matrix<S> from = b.from(0, first);
        if (b.column == 1 && columns == ld) return {from.data, b.row, vectors};
        pack(from, depth, columns, space, ld);
        return {space, ld, vectors};
    }
    bool packs() const { return b.column != 1; }
    // Whether its first tile of rows leaves a copy in `space` for the others.
    bool copies(const Panel<C, S>& panel) const { return collide && panel.data != space; }
    Coming coming(int64_t first, int columns) const { return coming_of(b.from(0, first), depth, columns); }
};

// Up to how many rows a matrix whose columns are lines, so many numbers apart, is read as it lies, in dot products; for more it pays
// to pack its panels, which are read from aligned memory. Measured cold (Zen 4, float32), packed over dots: 1,024 x 512 with 24, 32, 48
// and 64 rows 1.17, 1.08, 0.92 and 0.86; 412 x 412, whose lines begin anywhere in a line of the cache, with 8, 12, 16 and 24 rows 1.20,
// 1.03, 0.94 and 0.84. AVX2's tiles of two rows are alike.
template <class S> constexpr int64_t most_dot_rows(int64_t apart) {
    return apart * static_cast<int64_t>(sizeof(S)) % kLine == 0 ? 40 : 12;
}

// What products need, by one thread: memory for a panel, and for rows of up to `depth` numbers of another type.
template <class S> struct Scratch {
    using C = compute_t<S>;
    Buffer<S> panel;
    Buffer<C> wide;  // rows in the type of computation
    std::vector<const C*> wide_rows;

    Scratch(int64_t panel_elements, int64_t wide_rows_most = 0, int64_t depth = 0)
        : panel(panel_elements), wide(wide_rows_most * depth), wide_rows(wide_rows_most) {}

    const C* const* widened(const C* const* a, int64_t, int64_t) { return a; }
    template <class A> const C* const* widened(const A* const* a, int64_t n, int64_t depth) {
        for (int64_t i = 0; i < n; ++i) {
            C* row = wide.data() + i * depth;
            for (int64_t k = 0; k < depth; ++k) row[k] = upcast(a[i][k]);
            wide_rows[i] = row;
        }
        return wide_rows.data();
    }
};

// Whether products write or add.
enum class To { kPut, kAdd };

// When columns that are lines are read in dot products: never where the number of rows depends on that of threads, and results must
// not.
enum class Dots { kNever, kFewRows, kAlways };

// Whether n rows are multiplied by B in dot products.
template <class S> bool by_dots(Dots when, int64_t n, int64_t row, int64_t column) {
    return column != 1 && row == 1 && (when == Dots::kAlways || (when == Dots::kFewRows && n <= most_dot_rows<S>(column)));
}

// How a product goes about its matrix.
struct Way {
    Coming next{};  // what is read after B
    Dots dots = Dots::kFewRows;
    bool once = false;  // whether B's rows, where they are lines, are read once and in their order
};

// to[i] = or += a[i] B for n rows and B [depth, columns].
template <To Mode, class S, class A, class C = compute_t<S>>
void multiply(const A* const* a, int64_t n, Matrix<S> b, int64_t depth, int64_t columns, C* const* to, Scratch<S>& scratch,
              const Way& way = {}) {
    if (by_dots<S>(way.dots, n, b.row, b.column)) {
        product_dots<A, S>(a, n, b.data, b.column, depth, columns, [&](int64_t i, int64_t j, int m, const C* sums) {
            for (int q = 0; q < m; ++q)
                if constexpr (Mode == To::kAdd) to[i][j + q] += sums[q];
                else to[i][j + q] = sums[q];
        });
        return;
    }
#if defined(SPARSEFFN_PAIRS)
    if constexpr (std::is_same_v<A, bf16>)
        if (way.once && b.column == 1) {
            for (int64_t i = 0; i < n && Mode == To::kPut; ++i) std::fill_n(to[i], columns, C(0));
            return product_lines(a, n, depth, columns, to, [&](int64_t k) { return b.at(k, 0); });
        }
#endif
    const ByPanels<C, S> panels{b, depth, scratch.panel.data(), collides(b, depth)};
    product<C>(scratch.widened(a, n, depth), n, panels, columns, way.next,
               [&](int64_t i, int64_t first, int width, const auto& acc) {
                   if constexpr (Mode == To::kAdd) add(to[i] + first, acc, width);
                   else put(to[i] + first, acc, width);
               });
}

}  // namespace sparseffn
