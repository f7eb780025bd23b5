// address_set.h: has this address been seen in this step? A hash table of twice as many slots as there can be
// addresses.
#pragma once
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastrunner {

class AddressSet {
 public:
  explicit AddressSet(std::size_t capacity) : slots_(std::bit_ceil(2 * capacity + 2)) {}

  void clear() { std::fill(slots_.begin(), slots_.end(), nullptr); }

  // False if it was there already.
  bool insert(const void* address) {
    const std::size_t last = slots_.size() - 1;
    const std::uint64_t hash = reinterpret_cast<std::uintptr_t>(address) * 0x9e3779b97f4a7c15u;  // Fibonacci hashing
    std::size_t i = (hash >> 32) & last;
    for (; slots_[i]; i = (i + 1) & last)
      if (slots_[i] == address) return false;
    slots_[i] = address;
    return true;
  }

 private:
  std::vector<const void*> slots_;
};

}  // namespace fastrunner
