"""What a hostile text could try, for `situations`: (name, the layer that must stop it, code).

The code is the body of a function that returns whether it got through; an exception means that it
did not. It finds `os`, `socket`, `ctypes`, `errno`, `struct`, `libc`, `call(name, *arguments)` for
a system call by name, and P, with paths, ports and processes that the test made for it.
"""

FILES, NAMES, NETWORK = "files", "own file system", "network"
CALLS, OTHERS = "system calls", "processes"

# Reading: ways to read, and what there is to read.
_READS = {
  "open": "return len(open({0}, 'rb').read(1)) >= 0",
  "os.open": "return os.open({0}, os.O_RDONLY) >= 0",
  "libc.open": "return libc.open(os.fsencode({0}), 0) >= 0",
  "cat": "return os.system('cat ' + {0} + ' > got') == 0",
  "link": "os.link({0}, 'linked'); return True",
  "rename": "os.rename({0}, 'renamed'); return True",
}
_READ = {
  "a key": "P['key']",
  "a file for all": "P['public']",
  "passwd": "'/etc/passwd'",
  "the trainer's environment": "'/proc/%d/environ' % P['trainer']",
  "the trainer's files": "'/proc/%d/root/etc/passwd' % P['trainer']",
}
PAYLOADS = [
  (f"read {what} by {way}", FILES, code.format(path))
  for what, path in _READ.items()
  for way, code in _READS.items()
]

# Changing: the calls that write, and those that change what may only be read.
for name, code in {
  "write": "open({0}, 'r+').write('x')",
  "append": "open({0}, 'a').write('x')",
  "truncate": "os.truncate({0}, 0)",
  "unlink": "os.unlink({0})",
  "replace": "open('new', 'w').close(); os.rename('new', {0})",
  "chmod": "os.chmod({0}, 0o777)",
  "fchmod": "os.fchmod(os.open({0}, os.O_RDONLY), 0o777)",
  "chown": "os.chown({0}, os.getuid(), os.getgid())",
  "utime": "os.utime({0}, (0, 0))",
  "setxattr": "os.setxattr({0}, 'user.x', b'x')",
  "fsetxattr": "os.setxattr(os.open({0}, os.O_RDONLY), 'user.x', b'x')",
  "lock": "__import__('fcntl').fcntl(os.open({0}, os.O_RDONLY), 1024, 0)",
}.items():
  for what in ("key", "public", "reward"):
    if not (what == "reward" and name == "lock"):
      PAYLOADS.append((f"{name} {what}", FILES, code.format(f"P[{what!r}]") + "; return True"))
for name, code in {
  "create": "open({0} + '/made', 'w').close()",
  "mkdir": "os.mkdir({0} + '/made')",
  "symlink": "os.symlink('/', {0} + '/made')",
  "mkfifo": "os.mkfifo({0} + '/made')",
  "rmdir": "os.rmdir({0} + '/empty')",
  "chmod 0000": "os.chmod({0}, 0)",
  "list": "os.listdir({0})",
}.items():
  PAYLOADS.append(
    (f"{name} in a directory", FILES, code.format("P['directory']") + "; return True")
  )
for name, code in {
  "stat": "os.stat({0})",
  "lstat": "os.lstat({0})",
  "access": "return os.access({0}, os.F_OK)",
  "chdir": "os.chdir(P['directory'])",
  "O_PATH": "os.open({0}, os.O_PATH)",
  "statvfs": "os.statvfs({0})",
}.items():
  PAYLOADS.append((f"{name} of a key", NAMES, code.format("P['key']") + "; return True"))

PAYLOADS.append(("map /dev/zero", FILES, "return os.open('/dev/zero', os.O_RDONLY) >= 0"))

# Sockets.
_CONNECT = "s = socket.socket({}, {}); s.settimeout(1); s.connect({}); return True"
for name, code in {
  "UNIX stream by path": _CONNECT.format("socket.AF_UNIX", "1", "P['stream']"),
  "UNIX datagram by path": _CONNECT.format("socket.AF_UNIX", "2", "P['datagram']"),
  "UNIX by abstract name": _CONNECT.format("socket.AF_UNIX", "1", "P['abstract']"),
  "UNIX by the shell": "return os.system('exec 3<>' + P['stream']) == 0",
  "UNIX datagram of a pair": "a, b = socket.socketpair(type=2); a.sendto(b'x', P['datagram']);"
  " return True",
  "UNIX stream of a pair": "a, b = socket.socketpair(); b.close(); a.connect(P['stream']);"
  " return True",
  "TCP": _CONNECT.format("socket.AF_INET", "1", "('127.0.0.1', P['tcp'])"),
  "TCP 6": _CONNECT.format("socket.AF_INET6", "1", "('::1', P['tcp'])"),
  "UDP": "socket.socket(type=2).sendto(b'x', ('127.0.0.1', P['udp'])); return True",
  "listen": "s = socket.socket(); s.bind(('', 0)); s.listen(); return True",
  "http": "import http.client as h; h.HTTPConnection('127.0.0.1', P['tcp'], timeout=1).connect();"
  " return True",
}.items():
  PAYLOADS.append((name, NETWORK, code))
_FAMILIES = {"vsock": 40, "netlink": 16, "packet": 17, "alg": 38, "bluetooth": 31, "can": 29}
_FAMILIES |= {"tipc": 30, "xdp": 44, "rds": 21, "kcm": 41, "smc": 43, "qrtr": 42}
for name, family in _FAMILIES.items():  # A refused socket() is all that is asked for.
  code = f"return any(libc.socket({family}, kind, 0) >= 0 for kind in (1, 2, 3, 5))"
  PAYLOADS.append((f"a socket of {name}", NETWORK, code))

# What outlives a process or belongs to others.
for name, code in {
  "add_key": "return call('add_key', b'user', b'x', b'x', 1, -4) >= 0",
  "keyctl": "return call('keyctl', 0, -4, 1) >= 0",
  "keyctl join": "return call('keyctl', 1, 0) >= 0",
  "request_key": "call('request_key', b'user', b'x', 0, 0); return ctypes.get_errno() != 1",
  "shmget": "return call('shmget', 0, 4096, 0o1600) >= 0",
  "semget": "return call('semget', 0, 1, 0o1600) >= 0",
  "msgget": "return call('msgget', 0, 0o1600) >= 0",
  "mq_open": "return call('mq_open', b'rl', 0o102, 0o600, 0) >= 0",
  "memfd_create": "return call('memfd_create', b'x', 0) >= 0",
  "memfd_secret": "return call('memfd_secret', 0) >= 0",
  "shared memory of no file": "return len(__import__('mmap').mmap(-1, 4096)) > 0",
  "mmap shared": "return libc.syscall(ctypes.c_long(NUMBERS['mmap']), None, ctypes.c_long(4096), 3,"
  " 0x23, -1, ctypes.c_long(0)) != -1",
  "io_uring": "return call('io_uring_setup', 1, bytes(120)) >= 0",
  "userfaultfd": "return call('userfaultfd', 1) >= 0",
  "perf": "return call('perf_event_open', b'\\1\\0\\0\\0\\x80' + bytes(123), 0, -1, -1, 0) >= 0",
  "bpf": "return call('bpf', 0, struct.pack('=IIII', 2, 4, 4, 1) + bytes(64), 72) >= 0",
  "new user namespace": "return call('unshare', 0x10000000) == 0",
  "new network": "return call('unshare', 0x40000000) == 0",
  "new mounts": "return call('unshare', 0x20000) == 0",
  "clone with a namespace": "return call('clone', 0x10000011, 0, 0, 0, 0) > 0",
  "clone3 with one": "return call('clone3', struct.pack('=Q', 1 << 28) + bytes(56), 64) > 0",
  "setns": "return call('setns', os.open('/proc/1/ns/net', 0), 0) == 0",
  "mount": "return call('mount', b'none', b'.', b'tmpfs', 0, 0) == 0",
  "umount": "return call('umount2', b'/tmp', 2) == 0",
  "chroot": "os.chroot('.'); return True",
  "open_tree": "return call('open_tree', -100, b'/', 1) >= 0",
  "handle": "return call('open_by_handle_at', -100, struct.pack('=Ii', 8, 1) + bytes(8), 0) >= 0",
  "TIOCSTI": "return __import__('fcntl').ioctl(0, 0x5412, b'x') == 0",
  "personality": "return call('personality', 0x0400000) != -1",
  "hostname": "socket.sethostname('x'); return True",
  "kernel log": "return call('syslog', 10, 0, 0) >= 0",
  "F_SETOWN": "return __import__('fcntl').fcntl(os.pipe()[0], 8, P['trainer']) == 0",
  "become root": "os.setuid(0); return os.path.exists('/root') and bool(os.listdir('/root'))",
  "all capabilities": "return libc.capset(struct.pack('=Ii', 0x20080522, 0), b'\\xff' * 24) == 0",
}.items():
  PAYLOADS.append((name, CALLS, code))

# Other processes: the trainer, and the worker that a call runs under.
for who in ("P['trainer']", "os.getppid()"):
  for name, code in {
    "kill": "os.kill({0}, 9)",
    "stop": "os.kill({0}, 19)",
    "kill its group": "os.killpg(os.getpgid({0}), 9)",
    "ptrace": "return call('ptrace', 0x4206, {0}, 0, 0) == 0",
    "read memory": "return open('/proc/%d/mem' % {0}, 'rb').seek(4096) > 0",
    "process_vm_readv": "return call('process_vm_readv', {0}, 0, 0, 0, 0, 0) == 0",
    "pidfd_getfd": "return call('pidfd_getfd', os.pidfd_open({0}), 0, 0) >= 0",
    "prlimit": "return call('prlimit64', {0}, 7, struct.pack('=QQ', 3, 3), 0) == 0",
    "setpriority": "os.setpriority(0, {0}, 19)",
    "setaffinity": "os.sched_setaffinity({0}, [0])",
  }.items():
    layer = OTHERS if "trainer" in who and name in ("kill", "stop", "kill its group") else CALLS
    layer = FILES if name == "read memory" else layer  # /proc/<process>/mem
    if "getppid" in who and name in ("kill", "stop"):
      continue  # Process 1 of a namespace gets none of these: they return and do nothing.
    text = code.format(who)
    text += "" if "return" in text else "; return True"
    PAYLOADS.append((f"{name} {who}", layer, text))

_ORPHAN = """if os.fork() == 0:
  os.setsid()
  if os.fork() == 0:
    import time
    time.sleep(0.3)
    open(P['marker'], 'w').close()
    time.sleep(30)
  os._exit(0)"""

# A pair each: what the first leaves, the second must not find.
PAIRS = {
  "a file": ("open('left', 'w').close()", "return 'left' in os.listdir('.')"),
  "a deep tree": ("os.makedirs('d/' * 40 + 'e')", "return 'd' in os.listdir('.')"),
  "a tree deeper than Python recurses": (
    "for _ in range(1100): os.mkdir('d'); os.chdir('d')",
    "return 'd' in os.listdir('.')",
  ),
  "a directory that may not be listed": (
    "os.mkdir('u', 0o300); open('u/x', 'w').close()",
    "return 'u' in os.listdir('.')",
  ),
  "a directory made under a mask": (
    "os.umask(0o477); os.mkdir('m'); open('m/x', 'w').close()",
    "return 'm' in os.listdir('.')",
  ),
  "a closed directory": ("os.mkdir('c'); os.chmod('.', 0)", "return 'c' in os.listdir('.')"),
  "shared memory": ("open(P['shared'], 'w').close()", "return os.path.exists(P['shared'])"),
  "a module": ("import json; json.left = 1", "import json; return hasattr(json, 'left')"),
  "a variable": ("os.environ['LEFT'] = '1'", "return 'LEFT' in os.environ"),
  "a limit": (
    "call('prlimit64', os.getppid(), 7, struct.pack('=QQ', 9, 9), 0)",
    "import resource; return resource.getrlimit(7)[0] < 200",
  ),
  "niceness": ("os.nice(5)", "return os.nice(0) != P['nice']"),
  "an orphan": (_ORPHAN, "import time; time.sleep(0.6); return os.path.exists(P['marker'])"),
}
