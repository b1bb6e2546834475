#!/usr/bin/env bash
# Peak memory and times of bevel on MODEL.gguf ...; prints a table. Needs GNU time.
#
#     cargo build --release && benches/footprint.sh MODEL.gguf ... > benches/runs/footprint.txt
set -euo pipefail
bevel=${BEVEL:-$(dirname "$0")/../target/release/bevel}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

measure() { # label, command...
    local label=$1
    shift
    /usr/bin/time -o "$out/time" -f '%e %M' "$@" >/dev/null 2>"$out/log" || { cat "$out/log" >&2; exit 1; }
    read -r seconds kib <"$out/time"
    printf '  %-44s %8s s %9s MB peak\n' "$label" "$seconds" "$((kib * 1024 / 1000000))"
}

grep -m1 'model name' /proc/cpuinfo | sed 's/.*: /machine: /'
for model in "$@"; do
    printf '\n%s, %s MB\n' "$(basename "$model")" "$(($(stat -L -c %s "$model") / 1000000))"
    measure "inspect" "$bevel" inspect "$model"
    measure "run, one token (context 2048)" "$bevel" run "$model" Hello --temp 0 -n 1 --ctx 2048
    measure "run, 64 tokens (context 2048)" "$bevel" run "$model" Hello --temp 0 -n 64 --ctx 2048
    measure "quantize to Q8_0" "$bevel" quantize "$model" Q8_0 -o "$out/q.gguf" --force
    measure "convert to f16 GGUF" "$bevel" convert "$model" --dtype f16 -o "$out/f16.gguf"
    measure "convert to a Hugging Face directory" "$bevel" convert "$model" -o "$out/hf"
    rm -rf "$out"/*
done
