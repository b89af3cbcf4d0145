#!/usr/bin/env bash
# Resolve the newest versions that pyproject.toml allows, in an empty environment, and write them
# to constraints/ci.txt. Where packages come from is the machine's own pip setting and is not
# written down; a local build's suffix (torch's "+cpu") is dropped so that every build fits.
# torch itself is moved by hand, in constraints/ci.txt: its releases change numerics and kernels,
# and the proofs have to be made again.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3.11}" -m venv "$environment"
grep '^torch==' constraints/ci.txt >"$environment/torch.txt"
"$environment/bin/pip" install --quiet --disable-pip-version-check --upgrade \
    --constraint "$environment/torch.txt" ".[$(make --silent extras)]"
{
    echo "# Exact versions that the tests run with, on Linux x86-64 and Python 3.11."
    echo "# Written by constraints/refresh.sh; install with: pip install -c constraints/ci.txt"
    "$environment/bin/pip" freeze --all --exclude kinodit --exclude pip |
        sed -E 's/\+[A-Za-z0-9.]+$//' | sort --ignore-case
} >"$environment/ci.txt"
mv "$environment/ci.txt" constraints/ci.txt
