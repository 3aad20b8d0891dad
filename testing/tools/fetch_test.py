#!/usr/bin/env python3
"""Tests of third_party/bazel/fetch.py, without a network. Argument: fetch.py."""

import importlib.util
import io
import os
import sys
import tarfile
import tempfile
import threading
import unittest
import zipfile

FETCH = sys.argv.pop(1)

FILES = {"pkg/include/a.h": b"a", "pkg/lib/run": b"run", "other": b"o"}


def load():
  spec = importlib.util.spec_from_file_location("fetch", FETCH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def wheel(path):
  with zipfile.ZipFile(path, "w") as out:
    for name, data in FILES.items():
      info = zipfile.ZipInfo(name)
      info.external_attr = (0o100755 if name.endswith("run") else 0o100644) << 16
      out.writestr(info, data)
  return path


def sdist(path):
  with tarfile.open(path, "w:gz") as out:
    for name, data in FILES.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      info.mode = 0o755 if name.endswith("run") else 0o644
      out.addfile(info, io.BytesIO(data))
  return path


class FetchTest(unittest.TestCase):

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = folder.name
    os.environ["XDG_CACHE_HOME"] = os.path.join(self.folder, "cache")
    self.fetch = load()
    self.downloads = 0
    self.fetch.pip_download = self.download

  def download(self, requirements, kind, folder):
    del requirements
    self.downloads += 1
    make = sdist if kind == "sdist" else wheel
    return [make(os.path.join(folder, "archive"))]

  def request(self, kind="wheel", **take):
    return {"name": "pkg-1", "requirements": ["pkg==1"], "kind": kind,
            "take": take or {"pkg/include/": "include/"}}

  def tree(self, root):
    return sorted(os.path.relpath(os.path.join(folder, name), root)
                  for folder, _, names in os.walk(root) for name in names)

  def test_takes_what_is_asked_for(self):
    for kind in ("wheel", "sdist"):
      request = self.request(kind, **{"pkg/": "p/", "pkg/include/": None,
                                      "other": "renamed"})
      folder = self.fetch.cached(request)
      self.assertEqual(self.tree(folder), ["p/lib/run", "renamed"])
      self.assertEqual(os.stat(folder + "/p/lib/run").st_mode & 0o777, 0o555)
      self.assertEqual(os.stat(folder + "/renamed").st_mode & 0o777, 0o444)

  def test_takes_everything(self):
    folder = self.fetch.cached(self.request(**{"": "site/"}))
    self.assertEqual(self.tree(folder), sorted("site/" + f for f in FILES))

  def test_a_second_call_downloads_nothing(self):
    first = self.fetch.cached(self.request())
    self.assertEqual(self.fetch.cached(self.request()), first)
    self.assertEqual(self.downloads, 1)
    self.fetch.cached(self.request(**{"pkg/lib/": "lib/"}))
    self.assertEqual(self.downloads, 2)

  def test_something_missing_is_an_error_and_leaves_nothing(self):
    with self.assertRaisesRegex(SystemExit, "not found in .*nothing.h"):
      self.fetch.cached(self.request(**{"pkg/nothing.h": "nothing.h"}))
    root = os.path.join(self.folder, "cache", "dsd", "unpacked")
    self.assertEqual([n for n in os.listdir(root) if not n.endswith(".lock")],
                     [])

  def test_nothing_is_written_outside(self):
    FILES["pkg/../../evil"] = b"e"
    self.addCleanup(FILES.pop, "pkg/../../evil")
    with self.assertRaisesRegex(SystemExit, "leads out"):
      self.fetch.cached(self.request(**{"pkg/": "p/"}))

  def test_left_overs_of_a_killed_process_are_removed(self):
    folder = self.fetch.cached(self.request())
    os.rename(folder, folder + ".part-killed")
    self.assertEqual(self.fetch.cached(self.request()), folder)
    self.assertFalse(os.path.exists(folder + ".part-killed"))

  def test_of_two_at_once_one_downloads(self):
    threads = [threading.Thread(target=self.fetch.cached,
                                args=(self.request(),)) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertEqual(self.downloads, 1)

  def test_links_and_falls_back_to_copies(self):
    source = self.fetch.cached(self.request()) + "/include/a.h"
    target = os.path.join(self.folder, "linked")
    self.fetch.link(source, target)
    self.assertTrue(os.path.samefile(source, target))
    self.fetch.os = type("NoLinks", (), {"link": self.no_link})
    target = os.path.join(self.folder, "copied")
    self.fetch.link(source, target)
    with open(target, "rb") as copied:
      self.assertEqual(copied.read(), b"a")

  @staticmethod
  def no_link(source, target):
    raise OSError("no links between %s and %s" % (source, target))


if __name__ == "__main__":
  unittest.main()
