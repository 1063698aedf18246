#!/usr/bin/env bash
# Build the C++ engine with AddressSanitizer and UndefinedBehaviorSanitizer, and run its tests on that build.
# The library goes to a temporary place; the installed one is not touched. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

compiler=${CXX:-g++}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags=(-std=c++17 -O1 -g -fPIC -fvisibility=hidden -fno-omit-frame-pointer -Icsrc)
flags+=(-fsanitize=address,undefined -fno-sanitize-recover=all)
# The flags of a file with its own instruction set, from the table that setup.py reads.
table=csrc/kernels/flags.txt
isa_flags() {
  [ "$(uname -m)" != x86_64 ] || awk -v stem="$(basename "$1" .cpp)" '$1 == stem { $1 = ""; print }' "$table"
}
jobs=()
while IFS= read -r source; do
  # shellcheck disable=SC2046
  "$compiler" "${flags[@]}" $(isa_flags "$source") -c "$source" -o "$build/${source//\//.}.o" &
  jobs+=($!)
done < <(find csrc -name '*.cpp')
for job in "${jobs[@]}"; do wait "$job"; done
"$compiler" -shared "${flags[@]}" "$build"/*.o -o "$build/_engine.so"

# Python itself leaks by design, and torch's libraries are not instrumented: only our code's faults count.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:exitcode=99:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1
export PATCHSPARSE_ENGINE=$build/_engine.so OMP_NUM_THREADS=2
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)" \
  python -m pytest -q -n 0 -p no:cacheprovider tests/kernels/test_cpp.py tests/kernels/test_cpp_loading.py \
  tests/kernels/test_bfloat16.py tests/kernels/test_depthwise.py tests/kernels/test_winograd.py \
  tests/kernels/test_maps.py tests/kernels/test_refusals.py "$@"
