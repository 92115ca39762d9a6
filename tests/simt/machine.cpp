// The machine behind simt_host.h: fibers, their schedule, and what it checks.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <unordered_map>

#include "simt.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace bmtard {
namespace simt {
namespace host {

Settings settings;
Counters counters;
Position position;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kMaxPayload = 16;
constexpr size_t kMaxStaticShared = 48 * 1024;
constexpr const char kDynamicKey = 0;

enum class State { kIdle, kReady, kAtCollective, kAtBarrier, kExited };

// What goes on elsewhere, and where its stack is.
struct Context {
  jmp_buf registers;
  const void* stack = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Fiber {
  Context context;
  State state = State::kIdle;
  // What it waits at.
  const char* file = "";
  int line = 0;
  // The collective it takes part in.
  uint32_t mask = 0;
  int source = 0;
  Operation operation = Operation::kExchange;
  size_t bytes = 0;
  unsigned char in[kMaxPayload];
  unsigned char out[kMaxPayload];
};

using SharedArrays = std::map<std::pair<const void*, size_t>, std::unique_ptr<SharedArray>>;

// A block that runs.
struct Block {
  int at_barrier = 0;
  const Fiber* last_to_wait = nullptr;
  int exited = 0;
  std::vector<uint32_t> exited_lanes;                           // by warp
  std::vector<std::vector<std::pair<uint32_t, int>>> arrivals;  // by warp: mask, lanes there
  uint32_t epoch = 1;
  SharedArrays shared;
};

struct Machine {
  Context scheduler;
  ucontext_t starter;
  std::vector<std::unique_ptr<Fiber>> fibers;
  // The blocks that run side by side: one, a cluster, or a cooperative grid.
  std::vector<Block> blocks;
  int first_block = 0;
  int threads = 0;  // of each
  int at_common_barrier = 0;
  const Fiber* last_to_wait = nullptr;
  int exited = 0;
  uint32_t round = 1;  // counts the common barriers
  uint32_t launch = 0;
  bool cooperative = false;
  size_t dynamic_bytes = 0;
  const std::function<void()>* body = nullptr;
  std::exception_ptr fault;
};

Machine machine;

int block_slot() { return position.block - machine.first_block; }
Block& my_block() { return machine.blocks[block_slot()]; }
Fiber& fiber_of(int thread) { return *machine.fibers[block_slot() * machine.threads + thread]; }
Fiber& self() { return fiber_of(position.thread); }

std::string place(int thread) {
  return "block " + std::to_string(position.block) + " thread " + std::to_string(thread) +
         " (warp " + std::to_string(thread / kWarp) + " lane " + std::to_string(thread % kWarp) +
         ")";
}

const char* base_name(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

[[noreturn]] void fail(const std::string& message, const char* file, int line) {
  throw Fault(std::string(base_name(file)) + ":" + std::to_string(line) + ": " +
              place(position.thread) + ": " + message);
}

// AddressSanitizer wants to know of each switch, before it and after.
void leave([[maybe_unused]] Context& from, [[maybe_unused]] const Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
#endif
}

void arrive([[maybe_unused]] const Context& here, [[maybe_unused]] Context* from = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(here.fake_stack, from ? &from->stack : nullptr,
                                  from ? &from->bytes : nullptr);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer's own costs a system call each time.
const auto switch_to =
    reinterpret_cast<void (*)(jmp_buf, int)>(dlsym(dlopen("libc.so.6", RTLD_NOW), "_longjmp"));
#else
constexpr auto switch_to = _longjmp;
#endif

__attribute__((noinline)) void jump(Context& from, Context& to) {
  leave(from, to);
  if (_setjmp(from.registers) == 0) switch_to(to.registers, 1);
  arrive(from);
}

void to_scheduler() { jump(self().context, machine.scheduler); }

// Nobody may wait for a thread that leaves.
void check_exit() {
  if (my_block().at_barrier + machine.at_common_barrier > 0) {
    throw Fault(place(position.thread) + " leaves while others wait at a barrier");
  }
  const int lane = position.thread % kWarp;
  const int first = position.thread - lane;
  for (int i = first; i < std::min(first + kWarp, machine.threads); ++i) {
    const Fiber& other = fiber_of(i);
    if (other.state == State::kAtCollective && other.mask >> lane & 1) {
      throw Fault(place(position.thread) + " leaves while lane " + std::to_string(i - first) +
                  " waits for it in line " + std::to_string(other.line));
    }
  }
  my_block().exited_lanes[position.thread / kWarp] |= 1u << lane;
}

// A fiber lives through many threads: it runs one to its end and waits for the next.
void fiber_main(unsigned index) {
  Fiber& fiber = *machine.fibers[index];
  arrive(fiber.context, &machine.scheduler);
  leave(fiber.context, machine.scheduler);
  if (_setjmp(fiber.context.registers) == 0) setcontext(&machine.starter);
  arrive(fiber.context);
  for (;;) {
    try {
      (*machine.body)();
      check_exit();
    } catch (...) {
      machine.fault = std::current_exception();
    }
    fiber.state = State::kExited;
    ++my_block().exited;
    ++machine.exited;
    to_scheduler();
  }
}

void add_fiber() {
  auto fiber = std::make_unique<Fiber>();
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kGuardBytes, PROT_NONE) != 0) {
    throw Fault("no memory for the stack of a thread");
  }
  fiber->context.stack = stack;
  fiber->context.bytes = kStackBytes;
  const Context& fresh = fiber->context;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  const auto index = static_cast<unsigned>(machine.fibers.size());
  makecontext(&context, reinterpret_cast<void (*)()>(fiber_main), 1, index);
  machine.fibers.push_back(std::move(fiber));
  leave(machine.scheduler, fresh);
  swapcontext(&machine.starter, &context);
  arrive(machine.scheduler);
}

// Threads that a fault left in the middle of a kernel cannot be used again.
void drop_fibers() {
  for (const auto& fiber : machine.fibers) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber->context.stack, kStackBytes);
#endif
    munmap(const_cast<void*>(fiber->context.stack), kStackBytes);
  }
  machine.fibers.clear();
}

[[noreturn]] void deadlock() {
  std::map<std::string, int> waiting;
  for (size_t i = 0; i < machine.blocks.size() * machine.threads; ++i) {
    const Fiber& fiber = *machine.fibers[i];
    const std::string where = std::string(base_name(fiber.file)) + ":" + std::to_string(fiber.line);
    ++waiting[fiber.state == State::kExited      ? "have left"
              : fiber.state == State::kAtBarrier ? "wait at the barrier " + where
                                                 : "wait for other lanes at " + where];
  }
  std::string message = "deadlock in block " + std::to_string(machine.first_block);
  if (machine.blocks.size() > 1) {
    message += " and the " + std::to_string(machine.blocks.size() - 1) + " beside it";
  }
  message += ":";
  for (const auto& [what, count] : waiting) {
    message += " " + std::to_string(count) + " threads " + what + ";";
  }
  message.pop_back();
  throw Fault(message);
}

// Runs the blocks from first_block on, side by side.
void run_blocks(std::mt19937_64& random) {
  const int threads = machine.threads;
  const int total = threads * static_cast<int>(machine.blocks.size());
  const int warps = (threads + kWarp - 1) / kWarp;
  while (static_cast<int>(machine.fibers.size()) < total) add_fiber();
  machine.at_common_barrier = machine.exited = 0;
  machine.round = 1;
  for (Block& block : machine.blocks) {
    block.at_barrier = block.exited = 0;
    block.epoch = 1;
    block.exited_lanes.assign(warps, 0);
    block.arrivals.assign(warps, {});
    for (auto& [key, array] : block.shared) array->clear();
  }
  std::vector<int> order(total);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < total; ++i) machine.fibers[i]->state = State::kReady;
  const size_t blocks = machine.blocks.size();
  int ahead = -1;
  bool moved = false;
  while (machine.exited < total) {
    if (settings.seed != 0) std::shuffle(order.begin(), order.end(), random);
    // Most of the time one block runs ahead of the others for as long as it can: in turns alone
    // they would all get everything done before the first leaves.
    if (ahead < 0 || !moved) {
      const bool hurries = settings.seed != 0 && blocks > 1 && random() % 4 != 0;
      ahead = hurries ? static_cast<int>(random() % blocks) : -1;
    }
    moved = false;
    for (const int i : order) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.state != State::kReady || (ahead >= 0 && i / threads != ahead)) continue;
      moved = true;
      position.thread = i % threads;
      position.block = machine.first_block + i / threads;
      jump(machine.scheduler, fiber.context);
      if (machine.fault) std::rethrow_exception(std::exchange(machine.fault, nullptr));
    }
    if (!moved && ahead < 0) deadlock();
  }
}

// Whether two lanes that name each other have come to the same collective.
bool together(const Fiber& a, const Fiber& b) {
  return a.mask == b.mask && a.operation == b.operation && a.bytes == b.bytes && a.line == b.line &&
         (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Waits for the other lanes of the mask; the last one to come serves them all.
void collective(uint32_t mask, Operation operation, int source, const void* in, void* out,
                size_t bytes, const char* file, int line) {
  const int lane = position.thread % kWarp;
  const int first = position.thread - lane;
  if (!(mask >> lane & 1)) fail("a lane calls a collective whose mask leaves it out", file, line);
  if (operation == Operation::kExchange && !(mask >> source & 1)) {
    fail("a lane reads from lane " + std::to_string(source) + ", which the mask leaves out", file,
         line);
  }
  if (mask & my_block().exited_lanes[position.thread / kWarp]) {
    fail("the mask names a lane that has left", file, line);
  }
  if (machine.threads - first < kWarp && mask >> (machine.threads - first) != 0) {
    fail("the mask names a lane past the block", file, line);
  }
  Fiber& fiber = self();
  fiber.file = file;
  fiber.line = line;
  fiber.mask = mask;
  fiber.source = source;
  fiber.operation = operation;
  fiber.bytes = bytes;
  std::memcpy(fiber.in, in, bytes);
  fiber.state = State::kAtCollective;

  const Fiber& leader = fiber_of(first + __builtin_ctz(mask));
  if (leader.state == State::kAtCollective && leader.mask >> lane & 1 && !together(leader, fiber)) {
    fail("a lane of the mask is at another collective, line " + std::to_string(leader.line), file,
         line);
  }
  auto& arrivals = my_block().arrivals[position.thread / kWarp];
  const auto same_mask = [&](const auto& entry) { return entry.first == mask; };
  auto here = std::find_if(arrivals.begin(), arrivals.end(), same_mask);
  if (here == arrivals.end()) here = arrivals.insert(here, {mask, 0});
  if (++here->second == __builtin_popcount(mask)) {
    here->second = 0;
    bool any = false;
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      const Fiber& other = fiber_of(first + i);
      if (other.state != State::kAtCollective || !together(other, fiber)) {
        fail("lane " + std::to_string(i) + " of the mask is elsewhere", file, line);
      }
      any = any || other.in[0] != 0;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      Fiber& other = fiber_of(first + i);
      if (operation == Operation::kAny) {
        other.out[0] = any;
      } else {
        std::memcpy(other.out, fiber_of(first + other.source).in, bytes);
      }
      other.state = State::kReady;
    }
  }
  // Also the last one gives the others their turn.
  to_scheduler();
  std::memcpy(out, fiber.out, bytes);
}

}  // namespace

SharedArray::SharedArray(size_t element_bytes, int count, int line)
    : element_bytes_(element_bytes),
      line_(line),
      access_(count),
      storage_(element_bytes * count + 16) {
  data_ = storage_.data() + (16 - reinterpret_cast<uintptr_t>(storage_.data()) % 16) % 16;
  clear();
}

void SharedArray::clear() {
  std::fill(access_.begin(), access_.end(), Access{});
  std::memset(data_, 0xff, element_bytes_ * access_.size());  // NaN in every type
}

void SharedArray::race(int i, const char* what, const std::string& other) const {
  throw Fault("race: " + place(position.thread) + " " + what + " element " + std::to_string(i) +
              " of the shared array declared in line " + std::to_string(line_) + ", " + other +
              " without a barrier between");
}

void SharedArray::check_range(int i, int n) const {
  if (i >= 0 && n >= 0 && i + n <= static_cast<int>(access_.size())) return;
  throw Fault(place(position.thread) + " touches elements " + std::to_string(i) + " to " +
              std::to_string(i + n - 1) + " of a shared array of " +
              std::to_string(access_.size()) + " declared in line " + std::to_string(line_));
}

void* SharedArray::at(int i, int n, bool write) {
  const int thread = position.thread;
  const uint32_t epoch = my_block().epoch;
  const auto by = [](int other) {
    return other < 0 ? std::string("several threads") : "thread " + std::to_string(other);
  };
  check_range(i, n);
  counters.shared_bytes += static_cast<int64_t>(element_bytes_) * n;
  for (int j = i; j < i + n; ++j) {
    Access& access = access_[j];
    const bool written_now = access.written == epoch && access.writer != thread;
    if (write) {
      if (written_now) race(j, "writes", by(access.writer));
      if (access.read == epoch && access.reader != thread) {
        race(j, "writes what was read,", by(access.reader));
      }
      if (access.round_read_remotely == machine.round) {
        race(j, "writes what was read,", "another block");
      }
      access.written = epoch;
      access.writer = thread;
      access.round_written = machine.round;
    } else {
      if (access.written == 0) {
        throw Fault(place(thread) + " reads element " + std::to_string(j) +
                    " of the shared array declared in line " + std::to_string(line_) +
                    " before it is written");
      }
      if (written_now) race(j, "reads", by(access.writer));
      access.reader = access.read == epoch && access.reader != thread ? -1 : thread;
      access.read = epoch;
    }
  }
  return data_ + element_bytes_ * i;
}

const void* SharedArray::remote(int i) {
  check_range(i, 1);
  ++counters.remote_accesses;
  Access& access = access_[i];
  if (access.written == 0) {
    throw Fault(place(position.thread) + " reads element " + std::to_string(i) +
                " of another block's shared array declared in line " + std::to_string(line_) +
                " before it is written");
  }
  if (access.round_written == machine.round) race(i, "reads", "another block");
  access.round_read_remotely = machine.round;
  return data_ + element_bytes_ * i;
}

SharedArray* shared_array(const void* key, size_t element_bytes, int count, int line) {
  auto& array = my_block().shared[{key, element_bytes}];
  if (!array) array = std::make_unique<SharedArray>(element_bytes, count, line);
  return array.get();
}

SharedArray* dynamic_shared_array(size_t element_bytes) {
  auto& array = my_block().shared[{&kDynamicKey, element_bytes}];
  const size_t count = machine.dynamic_bytes / element_bytes;
  if (!array || array->bytes() != count * element_bytes) {
    array = std::make_unique<SharedArray>(element_bytes, static_cast<int>(count), 0);
  }
  return array.get();
}

SharedArray* array_of_rank(const SharedArray* mine, int rank) {
  if (rank < 0 || rank >= position.cluster_blocks) {
    throw Fault(place(position.thread) + " reads from block " + std::to_string(rank) +
                " of a cluster of " + std::to_string(position.cluster_blocks));
  }
  const SharedArrays& arrays = my_block().shared;
  const auto here = std::find_if(arrays.begin(), arrays.end(),
                                 [&](const auto& entry) { return entry.second.get() == mine; });
  Block& other = machine.blocks[rank];
  if (other.exited > 0) {
    throw Fault(place(position.thread) + " reads shared memory of a block that threads have left");
  }
  const auto there = other.shared.find(here->first);
  if (there == other.shared.end()) {
    throw Fault(place(position.thread) + " reads shared memory that its block has not touched");
  }
  return there->second.get();
}

void exchange(uint32_t mask, int source_lane, const void* in, void* out, size_t bytes,
              const char* file, int line) {
  if (bytes > 8) fail("a shuffle moves at most 8 bytes", file, line);
  collective(mask, Operation::kExchange, source_lane, in, out, bytes, file, line);
}

bool vote_any(uint32_t mask, bool predicate, const char* file, int line) {
  const unsigned char in = predicate;
  unsigned char out = 0;
  collective(mask, Operation::kAny, 0, &in, &out, 1, file, line);
  return out != 0;
}

void barrier(Scope scope, const char* file, int line) {
  if (scope == Scope::kCluster && position.cluster_blocks == 1) scope = Scope::kBlock;
  const bool common = scope != Scope::kBlock;
  if (scope == Scope::kGrid && !machine.cooperative) {
    fail("a barrier of a grid that is not cooperative", file, line);
  }
  Fiber& fiber = self();
  Block& block = my_block();
  if (common ? machine.exited > 0 : block.exited > 0) {
    fail("waits at a barrier that other threads have left", file, line);
  }
  // Those that wait already are at one place.
  for (const Fiber* other : {block.at_barrier > 0 ? block.last_to_wait : nullptr,
                             machine.at_common_barrier > 0 ? machine.last_to_wait : nullptr}) {
    if (!other || (!common && other == machine.last_to_wait)) continue;
    if (other->line != line || std::strcmp(other->file, file) != 0) {
      fail("another thread waits at the barrier in line " + std::to_string(other->line), file,
           line);
    }
  }
  fiber.file = file;
  fiber.line = line;
  fiber.state = State::kAtBarrier;
  (common ? machine.last_to_wait : block.last_to_wait) = &fiber;
  // The threads that must come.
  const int first = common ? 0 : block_slot() * machine.threads;
  const int count =
      common ? machine.threads * static_cast<int>(machine.blocks.size()) : machine.threads;
  int& arrived = common ? machine.at_common_barrier : block.at_barrier;
  if (++arrived == count) {
    arrived = 0;
    ++counters.barriers;
    if (common) {
      ++machine.round;
      for (Block& each : machine.blocks) ++each.epoch;
    } else {
      ++block.epoch;
    }
    for (int i = first; i < first + count; ++i) machine.fibers[i]->state = State::kReady;
  }
  to_scheduler();
}

void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    throw Fault(place(position.thread) + ": misaligned access of " + std::to_string(bytes) +
                " bytes");
  }
}

namespace {

// Who touched a piece of global memory last, and when. -1: several, between which the
// rest does not matter.
struct Touch {
  uint32_t launch = 0;
  int team = 0;  // the first of the blocks that run side by side
  uint32_t round = 0;
  int block = 0;
  uint32_t epoch = 0;
  int thread = 0;

  // Whether no barrier lies between this and `now`.
  bool beside(const Touch& now) const {
    if (launch != now.launch) return false;
    if (team != now.team) return true;
    if (round != now.round) return false;
    if (block != now.block) return true;
    return epoch == now.epoch && thread != now.thread;
  }

  // One reader more; what later writers are checked against stays the strictest.
  void join(const Touch& now) {
    if (launch != now.launch) {
      *this = now;
    } else if (team != now.team) {
      team = -1;
    } else if (round != now.round) {
      *this = now;
    } else if (block != now.block) {
      block = -1;
    } else if (epoch != now.epoch) {
      *this = now;
    } else if (thread != now.thread) {
      thread = -1;
    }
  }

  std::string who() const {
    if (team == -1 || block == -1) return "several blocks";
    return "block " + std::to_string(block) +
           (thread == -1 ? ", several threads" : " thread " + std::to_string(thread));
  }
};

// The last accesses to each two bytes, the smallest that a kernel touches.
class GlobalMemory {
 public:
  void start_launch() {
    if (pages_.size() > kManyPages) {
      pages_.clear();
      last_page_ = nullptr;
    }
  }

  void access(uintptr_t address, size_t bytes, bool write, const Touch& now) {
    for (uintptr_t piece = address / kPiece; piece < (address + bytes) / kPiece; ++piece) {
      Piece& here = at(piece);
      if (here.written.beside(now)) race(write ? "writes" : "reads", "written", here.written);
      if (write) {
        if (here.read.beside(now)) race("writes", "read", here.read);
        here.written = now;
      } else {
        here.read.join(now);
      }
    }
  }

 private:
  struct Piece {
    Touch written, read;
  };
  static constexpr uintptr_t kPiece = 2;
  static constexpr uintptr_t kPagePieces = 2048;
  static constexpr size_t kManyPages = 2048;
  using Page = std::vector<Piece>;

  Piece& at(uintptr_t piece) {
    const uintptr_t number = piece / kPagePieces;
    if (!last_page_ || number != last_number_) {
      Page& page = pages_[number];
      page.resize(kPagePieces);
      last_page_ = page.data();
      last_number_ = number;
    }
    return last_page_[piece % kPagePieces];
  }

  [[noreturn]] static void race(const char* does, const char* was, const Touch& other) {
    throw Fault("race in global memory: " + place(position.thread) + " " + does + " what was " +
                was + " by " + other.who() + ", without a barrier between");
  }

  std::unordered_map<uintptr_t, Page> pages_;
  Piece* last_page_ = nullptr;
  uintptr_t last_number_ = 0;
};

GlobalMemory global_memory;

}  // namespace

void global_access(const void* address, size_t bytes, bool write) {
  global_memory.access(reinterpret_cast<uintptr_t>(address), bytes, write,
                       {machine.launch, machine.first_block, machine.round, position.block,
                        my_block().epoch, position.thread});
}

bool sanitized() {
#if defined(__SANITIZE_ADDRESS__)
  return true;
#else
  return false;
#endif
}

void forbid([[maybe_unused]] const void* from, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(from, bytes);
#endif
}

namespace {

std::set<std::pair<int, const void*>> allowed;  // by device

}  // namespace

bool allows_shared(const void* kernel) { return allowed.count({settings.device, kernel}) > 0; }
void allow_shared(const void* kernel) { allowed.insert({settings.device, kernel}); }

void run(const Grid& grid, const std::function<void()>& thread_body) {
  ++counters.launches;
  ++machine.launch;
  global_memory.start_launch();
  const int blocks = static_cast<int>(grid.blocks);
  const int together = grid.cooperative ? blocks : grid.cluster;
  machine.body = &thread_body;
  machine.threads = grid.threads;
  machine.cooperative = grid.cooperative;
  machine.dynamic_bytes = grid.shared_bytes;
  machine.blocks.clear();
  machine.blocks.resize(together);
  position.grid_blocks = blocks;
  position.cluster_blocks = grid.cluster;
  std::mt19937_64 random(settings.seed);
  std::vector<int> order(blocks / together);
  std::iota(order.begin(), order.end(), 0);
  if (settings.seed != 0) std::shuffle(order.begin(), order.end(), random);
  try {
    for (const int team : order) {
      counters.blocks += together;
      machine.first_block = team * together;
      run_blocks(random);
      for (const Block& block : machine.blocks) {
        size_t bytes = 0;
        for (const auto& [key, array] : block.shared) {
          if (key.first != &kDynamicKey) bytes += array->bytes();
        }
        if (bytes > kMaxStaticShared) throw Fault("more than 48 KiB of static shared memory");
        if (grid.shared_bytes > 0 && bytes + grid.shared_bytes > settings.max_shared_bytes) {
          throw Fault("more shared memory than a block can have");
        }
      }
    }
  } catch (...) {
    drop_fibers();
    throw;
  }
}

}  // namespace host

float widen(Float16 x) {
  const int exponent = x.bits >> 10 & 31;
  const int fraction = x.bits & 1023;
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {0x7fff};
  bits += 0x7fff + (bits >> 16 & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

Float16 to_float16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (magnitude == 0) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);                // magnitude < 2 ** exponent
  const int place = std::max(exponent - 11, -24);  // the last one that is kept
  // nearbyint rounds ties to even; a carry runs on into the exponent as it should.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -place)));
  return {static_cast<uint16_t>(sign | (((place + 24) << 10) + units))};
}

}  // namespace simt
}  // namespace bmtard
