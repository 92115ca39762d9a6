// KL of one row of one teacher, for multi_teacher_kl and the whole loss.
#pragma once

#include "../core/multi_teacher_kl.h"
#include "../core/softmax_entropy.h"
#include "rows.h"

BMTARD_NAMESPACE_BEGIN

template <typename T>
struct TeacherKL {
  T kl, center;
  T entropy, entropy_eps;  // of the teacher: -sum p log p and -sum p log(p + eps)
  T student_max, student_log_sum, teacher_max, teacher_log_sum;
  T student_norm, teacher_norm;  // 1 / sum of the exponentials
};

// Sums over the classes that need log(p + eps).
template <typename T>
struct EpsSums {
  T self, center;  // of p log(p + eps) and p^2 / (p + eps)
  BMTARD_HD void add(T p, T eps, bool wants_center) {
    const T p_eps = p + eps;
    self = self + p * log(p_eps);
    if (wants_center) center = center + p * (p / p_eps);
  }
};

// KL and center of a row whose sum for KL overflowed. exp_of(j) is the teacher's exponential. Takes
// numbers, not a TeacherKL: the fast path need not compute what only this would read.
struct FarKL {
  double kl, center;
};
template <typename scalar, typename F>
__attribute__((noinline)) FarKL far_kl(const scalar* student, int64_t classes, double student_max,
                                       double student_log_sum, double student_scale,
                                       double teacher_norm, double eps, F exp_of) {
  using V = Vec<acc_t<scalar>>;
  double self = 0, cross = 0, center = 0;
  for (int64_t start = 0; start < classes; start += V::size) {
    const V z = load_at(student, start, classes, acc_t<scalar>(0));
    for (int i = 0; i < V::size && start + i < classes; ++i) {
      const double p = static_cast<double>(exp_of(start + i)) * teacher_norm;
      if (!(p > 0)) continue;
      self += p * ::log(p + eps);
      cross += p * scaled_below<double>(z.v[i], student_max, student_scale);
      if (eps > 0) center += p * (p / (p + eps));
    }
  }
  const double kl = self + student_log_sum - cross / kFarScale;
  return {kl, kl + center};
}

// `exps` holds the exponentials of the shifted student's and teacher's logits, each padded to whole
// vectors. Where `difference` is not null, it receives difference_scale (q - p).
template <bool has_eps, typename scalar>
inline TeacherKL<acc_t<scalar>> teacher_kl(const Matrix& students, const Matrix& teachers,
                                           int64_t row, int64_t classes,
                                           acc_t<scalar> student_scale, acc_t<scalar> teacher_scale,
                                           acc_t<scalar> eps, bool wants_center,
                                           acc_t<scalar>* exps, acc_t<scalar>* difference,
                                           acc_t<scalar> difference_scale) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const V zero = real(0);
  const scalar* student = row_of<scalar>(students, row);
  const scalar* teacher = row_of<scalar>(teachers, row);
  const real student_max = row_max(student, classes), teacher_max = row_max(teacher, classes);
  const int64_t padded = (classes + V::size - 1) / V::size * V::size;
  real* student_exps = exps;
  real* teacher_exps = exps + padded;

  double q_sum = 0, p_sum = 0, cross = 0, self = 0;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t length = classes - start < kBlock ? classes - start : kBlock;
    V q = zero, p = zero, pd = zero, pu = zero;
    for (int64_t j = 0; j < length; j += V::size) {
      // Fetches the next row during the work on this one. The processor's own prefetch stops at
      // the end of a page, which is about a row.
      __builtin_prefetch(student + students.row_stride + start + j);
      __builtin_prefetch(teacher + teachers.row_stride + start + j);
      const V s = load_at(student + start, j, length, kNegativeInfinity<real>);
      const V t = load_at(teacher + start, j, length, kNegativeInfinity<real>);
      const V v = (s - V(student_max)) * V(student_scale);
      const V u = (t - V(teacher_max)) * V(teacher_scale);
      const V ev = exp(v), eu = exp(u);
      store(student_exps + start + j, ev);
      store(teacher_exps + start + j, eu);
      q = q + ev;
      p = p + eu;
      pd = pd + weighted(eu, has_eps ? -v : u - v);
      pu = pu + eu * floor_exponent(u);
    }
    q_sum += static_cast<double>(reduce_add(q));
    p_sum += static_cast<double>(reduce_add(p));
    cross += static_cast<double>(reduce_add(pd));
    self += static_cast<double>(reduce_add(pu));
  }
  const double student_log_sum = ::log(q_sum), teacher_log_sum = ::log(p_sum);
  const real student_norm = static_cast<real>(1.0 / q_sum);
  const real teacher_norm = static_cast<real>(1.0 / p_sum);

  double self_eps = 0, center = 0;
  if (has_eps || difference) {
    const V q_scale = student_norm * difference_scale, p_scale = teacher_norm * difference_scale;
    for (int64_t start = 0; start < classes; start += kBlock) {
      const int64_t length = classes - start < kBlock ? classes - start : kBlock;
      EpsSums<V> sums{zero, zero};
      for (int64_t j = 0; j < length; j += V::size) {
        const V eu = load(teacher_exps + start + j);
        if (has_eps) sums.add(eu * V(teacher_norm), V(eps), wants_center);
        if (difference) {
          store_at(difference + start, j, length,
                   load(student_exps + start + j) * q_scale - eu * p_scale);
        }
      }
      self_eps += static_cast<double>(reduce_add(sums.self));
      center += static_cast<double>(reduce_add(sums.center));
    }
  }
  const double entropy = teacher_log_sum - self / p_sum;
  const double kl = cross / p_sum + student_log_sum + (has_eps ? self_eps : -teacher_log_sum);
  TeacherKL<real> found{static_cast<real>(kl),
                        static_cast<real>(kl + center),
                        static_cast<real>(entropy),
                        static_cast<real>(has_eps ? -self_eps : entropy),
                        student_max,
                        static_cast<real>(student_log_sum),
                        teacher_max,
                        static_cast<real>(teacher_log_sum),
                        student_norm,
                        teacher_norm};
  if (kl > std::numeric_limits<real>::max()) {
    const FarKL far =
        far_kl(student, classes, student_max, student_log_sum, student_scale, teacher_norm, eps,
               [teacher_exps](int64_t j) { return teacher_exps[j]; });
    found.kl = static_cast<real>(far.kl);
    found.center = static_cast<real>(far.center);
  }
  return found;
}

// The same of n <= Vec::size rows of few classes at once, from `row` on. The columns hold the
// teachers' and the students' exponentials on the way out.
template <bool has_eps, typename scalar>
inline TeacherKL<Vec<acc_t<scalar>>> teacher_kl_columns(
    const Matrix& students, const Matrix& teachers, int64_t row, int n, int64_t classes,
    acc_t<scalar> student_scale_value, acc_t<scalar> teacher_scale_value, acc_t<scalar> eps_value,
    bool wants_center, acc_t<scalar>* student, acc_t<scalar>* teacher) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const V student_scale = student_scale_value, teacher_scale = teacher_scale_value, eps = eps_value;
  load_columns<scalar>(students, row, n, classes, student);
  load_columns<scalar>(teachers, row, n, classes, teacher);
  const V zero = real(0);
  const V student_max = column_max(student, classes), teacher_max = column_max(teacher, classes);
  V q_sum = zero, p_sum = zero, cross = zero, self = zero;
  for (int64_t j = 0; j < classes; ++j) {
    const V v = (load(student + j * V::size) - student_max) * student_scale;
    const V u = (load(teacher + j * V::size) - teacher_max) * teacher_scale;
    const V ev = exp(v), eu = exp(u);
    store(student + j * V::size, ev);
    store(teacher + j * V::size, eu);
    q_sum = q_sum + ev;
    p_sum = p_sum + eu;
    cross = cross + weighted(eu, has_eps ? -v : u - v);
    self = self + eu * floor_exponent(u);
  }
  const V student_log_sum = log(q_sum), teacher_log_sum = log(p_sum);
  const V student_norm = V(real(1)) / q_sum, teacher_norm = V(real(1)) / p_sum;
  EpsSums<V> sums{zero, zero};
  if (has_eps) {
    for (int64_t j = 0; j < classes; ++j) {
      sums.add(load(teacher + j * V::size) * teacher_norm, eps, wants_center);
    }
  }
  const V entropy = teacher_log_sum - self * teacher_norm;
  const V kl = cross * teacher_norm + student_log_sum + (has_eps ? sums.self : -teacher_log_sum);
  TeacherKL<V> found{kl,           kl + sums.center, entropy,     has_eps ? -sums.self : entropy,
                     student_max,  student_log_sum,  teacher_max, teacher_log_sum,
                     student_norm, teacher_norm};
  if (reduce_add(kl - kl) == real(0)) return found;  // all are finite
  for (int i = 0; i < n; ++i) {
    if (!(kl.v[i] > std::numeric_limits<real>::max())) continue;
    const FarKL far = far_kl(row_of<scalar>(students, row + i), classes, student_max.v[i],
                             student_log_sum.v[i], student_scale_value, teacher_norm.v[i],
                             eps_value, [=](int64_t j) { return teacher[j * V::size + i]; });
    found.kl.v[i] = static_cast<real>(far.kl);
    found.center.v[i] = static_cast<real>(far.center);
  }
  return found;
}

// Calls f(Bool<eps > 0>): the inner loops depend on it.
template <bool value>
struct Bool {
  static constexpr bool is = value;
};
template <typename F>
BMTARD_HD void with_eps(double eps, F f) {
  eps != 0 ? f(Bool<true>{}) : f(Bool<false>{});
}

// Room for the exponentials of one student and one teacher row. Freed on the way out; kept out
// of std containers, whose inline code must not be compiled per instruction set.
template <typename real>
class RowScratch {
 public:
  explicit RowScratch(int64_t classes)
      : data_(static_cast<real*>(
            __builtin_malloc(2 * static_cast<size_t>(classes + Vec<real>::size) * sizeof(real)))) {
    if (!data_) __builtin_abort();
  }
  ~RowScratch() { __builtin_free(data_); }
  RowScratch(const RowScratch&) = delete;
  RowScratch& operator=(const RowScratch&) = delete;
  real* data() const { return data_; }

 private:
  real* data_;
};

BMTARD_NAMESPACE_END
