# shellcheck shell=bash
# Sourced. took: the seconds since then, by a clock that nobody sets, as somebody may set that of $SECONDS.
now() {
    if [ -r /proc/uptime ]; then
        cut -d . -f 1 /proc/uptime
    else
        date +%s
    fi
}
BEGAN=$(now)

took() {
    echo $(($(now) - BEGAN))
}
