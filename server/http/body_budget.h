// BodyBudget: bytes of request bodies that all connections together may hold.
#ifndef CACHALOT_SERVER_HTTP_BODY_BUDGET_H_
#define CACHALOT_SERVER_HTTP_BODY_BUDGET_H_

#include <atomic>
#include <cstddef>
#include <utility>

namespace cachalot {

// Any thread.
class BodyBudget {
 public:
  // A body's share grows as its bytes come, not with what its header says: a promise takes nobody's room. Large bodies
  // leave a quarter to small ones, which are what most requests are.
  static constexpr size_t kSmallBytes = 64 << 10;

  explicit BodyBudget(size_t max_bytes) : max_bytes_(max_bytes) {}

  // What one body holds; gives it back when destroyed.
  class Share {
   public:
    Share() = default;
    explicit Share(BodyBudget* budget) : budget_(budget) {}
    Share(Share&& other) noexcept
        : budget_(std::exchange(other.budget_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Share& operator=(Share&& other) noexcept {
      std::swap(budget_, other.budget_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Share() {
      if (budget_ != nullptr) budget_->held_.fetch_sub(bytes_);
    }
    // Holds `bytes` in all; false, and nothing changes, when there is no room for them.
    bool GrowTo(size_t bytes) {
      if (bytes <= bytes_) return true;
      const size_t limit = bytes <= kSmallBytes ? budget_->max_bytes_ : budget_->max_bytes_ / 4 * 3;
      const size_t more = bytes - bytes_;
      if (budget_->held_.fetch_add(more) + more > limit) {
        budget_->held_.fetch_sub(more);
        return false;
      }
      bytes_ = bytes;
      return true;
    }

   private:
    BodyBudget* budget_ = nullptr;
    size_t bytes_ = 0;
  };

  size_t held() const { return held_; }

 private:
  const size_t max_bytes_;
  std::atomic<size_t> held_ = 0;
};

}  // namespace cachalot

#endif  // CACHALOT_SERVER_HTTP_BODY_BUDGET_H_
