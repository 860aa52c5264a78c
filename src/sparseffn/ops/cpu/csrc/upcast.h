// Tensors in the type that is computed with.
#pragma once

#include <type_traits>

#include "parallel.h"
#include "vectors.h"

namespace sparseffn {

// x as To: itself, or a copy.
template <class S, class To = compute_t<S>> class Upcast {
  public:
    Upcast(const S* x, int64_t n, int threads) : copy_(std::is_same_v<S, To> ? 0 : n) {
        if constexpr (std::is_same_v<S, To>) {
            data_ = x;
        } else {
            To* to = copy_.data();
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t i = 0; i < n; ++i) to[i] = upcast(x[i]);
            data_ = to;
        }
    }
    const To* data() const { return data_; }

  private:
    Buffer<To> copy_;
    const To* data_;
};

}  // namespace sparseffn
