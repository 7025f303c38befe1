#!/usr/bin/env bash
# compute-sanitizer's four tools over the CUDA test executables of the core and over every kernel behind the operators.
#
#   csrc/tests/sanitize.sh [FOLDER OF THE TEST EXECUTABLES] [PYTHON]
#
# SANITIZER and SANITIZER_TOOLS choose the program and its tools, SANITIZER_FLAGS adds options. SANITIZER_PARTS, "correct
# correct_sums encode decode" unless set, are the operators; each runs by itself, once a format. Goes on after a finding;
# the exit code is 1 if there was one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

tests="${1:-build/core/csrc/tests}"
python="${2:-python3}"
sanitizer="${SANITIZER:-compute-sanitizer}"
command -v "$sanitizer" >/dev/null || { echo "no $sanitizer here: set SANITIZER to its path" >&2; exit 2; }
# the sanitizer must see every allocation, not the blocks of PyTorch's allocator
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

failed=()
check() {
  local name="$1" tool="$2" started=$SECONDS
  shift 2
  # shellcheck disable=SC2086  # flags are words
  if "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all ${SANITIZER_FLAGS:-} "$@" \
    >"$log" 2>&1; then
    printf '%-10s %-32s clean, %d s\n' "$tool" "$name" "$((SECONDS - started))"
  elif [ "$?" -eq 77 ]; then
    printf '%-10s %-32s skipped: no GPU\n' "$tool" "$name"
  else
    printf '%-10s %-32s FAILED\n' "$tool" "$name"
    tail -n 40 "$log"
    failed+=("$tool $name")
  fi
}

# racecheck needs minutes for what PyTorch launches, and watches shared memory alone, so that other kernels may be left
# out; one size of batch, of two blocks of rows and a bit, as its time goes with the number of launches
declare -A own=([cuda]="aniso" [triton]="correct_ encode_ decode_ split_backward_")
check_operators() {
  local tool="$1" backend="$2" part="$3" format="$4" filters=() sizes=()
  if [ "$tool" = racecheck ]; then
    for name in ${own[$backend]}; do filters+=(--kernel-name "kns=$name"); done
    sizes=(--rows 130)
  fi
  check "$backend, $part, $format" "$tool" ${filters[@]+"${filters[@]}"} "$python" python_tests/sanitize_driver.py \
    "$backend" --only "$part" --format "$format" ${sizes[@]+"${sizes[@]}"}
}

log="$(mktemp)"
trap 'rm -f "$log"' EXIT
for tool in ${SANITIZER_TOOLS:-memcheck racecheck initcheck synccheck}; do
  for executable in "$tests"/test_cuda_*; do
    [ -x "$executable" ] && check "$(basename "$executable")" "$tool" "$executable"
  done
  for backend in cuda triton; do
    for part in ${SANITIZER_PARTS:-correct correct_sums encode decode}; do
      for format in bfloat16 float16 float32 float64; do
        [ "$backend $format" = "triton float64" ] && continue
        check_operators "$tool" "$backend" "$part" "$format"
      done
    done
  done
done
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'with findings: %s\n' "${failed[@]}"
  exit 1
fi
