// Runs one test file. Exit codes: 0 passed, 1 failed, 77 the wanted instruction set is not there.
#include <cstdlib>
#include <cstring>

#include "aniso/row_kernels.h"
#include "check.h"

namespace aniso_test {

Counts& counts() {
  static Counts all;
  return all;
}

}  // namespace aniso_test

int main() {
  const char* wanted = std::getenv("ANISO_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, aniso::instruction_set()) != 0) {
    std::printf("skipped: no %s here, the kernels use %s\n", wanted, aniso::instruction_set());
    return 77;
  }
  aniso_test::run_tests();
  const aniso_test::Counts& all = aniso_test::counts();
  std::printf("%s: %lld checks, %lld failed\n", aniso::instruction_set(), static_cast<long long>(all.checks),
              static_cast<long long>(all.failures));
  return all.failures == 0 && all.checks > 0 ? 0 : 1;
}
