#!/bin/sh
# Tests of the compiled CPU kernel under a sanitizer (gcc's): dev/sanitize.sh address|thread [pytest arguments]
# OpenMP is left out, so that the kernel's threads are plain ones, which the thread sanitizer understands.
set -eu
kind=$1
shift
case $kind in
    address) flags=-fsanitize=address library=libasan.so ;;
    thread) flags=-fsanitize=thread library=libtsan.so ;;
    *) echo "usage: $0 address|thread [pytest arguments]" >&2; exit 2 ;;
esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/c++" <<END
#!/bin/sh
for argument; do
    shift
    test "\$argument" = -fopenmp || set -- "\$@" "\$argument"
done
exec g++ "\$@" -g -O1 $flags
END
chmod +x "$folder/c++"
echo "race:libtorch_cpu.so" > "$folder/suppressions"  # torch's own threads are OpenMP's, not understood
export CXX="$folder/c++" HF_REFORMER_CACHE="$folder" ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS="halt_on_error=1 suppressions=$folder/suppressions"
export LD_PRELOAD="$(g++ -print-file-name=$library) $(g++ -print-file-name=libstdc++.so.6)"  # the second: for exceptions
python -m pytest tests/kernels/test_cpu_kernel.py -p no:cacheprovider "$@"
