// The C interface of the operator: checks arguments, lays out the workspace, enqueues the steps.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/check.h"
#include "common/device.h"
#include "primitives.cuh"
#include "tango/steps.h"

namespace tango {
namespace {

// Largest size of the Gram matrices. One matrix of 6,324 tokens fits, and 32 frames of 14 x 14 have 6,272. A longer
// video fits if its segments or its static positions divide the tokens into pools. Otherwise the matrices are computed
// in strips of rows, three times. So the workspace stays O(F L D).
constexpr size_t kGramBytes = 160'000'000;
constexpr size_t kAlignment = 256;
constexpr double kRatioScale = 10000.0;

int check(const TangoPruneShape* shape, const TangoPruneParams* params) {
    int status = check_pointer("shape", shape, 1);
    if (status == TANGO_OK) status = check_pointer("params", params, 1);
    if (status != TANGO_OK) return status;
    status = check_ranges({
        {"frames", shape->frames, 1, TANGO_MAX_FRAMES},
        {"tokens_per_frame", shape->tokens_per_frame, 1, TANGO_MAX_TOKENS_PER_FRAME},
        {"width", shape->width, 2, TANGO_MAX_WIDTH},
        {"dtype", shape->dtype, TANGO_FP16, TANGO_FP32},
        {"retention_ratio", params->retention_ratio, 1, 10000},
        {"context_ratio", params->context_ratio, 0, 10000},
        {"expansion", params->expansion, 10000, 1000000},
        {"anchor_weight", params->anchor_weight, 0, 10000},
        {"segment_threshold", params->segment_threshold, -10000, 10000},
        {"static_threshold", params->static_threshold, -10000, 10000},
        {"neighbors", params->neighbors, 1, TANGO_MAX_NEIGHBORS},
        {"time_base", params->time_base, 2, 999999999},
        {"space_base", params->space_base, 2, 999999999},
        {"grid_rows", params->grid_rows, 1, TANGO_MAX_TOKENS_PER_FRAME},
        {"grid_columns", params->grid_columns, 1, TANGO_MAX_TOKENS_PER_FRAME},
        {"merge_order", params->merge_order, TANGO_MERGE_ANCHOR, TANGO_MERGE_DENSITY},
        {"budget", params->budget, TANGO_BUDGET_PAPER, TANGO_BUDGET_EXACT},
        {"precision", params->precision, TANGO_FAST, TANGO_EXACT},
        {"sink_count", params->sink_count, 0, TANGO_MAX_TOKENS_PER_FRAME},
    });
    if (status != TANGO_OK) return status;
    if (shape->width % 2 != 0) return fail(TANGO_BAD_ARGUMENT, "width is %d: it must be even", shape->width);
    if (params->grid_rows * params->grid_columns != shape->tokens_per_frame)
        return fail(TANGO_BAD_ARGUMENT, "tokens_per_frame is %d: the grid %d x %d has %d", shape->tokens_per_frame,
                    params->grid_rows, params->grid_columns, params->grid_rows * params->grid_columns);
    if (params->sink_count > 0 && params->sink_positions == nullptr)
        return fail(TANGO_BAD_ARGUMENT, "sink_positions is null, and sink_count is %d", params->sink_count);
    for (int i = 0; i < params->sink_count; ++i)
        if (params->sink_positions[i] < 0 || params->sink_positions[i] >= shape->tokens_per_frame)
            return fail(TANGO_BAD_ARGUMENT, "sink_positions[%d] is %d: a frame has %d tokens", i,
                        params->sink_positions[i], shape->tokens_per_frame);
    return TANGO_OK;
}

int round_up(int value, int multiple) { return ceil_div(value, multiple) * multiple; }

// Everything about the job except its pointers.
Job describe(const TangoPruneShape& shape, const TangoPruneParams& params) {
    Job job = {};
    job.F = shape.frames;
    job.L = shape.tokens_per_frame;
    job.D = shape.width;
    job.N = job.F * job.L;
    job.W = params.grid_columns;
    job.padded_D = round_up(job.D, kSliceK);
    job.ld = round_up(job.N, kRowUnit);
    job.candidate_ld = round_up(job.L, kRowUnit);
    job.neighbors = params.neighbors;
    job.retention = params.retention_ratio / kRatioScale;
    job.context_ratio = params.context_ratio / kRatioScale;
    job.expansion = params.expansion / kRatioScale;
    job.anchor_weight = params.anchor_weight / kRatioScale;
    job.segment_threshold = params.segment_threshold / kRatioScale;
    job.static_threshold = params.static_threshold / kRatioScale;
    job.time_base = params.time_base;
    job.space_base = params.space_base;
    job.capacity = std::min<long long>(job.N, 1LL * job.N * params.retention_ratio / 10000 + 2 * job.F);
    job.exact_count = static_cast<int>(std::ceil(job.retention * job.F * job.L));
    job.density_order = params.merge_order == TANGO_MERGE_DENSITY;
    job.exact_budget = params.budget == TANGO_BUDGET_EXACT;
    job.exact_products = params.precision == TANGO_EXACT;
    job.half_features = shape.dtype == TANGO_FP16;
    for (int i = 0; i < params.sink_count; ++i)
        job.sinks[params.sink_positions[i] / 32] |= 1u << params.sink_positions[i] % 32;

    // A pool of n tokens has at most n / 128 + 1 tile rows. There is at most one pool per frame: a segment of one frame
    // has one, a longer segment two.
    job.max_tile_rows = job.N / kTile + job.F;
    const size_t row_bytes = static_cast<size_t>(job.ld) * sizeof(float);
    if (row_bytes * job.N <= kGramBytes) {
        job.strips = 1;
        job.strip_tile_rows = job.max_tile_rows;
        job.gram_size = job.N * job.ld;
    } else {
        job.strip_tile_rows = std::max<int>(1, kGramBytes / (row_bytes * kTile));
        job.strips = ceil_div(job.max_tile_rows, job.strip_tile_rows);
        // Strips reserve their largest size. So a longer video never needs less than a shorter one, and a workspace for
        // the longest video, which is what TensorRT allocates, is enough for every other.
        job.gram_size = kGramBytes / sizeof(float);
    }
    const size_t frame_bytes = static_cast<size_t>(job.L) * job.candidate_ld * sizeof(float);
    job.select_batch = job.strips == 1 ? job.F : std::min<int>(job.F, std::max<size_t>(1, kGramBytes / frame_bytes));
    return job;
}

// Divides the workspace into regions, and remembers where the region of one name is.
class WorkspaceLayout {
  public:
    explicit WorkspaceLayout(void* workspace, const char* wanted = "")
        : base_(static_cast<char*>(workspace)), wanted_(wanted) {}

    template <typename T>
    void add(T*& pointer, const char* name, size_t count) {
        const size_t bytes = count * sizeof(T);
        pointer = reinterpret_cast<T*>(base_ + used_);
        if (std::strcmp(name, wanted_) == 0) {
            found_offset = used_;
            found_bytes = bytes;
            found = true;
        }
        used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    }

    size_t used() const { return used_; }

    bool found = false;
    size_t found_offset = 0, found_bytes = 0;

  private:
    char* base_;
    const char* wanted_;
    size_t used_ = 0;
};

void lay_out(Job& job, WorkspaceLayout& layout) {
    const size_t F = job.F, N = job.N;
    const size_t angles = F * job.time_pairs() + (job.H() + job.W) * job.space_pairs();
    layout.add(job.rotated_high, "rotated_high", N * job.padded_D);
    if (job.exact_products) layout.add(job.rotated_low, "rotated_low", N * job.padded_D);
    layout.add(job.rope_cos_sin, "rope_cos_sin", angles);
    layout.add(job.cosines, "cosines", N);
    layout.add(job.static_run, "static_run", N);
    layout.add(job.unchanged, "unchanged", F * F);
    layout.add(job.segment, "segment", F);
    layout.add(job.frame_segment, "frame_segment", F);
    layout.add(job.segment_count, "segment_count", 1);
    layout.add(job.select_pool, "select_pool", 2 * F);
    layout.add(job.candidates, "candidates", N);
    layout.add(job.chosen, "chosen", 2 * F);
    layout.add(job.kind, "kind", N);
    layout.add(job.merge_pool, "merge_pool", 2 * F);
    layout.add(job.context_count, "context_count", 1);
    layout.add(job.context, "context", N);
    layout.add(job.entry_pool, "entry_pool", N);
    layout.add(job.tile_row, "tile_row", job.max_tile_rows);
    layout.add(job.tile_rows, "tile_rows", 1);
    layout.add(job.packed, "packed", 1);
    layout.add(job.member_count, "member_count", 1);
    layout.add(job.gram, "gram", job.gram_size);  // also of `select_batch` frames' candidates, which are no larger
    layout.add(job.norm, "norm", N + 16 * F);
    layout.add(job.knn_mean_sq_dist, "knn_mean_sq_dist", N + 16 * F);
    layout.add(job.max_sq_dist, "max_sq_dist", 2 * F);
    layout.add(job.score, "score", N);
    layout.add(job.anchors, "anchors", N);
    layout.add(job.anchor_tokens, "anchor_tokens", N);
    layout.add(job.anchor_slot, "anchor_slot", N);
    layout.add(job.anchor_count, "anchor_count", 1);
    layout.add(job.owner, "owner", N);
    layout.add(job.member_rows, "member_rows", N);
    layout.add(job.member_start, "member_start", N);
    layout.add(job.members, "members", N);
    layout.add(job.member_anchor, "member_anchor", N);
    layout.add(job.chunk_sum, "chunk_sum", N / kChunk * job.D);
    layout.add(job.source, "source", N);
    layout.add(job.priority, "priority", N);
    layout.add(job.kept, "kept", 1);
    layout.add(job.final_kind, "final_kind", N);
}

int check_tensors(const TangoPruneTensors* tensors) {
    int status = check_pointer("tensors", tensors, 1);
    if (status == TANGO_OK) status = check_pointer("features", tensors->features, 16);
    if (status == TANGO_OK) status = check_pointer("salience", tensors->salience, 4);
    if (status == TANGO_OK) status = check_pointer("timestamps", tensors->timestamps, 4);
    if (status == TANGO_OK) status = check_pointer("tokens", tensors->tokens, 16);
    if (status == TANGO_OK) status = check_pointer("indices", tensors->indices, 4);
    if (status == TANGO_OK) status = check_pointer("count", tensors->count, 4);
    return status;
}

}  // namespace
}  // namespace tango

using namespace tango;

void tango_prune_defaults(int32_t grid_rows, int32_t grid_columns, TangoPruneParams* params) {
    if (params == nullptr) return;
    *params = {};
    params->retention_ratio = 1000;
    params->context_ratio = 4000;
    params->expansion = 15000;
    params->anchor_weight = 6000;
    params->segment_threshold = 6500;
    params->static_threshold = 8000;
    params->neighbors = 7;
    params->time_base = 10000;
    params->space_base = 1000;
    params->grid_rows = grid_rows;
    params->grid_columns = grid_columns;
}

int tango_prune_capacity(const TangoPruneShape* shape, const TangoPruneParams* params, int32_t* capacity) {
    if (int status = check(shape, params)) return status;
    if (int status = check_pointer("capacity", capacity, 1)) return status;
    *capacity = describe(*shape, *params).capacity;
    return TANGO_OK;
}

int tango_prune_workspace(const TangoPruneShape* shape, const TangoPruneParams* params, size_t* bytes) {
    if (int status = check(shape, params)) return status;
    if (int status = check_pointer("bytes", bytes, 1)) return status;
    Job job = describe(*shape, *params);
    WorkspaceLayout layout(nullptr);
    lay_out(job, layout);
    *bytes = layout.used();
    return TANGO_OK;
}

int tango_prune_region(const TangoPruneShape* shape, const TangoPruneParams* params, const char* name, size_t* offset,
                       size_t* bytes) {
    if (int status = check(shape, params)) return status;
    if (name == nullptr || offset == nullptr || bytes == nullptr)
        return fail(TANGO_BAD_ARGUMENT, "name, offset or bytes is null");
    Job job = describe(*shape, *params);
    WorkspaceLayout layout(nullptr, name);
    lay_out(job, layout);
    if (!layout.found) return fail(TANGO_BAD_ARGUMENT, "the workspace has no region named %s", name);
    *offset = layout.found_offset;
    *bytes = layout.found_bytes;
    return TANGO_OK;
}

int tango_prune_enqueue_steps(const TangoPruneShape* shape, const TangoPruneParams* params,
                              const TangoPruneTensors* tensors, void* workspace, size_t workspace_bytes, void* stream,
                              int32_t first, int32_t last) {
    static constexpr struct {
        const char* name;
        cudaError_t (*enqueue)(const Job&, cudaStream_t);
    } kSteps[TANGO_STEPS] = {
        {"prune: rotate", rotate},
        {"prune: find_segments", find_segments},
        {"prune: find_candidates", find_candidates},
        {"prune: select", select},
        {"prune: list_context", list_context},
        {"prune: find_densities", find_densities},
        {"prune: find_deltas", find_deltas},
        {"prune: find_anchors", find_anchors},
        {"prune: find_owners", find_owners},
        {"prune: merge", merge},
    };
    int status = check(shape, params);
    if (status == TANGO_OK) status = check_tensors(tensors);
    if (status == TANGO_OK) status = check_pointer("workspace", workspace, kAlignment);
    if (status == TANGO_OK)
        status = check_ranges({{"first", first, 0, TANGO_STEPS - 1}, {"last", last, first, TANGO_STEPS - 1}});
    if (status != TANGO_OK) return status;
    Job job = describe(*shape, *params);
    WorkspaceLayout layout(workspace);
    lay_out(job, layout);
    if (workspace_bytes < layout.used())
        return fail(TANGO_SMALL_WORKSPACE, "workspace has %zu bytes: it must have %zu", workspace_bytes, layout.used());
    job.features = tensors->features;
    job.salience = tensors->salience;
    job.timestamps = tensors->timestamps;
    job.tokens = tensors->tokens;
    job.indices = tensors->indices;
    job.count = tensors->count;
    job.merged = tensors->merged;
    job.segments = tensors->segments;
    for (int step = first; step <= last; ++step) {
        const cudaError_t error = kSteps[step].enqueue(job, static_cast<cudaStream_t>(stream));
        if (error != cudaSuccess) return cuda_status(error, kSteps[step].name);
    }
    return TANGO_OK;
}

int tango_prune_enqueue(const TangoPruneShape* shape, const TangoPruneParams* params, const TangoPruneTensors* tensors,
                        void* workspace, size_t workspace_bytes, void* stream) {
    return tango_prune_enqueue_steps(shape, params, tensors, workspace, workspace_bytes, stream, 0, TANGO_STEPS - 1);
}
