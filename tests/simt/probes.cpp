// Small kernels that do one thing wrong each, to show that the machine sees it.
#include "probes.h"

#include <atomic>
#include <climits>
#include <map>
#include <thread>

#include "simt.cuh"

namespace bmtard {
namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 4;  // of the probes that have several
constexpr int kPart = kThreads / kBlocks;

// A value passes from each thread to its neighbour.
BMTARD_KERNEL(kThreads) pass_on(int* out, bool barrier) {
  BMTARD_SHARED(int, values, kThreads);
  const int thread = simt::thread_id();
  values.set(thread, thread);
  if (barrier) simt::block_barrier();
  out[thread] = values.get((thread + 1) % kThreads);
}

BMTARD_KERNEL(kThreads) never_written(int* out) {
  BMTARD_SHARED(int, values, kThreads);
  out[simt::thread_id()] = values.get(simt::thread_id());
}

BMTARD_KERNEL(kThreads) past_the_end(int*) {
  BMTARD_SHARED(int, values, kThreads);
  values.set(simt::thread_id() + 1, 0);
}

BMTARD_KERNEL(kThreads) leave_before_the_barrier(int*) {
  if (simt::thread_id() == 5) return;
  simt::block_barrier();
}

BMTARD_KERNEL(kThreads) two_barriers(int*) {
  if (simt::thread_id() < 32) {
    simt::block_barrier();
  } else {
    simt::block_barrier();
  }
}

BMTARD_KERNEL(kThreads) barrier_and_shuffle(int* out) {
  const int thread = simt::thread_id();
  if (thread == 3 || thread >= simt::kWarp) simt::block_barrier();
  out[thread] = simt::shuffle_xor(simt::kFullWarp, 1, 1);
}

BMTARD_KERNEL(kThreads) not_in_the_mask(int* out) {
  out[simt::thread_id()] = simt::shuffle_xor(0x0000ffffu, 1, 1);
}

BMTARD_KERNEL(kThreads) source_not_in_the_mask(int* out) {
  const uint32_t half = simt::thread_id() % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[simt::thread_id()] = simt::shuffle_xor(half, 1, 16);
}

BMTARD_KERNEL(kThreads) lane_has_left(int* out) {
  if (simt::thread_id() == 7) return;
  out[simt::thread_id()] = simt::shuffle_xor(simt::kFullWarp, 1, 1);
}

BMTARD_KERNEL(kThreads) misaligned(int* out) { simt::store_pack<2>(out + 1, Pack<int, 2>{{1, 2}}); }

// Groups of eight lanes that loop for different times beside each other: allowed.
BMTARD_KERNEL(kThreads) uneven_groups(int* out) {
  const int thread = simt::thread_id(), group = thread % 32 / 8;
  int sum = 1;
  for (int i = 0; i <= group; ++i) {
    for (int distance = 4; distance > 0; distance /= 2) {
      sum += simt::shuffle_xor(0xffu << (8 * group), sum, distance);
    }
  }
  out[thread] = sum + simt::shuffle_xor(simt::kFullWarp, sum, 16);
}

// What only sanitizers see: an index that overflows on its way to a good one, and a value
// past the end that makes no difference.
BMTARD_KERNEL(kThreads) overflowing_index(int* out) {
  const int thread = simt::thread_id();
  const int far = (thread + 1) * (INT_MAX / 2);
  out[thread] = far == 0;
}

BMTARD_KERNEL(kThreads) read_past_the_end(int* out) {
  const int thread = simt::thread_id();
  out[thread] = simt::load(out + thread + 1) == INT_MIN;
}

// As pass_on, from each block to the next of its cluster or grid.
BMTARD_KERNEL(kThreads) pass_to_the_next_block(int* out, bool barrier, bool stay) {
  BMTARD_SHARED(int, value, 1);
  const int thread = simt::thread_id(), rank = simt::cluster_rank();
  if (thread == 0) value.set(0, rank);
  if (barrier) {
    simt::cluster_barrier();
  } else {
    simt::block_barrier();
  }
  out[rank * kPart + thread % kPart] = value.get_from((rank + 1) % simt::cluster_blocks(), 0);
  if (stay) simt::cluster_barrier();
}

BMTARD_KERNEL(kThreads) overwrite_what_others_read(int* out) {
  BMTARD_SHARED(int, value, 1);
  const int rank = simt::cluster_rank();
  if (simt::thread_id() == 0) value.set(0, rank);
  simt::cluster_barrier();
  out[rank * kPart] = value.get_from((rank + 1) % simt::cluster_blocks(), 0);
  simt::block_barrier();
  if (simt::thread_id() == 0) value.set(0, -1);
  simt::cluster_barrier();
}

BMTARD_KERNEL(kThreads) outside_the_cluster(int* out) {
  BMTARD_SHARED(int, value, 1);
  value.set(0, simt::thread_id() == 0);
  out[0] = value.get_from(simt::cluster_blocks(), 0);
}

BMTARD_KERNEL(kThreads) some_blocks_wait(int*) {
  if (simt::cluster_rank() > 0) simt::cluster_barrier();
}

BMTARD_KERNEL(kThreads) different_cluster_barriers(int*) {
  if (simt::cluster_rank() > 0) {
    simt::cluster_barrier();
  } else {
    simt::cluster_barrier();
  }
}

BMTARD_KERNEL(kThreads) grid_waits(int* out) {
  if (simt::block_id() == 0 && simt::thread_id() == 0) simt::store(out + kThreads - 1, 7);
  simt::grid_barrier();
  const int seen = simt::load(out + kThreads - 1);
  simt::grid_barrier();
  if (simt::thread_id() < kPart) {
    simt::store(out + simt::block_id() * kPart + simt::thread_id(), seen);
  }
}

// As pass_on, through global memory: with a barrier after the write, and after the read.
template <int barriers>
BMTARD_KERNEL(kThreads)
pass_on_globally(int* out) {
  const int thread = simt::thread_id();
  simt::store(out + thread, thread);
  if (barriers > 0) simt::block_barrier();
  const int value = simt::load(out + (thread + 1) % kThreads);
  if (barriers > 1) simt::block_barrier();
  simt::store(out + thread, value);
}

void barrier_of_the_block() { simt::block_barrier(); }
void barrier_of_the_cluster() { simt::cluster_barrier(); }
void barrier_of_the_grid() { simt::grid_barrier(); }

// From each block of the grid to the next.
template <void (*barrier)()>
BMTARD_KERNEL(kThreads)
pass_on_between_blocks(int* out) {
  const int block = simt::block_id(), thread = simt::thread_id();
  if (thread == 0) simt::store(out + block * kPart, block);
  barrier();
  const int value = simt::load(out + (block + 1) % kBlocks * kPart);
  barrier();
  if (thread < kPart) simt::store(out + block * kPart + thread, value);
}

BMTARD_KERNEL(kThreads) every_thread_writes(int* out) { simt::store(out, 1); }

BMTARD_KERNEL(kThreads) every_block_writes(int* out) {
  if (simt::thread_id() == 0) simt::store(out, 1);
}

BMTARD_KERNEL(kThreads) halves_of_a_pack(int* out) {
  if (simt::thread_id() == 0) simt::store_pack<2>(out, Pack<int, 2>{{1, 2}});
  if (simt::thread_id() == 1) simt::store(out + 1, 3);
}

// Many readers are no race; a writer among them is.
BMTARD_KERNEL(kThreads) write_what_all_read(int* out) {
  const int value = simt::load(out);
  if (simt::block_id() == 2 && simt::thread_id() == 7) simt::store(out, value + 1);
}

void pass_on_in_cluster(int* out) { pass_to_the_next_block(out, true, true); }
void no_cluster_barrier(int* out) { pass_to_the_next_block(out, false, true); }
void leave_while_others_read(int* out) { pass_to_the_next_block(out, true, false); }

// How often threads that ask at once for five answers have each computed; then how often one is
// that comes at the third attempt, and whether it is right.
std::vector<int> kept_answers() {
  simt::Kept<int, int> kept;
  std::atomic<int> computed[5] = {};
  std::atomic<bool> right{true};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 8; ++thread) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5000; ++i) {
        const int answer = kept.get(i % 5, [&](int& out) {
          ++computed[i % 5];
          out = 10 * (i % 5);
          return true;
        });
        if (answer != 10 * (i % 5)) right = false;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::vector<int> out(computed, computed + 5);
  int attempts = 0, last = 0;
  for (int i = 0; i < 9; ++i) {
    last = kept.get(7, [&](int& answer) {
      answer = ++attempts;
      return attempts == 3;
    });
  }
  out.push_back(attempts);
  out.push_back(right && last == 3);
  return out;
}

}  // namespace

std::vector<int> run_probe(const std::string& name) {
  if (name == "kept_answers") return kept_answers();
  alignas(16) static int out[kThreads];
  for (int& value : out) value = -1;
  const simt::Grid grid = {1, kThreads};
  const simt::Grid cluster = {kBlocks, kThreads, 0, kBlocks};
  const simt::Grid cooperative = {kBlocks, kThreads, 0, 1, true};
  const std::map<std::string, void (*)(int*)> probes = {
      {"never_written", never_written},
      {"past_the_end", past_the_end},
      {"leave_before_the_barrier", leave_before_the_barrier},
      {"two_barriers", two_barriers},
      {"barrier_and_shuffle", barrier_and_shuffle},
      {"not_in_the_mask", not_in_the_mask},
      {"source_not_in_the_mask", source_not_in_the_mask},
      {"lane_has_left", lane_has_left},
      {"misaligned", misaligned},
      {"overflowing_index", overflowing_index},
      {"read_past_the_end", read_past_the_end},
      {"uneven_groups", uneven_groups}};
  const std::map<std::string, void (*)(int*)> cluster_probes = {
      {"pass_on_in_cluster", pass_on_in_cluster},
      {"no_cluster_barrier", no_cluster_barrier},
      {"leave_while_others_read", leave_while_others_read},
      {"overwrite_what_others_read", overwrite_what_others_read},
      {"outside_the_cluster", outside_the_cluster},
      {"some_blocks_wait", some_blocks_wait},
      {"different_cluster_barriers", different_cluster_barriers},
      {"grid_barrier_in_a_cluster", grid_waits}};
  // Grids for the probes of global memory.
  const simt::Grid blocks = {kBlocks, kThreads};
  const simt::Grid pairs = {kBlocks, kThreads, 0, 2};
  const auto by_block = pass_on_between_blocks<barrier_of_the_block>;
  const auto by_cluster = pass_on_between_blocks<barrier_of_the_cluster>;
  const auto by_grid = pass_on_between_blocks<barrier_of_the_grid>;
  const std::map<std::string, std::pair<simt::Grid, void (*)(int*)>> global_probes = {
      {"global_with_barriers", {grid, pass_on_globally<2>}},
      {"global_read_too_early", {grid, pass_on_globally<0>}},
      {"global_write_too_early", {grid, pass_on_globally<1>}},
      {"global_in_cluster", {cluster, by_cluster}},
      {"global_in_grid", {cooperative, by_grid}},
      {"global_block_barrier", {blocks, by_block}},
      {"global_block_barrier_in_cluster", {cluster, by_block}},
      {"global_block_barrier_in_grid", {cooperative, by_block}},
      {"global_across_clusters", {pairs, by_cluster}},
      {"every_thread_writes", {grid, every_thread_writes}},
      {"every_block_writes", {blocks, every_block_writes}},
      {"every_block_of_a_cluster_writes", {cluster, every_block_writes}},
      {"halves_of_a_pack", {grid, halves_of_a_pack}},
      {"write_what_all_read", {blocks, write_what_all_read}},
      {"write_what_a_cluster_reads", {cluster, write_what_all_read}}};
  if (global_probes.count(name)) {
    const auto& [on, kernel] = global_probes.at(name);
    simt::launch(kernel, on, nullptr, out);
  } else if (name == "grid_barrier") {
    simt::launch(grid_waits, cooperative, nullptr, out);
  } else if (cluster_probes.count(name)) {
    simt::launch(cluster_probes.at(name), cluster, nullptr, out);
  } else if (name == "with_barrier" || name == "without_barrier") {
    simt::launch(pass_on, grid, nullptr, out, name == "with_barrier");
  } else {
    simt::launch(probes.at(name), grid, nullptr, out);
  }
  return {out, out + kThreads};
}

}  // namespace bmtard
