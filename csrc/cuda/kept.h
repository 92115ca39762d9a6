// Answers that do not change, asked for once.
#pragma once

#include <map>
#include <mutex>

namespace bmtard {
namespace simt {

// For any number of threads. It never forgets, so keys must be few.
template <typename Key, typename Answer>
class Kept {
 public:
  // ask(answer) fills in the answer for `key`. Once it returns true, it is not called again.
  template <typename Ask>
  Answer get(const Key& key, Ask ask) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = answers_.find(key);
    if (known != answers_.end()) return known->second;
    Answer answer{};
    if (ask(answer)) answers_[key] = answer;
    return answer;
  }

 private:
  std::mutex mutex_;
  std::map<Key, Answer> answers_;
};

}  // namespace simt
}  // namespace bmtard
