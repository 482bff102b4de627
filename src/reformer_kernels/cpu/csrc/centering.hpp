// The mean that is taken off vectors before they are hashed (hf_reformer.ops.lsh.centered): sums of unit vectors, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "tiles.hpp"

namespace hf {

constexpr float kSmallestNorm = 1e-12f;              // that a vector is divided by
constexpr float kSmallestDifference = 1.0f / 65536;  // of an entry of a unit vector from the mean's: less is rounding

constexpr float kMakesSmall = 0x1p-80f;              // of numbers whose squares are beyond float

// The sum of a row's squares. `at(k)`: its entries from k on, zeros behind the last.
template <typename F> HF_INLINE float sum_of_squares(int size, F&& at) {
    Float squares = zero();
    for (int k = 0; k < size; k += kWidth) squares = fma(at(k), at(k), squares);
    return sum(squares);
}
// What makes a row of these squares a unit vector; 0 if it is not finite.
template <typename F> HF_INLINE float unit_scale(float squares, int size, F&& at) {
    if (std::isfinite(squares)) return 1.0f / std::max(std::sqrt(squares), kSmallestNorm);
    const float smaller = std::sqrt(sum_of_squares(size, [&](int k) { return at(k) * splat(kMakesSmall); }));
    return std::isfinite(smaller) ? kMakesSmall / smaller : 0.0f;
}

HF_INLINE Float less_mean(Float unit, const Doubles& sums, Float share) { return fma(narrow(sums), zero() - share, unit); }
// The factor of a sum of `count` vectors: `share` of their mean is subtracted.
inline float share_of(double share, int64_t count) { return static_cast<float>(share) / std::max<int64_t>(count, 1); }

// A vector of floats, zeros behind it, becomes a unit vector less `factor` times `sums`, which counts it in.
inline void center_row(const float* row, int size, double* sums, float factor, float* out) {
    auto at = [&](int k) { return load(row + k); };
    const float scale = unit_scale(sum_of_squares(size, at), size, at);
    Float most = zero();
    for (int k = 0; k < size; k += kWidth) {
        const size_t bytes = std::min(kWidth, size - k) * sizeof(double);
        Doubles total = {};
        std::memcpy(&total, sums + k, bytes);
        const Float unit = scale > 0 ? load(row + k) * splat(scale) : zero();
        add(unit, total);
        std::memcpy(sums + k, &total, bytes);
        const Float rest = less_mean(unit, total, splat(factor));
        most = max(most, abs(rest));
        store(out + k, rest);
    }
    if (largest(most) < kSmallestDifference) std::fill(out, out + size, 0.0f);
}

// The vectors of one head less their means, tile after tile, from any multiple of `segment` on.
class Centering {
  public:
    struct State {
        std::vector<Doubles> sums;
        int64_t count = 0;
        explicit State(int64_t size) : sums((size + kWidth - 1) / kWidth) {}
    };

    Centering(const HashParams& h, int64_t head_index)
        : h_(h), size_(static_cast<int>(h.size)), rows_(h.vectors, head_index / h.heads, head_index % h.heads, h.bfloat16, h.size),
          mask_(h.mask ? h.mask + head_index / h.heads * h.length : nullptr),
          samples_(h.samples ? h.samples + head_index / h.heads * h.length : nullptr), so_far_(h.size) {
        if (!h.causal) scales_.resize((h.length + kTile - 1) / kTile * kTile);
        if (!h.sums) return;
        std::memcpy(so_far_.sums.data(), h.sums + head_index * h.size, h.size * sizeof(double));
        so_far_.count = h.counts[head_index / h.heads];
    }

    // Counts the tile in that begins at token `first`; all tiles in turn, causal: those before the last segment.
    void count_in(int64_t first, float* panels) {
        float unused[kTile];
        const int count = static_cast<int>(std::min<int64_t>(kTile, h_.length - first));
        read(first, count, panels);
        advance<false>(so_far_, first, count, panels, h_.causal ? unused : &scales_[first], [&] { add_mean(); });
    }
    // A segment begins with the next tile.
    void keep() {
        if (h_.causal) kept_.push_back(so_far_);
    }
    // A sample ends, causal: nothing is to be done.
    void add_mean() {
        if (h_.causal) return;
        for (const Doubles& sums : so_far_.sums) {
            means_.resize(means_.size() + kWidth);
            store(&*means_.end() - kWidth, narrow(sums) * splat(share_of(h_.share, so_far_.count)));
        }
    }

    State before(int64_t segment) const { return h_.causal ? kept_[segment] : State(h_.size); }

    // Tokens first … first + count - 1 as panels, padding 0. `state` is that before the first of them.
    void write(State& state, int64_t first, int count, float* panels) const {
        read(first, count, panels);
        if (h_.causal) {
            float scale[kTile];
            advance<true>(state, first, count, panels, scale, [] {});
            return;
        }
        for (int i = 0; i < count; i++) {
            const float scale = scales_[first + i], *mean = means_.data() + (samples_ ? samples_[first + i] : 0) * state.sums.size() * kWidth;
            if (scale == 0) clear(panels, i);
            Float most = zero();
            for (int k = 0; k < size_; k += kWidth) {
                const Float rest = fma(load(in_panels(panels, i, k)), splat(scale), zero() - load(mean + k));
                most = max(most, abs(rest));
                store(in_panels(panels, i, k), rest);
            }
            without_rounding(first, i, largest(most), panels);
        }
    }

  private:
    bool real(int64_t token) const { return !mask_ || mask_[token]; }
    bool begins(int64_t t) const { return samples_ && t && samples_[t] != samples_[t - 1]; }

    void read(int64_t first, int count, float* panels) const {
        for (int i = 0; i < count; i++) gather(rows_, static_cast<int>(first) + i, panels, i);
    }
    void clear(float* panels, int i) const {
        for (int k = 0; k < size_; k += kWidth) store(in_panels(panels, i, k), zero());
    }
    // A row that is padding, or holds nothing but rounding, becomes 0.
    void without_rounding(int64_t first, int i, float most, float* panels) const {
        if (!real(first + i) || most < kSmallestDifference) clear(panels, i);
    }
    void scales(int64_t first, int count, float* panels, float* scale) const {
        alignas(64) float squares[kTile] = {}, usual[kTile];
        auto row = [&](int i) { return [=](int k) { return load(in_panels(panels, i, k)); }; };
        for (int i = 0; i < count; i++) squares[i] = sum_of_squares(size_, row(i));
        for (int i = 0; i < count; i += kWidth)
            store(usual + i, splat(1.0f) / max(sqrt(load(squares + i)), splat(kSmallestNorm)));
        for (int i = 0; i < count; i++) {
            scale[i] = std::isfinite(squares[i]) ? usual[i] : unit_scale(squares[i], size_, row(i));
            if (!real(first + i)) scale[i] = 0;
            if (scale[i] == 0) clear(panels, i);
        }
    }
    // Counts the tokens of a tile in; `kSubtract`: and takes the mean off each. `end_sample` is called before a sample begins.
    template <bool kSubtract, typename F>
    void advance(State& state, int64_t first, int count, float* panels, float* scale, F&& end_sample) const {
        float share[kTile];
        Float most[kTile];
        scales(first, count, panels, scale);
        for (int begin = 0, end = 1; begin < count; begin = end++) {  // the tokens of one sample
            while (end < count && !begins(first + end)) end++;
            if (begins(first + begin)) {
                end_sample();
                state = State(h_.size);
            }
            for (int i = begin; i < end; i++) {
                state.count += real(first + i);
                if (!kSubtract) continue;
                share[i] = share_of(h_.share, state.count);
                most[i] = zero();
            }
            for (int k = 0; k < size_; k += kWidth) {
                Doubles sums = state.sums[k / kWidth];
                for (int i = begin; i < end; i++) {
                    float* at = in_panels(panels, i, k);
                    const Float unit = load(at) * splat(scale[i]);
                    add(unit, sums);
                    if (!kSubtract) continue;
                    const Float rest = less_mean(unit, sums, splat(share[i]));
                    most[i] = max(most[i], abs(rest));
                    store(at, rest);
                }
                state.sums[k / kWidth] = sums;
            }
            if (kSubtract)
                for (int i = begin; i < end; i++) without_rounding(first, i, largest(most[i]), panels);
        }
    }

    const HashParams& h_;
    int size_;
    Source rows_;
    const uint8_t* mask_;
    const int32_t* samples_;
    State so_far_;
    std::vector<State> kept_;   // causal: before every segment
    std::vector<float> means_;  // otherwise: of every sample, (samples, D up to a whole vector)
    std::vector<float> scales_;  // and of every token what makes it a unit vector
};

}  // namespace hf
