// What was checked, and what was wrong.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cases.h"

namespace check {

inline long long checks = 0, failures = 0;

// So many are enough to see what is wrong; the other cases are not run then.
constexpr long long kFailuresToShow = 40;

[[noreturn]] inline void finish() {
  std::printf("%lld checks, %lld failures\n", checks, failures);
  std::exit(failures == 0 ? 0 : 1);
}

template <typename... Arguments>
void fail(const Case& c, const char* format, Arguments... arguments) {
  std::printf("%s: ", c.name().c_str());
  std::printf(format, arguments...);
  std::printf("\n");
  if (++failures >= kFailuresToShow) finish();
}

inline bool expect(const Case& c, bool is_so, const char* what) {
  ++checks;
  if (!is_so) fail(c, "%s", what);
  return is_so;
}

inline bool expect_near(const Case& c, const char* what, std::int64_t at, double got, double wanted,
                        double tolerance) {
  ++checks;
  if (std::fabs(got - wanted) <= tolerance) return true;
  fail(c, "%s[%lld] is %.9g, not %.9g (+- %.2g)", what, static_cast<long long>(at), got, wanted,
       tolerance);
  return false;
}

}  // namespace check
