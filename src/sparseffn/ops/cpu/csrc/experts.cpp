// The expert computation behind a C interface.
#include <new>

#include "experts_types.h"

using namespace sparseffn;

namespace {

enum Result : int { kDone = 0, kBadIndex = 1, kNotFinite = 2, kNoMemory = 3 };

template <class T> const T* at(const void* const* in, int i) { return static_cast<const T*>(in[i]); }

template <class S> Matrices<S> matrices(const void* data, const int64_t* strides) {
    return {static_cast<const S*>(data), strides[0], strides[1], strides[2]};
}

template <class S> Problem<S> problem(const void* const* in, const int64_t* sizes, const double* numbers) {
    using C = compute_t<S>;
    Problem<S> p{};
    p.x = at<S>(in, 0);
    p.keys = matrices<S>(in[1], sizes + 7);
    p.gate_keys = matrices<S>(in[2], sizes + 10);
    p.values = matrices<S>(in[3], sizes + 13);
    p.key_bias = at<S>(in, 4);
    p.gate_bias = at<S>(in, 5);
    p.value_bias = at<S>(in, 6);
    p.gates = at<C>(in, 7);
    p.hidden = const_cast<S*>(at<S>(in, 8));
    p.keep = at<uint8_t>(in, 9);
    p.keep_scale = static_cast<C>(numbers[0]);
    p.alpha = static_cast<C>(numbers[1]);
    p.limit = static_cast<C>(numbers[2]);
    p.activation = static_cast<Activation>(sizes[5]);
    p.width = sizes[1];
    p.size = sizes[3];
    p.routing = {at<int64_t>(in, 10), at<int64_t>(in, 11), sizes[0], sizes[2], sizes[4]};
    p.threads = static_cast<int>(sizes[6]);
    return p;
}

template <class S> OutMatrices<S> out_matrices(void* data, const int64_t* strides) {
    return {static_cast<S*>(data), strides[0], strides[1], strides[2]};
}

template <class S> Gradients<S> gradients(void* const* out, const int64_t* strides) {
    const auto at = [&](int i) { return static_cast<S*>(out[i]); };
    return {at(0), at(1), out_matrices<S>(out[2], strides), out_matrices<S>(out[3], strides + 3),
            out_matrices<S>(out[4], strides + 6), at(5), at(6), at(7), static_cast<compute_t<S>*>(out[8])};
}

// What the system refuses must not end the process.
template <class F> int with_memory(int dtype, F&& f) {
    try {
        with_type(dtype, f);
        return kDone;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

}  // namespace

// in: x, keys, gate_keys, values, key_bias, gate_bias, value_bias, gates, hidden, keep, order, offsets; sizes: tokens, width,
// experts, size, k, activation, threads, then three strides each of keys, gate_keys and values; numbers: keep_scale, alpha,
// limit; out: gradient of y (in), of x, keys, gate_keys, values, key_bias, gate_bias, value_bias, gates; its strides as above.
extern "C" {

// The selections in stable order of their expert. 1 if an index is not that of an expert, 2 if a gate is not finite.
int sparseffn_sort_by_expert(const int64_t* indices, int64_t rows, int64_t experts, int dtype, const void* gates,
                             int64_t* order, int64_t* offsets) {
    bool finite = true, sorted = true;
    const int done = with_memory(dtype, [&](auto* tag) {
        using C = compute_t<std::remove_pointer_t<decltype(tag)>>;
        finite = all_finite(static_cast<const C*>(gates), rows);
        sorted = !finite || sort_by_expert(indices, rows, experts, order, offsets);
    });
    return done != kDone ? done : !finite ? kNotFinite : sorted ? kDone : kBadIndex;
}

int sparseffn_experts(int dtype, const void* const* in, const int64_t* sizes, const double* numbers, void* y) {
    return with_memory(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        forward(problem<S>(in, sizes, numbers), static_cast<S*>(y));
    });
}

int sparseffn_experts_backward(int dtype, const void* const* in, const int64_t* sizes, const double* numbers,
                               void* const* out, const int64_t* strides) {
    return with_memory(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        backward(problem<S>(in, sizes, numbers), gradients<S>(out, strides));
    });
}

// As above, where `hidden` is what is kept of the survivors and `positions` says which they are.
int sparseffn_experts_inner(int dtype, const void* const* in, const int64_t* sizes, const double* numbers, int64_t count,
                            int32_t* positions, void* y) {
    return with_memory(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        Problem<S> p = problem<S>(in, sizes, numbers);
        forward_inner(p, Inner<S>{count, positions, p.hidden}, static_cast<S*>(y));
    });
}

int sparseffn_experts_inner_backward(int dtype, const void* const* in, const int64_t* sizes, const double* numbers,
                                     int64_t count, int32_t* positions, void* const* out, const int64_t* strides) {
    return with_memory(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        Problem<S> p = problem<S>(in, sizes, numbers);
        backward_inner(p, Inner<S>{count, positions, p.hidden}, gradients<S>(out, strides));
    });
}
}
