#!/bin/sh
# What a Valkey pod of the chart runs: `start`, `ping` for its probes, `ask COMMAND...` for operators.
#
# valkey.conf has the settings; what only the pod knows comes on top. A shard of a cluster is the same
# node after each start: its name and its slots follow from its pod's name. So nothing about the
# cluster needs a disk, no job has to join the shards, and one that comes back takes its place again.
set -eu
umask 077

ask() {
    # The password is in REDISCLI_AUTH: command lines are visible to the node.
    # shellcheck disable=SC2086
    valkey-cli -h "$POD_IP" -p "$PORT" ${TLS_DIR:+--tls --cacert "$TLS_DIR/ca.crt"} "$@"
}

# Write the file in which a node finds who it is.
become_shard() {
    first=$((16384 * number / SHARDS))
    last=$((16384 * (number + 1) / SHARDS - 1))
    id=$(printf '%s' "$POD_NAME.$NODES_DOMAIN" | sha1sum | cut -c1-40)
    address="$POD_IP:$PORT@$((PORT + 10000)),$POD_NAME.$NODES_DOMAIN"
    {
        echo "$id $address myself,master - 0 0 $((number + 1)) connected $first-$last"
        echo "vars currentEpoch $SHARDS lastVoteEpoch 0"
    } > "$DATA_DIR/nodes.conf"
    {
        echo "cluster-announce-ip $POD_IP"
        echo "cluster-announce-hostname $POD_NAME.$NODES_DOMAIN"
    } >> "$conf"
}

# Introduce this node to the shards that it has no link to. Pods get new addresses when they come
# back, so this never ends while the server runs.
meet_peers() {
    linked=$(ask cluster nodes | grep ' connected' || true)
    peer=0
    while [ "$peer" -lt "$SHARDS" ]; do
        found=$(getent hosts "${POD_NAME%-*}-$peer.$NODES_DOMAIN" || true)
        ip=${found%%[[:space:]]*}
        case "$peer $linked" in
            "$number "*) ;;
            *" $ip:$PORT@"*) ;;
            *) [ -z "$ip" ] || ask cluster meet "$ip" "$PORT" || true ;;
        esac
        peer=$((peer + 1))
    done
}

# Certificates are renewed under the running server.
reload_certificates() {
    now=$(cat "$TLS_DIR/tls.crt" "$TLS_DIR/tls.key" "$TLS_DIR/ca.crt" | sha1sum)
    if [ "$now" != "$certificates" ]; then
        ask config set tls-cert-file "$TLS_DIR/tls.crt" tls-key-file "$TLS_DIR/tls.key" \
            tls-ca-cert-file "$TLS_DIR/ca.crt" && certificates=$now
    fi
}

look_after() {
    certificates=
    while sleep "$LOOK_SECONDS" && kill -0 $$ 2> /dev/null; do
        [ "$SHARDS" -eq 1 ] || meet_peers
        [ -z "${TLS_DIR:-}" ] || reload_certificates || true
    done
}

start() {
    conf=$RUN_DIR/valkey.conf
    number=${POD_NAME##*-}
    cp "$CONF_DIR/valkey.conf" "$conf"
    {
        printf 'requirepass %s\n' "$REDISCLI_AUTH"
        echo "bind $POD_IP"
        echo "dir $DATA_DIR"
    } >> "$conf"
    [ "$SHARDS" -eq 1 ] || become_shard
    [ "$SHARDS${TLS_DIR:-}" = 1 ] || look_after > /dev/null 2>&1 &
    exec valkey-server "$conf"
}

case "$1" in
    start) start ;;
    ping) [ "$(ask ping)" = PONG ] ;;
    ask)
        shift
        ask "$@"
        ;;
esac
