// The K best experts of each token by score less price, best first, from rows as they lie: 16 tokens side by side, and no
// sort of anything.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

namespace {

constexpr int64_t lanes = 16, most_k = 16;
typedef float Lanes __attribute__((vector_size(lanes * sizeof(float))));
typedef int32_t Whole __attribute__((vector_size(lanes * sizeof(int32_t))));

// Each score sinks, with its expert, through the K + 1 largest so far. A token is odd where torch's order among equals
// would matter, or a NaN is among them.
template <int K>
void top_k(const float *score_TE, const float *price_E, int64_t tokens, int64_t experts, int64_t *expert_TK, uint8_t *odd_T,
           int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < tokens; first += lanes) {
        int64_t width = std::min(lanes, tokens - first);
        Lanes best[K + 1], sinking{};
        Whole who[K + 1], odd{};
        for (int i = 0; i <= K; i++) best[i] = Lanes{} - std::numeric_limits<float>::infinity(), who[i] = Whole{};
        for (int64_t e = 0; e < experts; e++) {
            for (int64_t i = 0; i < width; i++) sinking[i] = score_TE[(first + i) * experts + e];
            Whole expert = Whole{} + int32_t(e);
            sinking -= price_E[e];
            odd |= sinking != sinking;
            for (int i = 0; i <= K; i++) {
                Whole above = sinking > best[i], passed = above ? who[i] : expert;
                Lanes sunk = above ? best[i] : sinking;
                best[i] = above ? sinking : best[i], who[i] = above ? expert : who[i];
                sinking = sunk, expert = passed;
            }
        }
        for (int i = 0; i < K; i++) odd |= best[i] == best[i + 1];
        for (int64_t i = 0; i < width; i++) {
            for (int k = 0; k < K; k++) expert_TK[(first + i) * K + k] = who[k][i];
            odd_T[first + i] = odd[i] != 0;
        }
    }
}

template <size_t... I> auto top_k_of(int64_t k, std::index_sequence<I...>) {
    decltype(&top_k<1>) table[] = {top_k<int(I) + 1>...};
    return table[k - 1];
}

}  // namespace

// 1 <= k <= 16, k <= experts -> how many tokens are odd
extern "C" int64_t evenmoe_top_k(const float *score_TE, const float *price_E, int64_t tokens, int64_t experts, int64_t k,
                                 int64_t *expert_TK, uint8_t *odd_T, int64_t threads) {
    top_k_of(k, std::make_index_sequence<most_k>())(score_TE, price_E, tokens, experts, expert_TK, odd_T, threads);
    return std::count(odd_T, odd_T + tokens, 1);
}
