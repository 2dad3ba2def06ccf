#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_tensor;

// Products of some columns of an expert with some of its rows of activations, for weights that are not repacked, in the
// bits of vec_dot: `dst` is the MUL_MAT_ID, `expert_rows` has (expert slot, token) of each row of the expert, `rows` are
// the activations of all tokens, quantized. False where vec_dot has to compute them: another type, another processor.
bool ggml_dot_rows(const struct ggml_tensor * dst, const char * expert, int64_t first_col, int64_t last_col,
                   const int32_t * expert_rows, int64_t first_row, int64_t last_row, const void * rows);

#ifdef __cplusplus
}
#endif
