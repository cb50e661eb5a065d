#!/usr/bin/env bash
# Tell a running SuperLink which nodes may come, and `flwr run` where the SuperLink is. Again after each new key.
#
#   deploy/register.sh FOLDER NAME ADDRESS      deploy/register.sh ~/federation devices 127.0.0.1:8001
#
# Writes the connection NAME to Flower's config.toml ($FLWR_HOME or ~/.flwr), then registers every FOLDER/node<i>.pub that
# is not registered yet. FOLDER/node<i>.id holds the id that the SuperLink gave it.
set -euo pipefail
[ $# -eq 3 ] || { sed -n 4p "$0"; exit 2; }
folder=$(cd "$1" && pwd) name=$2 address=$3
flwr config list >/dev/null  # writes Flower's own config.toml, with its default connection, where there is none
config=${FLWR_HOME:-$HOME/.flwr}/config.toml
if ! grep -qF "[superlink.$name]" "$config"; then
  printf '\n[superlink.%s]\naddress = "%s"\nroot-certificates = "%s"\n' "$name" "$address" "$folder/ca.crt" >> "$config"
elif ! grep -FA 9 "[superlink.$name]" "$config" | grep -qF "\"$address\""; then
  echo "register.sh: $config has a connection $name with another address than $address: choose another NAME" >&2
  exit 1
fi
known=$(flwr supernode list "$name" --format json)
grep -q '"success": true' <<< "$known" || { echo "register.sh: no SuperLink at $address: $known" >&2; exit 1; }
failed=0
shopt -s nullglob
for key in "$folder"/node*.pub; do
  id=${key%.pub}.id
  if [ -s "$id" ] && grep -qF "\"$(cat "$id")\"" <<< "$known"; then continue; fi
  if answer=$(flwr supernode register "$key" "$name" --format json) &&
    grep -oE '"node-id": *"?[0-9]+' <<< "$answer" | grep -oE '[0-9]+$' > "$id"; then
    echo "$key: node $(cat "$id")"
  else
    echo "$key was not registered: $answer" >&2
    rm -f "$id"
    failed=1
  fi
done
exit $failed
