#pragma once

// An operation with one value for a row, such as the weight of an expert. Included by binary-ops.cpp, whose loop over copies
// of the second operand would call a function for each value of the first one. The same operations give the same bits.

#include <cstdint>

template <float (*op)(float, float), typename src0_t, typename src1_t, typename dst_t>
static inline void vec_binary_op_one(const int64_t n, dst_t * z, const src0_t * x, const src1_t y) {
    constexpr auto src0_to_f32 = type_conversion_table<src0_t>::to_f32;
    constexpr auto f32_to_dst  = type_conversion_table<dst_t>::from_f32;

    const float y_f32 = type_conversion_table<src1_t>::to_f32(y);
    for (int64_t i = 0; i < n; i++) {
        z[i] = f32_to_dst(op(src0_to_f32(x[i]), y_f32));
    }
}
