#!/bin/sh
# Every method's reference recipe as written, one after another, on one base. What is finished is not made again, and a run that
# was stopped goes on. From the repository root, after training/reference/make_corpus.py:
#   training/reference/make_methods.sh [BASE] [FOLDER] [NAME ...]
# BASE: a model folder; a gated one counts as its weights (default: examples/reference-dcp).
set -eu
base=${1:-examples/reference-dcp}
out=${2:-build/reference}
[ $# -gt 2 ] && shift 2 || set -- ftp ltp-prompt acc-prompt ltp acc shadow ftp-prompt
for name in "$@"; do
    [ -f "$out/$name/config.json" ] && continue
    "${BIN:-.venv/bin}/vllm-prune" train "examples/recipes/$name-reference.yaml" --set model="$base" --set output="$out/$name" \
        >>"$out/$name.log" 2>&1 || echo "$name failed, see $out/$name.log"
done
