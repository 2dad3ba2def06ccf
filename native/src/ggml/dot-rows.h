#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_tensor;
struct ggml_compute_params;

// Products of some columns of an expert with some of its rows of activations, for weights that are not repacked, in the
// bits of vec_dot: `dst` is the MUL_MAT_ID, `expert_rows` has (expert slot, token) of each row of the expert, `rows` are
// the activations of all tokens, quantized. False where vec_dot has to compute them: another type, another processor.
bool ggml_dot_rows(const struct ggml_tensor * dst, const char * expert, int64_t first_col, int64_t last_col,
                   const int32_t * expert_rows, int64_t first_row, int64_t last_row, const void * rows);

// The products of this thread's columns of an expert with all its rows, in the bits of tiled/, for the experts that tiled/
// would compute. False where tiled/ has to.
bool ggml_dot_rows_tiled(const struct ggml_compute_params * params, const struct ggml_tensor * dst, int64_t expert,
                         const int32_t * expert_rows, int64_t n_rows);

#ifdef __cplusplus
}
#endif
