// SwiGLU experts block by block: rows are gathered, multiplied, activated and multiplied again while they are in the
// cache, one block of at most 1024 rows of one expert after the other, as many at a time as there are threads. The
// formulas are those of visit.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using Maybe = const std::optional<Tensor> &;
constexpr int64_t whole = INT64_MAX, block_rows = 1024, strip = 1024;

inline float wide(float x) { return x; }
inline float wide(at::BFloat16 x) { return std::bit_cast<float>(uint32_t(x.x) << 16); }
inline void narrow(float x, float &out) { out = x; }
inline void narrow(float x, at::BFloat16 &out) {  // to the nearest, ties to even; without a branch, so that it vectorises
    uint32_t bits = std::bit_cast<uint32_t>(x), up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.x = uint16_t(x != x ? 0x7fc0 : up);
}

inline float sigmoid(float x) {  // 1 / (1 + e^-x): e^r by a polynomial, 2^n by the exponent's bits
    float y = std::min(std::max(-x, -87.0f), 87.0f);
    float n = (y * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    float r = y - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float e = p * std::bit_cast<float>((int32_t(n) + 127) << 23);
    return 1.0f / (1.0f + e);
}

template <class T> void gather(const T *source, const int64_t *index, T *out, int64_t rows, int64_t dim) {
    for (int64_t m = 0; m < rows; m++) std::memcpy(out + m * dim, source + index[m] * dim, dim * sizeof(T));
}

// a = silu(gate) up
template <class T> void activate(const T *h, T *a, int64_t rows, int64_t hidden) {
    for (int64_t m = 0; m < rows; m++, h += 2 * hidden, a += hidden) {
#pragma omp simd
        for (int64_t f = 0; f < hidden; f++) {
            float gate = wide(h[f]);
            narrow(gate * sigmoid(gate) * wide(h[hidden + f]), a[f]);
        }
    }
}

// dh = act'(h)^T w s, a becomes w a, and -> <s, a>
template <class T> float pull(const T *h, const T *s, T *dh, T *a, float weight, int64_t hidden) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t f = 0; f < hidden; f++) {
        float gate = wide(h[f]), up = wide(h[hidden + f]), da = wide(s[f]);
        float sig = sigmoid(gate), silu = gate * sig;
        dot += da * silu * up;
        narrow(weight * silu * up, a[f]);
        narrow(weight * da * silu, dh[hidden + f]);
        narrow(weight * da * up * (sig + silu * (1.0f - sig)), dh[f]);
    }
    return dot;
}

struct Block {
    int64_t expert, start, rows;
};

std::vector<Block> blocks_of(at::IntArrayRef rows_A, int64_t start, int64_t most) {
    std::vector<Block> blocks;
    for (size_t expert = 0; expert < rows_A.size(); start += rows_A[expert++]) {
        int64_t rows = rows_A[expert], count = rows / most + (rows % most != 0);
        for (int64_t i = 0; i < count; i++)
            blocks.push_back({int64_t(expert), start + i * rows / count, (i + 1) * rows / count - i * rows / count});
    }
    return blocks;
}

// Room for the largest block of those that one thread computes, taken once a call.
struct Room {
    Tensor flat;
    Room(const std::vector<Block> &blocks, int64_t width, const Tensor &like) {
        int64_t rows = 0;
        for (auto &block : blocks) rows = std::max(rows, block.rows);
        flat = at::empty({rows * width}, like.options());
    }
    Tensor at(int64_t rows, int64_t offset, int64_t width) const {
        return flat.narrow(0, rows * offset, rows * width).view({rows, width});
    }
};

// The biggest first, each thread the next. With fewer blocks than threads the matmuls share the threads instead.
template <class F> void each(std::vector<Block> blocks, int64_t width, const Tensor &like, const F &compute) {
    at::AutoDispatchBelowADInplaceOrView below;
    int64_t threads = at::get_num_threads();
    if (threads == 1 || int64_t(blocks.size()) < threads) {
        Room room(blocks, width, like);
        for (auto &block : blocks) compute(block, room);
        return;
    }
    std::stable_sort(blocks.begin(), blocks.end(), [](auto &a, auto &b) { return a.rows > b.rows; });
    std::atomic<size_t> next{0};
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        at::AutoDispatchBelowADInplaceOrView below;
        at::NoGradGuard no_grad;
        Room room(blocks, width, like);
        for (size_t i; (i = next++) < blocks.size();) compute(blocks[i], room);
    });
}

// The rows of a block: where they lie already, or gathered into the room.
template <class T>
Tensor rows_of(const Tensor &source_XD, Maybe index_M, const Block &block, const Room &room, int64_t offset) {
    if (!index_M) return source_XD.narrow(0, block.start, block.rows);
    Tensor out = room.at(block.rows, offset, source_XD.size(1));
    gather(source_XD.const_data_ptr<T>(), index_M->const_data_ptr<int64_t>() + block.start, out.mutable_data_ptr<T>(),
           block.rows, source_XD.size(1));
    return out;
}

template <class T>
void forward_of(const Tensor &source_XD, Maybe index_M, at::IntArrayRef rows_A, const Tensor &up, const Tensor &down,
                Maybe h_MF, const Tensor &result_MD) {
    int64_t dim = down.size(1), hidden = down.size(2), at_h = dim, at_a = at_h + 2 * hidden;
    each(blocks_of(rows_A, 0, block_rows), at_a + hidden, source_XD, [&](const Block &block, const Room &room) {
        Tensor x = rows_of<T>(source_XD, index_M, block, room, 0);
        Tensor h = h_MF ? h_MF->narrow(0, block.start, block.rows) : room.at(block.rows, at_h, 2 * hidden);
        Tensor a = room.at(block.rows, at_a, hidden), result = result_MD.narrow(0, block.start, block.rows);
        at::mm_out(h, x, up.select(0, block.expert).t());
        activate(h.const_data_ptr<T>(), a.mutable_data_ptr<T>(), block.rows, hidden);
        at::mm_out(result, a, down.select(0, block.expert).t());
    });
}

template <class T>
void backward_of(const Tensor &g_XD, const Tensor &source_XD, Maybe index_M, at::IntArrayRef rows_A, int64_t start,
                 const Tensor &up, const Tensor &down, const Tensor &h_MF, Maybe weight_M, Maybe dweight_M, Maybe dup,
                 Maybe ddown, Maybe drow_XD) {
    int64_t dim = down.size(1), hidden = down.size(2), at_s = dim, at_a = at_s + hidden, at_dh = at_a + hidden;
    const float *weight = weight_M ? weight_M->const_data_ptr<float>() : nullptr;
    float *dweight = dweight_M ? dweight_M->mutable_data_ptr<float>() : nullptr;
    auto compute = [&](const Block &block, const Room &room) {
        Tensor g = rows_of<T>(g_XD, index_M, block, room, 0), s = room.at(block.rows, at_s, hidden);
        Tensor a = room.at(block.rows, at_a, hidden), dh = room.at(block.rows, at_dh, 2 * hidden);
        at::mm_out(s, g, down.select(0, block.expert));
        for (int64_t m = 0; m < block.rows; m++) {
            int64_t row = block.start + m;
            float dot = pull(h_MF.const_data_ptr<T>() + row * 2 * hidden, s.const_data_ptr<T>() + m * hidden,
                             dh.mutable_data_ptr<T>() + m * 2 * hidden, a.mutable_data_ptr<T>() + m * hidden,
                             weight ? weight[row] : 1.0f, hidden);
            if (dweight) dweight[row] = dot;
        }
        if (ddown) {
            Tensor out = ddown->select(0, block.expert);
            at::mm_out(out, g.t(), a);
        }
        if (dup) {
            Tensor out = dup->select(0, block.expert);
            at::mm_out(out, dh.t(), rows_of<T>(source_XD, index_M, block, room, 0));
        }
        if (drow_XD) {
            Tensor out = drow_XD->narrow(0, block.start, block.rows);
            at::mm_out(out, dh, up.select(0, block.expert));
        }
    };
    each(blocks_of(rows_A, start, whole), at_dh + 2 * hidden, source_XD, compute);
}

// y_t = sum over k of weight_tk row(place_tk), in fp32, in the order of k
template <class T> void total_of(const Tensor &row_XD, const Tensor &place_TK, Maybe weight_TK, const Tensor &y_TD) {
    int64_t tokens = place_TK.size(0), top_k = place_TK.size(1), dim = row_XD.size(1);
    const T *row = row_XD.const_data_ptr<T>();
    const int64_t *place = place_TK.const_data_ptr<int64_t>();
    const float *weight = weight_TK ? weight_TK->const_data_ptr<float>() : nullptr;
    T *y = y_TD.mutable_data_ptr<T>();
    at::parallel_for(0, tokens, 64, [&](int64_t first, int64_t last) {
        float sum[strip];
        for (int64_t t = first; t < last; t++)
            for (int64_t from = 0; from < dim; from += strip) {
                int64_t width = std::min(strip, dim - from);
                for (int64_t k = 0; k < top_k; k++) {
                    const T *term = row + place[t * top_k + k] * dim + from;
                    float by = weight ? weight[t * top_k + k] : 1.0f;
#pragma omp simd
                    for (int64_t d = 0; d < width; d++) sum[d] = (k ? sum[d] : 0.0f) + by * wide(term[d]);
                }
#pragma omp simd
                for (int64_t d = 0; d < width; d++) narrow(sum[d], y[t * dim + from + d]);
            }
    });
}

bool is_float(const Tensor &tensor) { return tensor.scalar_type() == at::kFloat; }

void forward(const Tensor &source_XD, Maybe index_M, at::IntArrayRef rows_A, const Tensor &up, const Tensor &down,
             Maybe h_MF, const Tensor &result_MD) {
    auto run = is_float(source_XD) ? forward_of<float> : forward_of<at::BFloat16>;
    run(source_XD, index_M, rows_A, up, down, h_MF, result_MD);
}

void backward(const Tensor &g_XD, const Tensor &source_XD, Maybe index_M, at::IntArrayRef rows_A, int64_t start,
              const Tensor &up, const Tensor &down, const Tensor &h_MF, Maybe weight_M, Maybe dweight_M, Maybe dup,
              Maybe ddown, Maybe drow_XD) {
    auto run = is_float(source_XD) ? backward_of<float> : backward_of<at::BFloat16>;
    run(g_XD, source_XD, index_M, rows_A, start, up, down, h_MF, weight_M, dweight_M, dup, ddown, drow_XD);
}

void total(const Tensor &row_XD, const Tensor &place_TK, Maybe weight_TK, const Tensor &y_TD) {
    (is_float(row_XD) ? total_of<float> : total_of<at::BFloat16>)(row_XD, place_TK, weight_TK, y_TD);
}

}  // namespace

TORCH_LIBRARY(evenmoe, library) {
    library.def("forward(Tensor source, Tensor? index, int[] rows, Tensor up, Tensor down, Tensor(a!)? h, "
                "Tensor(b!) result) -> ()");
    library.def("backward(Tensor g, Tensor source, Tensor? index, int[] rows, int start, Tensor up, Tensor down, Tensor h, "
                "Tensor? weight, Tensor(a!)? dweight, Tensor(b!)? dup, Tensor(c!)? ddown, Tensor(d!)? drow) -> ()");
    library.def("total(Tensor row, Tensor place, Tensor? weight, Tensor(a!) y) -> ()");
}

TORCH_LIBRARY_IMPL(evenmoe, CPU, library) {
    library.impl("forward", &forward);
    library.impl("backward", &backward);
    library.impl("total", &total);
}
