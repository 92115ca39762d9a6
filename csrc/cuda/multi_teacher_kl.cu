// KL of a student from each of K teachers by row, and its gradients.
#include "../core/multi_teacher_kl.h"
#include "kl_row.cuh"

namespace bmtard {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename R, typename Args>
BMTARD_DEVICE R inverse_temperature_of(const Args& args, int k) {
  const double temperature = args.temperature
                                 ? simt::load(args.temperature + k * args.temperature_stride)
                                 : args.temperature_value;
  return static_cast<R>(inverse_temperature(temperature));
}

// The planes of the statistics, see kernels.h.
enum Plane { kStudentMax, kStudentLogSum, kTeacherMax, kTeacherLogSum, kCenter };

// Where plane `plane` has teacher k's row n.
template <typename Args>
BMTARD_DEVICE int64_t statistic(const Args& args, Plane plane, int k, int64_t n) {
  return (static_cast<int64_t>(plane) * args.teachers + k) * args.rows + n;
}

// One group for a teacher's row. Both rows are read once if they fit into registers or shared
// memory, or if eps is 0 and no gradient is wanted; else twice.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
multi_teacher_kl_kernel(const BMTARD_GRID_CONSTANT MultiTeacherKLArgs args, Packing packing,
                        bool cached, int blocks_a_teacher) {
  using T = typename Shape::Type;
  using R = Real<T>;
  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const int k = group.block_id() / blocks_a_teacher;
  const int64_t n = group.number(group.block_id() % blocks_a_teacher);
  if (n >= args.rows) return;
  const Window window = window_of<Shape>(row_of<T>(args.student[k], n),
                                         static_cast<int>(args.classes), group.lane, packing);
  const auto row = [&](const Matrix& matrix, int place) {
    const T* data = row_of<T>(matrix, n);
    if constexpr (Shape::kTiles > 0) {
      return Row<Shape>(data, window);
    } else {
      return CachedRow<Shape>(data, window, group.lane, place * cached_values<Shape>(window.span),
                              cached ? Cache::kFill : Cache::kNone);
    }
  };
  const auto student = row(args.student[k], 0);
  const auto teacher = row(args.teacher[k], 1);
  const auto found =
      kl_row<Shape>(student, teacher, window, static_cast<R>(1 / args.student_temperature),
                    inverse_temperature_of<R>(args, k), static_cast<R>(args.eps), R(0), group);
  if (group.leads()) {
    put<R>(args.kl, static_cast<int64_t>(k) * args.rows + n, found.kl);
    if (args.statistics) {
      put<R>(args.statistics, statistic(args, kStudentMax, k, n), found.q.max);
      put<R>(args.statistics, statistic(args, kStudentLogSum, k, n), found.q.log_sum);
      put<R>(args.statistics, statistic(args, kTeacherMax, k, n), found.p.max);
      put<R>(args.statistics, statistic(args, kTeacherLogSum, k, n), found.p.log_sum);
      put<R>(args.statistics, statistic(args, kCenter, k, n), found.center);
    }
  }
  if (args.coefficient) {
    const R by_logit = at<R>(args.coefficient, k * args.coefficient_teacher_stride +
                                                   n * args.coefficient_row_stride) *
                       found.q.inverse_temperature;
    T* const to = static_cast<T*>(args.grad_student[k]) + n * args.classes;
    for_each_values<Shape>(window, {&student, &teacher}, [&](int tile, const auto& tiles) {
      const auto& [s, t] = tiles;
      Tile<Shape> gradient;
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) {
        using std::exp;
        const R difference = exp(found.q(s.value[i])) - exp(found.p(t.value[i]));
        gradient.value[i] = by_logit == R(0) ? R(0) : by_logit * difference;  // not 0 * NaN
      }
      store_tile<Shape>(to, window, tile, gradient);
    });
  }
  group.leave();
}

// What the gradients of one row of one teacher need beside the logits.
template <typename R>
struct Pair {
  LogSoftmax<R> q, p;
  R center, coefficient, eps;

  BMTARD_DEVICE Pair(const MultiTeacherKLBackwardArgs& args, int k, int64_t n)
      : q{static_cast<R>(1 / args.student_temperature), get(args, kStudentMax, k, n),
          get(args, kStudentLogSum, k, n)},
        p{inverse_temperature_of<R>(args, k), get(args, kTeacherMax, k, n),
          get(args, kTeacherLogSum, k, n)},
        center(get(args, kCenter, k, n)),
        coefficient(at<R>(args.coefficient,
                          k * args.coefficient_teacher_stride + n * args.coefficient_row_stride)),
        eps(static_cast<R>(args.eps)) {}

  BMTARD_DEVICE static R get(const MultiTeacherKLBackwardArgs& args, Plane plane, int k,
                             int64_t n) {
    return at<R>(args.statistics, statistic(args, plane, k, n));
  }

  // Adds to the gradients by a student's and a teacher's logit, and to that by the teacher's
  // temperature, up to the factor -coefficient / temperature.
  BMTARD_DEVICE void add(R student, R teacher, R& grad_student, R& grad_teacher,
                         R& by_temperature) const {
    using std::exp;
    if (coefficient == R(0)) return;  // the row may hold NaN
    const R log_q = q(student), log_p = p(teacher);
    const R probability = exp(log_p);
    grad_student += coefficient * q.inverse_temperature * (exp(log_q) - probability);
    const R by_scaled = kl_by_scaled_teacher(probability, log_p, log_q, center, eps, eps > R(0));
    grad_teacher += coefficient * p.inverse_temperature * by_scaled;
    // Where p is 0, so is the first factor, but the second may be infinite.
    by_temperature += probability > R(0) ? by_scaled * p.scaled(teacher) : by_scaled;
  }
};

template <typename T>
BMTARD_DEVICE T* gradient_row(void* const (&gradients)[kMaxTeachers], bool shared, int k, int64_t n,
                              int64_t classes) {
  T* const data = static_cast<T*>(gradients[shared ? 0 : k]);
  return data ? data + n * classes : nullptr;
}

// One group takes one row of one teacher. If a student or teacher is shared, it takes that row of
// every teacher. Each row is read once and each gradient written once; with a shared student or
// teacher, the gradients by the temperatures read the rows once more.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
multi_teacher_kl_backward_kernel(const BMTARD_GRID_CONSTANT MultiTeacherKLBackwardArgs args,
                                 Packing packing, bool together, int blocks_a_teacher) {
  using T = typename Shape::Type;
  using R = Real<T>;
  using Streamed = StreamedShape<Shape>;
  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const int part = group.block_id() / blocks_a_teacher;
  const int64_t n = group.number(group.block_id() % blocks_a_teacher);
  if (n >= args.rows) return;
  const Window window = window_of<Shape>(row_of<T>(args.student[0], n),
                                         static_cast<int>(args.classes), group.lane, packing);

  const auto finish_temperature = [&](const Pair<R>& pair, int k, R by_temperature) {
    if (!args.grad_temperature) return;
    R sums[1] = {by_temperature};
    group.sum(sums);
    if (group.leads()) {
      put<R>(args.grad_temperature, static_cast<int64_t>(k) * args.rows + n,
             -pair.coefficient * pair.p.inverse_temperature * sums[0]);
    }
  };

  if (!together) {
    const int k = part;
    const Pair<R> pair(args, k, n);
    T* const to_student = gradient_row<T>(args.grad_student, false, k, n, args.classes);
    T* const to_teacher = gradient_row<T>(args.grad_teacher, false, k, n, args.classes);
    const Row<Shape> student(row_of<T>(args.student[k], n), window);
    const Row<Shape> teacher(row_of<T>(args.teacher[k], n), window);
    R by_temperature = 0;
    for_each_values<Shape>(window, {&student, &teacher}, [&](int tile, const auto& tiles) {
      const auto& [s, t] = tiles;
      Tile<Shape> grad_s{}, grad_t{};
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) {
        pair.add(s.value[i], t.value[i], grad_s.value[i], grad_t.value[i], by_temperature);
      }
      if (to_student) store_tile<Shape>(to_student, window, tile, grad_s);
      if (to_teacher) store_tile<Shape>(to_teacher, window, tile, grad_t);
    });
    finish_temperature(pair, k, by_temperature);
    group.leave();
    return;
  }

  bool any_logits = false;
  for (int k = 0; k < args.teachers; ++k) {
    any_logits = any_logits || args.grad_student[k] || args.grad_teacher[k];
  }
  if (any_logits) {
    // Teacher by teacher of a tile, then the next tile.
    struct Place {
      int tile, k;
      BMTARD_DEVICE void move(int teachers) {
        if (++k < teachers) return;
        k = 0;
        ++tile;
      }
    };
    const int first = first_tile<Streamed>(window.span), end = end_tile<Streamed>(window.span);
    Place next{first, 0}, here{first, 0};
    Tile<Streamed> grad_s{}, grad_t{};
    for_each_ahead<kAheadOf<T, kAhead>>(
        first * args.teachers, end * args.teachers,
        [&](int) {
          const RawTiles<Streamed, 2> raw = {
              {fetch_tile<Streamed>(row_of<T>(args.student[next.k], n), window, next.tile),
               fetch_tile<Streamed>(row_of<T>(args.teacher[next.k], n), window, next.tile)}};
          next.move(args.teachers);
          return raw;
        },
        [&](int, const RawTiles<Streamed, 2>& raw) {
          const auto [tile, k] = here;
          const Tile<Streamed> s = widened<Streamed>(raw.of[0]), t = widened<Streamed>(raw.of[1]);
          const Pair<R> pair(args, k, n);
          R ignored = 0;
          BMTARD_UNROLL
          for (int i = 0; i < Streamed::kWidth; ++i) {
            pair.add(s.value[i], t.value[i], grad_s.value[i], grad_t.value[i], ignored);
          }
          // A shared gradient is complete after the last teacher.
          const bool last = k + 1 == args.teachers;
          if (last || !args.student_shared) {
            T* const to =
                gradient_row<T>(args.grad_student, args.student_shared, k, n, args.classes);
            if (to) store_tile<Streamed>(to, window, tile, grad_s);
            grad_s = {};
          }
          if (last || !args.teacher_shared) {
            T* const to =
                gradient_row<T>(args.grad_teacher, args.teacher_shared, k, n, args.classes);
            if (to) store_tile<Streamed>(to, window, tile, grad_t);
            grad_t = {};
          }
          here.move(args.teachers);
        });
  }
  if (!args.grad_temperature) return;
  for (int k = 0; k < args.teachers; ++k) {
    const Pair<R> pair(args, k, n);
    R by_temperature = 0;
    const Row<Streamed> student(row_of<T>(args.student[k], n), window);
    const Row<Streamed> teacher(row_of<T>(args.teacher[k], n), window);
    for_each_values<Streamed>(window, {&student, &teacher}, [&](int, const auto& tiles) {
      const auto& [s, t] = tiles;
      R ignored[2] = {0, 0};
      BMTARD_UNROLL
      for (int i = 0; i < Streamed::kWidth; ++i) {
        pair.add(s.value[i], t.value[i], ignored[0], ignored[1], by_temperature);
      }
    });
    finish_temperature(pair, k, by_temperature);
  }
  group.leave();
}

template <typename Args>
Alignment alignment_of(const Args& args) {
  Alignment alignment(args.dtype);
  for (int32_t k = 0; k < args.teachers; ++k) {
    alignment.add(args.student[k]);
    alignment.add(args.teacher[k]);
  }
  return alignment;
}

}  // namespace

int multi_teacher_kl(const MultiTeacherKLArgs& args, void* stream) {
  if (args.rows == 0) return 0;
  Alignment alignment = alignment_of(args);
  for (int32_t k = 0; args.coefficient && k < args.teachers; ++k) {
    alignment.add(args.grad_student[k], args.classes);
  }
  return with_shape<kThreads>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_divide(args.rows, Shape::kRows);
    const Packing packing = alignment.packing<Shape>(args.classes);
    const int64_t span = args.classes + packing.slack;
    const int64_t all = blocks * args.teachers;
    const bool twice = args.eps > 0 || args.coefficient;
    const int kept = twice ? 2 : 0;
    return launch_rows<Shape>(all, span, kept, [&](const simt::Grid& grid, bool cached) {
      return simt::launch(multi_teacher_kl_kernel<Shape>, grid, stream, args, packing, cached,
                          static_cast<int>(blocks));
    });
  });
}

int multi_teacher_kl_backward(const MultiTeacherKLBackwardArgs& args, void* stream) {
  Alignment alignment = alignment_of(args);
  bool wanted = args.grad_temperature != nullptr;
  for (int32_t k = 0; k < args.teachers; ++k) {
    for (const void* gradient : {args.grad_student[k], args.grad_teacher[k]}) {
      if (!gradient) continue;
      wanted = true;
      alignment.add(gradient, args.classes);
    }
  }
  if (args.rows == 0 || !wanted) return 0;
  const bool together = args.teachers > 1 && (args.student_shared || args.teacher_shared);
  return with_shape<kThreads, false>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_divide(args.rows, Shape::kRows);
    const Packing packing = alignment.packing<Shape>(args.classes);
    const int64_t span = args.classes + packing.slack;
    const int64_t all = blocks * (together ? 1 : args.teachers);
    return launch_rows<Shape>(all, span, 0, [&](const simt::Grid& grid, bool) {
      return simt::launch(multi_teacher_kl_backward_kernel<Shape>, grid, stream, args, packing,
                          together, static_cast<int>(blocks));
    });
  });
}

}  // namespace cuda
}  // namespace bmtard
