#!/usr/bin/env bash
# Make what a federation needs to trust itself: a certificate authority, the SuperLink's TLS certificate, one key per node.
#
#   deploy/keys.sh FOLDER NODES [HOST...]      deploy/keys.sh ~/federation 3 server.example.org 192.0.2.10
#
# HOST: every name or address under which devices reach the server. Run again, it keeps the authority and every key that
# is there, makes the keys that are missing, and makes a new server certificate only if HOST is given. A device gets
# FOLDER/ca.crt and its own FOLDER/node<i>, and nothing else.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 4p "$0"; exit 2; }
folder=$1 nodes=$2
shift 2
umask 077
mkdir -p "$folder"
cd "$folder"
[ -f server.pem ] || [ $# -ge 1 ] || { echo "keys.sh: name the HOST under which devices reach the server" >&2; exit 2; }

# The authority outlives the certificates that it signs, so that devices keep their ca.crt.
[ -f ca.key ] || openssl req -x509 -newkey rsa:3072 -nodes -days 3650 -subj "/CN=FedKRSO CA" -keyout ca.key -out ca.crt \
  -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
if [ $# -ge 1 ]; then
  names="DNS:localhost,IP:127.0.0.1"  # the owner's own commands, and the proxy's
  for host in "$@"; do
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then names+=",IP:$host"; else names+=",DNS:$host"; fi
  done
  openssl req -newkey rsa:3072 -nodes -subj "/CN=$1" -keyout server.key -out server.csr 2>/dev/null
  openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 -out server.pem -extfile <(
    printf '%s\n' "subjectAltName=$names" "basicConstraints=critical,CA:FALSE" "extendedKeyUsage=serverAuth" \
      "keyUsage=critical,digitalSignature,keyEncipherment" "subjectKeyIdentifier=hash" "authorityKeyIdentifier=keyid"
  ) 2>/dev/null
  rm server.csr
fi

for ((i = 0; i < nodes; i++)); do
  [ -f "node$i" ] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "node$i" -f "node$i"
done
echo "$PWD: ca.crt, server.pem${*:+ for $*}, and keys for $nodes nodes"
