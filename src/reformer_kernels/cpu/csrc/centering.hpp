// The mean that is taken off vectors before they are hashed (hf_reformer.ops.lsh.centered): sums of unit vectors, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.hpp"
#include "simd.hpp"

namespace hf {

constexpr float kSmallestNorm = 1e-12f;              // that a vector is divided by
constexpr float kSmallestDifference = 1.0f / 65536;  // of an entry of a unit vector from the mean's: less is rounding

// A vector at unit length; 0 if it is not finite.
inline void unit_row(const Source& rows, int token, float* unit) {
    const char* row = rows.row(token);
    const float* from = reinterpret_cast<const float*>(row);
    if (rows.bfloat16) {
        for (int k = 0; k < rows.size; k++) unit[k] = rows.element(row, k);
        from = unit;
    }
    Float total = zero();
    int k = 0;
    for (; k + kWidth <= rows.size; k += kWidth) total = fma(load(from + k), load(from + k), total);
    float squares = sum(total);
    for (; k < rows.size; k++) squares += from[k] * from[k];
    if (!std::isfinite(squares)) {
        std::fill(unit, unit + rows.size, 0.0f);
        return;
    }
    const float norm = std::max(std::sqrt(squares), kSmallestNorm);
    for (k = 0; k + kWidth <= rows.size; k += kWidth) store(unit + k, load(from + k) / splat(norm));
    for (; k < rows.size; k++) unit[k] = from[k] / norm;
}

inline void add_row(const float* __restrict unit, int64_t size, double* __restrict sums) {
    for (int64_t k = 0; k < size; k++) sums[k] += unit[k];
}

// A row that holds nothing but rounding becomes 0.
inline void without_rounding(float* row, int64_t size) {
    Float most = zero();
    int64_t k = 0;
    for (; k + kWidth <= size; k += kWidth) most = max(most, abs(load(row + k)));
    float largest_entry = largest(most);
    for (; k < size; k++) largest_entry = std::max(largest_entry, std::fabs(row[k]));
    if (largest_entry < kSmallestDifference) std::fill(row, row + size, 0.0f);
}

inline void less_mean(const float* __restrict unit, const double* __restrict sums, int64_t count, int64_t size, float* __restrict out) {
    const double share = 1.0 / std::max<int64_t>(count, 1);
    for (int64_t k = 0; k < size; k++) out[k] = static_cast<float>(unit[k] - sums[k] * share);
    without_rounding(out, size);
}

// The vectors of one head less their means, token after token, from any multiple of `segment` on.
class Centering {
  public:
    struct State {
        std::vector<double> sums;
        std::vector<float> unit;
        int64_t count = 0;
        explicit State(int64_t size) : sums(size), unit(size) {}
    };

    Centering(const HashParams& h, int64_t head_index, int64_t segment)
        : h_(h), rows_(h.vectors, head_index / h.heads, head_index % h.heads, h.bfloat16, h.size),
          mask_(h.mask ? h.mask + head_index / h.heads * h.length : nullptr),
          samples_(h.samples ? h.samples + head_index / h.heads * h.length : nullptr) {
        State state(h.size);
        if (h.sums) {
            std::copy_n(h.sums + head_index * h.size, h.size, state.sums.begin());
            state.count = h.counts[head_index / h.heads];
        }
        const int64_t end = h.causal ? (h.length - 1) / segment * segment : h.length;  // causal: the last segment's begin
        for (int64_t t = 0; t <= end && t < h.length; t++) {
            if (h.causal && t % segment == 0) kept_.push_back(state);
            if (t == end) break;
            advance(state, t);
            if (!h.causal && (t + 1 == h.length || begins(t + 1)))
                for (double sum : state.sums) means_.push_back(static_cast<float>(sum / std::max<int64_t>(state.count, 1)));
        }
    }

    State before(int64_t segment) const { return h_.causal ? kept_[segment] : State(h_.size); }

    // Tokens first … first + count - 1 as rows of floats, padding 0. `state` is that before the first of them.
    void write(State& state, int64_t first, int count, float* out) const {
        for (int64_t t = first; t < first + count; t++, out += h_.size) {
            if (h_.causal) advance(state, t);
            if (mask_ && !mask_[t]) {
                std::fill(out, out + h_.size, 0.0f);
                continue;
            }
            if (h_.causal) {
                less_mean(state.unit.data(), state.sums.data(), state.count, h_.size, out);
                continue;
            }
            unit_row(rows_, static_cast<int>(t), out);
            const float* mean = means_.data() + (samples_ ? samples_[t] : 0) * h_.size;
            for (int64_t k = 0; k < h_.size; k++) out[k] -= mean[k];
            without_rounding(out, h_.size);
        }
    }

  private:
    bool begins(int64_t t) const { return samples_ && t && samples_[t] != samples_[t - 1]; }
    void advance(State& state, int64_t t) const {
        if (begins(t)) {
            std::fill(state.sums.begin(), state.sums.end(), 0.0);
            state.count = 0;
        }
        if (mask_ && !mask_[t]) return;
        unit_row(rows_, static_cast<int>(t), state.unit.data());
        add_row(state.unit.data(), h_.size, state.sums.data());
        state.count++;
    }

    const HashParams& h_;
    Source rows_;
    const uint8_t* mask_;
    const int32_t* samples_;
    std::vector<State> kept_;   // causal: before every segment
    std::vector<float> means_;  // otherwise: of every sample, (samples, D)
};

}  // namespace hf
