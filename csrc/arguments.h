// Fills the parts that the argument structs of kernels.h share. csrc/ops calls it with tensors of
// torch, tests/simt with arrays of NumPy.
#pragma once

#include <vector>

#include "kernels.h"

namespace bmtard {

struct Logits {  // [N, C]
  DataType dtype;
  int64_t rows, classes;
  Matrix matrix;
};

// A vector, or one value for all (stride 0). data null: there is none.
struct Values {
  const void* data = nullptr;
  int64_t stride = 0;
};

// `values` if there are any, else `value`.
struct Temperature {
  Values values;
  double value = 0;
};

struct Coefficient {  // [K, N]
  const void* data;
  int64_t teacher_stride, row_stride;
};

template <typename Args>
void set_shape(Args& args, const Logits& logits) {
  args.dtype = logits.dtype;
  args.rows = logits.rows;
  args.classes = logits.classes;
}

template <typename Args>
void set_logits(Args& args, const Logits& logits) {
  set_shape(args, logits);
  args.logits = logits.matrix;
}

// Lists of K or 1, K <= kMaxTeachers: a list of one serves all of the other.
template <typename Args>
void set_pairs(Args& args, const std::vector<Logits>& students,
               const std::vector<Logits>& teachers) {
  const size_t count = students.size() > teachers.size() ? students.size() : teachers.size();
  set_shape(args, students[0]);
  args.teachers = static_cast<int32_t>(count);
  for (size_t k = 0; k < count; ++k) {
    args.student[k] = students[students.size() == 1 ? 0 : k].matrix;
    args.teacher[k] = teachers[teachers.size() == 1 ? 0 : k].matrix;
  }
}

template <typename Args>
void set_temperature(Args& args, const Temperature& temperature) {
  args.temperature = static_cast<decltype(args.temperature)>(temperature.values.data);
  args.temperature_stride = temperature.values.stride;
  args.temperature_value = temperature.value;
}

template <typename Args>
void set_coefficient(Args& args, const Coefficient& coefficient) {
  args.coefficient = coefficient.data;
  args.coefficient_teacher_stride = coefficient.teacher_stride;
  args.coefficient_row_stride = coefficient.row_stride;
}

}  // namespace bmtard
