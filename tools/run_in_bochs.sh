#!/bin/bash
# Runs a static x86-64 Linux program (-static -no-pie, one thread) on an emulated CPU with AVX-512, AVX-512-BF16 and
# AMX: Bochs' Sapphire Rapids. Prints the program's output; the exit status is the program's.
#
#   tools/run_in_bochs.sh PROGRAM [ARGUMENT...]     arguments without spaces
#
# FLASH_ATTENTION_* variables pass into the program's environment.
#
# Bochs runs about 50 million instructions a second. It comes from Debian, with all it needs, into
# ${FLASH_ATTN_BOCHS_DIR:-~/.cache/flash_attn/bochs} (350 MB; nothing is installed and root is not needed). The host
# needs apt-get, the Debian archive's keys (package debian-archive-keyring), gcc, xorriso and script (bsdutils).
# FLASH_ATTN_BOCHS_CPU=corei7_skylake_x (AVX-512 alone), arrow_lake (AVX2), ... picks another of Bochs' CPUs;
# FLASH_ATTN_BOCHS_SECONDS limits the time (900).
set -eu
set -o pipefail
[ $# -ge 1 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
program=$(readlink -f "$1")
shift
here=$(dirname "$(readlink -f "$0")")/bochs
cache=${FLASH_ATTN_BOCHS_DIR:-$HOME/.cache/flash_attn/bochs}
suite=trixie  # Bochs 3.0

download() {
  echo "downloading Bochs, GRUB and what they need from Debian $suite into $cache" >&2
  local apt=$cache/apt
  mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$cache/root.new"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main" \
    > "$apt/sources.list"
  local options=(-qq -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts=- -o Dir::Etc::Preferences=-
                 -o Dir::Etc::PreferencesParts=- -o Dir::State::Lists="$apt/lists" -o Dir::State::Status=/dev/null
                 -o Dir::Cache="$apt" -o Dir::Cache::Archives="$apt/archives" -o Debug::NoLocking=1
                 -o APT::Install-Recommends=0 -o APT::Architecture=amd64 -o APT::Sandbox::User="$(id -un)")
  apt-get "${options[@]}" update >&2
  apt-get "${options[@]}" -y --download-only install bochs bochs-term bochsbios vgabios grub-common grub-pc-bin >&2
  for package in "$apt"/archives/*.deb; do dpkg -x "$package" "$cache/root.new"; done
  mv "$cache/root.new" "$cache/root"
  rm -r "$apt"
}
[ -d "$cache/root" ] || download

root=$cache/root
lib=$root/usr/lib/x86_64-linux-gnu
in_root() {  # program of the downloaded Debian, with that Debian's libraries
  "$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$@"
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A bootable CD: GRUB, our kernel, the program.
mkdir -p "$work/cd/boot/grub"
gcc -std=gnu11 -O2 -ffreestanding -fno-builtin -fno-pic -fno-stack-protector -mno-red-zone -mgeneral-regs-only -nostdlib \
  -static -no-pie -Wl,-T,"$here/kernel.ld" -Wl,--build-id=none -Wl,-z,max-page-size=4096 -Wl,--no-warn-rwx-segments \
  -o "$work/cd/boot/kernel" "$here/boot.S" "$here/kernel.c"
cp "$program" "$work/cd/boot/program"
printf 'multiboot /boot/kernel\nmodule /boot/program %s\nboot\n' "$(env | grep '^FLASH_ATTENTION_' | tr '\n' ' ') program $*" > "$work/cd/boot/grub/grub.cfg"
in_root "$root/usr/bin/grub-mkimage" -d "$root/usr/lib/grub/i386-pc" -O i386-pc-eltorito -p /boot/grub \
  -o "$work/cd/boot/eltorito.img" biosdisk iso9660 multiboot normal configfile boot
xorriso -as mkisofs -quiet -R -o "$work/boot.iso" -b boot/eltorito.img -no-emul-boot -boot-load-size 4 -boot-info-table \
  "$work/cd" 2> "$work/xorriso.log" || { cat "$work/xorriso.log" >&2; exit 1; }

cat > "$work/bochsrc" << END
config_interface: textconfig
display_library: term
romimage: file=$root/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=$root/usr/share/vgabios/vgabios.bin
cpu: model=${FLASH_ATTN_BOCHS_CPU:-sapphire_rapids}, count=1, ips=100000000, reset_on_triple_fault=0
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
touch "$work/serial"
tail -f -n +1 "$work/serial" &
follower=$!
# Bochs wants a terminal for its screen.
LTDL_LIBRARY_PATH=$lib/bochs/plugins BXSHARE=$root/usr/share/bochs TERM=xterm timeout "${FLASH_ATTN_BOCHS_SECONDS:-900}" \
  script -qfc "exec $lib/ld-linux-x86-64.so.2 --library-path $lib $root/usr/bin/bochs-bin -q -f $work/bochsrc" /dev/null \
  < /dev/null > "$work/screen" 2>&1 || true
sleep 0.2
kill $follower
wait $follower 2> /dev/null || true
status=$(sed -n 's/^exit status \([0-9]*\).*/\1/p' "$work/serial" | tail -1)
if [ -z "$status" ]; then
  echo "the program did not end; Bochs' log:" >&2
  tail -5 "$work/log" >&2
  exit 124
fi
exit "$status"
