// What whole blocks of key-value pairs take and give: Top-K activation, product-key memory, and sums of value rows.
#pragma once

#include "activations.h"
#include "vectors.h"

namespace sparseffn {

template <class S> struct TopK {
    using C = compute_t<S>;
    const S* x;                                       // [tokens, width]
    const S *keys, *gate_keys, *values;               // [units, width]; gate_keys may be null
    const S *key_bias, *gate_bias, *value_bias;       // [units], [units], [width]; each may be null
    const uint8_t* keep;                              // [tokens, units]: which units dropout leaves; may be null
    C keep_scale;
    Activation activation;
    Clamp<C> clamp;
    bool by_norm, by_magnitude;
    int64_t tokens, width, units, k;
    int threads;
    S* coefficients;   // [tokens, k]
    int64_t* indices;  // [tokens, k], ascending
    S* slopes;         // [tokens, k] or, gated, [tokens, 2 k]: derivatives of the coefficients by the products; may be null

    int parts() const { return gate_keys ? 2 : 1; }
};

// Those that nobody waits for are null.
template <class S> struct TopKGradients {
    const S* y;
    const S* coefficients;  // may be null
    S* x;
    S *keys, *gate_keys, *values;
    S *key_bias, *gate_bias;
};

template <class S> void topk_forward(const TopK<S>& p, S* y);
template <class S> void topk_backward(const TopK<S>& p, const TopKGradients<S>& g);

template <class S> struct ProductKeys {
    const S* x;                   // [tokens, 2 half]
    const S *keys_a, *keys_b;     // [heads, n_a, half], [heads, n_b, half]
    const S* values;              // [n_a n_b, 2 half]
    bool softmax;                 // over a head's reads, in place of the activation
    Activation activation;
    int64_t tokens, half, heads, n_a, n_b, k;
    int threads;
    S* coefficients;   // [tokens, heads k]
    int64_t* indices;  // [tokens, heads k]
    S* slopes;         // [tokens, heads k]: derivatives of the coefficients by the sums; may be null

    int64_t reads() const { return heads * k; }
};

template <class S> void product_keys_forward(const ProductKeys<S>& p, S* y);
// `grad_values` may be null.
template <class S>
void product_keys_backward(const ProductKeys<S>& p, const S* grad_y, const S* grad_coefficients, S* grad_values,
                           compute_t<S>* grad_a, compute_t<S>* grad_b);

// Weighted sums of rows.
template <class S> struct Table {
    using C = compute_t<S>;
    const S* values;         // [rows, width]
    const int64_t* indices;  // [tokens, k]
    const C* weights;        // [tokens, k]
    int64_t rows, width, tokens, k;
    int threads;
    const S* bias = nullptr;  // [width], added to every sum; may be null
    // A second sum over the same pairs; may be null.
    const S* more_values = nullptr;
    const C* more_weights = nullptr;
};

template <class S> void sum_rows(const Table<S>& t, S* y);
// Either gradient may be null.
template <class S> void row_gradients(const Table<S>& t, const S* grad, S* grad_values, compute_t<S>* grad_weights);

// The k largest of each row of scores, and the k largest sums of two halves' scores, largest first.
template <class C> void topk(const C* scores, int64_t rows, int64_t n, int64_t k, bool ordered, int threads, int64_t* out);
template <class C>
void product_keys(const C* a, const C* b, int64_t rows, int64_t n_a, int64_t n_b, int64_t k, int threads, C* sums,
                  int64_t* indices);

}  // namespace sparseffn
