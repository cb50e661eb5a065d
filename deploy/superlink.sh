#!/usr/bin/env bash
# The server's side: a SuperLink that takes only nodes whose key is registered, over TLS. Runs until it is stopped.
#
#   deploy/superlink.sh FOLDER [OPTION...]      FOLDER: what deploy/keys.sh made
#
# It listens on this machine's loopback only, since whoever reaches its port can start runs: devices come in by
# deploy/proxy.sh. With flwr 1.39, whose SuperNodes have a port of their own, that port (9092) is open to the network.
# Its state (registered nodes, runs, messages) lies in FOLDER/superlink.db and outlives a restart. OPTION: --port N (8001),
# --fleet-api-address HOST:PORT (0.0.0.0:9092, flwr 1.39 only), --log-file FILE, --log-rotation-interval-hours N,
# --log-rotation-backup-count N.
set -euo pipefail
[ $# -ge 1 ] || { sed -n 4p "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd) folder=$(cd "$1" && pwd)
shift
refuse() { echo "superlink.sh: $*" >&2; exit 2; }
version=$(flower-superlink --version)
options=(--host 127.0.0.1 --port 8001)
[[ $version != *" 1.39."* ]] || options+=(--fleet-api-address 0.0.0.0:9092)

# Flower takes the last of two equal options, and any unique beginning of one: only what is listed here is passed on.
while [ $# -gt 0 ]; do
  case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}";; esac
  case $1 in
    --host | --control-api-address)
      [[ ${2-} =~ ^(127\.[0-9.]+|localhost|\[?::1\]?)(:[0-9]+)?$ ]] || refuse "$1 ${2-} would let everyone who reaches" \
        "this machine start runs on its devices: leave it out, and let devices in by deploy/proxy.sh.";;
    --insecure)
      refuse "--insecure would send updates in the clear and take any node: leave it out, deploy/keys.sh makes the keys.";;
    --fleet-api-address)
      [[ $version == *" 1.39."* ]] || refuse "$1 is an option of flwr 1.39: leave it out, and let devices in by" \
        "deploy/proxy.sh.";;
    --port | --log-file | --log-rotation-interval-hours | --log-rotation-backup-count) ;;
    *) refuse "$1 is not among the options that this script knows to be safe: leave it out, or run flower-superlink yourself.";;
  esac
  [ $# -ge 2 ] || refuse "$1 needs a value."
  options+=("$1" "$2")
  shift 2
done

"$here/expiry.sh" "$folder/ca.crt" "$folder/server.pem"
umask 077
# Runs say in their own log when a certificate is about to end.
export FEDKRSO_CERTIFICATE="$folder/ca.crt:$folder/server.pem"
# Either variable would open a further port to the network.
unset FLWR_INTERNAL_GRPC_CONTROL_API FLWR_INTERNAL_GRPC_FLEET_API
exec python -P "$here/guarded.py" superlink \
  --ssl-ca-certfile "$folder/ca.crt" --ssl-certfile "$folder/server.pem" --ssl-keyfile "$folder/server.key" \
  --enable-supernode-auth --disable-runtime-dependency-installation --database "$folder/superlink.db" "${options[@]}"
