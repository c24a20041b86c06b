#!/usr/bin/env bash
# Runs a static x86-64 Linux program (-static -no-pie, one thread) on an emulated CPU with AVX-512,
# AVX-512-BF16 and AMX: Bochs' Sapphire Rapids. Prints the program's output; the exit status is the
# program's.
#
#   tools/run_in_bochs.sh PROGRAM [ARGUMENT...]      arguments without spaces
#
# FLASH_ATTENTION_* variables and GLIBC_TUNABLES pass into the program's environment. Of its own:
#   FLASH_ATTN_BOCHS_DIR      where Bochs lives (~/.cache/flash_attn/bochs, 350 MB)
#   FLASH_ATTN_BOCHS_CPU      another of Bochs' CPUs: corei7_skylake_x (AVX-512), arrow_lake (AVX2)
#   FLASH_ATTN_BOCHS_SECONDS  limit of the run (900)
#
# The first run downloads Bochs, GRUB and all they need from Debian; nothing is installed and root
# is not needed. The host needs apt-get, debian-archive-keyring, gcc, xorriso and script (bsdutils).
set -euo pipefail
if [[ $# -eq 0 ]]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  exit 2
fi
program=$(readlink -f "$1")
shift
sources=$(dirname "$(readlink -f "$0")")/bochs
cache=${FLASH_ATTN_BOCHS_DIR:-$HOME/.cache/flash_attn/bochs}
suite=trixie  # Bochs 3.0
root=$cache/root
lib=$root/usr/lib/x86_64-linux-gnu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# An apt of its own: other lists, no installed packages.
download() {
  echo "downloading Bochs, GRUB and what they need from Debian $suite into $cache" >&2
  local apt=$cache/apt keys=/usr/share/keyrings/debian-archive-keyring.gpg
  mkdir -p "$apt"/{empty,lists/partial,archives/partial} "$cache/root.new"
  echo "deb [signed-by=$keys] http://deb.debian.org/debian $suite main" > "$apt/sources.list"
  cat > "$apt/apt.conf" << END
APT::Architecture "amd64";
APT::Install-Recommends "0";
APT::Sandbox::User "$(id -un)";
Debug::NoLocking "1";
Dir::Cache "$apt";
Dir::Cache::Archives "$apt/archives";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "$apt/empty";
Dir::Etc::SourceList "$apt/sources.list";
Dir::Etc::SourceParts "$apt/empty";
Dir::State::Lists "$apt/lists";
Dir::State::Status "/dev/null";
END
  export APT_CONFIG=$apt/apt.conf
  apt-get -qq update >&2
  apt-get -qq -y --download-only install bochs bochs-term bochsbios vgabios \
    grub-common grub-pc-bin >&2
  for package in "$apt"/archives/*.deb; do dpkg -x "$package" "$cache/root.new"; done
  mv "$cache/root.new" "$root"
  rm -r "$apt"
}

# Runs a downloaded program with the libraries downloaded with it.
downloaded() {
  "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$@"
}

# A bootable CD: GRUB, the kernel of tools/bochs, the program.
make_cd() {
  local boot=$work/cd/boot
  mkdir -p "$boot/grub"
  gcc -std=gnu11 -O2 -ffreestanding -fno-builtin -fno-pic -fno-stack-protector -mno-red-zone \
    -mgeneral-regs-only -nostdlib -static -no-pie -Wl,-T,"$sources/kernel.ld" \
    -Wl,--build-id=none -Wl,-z,max-page-size=4096 -Wl,--no-warn-rwx-segments \
    -o "$boot/kernel" "$sources/boot.S" "$sources/kernel.c"
  cp "$program" "$boot/program"
  {
    echo 'multiboot /boot/kernel'
    echo "module /boot/program $(env | grep -E '^(FLASH_ATTENTION_|GLIBC_TUNABLES=)' | tr '\n' ' ') program $*"
    echo 'boot'
  } > "$boot/grub/grub.cfg"
  downloaded "$root/usr/bin/grub-mkimage" -d "$root/usr/lib/grub/i386-pc" -O i386-pc-eltorito \
    -p /boot/grub -o "$boot/eltorito.img" biosdisk iso9660 multiboot normal configfile boot
  xorriso -as mkisofs -quiet -R -o "$work/boot.iso" -b boot/eltorito.img -no-emul-boot \
    -boot-load-size 4 -boot-info-table "$work/cd"
}

configure() {
  cat > "$work/bochsrc" << END
config_interface: textconfig
display_library: term
romimage: file=$root/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=$root/usr/share/vgabios/vgabios.bin
cpu: model=${FLASH_ATTN_BOCHS_CPU:-sapphire_rapids}, ips=100000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
clock: sync=none, time0=local
log: $work/log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
speaker: enabled=0
END
}

# Bochs wants a terminal for its screen; the program writes to the serial port.
run() {
  local bochs="$lib/ld-linux-x86-64.so.2 --library-path $lib $root/usr/bin/bochs-bin"
  touch "$work/serial"
  tail -f -n +1 "$work/serial" &
  local follower=$!
  LTDL_LIBRARY_PATH=$lib/bochs/plugins BXSHARE=$root/usr/share/bochs TERM=xterm \
    timeout "${FLASH_ATTN_BOCHS_SECONDS:-900}" \
    script -qfc "exec $bochs -q -f $work/bochsrc" /dev/null < /dev/null > "$work/screen" 2>&1 ||
    true  # Bochs ends with an error whenever the machine is switched off
  sleep 1
  kill "$follower"
  wait "$follower" 2> /dev/null || true
}

[[ -d $root ]] || download
make_cd "$@" 2> "$work/errors" || { cat "$work/errors" >&2; exit 1; }
configure
run
status=$(sed -n 's/^exit status \([0-9]*\).*/\1/p' "$work/serial" | tail -1)
if [[ -z $status ]]; then
  echo 'the program did not end in time, or the machine failed; the end of its log:' >&2
  tail -5 "$work/log" >&2
  exit 124
fi
exit "$status"
