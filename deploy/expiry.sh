#!/usr/bin/env bash
# Says which certificates end within a week, or have ended. Called at every start of the other scripts.
#
#   deploy/expiry.sh FILE...
set -euo pipefail
for file in "$@"; do
  openssl x509 -in "$file" -noout -checkend $((7 * 24 * 3600)) >/dev/null || echo "WARNING: $file is valid until" \
    "$(openssl x509 -in "$file" -noout -enddate | cut -d= -f2); docs/deploy.md, \"Keys\", says how to renew it" >&2
done
