#!/usr/bin/env bash
# A device's side: a SuperNode with its own key and its own data. Runs until it is stopped, and reconnects by itself.
#
#   deploy/supernode.sh FOLDER I NODES ADDRESS DATA [OPTION...]
#   deploy/supernode.sh ~/federation 0 3 server.example.org:8000 ~/data/mine
#
# FOLDER holds ca.crt and node<I>; I counts from 0 to NODES - 1 and is the node's partition id; ADDRESS is the server's
# (port 8000, or 9092 with flwr 1.39, where it speaks gRPC); DATA is the folder of this node's own files. OPTION:
#   --partitions LIST several partitions at this device ("0-4" or "0,3"), each a client with a folder of its own, DATA/0 and so
#                     on; I then names the key alone, and NODES is the number of all partitions
#   --require LIST    take part only in runs with secure-aggregation, example-privacy or both ("secure-aggregation")
#   --min-cohort N    only in sums of at least N nodes
#   --peers FILE      only in sums of nodes whose public keys are in FILE, one a line (node0.pub, ...); node<I> signs for this one
#   --max-epsilon N   only until the rows of this node have spent so much of differential privacy, in all runs
#   --app-hash HASH   run this app only; deploy/app-hash.sh prints the hash of a checkout
#   --port N          several nodes on one machine need a port each (9094)
#   --max-retries N, --max-wait-time SECONDS
set -euo pipefail
[ $# -ge 5 ] || { sed -n 4,5p "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
folder=$(cd "$1" && pwd) i=$2 nodes=$3 address=$4 data=$(cd "$5" && pwd)
shift 5
pin= policy= options=(--host 127.0.0.1) held="partition-id=$i"
while [ $# -gt 0 ]; do
  case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}";; esac
  [ $# -ge 2 ] || { echo "supernode.sh: $1 needs a value, or is not an option of this script." >&2; exit 2; }
  case $1 in
    --app-hash)
      [[ $2 =~ ^[0-9a-f]{64}$ ]] || { echo "supernode.sh: --app-hash '$2' is not 64 hexadecimal digits:" \
        "deploy/app-hash.sh prints the app's SHA-256." >&2; exit 2; }
      pin=$2;;
    --partitions)
      [[ $2 =~ ^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$ ]] || { echo "supernode.sh: --partitions '$2' is no list of partition" \
        "ids: write for instance 0-4 or 0,3." >&2; exit 2; }
      held="partitions='$2'" data="$data/{partition}";;
    --require)
      [[ $2 =~ ^[a-z,-]+$ ]] || { echo "supernode.sh: --require '$2' is no list of requirements: write for instance" \
        "secure-aggregation." >&2; exit 2; }
      policy+=" require='$2'";;
    --min-cohort | --max-epsilon)
      [[ $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || { echo "supernode.sh: $1 '$2' is no number." >&2; exit 2; }
      policy+=" ${1#--}=$2";;
    --peers)
      [ -f "$2" ] || { echo "supernode.sh: --peers '$2' is no file of public keys." >&2; exit 2; }
      policy+=" peers='$(realpath "$2")' key='$folder/node$i'";;
    --port | --max-retries | --max-wait-time) options+=("$1" "$2");;
    *) echo "supernode.sh: $1 is not among the options that this script knows to be safe: leave it out, or run" \
      "flower-supernode yourself." >&2; exit 2;;
  esac
  shift 2
done

warn() { echo "WARNING: $*" >&2; }
[ "$(id -u)" != 0 ] || warn "this SuperNode runs as root, and so does every app that the server hands out: use an" \
  "account of its own (docs/deploy.md, \"A device's own limits\")"
[ -n "$pin" ] || warn "this device runs every app that the server hands out; --app-hash limits it to one"
[ ! -w "${data%/\{partition\}}" ] || warn "$data can be changed by this account, and so by every app: make it read-only"
! command -v openssl >/dev/null || "$here/expiry.sh" "$folder/ca.crt"

umask 077
# Flower names an unpacked app by 8 of its 64 digits and takes one that is there already: here is only this one.
[ -z "$pin" ] || export FLWR_HOME="${FLWR_HOME:-$HOME/.flwr}/pinned-$pin"
child=
trap 'kill -TERM $child 2>/dev/null; wait; exit 0' TERM INT
# A device that went away without a farewell is taken for online for a minute, in which its key is refused: try again.
while true; do
  python -P "$here/guarded.py" supernode "${pin:-any}" --root-certificates "$folder/ca.crt" --auth-supernode-private-key "$folder/node$i" \
    --superlink "$address" --node-config "$held num-partitions=$nodes data-dir=\"$data\"$policy" "${options[@]}" &
  child=$!
  if wait $child; then exit 0; else code=$?; fi
  echo "the SuperNode ended with code $code; trying again in 10 s" >&2
  sleep 10 & child=$!
  wait $child
done
