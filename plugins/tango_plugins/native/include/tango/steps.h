/* The operator taken apart, for tests: one step at a time, its intermediate results readable and replaceable. */
#ifndef TANGO_STEPS_H
#define TANGO_STEPS_H

#include "tango/prune.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum TangoStep {
    TANGO_STEP_ROTATE = 0,     /* features, timestamps -> rotated_high, rotated_low, cosines */
    TANGO_STEP_SEGMENT = 1,    /* cosines -> segments, budgets */
    TANGO_STEP_CANDIDATES = 2, /* salience -> candidates of each pool, by salience */
    TANGO_STEP_SELECT = 3,     /* candidates, rotated -> kinds */
    TANGO_STEP_CONTEXT = 4,    /* kinds -> context, the tokens left to merge, by pool */
    TANGO_STEP_DENSITY = 5,    /* context, rotated -> gram, spread */
    TANGO_STEP_DELTA = 6,      /* gram, spread -> score */
    TANGO_STEP_ANCHORS = 7,    /* score -> anchors */
    TANGO_STEP_OWNERS = 8,     /* gram, anchors -> owners */
    TANGO_STEP_MERGE = 9,      /* owners, kinds -> tokens, indices, count, merged */
    TANGO_STEPS = 10
} TangoStep;

/* Like `tango_prune_enqueue`, the steps from `first` to `last`, both included, on what the workspace holds. */
TANGO_API int tango_prune_enqueue_steps(const TangoPruneShape* shape, const TangoPruneParams* params,
                                        const TangoPruneTensors* tensors, void* workspace, size_t workspace_bytes,
                                        void* stream, int32_t first, int32_t last);

/* Where an intermediate result of that name lies in the workspace. */
TANGO_API int tango_prune_region(const TangoPruneShape* shape, const TangoPruneParams* params, const char* name,
                                 size_t* offset, size_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
