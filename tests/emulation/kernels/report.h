// What was checked, and what was wrong.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "cases.h"
#include "device.h"

namespace check {

inline long long checks = 0, failures = 0;
inline int shown = 0, shown_of_case = 0;
inline std::map<std::string, int> skipped;  // cases, by the reason

// So many are enough to see what is wrong; the other cases are not run then. Few of each case, so
// that other cases are seen, too.
constexpr int kFailuresToShow = 40, kFailuresOfACase = 4;

[[noreturn]] inline void finish() {
  for (const auto& [reason, cases] : skipped) {
    std::printf("%d cases skipped: %s\n", cases, reason.c_str());
  }
  std::printf("%lld checks, %lld failures\n", checks, failures);
  std::exit(failures == 0 ? 0 : 1);
}

inline void begin(const Case& c, bool is_quiet) {
  shown_of_case = 0;
  if (!is_quiet) std::printf("case %s\n", c.name().c_str());
}

inline void skip(const std::string& reason) { ++skipped[reason]; }

template <typename... Arguments>
void fail(const Case& c, const char* format, Arguments... arguments) {
  ++failures;
  if (++shown_of_case > kFailuresOfACase) return;
  std::printf("%s: ", c.name().c_str());
  std::printf(format, arguments...);
  std::printf("\n");
  if (++shown >= kFailuresToShow) finish();
}

inline bool expect(const Case& c, bool is_so, const char* what) {
  ++checks;
  if (!is_so) fail(c, "%s", what);
  return is_so;
}

inline bool expect_success(const Case& c, const char* what, cudaError_t error) {
  ++checks;
  if (error != cudaSuccess) {
    fail(c, "%s returned %d (%s)", what, static_cast<int>(error), cudaGetErrorString(error));
  }
  return error == cudaSuccess;
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
