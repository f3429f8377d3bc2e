#!/usr/bin/env bash
# What `make setup` does: .venv with the packages that constraints.txt pins, from pip's mirror if it has one.
# Run: [PYTHON=python3.12] ./install.sh [EXTRA,...], the extras of pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
locale=${MEDASST_LANG:-${LC_ALL:-${LC_MESSAGES:-${LANG:-}}}}

say() { if [[ $locale == [zZ][hH]* ]]; then echo "$2"; else echo "$1"; fi; }
fail() { echo "make: $(say "$@")" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || fail \
  "PYTHON is '$python', must be Python 3.11 or newer; try make PYTHON=python3.12" \
  "PYTHON 为 '$python'，应为 Python 3.11 或更新版本；可试 make PYTHON=python3.12"
[[ -x .venv/bin/uv ]] || { "$python" -m venv .venv && .venv/bin/pip install --quiet --constraint constraints.txt uv; }

# as lines, and not as pyproject.toml itself: uv then sees in a moment, without an index, that all of them are there
required=$(.venv/bin/python -S -c '
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
if unknown := [name for name in sys.argv[1:] if name not in extras]:
    print(*unknown)
    sys.exit(1)
print(*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
' dev $(tr , ' ' <<<"$*")) || fail "no extra '$required' in pyproject.toml" "pyproject.toml 中没有 extra '$required'"
install() { .venv/bin/uv pip install --quiet --python .venv/bin/python --constraint constraints.txt "$@"; }
[[ -x .venv/bin/medasst ]] && install --offline -r - <<<"$required" 2>/dev/null && exit

mirror=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(.venv/bin/pip config get global.index-url 2>/dev/null || true)}}
[[ -z $mirror ]] || export UV_DEFAULT_INDEX=$mirror
if [[ ! -x .venv/bin/medasst ]]; then
  say "Installing into .venv: 5.8 GB, minutes the first time${mirror:+, from the mirror that pip or uv is set to}" \
    "正在安装到 .venv：5.8 GB，首次需要几分钟${mirror:+，使用 pip 或 uv 所设的镜像}"
  if [[ -t 2 ]]; then
    (while sleep 2; do printf '\r%6s MB ' "$(du -sm .venv | cut -f1)" >&2; done) &
    trap "kill $!" EXIT
  fi
fi
install -r - <<<"$required"
[[ -x .venv/bin/medasst ]] || install --no-deps --editable .
