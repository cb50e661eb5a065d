#!/usr/bin/env bash
# Tell a running SuperLink which nodes may come, and `flwr run` where the SuperLink is. Once for each federation.
#
#   deploy/register.sh FOLDER NAME ADDRESS      deploy/register.sh ~/federation devices 127.0.0.1:8000
#
# Writes the connection NAME to Flower's config.toml ($FLWR_HOME or ~/.flwr), then registers every FOLDER/node*.pub.
set -euo pipefail
[ $# -eq 3 ] || { sed -n 4p "$0"; exit 2; }
folder=$(cd "$1" && pwd) name=$2 address=$3
config=${FLWR_HOME:-$HOME/.flwr}/config.toml
mkdir -p "$(dirname "$config")"
touch "$config"
if ! grep -qF "[superlink.$name]" "$config"; then
  printf '\n[superlink.%s]\naddress = "%s"\nroot-certificates = "%s"\n' "$name" "$address" "$folder/ca.crt" >> "$config"
fi
for key in "$folder"/node*.pub; do
  flwr supernode register "$key" "$name" || echo "$key: not registered anew" >&2
done
