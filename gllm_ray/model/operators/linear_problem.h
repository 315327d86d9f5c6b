// What a linear layer is to compute.

#pragma once

#include "vectors.h"

namespace {

template <typename T, typename W>
struct Problem {
  const T* input;       // [rows, depth]
  const W* weight;      // [columns, depth]
  const float* scales;  // [columns] by which the weight's rows are multiplied, or null
  const T* bias;        // [columns], or null
  T* output;            // [rows, columns]
  int64_t rows, depth, columns;
};

}  // namespace
