// What the expert computation takes and gives; its four functions are compiled for each storage type in a file of its own.
#pragma once

#include "activations.h"
#include "routing.h"
#include "vectors.h"

namespace sparseffn {

template <class S> struct Problem {
    using C = compute_t<S>;
    const S* x;       // [tokens, width]
    const S* keys;    // [experts, width, size]
    const S* values;  // [experts, size, width]
    const C* gates;   // [tokens * k]
    S* hidden;        // [rows, size], sorted; null where nothing is kept
    const uint8_t* keep;  // [tokens * k, size], 0 where dropout removed a unit; null without dropout
    C keep_scale;
    Activation activation;
    int64_t width, size;
    Routing routing;
    int threads;
};

template <class S> struct Gradients {
    using C = compute_t<S>;
    const S* y;  // in
    S* x;
    S* keys;
    S* values;
    C* gates;
};

// The survivors of the inner top-K: of a token's K G coefficients only the `count` largest take part.
template <class S> struct Inner {
    int64_t count;
    int32_t* positions;  // [tokens, count]: slot * size + unit, ascending; -1 for one that dropout removed
    S* kept;             // [tokens, count], what the activation keeps of each
};

template <class S> void forward(const Problem<S>& p, S* y);
template <class S> void backward(const Problem<S>& p, const Gradients<S>& g);
template <class S> void forward_inner(Problem<S> p, const Inner<S>& inner, S* y);
template <class S> void backward_inner(Problem<S> p, const Inner<S>& inner, const Gradients<S>& g);

}  // namespace sparseffn
