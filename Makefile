# Everything a person or a machine does with this project, one word each. `make` alone shows them.
# `make demo` and `make test` each work as the first command on a fresh Debian 12: what is missing is
# installed first, and what is there is left alone (a second call installs nothing and needs no network).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install develop apt apt-dev apt-bench apt-ceph boot test test-slow test-ceph test-lvm \
        lint demo bench lock clean

# The distribution's own interpreter: its libvirt and nbd modules are for no other.
PYTHON := /usr/bin/python3
VENV := .venv
RUN := $(VENV)/bin/python
LAB := $(RUN) -m lab.enter --
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
# So many labs `make test` has side by side. A test waits more than it works: more labs than cores.
LABS ?= 3
# Where `make demo` keeps its snapshots: a kind of server, which the lab starts, or the address of one of yours.
REPO ?=
# For pytest, as in: make test ARGS="-k units -x"
ARGS ?=

APT := libvirt-daemon-system libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients qemu-system-x86 \
       qemu-utils python3-libvirt python3-libnbd python3-venv util-linux iproute2 nbdkit nbdkit-plugin-python \
       python3-guestfs
APT_DEV := xfsprogs acl procps e2fsprogs rsync busybox-static cpio sqlite3 kmod libnbd-bin gnutls-bin \
           openssh-server samba curl openssl ovmf swtpm swtpm-tools systemd faketime \
           btrfs-progs dosfstools mtools ntfs-3g lvm2
# What `make bench` compares with, and nothing else needs.
APT_BENCH := guestfish restic borgbackup virtnbdbackup smbclient
# A cluster of one node, and QEMU's way to it, for `make test-ceph`.
APT_CEPH := ceph-mon ceph-osd ceph-common qemu-block-extra

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: apt $(VENV)/.installed ## what stillframe needs to run: Debian packages and .venv

develop: apt-dev $(VENV)/.developed ## install, and what tests, demo and benchmarks need

test: develop boot ## every test but the slow ones and those on Ceph or LVM (root: the lab has its own namespaces)
ifeq ($(strip $(ARGS)),)
	@$(RUN) -m lab.share $(LABS) build
else
	$(LAB) $(RUN) -m pytest $(ARGS)
endif

test-slow: develop boot ## the tests that take minutes
	$(LAB) $(RUN) -m pytest -m slow $(ARGS)

test-ceph: develop apt-ceph boot ## the tests with disks on Ceph RBD, on a cluster of their own
	$(LAB) $(RUN) -m pytest -m ceph $(ARGS)

test-lvm: develop boot ## the tests with disks on LVM, in a guest with device-mapper (emulated: slow)
	$(RUN) -m lab.machine -- $(LAB) $(RUN) -m pytest -m lvm --timeout 1800 $(ARGS)

lint: develop ## ruff, mypy, import-linter (they are part of make test too)
	$(VENV)/bin/ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

demo: develop boot ## mirror a live guest, kill a run, recover; snapshots, a drill (REPO=s3|sftp|smb|URL: kept there)
	$(RUN) -m lab.enter $(if $(findstring ://,$(REPO)),--network) -- $(RUN) -m lab.demo $(if $(REPO),'$(REPO)')

bench: develop apt-bench boot ## measure, side by side with other tools in the same run
	$(LAB) $(RUN) -m bench.mirror $(ARGS)
	$(LAB) $(RUN) -m bench.freeze
	$(LAB) $(RUN) -m bench.repository $(ARGS)
	$(LAB) $(RUN) -m bench.incremental $(ARGS)
	$(LAB) $(RUN) -m bench.restore
	$(LAB) $(RUN) -m bench.files
	$(LAB) $(RUN) -m bench.storage
	$(RUN) -m bench.standing
	$(LAB) $(RUN) -m bench.prune --folder /var/tmp

# Here, not inside: the lab has no network. Quick, and offline, once .cache/lab holds what guests boot.
boot: develop
	@$(RUN) -m lab.fetch

# Looks first, so that it is quick and works offline once all is there. RUNLEVEL=1: no service is started.
define apt_install
@missing=$$(comm -13 <(dpkg-query -W -f '$${db:Status-Status} $${Package}\n' $(1) 2>/dev/null \
	| sed -n 's/^installed //p' | sort -u) <(printf '%s\n' $(1) | sort -u)); \
if [ -n "$$missing" ]; then \
	echo "Installing Debian packages:" $$missing; \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get update -qq; \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $$missing; \
fi
endef

apt:
	$(call apt_install,$(APT))

apt-dev:
	$(call apt_install,$(APT) $(APT_DEV))

apt-bench: apt-dev
	$(call apt_install,$(APT_BENCH))

apt-ceph: apt-dev
	$(call apt_install,$(APT_CEPH))

# The environment is a function of the lock files: when one changed it is made anew, so that nothing old
# stays in it. Distribution packages show through (libvirt, nbd); what is locked is installed over them.
$(VENV)/.made: requirements.lock requirements-dev.lock | apt
	$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	@touch $@

$(VENV)/.locked: $(VENV)/.made
	$(RUN) -m pip install --quiet --ignore-installed --no-deps --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	$(RUN) -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	@touch $@

# apt-dev as an order-only prerequisite: it comes first, but being phony never makes this stale.
$(VENV)/.developed: $(VENV)/.installed requirements-dev.lock | apt-dev
	$(RUN) -m pip install --quiet --ignore-installed --no-deps --require-hashes -r requirements-dev.lock
	@touch $@

# Versions and hashes from PyPI alone: this machine's pip configuration (mirrors, local wheels) stays out.
PIP_TOOLS := 7.6.2
COMPILE = env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null CUSTOM_COMPILE_COMMAND="make lock" \
	build/lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --build-deps-for editable \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host $(ARGS)

lock: apt ## refresh both lock files (ARGS=--upgrade, or ARGS="-P rich")
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet pip-tools==$(PIP_TOOLS)
	$(COMPILE) --output-file requirements.lock pyproject.toml
	$(COMPILE) --extra dev --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml

clean: ## remove what make and the tools wrote here
	rm -rf $(VENV) build .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
