// The parameters of every call. reformer_kernels/cpu/library.py reads the structures from this file: their fields are
// structures declared before, int64_t, double and pointers (a star at every name).
#pragma once

#include <cstdint>

namespace hf {

struct Strided {  // a tensor (B, H, T, D) or (B, H, R * T) whose last dimension is contiguous; strides in elements
    const void* data;
    int64_t batch, head, token;
};

struct AttentionParams {
    Strided query, key, value;          // (B, H, T, D); key.data null: shared query/key attention
    Strided perm, window_start, window_end;  // (B, H, R * T) int32, as layout.AttentionLayout has them
    Strided inverse;                    // (B, H, (R - 1) * T) int32: inverse permutations of all rounds but the last; window rule
    const uint8_t* mask;                // (B, T), chunk rule only, or null
    int64_t batch, heads, length, rounds, size, value_size;
    int64_t block_size, left_reach, right_reach;  // reach counts from the ends of blocks (chunk rule), or from every position
    int64_t bfloat16, dedup_pairs, causal, threads;
    int64_t dropout, dropout_key, first_head;  // whether pairs are dropped; the key; the number of the first head in its layer
    int64_t keep_threshold;             // a pair is kept where its random number is at least this
    double dropout_scale;               // 1 / (1 - p); 0 for p = 1
    double key_scale;                   // scale of the scores where keys are given
    float* out;                         // (B, T, H, D) contiguous, like the gradients
    float *row_max, *row_sum;           // (B, H, T): maximum (in units of log 2) and sum of every row's softmax
    Strided grad_out;                   // (B, H, T, D) float32
    float* delta;                       // (B, H, T): rowsum(grad_out * out), filled by the backward pass
    float *grad_query, *grad_key, *grad_value;
    // Attention mass: mass[j] = sum over queries i of query_weights[i] * P[i][j].
    const float *query_weights, *grad_mass;  // (B, T), or null
    float* mass_dot;                    // (B, H, T): sum over keys j of P[i][j] * grad_mass[j]
    float* mass;                        // (B, H, T)
};

struct HashParams {
    Strided vectors;                    // (B, H, T, D)
    const float* rotations;             // (H, D, R * columns) contiguous
    const int64_t* factors;             // bucket factors; columns = sum of their halves
    int64_t batch, heads, length, rounds, size, columns, num_factors, bfloat16, threads;
    int64_t centered, causal;           // hash unit vectors less their mean: of the tokens so far, or of all
    const uint8_t* mask;                // (B, T) or null, like the following: padding is in no mean
    const int32_t* samples;             // (B, T) 0, 1, …: each packed sample has its own mean
    const double* sums;                 // (B, H, D) unit vectors of earlier tokens, added up
    const int64_t* counts;              // (B) how many they are
    double share;                       // of the mean that is subtracted
    int32_t* buckets;                   // (B, H, R, T) contiguous
};

struct NormalParams {
    const int32_t* key;                 // that of a row is folded from it and the row's number
    int64_t rows, count, threads;
    float* values;                      // (rows, count)
};

struct SortParams {
    Strided buckets;                    // (B, H, R * T) int32, below num_buckets
    const uint8_t* mask;                // (B, T) or null: padding goes behind all buckets
    int64_t batch, heads, length, rounds, all_rounds, first_round;  // these rounds are some of all
    int64_t num_buckets, threads;
    int64_t left_reach, right_reach;    // of every token's window
    int32_t *perm, *window_start, *window_end;  // (B, H, all_rounds, T) contiguous; the last or both windows may be null
};

struct RotateParams {
    Strided x;                          // (B, H, T, D)
    const float *cosines, *sines;       // (tables, T, D) contiguous; tables: B or 1
    int64_t batch, heads, length, size, tables, turned_heads, inverse, bfloat16, threads;
    void* out;                          // (B, T, H, D) contiguous, in the dtype of x
};

struct DecodeParams {                   // new tokens on top of a cache
    Strided query, key, value;          // (B, H, T, D); query and key rotated by position
    Strided vectors;                    // what is hashed
    const float* rotations;             // (H, D, R * columns) contiguous
    const int64_t* factors;
    const int64_t* indices;             // (B, T) the tokens' indices in their sequences, rising; or -1: padding
    void *keys, *values;                // (B, H, capacity, D) contiguous, by index modulo capacity
    int32_t* buckets;                   // (B, H, R, capacity)
    double* sums;                       // (B, H, D) unit vectors so far, added up; null: vectors are hashed as they are
    int32_t *newest, *previous;         // (B, H, R, num_buckets) and (B, H, R, 1 + capacity): bucket_tables.BucketChains
    int64_t batch, heads, length, size, rounds, columns, num_factors, num_buckets, window, local_window, capacity, bfloat16, threads;
    double scale;                       // of scores; rounds > 0: shared query/key attention
    double share;                       // of the mean that is subtracted, with `sums`
    float* out;                         // (B, H, T, D)
};

struct LayerParams {                    // one token through a layer; all weights float32, (outs, ins) contiguous
    const float *attention_norm, *attention_norm_bias, *feed_forward_norm, *feed_forward_norm_bias;
    const float *query_proj, *key_proj, *value_proj, *out_proj;  // key_proj null: shared query/key attention
    const float *up_proj, *up_bias, *down_proj, *down_bias;
    const float *cosines, *sines;       // (rotary_rows, D) of rotary positions, or null
    const DecodeParams* attention;      // all but the new token's vectors and `out`
    int64_t hidden, feed_forward, gelu, float64, rotary_rows, turned_heads;
    double epsilon;
    void *x1, *x2;                      // (B, hidden) residual streams, float64 or float32; overwritten by the layer's output
};

struct StackParams {
    const LayerParams* layers;
    int64_t count;
};

}  // namespace hf
