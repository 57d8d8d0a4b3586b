#!/bin/sh
# Install what the book needs into a virtual environment: sh workflow/install.sh VENV
# uv does in a quarter of a minute what takes pip two. It is sent where pip's settings point; where it finds no way, pip installs.
set -e
pip=$1/bin/pip
packages="-r requirements.txt -c requirements.lock -e ."
settings=$($pip config list)

said() { # what pip is told under this name, by the environment or a file
    printf '%s\n' "$settings" | sed -nE "s/^(:env:|global|install)\.$1='(.*)'\$/\2/p" | sed 's/\\n/ /g' | tr '\n' ' ' | xargs
}

UV_INDEX_URL=${UV_INDEX_URL:-$(said index-url | cut -d' ' -f1)}
UV_EXTRA_INDEX_URL=${UV_EXTRA_INDEX_URL:-$(said extra-index-url)}
UV_FIND_LINKS=${UV_FIND_LINKS:-$(said find-links | tr ' ' ',')}
export UV_INDEX_URL UV_EXTRA_INDEX_URL UV_FIND_LINKS
{
    $pip install --quiet -c requirements.lock uv &&
        "$1/bin/uv" pip install --quiet --python "$1/bin/python" --index-strategy unsafe-best-match --system-certs $packages
} || $pip install --quiet $packages
