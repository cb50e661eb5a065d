#!/usr/bin/env bash
# A node's key counts no more: its device was lost, or is to have a new key. On the server, while the SuperLink runs.
#
#   deploy/revoke.sh FOLDER NAME I      deploy/revoke.sh ~/federation devices 1
#
# NAME is the connection that deploy/register.sh wrote. The old key moves to FOLDER/revoked/. For a new key of the same
# number: deploy/keys.sh, deploy/register.sh, and the device gets the new FOLDER/node<I>.
set -euo pipefail
[ $# -eq 3 ] || { sed -n 4p "$0"; exit 2; }
folder=$(cd "$1" && pwd) name=$2 node=node$3
[ -s "$folder/$node.id" ] || { echo "revoke.sh: $folder/$node.id is missing: that node is not registered" >&2; exit 1; }
id=$(cat "$folder/$node.id")
flwr supernode unregister "$id" "$name"
umask 077
mkdir -p "$folder/revoked/$id"
mv "$folder/$node" "$folder/$node.pub" "$folder/$node.id" "$folder/revoked/$id/"
echo "$node: revoked; its files are in $folder/revoked/$id"
