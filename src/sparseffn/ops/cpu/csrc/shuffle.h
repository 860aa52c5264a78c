// Shuffles of vectors, for every compiler.
#pragma once

// Lanes of a, then of b, by their numbers; GCC has the first form from version 12 on. A test compiles the second.
#if defined(__has_builtin) && !defined(SPARSEFFN_OLD_SHUFFLE)
#if __has_builtin(__builtin_shufflevector)
#define SPARSEFFN_SHUFFLE(V, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
// Comparing vectors gives integers of their width.
#ifndef SPARSEFFN_SHUFFLE
#define SPARSEFFN_SHUFFLE(V, a, b, ...) __builtin_shuffle(a, b, decltype((a) < (a)){__VA_ARGS__})
#endif
