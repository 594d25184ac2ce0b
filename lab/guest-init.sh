#!/bin/busybox sh
# Process 1 of the database guest. What it does is told on the kernel's command line:
#   (nothing)              write rows to the database on vda and acknowledge each on the console
#   stillframe.pause=S     the same, with S seconds between rows instead of as many as the machine can
#   stillframe.counter=1   write a counter to vda, then vdb, and acknowledge it
#   stillframe.check=1     look whether the database on vda is whole, say so, power off
# Every line for the host begins with a word in capitals.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in /modules/*; do insmod "$module"; done

setting() {
	sed -n "s/.*stillframe\.$1=\([^ ]*\).*/\1/p" /proc/cmdline
}

# To read where nothing ever comes is a pause that needs no process.
mkfifo /run/never
exec 4<>/run/never
rest() {
	read -r -t "$1" _ <&4
}

wait_path() {
	tries=0
	until [ -e "$1" ]; do
		tries=$((tries + 1))
		[ $tries -gt 500 ] && echo "FAILED no $1" && poweroff -f
		rest 0.02
	done
}

port_named() {
	for port in /sys/class/virtio-ports/*; do
		[ "$(cat "$port/name" 2>/dev/null)" = "$1" ] && echo "/dev/${port##*/}"
	done
}

write_rows() {
	# One sqlite3 for ever: a process for each row would be many times slower. With -bail an INSERT
	# that fails ends it, so no row is acknowledged that is not durable.
	payload=$(setting payload)
	pause=$(setting pause)
	row="INSERT INTO rows SELECT coalesce(max(n),0)+1, strftime('%Y-%m-%dT%H:%M:%fZ'), randomblob(${payload:-256}) FROM rows; SELECT 'ACK '||max(n) FROM rows;"
	{
		echo "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
		echo "CREATE TABLE IF NOT EXISTS rows(n INTEGER PRIMARY KEY, at TEXT, payload BLOB);"
		[ -z "$pause" ] && exec yes "$row"
		while echo "$row"; do rest "$pause"; done
	} | sqlite3 -batch -bail /data/rows.db
	echo "WRITER ended"
}

write_counters() {
	n=$(dd if=/dev/vda bs=512 count=1 2>/dev/null | tr -cd 0-9)
	n=${n:-0}
	while :; do
		n=$((n + 1))
		for disk in vda vdb; do
			printf '%-512s' $n | dd of=/dev/$disk bs=512 count=1 oflag=direct conv=fsync,notrunc 2>/dev/null || { echo "WRITER ended"; return; }
		done
		echo "ACK $n"
	done
}

one_word() {
	tr -s ' \n\r' '___' | cut -c1-200 | sed 's/_$//'
}

check() {
	counts=
	if mount -t ext4 /dev/vda /data; then
		integrity=$(sqlite3 -batch /data/rows.db 'PRAGMA integrity_check' 2>&1 | one_word)
		counts=$(sqlite3 -batch /data/rows.db "SELECT 'rows='||count(*)||' min='||coalesce(min(n),0)||' max='||coalesce(max(n),0) FROM rows" 2>&1)
		umount /data
	else
		integrity=not-mountable
	fi
	case $counts in
	rows=*) ;;
	*)
		[ "$integrity" = ok ] && integrity=$(echo "$counts" | one_word)
		counts="rows=0 min=0 max=0"
		;;
	esac
	echo "CHECK vda integrity=${integrity:-none} $counts"
}

if [ -n "$(setting check)" ]; then
	wait_path /dev/vda
	check
	poweroff -f
fi

wait_path /dev/vda
if [ -n "$(setting counter)" ]; then
	wait_path /dev/vdb
	write_counters &
else
	if mount -t ext4 /dev/vda /data; then write_rows & else echo "FAILED mount"; fi
fi

agent=
port=$(port_named org.qemu.guest_agent.0)
if [ -n "$port" ]; then
	wait_path "$port"
	qemu-ga --method=virtio-serial --path="$port" --statedir=/run --pidfile=/run/qemu-ga.pid --logfile=/run/qemu-ga.log &
	agent=$!
fi

commands=$(port_named stillframe.lab.0)
wait_path "$commands"
# Held open for good: the kernel throws away what arrived at a port that is being closed, and a host that
# connects between a read that found nobody and its close would lose its command.
exec 3<"$commands"
echo "READY"
while :; do
	# A read ends at once while no host is connected: hence the pause.
	if ! read -r number command <&3; then
		rest 0.1
		continue
	fi
	case $command in
	AGENT-STOP) kill -STOP "$agent" ;;
	AGENT-CONT) kill -CONT "$agent" ;;
	AGENT-KILL) kill -KILL "$agent" ;;
	SYNC) sync ;;
	NOTHING) ;;
	POWEROFF) echo "DONE $number 0"; /sbin/shutdown ;;
	*) false ;;
	esac
	echo "DONE $number $?"
done
