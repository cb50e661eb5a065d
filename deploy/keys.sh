#!/usr/bin/env bash
# Make what a federation needs to trust itself: a certificate authority, the SuperLink's TLS certificate, one key a node.
#
#   deploy/keys.sh FOLDER NODES HOST...      deploy/keys.sh ~/federation 3 localhost 192.168.1.10
#
# HOST: every name or address under which nodes reach the SuperLink. A device gets FOLDER/ca.crt and its own
# FOLDER/node<i>, and nothing else; ca.key and server.key stay where they are.
set -euo pipefail
[ $# -ge 3 ] || { sed -n 4p "$0"; exit 2; }
folder=$1 nodes=$2
shift 2
mkdir -p "$folder"
cd "$folder"
umask 077

names=""
for host in "$@"; do
  if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then names+=",IP:$host"; else names+=",DNS:$host"; fi
done

# With the authority that is there already, so that the devices' ca.crt stays good when one more device is added.
[ -f ca.key ] || openssl req -x509 -newkey rsa:3072 -nodes -days 825 -subj "/CN=FedKRSO CA" -keyout ca.key -out ca.crt 2>/dev/null
openssl req -newkey rsa:3072 -nodes -subj "/CN=$1" -keyout server.key -out server.csr 2>/dev/null
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 -out server.pem \
  -extfile <(printf 'subjectAltName=%s\n' "${names:1}") 2>/dev/null
rm server.csr

for ((i = 0; i < nodes; i++)); do
  [ -f "node$i" ] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "node$i" -f "node$i"
done
echo "$PWD: ca.crt, server.pem for $*, and keys for $nodes nodes"
