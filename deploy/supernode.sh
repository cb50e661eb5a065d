#!/usr/bin/env bash
# A device's side: a SuperNode with its own key and its own data. Runs until it is stopped; started again, it goes on.
#
#   deploy/supernode.sh FOLDER I NODES ADDRESS DATA [OPTION...]
#   deploy/supernode.sh ~/federation 0 3 192.168.1.10:8000 ~/data/mine
#
# FOLDER holds ca.crt and node<I>; I counts from 0 to NODES - 1 and is the node's partition id; ADDRESS is the SuperLink's
# (port 8000, or 9092 with flwr 1.39, where it speaks gRPC); DATA is the folder of this node's own files. OPTION goes to
# flower-supernode: several nodes on one machine need a `--port` each.
set -euo pipefail
[ $# -ge 5 ] || { sed -n 4,5p "$0"; exit 2; }
folder=$(cd "$1" && pwd) i=$2 nodes=$3 address=$4 data=$(cd "$5" && pwd)
shift 5
child=
trap 'kill -TERM $child 2>/dev/null; wait; exit 0' TERM INT
# A device that went away without a farewell is taken for online for a minute, in which its key is refused: try again.
while true; do
  flower-supernode --root-certificates "$folder/ca.crt" --auth-supernode-private-key "$folder/node$i" \
    --superlink "$address" --node-config "partition-id=$i num-partitions=$nodes data-dir=\"$data\"" "$@" &
  child=$!
  if wait $child; then exit 0; else code=$?; fi
  echo "the SuperNode ended with code $code; again in 10 s" >&2
  sleep 10 & child=$!
  wait $child
done
