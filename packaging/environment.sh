#!/usr/bin/env bash
# Makes .venv, or brings it up to date; does nothing where it stands and fits. `make env` calls it; the Makefile names its variables.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "environment: $*" >&2
    exit 1
}

# One at a time; whoever waited finds the environment ready.
exec 9<"packaging/environment.sh"
flock 9
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

[ "$(uname -s)" = Linux ] || fail "fbgemm has wheels for Linux only, this is $(uname -s): use a Linux machine or container"

stamp=.venv/sellarec-stamp # line 1: what the environment is for; line 2: a digest of what it was made from
python=.venv/bin/python

# Without DEVICE a standing environment keeps its own, so that DEVICE has to be said once only.
device=${DEVICE:-$(cut -d' ' -f1 "$stamp" 2>/dev/null | head -1 || true)}
if [ -z "$device" ]; then
    device=cpu
    if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then device=cuda; fi
fi
case $device in
    cpu | cuda) ;;
    *) fail "DEVICE is '$device': choose cpu or cuda" ;;
esac
requirements=requirements/$device.txt

# A virtual environment holds absolute paths, and the CPU and CUDA builds don't mix: another place or device means a new one.
identity="$device $PWD"
wanted=$(cat "$requirements" pyproject.toml packaging/*/pyproject.toml packaging/environment.sh | sha256sum | cut -d' ' -f1)
standing() { [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$identity" ] && "$python" -c '' 2>/dev/null; }
# Somebody may have installed other versions by hand. Only that counts here, not an error in the code that is being worked on.
fits() {
    local code=0
    "$python" -c '
import sys
from sellarec.environment import check_environment
from sellarec.errors import UserError
try:
    check_environment()
except UserError as error:
    print(f"environment: {error}")
    sys.exit(3)' 2>/dev/null || code=$?
    [ $code != 3 ]
}

if standing && fits; then
    [ "$(sed -n 2p "$stamp")" != "$wanted" ] || exit 0
    echo "environment: bringing .venv up to date with $requirements and pyproject.toml"
else
    base=
    for candidate in ${PYTHON:-python3.11 python3}; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
        if [ "$version" = 3.11 ]; then base=$candidate; break; fi
        tried="${tried:+$tried, }$candidate is ${version:-missing}"
    done
    [ -n "$base" ] || fail "Python 3.11 is needed ($tried): install it, or name it: make env PYTHON=/path/to/python3.11"
    "$base" -c 'import ensurepip, venv' 2>/dev/null || fail "$base lacks the venv module: install it (Debian: apt install python3.11-venv)"
    echo "environment: making .venv for $device with $("$base" --version), about a minute once the packages are downloaded"
    rm -rf .venv
    "$base" -m venv .venv
fi
rm -f "$stamp"
start=$SECONDS

pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }
torch=$(grep -m1 '^torch==' "$requirements")
index=${TORCH_INDEX:-}
if [ -z "$index" ] && [ $device = cpu ] && ! pip install -qq --dry-run --no-deps "$torch" 2>/dev/null; then
    index=https://download.pytorch.org/whl/cpu
fi
if [ -n "$index" ]; then
    echo "environment: $torch from $index"
    pip install -qq --progress-bar off --no-deps --index-url "$index" "$torch" ||
        fail "no $torch from $index: check the network, or set TORCH_INDEX to an index that has it"
fi
pip install -qq --no-compile --progress-bar off -r "$requirements" || fail "pip could not install $requirements (its message is above)"
# Compiled here, on all cores: pip compiles on one core, and processes told not to write bytecode would compile at every start.
# It ends with 1 in any case, as some packages carry templates that are no Python: what tells is torch's own bytecode.
"$python" -m compileall -q -j 0 "$PWD/.venv/lib" >/dev/null 2>&1 ||
    [ -n "$(find .venv/lib -path '*/torch/__pycache__/__init__.*.pyc' -print -quit)" ] ||
    fail "the packages could not be compiled: python -m compileall .venv/lib tells why (a full disk?)"
pip check >/dev/null || fail "the installed packages contradict each other: $(pip check | head -1)"

if [ $device = cpu ]; then
    cuda=$(pip list --format freeze | grep -iE '^(nvidia-|cuda-|triton=)' | paste -sd ' ' || true)
    [ -z "$cuda" ] || fail "CUDA packages came into a CPU set-up ($cuda): set TORCH_INDEX to an index of CPU wheels"
else
    "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        fail "pip gave a torch without CUDA: set TORCH_INDEX=https://download.pytorch.org/whl/cu130, or DEVICE=cpu"
fi
printf '%s\n%s\n' "$identity" "$wanted" >"$stamp"
echo "environment: .venv stands after $((SECONDS - start)) s ($device, $("$python" -c 'from importlib.metadata import version as v; print(*(f"{n} {v(n)}" for n in ("torch", "torchrec", "fbgemm-gpu", "ray")), sep=", ")'))"
