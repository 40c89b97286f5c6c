//! What stands under the options of `--help`: exit codes, explanations, examples.

pub(super) const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    the command failed; the message says why
  2    the command line was wrong
  10+  the VM ended by itself: see `cloudlet run --help`
  128+N  signal N ended the command; 141 is a reader of its output that has left";

pub(super) const RUN_HELP: &str = "\
Without --kernel the embedded guest boots. The disks' images are never written to: what the guest
writes goes to a copy-on-write layer that a snapshot or an overlay keeps, and that is gone with the
VM unless layer=FILE names it.

Options of --disk:
  ro           the guest may not write
  format=KIND  what the image is: raw or qcow2. Without, a name that ends with .qcow2 is one, all
               others are raw; a raw one that looks like qcow2 is refused. A qcow2 image must not
               refer to other files (`qemu-img convert` puts them into one)
  serial=TEXT  the disk's serial number (Linux shows /dev/disk/by-id/virtio-TEXT)
  layer=FILE   keep what the guest writes in FILE, which is made if it is not there; a later run
               with the same image goes on with it. What the guest has flushed survives a crash
  bandwidth=MIB, iops=N
               limits: MiB and requests a second, with a second's worth saved up. They are this
               host's: a restored VM has those of its own command line
A comma in a file's name is written twice.

Attached (without --detach) the terminal is the guest's serial console, and the VM ends with this
command: by Ctrl-], a signal, the end of the terminal, or of whoever reads the output. The end of an
input that is not a terminal ends nothing.

When the process of an imported image ends, so does the VM, and this command with the process's exit
code (128 and its number for a signal). A VM in the background is listed by `ps` with that code until
`stop` forgets it. `--json` tells the guest's code from the VM's own, in guest_code and exit_code.

Exit codes when the VM ended by itself:
  0   power-off by the guest, or stopped   10  reset by the guest
  11  triple fault                         12  KVM internal error
  13  KVM refused to enter the guest       14  an exit of KVM without use here
  15  the host failed the VM               159 seccomp violation

Examples:
  cloudlet run
  cloudlet run --image deb
  cloudlet run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --memory 512 --cpus 2
  cloudlet run --kernel app.elf --disk data.img,ro --name web --detach
  cloudlet run --kernel vmlinuz --disk debian.qcow2,layer=debian.layer --cmdline 'root=/dev/vda1'
  cloudlet run --disk root.img,layer=root.layer,serial=root --disk empty:512
  cloudlet run --image deb --net user --publish 8080:80 --publish 0.0.0.0:5353:53/udp
  cloudlet run --kernel vmlinuz --net tap=tap0,mac=02:00:00:00:00:01,bandwidth=100";

pub(super) const IMAGE_BUILD_HELP: &str = "\
The image is a directory with vmlinuz, initrd.img, root.ext4 and manifest.json. It is made of the
distribution's packages alone, which come from where this machine's apt gets them; the same versions
give the same bytes. It needs mmdebstrap, and root. DIR must not exist, and appears whole or not at
all.

The guest's network cards ask by DHCP. With --init systemd that is the service cloudlet-network, which
leaves a guest alone that has a network service of its own (NetworkManager, connman, dhcpcd; systemd-networkd
or ifupdown with a configuration).

Examples:
  cloudlet image build debian deb
  cloudlet image build debian py --include python3-minimal,python3-numpy --size 4096";

pub(super) const BALLOON_HELP: &str = "\
A guest with a balloon driver (Linux: virtio_balloon) gives memory above the target back to the host,
takes it back rather than run out of memory, and reports what it does not use without being asked.
Snapshots and overlays of a running VM leave its free memory out; a paused guest cannot be asked, so
make them while it runs.

Examples:
  cloudlet balloon web
  cloudlet balloon web --target 256";

pub(super) const IMAGE_IMPORT_HELP: &str = "\
Nothing is extracted on this machine: owners, device nodes and links go into the file system only,
and it takes no root. An archive may be compressed by gzip, zstd, xz or bzip2; `-` is standard input.
Of a container image (`skopeo copy docker://IMAGE oci:DIR`, the same as an archive, or `docker save`)
the hashes are checked, layers are applied in order, and its process is started with the image's
environment, directory and user once the guest is up. Of several images SOURCE:NAME is the one of
that name; of variants for one kind of machine the best that this CPU has is taken.

File capabilities and users' own attributes (user.*) are kept. Access control lists, SELinux labels and
other extended attributes are left out; which, and of how many files, is said at the end.

Without options kernel and initial RAM disk are those of the root file system's /boot, and its own
init runs. With --kernel-from they are Debian's, with an init that needs nothing of the root file system.

Examples:
  cloudlet image import rootfs.tar.gz alpine --kernel-from deb
  cloudlet image import oci-dir web --kernel-from deb --size 4096
  docker save web:1 | cloudlet image import - web --kernel-from deb
  cloudlet image import images.tar:web:1 web --kernel-from deb";

pub(super) const RESTORE_HELP: &str = "\
SOURCE is a snapshot directory, or the tag or id of a base VM. The VMs run in the background, share
the pages they do not change, and get names of their own. Network cards keep their addresses; those
that no --net connects have their link down. A card that was on an interface stays on one: its
driver has agreed to what `user` cannot do.

Examples:
  cloudlet restore /var/tmp/web-1 --name web
  cloudlet restore unikernel --name dev
  cloudlet restore /var/tmp/web-1 --clones 8
  cloudlet restore /var/tmp/web-1 --net tap=tap1";

pub(super) const SYNTHESIZE_HELP: &str = "\
The base VM that the overlay names must be in the store (`cloudlet base ls`). The VM runs as soon as
its machine state is there; pages that are missing are fetched as they are touched, and the command
returns when the VM runs (--wait: when the overlay is complete).

Examples:
  cloudlet synthesize fluid.overlay --name fluid
  cloudlet synthesize https://cloudlet.example/fluid.overlay --rate 38 --wait
  cloudlet synthesize http://10.0.0.2:8080/fluid.overlay --no-early-start";

pub(super) const STOP_HELP: &str = "\
The guest is not asked: `cloudlet shutdown` does that. What it wrote to named layers is flushed, unless
the VM does not answer and its process is killed.

Examples:
  cloudlet stop web
  cloudlet stop web --timeout 5
  cloudlet stop web --force";

pub(super) const EXEC_HELP: &str = "\
Needs the agent in the guest. The command's standard input, output and error are those of this one;
SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed on to its process group, which ends when this command
ends: with --tty on a terminal, whose keys are signals enough, these signals end this command. It runs
as the agent's user (root) with a small environment, in the root directory. In a loop that reads a list,
--no-stdin (-n) keeps the command from taking the rest of it.

Exit codes:
  the command's own, or 128 and its signal
  125  this command failed; the message says why
  126  the command cannot be run
  127  there is no such command

Examples:
  cloudlet exec web -- uname -a
  cloudlet exec --wait 30 web -- systemctl is-system-running --wait
  cloudlet exec web --cwd /srv --env DEBUG=1 -- ./server --port 80
  cloudlet exec -t web -- bash
  tar c dir | cloudlet exec web -- tar x -C /srv
  while read -r unit; do cloudlet exec -n web -- systemctl restart \"$unit\"; done < units";

pub(super) const CP_HELP: &str = "\
One of the two is in the guest, as VM:PATH, and needs the agent there; a path on the host with a colon
in it is written ./a:b. A directory is copied with all that is in it. If DST is a directory, the copy
is made in it; otherwise it gets that name. DIR/. stands for what is in DIR.

Modes, times of change and capabilities of files are kept (from a guest without capabilities, set-user-ID
and such); owners and other extended attributes are not, and how many files had some is said. Links
are copied as links, devices and sockets are left out. A file appears under its name when it is whole.

A file in the place of another keeps that one's owner and mode (and fails where this user may not set
them); a link in its place is replaced and not followed, unless it is DST and leads to a directory. A
device, pipe or socket is not replaced.

Examples:
  cloudlet cp server.conf web:/etc/
  cloudlet cp web:/var/log ./logs
  cloudlet cp site/. web:/srv/www";

pub(super) const SYNC_HELP: &str = "\
What the guest has deleted, and what it only caches, need not be in a snapshot or an overlay. Needs the
agent in the guest.

Example:
  cloudlet sync web && cloudlet snapshot web /var/tmp/web-1";

pub(super) const CALL_HELP: &str = "\
Requests of `fluid`:   frame TANK [WIDTH HEIGHT] | poke TANK X Y FORCE | stats
Requests of `object`:  recognise (with --attach IMAGE or --sample N) | stats
Any application:       verify

Examples:
  cloudlet call dev frame 3 --save frame.png
  cloudlet call dev recognise --sample 12";
