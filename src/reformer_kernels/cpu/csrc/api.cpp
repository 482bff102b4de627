// The C interface: no torch, no Python, so that one build serves every version of either.
#include <cstring>
#include <exception>
#include <stdexcept>
#include <type_traits>

#include "backward.hpp"
#include "decode_attention.hpp"
#include "decode_layer.hpp"
#include "hashing.hpp"
#include "prng.hpp"
#include "rotary.hpp"
#include "sweep.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using hf::AttentionParams;

// Returns 0; 1 when memory ran out, 2 for a bucket out of its range. Exceptions do not cross the C interface.
template <typename F> int guarded(F&& f) {
    try {
        f();
        return 0;
    } catch (const std::out_of_range&) {
        return 2;
    } catch (const std::exception&) {
        return 1;
    }
}

// Large outputs written row by row in random order: huge pages save most of the address translation.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr int64_t kHuge = 2 << 20;
    if (!data || bytes < 2 * kHuge) return;
    uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t{4095};
    uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~uintptr_t{4095};
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

void invert_permutations(const AttentionParams& p) {
    if (!p.inverse.data) return;
    int64_t groups = p.inverse.head ? p.heads : 1, rounds = p.rounds - 1;
    hf::parallel_for(p.batch * groups * rounds, p.threads, [&](int64_t task, int) {
        int64_t round = task % rounds, group = task / rounds % groups, batch = task / rounds / groups;
        const int32_t* perm = hf::Head::ints(p.perm, batch, group) + round * p.length;
        int32_t* inverse = const_cast<int32_t*>(hf::Head::ints(p.inverse, batch, group)) + round * p.length;
        for (int64_t i = 0; i < p.length; i++) inverse[perm[i]] = static_cast<int32_t>(i);
    });
}

// Calls run(shared, window), two integral constants: the kind of attention that kernels are compiled for.
template <typename F> int run_kind(const AttentionParams& p, F&& run) {
    return guarded([&] {
        invert_permutations(p);
        auto with_keys = [&](auto shared) {
            p.dedup_pairs ? run(shared, std::true_type()) : run(shared, std::false_type());
        };
        p.key.data ? with_keys(std::false_type()) : with_keys(std::true_type());
    });
}

}  // namespace

extern "C" {

// Size of a structure that Python mirrors, 0 for an unknown name: compared when the library is loaded.
int64_t hf_sizeof(const char* name) {
#define HF_SIZE(structure) \
    if (!std::strcmp(name, #structure)) return sizeof(hf::structure);
    HF_SIZE(Strided)
    HF_SIZE(AttentionParams)
    HF_SIZE(HashParams)
    HF_SIZE(NormalParams)
    HF_SIZE(SortParams)
    HF_SIZE(RotateParams)
    HF_SIZE(DecodeParams)
    HF_SIZE(LayerParams)
    HF_SIZE(StackParams)
#undef HF_SIZE
    return 0;
}

const char* hf_variant() { return hf::kVariant; }

int hf_hash(const hf::HashParams* h) {
    return guarded([&] { hf::run_hashing(*h); });
}

int hf_normals(const hf::NormalParams* n) {
    return guarded([&] { hf::run_normals(*n); });
}

int hf_sort(const hf::SortParams* s) {
    return guarded([&] { hf::run_sorting(*s); });
}

int hf_rotate(const hf::RotateParams* r) {
    prefer_huge_pages(r->out, r->batch * r->heads * r->length * r->size * (r->bfloat16 ? 2 : 4));
    return guarded([&] { hf::run_rotation(*r); });
}

int hf_decode_attention(const hf::DecodeParams* s) {
    return guarded([&] { hf::run_decode_attention(*s); });
}

int hf_decode_layers(const hf::StackParams* p) {
    return guarded([&] {
        for (const hf::LayerParams* layer = p->layers; layer < p->layers + p->count; layer++)
            layer->float64 ? hf::run_decode_layer<double>(*layer) : hf::run_decode_layer<float>(*layer);
    });
}

int hf_forward(const AttentionParams* p) {
    prefer_huge_pages(p->out, p->batch * p->heads * p->length * p->value_size * 4);
    return run_kind(*p, [&](auto shared, auto window) { hf::run_forward<shared.value, window.value>(*p); });
}

int hf_backward(const AttentionParams* p) {
    int64_t rows = p->batch * p->heads * p->length * 4;
    prefer_huge_pages(p->grad_query, rows * p->size);
    prefer_huge_pages(p->grad_key, rows * p->size);
    prefer_huge_pages(p->grad_value, rows * p->value_size);
    return run_kind(*p, [&](auto shared, auto window) { hf::run_backward<shared.value, window.value>(*p); });
}

// Fills `mass_dot` if `grad_mass` is given, else `mass`; both begin at 0.
int hf_sweep(const AttentionParams* p) {
    return run_kind(*p, [&](auto shared, auto window) { hf::run_sweep<shared.value, window.value>(*p); });
}

}  // extern "C"
