#!/usr/bin/env bash
# What devices connect to: nginx, which lets the requests of SuperNodes through to the SuperLink and nothing else.
#
#   deploy/proxy.sh FOLDER [PORT [SUPERLINK-PORT]]      deploy/proxy.sh ~/federation 8000 8001
#
# Runs until it is stopped, without root. PORT (8000) is open to the network; SUPERLINK-PORT (8001) is the one of
# deploy/superlink.sh, on loopback. FOLDER/proxy.log lists the requests that it refused. Not needed with flwr 1.39.
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 3 ] || { sed -n 4p "$0"; exit 2; }
here=$(cd "$(dirname "$0")" && pwd) folder=$(cd "$1" && pwd) public=${2:-8000} superlink=${3:-8001}
nginx=$(PATH=$PATH:/usr/sbin command -v nginx) || { echo "nginx is not installed: apt-get install nginx-light" >&2; exit 1; }
"$here/expiry.sh" "$folder/ca.crt" "$folder/server.pem"
umask 077
sed "s/PUBLIC/$public/; s/SUPERLINK\\$/$superlink\$/" "$here/nginx.conf" > "$folder/proxy.conf"
user=
[ "$(id -u)" != 0 ] || user="user root;"  # FOLDER is open to its owner only
exec "$nginx" -e stderr -p "$folder" -c "$folder/proxy.conf" -g "daemon off; $user"
