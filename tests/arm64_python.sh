#!/usr/bin/env bash
# Sets up what tests under emulation need: a Python for 64-bit ARM with TVM's runtime, and the
# libraries that the C++ runner links to.   tests/arm64_python.sh [FOLDER]   (.cache/arm64)
#
# Debian's packages are unpacked, not installed, and the wheels come from PyPI in the versions that
# this machine has, so neither root nor a foreign architecture in dpkg is needed.
set -euo pipefail
folder=${1:-"$(dirname "${BASH_SOURCE[0]}")/../.cache/arm64"}
python=${PYTHON:-python3}
[ ! -e "$folder/python" ] || exit 0
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
partial=$folder/partial
rm -rf "$partial" "$folder/root" "$folder/site"
mkdir -p "$partial/lists/partial" "$partial/archives/partial" "$folder/root"

apt=(
    -qq -oAPT::Architecture=arm64 -oAPT::Architectures=arm64 -oDebug::NoLocking=1
    "-oDir::State::Lists=$partial/lists" "-oDir::Cache=$partial" -oDir::State::Status=/dev/null
)
apt-get "${apt[@]}" update
packages=(
    libc6 libgcc-s1 libstdc++6 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib
    zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libssl3 libuuid1
)
(cd "$partial" && apt-get "${apt[@]}" download "${packages[@]}")
for package in "$partial"/*.deb; do
    dpkg-deb --extract "$package" "$folder/root"
done

here() { "$python" -c "from importlib.metadata import version; print(version('$1'))"; }
platforms=()
for glibc in 2_17 2_24 2_27 2_28; do platforms+=(--platform "manylinux_${glibc}_aarch64"); done
"$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
    --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 --abi abi3 --abi none \
    "${platforms[@]}" --platform manylinux2014_aarch64 --target "$folder/site" \
    "apache-tvm==$(here apache-tvm)" "apache-tvm-ffi==$(here apache-tvm-ffi)" \
    numpy ml_dtypes typing_extensions psutil cloudpickle tornado
# The compiler and its sources, 300 MB that no device needs.
rm -rf "$folder"/site/tvm/{lib/libtvm_compiler.so,lib/libtvm_runtime_cuda.so,3rdparty,include}
rm -rf "$partial"

# Without binfmt_misc a child interpreter must go through the emulator too.
echo "import sys; sys.executable = '$folder/python'" >"$folder/site/sitecustomize.py"
cat >"$folder/python.new" <<EOF
#!/bin/sh
exec qemu-aarch64 -L "$folder/root" \\
    -E PYTHONHOME="$folder/root/usr" -E PYTHONDONTWRITEBYTECODE=1 -E TVM_USE_RUNTIME_LIB=1 \\
    -E PYTHONPATH="$folder/site\${PYTHONPATH:+:\$PYTHONPATH}" \\
    "$folder/root/usr/bin/python3.11" "\$@"
EOF
chmod +x "$folder/python.new"
mv "$folder/python.new" "$folder/python"
