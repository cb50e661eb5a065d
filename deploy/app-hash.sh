#!/usr/bin/env bash
# Print the SHA-256 of the app in this checkout as `flwr run` sends it out: what deploy/supernode.sh takes as --app-hash.
# The app is made of all Python, Markdown, TOML, YAML and JSON files that git does not ignore: use a clean clone.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd) scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
flwr build --app "$root" >&2
sha256sum ./*.fab | cut -d' ' -f1
