// SPDX-License-Identifier: Apache-2.0
//
// Safetensors files beside Python's safetensors, archives beside torch.save, in
// the same run and on the same disk. Fails if anything comes out wrong.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "dsd/core/layout/layout.h"
#include "dsd/core/transfer/endpoint.h"
#include "dsd/frontends/checkpoint/checkpoint.h"
#include "dsd/frontends/checkpoint/convert.h"
#include "dsd/frontends/checkpoint/export.h"
#include "dsd/testing/benchmarks/measure.h"
#include "nlohmann/json.hpp"

namespace dsd {
namespace {

using Json = nlohmann::json;

constexpr int kTensors = 32;
constexpr int kRuns = 3;

bool same = true;  // whether all that came out is right

void Row(const std::string& what, const Json& theirs, const Seconds& ours) {
  const double wall = theirs["wall"].get<double>();
  absl::PrintF(
      "%s: Python %.3f s (CPU %.3f), dsd %.3f s (CPU %.3f), ratio %.2fx\n",
      what, wall, theirs["cpu"].get<double>(), ours.wall, ours.cpu,
      wall / ours.wall);
  std::fflush(stdout);
}

void Verdict(const std::string& what, bool right) {
  same &= right;
  if (!right) absl::PrintF("    %s: NOT RIGHT\n", what);
}

// Element i of tensor t is i + t, in float32; as in formats_peer.py.
struct Tensors {
  std::vector<std::vector<float>> buffers;
  MemoryEndpoint endpoint;
  checkpoint::State state;

  Tensors(int64_t elements, bool filled) : buffers(kTensors) {
    for (int t = 0; t < kTensors; ++t) {
      buffers[t].resize(elements);
      for (int64_t i = 0; i < elements && filled; ++i) {
        buffers[t][i] = static_cast<float>(i + t);
      }
      if (!endpoint
               .AddLocal({absl::StrCat("t", t), DType::kFloat32,
                          Layout::Replicated({elements / 1024, 1024}, {0})},
                         0, reinterpret_cast<std::byte*>(buffers[t].data()))
               .ok()) {
        std::exit(1);
      }
    }
    state.tensors = &endpoint;
  }

  bool operator==(const Tensors& other) const {
    return buffers == other.buffers;
  }
};

// What the disk reaches at most, past the page cache; 0: it has no such writes.
double DirectWriteSeconds(const std::string& path, int64_t bytes) {
  constexpr int64_t kPiece = int64_t{8} << 20;
  void* memory = nullptr;
  if (posix_memalign(&memory, 4096, kPiece) != 0) return 0;
  std::memset(memory, 1, kPiece);
  bool done = true;
  const Seconds seconds = LeastOf(
      kRuns, [&] { std::filesystem::remove(path); },
      [&] {
        const int fd =
            open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT, 0600);
        for (int64_t at = 0; at < bytes; at += kPiece) {
          done &= pwrite(fd, memory, kPiece, at) == kPiece;
        }
        done &= fsync(fd) == 0;
        close(fd);
      });
  std::filesystem::remove(path);
  std::free(memory);
  return done ? seconds.wall : 0;
}

void WriteAndRead(const std::string& peer, const std::string& directory,
                  checkpoint::Format format, int64_t elements) {
  const bool archive = format == checkpoint::Format::kTorchArchive;
  const std::string suffix = archive ? ".pt" : ".safetensors";
  const std::string number =
      archive ? "    torch.save archive, " : "18. safetensors, ";
  const std::string ours = absl::StrCat(directory, "/dsd", suffix);
  const std::string theirs = absl::StrCat(directory, "/python", suffix);
  const int64_t bytes = elements * kTensors * 4;
  const Json python = RunPeer(
      absl::StrCat(peer, " write ", theirs, " ", kTensors, " ", elements));
  Tensors source(elements, true);
  const Seconds write = LeastOf(
      kRuns, [&] { std::filesystem::remove(ours); },
      [&] { Must(checkpoint::Export(ours, format, source.state)); });
  Row(number + "durable write", python["durable"], write);
  absl::PrintF(
      "    Python without fsync: %.3f s, of which dsd's write is %.2fx\n",
      python["write"]["wall"].get<double>(),
      python["write"]["wall"].get<double>() / write.wall);
  const double direct = DirectWriteSeconds(directory + "/raw", bytes);
  if (direct > 0) {
    absl::PrintF("    %.2f GB/s; past the page cache %.2f GB/s: %.2f of it\n",
                 static_cast<double>(bytes) / write.wall / 1e9,
                 static_cast<double>(bytes) / direct / 1e9,
                 direct / write.wall);
  }
  // Each reads what the other wrote, too.
  const auto read_all = [&](const std::string& path) {
    return RunPeer(
        absl::StrCat(peer, " read ", path, " ", kTensors, " ", elements));
  };
  const Json read_theirs = read_all(theirs);
  const Json read_ours = read_all(ours);
  Verdict("Python's reading",
          read_theirs["right"].get<bool>() && read_ours["right"].get<bool>());
  Tensors target(elements, false);
  for (const std::string& path : {ours, theirs}) {
    const Seconds read = LeastOf(
        kRuns, [] {}, [&] { Must(checkpoint::Load(path, target.state)); });
    Row(absl::StrCat(number, "read of ", path == ours ? "dsd's" : "Python's"),
        path == ours ? read_ours["read"] : read_theirs["read"], read);
    Verdict("what was read", target == source);
  }
}

void ConvertAll(const std::string& directory, int64_t elements) {
  checkpoint::ConvertOptions options;
  options.overwrite = true;
  for (const std::string to : {"c.pt", "c.safetensors"}) {
    const double before = PeakMiB();
    const Seconds seconds = LeastOf(
        kRuns, [] {},
        [&] {
          Must(checkpoint::Convert(directory + "/python.safetensors",
                                   absl::StrCat(directory, "/", to), options));
        });
    absl::PrintF(
        "    convert to %s: %.3f s (CPU %.3f), %.2f GB/s, %.0f MiB "
        "more\n",
        to, seconds.wall, seconds.cpu,
        static_cast<double>(elements * kTensors * 4) / seconds.wall / 1e9,
        PeakMiB() - before);
  }
}

int Main(int argc, char** argv) {
  CommandLine line("Safetensors and torch.save archives beside PyTorch");
  std::string root = "/tmp";
  line.app.add_option("--directory", root, "where files are written");
  CLI11_PARSE(line.app, argc, argv);
  const std::string peer = line.peer();
  int64_t elements = (int64_t{1} << 30) / 4 / kTensors;
  if (line.quick) elements /= 16;
  const std::string directory =
      absl::StrCat(root, "/formats_benchmark_", getpid());
  std::filesystem::create_directories(directory);
  absl::PrintF("%d tensors, %.2f GiB, least of %d runs, warm page cache\n",
               kTensors,
               static_cast<double>(elements * kTensors * 4) / (1 << 30), kRuns);
  // First: the others fill the memory that it is to do without.
  WriteAndRead(peer, directory, checkpoint::Format::kSafetensors, elements);
  WriteAndRead(peer, directory, checkpoint::Format::kTorchArchive, elements);
  ConvertAll(directory, elements);
  std::filesystem::remove_all(directory);
  return same ? 0 : 1;
}

}  // namespace
}  // namespace dsd

int main(int argc, char** argv) { return dsd::Main(argc, argv); }
