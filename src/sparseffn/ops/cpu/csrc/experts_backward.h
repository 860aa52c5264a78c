// Gradients of the expert computation: of rows, of both weight tensors and of the gates. Each output element is summed by one
// thread in a fixed order.
#pragma once

#include <vector>

#include "experts.h"
#include "outer.h"
#include "transpose.h"

namespace sparseffn {

// Rows of a weight gradient that are added up before the tile is written.
constexpr int64_t kDepth = 512;
// Rows of the gradient of keys that one thread makes at a time, from as many columns of x, which it first brings together: read
// again and again where they lie, at 4 KiB from row to row, they leave the cache. Backward of 2,048 and 4,096 tokens takes 7% to
// 11% less; bringing rows of y's gradient together for the values takes 5% to 20% more.
constexpr int64_t kBlock = 16 * kRows;
// Rows that are fetched ahead of those brought together.
constexpr int64_t kRowsAhead = 12;

// to[e] = from[e]^T for the experts in use, by all threads.
template <class S>
void transpose_experts(const Problem<S>& p, const S* from, int64_t rows, int64_t columns, S* to) {
#pragma omp for schedule(static) collapse(2)
    for (int64_t e = 0; e < p.routing.experts; ++e)
        for (int64_t strip = 0; strip < (rows + kStrip - 1) / kStrip; ++strip)
            if (p.routing.offsets[e] < p.routing.offsets[e + 1])
                transpose_rows(from + e * rows * columns, rows, columns, strip * kStrip, to + e * rows * columns);
}

// For a row of hidden units: da (in place) becomes dh, `scaled` gets s * drop * act(h); returns the gate's gradient.
template <class S>
compute_t<S> through_activation(const Problem<S>& p, int64_t row, compute_t<S>* d, compute_t<S>* scaled) {
    using C = compute_t<S>;
    const int64_t selection = p.routing.order[row];
    const S* kept = p.hidden + row * p.size;
    const uint8_t* keep = p.keep ? p.keep + selection * p.size : nullptr;
    const C gate = p.gates[selection];
    C sums[kLanes<C>] = {};
    const auto pass = [&](auto activation) {
        constexpr Activation a = decltype(activation)::value;
        const auto unit = [&](int64_t g, C& sum) {
            const Slope<C> s = slope_of(a, C(upcast(kept[g])));
            const C drop = keep ? (keep[g] ? p.keep_scale : C(0)) : C(1);
            sum += d[g] * s.value * drop;
            scaled[g] = gate * drop * s.value;
            d[g] = d[g] * gate * drop * s.slope;
        };
        const int64_t whole = p.size / kLanes<C> * kLanes<C>;
        for (int64_t first = 0; first < whole; first += kLanes<C>)
#pragma omp simd
            for (int q = 0; q < kLanes<C>; ++q) unit(first + q, sums[q]);
        for (int64_t g = whole; g < p.size; ++g) unit(g, sums[g - whole]);
    };
    switch (p.activation) {
        case kRelu: pass(std::integral_constant<Activation, kRelu>{}); break;
        case kGelu: pass(std::integral_constant<Activation, kGelu>{}); break;
        case kSilu: pass(std::integral_constant<Activation, kSilu>{}); break;
        default: pass(std::integral_constant<Activation, kIdentity>{}); break;
    }
    return sum_of_lanes<C>(load(sums));
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

// Up to this many rows of an expert its weights are read as they lie, in dot products; for more it pays to transpose them.
constexpr int64_t kDotRows = 6;

// Experts in use, in one run for each thread.
struct Division {
    std::vector<int64_t> used, unused;
    int64_t most_rows = 0;
    Runs runs;
};

inline Division divide(const Routing& routing, int threads) {
    Division division;
    std::vector<int64_t> work;
    for (int64_t e = 0; e < routing.experts; ++e) {
        const int64_t rows = routing.offsets[e + 1] - routing.offsets[e];
        (rows ? division.used : division.unused).push_back(e);
        if (rows) work.push_back(rows + kWeightsAsRows);
        division.most_rows = std::max(division.most_rows, rows);
    }
    division.runs = runs_of(work, threads);
    return division;
}

// Each thread goes through some experts, one after the other while their weights are in its cache, and adds to gradients of x
// of its own, which are summed up at the end.
template <class S>
void backward_by_experts(const Problem<S>& p, const Gradients<S>& g, const Division& division, const compute_t<S>* x,
                         const compute_t<S>* gy, compute_t<S>* gx) {
    using C = compute_t<S>;
    const Routing& routing = p.routing;
    const int64_t n = routing.tokens * p.width, matrix = p.width * p.size;
    const int64_t most = std::max<int64_t>(division.most_rows, 1);
    Buffer<C> partial(n * (p.threads - 1));
#pragma omp parallel num_threads(p.threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        C* mine = thread == 0 ? gx : partial.data() + (thread - 1) * n;
        std::fill(mine, mine + n, C(0));
        Buffer<C> d(most * p.size), scaled(most * p.size), padded(most * kVectors * kLanes<C>);
        Buffer<S> transposed(most > kDotRows ? matrix : 0), ragged(padded_size<C>(std::max(p.width, p.size)));
        std::vector<const C*> inputs(most), sent(most), d_rows(most), scaled_rows(most), padded_rows(most);
        const Range own = division.runs.of(thread, threads);
        for (int64_t u = own.begin; u < own.end; ++u) {
            const int64_t e = division.used[u], first = routing.offsets[e], rows = routing.offsets[e + 1] - first;
            for (int64_t i = 0; i < rows; ++i) {
                inputs[i] = x + routing.token(first + i) * p.width;
                sent[i] = gy + routing.token(first + i) * p.width;
                d_rows[i] = d.data() + i * p.size;
                scaled_rows[i] = scaled.data() + i * p.size;
            }
            const bool by_dots = rows <= kDotRows;
            if (by_dots) {
                product_dots<C, S>(sent.data(), rows, p.values + e * matrix, p.width, p.width, p.size,
                                   [&](int64_t i, int64_t j, C sum) { d[i * p.size + j] = sum; });
            } else {
                transpose(p.values + e * matrix, p.size, p.width, transposed.data());
                product<C, S>(sent.data(), rows, transposed.data(), p.size, p.width, p.size, ragged.data(), Fetch{},
                              [&](int64_t i, int64_t first, int columns, const auto& acc) {
                                  put(d.data() + i * p.size + first, acc, columns);
                              });
            }
            for (int64_t i = 0; i < rows; ++i)
                g.gates[routing.order[first + i]] =
                    through_activation(p, first + i, d.data() + i * p.size, scaled.data() + i * p.size);
            if (by_dots) {
                product_dots<C, S>(d_rows.data(), rows, p.keys + e * matrix, p.size, p.size, p.width,
                                   [&](int64_t i, int64_t j, C sum) { mine[routing.token(first + i) * p.width + j] += sum; });
            } else {
                transpose(p.keys + e * matrix, p.width, p.size, transposed.data());
                product<C, S>(d_rows.data(), rows, transposed.data(), p.width, p.size, p.width, ragged.data(), Fetch{},
                              [&](int64_t i, int64_t column, int columns, const auto& acc) {
                                  add(mine + routing.token(first + i) * p.width + column, acc, columns);
                              });
            }
            outer_of_few(inputs.data(), d_rows.data(), rows, p.width, p.size, g.keys + e * matrix, padded,
                         padded_rows);
            outer_of_few(scaled_rows.data(), sent.data(), rows, p.size, p.width, g.values + e * matrix, padded,
                         padded_rows);
        }
        const Range idle = part_of(static_cast<int64_t>(division.unused.size()), thread, threads);
        for (int64_t u = idle.begin; u < idle.end; ++u) {
            std::memset(static_cast<void*>(g.keys + division.unused[u] * matrix), 0, matrix * sizeof(S));
            std::memset(static_cast<void*>(g.values + division.unused[u] * matrix), 0, matrix * sizeof(S));
        }
#pragma omp barrier
        const Range part = part_of(n, thread, threads);
        for (int other = 1; other < threads; ++other) {
            const C* add = partial.data() + (other - 1) * n;
            for (int64_t i = part.begin; i < part.end; ++i) gx[i] += add[i];
        }
    }
}

// Many tokens: weights are transposed once for all, each thread adds to the inputs of its own tokens.
template <class S>
void backward_by_tokens(const Problem<S>& p, const Gradients<S>& g, const compute_t<S>* x, const compute_t<S>* gy,
                        compute_t<S>* gx) {
    using C = compute_t<S>;
    const Routing& routing = p.routing;
    const int64_t line = kVectors * kLanes<C>;
    Buffer<S> transposed(routing.experts * p.width * p.size);
    Buffer<C> d(routing.rows() * p.size), scaled(routing.rows() * p.size);

    std::vector<std::pair<int64_t, Range>> chunks;
    for (int64_t e = 0; e < routing.experts; ++e)
        in_chunks<S>({routing.offsets[e], routing.offsets[e + 1]}, [&](Range rows) { chunks.push_back({e, rows}); });
    // Blocks of rows of the gradient of keys, then panels of that of values, expert by expert.
    const int64_t blocks = (p.width + kBlock - 1) / kBlock, units = blocks + (p.width + line - 1) / line;
    int64_t most = 0;
    for (int64_t e = 0; e < routing.experts; ++e) most = std::max(most, routing.offsets[e + 1] - routing.offsets[e]);

#pragma omp parallel num_threads(p.threads)
    {
        Workspace<S> ws(p);
        transpose_experts(p, p.values, p.size, p.width, transposed.data());
#pragma omp for schedule(dynamic, 1)
        for (size_t c = 0; c < chunks.size(); ++c) {
            const auto [e, rows] = chunks[c];
            const int64_t count = rows.end - rows.begin;
            for (int64_t i = 0; i < count; ++i) ws.inputs[i] = gy + routing.token(rows.begin + i) * p.width;
            C* da = d.data() + rows.begin * p.size;
            product<C, S>(ws.inputs.data(), count, transposed.data() + e * p.width * p.size, p.size, p.width, p.size,
                          ws.padded.data(), Fetch{}, [&](int64_t i, int64_t first, int columns, const auto& acc) {
                              put(da + i * p.size + first, acc, columns);
                          });
            for (int64_t r = rows.begin; r < rows.end; ++r)
                g.gates[routing.order[r]] = through_activation(p, r, d.data() + r * p.size, scaled.data() + r * p.size);
        }
        transpose_experts(p, p.keys, p.width, p.size, transposed.data());
        const Range tokens = part_of(routing.tokens, omp_get_thread_num(), omp_get_num_threads());
        std::fill(gx + tokens.begin * p.width, gx + tokens.end * p.width, C(0));
        for (int64_t e = 0; e < routing.experts; ++e)
            in_chunks<S>(routing.rows_of(e, tokens), [&](Range rows) {
                for (int64_t i = 0; i < rows.end - rows.begin; ++i) ws.rows[i] = d.data() + (rows.begin + i) * p.size;
                product<C, S>(ws.rows.data(), rows.end - rows.begin, transposed.data() + e * p.width * p.size, p.width, p.size,
                              p.width, ws.padded.data(), Fetch{}, [&](int64_t i, int64_t first, int columns, const auto& acc) {
                                  add(gx + routing.token(rows.begin + i) * p.width + first, acc, columns);
                              });
            });

        Buffer<C> padded(kDepth * line), sums(std::max(kBlock, p.size) * line), block(most * kBlock);
        std::vector<const C*> left, right, padded_rows(kDepth);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < routing.experts * units; ++unit) {
            const int64_t e = unit / units, part = unit % units, rows = routing.offsets[e + 1] - routing.offsets[e];
            const auto hidden = [&](const C* of, int64_t r) { return of + (routing.offsets[e] + r) * p.size; };
            const auto token = [&](const C* of, int64_t r) { return of + routing.token(routing.offsets[e] + r) * p.width; };
            left.resize(rows);
            right.resize(rows);
            if (part < blocks) {
                const int64_t first = part * kBlock, height = std::min(kBlock, p.width - first);
                for (int64_t r = 0; r < rows; ++r) {
                    if (r + kRowsAhead < rows)
                        for (int64_t c = 0; c < height; c += kLanes<C>) __builtin_prefetch(token(x, r + kRowsAhead) + first + c);
                    left[r] = block.data() + r * kBlock;
                    std::copy_n(token(x, r) + first, height, block.data() + r * kBlock);
                    right[r] = hidden(d.data(), r);
                }
                for (int64_t column = 0; column < p.size; column += line)
                    outer<S>(left, right, height, {column, std::min(column + line, p.size)}, p.size,
                             g.keys + (e * p.width + first) * p.size, padded, sums, padded_rows);
            } else {
                const int64_t first = (part - blocks) * line;
                for (int64_t r = 0; r < rows; ++r) {
                    left[r] = hidden(scaled.data(), r);
                    right[r] = token(gy, r);
                }
                outer<S>(left, right, p.size, {first, std::min(first + line, p.width)}, p.width,
                         g.values + e * p.size * p.width, padded, sums, padded_rows);
            }
        }
    }
}

// Threads divide experts where that leaves none of them waiting long, and always where there is little to wait for.
constexpr int64_t kFewTokens = 16;

template <class S> bool divides_experts(const Problem<S>& p, const Division& division) {
    // An expert's rows must be summed in one go, and the threads' own gradients of x be small beside those of the weights.
    const int64_t own = p.routing.tokens * p.width * (p.threads - 1), weights = 2 * p.routing.experts * p.width * p.size;
    if (division.most_rows > kDepth || own > weights) return false;
    return division.runs.imbalance <= kImbalance || p.routing.tokens <= kFewTokens;
}

template <class S> void backward(const Problem<S>& p, const Gradients<S>& g) {
    using C = compute_t<S>;
    const int64_t n = p.routing.tokens * p.width;
    const Upcast<S> x(p.x, n, p.threads), gy(g.y, n, p.threads);
    const Division division = divide(p.routing, p.threads);
    const auto run = [&](C* gx) {
        if (divides_experts(p, division)) backward_by_experts(p, g, division, x.data(), gy.data(), gx);
        else backward_by_tokens(p, g, x.data(), gy.data(), gx);
    };
    if constexpr (std::is_same_v<S, C>) {
        run(g.x);
    } else {
        Buffer<C> wide(n);
        run(wide.data());
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t i = 0; i < n; ++i) g.x[i] = narrow<S>(wide[i]);
    }
}

}  // namespace sparseffn
