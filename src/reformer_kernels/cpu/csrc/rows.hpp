// Rows of a head in the caller's memory, and fetching them into the cache before they are needed.
#pragma once

#include <algorithm>

#include "params.hpp"
#include "simd.hpp"

namespace hf {

// One head's rows.
struct Source {
    const char* base;
    int64_t stride;  // bytes
    bool bfloat16;
    int size;

    Source() = default;
    Source(const Strided& x, int64_t batch, int64_t head, bool half, int64_t columns)
        : base(static_cast<const char*>(x.data) + (batch * x.batch + head * x.head) * (half ? 2 : 4)),
          stride(x.token * (half ? 2 : 4)), bfloat16(half), size(static_cast<int>(columns)) {}

    const char* row(int token) const { return base + token * stride; }
    int64_t bytes() const { return size * (bfloat16 ? 2 : 4); }
    float element(const char* row, int column) const {
        if (!bfloat16) return reinterpret_cast<const float*>(row)[column];
        uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[column]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
};

// Rows that the next tile needs, fetched line by line between the products of the present one: rows in random order miss
// the cache, and a processor waits for no more than a dozen lines at once.
class Prefetcher {
  public:
    void clear() {
        kinds_ = row_ = 0;
        kind_ = -1;
        at_ = nullptr;
    }
    void add(const Source& source, const int32_t* tokens, int count) {
        queue_[kinds_++] = {source, tokens, count};
        rows_ = std::max(kinds_ == 1 ? 0 : rows_, count);
        if (!at_) turn();
    }
    HF_INLINE void step() {
        if (!at_) return;
        __builtin_prefetch(at_, 0, 2);
        at_ += 64;
        if (at_ >= end_) turn();
    }

  private:
    void turn() {  // to the next row: all kinds of one position, then the next position
        do {
            if (++kind_ == kinds_) {
                kind_ = 0;
                row_++;
            }
            if (row_ >= rows_) {
                at_ = nullptr;
                return;
            }
        } while (row_ >= queue_[kind_].count);
        const Rows& rows = queue_[kind_];
        at_ = rows.source.row(rows.tokens[row_]);
        end_ = at_ + rows.source.bytes();
    }
    struct Rows {
        Source source;
        const int32_t* tokens;
        int count;
    };
    Rows queue_[8];
    int kinds_ = 0, kind_ = -1, row_ = 0, rows_ = 0;
    const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace hf
