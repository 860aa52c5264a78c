// Balanced assignment of tokens to experts, exact, in O(T E) memory; the method is told in ops/assignment.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace sparseffn {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Sweeps of dual ascent over all experts; as in ops/assignment.py.
constexpr int kSweeps = 8;

class Assignment {
  public:
    Assignment(const double* scores, int64_t tokens, int64_t experts, int64_t* assigned)
        : scores_(tokens * experts), tokens_(tokens), experts_(experts), capacity_((tokens + experts - 1) / experts),
          assigned_(assigned), prices_(experts, 0.0), dummy_(experts, 0), loads_(experts, 0),
          members_(experts), cost_(experts * experts, kInfinity), mover_(experts * experts, -1) {
        const double factor = shrink(scores, tokens * experts);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t e = 0; e < experts; ++e) {
                const double score = scores[t * experts + e] * factor;
                scores_[e * tokens + t] = std::isnan(score) ? 0.0 : std::clamp(score, -kLargest, kLargest);
            }
    }

    void run() {
        ascend();
        for (int64_t t = 0; t < tokens_; ++t) {
            int64_t best = 0;
            for (int64_t e = 1; e < experts_; ++e)
                if (net(t, e) > net(t, best)) best = e;
            place(t, best);
        }
        // A dummy costs an expert's price alone, so the cheapest experts are its best choice.
        std::vector<int64_t> cheapest(experts_);
        std::iota(cheapest.begin(), cheapest.end(), 0);
        std::stable_sort(cheapest.begin(), cheapest.end(), [&](int64_t a, int64_t b) { return prices_[a] < prices_[b]; });
        for (int64_t i = 0; i < capacity_ * experts_ - tokens_; ++i) {
            dummy_[cheapest[i]] = 1;
            ++loads_[cheapest[i]];
        }
        for (int64_t e = 0; e < experts_; ++e) refresh(e);
        while (std::any_of(loads_.begin(), loads_.end(), [&](int64_t load) { return load > capacity_; })) exchange();
    }

  private:
    // Makes scores small enough that sums of them round to less than kTiny: another scale is the same problem.
    static double shrink(const double* scores, int64_t n) {
        double largest = 0.0;
        for (int64_t i = 0; i < n; ++i)
            if (std::isfinite(scores[i])) largest = std::max(largest, std::fabs(scores[i]));
        return largest > kLargest ? kLargest / largest : 1.0;
    }

    double score(int64_t t, int64_t e) const { return scores_[e * tokens_ + t]; }
    double net(int64_t t, int64_t e) const { return score(t, e) - prices_[e]; }

    void place(int64_t token, int64_t expert) {
        assigned_[token] = expert;
        members_[expert].push_back(token);
        ++loads_[expert];
    }

    // Prices near the dual optimum: each expert in turn takes the price at which `capacity` tokens want it.
    void ascend() {
        if (experts_ == 1 || capacity_ >= tokens_) return;
        std::vector<double> gain(tokens_);
        const int64_t above = tokens_ - capacity_;
        for (int sweep = 0; sweep < kSweeps; ++sweep)
            for (int64_t e = 0; e < experts_; ++e) {
                std::fill(gain.begin(), gain.end(), -kInfinity);
                double* best = gain.data();
                for (int64_t o = 0; o < experts_; ++o) {
                    if (o == e) continue;
                    const double* column = scores_.data() + o * tokens_;
                    const double price = prices_[o];
#pragma omp simd
                    for (int64_t t = 0; t < tokens_; ++t) best[t] = best[t] < column[t] - price ? column[t] - price : best[t];
                }
                for (int64_t t = 0; t < tokens_; ++t) best[t] = score(t, e) - best[t];
                std::nth_element(gain.begin(), gain.begin() + above, gain.end());
                prices_[e] = (gain[above] + *std::max_element(gain.begin(), gain.begin() + above)) / 2;
            }
    }

    // What it costs to move one token out of an expert, to each other one.
    void refresh(int64_t from) {
        for (int64_t to = 0; to < experts_; ++to) {
            cost_[from * experts_ + to] = kInfinity;
            mover_[from * experts_ + to] = -1;
        }
        for (const int64_t t : members_[from])
            for (int64_t to = 0; to < experts_; ++to) {
                const double loss = score(t, from) - score(t, to);
                double& cost = cost_[from * experts_ + to];
                int64_t& mover = mover_[from * experts_ + to];
                // Members are in no order: the lowest token breaks ties.
                if (to != from && (loss < cost || (loss == cost && t < mover))) cost = loss, mover = t;
            }
    }

    bool dummy_moves(int64_t from, int64_t to) const {
        return dummy_[from] && !dummy_[to] && cost_[from * experts_ + to] >= 0;
    }
    double edge(int64_t from, int64_t to) const { return dummy_moves(from, to) ? 0.0 : cost_[from * experts_ + to]; }

    // Moves one unit along the cheapest chain from an overfull to an underfull expert (Bellman and Ford).
    void exchange() {
        std::vector<double> distance(experts_);
        std::vector<int64_t> before(experts_, -1);
        for (int64_t e = 0; e < experts_; ++e) distance[e] = loads_[e] > capacity_ ? 0.0 : kInfinity;
        for (int64_t round = 0; round < experts_; ++round) {
            bool changed = false;
            for (int64_t from = 0; from < experts_; ++from)
                for (int64_t to = 0; to < experts_; ++to) {
                    if (to == from || distance[from] == kInfinity) continue;
                    const double through = distance[from] + edge(from, to);
                    if (through < distance[to] - kTiny) distance[to] = through, before[to] = from, changed = true;
                }
            if (!changed) break;
        }
        int64_t last = -1;
        for (int64_t e = 0; e < experts_; ++e)
            if (loads_[e] < capacity_ && (last < 0 || distance[e] < distance[last])) last = e;
        std::vector<int64_t> path{last};
        while (before[path.back()] >= 0) path.push_back(before[path.back()]);
        std::reverse(path.begin(), path.end());
        for (size_t i = 0; i + 1 < path.size(); ++i) move(path[i], path[i + 1]);
        --loads_[path.front()];
        ++loads_[path.back()];
        for (const int64_t e : path) refresh(e);
    }

    // Moves the cheapest item along one edge; costs are refreshed once the whole chain has moved.
    void move(int64_t from, int64_t to) {
        if (dummy_moves(from, to)) {
            dummy_[from] = 0;
            dummy_[to] = 1;
            return;
        }
        const int64_t token = mover_[from * experts_ + to];
        auto& members = members_[from];
        members.erase(std::find(members.begin(), members.end(), token));
        members_[to].push_back(token);
        assigned_[token] = to;
    }

    // Rounding must not make a cycle look cheaper than nothing.
    static constexpr double kTiny = 1e-12;
    static constexpr double kLargest = 100.0;

    std::vector<double> scores_;  // [experts, tokens], so that loops over tokens are vectorised
    int64_t tokens_, experts_, capacity_;
    int64_t* assigned_;
    std::vector<double> prices_;
    std::vector<char> dummy_;
    std::vector<int64_t> loads_;
    std::vector<std::vector<int64_t>> members_;
    std::vector<double> cost_;
    std::vector<int64_t> mover_;
};

}  // namespace
}  // namespace sparseffn

extern "C" void sparseffn_assign(const double* scores, int64_t tokens, int64_t experts, int64_t* assigned) {
    sparseffn::Assignment(scores, tokens, experts, assigned).run();
}
