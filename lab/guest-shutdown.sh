#!/bin/busybox sh
# What qemu-ga runs for guest-shutdown: end the writer, leave a clean file system, power off.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
exec </dev/null >/dev/ttyS0 2>&1
echo "SHUTDOWN begins"
killall yes sqlite3 dd 2>/dev/null
tries=0
while mountpoint -q /data 2>/dev/null || grep -q ' /data ' /proc/mounts; do
	umount /data 2>/dev/null
	tries=$((tries + 1))
	[ $tries -gt 300 ] && echo "FAILED umount" && break
	usleep 50000
done
sync
echo "SHUTDOWN clean"
case "$*" in *-r*) reboot -f ;; *) poweroff -f ;; esac
