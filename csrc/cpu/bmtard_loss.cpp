// The whole balanced loss: temperatures, KLs, weights, loss, gradients, state.
#include "../core/balance.h"
#include "teacher_kl.h"
#include "temperature_search.h"

BMTARD_NAMESPACE_BEGIN

namespace {

// Views into the workspace; bmtard_loss_workspace() in dispatch.cpp sizes it.
template <typename scalar>
struct Workspace {
  using real = acc_t<scalar>;
  double* parts;     // [3, N]
  double* kl;        // [K, N]
  double* entropy;   // [K, N]
  real* max;         // [K, N], of the teachers
  real* difference;  // [K, N, C], q - p, where the gradients themselves are of half type

  explicit Workspace(const BMTARDLossArgs& args) {
    const int64_t rows = args.rows, all = args.teachers * args.rows;
    parts = static_cast<double*>(args.workspace);
    kl = parts + 3 * rows;
    entropy = kl + all;
    max = reinterpret_cast<real*>(entropy + all);
    difference = max + all;
  }
};

// Mode "bisect": every teacher to the largest of their entropies at the lower bound.
template <typename scalar>
bool solve_temperatures(const BMTARDLossArgs& args, const Workspace<scalar>& work,
                        ParallelFor parallel_for, double* temperatures) {
  using real = acc_t<scalar>;
  double log_count[kMaxTeachers];
  EntropyDerivatives<double> lowest[kMaxTeachers];
  double target = kNegativeInfinity<double>;
  for (int32_t k = 0; k < args.teachers; ++k) {
    real* max = work.max + k * args.rows;
    log_count[k] =
        mean_range<scalar>(args.teacher[k], args.rows, args.classes, max, work.parts, parallel_for)
            .log_count;
    lowest[k] = mean_derivatives<scalar>(args.teacher[k], args.rows, args.classes, max, args.low,
                                         work.parts, parallel_for);
    if (lowest[k].entropy > target) target = lowest[k].entropy;
  }
  bool out_of_bounds = false;
  for (int32_t k = 0; k < args.teachers; ++k) {
    auto search = new_search<real>(args, SearchMethod::kHalley, target, log_count[k]);
    const double current = args.state.temperatures[k];
    search.start(current, current);
    // The entropy at the lower bound is known; for the teacher that set the target, it is it.
    if (lowest[k].entropy >= target - search.tolerance) {
      search.temperature = args.low;
      search.update(lowest[k]);
    }
    run(search, [&](double temperature) {
      return mean_derivatives<scalar>(args.teacher[k], args.rows, args.classes,
                                      work.max + k * args.rows, temperature, work.parts,
                                      parallel_for);
    });
    out_of_bounds |= search.status == kClampedHigh;
    temperatures[k] = move_temperature(current, search.temperature, args.temperature_momentum);
  }
  return out_of_bounds;
}

template <typename scalar>
void loss(const BMTARDLossArgs& args, ParallelFor parallel_for) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  constexpr bool is_half = !std::is_same<scalar, real>::value;
  const Workspace<scalar> work(args);
  const BalanceState& state = args.state;
  const int32_t teachers = args.teachers;
  const int64_t rows = args.rows, classes = args.classes;

  double temperatures[kMaxTeachers];
  for (int32_t k = 0; k < teachers; ++k) temperatures[k] = state.temperatures[k];
  bool out_of_bounds = false;
  if (args.update && args.mode == BalanceMode::kBisect) {
    out_of_bounds = solve_temperatures<scalar>(args, work, parallel_for, temperatures);
  }

  const real student_scale = static_cast<real>(1.0 / args.student_temperature);
  const real gradient_scale = static_cast<real>(args.scale / args.student_temperature);
  // q - p of the row goes where its gradient will be, or beside it where that is a half type.
  const auto difference_of = [&](int32_t k, int64_t r) {
    real* base =
        is_half ? work.difference + k * rows * classes : static_cast<real*>(args.grad_student[k]);
    return base + r * classes;
  };
  // The published entropies, of mode "sign", have eps inside the logarithm too.
  const bool published = args.mode == BalanceMode::kSign;
  const auto rows_of_teacher = [&](int32_t k, int64_t begin, int64_t end) {
    const real scale = static_cast<real>(inverse_temperature(temperatures[k]));
    const RowScratch<real> scratch(classes);
    const int64_t padded = (classes + V::size - 1) / V::size * V::size;
    for (int64_t r = begin; r < end; ++r) {
      const auto found =
          teacher_kl<scalar>(args.student[k], args.teacher[k], r, classes, student_scale, scale,
                             static_cast<real>(args.eps), false, scratch.data());
      work.kl[k * rows + r] = found.kl;
      work.entropy[k * rows + r] = published ? found.entropy_eps : found.entropy;
      if (!args.grad_student[k]) continue;
      const V q_scale = found.student_norm * gradient_scale;
      const V p_scale = found.teacher_norm * gradient_scale;
      for (int64_t j = 0; j < classes; j += V::size) {
        store_at(difference_of(k, r), j, classes,
                 load(scratch.data() + j) * q_scale - load(scratch.data() + padded + j) * p_scale);
      }
    }
  };
  const auto columns_of_teacher = [&](int32_t k, int64_t begin, int64_t end) {
    const real scale = static_cast<real>(inverse_temperature(temperatures[k]));
    real student[kMaxColumns * V::size], teacher[kMaxColumns * V::size];
    for_groups<real>(begin, end, [&](int64_t r, int n) {
      load_columns<scalar>(args.student[k], r, n, classes, student);
      load_columns<scalar>(args.teacher[k], r, n, classes, teacher);
      const auto found =
          teacher_kl_columns<real>(student, teacher, classes, student_scale, scale,
                                   static_cast<real>(args.eps), args.eps != 0, false);
      const V entropy = published ? found.entropy_eps : found.entropy;
      for (int i = 0; i < n; ++i) {
        work.kl[k * rows + r + i] = found.kl.v[i];
        work.entropy[k * rows + r + i] = entropy.v[i];
      }
      if (!args.grad_student[k]) return;
      const V q_scale = found.student_norm * V(gradient_scale);
      const V p_scale = found.teacher_norm * V(gradient_scale);
      for (int64_t j = 0; j < classes * V::size; j += V::size) {
        store(student + j, load(student + j) * q_scale - load(teacher + j) * p_scale);
      }
      store_columns(difference_of(k, r), n, classes, student);
    });
  };
  for_rows(parallel_for, teachers * rows, 4 * classes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {  // one piece for each teacher
      const int32_t k = static_cast<int32_t>(i / rows);
      const int64_t stop = end < (k + 1) * rows ? end : (k + 1) * rows;
      if (classes <= kMaxColumns) {
        columns_of_teacher(k, i - k * rows, stop - k * rows);
      } else {
        rows_of_teacher(k, i - k * rows, stop - k * rows);
      }
      i = stop;
    }
  });

  // In row order, whatever the number of threads.
  double losses[kMaxTeachers], entropies[kMaxTeachers], weights[kMaxTeachers];
  bool finite = true;
  for (int32_t k = 0; k < teachers; ++k) {
    losses[k] = entropies[k] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      losses[k] += work.kl[k * rows + r];
      entropies[k] += work.entropy[k * rows + r];
    }
    losses[k] *= args.scale;
    entropies[k] /= static_cast<double>(rows);
    finite &= is_finite(losses[k]) && is_finite(entropies[k]);
    weights[k] = state.weights[k];
  }
  if (args.update && finite) {
    const bool first = *state.step == 0;
    for (int32_t k = 0; k < teachers; ++k) {
      if (first) state.initial_losses[k] = losses[k];
    }
    balance_weights(teachers, losses, state.initial_losses, *state.weight_lr, args.loss_exponent,
                    weights);
    if (args.mode == BalanceMode::kSign) {
      sign_step(teachers, entropies, *state.temperature_lr, args.low, args.high, temperatures);
    }
    for (int32_t k = 0; k < teachers; ++k) {
      state.temperatures[k] = temperatures[k];
      state.weights[k] = weights[k];
      state.entropies[k] = entropies[k];
      state.losses[k] = losses[k];
    }
    *state.step += 1;
    *state.status = out_of_bounds ? kTargetOutOfBounds : kUpdated;
  } else if (args.update) {
    *state.status = kSkippedNonFinite;
  }

  double total = 0;
  for (int32_t k = 0; k < teachers; ++k) total += weights[k] * losses[k];
  *static_cast<real*>(args.loss) = static_cast<real>(total);

  for (int32_t k = 0; k < teachers; ++k) {
    if (!args.grad_student[k]) continue;
    const V weight = static_cast<real>(weights[k]);
    // Rows lie one after the other here, so a thread's part is one long row.
    for_rows(parallel_for, rows, classes, [&](int64_t begin, int64_t end) {
      scalar* out = static_cast<scalar*>(args.grad_student[k]) + begin * classes;
      const int64_t count = (end - begin) * classes;
      for_row(difference_of(k, begin), count, real(0),
              [&](V d, int64_t j) { store_at(out, j, count, d * weight); });
    });
  }
}

}  // namespace

void bmtard_loss(const BMTARDLossArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype,
            [&](auto type) { loss<typename decltype(type)::type>(args, parallel_for); });
}

BMTARD_NAMESPACE_END
