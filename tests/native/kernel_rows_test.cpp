// What kernels do to single rows: against plain scalar code, and every kernel against the first one, bit for bit.
#include <algorithm>
#include <functional>

#include "hadamard.hpp"
#include "kernel_cases.hpp"

namespace kernel_test {
namespace {

const int kWidths[] = {1, 2, 7, 15, 16, 17, 31, 33, 48, 100, 129};
const float kExtremes[] = {kNan, kInfinity, -kInfinity, 3e38f, -3e38f, 1e-45f, -1e-40f, 0.0f, -0.0f, 0x1p-126f};

// Rows of `width`: ordinary ones, then some with an extreme value at each end, then zeros.
std::vector<std::vector<float>> rows_of(int width) {
    Random random(static_cast<unsigned>(width));
    std::vector<std::vector<float>> rows;
    for (float scale : {1.0f, 1e-3f, 1e30f, 1e-38f}) {
        rows.emplace_back(width);
        random.numbers(rows.back().data(), width, scale);
    }
    for (float extreme : kExtremes)
        for (int at : {0, width - 1}) {
            rows.emplace_back(width);
            random.numbers(rows.back().data(), width);
            rows.back()[at] = extreme;
        }
    rows.emplace_back(width, 0.0f);
    return rows;
}

bool near(double a, double b, double relative, double absolute = 0) {
    if (std::isnan(b) || std::isinf(b)) return std::isnan(b) ? std::isnan(a) : a == b;
    return std::fabs(a - b) <= absolute + relative * std::fabs(b);
}

// The same function of each kernel that agrees with the others must give the bits of the first.
using Values = std::vector<float>;
void check_agreement(bool of_portable_too, const char* what, const std::function<Values(const Kernel&)>& run) {
    Values first;
    for (const Kernel* kernel : available_kernels()) {
        if (!of_portable_too && !is_fused(*kernel)) continue;
        const Values values = run(*kernel);
        if (first.empty()) first = values;
        CHECK(same(values.data(), first.data(), values.size()), "%s: %s differs from the first kernel", kernel->name,
              what);
    }
}

Values rms_norm(const Kernel& kernel, const Values& x, const Values& weight) {
    const Exact<float> in(x.data(), x.size()), scale(weight.data(), weight.size());
    Exact<float> y(x.size());
    kernel.rms_norm(in.data(), scale.data(), static_cast<int>(x.size()), 1e-5f, y.data());
    return {y.data(), y.data() + y.size()};
}

void check_rms_norm(const Values& x) {
    Values weight(x.size());
    Random(7).numbers(weight.data(), weight.size());
    double squares = 0;
    float in_float = 0;  // what overflows in float32 is infinite
    for (float v : x) squares += static_cast<double>(v) * v, in_float += v * v;
    const double rms = std::isfinite(in_float) ? std::sqrt(squares / x.size() + 1e-5) : std::sqrt(in_float);
    for (const Kernel* kernel : available_kernels()) {
        const Values y = rms_norm(*kernel, x, weight);
        for (std::size_t i = 0; i < x.size(); ++i)
            CHECK(near(y[i], x[i] / rms * weight[i], 2e-6, 1e-44), "%s: rms_norm of %zu: %g at %zu", kernel->name,
                  x.size(), y[i], i);
    }
    check_agreement(true, "rms_norm", [&](const Kernel& kernel) { return rms_norm(kernel, x, weight); });
}

struct Quantized {
    std::vector<std::int8_t> codes;
    std::int32_t sum;
    float scale;
};

Quantized quantize(const Kernel& kernel, const Values& x, const float* scale, int bits) {
    const int width = static_cast<int>(x.size()), padded = (width + 7) / 8 * 8;
    const Exact<float> in(x.data(), x.size());
    Exact<std::int8_t> codes(padded, 99);
    Quantized q = {};
    if (scale != nullptr)
        kernel.quantize_static(in.data(), width, padded, *scale, bits, codes.data(), &q.sum, &q.scale);
    else
        kernel.quantize_token(in.data(), width, padded, bits, codes.data(), &q.sum, &q.scale);
    q.codes.assign(codes.data(), codes.data() + codes.size());
    return q;
}

// quant.arithmetic.token_scales
float token_scale(const Values& x, int bits) {
    float absmax = 0;
    for (float v : x) absmax = std::isnan(v) || std::isnan(absmax) ? kNan : std::max(absmax, std::fabs(v));
    if (!std::isfinite(absmax)) return kNan;
    return absmax == 0 ? 1.0f : std::max(absmax / (bits == 4 ? 7.0f : 127.0f), 0x1p-126f);
}

void check_quantize(const Values& x, int bits, const float* fixed) {
    const float lowest = bits == 4 ? -8.0f : -128.0f, highest = -lowest - 1;
    const bool has_nan = std::any_of(x.begin(), x.end(), [](float v) { return std::isnan(v); });
    const float scale = fixed != nullptr ? (has_nan ? kNan : *fixed) : token_scale(x, bits);
    for (const Kernel* kernel : available_kernels()) {
        const Quantized q = quantize(*kernel, x, fixed, bits);
        CHECK(same(q.scale, scale), "%s: scale %g, not %g", kernel->name, q.scale, scale);
        std::int32_t sum = 0;
        for (std::size_t i = 0; i < q.codes.size(); ++i) {
            sum += q.codes[i];
            if (std::isnan(scale) && i < x.size()) continue;  // the row is lost; its codes are any
            const float code = i < x.size() ? std::clamp(std::nearbyint(x[i] / scale), lowest, highest) : 0;
            CHECK(q.codes[i] == code, "%s: code %d of %g, scale %g", kernel->name, q.codes[i], x[i], scale);
        }
        CHECK(q.sum == sum, "%s: sum %d, not %d", kernel->name, q.sum, sum);
    }
}

Values swiglu(const Kernel& kernel, const Values& gate, const Values& up) {
    const Exact<float> g(gate.data(), gate.size()), u(up.data(), up.size());
    Exact<float> y(gate.size());
    kernel.swiglu(g.data(), u.data(), static_cast<int>(gate.size()), y.data());
    return {y.data(), y.data() + y.size()};
}

void check_swiglu(const Values& x) {
    Values gate(x), up(x.size());
    Random(3).numbers(up.data(), up.size(), 2);
    for (std::size_t i = 0; i + 1 < gate.size(); i += 2) gate[i] *= 40;
    for (const Kernel* kernel : available_kernels()) {
        const Values y = swiglu(*kernel, gate, up);
        for (std::size_t i = 0; i < x.size(); ++i) {
            // Beyond -88 the denominator is infinite in float32, and the quotient 0.
            const double g = gate[i], decay = std::exp(-g), right = g / (1 + decay) * up[i];
            const bool vanishes = decay > 3.4e38 && std::isfinite(g);
            CHECK(vanishes ? std::fabs(y[i]) < 1e-30 : near(y[i], static_cast<float>(right), 1e-6, 1e-44),
                  "%s: swiglu(%g, %g) = %g, not %g", kernel->name, gate[i], up[i], y[i], right);
        }
    }
    check_agreement(false, "swiglu", [&](const Kernel& kernel) { return swiglu(kernel, gate, up); });
}

// e^x over its whole range, by way of swiglu(-x, 1) = -x / (1 + e^x).
void check_exponential() {
    Values gate;
    for (float x = -110; x < 95; x += 0.013f) gate.push_back(-x);
    const Values ones(gate.size(), 1.0f);
    for (const Kernel* kernel : available_kernels()) {
        const Values y = swiglu(*kernel, gate, ones);
        for (std::size_t i = 0; i < gate.size(); ++i) {
            const double x = -static_cast<double>(gate[i]);
            if (std::fabs(x) < 0.02 || x > 88) continue;
            CHECK(near(y[i], -x / (1 + std::exp(x)), 4e-7), "%s: at %g", kernel->name, x);
        }
    }
}

void check_add(const Values& x) {
    Values sum(x.size());
    Random(9).numbers(sum.data(), sum.size());
    for (const Kernel* kernel : available_kernels()) {
        const Exact<float> in(x.data(), x.size());
        Exact<float> y(sum.data(), sum.size());
        kernel->add(in.data(), static_cast<int>(x.size()), y.data());
        for (std::size_t i = 0; i < x.size(); ++i) CHECK(same(y[i], sum[i] + x[i]), "%s: add at %zu", kernel->name, i);
    }
}

void check_argmax(const Values& x) {
    std::int32_t first = 0;
    for (std::size_t i = 1; i < x.size(); ++i)
        if (x[i] > x[first]) first = static_cast<std::int32_t>(i);
    const bool has_nan = std::any_of(x.begin(), x.end(), [](float v) { return std::isnan(v); });
    if (has_nan || !std::isfinite(x[first])) first = -1;
    for (const Kernel* kernel : available_kernels()) {
        const Exact<float> in(x.data(), x.size());
        const std::int32_t found = kernel->argmax(in.data(), static_cast<int>(x.size()));
        CHECK(found == first, "%s: argmax of %zu is %d, not %d", kernel->name, x.size(), found, first);
    }
}

void check_rotate(const Values& x) {
    if (x.size() % 2 == 1) return;
    const std::size_t half = x.size() / 2;
    Values cosine(half), sine(half);
    Random(5).numbers(cosine.data(), half), Random(6).numbers(sine.data(), half);
    for (const Kernel* kernel : available_kernels()) {
        Exact<float> head(x.data(), x.size());
        const Exact<float> c(cosine.data(), half), s(sine.data(), half);
        kernel->rotate(head.data(), c.data(), s.data(), static_cast<int>(x.size()));
        for (std::size_t i = 0; i < half; ++i) {
            const volatile float products[4] = {x[i] * c[i], x[i + half] * s[i], x[i + half] * c[i], x[i] * s[i]};
            CHECK(same(head[i], products[0] - products[1]) && same(head[i + half], products[2] + products[3]),
                  "%s: rotate at %zu of %zu", kernel->name, i, half);
        }
    }
}

// Any signs do: the kernel does not ask whether they make a Hadamard matrix.
void check_hadamard(int blocks, int base, int power) {
    const int count = base * power;
    Values x(static_cast<std::size_t>(blocks) * count);
    std::vector<std::int8_t> signs(static_cast<std::size_t>(base) * base);
    Random random(static_cast<unsigned>(count));
    random.numbers(x.data(), x.size());
    for (std::int8_t& sign : signs) sign = random.integer(0, 1) == 0 ? -1 : 1;
    const Hadamard transform(blocks, base, power, signs.data());
    const HadamardPlan plan = transform.plan();
    const auto run = [&](const Kernel& kernel) {
        Exact<float> y(x.data(), x.size()), scratch(hadamard_scratch(base, power));
        kernel.hadamard(plan, y.data(), scratch.data());
        return Values(y.data(), y.data() + y.size());
    };
    const Values y = run(*available_kernels().front());
    for (int b = 0; b < blocks; ++b)
        for (int i = 0; i < base; ++i)
            for (int j = 0; j < power; ++j) {
                double sum = 0;
                for (int p = 0; p < base; ++p)
                    for (int q = 0; q < power; ++q) {
                        const double sign = __builtin_parity(static_cast<unsigned>(j & q)) ? -1 : 1;
                        sum += (base > 1 ? signs[i * base + p] : 1) * sign * x[b * count + p * power + q];
                    }
                CHECK(near(y[b * count + i * power + j], sum * plan.scale, 1e-5, 1e-6), "hadamard %d x %d x %d", blocks,
                      base, power);
            }
    check_agreement(true, "hadamard", run);
}

}  // namespace
}  // namespace kernel_test

int main() {
    using namespace kernel_test;
    for (int width : kWidths)
        for (const Values& x : rows_of(width)) {
            check_rms_norm(x);
            for (int bits : {4, 8}) {
                for (float scale : {1.0f, 0.0625f, 1e-3f, 0x1p-126f}) check_quantize(x, bits, &scale);
                check_quantize(x, bits, nullptr);
            }
            check_swiglu(x), check_add(x), check_argmax(x), check_rotate(x);
        }
    check_argmax(Values(50, -kInfinity)), check_argmax({1, 2, 2, 1}), check_argmax({-0.0f, 0.0f});
    check_exponential();
    for (int power : {1, 2, 4, 8, 16, 32, 64}) {
        check_hadamard(1, 1, power);
        check_hadamard(3, 1, power);
    }
    check_hadamard(1, 12, 2), check_hadamard(1, 12, 4), check_hadamard(2, 20, 16), check_hadamard(1, 28, 32);
    std::puts("rows agree");
}
