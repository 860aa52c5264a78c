// A router's scores, choice and weights, and their gradients; compiled in route.cpp.
#pragma once

#include <cstdint>

namespace sparseffn {

enum Gate : int { kSigmoid = 0, kSoftmax = 1, kRenormalised = 2 };

// A matrix in memory order; `type` as with_type has it.
struct Stored {
    const void* data;
    int type;
};

struct Routes {
    Stored x;         // [tokens, width]
    Stored selector;  // [experts, width]
    Gate gate;
    const bool* keep;  // [tokens, experts], false for experts that a token may not choose; null: all may be
    int64_t tokens, width, experts, k;
    bool is_double;  // whether logits and gates are double, else float
    int threads;
};

// Out: logits [tokens, experts]; indices and gates [tokens, k], gates 0 of chosen experts that are not kept; with a softmax over
// all experts its shares [tokens, experts].
void route(const Routes& routes, void* logits, int64_t* indices, void* gates, void* shares);

// The logits alone.
void scores(const Routes& routes, void* logits);

// Gradient of the logits [tokens, experts], from those of the gates and of the logits themselves, either of them null.
void logits_gradient(const Routes& routes, const int64_t* indices, const void* gates, const void* shares, const void* grad_logits,
                     const void* grad_gates, void* out);

// From it those of x, in its own type, and of the selector, in the type of the logits, where they are not null; at least one
// token.
void selector_gradients(const Routes& routes, const void* d_logits, void* grad_x, void* grad_selector);

}  // namespace sparseffn
