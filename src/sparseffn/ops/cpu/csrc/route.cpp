// See route.h.
#include "route.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "matrix.h"
#include "select.h"

namespace sparseffn {
namespace {

// Weights of the chosen experts, the first of which has the largest logit that is kept, and the shares of all where these are
// asked for. `keep`: of all experts, null if all are kept.
template <class C>
void gates_of(Gate kind, const C* logits, const bool* keep, int64_t experts, const int64_t* chosen, int64_t k, C* gates, C* shares) {
    const auto is_kept = [&](int64_t e) { return !keep || keep[e]; };
    if (kind == kSigmoid) {
        for (int64_t j = 0; j < k; ++j) gates[j] = is_kept(chosen[j]) ? C(1) / (C(1) + std::exp(-logits[chosen[j]])) : C(0);
        return;
    }
    const C top = keep && kind == kSoftmax ? *std::max_element(logits, logits + experts) : logits[chosen[0]];
    double sum = 0;  // one number a token, of up to N_E terms one after the other
    if (kind == kSoftmax)
        for (int64_t e = 0; e < experts; ++e) sum += std::exp(logits[e] - top);
    else
        for (int64_t j = 0; j < k; ++j)
            if (is_kept(chosen[j])) sum += std::exp(logits[chosen[j]] - top);
    for (int64_t j = 0; j < k; ++j)
        gates[j] = is_kept(chosen[j]) ? std::exp(logits[chosen[j]] - top) / static_cast<C>(sum) : C(0);
    if (shares)
        for (int64_t e = 0; e < experts; ++e) shares[e] = std::exp(logits[e] - top) / static_cast<C>(sum);
}

// From here on transposing the selector pays, but for what is multiplied as it is stored; below, each logit is a dot product of
// lines as they lie.
constexpr int64_t kManyTokens = 128;
// Rows that a thread takes at a time, in the type that is multiplied: they stay in its second-level cache.
constexpr int64_t kRowsAtOnce = 96;
// The same where few tokens are upcast for dot products: two tiles. More gained nothing from 12 to 96.
constexpr int64_t kUpcastAtOnce = 12;

template <class To> bool is(const Stored& matrix) {
    bool same = false;
    with_type(matrix.type, [&](auto* tag) { same = std::is_same_v<std::remove_pointer_t<decltype(tag)>, To>; });
    return same;
}

// Rows of a matrix as C, up to `most` at a time: where they lie, or as copies.
template <class C> class SomeRows {
  public:
    // With `padded`, they are always copied, zero-filled to whole panels of registers.
    SomeRows(const Stored& matrix, int64_t width, Range columns, bool padded, int64_t most = kRowsAtOnce)
        : matrix_(matrix), width_(width), columns_(columns), padded_(padded), rows_(most),
          copy_(padded || !is<C>(matrix) ? most * ld() : 0) {}

    const C* const* take(int64_t first, int64_t n) {
        with_type(matrix_.type, [&](auto* tag) {
            using S = std::remove_pointer_t<decltype(tag)>;
            const S* from = static_cast<const S*>(matrix_.data) + first * width_ + columns_.begin;
            for (int64_t i = 0; i < n; ++i, from += width_) {
                if constexpr (std::is_same_v<S, C>)
                    if (!padded_) {
                        rows_[i] = from;
                        continue;
                    }
                C* to = copy_.data() + i * ld();
                const int64_t columns = columns_.end - columns_.begin;
                for (int64_t c = 0; c < columns; ++c) to[c] = narrow<C>(static_cast<compute_t<C>>(upcast(from[c])));
                std::fill(to + columns, to + ld(), C{});
                rows_[i] = to;
            }
        });
        return rows_.data();
    }

  private:
    int64_t ld() const {
        constexpr int64_t kPanel = kVectors * kLanes<C>;
        return (columns_.end - columns_.begin + kPanel - 1) / kPanel * kPanel;
    }

    Stored matrix_;
    int64_t width_;
    Range columns_;
    bool padded_;
    std::vector<const C*> rows_;
    Buffer<C> copy_;
};

// A matrix in the type of computation.
template <class C> class Wide {
  public:
    Wide(const Stored& matrix, int64_t n) {
        with_type(matrix.type, [&](auto* tag) {
            using S = std::remove_pointer_t<decltype(tag)>;
            const S* from = static_cast<const S*>(matrix.data);
            if constexpr (std::is_same_v<S, C>) {
                data_ = from;
            } else {
                C* to = copy_.emplace(n).data();
                for (int64_t i = 0; i < n; ++i) to[i] = static_cast<C>(upcast(from[i]));
                data_ = to;
            }
        });
    }
    const C* data() const { return data_; }

  private:
    std::optional<Buffer<C>> copy_;
    const C* data_ = nullptr;
};

// What a thread needs to choose a token's experts.
template <class C> struct TokenChoice {
    Buffer<Key<C>> keys;
    Selector<Key<C>> selector;

    explicit TokenChoice(const Routes& r) : keys(r.experts), selector(Selector<Key<C>>::of_best(r.experts, r.k)) {}
};

// What a thread needs, x as A. Made before threads start: what they cannot get must not end the process.
template <class A, class C> struct ScoreWorkspace {
    SomeRows<A> x;
    TokenChoice<C> choice;
    Buffer<C> panel;

    ScoreWorkspace(const Routes& r, int64_t most, int64_t panel_elements)
        : x(r.x, r.width, {0, r.width}, false, most), choice(r), panel(panel_elements) {}
};

// Calls score(x, first token, tokens, workspace), which writes logits, for some tokens at a time; then then(token, its logits,
// choice) for each.
template <class C, class A, class Score, class Then>
void score_rows(const Routes& r, int64_t at_once, std::vector<ScoreWorkspace<A, C>>& all, const C* logits, Score&& score, Then&& then) {
    ScoreWorkspace<A, C>& ws = all[omp_get_thread_num()];
    const Range own = part_of(r.tokens, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t first = own.begin; first < own.end; first += at_once) {
        const int64_t n = std::min(at_once, own.end - first);
        score(ws.x.take(first, n), first, n, ws);
        for (int64_t t = first; t < first + n; ++t) then(t, logits + t * r.experts, ws.choice);
    }
}

// The selector's lines are read as they lie.
template <class C, class A, class S, class F> void score_by_lines(const Routes& r, const S* selector, C* logits, F&& then) {
    constexpr int64_t at_once = std::is_same_v<A, C> ? kUpcastAtOnce : kRowsAtOnce;
    auto all = one_for_each_thread<ScoreWorkspace<A, C>>(r.threads, r, at_once, 0);
#pragma omp parallel num_threads(r.threads)
    score_rows(
        r, at_once, all, logits,
        [&](const A* const* x, int64_t first, int64_t n, auto&) {
            product_dots<A, S>(x, n, selector, r.width, r.width, r.experts,
                               [&](int64_t i, int64_t e, int experts, const C* sums) {
                                   std::copy_n(sums, experts, logits + (first + i) * r.experts + e);
                               });
        },
        then);
}

// The selector is transposed, for products by panels of experts.
template <class C, class F> void score_by_panels(const Routes& r, C* logits, F&& then) {
    const Wide<C> selector(r.selector, r.experts * r.width);
    Buffer<C> transposed(r.width * r.experts);
    auto all = one_for_each_thread<ScoreWorkspace<C, C>>(r.threads, r, kRowsAtOnce, ragged_size<C>(r.width, r.experts));
#pragma omp parallel num_threads(r.threads)
    {
#pragma omp for schedule(static)
        for (int64_t first = 0; first < r.experts; first += kStrip)
            transpose_rows(selector.data(), r.experts, r.width, r.width, first, transposed.data(), r.experts);
        score_rows(
            r, kRowsAtOnce, all, logits,
            [&](const C* const* x, int64_t first, int64_t n, auto& ws) {
                C* scores = logits + first * r.experts;
                const ByPanels<C, C> by{{transposed.data(), r.experts, 1}, r.width, ws.panel.data()};
                product<C>(x, n, by, r.experts, Coming{},
                           [&](int64_t i, int64_t column, int columns, const auto& acc) {
                               put(scores + i * r.experts + column, acc, columns);
                           });
            },
            then);
    }
}

// Calls then(token, its logits, choice) for every token.
template <class C, class F> void score_tokens(const Routes& r, C* logits, F&& then) {
    with_type(r.selector.type, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        const S* selector = static_cast<const S*>(r.selector.data);
        if constexpr (std::is_same_v<operand_t<S>, S> && std::is_same_v<compute_t<S>, C> && !std::is_same_v<S, C>) {
            // As exact as in float, where no number is subnormal, and nothing is copied.
            if (is<S>(r.x)) return score_by_lines<C, S>(r, selector, logits, then);
        }
        if (r.tokens >= kManyTokens) return score_by_panels<C>(r, logits, then);
        if constexpr (std::is_same_v<compute_t<S>, C>) return score_by_lines<C, C>(r, selector, logits, then);
        const Wide<C> wide(r.selector, r.experts * r.width);
        score_by_lines<C, C>(r, wide.data(), logits, then);
    });
}

template <class C> void route_in(const Routes& r, C* logits, int64_t* indices, C* gates, C* shares) {
    score_tokens(r, logits, [&](int64_t t, const C* scores, TokenChoice<C>& choice) {
        const bool* keep = r.keep ? r.keep + t * r.experts : nullptr;
        for (int64_t e = 0; e < r.experts; ++e)
            choice.keys[e] = sortable(!keep || keep[e] ? scores[e] : -std::numeric_limits<C>::infinity());
        choice.selector.best(choice.keys.data(), r.experts, r.k, true, indices + t * r.k);
        gates_of(r.gate, scores, keep, r.experts, indices + t * r.k, r.k, gates + t * r.k,
                 r.gate == kSoftmax && shares ? shares + t * r.experts : nullptr);
    });
}

// Through the weights of a token's chosen experts.
template <class C>
void through_gates(Gate kind, const C* gates, const C* shares, const C* grad, const int64_t* chosen, int64_t k,
                   int64_t experts, C* d) {
    // A gate that is 0 passes nothing on, whatever arrives there: nothing selected a dropped expert.
    const auto through = [&](auto add) {
        for (int64_t j = 0; j < k; ++j)
            if (gates[j] != C(0)) add(j);
    };
    if (kind == kSigmoid) return through([&](int64_t j) { d[chosen[j]] += grad[j] * gates[j] * (C(1) - gates[j]); });
    double common = 0;
    through([&](int64_t j) { common += double(gates[j]) * grad[j]; });
    through([&](int64_t j) { d[chosen[j]] += gates[j] * (kind == kSoftmax ? grad[j] : grad[j] - static_cast<C>(common)); });
    for (int64_t e = 0; e < experts && kind == kSoftmax; ++e) d[e] -= shares[e] * static_cast<C>(common);
}

template <class C>
void logits_gradient_in(const Routes& r, const int64_t* indices, const C* gates, const C* shares, const C* grad_logits,
                        const C* grad_gates, C* out) {
    const int64_t n = r.tokens * r.experts;
    if (grad_logits) std::copy_n(grad_logits, n, out);
    else std::fill_n(out, n, C(0));
    for (int64_t t = 0; t < r.tokens && grad_gates; ++t)
        through_gates(r.gate, gates + t * r.k, shares + t * r.experts, grad_gates + t * r.k, indices + t * r.k, r.k, r.experts,
                      out + t * r.experts);
}

// d [tokens, experts] times the selector, in x's type.
template <class C, class X> void x_gradient(const Routes& r, const C* d, const C* selector, Range tokens, C* panel, X* grad_x) {
    const C* rows[kRowsAtOnce];
    for (int64_t first = tokens.begin; first < tokens.end; first += kRowsAtOnce) {
        const int64_t n = std::min(kRowsAtOnce, tokens.end - first);
        for (int64_t i = 0; i < n; ++i) rows[i] = d + (first + i) * r.experts;
        product<C>(rows, n, ByPanels<C, C>{{selector, r.width, 1}, r.experts, panel}, r.width, Coming{},
                   [&](int64_t i, int64_t column, int columns, const auto& acc) {
                       put_narrowed(grad_x + (first + i) * r.width + column, acc, columns);
                   });
    }
}

// Some columns of d^T x.
template <class C> void selector_gradient(const Routes& r, const C* d, Range columns, SomeRows<C>& x, C* grad_selector) {
    const C* rows[kRowsAtOnce];
    for (int64_t first = 0; first < r.tokens; first += kRowsAtOnce) {
        const int64_t n = std::min(kRowsAtOnce, r.tokens - first);
        for (int64_t i = 0; i < n; ++i) rows[i] = d + (first + i) * r.experts;
        const C* const* x_rows = x.take(first, n);
        for (int64_t at = 0; columns.begin + at < columns.end; at += kVectors * kLanes<C>) {
            const int some = static_cast<int>(std::min<int64_t>(columns.end - columns.begin - at, kVectors * kLanes<C>));
            const auto block = [&](int64_t e, auto size) {
                constexpr int R = decltype(size)::value;
                Vec<C> acc[R][kVectors];
                tile_outer<C, R, kVectors>([&](int64_t i) { return rows[i] + e; }, [&](int64_t i) { return x_rows[i] + at; }, n, acc);
                for (int i = 0; i < R; ++i) {
                    C* to = grad_selector + (e + i) * r.width + columns.begin + at;
                    if (first) add(to, acc[i], some);
                    else put(to, acc[i], some);
                }
            };
            in_tiles<kRows>(r.experts, block);
        }
    }
}

template <class C> struct GradientWorkspace {
    Range columns;
    SomeRows<C> x;
    Buffer<C> panel;

    GradientWorkspace(const Routes& r, Range own)
        : columns(own), x(r.x, r.width, own, true), panel(ragged_size<C>(r.experts, r.width)) {}
};

template <class C> void selector_gradients_in(const Routes& r, const C* d, void* grad_x, C* grad_selector) {
    const Wide<C> selector(r.selector, r.experts * r.width);
    const int parts = r.threads;
    std::vector<GradientWorkspace<C>> all;
    // Whole panels of registers, but for the last.
    constexpr int64_t kPanel = kVectors * kLanes<C>;
    const int64_t panels = (r.width + kPanel - 1) / kPanel;
    for (int i = 0; i < parts; ++i) {
        const Range own = part_of(panels, i, parts);
        all.emplace_back(r, Range{own.begin * kPanel, std::min(own.end * kPanel, r.width)});
    }
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int i = 0; i < parts; ++i) {
        with_type(r.x.type, [&](auto* tag) {
            using X = std::remove_pointer_t<decltype(tag)>;
            if constexpr (std::is_same_v<compute_t<X>, C>)
                if (grad_x) x_gradient(r, d, selector.data(), part_of(r.tokens, i, parts), all[i].panel.data(), static_cast<X*>(grad_x));
        });
        if (grad_selector) selector_gradient(r, d, all[i].columns, all[i].x, grad_selector);
    }
}

template <class F> void in_precision(const Routes& r, F&& f) {
    if (r.is_double) f(static_cast<double*>(nullptr));
    else f(static_cast<float*>(nullptr));
}

}  // namespace

void route(const Routes& r, void* logits, int64_t* indices, void* gates, void* shares) {
    in_precision(r, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        route_in<C>(r, static_cast<C*>(logits), indices, static_cast<C*>(gates), static_cast<C*>(shares));
    });
}

void scores(const Routes& r, void* logits) {
    in_precision(r, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        score_tokens(r, static_cast<C*>(logits), [](int64_t, const C*, TokenChoice<C>&) {});
    });
}

void logits_gradient(const Routes& r, const int64_t* indices, const void* gates, const void* shares, const void* grad_logits,
                     const void* grad_gates, void* out) {
    in_precision(r, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        logits_gradient_in<C>(r, indices, static_cast<const C*>(gates), static_cast<const C*>(shares),
                              static_cast<const C*>(grad_logits), static_cast<const C*>(grad_gates), static_cast<C*>(out));
    });
}

void selector_gradients(const Routes& r, const void* d_logits, void* grad_x, void* grad_selector) {
    in_precision(r, [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        selector_gradients_in<C>(r, static_cast<const C*>(d_logits), grad_x, static_cast<C*>(grad_selector));
    });
}

}  // namespace sparseffn
