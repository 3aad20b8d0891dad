# SPDX-License-Identifier: Apache-2.0
"""The client of c10d's TCPStore against PyTorch's own servers, the old one and the one of libuv.

usage: c10d_store_test.py <c10d_store_probe>
"""

import datetime
import os
import subprocess
import sys

from torch.distributed import TCPStore

PATIENCE = datetime.timedelta(seconds=40)


def check(probe, use_libuv):
  store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=use_libuv, timeout=PATIENCE)
  store.set("early", "from Python")
  store.set("large", b"x" * ((1 << 20) + 1))
  process = subprocess.Popen([probe, str(store.port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  store.wait(["waiting"], PATIENCE)
  assert store.get("waiting") == b"a\0\xff\n b", store.get("waiting")
  assert store.get("probe") == b"x" * 100000
  store.set("late", "later")
  store.wait(["bye"], PATIENCE)
  del store  # and with it the server, while the probe waits
  output, _ = process.communicate(timeout=PATIENCE.total_seconds())
  assert process.returncode == 0, output
  print("libuv" if use_libuv else "without libuv", output.strip())


def main():
  for use_libuv in (True, False):
    check(sys.argv[1], use_libuv)
  sys.stdout.flush()
  os._exit(0)


if __name__ == "__main__":
  main()
