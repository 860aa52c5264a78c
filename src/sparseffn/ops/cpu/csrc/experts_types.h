// What the expert computation takes and gives; its four functions are compiled for each storage type in a file of its own.
#pragma once

#include "activations.h"
#include "matrix.h"
#include "routing.h"
#include "vectors.h"

namespace sparseffn {

template <class S> struct Problem {
    using C = compute_t<S>;
    const S* x;                           // [tokens, width]
    Matrices<S> keys, gate_keys, values;  // [experts, width, size] twice, [experts, size, width]; gate_keys of gated experts
    const S *key_bias, *gate_bias, *value_bias;  // [experts, size] twice, [experts, width]; each may be null
    const C* gates;                              // [tokens * k]
    S* hidden;  // [rows, size], sorted, or [rows, 2 size]: products of keys, then of gate_keys; null where nothing is kept
    const uint8_t* keep;  // [tokens * k, size], 0 where dropout removed a unit; null without dropout
    C keep_scale;
    Activation activation;
    C alpha, limit;  // of the clamped SwiGLU
    int64_t width, size;
    Routing routing;
    int threads;

    // Numbers kept for each hidden unit.
    int64_t kept() const { return gate_keys ? 2 : 1; }
    // Keys and gate keys are columns in turns of one matrix.
    bool interleaved() const {
        return gate_keys.data == keys.data + 1 && keys.column == 2 && gate_keys.column == 2 && gate_keys.row == keys.row &&
               gate_keys.expert == keys.expert && gate_keys;
    }
    // Columns of a matrix of keys as it is multiplied.
    int64_t units_of_keys() const { return interleaved() ? 2 * size : size; }
};

// Those that nobody waits for are null.
template <class S> struct Gradients {
    using C = compute_t<S>;
    const S* y;  // in
    S* x;
    OutMatrices<S> keys, gate_keys, values;  // each with lines of rows or of columns
    S *key_bias, *gate_bias, *value_bias;
    C* gates;
};

// The survivors of the inner top-K: of a token's K G coefficients only the `count` largest take part.
template <class S> struct Inner {
    int64_t count;
    int32_t* positions;  // [tokens, count]: slot * size + unit, ascending; -1 for one that dropout removed
    S* kept;             // [tokens, count], what the activation keeps of each; gated [tokens, 2 count], keys' products first
};

template <class S> void forward(const Problem<S>& p, S* y);
template <class S> void backward(const Problem<S>& p, const Gradients<S>& g);
template <class S> void forward_inner(Problem<S> p, const Inner<S>& inner, S* y);
template <class S> void backward_inner(Problem<S> p, const Inner<S>& inner, const Gradients<S>& g);

}  // namespace sparseffn
