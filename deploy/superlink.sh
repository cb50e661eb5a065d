#!/usr/bin/env bash
# The server's side: a SuperLink that takes only nodes whose key is registered, over TLS. Runs until it is stopped.
#
#   deploy/superlink.sh FOLDER [OPTION...]      FOLDER: what deploy/keys.sh made
#
# Its state (registered nodes, runs) lies in FOLDER/superlink.db and outlives a restart. OPTION goes to flower-superlink,
# for instance `--host 0.0.0.0` to be reached from other machines.
set -euo pipefail
[ $# -ge 1 ] || { sed -n 4p "$0"; exit 2; }
folder=$(cd "$1" && pwd)
shift
exec flower-superlink \
  --ssl-ca-certfile "$folder/ca.crt" --ssl-certfile "$folder/server.pem" --ssl-keyfile "$folder/server.key" \
  --enable-supernode-auth --disable-runtime-dependency-installation --database "$folder/superlink.db" "$@"
