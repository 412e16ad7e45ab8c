// The ends of dual.py, to the bit, from scores laid out by expert: many tokens side by side, and no sort of anything.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

namespace {

constexpr int64_t lanes = 16, most_k = 16;
constexpr float infinity = std::numeric_limits<float>::infinity();
typedef float Lanes __attribute__((vector_size(lanes * sizeof(float)), aligned(alignof(float))));

// The K-th and the (K+1)-th largest of score less price, of 16 tokens at a time: each score sinks through the K + 1
// largest so far, by max and min alone.
template <int K>
void token_ends(const float *score_ET, const float *price_E, int64_t tokens, int64_t experts, float *lower_T,
                float *upper_T, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < tokens; first += lanes) {
        int64_t width = std::min(lanes, tokens - first);
        Lanes best[K + 1], edge{};
        for (auto &each : best) each = Lanes{} - infinity;
        for (int64_t e = 0; e < experts; e++) {
            const float *score = score_ET + e * tokens + first;
            if (width < lanes) {
                std::copy_n(score, width, reinterpret_cast<float *>(&edge));
                score = reinterpret_cast<float *>(&edge);
            }
            Lanes sinking = *reinterpret_cast<const Lanes *>(score) - price_E[e];
            for (auto &each : best) {
                auto above = sinking > each;
                Lanes stays = above ? sinking : each;
                sinking = above ? each : sinking;
                each = stays;
            }
        }
        std::copy_n(reinterpret_cast<float *>(&best[K]), width, lower_T + first);
        std::copy_n(reinterpret_cast<float *>(&best[K - 1]), width, upper_T + first);
    }
}

template <size_t... I> auto token_ends_of(int64_t top_k, std::index_sequence<I...>) {
    decltype(&token_ends<1>) table[] = {token_ends<int(I) + 1>...};
    return table[top_k - 1];
}

// Those that are above `least`, to the front of `above`. -> how many
int64_t above_of(const float *score_T, const float *price_T, int64_t tokens, int64_t step, float least, float *above) {
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; t += step) {
        above[count] = score_T[t] - price_T[t];
        count += above[count] > least;
    }
    return count;
}

// What a few more than low + 1 margins are above, most likely, from one in 16 of them.
float guess(const float *score_T, const float *price_T, int64_t tokens, int64_t low, float *above) {
    int64_t count = above_of(score_T, price_T, tokens, 16, -infinity, above), rank = low / 16;
    rank += 8 + 2 * int64_t(std::sqrt(double(rank)));
    if (rank >= count) return -infinity;
    std::nth_element(above, above + rank, above + count, std::greater<>());
    return above[rank];
}

}  // namespace

extern "C" {

// 1 <= top_k <= 16, top_k < experts
int64_t evenmoe_token_ends(const float *score_ET, const float *price_E, int64_t tokens, int64_t experts, int64_t top_k,
                           float *lower_T, float *upper_T, int64_t threads) {
    token_ends_of(top_k, std::make_index_sequence<most_k>())(score_ET, price_E, tokens, experts, lower_T, upper_T, threads);
    return 0;
}

// Of score less the token's price: the ends of the best prices of each expert, but nothing below `floor`. A token whose
// price is infinite is padding. Only margins above the floor, and above what a sample says, are looked at more than once.
int64_t evenmoe_expert_ends(const float *score_ET, const float *price_T, int64_t tokens, int64_t experts, int64_t top_k,
                            double floor, float *lower_E, float *upper_E, int64_t threads) {
    int64_t rows = top_k * std::count_if(price_T, price_T + tokens, [](float price) { return price < infinity; });
    int64_t low = rows / experts, high = std::max(rows - 1, int64_t(0)) / experts;
#pragma omp parallel num_threads(int(threads))
    {
        std::vector<float> above(tokens);
#pragma omp for
        for (int64_t e = 0; e < experts; e++) {
            const float *score_T = score_ET + e * tokens;
            float least = float(floor), likely = std::max(least, guess(score_T, price_T, tokens, low, above.data()));
            int64_t count = above_of(score_T, price_T, tokens, 1, likely, above.data());
            if (count <= low && likely > least) count = above_of(score_T, price_T, tokens, 1, least, above.data());
            lower_E[e] = upper_E[e] = least;
            if (count <= high) continue;
            auto end = above.begin() + count, at_high = above.begin() + high;
            std::nth_element(above.begin(), at_high, end, std::greater<>());
            lower_E[e] = upper_E[e] = *at_high;
            if (high < low) lower_E[e] = low < count ? *std::max_element(at_high + 1, end) : least;
        }
    }
    return 0;
}
}
