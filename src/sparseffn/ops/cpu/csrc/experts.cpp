// The whole expert computation of a mixture and its backward:
//
//     y[t] = sum over selections (e, s) of token t:  s * (drop * act(x[t] keys[e])) values[e]
//
// Many tokens: each thread owns a block of tokens and goes through all experts, so that it alone adds to its tokens' outputs.
// Few tokens: each thread owns some experts and reads their weights once; its outputs are added up afterwards. Either way the
// order of every sum is fixed by the routing and the number of threads: results are the same from run to run.
#include <vector>

#include "activations.h"
#include "product.h"
#include "routing.h"

namespace sparseffn {
namespace {

// Rows of one expert that are taken at a time: their hidden units stay in the second-level cache.
constexpr int64_t kChunk = 192;
// Rows of a weight gradient that are added up before the tile is written.
constexpr int64_t kDepth = 512;
// Up to this many rows an expert, on average, threads divide experts instead of tokens: measured crossover, see bench layer.
constexpr int64_t kFewRows = 12;

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

// x in the type of computation: itself, or a copy.
template <class S> class Widened {
    using C = compute_t<S>;

  public:
    Widened(const S* x, int64_t n, int threads) : copy_(std::is_same_v<S, C> ? 0 : n) {
        if constexpr (std::is_same_v<S, C>) {
            data_ = x;
        } else {
            C* to = copy_.data();
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t i = 0; i < n; ++i) to[i] = widen(x[i]);
            data_ = to;
        }
    }
    const C* data() const { return data_; }

  private:
    Buffer<C> copy_;
    const C* data_;
};

// What one thread needs for a chunk of rows.
template <class S> struct Workspace {
    using C = compute_t<S>;
    Buffer<C> units;
    Buffer<S> padded;
    std::vector<const C*> inputs, rows;

    explicit Workspace(const Problem<S>& p)
        : units(kChunk * p.size), padded(padded_size<C>(std::max(p.width, p.size))), inputs(kChunk), rows(kChunk) {}
};

// Hidden units `first..first+size` of rows of one expert, activated, dropped and scaled by their gates, into ws.units.
template <class S>
void up(const Problem<S>& p, const compute_t<S>* x, int64_t expert, Range rows, Range units, Workspace<S>& ws) {
    using C = compute_t<S>;
    const int64_t n = rows.end - rows.begin, size = units.end - units.begin;
    for (int64_t i = 0; i < n; ++i) {
        ws.inputs[i] = x + p.routing.token(rows.begin + i) * p.width;
        ws.rows[i] = ws.units.data() + i * size;
    }
    C* u = ws.units.data();
    product<C, S>(ws.inputs.data(), n, p.keys + expert * p.width * p.size + units.begin, p.size, p.width, size,
                  ws.padded.data(),
                  [&](int64_t i, int64_t first, int columns, const auto& acc) { put(u + i * size + first, acc, columns); });
    const bool output = keeps_output(p.activation);
    for (int64_t i = 0; i < n; ++i) {
        C* row = u + i * size;
        S* kept = p.hidden ? p.hidden + (rows.begin + i) * p.size + units.begin : nullptr;
        const int64_t selection = p.routing.order[rows.begin + i];
        if (kept && !output)
            for (int64_t g = 0; g < size; ++g) kept[g] = narrow<S>(row[g]);
        switch (p.activation) {  // outside the loops, so that each of them is vectorised
            case kRelu: for (int64_t g = 0; g < size; ++g) row[g] = activate(kRelu, row[g]); break;
            case kGelu: for (int64_t g = 0; g < size; ++g) row[g] = activate(kGelu, row[g]); break;
            case kSilu: for (int64_t g = 0; g < size; ++g) row[g] = activate(kSilu, row[g]); break;
            default: break;
        }
        if (kept && output)
            for (int64_t g = 0; g < size; ++g) kept[g] = narrow<S>(row[g]);
        const C gate = p.gates[selection];
        if (p.keep) {
            const uint8_t* keep = p.keep + selection * p.size + units.begin;
            const C scale = gate * p.keep_scale;
            for (int64_t g = 0; g < size; ++g) row[g] = keep[g] ? row[g] * scale : C(0);
        } else {
            for (int64_t g = 0; g < size; ++g) row[g] *= gate;
        }
    }
}

// y[token] += ws.units values[expert], for rows of one expert.
template <class S>
void down(const Problem<S>& p, int64_t expert, Range rows, Range units, Workspace<S>& ws, compute_t<S>* y) {
    using C = compute_t<S>;
    product<C, S>(ws.rows.data(), rows.end - rows.begin, p.values + (expert * p.size + units.begin) * p.width, p.width,
                  units.end - units.begin, p.width, ws.padded.data(),
                  [&](int64_t i, int64_t first, int columns, const auto& acc) {
                      add(y + p.routing.token(rows.begin + i) * p.width + first, acc, columns);
                  });
}

template <class S, class F> void in_chunks(Range rows, F&& f) {
    for (int64_t r = rows.begin; r < rows.end; r += kChunk) f(Range{r, std::min(r + kChunk, rows.end)});
}

template <class S> void forward_by_tokens(const Problem<S>& p, const compute_t<S>* x, compute_t<S>* y) {
#pragma omp parallel num_threads(p.threads)
    {
        Workspace<S> ws(p);
        const Range tokens = part_of(p.routing.tokens, omp_get_thread_num(), omp_get_num_threads());
        std::fill(y + tokens.begin * p.width, y + tokens.end * p.width, compute_t<S>(0));
        for (int64_t e = 0; e < p.routing.experts; ++e)
            in_chunks<S>(p.routing.rows_of(e, tokens), [&](Range rows) {
                up(p, x, e, rows, Range{0, p.size}, ws);
                down(p, e, rows, Range{0, p.size}, ws, y);
            });
    }
}

// Part of an expert's units, with all of its rows.
struct Share {
    int64_t expert;
    Range units;
};

// Experts in use, split so that threads get equal numbers of shares.
template <class S> std::vector<Share> shares_of(const Problem<S>& p) {
    std::vector<int64_t> used;
    for (int64_t e = 0; e < p.routing.experts; ++e)
        if (p.routing.offsets[e] < p.routing.offsets[e + 1]) used.push_back(e);
    const int64_t n = static_cast<int64_t>(used.size()), line = kLanes<compute_t<S>>;
    int64_t pieces = 1;
    while (n * pieces % p.threads != 0 && n * pieces < 8 * p.threads && p.size / (2 * pieces) >= 2 * line) pieces *= 2;
    std::vector<Share> shares;
    for (const int64_t e : used)
        for (int64_t i = 0; i < pieces; ++i) {
            // Whole vectors, so that no share has a ragged end but the last.
            const auto edge = [&](int64_t j) { return j == pieces ? p.size : p.size * j / pieces / line * line; };
            shares.push_back({e, {edge(i), edge(i + 1)}});
        }
    return shares;
}

template <class S> void forward_by_experts(const Problem<S>& p, const compute_t<S>* x, compute_t<S>* y) {
    using C = compute_t<S>;
    const std::vector<Share> shares = shares_of(p);
    const int64_t n = p.routing.tokens * p.width;
    Buffer<C> partial(n * (p.threads - 1));
#pragma omp parallel num_threads(p.threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Workspace<S> ws(p);
        C* mine = thread == 0 ? y : partial.data() + (thread - 1) * n;
        std::fill(mine, mine + n, C(0));
        const Range own = part_of(static_cast<int64_t>(shares.size()), thread, threads);
        for (int64_t i = own.begin; i < own.end; ++i) {
            const Share& share = shares[i];
            in_chunks<S>({p.routing.offsets[share.expert], p.routing.offsets[share.expert + 1]}, [&](Range rows) {
                up(p, x, share.expert, rows, share.units, ws);
                down(p, share.expert, rows, share.units, ws, mine);
            });
        }
#pragma omp barrier
        const Range part = part_of(n, thread, threads);
        for (int other = 1; other < threads; ++other) {
            const C* add = partial.data() + (other - 1) * n;
            for (int64_t i = part.begin; i < part.end; ++i) y[i] += add[i];
        }
    }
}

template <class S> void forward(const Problem<S>& p, S* y) {
    using C = compute_t<S>;
    const int64_t n = p.routing.tokens * p.width;
    const Widened<S> x(p.x, n, p.threads);
    const auto run = [&](C* to) {
        if (p.routing.rows() <= kFewRows * p.routing.experts) forward_by_experts(p, x.data(), to);
        else forward_by_tokens(p, x.data(), to);
    };
    if constexpr (std::is_same_v<S, C>) {
        run(y);
    } else {
        Buffer<C> wide(n);
        run(wide.data());
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t i = 0; i < n; ++i) y[i] = narrow<S>(wide[i]);
    }
}

template <class S> struct Gradients {
    using C = compute_t<S>;
    const S* y;  // in
    S* x;
    S* keys;
    S* values;
    C* gates;
};

// to[e] = from[e]^T for the experts in use: [rows, columns] becomes [columns, rows], a block at a time.
template <class S>
void transpose(const Problem<S>& p, const S* from, int64_t rows, int64_t columns, S* to) {
    constexpr int64_t kBlock = 16;
#pragma omp for schedule(static) collapse(2)
    for (int64_t e = 0; e < p.routing.experts; ++e)
        for (int64_t c = 0; c < (columns + kBlock - 1) / kBlock; ++c) {
            if (p.routing.offsets[e] == p.routing.offsets[e + 1]) continue;
            const S* a = from + e * rows * columns;
            S* b = to + e * rows * columns;
            const int64_t first = c * kBlock, last = std::min(first + kBlock, columns);
            for (int64_t r = 0; r < rows; r += kBlock) {
                const int64_t end = std::min(r + kBlock, rows);
                if (end - r == kBlock && last - first == kBlock) {
                    S block[kBlock][kBlock];
                    for (int64_t i = 0; i < kBlock; ++i)
                        for (int64_t j = 0; j < kBlock; ++j) block[j][i] = a[(r + i) * columns + first + j];
                    for (int64_t j = 0; j < kBlock; ++j) std::memcpy(b + (first + j) * rows + r, block[j], sizeof block[j]);
                } else {
                    for (int64_t j = first; j < last; ++j)
                        for (int64_t i = r; i < end; ++i) b[j * rows + i] = a[i * columns + j];
                }
            }
        }
}

// For a row of hidden units: da (in place) becomes dh, `scaled` gets s * drop * act(h); returns the gate's gradient.
template <class S>
compute_t<S> through_activation(const Problem<S>& p, int64_t row, compute_t<S>* d, compute_t<S>* scaled) {
    using C = compute_t<S>;
    const int64_t selection = p.routing.order[row];
    const S* kept = p.hidden + row * p.size;
    const uint8_t* keep = p.keep ? p.keep + selection * p.size : nullptr;
    const C gate = p.gates[selection];
    C gate_gradient = 0;
    const auto pass = [&](auto activation) {
        constexpr Activation a = decltype(activation)::value;
        C sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t g = 0; g < p.size; ++g) {
            const Slope<C> s = slope_of(a, C(widen(kept[g])));
            const C drop = keep ? (keep[g] ? p.keep_scale : C(0)) : C(1);
            sum += d[g] * s.value * drop;
            scaled[g] = gate * drop * s.value;
            d[g] = d[g] * gate * drop * s.slope;
        }
        gate_gradient = sum;
    };
    switch (p.activation) {
        case kRelu: pass(std::integral_constant<Activation, kRelu>{}); break;
        case kGelu: pass(std::integral_constant<Activation, kGelu>{}); break;
        case kSilu: pass(std::integral_constant<Activation, kSilu>{}); break;
        default: pass(std::integral_constant<Activation, kIdentity>{}); break;
    }
    return gate_gradient;
}

// to [height, columns] = sum over rows of a[row] b[row]^T; zero without rows.
template <class S>
void outer(const std::vector<const compute_t<S>*>& a, const std::vector<const compute_t<S>*>& b, int64_t height,
           Range columns, int64_t ld, S* to, Buffer<compute_t<S>>& padded, Buffer<compute_t<S>>& sums,
           std::vector<const compute_t<S>*>& padded_rows) {
    using C = compute_t<S>;
    const int64_t rows = static_cast<int64_t>(a.size());
    const int width = static_cast<int>(columns.end - columns.begin);
    const int vectors = (width + kLanes<C> - 1) / kLanes<C>;
    const bool ragged = width % kLanes<C> != 0, several = rows > kDepth || !std::is_same_v<S, C>;
    const int64_t lds = vectors * kLanes<C>;
    if (several) std::fill(sums.data(), sums.data() + height * lds, C(0));
    for (int64_t begin = 0; begin < std::max<int64_t>(rows, 1); begin += kDepth) {
        const int64_t depth = std::min(kDepth, rows - begin);
        const C* const* right = b.data() + begin;
        int64_t at = columns.begin;
        if (ragged) {
            for (int64_t r = 0; r < depth; ++r) {
                std::memcpy(padded.data() + r * lds, b[begin + r] + columns.begin, width * sizeof(C));
                std::fill(padded.data() + r * lds + width, padded.data() + (r + 1) * lds, C(0));
                padded_rows[r] = padded.data() + r * lds;
            }
            right = padded_rows.data();
            at = 0;
        }
        with_constant<kVectors>(vectors, [&](auto n) {
            constexpr int N = decltype(n)::value;
            const auto block = [&](int64_t i, auto r) {
                constexpr int R = decltype(r)::value;
                Vec<C> acc[R][N];
                tile_outer<C, R, N>(a.data() + begin, i, right, at, depth, acc);
                for (int q = 0; q < R; ++q) {
                    if (several) add(sums.data() + (i + q) * lds, acc[q], width);
                    else if constexpr (std::is_same_v<S, C>) put(to + (i + q) * ld + columns.begin, acc[q], width);
                }
            };
            int64_t i = 0;
            for (; i + kRows <= height; i += kRows) block(i, std::integral_constant<int, kRows>{});
            with_constant<kRows - 1>(static_cast<int>(height - i), [&](auto r) { block(i, r); });
        });
    }
    if (several)
        for (int64_t i = 0; i < height; ++i)
            for (int c = 0; c < width; ++c) to[i * ld + columns.begin + c] = narrow<S>(sums[i * lds + c]);
}

template <class S> void backward(const Problem<S>& p, const Gradients<S>& g) {
    using C = compute_t<S>;
    const Routing& routing = p.routing;
    const int64_t n = routing.tokens * p.width, line = kVectors * kLanes<C>;
    const Widened<S> x(p.x, n, p.threads), gy(g.y, n, p.threads);
    Buffer<S> turned(routing.experts * p.width * p.size);
    Buffer<C> d(routing.rows() * p.size), scaled(routing.rows() * p.size);
    Buffer<C> wide_gx(std::is_same_v<S, C> ? 0 : n);
    C* gx;
    if constexpr (std::is_same_v<S, C>) gx = g.x;
    else gx = wide_gx.data();

    std::vector<std::pair<int64_t, Range>> chunks;
    for (int64_t e = 0; e < routing.experts; ++e)
        in_chunks<S>({routing.offsets[e], routing.offsets[e + 1]}, [&](Range rows) { chunks.push_back({e, rows}); });
    // Panels of the gradient of keys, then of values, expert by expert.
    const int64_t key_panels = (p.size + line - 1) / line, value_panels = (p.width + line - 1) / line;
    const int64_t panels = key_panels + value_panels;

#pragma omp parallel num_threads(p.threads)
    {
        Workspace<S> ws(p);
        transpose(p, p.values, p.size, p.width, turned.data());
#pragma omp for schedule(dynamic, 1)
        for (size_t c = 0; c < chunks.size(); ++c) {
            const auto [e, rows] = chunks[c];
            const int64_t count = rows.end - rows.begin;
            for (int64_t i = 0; i < count; ++i) ws.inputs[i] = gy.data() + routing.token(rows.begin + i) * p.width;
            C* da = d.data() + rows.begin * p.size;
            product<C, S>(ws.inputs.data(), count, turned.data() + e * p.width * p.size, p.size, p.width, p.size,
                          ws.padded.data(), [&](int64_t i, int64_t first, int columns, const auto& acc) {
                              put(da + i * p.size + first, acc, columns);
                          });
            for (int64_t r = rows.begin; r < rows.end; ++r)
                g.gates[routing.order[r]] = through_activation(p, r, d.data() + r * p.size, scaled.data() + r * p.size);
        }
        transpose(p, p.keys, p.width, p.size, turned.data());
        const Range tokens = part_of(routing.tokens, omp_get_thread_num(), omp_get_num_threads());
        std::fill(gx + tokens.begin * p.width, gx + tokens.end * p.width, C(0));
        for (int64_t e = 0; e < routing.experts; ++e)
            in_chunks<S>(routing.rows_of(e, tokens), [&](Range rows) {
                for (int64_t i = 0; i < rows.end - rows.begin; ++i) ws.rows[i] = d.data() + (rows.begin + i) * p.size;
                product<C, S>(ws.rows.data(), rows.end - rows.begin, turned.data() + e * p.width * p.size, p.width, p.size,
                              p.width, ws.padded.data(), [&](int64_t i, int64_t first, int columns, const auto& acc) {
                                  add(gx + routing.token(rows.begin + i) * p.width + first, acc, columns);
                              });
            });
        if constexpr (!std::is_same_v<S, C>)
            for (int64_t i = tokens.begin * p.width; i < tokens.end * p.width; ++i) g.x[i] = narrow<S>(gx[i]);

        Buffer<C> padded(kDepth * line), sums(std::max(p.width, p.size) * line);
        std::vector<const C*> hidden_rows, token_rows, padded_rows(kDepth);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < routing.experts * panels; ++unit) {
            const int64_t e = unit / panels, panel = unit % panels;
            const bool of_keys = panel < key_panels;
            const int64_t first = (of_keys ? panel : panel - key_panels) * line;
            const int64_t height = of_keys ? p.width : p.size, width = of_keys ? p.size : p.width;
            const Range columns{first, std::min(first + line, width)};
            S* to = (of_keys ? g.keys : g.values) + e * p.width * p.size;
            hidden_rows.clear();
            token_rows.clear();
            for (int64_t r = routing.offsets[e]; r < routing.offsets[e + 1]; ++r) {
                hidden_rows.push_back((of_keys ? d.data() : scaled.data()) + r * p.size);
                token_rows.push_back((of_keys ? x.data() : gy.data()) + routing.token(r) * p.width);
            }
            if (of_keys) outer<S>(token_rows, hidden_rows, height, columns, width, to, padded, sums, padded_rows);
            else outer<S>(hidden_rows, token_rows, height, columns, width, to, padded, sums, padded_rows);
        }
    }
}

}  // namespace
}  // namespace sparseffn

using namespace sparseffn;

namespace {

template <class S>
Problem<S> problem(const void* const* in, const int64_t* sizes, double keep_scale) {
    using C = compute_t<S>;
    return {static_cast<const S*>(in[0]),       static_cast<const S*>(in[1]), static_cast<const S*>(in[2]),
            static_cast<const C*>(in[3]),       static_cast<S*>(const_cast<void*>(in[4])),
            static_cast<const uint8_t*>(in[5]), static_cast<C>(keep_scale),   static_cast<Activation>(sizes[5]),
            sizes[1],                           sizes[3],
            Routing{static_cast<const int64_t*>(in[6]), static_cast<const int64_t*>(in[7]), sizes[0], sizes[2], sizes[4]},
            static_cast<int>(sizes[6])};
}

}  // namespace

// in: x, keys, values, gates, hidden, keep, order, offsets; sizes: tokens, width, experts, size, k, activation, threads.
extern "C" {

int sparseffn_sort_by_expert(const int64_t* indices, int64_t rows, int64_t experts, int64_t* order, int64_t* offsets) {
    return sort_by_expert(indices, rows, experts, order, offsets) ? 0 : 1;
}

void sparseffn_experts(int dtype, const void* const* in, const int64_t* sizes, double keep_scale, void* y) {
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        forward(problem<S>(in, sizes, keep_scale), static_cast<S*>(y));
    });
}

// out: gradient of y (in), of x, keys, values, gates.
void sparseffn_experts_backward(int dtype, const void* const* in, const int64_t* sizes, double keep_scale,
                                void* const* out) {
    with_type(dtype, [&](auto* tag) {
        using S = std::remove_pointer_t<decltype(tag)>;
        backward(problem<S>(in, sizes, keep_scale),
                 Gradients<S>{static_cast<const S*>(out[0]), static_cast<S*>(out[1]), static_cast<S*>(out[2]),
                              static_cast<S*>(out[3]), static_cast<compute_t<S>*>(out[4])});
    });
}
}
