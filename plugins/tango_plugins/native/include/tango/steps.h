/* The operator of tango/prune.h step by step, for tests: they read and replace its intermediate results. */
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
    TANGO_STEP_DENSITY = 5,    /* context, rotated -> gram, knn_mean_sq_dist */
    TANGO_STEP_DELTA = 6,      /* gram, knn_mean_sq_dist -> score */
    TANGO_STEP_ANCHORS = 7,    /* score -> anchors */
    TANGO_STEP_OWNERS = 8,     /* gram, anchors -> owners */
    TANGO_STEP_MERGE = 9,      /* owners, kinds -> tokens, indices, count, merged */
    TANGO_STEPS = 10
} TangoStep;

/* As tango_prune_enqueue, for the steps from `first` to `last` inclusive, on the current contents of the workspace. */
TANGO_API int tango_prune_enqueue_steps(const TangoPruneShape* shape, const TangoPruneParams* params,
                                        const TangoPruneTensors* tensors, void* workspace, size_t workspace_bytes,
                                        void* stream, int32_t first, int32_t last);

/* Offset and size of an intermediate result in the workspace, by its name in src/prune/job.cuh. */
TANGO_API int tango_prune_region(const TangoPruneShape* shape, const TangoPruneParams* params, const char* name,
                                 size_t* offset, size_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
