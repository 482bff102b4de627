// The mean that is taken off vectors before they are hashed (hf_reformer.ops.lsh.centered): sums of unit vectors, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.hpp"

namespace hf {

constexpr float kSmallestNorm = 1e-12f;  // that a vector is divided by
constexpr double kGrid = 1.5 * 4096;       // x + kGrid - kGrid is x rounded to a multiple of 2^-40

// A vector at unit length; 0 if it is not finite. Sums run in lanes, wherever a vector comes from.
inline void unit_row(const Source& rows, int token, float* unit) {
    constexpr int kLanes = 8;  // head sizes are multiples of it
    const char* row = rows.row(token);
    const float* from = reinterpret_cast<const float*>(row);
    if (rows.bfloat16) {
        for (int k = 0; k < rows.size; k++) unit[k] = rows.element(row, k);
        from = unit;
    }
    float lanes[kLanes] = {}, squares = 0;
    for (int k = 0; k < rows.size; k += kLanes)
        for (int i = 0; i < kLanes; i++) lanes[i] += from[k + i] * from[k + i];
    for (float lane : lanes) squares += lane;
    if (!std::isfinite(squares)) {
        std::fill(unit, unit + rows.size, 0.0f);
        return;
    }
    const float factor = 1 / std::max(std::sqrt(squares), kSmallestNorm);
    for (int k = 0; k < rows.size; k++) unit[k] = from[k] * factor;
}

inline void add_row(const float* unit, int64_t size, double* sums) {
    for (int64_t k = 0; k < size; k++) sums[k] += unit[k];
}

// Where they are equal, the difference is 0 and not what rounding leaves of it.
inline void less_mean(const float* unit, const double* sums, int64_t count, int64_t size, float* out) {
    const double share = 1.0 / std::max<int64_t>(count, 1);
    for (int64_t k = 0; k < size; k++) out[k] = static_cast<float>(unit[k] - sums[k] * share + kGrid - kGrid);
}

// The tokens of one head, centered tile by tile in any order.
class Centering {
  public:
    Centering(const HashParams& h, int64_t head_index, int64_t tile)
        : h_(h), rows_(h.vectors, head_index / h.heads, head_index % h.heads, h.bfloat16, h.size),
          mask_(h.mask ? h.mask + head_index / h.heads * h.length : nullptr),
          samples_(h.samples ? h.samples + head_index / h.heads * h.length : nullptr), tile_(tile), width_(h.size + 1) {
        const int64_t batch = head_index / h.heads, samples = samples_ && h.length ? samples_[h.length - 1] + 1 : 1;
        State state(h.size);
        if (h.sums) {
            std::copy_n(h.sums + head_index * h.size, h.size, state.sums.begin());
            state.count = h.counts[batch];
        }
        kept_.resize((h.causal ? (h.length + tile - 1) / tile : samples) * width_);
        for (int64_t t = 0; t < h.length; t++) {
            if (h.causal && t % tile == 0) keep(state, t / tile);
            advance(state, t);
            if (!h.causal && (t + 1 == h.length || begins(t + 1))) keep(state, samples_ ? samples_[t] : 0);
        }
    }

    // Tokens first … first + count - 1, the first one a tile's, as rows of floats.
    void write(int64_t first, int count, float* out) const {
        State state(h_.size);
        if (h_.causal) take(state, first / tile_);
        for (int64_t t = first; t < first + count; t++, out += h_.size) {
            if (!h_.causal && (t == first || begins(t))) take(state, samples_ ? samples_[t] : 0);
            if (mask_ && !mask_[t]) {
                std::fill(out, out + h_.size, 0.0f);
                if (h_.causal) advance(state, t);
                continue;
            }
            if (h_.causal)
                advance(state, t);
            else
                unit_row(rows_, static_cast<int>(t), state.unit.data());
            less_mean(state.unit.data(), state.sums.data(), state.count, h_.size, out);
        }
    }

  private:
    struct State {
        std::vector<double> sums;
        std::vector<float> unit;
        int64_t count = 0;
        explicit State(int64_t size) : sums(size), unit(size) {}
    };
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
    void keep(const State& state, int64_t at) {
        std::copy(state.sums.begin(), state.sums.end(), kept_.begin() + at * width_);
        kept_[at * width_ + h_.size] = static_cast<double>(state.count);
    }
    void take(State& state, int64_t at) const {
        std::copy_n(kept_.begin() + at * width_, h_.size, state.sums.begin());
        state.count = static_cast<int64_t>(kept_[at * width_ + h_.size]);
    }

    const HashParams& h_;
    Source rows_;
    const uint8_t* mask_;
    const int32_t* samples_;
    int64_t tile_, width_;
    std::vector<double> kept_;  // sums and count: causal, before every tile; otherwise of every sample
};

}  // namespace hf
