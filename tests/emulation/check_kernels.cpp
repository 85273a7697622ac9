// The CUDA kernels against the formulas in double precision, on the device that the program is
// linked with (kernels/device.h).
//
//   check_kernels [--quiet] [k/n] [seed] [dtype]
//
// runs every n-th case from the k-th on, of one dtype if it is named. It prints each case before it
// runs it (not with --quiet), what is wrong, and how many checks were done. The same seed gives the
// same data again and, emulated, the same order of threads.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/against_formulas.h"
#include "kernels/properties.h"

namespace check {
namespace {

void check_case(const Case& c, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  set_order(seed);
  const std::uint64_t refusals = driver().refusals;
  Data data(c, random);
  const Formulas formulas(c, data);
  const bool has_variance = c.problem.per_channel() > 1;
  if (has_variance) formulas.check_training();
  formulas.check_inference();
  if (has_variance) check_properties(c, data, random, seed);
  if (!has_variance) check_single_values(c, data);
  // Of a forward and a backward kernel, each once, and only where somebody else is at work.
  const std::uint64_t most = c.device == "shared" ? 2 : 0;
  expect(c, driver().refusals - refusals <= most, "launches that don't fit are few");
}

void run(Case c, std::uint64_t seed, bool is_quiet) {
  try {
    const std::string reason = set_up(&c);
    if (!reason.empty()) return skip(reason);
    begin(c, is_quiet);
    check_case(c, seed);
  } catch (const DeviceLost& error) {
    fail(c, "%s; the cases after it are not run", error.what());
    finish();
  } catch (const std::runtime_error& error) {
    fail(c, "%s", error.what());
  }
}

}  // namespace
}  // namespace check

int main(int argc, char** argv) {
  std::vector<std::string> words(argv + 1, argv + argc);
  const bool is_quiet = !words.empty() && words[0] == "--quiet";
  if (is_quiet) words.erase(words.begin());
  words.resize(3);
  const std::string part = words[0].empty() ? "0/1" : words[0], dtype = words[2];
  const std::size_t k = std::stoul(part), n = std::stoul(part.substr(part.find('/') + 1));
  const std::uint64_t seed = words[1].empty() ? 1 : std::stoull(words[1]);
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // whatever ends the program, its lines are out
  const std::vector<check::Case> cases = check::all_cases();
  for (std::size_t i = k; i < cases.size(); i += n) {
    const char* const of_case = check::kDTypeNames[static_cast<int>(cases[i].problem.dtype)];
    if (dtype.empty() || dtype == of_case) check::run(cases[i], seed + i, is_quiet);
  }
  check::finish();
}
