#include "step.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace osp {
namespace {

constexpr std::size_t kLargestChunk = 1 << 20, kSmallestChunk = 16 << 10;  // bytes of weights, where there are few rows
constexpr std::size_t kSharesOfThread = 3;
constexpr int kOutputsOfChunk = 1024;  // rows times panels

// A prepared row in scratch: floats, codes, their sum, the scale.
struct PreparedRow {
    PreparedRow(std::byte* scratch, int index, int stride)
        : floats(reinterpret_cast<float*>(scratch + static_cast<std::size_t>(index) * bytes(stride))),
          codes(reinterpret_cast<std::int8_t*>(floats + stride)),
          sum(reinterpret_cast<std::int32_t*>(codes + stride)),
          scale(reinterpret_cast<float*>(sum + 1)) {}
    static std::size_t bytes(int stride) { return lines(static_cast<std::size_t>(stride) * 5 + 8); }

    float* floats;
    std::int8_t* codes;
    std::int32_t* sum;
    float* scale;
};

PreparedRow prepared_row(const std::byte* scratch, int index, int stride) {
    return {const_cast<std::byte*>(scratch), index, stride};
}

// Panels that the next chunk takes: a share of the work that is left, so that chunks grow smaller towards the end of a
// phase, where all threads are to be done at the same time.
int panels_of_chunk(const PackedMatrix& matrix, std::size_t bytes_left, int rows, int threads) {
    const std::size_t share = bytes_left / (static_cast<std::size_t>(threads) * kSharesOfThread);
    const std::size_t bytes = std::clamp(share, kSmallestChunk, kLargestChunk) / static_cast<std::size_t>(1 + rows / 8);
    const int least = rows >= 24 ? 2 : 1;  // kernels take two panels at a time where there are many rows
    const int most = std::max(least, kOutputsOfChunk / rows);
    return std::clamp(static_cast<int>(bytes / matrix.panel_bytes()), least, most);
}

void multiply_rows(const Kernel& kernel, const Linear& linear, const InputPlane& input, int rows, int first, int count,
                   float* y) {
    const std::size_t stride = static_cast<std::size_t>(count) * kLanes;
    if (linear.input_bits == 16)
        kernel.float_product(input.float_rows(0, rows), linear.matrix.view(), first, count, y, stride);
    else
        kernel.integer_product(input.code_rows(0, rows), linear.matrix.view(), first, count, y, stride);
}

}  // namespace

// Floats of scratch for the transform of any width up to this one.
static std::size_t hadamard_room(int width) {
    return hadamard_scratch(std::min(width, kLargestBase), 1) + static_cast<std::size_t>(width);
}

std::size_t scratch_bytes(const Shape& shape, int max_positions, int rows) {
    const int widest = std::max({shape.width, shape.inner, shape.queries()});
    const auto stride = static_cast<std::size_t>(stride_of(widest));
    const std::size_t preparing =
        PreparedRow::bytes(static_cast<int>(stride)) * kRowsOfTile + hadamard_room(widest) * sizeof(float);
    const std::size_t placing =
        (static_cast<std::size_t>(shape.queries() + shape.keys()) * kRowsOfTile + hadamard_room(shape.head_dim)) *
            sizeof(float) +
        64;
    const std::size_t multiplying =
        2 * sizeof(float) * kLanes * static_cast<std::size_t>(std::max(kOutputsOfChunk, 2 * rows));
    const std::size_t attending =
        sizeof(float) * (static_cast<std::size_t>(kTokensOfTile) * static_cast<std::size_t>(shape.queries()) +
                         attention_scratch(max_positions));
    return lines(std::max({preparing, placing, multiplying, attending}) + 4 * 64);
}

StepBuilder::StepBuilder(Model& model, const Batch& batch)
    : model_(model), kernel_(model.kernel_), activations_(*model.activations_), plan_(std::make_shared<Plan>()) {
    plan_->batch = batch;
    for (std::size_t s = 0; s < batch.slices.size(); ++s) {
        const Slice& slice = batch.slices[s];
        for (int i = 0; i < slice.length; ++i) {
            if (i >= slice.length - slice.logits) plan_->wanted.push_back(static_cast<int>(plan_->position.size()));
            plan_->slice_of.push_back(static_cast<int>(s));
            plan_->position.push_back(slice.start + i);
        }
    }
    rows_ = static_cast<int>(batch.tokens.size());
    residual_ = &activations_.residual;
}

// What phases hold must outlive this builder: a late thread may still be in them after `Model::step` has returned. So
// they refer to the plan, which they share, and to parts of the model, which waits for its threads before it goes.
std::vector<Phase> StepBuilder::build() {
    embed();
    for (int layer = 0; layer < model_.shape_.layers; ++layer) compute_block(layer);
    if (!plan_->wanted.empty()) predict();
    return std::move(phases_);
}

void StepBuilder::compute_block(int layer) {
    const Block& block = model_.weights_.blocks[static_cast<std::size_t>(layer)];
    const Linear &q = block.at(Site::kQ), &k = block.at(Site::kK), &v = block.at(Site::kV), &o = block.at(Site::kO);
    const Linear &gate = block.at(Site::kGate), &up = block.at(Site::kUp), &down = block.at(Site::kDown);
    Model::Activations& a = activations_;
    prepare(*residual_, a.hidden, block.attention_norm.data(), nullptr, {&q, &k, &v});
    multiply(a.hidden, {part(q, a.queries), part(k, a.keys), part(v, a.values)});
    place(layer);
    if (layer == model_.shape_.layers - 1) {  // what follows is for logits only
        if (plan_->wanted.empty()) return;
        narrow();
    }
    attend(layer);
    prepare(a.attended.floats, a.attended, nullptr, nullptr, {&o});
    multiply(a.attended, {part(o, *residual_, true)});
    prepare(*residual_, a.hidden, block.ffn_norm.data(), nullptr, {&gate, &up});
    Part gated = part(gate, a.inner.floats);
    gated.up = &up;
    multiply(a.hidden, {gated});
    prepare(a.inner.floats, a.inner, nullptr, down.rotated ? &model_.weights_.ffn : nullptr, {&down});
    multiply(a.inner, {part(down, *residual_, true)});
}

void StepBuilder::predict() {
    const Weights& weights = model_.weights_;
    prepare(*residual_, activations_.hidden, weights.final_norm.data(), nullptr, {&weights.head});
    const auto stride = static_cast<std::size_t>(model_.shape_.vocabulary);
    multiply(activations_.hidden, {{&weights.head, nullptr, model_.logits_.as<float>(), stride, false}});
    find_argmax();
}

void StepBuilder::embed() {
    const int half = model_.shape_.head_dim / 2, count = rows_;
    Model::Activations& a = activations_;
    const int stride = a.residual.stride + a.cosine.stride + a.sine.stride;
    const Weights& weights = model_.weights_;
    const auto compute = [=, plan = plan_, &a, &weights](int chunk, std::byte* scratch) {
        auto* to = reinterpret_cast<float*>(scratch);
        for (int n = chunk * kRowsOfTile; n < std::min(count, (chunk + 1) * kRowsOfTile); ++n, to += stride) {
            const auto row = static_cast<std::size_t>(n);
            weights.table().read_row(plan->batch.tokens[row], to);
            float *cosine = to + a.residual.stride, *sine = cosine + a.cosine.stride;
            for (int i = 0; i < half; ++i) {
                // The angle is rounded to float32 as in training; cosine and sine are those of float64, rounded once.
                const float angle =
                    static_cast<float>(plan->position[row]) * weights.rotary_frequencies[static_cast<std::size_t>(i)];
                cosine[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
                sine[i] = static_cast<float>(std::sin(static_cast<double>(angle)));
            }
        }
    };
    const auto commit = [=, &a](int chunk, const std::byte* scratch) {
        const auto* from = reinterpret_cast<const float*>(scratch);
        for (int n = chunk * kRowsOfTile; n < std::min(count, (chunk + 1) * kRowsOfTile); ++n, from += stride) {
            std::copy_n(from, a.residual.width, a.residual.row(n));
            std::copy_n(from + a.residual.stride, half, a.cosine.row(n));
            std::copy_n(from + a.residual.stride + a.cosine.stride, half, a.sine.row(n));
        }
    };
    phases_.push_back({(count + kRowsOfTile - 1) / kRowsOfTile, compute, commit});
}

void StepBuilder::prepare(const FloatPlane& source, const InputPlane& target, const float* norm,
                          const Hadamard* hadamard, std::vector<const Linear*> readers) {
    const auto coded =
        std::find_if(readers.begin(), readers.end(), [](const Linear* linear) { return linear->input_bits < 16; });
    const Linear* codes = coded == readers.end() ? nullptr : *coded;  // all that read codes read the same
    const bool floats =
        std::any_of(readers.begin(), readers.end(), [](const Linear* linear) { return linear->input_bits == 16; });
    if (!codes && &source == &target.floats && !hadamard) return;  // they are there already
    const int count = rows_;
    const int width = source.width, stride = target.floats.stride;
    const int padded = (width + kColumnStep - 1) / kColumnStep * kColumnStep;
    const float eps = model_.shape_.norm_eps;
    const HadamardPlan transform = hadamard ? hadamard->plan() : HadamardPlan{};
    const Kernel& kernel = kernel_;
    const auto compute = [=, &source, &kernel](int chunk, std::byte* scratch) {
        auto* room = reinterpret_cast<float*>(scratch + PreparedRow::bytes(stride) * kRowsOfTile);
        for (int n = chunk * kRowsOfTile, i = 0; n < std::min(count, (chunk + 1) * kRowsOfTile); ++n, ++i) {
            const PreparedRow row(scratch, i, stride);
            const float* from = source.row(n);
            if (norm)
                kernel.rms_norm(from, norm, width, eps, row.floats);
            else
                std::copy_n(from, width, row.floats);
            if (hadamard) kernel.hadamard(transform, row.floats, room);
            if (codes && codes->per_token)
                kernel.quantize_token(row.floats, width, padded, codes->input_bits, row.codes, row.sum, row.scale);
            else if (codes)
                kernel.quantize_static(row.floats, width, padded, codes->input_scale, codes->input_bits, row.codes,
                                       row.sum, row.scale);
        }
    };
    const auto commit = [=, &target](int chunk, const std::byte* scratch) {
        for (int n = chunk * kRowsOfTile, i = 0; n < std::min(count, (chunk + 1) * kRowsOfTile); ++n, ++i) {
            const PreparedRow row = prepared_row(scratch, i, stride);
            if (floats) std::copy_n(row.floats, width, target.floats.row(n));
            if (!codes) continue;
            std::copy_n(row.codes, padded, target.codes_of(n));
            target.sums.as<std::int32_t>()[n] = *row.sum;
            target.scales.as<float>()[n] = *row.scale;
        }
    };
    phases_.push_back({(count + kRowsOfTile - 1) / kRowsOfTile, compute, commit});
}

void StepBuilder::multiply(const InputPlane& input, std::vector<Part> parts) {
    const int count = rows_;
    const auto bytes_of_panel = [](const Part& part) { return part.linear->matrix.panel_bytes() * (part.up ? 2 : 1); };
    std::size_t bytes_left = 0;
    for (const Part& part : parts)
        bytes_left += bytes_of_panel(part) * static_cast<std::size_t>(part.linear->matrix.panels());
    std::vector<PanelRun> runs;
    for (std::size_t p = 0; p < parts.size(); ++p) {
        const PackedMatrix& matrix = parts[p].linear->matrix;
        for (int first = 0, taken; first < matrix.panels(); first += taken) {
            taken = std::min(panels_of_chunk(matrix, bytes_left, count, model_.threads()), matrix.panels() - first);
            runs.push_back({static_cast<int>(p), first, taken});
            bytes_left -= bytes_of_panel(parts[p]) * static_cast<std::size_t>(taken);
        }
    }
    const int chunks = static_cast<int>(runs.size());
    struct Work {
        std::vector<Part> parts;
        std::vector<PanelRun> runs;
    };
    const auto work = std::make_shared<const Work>(Work{std::move(parts), std::move(runs)});
    const Kernel& kernel = kernel_;
    const auto compute = [=, &input, &kernel](int chunk, std::byte* scratch) {
        const PanelRun& run = work->runs[static_cast<std::size_t>(chunk)];
        const Part& part = work->parts[static_cast<std::size_t>(run.part)];
        auto* y = reinterpret_cast<float*>(scratch);
        multiply_rows(kernel, *part.linear, input, count, run.first, run.count, y);
        if (!part.up) return;
        const int outputs = count * run.count * kLanes;
        multiply_rows(kernel, *part.up, input, count, run.first, run.count, y + outputs);
        kernel.swiglu(y, y + outputs, outputs, y);
    };
    const auto commit = [=, &kernel](int chunk, const std::byte* scratch) {
        const PanelRun& run = work->runs[static_cast<std::size_t>(chunk)];
        const Part& part = work->parts[static_cast<std::size_t>(run.part)];
        const int first = run.first * kLanes, width = std::min(run.count * kLanes, part.linear->matrix.rows() - first);
        const auto* y = reinterpret_cast<const float*>(scratch);
        for (int n = 0; n < count; ++n, y += run.count * kLanes) {
            float* to = part.out + static_cast<std::size_t>(n) * part.stride + first;
            if (part.add)
                kernel.add(y, width, to);
            else
                std::copy_n(y, width, to);
        }
    };
    phases_.push_back({chunks, compute, commit});
}

void StepBuilder::narrow() {
    if (logit_rows() == rows_) return;
    Model::Activations& a = activations_;
    const int width = a.residual.width;
    rows_ = logit_rows();
    residual_ = &a.narrowed;
    const auto compute = [=, plan = plan_, &a](int row, std::byte* scratch) {
        const int from = plan->wanted[static_cast<std::size_t>(row)];
        std::copy_n(a.residual.row(from), width, reinterpret_cast<float*>(scratch));
    };
    const auto commit = [=, &a](int row, const std::byte* scratch) {
        std::copy_n(reinterpret_cast<const float*>(scratch), width, a.narrowed.row(row));
    };
    phases_.push_back({rows_, compute, commit});
}

void StepBuilder::find_argmax() {
    const int width = model_.shape_.vocabulary;
    const float* logits = model_.logits_.as<float>();
    std::int32_t* tokens = model_.argmax_.data();
    const Kernel& kernel = kernel_;
    const auto compute = [=, &kernel](int row, std::byte* scratch) {
        *reinterpret_cast<std::int32_t*>(scratch) =
            kernel.argmax(logits + static_cast<std::size_t>(row) * static_cast<std::size_t>(width), width);
    };
    const auto commit = [=](int row, const std::byte* scratch) {
        tokens[row] = *reinterpret_cast<const std::int32_t*>(scratch);
    };
    phases_.push_back({logit_rows(), compute, commit});
}

}  // namespace osp
