// The operators of a compiled graph that stand for what the compiler is not good at. Their schemas
// and shapes are in ops.py.

#include <torch/library.h>

#include "group_norm.h"
#include "matmul.h"
#include "row_ops.h"

// No operator: Python's collector calls it at any time, also while something is traced.
extern "C" void qncd_forget(const char* key) { forget(key); }

TORCH_LIBRARY_FRAGMENT(qncd, library) {
  library.def(
      "keep(str key, bool is_conv, bool upsampled, Tensor[] weights, Tensor[] weight_scales, "
      "Tensor weight_zero_point, int[] stride, int[] padding, int[] dilation, int groups, "
      "int rows, bool writes_bfloat16) -> ()",
      keep);
}

TORCH_LIBRARY_IMPL(qncd, CPU, library) {
  library.impl("multiply", multiply);
  library.impl("matmul", matmul);
  library.impl("attention", attention);
  library.impl("byte_attention", byte_attention);
  library.impl("image_codes", image_codes);
  library.impl("gated_codes", gated_codes);
  library.impl("gated_product_codes", gated_product_codes);
}
