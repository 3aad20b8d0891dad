"""Puts parts of a pinned package of the Python index into a repository of Bazel.

    fetch.py '<request as JSON>'

The request:
    name          of the folder in the cache, for people
    requirements  pip requirement lines with hashes
    kind          "sdist" or "wheel"
    take          {path or folder/ in the archive: path or folder/ below dest}
    dest          folder of the repository

The parts are unpacked once per user into ${XDG_CACHE_HOME:-~/.cache}/dsd, in a folder whose name carries a hash of the
request, and hard links to them (copies where the file systems differ) are put into the repository, so that clones and
embedding workspaces share one download and one copy on disk. A second process that wants the same folder waits.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile

LOCK_SECONDS = 1500
PIP_SECONDS = 1500
# Part of every cache key: raise it when the same request gives other files.
LAYOUT = 1


def cache_root():
  return os.path.join(
      os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dsd")


@contextlib.contextmanager
def locked(path):
  """Holds an advisory lock that dies with the process."""
  with open(path, "w") as lock:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if time.monotonic() > deadline:
          raise SystemExit("another process held %s for %d seconds" %
                           (path, LOCK_SECONDS))
        time.sleep(0.2)
    yield


def pip_download(requirements, kind, folder):
  """Downloads one file per requirement; pip refuses a file of another hash."""
  listing = os.path.join(folder, "requirements.txt")
  with open(listing, "w") as out:
    out.write("\n".join(requirements) + "\n")
  command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
             "--no-cache-dir", "--no-input", "--require-hashes",
             "--requirement", listing, "--dest", os.path.join(folder, "files")]
  if kind == "sdist":
    command += ["--no-binary", ":all:"]
  else:
    command += ["--only-binary", ":all:"]
  if kind == "wheel":
    command += ["--implementation", "cp", "--python-version", "3.11",
                "--abi", "cp311", "--abi", "none"]
    # pip compares platform tags as text, so each one is named.
    for minor in range(17, 29):
      command += ["--platform", "manylinux_2_%d_x86_64" % minor]
    command += ["--platform", "manylinux2014_x86_64"]
  done = subprocess.run(command, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, timeout=PIP_SECONDS,
                        check=False)
  if done.returncode:
    raise SystemExit("%s\nfailed with status %d:\n%s" % (
        " ".join(command), done.returncode,
        done.stdout.decode(errors="replace")))
  return sorted(glob.glob(os.path.join(folder, "files", "*")))


def target_of(member, take):
  """Where a member of an archive goes, or None."""
  for source in sorted(take, key=len, reverse=True):
    dest = take[source]
    if member == source:
      return dest
    if (not source or source.endswith("/")) and member.startswith(source):
      return dest if dest is None else dest + member[len(source):]
  return None


def members(archive):
  """Yields (name, mode, reader) of the plain files in a wheel or sdist."""
  if zipfile.is_zipfile(archive):
    with zipfile.ZipFile(archive) as wheel:
      for info in wheel.infolist():
        if not info.is_dir():
          yield (info.filename, info.external_attr >> 16,
                 functools.partial(wheel.open, info))
  else:
    with tarfile.open(archive) as sdist:
      for info in sdist:
        if info.isfile():
          yield (info.name, info.mode,
                 functools.partial(sdist.extractfile, info))


def unpack(archive, take, folder):
  for name, mode, reader in members(archive):
    target = target_of(name, take)
    if target is None:
      continue
    path = os.path.normpath(os.path.join(folder, target))
    if not path.startswith(folder + os.sep):
      raise SystemExit("%s leads out of its folder: %s" % (archive, name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with reader() as source, open(path, "wb") as out:
      shutil.copyfileobj(source, out, 1 << 20)
    # Read-only, since hard links share it.
    os.chmod(path, 0o555 if mode & 0o111 else 0o444)


def missing(folder, take):
  return [t for t in take.values()
          if t is not None and not os.path.lexists(os.path.join(folder, t))]


def cached(request):
  """The folder with the unpacked parts, made if need be."""
  recipe = {k: request[k] for k in ("requirements", "kind", "take")}
  recipe["layout"] = LAYOUT
  if request["kind"] == "own wheel":
    recipe["python"] = sys.implementation.cache_tag
  key = hashlib.sha256(
      json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
  root = os.path.join(cache_root(), "unpacked")
  os.makedirs(root, exist_ok=True)
  folder = os.path.join(root, "%s-%s" % (request["name"], key))
  with locked(folder + ".lock"):
    if os.path.isdir(folder):
      return folder
    for left_over in glob.glob(folder + ".part-*"):
      shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=os.path.basename(folder) + ".part-",
                                     dir=root) as work:
      parts = os.path.join(work, "parts")
      os.mkdir(parts)
      for archive in pip_download(request["requirements"], request["kind"],
                                  work):
        unpack(archive, request["take"], parts)
      absent = missing(parts, request["take"])
      if absent:
        raise SystemExit("not found in %s: %s" %
                         (request["requirements"], absent))
      os.rename(parts, folder)
  return folder


def link(source, target):
  try:
    os.link(source, target)
  except OSError:  # Another file system, or links that the system forbids.
    shutil.copy2(source, target)
  return target


def main():
  request = json.loads(sys.argv[1])
  shutil.copytree(cached(request), request["dest"], copy_function=link,
                  dirs_exist_ok=True)


if __name__ == "__main__":
  main()
