#!/usr/bin/env bash
# What needs a GPU, on a machine without a network, 10 minutes at a time. A result is printed as soon as it is there.
#
#   bench/gpu.sh               the first ten minutes: build and install, a first look at every kernel family (smoke),
#                              the most wanted timings, the tests marked cuda, the machine code; what passed before is
#                              not run again
#   bench/gpu.sh counters      the second: counters of the main kernels, by the best profiler here, and the sanitizers
#   bench/gpu.sh compare A B   the third: two variants beside each other. Each is a checkout, which is built, a folder
#                              with the package, or a compiled module for the installed package; see bench/ab.py
#   bench/gpu.sh STAGE ...     these stages, whether they passed or not: build smoke wanted test code, profile memcheck
#                              synccheck racecheck initcheck, bench dropin
#   PYTHON=/path/to/python     the interpreter that has torch (default python3); needs pybind11, cmake and ninja, and
#                              for the tests what the extra `test` names; pytest-xdist and pytest-timeout shorten them
#   GPU_OUT=/folder            logs and results are copied there after every stage
#
# Logs and what has passed: build/gpu/. Exit code 1 if a stage failed; the others run all the same, but not after a
# failed build.
set -u -o pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
state=build/gpu
mkdir -p "$state" bench/results

sources=$(find csrc python tests bench CMakeLists.txt pyproject.toml -type f ! -name '*.so' ! -path 'bench/results/*' \
  ! -path '*__pycache__*' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)

build() {
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  for tool in nvcc cmake ninja; do command -v $tool && $tool --version | tail -n 1; done
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' || return 1
  "$python" -m pip install --no-build-isolation --no-deps --no-index --force-reinstall \
    --config-settings=cmake.define.TORCHWELD_CUDA=ON . || build_without_pip || return 1
  "$python" -c 'import torch; from torchweld import backend; why = backend.unavailable("cuda"); assert why is None, why'
}

build_without_pip() { # scikit-build-core is missing, or too old: cmake and ninja do what it asks them to do
  local site
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))') &&
    install_into "$site" . build/gpu/cmake
}

install_into() { # folder, checkout, folder for objects
  cmake -S "$2" -B "$3" -G Ninja -DCMAKE_BUILD_TYPE=Release -DTORCHWELD_CUDA=ON \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -c 'import pybind11; print(pybind11.get_cmake_dir())')" &&
    cmake --build "$3" && cmake --install "$3" --prefix "$1" && cp -r "$2/python/torchweld" "$1"
}

tests() { # paths and options
  local options=()
  if "$python" -c 'import xdist' 2>/dev/null; then
    options=(-n "$(nproc)")
  else
    options=(-o addopts=-ra) # without the options of xdist
  fi
  "$python" -c 'import pytest_timeout' 2>/dev/null && options+=(--timeout 40)
  # A file that cannot be imported, for want of a package, must not keep the others from running.
  "$python" -m pytest -q --tb=line -p no:cacheprovider --continue-on-collection-errors "${options[@]}" "$@"
}

sanitize() { # tool, options of bench/sanitize.py; the kernels that are watched are ours
  if ! command -v compute-sanitizer; then
    echo 'compute-sanitizer is not on PATH: it comes with the CUDA toolkit'
    return 1
  fi
  local watched=(--kernel-name kernel_substring=torchweld) tool=$1
  shift
  [[ $tool == initcheck ]] && watched=() # it must see who wrote the memory that they read
  # Each tensor in an allocation of its own, so that a step beyond it is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 "${watched[@]}" \
    "$python" bench/sanitize.py "$@"
}

results() { # suffix: a file for this device
  local device
  device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') &&
    echo "bench/results/$device$1"
}

wanted() {
  local file
  file=$(results -wanted.jsonl) && rm -f "$file" && "$python" bench/wanted.py --json "$file"
}

bench() {
  local file
  file=$(results .json) && "$python" -m torchweld bench --device cuda --quick --no-compile --json "$file"
}

compare() { # A, B, options of bench/ab.py
  local variants=() folder
  for each in "$1" "$2"; do
    if [[ -f $each/CMakeLists.txt ]]; then
      folder=build/gpu/variants/$(realpath "$each" | sha256sum | cut -c1-12)
      mkdir -p "$folder/site"
      if ! install_into "$folder/site" "$each" "$folder/objects" >"$folder/log" 2>&1; then
        tail -n 40 "$folder/log"
        return 1
      fi
      each=$folder/site
    fi
    variants+=("$each")
  done
  shift 2
  [[ ! -d ${variants[0]} ]] || export PYTHONPATH="${variants[0]}${PYTHONPATH:+:$PYTHONPATH}" # nothing need be installed
  "$python" bench/ab.py "${variants[@]}" "$@"
}

collect() { # what a machine that is given back must not keep
  [[ -n ${GPU_OUT:-} ]] || return 0
  mkdir -p "$GPU_OUT" && cp -r "$state"/*.log bench/results "$GPU_OUT"
}

failed=0
report=()
stage() { # name, seconds, command...
  local name=$1 limit=$2 started=$SECONDS rc
  shift 2
  if [[ -f $state/$name.passed && $(<"$state/$name.passed") == "$sources" && " $asked " != *" $name "* ]]; then
    report+=("$(printf '%-10s passed before' "$name")")
    return 0
  fi
  echo "== $name (at most $limit s; log in $state/$name.log)"
  rm -f "$state/$name.passed"
  # What the first minutes are for is shown line by line; of the others a failure shows the end.
  if [[ " smoke wanted profile compare " == *" $name "* ]]; then
    timeout --kill-after=10 "$limit" bash -c '"$@"' _ "$@" 2>&1 | tee "$state/$name.log"
    rc=${PIPESTATUS[0]}
  else
    timeout --kill-after=10 "$limit" bash -c '"$@"' _ "$@" >"$state/$name.log" 2>&1
    rc=$?
    tail -n $((rc == 0 ? 1 : 40)) "$state/$name.log"
  fi
  collect
  if ((rc == 0)); then
    echo "$sources" >"$state/$name.passed"
    report+=("$(printf '%-10s passed   %4d s' "$name" $((SECONDS - started)))")
  else
    failed=1
    report+=("$(printf '%-10s FAILED   %4d s, exit code %d, %s' "$name" $((SECONDS - started)) $rc "$state/$name.log")")
  fi
  return $rc
}

run() { # stage
  case $1 in
    smoke) stage smoke 90 "$python" bench/smoke.py --seconds 20 --jobs "$(nproc)" ;;
    wanted) stage wanted 180 wanted ;;
    test) stage test 120 tests tests -m cuda --ignore-glob '*/tests/dropin/*_db.py' ;;
    code) stage code 60 tests tests/emulated/test_machine_code.py tests/emulated/test_contraction.py ;;
    profile) stage profile 150 "$python" bench/counters.py --out "$state/counters" ;;
    # Most of a tool's time goes into the first launch of each instance: one dtype, the head sizes of most models.
    memcheck) stage memcheck 120 sanitize memcheck --dtypes bfloat16 --dims 64 128 ;;
    synccheck) stage synccheck 70 sanitize synccheck --dtypes bfloat16 --dims 64 128 ;;
    # racecheck knows mbarriers only beside tensor copies: of attention it sees the kernels without them.
    racecheck) stage racecheck 60 sanitize racecheck --dtypes float32 --dims 64 ;;
    initcheck) stage initcheck 50 sanitize initcheck --dtypes bfloat16 --dims 64 ;;
    bench) stage bench 110 bench ;;
    dropin) stage dropin 110 tests tests/dropin -m cuda ;;
    *) echo "expected a stage, counters or compare, but got $1; the head of $0 lists them" >&2; failed=1 ;;
  esac
}

export python
export -f build build_without_pip install_into tests sanitize results wanted bench compare
asked=$*
case ${1:-first} in
  first) list=(smoke wanted test code) ;;
  counters) list=(profile memcheck synccheck racecheck initcheck) asked='' ;;
  compare)
    if (($# < 3)); then
      echo "expected: $0 compare A B [options of bench/ab.py], but got $(($# - 1)) variants" >&2
      exit 2
    fi
    asked=compare
    ;;
  *) list=("$@") ;;
esac
if [[ $asked == compare ]]; then
  stage compare 590 "$@"
elif stage build 140 build; then
  for each in "${list[@]}"; do [[ $each == build ]] || run "$each"; done
fi
printf '%s\n' "${report[@]}"
exit $failed
