// Threads of the OpenMP runtime that PyTorch uses: a second runtime would compete with it for the same cores.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace sparseffn {

// Part `index` of `parts` nearly equal parts of 0..n.
struct Range {
    int64_t begin, end;
};
inline Range part_of(int64_t n, int index, int parts) { return {n * index / parts, n * (index + 1) / parts}; }

// Memory without the zeros of std::vector. Tests compile with SPARSEFFN_POISON, so that what is read unwritten shows: all bits
// set are NaN in every floating type and -1 in every signed one.
template <class T> class Buffer {
  public:
    explicit Buffer(int64_t n) : data_(new T[std::max<int64_t>(n, 1)]) {
#ifdef SPARSEFFN_POISON
        std::memset(static_cast<void*>(data_.get()), 0xFF, std::max<int64_t>(n, 1) * sizeof(T));
#endif
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }

  private:
    std::unique_ptr<T[]> data_;
};

}  // namespace sparseffn
