// The mean that is taken off vectors before they are hashed (hf_reformer.ops.lsh.centered): sums of unit vectors, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.hpp"
#include "simd.hpp"

namespace hf {

constexpr float kSmallestNorm = 1e-12f;  // that a vector is divided by
constexpr double kGrid = 1.5 * 4096;       // x + kGrid - kGrid is x rounded to a multiple of 2^-40

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
    const float factor = 1 / std::max(std::sqrt(squares), kSmallestNorm);
    for (k = 0; k + kWidth <= rows.size; k += kWidth) store(unit + k, load(from + k) * splat(factor));
    for (; k < rows.size; k++) unit[k] = from[k] * factor;
}

inline void add_row(const float* __restrict unit, int64_t size, double* __restrict sums) {
    for (int64_t k = 0; k < size; k++) sums[k] += unit[k];
}

// Where they are equal, the difference is 0 and not what rounding leaves of it.
inline void less_mean(const float* __restrict unit, const double* __restrict sums, int64_t count, int64_t size, float* __restrict out) {
    const double share = 1.0 / std::max<int64_t>(count, 1);
    for (int64_t k = 0; k < size; k++) out[k] = static_cast<float>(unit[k] - sums[k] * share + kGrid - kGrid);
}

// The vectors of one head less their means. A walk over tokens in turn begins at any multiple of `segment`.
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
        const std::vector<float> zeros(h.size);
        if (h.sums) {
            std::copy_n(h.sums + head_index * h.size, h.size, state.sums.begin());
            state.count = h.counts[head_index / h.heads];
        }
        const int64_t end = h.causal ? (h.length - 1) / segment * segment : h.length;  // causal: the last segment's begin
        for (int64_t t = 0; t <= end && t < h.length; t++) {
            if (h.causal && t % segment == 0) kept_.push_back(state);
            if (t == end) break;
            advance(state, t);
            if (!h.causal && (t + 1 == h.length || begins(t + 1))) {
                kept_.push_back(state);
                less_mean(zeros.data(), state.sums.data(), state.count, h.size, kept_.back().unit.data());
            }
        }
    }

    State before(int64_t segment) const { return h_.causal ? kept_[segment] : State(h_.size); }

    // The next tokens of a walk, first … first + count - 1, as rows of floats; padding is 0.
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
            add(kept_[samples_ ? samples_[t] : 0].unit.data(), out);
        }
    }

  private:
    void add(const float* __restrict row, float* __restrict out) const {
        for (int64_t k = 0; k < h_.size; k++) out[k] += row[k];
    }
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
    std::vector<State> kept_;  // causal: before every segment; otherwise of every sample, its mean's opposite in `unit`
};

}  // namespace hf
