#!/bin/busybox sh
# Process 1 of the machine that lab/machine.py boots, until it hands over to the command: the host's files as
# root, read through virtiofs, below a file system in memory that takes what is written.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in /modules/*; do insmod "$module"; done
mkdir -p /host /written /root
mount -t virtiofs -o ro host /host
mount -t tmpfs none /written
mkdir /written/upper /written/work
mount -t overlay -o lowerdir=/host,upperdir=/written/upper,workdir=/written/work none /root
mount -t proc none /root/proc
mount -t sysfs none /root/sys
mount -t devtmpfs none /root/dev
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs none /root/dev/shm
mount -t devpts none /root/dev/pts
# The command lies in the host's /var/tmp, which is hidden from here on.
command=$(sed -n "s/.*stillframe\.command=\([^ ]*\).*/\1/p" /proc/cmdline)
for folder in tmp var/tmp run; do mount -t tmpfs none "/root/$folder"; done
cp "/host$command" /root/run/command
exec switch_root /root /bin/bash /run/command
