// Keys whose products with many rows are wanted, transposed into panels that one tile of a product reads.
#pragma once

#include "matrix.h"

namespace sparseffn {

// Keys [units, width] as panels of columns: panel p is [width, kColumns], zero beyond the last key.
template <class S> class Panels {
    using C = compute_t<S>;
    static constexpr int64_t kColumns = kVectors * kLanes<C>;

  public:
    Panels(int64_t units, int64_t width) : units_(units), width_(width), data_(count() * width * kColumns) {}

    int64_t count() const { return (units_ + kColumns - 1) / kColumns; }
    // From one row of scores to the next.
    int64_t padded() const { return count() * kColumns; }

    // By all threads of a team.
    void fill(const S* keys) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < count(); ++p) {
            const int64_t first = p * kColumns, n = std::min(kColumns, units_ - first);
            pack(Matrix<S>{keys + first * width_, 1, width_}, width_, n, data_.data() + p * width_ * kColumns, kColumns);
        }
    }

    // to[i] = keys a[i] for n rows, each with padded() elements.
    void multiply(const C* const* a, int64_t n, C* to, int64_t ld) const {
        for (int64_t p = 0; p < count(); ++p) {
            const S* panel = data_.data() + p * width_ * kColumns;
            const Coming next(panel + width_ * kColumns, p + 1 < count() ? width_ : 0, kColumns, kColumns);
            product<C>(a, n, ByPanels<C, S>{{panel, kColumns, 1}, width_, nullptr}, kColumns, next,
                       [&](int64_t i, int64_t, int columns, const auto& acc) { put(to + i * ld + p * kColumns, acc, columns); });
        }
    }

  private:
    int64_t units_, width_;
    Buffer<S> data_;
};

}  // namespace sparseffn
