// Vectors of 64 bytes on machines whose registers are narrower: a few registers side by side.
//
// GCC keeps a vector_size(64) in memory there, and every operation on it goes through the stack; a struct of vectors of
// the register's own size is taken apart into registers.
#pragma once
#include <cstdint>
#include <cstring>

namespace ds {

#ifdef __AVX__
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

template <class E>
struct alignas(64) Wide {
  typedef E Part __attribute__((vector_size(REGISTER_BYTES)));
  static constexpr int PARTS = 64 / REGISTER_BYTES, PER_PART = REGISTER_BYTES / int(sizeof(E));

  Part part[PARTS];

  Wide() = default;
  Wide(E x) {  // in every lane
    for (Part& p : part) p = Part{} + x;
  }
  template <class F>
  explicit Wide(const Wide<F>& other) {  // the same bits
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) part[i] = (Part)other.part[i];
  }
  static Wide at(const E* p) {  // register by register: a copy of the struct would go through the stack
    Wide v;
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) std::memcpy(&v.part[i], p + i * PER_PART, REGISTER_BYTES);
    return v;
  }
  void to(E* p) const {
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) std::memcpy(p + i * PER_PART, &part[i], REGISTER_BYTES);
  }
  E operator[](int i) const { return part[i / PER_PART][i % PER_PART]; }

#define DS_BINARY(OP)                                                        \
  friend inline Wide operator OP(const Wide& a, const Wide& b) {             \
    Wide c;                                                                  \
    for (int i = 0; i < PARTS; i++) c.part[i] = a.part[i] OP b.part[i];      \
    return c;                                                                \
  }
  DS_BINARY(+)
  DS_BINARY(-)
  DS_BINARY(*)
  DS_BINARY(/)
  DS_BINARY(&)
  DS_BINARY(|)
#undef DS_BINARY
#define DS_COMPARE(OP)                                                          \
  friend inline Wide<int32_t> operator OP(const Wide& a, const Wide& b) {       \
    Wide<int32_t> c;                                                            \
    for (int i = 0; i < PARTS; i++)                                             \
      c.part[i] = (typename Wide<int32_t>::Part)(a.part[i] OP b.part[i]);       \
    return c;                                                                   \
  }
  DS_COMPARE(<)
  DS_COMPARE(>)
  DS_COMPARE(>=)
#undef DS_COMPARE

  Wide operator-() const { return each([](Part p) { return -p; }); }
  Wide operator~() const { return each([](Part p) { return ~p; }); }
  Wide operator<<(int bits) const { return each([=](Part p) { return p << bits; }); }
  Wide operator>>(int bits) const { return each([=](Part p) { return p >> bits; }); }
  Wide& operator+=(const Wide& b) { return *this = *this + b; }

 private:
  template <class F>
  Wide each(F&& f) const {
    Wide c;
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) c.part[i] = f(part[i]);
    return c;
  }
};

}  // namespace ds
