// One step of the balanced multi-teacher loss: temperatures, losses, weights, gradients and
// state, all in one launch. Rounds over the batch, see batch.cuh.
#include "../core/balance.h"
#include "../core/temperature_search.h"
#include "batch.cuh"
#include "kl_row.cuh"

namespace bmtard {
namespace cuda {
namespace {

// What a pass over the batch is for.
enum Phase : int32_t {
  kTarget,  // the entropies at the lower bound
  kSearch,  // the entropies where the searches ask for them
  kLoss,    // KL and entropy at the temperatures of this step
  kGradient,
};

// The balance's state of a teacher.
struct Teacher {
  double current;      // temperature before this step
  double temperature;  // of the next pass
  TemperatureSearch<double> search;
};

template <typename R>
struct Workspace {
  double* slots;  // of the Team
  R* statistics;  // [4][K][N]: maximum and log-sum of the student, of the teacher
};

template <typename R>
BMTARD_DEVICE Workspace<R> workspace_of(const BMTARDLossArgs& args) {
  auto* const slots = static_cast<double*>(args.workspace);
  return {slots, reinterpret_cast<R*>(slots + 2 * kMaxSlots * args.teachers * kSums)};
}

BMTARD_DEVICE bool bisects(const BMTARDLossArgs& args) {
  return args.update && args.mode == BalanceMode::kBisect;
}

// The teachers' matrices have the numbers 0 to K - 1, because every round reads them. The students'
// matrices follow.
template <typename Shape>
BMTARD_DEVICE auto teacher_row(const BMTARDLossArgs& args, const Share<Shape>& share,
                               const Window& window, int k, int64_t n, bool first_look) {
  return share.row(args.teacher[k], window, k, n, first_look);
}
template <typename Shape>
BMTARD_DEVICE auto student_row(const BMTARDLossArgs& args, const Share<Shape>& share,
                               const Window& window, int k, int64_t n, bool first_look) {
  return share.row(args.student[k], window, args.teachers + k, n, first_look);
}

// Adds up a teacher's KL and entropy over this block's rows, and writes their statistics.
template <typename Shape, typename R>
BMTARD_DEVICE void loss_pass(const BMTARDLossArgs& args, int k, double temperature, R* statistics,
                             const Share<Shape>& share, Group<Shape>& group,
                             double (&sums)[kSums]) {
  const R eps = static_cast<R>(args.eps);
  const R entropy_eps = args.mode == BalanceMode::kSign ? eps : R(0);
  const R student_inverse = static_cast<R>(1 / args.student_temperature);
  const R inverse = static_cast<R>(inverse_temperature(temperature));
  const int64_t plane = args.teachers * args.rows;
  BMTARD_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  share.for_each([&](int64_t n) {
    const Window window = share.window(args.student[k], n);
    const auto student = student_row(args, share, window, k, n, true);
    const auto teacher = teacher_row(args, share, window, k, n, !bisects(args));
    const auto found =
        kl_row<Shape>(student, teacher, window, student_inverse, inverse, eps, entropy_eps, group);
    sums[0] += found.kl;
    sums[1] += found.entropy;
    if (group.lane == 0) {
      R* const to = statistics + k * args.rows + n;
      simt::store(to, found.q.max);
      simt::store(to + plane, found.q.log_sum);
      simt::store(to + 2 * plane, found.p.max);
      simt::store(to + 3 * plane, found.p.log_sum);
    }
  });
}

// d loss / d student k, of this block's rows.
template <typename Shape, typename R>
BMTARD_DEVICE void gradient_pass(const BMTARDLossArgs& args, int k, double temperature,
                                 double weight, const R* statistics, const Share<Shape>& share) {
  using T = typename Shape::Type;
  using std::exp;
  if (!args.grad_student[k]) return;
  const R inverse = static_cast<R>(inverse_temperature(temperature));
  const R student_inverse = static_cast<R>(1 / args.student_temperature);
  const R coefficient = static_cast<R>(weight * args.gradient_scale / args.student_temperature);
  const int64_t plane = args.teachers * args.rows;
  share.for_each([&](int64_t n) {
    const R* const from = statistics + k * args.rows + n;
    const LogSoftmax<R> q{student_inverse, simt::load(from), simt::load(from + plane)};
    const LogSoftmax<R> p{inverse, simt::load(from + 2 * plane), simt::load(from + 3 * plane)};
    const Window window = share.window(args.student[k], n);
    const auto student = student_row(args, share, window, k, n, false);
    const auto teacher = teacher_row(args, share, window, k, n, false);
    T* const to = static_cast<T*>(args.grad_student[k]) + n * args.classes;
    for_each_values<Shape>(window, {&student, &teacher}, [&](int tile, const auto& tiles) {
      const auto& [s, t] = tiles;
      Tile<Shape> gradient;
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) {
        gradient.value[i] = coefficient * (exp(q(s.value[i])) - exp(p(t.value[i])));
      }
      store_tile<Shape>(to, window, tile, gradient);
    });
  });
}

// Continues the searches with the totals of pass `phase`, kTarget or kSearch. Lane k decides for
// teacher k. Returns the next phase, the same on all lanes of the warp.
template <typename R, int threads>
BMTARD_DEVICE int32_t next_phase(const BMTARDLossArgs& args, int32_t phase, int lane,
                                 Teacher* teacher, const Team<threads>& team) {
  const double rows = static_cast<double>(args.rows);
  EntropyDerivatives<double> found{};
  if (teacher && (phase == kTarget || !teacher->search.done)) {
    found = {team.total(lane, 0) / rows, team.total(lane, 1) / rows, team.total(lane, 2) / rows};
  }
  if (phase == kTarget) {
    // The sign rule comes to rest there: at the highest of the entropies at the lower bound.
    double target = teacher ? found.entropy : -std::numeric_limits<double>::infinity();
    BMTARD_UNROLL
    for (int distance = simt::kWarp / 2; distance > 0; distance /= 2) {
      target = Max{}(target, simt::shuffle_xor(simt::kFullWarp, target, distance));
    }
    if (teacher) {
      TemperatureSearch<double>& search = teacher->search;
      search.target = target;
      search.log_count = team.total(lane, 3) / rows;
      search.tolerance = search_tolerance<R>(args.tolerance, search.log_count);
      search.low = args.low;
      search.high = args.high;
      search.max_iterations = args.max_iterations;
      search.method = SearchMethod::kHalley;
      search.start(found, teacher->current, teacher->current);
    }
  } else if (teacher && !teacher->search.done) {
    teacher->search.update(found);
  }
  bool open = false;
  if (teacher) {
    const TemperatureSearch<double>& search = teacher->search;
    open = !search.done;
    teacher->temperature =
        open ? search.temperature
             : move_temperature(teacher->current, search.temperature, args.temperature_momentum);
  }
  return simt::any(simt::kFullWarp, open) ? kSearch : kLoss;
}

// Shared by the block. The thread that owns a teacher writes here for the others.
struct Board {
  simt::Shared<double> temperature, weight, initial_loss, loss, entropy;  // [kMaxTeachers]
};

// Computes the weights and the loss and writes the state; for one thread.
template <typename R>
BMTARD_DEVICE void settle(const BMTARDLossArgs& args, const Board& board, int64_t step,
                          bool out_of_bounds, bool writes) {
  const int K = args.teachers;
  const double* losses = board.loss.read_all(K);
  const double* entropies = board.entropy.read_all(K);
  const double* initial_losses = step == 0 ? losses : board.initial_loss.read_all(K);
  double* weights = board.weight.own_all(K);
  bool finite = true;
  BMTARD_ROLLED
  for (int k = 0; k < K; ++k) finite = finite && is_finite(losses[k]) && is_finite(entropies[k]);
  if (args.update && finite) {
    balance_weights(K, losses, initial_losses, simt::load(args.state.weight_lr), args.loss_exponent,
                    weights);
  }
  if (!writes) return;
  double loss = 0;
  BMTARD_ROLLED
  for (int k = 0; k < K; ++k) loss += weights[k] * losses[k];
  put<R>(args.loss, 0, static_cast<R>(loss));
  if (!args.update) return;
  const BalanceState& state = args.state;
  if (!finite) {
    simt::store(state.status, static_cast<int32_t>(kSkippedNonFinite));
    return;
  }
  BMTARD_ROLLED
  for (int k = 0; k < K; ++k) {
    simt::store(state.temperatures + k, board.temperature.get(k));
    simt::store(state.weights + k, weights[k]);
    simt::store(state.initial_losses + k, initial_losses[k]);
    simt::store(state.entropies + k, entropies[k]);
    simt::store(state.losses + k, losses[k]);
  }
  if (args.mode == BalanceMode::kSign) {
    sign_step(K, entropies, simt::load(state.temperature_lr), args.low, args.high,
              state.temperatures);
  }
  simt::store(state.step, step + 1);
  simt::store(state.status, static_cast<int32_t>(out_of_bounds ? kTargetOutOfBounds : kUpdated));
}

template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
bmtard_loss_kernel(const BMTARD_GRID_CONSTANT BMTARDLossArgs args, Packing packing,
                   int cached_matrices) {
  using R = Real<typename Shape::Type>;
  BMTARD_SHARED(Teacher, teachers, kMaxTeachers);
  BMTARD_SHARED(double, temperature, kMaxTeachers);
  BMTARD_SHARED(double, weight, kMaxTeachers);
  BMTARD_SHARED(double, initial_loss, kMaxTeachers);
  BMTARD_SHARED(double, loss, kMaxTeachers);
  BMTARD_SHARED(double, entropy, kMaxTeachers);
  BMTARD_SHARED(int32_t, searching, kMaxTeachers);
  BMTARD_SHARED(double, totals, kMaxTeachers* kSums);
  BMTARD_SHARED(double, mine, 2 * kMaxTeachers * kSums);
  BMTARD_SHARED(int32_t, next, 1);
  const Board board = {temperature, weight, initial_loss, loss, entropy};
  const Workspace<R> workspace = workspace_of<R>(args);
  const int thread = simt::thread_id();
  const bool owns = thread < args.teachers;  // teacher `thread`

  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const Share<Shape> share(args.rows, args.classes, packing, cached_matrices, group);
  Team<Shape::kThreads> team(block, {totals, mine, workspace.slots}, args.teachers);
  // Block 0 overwrites the state after the last round, when all have read it.
  const int64_t step = simt::load(args.state.step);
  if (owns) {
    Teacher& teacher = teachers.own(thread);
    teacher.current = simt::load(args.state.temperatures + thread);
    teacher.temperature = bisects(args) ? args.low : teacher.current;
    temperature.set(thread, teacher.temperature);
    weight.set(thread, simt::load(args.state.weights + thread));
    initial_loss.set(thread, simt::load(args.state.initial_losses + thread));
    searching.set(thread, true);
  }
  simt::block_barrier();

  int32_t phase = bisects(args) ? kTarget : kLoss;
  for (;;) {
    const auto wanted = [&](int k) { return phase != kSearch || searching.get(k); };
    double sums[kSums];
    BMTARD_ROLLED
    for (int k = 0; k < args.teachers; ++k) {
      if (!wanted(k)) continue;
      if (phase == kLoss) {
        loss_pass<Shape, R>(args, k, temperature.get(k), workspace.statistics, share, group, sums);
      } else {
        entropy_pass(args.teacher[k], k, phase == kTarget, temperature.get(k), share, group, sums);
      }
      team.give(group, k, sums);
    }
    team.combine(wanted);
    if (phase == kLoss) break;
    if (thread < simt::kWarp) {
      Teacher* teacher = owns ? &teachers.own(thread) : nullptr;
      const int32_t decided = next_phase<R>(args, phase, thread, teacher, team);
      if (owns) {
        temperature.set(thread, teacher->temperature);
        searching.set(thread, !teacher->search.done);
      }
      if (thread == 0) next.set(0, decided);
    }
    simt::block_barrier();
    phase = next.get(0);
  }

  bool stopped = false;
  if (owns) {
    loss.set(thread, args.scale * team.total(thread, 0));
    entropy.set(thread, team.total(thread, 1) / static_cast<double>(args.rows));
    // kClampedLow is a success: the teacher that set the target ends at the lower bound.
    stopped = bisects(args) && teachers.own(thread).search.status == kClampedHigh;
  }
  if (thread < simt::kWarp) stopped = simt::any(simt::kFullWarp, stopped);
  simt::block_barrier();
  if (thread == 0) settle<R>(args, board, step, stopped, simt::block_id() == 0);
  simt::block_barrier();
  BMTARD_ROLLED
  for (int k = 0; k < args.teachers; ++k) {
    gradient_pass<Shape, R>(args, k, temperature.get(k), weight.get(k), workspace.statistics,
                            share);
  }
  team.leave();
}

}  // namespace

int bmtard_loss(const BMTARDLossArgs& args, void* stream) {
  Alignment alignment(args.dtype);
  for (int32_t k = 0; k < args.teachers; ++k) {
    alignment.add(args.student[k]);
    alignment.add(args.teacher[k]);
    alignment.add(args.grad_student[k], args.classes);
  }
  return with_shape<kBatchThreads, false, false>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const auto kernel = bmtard_loss_kernel<Shape>;
    const Packing packing = alignment.packing<Shape>(args.classes);
    const int64_t span = args.classes + packing.slack;
    const BatchPlan plan =
        plan_batch<Shape>(kernel, args.rows, args.classes, span, args.teachers, 2 * args.teachers);
    return launch_batch<Shape>(kernel, plan, stream, args, packing);
  });
}

size_t bmtard_loss_workspace(const BMTARDLossArgs& args) {
  const size_t real = args.dtype == DataType::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(slot_values(args.teachers)) * sizeof(double) +
         static_cast<size_t>(4 * args.teachers * args.rows) * real;
}

}  // namespace cuda
}  // namespace bmtard
