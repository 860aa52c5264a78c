// The selector's product behind a C interface.
#include "linear.h"

using namespace sparseffn;

// sizes: tokens, width, outputs, threads.
extern "C" void sparseffn_linear(int dtype, const void* x, const void* w, const int64_t* sizes, void* y) {
    const auto run = [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        linear(static_cast<const C*>(x), static_cast<const C*>(w), sizes[0], sizes[1], sizes[2],
               static_cast<int>(sizes[3]), static_cast<C*>(y));
    };
    if (dtype == 0) run(static_cast<float*>(nullptr));
    else run(static_cast<double*>(nullptr));
}
