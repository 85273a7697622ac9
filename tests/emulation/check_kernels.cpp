// The CUDA kernels on the emulated device, against the formulas in double precision.
//
//   check_kernels [k/n] [seed] [dtype]
//
// runs every n-th case from the k-th on, of one dtype if it is named, and prints what is wrong and
// how many checks were done. The same seed gives the same data and order of threads again.
#include <cstdio>
#include <random>
#include <string>

#include "kernels/against_formulas.h"
#include "kernels/properties.h"

namespace check {
namespace {

void run(const Case& c, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  emulation::set_seed(seed);
  open(device_named(c.device));
  const std::uint64_t refusals = emulation::counts().refusals;
  try {
    Data data(c, random);
    const Formulas formulas(c, data);
    const bool has_variance = c.problem.per_channel() > 1;
    if (has_variance) formulas.check_training();
    formulas.check_inference();
    if (has_variance) check_properties(c, data, random, seed);
    if (!has_variance) check_single_values(c, data);
    // Of a forward and a backward kernel, each once, and only where somebody else is at work.
    const std::uint64_t most = c.device == "shared" ? 2 : 0;
    expect(c, emulation::counts().refusals - refusals <= most, "launches that don't fit are few");
  } catch (const emulation::Failure& failure) {
    fail(c, "%s", failure.what());
  }
}

}  // namespace
}  // namespace check

int main(int argc, char** argv) {
  const std::string part = argc > 1 ? argv[1] : "0/1";
  const std::size_t k = std::stoul(part), n = std::stoul(part.substr(part.find('/') + 1));
  const std::uint64_t seed = argc > 2 ? std::stoull(argv[2]) : 1;
  const std::string dtype = argc > 3 ? argv[3] : "";
  const std::vector<check::Case> cases = check::all_cases();
  for (std::size_t i = k; i < cases.size(); i += n) {
    const char* const of_case = check::kDTypeNames[static_cast<int>(cases[i].problem.dtype)];
    if (dtype.empty() || dtype == of_case) check::run(cases[i], seed + i);
  }
  check::finish();
}
