#include "product_timer.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "activations.hpp"
#include "pool.hpp"

namespace osp {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kChunkBytes = 48 << 10;
constexpr int kPanelsOfChunk = 4;  // where there are many rows

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Small codes, the same each time.
void fill(const InputPlane& input, int rows, int columns) {
    for (int n = 0; n < rows; ++n) {
        std::int32_t sum = 0;
        for (int k = 0; k < columns; ++k) {
            const int code = (n * 31 + k * 17) % 16 - 8;
            input.codes_of(n)[k] = static_cast<std::int8_t>(code);
            input.floats.row(n)[k] = static_cast<float>(code);
            sum += code;
        }
        input.sums.as<std::int32_t>()[n] = sum;
        input.scales.as<float>()[n] = 1;
    }
}

}  // namespace

double time_product(const Kernel& kernel, Format format, int rows, int outputs, int columns, int threads,
                    double seconds) {
    if (rows < 1) throw std::invalid_argument("a product of no rows");
    const bool integers = format == Format::kInt4 || format == Format::kInt8;
    PackedMatrix matrix(format, outputs, columns, integers ? std::vector<float>{1.0f} : std::vector<float>{});
    for (int panel = 0; panel < matrix.panels(); ++panel) matrix.randomize_panel(panel, 1);
    const InputPlane input(rows, columns);
    fill(input, rows, columns);
    const int step = rows > 16 ? kPanelsOfChunk : std::max(1, static_cast<int>(kChunkBytes / matrix.panel_bytes()));
    const std::size_t stride = static_cast<std::size_t>(step) * kLanes;
    Pool pool(threads, stride * static_cast<std::size_t>(rows) * sizeof(float));
    const auto compute = [&](int chunk, std::byte* scratch) {
        const int first = chunk * step, count = std::min(step, matrix.panels() - first);
        auto* y = reinterpret_cast<float*>(scratch);
        if (integers)
            kernel.integer_product(input.code_rows(0, rows), matrix.view(), first, count, y, stride);
        else
            kernel.float_product(input.float_rows(0, rows), matrix.view(), first, count, y, stride);
    };
    const Phase phase = {(matrix.panels() + step - 1) / step, compute, [](int, const std::byte*) {}};
    std::vector<double> times;
    pool.run({phase});  // warm
    for (const auto start = Clock::now(); times.empty() || seconds_since(start) < seconds;) {
        const auto begin = Clock::now();
        pool.run({phase});
        times.push_back(seconds_since(begin));
    }
    pool.quiesce();
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
    return times[times.size() / 2];
}

}  // namespace osp
