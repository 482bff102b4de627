// Small matrix products whose operands lie in caches: C[M x N] = sum over k of A(m, k) * B[k][n], in registers.
#pragma once

#include <type_traits>

#include "rows.hpp"

namespace hf {

// A register block is kRows x (2 vectors); the last rows of a granule may be fewer.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif

constexpr int kTile = 64;                // queries and keys are worked on in tiles of this many positions
constexpr int kGranule = 16;             // visibility is decided for blocks of kGranule x kGranule pairs
constexpr int kGroups = kTile / kGranule;
constexpr int kPanel = 2 * kWidth;       // columns of a panel: a matrix of c columns is ceil(c / kPanel) panels,
                                         // each [rows][kPanel]
static_assert(kGranule % kWidth == 0 && kTile % kPanel == 0);

template <int M, int N> struct Block {
    Float at[M][N];

    HF_INLINE void clear() {
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) at[m][n] = zero();
    }
    HF_INLINE void read(const float* c, int stride) {
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) at[m][n] = load(c + m * stride + n * kWidth);
    }
    HF_INLINE void write(float* c, int stride) const {
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) store(c + m * stride + n * kWidth, at[m][n]);
    }
    // A(m, k) = a[m * kRowStep + k * kStep], B[k] = b + k * kPanel; `steps` is a multiple of 8.
    template <int kRowStep, int kStep> HF_INLINE void accumulate(const float* a, const float* b, int steps, Prefetcher& prefetcher) {
        for (int begin = 0; begin < steps; begin += 4) {
            prefetcher.step();
#pragma GCC unroll 4
            for (int k = begin; k < begin + 4; k++) {
                Float row[N];
                for (int n = 0; n < N; n++) row[n] = load(b + k * kPanel + n * kWidth);
                for (int m = 0; m < M; m++) {
                    Float x = splat(a[m * kRowStep + k * kStep]);
                    for (int n = 0; n < N; n++) at[m][n] = fma(x, row[n], at[m][n]);
                }
            }
        }
    }
};

// Calls f(Block<M, N>, first row) for the rows of one granule.
template <int N, typename F> HF_INLINE void for_rows_of_granule(F&& f) {
    constexpr int kWhole = kGranule / kRows * kRows, kRest = kGranule - kWhole;
    for (int m = 0; m < kWhole; m += kRows) f(Block<kRows, N>(), m);
    if constexpr (kRest > 0) f(Block<kRest, N>(), kWhole);
}

// Calls f(integral constant N, first column, panel) for `columns` columns, N vectors of a panel at a time.
template <typename F> HF_INLINE void for_panels(int columns, F&& f) {
    for (int panel = 0; panel * kPanel < columns; panel++) {
        if (columns - panel * kPanel > kWidth)
            f(std::integral_constant<int, 2>(), panel);
        else
            f(std::integral_constant<int, 1>(), panel);
    }
}

HF_INLINE int panels_of(int columns) { return (columns + kPanel - 1) / kPanel; }

}  // namespace hf
