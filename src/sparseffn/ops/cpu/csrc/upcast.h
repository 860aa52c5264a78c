// Tensors in the type of computation.
#pragma once

#include <type_traits>

#include "parallel.h"
#include "vectors.h"

namespace sparseffn {

// x in the type of computation: itself, or a copy.
template <class S> class Upcast {
    using C = compute_t<S>;

  public:
    Upcast(const S* x, int64_t n, int threads) : copy_(std::is_same_v<S, C> ? 0 : n) {
        if constexpr (std::is_same_v<S, C>) {
            data_ = x;
        } else {
            C* to = copy_.data();
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t i = 0; i < n; ++i) to[i] = upcast(x[i]);
            data_ = to;
        }
    }
    const C* data() const { return data_; }

  private:
    Buffer<C> copy_;
    const C* data_;
};

}  // namespace sparseffn
