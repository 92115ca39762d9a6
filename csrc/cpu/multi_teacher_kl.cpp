#include "teacher_kl.h"

BMTARD_NAMESPACE_BEGIN

namespace {

template <typename real, typename Args>
real teacher_scale(const Args& args, int32_t k) {
  const double temperature =
      args.temperature ? args.temperature[k * args.temperature_stride] : args.temperature_value;
  return static_cast<real>(inverse_temperature(temperature));
}

// Where the results of rows [r, r + n) of teacher k go; T is real, or a vector of n lanes.
template <typename real, typename T>
void write(const MultiTeacherKLArgs& args, int32_t k, int64_t r, int n, const TeacherKL<T>& found) {
  const int64_t plane = args.teachers * args.rows, at = k * args.rows + r;
  store_lanes(static_cast<real*>(args.kl) + at, n, found.kl);
  if (real* statistics = static_cast<real*>(args.statistics)) {
    store_lanes(statistics + at, n, found.student_max);
    store_lanes(statistics + plane + at, n, found.student_log_sum);
    store_lanes(statistics + 2 * plane + at, n, found.teacher_max);
    store_lanes(statistics + 3 * plane + at, n, found.teacher_log_sum);
    store_lanes(statistics + 4 * plane + at, n, found.center);
  }
}

template <bool has_eps, typename scalar>
void forward_rows(const MultiTeacherKLArgs& args, int64_t begin, int64_t end) {
  using real = acc_t<scalar>;
  const RowScratch<real> scratch(args.classes);
  for (int32_t k = 0; k < args.teachers; ++k) {
    for (int64_t r = begin; r < end; ++r) {
      const auto found = teacher_kl<has_eps, scalar>(
          args.student[k], args.teacher[k], r, args.classes,
          static_cast<real>(1.0 / args.student_temperature), teacher_scale<real>(args, k),
          static_cast<real>(args.eps), args.statistics != nullptr, scratch.data(), nullptr, 0);
      write<real>(args, k, r, 1, found);
    }
  }
}

template <bool has_eps, typename scalar>
void forward_columns(const MultiTeacherKLArgs& args, int64_t begin, int64_t end) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  real student[kMaxColumns * V::size], teacher[kMaxColumns * V::size];
  for (int32_t k = 0; k < args.teachers; ++k) {
    for_groups<real>(begin, end, [&](int64_t r, int n) {
      const auto found = teacher_kl_columns<has_eps, scalar>(
          args.student[k], args.teacher[k], r, n, args.classes,
          static_cast<real>(1.0 / args.student_temperature), teacher_scale<real>(args, k),
          static_cast<real>(args.eps), args.statistics != nullptr, student, teacher);
      write<real>(args, k, r, n, found);
    });
  }
}

// One row of one teacher in the backward pass.
template <typename scalar>
struct RowBackward {
  using real = acc_t<scalar>;
  const scalar* student;
  const scalar* teacher;
  real student_max, student_log_sum, teacher_max, teacher_log_sum, center;
  real coefficient, teacher_scale;
  Vec<real> by_temperature;
};

// A row of zeros, allocated when it is first needed.
template <typename scalar>
class ZeroRow {
 public:
  ZeroRow() = default;
  ~ZeroRow() { __builtin_free(data_); }
  ZeroRow(const ZeroRow&) = delete;
  ZeroRow& operator=(const ZeroRow&) = delete;
  const scalar* get(int64_t classes) {
    if (!data_) data_ = __builtin_calloc(static_cast<size_t>(classes), sizeof(scalar));
    if (!data_) __builtin_abort();
    return static_cast<const scalar*>(data_);
  }

 private:
  void* data_ = nullptr;
};

template <typename scalar>
void backward_rows(const MultiTeacherKLBackwardArgs& args, int64_t begin, int64_t end) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const real* statistics = static_cast<const real*>(args.statistics);
  const real* coefficient = static_cast<const real*>(args.coefficient);
  const int64_t plane = args.teachers * args.rows;
  const V student_scale = static_cast<real>(1.0 / args.student_temperature);
  const V eps = static_cast<real>(args.eps);
  const bool has_eps = args.eps != 0;
  bool wants_teacher = args.grad_temperature != nullptr;
  for (int32_t k = 0; k < args.teachers; ++k) wants_teacher |= args.grad_teacher[k] != nullptr;

  ZeroRow<scalar> zeros;
  RowBackward<scalar> rows[kMaxTeachers];
  for (int64_t r = begin; r < end; ++r) {
    for (int32_t k = 0; k < args.teachers; ++k) {
      const int64_t at = k * args.rows + r;
      rows[k] = {row_of<scalar>(args.student[k], r),
                 row_of<scalar>(args.teacher[k], r),
                 statistics[at],
                 statistics[plane + at],
                 statistics[2 * plane + at],
                 statistics[3 * plane + at],
                 statistics[4 * plane + at],
                 coefficient[k * args.coefficient_teacher_stride + r * args.coefficient_row_stride],
                 teacher_scale<real>(args, k),
                 V(real(0))};
      if (rows[k].coefficient == real(0)) {  // the row may hold NaN, and 0 * NaN is NaN
        rows[k].student = rows[k].teacher = zeros.get(args.classes);
        rows[k].student_max = rows[k].student_log_sum = 0;
        rows[k].teacher_max = rows[k].teacher_log_sum = rows[k].center = 0;
      }
    }
    const auto out = [&](void* grad) { return static_cast<scalar*>(grad) + r * args.classes; };
    for (int64_t j = 0; j < args.classes; j += V::size) {
      const auto at = [&](const scalar* row) {
        return load_at(row, j, args.classes, kNegativeInfinity<real>);
      };
      V student_total = real(0), teacher_total = real(0);
      for (int32_t k = 0; k < args.teachers; ++k) {
        RowBackward<scalar>& row = rows[k];
        const V log_q =
            (at(row.student) - V(row.student_max)) * student_scale - V(row.student_log_sum);
        const V u = (at(row.teacher) - V(row.teacher_max)) * V(row.teacher_scale);
        const V log_p = u - V(row.teacher_log_sum);
        const V p = exp(log_p);
        if (args.grad_student[args.student_shared ? 0 : k]) {
          const V grad = V(row.coefficient) * student_scale * (exp(log_q) - p);
          if (args.student_shared) {
            student_total = student_total + grad;
          } else {
            store_at(out(args.grad_student[k]), j, args.classes, grad);
          }
        }
        if (wants_teacher) {
          const V by_u = V(row.coefficient) *
                         kl_by_scaled_teacher(p, log_p, log_q, V(row.center), eps, has_eps);
          const V grad = by_u * V(row.teacher_scale);
          row.by_temperature = row.by_temperature - grad * floor_exponent(u);
          if (args.teacher_shared) {
            teacher_total = teacher_total + grad;
          } else if (args.grad_teacher[k]) {
            store_at(out(args.grad_teacher[k]), j, args.classes, grad);
          }
        }
      }
      if (args.student_shared && args.grad_student[0]) {
        store_at(out(args.grad_student[0]), j, args.classes, student_total);
      }
      if (args.teacher_shared && args.grad_teacher[0]) {
        store_at(out(args.grad_teacher[0]), j, args.classes, teacher_total);
      }
    }
    if (args.grad_temperature) {
      for (int32_t k = 0; k < args.teachers; ++k) {
        static_cast<real*>(args.grad_temperature)[k * args.rows + r] =
            reduce_add(rows[k].by_temperature);
      }
    }
  }
}

template <bool has_eps, typename scalar>
void forward(const MultiTeacherKLArgs& args, int64_t begin, int64_t end) {
  args.classes <= kMaxColumns ? forward_columns<has_eps, scalar>(args, begin, end)
                              : forward_rows<has_eps, scalar>(args, begin, end);
}

// The backward pass to the students follows while the rows are still in the cache.
template <bool has_eps, typename scalar>
void forward_and_backward(const MultiTeacherKLArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kCacheBytes = 256 * 1024;
  MultiTeacherKLBackwardArgs backward{};
  backward.teachers = args.teachers;
  backward.rows = args.rows;
  backward.classes = args.classes;
  for (int32_t k = 0; k < args.teachers; ++k) {
    backward.student[k] = args.student[k];
    backward.teacher[k] = args.teacher[k];
    backward.grad_student[k] = args.grad_student[k];
  }
  backward.temperature = args.temperature;
  backward.temperature_stride = args.temperature_stride;
  backward.temperature_value = args.temperature_value;
  backward.student_temperature = args.student_temperature;
  backward.eps = args.eps;
  backward.statistics = args.statistics;
  backward.coefficient = args.coefficient;
  backward.coefficient_teacher_stride = args.coefficient_teacher_stride;
  backward.coefficient_row_stride = args.coefficient_row_stride;
  const int64_t row_bytes = 3 * args.teachers * args.classes * static_cast<int64_t>(sizeof(scalar));
  const int64_t fits = kCacheBytes / row_bytes, fewest = Vec<acc_t<scalar>>::size;
  const int64_t step = fits > fewest ? fits / fewest * fewest : fewest;
  for (int64_t r = begin; r < end; r += step) {
    const int64_t stop = r + step < end ? r + step : end;
    forward<has_eps, scalar>(args, r, stop);
    backward_rows<scalar>(backward, r, stop);
  }
}

}  // namespace

void multi_teacher_kl(const MultiTeacherKLArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype, [&](auto type) {
    using scalar = typename decltype(type)::type;
    with_eps(args.eps, [&](auto eps) {
      constexpr bool has_eps = decltype(eps)::is;
      for_rows(parallel_for, args.rows, 2 * args.teachers * args.classes,
               [&](int64_t begin, int64_t end) {
                 args.coefficient ? forward_and_backward<has_eps, scalar>(args, begin, end)
                                  : forward<has_eps, scalar>(args, begin, end);
               });
    });
  });
}

void multi_teacher_kl_backward(const MultiTeacherKLBackwardArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype, [&](auto type) {
    using scalar = typename decltype(type)::type;
    for_rows(parallel_for, args.rows, 2 * args.teachers * args.classes,
             [&](int64_t begin, int64_t end) { backward_rows<scalar>(args, begin, end); });
  });
}

BMTARD_NAMESPACE_END
